"""The directory: what is added comes back, what is foreign or damaged is refused in one line, nothing is replaced."""

import hashlib
import json

import pytest
import torch

from lora_init.bank.store import open_bank
from lora_init.collection.collect import collect
from lora_init.errors import LoraInitError
from lora_init.serving.trained import read_trained
from lora_init.statistics.tensorfile import write_tensors
from tests.bank import made
from tests.conftest import refused
from tests.processes import FORKS


def test_what_was_added_comes_back(bank, trained):
    again = open_bank(bank.path)
    assert again == bank
    assert again.tasks == {"task0": ["task0-early", "task0"], "task1": ["task1"], "task2": ["task2"]}
    for name, layer in read_trained(trained["task1"]).layers.items():
        kept = again.layers("task1")[name]
        assert torch.equal(kept.a, layer.a) and torch.equal(kept.b, layer.b) and kept.scaling == layer.scaling
    assert again.embeddings("task1").shape == (32, 32)


def test_a_name_is_never_given_twice(bank, trained):
    refused("has an entry 'task1' already", made.add, bank.path, 1, trained["task1"])
    assert open_bank(bank.path) == bank


@pytest.mark.parametrize("name", ["", "..", "a/b", "../out", "a.b", "generator", "x" * 81, "-a"])
def test_a_name_is_a_plain_name_of_a_file(name, bank, trained):
    refused("a name has letters", made.add, bank.path, 1, trained["task1"], name=name or " ")


def test_a_name_in_the_index_is_not_trusted(bank):
    index = json.loads((bank.path / "bank.json").read_text())
    index["entries"]["../../elsewhere"] = index["entries"].pop("task1")
    (bank.path / "bank.json").write_text(json.dumps(index))
    refused("a name has letters", open_bank, bank.path)


def test_another_base_is_refused(bank, trained):
    with pytest.raises(LoraInitError, match="holds adapters of a Llama, and a Bert is another model"):
        made.add(bank.path, 1, trained["task1"], name="new", fingerprint="0" * 32, model="a Bert")
    assert open_bank(bank.path) == bank


def test_prompts_embedded_otherwise_are_refused(bank, trained, tmp_path):
    words = "^.*bank embeds prompts by its base, got org/encoder.$"
    refused(words, made.add, bank.path, 1, trained["task1"], name="new", encoder="org/encoder")
    assert open_bank(bank.path) == bank
    made.add(tmp_path / "by", 1, trained["task1"], encoder="org/encoder")
    refused("by embeds prompts by org/encoder, got the base", made.add, tmp_path / "by", 2, trained["task2"])


def test_an_index_of_another_format_is_refused(tmp_path):
    """Before its entries are looked at, whose form nobody knows then."""
    whole = {"format": "lora_init.bank", "version": 1, "entries": 3}
    for change in ({"format": "lora_init.plan"}, {"version": 2}, {"format": None}):
        (tmp_path / "bank.json").write_text(json.dumps(whole | change))
        refused("bank.json is of another format than lora_init.bank 1. Give another directory", open_bank, tmp_path)
    (tmp_path / "bank.json").write_text(json.dumps(whole))
    refused("bank.json is damaged", open_bank, tmp_path)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda path: (path / "task1.safetensors").unlink(), "task1.safetensors is missing or not what was added"),
    (lambda path: (path / "task1.safetensors").write_bytes(b"x" * 100), "is missing or not what was added"),
    (lambda path: (path / "task1.safetensors").write_bytes((path / "task2.safetensors").read_bytes()),
     "is missing or not what was added"),
])  # fmt: skip
def test_a_damaged_or_foreign_entry_is_refused(damage, message, bank):
    damage(bank.path)
    refused(message, open_bank(bank.path).layers, "task1")
    assert open_bank(bank.path).layers("task2")


@pytest.mark.parametrize("place", [["fingerprint"], ["entries", "task1", "rank"], ["entries", "task1", "task"]])
def test_an_index_of_other_types_is_damaged(place, bank):
    index = json.loads((bank.path / "bank.json").read_text())
    *path, last = place
    inner = index
    for key in path:
        inner = inner[key]
    inner[last] = [1]
    (bank.path / "bank.json").write_text(json.dumps(index))
    refused(rf"bank.json is damaged .* has {last}=\[1\]", open_bank, bank.path)


def test_no_bank_and_an_empty_one(bank, tmp_path):
    refused("is no bank", open_bank, tmp_path)
    index = json.loads((bank.path / "bank.json").read_text()) | {"entries": {}}
    (bank.path / "bank.json").write_text(json.dumps(index))
    refused("is an empty bank", open_bank, bank.path)


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}],
)
def test_only_plain_lora_is_kept(options, bank, tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(made.base(), LoraConfig(target_modules=["q_proj"], **options)).save_pretrained(tmp_path / "odd")
    refused("a bank holds plain LoRA of linear layers", made.add, bank.path, 1, tmp_path / "odd", name="odd")
    get_peft_model(made.base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "new")
    refused("never trained", made.add, bank.path, 1, tmp_path / "new", name="new")


def test_statistics_come_along(bank, trained, tmp_path):
    file = tmp_path / "statistics.safetensors"
    stats = collect(made.base(), made.batches(1), rank=4, statistics=file)
    found = made.add(bank.path, 1, trained["task1"], name="with", statistics=file)
    assert found.statistics("with").provenance == stats.provenance and found.statistics("task1") is None
    (bank.path / "with.statistics.safetensors").write_bytes(b"x")
    refused("not what was added", found.statistics, "with")


def test_statistics_of_another_model_are_refused(bank, trained, tmp_path):
    torch.manual_seed(5)
    file = tmp_path / "statistics.safetensors"
    collect(made.tiny_llama(), made.batches(1), rank=4, statistics=file)
    refused("of another model", made.add, bank.path, 1, trained["task1"], name="with", statistics=file)
    assert open_bank(bank.path) == bank


def _add(path, folder, name):
    torch.set_num_threads(1)
    made.add(path, 1, folder, name=name)


def test_two_processes_add_at_once(bank, trained):
    names = [f"new{i}" for i in range(2)]
    workers = [FORKS.Process(target=_add, args=(bank.path, trained["task1"], name)) for name in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert set(open_bank(bank.path).entries) == {*bank.entries, *names}


@pytest.mark.parametrize("header", [{}, {"scalings": {"up": "much"}}, {"scalings": [1]}])
def test_an_entry_without_scalings_as_we_write_them_is_damaged(header, bank):
    file = bank.path / "task1.safetensors"
    write_tensors(file, "lora_init.bank_entry", 1, header | {"task": "task1"}, {})
    index = json.loads((bank.path / "bank.json").read_text())
    index["entries"]["task1"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (bank.path / "bank.json").write_text(json.dumps(index))
    refused(r"task1\.safetensors.*a layer", open_bank(bank.path).layers, "task1")
