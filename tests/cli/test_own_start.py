"""examples/own_start: a start and a policy in a package of its own work in every command and in Python."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.assets import EXAMPLES
from tests.processes import ANEW, command_line, free_port
from tests.processes import run as in_processes

PROGRAM = """
import torch, lora_init
from tests.conftest import batches_for, tiny_llama
model, batches = tiny_llama(), batches_for("llama")
stats = lora_init.collect(model, batches, rank=3)
adapted = lora_init.initialize(model, batches, rank=3, rho=1.0, method="tail")
a = adapted.get_submodule("base_model.model.model.layers.1.mlp.down_proj.lora_A.default").weight.detach()
print("OUTSIDE", float((a @ stats["model.layers.1.mlp.down_proj"].components.T).abs().max()) < 1e-5)
from lora_init.cli.app import app
for words in {commands}:
    try: app(words)
    except SystemExit as end: print("CODE", words[0], end.code, flush=True)
"""


@pytest.mark.slow
def test_the_package_of_the_examples_installs_and_works_everywhere(home, tmp_path):
    own, adapter, runs, file = tmp_path / "own", *(str(tmp_path / name) for name in ("adapter", "runs", "stats"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(own), str(EXAMPLES / "own_start")], check=True)
    model, text = str(home / "model"), str(home / "text.txt")
    short = ["--steps=2", "--seeds=2", "--learning-rates=1e-3", "--report-samples=8", "--selection-samples=4"]
    commands = [
        ["init", model, text, "-o", adapter, "--rank", "3", "--rho", "1", "--method", "tail", "--statistics", file],
        ["ranks", file, "--rank", "2", "--max-rank", "3", "--policy", "spread"],
        ["inspect", adapter],
        ["compare", model, text, "-o", runs, "--starts", "random,tail", "--rank", "2", "--max-length", "16", *short],
    ]
    (tmp_path / "program.py").write_text(ANEW.format(folder=str(own)) + PROGRAM.format(commands=commands))
    ((_, out, err),) = in_processes(command_line, 1, tmp_path, str(tmp_path / "program.py"), MASTER_PORT=free_port())
    ended = [line for line in out.splitlines() if line.startswith(("CODE", "OUTSIDE"))]
    assert ended == ["OUTSIDE True", "CODE init 0", "CODE ranks 0", "CODE inspect 0", "CODE compare 0"], err
    assert "tail (own-start 0.1.0)" in out  # inspect
    assert json.loads((Path(runs) / "settings.json").read_text())["packages"] == {"tail": "own-start 0.1.0"}
