"""One run of a comparison: what it reads, trains and leaves; full weights, classifiers, the settings of a machine."""

import json
import platform
import shutil
import warnings
from dataclasses import asdict, replace
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import lora_init
from lora_init.collection.processes import digest_of
from lora_init.comparison import outlook, workbench
from lora_init.comparison.runs import Run
from lora_init.comparison.training import TrainingResult
from lora_init.comparison.variants import Variant
from lora_init.comparison.workbench import Workbench
from lora_init.errors import LoraInitError
from lora_init.layers.identity import fingerprint, model_config
from lora_init.layers.targets import find_targets
from lora_init.rates.training_length import TrainingLength
from tests.commands import save_model
from tests.comparison.made import again, assert_same, compare, set_up_bench, snapshot, without_clock
from tests.conftest import refused, tiny_llama


@pytest.mark.slow
def test_statistics_come_from_training_rows_alone(home, tmp_path, monkeypatch):
    seen = []
    real = workbench.collect

    def spy(model, batches, *arguments, **options):
        batches = list(batches)
        seen.extend(tuple(row[row != 0].tolist()) for batch in batches for row in batch["input_ids"])
        return real(model, batches, *arguments, **options)

    monkeypatch.setattr(workbench, "collect", spy)
    monkeypatch.setattr(workbench.Workbench, "check", lambda *_: None)  # which collects from one layer
    compare(home, tmp_path / "out", learning_rates=[1e-3], seeds=1)
    bench = set_up_bench(home, tmp_path)
    trained = {tuple(item.tokens[0]) for item in bench.task.train}
    scored = {tuple(item.tokens[0]) for item in [*bench.task.selection, *bench.task.report]}
    assert len(seen) == len(set(seen)) == 32 and set(seen) <= trained and not set(seen) & scored


@pytest.mark.slow
def test_statistics_are_kept_for_the_next_call(home, tmp_path, monkeypatch):
    real, calls = workbench.collect, []
    monkeypatch.setattr(workbench.Workbench, "check", lambda *_: None)  # which collects from one layer
    monkeypatch.setattr(workbench, "collect", lambda *a, **k: calls.append(k["center"]) or real(*a, **k))
    for starts in (["eva", "eva-rho1"], ["eva-uncentred", "eva-ranks"]):
        compare(home, tmp_path / "out", starts=starts, learning_rates=[1e-3], seeds=2)
    assert sorted(calls) == [False, False, True, True]


SECOND = dict(
    starts=("random", "eva"), learning_rates=None, seeds=1, extend=0, full=False, steps=2, evaluation_points=None
)


@pytest.fixture(scope="module")
def others(home):
    """Beside the model and its data there are others."""
    torch.manual_seed(5)
    save_model(tiny_llama(num_hidden_layers=1), home / "other")
    shutil.copytree(home / "llama", home / "rotated")  # the same weights
    text = (home / "rotated" / "config.json").read_text()
    assert '"rope_theta": 10000.0' in text
    (home / "rotated" / "config.json").write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 5.0'))
    lines = (home / "rows.jsonl").read_text().splitlines()
    (home / "other.jsonl").write_text("\n".join(lines[::-1][:80]))


@pytest.fixture(scope="module")
def undisturbed(home, others, tmp_path_factory):
    """A comparison that nothing came before."""
    return compare(home, tmp_path_factory.mktemp("undisturbed") / "out", **SECOND)


def collected(home, directory, **settings):
    """The statistics of a seed, whether they were there or not."""
    stats = set_up_bench(home, directory, **settings).statistics(0, center=True, gradients=False)
    return digest_of({name: vars(stats[name]) for name in stats})


@pytest.fixture(scope="module")
def first_statistics(home, tmp_path_factory):
    return collected(home, tmp_path_factory.mktemp("first"))


@pytest.mark.parametrize(
    "before",
    [
        dict(data="other.jsonl"),
        dict(model="other"),
        dict(model="rotated"),
        dict(dtype="bfloat16"),
        dict(target_modules="attention"),
        dict(rank=1),
        dict(statistics_batches=2),
        dict(batch_size=2),
    ],
    ids=str,
)
@pytest.mark.slow
def test_statistics_are_taken_for_the_same_model_data_and_layers_alone(
    home, others, first_statistics, tmp_path, before
):
    collected(home, tmp_path, **before)
    assert collected(home, tmp_path) == first_statistics
    assert len([*(tmp_path / "statistics").iterdir()]) == 2


def does_not_fit(model, seed):
    raise LoraInitError("this start does not fit.")


@pytest.mark.slow
def test_a_first_command_that_ended_before_its_settings_were_written_disturbs_nothing(home, undisturbed, tmp_path):
    """Its statistics are of another model."""
    before = {"model": "rotated", "starts": ("random", "eva", ("mine", does_not_fit))}
    with pytest.raises(LoraInitError, match="does not fit"):
        compare(home, tmp_path / "out", **SECOND | before)
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "statistics"]
    found = compare(home, tmp_path / "out", **SECOND)
    assert found.settings["recommended"] == undisturbed.settings["recommended"]
    assert without_clock(found.records) == without_clock(undisturbed.records)


def test_a_comparison_does_not_go_on_with_the_same_weights_that_compute_otherwise(home, undisturbed):
    """Under the same name: the configuration of the model was edited between two calls."""
    config = home / "llama" / "config.json"
    text = config.read_text()
    config.write_text((home / "rotated" / "config.json").read_text())
    try:
        said = r"other content: .*rope_theta"
        refused(said, compare, home, undisturbed.directory, **SECOND)
    finally:
        config.write_text(text)


def test_a_comparison_does_not_go_on_with_other_rows_to_train_on(home, undisturbed):
    rows = (home / "rows.jsonl").read_text().splitlines()
    bench = set_up_bench(home, undisturbed.directory)
    scored = {bench.loaded.tokenizer.decode(item.tokens[0]) for item in [*bench.task.selection, *bench.task.report]}
    changed = []
    for row in map(json.loads, rows):
        if not any(row["passage"] in text for text in scored):
            row["passage"] = " ".join(reversed(row["passage"].split()))
        changed.append(json.dumps(row))
    (home / "rows.jsonl").write_text("\n".join(changed))
    try:
        refused("other content: .*examples to train on", compare, home, undisturbed.directory, **SECOND)
    finally:
        (home / "rows.jsonl").write_text("\n".join(rows))


def test_rates_are_measured_on_the_head_that_is_trained(home, tmp_path, monkeypatch):
    """A new head is drawn from the seed of a run, whatever the library drew, and statistics are from that one."""
    bench = set_up_bench(home, tmp_path, "bert", label="first", completion=None)
    head, real, seen = bench.loaded.model.classifier.weight, workbench.collect, []
    monkeypatch.setattr(workbench, "collect", lambda *a, **k: seen.append(head.clone()) or real(*a, **k))
    head.data.zero_(), bench.loaded.model.classifier.bias.data.fill_(3.0)
    bench.measured_rates([Variant("eva-grad")])
    bench._renew_head(bench.loaded, 0)
    assert len(seen) == 1 and torch.equal(seen[0], head) and not bench.loaded.model.classifier.bias.any()
    drawn = head.clone()
    bench._renew_head(replace(bench.loaded, drawn=frozenset()), 1)  # as of a checkpoint that has a trained one
    assert torch.equal(head, drawn)


def test_full_training_of_a_quantized_classifier_starts_at_the_head_of_all_others(home, tmp_path, monkeypatch):
    """The float model is loaded anew for each run, with a head that the library draws."""
    bench, other = (set_up_bench(home, tmp_path, "bert", label="first", completion=None) for _ in range(2))
    other.loaded.model.classifier.weight.data.fill_(3.0)
    monkeypatch.setattr(Workbench, "_errors", lambda *_: None)
    bench = replace(bench, float_model=lambda: other.loaded)
    for seed in (0, 1):
        prepared = bench._prepare(Variant("full"), seed)
        bench._renew_head(bench.loaded, seed)
        assert prepared.peft_model is other.loaded.model
        assert torch.equal(prepared.peft_model.classifier.weight, bench.loaded.model.classifier.weight)
        prepared.release()


def test_the_loss_of_the_float_model_is_without_the_error_of_any_layer(home, tmp_path, monkeypatch):
    bench, asked = set_up_bench(home, tmp_path, target_modules=["q_proj"]), []
    monkeypatch.setattr(type(bench), "_errors", lambda self, modules: asked.append(modules))
    bench._measure_before()
    assert asked == ["all-linear"] and bench.shape.target_modules == ["q_proj"]


@pytest.mark.parametrize("blank", [True, False])
@pytest.mark.slow
def test_the_rate_of_a_frozen_a_is_its_own(home, tmp_path, blank):
    bench = set_up_bench(home, tmp_path, steps=12)  # of fewer, rates that are rounded are the same
    names = [Variant(name) for name in ("random", "random-frozen-a", "natural-gradient-frozen-a", "eva")]
    rates = bench.measured_rates(names, blank)
    for name, rate in rates.items():
        assert all((one.quadratic == 0.0) == name.endswith("frozen-a") for one in rate.responses.values()), name
    assert rates["random-frozen-a"].rate > rates["random"].rate


def test_a_dry_run_tells_the_rates_that_starts_of_their_size_have(home, tmp_path):
    bench = set_up_bench(home, tmp_path, steps=12)
    names = ["random", "eva+32-alpha", "eva-frozen-a", "eva-frozen-a+equal-parameters"]
    told, run = (bench.measured_rates([*map(Variant.parse, names)], blank) for blank in (True, False))
    for name in names:  # up to 5 times apart, where all were told the rate of `random`
        assert told[name].rate == pytest.approx(run[name].rate, rel=0.4), name
    assert told["random"].rate > 3 * told["eva+32-alpha"].rate


def test_a_dry_run_measures_what_has_the_same_size_once(home, tmp_path, monkeypatch):
    bench, asked = set_up_bench(home, tmp_path), []
    monkeypatch.setattr(workbench, "measure_rate", lambda *given, **how: asked.append(how["freeze_a"]) or len(asked))
    names = ["random", "eva", "eva-rho2+equal-parameters", "eva-frozen-a", "eva-frozen-a+equal-parameters"]
    told = bench.measured_rates([*map(Variant.parse, names)], blank=True)
    assert asked == [False, True, True] and [told[name] for name in names] == [1, 1, 1, 2, 3]


def test_a_frozen_a_of_as_many_parameters_has_the_rate_of_its_own_rank(home, tmp_path):
    """Of about twice the rank, by the rule: a forward pass tells a lower one."""
    given = dict(starts=["random", "random-frozen-a", "eva-rho2"], learning_rates=None, dry_run=True)
    found = compare(home, tmp_path, **given).settings["recommended"]
    assert found.keys() == {"random", "random-frozen-a", "random-frozen-a+equal-parameters", "eva-rho2"}
    plain = Variant("random-frozen-a")
    rates = set_up_bench(home, tmp_path / "b").measured_rates([plain, Variant(plain.base, equal_parameters=True)])
    once, more = (rate.rate for rate in rates.values())
    assert found["random-frozen-a+equal-parameters"] / found["random-frozen-a"] == pytest.approx(more / once, rel=0.05)
    assert more < 0.8 * once


@pytest.mark.slow
def test_a_run_leaves_the_plain_model_as_it_was(home, tmp_path):
    bench = set_up_bench(home, tmp_path)
    before = {name: value.clone() for name, value in bench.loaded.model.state_dict().items()}
    first = bench.carry_out(Run(Variant("eva"), 0, 1e-2))
    assert all(torch.equal(value, before[name]) for name, value in bench.loaded.model.state_dict().items())
    assert "adapter" not in first
    bench.carry_out(Run(Variant("pissa"), 0, 1e-2))
    assert without_clock([bench.carry_out(Run(Variant("eva"), 0, 1e-2))]) == without_clock([first])


@pytest.mark.parametrize(("name", "act"), [
    ("train", lambda bench: bench.carry_out(Run(Variant("pissa"), 0, 1e-2))),
    ("measure_rate", lambda bench: bench.measured_rates([Variant("random")])),
    ("evaluate", outlook.measure),
])  # fmt: skip
def test_whatever_is_raised_the_plain_model_has_no_adapter_afterwards(name, act, home, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    bench = set_up_bench(home, tmp_path)
    before = snapshot(bench.loaded.model)
    monkeypatch.setattr(outlook if name == "evaluate" else workbench, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        act(bench)
    assert_same(before, snapshot(bench.loaded.model))


def test_what_is_no_fault_of_a_start_is_raised_and_what_is_makes_a_failed_run(home, tmp_path, monkeypatch):
    bench, run = set_up_bench(home, tmp_path), Run(Variant("random"), 0, 1e-2)
    before = {name: value.clone() for name, value in bench.loaded.model.state_dict().items()}
    refused("^random, .*: its learning rate is not known yet. Do the runs before it first", bench.carry_out,
            Run(Variant("random"), 0, None))  # fmt: skip

    def fails(*arguments, **options):
        raise next(errors)

    full = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."
    errors = iter(
        [RuntimeError(full), MemoryError(), LoraInitError("no such layer."), RuntimeError("odd"), KeyError(3)]
    )
    monkeypatch.setattr(workbench, "train", fails)
    for said in ("out of memory. Try a smaller", "out of memory. Try a smaller", "no such layer."):
        record = bench.carry_out(run)
        assert record["status"] == "failed" and record["error"].startswith(said) and record["plain_loss"] > 0
    for kind in (RuntimeError, KeyError):
        with pytest.raises(kind):
            bench.carry_out(run)
    assert all(torch.equal(value, before[name]) for name, value in bench.loaded.model.state_dict().items())


@pytest.mark.parametrize("start", ["eva", "eva+2-batches", "eva-grad+3-batches", "eva-uncentred"])
@pytest.mark.slow
def test_statistics_are_kept_by_what_they_are_of(start, home, tmp_path, monkeypatch):
    real, seen, shown = workbench.collect, [], []

    def collect(model, batches, *given, progress, **more):
        made = real(model, batches, *given, progress=progress, **more)
        seen.append(made.provenance.n_batches)
        shown.append(progress)
        return made

    monkeypatch.setattr(workbench, "collect", collect)
    bench = set_up_bench(home, tmp_path, steps=4)
    bench.carry_out(Run(Variant.parse(start), 0, 1e-2))
    (file,) = (tmp_path / "statistics").iterdir()
    kind, n_batches = {
        "eva": ("centred", 8), "eva+2-batches": ("centred-2", 2), "eva-grad+3-batches": ("centred-gradients-3", 3),
        "eva-uncentred": ("uncentred", 8),
    }[start]  # fmt: skip
    assert file.name.rpartition("-")[0] == f"seed0-{kind}" and seen == [n_batches]
    assert shown == [False]  # of a bar: the steps of the run have one


@pytest.mark.parametrize(("text", "name"), [
    ("processor\t: 0\nmodel name\t: A: 1 GHz\nmodel name\t: B\n", "A: 1 GHz"), ("processor\t: 0\n", "z80"),
    (None, "z80"),
])  # fmt: skip
def test_the_processor_is_named_by_the_system_or_else_by_its_kind(text, name, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(workbench, "Path", lambda path: file if path == "/proc/cpuinfo" else None)
    monkeypatch.setattr("platform.machine", lambda: "z80")
    for own in ("", "Zilog"):
        monkeypatch.setattr("platform.processor", lambda own=own: own)
        assert workbench.processor() == (own or name if name == "z80" else name)


@pytest.mark.slow
def test_starts_by_the_gradient_learn_from_the_loss_of_the_task(home, tmp_path):
    """A language model and a classifier; the steps begin below random, the base is put back after each."""
    starts = ("random", "eva", "eva-grad", "grad-a", "natural-gradient", "lora-ga", "lora-one", "gradient-ranks")
    found = compare(
        home, tmp_path / "lm", starts=starts, steps=12, seeds=1, learning_rates=(1e-4,), evaluation_points=[6]
    )
    records = {record["start"]: record for record in found.records if "+" not in record["start"]}
    assert set(records) == set(starts) and {record["status"] for record in records.values()} == {"finished"}
    begin = {start: record["report_loss"][0] for start, record in records.items()}
    assert begin["lora-one"] < begin["random"] - 0.01
    for start in starts:
        if start != "lora-one":
            # lora-ga takes weights apart, which rounds
            assert begin[start] == pytest.approx(begin["random"], rel=1e-5), start
            assert records[start]["report_loss"][-1] < begin[start], start
    assert records["gradient-ranks"]["ranks"] is not None
    files = sorted(file.name.rpartition("-")[0] for file in (tmp_path / "lm" / "statistics").iterdir())
    assert files == ["seed0-centred", "seed0-centred-gradients"]
    classes = compare(
        home, tmp_path / "classes", model="bert", label="first", starts=("random", "eva-grad"), seeds=1,
        learning_rates=(1e-3,),
    )  # fmt: skip
    assert {record["status"] for record in classes.records} == {"finished"}


def test_settings_say_all_that_shapes_a_run(home, tmp_path):
    bench = set_up_bench(home, tmp_path)
    made, model = bench.settings("its name"), bench.loaded.model
    known = {name: made.pop(name) for name in ("fingerprint", "config", "examples", "data")}
    assert known["fingerprint"] == fingerprint(model) and known["config"] == model_config(model)
    assert "rows.jsonl" in known["data"] == bench.task.data and len(known["examples"]) == 3
    assert made == {
        "format": 3, "task": bench.task.label, "kind": bench.task.kind, "model": "its name",
        "model_class": "LlamaForCausalLM", "folds": bench.folds, "normalize": bench.task.normalize, "retain_data": None,
        **asdict(bench.shape), "dtype": "float32", "device": "cpu", **asdict(bench.training),
        "schedule": "linear warm-up, cosine to zero",
        "optimizer": "AdamW, no weight decay, gradients clipped to norm 1", "statistics_batches": 8,
    }  # fmt: skip
    assert json.loads(json.dumps(made)) == made
    bank = SimpleNamespace(in_words=lambda: "bank: 2 adapters")
    more = replace(bench, strengths=(0.5, 1.0), bank=bank, own={"mine": again}).settings("its name")
    assert (more["strengths"], more["bank"], [*more["own"]]) == ([0.5, 1.0], "bank: 2 adapters", ["mine"])


def test_the_texts_beside_the_examples_and_the_float_weights_are_told_by_what_they_hold(home, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(f"one dog run to the {name}\nmy red hats")
        torch.manual_seed(len(name) + (name == "two"))
        save_model(tiny_llama(num_hidden_layers=1), tmp_path / name / "model")

    def hashes(retain, replay, weights):
        given = dict(retain_data=tmp_path / retain / "text.txt", replay=tmp_path / replay / "text.txt")
        bench = set_up_bench(home, tmp_path, **given)
        return replace(bench, float_weights=tmp_path / weights / "model").settings("llama")["examples"]

    first = hashes("one", "one", "one")
    for place, name in enumerate(("text to retain", "text to replay", "float weights")):
        other = hashes(*["two" if i == place else "one" for i in range(3)])
        assert {key for key in first if first[key] != other[key]} == {name}


@pytest.mark.parametrize("asked", [{"retain_data"}, {"replay"}, {"retain_data", "replay"}, set()])
def test_the_texts_beside_the_examples_are_told_in_the_settings(asked, home, tmp_path):
    for name in asked:
        (tmp_path / f"{name}.txt").write_text(f"one dog run to the {name}\nmy red hats")
    made = set_up_bench(home, tmp_path, **{name: tmp_path / f"{name}.txt" for name in asked}).settings("llama")
    told = {name: made.get(name) for name in ("retain_data", "replay")}
    assert {name for name, text in told.items() if text is not None} == asked
    assert all(name in told[name] and "2 of 2 examples" in told[name] for name in asked)


def test_statistics_are_of_the_first_batches_of_a_seed_and_the_layers_that_get_an_adapter(home, tmp_path, monkeypatch):
    seen, real = [], workbench.collect

    def collect(model, batches, *given, **more):
        seen.extend(batch["input_ids"].tolist() for batch in batches)
        return real(model, batches, *given, **more)

    monkeypatch.setattr(workbench, "collect", collect)
    bench = set_up_bench(home, tmp_path, target_modules=["v_proj"])
    stats = bench.statistics(3, center=True, gradients=False, n_batches=2)
    assert seen == [bench.task.batch(items)["input_ids"].tolist() for items in bench.task.order(3, 2, 4)]
    assert [*stats] == ["model.layers.0.self_attn.v_proj"]
    classifier = set_up_bench(home, tmp_path, "bert", label="first", completion=None)
    stats = classifier.statistics(0, center=True, gradients=False, n_batches=1)
    assert len([*stats]) > 3 and "classifier" not in stats  # which is trained whole


def test_a_training_is_given_what_its_run_says(home, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        workbench, "train", lambda *words, **how: given.append((words[1:], how)) or TrainingResult(report_loss=[2.0])
    )
    (tmp_path / "text.txt").write_text("one dog run\nmy red hats")
    bench = set_up_bench(home, tmp_path, replay=tmp_path / "text.txt")

    def on_step():
        pass

    record = bench.carry_out(Run(Variant("random"), 2, 3e-3), on_step)
    how = dict(learning_rate=3e-3, seed=2, plain_loss=record["plain_loss"], replay=bench.replay, on_step=on_step)
    assert given.pop() == ((bench.task, bench.training), how)
    replace(bench, replay=None).carry_out(Run(Variant("random", steps=9), 2, 3e-3))
    (words, how), longer = given.pop(), replace(bench.training, steps=9, evaluation_points=[0, 9])
    assert words == (bench.task, longer) and how["replay"] == ()


@pytest.mark.parametrize("model", ["llama", "bert"])
@pytest.mark.slow
def test_ranks_are_kept_where_they_differ_from_the_one_that_was_asked_for(model, home, tmp_path, monkeypatch):
    monkeypatch.setattr(workbench, "train", lambda *_, **__: TrainingResult(report_loss=[2.0]))
    more = dict(label="first", completion=None) if model == "bert" else {}
    bench = set_up_bench(home, tmp_path, model, **more)
    records = {name: bench.carry_out(Run(Variant(name), 0, 1e-2)) for name in ("random", "gradient-ranks")}
    assert records["random"]["ranks"] is None and records["gradient-ranks"]["ranks"] is not None
    assert all(0.0 < record["run_seconds"] < 60.0 for record in records.values())


def test_a_start_that_does_not_fit_has_no_rate_and_the_others_have(home, tmp_path):
    bench = replace(set_up_bench(home, tmp_path), own={"mine": does_not_fit})
    before = snapshot(bench.loaded.model)
    assert [*bench.measured_rates([Variant("mine"), Variant("random")])] == ["random"]
    assert_same(before, snapshot(bench.loaded.model))


def test_the_circumstances_of_a_run_are_what_rounds_its_sums():
    made = workbench.circumstances()
    assert made["threads"] == torch.get_num_threads() and made["processor"]
    assert made["versions"] == {
        "lora_init": lora_init.__version__, "torch": version("torch"), "transformers": version("transformers"),
        "peft": version("peft"), "python": platform.python_version(),
    }  # fmt: skip
    assert [*made] == ["threads", "processor", "versions"]


def test_statistics_of_a_seed_say_what_they_were_made_of(home, tmp_path):
    bench = set_up_bench(home, tmp_path)
    made = bench.statistics(2, center=False, gradients=True, n_batches=1).provenance
    assert (made.seed, made.center, made.gradients, made.n_batches, made.rank) == (2, False, True, 1, bench.shape.rank)
    assert made.data.endswith("training examples in the order of seed 2")
    assert (
        not {"own", "bank", "replay", "quantisation"} & bench.settings("llama").keys()
    )  # of which it has none: older comparisons go on
    bench.loaded.model.config.quantization_config = {"quant_method": "one of its own"}
    assert bench.settings("llama")["quantisation"] == {"quant_method": "one of its own"}


def test_a_classifier_is_trained_in_float32_whatever_its_checkpoint_is_in(home, tmp_path, monkeypatch):
    """Where half precision is no slower, so that a language model stays in it."""
    monkeypatch.setattr("lora_init.loading.models.is_better_in_float32", lambda *_: False)
    model = AutoModelForSequenceClassification.from_pretrained(home / "bert", dtype=torch.bfloat16)
    save_model(model, tmp_path / "half")
    given = dict(model=tmp_path / "half", label="first", completion=None)
    assert set_up_bench(home, tmp_path, **given).loaded.model.dtype == torch.float32
    refused("^dtype='bfloat16': the head of a classifier", set_up_bench, home, tmp_path, **given, dtype="bfloat16")


def test_a_check_reads_a_few_batches_once_for_each_kind_and_builds_on_one_layer(home, tmp_path, monkeypatch):
    bench = replace(set_up_bench(home, tmp_path), own={"mine": again})
    collecting, preparing, collected, prepared = workbench.collect, workbench.prepare, [], []

    def collect(model, batches, layers, **options):
        collected.append((len(batches), layers, options["center"], options["gradients"], options["progress"]))
        warnings.warn("so few batches", stacklevel=1)
        return collecting(model, batches, layers, **options)

    def prepare(variant, inputs):
        made = preparing(variant, inputs)
        prepared.append((str(variant), sorted(made.ranks.values())))
        return made

    monkeypatch.setattr(workbench, "collect", collect)
    monkeypatch.setattr(workbench, "prepare", prepare)
    before, filters = snapshot(bench.loaded.model), []
    names = ("random", "eva", "eva-rho1", "eva-uncentred", "eva-grad", "lora-one", "pissa", "full", "bank-nearest",
             "mine", "unknown")  # fmt: skip
    with warnings.catch_warnings(action="error"):
        filters += warnings.filters
        bench.check([*map(Variant.parse, names)])
        assert warnings.filters == filters
    assert_same(before, snapshot(bench.loaded.model))
    (first, *_) = find_targets(bench.loaded.model, "all-linear").layers
    assert collected == [
        (4, [first], True, False, False), (4, [first], False, False, False), (4, [first], True, True, False),
    ]  # fmt: skip
    assert prepared == [(name, [2] * (7 if name == "mine" else 1)) for name in names if name not in names[7:9]][:-1]


@pytest.mark.parametrize(("n_train", "size", "wanted", "of_statistics", "held_out"), [
    (100, 4, None, 8, 4), (40, 4, None, 8, 2), (24, 4, None, 5, 1), (24, 4, 3, 3, 1), (24, 4, 99, 5, 1),
    (4, 4, None, 1, 1), (9, 4, None, 1, 1), (200, 1, 16, 16, 16),
])  # fmt: skip
def test_no_example_is_read_twice_and_some_are_left_for_the_size_of_a_step(
    n_train, size, wanted, of_statistics, held_out, home, tmp_path
):
    bench = set_up_bench(home, tmp_path, train_samples=4)
    task = replace(bench.task, train=bench.task.train * 50)
    bench = replace(
        bench, task=replace(task, train=task.train[:n_train]), training=replace(bench.training, batch_size=size)
    )
    assert (bench.n_batches(wanted), bench._n_held_out()) == (of_statistics, held_out)


def changing(model, seed):
    """A start that takes what it adds off the base."""
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    return again(model, seed)


@pytest.mark.parametrize(("start", "status", "retained", "dialed", "kept"), [
    ("random", "finished", True, True, True), ("random", "unstable", False, False, True),
    ("pissa", "finished", True, False, True), ("mine", "finished", True, True, True),
    ("changing", "finished", True, False, False), ("full", "finished", True, False, None),
])  # fmt: skip
@pytest.mark.slow
def test_what_is_measured_and_kept_of_a_run_depends_on_its_start_and_its_end(
    start, status, retained, dialed, kept, home, tmp_path, monkeypatch
):
    result = TrainingResult(status=status, report_loss=[3.0, 2.5, 2.0])
    monkeypatch.setattr(workbench, "train", lambda *_, **__: replace(result))
    (tmp_path / "other.txt").write_text("one dog run\nmy red hats")
    bench = set_up_bench(home, tmp_path, retain_data=tmp_path / "other.txt")
    bench = replace(bench, own={"mine": again, "changing": changing}, strengths=(0.5, 1.0))
    run = Run(Variant(start), 0, 1e-2)
    record = bench.carry_out(run, keep=kept is not None)
    assert (record["retain_loss"] is not None, record["dial"] is not None) == (retained, dialed)
    if dialed:
        assert [strength for strength, *_ in record["dial"]] == [0.5, 1.0]
        assert record["dial"][1][1:] == [2.0, record["retain_loss"][1]]
    assert ("adapter_model.safetensors" in record.get("adapter", ())) is bool(kept)
    assert ("adapter" in record) is (kept is not None)
    for fewer in (replace(bench, strengths=()), replace(bench, retain=None, _before={})):
        record = fewer.carry_out(run)
        assert record["dial"] is None and (record["retain_loss"] is not None) == (retained and fewer.retain is not None)


def test_the_peak_of_memory_is_that_of_the_run_and_not_of_what_was_measured_before(home, tmp_path, monkeypatch):
    seen, bench = [], set_up_bench(home, tmp_path)
    for name in ("evaluate", "reset_peak", "prepare", "train", "peak_bytes"):
        function = getattr(workbench, name)
        monkeypatch.setattr(
            workbench, name, lambda *a, name=name, function=function, **k: seen.append(name) or function(*a, **k)
        )
    bench.carry_out(Run(Variant("random"), 0, 1e-2))
    assert seen == ["evaluate", "reset_peak", "prepare", "train", "peak_bytes"]


def test_a_rate_is_measured_on_the_first_batches_and_for_the_length_of_the_runs(home, tmp_path, monkeypatch):
    bench, asked = set_up_bench(home, tmp_path), []

    def measure(model, batches, length, freeze_a):
        asked.append(([batch["input_ids"].tolist() for batch in batches], length, freeze_a))
        return len(asked)

    monkeypatch.setattr(workbench, "measure_rate", measure)
    starts = [Variant("random"), Variant("full"), Variant("random-frozen-a")]
    assert bench.measured_rates(starts) == {"random": 1, "random-frozen-a": 2}
    first = [bench.task.batch(items)["input_ids"].tolist() for items in bench.task.order(0, 4, 4)]
    length = TrainingLength(6, 4, len(bench.task.train))
    assert asked == [(first, length, False), (first, length, True)]


def test_a_start_learns_from_the_first_examples_of_its_seed_and_is_stepped_on_the_next(home, tmp_path, monkeypatch):
    bench, asked, real = set_up_bench(home, tmp_path), [], workbench.prepare
    monkeypatch.setattr(workbench, "prepare", lambda variant, inputs: asked.append(inputs) or real(variant, inputs))
    monkeypatch.setattr(workbench, "train", lambda *_, **__: TrainingResult(report_loss=[2.0]))
    bench = replace(bench, own={"mine": again})
    for name, seed, n in (("random", 0, 8), ("mine", 1, 8), ("random+3-batches", 2, 3)):
        bench.carry_out(Run(Variant.parse(name), seed, 1e-2))
        inputs = asked.pop()
        batches = [bench.task.batch(items)["input_ids"].tolist() for items in bench.task.order(seed, n + 4, 4)]
        assert [batch["input_ids"].tolist() for batch in inputs.batches] == batches[:n]
        held_out = [row for batch in inputs.held_out() for row in batch["input_ids"].tolist()]
        assert sorted(held_out) == sorted(row for batch in batches[n:] for row in batch)
        assert (inputs.seed, inputs.own) == (seed, again if name == "mine" else None)


def test_the_seconds_of_statistics_are_those_of_each_start_that_reads_them(home, tmp_path, monkeypatch):
    bench = set_up_bench(home, tmp_path)
    monkeypatch.setattr(workbench, "train", lambda *_, **__: TrainingResult(report_loss=[2.0]))
    made = bench.statistics(0, True, False)
    took = replace(made.provenance, seconds={"passes": 1000.0, "directions": 500.0})
    bench.statistics = lambda *_: replace(made, provenance=took)
    taken = {}
    for name in ("random", "eva"):
        taken[name] = bench.carry_out(Run(Variant(name), 0, 1e-2))["initialisation_seconds"]
    assert 1500.0 < taken["eva"] < 1600.0 and 0.0 < taken["random"] < 100.0


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_new_head_is_drawn_as_wide_as_the_model_says_and_nothing_else_is(has_bias, home, tmp_path):
    loaded = set_up_bench(home, tmp_path, "bert", label="first", completion=None).loaded
    loaded.model.config.initializer_range = 0.5
    if not has_bias:
        loaded.model.classifier.bias = None
    loaded = replace(loaded, drawn=frozenset({"classifier.weight", "bert.pooler.dense.weight"}))
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    Workbench._renew_head(None, loaded, 3)
    after = loaded.model.state_dict()
    head = after.pop("classifier.weight")
    assert torch.equal(head, 0.5 * torch.randn(head.shape, generator=torch.Generator().manual_seed(3)))
    assert not after.pop("classifier.bias", torch.zeros(1)).any()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize(("fold", "name"), [
    ("train", "examples to train on"), ("selection", "examples to select by"), ("report", "examples to report"),
])  # fmt: skip
def test_settings_tell_other_examples_by_the_fold_that_they_are_in(fold, name, home, tmp_path):
    bench = set_up_bench(home, tmp_path)
    items = list(getattr(bench.task, fold))
    other = replace(bench, task=replace(bench.task, **{fold: [*items[:-2], items[-1], items[-2]]}))
    hashes, others = (one.settings("llama")["examples"] for one in (bench, other))
    assert {key for key in hashes if hashes[key] != others[key]} == {name} and hashes.keys() == others.keys()
    assert bench.folds == {"train": len(bench.task.train), "selection": 8, "report": 12}
