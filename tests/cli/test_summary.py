"""The parts of what `lora-init init` says of an adapter; tests/cli/test_summaries.py has the lines."""

from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_init.cli import summary
from lora_init.cli.summary import summary_of, summary_of_bank
from lora_init.errors import LoraInitError


class Target:
    """A layer that takes so many parameters for each rank."""

    def __init__(self, each):
        self.each = each

    def parameters(self, rank, *extra):
        return self.each * rank + sum(extra)


def built(**changes):
    about = dict(
        corrects_base=False, freeze_a=False, changes_output=False, use_dora=False, losses=(2.5, float("nan")),
        method="eva", lora_alpha=16, scaling=2.0, gamma=1.5, errors={}, recommended={"learning_rate": 1e-3},
        how_to_train="Train.", dtype="float32", start=SimpleNamespace(needs_gradient=False), ranks={"a": 2, "b": 4},
        targets={"a": Target(10), "b": Target(30)}, n_parameters=lambda: 140, provenance=SimpleNamespace(settings={}),
    )  # fmt: skip
    return SimpleNamespace(**about | changes)


class Ranks(dict):
    """Ranks with the budget that they were made for."""

    rank, budget, notes = 3, None, ("of ranks",)


@pytest.mark.parametrize(("changes", "load"), [
    ({}, "PeftModel.from_pretrained(base_model, 'out', is_trainable=True)"),
    ({"corrects_base": True}, "as out/README.md shows"), ({"freeze_a": True}, "as out/README.md shows"),
    ({"provenance": SimpleNamespace(settings={"classes": ["no", 1]})},
     "PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained('m', id2label={0: 'no', 1: '1'}), "
     "'out', is_trainable=True)"),
])  # fmt: skip
def test_an_adapter_is_loaded_by_one_line_unless_more_has_to_be_done(changes, load):
    assert summary._how_to_load("m", Path("out"), built(**changes)) == load


@pytest.mark.parametrize(("changes", "budget", "notes"), [
    ({}, None, []),
    ({"start": SimpleNamespace(needs_gradient=True)}, None, ["it has seen the labels of these examples:"]),
    ({"use_dora": True}, "parameters", ["a budget does not count DoRA's magnitudes."]),
    ({"use_dora": True}, "bytes", ["a budget does not count DoRA's magnitudes."]), ({"use_dora": True}, "ranks", []),
    ({"use_dora": True}, None, []), ({}, "bytes", []),
    ({"dtype": "bfloat16"}, "bytes",
     ["PEFT trains and saves float32; `lora-init export --dtype bfloat16` keeps a budget."]),
])  # fmt: skip
def test_notes_depend_on_what_the_adapter_is(changes, budget, notes):
    class Budget(SimpleNamespace):
        def __str__(self):
            return "a budget"

    ranks = SimpleNamespace(budget=None if budget is None else Budget(unit=budget))
    found = summary._notes(built(**changes), ranks)
    assert [text[: len(note)] for text, note in zip(found, notes, strict=True)] == notes


def test_at_one_rank_every_layer_has_the_largest():
    assert summary._at_one_rank(built()) == 4 * (10 + 30) / (2 * 10 + 4 * 30)


@pytest.mark.parametrize(("shares", "expected"), [
    ({}, None), ({"a": float("nan")}, None),
    ({"a": 0.9, "b": 0.2, "c": float("nan"), "d": 0.41234567}, {"median": 0.412346, "min": 0.2, "min_layer": "b"}),
])  # fmt: skip
def test_shares_of_held_out_data_are_summed_up_where_they_were_measured(shares, expected):
    assert summary._held_out(SimpleNamespace(held_out=shares)) == expected


@pytest.mark.parametrize(("dialable", "said"), [
    (True, "train it; then lora-init dial TRAINED HELD-OUT-DATA -o kept"),
    (False, "train it as out/README.md shows; then lora-init inspect TRAINED"),
])  # fmt: skip
def test_no_dial_is_offered_that_would_be_refused(dialable, said, monkeypatch):
    def check(config, others, name):
        assert (config, others, name) == ("config", (), "")
        if not dialable:
            raise LoraInitError("no.")

    monkeypatch.setattr("lora_init.keep.dial.check_dialable", check)
    monkeypatch.setattr("lora_init.adapters.directory.AdapterDirectory", lambda path: SimpleNamespace(config="config"))
    assert summary._next(Path("out")) == said


@pytest.mark.parametrize("odd", [False, True])
def test_a_summary_has_what_was_made_and_written(odd, monkeypatch, tmp_path):
    """With everything plain, and with everything that adds a fact."""
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(2_000_000))
    noted = {}

    def serving_note(ranks, config, shapes, base_change):
        noted.update(config=config, shapes=shapes, base_change=base_change)
        return "served"

    monkeypatch.setattr("lora_init.serving.support.serving_note", serving_note)
    written = SimpleNamespace(config={"r": 3}, shapes={"a": [1]})
    monkeypatch.setattr("lora_init.adapters.directory.AdapterDirectory", lambda path: written)
    monkeypatch.setattr("lora_init.adapters.card.start_in_words", lambda one: "It began so")
    monkeypatch.setattr("lora_init.adapters.card.correction_of", lambda one: "corrected")
    monkeypatch.setattr(summary, "_next", lambda directory: f"next of {directory.name}")
    quantized = {"quant_method": "gptq", "bits": 4} if odd else None
    made = SimpleNamespace(
        model_id="tiny", model_class="Llama", data="chat", settings={"classes": ["x"]} if odd else {}, n_samples=9,
        n_batches=3, stop_reason="converged", seconds=1.5, quantisation=quantized, notes=["of statistics"],
    )  # fmt: skip

    class Stats(list):
        provenance, targets = made, {"a": Target(10), "b": Target(30)}
        held_out = {"a": 0.5}  # noqa: RUF012

        def explained_variance(self, name):
            return [0.0] * (5 if name == "b" else 3)

    changes = dict(corrects_base=True, freeze_a=True, errors={"a": 1}, losses=None, use_dora=True) if odd else {}
    names = SimpleNamespace(file=Path("s") if odd else None, model="m")
    found = summary_of(names, Stats("ab"), Ranks(a=2, b=4), tmp_path, built(**changes))
    special = ["It began so.", "the base was quantized (gptq 4): train and serve on the same."] if odd else []
    assert found == {
        "adapter": str(tmp_path), "statistics": "s" if odd else None, "model": "tiny", "model_class": "Llama",
        "data": "chat", "classes": ["x"] if odd else [], "rank": 3, "ranks": {"a": 2, "b": 4}, "method": "eva",
        "lora_alpha": 16, "scaling": 2.0, "parameters": 140, "megabytes": 2.0, "megabytes_at_one_rank": 160 / 140 * 2.0,
        "uniform_parameters": 120 + (4 if odd else 0), "n_samples": 9, "n_batches": 3, "stop_reason": "converged",
        "n_components": 5, "held_out": {"median": 0.5, "min": 0.5, "min_layer": "a"}, "gamma": 1.5,
        "loss_before": None if odd else 2.5, "loss_at_start": None, "correction": "corrected" if odd else None,
        "quantisation": quantized, "seconds": 1.5, "serving": "served",
        "load": summary._how_to_load("m", tmp_path, built(**changes)), "recommended": {"learning_rate": 1e-3},
        "train": "Train.", "next": f"next of {tmp_path.name}", "notes": [*special, "of statistics", "of ranks"],
    }  # fmt: skip
    assert noted == {"config": {"r": 3}, "shapes": {"a": [1]}, "base_change": "eva" if odd else ""}


@pytest.mark.parametrize("losses", [None, (2.5, 2.25)])
def test_a_start_from_a_bank_is_summed_up_with_its_neighbours(losses, monkeypatch):
    near = make_dataclass("Near", [("name", str), ("similarity", float)], namespace={"in_words": lambda self: "near"})
    monkeypatch.setattr(summary, "_next", lambda directory: "next")
    started = SimpleNamespace(init=built(losses=losses), neighbours=[near("a", 0.5)], weights={"a": 1.0}, passes=4)
    before, after = losses or (None, None)
    assert summary_of_bank(started, Path("out")) == {
        "adapter": "out", "method": "eva", "ranks": {"a": 2, "b": 4}, "parameters": 140,
        "neighbours": [{"name": "a", "similarity": 0.5, "said": "near"}], "weights": {"a": 1.0}, "passes": 4,
        "gamma": 1.5, "loss_before": before, "loss_at_start": after, "next": "next",
    }  # fmt: skip
