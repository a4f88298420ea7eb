"""The base installation: init, ranks, inspect and export run without the extras; all else names what it needs."""

import subprocess
import sys

import pytest

from lora_init.errors import EXTRAS, LoraInitError, require
from tests.commands import assert_one_line_error, run

# Runs the command once for each list of words, in a Python that cannot import what the extras install.
PROGRAM = """
import sys
sys.modules.update(dict.fromkeys({blocked}))
from lora_init.cli.app import app
for words in {commands}:
    try: app(words)
    except SystemExit as end: print("CODE", words[0], end.code, flush=True)
"""


@pytest.mark.slow
def test_the_four_commands_run_without_the_extras(home, tmp_path):
    stats, adapter, plan = (str(tmp_path / name) for name in ("stats", "adapter", "plan.json"))
    commands = [
        ["init", str(home / "model"), str(home / "text.txt"), "-o", adapter, "--statistics", stats, "--rank", "4"],
        ["ranks", stats, "--rank", "4", "--compare", "uniform", "-o", plan],
        ["ranks", stats, "--rank", "4"],
        *(["inspect", path] for path in (stats, adapter, plan)),
        ["export", adapter, "-o", str(tmp_path / "served"), "--engine", "vllm"],
    ]
    blocked = [name for name in EXTRAS if name != "httpx2"]  # which huggingface_hub 2 needs as well
    program = PROGRAM.format(blocked=blocked, commands=commands)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    ended = [line for line in done.stdout.splitlines() if line.startswith("CODE")]
    assert ended == [f"CODE {words[0]} 0" for words in commands], done.stderr


@pytest.fixture(scope="module")
def made(home, tmp_path_factory):
    """A folder with an adapter and its statistics."""
    made = tmp_path_factory.mktemp("made")
    done = run("init", home / "model", home / "text.txt", "-o", made / "adapter", "--statistics", made / "s", "--rank",
               4)  # fmt: skip
    assert done.exit_code == 0, done.output
    return made


@pytest.mark.parametrize("library", EXTRAS)
def test_what_is_missing_is_named_with_its_extra(library, home, made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    compared = ["compare", home / "model", home / "text.txt", "-o", tmp_path / "out"]
    command = {
        "matplotlib": ["ranks", made / "s", "-o", tmp_path / "plan.json", "--plot", tmp_path / "plan.png"],
        "scipy": compared,
        "sklearn": compared,
        "ray": [*compared, "--cluster", "ray"],
        "distributed": [*compared, "--cluster", "dask:tcp://HOST:8786"],
        "submitit": [*compared, "--cluster", "slurm"],
        "gguf": ["export", made / "adapter", "-o", tmp_path / "a.gguf", "--engine", "llama.cpp"],
        "httpx2": ["verify", made / "adapter", "--url", "http://127.0.0.1:9/v1"],
        "bitsandbytes": ["init", home / "model", home / "text.txt", "-o", tmp_path / "out", "--quantize", "nf4"],
    }[library]
    words = f"this needs {library}, which is not installed. Install it: pip install 'lora-init[{EXTRAS[library]}]'"
    assert_one_line_error(run(*command), words, code=2 if library == "httpx2" else 1)  # verify could not ask
    assert not (tmp_path / "plan.json").exists()
    with pytest.raises(LoraInitError, match="which is not installed"):
        require("torch", library)
