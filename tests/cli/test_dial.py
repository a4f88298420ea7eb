"""`dial` writes an adapter at the strengths that it chose, `replay` what the base writes; errors are one line."""

import json
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_init.adapters.init_config import Reading
from lora_init.cli import dial as command_of
from lora_init.cli.console import Running, running
from lora_init.cli.dial import _check_options
from lora_init.cli.options import Loading, LoadingQuantized
from lora_init.errors import LoraInitError
from lora_init.keep.dial import Rule, strengths
from tests.commands import WORDS, assert_one_line_error, run, save_model, write_data
from tests.conftest import refused, tiny_bert, tiny_llama

IDS = torch.arange(3, 23).reshape(2, 10)


def train(model, ids, steps):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base that knows the passages of `write_data`, and an adapter trained on other sentences."""
    folder = tmp_path_factory.mktemp("dial")
    torch.manual_seed(0)
    base = tiny_llama()
    train(base, torch.tensor([[*range(4 + i, 23), *range(4, 4 + i)] for i in range(19)]), 60)
    save_model(base, folder / "base")
    write_data(folder)
    (folder / "task.txt").write_text("\n".join(f"mat a on sat cat {word} the" for word in WORDS * 2))
    model = adapted(folder)
    train(model, torch.tensor([[9, 8, 7, 6, 5, 4 + i, 4] for i in range(19)]), 60)
    model.save_pretrained(folder / "trained")
    return folder


def adapted(folder, **settings):
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    settings = dict(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM") | settings
    return get_peft_model(base, LoraConfig(**settings))


@torch.no_grad()
def logits(folder, adapter, chosen=1.0):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / adapter).eval()
    with strengths(model, chosen):
        return model(IDS).logits


def dialed(folder, output, *more):
    words = ["--keep", folder / "text.txt"] if "--own" not in more else []
    more = [word for word in more if word != "--own"]
    done = run("dial", folder / "trained", folder / "task.txt", *words, "-o", output, "--samples", 36, "--json", *more)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("more", [[], ["--strength", 0.6], ["--uniform", "--keep-within", 0.05], ["--alpha-pattern"]])
@pytest.mark.slow
def test_what_is_written_does_what_was_chosen(more, place, undrawn, tmp_path):
    found = dialed(place, tmp_path / "kept", *more)
    layers = found["chosen"]["layers"]
    expected = logits(place, "trained", layers)
    assert (expected - logits(place, "trained")).abs().max() > 1e-3
    torch.testing.assert_close(logits(place, tmp_path / "kept"), expected, atol=1e-5, rtol=1e-5)
    exported = run("export", tmp_path / "kept", "-o", tmp_path / "served", "--engine", "vllm")
    assert exported.exit_code == 0 and "its strength is the dial's: " in exported.stdout, exported.stderr
    torch.testing.assert_close(logits(place, tmp_path / "served"), expected, atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "kept/adapter_config.json").read_text())
    assert bool(config["alpha_pattern"]) == ("--alpha-pattern" in more)
    if "--strength" in more:  # the weights are the trained ones
        assert config["lora_alpha"] == pytest.approx(0.6 * 8) and set(layers.values()) == {0.6}
        old, new = (load_file(at / "adapter_model.safetensors") for at in (place / "trained", tmp_path / "kept"))
        assert all(torch.equal(old[name], tensor) for name, tensor in new.items())


def test_the_export_that_is_printed_is_of_what_was_written(place, tmp_path, monkeypatch):
    def options(config, shapes):
        alphas.append(config["lora_alpha"])
        return "-x"

    alphas = []
    monkeypatch.setattr("lora_init.serving.support.export_options", options)
    done = run("dial", place / "trained", "--strength", 0.6, "-o", tmp_path / "kept")
    assert done.exit_code == 0 and alphas == [pytest.approx(0.6 * 8)]
    assert " ".join(done.stdout.split()).endswith(f"{tmp_path / 'kept'} -x -o {tmp_path / 'kept-served'}")


def test_strengths_are_measured_on_the_base_that_is_named(place, tmp_path):
    """An adapter may name one that is not here."""
    shutil.copytree(place / "trained", tmp_path / "moved")
    file = tmp_path / "moved" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "nowhere")}))
    words = ["dial", tmp_path / "moved", place / "task.txt", "--samples", 40, "--strength", 0.6, "-o", tmp_path / "out"]
    done = run(*words, "--base", place / "base", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["task"]["base"]["loss"] > 0, done.output


def test_the_seed_draws_the_task_and_the_text_to_keep(place, tmp_path, monkeypatch):
    seen = []

    def read(model, rule, task, kept, *_):
        seen.append([sorted(row.tolist() for batch in some for row in batch["input_ids"]) for some in (task, kept)])
        raise LoraInitError("enough")

    monkeypatch.setattr("lora_init.keep.dial.choose_dial", read)
    words = ["dial", place / "trained", place / "task.txt", "--keep", place / "text.txt", "--samples", 37]
    for seed in (0, 0, 1):
        assert_one_line_error(run(*words, "-o", tmp_path / "kept", "--seed", seed), "enough")
    assert seen[0] == seen[1] and seen[0][0] != seen[2][0] and seen[0][1] != seen[2][1]


def test_what_cannot_be_dialed_is_one_line(place, tmp_path):
    text, task, out = place / "text.txt", place / "task.txt", tmp_path / "out"
    (tmp_path / "empty.txt").write_text("\n \n")

    def refused(*words, adapter=place / "trained", data=task, keep=text):
        keep = [] if keep is None else ["--keep", keep]
        assert_one_line_error(run("dial", adapter, data, *keep, "-o", out, "--samples", 36), *words)

    def saved(name, **settings):
        adapted(place, **settings).save_pretrained(tmp_path / name)
        return tmp_path / name

    refused("never trained", adapter=saved("start"))
    refused("use_dora", "no strength", adapter=saved("dora", use_dora=True))
    refused("lm_head", "trained whole", adapter=saved("head", modules_to_save=["lm_head"]))
    refused("pissa", "export --start", adapter=saved("pissa", init_lora_weights="pissa"))
    refused("task's own data", keep=task)
    refused("empty.txt", "x", keep=tmp_path / "empty.txt")
    save_model(tiny_bert(), tmp_path / "bert")
    model = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "classifier")
    refused("classifier", "trained whole", adapter=tmp_path / "classifier")
    save_model(tiny_llama(hidden_size=16), tmp_path / "other")
    for more, words in (
        (["--strength", -0.5], ["--strength -0.5", "at least 0.001"]),
        (["--strength", 1e-31], ["--strength 1e-31", "at least 0.001"]),
        (["--strength", "nan"], ["--strength", "at least 0.001"]),
        (["--lose", "much"], ["--lose 'much'", "2%"]),
        (["--lose", 2], ["--lose 2 is 200% more loss", "Write 2 % as 0.02."]),
        (["--lose", "1%", "--keep-within", 0.1], ["--lose and --keep-within are both given"]),
        (["--base", tmp_path / "other"], ["32", "16"]),
    ):
        assert_one_line_error(run("dial", place / "trained", task, "--keep", text, "-o", out, *more), *words)
    for more, words in (([], ["name DATA", "--strength 0.8"]), (["--strength", 0.5, "--keep", text], ["name DATA"])):
        assert_one_line_error(run("dial", place / "trained", "-o", out, *more), *words)
    few = run("dial", place / "trained", task, "-o", out, "--samples", 12)
    assert_one_line_error(few, "--samples", "greater than or equal to 36", code=2)
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    refused("chat template", data=tmp_path / "chats.jsonl")
    assert not out.exists()


def test_replay_writes_lines_that_can_be_trained_on(place, tmp_path, monkeypatch):
    file = tmp_path / "replay.jsonl"
    done = run("replay", place / "base", "-o", file, "--n", 5, "--length", 12)
    assert done.exit_code == 0 and "5" in done.stdout
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 5 and all(row["text"].strip() for row in rows)
    assert_one_line_error(run("replay", place / "base", "-o", file), "exists")
    monkeypatch.setattr("lora_init.loading.models.ModelSource.load", None)  # refused before
    more = ["replay", place / "base", "-o", tmp_path / "r.jsonl"]
    assert_one_line_error(run(*more, "--length", 3000), "--length 3000", "3001 tokens, and the model takes 64")
    assert_one_line_error(run(*more, "--chat"), "no chat template")
    assert_one_line_error(run("replay", tmp_path / "none", "-o", tmp_path / "r.jsonl"), "no such directory")


def test_how_the_base_was_loaded_is_not_forgotten(place, tmp_path):
    made = {"provenance": {"quantisation": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bits": None,
                                            "bnb_4bit_quant_type": "nf4"}}}  # fmt: skip
    model = adapted(place, auto_mapping={"lora_init": made})
    train(model, IDS, 3)
    model.save_pretrained(tmp_path / "nf4")
    words = [tmp_path / "nf4", place / "task.txt", "--keep", place / "text.txt", "--samples", 36, "--uniform"]
    done = run("dial", *words, "-o", tmp_path / "kept")
    assert done.exit_code == 0 and "made on a base in nf4, and this one is not: --quantize nf4" in done.stderr
    done = run("export", tmp_path / "nf4", "-o", tmp_path / "served", "--data", place / "task.txt")
    assert done.exit_code == 0 and "note: it was made on a base in nf4" in done.stdout, done.output
    assert "nf4" not in run("export", place / "trained", "-o", tmp_path / "other").output


def test_one_strength_needs_neither_data_nor_a_pass(place, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_init.loading.models.ModelSource.load", None)  # no weights of the base are needed
    done = run("dial", place / "trained", "-o", tmp_path / "kept", "--strength", 0.6)
    assert done.exit_code == 0 and "0.6 in all layers" in done.stdout, done.output
    kept = tmp_path / "kept"
    assert done.stdout.splitlines()[-1] == f"Next: lora-init export {kept} --engine vllm -o {kept}-served"
    torch.testing.assert_close(logits(place, tmp_path / "kept"), logits(place, "trained", 0.6), atol=1e-5, rtol=1e-5)
    assert "0.6 in all layers" in run("inspect", tmp_path / "kept").stdout and not (tmp_path / "kept/dial.png").exists()
    assert "its strength is the dial's: 0.6" in run("export", tmp_path / "kept", "-o", tmp_path / "served").stdout


def test_rows_that_were_set_before_training_are_written(place, tmp_path):
    model = adapted(place, target_modules=["q_proj", "lm_head"])
    model.base_model.model.lm_head.base_layer.weight.data[60:] += 1.0
    model.base_model.model.lm_head.lora_B["default"].weight.data += 0.1
    model.save_pretrained(tmp_path / "trained")
    kept = tmp_path / "kept"
    done = run("dial", tmp_path / "trained", "-o", kept, "--strength", 1)
    assert done.stdout.splitlines()[-1] == f"Next: lora-init export {kept} -o {kept}-served", done.output
    torch.testing.assert_close(logits(place, kept), logits(place, tmp_path / "trained"), atol=1e-5, rtol=1e-5)
    # Others that would leave the rows out refuse the adapter.
    assert_one_line_error(run("inspect", tmp_path / "trained", "--merge", "int8"), "merge_and_unload")
    words = ["bank", "add", tmp_path / "bank", tmp_path / "trained", "--data", place / "text.txt"]
    assert_one_line_error(run(*words), "lm_head.base_layer.weight: a bank holds plain LoRA of linear layers")


@pytest.mark.slow
def test_what_takes_long_says_in_a_log_how_far_it_is(place, tmp_path):
    words = ["dial", place / "trained", place / "task.txt", "--samples", 36]
    lines = run(*words, "-o", tmp_path / "kept").stderr.splitlines()  # the base writes the text to keep
    parts = ["18 of 18 texts", "strength 0: task ", "strength 0.4: ", "strength 1.2: ", "fitted with weight 0.3: "]
    found = [next(i for i, line in enumerate(lines) if part in line) for part in parts]
    assert found == sorted(found) and all(" min left" in lines[i] or " s left" in lines[i] for i in found[1:])
    assert run(*words, "-o", tmp_path / "quiet", "-q").stderr == ""
    done = run("replay", place / "base", "-o", tmp_path / "r.jsonl", "--n", 70, "--length", 4)
    first, second, last = done.stderr.splitlines()
    assert first.startswith("32 of 70 texts") and first.endswith(" left") and second.startswith("64 of 70 texts")
    assert last == "70 of 70 texts written"


ALONE = ": name DATA, or --strength 0.8 alone for that strength in all layers."


@pytest.mark.parametrize(("data", "keep", "strength", "given", "line"), [
    ("d", None, None, "", None), ("d", "k", None, "", None), (None, None, 0.8, "", None),
    ("d", "k", 0.8, "template", None),
    (None, None, None, "", f"strengths are chosen on its task{ALONE}"),
    (None, "k", None, "", f"strengths are chosen on its task{ALONE}"),
    (None, "k", 0.8, "", f"--keep is measured beside the task{ALONE}"),
    *((None, None, 0.8, option, "--it: without DATA nothing is measured. Leave it out.")
      for option in ("template", "dtype", "quantize", "samples", "max_length", "seed")),
    (None, None, 0.8, "uniform", None),
    *(("d", keep, None, "", f"--keep {keep} is the task's own data. Name text of another kind, or leave --keep away.")
      for keep in ("d", "./d", "../{}/d")),
])  # fmt: skip
def test_a_dial_needs_a_task_or_a_strength_and_other_text_to_keep(
    data, keep, strength, given, line, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    keep = keep and keep.format(tmp_path.name)
    monkeypatch.setattr("lora_init.cli.console.running", Running(options={given: ("--it", "")}, given={given} - {""}))
    if line is None:
        _check_options(data, keep, strength)
    else:
        with pytest.raises(LoraInitError) as caught:
            _check_options(data, keep, strength)
        assert str(caught.value) == line.format(tmp_path.name)


@pytest.fixture
def steps(monkeypatch):
    """What each step of a dial is asked for; nothing is read, loaded or measured."""
    asked = {}

    def step(place, result=None):
        def ask(*words, **how):
            asked[place.rpartition(".")[2]] = (*words, how)
            return result

        monkeypatch.setattr(f"lora_init.{place}", ask)

    trained = SimpleNamespace(config="config", others={}, layers={"a": 1}, adds_nothing=False, base="its", quantized="")
    source = SimpleNamespace(
        tokenizer="words", seq2seq="is seq2seq", config=SimpleNamespace(), name="base", task_type="CAUSAL_LM",
        check_quantized=lambda how: asked.update(checked=how),
        load=lambda **how: SimpleNamespace(model="weights", tokenizer="words"),
    )  # fmt: skip
    read = SimpleNamespace(n=36)
    found = SimpleNamespace(summary=lambda: {"chosen by": "the loss"}, to_dict=lambda: {"chosen": 1})
    for name, result in {
        "files.check_free": None, "keep.dial.check_dialable": None, "keep.dial.choose_dial": found,
        "keep.dialed.write_dialed": "out", "loading.batches.load_batches": read, "loading.batches.load_other": read,
        "loading.models.open_model": source, "serving.base.read_base": SimpleNamespace(parameters={}),
        "serving.base.with_changed_copies": trained, "serving.fit.check_fit": SimpleNamespace(check=lambda: None),
        "serving.support.export_options": None, "serving.trained.read_trained": trained,
        "serving.trained.with_parameters": trained, "adapters.peft_model.with_adapter": nullcontext("model"),
        "adapters.directory.AdapterDirectory": SimpleNamespace(config="config", shapes={}),
    }.items():  # fmt: skip
        step(name, result)
    monkeypatch.setattr(command_of, "importing", lambda *names, **data: nullcontext())
    return SimpleNamespace(asked=asked, trained=trained, source=source, read=read)


@pytest.mark.parametrize(("samples", "batch", "kept_batch"), [(36, 4, 4), (60, 6, 4), (192, 8, 4), (400, 8, 4)])
def test_a_dial_reads_as_many_examples_as_asked_in_nine_batches_at_least(samples, batch, kept_batch, steps, tmp_path):
    how = dict(samples=samples, max_length=9, seed=3, loading=LoadingQuantized(quantize="nf4"))
    command_of.dial("a", "d", output=tmp_path / "out", keep="k", reading=Reading(template="{x}"), **how)
    of_task, of_kept = steps.asked["load_batches"], steps.asked["load_other"]
    both = dict(tokenizer="words", max_length=9, seed=3, seq2seq="is seq2seq")
    task = both | vars(Reading(template="{x}")) | dict(samples=samples, batch_size=batch)
    assert of_task == ("d", task) and of_kept == ("k", both | dict(samples=samples // 2, batch_size=kept_batch))
    assert steps.asked["checked"] == "nf4"
    assert steps.asked["choose_dial"] == ("model", Rule(), steps.read, steps.read, None, 3, command_of.say, {})


def test_few_examples_are_refused_before_the_weights_are_loaded(steps, tmp_path, monkeypatch):
    how = dict(output=tmp_path / "out", reading=Reading(), loading=LoadingQuantized())
    steps.source.load = None  # a call would be a TypeError
    steps.read.n = 2
    refused("^DATA d: 2 examples, and at least", command_of.dial, "a", "d", **how)
    monkeypatch.setattr("lora_init.loading.batches.load_batches", lambda *words, **how: SimpleNamespace(n=36))
    refused("^--keep k: 2 examples, and at least", command_of.dial, "a", "d", keep="k", **how)


@pytest.mark.parametrize(("made_on", "quantize", "saved_as", "warned"), [
    ("nf4", None, None, True), ("", None, None, False), ("nf4", "nf4", None, False), ("nf4", None, {"bits": 4}, False),
])  # fmt: skip
def test_a_base_in_other_numbers_than_in_training_is_warned_of(made_on, quantize, saved_as, warned, steps, tmp_path):
    steps.trained.quantized, steps.source.config.quantization_config = made_on, saved_as
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        how = dict(reading=Reading(), loading=LoadingQuantized(quantize=quantize))
        command_of.dial("a", "d", output=tmp_path / "out", **how)
    texts = ["a was made on a base in nf4, and this one is not: --quantize nf4."] if warned else []
    assert [str(one.message) for one in said] == texts


@pytest.mark.parametrize("quiet", [False, True])
def test_a_dial_writes_where_and_how_it_was_asked(quiet, steps, tmp_path, monkeypatch, capsys):
    needed, out = [], tmp_path / "out"
    monkeypatch.setattr(command_of, "require", needed.append)
    running.quiet = quiet
    how = dict(output=out, reading=Reading(), loading=LoadingQuantized())
    command_of.dial("a", "d", **how)
    assert needed == ["matplotlib"]  # which draws what was found
    assert steps.asked["check_free"][:2] == (out, False)
    assert steps.asked["write_dialed"][4:] == (False, False, {}) and steps.asked["load_batches"][-1]["seed"] == 0
    command_of.dial("a", "d", overwrite=True, alpha_pattern=True, **how)
    assert steps.asked["check_free"][:2] == (out, True) and steps.asked["write_dialed"][4:] == (True, True, {})
    command_of.dial("a", "d", overwrite=True, **how)
    assert steps.asked["write_dialed"][4:] == (True, False, {})
    assert ("the loss" in capsys.readouterr().out) is not quiet


def test_replay_names_what_it_cannot_write_or_continue(steps, tmp_path, monkeypatch):
    how = dict(loading=Loading())
    refused(
        r"texts are written as JSON lines\. Name the file so: r\.jsonl\.$",
        command_of.replay,
        "m",
        tmp_path / "r.txt",
        **how,
    )
    refused(r"Name the file so: rows\.jsonl\.$", command_of.replay, "m", tmp_path / "rows", **how)
    steps.source.task_type, steps.source.saved_as, steps.source.auto_class = "SEQ_CLS", None, "AutoModelForX"
    refused("^m is a AutoModelForX, which continues no text.$", command_of.replay, "m", tmp_path / "r.json", **how)
    steps.source.saved_as = "BertForX"
    refused("^m is a BertForX, which continues no text.$", command_of.replay, "m", tmp_path / "r.jsonl", **how)


@pytest.mark.parametrize("quiet", [False, True])
def test_replay_writes_in_the_home_folder_as_it_says(quiet, steps, tmp_path, monkeypatch, capsys):
    written = []

    def write(*words):
        written.append(words)
        return [{"text": "é"}, {"text": "b"}]

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("lora_init.keep.replay.check_texts", lambda *words: None)
    monkeypatch.setattr("lora_init.keep.replay.replay", write)
    running.quiet = quiet
    command_of.replay("m", Path("~/r.json"), loading=Loading())
    assert written == [("weights", "words", 256, 64, 0, False, command_of.say)]
    rows = [json.loads(line) for line in (tmp_path / "r.json").read_text().splitlines()]
    assert rows == [{"text": "é"}, {"text": "b"}]
    assert ("columns ['text']" in " ".join(capsys.readouterr().out.split())) is not quiet
