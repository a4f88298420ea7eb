"""`lora-init compare` as a user meets it."""

import json
import os
import signal
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from lora_init.cli import app as cli
from lora_init.cli import compare as command_of
from lora_init.cli.console import Running
from lora_init.comparison import workbench
from lora_init.comparison.runs import read_runs, read_settings
from lora_init.comparison.workbench import Workbench
from lora_init.errors import LoraInitError
from tests.commands import WORDS
from tests.comparisons import make_home
from tests.conftest import refused
from tests.processes import command_line, free_port
from tests.processes import run as run_processes


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("command"), num_hidden_layers=1)


@pytest.fixture
def command(home, tmp_path):
    """The smallest comparison that works, to which tests add."""
    return [
        "compare", home / "llama", home / "rows.jsonl", "-o", tmp_path / "out", "--template", "{passage}",
        "--completion", " {options}", "--steps", 4, "--batch-size", 4, "--selection-samples", 6,
        "--report-samples", 8, "--rank", 2, "--lora-alpha", 16, "--starts", "random,eva-rho1",
        "--learning-rates", "1e-3,1e-2", "--seeds", 3, "--extend", 0, "--statistics-batches", 4,
    ]  # fmt: skip


@pytest.fixture
def undrawn(monkeypatch):
    """Leave the pictures out, which take longer than the runs."""
    monkeypatch.setattr("lora_init.comparison.report.pictures", lambda summary: {})


def run(*arguments, code=0):
    """Run a command, in which of two lists the last one counts; on the command line that is refused."""
    words = [str(argument) for argument in arguments]
    for option in ("--starts", "--learning-rates", "--statistics-batches", "--eval-points"):
        while words.count(option) > 1:
            del words[words.index(option) : words.index(option) + 2]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == code, result.output
    return result


@pytest.mark.slow
def test_it_compares_and_goes_on(command, tmp_path, monkeypatch):
    first = run(*command)
    monkeypatch.setattr("lora_init.comparison.report.pictures", lambda summary: {})  # once is enough
    assert "eva-rho1" in first.stdout and "learning rates" in first.stdout
    assert "run 10/10 " in first.stderr and "report.html: written" in first.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"settings.json", "runs", "report.html", "report.md"}
    again = run(*command, "--json")
    assert "run 10/10" not in again.stderr
    content = json.loads(again.stdout)
    assert content["runs"] == read_runs(tmp_path / "out")
    assert content["verdicts"][0]["start"] == "eva-rho1" and content["settings"] == read_settings(tmp_path / "out")
    assert content["settings"]["evaluation_points"] == [0, 1, 2, 3, 4] and content["settings"]["sweep"] == "halving"
    other = run(*command, "--rank", 4, "--steps", 5, code=1)
    assert "rank was 2, now 4" in other.stderr and "steps was 4, now 5" in other.stderr
    assert [line.partition(": ")[0] for line in other.stderr.splitlines()] == ["data", "error"]


@pytest.mark.usefixtures("undrawn")
def test_options_reach_the_comparison(command, home, tmp_path):
    listed = home / "retain.txt"
    listed.write_text("\n".join(["one dog run", "my green house"] * 4))
    run(
        *command[:7], "--options", "listed", "--answer", "position", "--completion", " {position}", "--normalize",
        "--steps", 3, "--batch-size", 4, "--selection-samples", 6, "--report-samples", 8,
        "--train-samples", 32, "--max-length", 20,
        "--data-seed", 1, "--rank", 2, "--lora-alpha", 4, "--target-modules", "q_proj,v_proj", "--warmup", 0.2,
        "--eval-points", "1,2", "--starts", "random", "--learning-rates", "1e-3", "--seeds", 1, "--sweep", "full",
        "--retain-data", listed, "--retain-samples", 8, "--name", "first word",
    )  # fmt: skip
    settings = read_settings(tmp_path / "out")
    expected = {
        "task": "first word", "kind": "multiple-choice", "normalize": True, "steps": 3, "rank": 2, "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"], "warmup": 0.2, "evaluation_points": [0, 1, 2, 3], "sweep": "full",
        "seeds": [0], "dtype": "float32",
    }  # fmt: skip
    assert {name: settings[name] for name in expected} == expected
    rows = "32 examples to train on, 6 to select by and 8 to report"
    for part in (rows, "split seed 1", "at most 20 tokens", "answer position"):
        assert part in settings["data"]
    assert "8 of 8 examples" in settings["retain_data"]


@pytest.mark.parametrize(("words", "progress"), [(["-q"], False), ([], None)])
def test_quiet_takes_the_progress_away_and_else_the_terminal_decides(command, words, progress, monkeypatch):
    got = {}

    def stop(*_, **given):
        got.update(given)
        raise LoraInitError("stopped")

    monkeypatch.setattr("lora_init.comparison.compare.compare", stop)
    monkeypatch.setattr("sys.argv", ["/bin/lora-init", "compare", "m", "a b.csv", "--template", "{a}"])
    run(*command, *words, code=1)
    assert got.get("progress") is progress
    assert got["command"] == "lora-init compare m 'a b.csv' --template '{a}'"  # which a shell takes again


def test_what_is_typed_is_what_compare_is_asked_for(command, home, tmp_path, monkeypatch):
    looked_at, asked = [], []

    def stop(*words, **given):
        asked.append((words, given))
        raise LoraInitError("stopped")

    @contextmanager
    def importing(*words):
        looked_at.append(words)
        yield

    monkeypatch.setattr("lora_init.comparison.compare.compare", stop)
    monkeypatch.setattr(command_of, "importing", importing)
    run(
        *command, "--rank", 3, "--seeds", 2, "--label", "kind", "--dry-run", "--weights", "float", "--bank", "b",
        "--time", "1h30m", "--precision", "2%", "--cluster", "ray", "--gpus-per-run", 0.5, "--extend", 2, "--full",
        "--statistics-batches", "4,16", "--replay", "r", "--no-dial", "--eval-points", "1,2", "--starts", "eva,mine=d",
        "--retain-template", r"{a}\n", "--selection-samples", 5, "--trust-remote-code", code=1,
    )  # fmt: skip
    ((words, given),) = asked
    place = (str(home / "llama"), str(home / "rows.jsonl"))
    assert looked_at == [place] and words == (*place, tmp_path / "out")
    expected = dict(
        rank=3, seeds=2, label="kind", dry_run=True, bank=Path("b"), time=5400.0, precision=0.02, executor="ray",
        gpus_per_run=0.5, extend=2, full=True, statistics_batches=[4, 16], replay="r", dial=False,
        evaluation_points=[1, 2], starts=["eva", ("mine", Path("d"))], learning_rates=[1e-3, 1e-2],
        target_modules="all-linear", retain_template="{a}\n", selection_samples=5, trust_remote_code=True,
        template="{passage}", completion=" {options}", weights="float", say=command_of.say,
    )  # fmt: skip
    assert {name: given.get(name) for name in expected} == expected


def test_classes_are_counted_before_the_runs(home, tmp_path):
    rows = [f"the cat {word},{kind}" for word in WORDS for kind in ("pets", "zoo", "pets")]
    (tmp_path / "rows.csv").write_text("\n".join(["text,kind", *rows]))
    options = ["--template", "{text}", "--label", "kind", "--seeds", 1, "--steps", 1, "--learning-rates", "1e-3"]
    done = run("compare", home / "bert", tmp_path / "rows.csv", "-o", tmp_path / "out", *options, "--dry-run")
    assert "2 classes (pets 38, zoo 19)" in next(line for line in done.stderr.splitlines() if line[:5] == "data:")


def test_a_dry_run_says_what_it_would_do_and_take_and_writes_nothing(command, tmp_path):
    text = run(*command, "--dry-run").stdout
    lines = [line.split() for line in text.splitlines()]
    assert lines[1] == ["random", "1e-3", "1e-2", "the", "best", "5"] and lines[2][0] == "eva-rho1"
    more = "at most 3 more of random for twice the steps, if a start is better."
    for said in (
        "to train on, 6 to select by and 8 to report",
        f"\n10 runs, 0 ended; {more}\nTime: about ",
        "Detectable at best: with 3 seeds 1.8 %, with 5 seeds 0.88 %",
    ):
        assert said in text
    content = json.loads(run(*command, "--dry-run", "--json").stdout)
    assert len(content["runs"]) == 10 and content["ended"] == 0 and content["runs"][-1]["learning_rate"] is None
    assert not (tmp_path / "out").exists()
    limited = run(*command, "--dry-run", "--precision", "1%", "--seeds", 6).stdout
    assert "on seeds 2 to 5" in limited
    assert "10 runs, 0 ended; at most 6 more on seeds that are added where they still decide, 6 more of" in limited
    two = run(*command, "--dry-run", "--seeds", 2, "--starts", "random,eva-rho1,pissa").stdout
    assert "on seeds 2" not in two and "with 2 seeds 2.7 %, with 5 seeds 0.85 % of the loss" in two


@pytest.mark.parametrize(("arguments", "message"), [
    (["--starts", " , "], "--starts '': expected names, each once."),
    (["--starts", ""], "--starts '': expected names, each once."),
    (["--starts", "random,evva"], "start 'evva' is unknown. Did you mean eva"),
    (["--learning-rates", "1e-3,fast"], "--learning-rates '1e-3,fast': expected numbers separated by commas."),
    (["--learning-rates", "-1e-3"], "--learning-rates -0.001: expected positive numbers"),
    (["--eval-points", "9"], "expected rising steps from 0 to 4"),
    (["--eval-points", "1.5"], "--eval-points '1.5': expected whole numbers"),
    (["--label", "class"], "what --label names"),
    (["--batch-size", 500], "expected 500 or more"),
    (["--time", "2 weeks"], "--time '2 weeks': expected a duration such as 90s, 30m, 2h or 1h30m."),
    (["--time", "0s"], "--time 0: expected a number above zero"),
    (["--precision", "little"], "--precision 'little': expected a share such as 2% or 0.02."),
    (["--statistics-batches", "4,4"], "--statistics-batches 4,4: expected numbers of batches, each once."),
    (["--statistics-batches", "few"], "--statistics-batches 'few': expected whole numbers"),
    (["--workers", 2, "--cluster", "ray"], "--workers 2 is for this machine"),
    (["--gpus-per-run", 0.5], "--gpus-per-run"),
    (["--gpus-per-run", 0.5, "--workers", 2, "--time", "2h"], "--gpus-per-run: that is for --cluster. Leave it out."),
    (["--cluster", "rya"], "cluster 'rya' is unknown. Did you mean ray?"),
    (["--cluster", "slurm:nowhere.yaml"], "cluster 'slurm:nowhere.yaml': [Errno 2] No such file or directory"),
    (["--starts", "random,mine=nowhere"], "start 'mine': nowhere is no adapter directory"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_1(command, arguments, message):
    result = run(*command, *arguments, code=1)
    assert message in result.stderr and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def interrupted(rank, size, folder, sent, *words):
    """Run the command, and send its process a signal in the middle of its second run."""
    train, calls = workbench.train, []

    def training(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), sent)
        return train(*arguments, **options)

    workbench.train = training
    return command_line(rank, size, folder, *words)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_a_signal_leaves_a_report_says_how_to_go_on_and_exits_with_130(command, tmp_path, sent):
    ((code, out, errors),) = run_processes(interrupted, 1, tmp_path, sent, *map(str, command), MASTER_PORT=free_port())
    assert code == 130 and out == "" and "run 1/10" in errors
    said, last = errors.splitlines()[-2:]
    assert last == "interrupted" and "out: 1 of 10 runs are kept, with their report" in said
    assert said.endswith("The same command goes on from there.")
    assert [record["status"] for record in read_runs(tmp_path / "out")] == ["finished"]
    assert "random" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("failing", ["random", "eva-rho1"])
@pytest.mark.slow
def test_where_a_run_fails_the_command_does(command, monkeypatch, failing):
    fill = Workbench._fill

    def no_room(bench, record, run, *others):
        if str(run.start) == failing:
            raise MemoryError("no room")
        return fill(bench, record, run, *others)

    monkeypatch.setattr(Workbench, "_fill", no_room)
    few = ["--learning-rates", "1e-3", "--seeds", 2]
    assert "runs failed (" in " ".join(run(*command, *few, code=1).stdout.split())


@pytest.mark.parametrize(("seeds", "words"), [
    ([3], "seed 3"), ([0, 1], "seeds 0, 1"), ([0, 1, 2], "seeds 0 to 2"), ([2, 4, 6], "seeds 2, 4, 6"),
    ([5, 7], "seeds 5, 7"),
])  # fmt: skip
def test_seeds_are_named_by_their_ends_where_there_are_more_than_two_in_a_row(seeds, words):
    assert command_of._seeds(seeds) == words


@pytest.mark.parametrize(("word", "start"), [
    ("eva", "eva"), ("mine=a/b", ("mine", Path("a/b"))), ("mine=a=b", ("mine", Path("a=b"))),
])  # fmt: skip
def test_a_start_may_be_a_directory_by_a_name(word, start):
    assert command_of._read_start(word) == start


@pytest.mark.parametrize(("data", "workers", "cluster", "time", "given", "said"), [
    ("-", None, None, None, "", None), ("d", 2, "ray", None, "", None), ("d", None, None, "2h", "", None),
    ("-", 1, None, None, "", "DATA '-': workers read"), ("-", None, "ray", None, "", "DATA '-': workers read"),
    ("d", None, None, None, "gpus_per_run", "--it: that is for --cluster. Leave it out."),
    ("d", None, "ray", None, "gpus_per_run", None), ("d", None, "ray", "2h", "", "--time counts from now on, waiting"),
])  # fmt: skip
def test_what_workers_and_clusters_cannot_do_is_refused_and_a_limit_explained(
    data, workers, cluster, time, given, said, monkeypatch
):
    lines = []
    monkeypatch.setattr(command_of, "say", lines.append)
    running = Running(options={"gpus_per_run": ("--it", "")}, given={given})
    monkeypatch.setattr("lora_init.cli.console.running", running)
    if said is None or said.startswith("--time"):
        command_of._check_cluster(data, workers, cluster, time)
    else:
        refused(f"^{said}", command_of._check_cluster, data, workers, cluster, time)
    assert [line[: len(said)] for line in lines] == ([said] if said and said.startswith("--time") else [])


@pytest.mark.parametrize(("failed", "best", "as_json"), [
    (False, False, False), (False, True, False), (True, True, False), (False, True, True), (True, False, True),
])  # fmt: skip
def test_a_comparison_ends_with_where_its_report_is_and_an_error_if_a_run_failed(
    failed, best, as_json, monkeypatch, tmp_path
):
    said, printed = [], []
    if best:
        (tmp_path / "best").mkdir()
    summary = SimpleNamespace(verdicts=[], notes=["a note"])
    # A loss that rises is a finding about a rate, and no fault of the run.
    records = [{"status": "unstable"}, {"status": "failed" if failed else "finished"}]
    made = SimpleNamespace(outlook=None, directory=tmp_path, settings={"rank": 2}, records=records, summary=summary)
    monkeypatch.setattr(command_of, "say", said.append)
    monkeypatch.setattr(command_of, "running", Running(as_json=as_json))
    monkeypatch.setattr(command_of, "print_result", lambda content, show, written: printed.append((content, written)))
    if failed:
        with pytest.raises(SystemExit) as ended:
            command_of._print_comparison(made)
        assert ended.value.code == 1
    else:
        command_of._print_comparison(made)
    content = {
        "directory": str(tmp_path),
        "settings": {"rank": 2},
        "runs": records,
        "verdicts": [],
        "notes": ["a note"],
    }
    assert printed == [(content, True)]
    lines = [f"{tmp_path / 'report.html'}: written", f"{tmp_path / 'best'}: the trained adapter of the best start"]
    assert said == ([] if as_json else lines[: 1 + best])


@pytest.mark.parametrize("option", ["learning-rates", "eval-points", "statistics-batches", "time", "precision"])
def test_an_option_of_no_words_is_refused_and_not_taken_as_one_that_was_left_out(option, monkeypatch):
    """As a script types it whose variable is empty."""
    monkeypatch.setattr("lora_init.comparison.compare.compare", None)
    monkeypatch.setattr(command_of, "importing", lambda *words: nullcontext())
    result = run("compare", "m", "d", "-o", "none", f"--{option}", "", code=1)
    assert result.stderr.startswith(f"error: --{option} '': expected ")


@pytest.mark.parametrize("quiet", [False, True])
def test_an_outlook_is_what_was_asked_for_so_that_quiet_does_not_hide_it(quiet, monkeypatch):
    shown = []
    monkeypatch.setattr("lora_init.cli.console.running", Running(quiet=quiet))
    monkeypatch.setattr(command_of, "show_outlook", lambda console, ahead: shown.append(ahead))
    outlook = SimpleNamespace(to_dict=lambda: {"ended": 0})
    command_of._print_comparison(SimpleNamespace(outlook=outlook, planned=[], settings={"data": "chat"}))
    assert shown == [{"runs": [], "ended": 0, "data": "chat"}]
