"""`lora-init init`: the adapter that it makes, the statistics file, and what it refuses."""

import json
import math
import re
import shutil
from contextlib import nullcontext
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lora_init
from lora_init import Statistics, allocate_ranks, build_adapter, collect, load_batches
from lora_init.adapters.init_config import Correction, Layers, PassOptions, Ranks, Reading, Sample, Shape
from lora_init.cli import init as command_of
from lora_init.cli.console import Running, running
from lora_init.cli.init import FromBank, _check_words
from lora_init.cli.options import Length, LoadingQuantized
from lora_init.collection.backward import NoGradientsError
from lora_init.loading import models
from lora_init.loading.models import load_model
from lora_init.planning.plan import save_plan
from lora_init.rates.learning_rate import rate_text
from tests.commands import WORDS, assert_one_line_error, run, save_model
from tests.conftest import refused, tiny_bert, tiny_llama

# What it makes


@pytest.mark.slow
def test_starts_by_the_gradient_collect_it_and_say_what_they_do_to_the_model(command, home, tmp_path):
    file = tmp_path / "stats.safetensors"
    plain = run(*command, "--statistics", file)
    assert plain.exit_code == 0, plain.output
    command[command.index("-o") + 1] = str(tmp_path / "lora-ga")
    other = run(*command, "--statistics", file, "--method", "eva-grad", "--rho", 2)
    assert other.exit_code == 1 and "was made with gradients False, and True is asked for" in other.stderr
    file.unlink()
    made = run(*command, "--statistics", file, "--method", "lora-ga", "--rho", "1", "--gamma", "32")
    assert made.exit_code == 0, made.output
    assert "base weights must give up what the adapter" in " ".join(made.stdout.split())
    for output in (made.stdout, run("inspect", tmp_path / "lora-ga").stdout):
        assert "began as lora-ga, which changes the base weights, so no engine takes it as it is." in output
        assert "`lora-init export --start DIRECTORY`" in output and "vLLM" not in output
    command[command.index("-o") + 1] = str(tmp_path / "planned")
    again = run(*command, "--statistics", file, "--method", "eva-grad", "--rho", "1")
    assert again.exit_code == 0 and "B is not zero" not in again.stdout
    command[command.index("-o") + 1] = str(tmp_path / "step")
    stepped = run(*command, "--method", "lora-one", "--rho", "1", "--json")
    said = json.loads(stepped.stdout)
    assert said["loss_at_start"] < said["loss_before"] and said["gamma"] >= 1.0
    for text in (said["notes"][0], (tmp_path / "step/README.md").read_text()):
        assert "before any training" in text
    planned = run("ranks", file, "--policy", "gradient", "--rank", "2", "--compare", "eva", "--compare", "gora")
    assert planned.exit_code == 0 and "gora" in planned.stdout, planned.output


def test_every_way_makes_the_same_adapter_where_nothing_is_said_of_rho(command, home, tmp_path):
    """By the command, by a plan of `ranks`, by `initialize` and step by step, with defaults everywhere."""
    command[-1] = "2"  # at which ranks would move
    file, plan = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    assert run(*command, "--statistics", file).exit_code == 0
    assert run("ranks", file, "--rank", 2, "--output", plan).exit_code == 0
    planned = ["init", home / "model", "--statistics", file, "--ranks", plan, "-o", tmp_path / "planned"]
    assert run(*planned).exit_code == 0
    for option in ("--rank", "--rho"):
        twice = run(*planned[:-1], tmp_path / "twice", option, 2)
        assert_one_line_error(twice, "--ranks names a plan, which has all ranks. Leave --rank and --rho out.")
    loaded = load_model(str(home / "model"))
    batches = load_batches(home / "text.txt", loaded.tokenizer)
    stats = collect(loaded.model, batches, rank=2, progress=False)
    for built in (build_adapter(stats, allocate_ranks(stats, rank=2)), build_adapter(stats)):
        built.save_pretrained(tmp_path / "steps", overwrite=True)
        ways = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "planned", "steps")]
        assert ways[0].keys() == ways[1].keys() == ways[2].keys()
        assert all(torch.equal(ways[0][key], way[key]) for way in ways for key in way)
    lora_init.initialize(loaded.model, batches, rank=2, progress=False).save_pretrained(tmp_path / "initialized")
    called = load_file(tmp_path / "initialized" / "adapter_model.safetensors")
    assert called.keys() == ways[0].keys() and all(torch.equal(called[key], ways[0][key]) for key in called)


def test_the_default_is_the_recommended_adapter_and_says_what_to_train_it_with(command, home, tmp_path):
    save_model(tiny_bert(task=None), tmp_path / "model")
    classes = [tmp_path / "model", home / "rows.jsonl", "--template", "{passage}", "--label", "question", "--rank", 2]
    answers = [*command[1:2], home / "rows.jsonl", "--template", "{passage}", "--completion", " {question}"]
    cases = {  # method, and the steps of an epoch
        "text": ([*command[1:3]], "eva"),
        "answers": (answers, "eva"),
        "classes": (classes, "natural-gradient"),
        "random": ([*command[1:3], "--method", "random"], "random"),
    }
    for name, (words, method) in cases.items():
        out = tmp_path / name
        made = run("init", *words, "--rank", 2, "--steps", 50, "-o", out)
        assert made.exit_code == 0, made.output
        config, origin = (json.loads((out / file).read_text()) for file in ("adapter_config.json", "lora_init.json"))
        assert (origin["method"], config["lora_alpha"], config["rank_pattern"]) == (method, 4, {})
        assert "rank 2 in " in made.stdout
        rate = origin["recommended"].pop("learning_rate")
        assert origin["recommended"] == {"warmup": 0.1, "schedule": "cosine", "optimizer": "AdamW"} and 1e-5 < rate < 1
        line = f"Train with AdamW at {rate_text(rate)}, warm-up 10%, cosine, for 50 steps of 8"
        inspected = " ".join(run("inspect", out).stdout.split())
        assert line in made.stdout and line in (out / "README.md").read_text() and line in inspected
        assert len(made.stdout.splitlines()) - made.stdout.count("note: ") <= 6


def test_a_learning_rate_that_a_comparison_found_is_in_all_that_is_written(command, tmp_path):
    made = run(*command, "--learning-rate", "2.5e-3", "--json")
    assert made.exit_code == 0, made.output
    said, origin = json.loads(made.stdout), json.loads((tmp_path / "out/lora_init.json").read_text())
    for found in (said, origin):
        assert found["recommended"]["learning_rate"] == 2.5e-3
    line = f"Train with AdamW at {rate_text(2.5e-3)}, "
    assert line in (tmp_path / "out/README.md").read_text()
    assert line in " ".join(run("inspect", tmp_path / "out").stdout.split())


def test_the_length_of_the_training_is_an_option(command, home, tmp_path, monkeypatch):
    n = len((home / "rows.jsonl").read_text().splitlines())
    out = tmp_path / "adapter"
    words = ["init", *command[1:3], "--rank", 2, "--method", "random", "-o", out]
    assert run(*words, "--epochs", 3, "--train-batch-size", 4).exit_code == 0
    rate = json.loads((out / "lora_init.json").read_text())["rate"]
    assert (rate["steps"], rate["batch_size"], rate["rows"]) == (3 * math.ceil(n / 4), 4, n)
    assert f" for {math.ceil(n / 8)} steps of 8 (an epoch of " in " ".join(
        run("inspect", out, "--epochs", 1, "--train-batch-size", 8).stdout.split()
    )
    monkeypatch.setattr("lora_init.loading.models.ModelSource.load", None)  # a call would be a TypeError
    for asked in ([*words, "--overwrite"], ["inspect", out]):
        other = run(*asked, "--steps", 9999, "--epochs", 3)
        assert other.exit_code == 1 and "--steps 9999 and --epochs 3 contradict: 3 epochs of" in other.stderr


def refuse(*_):
    raise NoGradientsError("no gradients here.")


def test_init_writes_an_adapter_that_peft_loads_and_that_changes_nothing(command, home, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # or long paths are wrapped
    result = run(*command)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == f"data: {home.name}/text.txt: 48 of 48 examples, seed 0, at most 512 tokens, text\n"
    for part in ("rank ", "parameters", "MB. ", "Load it: ", "lora-init inspect", str(tmp_path / "out")):
        assert part in result.stdout
    assert result.stdout.splitlines()[-1] == "Next: train it; then lora-init dial TRAINED HELD-OUT-DATA -o kept"

    ids = torch.arange(12)[None]
    base = AutoModelForCausalLM.from_pretrained(home / "model").eval()
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "out", is_trainable=True)
        assert torch.equal(adapted(ids).logits, before)
    assert adapted.peft_config["default"].base_model_name_or_path == str(home / "model")


def test_json_is_all_that_is_on_stdout_and_agrees_with_the_directory(command, tmp_path):
    result = run(*command, "--json", "--statistics", tmp_path / "s.safetensors")
    summary = json.loads(result.stdout)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ranks = {name: rank for name, rank in summary["ranks"].items() if rank}
    assert {f"base_model.model.{name}.lora_A.weight": rank for name, rank in ranks.items()} == {
        key: len(a) for key, a in written.items() if "lora_A" in key
    }
    assert sum(summary["ranks"].values()) == 4 * len(summary["ranks"])
    assert summary["parameters"] == sum(tensor.numel() for tensor in written.values())
    assert summary["adapter"] == str(tmp_path / "out")
    assert summary["statistics"] == str(tmp_path / "s.safetensors")
    assert 0 < summary["held_out"]["min"] <= summary["held_out"]["median"] <= 1


def test_options_reach_the_adapter(command, tmp_path):
    options = "--method orthogonal --lora-alpha 8 --use-rslora --use-dora --rho 1 --target-modules q_proj,v_proj"
    assert run(*command, *options.split(), "--exclude-modules", r".*layers\.1\..*").exit_code == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["use_dora"]) == (4, 8, True, True)
    assert config["rank_pattern"] == {}
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert {key.split(".lora_")[0] for key in keys} == {
        f"base_model.model.model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")
    }


def test_settings_reach_the_statistics(home, tmp_path):
    options = "--no-center --token-mask labels --seed 3 --max-batches 2 --batch-size 2 --samples 20 --dtype bfloat16"
    columns = [
        "--template",
        "{passage}",
        "--completion",
        "{question}",
        "--statistics",
        tmp_path / "s",
        "--device",
        "cpu",
    ]
    result = run(
        "init", home / "model", home / "rows.jsonl", "-o", tmp_path / "out", *options.split(), *columns, "--rank", 2
    )
    assert result.exit_code == 0, result.stderr
    made = lora_init.Statistics.load(tmp_path / "s").provenance
    assert (made.center, made.token_mask, made.seed, made.n_batches) == (False, "labels", 3, 2)
    assert made.stop_reason == "max_batches"
    assert "20 of 48 examples" in made.data
    assert made.task_type == "CAUSAL_LM"
    # Only the answer and the end of the text have labels, and the tokens before them do not count.
    assert made.n_samples == 2 * 2 * 2


def test_a_column_of_classes_makes_a_classifier(home, tmp_path, monkeypatch):
    """The start is that of the classes' own loss, and what the card says loads the adapter with its head."""
    save_model(tiny_bert(task=None), tmp_path / "model")
    file, out = tmp_path / "s.safetensors", tmp_path / "out"
    command = ["init", tmp_path / "model", home / "rows.jsonl", "--template", "{passage}", "--label", "question"]
    command += ["--method", "natural-gradient", "--rank", 2, "--rho", 1, "--seed", 3, "--statistics", file]
    made = run(*command, "-o", out, "--json")
    assert made.exit_code == 0, made.output
    assert "19 classes (a 3, and 3, cat 3, " in made.stderr.splitlines()[0]  # before the pass
    said, n_classes = json.loads(made.stdout), len(WORDS[:19])
    assert said["classes"] == sorted(WORDS[:19]) and "id2label={0: " in said["load"]
    loaded = load_model(str(tmp_path / "model"), task_type="SEQ_CLS", seed=3, n_labels=n_classes)
    batches = load_batches(home / "rows.jsonl", loaded.tokenizer, template="{passage}", label="question", seed=3)
    stats = collect(loaded.model, batches, rank=2, seed=3, gradients=True, task_type="SEQ_CLS")
    expected = build_adapter(stats, 2, "natural-gradient", seed=3)
    tensors = load_file(out / "adapter_model.safetensors")
    for name, (a, _) in expected.weights.items():
        torch.testing.assert_close(tensors[f"base_model.model.{name}.lora_A.weight"], a)
    script = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    assert said["next"] == f"train it as {out / 'README.md'} shows; then lora-init inspect TRAINED"
    names = {}
    exec(script, names)
    model = names["model"]
    assert list(model.config.id2label.values()) == said["classes"]
    head = model.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(head, loaded.model.classifier.weight) and head.requires_grad
    # The file stands in for the data, classes and head included.
    again = run("init", tmp_path / "model", "--task-type", "SEQ_CLS", "--statistics", file, "-o", tmp_path / "again",
                "--method", "natural-gradient", "--rank", 2, "--rho", 1)  # fmt: skip
    assert again.exit_code == 0, again.output
    # It decides on the start, too: the one that is recommended for classes.
    shown = run("init", tmp_path / "model", "--task-type", "SEQ_CLS", "--statistics", file, "-o", tmp_path / "third",
                "--rank", 2, "--json")  # fmt: skip
    assert json.loads(shown.stdout)["method"] == "natural-gradient"
    same = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert same.keys() == tensors.keys() and all(torch.equal(same[key], tensors[key]) for key in same)


def test_a_task_type_that_a_statistics_file_is_not_for_is_refused(home, tmp_path):
    file = tmp_path / "s.safetensors"
    model = load_model(str(home / "model")).model
    collect(model, [{"input_ids": torch.arange(3, 15)[None]}] * 4, rank=2).save(file)  # of no task
    words = ("init", home / "model", "--statistics", file, "--rank", 2)
    assert run(*words, "-o", tmp_path / "plain").exit_code == 0
    other = run(*words, "--task-type", "CAUSAL_LM", "-o", tmp_path / "other")
    assert other.exit_code == 1 and not (tmp_path / "other").exists()
    assert f"{file} is for task type None. Leave --task-type out, or name DATA." in other.stderr


def test_a_dry_run_reads_no_weights_and_writes_nothing(command, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the weights were read")

    command += ["--use-dora", "--freeze-a"]
    done = json.loads(run(*command, "--json").stdout)
    command[command.index("-o") + 1] = str(tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr("lora_init.loading.models.ModelSource.load", never)
        said = json.loads(run(*command, "--dry-run", "--json").stdout)
        shown = run(*command, "--dry-run", "--statistics", tmp_path / "stats", "--method", "eva-grad").stdout
        assert_one_line_error(run(*command, "--dry-run", "--target-modules", "qproj"), "matches no layer")
        assert_one_line_error(
            run(*command, "--dry-run", "--lora-alpha", "0"), "--lora-alpha 0, expected a number above 0"
        )
    assert {entry.name for entry in tmp_path.iterdir()} == {"out"}
    assert said["layers"] == len(done["ranks"]) and said["parameters"] == done["uniform_parameters"]
    assert said["data"] == done["data"] and said["batches"] == done["n_batches"] and said["tokens"] >= done["n_samples"]
    model = tiny_llama()
    assert said["weights_bytes"] == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert said["offloaded_bytes_read"] == said["batches"] * said["weights_bytes"]
    in_layers = sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)
    assert said["operations"] == 2 * in_layers * said["tokens"]
    for more in (["--gradients"], ["--method", "grad-a"]):  # which run backward, too
        by_gradient = json.loads(run(*command, "--dry-run", "--json", "--template", "{text}", *more).stdout)
        assert by_gradient["operations"] == 3 * said["operations"]
    assert said["seconds"] > 0
    for part in ("layers ", "parameters ", "at rank 4 everywhere", "memory ", "offloaded ", "TFLOP", "GFLOP/s"):
        assert part in shown


def test_a_dry_run_counts_no_batches_beyond_the_most(command):
    whole, few = (
        json.loads(run(*command, "--dry-run", "--json", "--batch-size", 2, *more).stdout)
        for more in ([], ["--max-batches", 3])
    )
    assert whole["batches"] > few["batches"] == 3 and whole["tokens"] > few["tokens"]
    assert few["seconds"] < whole["seconds"] and few["offloaded_bytes_read"] == 3 * few["weights_bytes"]


@pytest.mark.parametrize(("saved_in", "words", "instructions", "n_bytes"), [
    (None, [], "AVX512", 4),  # a checkpoint that names no type is in float32
    ("bfloat16", [], "AVX512", 2),
    ("bfloat16", [], "AVX2", 4),  # which emulates it
    ("bfloat16", ["--dtype", "float16"], "AVX2", 2),
])  # fmt: skip
@pytest.mark.slow
def test_a_dry_run_counts_the_bytes_of_the_type_that_would_run(
    command, home, tmp_path, monkeypatch, saved_in, words, instructions, n_bytes
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setattr(models, "_memory", lambda: 10**9)
    shutil.copytree(home / "model", tmp_path / "model")
    config = json.loads((home / "model/config.json").read_text())
    config.pop("dtype", config.pop("torch_dtype", None))
    (tmp_path / "model/config.json").write_text(json.dumps(config | ({} if saved_in is None else {"dtype": saved_in})))
    command[1] = tmp_path / "model"
    said = json.loads(run(*command, "--dry-run", "--json", *words).stdout)
    assert said["weights_bytes"] == n_bytes * sum(p.numel() for p in tiny_llama().parameters())


def test_a_plan_that_gives_a_layer_more_has_a_pass_that_keeps_so_much(command, home, tmp_path):
    file, plan = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    source = load_model(str(home / "model"))
    stats = collect(source.model, load_batches(home / "text.txt", source.tokenizer), rank=8, progress=False)
    planned = allocate_ranks(stats, megabytes=0.004, dtype="bfloat16", rho=4)
    save_plan(planned, plan)
    done = run(*command[:-2], "--ranks", plan, "--statistics", file, "--use-dora", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["ranks"] == dict(planned)
    made = Statistics.load(file).provenance
    assert made.rank == planned.rank and made.rho == max(planned.values()) / planned.rank > 1
    notes = "\n".join(said["notes"])
    assert f"{planned.budget} does not count DoRA's magnitudes." in notes
    assert f"PEFT trains and saves float32; `lora-init export --dtype bfloat16` keeps {planned.budget}." in notes


# The statistics file


def without_data(command):
    return [*command[:2], *command[3:]]


def test_without_data_a_file_serves_another_rank(command, tmp_path, monkeypatch):
    file = tmp_path / "s.safetensors"
    assert run(*command, "--statistics", file).exit_code == 0
    before = file.read_bytes()

    def never(*_, **__):
        raise AssertionError("collected again")

    monkeypatch.setattr("lora_init.building.pipeline.collect", never)
    dry = [*without_data(command), "--statistics", file, "--overwrite", "--dry-run"]
    said, shown = json.loads(run(*dry, "--json").stdout), run(*dry).stdout
    assert [said[key] for key in ("data", "batches", "tokens", "operations")] == [None, 0, 0, 0]
    assert "none: the statistics file is used as it is" in shown
    result = run(*without_data(command), "--statistics", file, "--rank", 2, "--overwrite")
    assert result.exit_code == 0, result.stderr
    assert f"{file}: used as it is" in result.stderr
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
    assert file.read_bytes() == before


@pytest.mark.parametrize(("options", "parts"), [
    (["--rank", "9"], ["--rank 9 lets a layer have rank 9", "Collect again"]),
    (["--target-modules", "q_proj"], ["0 are missing, 12 too many"]),
    (["--method", "eva-grad"], ["have no gradients. Collect them with --gradients, from data"]),
    (["--method", "lora-one"], ["by the loss on examples, and DATA is missing"]),
])  # fmt: skip
def test_without_data_a_file_that_does_not_serve_is_refused_and_kept(command, tmp_path, options, parts):
    file = tmp_path / "s.safetensors"
    assert run(*command, "--statistics", file).exit_code == 0
    before = file.read_bytes()
    result = run(*without_data(command), "--statistics", file, "--overwrite", *options)
    assert result.exit_code == 1
    assert all(part in result.stderr for part in parts), result.stderr
    assert file.read_bytes() == before


def test_a_file_does_not_serve_the_same_weights_that_compute_otherwise(command, tmp_path):
    file, config = tmp_path / "s.safetensors", tmp_path / "model" / "config.json"
    shutil.copytree(command[1], config.parent)
    command[1] = str(config.parent)
    assert run(*command, "--statistics", file).exit_code == 0
    config.write_text(config.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 5.0'))
    result = run(*without_data(command), "--statistics", file, "--overwrite")
    assert_one_line_error(
        result, f"{file} was made from this model with rope_parameters.rope_theta 10000.0 instead of 5.0. Make"
    )


def test_the_same_command_uses_the_file_and_another_one_is_refused(command, tmp_path):
    file = tmp_path / "s.safetensors"
    command += ["--statistics", str(file)]
    assert run(*command).exit_code == 0
    before = file.read_bytes()
    command[command.index("-o") + 1] = str(tmp_path / "again")
    again = run(*command)
    assert again.exit_code == 0 and f"{file}: used as it is" in again.stderr and file.read_bytes() == before
    command[command.index("-o") + 1] = str(tmp_path / "other")
    for options, part in (
        (["--template", "{text} {text}"], "was made with template None, and '{text} {text}' is asked for"),
        (["--max-length", "8"], "with max_length"),
        (["--samples", "20"], "with samples"),
        (["--seed", "3"], "with seed"),
        (["--no-center"], "with center True, and False"),
        (["--token-mask", "labels"], "with token_mask"),
        (["--target-modules", "q_proj"], "with layers"),
    ):
        result = run(*command, *options)
        assert_one_line_error(result, part, "Pass --overwrite to collect again, or leave DATA out to use the file")
        assert file.read_bytes() == before and not (tmp_path / "other").exists()
    assert run(*command, "--no-center", "--overwrite").exit_code == 0
    assert not lora_init.Statistics.load(file).provenance.center


def interrupt_at(batch, monkeypatch):
    from transformers import LlamaModel

    calls, forward = [], LlamaModel.forward

    def counted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == batch:
            raise KeyboardInterrupt
        return forward(self, *arguments, **options)

    monkeypatch.setattr(LlamaModel, "forward", counted)


def test_ctrl_c_keeps_what_was_collected_and_the_same_command_goes_on(command, tmp_path, monkeypatch):
    file = tmp_path / "s.safetensors"
    interrupt_at(4, monkeypatch)
    result = run(*command, "--statistics", file)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[1:] == [
        f"{file}: kept the statistics of 3 batches. The same command goes on after them.",
        "interrupted",
    ]
    made = lora_init.Statistics.load(file).provenance
    assert (made.n_batches, made.stop_reason) == (3, "interrupted")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert run(*command, "--statistics", file).exit_code == 0
    resumed = lora_init.Statistics.load(file)
    assert run(*command, "--statistics", tmp_path / "whole", "--overwrite").exit_code == 0
    whole = lora_init.Statistics.load(tmp_path / "whole")
    assert resumed.provenance.complete and resumed.provenance.n_batches == whole.provenance.n_batches > 3
    for layer in whole:
        assert resumed[layer].n_samples == whole[layer].n_samples
        assert resumed.total_variance(layer) == pytest.approx(whole.total_variance(layer), rel=1e-5)


# Errors


@pytest.mark.parametrize(("change", "parts"), [
    ({1: "./nowhere"}, ["model './nowhere': no such directory"]),
    ({1: "some/model"}, ["'some/model'", "HF_HUB_OFFLINE is set"]),
    ({1: "empty"}, ["has no config.json"]),
    ({1: "adapter"}, ["it is an adapter. Name its base model"]),
    ({1: "text.txt"}, ["is a file"]),
    ({1: "damaged"}, ["'damaged' cannot be loaded"]),
    ({1: "truncated"}, ["'truncated' cannot be loaded"]),
    ({1: "unknown"}, ["'unknown' cannot be loaded", "nosuchtype"]),
    ({1: "remote"}, ["'remote' needs code that comes with it", "--trust-remote-code"]),
    ({1: "vision"}, ["reads text only"]),
    ({2: "nowhere.jsonl"}, ["nowhere.jsonl", "no such file"]),
    ({2: "rows.jsonl"}, ["passage", "question"]),
    ({"--target-modules": "qproj"}, ["matches no layer", "'q_proj' (2 layers)"]),
    ({"--target-modules": "(q"}, ["--target-modules", "(q"]),
    ({"--rank": "64"}, ["--rank 64", "input width 32"]),
    ({"--device": "quantum"}, ["device 'quantum' cannot be used here"]),
    ({"--device": "cuda:99"}, ["device 'cuda:99' cannot be used here"]),
    ({"--task-type": "POETRY"}, ["'POETRY' is unknown", "CAUSAL_LM"]),
    ({"--task-type": "seq_class"}, ["'seq_class' is unknown. Did you mean SEQ_CLS?"]),
    ({"--task-type": "SEQ_CLS", "--method": "grad-a"}, ["need classes, not texts alone", "--label COLUMN"]),
    ({"--task-type": "TOKEN_CLS", "--method": "grad-a"}, ["need classes", "Use initialize() in Python"]),
    ({"--task-type": "CAUSAL_LM", "--label": "text"}, ["--task-type CAUSAL_LM does not. Give one."]),
    ({"--label": "kind"}, ["--label kind is not a column. Columns of"]),
    ({"--label": "text", "--token-mask": "labels"}, ["--label text: a class is no --token-mask labels"]),
    ({"--lora-alpha": "-1"}, ["--lora-alpha -1"]),
    ({"--statistics": "nowhere/s"}, ["nowhere/s: there is no directory nowhere. Create it first."]),
    ({"--statistics": "text.txt"}, ["text.txt"]),
    ({"-o": "text.txt"}, ["text.txt is a file, and a directory is needed"]),
    ({"-o": "model"}, ["model exists and is not empty", "pass --overwrite"]),
    ({"--target-modules": "embed_tokens"}, ["selects only layers that cannot start from data"]),
    ({"--split": "validation"}, ["--split validation is for a folder", "not for text.txt"]),
    ({"--ranks": "text.txt"}, ["--ranks names a plan, which has all ranks. Leave --rank and --rho out."]),
    ({1: "no-tokenizer"}, ["'no-tokenizer' has no tokenizer beside it"]),
], ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "")  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(home, tmp_path, monkeypatch, change, parts):
    make_bad_models(home, tmp_path)
    for name in ("model", "text.txt", "rows.jsonl"):
        (tmp_path / name).symlink_to(home / name)
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    positional = {1: "model", 2: "text.txt"}
    options = {"-o": "out", "--rank": "4"}
    for key, value in change.items():
        (positional if isinstance(key, int) else options)[key] = value
    result = run("init", positional[1], positional[2], *(word for pair in options.items() for word in pair))
    assert_one_line_error(result, *parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(("options", "part"), [
    (["--lora-alpha", "0"], "--lora-alpha 0, expected a number above 0"),
    (["--whiten", "--method", "random"], "--whiten is for the start eva; --method random has no variances"),
    (["--gamma", "3"], "--gamma 3 with --method eva"),
    (["--method", "lora-one", "--use-dora"], "DoRA's magnitudes"),
    (["--device", "quantum"], "'quantum' cannot be used"),
    (["--template", "{nothing}"], "has no column 'nothing'"),
])  # fmt: skip
def test_what_can_be_refused_is_refused_before_the_weights_are_read(command, monkeypatch, options, part):
    def never(*_, **__):
        raise AssertionError("the weights were read")

    monkeypatch.setattr("lora_init.loading.models.ModelSource.load", never)
    assert_one_line_error(run(*command, *options), part)


def make_bad_models(home, folder):
    def variant(name, config=None, **changes):
        directory = folder / name
        directory.mkdir()
        for file in (home / "model").iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        settings = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps(settings) if config is None else config)
        return directory

    tiny_llama().save_pretrained(folder / "no-tokenizer")
    (folder / "empty").mkdir()
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    variant("damaged", config="{")
    variant("unknown", model_type="nosuchtype", architectures=["NoSuchForCausalLM"])
    remote = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (variant("remote", model_type="own", architectures=["OwnForCausalLM"], auto_map=remote) / "code.py").write_text(
        "raise SystemExit('ran')"
    )
    weights = variant("truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    variant("vision", model_type="vit", architectures=["ViTForImageClassification"])


def test_the_rate_follows_alpha_and_a_frozen_a_and_not_dora(command, tmp_path):
    found = {}
    for i, options in enumerate(("", "--lora-alpha 8", "--freeze-a", "--unit-rows", "--use-dora")):
        command[command.index("-o") + 1] = str(tmp_path / str(i))
        made = run(*command, "--rank", 2, *options.split(), "--json")
        assert made.exit_code == 0, made.output
        found[options] = json.loads(made.stdout)
    rates = {options: said["recommended"]["learning_rate"] for options, said in found.items()}
    assert 0.4 < rates["--lora-alpha 8"] / rates[""] < 0.8
    assert rates["--freeze-a"] > rates[""] == rates["--use-dora"]
    assert rates["--unit-rows"] != rates[""]


@pytest.mark.parametrize(("more", "said"), [
    ([], "nothing was kept: --statistics FILE keeps what a pass has found."),
    (["--statistics", "kept.safetensors"], "nothing was kept: the pass had found nothing yet."),
])  # fmt: skip
def test_an_interruption_before_the_first_batch_says_what_is_kept(command, tmp_path, monkeypatch, more, said):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lora_init.cli.source.collect_for", stopped)
    done = run(*command, *more)
    assert done.exit_code == 130 and said in done.stderr


TOGETHER = "--method from-bank and --bank go together, and need DATA: examples of the new task."
DECIDED, RULED = (
    "a bank's adapters decide that. Leave it out.",
    "only the rule's rate depends on it, and --learning-rate",
)


@pytest.mark.parametrize(("method", "data", "bank", "rate", "given", "line"), [
    ("eva", "d", None, None, "", None), (None, None, None, None, "", None), ("from-bank", "d", "b", None, "", None),
    ("from-bank", "d", None, None, "", TOGETHER), ("eva", "d", "b", None, "", TOGETHER),
    ("from-bank", None, "b", None, "", TOGETHER),
    *(("eva", "d", None, None, option, "--it: that is for --method from-bank. Leave it out.")
      for option in ("by", "similarity")),
    *(("from-bank", "d", "b", None, option, f"--it: {DECIDED}") for option in (
        "rho", "ranks_from", "dry_run", "label", "learning_rate", "steps", "epochs", "target_modules", "use_dora",
        "max_batches", "token_mask")),
    *(("from-bank", "d", "b", None, option, None) for option in (
        "task_type", "lora_alpha", "gamma", "weights", "unchecked", "seed", "by", "similarity", "rank", "template")),
    *(("eva", "d", None, 1e-3, option, f"--it: {RULED} names another. Leave it out.")
      for option in ("steps", "epochs", "train_batch_size")),
    ("eva", "d", None, None, "steps", None), ("eva", "d", None, 0.999, "", None),
    *(("eva", "d", None, rate, "", f"--learning-rate {rate:g}: expected a number between 0 and 1, such as 2e-4.")
      for rate in (0.0, 1.0, math.nan)),
])  # fmt: skip
def test_words_go_together_or_are_refused(method, data, bank, rate, given, line, monkeypatch):
    monkeypatch.setattr("lora_init.cli.console.running", Running(options={given: ("--it", "")}, given={given} - {""}))
    if line is None:
        _check_words(method, data, FromBank(bank=bank), rate)
    else:
        refused(f"^{re.escape(line)}$", _check_words, method, data, FromBank(bank=bank), rate)


@pytest.mark.parametrize("by", ["nearest", "mixture"])
def test_a_mixture_needs_scipy(by, monkeypatch):
    asked = []
    monkeypatch.setattr("lora_init.cli.init.require", asked.append)
    _check_words("from-bank", "d", FromBank(bank="b", by=by), None)
    assert asked == (["scipy"] if by == "mixture" else [])


@pytest.mark.parametrize(("rank", "quiet"), [(None, False), (0, True), (1, False)])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("bank", [None, Path("b")])
def test_the_first_process_writes_an_adapter_as_was_asked(bank, overwrite, rank, quiet, monkeypatch, capsys):
    saved, kinds = [], [("length", str, ""), ("learning_rate", float, None)]
    save = {"save_pretrained": lambda built, path, **how: saved.append((built, path, how))}
    made = make_dataclass("Made", kinds, namespace=save)
    config = SimpleNamespace(start=SimpleNamespace(name="eva"), ranks=SimpleNamespace(rank=2, rho=1.0))
    opened = SimpleNamespace(length="as long", examples=SimpleNamespace(held_out=[]))
    for place, result in {
        "source.find_statistics": None, "source.are_of_classes": False, "source.check_named": (config, None, 1.0),
        "source.read_named": (opened, config), "source.load_named": (SimpleNamespace(model="weights"), config),
        "source.collect_named": ("stats", config), "init.importing": nullcontext(), "init.process_rank": rank,
        "init.on_demand": lambda path: "bank", "init.start_from": SimpleNamespace(init=made()),
        "init.summary_of": {}, "init.summary_of_bank": {},
    }.items():  # fmt: skip
        monkeypatch.setattr(f"lora_init.cli.{place}", lambda *words, result=result: result)
    for name in ("show_summary", "show_bank_summary"):
        monkeypatch.setattr(command_of, name, lambda console, content, name=name: console.print(name))
    monkeypatch.setattr("lora_init.building.pipeline.choose", lambda config, classes: config)
    monkeypatch.setattr("lora_init.building.pipeline.build", lambda *words: made())
    monkeypatch.setattr("lora_init.planning.allocate.allocate_ranks", lambda *words: "plan")
    running.quiet = quiet
    command_of.init(
        "m", "d", output=Path("~/out"), method="from-bank" if bank else None, overwrite=overwrite, ranks=Ranks(),
        learning_rate=None if bank else 1e-3, length=Length(), reading=Reading(), sample=Sample(), layers=Layers(),
        shape=Shape(), correction=Correction(), run=PassOptions(), loading=LoadingQuantized(),
        from_bank=FromBank(bank=bank),
    )  # fmt: skip
    expected = (made("as long", None if bank else 1e-3), Path("~/out"), dict(overwrite=overwrite, model="weights"))
    assert saved == ([] if rank == 1 else [expected])
    shown = "show_bank_summary\n" if bank else "show_summary\n"
    assert capsys.readouterr().out == ("" if quiet or rank == 1 else shown)
