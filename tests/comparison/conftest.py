"""What all tests of comparisons share."""

import pytest

from tests.comparisons import make_home


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("comparison"), num_hidden_layers=1)
