"""`lora-init bank`, and `init --method from-bank`: from trained adapters to one that starts where they ended."""

import json

import pytest
from transformers import AutoModelForCausalLM

from lora_init.loading.batches import load_batches
from lora_init.loading.models import load_model
from tests.bank.made import fit
from tests.commands import assert_one_line_error, run

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


@pytest.mark.parametrize("by", ["nearest", "mixture", "generated", "mean"])
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
    (["--similarity", "subspaces"], ["--statistics"]),
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
