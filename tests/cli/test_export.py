"""`lora-init export`: what it prints, that its errors are one line, and the losses it measures."""

import json
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from peft import LoraConfig, get_peft_model

from lora_init.cli import export
from lora_init.cli.console import Running
from lora_init.errors import LoraInitError
from lora_init.loading.examples import MAX_LENGTH
from lora_init.serving.export import Exported
from tests.commands import WORDS, assert_one_line_error, run, save_model
from tests.conftest import refused, tiny_bert, tiny_llama
from tests.serving.made import ADAPTERS, train


@pytest.fixture
def trained(tmp_path):
    save_model(tiny_llama(), tmp_path / "base")
    rows = [{"text": " ".join(WORDS[i % 19 :] + WORDS[: i % 7])} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return train(tmp_path / "base", tmp_path / "trained", **ADAPTERS["ranks, first match wins"])


def test_it_prints_the_sizes_and_ends_with_the_commands(trained, tmp_path):
    done = run("export", trained, "-o", tmp_path / "served", "--engine", "vllm")
    assert done.exit_code == 0, done.output
    assert "rank" in done.stdout and "16" in done.stdout
    serve, verify = done.stdout.strip().splitlines()[-2:]
    assert serve.startswith("vllm serve ")
    assert verify == f"lora-init verify {tmp_path / 'served'} --url http://127.0.0.1:8000/v1 --model served"
    again = run("export", trained, "-o", tmp_path / "served", "--engine", "vllm")
    assert_one_line_error(again, "exists and is not empty", "pass --overwrite.")
    assert run("export", trained, "-o", tmp_path / "served", "--engine", "vllm", "--overwrite").exit_code == 0


def test_several_are_written_beside_each_other(trained, tmp_path):
    others = [
        train(tmp_path / "base", tmp_path / f"more/v1.{i}", target_modules=["q_proj"], r=rank)
        for i, rank in ((1, 3), (2, 33), (3, 8))
    ]
    (others[2] / "adapter_model.safetensors").unlink()
    done = run("export", trained, *others, "-o", tmp_path / "served", "--engine", "vllm")
    error = f"error: {others[2]} has no adapter_model.safetensors"
    assert done.exit_code == 1 and [line.partition(". ")[0] for line in done.stderr.splitlines()] == [error]
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    assert rows["v1.2"][0] == "64" and rows["v1.2"][3:5] == ["rank", "32:"] and rows["v1.3"] == ["failed"]
    names = " ".join(f"{name}={tmp_path / 'served' / name}" for name in ("trained", "v1.1", "v1.2"))
    serve = f"vllm serve {tmp_path / 'base'} --enable-lora --max-lora-rank 64 --lora-modules {names}"
    paths = " ".join(str(tmp_path / "served" / name) for name in ("trained", "v1.1", "v1.2"))
    ask = f"lora-init verify {paths} --url http://127.0.0.1:8000/v1"
    assert done.stdout.splitlines()[-2:] == [serve, ask]
    again = run("export", trained, others[0], "-o", tmp_path / "served", "--engine", "vllm", "--overwrite", "--json")
    assert again.exit_code == 0 and [one["rank"] for one in json.loads(again.stdout)] == [16, 8]
    assert_one_line_error(run("export", trained, trained, "-o", tmp_path / "two"), "have the name 'trained'")
    mixed = json.loads(run("export", trained, others[2], "-o", tmp_path / "mixed", "--json").stdout)
    assert mixed[0].keys() == mixed[1].keys() and mixed[0]["failed"] is None and mixed[1]["error"] is None
    assert mixed[0]["error"] == 0.0 and "no adapter_model.safetensors" in mixed[1]["failed"]
    # The loss of the one that can be read is measured all the same.
    (others[2] / "adapter_config.json").write_text("{")
    words = ["export", others[2], trained, "-o", tmp_path / "measured", "--data", tmp_path / "data.jsonl", "--json"]
    measured = run(*words, "--samples", 4)
    assert measured.exit_code == 1, measured.output
    failed, read = json.loads(measured.stdout)
    assert "adapter_config.json" in failed["failed"] and read["failed"] is None and len(read["losses"]) == 2


@pytest.mark.parametrize("order", [1, -1])
def test_losses_of_those_that_are_written_stand_beside_one_that_failed(trained, tmp_path, order):
    broken = train(tmp_path / "base", tmp_path / "broken", target_modules=["q_proj"], r=2)
    (broken / "adapter_model.safetensors").unlink()
    options = "-o", tmp_path / "served", "--data", tmp_path / "data.jsonl"
    done = run("export", *[trained, broken][::order], *options)
    assert done.exit_code == 1 and "loss before, after" in done.stdout, done.output
    assert "failed" in done.stdout and "no adapter_model.safetensors" in done.stderr


def test_one_of_several_that_failed_is_named_once(trained, tmp_path):
    narrow = train(tmp_path / "base", tmp_path / "narrow", target_modules=["q_proj"], r=2)
    done = run("export", trained, narrow, "-o", tmp_path / "out", "--engine", "mlx", "--keep-ranks")
    assert done.exit_code == 1
    assert [line.partition(" takes one rank")[0] for line in done.stderr.splitlines()] == [
        f"error: {directory}: mlx" for directory in (trained, narrow)
    ]


@pytest.mark.parametrize("options, message", [
    (["--engine", "lama.cpp"], "engine 'lama.cpp' is unknown. Did you mean llama.cpp?"),
    (["--engine", "mlx", "--keep-ranks"], "mlx takes one rank for all layers."),
    (["--engine", "ollama", "--data", "x"], "--data: PEFT measures the loss."),
    (["--parameters", "many"], "--parameters many: a whole number from 1 to 10^12 is needed"),
    (["--merge-into", "base", "--rank", "2"], "no ranks"),
    *((["--reduce-intruders", "--base", "nowhere", *more], "--reduce-intruders is of an adapter as PEFT loads it.")
      for more in (["--rename"], ["--start", "nowhere"])),
])  # fmt: skip
def test_wrong_usage_is_one_line(options, message, trained, tmp_path):
    done = run("export", trained, "-o", tmp_path / "served", *options)
    assert_one_line_error(done, message)
    assert not (tmp_path / "served").exists()


def test_an_adapter_of_a_base_of_another_size_is_warned_of(tmp_path):
    save_model(tiny_llama(), tmp_path / "base")
    save_model(tiny_llama(num_hidden_layers=3), tmp_path / "deeper")
    (tmp_path / "text.txt").write_text("\n".join([" ".join(WORDS)] * 20))
    assert run("init", tmp_path / "base", tmp_path / "text.txt", "--rank", 2, "-o", tmp_path / "new").exit_code == 0
    assert run("export", tmp_path / "new", "-o", tmp_path / "same").stderr == ""
    done = run("export", tmp_path / "new", "-o", tmp_path / "other", "--base", tmp_path / "deeper")
    assert done.exit_code == 0 and "warning: adapter_config.json says that the base has" in done.stderr
    assert done.stderr.rstrip().endswith("Is it the same base?")


@pytest.mark.parametrize(("task", "kind", "load"), [
    ("SEQ_CLS", "a classifier", "AutoModelForSequenceClassification.from_pretrained({base!r}, num_labels=3)"),
    ("FEATURE_EXTRACTION", "an encoder", "AutoModel.from_pretrained({base!r})"),
])  # fmt: skip
def test_models_that_write_no_text_are_offered_no_engine_of_text(task, kind, load, tmp_path):
    base = str(save_model(tiny_bert(), tmp_path / "base"))
    auto = load.partition(".")[0]
    more = {"num_labels": 3, "ignore_mismatched_sizes": True} if task == "SEQ_CLS" else {}
    model = getattr(transformers, auto).from_pretrained(base, **more)
    config = LoraConfig(task_type=task, target_modules=["query"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "trained")
    shown = run("inspect", tmp_path / "trained").stdout
    assert f"It is of {kind}, and the engines of `lora-init export` write text." in shown and "vLLM" not in shown
    done = run("export", tmp_path / "trained", "-o", tmp_path / "for-peft", "--base", base)
    command = f"PeftModel.from_pretrained({load.format(base=base)}, '{tmp_path / 'for-peft'}')"
    assert done.stdout.splitlines()[-1] == command, done.output
    if task == "SEQ_CLS":
        merge = ["export", tmp_path / "trained", "-o", tmp_path / "merged", "--merge-into"]
        assert_one_line_error(run(*merge, base), "num_labels=")
        fitting = getattr(transformers, auto).from_pretrained(base, **more)
        fitting.save_pretrained(tmp_path / "fitting")
        done = run(*merge, tmp_path / "fitting")
        assert done.exit_code == 0 and "warning" not in done.stderr, done.output


# What is printed of an export, line by line: each fact adds its own line, or changes it.

PLAIN = dict(
    path=Path("out"), engine=None, rank=8, scaling=2.0, command="serve it", parameters=12345, n_bytes=1_260_000
)
WRITTEN = ["written out: 1.26 MB", "rank 8, scaling 2, 12,345 parameters", "", "serve it"]
LINES = {
    "plain": ({}, WRITTEN),
    "merged": (dict(rank=0), [WRITTEN[0], *WRITTEN[2:]]),
    "filled up": (dict(added=("a", "b")), [
        *WRITTEN[:2], "added 2 layers that do nothing, because others of their kind have an adapter", *WRITTEN[2:]]),
    "compressed": (dict(errors={"a": 0.01, "b": 0.03, "c": 0.02}, error=0.0234), [
        *WRITTEN[:2], "error 2.34% of the update; of 3 compressed layers b has most, 3.00%", *WRITTEN[2:]]),
    "at most": (dict(smaller=(4, 0.0567)), [
        *WRITTEN[:2], "smaller rank 4 would lose 5.67% of the update", *WRITTEN[2:]]),
    "corrected": (dict(error_share=3.0), [
        *WRITTEN[:2], "quantized base rounding its weights moved them 3 times as far as the adapter does",
        *WRITTEN[2:]]),
    "corrected far": (dict(error_share=3.21), [
        *WRITTEN[:2], "quantized base rounding its weights moved them 3.21 times as far as the adapter does: on float "
        "weights it is not what was trained", *WRITTEN[2:]]),
    "intruders": (dict(intruders=(7, 2)), [*WRITTEN[:2], "intruders 7 before, 2 after", *WRITTEN[2:]]),
    "notes": (dict(notes=("one", "two")), [*WRITTEN[:2], "note: one", "note: two", *WRITTEN[2:]]),
    "asked about": (dict(verify="lora-init verify out"), [*WRITTEN, "lora-init verify out"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_each_fact_of_an_export_has_its_line(case, trained, tmp_path, monkeypatch):
    facts, expected = LINES[case]
    monkeypatch.setattr("lora_init.serving.export.export_adapter", lambda *_, **__: Exported(**PLAIN | facts))
    monkeypatch.setenv("COLUMNS", "200")
    done = run("export", trained, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines == expected


def test_a_table_of_exports_has_a_cell_for_each_fact(trained, tmp_path, monkeypatch):
    made = iter([
        Exported(**PLAIN | dict(path=tmp_path / "out" / "trained", error=0.0123, smaller=(4, 0.0567))),
        Exported(**PLAIN | dict(path=tmp_path / "out" / "other", rank=0, n_bytes=2_000_000)),
    ])  # fmt: skip
    monkeypatch.setattr("lora_init.serving.export.export_adapter", lambda *_, **__: next(made))
    other = train(tmp_path / "base", tmp_path / "other", target_modules=["q_proj"])
    done = run("export", trained, other, "-o", tmp_path / "out")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[:3] == [
        ["adapter", "rank", "MB", "update", "lost", "at", "the", "next", "smaller", "rank"],
        ["trained", "8", "1.26", "1.23%", "rank", "4:", "5.67%"],
        ["other", "merged", "2.00", "0.00%"],
    ]


# The parts, without an adapter.


@pytest.mark.parametrize(("options", "line"), [
    ({}, None), ({"data": "d"}, None), ({"merge_into": "m", "start": Path("s"), "engine": "vllm"}, None),
    *(({"data": "d"} | more, "--data: PEFT measures the loss. Leave --merge-into, --start and --engine away.")
      for more in ({"merge_into": "m"}, {"start": Path("s")}, {"engine": "llama.cpp"})),
    ({"data": "d", "engine": "vllm"}, None),
])  # fmt: skip
def test_the_loss_is_measured_of_what_peft_loads(options, line, monkeypatch):
    monkeypatch.setattr(export, "require", lambda *_: None)
    asked = dict.fromkeys(("data", "engine", "merge_into", "start")) | {"reduce_intruders": False} | options
    if line is None:
        export._check_options(**asked)
    else:
        refused(f"^{line}$", export._check_options, **asked)


@pytest.mark.parametrize(
    ("option", "idle"), [("template", True), ("samples", True), ("max_length", True), ("rank", False)]
)
def test_how_data_are_read_is_for_data(option, idle, monkeypatch):
    monkeypatch.setattr("lora_init.cli.console.running", Running(options={option: ("--it", "")}, given={option}))
    if idle:
        refused("^--it: that is for --data. Leave it out.$", export._check_options, None, None, None, None, False)
    else:
        export._check_options(None, None, None, None, False)
    export._check_options("d", None, None, None, False)


def test_packages_are_asked_for_before_the_work(monkeypatch):
    asked = []
    monkeypatch.setattr(export, "require", lambda *names: asked.append(names))
    monkeypatch.setattr(export, "require_version", lambda *words: asked.append(words))
    export._check_options(None, "llama.cpp", None, None, True)
    assert asked == [("gguf",), ("scipy",), ("peft", "0.19", "--reduce-intruders")]
    asked.clear()
    export._check_options(None, None, None, None, False)
    assert asked == [()]


def test_one_adapter_is_written_where_it_was_typed_and_several_under_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, here, out = Path("a"), Path(), Path("out")
    assert export._places([one], out, "llama.cpp", Path("s")) == {out: one}
    assert export._places([one, here], out, None, None) == {
        tmp_path / "out/a": one,
        tmp_path / "out" / tmp_path.name: here,
    }
    files = export._places([one, Path("b")], out, "llama.cpp", None)
    assert files == {tmp_path / "out/a.gguf": one, tmp_path / "out/b.gguf": Path("b")}
    line = "^several directories have the name 'a', under which each would be written.$"
    refused(line, export._places, [one, Path("x/a")], out, None, None)
    line = "^--start is one adapter before its training. Export those that have one one by one.$"
    refused(line, export._places, [one, Path("b")], out, None, Path("s"))


@pytest.mark.parametrize(("typed", "bases", "named"), [
    (None, ["x", "x"], ""), (None, ["x", "y"], None), ("b", ["x", "y"], "b"), ("b", ["x"], "b"),
])  # fmt: skip
def test_a_command_names_the_base_where_the_adapters_do_not_agree(typed, bases, named, monkeypatch):
    monkeypatch.setattr("lora_init.adapters.directory.AdapterDirectory", lambda base: SimpleNamespace(base=base))
    assert export._base_named(bases, typed) == named


@pytest.mark.parametrize(("text", "said"), [("x/y is wrong.", "x/y is wrong."), ("no rank.", "x/y: no rank.")])
@pytest.mark.parametrize("measured", [False, True])
def test_a_failure_has_the_keys_of_an_export_and_names_its_adapter_once(text, said, measured, capsys):
    found = export._failure(LoraInitError(text), Path("x/y"), Path("out/a"), measured)
    keys = dict.fromkeys(field.name for field in fields(Exported))
    assert found == keys | {"path": "out/a", "failed": said} | ({"losses": None} if measured else {})
    assert capsys.readouterr() == ("", f"error: {said}\n")


@pytest.mark.parametrize(("data", "engine", "config", "fails"), [
    ("d", "vllm", {"target_parameters": ["x"]}, True), (None, "vllm", {"target_parameters": ["x"]}, False),
    ("d", None, {"target_parameters": ["x"]}, False), ("d", "vllm", {}, False),
])  # fmt: skip
def test_experts_are_measured_in_the_form_of_peft_alone(data, engine, config, fails):
    if fails:
        line = "^--data: PEFT measures the loss, and vllm gets experts in another form.$"
        refused(line, export._check_experts, data, engine, config)
    else:
        export._check_experts(data, engine, config)


@pytest.mark.parametrize(("base", "bases", "loaded"), [
    (None, ["x", "x"], "x"), ("b", ["x", "y"], "b"), (None, [None, "x"], "x"), (None, [None], "fails"),
])  # fmt: skip
def test_one_base_is_loaded_for_all_that_can_be_read(base, bases, loaded, monkeypatch):
    def read(directory):
        if directory is None:
            raise LoraInitError("cannot be read.")
        return SimpleNamespace(base=directory)

    asked = []
    monkeypatch.setattr("lora_init.adapters.directory.AdapterDirectory", read)
    monkeypatch.setattr(
        "lora_init.loading.models.load_model", lambda *words, **how: asked.append((*words, how)) or "it"
    )
    if loaded == "fails":
        refused("^cannot be read.$", export._load, bases, base)
    else:
        assert export._load(bases, base, True) == "it"
        assert asked == [(loaded, {"dtype": "float32", "trust_remote_code": True})]


@pytest.mark.parametrize("n", [1, 2])
def test_what_cannot_be_read_ends_the_command_only_where_it_is_alone(n, monkeypatch):
    checked = []

    def read(directory):
        if directory == "bad":
            raise LoraInitError("cannot be read.")
        return SimpleNamespace(config={})

    monkeypatch.setattr("lora_init.adapters.directory.AdapterDirectory", read)
    monkeypatch.setattr("lora_init.serving.export.check_before_loading", lambda *words: checked.append(words[1:]))
    call = (["bad", "good"][:n], "base", 3, None, None)
    if n == 1:
        refused("^cannot be read.$", export._check_before_loading, *call)
    else:
        export._check_before_loading(*call, True)
        assert checked == [("base", 3, True)]


@pytest.mark.parametrize(("changes", "row"), [
    ({}, {"adapter": "a", "rank": "8", "MB": "1.26", "update lost": "1.23%", "at the next smaller rank": ""}),
    ({"rank": 0, "smaller": (4, 0.0567), "losses": [2.5, 2.25]},
     {"adapter": "a", "rank": "merged", "MB": "1.26", "update lost": "1.23%",
      "at the next smaller rank": "rank 4: 5.67%", "loss before, after": "2.5000, 2.2500"}),
    ({"failed": "why", "losses": None, "rank": None},
     {"adapter": "a", "rank": "failed", "MB": "", "update lost": "", "at the next smaller rank": "",
      "loss before, after": ""}),
])  # fmt: skip
def test_a_row_of_several_exports_is_whole_whatever_became_of_it(changes, row):
    summary = {"path": "out/a", "failed": None, "rank": 8, "n_bytes": 1_260_000, "error": 0.0123, "smaller": None}
    assert export._row(summary | changes) == row


@pytest.mark.parametrize("asked", [True, False])
def test_the_base_is_loaded_where_intruders_are_reduced_in_it(asked, trained, tmp_path, monkeypatch):
    loaded, given = SimpleNamespace(model=object()), []

    def export_adapter(*_, reduce_intruders, **__):
        given.append(reduce_intruders)
        raise LoraInitError("seen")

    monkeypatch.setattr(export, "require_version", lambda *words: None)
    monkeypatch.setattr(export, "_load", lambda *words: loaded)
    monkeypatch.setattr("lora_init.serving.export.export_adapter", export_adapter)
    done = run("export", trained, "-o", tmp_path / "out", *["--reduce-intruders"] * asked)
    assert "seen" in done.stderr and given == [loaded.model if asked else None]


@pytest.mark.parametrize("n", [1, 2])
def test_what_is_typed_reaches_the_export_and_the_losses_are_before_and_after_it(n, trained, tmp_path, monkeypatch):
    looked_at, loaded_by, read_by, exported_by, measured = [], [], [], [], []
    loaded = SimpleNamespace(model=None, tokenizer="its words", seq2seq="both")
    other = train(tmp_path / "base", tmp_path / "other", target_modules=["q_proj"])
    adapters = [trained, other][:n]

    @contextmanager
    def importing(**words):
        looked_at.append(words)
        yield

    def export_adapter(directory, place, *words, **how):
        exported_by.append((directory, place, *words, how))
        return Exported(**PLAIN | dict(path=place))

    monkeypatch.setattr(export, "importing", importing)
    monkeypatch.setattr(export, "_check_before_loading", lambda *words: looked_at.append(words[1:]))
    monkeypatch.setattr(export, "_load", lambda *words: loaded_by.append(words) or loaded)
    monkeypatch.setattr(export, "_losses", lambda *words: measured.append(words) or {"losses": [2.0, 1.0]})
    monkeypatch.setattr("lora_init.loading.batches.load_batches", lambda *words, **how: read_by.append((words, how)))
    monkeypatch.setattr("lora_init.serving.export.export_adapter", export_adapter)
    typed = ["--rank", 3, "--base", "b", "--data", "d", "--template", "{a}", "--keep-ranks", "--trust-remote-code"]
    for more, samples, max_length in ((["--samples", 5, "--max-length", 9], 5, 9), ([], 64, MAX_LENGTH)):
        done = run("export", *adapters, "-o", tmp_path / "out", *typed, *more)
        assert done.exit_code == 0, done.output
        assert looked_at == [{"data": "d"}, ("b", 3, "d", None, True)] and loaded_by == [(adapters, "b", True)]
        ((words, how),) = read_by
        assert words == ("d", "its words") and how["seq2seq"] == "both" and how["template"] == "{a}"
        assert (how["samples"], how["max_length"]) == (samples, max_length)
        places = [tmp_path / "out"] if n == 1 else [tmp_path / "out" / one.name for one in adapters]
        assert [asked[:4] for asked in exported_by] == [(*pair, None, 3) for pair in zip(adapters, places, strict=True)]
        for *_, how in exported_by:
            assert how["trust_remote_code"] and how["keep_ranks"] and not how["overwrite"] and how["base"] == "b"
        assert [words[2:] for words in measured] == [*zip(adapters, places, strict=True)]
        for seen in (looked_at, loaded_by, read_by, exported_by, measured):
            seen.clear()


@pytest.mark.parametrize(("words", "summary"), [([], True), (["-q"], False)])
def test_quiet_takes_away_the_summary_of_several_exports(words, summary, trained, tmp_path):
    other = train(tmp_path / "base", tmp_path / "other", target_modules=["q_proj"])
    done = run("export", trained, other, "-o", tmp_path / "out", *words)
    assert done.exit_code == 0 and (done.stdout != "") is summary
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["other", "trained"]


@pytest.mark.parametrize("n", [1, 2])
def test_brackets_in_notes_and_commands_are_no_markup(n, trained, tmp_path, monkeypatch):
    def made(_, place, *words, **how):
        return Exported(**PLAIN | dict(path=place, command="serve a[b]c", verify="ask a[b]c", notes=("note a[b]c",)))

    monkeypatch.setattr("lora_init.serving.export.export_adapter", made)
    other = train(tmp_path / "base", tmp_path / "other", target_modules=["q_proj"])
    shown = run("export", *[trained, other][:n], "-o", tmp_path / "out").stdout
    assert shown.count("serve a[b]c") == shown.count("ask a[b]c") == n and ("note a[b]c" in shown) == (n == 1)


def test_an_option_in_the_failure_of_one_of_several_is_written_as_it_is_typed(trained, tmp_path):
    other = train(tmp_path / "base", tmp_path / "other", target_modules=["q_proj"])
    done = run("export", trained, other, "-o", tmp_path / "out", "--rank", 1000)
    assert done.exit_code == 1
    for directory, line in zip((trained, other), done.stderr.splitlines(), strict=True):
        assert line.startswith(f"error: {directory}: --rank 1000: no layer of this adapter can have more than rank ")


def test_where_all_of_several_failed_no_command_is_printed(trained, tmp_path):
    other = train(tmp_path / "base", tmp_path / "other", target_modules=["q_proj"])
    for directory in (trained, other):
        (directory / "adapter_model.safetensors").unlink()
    done = run("export", trained, other, "-o", tmp_path / "out", "--base", tmp_path / "base")
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 2
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [["trained", "failed"], ["other", "failed"]]
