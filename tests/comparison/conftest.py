"""What all tests of comparisons share."""

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def _libraries():
    """Load the large libraries first, and let no collection after a run look through them: a third of a second each."""
    import pandas  # noqa: F401
    import peft  # noqa: F401

    gc.freeze()
