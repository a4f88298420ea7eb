"""The plan: its accounting, its file, what a notebook shows of it, and which engines take its adapter."""

import copy
import json
import pickle
from dataclasses import fields, replace

import pytest
from hypothesis import given

from lora_init.errors import LoraInitError
from lora_init.planning.allocate import RankAllocation, allocate_ranks
from lora_init.planning.plan import load_plan, save_plan
from tests.conftest import refused
from tests.planning.made import WIDE, distinct, explained, full_plan, laws, statistics, widths3


@laws
@given(distinct, widths3)
def test_the_accounting_is_exact(ratios, widths):
    plan = allocate_ranks(statistics(ratios, widths), rank=2)
    assert plan.total_rank == sum(plan.values())
    assert plan.parameters == sum(rank * (a + b) for rank, (a, b) in zip(plan.values(), widths, strict=True))
    assert plan.megabytes("float16") == plan.parameters * 2 / 1e6
    assert plan.explained_variance == pytest.approx(explained(ratios, plan.values()) / 3)
    table = plan.to_pandas()
    assert dict(table["rank"]) == dict(plan) and table["parameters"].sum() == plan.parameters
    assert table["explained_variance"].mean() == pytest.approx(plan.explained_variance)


# --- The file -------------------------------------------------------------------------------------------------------


def same(one, other):
    assert dict(one) == dict(other) and list(one) == list(other)
    for name in (*(each.name for each in fields(one) if each.name != "settings"), "spent"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.settings["overrides"] == {"*.v_proj": {"max_rank": 1}}


def test_a_plan_survives_its_file_copies_and_pickles(tmp_path):
    stats, plan = full_plan()
    plan = replace(plan, unsupported={"embed": "Embedding"})
    loaded = load_plan(save_plan(plan, tmp_path / "plan.json"))
    for other in (loaded, copy.copy(plan), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):  # noqa: S301
        same(plan, other)
        other.check(stats)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_for_another_model_is_refused():
    stats, plan = full_plan()
    other = full_plan(fingerprint="f2", model_id="other/model")[0]
    refused(r"made for some/model \(fingerprint f1\), .* another: .* other/model \(f2\)", plan.check, other)
    with pytest.raises(LoraInitError, match=r"names layer 'h.0.q_proj', which the statistics do not have"):
        RankAllocation(dict(plan), 2).check(statistics(WIDE))
    plan.check(stats)


def put(content, *path, value):
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: put(c, "format_version", value=2), "format version 2, and this lora_init reads 1"),
    (lambda c: put(c, "format", value="x"), "is not a plan of lora_init"),
    (lambda c: put(c, "layers", "h.0.q_proj", "rank", value=-1), "damaged: .*'h.0.q_proj' has .*'rank': -1"),
    (lambda c: put(c, "layers", "h.0.q_proj", "rank", value="9"), "damaged: .*'h.0.q_proj' has .*'rank': '9'"),
    (lambda c: put(c, "layers", "h.0.q_proj", "rank", value=65), "damaged: .*'rank': 65, .*'in_features': 64"),
    (lambda c: put(c, "layers", "h.0.q_proj", "explained_variance", value=2), "damaged: .*'explained_variance': 2"),
    (lambda c: put(c, "rank", value=0), "damaged: .*rank=0"),
    (lambda c: put(c, "layers", value=[]), "damaged"),
    (lambda c: put(c, "budget", value={"a": 1}), "damaged"),
    (lambda c: put(c, "budget", "asked", value="1M"), "damaged: .*Budget has asked='1M'"),
    (lambda c: put(c, "provenance", "fingerprint", value=3), "damaged: .*Provenance has fingerprint=3"),
    (lambda c: c.pop("policy"), "damaged: KeyError 'policy'"),
])  # fmt: skip
def test_a_damaged_plan_is_refused(tmp_path, change, message):
    path = save_plan(full_plan()[1], tmp_path / "plan.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    refused(message, load_plan, path)


# --- In a notebook --------------------------------------------------------------------------------------------------


def test_a_plan_knows_the_layers_that_have_no_statistics():
    stats = replace(full_plan()[0], unsupported={"embed": "Embedding"})
    assert allocate_ranks(stats, rank=2).unsupported == {"embed": "Embedding"}
