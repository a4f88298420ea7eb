"""Every keyword of every public entry changes the adapter, its record or the run, or is refused with one line.

Keywords are read from the signatures, so that a new option enters by itself: it needs a value to be tried with, below.
A record that holds nothing but the option itself does not count: an adapter that says it was whitened has to be so.
"""

import copy
import inspect
import json
from dataclasses import asdict, fields
from unittest.mock import DEFAULT, patch

import pytest
import torch
import typer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import lora_init
from lora_init.adapters.card import origin_of
from lora_init.adapters.init_config import Options
from lora_init.building import initialize as initializing
from lora_init.building.build import build_adapter
from lora_init.cli.app import app
from lora_init.comparison.tasks import LoadingOptions
from lora_init.errors import LoraInitError
from lora_init.loading.models import load_model
from lora_init.starts.starts import buildable
from tests.commands import run, save_model, write_data
from tests.comparisons import SMALL, make_home
from tests.conftest import batches_for, tiny_llama
from tests.options import CODE, INPUT, PLACE, SHOWN, THERE, Free, Try, check, without

pytestmark = pytest.mark.filterwarnings("ignore")


def reversed_tokens(model, batch):
    return model(**{name: value.flip(1) for name, value in batch.items()})


def first_logits(output, batch):
    return output.logits[:, :4].square().mean()


NO_LABELS = Free("of rows without a label: tests/loading/test_batches.py")
# By name, for all entries; those of one entry below go first.
OPTIONS = {
    "model": INPUT, "batches": INPUT, "tokenizer": INPUT, "stats": INPUT, "data": Try("some words", recorded=True),
    "progress": SHOWN, "say": SHOWN, "command": Try("words", recorded=True), "device": PLACE, "trust_remote_code": CODE,
    "rank": Try(2), "rho": Try(2.0), "method": Try("orthogonal"), "seed": Try(1, recorded=True),
    "adapter_name": Try("mine"),
    "template": Try("{question}"), "completion": Try(" {question}"), "format": Try("text"), "subset": Try("one"),
    "split": Try("test"), "label": Try("question"), "samples": Try(8), "batch_size": Try(2), "max_length": Try(3),
    "offset": Try(3), "seq2seq": Try(True), "needs_labels": NO_LABELS,
    "known_classes": Try(("a", "b")), "target_modules": Try("attention"), "exclude_modules": Try(["q_proj"]),
    "target_parameters": Try(["experts"]), "task_type": Try("CAUSAL_LM"), "lora_alpha": Try(3.0),
    "use_rslora": Try(True),
    "use_dora": Try(True), "lora_dropout": Try(0.25), "modules_to_save": Try(["lm_head"]), "freeze_a": Try(True),
    "whiten": Try(True), "unit_rows": Try(True), "gamma": Try(2.0), "weights": Try("float"), "unchecked": Try(True),
    "gradients": Try(True, {"completion": " {question}"}), "center": Try(False),
    "token_mask": Try("labels", {"completion": " {question}"}), "max_batches": Try(2),
    "skip_bad_batches": Free("says what happens where a batch fails: tests/collection/test_collect.py"),
    "tolerance": Try(9.0, recorded=True), "forward": Try(reversed_tokens),
    "loss": Try(first_logits, {"method": "grad-a", "completion": " {question}"}),
    "statistics": Try("kept.safetensors"), "overwrite": THERE,
    "config": Try(LoraConfig(r=2, target_modules=["q_proj"])), "learning_rate": Try("measured"),
}  # fmt: skip


def parameters(function):
    every = inspect.signature(function).parameters.values()
    return [one.name for one in every if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("options")
    save_model(tiny_llama(num_hidden_layers=1), home / "model")
    write_data(home)
    return home


def adapted():
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama(num_hidden_layers=1), config)


def plain(config):
    """Leave out of a config the record that it carries, and what is of the process."""
    return {key: one for key, one in config.items() if key not in ("auto_mapping", "megatron_core", "runtime_config")}


def built(init):
    config = init.to_peft_config().to_dict()
    config = {key: sorted(one) if isinstance(one, set) else one for key, one in config.items()}
    parts = {name: [own.a, own.b] for name, own in init.weights.items()}
    return {"weights": parts, "config": plain(config), "frozen": init.freeze_a}


def test_collect():
    model, batches = tiny_llama(num_hidden_layers=1), batches_for("llama", 12)

    def call(**given):
        given.pop("completion", None)
        stats = lora_init.collect(model, batches, **{"progress": False, "rank": 4} | given)
        gradients = {name: vars(one) for name, one in stats.gradients.items()}
        return [{name: vars(stats[name]) for name in stats}, gradients], asdict(stats.provenance)

    for one in batches:
        one["labels"] = one["labels"].clone()
        one["labels"][:, :3] = -100
    probes = {
        "statistics": THERE, "rho": Try(3.0),
        "task_type": Try("CAUSAL_LM", recorded=True), "token_mask": Try("labels"),
        "loss": Try(first_logits, {"gradients": True}),
    }  # fmt: skip
    check("collect()", call, parameters(lora_init.collect), OPTIONS | probes)


def test_allocate_ranks():
    stats = lora_init.collect(tiny_llama(), batches_for("llama", n_batches=12), rank=4, progress=False, gradients=False)
    probes = {
        "total_rank": Try(20), "parameters": Try(900), "fraction": Try(0.02), "megabytes": Try(0.004),
        "dtype": Try("float16", {"megabytes": 0.004}), "variance": Try(0.3),
        "coverage": Try("total", {"variance": 0.3}),
        "policy": Try("cost-aware", {"rho": 2.0}), "min_rank": Try(1, {"total_rank": 15, "rho": 3.0}),
        "max_rank": Try(2),
        "multiple_of": Try(3), "allowed_ranks": Try((3,)), "tie": Try(("o_proj", "down_proj"), {"rho": 2.0}),
        "uniform_per_kind": Try(True, {"rho": 2.0}), "overrides": Try({"q_proj": {"max_rank": 1}}),
        "exclude": Try("q_proj"),
    }  # fmt: skip

    def call(**given):
        return dict(lora_init.allocate_ranks(stats, **given)), {}

    check("allocate_ranks()", call, parameters(lora_init.allocate_ranks), OPTIONS | probes)


@pytest.fixture(scope="module")
def stats():
    batches = batches_for("llama", 8)
    return lora_init.collect(tiny_llama(num_hidden_layers=1), batches, rank=8, progress=False, gradients=True)


@pytest.mark.parametrize("method", buildable())
def test_build_adapter(method, stats):
    errors = {name: torch.ones(target.out_features, target.in_features) for name, target in stats.targets.items()}
    base = {"ranks": 4} | ({"errors": errors} if method == "qera" else {})
    probes = {"ranks": Try(2), "errors": Try({name: 2 * one for name, one in errors.items()})}

    def call(**given):
        if method == "lora-ga" and "config" in given:
            raise LoraInitError("rank")
        return built(build_adapter(stats, **{"method": method} | given)), {}

    options = set(parameters(build_adapter)) - {"method"}
    if method not in ("random", "gaussian", "orthogonal", "random-scaled", "qera"):
        options -= {"seed"}  # nothing is drawn
    check(f"build_adapter(method={method!r})", call, sorted(options), OPTIONS | probes, base)


def test_initialize(home, tmp_path, monkeypatch):
    loaded = load_model(str(home / "model"))
    inits, real = [], initializing._applied
    monkeypatch.setattr(initializing, "_applied", lambda init, *more: inits.append(init) or real(init, *more))

    def call(**given):
        file = tmp_path / given["statistics"] if "statistics" in given else None
        given = {"template": "{passage}", "rank": 3, "progress": False} | given | ({"statistics": file} if file else {})
        if "config" in given:
            given.pop("rank")
        adapted = lora_init.initialize(loaded.model, home / "rows.jsonl", tokenizer=loaded.tokenizer, **given)
        found = built(inits[-1]) | {"name": adapted.active_adapters, "kept": bool(file and file.exists())}
        adapted.unload()
        return found, origin_of(inits[-1])

    check("initialize()", call, parameters(lora_init.initialize), OPTIONS)


def test_the_trainer_callback(tmp_path):
    torch.manual_seed(0)
    tokens = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.where(row > 20, -100)}
        for row in torch.randint(3, 64, (24, 8))
    ]

    def call(**given):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to="none", save_strategy="no",
            use_cpu=True,
            disable_tqdm=True, learning_rate=1e-2, logging_strategy="no",
        )  # fmt: skip
        torch.manual_seed(0)  # or each adapter begins elsewhere, and no option is idle
        started = Trainer(adapted(), arguments, train_dataset=tokens, callbacks=[lora_init.StartCallback(**given)])
        started.train()
        weights = {name: one for name, one in started.model.named_parameters() if ".lora_" in name}
        return weights, {"trained": [name for name in weights if weights[name].requires_grad]}

    probes = {
        "replay": Try(0.5), "dial": Try(True), "samples": Try(4), "gradients": Try(True), "token_mask": Try("labels"),
        "statistics": Free("a file"), "tolerance": Free("how long a pass is: tests/training/test_callback.py"),
        "needs_labels": Try(True),
        "loss": Try(first_logits, {"method": "grad-a"}),
    }  # fmt: skip
    names = [*parameters(lora_init.StartCallback), *(one.name for one in fields(Options))]
    check("StartCallback()", call, dict.fromkeys(names), OPTIONS | probes)


def test_learning_rate(home):
    loaded = load_model(str(home / "model"))
    base = lora_init.initialize(loaded.model, batches_for("llama"), rank=4, progress=False)
    base.add_adapter("mine", LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj"]))

    def call(**given):
        found = lora_init.learning_rate(base, batches_for("llama"), **given)
        return [str(found), found.stored()["responses"]], {}

    of_length = {"steps": Try(300), "epochs": Try(3, {"steps": 300}), "train_batch_size": Try(16)}
    check("learning_rate()", call, parameters(lora_init.learning_rate), OPTIONS | of_length)


def test_dial(home):
    trained = adapted()
    adam = torch.optim.Adam([one for one in trained.parameters() if one.requires_grad], lr=0.02)
    for batch in batches_for("llama") * 5:
        trained(**batch).loss.backward()
        adam.step()
        adam.zero_grad()

    def call(**given):
        model = copy.deepcopy(trained)
        given = {"keep": batches_for("llama", 8)[4:]} | given
        found = lora_init.dial(model, batches_for("llama"), **given)
        return [dict(found.strengths), dict(found.task), dict(found.keep)], {}

    tokenizer = load_model(str(home / "model")).tokenizer
    probes = {
        "keep": INPUT, "lose": Try(0.0), "keep_within": Try(1e-6), "strength": Try(0.5), "uniform": Try(True),
        "seed": Try(3, {"keep": None, "tokenizer": tokenizer}),
    }  # fmt: skip
    check("dial()", call, parameters(lora_init.dial), OPTIONS | probes)


COMMON = ("quiet", "verbose", "as_json", "help_all", "help", "context")
IN_FILES = {"exclude_modules": "q_proj", "target_parameters": "experts", "modules_to_save": "lm_head"}


def words(name, option, value):
    on, off = option.opts[0], option.secondary_opts
    return [on if value else off[0]] if isinstance(value, bool) else [on, IN_FILES.get(name, value)]


@pytest.mark.parametrize("beside", ["nothing", "statistics", "statistics and no data"])
def test_the_command_init(home, tmp_path, beside):
    """Also where statistics are there already: an option that they do not follow says so."""
    options = {one.name: one for one in typer.main.get_command(app).commands["init"].params if one.name not in COMMON}
    file, places = tmp_path / "stats.safetensors", iter(range(1000))
    data = [home / "rows.jsonl", "--template", "{passage}", "--samples", 24]
    command = ["init", home / "model", *(data if beside != "statistics and no data" else []), "--rank", 2]
    if beside != "nothing":
        first = run("init", home / "model", *data, "--rank", 2, "--statistics", file, "-o", tmp_path / "first")
        assert first.exit_code == 0, first.output
        command += ["--statistics", file]

    def call(**given):
        place, content = tmp_path / f"out{next(places)}", file.read_bytes() if file.exists() else b""
        words_given = [*command, "-o", place]
        for name, value in given.items():
            words_given += words(name, options[name], value)
        result = run(*words_given)
        if file.exists():
            file.write_bytes(content)
        if result.exit_code:
            assert result.stderr.strip().splitlines()[-1].startswith("error: "), (given, result.output)
            raise LoraInitError("refused")
        if not place.exists():
            return ["dry run"], {}
        config = json.loads((place / "adapter_config.json").read_text())
        record = json.loads((place / "lora_init.json").read_text())
        return [load_file(place / "adapter_model.safetensors"), plain(config)], record

    probes = {
        "model": INPUT, "data": INPUT, "output": Free("where it goes"), "learning_rate": Try(1e-3, recorded=True),
        "steps": Try(900), "epochs": Try(3), "train_batch_size": Try(16),
        "dry_run": Try(True), "statistics": Free("the file"), "ranks_from": Try("nowhere"), "bank": Try("nowhere"),
        "by": Try("mean"), "similarity": Try("both"), "dtype": Try("bfloat16"), "quantize": Try("nf4"),
        "task_type": Try("FEATURE_EXTRACTION"), "rank": Try(3),
    }  # fmt: skip
    if beside != "nothing":
        probes |= {"gradients": Try(True), "token_mask": Try("labels"), "needs_labels": Try(True)}
    check(f"lora-init init, beside {beside},", call, dict.fromkeys(options), OPTIONS | probes)


@pytest.mark.slow
def test_compare(tmp_path_factory):
    home = make_home(tmp_path_factory.mktemp("comparison"), n_rows=60, num_hidden_layers=1)
    places = iter(range(1000))
    base = SMALL | dict(starts=("random",), steps=2, seeds=1, learning_rates=[1e-2], evaluation_points=None)

    def call(**given):
        place = home / f"out{next(places)}"
        with patch.multiple("lora_init.comparison.compare", write_report=lambda path: [], keep_best=DEFAULT):
            found = lora_init.compare(str(home / "llama"), home / "rows.jsonl", place, **base | given)
        records = [without(one, "circumstances") for one in found.records]
        for one in records:
            for name in [name for name in one if "seconds" in name or name == "peak_memory_bytes"]:
                one.pop(name)
        plan = [(str(run.start), run.seed, run.learning_rate) for run in found.planned]
        return [records, plan, found.outlook is not None], found.settings

    probes = {
        "output": Free("where it goes"), "data": INPUT, "starts": Try(("random", "eva")), "learning_rates": Try([1e-3]),
        "seeds": Try(2), "sweep": Try("full", {"seeds": 3, "learning_rates": [1e-3, 1e-2]}),
        "extend": Try(1, {"learning_rates": [1e-3, 1e-2]}), "full": Try(True), "steps": Try(3), "warmup": Try(0.9),
        "evaluation_points": Try([1, 3], {"steps": 4}), "statistics_batches": Try(2, {"starts": ("eva",)}),
        "bank": Try("nowhere"),
        "time": Try(600.0), "precision": Try(0.5), "workers": Free("how runs are shared out"),
        "executor": Free("how runs are shared out"), "gpus_per_run": Try(0.5), "dry_run": Try(True),
        "options": Try("options"), "answer": Try("letter"), "normalize": Try(True), "train_samples": Try(8),
        "selection_samples": Try(4), "report_samples": Try(4), "data_seed": Try(1), "name": Try("mine", recorded=True),
        "retain_data": Try(home / "text.txt"), "retain_template": Try("{text}"),
        "retain_samples": Try(4), "dial": Try(False), "replay": Try(home / "text.txt"), "dtype": Try("bfloat16"),
        "quantize": Try("nf4"), "rank": Try(3), "completion": Try(" {letter}"), "template": Try("{text} so"),
        "label": Try("first"),
    }  # fmt: skip
    (home / "text.txt").write_text("the cat sat on a mat\nand saw one dog run\n")
    names = [*parameters(lora_init.compare), *(one.name for one in fields(LoadingOptions))]
    check("compare()", call, dict.fromkeys(names), OPTIONS | probes)
