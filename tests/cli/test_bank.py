"""`lora-init bank`, and `init --method from-bank`: from trained adapters to one that starts where they ended."""

import json
from contextlib import nullcontext
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_init.adapters.init_config import Reading
from lora_init.bank.embeddings import MOST_PROMPTS
from lora_init.bank.store import INDEX
from lora_init.cli import bank as command
from lora_init.cli.console import running
from lora_init.errors import LoraInitError
from lora_init.loading.batches import load_batches
from lora_init.loading.models import load_model
from lora_init.starts.starts import BANK_WAYS
from tests.bank.made import fit
from tests.commands import assert_one_line_error, run
from tests.conftest import refused

READ = ["--template", "{passage}", "--completion", " {question}"]


@pytest.fixture(scope="module")
def adapters(home, tmp_path_factory):
    """Two adapters for the questions of the data, one of them for those turned round."""
    folder = tmp_path_factory.mktemp("adapters")
    loaded = load_model(str(home / "model"))
    batches = load_batches(home / "rows.jsonl", loaded.tokenizer, template="{passage}", completion=" {question}")
    for number in range(2):
        model = fit(AutoModelForCausalLM.from_pretrained(home / "model"), batches, number, wrong=number == 1)
        model.save_pretrained(folder / f"task {number}")
    return folder


@pytest.fixture
def bank(home, adapters, tmp_path):
    for number in range(2):
        done = add(tmp_path / "bank", adapters / f"task {number}", home)
        assert done.exit_code == 0, done.stderr
    assert "bank: task-1, task task-1, rank 2, 48 prompts. In all 2, tasks: 2.\nNext: lora-init init " in done.stdout
    return tmp_path / "bank"


def add(bank, adapter, home, *more):
    return run("bank", "add", bank, adapter, "--data", home / "rows.jsonl", *READ, *more)


def test_an_entry_has_the_name_of_its_directory_whatever_it_is_called(bank, adapters, home, monkeypatch):
    monkeypatch.chdir(adapters / "task 0")
    assert json.loads(add(bank.parent / "new", ".", home, "--json").stdout)["entry"] == "task-0"


def start(home, bank, *more):
    output = bank.parent / "out"
    command = ["init", home / "model", home / "rows.jsonl", *READ, "-o", output, "--rank", "2", "--samples", "24"]
    return run(*command, "--method", "from-bank", "--bank", bank, *more)


def test_list_says_what_is_there(bank):
    done = run("bank", "list", bank)
    assert done.exit_code == 0
    for part in ("2 adapters of 2 tasks", "LlamaForCausalLM", "middle layer of the base", "task-0", "rows.jsonl"):
        assert part in done.stdout
    # A long path is broken where the line ends.
    assert f"generatornone:lora-initbanktrain{bank}" in "".join(done.stdout.split())
    listed = json.loads(run("bank", "list", bank, "--json").stdout)
    assert list(listed["entries"]) == ["task-0", "task-1"] and listed["entries"]["task-0"]["n_prompts"] == 48


def test_what_was_added_is_said_to_scripts(bank, adapters, home):
    said = json.loads(add(bank, adapters / "task 0", home, "--name", "again", "--task", "both", "--json").stdout)
    counts = {"rank": 2, "n_prompts": 48, "tasks": 3}
    assert {key: said[key] for key in ("bank", "entry", "task", *counts)} == {
        "bank": str(bank), "entry": "again", "task": "both", **counts,
    }  # fmt: skip


@pytest.mark.parametrize("by", ["nearest", "mixture", "generated", "mean"])
@pytest.mark.slow
def test_each_way_writes_an_adapter_that_peft_loads(by, bank, home):
    from peft import PeftModel

    if by == "generated":
        done = run("bank", "train", bank, "--steps", "8")
        assert done.exit_code == 0 and "step 8 of 8" in done.stderr and "parameters" in done.stdout
        assert "generator trained " in " ".join(run("bank", "list", bank).stdout.split())
    done = start(home, bank, "--by", by, "--json", "--gamma", "1")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["method"] == f"bank-{by}" and said["gamma"] == 1.0 and set(said["ranks"].values()) == {2}
    assert len(said["neighbours"]) == 2 and len(said["weights"]) == {"nearest": 1, "generated": 0}.get(by, 2)
    base = AutoModelForCausalLM.from_pretrained(home / "model")
    model = PeftModel.from_pretrained(base, said["adapter"], is_trainable=True)
    assert any(float(p.detach().abs().max()) > 0 for name, p in model.named_parameters() if "lora_B" in name)
    shown = run("inspect", said["adapter"])
    assert shown.exit_code == 0 and f"bank-{by}" in shown.stdout


@pytest.mark.parametrize(("more", "parts"), [
    (["--by", "generated"], ["has no generator yet", "lora-init bank train"]),
    (["--similarity", "subspaces"], ["--similarity subspaces compares statistics. Name with --statistics a file"]),
    (["--similarity", "both", "--statistics", "none.safetensors"], ["compares statistics. Name with --statistics a"]),
    (["--statistics", "new.safetensors"], ["--statistics: --similarity embeddings compares prompts alone. Leave it"]),
    (["--use-dora", "--rho", "1"], ["--rho, --use-dora: a bank's adapters decide that. Leave them out."]),
    (["--dry-run"], ["--dry-run"]),
])  # fmt: skip
def test_what_cannot_be_is_one_line(more, parts, bank, home):
    assert_one_line_error(start(home, bank, *more), *parts)
    assert not (bank.parent / "out").exists()


def test_bad_banks_and_adapters_are_one_line(bank, home, adapters, tmp_path):
    assert_one_line_error(run("bank", "list", tmp_path), "is no bank")
    assert_one_line_error(start(home, tmp_path / "none" / "out"), "is no bank")
    assert_one_line_error(add(bank, adapters / "task 0", home), "has an entry 'task-0' already")
    assert_one_line_error(add(bank, home / "model", home, "--name", "x"), "adapter_config.json")
    assert_one_line_error(add(bank, adapters / "task 0", home, "--name", "../x"), "a name has letters")


def test_the_list_has_a_row_for_each_entry_and_says_what_is_there(bank):
    listed = json.loads(run("bank", "list", bank, "--json").stdout)
    assert (
        [*listed] == ["bank", "model", "encoder", "entries"] and listed["bank"] == str(bank) and listed["encoder"] == ""
    )
    lines = [" ".join(line.split()) for line in run("bank", "list", bank).stdout.splitlines()]
    first = lines.index("entry task rank prompts statistics data")
    row = "task-{0} task-{0} 2 48 - {1}"
    name = listed["entries"]["task-0"]["data"].partition(":")[0]
    assert lines[first + 1 : first + 3] == [row.format(number, name) for number in range(2)]
    assert f"base {listed['model']}" in lines and lines[first - 1] == ""
    assert lines[-1] == f"Next: lora-init init MODEL DATA --method from-bank --bank {bank} -o started"


ENTRY = make_dataclass("Entry", [("task", str, "t"), ("rank", int, 4), ("n_prompts", int, 5)])


@pytest.fixture
def added(monkeypatch):
    """What each step of adding an entry is asked for; nothing is read or loaded."""
    asked = {}

    def step(place, result):
        def ask(*words, **how):
            asked[place.rpartition(".")[2]] = (*words, how)
            return result(*words) if callable(result) else result

        monkeypatch.setattr(f"lora_init.{place}", ask)

    trained = SimpleNamespace(base="its base")
    loaded = SimpleNamespace(model="weights", tokenizer="words", seq2seq="is seq2seq")
    step("bank.store.check_plain_lora", None)
    step("bank.store.open_bank", SimpleNamespace(entries={}, encoder="encoder of the bank"))
    step(
        "bank.store.add_entry",
        lambda bank, name, *_: SimpleNamespace(path=bank.path, entries={name: ENTRY()}, tasks="t"),
    )
    step("bank.embeddings.embed", "embeddings")
    step("layers.identity.fingerprint", "print")
    step("loading.models.load_model", loaded)
    step("loading.batches.load_batches", SimpleNamespace(description="rows", settings={}))
    step("serving.base.read_base", "plain")
    step("serving.base.with_changed_copies", "changed")
    step("serving.trained.read_trained", trained)
    step("statistics.statistics.Statistics.load", SimpleNamespace(provenance=SimpleNamespace(settings={})))
    monkeypatch.setattr(command, "importing", lambda *names: asked.update(importing=names) or nullcontext())
    monkeypatch.setattr(command, "read_encoder", lambda name: f"read {name}")
    return asked


def test_an_entry_is_what_was_asked_for(added, tmp_path, capsys):
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / INDEX).touch()
    words = dict(model="m", encoder="e", task="sums", samples=7, max_length=9, trust_remote_code=True)
    command.add(tmp_path / "bank", "a", "d", statistics="s", name="n", reading=Reading(template="{x}"), **words)
    assert added["importing"] == ("m", "d") and added["read_base"][0] == added["load_model"][0] == "m"
    assert added["read_base"][2] == added["load_model"][1] == {"trust_remote_code": True}
    *read, how = added["load_batches"]
    asked = {"samples": 7, "max_length": 9, "seq2seq": "is seq2seq", "template": "{x}"}
    assert read == ["d", "words"] and asked.items() <= how.items()
    assert added["embed"][3] == "read e"
    bank, *of_entry = added["add_entry"]
    assert bank.encoder == "e"  # and not the bank's own, so that `add_entry` refuses it
    assert of_entry[0] == "n" and of_entry[3] == {"task": "sums", "data": "rows", "statistics": "s"}
    assert "bank: n, task t, rank 4, 5 prompts. In all 1, tasks: 1.\n" in capsys.readouterr().out
    running.quiet = True
    command.add(tmp_path / "bank", Path("dir/A b_"), "d", reading=Reading())
    assert capsys.readouterr() == ("", "")
    assert added["load_model"] == ("its base", {"trust_remote_code": False})
    assert added["load_batches"][-1]["samples"] == MOST_PROMPTS
    bank, *of_entry = added["add_entry"]
    assert bank.encoder == "encoder of the bank" and added["embed"][3] == "read encoder of the bank"
    assert of_entry[0] == "A-b" and of_entry[3] == {"task": "A-b", "data": "rows", "statistics": None}


@pytest.mark.parametrize("bank", ["bank", "~/bank"])
@pytest.mark.parametrize(("directory", "name"), [
    ("A b_", "A-b"), ("-start-", "start"), ("_x.y_", "x-y"), ("é a", "a"), ("a--b", "a--b"), ("new", None),
])  # fmt: skip
def test_an_entry_is_named_after_its_directory_in_a_bank_that_may_be_in_the_home_folder(
    directory, name, bank, added, tmp_path, monkeypatch
):
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / INDEX).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    there = SimpleNamespace(entries={"new": 1}, encoder="of the bank")
    monkeypatch.setattr("lora_init.bank.store.open_bank", lambda path: there)
    if name is None:
        said = "has an entry 'new' already and replaces none"
        refused(said, command.add, Path(bank), Path(directory), "d", reading=Reading())
        return
    command.add(Path(bank), Path(directory), "d", reading=Reading())
    assert added["add_entry"][1] == name and added["add_entry"][0].encoder == "of the bank"


def test_what_is_no_bank_and_no_plain_adapter_are_refused_before_the_base_is_loaded(added, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").touch()
    refused("notes.txt is a file", command.add, tmp_path / "notes.txt", "a", "d", name="n", reading=Reading())
    refused("a name has letters", command.add, tmp_path / "bank", "a", "d", name="a b", reading=Reading())

    def check(trained):
        raise LoraInitError("it is not plain.")

    monkeypatch.setattr("lora_init.bank.store.check_plain_lora", check)
    refused("it is not plain", command.add, tmp_path / "bank", "a", "d", name="n", reading=Reading())
    assert "load_model" not in added and "embed" not in added


@pytest.mark.parametrize("quiet", [False, True])
def test_the_list_names_the_encoder_and_which_entries_have_statistics(quiet, monkeypatch, capsys, tmp_path):
    entry = make_dataclass("Entry", ["task", "rank", "n_prompts", "statistics_sha256", "data"])
    entries = {"a": entry("sums", 4, 32, "0a1b", "rows.jsonl: 32 of 40"), "b": entry("[b]", 8, 16, "", "chat: 16")}
    about = dict(path=tmp_path, entries=entries, tasks=["sums", "[b]"], model="Llama tiny", encoder="org/encoder")
    monkeypatch.setattr("lora_init.bank.store.open_bank", lambda path: SimpleNamespace(**about))
    running.quiet = quiet  # a list was asked for, and is printed all the same
    command.list_(tmp_path)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in ("prompts embedded by org/encoder", "a sums 4 32 yes rows.jsonl", "b [b] 8 16 - chat"):
        assert line in lines, lines


@pytest.mark.parametrize(("steps", "said"), [
    (17, [2, 4, 6, 8, 10, 12, 14, 16]), (3, [1, 2, 3]), (None, [*range(200, 1601, 200)]),
])  # fmt: skip
@pytest.mark.parametrize(("explained", "words"), [(0.256, "26% of"), (-0.5, "0% of")])
def test_a_training_says_about_eight_times_how_far_it_is(steps, said, explained, words, monkeypatch, capsys, tmp_path):
    asked = []

    def train(opened, rank, steps, seed, report):
        asked.append((opened, rank, seed))
        for step in range(1, steps + 1):
            report(step, 0.5)
        decoder = SimpleNamespace(parameters=lambda: [SimpleNamespace(numel=lambda: 1234)] * 2)
        return SimpleNamespace(save=lambda bank: tmp_path / "[b]g", decoder=decoder, explained=explained)

    opened = SimpleNamespace(path=tmp_path, tasks={"a": 1, "b": 2})
    monkeypatch.setattr("lora_init.bank.generator.train_generator", train)
    monkeypatch.setattr("lora_init.bank.store.open_bank", lambda path: opened)
    command.train(tmp_path, rank=3, steps=steps, seed=5)
    out, errors = capsys.readouterr()
    assert asked == [(opened, 3, 5)]
    assert errors.splitlines() == [
        f"step {step} of {steps or 1600}: error 0.500 of the variance of the weights" for step in said
    ]
    line = (
        f"{tmp_path / '[b]g'}: 2,468 parameters. From prompts of its 2 tasks that it did not see it reproduces {words} "
        "what distinguishes their adapters."
    )
    follows = f"Next: lora-init init MODEL DATA --method from-bank --bank {tmp_path} -o started"
    assert " ".join(out.split()) == f"{line} {follows}"
    running.quiet = True
    command.train(tmp_path, steps=steps)
    assert asked[1] == (opened, None, 0) and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["", "encoder"])
def test_an_encoder_is_loaded_if_one_is_named(name, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "lora_init.loading.models.load_model", lambda *words, **how: asked.append((*words, how)) or "it"
    )
    assert command.read_encoder(name) == ("it" if name else None)
    assert asked == ([("encoder", {"task_type": "FEATURE_EXTRACTION"})] if name else [])


def test_one_encoder_embeds_the_prompts_of_all_entries(home, adapters, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "read_encoder", lambda name: f"read {name}")
    monkeypatch.setattr("lora_init.bank.embeddings.embed", lambda *words: asked.append(words[3:]) or torch.eye(3))
    for number, more in enumerate((["--encoder", "org/encoder"], [])):
        done = add(tmp_path / "bank", adapters / f"task {number}", home, *more)
        assert done.exit_code == 0, done.stderr
    assert asked == [("read org/encoder",)] * 2


ROWS = {"digest of the rows": "a"}


@pytest.mark.parametrize(("settings", "here", "is_other"), [
    (ROWS, ROWS, False), ({}, ROWS, False), ({"digest of the rows": None}, ROWS, False), (ROWS, {}, False),
    ({"digest of the rows": "b"}, ROWS, True),
])  # fmt: skip
def test_statistics_of_other_rows_are_refused_where_both_are_known(settings, here, is_other):
    stats = SimpleNamespace(path="s", provenance=SimpleNamespace(settings=settings, data="rows"))
    if is_other:
        said = r"^s is of other data \(rows\). Name what init made of this data.$"
        refused(said, command._check_of_these, stats, SimpleNamespace(settings=here))
    else:
        command._check_of_these(stats, SimpleNamespace(settings=here))


def test_an_entry_takes_no_statistics_of_other_data(bank, adapters, home, tmp_path):
    words = ["init", home / "model", home / "text.txt", "--rank", 2, "--samples", 24, "-o", tmp_path / "other"]
    assert run(*words, "--statistics", tmp_path / "other.safetensors").exit_code == 0
    of_other = ("--name", "x", "--statistics", tmp_path / "other.safetensors")
    assert_one_line_error(add(bank, adapters / "task 0", home, *of_other), "is of other data (")
    start_of_other = start(home, bank, "--similarity", "subspaces", *of_other[2:])
    assert "is of other data (" in start_of_other.stderr and start_of_other.exit_code == 1


@pytest.mark.parametrize("labels", [True, False])
def test_a_start_is_chosen_by_the_loss_where_there_are_labels(labels, monkeypatch):
    made = {}
    held_out = ({"labels": 1},) if labels else ({"x": 1},)
    examples = SimpleNamespace(batches=SimpleNamespace(settings=ROWS), held_out=held_out)
    stored = SimpleNamespace(path="s", provenance=SimpleNamespace(settings=ROWS, data="rows"))
    for place, result in (("embeddings.embed", "embeddings"), ("similarity.neighbours", "order")):
        monkeypatch.setattr(f"lora_init.bank.{place}", lambda *words, r=result, p=place: made.update({p: words}) or r)
    monkeypatch.setattr("lora_init.collection.losses.mean_loss", lambda model, batches: (model, batches))
    monkeypatch.setattr(
        "lora_init.bank.start.start_from_bank", lambda *words, **how: made.update(start=words, how=how) or 1
    )
    monkeypatch.setattr(command, "read_encoder", lambda name: f"read {name}")
    bank = SimpleNamespace(path="b", encoder="e")
    config = SimpleNamespace(start=BANK_WAYS["nearest"], ranks=SimpleNamespace(rank=3), shape="shape")
    loaded = SimpleNamespace(model="m", tokenizer="t")
    assert command.start_from(bank, "both", loaded, examples, config, stored) == 1
    assert made["embeddings.embed"] == ("m", examples.batches, "t", "read e")
    assert made["similarity.neighbours"] == (bank, "embeddings", stored, "both")
    *words, loss_of, way = made["start"]
    assert (words, way) == ([bank, "m", "embeddings"], "nearest")
    assert made["how"] == {"rank": 3, "shape": "shape", "order": "order"}
    assert (loss_of("model") == ("model", [*held_out])) if labels else loss_of is None
