"""The command line as a whole: help, wrong usage, how it is started."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

import lora_init
from lora_init import allocate_ranks, build_adapter, collect, load_batches
from lora_init import cli as package
from lora_init.adapters.init_config import Reading
from lora_init.cli import app as cli
from lora_init.cli.init import init
from lora_init.cli.ranks import PlanOptions, ranks
from lora_init.comparison.runs import RunPlan
from lora_init.comparison.variants import REFERENCE
from lora_init.errors import LoraInitError
from lora_init.loading.examples import FORMATS
from lora_init.loading.models import open_model
from lora_init.planning.policies import policy_names
from lora_init.planning.snippets import TOOLS, snippet
from lora_init.serving.engines import find_engine
from lora_init.starts.starts import FROM_BANK, buildable
from tests.commands import assert_one_line_error, run
from tests.loading.made import byte_tokenizer

_TEMPLATES = ("template", "completion", "retain_template")
_GROUP = typer.main.get_command(cli.app)
_COMMANDS = {name: one for name, one in _GROUP.commands.items() if name != "bank"}
_COMMANDS |= {f"bank {name}": one for name, one in _GROUP.commands["bank"].commands.items()}


@pytest.mark.parametrize("arguments", [
    ["init"],
    ["init", "model", "data"],
    ["init", "model", "data", "-o", "out", "--rank", "0"],
    ["init", "model", "data", "-o", "out", "--rho", "0.5"],
    ["init", "model", "data", "-o", "out", "--batch-size", "0"],
    ["init", "model", "data", "-o", "out", "--method", "magic"],
    ["init", "model", "data", "-o", "out", "--no-such-option"],
    ["compare", "model", "data", "-o", "out", "--data-seed", "-1"],
    ["inspect"],
    ["bank", "add", "bank"],
    ["--nonsense"],
    ["nosuchcommand"],
])  # fmt: skip
def test_wrong_usage_exits_with_2(arguments):
    assert_one_line_error(run(*arguments), "--help.", code=2)


LISTS = {
    "init": ["--exclude-modules", "--modules-to-save", "--target-modules", "--target-parameters"],
    "compare": ["--eval-points", "--learning-rates", "--starts", "--statistics-batches", "--target-modules"],
    "merge": ["--weights"],
    "ranks": ["--allowed-ranks"],
}
DATA = dict.fromkeys(("bank add", "export", "inspect", "verify"), "--data")
DATA |= {"compare": "--retain-data", "dial": "--keep"}


@pytest.mark.parametrize("name", _COMMANDS)
def test_lists_and_data_are_given_once_and_all_else_may_be_given_anew(name):
    """Of two, click would take the last one without a word."""
    told, data = [], []
    for option in _COMMANDS[name].params:
        if option.param_type_name == "option" and option.name not in ("help", "help_all"):
            values = [] if option.is_flag else ["1"]
            said = run(*name.split(), option.opts[0], *values, option.opts[-1], *values).stderr
            once = f"error: {option.opts[0]} is given 2 times. Give it once, "
            if said.startswith(f"{once}with commas between its items."):
                told.append(option.opts[0])
            if said.startswith(f"{once}as a folder or a pattern of several files."):
                data.append(option.opts[0])
    assert data == ([DATA[name]] if name in DATA else [])
    assert sorted(told) == LISTS.get(name, [])
    if name == "init":
        last = _COMMANDS[name].make_context(name, ["m", "d", "-o", "x", "--rank", "2", "-o", "y", "--rank", "4"]).params
        assert (last["rank"], str(last["output"])) == (4, "y")


def test_without_arguments_it_prints_four_things_to_do_and_their_commands():
    result = run()
    assert result.exit_code == 0 and re.findall(r"^(\d)\. ", result.stdout, re.MULTILINE) == ["1", "2", "3", "4"]
    commands = re.findall(r"^   lora-init (.+)$", result.stdout, re.MULTILINE)
    assert [words.split()[0] for words in commands] == ["init", "dial", "export", "verify", "compare"]
    for words in commands:
        name, *rest = shlex.split(words)
        _COMMANDS[name].make_context(name, rest)


@pytest.mark.parametrize(("typed", "said"), [
    (["iniit"], "No such command 'iniit'. Did you mean 'init'? See lora-init --help."),
    (["merge", "a", "b", "-o", ""], "output '.': this directory itself cannot be written anew."),
    (["init", "base", "data.jsonl", "-o", ""], "output '.': this directory itself cannot be written anew."),
])  # fmt: skip
def test_a_mistyped_word_is_told_in_one_line_with_the_nearest(typed, said):
    done = run(*typed)
    assert_one_line_error(done, said, code=2 if len(typed) == 1 else 1)


@pytest.mark.parametrize(("names", "said"), [([], "none"), (["A", "B"], "A 80 GB, B 80 GB")])
def test_env_lists_the_gpus(names, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    about = lambda i: SimpleNamespace(name=names[i], total_memory=80 * 10**9)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", about)
    assert json.loads(run("env", "--json").stdout)["gpus"] == said


def test_a_group_of_commands_without_a_word_lists_its_commands():
    done = run("bank")
    assert done.exit_code == 2 and done.stderr.startswith("Usage: lora-init bank") and "error: " not in done.stderr
    assert all(re.search(rf"^  {name} ", done.stderr, re.MULTILINE) for name in ("add", "list"))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["init", "--help"], ["inspect", "--help"], ["init"], ["--nonsense"]]
)
def test_help_and_usage_errors_import_nothing_heavy(arguments):
    program = (
        "import sys\nfrom lora_init.cli.app import app\n"
        f"try: app({arguments!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'sklearn', 'matplotlib', 'safetensors'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize(("command", "argument", "registry"), [
    (init, "method", [*buildable(), FROM_BANK]),
    (Reading, "format", FORMATS),
    (PlanOptions, "policy", policy_names()),
    (ranks, "tool", TOOLS),
])  # fmt: skip
def test_choices_of_the_command_line_are_what_the_registry_has(command, argument, registry):
    hint = get_type_hints(command)[argument]
    literal = next(kind for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal)
    assert get_args(literal) == tuple(registry)


@pytest.mark.parametrize("name", ["init", "compare", "export", "verify", "bank add"])
def test_every_command_reads_data_by_the_same_options(name):
    commands = typer.main.get_command(cli.app)
    for part in name.split():
        commands = commands.commands[part]
    assert {one.name for one in fields(Reading)} < {parameter.name for parameter in commands.params}


def test_the_version_is_printed():
    assert run("--version").stdout == f"lora-init {lora_init.__version__}\n"


def test_env_has_what_a_bug_report_needs():
    about = json.loads(run("env", "--json").stdout)
    assert about["lora-init"] == lora_init.__version__ and about["torch"] == torch.__version__
    assert {"python", "system", "transformers", "peft", "datasets", "cores", "memory", "gpus"} <= set(about)
    shown = run("env").stdout
    assert "torch " in shown and shown.splitlines()[-1].startswith("Next: LORA_INIT_DEBUG=1 lora-init ")


def test_env_names_each_gpu_with_its_memory(monkeypatch):
    gpus = [SimpleNamespace(name=name, total_memory=size) for name, size in (("H100", 85.1e9), ("L4", 23.6e9))]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    assert json.loads(run("env", "--json").stdout)["gpus"] == "H100 85 GB, L4 24 GB"


@pytest.mark.parametrize("name", ["init", "compare"])
def test_the_examples_in_the_help_are_commands_that_parse(name):
    lines = run(name, "--help").stdout.partition("Examples:")[2].replace("\\\n", " ").splitlines()
    commands = [line.partition(f"$ lora-init {name} ")[2] for line in lines if f"$ lora-init {name} " in line]
    command = typer.main.get_command(cli.app).commands[name]
    given = [command.make_context(name, shlex.split(words)).params for words in commands]
    output = {"init": "adapter", "compare": "comparison"}[name]
    assert [one["output"] for one in given] == [Path(output)] * 3 and given[2]["label"] == "stars"


def test_it_runs_as_a_module_and_as_a_script():
    done = subprocess.run(
        [sys.executable, "-m", "lora_init", "inspect", "nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: nowhere: no such file or directory. Expected ")
    assert done.stderr.count("\n") == 1
    (script,) = entry_points(group="console_scripts", name="lora-init")
    assert script.load() is package.main


def test_nothing_names_this_machine():
    # The example in the help was printed by a real run; it must not tell where.
    assert os.sep + "work" + os.sep not in Path(cli.__file__).read_text()


@pytest.mark.parametrize(("call", "closest"), [
    (lambda: allocate_ranks(statistics(), rank=2, policy="evaa"), "eva"),
    (lambda: allocate_ranks(statistics(), megabytes=1, dtype="float23"), "float32"),
    (lambda: allocate_ranks(statistics(), variance=0.9, coverage="totl"), "total"),
    (lambda: allocate_ranks(statistics(), rank=2, overrides={"0": {"max_rnk": 2}}), "max_rank"),
    (lambda: snippet(allocate_ranks(statistics(), rank=2), "axolotll"), "axolotl"),
    (lambda: build_adapter(statistics(), 2, "evva"), "eva"),
    (lambda: collect(nn.Sequential(nn.Linear(8, 8)), [torch.randn(8, 8)], rank=2, token_mask="label"), "labels"),
    (lambda: load_batches([{"text": "x"}], byte_tokenizer(), format="alpacca"), "alpaca"),
    (lambda: open_model("x", task_type="CAUSALLM"), "CAUSAL_LM"),
    (lambda: find_engine("vlm"), "vllm"),
    (lambda: RunPlan([REFERENCE], [1e-3], [0], "halvin"), "halving"),
])  # fmt: skip
def test_every_choice_that_is_none_is_answered_with_the_closest(call, closest):
    with pytest.raises(LoraInitError, match=rf"Did you mean {closest}\?"):
        call()


def statistics():
    torch.manual_seed(0)
    return collect(nn.Sequential(nn.Linear(8, 8)), [torch.randn(8, 8) for _ in range(3)], rank=2)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("typed", "offered"),
    [("lora-init in", ["init", "inspect"]), ("lora-init init m d --method ev", ["eva", "eva-grad"]),
     ("lora-init compare m d --form", ["--format"]), ("lora-init compare m d --help-all --form", ["--format"])],
)  # fmt: skip
def test_the_shell_completes_commands_options_and_choices(shell, typed, offered):
    environment = {"_LORA_INIT_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": typed}
    if shell == "bash":
        environment |= {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    if shell == "fish":
        environment |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    result = CliRunner().invoke(cli.app, [], env=environment, prog_name="lora-init")
    said = re.findall(r"[\w-]+", result.output)
    assert [word for word in offered if word not in said] == [] and "Usage" not in said, result.output


@pytest.mark.parametrize("name", _COMMANDS)
def test_help_fits_a_screen_and_help_all_has_every_option(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    short, whole = (run(*name.split(), option).stdout for option in ("--help", "--help-all"))
    assert len(short.splitlines()) <= 40 and max(map(len, short.splitlines())) <= 80 and "--help-all" in short
    assert not re.search(r"\w-$", f"{short}{whole}", re.MULTILINE)  # names such as lora-ga are in one piece
    assert re.match(rf"Usage: lora-init {name} \[OPTIONS\]( \[?[A-Z]+\]?(\.\.\.)?)*\n", short)
    options = [one for one in _COMMANDS[name].params if one.param_type_name == "option"]
    assert all(one.opts[0] in whole for one in options) and "--quiet" in whole and "--quiet" not in short


@pytest.mark.parametrize(("own", "then"), [(None, "passive"), ("active", "active")])
def test_threads_that_wait_do_not_spin_unless_the_user_wants_it(own, then, monkeypatch):
    """PyTorch is imported after that, which reads it."""
    seen = []
    monkeypatch.setenv("OMP_WAIT_POLICY", own or "")  # so that it is as before afterwards
    if own is None:
        del os.environ["OMP_WAIT_POLICY"]
    monkeypatch.setattr(cli, "app", lambda: seen.append(os.environ["OMP_WAIT_POLICY"]))
    monkeypatch.setattr(cli.signal, "signal", lambda *words: None)
    cli.main()
    assert seen == [then]


@pytest.mark.parametrize(("rank", "words", "runs"), [
    (None, ["rate", "a", "d"], True), (0, ["rate", "a", "d"], True), (1, ["rate", "a", "d"], False), (1, [], False),
    (1, ["init", "m", "d"], True), (1, ["rate", "init", "d"], False), (1, ["bank", "add", "init"], False),
])  # fmt: skip
def test_of_several_processes_the_first_does_all_and_the_others_only_the_pass_of_init(rank, words, runs, monkeypatch):
    """The first word tells it: a directory may be named init, too."""
    did = []
    monkeypatch.setattr(cli, "process_rank", lambda: rank)
    monkeypatch.setattr(cli, "silence", lambda: did.append("silence"))
    monkeypatch.setattr(cli, "app", lambda: did.append("runs"))
    monkeypatch.setattr(cli.signal, "signal", lambda *words: None)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setattr("sys.argv", ["lora-init", *words])
    cli.main()
    assert did == ["silence"] * bool(rank) + ["runs"] * runs


@pytest.mark.parametrize(("name", "option"), [
    (name, one) for name, command in _COMMANDS.items() for one in command.params if one.name in _TEMPLATES
], ids=lambda value: getattr(value, "name", value))  # fmt: skip
def test_a_line_end_that_is_typed_in_a_template_is_one(name, option):
    context = _COMMANDS[name].make_context(name, [], resilient_parsing=True)
    assert option.process_value(context, "a\\nb") == "a\nb"
