"""A part of `tests/fuzz.py` that the suite has time for."""

from tests import fuzz


def test_damaged_files_give_one_line():
    counts, wrong = fuzz.main(180)
    assert not wrong
    assert all(counts[kind, "one line"] > 10 for kind in ("statistics", "plan", "adapter"))  # negative: much is noticed
