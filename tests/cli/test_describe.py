"""The parts of what `lora-init inspect` reads; tests/cli/test_inspect.py has the command."""

import json
from contextlib import nullcontext
from dataclasses import make_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import lora_init
from lora_init.adapters.init_config import Reading
from lora_init.cli import describe as about
from lora_init.cli.describe import damage_of, describe
from lora_init.errors import LoraInitError
from lora_init.files import digests_of
from lora_init.planning.plan import RankAllocation
from lora_init.serving.trained import DIAL_FILE
from tests.adapters.made import made_up_statistics
from tests.conftest import batches_for, refused, tiny_llama
from tests.layers.made import mixtral
from tests.versions import needs_experts_by_peft


@pytest.mark.parametrize("kind", [KeyError, TypeError, ZeroDivisionError, AttributeError, ValueError])
def test_content_of_another_form_is_damage_with_the_name_of_its_error(kind):
    error = kind("r")
    with pytest.raises(LoraInitError) as caught, damage_of(Path("a"), Path("b")):
        raise error
    assert str(caught.value) == f"a, b is damaged: {type(error).__name__} {error}. Make it again."


@pytest.mark.parametrize("error", [LoraInitError("as it is."), MemoryError("x"), OSError("x")])
def test_what_is_no_damage_passes_through(error):
    with pytest.raises(type(error)) as caught, damage_of(Path("a")):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(("ranks", "gaps"), [
    ({"h.0.q": 4, "h.1.q": 2}, {}), ({"h.0.q": 4, "h.2.v": 2}, {"h.2.q": 0, "h.0.v": 0}),
    ({"h.1.x.1.q": 4, "h.0.v": 2}, {"h.0.x.1.q": 0, "h.1.v": 0}), ({"head": 4, "h.0.q": 2}, {}), ({}, {}),
])  # fmt: skip
def test_layers_that_others_of_their_kind_have_are_gaps(ranks, gaps):
    assert about._with_gaps(ranks) == ranks | gaps


@pytest.mark.parametrize(("content", "kind"), [
    (b'{"a": 1}', "plan"), (b'\x08\0\0\0\0\0\0\0{"a": 1}', "statistics"), (b"{", "plan"),
])  # fmt: skip
def test_a_file_is_what_it_begins_like_whatever_its_name_is(content, kind, tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_bytes(content)
    monkeypatch.setattr(about, "_describe_plan", lambda path: ("plan", path))
    monkeypatch.setattr(about, "_describe_statistics", lambda path: ("statistics", path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert describe("~/x.txt") == (kind, tmp_path / "x.txt")


@pytest.mark.parametrize("content", [b"", b"garbage", b"garbage!{", b" {"])
def test_a_file_of_another_kind_is_told(content, tmp_path, monkeypatch):
    monkeypatch.setattr(about, "_describe_statistics", lambda path: pytest.fail("read") if content[8:9] != b"{" else 1)
    (tmp_path / "x").write_bytes(content)
    if content[8:9] == b"{":
        assert describe(tmp_path / "x") == 1
    else:
        refused("x is neither statistics nor a plan. Name what lora-init has written.$", describe, tmp_path / "x")


@pytest.mark.parametrize(("files", "kind"), [
    (["settings.json"], "comparison"), (["settings.json", "adapter_config.json"], "adapter"), ([], "adapter"),
])  # fmt: skip
def test_a_directory_with_an_adapter_in_it_is_one(files, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_init.comparison.report.describe_directory", lambda path: "comparison")
    monkeypatch.setattr(about, "_describe_adapter", lambda path, length, base: "adapter")
    for name in files:
        (tmp_path / name).touch()
    assert describe(tmp_path) == kind


def test_a_record_of_the_dial_counts_while_the_adapter_is_as_it_wrote_it(tmp_path):
    assert about._describe_dial(tmp_path) is None
    (tmp_path / "weights").write_text("a")
    record = {"sha256": digests_of(tmp_path, ["weights"]), "rule": "x"}
    (tmp_path / DIAL_FILE).write_text(json.dumps(record))
    assert about._describe_dial(tmp_path) == record | {"picture": str(tmp_path / "dial.png")}
    (tmp_path / "weights").write_text("b")
    assert about._describe_dial(tmp_path) is None


class Kept:
    """What is kept of layers: sums add up."""

    def __init__(self, arrives=0.0, ratio=0.0):
        self.arrives, self.ratio = arrives, ratio

    def __add__(self, other):
        return Kept(self.arrives + other.arrives, self.ratio + other.ratio)

    def advice(self, lost):
        return f"lost {lost}"


@pytest.mark.parametrize("with_data", [False, True])
def test_a_merge_is_described_by_its_layers_and_measured_where_there_are_data(with_data, monkeypatch, tmp_path):
    calls, rows = [], tmp_path / "rows.txt"
    rows.write_text("a\n")
    trained, plain = SimpleNamespace(base="named"), SimpleNamespace(source="base", parameters=2)

    def noted(name, result):
        def call(*words, **options):
            calls.append((name, *words, *sorted(options.items())))
            return result

        return call

    places = {
        "serving.trained.read_trained": trained, "serving.base.read_base": plain,
        "serving.trained.with_parameters": "with", "serving.base.with_changed_copies": "copied",
        "serving.base.bring_checkpoint": None, "serving.base.plan_merge": "planned",
        "serving.kept.kept_by_merge": {"a": Kept(0.25, 0.5), "b": Kept(0.5, float("inf"))},
        "statistics.statistics.Statistics.load": "stats",
        "loading.models.load_model": SimpleNamespace(tokenizer="tokenizer", model="model"),
        "loading.batches.load_batches": "batches",
    }  # fmt: skip
    for place, result in places.items():
        monkeypatch.setattr(f"lora_init.{place}", noted(place.rpartition(".")[2], result))
    monkeypatch.setattr("lora_init.serving.kept.Kept", Kept)
    monkeypatch.setattr("lora_init.adapters.directory.AdapterDirectory", lambda path: f"read {path}")
    diverged = make_dataclass("Diverged", ["merged"], namespace={"lost": 0.125})(0.5)
    monkeypatch.setattr("lora_init.serving.kept.divergence", noted("divergence", diverged))
    data = str(rows) if with_data else None
    path, file = Path("adapter"), Path("s") if with_data else None
    found = about.describe_merge(path, "int8", None, file, data, Reading(template="{text}"), with_data)
    assert found == {
        "base": "base", "type": "int8", "statistics": with_data, "arrives": 0.75, "noise": None,
        "divergence": {"merged": 0.5, "computed_in": "float32"} if with_data else None,
        "advice": f"lost {0.125 if with_data else None}",
        "layers": {"a": {"arrives": 0.25, "noise": 0.5}, "b": {"arrives": 0.5, "noise": None}},
    }  # fmt: skip
    reading = sorted((vars(Reading(template="{text}")) | {"samples": 32}).items())
    trusted = ("trust_remote_code", with_data)
    assert calls == [
        ("read_trained", path), ("read_base", "named", trained, trusted), ("bring_checkpoint", "base", trained),
        ("with_parameters", trained, 2), ("with_changed_copies", "with", plain),
        *([("load", file)] if with_data else []), ("plan_merge", plain, "copied"),
        ("kept_by_merge", plain, "copied", "planned", "int8", "stats" if with_data else None),
        *([("load_model", "base", ("dtype", "float32"), trusted), ("load_batches", data, "tokenizer", *reading),
           ("divergence", "model", "read adapter", "batches", "int8")] if with_data else []),
    ]  # fmt: skip


def test_layers_that_read_one_input_have_its_held_out_share(tmp_path):
    stats = lora_init.collect(tiny_llama(), batches_for("llama", 4), ["q_proj", "k_proj", "down_proj"], rank=2)
    layers = describe(stats.save(tmp_path / "s"))["layers"]
    assert any(name != layer["input_shared_with"] for name, layer in layers.items())
    for layer in layers.values():
        assert layer["held_out"] == layers[layer["input_shared_with"]]["held_out"] is not None


def test_layers_that_a_plan_leaves_out_count_for_engines_that_want_all(tmp_path):
    """Also those of a block without any adapter, which the weights don't tell from a model that ends there."""
    stats = made_up_statistics(tiny_llama(), ["q_proj"], task_type="CAUSAL_LM")
    for name, last in (("all", 4), ("first", 0)):
        plan = RankAllocation(dict(zip(stats, (4, last), strict=True)), 4, dict(stats.targets))
        lora_init.build_adapter(stats, plan, "random").save_pretrained(tmp_path / name)
        takes = describe(tmp_path / name)["serving"].partition(" as it is. ")[0]
        assert ("SGLang" in takes) == (name == "all")


@pytest.mark.parametrize("trained", [False, True])
def test_the_rate_that_was_asked_for_is_told_after_training_as_well(trained, tmp_path):
    """The rule's own is not: it is of sizes in a record that does not travel."""
    stats = made_up_statistics(tiny_llama(), ["q_proj"], task_type="CAUSAL_LM")
    for name, own in (("asked", 0.00123), ("rule", None)):
        built = replace(lora_init.build_adapter(stats, 2, "random"), learning_rate=own)
        built.save_pretrained(tmp_path / name)
        if trained:
            model = PeftModel.from_pretrained(tiny_llama(), tmp_path / name, is_trainable=True)
            with torch.no_grad():
                next(p for key, p in model.named_parameters() if "lora_B" in key).fill_(0.1)
            model.save_pretrained(tmp_path / name)
        told = describe(tmp_path / name)
        assert told["untrained"] is not trained and told["origin"]["method"] == "random"
        assert bool(told["train"]) == (not trained or own is not None)
        assert own is None or "1.23e-3" in told["train"]


@pytest.mark.parametrize(("task", "asked"), [
    ("CAUSAL_LM", "CAUSAL_LM"), ("SEQ_CLS", "SEQ_CLS"), (None, None), ("PROMPT", None), (7, None),
])  # fmt: skip
def test_intruders_are_counted_in_the_class_of_the_checkpoint_where_the_task_is_no_class(task, asked, monkeypatch):
    loaded, layer = [], SimpleNamespace(count=1, of=2, energy_share=float("nan"), similarities=(0.75, 0.25, 0.5))
    counted = SimpleNamespace(layers={"a": layer}, count=1, of=2, energy_share=0.5, skipped={"e": "Embedding"})
    # First, or a module that is imported for it keeps the stand-ins of the next lines for good.
    monkeypatch.setattr("lora_init.serving.intruders.intruder_dimensions", lambda *words: counted)
    monkeypatch.setattr("lora_init.adapters.directory.AdapterDirectory", lambda path: SimpleNamespace(n_labels=3))
    load = lambda *words, **how: loaded.append((*words, how)) or SimpleNamespace(model="weights")  # noqa: E731
    monkeypatch.setattr("lora_init.loading.models.load_model", load)
    monkeypatch.setattr(about, "importing", lambda *names: nullcontext())
    description = {"what": "adapter", "task_type": task, "base_model": "named"}
    for model in (None, "typed"):
        found = about.describe_intruders(Path("a"), description, model, True)
        how = {"task_type": asked, "trust_remote_code": True, "device": "cpu", "n_labels": 3}
        assert loaded.pop() == (found["model"], how) and found["model"] == (model or "named")
        assert found["layers"] == {"a": {"count": 1, "of": 2, "energy_share": None, "least_similarity": 0.25}}
        assert found["skipped"] == {"e": "Embedding"}


def test_ranks_are_in_the_order_of_the_model(tmp_path):
    model = tiny_llama(num_hidden_layers=11)
    stats = lora_init.collect(model, batches_for("llama", 2), ["q_proj"], rank=2)
    lora_init.build_adapter(stats, 2).save_pretrained(tmp_path / "adapter")
    blocks = [int(name.split(".")[2]) for name in describe(tmp_path / "adapter")["ranks"]]
    assert blocks == [*range(11)]


@pytest.mark.parametrize("given", [None, pytest.param(["mlp.experts.down_proj"], marks=needs_experts_by_peft)])
def test_what_an_adapter_says_of_itself_is_told_as_it_is(given, tmp_path):
    model = mixtral() if given else tiny_llama()
    settings = {"r": 2, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**settings, target_parameters=given))
    adapted.save_pretrained(tmp_path)
    told = describe(tmp_path)
    assert {key: told[key] for key in ("task_type", "rank", "lora_alpha", "use_rslora", "use_dora")} == {
        "task_type": "CAUSAL_LM", "rank": 2, "lora_alpha": 6, "use_rslora": True, "use_dora": False,
    }  # fmt: skip
    assert told["target_parameters"] == (given or [])
    assert told["parameters"] == adapted.get_nb_trainable_parameters()[0]
