"""Scripts read what commands print with --json: a key that goes or changes its kind shows here.

python -m tests.cli.test_json  # writes tests/cli/json_keys.json; CHANGELOG.md says what changed
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.commands import run, save_model, write_data
from tests.conftest import tiny_llama

AGAIN = "If that is meant, run `python -m tests.cli.test_json`."
KEPT = Path(__file__).with_name("json_keys.json")
# By what is asked for, in an order in which what one command writes is there for the next. {0} is the folder.
COMMANDS = {
    "init --dry-run": "init {0}/model {0}/text.txt --rank 2 --dry-run -o {0}/none",
    "init": "init {0}/model {0}/text.txt --rank 2 --statistics {0}/s.safetensors -o {0}/start",
    "init of a step": "init {0}/model {0}/text.txt --rank 2 --method lora-one --samples 16 -o {0}/stepped",
    "init of a plan": "init {0}/model --statistics {0}/s.safetensors --rank 2 -o {0}/planned",
    "merge": "merge {0}/s.safetensors {0}/other.safetensors -o {0}/both.safetensors",
    "ranks": "ranks {0}/s.safetensors --rank 2 -o {0}/plan.json",
    "ranks --compare": "ranks {0}/s.safetensors --rank 2 --compare uniform",
    "rate": "rate {0}/trained-not {0}/text.txt --base {0}/model --steps 100",
    "inspect of statistics": "inspect {0}/s.safetensors",
    "inspect of a plan": "inspect {0}/plan.json",
    "inspect of a start": "inspect {0}/start",
    "inspect of a trained adapter": "inspect {0}/trained --base {0}/model --engine vllm --intruders",
    "inspect of several": "inspect {0}/start {0}/plan.json",
    "export": "export {0}/trained --engine vllm -o {0}/served",
    "export of several": "export {0}/trained {0}/start --engine vllm -o {0}/served-both",
    "dial --strength": "dial {0}/trained --strength 0.5 -o {0}/weaker",
    "dial": "dial {0}/trained {0}/text.txt --keep {0}/keep.txt --uniform --samples 36 -o {0}/dialed",
    "replay": "replay {0}/model --n 4 --length 8 -o {0}/replay.jsonl",
    "compare --dry-run": "compare {0}/model {0}/text.txt --steps 4 --batch-size 2 --seeds 1 --starts random --dry-run"
    " -o {0}/runs",
}  # fmt: skip


def prepare(folder):
    torch.manual_seed(0)
    save_model(tiny_llama(), folder / "model")
    write_data(folder)
    (folder / "keep.txt").write_text(
        "\n".join(f"red hats in my {word} house" for word in ["green", "mat", "dog", "two"] * 4)
    )
    run("init", folder / "model", folder / "keep.txt", "--rank", 2, "--statistics", folder / "other.safetensors",
        "-o", folder / "other")  # fmt: skip
    for name, trained in (("trained", True), ("trained-not", False)):
        settings = dict(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(tiny_llama(), LoraConfig(**settings, init_lora_weights=not trained))
        model.peft_config["default"].base_model_name_or_path = str(folder / "model")
        model.save_pretrained(folder / name)


def shape(value):
    """The keys of a value and of what it holds, and the kinds of all; layers and the like are one key, '*'."""
    if isinstance(value, dict):
        if value and (any("." in key or "/" in key for key in value) or all(key.isdigit() for key in value)):
            return {"*": shape(next(iter(value.values())))}
        return {key: shape(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return {bool: "truth", int: "number", float: "number", str: "text", type(None): "nothing"}[type(value)]


def printed(name, folder):
    result = run(*COMMANDS[name].format(folder).split(), "--json")
    assert result.exit_code == 0, (name, result.output)
    return shape(json.loads(result.stdout))


@pytest.fixture(scope="module")
def all_printed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("json")
    prepare(folder)
    return {name: printed(name, folder) for name in COMMANDS}


@pytest.mark.filterwarnings("ignore")
def test_brackets_in_a_name_are_no_markup(tmp_path):
    folder = tmp_path / "a[bold]b"
    folder.mkdir()
    prepare(folder)
    names = 0
    for name in ("init", "ranks", "merge", "inspect of a plan", "inspect of a trained adapter", "export",
                 "dial --strength", "replay"):  # fmt: skip
        result = run(*COMMANDS[name].format(folder).split())
        assert result.exit_code == 0 and str(tmp_path / "ab") not in result.output, result.output
        names += str(folder) in result.output
    assert names >= 7


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMMANDS)
def test_keys_stay_as_scripts_know_them(name, all_printed):
    assert all_printed[name] == json.loads(KEPT.read_text(encoding="utf-8"))[name], AGAIN


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        found = {name: printed(name, Path(place)) for name in COMMANDS}
    KEPT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{KEPT}\n")
