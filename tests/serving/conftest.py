"""What all tests of serving share."""

import pytest

from tests.conftest import tiny_llama


@pytest.fixture
def base(tmp_path):
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "base")
    return tmp_path / "base"
