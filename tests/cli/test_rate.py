"""`lora-init rate`, and what other commands refuse of an adapter or a rank before a model is loaded."""

import json
import shutil

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lora_init import build_adapter
from lora_init.loading import models
from tests.adapters.made import made_up_statistics
from tests.commands import assert_one_line_error, run, save_model
from tests.conftest import tiny_bert, tiny_llama, tiny_t5


@pytest.fixture(scope="module")
def folder(home, tmp_path_factory):
    """Adapters before and after training, of a language model and of a classifier, and a base of another size."""
    folder = tmp_path_factory.mktemp("rate")
    save_model(tiny_llama(hidden_size=48), folder / "wide")
    save_model(tiny_bert(), folder / "bert")
    save_model(tiny_bert().bert, folder / "body")
    (folder / "a folder").mkdir()
    (folder / "a folder/file").write_text("")

    def save(name, base, auto, fill, **config):
        model = get_peft_model(getattr(transformers, auto).from_pretrained(base), LoraConfig(r=4, **config))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.fill_(fill)
        model.save_pretrained(folder / name)

    for name, fill in (("start", 0.0), ("trained", 0.1)):
        save(name, home / "model", "AutoModelForCausalLM", fill, target_modules=["q_proj"], task_type="CAUSAL_LM")
    auto = "AutoModelForSequenceClassification"
    save("classifier", folder / "bert", auto, 0.1, target_modules=["query"], task_type="SEQ_CLS")
    made = run("init", home / "model", home / "text.txt", "-o", folder / "ours", "--rank", 4)
    assert made.exit_code == 0, made.output
    return folder


def test_it_prints_the_rate_of_any_adapter_before_training(folder, home):
    result = run("rate", folder / "start", home / "text.txt", "--steps", 100)
    assert result.exit_code == 0 and result.stdout.startswith("Train with AdamW at "), result.output


def test_the_data_of_an_encoder_decoder_are_read_as_such(folder, home):
    save_model(tiny_t5(), folder / "t5")
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "t5")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM"))
    model.save_pretrained(folder / "of t5")
    assert_one_line_error(run("rate", folder / "of t5", home / "text.txt"), "an encoder-decoder model needs a prompt")
    read = ["--template", "{passage}", "--completion", " {question}"]
    assert run("rate", folder / "of t5", home / "rows.jsonl", *read).exit_code == 0


@pytest.mark.parametrize(("given", "steps", "epochs"), [
    ({"--steps": 12}, 12, 2.0), ({"--epochs": 3}, 18, 3.0), ({}, 6, 1.0), ({"--train-batch-size": 16}, 3, 1.0),
    ({"--steps": 6, "--train-batch-size": 16}, 6, 2.0),
])  # fmt: skip
def test_steps_and_epochs_of_the_training_follow_from_each_other_and_the_rows(given, steps, epochs, folder, home):
    """48 rows are six steps of eight."""
    words = [word for option in given.items() for word in option]
    told = json.loads(run("rate", folder / "start", home / "text.txt", *words, "--json").stdout)
    assert (told["steps"], told["epochs"]) == (steps, epochs)


@pytest.mark.parametrize("base", ["model", "body"])
@pytest.mark.slow
def test_the_rate_of_a_classifier_is_that_of_its_new_head(base, folder, home, tmp_path):
    """Whose base is a language model, or a body alone: the checkpoint has no head."""
    source = home / "model" if base == "model" else folder / "body"
    rows = [{"text": f"the cat {word} the dog", "label": word[0]} for word in ("sat", "on", "mat") for _ in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = [tmp_path / "rows.jsonl", "--template", "{text}", "--steps", 60]
    made = run("init", source, *words, "--label", "label", "--method", "random", "-o", tmp_path / "start", "--json")
    assert made.exit_code == 0, made.output
    told = run("rate", tmp_path / "start", *words)
    assert told.exit_code == 0 and "dial" not in told.stdout, told.output
    rate = json.loads(run("rate", tmp_path / "start", *words, "--json").stdout)["learning_rate"]
    assert rate == pytest.approx(json.loads(made.stdout)["recommended"]["learning_rate"], rel=0.1)
    counted = run("inspect", tmp_path / "start", "--base", source, "--intruders")
    assert "size mismatch" not in counted.output


def test_the_rate_of_a_frozen_a_is_its_own_wherever_it_is_recorded(home, tmp_path):
    """In the config, which goes along with training, or in our file alone, where another tool rewrote the config."""
    stats, rates = made_up_statistics(tiny_llama(), task_type="CAUSAL_LM", model_id=str(home / "model")), {}
    for name, freeze_a in (("free", False), ("frozen", True)):
        init = build_adapter(stats, 4, "random", lora_alpha=0.01, freeze_a=freeze_a)
        init.save_pretrained(tmp_path / name)
    shutil.copytree(tmp_path / "frozen", tmp_path / "rewritten")
    config = json.loads((tmp_path / "frozen/adapter_config.json").read_text())
    (tmp_path / "rewritten/adapter_config.json").write_text(json.dumps(config | {"auto_mapping": None}))
    for name in ("free", "frozen", "rewritten"):
        told = run("rate", tmp_path / name, home / "text.txt", "--steps", 100, "--json")
        rates[name] = json.loads(told.stdout)["learning_rate"]
    assert rates["rewritten"] == rates["frozen"] > 1.2 * rates["free"]


def test_layers_that_nothing_moves_are_counted(folder, home, tmp_path):
    shutil.copytree(folder / "start", tmp_path / "start")
    tensors = load_file(folder / "start/adapter_model.safetensors")
    key = next(key for key in tensors if "layers.1.self_attn.q_proj.lora_A" in key)
    save_file(tensors | {key: torch.zeros_like(tensors[key])}, tmp_path / "start/adapter_model.safetensors")
    words = ["rate", tmp_path / "start", home / "text.txt", "--steps", 100]
    done = run(*words)
    assert "\n1 layers say nothing, such as model.layers.1.self_attn.q_proj.\n" in done.stdout, done.output
    assert json.loads(run(*words, "--json").stdout)["left_out"] == ["model.layers.1.self_attn.q_proj"]
    assert "say nothing" not in run("rate", folder / "start", *words[2:]).stdout


# Words of a command: {home} has the model and data, adapters stand in the folder that is worked in.
REFUSED = {
    "rate of a wrong base": (["rate", "start", "{home}/text.txt", "--base", "wide"], "a base of another size"),
    "rate after training": (
        ["rate", "trained", "{home}/text.txt"],
        "trained: B is not zero, and the rule is for adapters before training. Name the adapter before its training.",
    ),
    "rank of init": (
        ["init", "{home}/model", "{home}/text.txt", "-o", "out", "--rank", 1000000],
        "--rank 1000000 is larger than its input width 32 (14 such layers)",
    ),
    "rank of compare": (
        ["compare", "{home}/model", "{home}/text.txt", "-o", "out", "--rank", 1000000],
        "--rank 1000000 is larger than its input width 32 (14 such layers)",
    ),
    "rank of export": (
        ["export", "trained", "-o", "out", "--rank", 1000000, "--data", "{home}/text.txt"],
        "--rank 1000000: no layer of this adapter can have more than rank 32",
    ),
    "export of a wrong base": (
        ["export", "trained", "-o", "out", "--base", "wide", "--data", "{home}/text.txt"], "a base of another size",
    ),
    "loss of a classifier": (
        ["export", "classifier", "-o", "out", "--data", "{home}/text.txt"],
        "classifier is of a classifier, and the loss is that of text. Leave --data out.",
    ),
    "output of export": (["export", "trained", "-o", "a folder"], "error: a folder exists and is not empty"),
    "output of init": (["init", "{home}/model", "{home}/text.txt", "-o", "a folder"], "error: a folder exists and is"),
    "output of dial": (["dial", "trained", "--strength", 0.8, "-o", "a folder"], "error: a folder exists and is not"),
    "file for llama.cpp": (["export", "trained", "-o", "a folder", "--engine", "llama.cpp"], "error: a folder is"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_before_a_model_is_loaded_by_the_path_that_was_typed(folder, home, monkeypatch, case):
    words, expected = REFUSED[case]
    monkeypatch.setattr(models.ModelSource, "load", None)
    monkeypatch.chdir(folder)
    assert_one_line_error(run(*(str(word).format(home=home) for word in words)), expected)
    assert not (folder / "out").exists()


def test_the_export_of_a_classifier_asks_nothing_about_its_own_head(folder, home, tmp_path):
    save_model(tiny_bert(), tmp_path / "bert")
    rows = [f"{text},{'abc'[i % 3]}" for i, text in enumerate((home / "text.txt").read_text().splitlines())]
    (tmp_path / "rows.csv").write_text("\n".join(["text,kind", *rows]))
    made = run("init", tmp_path / "bert", tmp_path / "rows.csv", "--label", "kind", "-o", tmp_path / "a", "--rank", 2)
    assert made.exit_code == 0, made.output
    done = run("export", tmp_path / "a", "-o", tmp_path / "b")
    assert done.exit_code == 0 and done.stderr == "", done.output
    assert run("inspect", tmp_path / "a", "--base", tmp_path / "bert").exit_code == 0
