"""Limits on the rank of single layers, and layers that share one."""

import numpy as np
import pytest

from lora_init.layers.targets import Target
from lora_init.planning.limits import Limits, allowed_by_unit, layer_limits, select, tie_layers
from tests.conftest import refused

NAMES = ("e.0.q", "e.0.k", "e.0.up", "e.1.q", "e.1.k", "e.1.up", "head")


def targets(**groups):
    return {name: Target(name, "Linear", 8, 8, groups=groups.get(name, 1)) for name in ("a", "b", "m.c")}


@pytest.mark.parametrize(("limits", "top", "ranks"), [
    (Limits(), 3, [1, 2, 3]),
    (Limits(max_rank=2), 3, [1, 2]),
    (Limits(max_rank=5), 3, [1, 2, 3]),
    (Limits(min_rank=2, multiple_of=3), 9, [3, 6, 9]),
    (Limits(multiple_of=4), 3, []),
    (Limits(allowed_ranks=(2, 4, 8)), 6, [2, 4]),
    (Limits(multiple_of=4, allowed_ranks=(2, 4, 8)), 8, [4, 8]),
    (Limits(max_rank=0), 3, []),
])  # fmt: skip
def test_the_ranks_that_limits_allow(limits, top, ranks):
    assert limits.ranks(top).tolist() == ranks
    assert limits.highest(top) == max(ranks, default=0)


def test_limits_are_written_as_they_differ_from_none():
    assert str(Limits()) == "any rank"
    whole = Limits(1, 8, 2, (2, 4))
    assert str(whole) == "min_rank=1, max_rank=8, multiple_of=2, allowed_ranks=(2, 4)"


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, Limits(1, 8, 2)),
    ({"rank": 4}, Limits(4, 4, 2)),
    ({"rank": None}, Limits(0, None, 2)),
    ({"max_rank": None}, Limits(1, None, 2)),
    ({"max_rank": 1}, Limits(1, 1, 2)),
    ({"multiple_of": None, "min_rank": 0}, Limits(0, 8, 1)),
    ({"allowed_ranks": [4, 0, 2, 4]}, Limits(1, 8, 2, (2, 4))),
    ({"allowed_ranks": None}, Limits(1, 8, 2)),
])  # fmt: skip
def test_an_override_changes_the_limits_that_it_names(settings, expected):
    assert Limits(1, 8, 2).changed(settings, "here: ") == expected


@pytest.mark.parametrize(("settings", "message"), [
    ({"min_rank": -1}, "^here: min_rank=-1, expected a whole number of at least 0"),
    ({"max_rank": -1}, "^here: max_rank=-1, expected a whole number of at least 0"),
    ({"multiple_of": 0}, "^here: multiple_of=0, expected a whole number of at least 1"),
    ({"rank": 1.5}, "^here: m.._rank=1.5, expected a whole number of at least 0"),
    ({"min_rank": 9}, "^here: min_rank=9 is above max_rank=8. Lower it.$"),
    ({"top": 9}, "^here: 'top' is no limit. Choose from rank, min_rank, max_rank, multiple_of, allowed_ranks"),
    ({"allowed_ranks": [0]}, r"^here: allowed_ranks=\[0\]: a list of ranks above 0 is needed, such as \[8, 16, 32\].$"),
    ({"allowed_ranks": [-4]}, "^here: allowed_ranks=-4, expected a whole number of at least 0"),
])  # fmt: skip
def test_what_is_wrong_with_a_limit_says_where(settings, message):
    refused(message, Limits(1, 8, 2).changed, settings, "here: ")


def test_later_overrides_win_and_groups_divide_each_rank():
    overrides = {"*": {"max_rank": 6, "multiple_of": 2}, "c": {"max_rank": 4}, "a": {"multiple_of": 1}}
    found = layer_limits(targets(b=3), {"min_rank": 1}, overrides, ())
    assert found == {"a": Limits(1, 6, 1), "b": Limits(1, 6, 6), "m.c": Limits(1, 4, 2)}
    assert layer_limits(targets(), {}, None, ("b", "*b")) == {"a": Limits(), "m.c": Limits()}


def test_the_limits_that_a_caller_gives_stay_as_they_are():
    overrides = {"*": {"rank": 4}}
    assert {*layer_limits(targets(), {}, overrides, ()).values()} == {Limits(4, 4)}
    assert overrides == {"*": {"rank": 4}}


@pytest.mark.parametrize(("overrides", "exclude", "message"), [
    ([("a", {})], (), r"^overrides=\[\('a', \{\}\)\]: a mapping such as \{'up_proj': \{'max_rank': 8\}\} is needed.$"),
    ({"a": {"rank": "2"}}, (), r"^overrides\['a'\]: m.._rank='2', expected a whole number"),
    ({"a": {}, "b": 8}, (), r"^overrides=\{'a': \{\}, 'b': 8\}: a mapping such as"),
    ({3: {}}, (), "^overrides='3' matches no layer. Names end in a, b, c.$"),
    (None, ["a", 3], r"^exclude=\['a', 3\]: a name, an ending or a wildcard is needed, or a list of them.$"),
    (None, "x*", r"^exclude='x\*' matches no layer. Names end in a, b, c.$"),
    (None, ["*"], r"^exclude=\['\*'\] leaves none of 3 layers.$"),
])  # fmt: skip
def test_what_means_no_layer_is_refused(overrides, exclude, message):
    refused(message, layer_limits, targets(), {}, overrides, exclude)


@pytest.mark.parametrize(("pattern", "selected"), [
    ("e.0.q", ["e.0.q"]),
    ("q", ["e.0.q", "e.1.q"]),
    ("1.*", ["e.1.q", "e.1.k", "e.1.up"]),
    ("e.?.up", ["e.0.up", "e.1.up"]),
    ("head", ["head"]),
])  # fmt: skip
def test_a_pattern_is_a_name_an_ending_or_a_wildcard(pattern, selected):
    assert select(pattern, NAMES, "x") == selected


def test_a_name_with_a_bracket_is_itself_and_what_matches_nothing_is_told_the_closest():
    assert select("a[0]", ["a[0]", "a0"], "x") == ["a0"]
    assert select("a[1]", ["a[1]", "b"], "x") == ["a[1]"]
    refused("^x='h.0.heads' matches no layer. Closest: head.$", select, "h.0.heads", NAMES, "x")
    refused("^x='p' matches no layer. Closest: up.$", select, "p", NAMES, "x")
    many = [f"m.{letter}" for letter in "ihgfedcba"]
    refused("^x='zzz' matches no layer. Names end in a, b, c, d, e, f, g.$", select, "zzz", many, "x")


@pytest.mark.parametrize(("tie", "per_kind", "units"), [
    ((), False, [0, 1, 2, 3, 4, 5, 6]),
    (("q", "k"), False, [0, 0, 1, 2, 2, 3, 4]),
    (("q", "k", "head"), False, [0, 0, 1, 2, 2, 3, 4]),  # which is in no block with them
    ([("q", "up")], False, [0, 1, 0, 2, 3, 2, 4]),
    ([("k", "up"), ("q", "k")], False, [0, 0, 0, 1, 1, 1, 2]),
    ((), True, [0, 1, 2, 0, 1, 2, 3]),
    (("q", "k"), True, [0, 0, 1, 0, 0, 1, 2]),
    (("0.q", "1.q"), False, [0, 1, 2, 0, 3, 4, 5]),
])  # fmt: skip
def test_tied_layers_have_one_number(tie, per_kind, units):
    found = tie_layers(NAMES, tie, per_kind)
    assert found.tolist() == units and found.dtype == np.int64


@pytest.mark.parametrize(("tie", "message"), [
    (3, "^tie=3: a name, an ending or a wildcard is needed, or a list of them.$"),
    ([("q", "k"), 3], "^tie=3: a name, an ending or a wildcard is needed"),
    ([("q", 3)], r"^tie=\('q', 3\): a name"),
    (("q", "v"), "^tie='v' matches no layer. Names end in head, k, q, up.$"),
    (("*.q", "up"), r"^tie=\['\*.q', 'up'\]: '\*.q' must be how names end, such as 'q_proj'.$"),
    (("q",), r"^tie=\['q'\] ties nothing: no two of these are in one block. Name at least two.$"),
    ("head", r"^tie=\['head'\] ties nothing"),
])  # fmt: skip
def test_a_tie_of_nothing_is_refused(tie, message):
    refused(message, tie_layers, NAMES, tie)
    assert tie_layers(NAMES, ()).tolist() == tie_layers(NAMES, []).tolist() == list(range(7))


def test_layers_of_a_unit_may_have_what_each_of_them_may():
    limits = {"a": Limits(min_rank=1), "b": Limits(multiple_of=2), "c": Limits(min_rank=2, max_rank=3), "d": Limits()}
    found = allowed_by_unit(limits, np.array([3, 4, 4, 0]), 4, np.array([0, 0, 1, 2]))
    assert [np.flatnonzero(row).tolist() for row in found] == [[2], [2, 3], [0]]
    tied = (
        r"^tied layers have no possible rank: 'a' \(min_rank=1; at most 1\), 'b' \(multiple_of=2; at most 4\), "
        r"'d' \(any rank; at most 4\), 'e' \(any rank; at most 4\). The last is what its input width, the components "
        "collected and rho x average rank allow. Relax the limits or the tie.$"
    )
    five = {"a": limits["a"], "c": Limits(), "b": limits["b"], "d": Limits(), "e": Limits(), "f": Limits()}
    refused(tied, allowed_by_unit, five, np.array([1, 4, 4, 4, 4, 4]), 4, np.array([1, 0, 1, 1, 1, 1]))
    alone = r"^a layer has no possible rank: 'c' \(min_rank=5; at most 4\). The last is"
    refused(alone, allowed_by_unit, {"c": Limits(min_rank=5)}, np.array([4]), 4, np.array([0]))
