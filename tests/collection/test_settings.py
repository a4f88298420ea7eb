"""What a file says of a pass: by what two are compared, and how far one came."""

import pytest

from lora_init.collection.settings import Position, read_settings
from lora_init.statistics.statistics import Provenance

MADE = Provenance(
    "m", "C", "f", "all-linear", data="d", task_type="T", center=False, token_mask="labels", seed=3, rank=4, n_batches=5
)


def test_passes_are_compared_by_these_settings_in_this_order():
    made = Provenance(**{**vars(MADE), "settings": {"rho": 2.0, "rank": "shadowed"}, "gradients": True})
    assert read_settings(made) == {
        "fingerprint": "f", "rho": 2.0, "rank": 4, "center": False, "token_mask": "labels", "seed": 3,
        "gradients": True, "task_type": "T", "data": "d",
    }  # fmt: skip
    assert next(iter(read_settings(made))) == "fingerprint"


def test_an_older_file_has_used_its_batches():
    assert Position.of(MADE) == Position(None, None, False, [5], 0)
    settings = {"first_batch": "a", "batches": "b", "common_loader": True, "used": [1, 2], "bad_batches": 3, "rho": 2.0}
    made = Provenance(**{**vars(MADE), "settings": settings})
    assert Position.of(made) == Position("a", "b", True, [1, 2], 3)


@pytest.mark.parametrize(("one", "other", "differ"), [
    (("a", None), ("a", None), False),
    (("a", None), ("b", None), True),
    (("a", "x"), ("a", "y"), True),
    (("a", "x"), ("b", "x"), True),
    (("a", "x"), ("a", None), False),  # what one does not know says nothing
    ((None, "x"), ("a", "x"), False),
    ((None, "x"), ("a", "y"), True),
    ((None, None), ("a", "y"), False),
])  # fmt: skip
def test_data_are_others_where_both_know_it(one, other, differ):
    assert Position(*one).is_in_other_data(Position(*other)) is differ
    assert Position(*other).is_in_other_data(Position(*one)) is differ


@pytest.mark.parametrize(("earlier", "later", "used"), [
    ([2], [3], [5]), ([], [3], [3]), ([2], [], [2]), ([1, 2], [3, 4], [4, 6]), ([1], [3, 4], [4, 4]),
])  # fmt: skip
def test_what_both_parts_of_a_pass_used_adds_up(earlier, later, used):
    found = Position("a", "b", True, later, 1).after(Position("x", "y", False, earlier, 2))
    assert found == Position("a", "b", True, used, 3)
