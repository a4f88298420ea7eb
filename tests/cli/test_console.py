"""What all commands share: one line per error, its words, signals; under torchrun one result and one exit code."""

import json
import logging
import os
import re
import warnings
from contextlib import nullcontext

import pytest
import torch
import transformers
import typer
from rich.status import Status
from transformers import AutoModelForCausalLM

from lora_init import Statistics
from lora_init.cli import app as cli
from lora_init.cli import commands, console
from lora_init.cli.console import in_words, one_line_errors
from lora_init.errors import LoraInitError, explain, warn
from lora_init.loading.batches import load_batches
from lora_init.loading.models import load_model
from tests.assets import EXAMPLES
from tests.bank.made import fit
from tests.commands import WORDS, assert_one_line_error, save_model, tokenizer_of
from tests.commands import run as run_here
from tests.conftest import refused, tiny_llama
from tests.processes import command_line, free_port, run
from tests.serving.engine import Engine
from tests.versions import needs_torchrun


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    save_model(tiny_llama(), home / "model")
    (home / "text.txt").write_text("\n".join(" ".join(WORDS[i % 19 :] + WORDS[: i % 7]) for i in range(28)))
    return home


@pytest.fixture(scope="module")
def made(home, tmp_path_factory):
    """The model and data; a start, its statistics, two trained adapters, and a bank of them with a generator."""
    made = tmp_path_factory.mktemp("made")
    for name in ("model", "text.txt"):
        (made / name).symlink_to(home / name)
    data = load_batches(home / "text.txt", load_model(str(home / "model")).tokenizer)
    for seed, name in enumerate(("one", "two")):
        fit(AutoModelForCausalLM.from_pretrained(home / "model"), data, seed).save_pretrained(made / name)
    for words in (
        "init model text.txt --rank 2 --statistics stats -o start", "bank add kept one --data text.txt",
        "bank add kept two --data text.txt", "bank train kept --steps 2",
    ):  # fmt: skip
        assert run_in(made, words).exit_code == 0, words
    return made


def run_in(folder, words, **places):
    """Run a command whose words may be files of a folder; OUT and its like are `places`."""
    found = [str(places.get(w, folder / w if (folder / w).exists() or w in NEW else w)) for w in words.split()]
    return run_here(*found)


NEW = ("start", "stats", "kept")
IMPORTS, READS, LOADS = "importing torch and transformers", "reading model and the data", "loading model"
BUSY = {
    "env": ["importing torch"],
    "init model text.txt --rank 2 -o OUT": [IMPORTS, READS, LOADS, "computing the start eva"],
    "init model text.txt --rank 2 --method from-bank --bank kept -o OUT": [IMPORTS, READS, LOADS, "starting from kept"],
    "init model text.txt --rank 2 --dry-run -o OUT": [IMPORTS, READS],
    "ranks stats --rank 2": [],
    "rate start text.txt": [IMPORTS, LOADS, "measuring"],
    "inspect one --intruders": [IMPORTS, LOADS, "decomposing the weights"],
    "inspect one --base model": [IMPORTS],
    "inspect one --merge bfloat16 --data text.txt": [IMPORTS, "merging into model", LOADS, "measuring"],
    "dial one text.txt --strength 0.5 --samples 36 -o OUT": [IMPORTS, LOADS, "measuring strengths"],
    "replay model --n 2 --length 3 -o OUT": [IMPORTS, LOADS, "writing 2 texts"],
    "export one -o OUT": [IMPORTS],
    "export one --rank 1 --data text.txt -o OUT": [IMPORTS, LOADS],
    "verify one --url URL --data text.txt --n 4": [IMPORTS, LOADS, "computing and asking 4 of 16 prompts"],
    "bank add OUT one --data text.txt --encoder model": [IMPORTS, LOADS, LOADS, "embedding the prompts"],
    "bank list kept": [IMPORTS],
    "bank train kept --steps 2": [IMPORTS],
    "compare model text.txt --rank 999 -o OUT": [IMPORTS],
}  # fmt: skip


@pytest.mark.parametrize("words", BUSY)
@pytest.mark.slow
def test_what_takes_long_is_said_while_it_runs(words, made, undrawn, tmp_path, monkeypatch):
    """A terminal shows it, and nothing else tells a command that works from one that hangs."""
    said, enter = [], Status.__enter__
    monkeypatch.setattr(Status, "__enter__", lambda self: (said.append(str(self.status)), enter(self))[1])
    engine = Engine(tokenizer_of(WORDS))
    engine.add("base", made / "model", None)
    engine.add("one", made / "model", made / "one", parent="base")
    with engine.running() if "URL" in words else nullcontext() as url:
        done = run_in(made, words, OUT=tmp_path / f"out{'.jsonl' * words.startswith('replay')}", URL=url)
    assert done.exit_code == words.startswith("compare"), done.output  # which ends before its runs
    assert [re.sub(r"/\S*/", "", one) for one in said] == BUSY[words]


@needs_torchrun
def test_two_processes_make_one_result_and_say_it_once(home, tmp_path):
    init, made = ["init", str(home / "model"), str(home / "text.txt"), "--rank", "4"], tmp_path / "made"
    made.mkdir()
    arguments = [*init, "--json", "-o", str(made / "out"), "--statistics", str(made / "stats")]
    (code, out, err), second = run(command_line, 2, tmp_path, *arguments, MASTER_PORT=free_port())
    assert code == 0 and "Traceback" not in err, err
    assert json.loads(out)["adapter"] == str(made / "out") and second == [0, "", ""]  # one result, not two
    assert {entry.name for entry in made.iterdir()} == {"out", "stats"}
    assert run_here(*init, "-o", tmp_path / "alone", "--statistics", tmp_path / "one").exit_code == 0
    stats, expected = Statistics.load(made / "stats"), Statistics.load(tmp_path / "one")
    assert stats.provenance.data == expected.provenance.data and stats.provenance.n_batches == 4
    # In fewer than MIN_BATCHES no layer can be done, so that none is done in one of the two passes only.
    assert {name: stats[name].n_samples for name in stats} == {name: expected[name].n_samples for name in expected}
    for name in stats:  # 19 words, 4 batches of 8: three directions hold most, and truncation cuts little
        assert stats.total_variance(name) == pytest.approx(expected.total_variance(name), rel=1e-6)
        shares = (float(one.explained_variance_ratio(name).sum()) for one in (stats, expected))
        assert next(shares) == pytest.approx(next(shares), rel=0.02)


@needs_torchrun
@pytest.mark.slow
def test_the_example_trains_what_two_processes_found(tmp_path):
    words = [str(EXAMPLES / "two_processes.py"), "--output", str(tmp_path / "adapter")]
    (code, out, err), _ = run(command_line, 2, tmp_path, *words, MASTER_PORT=free_port())
    assert code == 0 and "destroy_process_group" not in err and "Traceback" not in err, err
    assert "2 processes: 24 batches, 3072 tokens" in out
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss of the last batch here (\S+)", out)]
    assert len(losses) == 3 and losses[2] < losses[0]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@needs_torchrun
@pytest.mark.slow
def test_each_process_says_what_is_wrong_with_it_and_all_end(home, tmp_path):
    init = ["init", str(home / "model"), str(home / "text.txt"), "-o"]
    (tmp_path / "full-1").mkdir()
    (tmp_path / "full-1" / "file").touch()
    missing = ["init", str(home / "model"), str(home / "none.txt"), "-o", str(tmp_path / "out")]
    ended = "error: rank 0 waited for 1 other process, of which one has ended"
    cases = [
        (missing, "error: data ", "rank 1: error: data "),
        ([*init, str(tmp_path / "full-RANK")], ended, f"rank 1: error: {tmp_path / 'full-1'} exists and is not empty"),
        (
            [*init, str(tmp_path / "out"), "--statistics", str(tmp_path / "stats-RANK")],
            "error: rank 1 has statistics file",
            "rank 1: error: rank 1 has statistics file",
        ),
    ]
    for arguments, *starts in cases:
        found = run(command_line, 2, tmp_path, *arguments, MASTER_PORT=free_port())
        for (code, out, err), start in zip(found, starts, strict=True):
            lines = [line for line in err.splitlines() if not line.startswith("data: ")]  # what was read is said first
            assert (code, out, len(lines)) == (1, "", 1) and lines[0].startswith(start), found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("error", "part"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "smaller --batch-size"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "smaller --batch-size"),
    (MemoryError(), "smaller --batch-size"),
    (OSError(12, "Cannot allocate memory"), "smaller --batch-size"),
    (OSError(28, "No space left on device", "out/adapter_model.safetensors"),
     "out/adapter_model.safetensors: No space"),
    (PermissionError(13, "Permission denied", "out"), "out: Permission denied"),
    (RuntimeError("first line\nsecond line"), "unexpected RuntimeError: first line. LORA_INIT_DEBUG=1"),
    (KeyError("x"), "unexpected KeyError"),
])  # fmt: skip
def test_whatever_goes_wrong_is_one_line(command, monkeypatch, error, part):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("lora_init.cli.source.open_model", fail)
    assert_one_line_error(run_here(*command), part)


@pytest.mark.parametrize("options", [["-v"], []])
def test_verbose_and_debug_let_the_traceback_through(command, monkeypatch, options):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("lora_init.cli.source.open_model", fail)
    assert isinstance(run_here(*command).exception, SystemExit)
    if not options:
        monkeypatch.setenv("LORA_INIT_DEBUG", "1")
    assert isinstance(run_here(*command, *options).exception, ZeroDivisionError)


def test_quiet_prints_warnings_and_what_was_asked_for_but_no_summary(command, tmp_path):
    command += ["--statistics", str(tmp_path / "stats"), "--exclude-modules", "q_prj"]
    assert run_here(*command).exit_code == 0
    loud = run_here(*command, "--overwrite")
    quiet = run_here(*command, "--overwrite", "--quiet")
    assert "used as it is" in loud.stderr and "used as it is" not in quiet.stderr
    assert quiet.stderr.startswith("warning: ") and quiet.stderr.count("\n") == 1
    assert "parameters" in loud.stdout and quiet.stdout == ""
    asked = run_here(*command, "--overwrite", "--quiet", "--json")
    assert json.loads(asked.stdout)["adapter"] and run_here("inspect", tmp_path / "stats", "-q").stdout


def test_warnings_of_this_package_are_one_line_and_others_are_silent(capsys):
    with one_line_errors():
        warn("ours\nis long")
        warnings.warn_explicit("theirs", UserWarning, "other.py", 1, module="transformers.other")
    assert capsys.readouterr().err == "warning: ours is long\n"


@pytest.mark.parametrize(("columns", "width"), [(None, 100), ("60", 60)])
def test_a_pipe_is_as_wide_as_the_ranks_of_a_model_unless_its_reader_says_how_wide(columns, width, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert console.make_console().width == width


def test_a_terminal_keeps_its_width_and_shows_lines_whole_and_without_colours(monkeypatch, capsys):
    for name in ("COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.get_terminal_size", lambda *_: os.terminal_size((55, 20)))
    terminal = console.make_console()
    assert terminal.is_terminal and terminal.width == 55
    terminal.print("rank 12 of 'q_proj' " * 9)
    assert capsys.readouterr().out == "rank 12 of 'q_proj' " * 9 + "\n"


@pytest.mark.parametrize(("options", "in_python", "on_the_command_line"), [
    ({"overwrite": True}, "overwrite=True", "--overwrite"),
    ({"center": False}, "center=False", "--no-center"),
    ({"whiten": False}, "whiten=False", "no --whiten"),
    ({"rank": 64}, "rank=64", "--rank 64"),
    ({"gamma": 2.0}, "gamma=2.0", "--gamma 2"),
    ({"gamma": ...}, "gamma=", "--gamma"),
    ({"method": "eva"}, "method='eva'", "--method eva"),
    ({"template": "{x} y"}, "template='{x} y'", "--template '{x} y'"),
    ({"target_modules": ["q", "k"]}, "target_modules=['q', 'k']", "--target-modules q,k"),
    ({"rows": 3}, "rows=3", "rows=3"),
])  # fmt: skip
def test_an_error_names_options_and_each_way_in_writes_them_its_way(
    options, in_python, on_the_command_line, monkeypatch
):
    error = LoraInitError(f"rank=3, '{{x}}': {{{next(iter(options))}}} is wrong.", **options)
    init = typer.main.get_command(cli.app).commands["init"]
    fresh = console.Running()
    for module in (console, commands):
        monkeypatch.setattr(module, "running", fresh)
    assert str(error) == explain(error, in_words) == f"rank=3, '{{x}}': {in_python} is wrong."
    commands.common_options(init.make_context("init", [], resilient_parsing=True))
    assert explain(error, in_words) == f"rank=3, '{{x}}': {on_the_command_line} is wrong."
    within = LoraInitError("{template} has no {rank}.", template="{rank}", rank=3)
    assert str(within) == "template='{rank}' has no rank=3."


def test_processes_that_cannot_reach_each_other_are_told_what_gloo_needs(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)

    def fail(backend):
        raise RuntimeError("Gloo connectFullMesh failed with timed out connecting: Connection refused")

    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    refused(
        "cannot reach each other: Gloo.* Connection refused. .*GLOO_SOCKET_IFNAME", console.process_group().__enter__
    )


@pytest.fixture
def running(monkeypatch):
    """A command of which nothing is known yet."""
    fresh = console.Running()
    monkeypatch.setattr(console, "running", fresh)
    return fresh


LAUNCH = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("changes", "rank"), [
    ({}, 3), ({"RANK": "0"}, 0), ({"WORLD_SIZE": "1"}, None), ({"RANK": ""}, None), ({"MASTER_ADDR": ""}, None),
    ({"MASTER_PORT": ""}, None), ({"WORLD_SIZE": ""}, None),
])  # fmt: skip
def test_a_process_has_a_rank_in_a_launch_alone(changes, rank, monkeypatch):
    for name, value in (LAUNCH | changes).items():
        monkeypatch.setenv(name, value)
    assert console.process_rank() == rank


@pytest.mark.parametrize(("rank", "quiet", "said", "error"), [
    (None, False, "a line\n", "error: wrong\n"), (0, False, "a line\n", "error: wrong\n"),
    (2, False, "", "rank 2: error: wrong\n"), (None, True, "", "error: wrong\n"),
])  # fmt: skip
def test_the_first_process_speaks_and_each_says_its_error(rank, quiet, said, error, running, monkeypatch, capsys):
    monkeypatch.setattr(console, "process_rank", lambda: rank)
    running.quiet = quiet
    console.say("a line")
    assert capsys.readouterr() == ("", said)
    console.print_error("wrong")
    assert capsys.readouterr() == ("", error)


@pytest.mark.parametrize(("as_json", "quiet", "written", "shown"), [
    (False, False, True, "shown"), (False, True, True, ""), (False, True, False, "shown"), (True, True, True, "json"),
    (True, False, False, "json"),
])  # fmt: skip
def test_a_result_is_json_or_shown_and_of_what_was_written_nothing_where_it_is_quiet(
    as_json, quiet, written, shown, running, capsys
):
    running.as_json, running.quiet = as_json, quiet
    console.print_result({"a": [1]}, lambda out, content: out.print(f"shown {content['a']}", markup=False), written)
    expected = {"json": '{\n  "a": [\n    1\n  ]\n}\n', "shown": "shown [1]\n", "": ""}[shown]
    assert capsys.readouterr() == (expected, "")
    if as_json:
        with pytest.raises(ValueError, match="not JSON compliant"):
            console.print_result(float("nan"), None)


def test_what_one_runs_next_is_the_last_line_as_it_is(capsys):
    console.print_next(console.make_console(), "lora-init x '[b]y[/b]' " + "z" * 200)
    assert capsys.readouterr().out == f"Next: lora-init x '[b]y[/b]' {'z' * 200}\n"


@pytest.mark.parametrize(("names", "line"), [
    ("a", "--a: no use. Leave it out."), ("c a", "--c, --a: no use. Leave them out."), ("b", None), ("", None),
])  # fmt: skip
def test_options_without_an_effect_are_refused_together_as_they_are_typed(names, line, running):
    running.options = {name: (f"--{name}", f"--no-{name}") for name in "abc"}
    running.given = {"a", "c"}
    assert console.given(names.split()) == [f"--{name}" for name in names.split() if name != "b"]
    if line is None:
        console.refuse_idle(names.split(), "no use")
    else:
        refused(f"^{line}$", console.refuse_idle, names.split(), "no use")


@pytest.mark.parametrize(("error", "code", "said"), [
    (KeyboardInterrupt(), 130, "interrupted\n"), (LoraInitError("{a} is wrong.", a=True), 1, "error: --a is wrong.\n"),
    (OSError(2, "No such file", "x"), 1, "error: x: No such file.\n"), (None, None, ""),
])  # fmt: skip
def test_an_error_is_one_line_and_an_exit_code(error, code, said, running, capsys):
    running.options = {"a": ("--a", "--no-a")}

    def work():
        with one_line_errors():
            if error is not None:
                raise error

    if code is None:
        work()
    else:
        with pytest.raises(SystemExit) as ended:
            work()
        assert ended.value.code == code
    assert capsys.readouterr() == ("", said)


def test_who_reads_no_further_hears_of_no_error(running, monkeypatch, capsys):
    """As `head` does, which leaves before the end."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr("sys.stdout", out)
        with pytest.raises(SystemExit) as ended, one_line_errors():
            print("a line", flush=True)
        print("another", flush=True)  # as Python does at its end
    assert ended.value.code == 1 and capsys.readouterr().err == ""


def test_a_warning_is_printed_once_and_kept_in_the_words_of_python(running, monkeypatch, capsys):
    running.options, running.warned = {"rank": ("--rank", "")}, {"an older one"}
    shown = warnings.showwarning
    with one_line_errors():
        for _ in "ab":
            warn("{rank} is\nlarge.", rank=8)
            warn("{rank} is large.", rank=8)
    assert capsys.readouterr().err == "warning: --rank 8 is large.\n"
    assert running.warned == {"rank=8 is large."} and warnings.showwarning is shown
    monkeypatch.setattr(console, "process_rank", lambda: 1)
    with one_line_errors():
        warn("another")
    assert capsys.readouterr().err == "" and running.warned == set()


def test_where_it_is_verbose_warnings_and_errors_are_those_of_python(running):
    running.verbose = True
    with pytest.warns(UserWarning, match="theirs"), pytest.raises(ZeroDivisionError), one_line_errors():
        warnings.warn("theirs", UserWarning, stacklevel=1)
        raise ZeroDivisionError


@pytest.mark.parametrize("quiet", [True, False])
def test_what_goes_on_is_shown_on_stderr_unless_quiet(quiet, running):
    running.quiet = quiet
    with console.busy("loading") as status:
        assert status.console.quiet is quiet and status.console.stderr and status.status == "loading"


@pytest.mark.parametrize("wanted", [None, "wanted"])
def test_names_are_looked_at_before_torch_is_imported_and_then_the_libraries_are_quiet(wanted, running, monkeypatch):
    looked, verbosity = [], transformers.logging.get_verbosity()
    for place in ("models.check_model_source", "sources.check_data", "reader.check_columns"):
        monkeypatch.setattr(f"lora_init.loading.{place}", lambda *words, place=place: looked.append((place, *words)))
    monkeypatch.setattr(transformers.logging, "set_verbosity_error", lambda: looked.append("quiet"))
    monkeypatch.setattr(transformers.logging, "disable_progress_bar", lambda: looked.append("no bar"))
    hub = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(hub, "level", logging.WARNING)
    running.wanted = wanted
    with console.importing("m", "d"):
        looked.append("block")
    columns = [("reader.check_columns", "d", "wanted")] if wanted else []
    found = [("models.check_model_source", "m"), ("sources.check_data", "d"), *columns, "block"]
    assert looked == [*found, "quiet", "no bar"] and hub.level == logging.ERROR
    looked.clear()
    with console.importing():
        running.verbose = True
    assert looked == [] and transformers.logging.get_verbosity() == verbosity


def test_processes_of_a_launch_join_and_part_whatever_happens(monkeypatch):
    done = []
    monkeypatch.setattr(torch.distributed, "init_process_group", done.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: done.append("parted"))
    monkeypatch.setattr(console, "process_rank", lambda: None)
    with console.process_group():
        assert done == []
    monkeypatch.setattr(console, "process_rank", lambda: 0)
    with pytest.raises(KeyError), console.process_group():
        assert done == ["gloo"]
        raise KeyError
    assert done == ["gloo", "parted"]


def test_a_silent_process_prints_nothing_more_to_stdout(capfd, monkeypatch):
    kept = os.dup(1)
    try:
        with open(1, "w", closefd=False) as out:
            monkeypatch.setattr("sys.stdout", out)
            print("before")  # which is not lost, although it is in a buffer yet
            console.silence()
        os.write(1, b"from C")
        os.write(2, b"an error")
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert capfd.readouterr() == ("before\n", "an error")


@pytest.mark.parametrize(("value", "typed"), [
    (8, "--a 8"), (8.0, "--a 8"), (0.5, "--a 0.5"), ("a b", "--a 'a b'"), ([1, 2.0], "--a 1,2"), (("x",), "--a x"),
    (True, "--a"), (False, "--no-a"), (..., "--a"), ("", "--a ''"),
])  # fmt: skip
def test_an_option_is_written_as_it_is_typed(value, typed, running):
    running.options = {"a": ("--a", "--no-a")}
    assert in_words("a", value) == typed
    assert in_words("b", 3) == "b=3"


@pytest.mark.parametrize("words", [
    "rate one missing.txt", "dial one missing.txt -o OUT", "init model missing.txt -o OUT",
    "compare model missing.txt -o OUT", "export one -o OUT --data missing.txt", "bank add kept one --data missing.txt",
])  # fmt: skip
def test_data_that_are_not_there_are_named_before_anything_is_imported(words, home, tmp_path, monkeypatch):
    def busy(what):
        raise AssertionError(f"{what}, before the data were looked at")

    monkeypatch.setattr(console, "busy", busy)
    result = run_here(*[tmp_path / w if w == "OUT" else home / w if (home / w).exists() else w for w in words.split()])
    assert_one_line_error(result, "missing.txt")
