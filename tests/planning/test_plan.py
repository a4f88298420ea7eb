"""The plan: its accounting, its file, what a notebook shows of it, and which engines take its adapter."""

import copy
import json
import pickle
import re
from dataclasses import fields, replace

import pytest
from hypothesis import given

from lora_init.errors import LoraInitError
from lora_init.layers.targets import Target
from lora_init.planning.allocate import RankAllocation, allocate_ranks
from lora_init.planning.plan import load_plan, plan_config, save_plan
from tests.conftest import refused
from tests.planning.made import WIDE, distinct, explained, full_plan, laws, llama_like, statistics, widths3


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


def test_a_plan_made_by_hand_knows_its_ranks_alone():
    plan = RankAllocation({"h.0.up": 2, "h.1.up": 0}, 1)
    words = "^the plan was made by hand and does not know enough about layer 'h.0.up'. Give targets= and explained= to"
    for read in (lambda: plan.parameters, lambda: plan.explained_variance, plan.to_pandas, plan.megabytes):
        refused(words, read)
    assert plan.total_rank == plan.spent == 2
    targets = {name: Target(name, "Linear", 8, 16) for name in plan}
    known = RankAllocation(plan, 1, targets, {"h.0.up": 0.5})
    assert known.parameters == 2 * (8 + 16) and known.to_pandas()["explained_variance"].isna().tolist() == [False, True]
    refused("layer 'h.1.up'", lambda: known.explained_variance)  # the other share is not known


def test_what_takes_no_part_explains_nothing():
    """The mean is over the layers that take part, so over none it is zero."""
    shares = {"h.0.up": 0.5, "h.1.up": 0.0}
    for excluded, expected in (((), 0.25), (("h.1.up",), 0.5), (tuple(shares), 0.0)):
        plan = RankAllocation(dict.fromkeys(shares, 0), 1, explained=shares, excluded=excluded)
        assert plan.explained_variance == expected
    assert RankAllocation({}, 1).explained_variance == 0.0


def test_parameters_are_named_apart_from_modules():
    """PEFT has an argument of its own for them; a layer without statistics says by its kind which it is."""
    ranks = {"0.q_proj": 2, "0.experts.up": 2, "0.experts.gate": 0}
    targets = {
        "0.q_proj": Target("0.q_proj", "Linear", 8, 8),
        "0.experts.up": Target("0.experts.up", "E", 8, 8, experts=4),
    }
    plan = RankAllocation(ranks, 2, targets, unsupported={"table": "Embedding", "0.experts.down": "Parameter"})
    config = plan_config(plan, 2.0)
    assert sorted(config["target_modules"]) == ["0.q_proj", "table"]
    assert config["target_parameters"] == ["0.experts.up", "0.experts.down"]
    by_hand = plan_config(RankAllocation(ranks, 2), 2.0)  # without targets all are taken for modules
    assert sorted(by_hand["target_modules"]) == ["0.experts.up", "0.q_proj"] and "target_parameters" not in by_hand


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


def test_a_notebook_shows_the_ranks_by_block_and_kind():
    plan = allocate_ranks(llama_like(3), rank=4, exclude=["*.0.*.k_proj"])
    html = plan._repr_html_()
    assert "border=" not in html and "nan" not in html.lower()
    cells = [int(cell) for cell in re.findall(r"<td>(\d+)</td>", html)]
    assert len(cells) == 11 and sum(cells) == plan.total_rank and html.count("<td>·</td>") == 1
    assert "<td>·</td>" in RankAllocation({"h.0.up": 3, "h.0.down": 1, "h.1.up": 2}, 2)._repr_html_()


def test_a_share_that_rounding_has_put_above_one_is_read(tmp_path):
    plan = full_plan()[1]
    name = next(iter(plan))
    above = replace(plan, explained={**plan.explained, name: 1.0000000000000002})
    assert load_plan(save_plan(above, tmp_path / "plan.json")).explained[name] > 1.0
