"""`initialize` reads data of every kind by itself, given a tokenizer."""

import json
import re
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model

from lora_init import LoraInitError, Statistics, initialize, load_batches
from lora_init.building.initialize import _print_made
from lora_init.trainers.trainers import TrainerIntegration
from tests.collection.made import labelled
from tests.conftest import refused, tiny_bert, tiny_llama
from tests.loading.made import bert_tokenizer, byte_tokenizer
from tests.trainers.made import plain

ROWS = [{"question": f"what is {i}", "answer": f"it is {i * i}"} for i in range(12)]
READING = dict(template="{question}?", completion=" {answer}", samples=8)


def written(folder):
    for name, rows in (("a", ROWS[:6]), ("b", ROWS[6:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


SOURCES = {
    "a path": lambda folder: folder / "a.jsonl",
    "several paths": lambda folder: [folder / "a.jsonl", str(folder / "b.jsonl")],
    "a pattern": lambda folder: str(folder / "*.jsonl"),
    "rows": lambda folder: ROWS,
    "a data set": lambda folder: Dataset.from_list(ROWS),
    "a stream": lambda folder: IterableDataset.from_generator(lambda: iter(ROWS)),
    "a data frame": lambda folder: pd.DataFrame(ROWS),
}


def llama():
    torch.manual_seed(0)
    return tiny_llama(vocab_size=300)


def weights(model):
    return {name: tensor for name, tensor in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("source", SOURCES)
def test_data_of_every_kind_are_read(source, tmp_path):
    made = SOURCES[source](written(tmp_path))
    ours = initialize(llama(), made, rank=2, tokenizer=byte_tokenizer(), **READING)
    batches = load_batches(SOURCES[source](tmp_path), byte_tokenizer(), needs_labels=False, **READING)
    theirs = weights(initialize(llama(), batches, rank=2))
    for name, tensor in weights(ours).items():
        assert torch.equal(tensor, theirs[name]), name


def test_statistics_have_what_rho_needs_and_gradients_if_asked_for(tmp_path):
    asked = dict(tokenizer=byte_tokenizer(), gradients=True, statistics=tmp_path / "stats", **READING)
    initialize(llama(), ROWS, rank=2, rho=4, **asked)
    made = Statistics.load(tmp_path / "stats").provenance
    assert made.settings["rho"] == 4 and made.gradients


def test_classes_are_those_of_the_models_head():
    rows = [{"text": "a b c d e f"[: 2 * i + 1], "kind": ("even", "odd")[i % 2]} for i in range(6)]
    model, seen = tiny_bert(), []
    model.config.id2label = {0: "odd", 1: "even"}

    def loss(output, batch):
        seen.extend(batch["labels"].tolist())
        return output.loss

    reading = dict(tokenizer=bert_tokenizer(), template="{text}", label="kind", batch_size=2)
    adapted = initialize(model, rows, rank=2, rho=1, loss=loss, **reading)  # of classes it asks for gradients
    expected = load_batches(rows, known_classes=("odd", "even"), **reading)
    assert seen == [label for batch in expected for label in batch["labels"].tolist()]
    assert adapted.peft_config["default"].task_type == "SEQ_CLS"
    turned = load_batches(rows, known_classes=("even", "odd"), **reading)
    refused("the data count the classes as even, odd, the model", initialize, adapted.unload(), turned, rank=2)
    numbered = [{"text": f"{'a b c d e f'[: 2 * i + 1]} {word}", "kind": i} for i in range(6) for word in "gh"]
    with pytest.raises(LoraInitError, match=r"the data have 6 classes, the model's head 2.* with num_labels=6\."):
        initialize(tiny_bert(), numbered, rank=2, **reading)


@pytest.mark.parametrize(("source", "options", "words"), [
    ("nowhere.jsonl", {}, "nowhere.jsonl"),
    (ROWS, dict(template="{missing}"), "missing"),
    (ROWS, dict(samples=0), "samples=0"),
    (ROWS, dict(samples=2.5), "samples=2.5, expected a whole number"),
    (ROWS, dict(method="lora-ga", rho=2), "it gives all layers one rank"),
])  # fmt: skip
def test_bad_data_are_one_line(source, options, words):
    refused(words, initialize, llama(), source, tokenizer=byte_tokenizer(), **options)


def asked(**more):
    chosen = dict(target_modules=["q_proj", "k_proj", "up_proj"], exclude_modules=["k_proj"], layers_to_transform=[1])
    return LoraConfig(r=3, lora_alpha=9, lora_dropout=0.1, use_rslora=True, task_type="CAUSAL_LM", **chosen | more)


def test_a_lora_config_says_what_the_adapter_is_like():
    config, data = asked(), load_batches(ROWS, byte_tokenizer(), needs_labels=False, **READING)
    wanted = get_peft_model(llama(), asked())
    got = initialize(llama(), data, config=config, rho=1, rank=3, lora_alpha=9)
    assert {n: p.shape for n, p in weights(got).items()} == {n: p.shape for n, p in weights(wanted).items()}
    mine, theirs = got.peft_config["default"], wanted.peft_config["default"]
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "task_type"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert vars(config) == vars(asked())  # not changed
    for name, parameter in weights(got).items():
        if "lora_A" in name:  # directions of the data
            gram = parameter @ parameter.T
            assert torch.allclose(gram / gram[0, 0], torch.eye(3), atol=1e-3), name


def test_what_a_trainer_brings_itself_is_refused_beside_it(tmp_path):
    trainer = plain(tmp_path, byte_tokenizer(), llama())
    refused(
        "^config= is for a plain model. Give it to the trainer, as peft_config.$", initialize, trainer, config=asked()
    )
    refused("^tokenizer= is for batches of your own. Leave it out.$", initialize, trainer, tokenizer=byte_tokenizer())
    assert trainer.model.__class__.__name__ == "LlamaForCausalLM"


def test_a_learning_rate_that_no_trainer_can_be_given_is_refused_before_a_batch_is_read(tmp_path):
    read = []
    trainer = plain(tmp_path, byte_tokenizer(), llama())
    trainer.get_train_dataloader = lambda: read.append("the trainer's data")
    said = "learning_rate={}: 'measured' sets the rate of a trainer. For a model call learning_rate()."
    for rate, given in (("measured", (llama(), map(read.append, ["a batch"]))), (1e-3, (trainer,))):
        refused(f"^{re.escape(said.format(repr(rate)))}$", initialize, *given, rank=2, learning_rate=rate)
    assert read == [] and type(trainer.model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(("ranks", "words"), [
    ((4, 1, 2, 2), "eva: 4 layers, rank 1 to 4, "), ((1, 3, 3), "eva: 3 layers, rank 1 to 3, "),
    ((3, 3), "eva: 2 layers, rank 3, "), ((2,), "eva: 1 layers, rank 2, "),
])  # fmt: skip
def test_what_was_made_is_one_line_beside_the_output_of_a_program(ranks, words, capsys):
    init = SimpleNamespace(method="eva", how_to_train="Train so.", ranks=dict(enumerate(ranks)))
    init.provenance = SimpleNamespace(n_batches=3)
    _print_made(init, SimpleNamespace(has_plain_loss=True, batch_size=8), 1.5)
    assert capsys.readouterr() == ("", f"{words}3 batches of 8 examples, 1.5 s. Train so.\n")


def test_of_all_processes_one_says_what_was_made(tmp_path, monkeypatch, capsys):
    for is_main in (True, False):
        monkeypatch.setattr(TrainerIntegration, "is_main_process", is_main)
        trainer = plain(tmp_path, byte_tokenizer(pad_token="<|pad|>"), llama())
        initialize(trainer, rank=2, target_modules=["q_proj"])
        assert ("batches of 4 examples" in capsys.readouterr().err) == is_main


def test_a_trainer_learns_from_texts_of_ones_own(tmp_path):
    trainer = plain(tmp_path, byte_tokenizer(), llama())
    adapted = initialize(trainer, ROWS, rank=2, tokenizer=byte_tokenizer(), **READING)
    theirs = weights(initialize(llama(), ROWS, rank=2, tokenizer=byte_tokenizer(), **READING))
    assert trainer.model is adapted
    for name, tensor in weights(adapted).items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(("name", "start"), [("default", "START"), ("other", "START/other")])
def test_a_start_that_changed_the_base_says_what_to_keep_of_it(name, start):
    """PEFT saves an adapter of another name into a folder of that name."""
    with pytest.warns(UserWarning, match="method='lora-ga' changed the base weights") as caught:
        options = dict(rank=2, target_modules=["q_proj"], method="lora-ga")
        initialize(llama(), labelled("llama", n_batches=2), adapter_name=name, **options)
    (said,) = [str(one.message) for one in caught if "changed the base" in str(one.message)]
    assert f"`lora-init export --start {start}` needs that" in said
