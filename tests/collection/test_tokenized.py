"""A tokenized data set goes straight to collect."""

import pytest
import torch
from datasets import Dataset

from lora_init.collection.collect import collect
from lora_init.errors import LoraInitError
from lora_init.loading.batches import as_batches
from tests.conftest import refused, tiny_llama, tiny_vit


def tokenized(n=24, **columns):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 64, (5 + i % 7,), generator=generator).tolist() for i in range(n)]
    return Dataset.from_dict({"input_ids": ids, "text": ["left out"] * n, **{k: v(ids) for k, v in columns.items()}})


def spectra(stats):
    return [stats[name].explained_variance for name in stats]


@pytest.mark.parametrize("form", ["Dataset", "torch format", "IterableDataset"])
def test_every_row_is_read_once_and_padding_does_not_count(form):
    rows, model = tokenized(), tiny_llama()
    n_tokens = sum(map(len, rows["input_ids"]))
    given = {"Dataset": rows, "torch format": rows.with_format("torch"), "IterableDataset": rows.to_iterable_dataset()}[
        form
    ]
    found = collect(model, given, rank=2, tolerance=0)
    assert (found.provenance.n_batches, found.provenance.n_samples) == (3, n_tokens)
    exact = collect(model, [{"input_ids": torch.tensor([ids])} for ids in rows["input_ids"]], rank=2, tolerance=0)
    for ours, theirs in zip(spectra(found), spectra(exact), strict=True):
        assert torch.allclose(ours, theirs, rtol=0.1)  # the same rows; the order decides how much of the tail is kept


def test_order_is_random_and_the_seed_decides_it():
    rows = tokenized(n=40)
    drawn = ([b["input_ids"].tolist() for b in as_batches(rows, tiny_llama(), seed)] for seed in (0, 0, 1))
    first, again, other = drawn
    assert first == again != other
    assert sorted(map(tuple, rows["input_ids"][:8])) != sorted(tuple(x for x in ids if x) for ids in first[0])


def test_a_batch_is_as_a_collator_makes_it():
    rows = tokenized(n=4, labels=lambda ids: [[-100, *row[1:]] for row in ids])
    (batch,) = as_batches(rows, tiny_llama(pad_token_id=9), 0)
    longest = max(map(len, rows["input_ids"]))
    assert {name: tuple(t.shape) for name, t in batch.items()} == dict.fromkeys(
        ["input_ids", "labels", "attention_mask"], (4, longest)
    )
    padding = batch["attention_mask"] == 0
    assert padding.any() and (batch["input_ids"][padding] == 9).all() and (batch["labels"][padding] == -100).all()


@pytest.mark.parametrize(
    ("name", "values"),
    [("label", [0, None]), ("label", ["yes", "no"]), ("pixel_values", [[0.5], [0.5, 1.0]]), ("labels", [[1], None])],
)
def test_a_column_that_makes_no_batch_is_named(name, values):
    model = tiny_vit() if name == "pixel_values" else tiny_llama()
    rows = tokenized(n=2, **{name: lambda ids: values})
    refused(rf"column '{name}' of the data set: .*\. Expected numbers in each row", collect, model, rows, rank=2)


def test_texts_are_refused_with_what_to_do():
    with pytest.raises(LoraInitError, match=r"the columns text, and LlamaForCausalLM takes none .* load_batches"):
        collect(tiny_llama(), Dataset.from_dict({"text": ["a", "b"]}))
