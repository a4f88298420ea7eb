"""Starts from a bank beside the others: what they cost and change is in their records, and a bank is needed."""

import dataclasses

import pytest

from lora_init.bank.embeddings import embed
from lora_init.bank.generator import train_generator
from lora_init.bank.store import Bank, add_entry
from lora_init.errors import LoraInitError
from lora_init.layers.identity import fingerprint
from lora_init.loading.batches import load_batches
from lora_init.loading.models import load_model
from lora_init.serving.trained import read_trained
from tests.bank.made import fit
from tests.comparison.made import compare
from tests.conftest import refused


@pytest.fixture(scope="module")
def bank(home):
    """Two adapters for the data that the comparison is on, one of them trained the wrong way."""
    for number in range(2):
        loaded = load_model(str(home / "llama"))
        batches = load_batches(home / "rows.jsonl", loaded.tokenizer, template="{passage}", completion=" {options}")
        new, embeddings = Bank(home / "bank", fingerprint(loaded.model), "a Llama", ""), embed(loaded.model, batches)
        model = fit(loaded.model, batches, number, wrong=number == 1)
        model.save_pretrained(home / f"trained{number}")
        trained = read_trained(home / f"trained{number}")
        found = add_entry(new, f"task{number}", trained, embeddings, task=f"task{number}", data="")
    train_generator(found, steps=4).save(found)
    return home / "bank"


@pytest.mark.slow
def test_starts_from_a_bank_are_runs_as_any_other(home, bank, tmp_path):
    starts = ["random", "bank-nearest", "bank-mixture", "bank-mean", "bank-generated"]
    found = compare(home, tmp_path / "out", starts=starts, bank=bank, learning_rates=[1e-3], seeds=1)
    records = {record["start"]: record for record in found.records if "-steps" not in record["start"]}
    assert set(records) == set(starts)
    before = records["random"]["report_loss"][0]
    for start in ("bank-nearest", "bank-mixture"):
        record = records[start]
        assert record["status"] == "finished" and record["gamma"] > 0 and record["initialisation_seconds"] > 0
        assert record["report_loss"][0] < before  # a head start: it was trained on such data
    for record in records.values():  # a mean with a wrong one, or hardly trained weights, may be of no use
        assert record["status"] == "finished" or "take none" in record["error"]
    assert found.settings["bank"].startswith("bank: 2 adapters of task0, task1 (")
    # The same again does nothing; with another bank it would be another comparison.
    assert compare(home, tmp_path / "out", starts=starts, bank=bank, learning_rates=[1e-3], seeds=1).records
    assert dataclasses.is_dataclass(found)
    # Where it goes on, starts that are from no bank may come to the others.
    more = compare(home, tmp_path / "out", starts=["eva"], bank=bank, learning_rates=[1e-3], seeds=1)
    assert {"eva", "bank-nearest"} <= {record["start"] for record in more.records}


def test_a_bank_is_needed_and_of_this_model(home, bank, tmp_path):
    refused("those from a bank need bank=", compare, home, tmp_path / "out", starts=["random", "bank-nearest"])
    with pytest.raises(LoraInitError, match="holds adapters of a Llama, and BertForSequenceClassification is another"):
        compare(home, tmp_path / "out", model="bert", label="first", bank=bank, starts=["random", "bank-nearest"])
    said = "^bank=.*: no start is from a bank. Leave it out, or add bank-nearest."
    refused(said, compare, home, tmp_path / "out", starts=["random", "eva"], bank=bank)
    refused("is no bank", compare, home, tmp_path / "out", starts=["random", "bank-nearest"], bank=home)
