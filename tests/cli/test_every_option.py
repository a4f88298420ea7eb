"""Every option of every command changes what comes out, or is refused with one line.

As `tests/test_options.py`, which has `init` and the entries in Python: options are read from the declarations, and a
new one needs a value to be tried with.
"""

import json
import re

import pytest
import torch
import typer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_init.adapters import measured_rate
from lora_init.adapters.measured_rate import learning_rate
from lora_init.cli.app import app
from lora_init.errors import LoraInitError
from tests.commands import WORDS, run, save_model, tokenizer_of, write_data
from tests.conftest import tiny_llama
from tests.options import CODE, INPUT, PLACE, THERE, Free, Try, check
from tests.serving.engine import Engine

COMMON = ("quiet", "verbose", "as_json", "help_all", "help", "context", "overwrite")
# Values that a command reads of the folder `home`; of options of all commands.
OPTIONS = {
    "base": Try("{home}/other"), "steps": Try(300), "epochs": Try(3), "train_batch_size": Try(16),
    "template": Try("{question}"), "completion": Try(" {question}"), "format": Try("text"), "subset": Try("one"),
    "split": Try("test"), "max_length": Try(5), "dtype": Try("bfloat16"), "device": PLACE, "trust_remote_code": CODE,
    "output": Free("where it goes"), "overwrite": THERE, "seed": Try(1), "samples": Try(40), "quantize": Try("nf4"),
}  # fmt: skip


IDS = torch.tensor([[*range(4 + i, 23), *range(4, 4 + i)] for i in range(19)])  # near `write_data`


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two bases, an adapter before and after its training, another one, statistics of two passes over a deeper base."""
    home = tmp_path_factory.mktemp("options")
    write_data(home)
    for seed, (name, depth) in enumerate((("base", 1), ("other", 1), ("deep", 2))):
        torch.manual_seed(seed)
        save_model(tiny_llama(initializer_range=0.3, num_hidden_layers=depth), home / name)  # so that rounding shows
    for name, steps in (("start", 0), ("trained", 20), ("again", 10)):
        torch.manual_seed(2)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(home / "base"), config)
        adam = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=0.02)
        for _ in range(steps):
            model(input_ids=IDS, labels=IDS).loss.backward()
            adam.step()
            adam.zero_grad()
        model.save_pretrained(home / name)
    backwards = [" ".join(reversed(line.split())) for line in (home / "text.txt").read_text().splitlines()]
    (home / "other.txt").write_text("\n".join(backwards))
    # Other rows, in part: those that begin alike are not merged.
    for name, base, seed in (("first", "deep", 0), ("second", "deep", 1), ("of base", "base", 0)):
        made = run(
            "init", home / base, home / "rows.jsonl", "--template", "{passage}", "--rank", 4, "--samples", 24,
            "--seed", seed, "--statistics", home / f"{name}.safetensors", "-o", home / name,
        )  # fmt: skip
        assert made.exit_code == 0, made.output
    return home


def contents(place):
    """Return what was written: tensors, JSON without times, or text."""
    if place.is_dir():
        return {str(path.relative_to(place)): contents(path) for path in sorted(place.rglob("*")) if path.is_file()}
    if place.suffix == ".safetensors":
        return load_file(place)
    if not place.exists():
        return None
    text = place.read_bytes().decode(errors="replace")
    return re.sub(r'"(seconds|created|date|versions)": ("[^"]*"|\{[^}]*\}|[\d.]+)', "", text)


def check_command(name, words, home, tmp_path, probes, read, ending=""):
    """Run a command with each of its options; `read` takes what matters of what is printed and what was written."""
    command = typer.main.get_command(app).commands[name]
    options = {one.name: one for one in command.params if one.name not in COMMON}
    places = iter(range(1000))

    def text(value):
        return str(value).replace("{home}", str(home))

    def call(**given):
        place = tmp_path / f"out{next(places)}{ending}"
        more = [] if "output" not in options else ["-o", place]
        for option, value in given.items():
            on = options[option].opts[0]
            more += ([on] if value else []) if isinstance(value, bool) else [on, text(value)]
        result = run(name, *map(text, words), *more)
        if re.search(r"^(error: |│ Invalid value)", result.stderr, re.MULTILINE):
            raise LoraInitError("refused")
        assert result.exit_code == 0 or result.stdout, (given, result.exception)
        printed = result.stdout.replace(str(place), "PLACE")
        return [result.exit_code, read(printed, contents(place))], {}

    arguments = {one.name: INPUT for one in command.params if one.param_type_name == "argument"}
    check(f"lora-init {name}", call, dict.fromkeys(options), OPTIONS | arguments | probes)


def everything(printed, written):
    return [re.sub(r"[\d.]+ (s|min)\b", "", printed), written]


def beside(given):
    """Try options beside others."""
    return {name: Try(probe.value, given) for name, probe in OPTIONS.items() if isinstance(probe, Try)}


@pytest.mark.slow
def test_rate(home, tmp_path, monkeypatch):
    rules = []  # what is printed has two digits

    def noted(*words, **given):
        rules.append(learning_rate(*words, **given))
        return rules[-1]

    monkeypatch.setattr(measured_rate, "learning_rate", noted)

    def read(printed, _):
        return [json.loads(printed)["learning_rate"], rules[-1].stored()["responses"]]

    given = {"template": "{passage} {question}"}
    probes = beside(given) | {"template": Try("{question}", given)}
    check_command("rate", ["{home}/start", "{home}/rows.jsonl", "--json"], home, tmp_path, probes, read)


def test_ranks(home, tmp_path):
    """As a table and as a plan; and for another tool, which takes no rank of its own for `lora_alpha`."""
    given, budget, tool = {"rho": 2.0, "rank": 4}, {"rho": 2.0}, {"rank": 4, "tool": "peft"}
    probes = {
        "rank": Try(3, budget), "total_rank": Try(50, budget), "parameters": Try("3k", budget),
        "fraction": Try(0.05, budget), "megabytes": Try(0.01, budget), "variance": Try(0.5),
        "dtype": Try("float16", budget | {"megabytes": 0.01}), "coverage": Try("total", {"variance": 0.5}),
        "policy": Try("cost-aware", given), "rho": Try(1.0, given), "min_rank": Try(3, given),
        "max_rank": Try(5, given), "multiple_of": Try(3, given), "allowed_ranks": Try("3,6", given),
        "tie": Try("q_proj,o_proj", given), "uniform_per_kind": Try(True, given),
        "override": Try("q_proj:max_rank=1", given), "exclude": Try("q_proj", given),
        "compare": Try("max_rank=2", given), "tool": Try("peft", given),
        "plot": Free("a picture: tests/cli/test_ranks.py"),
        "lora_alpha": Try(3.0, tool), "use_rslora": Try(True, tool),
    }  # fmt: skip
    check_command("ranks", ["{home}/first.safetensors"], home, tmp_path, probes, everything)
    rslora = run("ranks", home / "first.safetensors", "--rank", 4, "--format", "peft", "--use-rslora").stdout
    assert re.search(r"lora_alpha\W+4\b", rslora), rslora  # a scaling of 2, as without


def test_merge(home, tmp_path):
    words = ["{home}/first.safetensors", "{home}/second.safetensors"]
    check_command("merge", words, home, tmp_path, {"weights": Try("0.1,0.9")}, lambda _, written: written)


@pytest.mark.slow
def test_dial(home, undrawn, tmp_path):
    def read(printed, written):
        found = json.loads(printed)
        return [found["chosen"], written and written["adapter_model.safetensors"]]

    given = {"template": "{passage} {question}", "keep": "{home}/other.txt", "samples": 36}
    quick = given | {"uniform": True}  # what is read and chosen by is the same, and nothing is fitted
    probes = beside(quick) | {
        "template": Try("{question}", quick), "keep": Try("{home}/text.txt", quick),
        "lose": Try("0%", quick), "keep_within": Try(1e-4, quick),
        "strength": Try(0.5, given), "uniform": Try(True, given), "alpha_pattern": Try(True, given),
    }  # fmt: skip
    check_command("dial", ["{home}/trained", "{home}/rows.jsonl", "--json"], home, tmp_path, probes, read)


def test_replay(home, tmp_path):
    probes = {"n": Try(3), "length": Try(5), "chat": Try(True)}
    check_command(
        "replay",
        ["{home}/base", "--n", 16, "--length", 24],
        home,
        tmp_path,
        probes,
        lambda _, written: written,
        ".jsonl",
    )


@pytest.mark.slow
def test_export(home, tmp_path):
    data = {"rank": 2, "data": "{home}/rows.jsonl", "template": "{passage}"}
    probes = beside(data) | {
        "engine": Try("vllm"), "rank": Try(2), "parameters": Try("500"), "megabytes": Try(0.002),
        "keep_ranks": Try(True, {"parameters": "500"}), "start": Try("{home}/again"), "merge_into": Try("{home}/base"),
        "reduce_intruders": Try(True), "rename": Try(True), "data": Try("{home}/text.txt", {"rank": 2}),
        "template": Try("{question}", data), "samples": Try(3, data), "dtype": Try("bfloat16"),
    }  # fmt: skip
    check_command("export", ["{home}/trained"], home, tmp_path, probes, everything)


def test_inspect(home, tmp_path):
    whole = {"merge_type": "int8", "data": "{home}/rows.jsonl", "template": "{passage}"}
    probes = beside(whole) | {
        "intruders": Try(True), "merge_type": Try("int8"), "base": Try("{home}/other"), "engine": Try("vllm"),
        "statistics": Try("{home}/of base.safetensors", {"merge_type": "int8"}),
        "data": Try("{home}/text.txt", {"merge_type": "int8"}), "template": Try("{question}", whole),
        "steps": Free("of a start, below"), "epochs": Free("of a start, below"),
        "train_batch_size": Free("of a start, below"),
    }  # fmt: skip
    check_command("inspect", ["{home}/trained"], home, tmp_path, probes, lambda printed, _: printed)


def test_inspect_of_a_start(home, tmp_path):
    def read(printed, _):
        return re.findall(r"\de-\d+", printed)

    probes = dict.fromkeys(OPTIONS, Free("not of a start")) | dict.fromkeys(
        ("intruders", "merge_type", "engine", "statistics", "data"), Free("not of a start")
    )
    probes |= {name: OPTIONS[name] for name in ("steps", "epochs", "train_batch_size")}
    check_command("inspect", ["{home}/first"], home, tmp_path, probes, read)


@pytest.mark.slow
def test_verify(home, tmp_path):
    engine = Engine(tokenizer_of(WORDS))
    for name, directory in (("base", None), ("trained", "trained"), ("mine", "again"), ("foreign", None)):
        base = home / ("other" if name == "foreign" else "base")
        parent = None if directory is None else "base"
        engine.add(name, base, directory and home / directory, parent=parent)

    def read(printed, _):
        return [printed, len(engine.asked)]

    with engine.running() as url:
        given = {"data": "{home}/rows.jsonl", "template": "{passage}", "n": 4}
        probes = beside(given) | {
            "url": INPUT, "model": Try("mine", given), "served_base": Try("foreign", given), "n": Try(3, given),
            "template": Try("{question}", given), "data": Try("{home}/other.txt", {"n": 4}),
            "api_key": Free("tests/serving/test_verify.py"), "timeout": Free("how long it waits"),
        }  # fmt: skip
        check_command("verify", ["{home}/trained", "--url", url, "--json"], home, tmp_path, probes, read)
