"""What is computed from batches depends on their tokens: not on padding, nor on which rows share a batch."""

from contextlib import suppress
from functools import partial
from tempfile import TemporaryDirectory

import pytest
import torch
from torch.nn.functional import pad

import lora_init
from lora_init import QuantizationErrors, find_targets
from lora_init.bank.embeddings import embed
from lora_init.building.quantized import loss_or_distance
from tests.collection.made import rounded
from tests.conftest import batches_for, tiny_bert, tiny_llama


def llama():
    torch.manual_seed(0)
    return tiny_llama()


def labelled():
    """Batches with a prompt that has no label, and no padding but some of their own."""
    made = batches_for("llama", n_batches=2)
    for batch in made:
        batch["labels"][:, :3] = -100
    return made


def padded(batches, attention_mask=0, labels=-100):
    """Pad all rows by five words more; 1 in the mask does not say so."""
    beyond = {"input_ids": 7, "attention_mask": attention_mask, "labels": labels}
    return [{name: pad(values, (0, 5), value=beyond[name]) for name, values in batch.items()} for batch in batches]


def alone(batches):
    """Make a batch of each row, as long as it is."""
    rows = []
    for batch in batches:
        for i, mask in enumerate(batch["attention_mask"].bool()):
            rows.append({name: values[i, mask][None] for name, values in batch.items()})
    return rows


def spectra(batches, **options):
    stats = lora_init.collect(llama(), batches, rank=4, rho=8, progress=False, max_batches=1000, tolerance=0, **options)
    found = [(stats[name].mean, stats.total_variance(name), stats[name].n_samples) for name in stats]
    of_gradients = stats.gradients.values()
    return found + [(one.weighted.explained_variance, one.output_moment, one.n_samples) for one in of_gradients]


def rate(batches):
    model = lora_init.initialize(llama(), labelled(), method="orthogonal", rank=4, progress=False)
    return lora_init.learning_rate(model, batches, steps=10).stored()["responses"]


def distance(batches):
    """How far a rounded encoder is from the one that was not rounded."""
    torch.manual_seed(0)
    model = tiny_bert(task="")
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        errors = QuantizationErrors(rounded(model, bits=2), find_targets(model).layers, folder)
        batches = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
        return 1e4 * loss_or_distance(model, errors, batches)(model)


READ = {
    "statistics": spectra,
    "statistics of gradients": partial(spectra, gradients=True),
    "embeddings of a bank": lambda batches: embed(llama(), batches),
    "loss": lambda batches: lora_init.mean_loss(llama(), batches),
    "learning rate": rate,
    "distance of a quantized encoder": distance,
}


@pytest.mark.parametrize("what", READ)
def test_padding_does_not_count(what):
    batches = labelled()
    expected = READ[what](batches)
    torch.testing.assert_close(READ[what](padded(batches)), expected, atol=2e-5, rtol=1e-3)
    for labels in (-100, 7):  # that could be seen
        with suppress(AssertionError):
            torch.testing.assert_close(READ[what](padded(batches, 1, labels)), expected, atol=2e-5, rtol=1e-3)
            continue
        return
    pytest.fail("words more change nothing")


@pytest.mark.parametrize("what", [name for name in READ if name != "loss"])  # which is a mean over batches
def test_a_row_counts_for_its_tokens_whatever_batch_it_is_in(what):
    batches = labelled()
    torch.testing.assert_close(READ[what](alone(batches)), READ[what](batches), atol=2e-5, rtol=1e-3)
