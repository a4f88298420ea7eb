"""The plan: its accounting, its file, what a notebook shows of it, and which engines take its adapter."""

import copy
import json
import math
import pickle
import re
from dataclasses import asdict, fields, replace

import pytest
from hypothesis import given

from lora_init.errors import LoraInitError
from lora_init.layers.targets import Target
from lora_init.planning.allocate import RankAllocation, allocate_ranks
from lora_init.planning.plan import load_plan, plan_config, plan_text, plan_to_dict, rank_grid, save_plan, source_text
from lora_init.statistics.statistics import Provenance
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
    for exclude in ({"q_proj"}, frozenset({"q_proj"}), ("q_proj",)):  # as the caller had it
        asked = replace(plan, settings={**plan.settings, "exclude": exclude})
        assert load_plan(save_plan(asked, tmp_path / "other.json")).settings["exclude"] == ["q_proj"]


def test_a_plan_for_another_model_is_refused():
    stats, plan = full_plan()
    other = full_plan(fingerprint="f2", model_id="other/model")[0]
    refused(r"made for some/model \(fingerprint f1\), .* another: .* other/model \(f2\)", plan.check, other)
    with pytest.raises(LoraInitError, match=r"names layer 'h.0.q_proj', which the statistics do not have"):
        RankAllocation(dict(plan), 2).check(statistics(WIDE))
    plan.check(stats)


def test_what_a_file_says_of_a_plan():
    plan = full_plan()[1]
    written = plan_to_dict(replace(plan, unsupported={"embed": "Embedding"}, notes=("A note.",)))
    kinds = {"h.0.q_proj": (2, 0.5), "h.0.k_proj": (2, 0.5), "h.0.v_proj": (1, 0.3), "h.1.q_proj": (1, 0.15)}
    kinds |= {"h.1.k_proj": (1, 0.15), "h.1.v_proj": (0, 0.0)}
    assert written.pop("provenance") == asdict(plan.provenance)
    assert written == {
        "format": "lora_init.plan", "format_version": 1, "rank": 1, "policy": "eva",
        "budget": dict(kind="parameters", asked=1000, unit="parameters", limit=1000, dtype="float32", coverage=""),
        "settings": {"rho": 2, "tie": ["q_proj", "k_proj"], "overrides": {"*.v_proj": {"max_rank": 1}},
                     "exclude": ["h.1.v_proj"]},
        "totals": {"layers": 5, "total_rank": 7, "parameters": 896, "megabytes_float32": 0.003584,
                   "explained_variance": 0.32},
        "layers": {
            name: dict(rank=rank, kind="Linear", in_features=64, out_features=64, parameters=128 * rank,
                       explained_variance=pytest.approx(share))
            for name, (rank, share) in kinds.items()
        },
        "excluded": ["h.1.v_proj"], "unsupported": {"embed": "Embedding"}, "notes": ["A note."],
    }  # fmt: skip
    assert type(written["settings"]["overrides"]["*.v_proj"]["max_rank"]) is int  # it was a number of numpy
    of_parts = Target("c", "Conv2d", 18, 8, (3, 3), 2)
    by_hand = plan_to_dict(RankAllocation({"c": 2}, 2, {"c": of_parts}, {"c": 1.0}))
    assert by_hand["layers"]["c"] == {
        "rank": 2, "kind": "Conv2d", "in_features": 18, "out_features": 8, "kernel": [3, 3], "groups": 2,
        "parameters": 44, "explained_variance": 1.0,
    }  # fmt: skip
    assert by_hand["budget"] is by_hand["provenance"] is None and by_hand["settings"] == {}


def test_a_plan_by_hand_survives_its_file(tmp_path):
    target = Target("c", "Conv2d", 18, 8, (3, 3), 2)
    plan = RankAllocation({"c": 2, "d": 0}, 2, {"c": target, "d": replace(target, name="d")}, {"c": 1.0, "d": 0.0})
    loaded = load_plan(str(save_plan(plan, tmp_path / "plan.json")))
    assert all(getattr(loaded, one.name) == getattr(plan, one.name) for one in fields(plan))
    refused(
        r"nowhere.json: the plan could not be read: No such file or dir.*Name a file",
        load_plan,
        tmp_path / "nowhere.json",
    )


def test_a_layer_of_full_rank_and_one_with_a_single_output_survive_their_file(tmp_path):
    targets = {"up": Target("up", "Linear", 4, 9), "score": Target("score", "Linear", 9, 1)}
    plan = RankAllocation({"up": 4, "score": 1}, 2, targets, {"up": 1.0, "score": 0.5})
    assert dict(load_plan(save_plan(plan, tmp_path / "plan.json")).targets) == targets


def test_a_plan_is_equal_to_its_ranks_and_does_not_change():
    plan = RankAllocation({"a": 1, "b": 2}, 1, policy="eva")
    assert plan == {"a": 1, "b": 2} == plan and plan != {"a": 1} and plan == replace(plan, policy="uniform")
    with pytest.raises(AttributeError):
        plan.rank = 2


def test_the_file_of_a_plan_can_be_read_by_people(tmp_path):
    plan = RankAllocation({"über": 1}, 1, {"über": Target("über", "Linear", 2, 2)}, {"über": 1.0})
    text = save_plan(plan, tmp_path / "plan.json").read_text(encoding="utf-8")
    assert '\n "layers": {\n  "über": {\n   "rank": 1,\n' in text and text.endswith("\n}\n")


def test_a_plan_in_words():
    plan, by_hand = full_plan()[1], RankAllocation({"a": 3, "b": 1, "c": 0}, 2)
    assert repr(plan) == "RankAllocation(5 of 6 layers with rank 1 to 2, total rank 7)"
    assert repr(by_hand) == "RankAllocation(2 of 3 layers with rank 1 to 3, total rank 4)"
    assert repr(RankAllocation({"a": 0}, 1)) == "RankAllocation(0 of 1 layers with rank 0, total rank 0)"
    assert plan_text(replace(plan, settings={"rho": 2.0, "min_rank": 1, "exclude": ["v"]})) == (
        "policy eva, budget parameters=1,000, rho=2, min_rank=1, exclude=['v']"
    )
    assert plan_text(by_hand) == "policy by hand, budget by hand" and source_text(by_hand) == "a plan made by hand"


@pytest.mark.parametrize(("changes", "words"), [
    (dict(n_batches=4), "of some/model on some data: 1,000 rows in 4 batches, centered (PCA)"),
    (dict(model_id=""), "of LlamaForCausalLM on some data: 1,000 rows in 0 batches, centered (PCA)"),
    (dict(model_id="", model_class="", n_batches=1),
     "of a model without a name on some data: 1,000 rows in 1 batches, centered (PCA)"),
    (dict(n_samples=0, data=""),
     "of some/model on data not described: rows that were not counted, centered (PCA)"),
    (dict(center=False), "of some/model on some data: 1,000 rows in 0 batches, not centered (second moment)"),
])  # fmt: skip
def test_where_a_plan_comes_from_in_words(changes, words):
    plan = full_plan()[1]
    assert (
        source_text(replace(plan, provenance=replace(plan.provenance, **changes)))
        == f"the inputs of each layer {words}"
    )


def test_a_model_is_compared_where_both_sides_know_it():
    plan = full_plan(fingerprint="0123456789abcdef", model_id="")[1]
    said = refused("the plan was made for", plan.check_model, "f" * 32, "this one")
    assert said == (
        "the plan was made for LlamaForCausalLM (fingerprint 0123456789ab), and this is another: this one "
        "(ffffffffffff). Make a plan from statistics of this model."
    )
    for fine in (plan, replace(plan, provenance=None), full_plan(fingerprint="")[1]):
        fine.check_model("0123456789abcdef", "the same")
        fine.check_model("", "unknown")


def test_ranks_as_block_and_kind():
    table = rank_grid({"h.1.up": 3, "h.0.up": 2, "h.0.down": 0, "head": 5})
    assert table.index.tolist() == ["", 0, 1]
    found = {kind: [None if math.isnan(rank) else rank for rank in table[kind]] for kind in table}
    assert found == {"up": [None, 2.0, 3.0], "down": [None, None, None], "head": [5.0, None, None]}


def test_a_plan_keeps_what_it_was_made_of():
    """No change of a caller's mapping reaches it."""
    ranks, settings, shares = {"a": 1}, {"rho": 2}, {"a": 0.5}
    plan = RankAllocation(ranks, 1, {"a": Target("a", "Linear", 2, 3)}, shares, settings=settings)
    ranks["a"], settings["rho"], shares["a"] = 9, 9, 9.0
    assert plan["a"] == 1 and plan.settings == {"rho": 2} and plan.explained == {"a": 0.5}
    assert plan.to_pandas().reset_index().to_dict("records") == [
        {"layer": "a", "rank": 1, "in_features": 2, "out_features": 3, "parameters": 5, "explained_variance": 0.5}
    ]


def test_what_a_task_is_reaches_the_configuration():
    plan = RankAllocation({"up": 2, "more.up": 0}, 2, provenance=Provenance("", "", "", [], task_type="CAUSAL_LM"))
    config = plan_config(plan, 3.0, use_rslora=True)
    assert (config["task_type"], config["use_rslora"], config["target_modules"]) == ("CAUSAL_LM", True, "^(?:up)$")
    assert config["lora_alpha"] == pytest.approx(3 * 2**0.5)


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
    (lambda c: put(c, "layers", "h.0.q_proj", "rank", value=True), "damaged: .*'h.0.q_proj' has .*'rank': True"),
    (lambda c: put(c, "layers", "h.0.q_proj", "out_features", value=0), "damaged: .*'out_features': 0"),
    (lambda c: put(c, "layers", "h.0.q_proj", "explained_variance", value=-0.1), "damaged: .*variance': -0.1"),
    (lambda c: put(c, "rank", value=0), "damaged: .*rank=0"),
    (lambda c: put(c, "rank", value=2.0), "damaged: .*rank=2.0"),
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


def test_a_plan_goes_where_the_home_of_its_user_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path)), monkeypatch.setenv("USERPROFILE", str(tmp_path))
    plan = allocate_ranks(statistics({"a": [0.5, 0.25]}), rank=1)
    save_plan(plan, "~/plan.json")
    assert dict(load_plan(tmp_path / "plan.json")) == dict(load_plan("~/plan.json")) == dict(plan)
