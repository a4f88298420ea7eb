"""compare() end to end on a tiny model: what it makes, that it goes on after a kill, and what it may claim."""

import dataclasses
import re
import shlex
import signal
import sys

import pytest
import typer

import lora_init
from lora_init import Start
from lora_init.cli.app import app as cli
from lora_init.comparison import report, workbench
from lora_init.comparison.compare import Comparison, _init_command, _with_kept_rates
from lora_init.comparison.findings import summarise
from lora_init.comparison.runs import Run, RunPlan, read_runs
from lora_init.comparison.starts import AdapterShape, StartInputs, prepare
from lora_init.comparison.tables import run_tables
from lora_init.comparison.tasks import LoadingOptions
from lora_init.comparison.training import TrainingResult
from lora_init.comparison.variants import REFERENCE, Variant
from lora_init.comparison.workbench import RunRecord
from lora_init.errors import LoraInitError
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
