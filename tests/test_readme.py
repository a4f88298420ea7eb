"""Every code block of the README runs, in order, with a tiny model and tiny data under the names it uses."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lora_init
from lora_init.cli import app as cli
from tests.cli.test_app import WORDS, save_model
from tests.conftest import tiny_llama

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
MODEL, DATA = "HuggingFaceTB/SmolLM2-135M-Instruct", "boolq.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    save_model(tiny_llama(), folder / MODEL)
    rows = [
        {"passage": " ".join(WORDS[i % 19 :] + WORDS[: i % 7]), "question": WORDS[i % 19], "label": i % 2 == 0}
        for i in range(48)
    ]
    (folder / DATA).write_text("\n".join(map(json.dumps, rows)))
    return folder


def numbered(*languages):
    chosen = [(i, text) for i, (language, text) in enumerate(BLOCKS) if language in languages]
    return pytest.mark.parametrize("text", [text for _, text in chosen], ids=[f"block{i}" for i, _ in chosen])


def test_no_block_escapes():
    assert {language for language, _ in BLOCKS} <= {"python", "bash", "text", "json"}
    assert README.count("```") == 2 * len(BLOCKS)
    assert "@@" not in README


def for_the_tiny_model(text):
    """Budgets, names and lengths as they fit the tiny model."""
    for pattern, smaller in (
        (r"\b1M\b", "3k"),
        (r"\b5M\b", "5k"),
        (r"\bMODEL DATA\b", f"{MODEL} {DATA}"),
        (r"lora-init compare", "lora-init compare --steps 2 --seeds 2 --learning-rates 1e-3 --validation-samples 8"),
        (r'starts=\("random", "eva"\)', r"\g<0>, steps=2, seeds=2, learning_rates=[1e-3], validation_samples=8"),
    ):
        text = re.sub(pattern, smaller, text)
    return text


@numbered("python")
def test_python(text, folder, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "HuggingFaceTB").symlink_to(folder / "HuggingFaceTB")
    (tmp_path / DATA).symlink_to(folder / DATA)
    monkeypatch.chdir(tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL)
    batches = lora_init.load_batches(DATA, tokenizer, template="{passage}\nQuestion: {question}?")
    names = {
        "lora_init": lora_init,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "name": MODEL,
        "model": model,
        "tokenizer": tokenizer,
        "batches": batches,
    }
    if "stats =" not in text and "stats" in text:
        names["stats"] = lora_init.collect(model, batches)
    exec(compile(for_the_tiny_model(text), "README.md", "exec"), names)
    if "peft_model" in names:
        assert any("lora_A" in name for name, _ in names["peft_model"].named_parameters())


@numbered("bash")
def test_commands(text, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for line in for_the_tiny_model(text).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        elif words[:2] == ["pip", "install"]:
            assert (ROOT / "pyproject.toml").exists()
        else:
            if words[0] in ("torchrun", "accelerate"):  # here in one process; in tests/test_launched.py in two
                words = ["lora-init", *words[words.index("lora_init") + 1 :]]
            assert words[0] == "lora-init", line
            result = CliRunner().invoke(cli.app, words[1:])
            assert result.exit_code == 0, f"{line}\n{result.stderr}"


def test_the_help_of_every_command_named_here_exists():
    for name in set(re.findall(r"`lora-init (\w+)", README)):
        assert CliRunner().invoke(cli.app, [name, "--help"]).exit_code == 0


def test_the_files_named_here_exist():
    for path in re.findall(r"`((?:examples|tests|benchmarks)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path


def test_public_names_are_documented():
    assert [name for name in lora_init.__all__ if f"{name}" not in README] == []
