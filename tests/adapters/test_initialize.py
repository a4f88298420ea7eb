"""`initialize` reads data of every kind by itself, given a tokenizer."""

import json

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset

from lora_init import LoraInitError, initialize, load_batches
from tests.conftest import tiny_bert, tiny_llama
from tests.loading.test_batches import bert_tokenizer, byte_tokenizer

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


def test_a_start_from_gradients_leaves_out_what_has_no_label():
    rows = [*ROWS, {"question": "q" * 40, "answer": "cut off"}]
    reading = READING | dict(samples=None, max_length=30)
    with pytest.warns(UserWarning, match="without a labelled token"):
        initialize(llama(), rows * 2 + rows[-1:] * 4, rank=2, method="lora-one", tokenizer=byte_tokenizer(), **reading)


def test_options_go_where_they_belong():
    model = initialize(
        llama(), ROWS, rank=2, tokenizer=byte_tokenizer(), exclude_modules=["k_proj"], max_batches=1, **READING
    )
    assert not any("k_proj" in name for name in weights(model)) and any("q_proj" in name for name in weights(model))


def test_classes_are_those_of_the_models_head():
    rows = [{"text": "a b c d e f"[: 2 * i + 1], "kind": ("even", "odd")[i % 2]} for i in range(6)]
    model, seen = tiny_bert(), []
    model.config.id2label = {0: "odd", 1: "even"}

    def loss(output, batch):
        seen.extend(batch["labels"].tolist())
        return output.loss

    reading = dict(tokenizer=bert_tokenizer(), template="{text}", label="kind", batch_size=2)
    adapted = initialize(model, rows, rank=2, method="natural-gradient", rho=1, loss=loss, **reading)
    expected = load_batches(rows, known_classes=("odd", "even"), **reading)
    assert seen == [label for batch in expected for label in batch["labels"].tolist()]
    assert adapted.peft_config["default"].task_type == "SEQ_CLS"
    numbered = [{**row, "kind": i} for i, row in enumerate(rows)]
    with pytest.raises(LoraInitError, match=r"has 6 classes, the model's head 2. Load the model with num_labels=6."):
        initialize(tiny_bert(), numbered, rank=2, **reading)


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("nowhere.jsonl", {}, "nowhere.jsonl"),
        (ROWS, dict(template="{missing}"), "missing"),
        (ROWS, dict(samples=0), "samples=0"),
    ],
)
def test_bad_data_are_one_line(source, options, words):
    with pytest.raises(LoraInitError, match=words) as error:
        initialize(llama(), source, tokenizer=byte_tokenizer(), **options)
    assert "\n" not in str(error.value)
