"""In Python, too, `~` is the home directory wherever a path is named; tests/cli/test_printed.py types it."""

import pytest

import lora_init
from lora_init.loading.models import load_model
from lora_init.planning.plan import load_plan, save_plan
from tests.cli.typed import prepare
from tests.commands import save_model
from tests.conftest import batches_for, tiny_llama


@pytest.mark.filterwarnings("ignore")
def test_every_path_may_begin_at_the_home_directory(tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir(), elsewhere.mkdir()
    prepare(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    model, batches = tiny_llama(), batches_for("llama")
    stats = lora_init.collect(model, batches, rank=2, progress=False, statistics="~/kept.safetensors")
    stats.save("~/saved.safetensors")
    assert len(lora_init.Statistics.load("~/saved.safetensors")) == len(stats)
    save_plan(lora_init.allocate_ranks(stats), "~/plan.json")
    assert load_plan("~/plan.json") == load_plan(home / "plan.json")
    lora_init.build_adapter(stats, 2).save_pretrained("~/adapter")
    loaded = load_model("~/model")
    again = lora_init.initialize(
        loaded.model, "~/text.txt", tokenizer=loaded.tokenizer, rank=2, progress=False, statistics="~/two.safetensors"
    )
    again.save_pretrained(home / "again")
    assert lora_init.check_fit("~/trained", "~/model").base == "~/model"
    lora_init.export_adapter("~/trained", "~/served", "vllm", base="~/model")
    lora_init.export_adapter("~/trained", "~/merged", merge_into="~/model")
    lora_init.intruder_dimensions(save_and_load(home), "~/trained")
    written = {path.name for path in home.iterdir()}
    assert written >= {
        "kept.safetensors", "saved.safetensors", "plan.json", "adapter", "two.safetensors", "served", "merged",
    }  # fmt: skip
    assert not [*elsewhere.iterdir()]


def save_and_load(home):
    return load_model(str(save_model(tiny_llama(), home / "plain"))).model
