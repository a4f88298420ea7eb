"""Code that comes with a model runs where it is allowed, in every command that can be told so, and nowhere else."""

import json
import re
import sys

import pytest
import torch
import typer
from peft import LoraConfig, get_peft_model
from transformers import dynamic_module_utils

from lora_init.cli.app import app
from tests.commands import WORDS, run, save_model, tokenizer_of, write_data
from tests.conftest import tiny_llama
from tests.serving.engine import Engine

# The code of a model: it leaves a file beside itself as it runs.
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({ran!r}).write_text("")

class TheirConfig(LlamaConfig):
    model_type = "theirs"

class TheirForCausalLM(LlamaForCausalLM):
    config_class = TheirConfig
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base with code of its own, the same base without, and an adapter of it."""
    home = tmp_path_factory.mktemp("trusted")
    write_data(home)
    backwards = [" ".join(reversed(line.split())) for line in (home / "text.txt").read_text().splitlines()]
    (home / "other.txt").write_text("\n".join(backwards))
    torch.manual_seed(0)
    save_model(model := tiny_llama(num_hidden_layers=1), home / "plain")
    save_model(model, home / "theirs")
    config = json.loads((home / "plain" / "config.json").read_text()) | {
        "architectures": ["TheirForCausalLM"], "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirForCausalLM"},
    }  # fmt: skip
    (home / "theirs" / "config.json").write_text(json.dumps(config))
    (home / "theirs" / "theirs.py").write_text(CODE.format(ran=str(home / "ran")))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(home / "start")
    with torch.no_grad():
        for name, one in adapted.named_parameters():
            if ".lora_B." in name:
                one.fill_(0.02)
    adapted.save_pretrained(home / "adapter")
    return home


DATA = ["{home}/rows.jsonl", "--template", "{passage}", "--samples", 24]
FEW = ["--steps", 1, "--seeds", 1, "--starts", "random", "--learning-rates", "1e-3", "--rank", 2, "--train-samples", 8]
MANY = [*DATA[:3], "--samples", 36]
BASE, ADAPTER, START = "{home}/theirs", "{home}/adapter", "{home}/start"
COMMANDS = {
    "init": ["init", BASE, *DATA, "--rank", 2, "-o", "{out}"],
    "init, a dry run": ["init", BASE, *DATA, "--rank", 2, "-o", "{out}", "--dry-run"],
    "rate": ["rate", START, *DATA[:3], "--base", BASE],
    "inspect, of an engine": ["inspect", ADAPTER, "--base", BASE, "--engine", "vllm"],
    "inspect, intruders": ["inspect", ADAPTER, "--base", BASE, "--intruders"],
    "export": ["export", ADAPTER, "--base", BASE, "--engine", "vllm", "-o", "{out}"],
    "export, measured": ["export", ADAPTER, "--base", BASE, "--rank", 1, "--data", *DATA[:3], "-o", "{out}"],
    "export, merged": ["export", ADAPTER, "--merge-into", BASE, "-o", "{out}"],
    "inspect, merged": ["inspect", ADAPTER, "--base", BASE, "--merge", "int8", "--data", *DATA[:3]],
    "compare": ["compare", BASE, *DATA[:3], *FEW, "--selection-samples", 4, "--report-samples", 4, "-o", "{out}"],
    "dial": ["dial", ADAPTER, *MANY, "--base", BASE, "--strength", 0.5, "-o", "{out}"],
    "dial, texts": ["dial", ADAPTER, *MANY, "--base", BASE, "--keep", "{home}/other.txt", "--uniform", "-o", "{out}"],
    "replay": ["replay", BASE, "--n", 4, "--length", 8, "-o", "{out}.jsonl"],
    "verify": ["verify", ADAPTER, "--base", BASE, "--url", "{url}", "--data", *DATA[:3], "--n", 4],
    "bank add": ["bank", "add", "{home}/bank", ADAPTER, "--data", *DATA[:3], "--model", BASE],
}  # fmt: skip


def commands(group, above=""):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} ")
        elif "trust_remote_code" in [one.name for one in command.params]:
            yield above + name


def test_every_command_with_this_option_is_tried():
    assert {name.partition(",")[0] for name in COMMANDS} == {*commands(typer.main.get_command(app))}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.slow
def test_code_that_comes_with_a_model_runs_where_it_is_allowed_alone(name, home, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    engine = Engine(tokenizer_of(WORDS))
    engine.add("plain", home / "plain")
    engine.add("adapter", home / "plain", home / "adapter", parent="plain")

    def call(*more):
        places = {"{home}": str(home), "{out}": str(tmp_path / "out"), "{url}": url}
        words = [str(word) for word in (*COMMANDS[name], *more)]
        for place, value in places.items():
            words = [word.replace(place, value) for word in words]
        (home / "ran").unlink(missing_ok=True)
        done = run(*words)
        return done, (home / "ran").exists()

    with engine.running() as url:
        refused, ran = call()
        assert refused.exit_code and not ran and not (tmp_path / "out").exists()
        assert re.search(
            "needs code that comes with it. Read that code, then pass --trust-remote-code.", refused.stderr
        )
        allowed, ran = call("--trust-remote-code")
        assert allowed.exit_code == 0 and ran, allowed.output
