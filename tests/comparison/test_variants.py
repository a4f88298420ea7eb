"""A start and how it is run: each way has one name, which is read as it is written, and says what the start is."""

import pytest

from lora_init.comparison.variants import Variant, by_batches
from tests.conftest import refused

NAMES = {
    "eva": Variant("eva"),
    "eva+32-alpha": Variant("eva", alpha=32),
    "eva+10-batches": Variant("eva", batches=10),
    "eva+120-steps": Variant("eva", steps=120),
    "eva+equal-parameters": Variant("eva", equal_parameters=True),
    "eva+32-alpha+16-batches+9-steps+equal-parameters": Variant("eva", 32, 16, 9, True),
    "mine+yours+4-steps": Variant("mine+yours", steps=4),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_as_it_is_written(name):
    assert Variant.parse(name) == NAMES[name] and str(NAMES[name]) == name
    assert Variant.parse(name).is_plain == (name == "eva")


@pytest.mark.parametrize("name", ["eva+0-batches", "eva+08-steps", "eva+-3-alpha", "eva+4-alpha ", "eva+4-alphas",
                                  "4-alpha", "eva+4-alpha\n"])  # fmt: skip
def test_what_is_no_way_to_run_a_start_is_a_part_of_its_name(name):
    assert Variant.parse(name) == Variant(name)


@pytest.mark.parametrize("twice", ["eva+4-steps+9-steps", "eva+equal-parameters+8-alpha+equal-parameters"])
def test_a_way_is_said_once(twice):
    refused(f"^start '{twice.replace('+', '.')}': what follows a plus can be said once", Variant.parse, twice)


@pytest.mark.parametrize(("name", "has_recipe", "is_ours", "changes_base"), [
    ("eva", True, True, False), ("eva-rho2", True, True, False), ("lora-ga", True, True, True),
    ("pissa", False, True, True), ("full", False, True, True), ("bank-nearest", False, True, False),
    ("mine", False, False, False), ("eva+", False, False, False),
])  # fmt: skip
def test_what_is_known_of_a_start_is_that_of_its_base(name, has_recipe, is_ours, changes_base):
    for ways in ({}, {"alpha": 8, "steps": 3}):
        variant = Variant(name, **ways)
        known = (variant.recipe is not None, variant.start is not None, variant.changes_base)
        assert known == (has_recipe, is_ours, changes_base)


@pytest.mark.parametrize(("name", "differs"), [
    ("random", (False, False)), ("eva", (False, False)), ("eva-rho2", (True, False)), ("eva-ranks", (False, False)),
    ("random-frozen-a", (True, True)), ("eva-frozen-a+8-alpha", (True, True)), ("pissa", (False, False)),
    ("eva-rho2+equal-parameters", (False, False)), ("eva-frozen-a+equal-parameters", (False, False)),
    ("full", (False, False)), ("mine", (False, False)),
])  # fmt: skip
def test_a_start_has_another_number_of_parameters_where_ranks_move_or_a_is_frozen(name, differs):
    assert tuple(Variant.parse(name).differs_in_parameters(same) for same in (False, True)) == differs


@pytest.mark.parametrize(("numbers", "expected"), [
    ([4], "random pissa mine full eva eva+8-batches eva-ranks+3-alpha"),
    ([4, 16], "random pissa mine full eva+4-batches eva+16-batches eva+8-batches eva-ranks+3-alpha+4-batches "
     "eva-ranks+3-alpha+16-batches"),
    ([16, 4, 9], "random pissa mine full eva+16-batches eva+4-batches eva+9-batches eva+8-batches "
     "eva-ranks+3-alpha+16-batches eva-ranks+3-alpha+4-batches eva-ranks+3-alpha+9-batches"),
])  # fmt: skip
def test_a_start_from_data_is_run_with_each_of_several_numbers_of_batches(numbers, expected):
    starts = map(Variant.parse, ("random", "pissa", "mine", "full", "eva", "eva+8-batches", "eva-ranks+3-alpha"))
    assert " ".join(map(str, by_batches(starts, numbers))) == expected


@pytest.mark.parametrize(("name", "options"), [
    ("bank-nearest", ["--method", "from-bank", "--by", "nearest", "--bank", "BANK"]),
    ("bank-nearest+8-alpha", None), ("pissa", None),
])  # fmt: skip
def test_init_makes_a_start_from_a_bank_as_it_is(name, options):
    assert Variant.parse(name).init_options() == options
