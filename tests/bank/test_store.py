"""The directory: what is added comes back, what is foreign or damaged is refused in one line, nothing is replaced."""

import hashlib
import json
from contextlib import contextmanager, nullcontext

import pytest
import torch

from lora_init.bank.store import GENERATOR, Bank, add_entry, check_plain_lora, open_bank
from lora_init.collection.collect import collect
from lora_init.errors import LoraInitError
from lora_init.serving.trained import EMBEDDING, Layer, Trained, read_trained
from lora_init.statistics.tensorfile import TensorFile, write_tensors
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


def test_a_bank_of_the_home_directory_is_found(bank, monkeypatch):
    monkeypatch.setenv("HOME", str(bank.path.parent))
    assert open_bank(f"~/{bank.path.name}").tasks == bank.tasks


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


def test_another_generator_is_another_bank(bank):
    words = [open_bank(bank.path).in_words()]
    for content in (b"one", b"two"):
        (bank.path / GENERATOR).write_bytes(content)
        words.append(open_bank(bank.path).in_words())
    assert len({*words}) == 3


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


def test_what_another_process_has_added_while_one_waited_for_it_stays(tmp_path, monkeypatch):
    layers = {"q": Layer(torch.ones(1, 2), torch.ones(3, 1), 1.0)}

    def add(name, lock):
        monkeypatch.setattr("lora_init.bank.store.FileLock", lock)
        bank = Bank(tmp_path / "bank", "f", "a model", "")
        return add_entry(bank, name, Trained({}, layers, {}), torch.ones(2, 4), task="t", data="")

    add("first", lambda path: nullcontext())

    @contextmanager
    def waited(path):
        add("second", lambda path: nullcontext())
        yield

    assert {*add("third", waited).entries} == {"first", "second", "third"}
    assert {*open_bank(tmp_path / "bank").entries} == {"first", "second", "third"}


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


def small(path, **about):
    layers = {
        "up": Layer(torch.ones(2, 3), torch.ones(4, 2), 0.5),
        "down": Layer(torch.ones(3, 3), torch.ones(4, 3), 2.0),
    }
    known = dict(task="t", data="d") | about
    new = Bank(path, "f", "a model", known.pop("encoder", ""))
    return add_entry(new, known.pop("name", "one"), Trained({}, layers, {}), torch.ones(5, 6).bfloat16(), **known)


def test_what_an_index_says(tmp_path):
    """All of it: other programs read it."""
    small(tmp_path / "bank", encoder="e")
    bank = small(tmp_path / "bank", encoder="e", name="two", task="other")
    assert sorted(path.name for path in bank.path.iterdir()) == [
        ".lock", "bank.json", "one.safetensors", "two.safetensors",
    ]  # fmt: skip
    files = [hashlib.sha256((bank.path / f"{name}.safetensors").read_bytes()).hexdigest() for name in ("one", "two")]
    common = {"data": "d", "rank": 3, "n_prompts": 5, "statistics_sha256": ""}
    text = (bank.path / "bank.json").read_text()
    assert json.loads(text) == {
        "format": "lora_init.bank", "version": 1, "fingerprint": "f", "model": "a model", "encoder": "e",
        "entries": {
            "one": {"task": "t", "sha256": files[0], **common}, "two": {"task": "other", "sha256": files[1], **common},
        },
    }  # fmt: skip
    assert text.startswith('{\n  "format"') and text.endswith("}\n")
    digest = hashlib.sha256("".join(files).encode()).hexdigest()[:16]
    assert bank.in_words() == f"bank: 2 adapters of t, other ({digest})" and bank.tasks == {
        "t": ["one"],
        "other": ["two"],
    }
    assert TensorFile(bank.path / "one.safetensors", "lora_init.bank_entry", 1).header["scalings"] == {
        "up": 0.5, "down": 2.0,
    }  # fmt: skip
    assert TensorFile(bank.path / "two.safetensors", "lora_init.bank_entry", 1).header["task"] == "other"
    assert bank.embeddings("one").dtype == torch.float32
    assert {name: layer.scaling for name, layer in bank.layers("one").items()} == {"up": 0.5, "down": 2.0}


def test_a_refused_entry_leaves_nothing_behind(tmp_path):
    path = tmp_path / "bank"
    words = "^entry 'a b': a name has letters, digits, - and _, at most 80. Pass another --name.$"
    refused(words, small, path, name="a b")
    assert not path.exists()
    file = tmp_path / "file"
    file.touch()
    refused("file", small, file)
    with pytest.raises(LoraInitError):
        small(path, statistics=tmp_path / "nowhere")
    assert not path.exists() and small(path, name="x" * 80).entries
    assert small(tmp_path / "deep" / "er" / "bank").entries


@pytest.mark.parametrize(("changes", "said"), [
    (dict(layers={"m": Layer(torch.ones(1, 3), torch.ones(4, 1), 1.0, magnitude=torch.ones(4))}), "DoRA"),
    (dict(config={"alora_invocation_tokens": [1]}), "aLoRA"),
    (dict(layers={"e": Layer(torch.ones(2, 1, 3), torch.ones(2, 4, 1), 1.0)}), "e"),
    (dict(layers={"t": Layer(torch.ones(1, 3), torch.ones(4, 1), 1.0, EMBEDDING)}), "t"),
    (dict(others={"head.weight": torch.ones(1)}), "head.weight"),
])  # fmt: skip
def test_what_has_no_common_form_is_named(changes, said):
    plain = {"up": Layer(torch.ones(1, 3), torch.ones(4, 1), 1.0)}
    words = f"^the adapter has {said}: a bank holds plain LoRA of linear layers. Train one of those.$"
    refused(words, check_plain_lora, Trained(**dict(config={}, layers=plain, others={}) | changes))
    check_plain_lora(Trained({}, plain, {}))
