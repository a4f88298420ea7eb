"""compare() end to end on a tiny model: what it makes, that it goes on after a kill, and what it may claim."""

import dataclasses
import json
import math
import re
import shlex
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import typer

import lora_init
from lora_init import Start
from lora_init.cli.app import app as cli
from lora_init.comparison import compare as comparing
from lora_init.comparison import report, workbench
from lora_init.comparison.budget import RunBudget
from lora_init.comparison.compare import Comparison, _init_command, _with_kept_rates
from lora_init.comparison.findings import summarise
from lora_init.comparison.runs import Run, RunPlan, read_runs
from lora_init.comparison.size import SIZES
from lora_init.comparison.starts import AdapterShape, StartInputs, prepare
from lora_init.comparison.tables import run_tables
from lora_init.comparison.tasks import LoadingOptions
from lora_init.comparison.training import TrainingResult
from lora_init.comparison.variants import REFERENCE, Variant
from lora_init.comparison.workbench import RunRecord, Workbench
from lora_init.errors import LoraInitError
from lora_init.layers.targets import find_targets
from lora_init.rates.learning_rate import LearningRate, Response
from lora_init.rates.training_length import TrainingLength
from tests import comparisons
from tests.collection.made import labelled
from tests.commands import WORDS
from tests.comparison.made import again, compare, set_up_bench, without_clock
from tests.comparisons import planted, settings, write
from tests.conftest import batches_for, refused, tiny_llama
from tests.processes import FORKS

RUNS = [Run(REFERENCE, 9, 1e-3)]  # one more than those that ended


@pytest.fixture(scope="module")
def full(home, tmp_path_factory):
    """All that a language model can be compared by."""
    output = tmp_path_factory.mktemp("full") / "out"
    retain = home / "retain.txt"
    retain.write_text("\n".join(f"one dog run to the {word}" for word in WORDS[:8]))
    lines = []
    found = compare(
        home, output, drawn=True, options="options", retain_data=retain, retain_samples=8, say=lines.append,
        learning_rates=[1e-3],
        starts=("random", "orthogonal", "eva-rho1", "eva-rho2", "eva-ranks", "eva-frozen-a"),
    )  # fmt: skip
    return found, lines


# Records


def of_equal_steps(records):
    """All but the runs of random with twice the steps, which come where a start happens to be better."""
    return [record for record in records if "-steps" not in record["start"]]


@pytest.mark.slow
def test_every_run_is_there_with_every_key(full):
    found, _ = full
    records = read_runs(found.directory)
    assert [record["status"] for record in records] == ["finished"] * len(found.planned)
    for record in of_equal_steps(records):
        kinds = (RunRecord, TrainingResult)
        assert set(record) == {field.name for kind in kinds for field in dataclasses.fields(kind)}
        assert record["evaluation_points"] == [0, 3, 6] and len(record["report_loss"]) == 3
        assert len(record["training_loss"]) == 6
        assert set(record["metrics"]) == set(record["metrics_before"]) == {"accuracy", "macro_f1", "mcc"}
        assert len(record["retain_loss"]) == 2
        assert [point[0] for point in record["dial"]] == [0.4, 0.55, 0.7, 0.85, 1.0, 1.15]
        assert record["dial"][4][1:] == [record["report_loss"][-1], record["retain_loss"][1]]
        # With less of the adapter the model is nearer to the plain one, on the task and on other text.
        assert abs(record["dial"][0][2] - record["retain_loss"][0]) < abs(
            record["dial"][4][2] - record["retain_loss"][0]
        )
    starts = {record["start"] for record in records}
    assert {start for start in starts if "+equal" in start} == {
        f"{x}+equal-parameters" for x in ("eva-rho2", "eva-frozen-a")
    }


def test_the_command_that_is_proposed_makes_an_adapter_as_the_runs_did(full, home):
    """What a run reads and what shapes it, where the defaults of the two commands differ, too."""
    name, *proposed = shlex.split(full[0].settings["init"])[1:]
    init = typer.main.get_command(cli).commands[name]
    read = init.make_context(name, [*proposed, "-o", "out"]).params
    assert (read["model"], read["data"]) == (str(home / "llama"), str(home / "rows.jsonl"))
    made = dict(template="{passage}", completion=" {answer}", batch_size=4, rank=2, target_modules="all-linear")
    alike = ("max_length", "split", "subset", "format", "label", "dtype", "quantize", "trust_remote_code")
    made |= {name: getattr(LoadingOptions(), name) for name in alike}
    assert {name: read[name] for name in made} == made


def test_without_the_dial_adapters_are_evaluated_as_trained(full, home, tmp_path):
    found, _ = full
    options = dict(retain_data=home / "retain.txt", retain_samples=8, dry_run=True)
    with_dial, without = (compare(home, tmp_path, **options, dial=dial).outlook for dial in (True, False))
    assert 0.0 < with_dial.dial_seconds < with_dial.seconds and without.dial_seconds == 0.0
    assert found.settings["strengths"] == [0.4, 0.55, 0.7, 0.85, 1.0, 1.15]
    assert (found.directory / "frontiers.png").exists() and not (found.directory / "forgetting.png").exists()


@pytest.mark.slow
def test_every_start_is_trained_with_the_same_replayed_text(home, tmp_path):
    texts = home / "replay.txt"
    texts.write_text(
        "\n".join(f"{start} {word}" for word in WORDS[:4] for start in ("the red hats run to", "my", "one"))
    )
    options = dict(learning_rates=[1e-2], seeds=1, retain_data=texts, retain_samples=12, dial=False)
    plain = compare(home, tmp_path / "0", **options)
    found = compare(home, tmp_path / "1", **options, replay=texts)
    assert "12 of 12 examples" in found.settings["replay"] and "replay" not in plain.settings
    (order,) = {record["data_order"] for record in found.records}
    assert order != plain.records[0]["data_order"]
    for with_text, alone in zip(found.records, plain.records, strict=True):
        assert with_text["retain_loss"][1] < alone["retain_loss"][1]
    with pytest.raises(LoraInitError, match="replay is for language models"):
        compare(home, tmp_path / "classes", model="bert", label="first", replay=texts)


def test_no_text_is_longer_than_asked_whatever_it_is_for(home, tmp_path):
    texts = home / "long.txt"
    texts.write_text("\n".join(" ".join(WORDS[i : i + 12]) for i in range(4)))
    bench = set_up_bench(home, tmp_path, retain_data=texts, replay=texts, max_length=9)
    for batches in (bench.retain, bench.replay):
        assert {batch["input_ids"].shape[1] for batch in batches} == {9}


def test_forgetting_is_measured_on_as_many_texts_as_asked(home, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(" ".join(WORDS[i : i + 4]) for i in range(9)))
    bench = set_up_bench(home, tmp_path / "out", retain_data=texts, retain_samples=5)
    assert sum(len(batch["input_ids"]) for batch in bench.retain) == 5


def test_all_starts_begin_as_the_plain_model_and_see_the_same_data(full):
    records = of_equal_steps(full[0].records)
    assert len({record["report_loss"][0] for record in records}) == 1
    assert len({record["retain_loss"][0] for record in records}) == 1
    for seed in (0, 1):
        assert len({record["data_order"] for record in records if record["seed"] == seed}) == 1
    assert len({record["data_order"] for record in records}) == 2
    counts = {r["trainable_parameters"] for r in records if r["ranks"] is None and "frozen-a" not in r["start"]}
    assert len(counts) == 1
    for record in records:
        if record["ranks"] is not None and record["start"] in ("eva-rho2", "eva-ranks"):
            assert sum(record["ranks"].values()) <= 2 * 7
        if "+equal-parameters" in record["start"]:
            assert record["trainable_parameters"] <= counts.copy().pop()


def test_a_package_that_the_report_needs_is_missed_before_anything_is_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as where it is not installed
    with pytest.raises(LoraInitError, match="this needs sklearn, which is not installed"):
        lora_init.compare("no-model", "no-data", tmp_path / "out")


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LoraInitError, match=r"file cannot be written to \(Not a directory\)"):
        lora_init.compare("no-model", "no-data", tmp_path / "file" / "out")


@pytest.mark.slow
def test_the_best_rate_of_two_seeds_goes_to_the_other(home, tmp_path):
    found = compare(home, tmp_path / "out", seeds=3, starts=["random", "eva-rho1"], learning_rates=[1e-4, 1e-2])
    for start in ("random", "eva-rho1"):
        own = [record for record in found.records if record["start"] == start]
        swept = {rate: [r["selection_loss"] for r in own if r["learning_rate"] == rate and r["seed"] < 2]
                 for rate in (1e-4, 1e-2)}  # fmt: skip
        assert all(len(losses) == 2 for losses in swept.values())
        best = min(swept, key=lambda rate: sum(swept[rate]))
        assert [record["learning_rate"] for record in own if record["seed"] == 2] == [best]


# Classifiers


# Going on


def test_what_is_done_to_its_table_changes_no_comparison():
    table = pd.DataFrame({"start": ["eva", "random"], "loss": [1.0, 2.0]})
    comparison = SimpleNamespace(summary=SimpleNamespace(table=table))
    Comparison.to_pandas(comparison).drop(columns="loss", inplace=True)
    Comparison.to_pandas(comparison).loc[0, "loss"] = 9.0
    assert [*Comparison.to_pandas(comparison).columns] == ["start", "loss"] and [*table["loss"]] == [1.0, 2.0]


@pytest.mark.slow
def test_a_second_call_does_nothing_again_and_can_add(home, tmp_path, monkeypatch):
    found = compare(home, tmp_path / "out", learning_rates=[1e-2], starts=["random"])
    written = read_runs(tmp_path / "out")

    def fail(*_, **__):
        raise AssertionError("ran again")

    with monkeypatch.context() as patched:
        patched.setattr(workbench, "train", fail)
        again = compare(home, tmp_path / "out", learning_rates=[1e-2], starts=["random"])
    assert again.records == found.records and again.summary.verdicts == found.summary.verdicts
    assert read_runs(tmp_path / "out") == written
    more = compare(home, tmp_path / "out", learning_rates=[1e-2], starts=["orthogonal"], seeds=[2])
    assert {record["start"] for record in more.records} == {"random", "orthogonal"}
    assert more.settings["starts"] == ["random", "orthogonal"] and more.settings["seeds"] == [0, 1, 2]


def test_a_comparison_that_goes_on_keeps_the_rates_that_it_measured(tmp_path):
    """On another machine their last digit may differ, and they are settings, which must stay."""
    measured = {"random": 1.1e-3, "eva": 2e-3}
    plan = RunPlan([REFERENCE, Variant("eva")], [], [0], "full", recommended=measured)
    asked, kept = RunPlan([REFERENCE], [1e-3], [0], "full"), write(tmp_path / "kept", [], recommended={"random": 1e-3})
    assert _with_kept_rates(plan, tmp_path / "new").recommended == measured
    assert _with_kept_rates(plan, kept).recommended == {"random": 1e-3, "eva": 2e-3}
    assert _with_kept_rates(asked, kept) == asked


def run_until_killed(home, output, ended):
    """Compare, but wait in the third run, so that nothing depends on how fast the machine is."""
    train, calls = workbench.train, []

    def waiting(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            signal.pause()
        return train(*arguments, **options)

    workbench.train = waiting
    compare(home, output, learning_rates=[1e-2], seeds=3, say=ended.send)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_run_it_ends_with_the_same_table(home, tmp_path):
    uninterrupted = compare(home, tmp_path / "whole", learning_rates=[1e-2], seeds=3)
    for _ in range(2):
        lines, ended = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=run_until_killed, args=(home, tmp_path / "killed", ended))
        process.start()
        ended.close()
        assert lines.recv().startswith("data: ") and all(": finished" in lines.recv() for _ in range(2))
        process.kill()
        process.join()
    assert len(read_runs(tmp_path / "killed")) == 4 < len(uninterrupted.records)
    resumed = compare(home, tmp_path / "killed", learning_rates=[1e-2], seeds=3)
    assert without_clock(read_runs(tmp_path / "killed")) == without_clock(read_runs(tmp_path / "whole"))
    tables, expected = run_tables(resumed.summary), run_tables(uninterrupted.summary)
    assert all(tables[name].equals(expected[name]) for name in expected if name not in ("cost", "runs"))
    assert resumed.summary.verdicts == uninterrupted.summary.verdicts


@pytest.mark.slow
def test_ctrl_c_leaves_a_report_of_what_ended(home, tmp_path, monkeypatch):
    real, calls = workbench.train, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(workbench, "train", interrupted)
    lines = []
    with pytest.raises(KeyboardInterrupt):
        compare(home, tmp_path / "out", say=lines.append)
    assert len(read_runs(tmp_path / "out")) == 2
    assert "random" in (tmp_path / "out" / "report.md").read_text()
    kept = "2 of 8 runs are kept, with their report. The same command goes on from there."
    assert lines[3:] == [f"{tmp_path / 'out'}: {kept}"]


# Runs that go wrong


def broken_start(model, seed):
    raise TypeError("got an unexpected keyword argument 'r'")


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("kind", ["a function", "an adapter of another base", "a package"])
@pytest.mark.slow
def test_a_start_that_cannot_be_built_is_refused_before_the_first_run(
    kind, dry_run, home, tmp_path, monkeypatch, installed
):
    monkeypatch.setattr(workbench, "train", lambda *_, **__: pytest.fail("a run began"))
    start, said = ("mine", broken_start), "start 'mine': its function raised TypeError: got an unexpected keyword"
    if kind == "an adapter of another base":
        again(tiny_llama(num_hidden_layers=3), 0).save_pretrained(tmp_path / "theirs")
        start, said = ("mine", tmp_path / "theirs"), "start 'mine': "
    if kind == "a package":
        installed("lora_init.starts", theirs=Start("theirs", "", function=lambda rank: rank + "x"))
        start, said = "theirs", r"start 'theirs' \(an unknown package\): its function raised TypeError: unsupported"
    refused(said, compare, home, tmp_path / "out", starts=["random", start], dry_run=dry_run)
    assert not (tmp_path / "out" / "runs").exists()


def with_another_base(model, seed):
    """A start that takes what it adds off the base."""
    return lora_init.initialize(model, batches_for("llama", seed=seed), rank=2, lora_alpha=16, method="lora-ga",
                                gamma=0.5, seed=seed)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_start_of_ones_own_that_changes_the_base_is_neither_dialed_nor_kept(home, tmp_path, monkeypatch):
    whole = report.summarise
    monkeypatch.setattr(report, "summarise", lambda *given: dataclasses.replace(whole(*given), start="mine"))
    lines, given = [], dict(retain_data=home / "rows.jsonl", retain_template="{passage}", retain_samples=8)
    starts = ["random", ("mine", with_another_base), ("again", again)]
    found = compare(home, tmp_path / "out", starts=starts, learning_rates=[1e-3], seeds=1, say=lines.append, **given)
    dialed = {record["start"]: record["dial"] is not None for record in found.records}
    assert dialed == {"random": True, "mine": False, "again": True}
    assert lines[-1].endswith("best is not made: mine changes the weights of the model") or any(
        "is not made: mine changes the weights of the model" in line for line in lines
    )
    assert not (tmp_path / "out" / "best").exists()


def test_an_adapter_of_ones_own_is_put_on_as_its_record_says(home, tmp_path):
    stats = lora_init.collect(tiny_llama(), labelled("llama"), rank=2, gradients=True)
    for name, way in (("frozen", dict(freeze_a=True)), ("other base", dict(method="lora-ga", gamma=0.5))):
        lora_init.build_adapter(stats, 2, lora_alpha=16, **way).save_pretrained(tmp_path / name)
    model = tiny_llama()
    prepared = prepare(Variant("mine"), StartInputs(model, AdapterShape(2, 16), 0, own=tmp_path / "frozen"))
    trains = {name: p.requires_grad for name, p in prepared.peft_model.named_parameters() if ".lora_" in name}
    assert trains and all(trains[name] == (".lora_B." in name) for name in trains)
    prepared.release()
    refused("changes the base weights, so it does not fit", prepare, Variant("mine"),
            StartInputs(model, AdapterShape(2, 16), 0, own=tmp_path / "other base"))  # fmt: skip


# What may be claimed


def useless(model, seed):
    """A is zero and stays zero, so nothing can be learned."""
    peft_model = again(model, seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_A" in name:
            parameter.data.zero_()
            parameter.requires_grad_(False)
    return peft_model


@pytest.mark.slow
def test_a_planted_winner_is_found_and_a_planted_tie_is_not_called(home, tmp_path):
    found = compare(
        home, tmp_path / "out", starts=["random", ("useless", useless), ("again", again)], learning_rates=[1e-2],
        seeds=4, steps=12, evaluation_points=[6],
    )  # fmt: skip
    outcome = {verdict.start: verdict for verdict in found.summary.verdicts}
    assert outcome["useless"].outcome == "worse"
    assert outcome["again"].outcome == "no difference shown"
    losses = {(r["start"], r["seed"]): r["report_loss"] for r in found.records}
    for seed in range(4):
        assert losses["again", seed] == losses["random", seed]
        assert losses["useless", seed][0] == losses["useless", seed][-1] > losses["random", seed][-1]


# Planning


@pytest.mark.parametrize(("changes", "message"), [
    (dict(starts=["random", "evva"]), "start 'evva' is unknown. Did you mean eva"),
    (dict(starts=[]), "expected names, each once"),
    (dict(starts=["eva", "random", "eva"]), "expected names, each once"),
    (dict(starts=["random", ("eva", useless)]), "a new name"),
    (dict(starts=["random", ("mine", "nowhere")]), "start 'mine': nowhere is no adapter directory"),
    (dict(starts=[("mine+32-alpha", useless)]), "start 'mine+32-alpha': what follows a plus says how a start is run"),
    (dict(starts=["eva+400-batches"]), "start 'eva+400-batches': the training data make 21 batches for it."),
    (dict(rank=700), "rank=700 is larger than its input width"),
    (dict(rank=700, dry_run=True), "rank=700 is larger than its input width"),
    (dict(learning_rates=[-1e-3]), "learning_rates=[-0.001]: expected positive numbers"),
    (dict(learning_rates="1e-3"), "learning_rates=['1e-3'] and seeds=[0, 1]: expected numbers"),
    (dict(lora_alpha=-4), "lora_alpha=-4, expected a number above 0"),
    (dict(lora_alpha=0), "lora_alpha=0, expected a number above 0"),
    (dict(rank="8"), "rank='8', expected a whole number of at least 1"),
    (dict(starts="evva"), "start 'evva' is unknown"),
    (dict(statistics_batches=[0, 4]), "expected numbers of batches, each once"),
    (dict(evaluation_points=[7]), "expected rising steps from 0 to 6"),
    (dict(model="bert"), "is a BertForSequenceClassification, and a comparison trains causal language models"),
    (dict(model="bert", label="first", retain_data="rows.jsonl"), "a classifier has no loss on text"),
    (dict(model="bert", label="first", dtype="bfloat16"), "the head of a classifier is trained whole"),
    (dict(label="kind"), "label='kind' is not a column"),
    (dict(report_samples=111), "1 examples to train on, 8 to select by and 111 to report"),
    (dict(report_samples=0), "report_samples=0, expected a whole number of at least 1"),
    (dict(report_sample=12), "compare() has no argument report_sample=. Did you mean report_samples?"),
    (dict(learning_rate=1e-3), "compare() has no argument learning_rate=. Did you mean learning_rates?"),
])  # fmt: skip
def test_bad_input(home, tmp_path, changes, message):
    assert message in refused("", compare, home, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_model_is_named(tmp_path):
    said = r"^compare\(\) takes a directory or hub id in this place and got a LlamaForCausalLM\."
    refused(said, lora_init.compare, tiny_llama(), "rows.jsonl", tmp_path / "out")


@pytest.mark.parametrize(("modules", "trusted"), [("all-linear", False), (["q_proj", "v_proj"], True)])
def test_the_command_that_makes_an_adapter_has_what_was_asked_for(modules, trusted, home, tmp_path):
    bench = set_up_bench(home, tmp_path)
    bench = dataclasses.replace(bench, shape=dataclasses.replace(bench.shape, target_modules=modules))
    options = LoadingOptions(template="{a b}", completion=" {c}", split="test", trust_remote_code=trusted)
    words = shlex.split(_init_command("my model", "data", options, bench))
    listed = modules if isinstance(modules, str) else "q_proj,v_proj"
    assert words[:4] == ["lora-init", "init", "my model", "data"] and ("--trust-remote-code" in words) == trusted
    for option, value in (
        ("--target-modules", listed),
        ("--template", "{a b}"),
        ("--completion", " {c}"),
        ("--split", "test"),
        ("--rank", "2"),
    ):
        assert words[words.index(option) + 1] == value
    assert not {"--label", "--subset", "--quantize"} & {*words}
    letters = dataclasses.replace(bench, task=dataclasses.replace(bench.task, spelled_out=False))
    assert _init_command("my model", "data", options, letters) is None


def test_a_notebook_shows_the_differences_as_soon_as_there_are_any(tmp_path):
    def shown(runs):
        kept = {Run.of(run): run for run in runs}
        summary = summarise(runs, settings())
        return Comparison(tmp_path / "<out>", settings(), runs, [*kept, *RUNS], summary, [])._repr_html_()

    runs = planted({"eva": -0.01})
    before, after = shown([]), shown(runs)
    assert before == f"<p>Comparison(0 of 1 runs in {tmp_path}/&lt;out&gt;: {summarise([], settings()).headline})</p>"
    assert after.startswith(f"<p>Comparison(24 of 25 runs in {tmp_path}/&lt;out&gt;: ") and "<table" in after
    heads, cells = (re.findall(f"<{tag}>(.*)</{tag}>", after) for tag in ("th", "td"))
    assert (
        'border="1"' not in after and heads[:2] == ["start", "difference"] and len(cells) == len(heads)
    )  # no row numbers
    assert cells[0] == "eva" and cells[-1] == "better"


# What is said meanwhile, and what is kept beside the runs


class Reached(Exception):
    """The model and the data would be read now."""


@pytest.fixture
def reach(tmp_path, monkeypatch):
    """Call compare() up to where it reads the model and the data, and return what it hands on."""

    def set_up(*given, **more):
        raise Reached(*given, more)

    monkeypatch.setattr(comparing, "set_up", set_up)
    monkeypatch.chdir(tmp_path)

    def call(**changes):
        with pytest.raises(Reached) as caught:
            lora_init.compare("model", "rows.jsonl", "out", **changes)
        *_, shape, more = caught.value.args
        return shape, more["sources"], more["training"]

    return call


@pytest.mark.parametrize(("changes", "message"), [
    (dict(rank=0), "rank=0, expected a whole number of at least 1"),
    (dict(rank=1.5), "rank=1.5, expected a whole number of at least 1"),
    (dict(device="abacus"), "device 'abacus' cannot be used here"),
    (dict(statistics_batches=[]), "statistics_batches=[]: expected numbers of batches, each once"),
    (dict(statistics_batches=[4, "x"]), "statistics_batches=[4, 'x']: expected numbers of batches, each once"),
    (dict(statistics_batches=0), "statistics_batches=[0]: expected numbers of batches, each once"),
    (dict(starts="random,eva"), "starts='random,eva' is one text. Pass a list: starts=['random', 'eva']."),
    (dict(starts=["random", 3]), "starts has 3: expected names, or pairs of a name and an adapter of your own."),
    (dict(time=0), "time=0: expected a number above zero"),
    (dict(precision=2), "precision=2: expected a number above zero and below 1"),
    (dict(seeds=[1, 1]), "seeds=[1, 1]: expected whole numbers from 0 on, each once"),
    (dict(learning_rates=2), "learning_rates=[2]: expected positive numbers up to 1"),
    (dict(extend=-1), "extend=-1, expected a whole number of at least 0"),
    (dict(extend=0.5), "extend=0.5, expected a whole number of at least 0"),
    (dict(steps=0), "steps=0, expected a whole number of at least 1"),
    (dict(steps=2.5), "steps=2.5, expected a whole number of at least 1"),
    (dict(batch_size=0), "batch_size=0, expected a whole number of at least 1"),
    (dict(batch_size=2.5), "batch_size=2.5, expected a whole number of at least 1"),
    (dict(workers=-1), "workers=-1, expected a whole number of at least 1"),
    (dict(workers=1.5), "workers=1.5, expected a whole number of at least 1"),
    (dict(seeds=[0.5]), "seeds=[0.5]: expected whole numbers from 0 on, each once"),
    (dict(seeds=5.0), "seeds=[5.0]: expected whole numbers from 0 on, each once"),
    (dict(seeds=True), "seeds=[True]: expected numbers"),
    (dict(statistics_batches=[4, 2.5]), "statistics_batches=[4, 2.5]: expected numbers of batches, each once"),
    (dict(statistics_batches=2.5), "statistics_batches=[2.5]: expected numbers of batches, each once"),
    (dict(evaluation_points=[2.5]), "evaluation_points=2.5, expected a whole number of at least 0"),
    (dict(evaluation_points="10"), "evaluation_points='10', expected a whole number of at least 0"),
    (dict(gpus_per_run=0.5), "gpus_per_run=0.5 is for the name of a cluster. Leave it out."),
    (dict(workers=2, executor="ray"), "workers=2 is for this machine, and a cluster has its own. Leave one out."),
    (dict(gpus_per_run=2), "gpus_per_run=2 is for the name of a cluster. Leave it out."),
    (dict(gpus_per_run=2, executor=FORKS), "gpus_per_run=2 is for the name of a cluster. Leave it out."),
    (dict(gpus_per_run=1.5, executor="ray"), "gpus_per_run=1.5: expected a share of one GPU, or a whole number."),
    (dict(gpus_per_run=math.inf, executor="ray"), "gpus_per_run=inf: expected a share of one GPU, or a whole number."),
    (dict(gpus_per_run="2", executor="ray"), "gpus_per_run='2': expected a share of one GPU, or a whole number."),
])  # fmt: skip
@pytest.mark.usefixtures("reach")
def test_what_the_arguments_alone_tell_is_refused_before_the_model_is_read(changes, message):
    assert message in refused("", lora_init.compare, "model", "rows.jsonl", "out", **changes)


def test_the_least_of_each_number_will_do_and_one_number_may_stand_for_a_list(reach):
    shape, sources, training = reach(
        rank=1, extend=0, steps=1, seeds=1, statistics_batches=1, learning_rates=1e-3, evaluation_points=1, starts="eva"
    )
    assert (shape, sources.statistics_batches) == (AdapterShape(1, 2, "all-linear"), 1)
    assert [str(start) for start in sources.starts] == ["random", "eva"]
    assert (training.steps, training.evaluation_points) == (1, [0, 1])
    shape, sources, training = reach(rank=3, lora_alpha=5, statistics_batches=[7, 2])
    assert (shape.lora_alpha, sources.statistics_batches, training.steps) == (5, 7, 100)
    assert not (sources.own or sources.bank)


def test_numbers_of_numpy_are_taken_as_those_of_python(reach):
    """Neither the files of a comparison nor the generators that seeds are for take the others."""
    shape, sources, training = reach(
        rank=np.int64(3), lora_alpha=np.float32(5), statistics_batches=np.int64(7), seeds=np.int64(2),
        evaluation_points=np.array([2, 50]), learning_rates=np.float32(1e-3),
    )  # fmt: skip
    assert (shape, sources.statistics_batches) == (AdapterShape(3, 5, "all-linear"), 7)
    assert training.evaluation_points == [0, 2, 50, 100]
    for numbers in (comparing._read_seeds(np.int64(2), RunBudget()), comparing._read_seeds(np.arange(2), RunBudget())):
        assert numbers == [0, 1]
        json.dumps([numbers, shape.rank, shape.lora_alpha, sources.statistics_batches, training.evaluation_points])


@pytest.mark.parametrize(("modules", "alike"), [
    (["q_proj"], True), (["q_proj", "o_proj"], True), (["q_proj", "k_proj"], False),
    (["up_proj", "down_proj"], True), (["q_proj", "up_proj"], False),
])  # fmt: skip
def test_layers_cost_the_same_that_have_as_many_inputs_and_outputs_in_all(modules, alike):
    layers = find_targets(tiny_llama(num_hidden_layers=1), modules).layers
    assert len(layers) == len(modules) and comparing._ranks_cost_the_same(layers) is alike


def test_a_dry_run_of_what_has_begun_plans_what_follows_from_the_runs_that_ended(home, tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "look_ahead", lambda *given: "outlook")
    monkeypatch.setattr(Workbench, "check", lambda bench, starts: None)
    asked = dict(starts=["random"], seeds=3, dry_run=True)
    first = compare(home, tmp_path / "out", **asked)
    assert [run.learning_rate for run in first.planned if run.seed == 2] == [None] and first.records == []
    swept = [
        comparisons.record(run.start, run.learning_rate, run.seed, run.learning_rate)
        for run in first.planned if run.seed < 2
    ]  # fmt: skip
    write(tmp_path / "out", swept)
    (tmp_path / "out" / "settings.json").write_text(json.dumps(first.settings))
    again = compare(home, tmp_path / "out", **asked)
    assert [run.learning_rate for run in again.planned if run.seed == 2] == [1e-3] and len(again.records) == 4


def test_without_a_limit_there_are_five_seeds_and_with_one_as_many_as_it_may_spend():
    limited = RunBudget(precision=0.1)
    for seeds, budget, expected in (
        (None, RunBudget(), [0, 1, 2, 3, 4]), (None, limited, [*range(32)]),
        (2, limited, [0, 1]), ((3, 1), limited, [3, 1]),
    ):  # fmt: skip
        assert comparing._read_seeds(seeds, budget) == expected


@pytest.mark.parametrize(("starts", "full", "names"), [
    (None, False, ["random", "eva", "natural-gradient"]),
    (["eva"], False, ["random", "eva"]), (["eva"], True, ["random", "eva", "full"]),
    (["eva", "random"], False, ["eva", "random"]), (["full", "random"], True, ["full", "random"]),
])  # fmt: skip
def test_random_is_there_in_any_case_and_full_training_if_asked_for(starts, full, names):
    assert [str(start) for start in comparing._read_starts(starts, full, None, goes_on=False)[0]] == names


def test_paths_mean_the_same_in_another_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    there = str(tmp_path / "there")
    Path(there).mkdir()
    Path(there, "adapter_model.safetensors").touch()
    for given, expected in (
        ("there", there), (Path("there"), there), ("~/there", there),
        ("hub/id", "hub/id"), (None, None), (again, again),
    ):  # fmt: skip
        assert comparing._absolute(given) == expected
    read = comparing._read_options(dict(retain_data="there", replay="there", weights="there", template="there"))
    assert (read.retain_data, read.replay, read.weights, read.template) == (there, there, there, "there")
    _, own = comparing._read_starts(["random", ("mine", "there"), ("yours", again)], False, None, goes_on=False)
    assert own == {"mine": there, "yours": again}
    (tmp_path / "model").mkdir()
    assert [comparing.model_name(name) for name in ("model", "~/model", ".", "hub/id")] == [
        "model", "model", tmp_path.name, "hub/id",
    ]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), [
    (dict(normalize=True), "normalize=True goes with options=. Give both, or leave it out."),
    (dict(answer="right"), "answer='right' goes with options=. Give both, or leave it out."),
    (dict(retain_template="{a}"), "retain_template='{a}' goes with retain_data=. Give both, or leave it out."),
    (dict(retain_samples=9), "retain_samples=9 goes with retain_data=. Give both, or leave it out."),
    (dict(dial=False), "dial=False goes with retain_data=. Give both, or leave it out."),
    (dict(dial=True, answer="answer", retain_samples=64), None), (dict(dial=False, retain_data="texts"), None),
    (dict(normalize=True, options="a,b"), None),
])  # fmt: skip
def test_an_option_of_another_one_is_refused_without_it(changes, said):
    if said is None:
        assert {name: getattr(comparing._read_options(changes), name) for name in changes} == changes
    else:
        assert refused("", comparing._read_options, changes) == said


def test_who_does_the_runs_is_chosen_by_what_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "open_executor", lambda *given: given)
    monkeypatch.setattr(comparing, "processes", lambda n: f"{n} processes")
    pool = object()
    assert comparing._find_executor(None, None, 1, tmp_path) is None
    assert comparing._find_executor(3, None, 1, tmp_path) == "3 processes"
    assert comparing._find_executor(None, pool, 1, tmp_path) == (pool, 1, tmp_path)
    for gpus in (0, 0.5, 1, 2, 3.0):
        assert comparing._find_executor(None, "ray", gpus, tmp_path) == ("ray", gpus, tmp_path)


def test_numbers_of_batches_end_at_what_the_data_make():
    bench, lines = SimpleNamespace(n_batches=lambda wanted: min(wanted, 21)), []
    starts = [REFERENCE, Variant("eva", batches=21)]
    for given, found in (([4, 21], [4, 21]), ([16, 40, 80], [16, 21]), ([40], [21])):
        assert comparing._possible_batches(bench, starts, given, lines.append) == found
    said = "Statistics are from at most 21 batches: the training data make no more, and some are set aside."
    assert lines == [said] * 2
    starts.append(Variant("eva", batches=22))
    refused(
        r"start 'eva\+22-batches': the training data make 21 batches",
        comparing._possible_batches,
        bench,
        starts,
        [4],
        print,
    )


def test_a_comparison_that_goes_on_has_the_size_that_it_had(tmp_path):
    small = SIZES[2]
    assert comparing._kept_size(tmp_path) is None
    assert comparing._kept_size(write(tmp_path / "small", [], size=dataclasses.asdict(small))) == small
    assert comparing._kept_size(write(tmp_path / "whole", [])) == SIZES[0]
    plan = RunPlan([REFERENCE], [], [0], "full", recommended={"random": 1e-3})
    for none in ({}, {"recommended": None}):  # as of rates that were asked for
        assert _with_kept_rates(plan, write(tmp_path / "whole", [], **none)) == plan


@pytest.fixture
def doing(tmp_path, monkeypatch):
    """Do runs that end as told; return what happened."""

    def do(n_ended, error=None, report_error=None, budget=None):
        happened, log = [], SimpleNamespace(records=dict.fromkeys(range(n_ended)), path=tmp_path)

        def run_all(*given):
            happened.append("runs")
            if error:
                raise error

        def write_report(path):
            happened.append("report")
            if report_error:
                raise report_error

        monkeypatch.setattr(comparing, "run_all", run_all)
        monkeypatch.setattr(comparing, "write_report", write_report)
        monkeypatch.setattr(comparing, "keep_best", lambda *given: happened.append("best"))
        with pytest.raises(type(error)) if error else nullcontext():
            due = lambda records: ([*range(7)], [])  # noqa: E731
            comparing._do_runs(log, None, due, budget or RunBudget(), "out", happened.append)
        return happened

    return do


def test_what_is_done_at_the_end_of_all_runs_and_where_they_break_off(doing, monkeypatch):
    assert doing(2) == ["runs", "best"]
    monkeypatch.setattr("lora_init.comparison.budget.time.monotonic", lambda: 9.5)
    assert doing(2, budget=RunBudget(10.0, began=0.0)) == ["runs", "best"]
    assert doing(2, budget=RunBudget(9.0, began=0.0)) == ["runs"]  # the time is out
    for wrong in (None, LoraInitError("in use"), OSError("full")):
        assert doing(2, ValueError(), wrong) == ["runs", "report"]
        kept = "out: 2 of 7 runs are kept, with their report. The same command goes on from there."
        assert doing(2, KeyboardInterrupt(), wrong) == ["runs", "report", kept]
    none = "out: no run had ended. The same command goes on from there."
    assert doing(0, KeyboardInterrupt()) == ["runs", none] and doing(0, ValueError()) == ["runs"]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_shown_if_asked_for_and_else_on_a_terminal(terminal, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert [comparing._shows_progress(wish) for wish in (None, True, False)] == [terminal, True, False]


def test_the_command_that_makes_an_adapter_reads_as_the_runs_did():
    bench = SimpleNamespace(
        task=SimpleNamespace(spelled_out=True), shape=AdapterShape(3, 6, "all-linear"),
        training=SimpleNamespace(batch_size=5),
    )  # fmt: skip
    given = dict(
        template="{q}", format="chat", subset="s", max_length=99, dtype="bfloat16", quantize="nf4", label="kind"
    )
    words = shlex.split(_init_command("m", "d", LoadingOptions(**given), bench))
    assert dict(zip(words[4::2], words[5::2], strict=True)) == {
        "--template": "{q}", "--format": "chat", "--subset": "s", "--max-length": "99", "--dtype": "bfloat16",
        "--quantize": "nf4", "--label": "kind", "--batch-size": "5", "--rank": "3", "--target-modules": "all-linear",
    }  # fmt: skip
    for completion, options, expected in (
        (None, None, None), ("", None, None), ("", "a,b", " {right}"), (" so {right}", "a,b", " so {right}"),
        (" so", None, " so"),
    ):  # fmt: skip
        asked = LoadingOptions(template="{q}", completion=completion, options=options, answer="right")
        words = shlex.split(_init_command("m", "d", asked, bench))
        assert dict(zip(words[4::2], words[5::2], strict=True)).get("--completion") == expected


@pytest.mark.parametrize("workers", [None, 3])
def test_a_dry_run_builds_each_start_and_shares_the_time_among_workers(workers, home, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(comparing, "look_ahead", lambda *given: seen.update(workers=given[-1]) or "outlook")
    monkeypatch.setattr(Workbench, "check", lambda bench, starts: seen.update(checked=[*map(str, starts)]))
    rate = LearningRate({"layer": Response(1.0, 0.0)}, TrainingLength(6))

    def measured(bench, starts, blank=False):
        return seen.update(blank=blank) or {str(start): rate for start in starts}

    monkeypatch.setattr(Workbench, "measured_rates", measured)
    found = compare(home, tmp_path / "out", learning_rates=None, dry_run=True, workers=workers)
    assert seen == {"workers": workers or 1, "checked": ["random", "eva"], "blank": True}
    assert (found.outlook, found.files) == ("outlook", []) and found.settings["recommended"]["eva"] == rate.rate
    # Rates of a first call stay, also in what a later one plans: on another machine a last digit may differ.
    kept = {"random": 1.1e-3, "eva": 2e-3}
    settings_file = tmp_path / "out" / "settings.json"
    settings_file.parent.mkdir()
    settings_file.write_text(json.dumps(found.settings | {"recommended": kept}))
    again = compare(home, tmp_path / "out", learning_rates=None, dry_run=True, workers=workers)
    assert again.settings["recommended"] == kept
