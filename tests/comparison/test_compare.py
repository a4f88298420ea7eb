"""compare() end to end on a tiny model: what it makes, that it goes on after a kill, and what it may claim."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lora_init
from lora_init.comparison import workbench
from lora_init.comparison.compare import model_name
from lora_init.comparison.runs import Run, read_runs, read_settings
from lora_init.comparison.starts import AdapterShape, Basis, Variant, prepare
from lora_init.comparison.tables import run_tables
from lora_init.comparison.tasks import Loading
from lora_init.comparison.training import Training
from lora_init.comparison.workbench import RunRecord, circumstances, set_up
from lora_init.errors import LoraInitError
from tests.commands import save_model
from tests.comparisons import SMALL, make_home

# What differs between two identical comparisons.
CLOCK = ("peak_memory_bytes",)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("comparison"))


def compare(home, output, model="llama", **changes):
    settings = SMALL | dict(starts=("random", "eva")) | changes
    if settings.get("label") or settings.get("options"):
        settings["completion"] = None
    return lora_init.compare(str(home / model), home / "rows.jsonl", output, **settings)


def without_clock(records):
    return [{key: record[key] for key in record if key not in CLOCK and "seconds" not in key} for record in records]


@pytest.fixture(scope="module")
def full(home, tmp_path_factory):
    """All that a language model can be compared by."""
    output = tmp_path_factory.mktemp("full") / "out"
    retain = home / "retain.txt"
    retain.write_text("\n".join(["one dog run to the red hats", "my green house"] * 4))
    lines = []
    found = compare(
        home, output, options="options", match_scale=True, retain_data=retain, retain_samples=8, say=lines.append,
        learning_rates=[1e-3],
        starts=("random", "orthogonal", "eva-rho1", "eva", "eva-ranks", "eva-frozen-a"),
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
        assert set(record) == {field.name for field in dataclasses.fields(RunRecord)}
        assert record["evaluation_points"] == [0, 3, 6] and len(record["report_loss"]) == 3
        assert len(record["training_loss"]) == 6
        assert set(record["metrics"]) == set(record["metrics_before"]) == {"accuracy", "macro_f1", "mcc"}
        assert len(record["retain_loss"]) == 2
    starts = {record["start"] for record in records}
    assert {start for start in starts if "+equal" in start} == {
        f"{x}+equal-parameters" for x in ("eva", "eva-frozen-a")
    }
    matched = ("orthogonal", "eva-rho1", "eva", "eva-frozen-a")
    assert {start for start in starts if "+matched" in start} == {f"{x}+matched-scale" for x in matched}


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
        if record["ranks"] is not None and record["start"] in ("eva", "eva-ranks"):
            assert sum(record["ranks"].values()) <= 2 * 14
        if "+equal-parameters" in record["start"]:
            assert record["trainable_parameters"] <= counts.copy().pop()


def test_the_scale_of_a_is_recorded_and_matched(full):
    scale = {record["start"]: record["a_scale"] for record in full[0].records if record["seed"] == 0}
    assert scale["eva-rho1"] == pytest.approx(1.0, rel=1e-5)
    assert scale["random"] == pytest.approx(0.58, abs=0.05)
    assert scale["eva-rho1+matched-scale"] == pytest.approx(scale["random"], rel=1e-5)


def test_statistics_cost_time_and_are_made_once_for_each_seed(full):
    found, _ = full
    seconds = {record["start"]: record["initialisation_seconds"] for record in found.records}
    assert seconds["random"] < seconds["eva"]
    files = sorted(path.name for path in (found.directory / "statistics").iterdir())
    assert files == ["seed0-centred.safetensors", "seed1-centred.safetensors"]


def test_an_output_that_cannot_be_written_is_refused_before_model_and_data_are_read(tmp_path):
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


def test_the_report_has_every_run_and_the_settings(full):
    found, lines = full
    assert {path.name for path in found.files} >= {"report.html", "report.md", "learning_curves.png"}
    page = (found.directory / "report.html").read_text()
    for record in found.records:
        assert f"{record['report_loss'][-1]:.4f}" in page
    settings = read_settings(found.directory)
    assert settings == found.settings
    assert settings["model"] == "llama" and settings["kind"] == "multiple-choice" and settings["threads"] >= 1
    assert str(found.directory.parent) not in json.dumps({**settings, "command": ""})
    assert len(lines) == len(found.records) and lines[-1].startswith(f"run {len(found.planned)}/")


def test_statistics_come_from_training_rows_alone(home, tmp_path, monkeypatch):
    seen = []
    real = workbench.collect

    def spy(model, batches, *arguments, **options):
        batches = list(batches)
        seen.extend(tuple(row[row != 0].tolist()) for batch in batches for row in batch["input_ids"])
        return real(model, batches, *arguments, **options)

    monkeypatch.setattr(workbench, "collect", spy)
    compare(home, tmp_path / "out", learning_rates=[1e-3], seeds=1)
    bench = set_up_bench(home, tmp_path)
    trained = {tuple(item.tokens[0]) for item in bench.task.train}
    scored = {tuple(item.tokens[0]) for item in [*bench.task.selection, *bench.task.report]}
    assert len(seen) == len(set(seen)) == 32 and set(seen) <= trained and not set(seen) & scored


def set_up_bench(home, directory, model="llama", data="rows.jsonl", steps=6, **options):
    training = Training(steps, 4, 0.1, [0, 3, steps])
    asked = Loading(
        **dict(template="{passage}", completion=" {options}", selection_samples=8, report_samples=12) | options
    )
    shape = AdapterShape(rank=2, lora_alpha=4)
    return set_up(str(home / model), home / data, directory, asked, shape, training, 8)


def test_statistics_are_kept_for_the_next_call(home, tmp_path, monkeypatch):
    real, calls = workbench.collect, []
    monkeypatch.setattr(workbench, "collect", lambda *a, **k: calls.append(k["center"]) or real(*a, **k))
    for starts in (["eva", "eva-rho1"], ["eva-uncentred", "eva-ranks"]):
        compare(home, tmp_path / "out", starts=starts, learning_rates=[1e-3], seeds=2)
    assert sorted(calls) == [False, False, True, True]


def test_a_run_leaves_the_plain_model_as_it_was(home, tmp_path):
    bench = set_up_bench(home, tmp_path)
    before = {name: value.clone() for name, value in bench.loaded.model.state_dict().items()}
    first = bench.carry_out(Run(Variant("eva"), 0, 1e-2))
    assert all(torch.equal(value, before[name]) for name, value in bench.loaded.model.state_dict().items())
    bench.carry_out(Run(Variant("pissa"), 0, 1e-2))
    assert without_clock([bench.carry_out(Run(Variant("eva"), 0, 1e-2))]) == without_clock([first])


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_full_fine_tuning_trains_all_weights_and_leaves_them(home, tmp_path, model):
    label = "first" if model == "bert" else None
    found = compare(
        home, tmp_path / "out", model, label=label, starts=["random"], full=True, seeds=2, learning_rates=[1e-2]
    )
    records = {(record["start"], record["seed"]): record for record in found.records}
    full, random = records["full", 0], records["random", 0]
    assert (full["learning_rate"], full["ranks"], full["a_scale"]) == (1e-3, None, 0.0)
    assert full["trainable_parameters"] > 5 * random["trainable_parameters"]
    # An adapter in the way may change the last bit.
    assert full["report_loss"][0] == pytest.approx(random["report_loss"][0], rel=1e-6)
    assert full["report_loss"][0] == pytest.approx(full["plain_loss"], rel=1e-6)
    assert full["report_loss"][-1] < full["report_loss"][0]
    assert "Full fine-tuning ends at" in found.summary.headroom and found.settings["starts"] == ["random", "full"]


# Classifiers


def test_a_classifier(home, tmp_path):
    found = compare(home, tmp_path / "out", model="bert", label="first", seeds=2)
    records = found.records
    assert [record["status"] for record in records] == ["finished"] * len(found.planned)
    assert found.settings["kind"] == "classification" and records[0]["retain_loss"] is None
    assert " --label first " in found.settings["init"]
    # A new head is drawn from the seed, alike for all starts.
    for seed in (0, 1):
        assert len({record["report_loss"][0] for record in records if record["seed"] == seed}) == 1
    assert len({record["report_loss"][0] for record in records}) == 2


def test_a_head_that_the_checkpoint_has_is_kept(tmp_path):
    from tests.conftest import tiny_bert

    home = make_home(tmp_path)
    save_model(tiny_bert(), home / "trained")
    rows = [{"text": f"the cat {'sat ' * i}", "kind": i % 2} for i in range(60)]
    (home / "two.jsonl").write_text("\n".join(map(json.dumps, rows)))
    bench = set_up_bench(
        home,
        tmp_path,
        "trained",
        "two.jsonl",
        template=None,
        completion=None,
        label="kind",
        selection_samples=2,
        report_samples=4,
    )
    head = bench.loaded.model.classifier.weight.clone()
    bench.carry_out(Run(Variant("random"), 1, 1e-2))
    assert torch.equal(bench.loaded.model.classifier.weight, head)


# Going on


def test_the_command_of_the_report_makes_the_adapter(full, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from lora_init.cli import app

    command = full[0].summary.command
    if command is None:
        command = f"{full[0].settings['init']} --method eva --rho 2 --learning-rate 1e-3 --output adapter"
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app.app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "adapter" / "lora_init.json").read_text())["recommended"]["learning_rate"] == 1e-3


@pytest.mark.parametrize(("options", "known"), [(dict(options="listed", answer="letter"), False), ({}, True)])
def test_there_is_no_command_where_init_cannot_read_the_answers(home, tmp_path, options, known):
    found = compare(home, tmp_path / "out", learning_rates=[1e-2], starts=["random"], seeds=1, dry_run=True, **options)
    assert bool(found.settings["init"]) == known


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
    more = compare(home, tmp_path / "out", learning_rates=[1e-2], starts=["orthogonal"], seeds=3)
    assert {record["start"] for record in more.records} == {"random", "orthogonal"}
    assert more.settings["starts"] == ["random", "orthogonal"] and more.settings["seeds"] == [0, 1, 2]


@pytest.mark.parametrize(("changes", "message"), [
    (dict(rank=3), "rank was 2, now 3"),
    (dict(report_samples=13), "data was "),
    (dict(model="bert", label="first"), "kind was 'causal-lm', now 'classification'"),
])  # fmt: skip
def test_another_configuration_is_refused(home, tmp_path, changes, message):
    compare(home, tmp_path / "out", learning_rates=[1e-2], starts=["random"], seeds=1)
    written = read_runs(tmp_path / "out")
    for dry_run in (False, True):
        with pytest.raises(LoraInitError, match=message):
            compare(home, tmp_path / "out", dry_run=dry_run, **changes)
    assert read_runs(tmp_path / "out") == written


def test_other_examples_to_report_or_another_adapter_of_the_same_name_are_refused(home, tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        again(AutoModelForCausalLM.from_pretrained(home / "llama"), seed).save_pretrained(tmp_path / name)
    options = dict(learning_rates=[1e-2], starts=["random", ("mine", tmp_path / "one")], seeds=1)
    compare(home, tmp_path / "out", **options)
    compare(home, tmp_path / "out", **options | dict(starts=["random", ("other", tmp_path / "two")]))
    with pytest.raises(LoraInitError, match="of which this was other content: mine"):
        compare(home, tmp_path / "out", **options | dict(starts=["random", ("mine", tmp_path / "two")]))
    edited = tmp_path / home.name / "rows.jsonl"  # the name of the data is that of folder and file
    edited.parent.mkdir()
    edited.write_text(
        (home / "rows.jsonl").read_text().replace("sat", "SAT").replace("mat", "sat").replace("SAT", "mat")
    )
    with pytest.raises(LoraInitError, match="other content: examples to report, examples to select by"):
        lora_init.compare(str(home / "llama"), edited, tmp_path / "out", **SMALL | options)


# Its third run waits to be killed, so that nothing depends on how fast the machine is.
WAITING = """
import sys, time
from pathlib import Path
from lora_init.comparison import workbench
from tests.comparison.test_compare import compare
train, calls = workbench.train, []
def waiting(*arguments, **options):
    calls.append(1)
    while len(calls) == 3:
        time.sleep(0.01)
    return train(*arguments, **options)
workbench.train = waiting
compare(Path(sys.argv[1]), sys.argv[2], learning_rates=[1e-2], seeds=3, say=lambda t: print(t, flush=True))
"""


def test_killed_in_the_middle_of_a_run_it_ends_with_the_same_table(home, tmp_path):
    uninterrupted = compare(home, tmp_path / "whole", learning_rates=[1e-2], seeds=3)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WAITING, str(home), str(tmp_path / "killed")]
    for _ in range(2):
        with subprocess.Popen(command, env=environment, stdout=-1, text=True) as process:
            assert all(": finished" in process.stdout.readline() for _ in range(2))
            process.kill()
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
    kept = "2 of 12 runs are kept, with their report. The same command goes on from there."
    assert lines[2:] == [f"{tmp_path / 'out'}: {kept}"]


# Runs that go wrong


def test_out_of_memory_fails_one_run_and_the_others_go_on(home, tmp_path, monkeypatch):
    real, calls = workbench.train, []

    def greedy(model, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            torch.empty(2**60)
        return real(model, *arguments, **options)

    monkeypatch.setattr(workbench, "train", greedy)
    found = compare(home, tmp_path / "out", learning_rates=[1e-2])
    failed = [record for record in found.records if record["status"] == "failed"]
    assert [(r["start"], r["seed"], r["learning_rate"]) for r in failed] == [("eva", 0, 1e-2)]
    assert failed[0]["error"].startswith("out of memory") and failed[0]["report_loss"] == []
    assert failed[0]["trainable_parameters"] > 0
    assert len(found.records) == len(found.planned) == 6
    # The next call tries it again, and what came after it is what it would have been.
    monkeypatch.setattr(workbench, "train", real)
    again = compare(home, tmp_path / "out", learning_rates=[1e-2])
    assert {record["status"] for record in again.records} == {"finished"}
    clean = compare(home, tmp_path / "clean", learning_rates=[1e-2])
    key = lambda r: (r["start"], r["learning_rate"], r["seed"])  # noqa: E731
    assert sorted(without_clock(again.records), key=key) == sorted(without_clock(clean.records), key=key)


def test_an_error_in_the_code_is_not_a_failed_run(home, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(workbench, "train", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        compare(home, tmp_path / "out")


def test_other_data_for_one_start_is_noticed(home, tmp_path, monkeypatch):
    real = workbench.train

    calls = []

    def tampered(model, task, order, *others, **options):
        calls.append(1)
        return real(model, task, order[::-1] if len(calls) == 2 else order, *others, **options)

    monkeypatch.setattr(workbench, "train", tampered)
    with pytest.raises(LoraInitError, match=r"eva, 0\.001, seed 0 saw other data than random, 0\.001, seed 0"):
        compare(home, tmp_path / "out")


# What may be claimed


def useless(model, seed):
    """A is zero and stays zero, so nothing can be learned."""
    peft_model = again(model, seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_A" in name:
            parameter.data.zero_()
            parameter.requires_grad_(False)
    return peft_model


def again(model, seed):
    """The random start under another name."""
    return prepare(Variant("random"), Basis(model, AdapterShape(rank=2, lora_alpha=16), seed)).peft_model


def one_layer(model, seed):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=16, target_modules=["layers.1.self_attn.q_proj"])
    return get_peft_model(model, config)


def test_the_ranks_of_a_start_that_leaves_layers_out_are_recorded(home, tmp_path):
    starts = ["random", ("some", one_layer)]
    found = compare(home, tmp_path / "out", starts=starts, learning_rates=[1e-3], seeds=1)
    ranks = {record["start"]: record["ranks"] for record in found.records}
    assert ranks["random"] is None and ranks["some"] == {"model.layers.1.self_attn.q_proj": 2}


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


def test_a_start_that_has_learned_already_wins(home, tmp_path):
    bench = set_up_bench(home, tmp_path, steps=40)
    shape = AdapterShape(rank=2, lora_alpha=16, task_type="CAUSAL_LM")
    trained = prepare(Variant("random"), Basis(bench.loaded.model, shape, 9))
    order = bench.task.order(5, 40, 4)
    workbench.train(trained.peft_model, bench.task, order, bench.training, learning_rate=1e-2, seed=0, plain_loss=9.0)
    trained.peft_model.save_pretrained(tmp_path / "learned")
    trained.release()
    found = compare(
        home, tmp_path / "out", starts=["random", ("learned", tmp_path / "learned")], learning_rates=[1e-3], seeds=4
    )
    assert [verdict.outcome for verdict in found.summary.verdicts] == ["better"]


# Planning


def test_the_default_is_random_against_what_is_recommended(home, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")  # which keeps bfloat16
    model = AutoModelForCausalLM.from_pretrained(home / "llama", dtype=torch.bfloat16)
    save_model(model, tmp_path / "half")
    asked = {k: v for k, v in SMALL.items() if k not in ("learning_rates", "seeds", "extend", "lora_alpha")}
    found = lora_init.compare(
        str(tmp_path / "half"), home / "rows.jsonl", tmp_path / "out", **asked | {"rank": 4}, dry_run=True
    )
    rates, own = [1e-4, 3e-4, 1e-3], {"eva+16-alpha": 2e-4, "natural-gradient+40-alpha": 2e-4}
    ahead = found.outlook
    assert {start["name"]: start["rates"] for start in ahead.starts} == {
        "random": rates, **{name: sorted([*rates, rate]) for name, rate in own.items()}
    }  # fmt: skip
    assert found.settings["dtype"] == "bfloat16" and found.settings["lora_alpha"] == 8
    assert found.settings["recommended"] == own and not (tmp_path / "out").exists()
    assert (ahead.swept, ahead.others, ahead.n_runs, ahead.ended) == ([0, 1], [2, 3, 4], 9 + 14 + 14, 0)
    assert ahead.may_add == {"rates": 3 * 2 * 2, "seeds": 0, "longer": 5} and ahead.most_runs == ahead.n_runs + 17
    assert ahead.folds == {"train": 100, "selection": 8, "report": 12}
    assert 0.0 < ahead.seconds < ahead.most_seconds and list(ahead.detectable) == [5]


def test_a_recommended_start_is_judged_untuned(home, tmp_path):
    found = compare(home, tmp_path / "out", starts=None, seeds=3, learning_rates=[1e-3])
    assert {(run["start"], run["learning_rate"]) for run in found.records if run["seed"] == 2} >= {
        ("random", 1e-3), ("eva+8-alpha", 2e-4), ("natural-gradient+20-alpha", 2e-4),
    }  # fmt: skip
    assert len(found.summary.as_recommended) == 2 and found.settings["recommended"]["eva+8-alpha"] == 2e-4
    assert "As recommended, without tuning" in (tmp_path / "out" / "report.html").read_text()
    more = compare(home, tmp_path / "out", starts=["random", "orthogonal"], seeds=3, learning_rates=[1e-3])
    assert len(more.summary.as_recommended) == 2 and more.settings["recommended"] == found.settings["recommended"]


def test_a_dry_run_writes_nothing(home, tmp_path):
    found = compare(home, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    assert [run.learning_rate for run in found.planned] == ([1e-3] * 3 + [1e-2] * 3) * 2
    assert found.records == []
    compare(home, tmp_path / "out")
    done = compare(home, tmp_path / "out", dry_run=True)
    assert len(done.records) == len(done.planned)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(starts=["random", "evva"]), "start 'evva' is unknown. Did you mean eva"),
        (dict(starts=[]), "expected names, each once"),
        (dict(starts=["eva", "random", "eva"]), "expected names, each once"),
        (dict(starts=["random", ("eva", useless)]), "a pair is needed, of a new name and"),
        (dict(starts=["random", ("mine", "nowhere")]), "start 'mine': nowhere is no adapter directory"),
        (dict(learning_rates=[-1e-3]), "learning_rates=[-0.001]: expected positive numbers"),
        (dict(evaluation_points=[7]), "expected rising steps from 0 to 6"),
        (dict(model="bert"), "is a BertForSequenceClassification, and a comparison trains causal language models"),
        (dict(model="bert", label="first", retain_data="rows.jsonl"), "a classifier has no loss on text"),
        (dict(model="bert", label="first", dtype="bfloat16"), "the head of a classifier is trained whole"),
        (dict(label="kind"), "label='kind' is not a column"),
        (dict(report_samples=111), "1 examples to train on, 8 to select by and 111 to report"),
        (dict(report_samples=0), "report_samples=0: expected at least 1"),
        (dict(report_sample=12), "compare() has no argument 'report_sample'. Closest: 'report_samples'."),
        (dict(learning_rate=1e-3), "compare() has no argument 'learning_rate'. Closest: 'learning_rates'."),
    ],
)
def test_bad_input(home, tmp_path, changes, message):
    with pytest.raises(LoraInitError) as error:
        compare(home, tmp_path / "out", **changes)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


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
    files = sorted(file.name for file in (tmp_path / "lm" / "statistics").iterdir())
    assert files == ["seed0-centred-gradients.safetensors", "seed0-centred.safetensors"]
    classes = compare(
        home, tmp_path / "classes", model="bert", label="first", starts=("random", "eva-grad"), seeds=1,
        learning_rates=(1e-3,),
    )  # fmt: skip
    assert {record["status"] for record in classes.records} == {"finished"}


def test_a_misspelt_argument_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(LoraInitError, match=r"has no argument 'dtpye'\. Closest: 'dtype'"):
        lora_init.compare("no/such/model", "no-such-data.jsonl", tmp_path / "out", dtpye="bfloat16")


def test_runs_are_held_against_the_loss_of_the_plain_model(home, tmp_path, monkeypatch):
    real, limits = workbench.train, []
    monkeypatch.setattr(workbench, "train", lambda *a, **k: limits.append(k["plain_loss"]) or real(*a, **k))
    found = compare(home, tmp_path / "out", starts=["random", "lora-one"], learning_rates=[1e-4], seeds=1)
    first = {record["start"]: record["report_loss"][0] for record in found.records}
    assert first["lora-one"] < first["random"] and limits == pytest.approx([first["random"]] * 2)


# What is said meanwhile, and what is kept beside the runs


def test_a_line_for_each_run_and_a_bar_for_its_steps(home, tmp_path, capfd):
    lines = []
    compare(home, tmp_path / "out", starts=["random"], seeds=1, say=lines.append, progress=True)
    assert [line.split(", loss")[0] for line in lines] == [
        "run 1/2 random, 0.001, seed 0: finished",
        "run 2/2 random, 0.01, seed 0: finished",
    ]
    assert "; 1 left, about " in lines[0] and "left" not in lines[1]
    assert "run 2/2 random, 0.01, seed 0:   0%" in capfd.readouterr().err


def test_settings_tell_nothing_about_this_machine_but_what_may_change_numbers(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    assert model_name(str(tmp_path / "model")) == "model"
    assert model_name("org/name") == "org/name"
    monkeypatch.chdir(tmp_path / "model")
    assert model_name(".") == "model"
    found = circumstances()
    assert set(found["versions"]) == {"lora_init", "torch", "transformers", "peft", "python"}
    assert found["threads"] >= 1 and isinstance(found["processor"], str)
