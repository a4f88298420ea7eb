"""The command line as a whole: help, wrong usage, how it is started."""

import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import typer

import lora_init
from lora_init import cli as package
from lora_init.cli import app as cli
from tests.commands import run


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["init"],
        ["init", "model", "data"],
        ["init", "model", "data", "-o", "out", "--rank", "0"],
        ["init", "model", "data", "-o", "out", "--rho", "0.5"],
        ["init", "model", "data", "-o", "out", "--batch-size", "0"],
        ["init", "model", "data", "-o", "out", "--method", "magic"],
        ["init", "model", "data", "-o", "out", "--no-such-option"],
        ["inspect"],
        ["nosuchcommand"],
    ],
)
def test_wrong_usage_exits_with_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


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


def test_a_mistyped_choice_is_answered_with_the_closest():
    arguments = ["init", "model", "data", "-o", "out"]
    for words, closest in (
        (["intit", "model"], "init"),
        ([*arguments, "--method", "lora-ge"], "lora-ga"),
        (["ranks", "stats", "--policy", "cost-awar"], "cost-aware"),
        (["ranks", "stats", "--format", "axolotll"], "axolotl"),
    ):
        result = run(*words)
        assert result.exit_code == 2 and f"Did you mean {closest}?" in result.stderr.replace("'", ""), result.stderr
    assert "--method" in run(*arguments, "--methd", "eva").stderr


def test_the_version_is_printed():
    assert run("--version").stdout == f"lora-init {lora_init.__version__}\n"


def test_env_has_what_a_bug_report_needs():
    about = json.loads(run("env", "--json").stdout)
    assert about["lora-init"] == lora_init.__version__ and about["torch"] == torch.__version__
    assert {"python", "system", "transformers", "peft", "datasets", "cores", "memory", "gpus"} <= set(about)
    assert "torch " in run("env").stdout


def test_the_shell_completes_commands():
    asked = {"_LORA_INIT_COMPLETE": "complete_bash", "COMP_WORDS": "lora-init in", "COMP_CWORD": "1"}
    program = "import sys; sys.argv = ['lora-init']; from lora_init.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["init", "inspect"], done.stderr


def test_the_example_in_the_help_is_a_command_that_parses():
    (example,) = (line for line in run("init", "--help").stdout.splitlines() if "$ lora-init init " in line)
    arguments = shlex.split(example.partition("$ lora-init init ")[2])
    command = typer.main.get_command(cli.app).commands["init"]
    assert command.make_context("init", arguments).params["rank"] is None


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
