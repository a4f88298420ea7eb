"""What all tests of comparisons share."""

import gc

import pytest

from tests.comparisons import make_home


@pytest.fixture(scope="session", autouse=True)
def _libraries():
    """Load the large libraries first, and let no collection after a run look through them: a third of a second each."""
    import pandas  # noqa: F401
    import peft  # noqa: F401

    gc.freeze()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("comparison"))
