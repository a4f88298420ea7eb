"""What `lora-init init` runs on: which words go together, and what is refused before anything is read."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_init.adapters.init_config import InitConfig
from lora_init.cli import source
from lora_init.cli.console import Running
from lora_init.cli.options import LoadingQuantized
from lora_init.cli.source import Names
from lora_init.collection.collect import OtherSettingsError
from lora_init.errors import LoraInitError
from lora_init.starts.starts import STARTS
from tests.conftest import refused


@pytest.fixture(autouse=True)
def said(monkeypatch):
    """Lines that were said; and no option is on a command line."""
    lines = []
    monkeypatch.setattr(source, "say", lines.append)
    monkeypatch.setattr("lora_init.cli.console.running", Running())
    return lines


def names(data="d", file=None, ranks_from=None, overwrite=False):
    return Names("m", data, Path("out"), overwrite, file, ranks_from)


def stored(path="s", **provenance):
    made = dict(gradients=False, settings={}, rho=2.0, rank=4, seed=3, complete=True, data="chat", n_batches=5,
                fingerprint="f", model_class="Llama", model_id="tiny")  # fmt: skip
    return SimpleNamespace(path=path, provenance=SimpleNamespace(**made | provenance))


@pytest.mark.parametrize(("data", "made", "of_classes"), [
    (None, dict(gradients=True, settings={"classes": ["a"]}), True), (None, dict(gradients=True), False),
    (None, dict(settings={"classes": ["a"]}), False), ("d", dict(gradients=True, settings={"classes": ["a"]}), False),
    (None, None, False),
])  # fmt: skip
def test_statistics_of_classes_count_where_there_are_no_data(data, made, of_classes):
    assert source.are_of_classes(names(data), None if made is None else stored(**made)) is of_classes


@pytest.mark.parametrize(("data", "made", "ranks_from", "asked", "expected"), [
    ("d", None, False, {}, (8, None, 2.0)), ("d", None, False, {"rho": 3.0}, (8, None, 3.0)),
    ("d", {"rho": 5.0}, False, {}, (8, None, 5.0)), ("d", {"rho": None}, False, {}, (8, None, 2.0)),
    (None, {"rho": 1.5}, False, {"rank": 3}, (3, ("ranks of", 3, 1.0), 1.5)),
    ("d", None, True, {}, (6, "plan", 2.5)), ("d", {"rho": 3.0}, True, {}, (4, "plan", 3.0)),
    (None, {"rho": 3.0}, True, {}, (4, "plan", 3.0)),
])  # fmt: skip
def test_a_pass_keeps_as_much_as_the_plan_the_file_and_the_options_need(
    data, made, ranks_from, asked, expected, monkeypatch
):
    class Plan(dict):
        rank = 6

    plan, stats = Plan(a=15, b=3), None if made is None else stored(**made)
    monkeypatch.setattr(source, "check", lambda config, **_: None)
    monkeypatch.setattr(source, "find_device", lambda device: None)
    monkeypatch.setattr(source, "load_plan", lambda path: plan)
    monkeypatch.setattr(
        source, "allocate_ranks", lambda given, *words: ("ranks of", *words) if given is stats else None
    )
    config = InitConfig().with_options(**{"rank": 8} | asked)
    found, known, rho = source.check_named(
        names(data, ranks_from=Path("p") if ranks_from else None), config, stats, "cpu"
    )
    assert (found.ranks.rank, "plan" if known is plan else known, rho) == expected


def test_what_is_checked_first_are_the_options_and_the_device(monkeypatch):
    asked = []
    monkeypatch.setattr(source, "check", lambda config, **how: asked.append(how))
    monkeypatch.setattr(source, "find_device", asked.append)
    source.check_named(names(overwrite=True), InitConfig(), None, "cuda:7")
    assert asked == [{"output": Path("out"), "overwrite": True}, "cuda:7"]
    config = replace(InitConfig(), start=next(one for one in STARTS if one.name == "lora-one"))
    line = "^--method lora-one finds the size of its step by the loss on examples, and DATA is missing.$"
    refused(line, source.check_named, names(None), config, None, "cpu")


@pytest.mark.parametrize("option", ["rank", "rho"])
def test_a_plan_has_all_ranks(option, monkeypatch):
    monkeypatch.setattr("lora_init.cli.console.running", Running(options={option: (f"--{option}", "")}, given={option}))
    monkeypatch.setattr(source, "load_plan", lambda path: pytest.fail("read"))
    line = "^--ranks names a plan, which has all ranks. Leave --rank and --rho out.$"
    refused(line, source.check_named, names(ranks_from=Path("p")), InitConfig(), None, "cpu")


@pytest.mark.parametrize(("data", "there", "named", "line"), [
    ("d", True, True, "loaded"), ("d", False, True, None), ("d", False, False, None), (None, True, True, "loaded"),
    (None, False, False, "DATA is missing. Name it, or name with --statistics a file that exists."),
    (None, False, True, "--statistics {}: no such file. Name one that exists, or DATA to make it from."),
])  # fmt: skip
def test_statistics_are_read_if_they_are_there_and_needed_without_data(data, there, named, line, tmp_path, monkeypatch):
    file, checked = tmp_path / "s", []
    if there:
        file.touch()
    monkeypatch.setattr(source.Statistics, "load", lambda path: "loaded" if path == file else None)
    monkeypatch.setattr(source, "check_writable", lambda *words, **how: checked.append((*words, how)))
    asked = names(data, file if named else None)
    if line in (None, "loaded"):
        assert source.find_statistics(asked, InitConfig()) == line
        assert checked == ([(file, {"overwrite": True, "kind": "statistics file"})] if data and named else [])
    else:
        with pytest.raises(LoraInitError) as caught:
            source.find_statistics(asked, InitConfig())
        assert str(caught.value) == line.format(file)


@pytest.mark.parametrize(("option", "idle"), [
    ("template", True), ("samples", True), ("max_batches", True), ("token_mask", True), ("seed", False),
    ("dtype", False),
])  # fmt: skip
def test_without_data_what_is_about_reading_is_idle(option, idle, tmp_path, monkeypatch):
    (tmp_path / "s").touch()
    monkeypatch.setattr(source.Statistics, "load", lambda path: "loaded")
    monkeypatch.setattr("lora_init.cli.console.running", Running(options={option: ("--it", "")}, given={option}))
    if idle:
        line = f"^--it: without DATA nothing is read; {tmp_path / 's'} is used as it is. Leave it out.$"
        refused(line, source.find_statistics, names(None, tmp_path / "s"), InitConfig())
    else:
        assert source.find_statistics(names(None, tmp_path / "s"), InitConfig()) == "loaded"


ABOUT = "s is not about the layers that --target-modules and --target-parameters select: "


@pytest.mark.parametrize(("made", "layers", "given", "line"), [
    ({}, "abc", "", None), ({}, "abc", "dtype", None), ({"settings": {"dtype": "bfloat16"}}, "abc", "", None),
    ({"settings": {"dtype": "float32"}}, "abc", "dtype", None),
    ({"settings": {"dtype": "bfloat16"}}, "abc", "dtype", "s was made in bfloat16. Leave --dtype out, or name DATA."),
    ({"fingerprint": "x"}, "abc", "", "s was made from another model (Llama tiny). Name the file of this one."),
    ({"fingerprint": "x", "model_id": ""}, "abc", "", "s was made from another model (Llama). Name the file of this "),
    ({"settings": "odd"}, "abc", "", "s was made from this model with rope 1 instead of 2. Make it anew: name DATA."),
    ({}, "c", "", f"{ABOUT}2 are missing, 0 too many. Select those that it is about."),
    ({}, "bxyzc", "", f"{ABOUT}1 are missing, 3 too many. Select those that it is about."),
])  # fmt: skip
def test_a_file_is_for_the_model_that_it_was_made_from_and_its_layers(made, layers, given, line, monkeypatch):
    class Stats(list):
        path, provenance, unsupported = "s", stored(**made).provenance, {"c": "Embedding"}

    monkeypatch.setattr(source, "fingerprint", lambda model: "f")
    monkeypatch.setattr(source, "model_config", lambda model: "config")
    monkeypatch.setattr(source, "dtype_of", lambda model: "float32")
    monkeypatch.setattr(source, "differing_config", lambda made, now: "rope 1 instead of 2" if made == "odd" else "")
    targets = SimpleNamespace(layers={"a": 1, "b": 1}, unsupported={"c": "Embedding"})
    monkeypatch.setattr(source, "find_targets", lambda model, **_: targets)
    running = Running(options={"dtype": ("--dtype", "")}, given={given} - {""})
    monkeypatch.setattr("lora_init.cli.console.running", running)
    call = (Stats(layers[:-1]), torch.nn.Linear(1, 1), InitConfig())
    if line is None:
        source._check_made_for(*call)
    else:
        with pytest.raises(LoraInitError) as caught:
            source._check_made_for(*call)
        assert str(caught.value).startswith(line)


KEPT = "s: kept the statistics of 3 batches. The same command goes on after them."
FOUND = "nothing was kept: the pass had found nothing yet. The same command begins anew."
KEEPS = "nothing was kept: --statistics FILE keeps what a pass has found. The same command begins anew."


@pytest.mark.parametrize(("file", "kept", "error", "lines"), [
    ("s", 3, KeyboardInterrupt, [KEPT]), ("s", 3, ValueError, [KEPT]), ("s", None, KeyboardInterrupt, [FOUND]),
    (None, None, KeyboardInterrupt, [KEEPS]), (None, 3, ValueError, [KEEPS]), ("s", None, ValueError, []),
    (None, None, ValueError, []),
])  # fmt: skip
def test_what_is_kept_of_a_pass_that_was_stopped_is_said(file, kept, error, lines, said):
    stop = error("stop")
    if kept is not None:
        stop.statistics = stored(n_batches=kept)
    with pytest.raises(error), source._saying_what_is_kept(file and Path(file)):
        raise stop
    assert said == lines


@pytest.mark.parametrize(("made", "line"), [
    ({}, "s: used as it is (chat; 5 batches)"), ({"data": ""}, "s: used as it is (data not described; 5 batches)"),
    ({"complete": False}, "s: used as it is (chat; 5 batches, of a pass that was interrupted)"),
])  # fmt: skip
def test_a_file_that_is_used_as_it_is_is_named(made, line, said):
    source._say_used(stored(**made))
    assert said == [line]


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("refuses", [False, True])
def test_a_file_of_other_settings_is_written_anew_only_if_asked(refuses, overwrite, quiet, said, monkeypatch, tmp_path):
    asked, file = [], tmp_path / "s"
    file.touch()

    def collect(model, examples, config, rho):
        asked.append((model, examples, rho, config.run.overwrite, config.run.statistics, config.run.progress))
        if refuses and not config.run.overwrite:
            raise OtherSettingsError("It differs.")
        return stored(file), config

    monkeypatch.setattr(source, "collect_for", collect)
    monkeypatch.setattr(source, "running", Running(quiet=quiet))
    collected = ("model", "examples", InitConfig(), None, 2.0)
    call = (names(file=file, overwrite=overwrite), *collected)
    first = ("model", "examples", 2.0, False, file, False if quiet else None)
    if refuses and not overwrite:
        line = "Pass --overwrite to collect again, or leave DATA out to use the file as it is.$"
        refused(line, source.collect_named, *call)
    else:
        source.collect_named(*call)
        assert said == [f"{file}: used as it is (chat; 5 batches)"]  # for nobody has written it
    assert asked == [first, (*first[:3], True, *first[4:])][: 2 if refuses and overwrite else 1]


def test_the_time_of_a_file_is_known_if_it_is_there(tmp_path):
    (tmp_path / "s").touch()
    assert source._time_written(tmp_path / "s") == (tmp_path / "s").stat().st_mtime_ns
    assert source._time_written(None) is source._time_written(tmp_path / "none") is None


def opening(monkeypatch, task_type="CAUSAL_LM", **more):
    """Let a model be opened without one; return what was asked for."""
    asked = []
    opened = SimpleNamespace(
        task_type=task_type, check_quantized=lambda *words, **how: asked.append((*words, how)), empty=lambda: None,
        tokenizer="tokenizer", seq2seq=False, classes=("x",), **more,
    )  # fmt: skip
    monkeypatch.setattr(source, "open_model", lambda *words, **how: asked.append((*words, how)) or opened)
    return asked, opened


@pytest.mark.parametrize(("label", "task_type", "gradient", "data", "opened", "line"), [
    (None, None, False, "d", "CAUSAL_LM", None), ("k", None, True, "d", "SEQ_CLS", None),
    ("k", "SEQ_CLS", True, "d", "SEQ_CLS", None), (None, "SEQ_CLS", True, None, "SEQ_CLS", None),
    (None, "SEQ_CLS", False, "d", "SEQ_CLS", None), (None, None, True, "d", "CAUSAL_LM", None),
    ("k", "CAUSAL_LM", False, "d", None,
     "--label makes this a classification, and --task-type CAUSAL_LM does not. Give one."),
    (None, None, True, "d", "SEQ_CLS",
     "gradients for the task type SEQ_CLS need classes, not texts alone. Name their column: --label COLUMN."),
    (None, None, True, "d", "TOKEN_CLS",
     "gradients for the task type TOKEN_CLS need classes, not texts alone. Use initialize() in Python."),
])  # fmt: skip
def test_a_model_is_opened_for_classes_where_the_data_have_them(
    label, task_type, gradient, data, opened, line, monkeypatch
):
    asked, model = opening(monkeypatch, opened)
    config = InitConfig().with_options(label=label, task_type=task_type, gradients=gradient)
    loading = LoadingQuantized(quantize="nf4", trust_remote_code=True)
    if line is None:
        assert source._open(names(data), config, loading) is model
        how = {"task_type": "SEQ_CLS" if label else task_type, "trust_remote_code": True}
        assert asked == [("m", how), ("nf4", {"needed": False})]
    else:
        with pytest.raises(LoraInitError) as caught:
            source._open(names(data), config, loading)
        assert str(caught.value) == line


@pytest.mark.parametrize(("data", "stored_rows", "rows"), [("d", None, 30), (None, 50, 50), (None, None, None)])
def test_data_are_read_for_the_model_and_the_length_is_planned_of_their_rows(
    data, stored_rows, rows, monkeypatch, said
):
    opening(monkeypatch)
    read, planned = [], []
    batches = SimpleNamespace(settings={"rows": 30})
    examples = SimpleNamespace(data="chat, 30 rows")
    monkeypatch.setattr(source, "read", lambda *words: read.append(words) or (batches, "beyond"))
    monkeypatch.setattr(source, "split", lambda *words: read.append(words) or examples)
    config = InitConfig()
    training = SimpleNamespace(plan=lambda rows: planned.append(rows) or "length")
    stats = None if data or stored_rows is None else stored(settings={"rows": stored_rows})
    opened, found = source.read_named(names(data), config, LoadingQuantized(), stats, training)
    assert found.layers.task_type == "CAUSAL_LM" and planned == [rows] and opened.length == "length"
    if data is None:
        assert opened.examples == source.Examples(None) and read == [] and said == []
    else:
        assert read == [("d", "tokenizer", found, False, ("x",)), (batches, "beyond", found.measures)]
        assert opened.examples is examples and said == ["data: chat, 30 rows"]


def test_what_layers_cannot_do_is_refused_before_the_data_are_read(monkeypatch):
    asked = []
    _, opened = opening(monkeypatch)
    opened.empty = lambda: "empty"
    targets = SimpleNamespace(layers={"a": 1})
    monkeypatch.setattr(source, "find_targets", lambda model, **how: asked.append((model, how)) or targets)
    for name in ("check_targets", "check_experts", "check_modules_to_save"):
        monkeypatch.setattr(source, name, lambda *words, name=name: asked.append((name, *words)))
    config = InitConfig().with_options(rank=3, modules_to_save=["x"], target_modules=["q"])
    source.read_named(names(None), config, LoadingQuantized(), None, SimpleNamespace(plan=lambda rows: None))
    (model, how), targeted, (name, experts, shape), saved = asked
    assert (model, how["target_modules"], targeted) == ("empty", ["q"], ("check_targets", "empty", targets, 3))
    assert (name, [*experts], shape) == ("check_experts", [1], config.shape)
    assert saved == ("check_modules_to_save", "empty", ["x"])


@pytest.mark.parametrize(("data", "classes", "made", "asked"), [
    ("d", ("a", "b"), None, {"seed": 5, "n_labels": 2}), ("d", (), None, {"seed": 5, "n_labels": None}),
    (None, (), {"settings": {"classes": ["a"]}, "seed": 3}, {"seed": 3, "n_labels": 1}),
    (None, (), {"seed": 3}, {"seed": 3, "n_labels": None}),
    ("d", ("a", "b"), {"settings": {"classes": ["a"]}, "seed": 3}, {"seed": 5, "n_labels": 2}),
])  # fmt: skip
@pytest.mark.parametrize("planned", [False, True])
def test_a_head_is_that_of_the_classes_and_a_plan_is_for_this_model(data, classes, made, asked, planned, monkeypatch):
    checked, fitted = [], []
    loaded = SimpleNamespace(model=torch.nn.Linear(1, 1), drawn="drawn")
    loading = SimpleNamespace(load=lambda model, **how: loaded if (model, how) == ("opened", asked) else None)
    opened = SimpleNamespace(model="opened", examples=SimpleNamespace(classes=classes))
    monkeypatch.setattr(source, "fit_to", lambda *words: fitted.append(words) or "fitted")
    monkeypatch.setattr(source, "fingerprint", lambda model: "f")
    plan = SimpleNamespace(check_model=lambda *words: checked.append(words))
    config = InitConfig().with_options(seed=5)
    stats = None if made is None else stored(**made)
    call = (names(data, ranks_from=Path("p") if planned else None), opened, config, loading, stats, plan)
    assert source.load_named(*call) == (loaded, "fitted") and fitted == [(loaded.model, config, classes, "drawn")]
    assert checked == ([("f", "Linear m")] if planned else [])


def test_without_data_a_file_is_used_as_it_is_once_it_is_checked(said, monkeypatch):
    checked, stats, config = [], stored(), InitConfig()
    monkeypatch.setattr(source, "_check_made_for", lambda *words: checked.append(words))
    monkeypatch.setattr(source, "collect_for", lambda *_: pytest.fail("collected"))
    assert source.collect_named(names(None), "model", None, config, stats, 2.0) == (stats, config)
    assert checked == [(stats, "model", config)] and said == ["s: used as it is (chat; 5 batches)"]
