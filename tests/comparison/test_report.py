"""report.html, report.md and pictures: every number is in them, nothing from outside; and the adapter in best/."""

import dataclasses
import json
import math
import re
from concurrent.futures import Future
from html.parser import HTMLParser

import pandas as pd
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_init.adapters.directory import card_header
from lora_init.comparison import workbench
from lora_init.comparison.findings import summarise
from lora_init.comparison.report import describe_directory, keep_best, write_report
from lora_init.comparison.runs import Run, RunDirectory, read_runs
from lora_init.comparison.tables import _steps_cell, run_tables
from lora_init.comparison.training import evaluate
from tests.comparison.made import compare, set_up_bench
from tests.comparisons import broken, exact, planted, record, settings, write
from tests.conftest import refused

HOSTILE = '<script>alert("1")</script>|*_$x^2$'


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on tags that do not match."""

    VOID = ("meta", "br", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    runs = planted({"eva": -0.01, HOSTILE: 0.004})
    folder = write(tmp_path_factory.mktemp("full"), runs, note=HOSTILE, model=HOSTILE, lines="one\n\n# two\n| three")
    return runs, folder, write_report(folder)


@pytest.mark.slow
def test_the_page_has_every_run_and_every_setting_and_needs_nothing_else(full):
    runs, folder, files = full
    text = (folder / "report.html").read_text()
    page = Page(text)
    words = " ".join(page.words)
    for run in runs:
        for loss in run["report_loss"]:
            assert f"{loss:.4f}" in words
    for setting in ("2.13.0", "lora-init compare tiny/model siqa.jsonl", "fingerprint", "siqa.jsonl, 800 rows"):
        assert setting in words
    assert not {"script", "link", "iframe", "object"} & set(page.tags) and "To cite it: CITATION.cff" in words
    assert len(page.links) == sum(file.suffix == ".png" for file in files)
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert "url(" not in text and "@import" not in text


def test_text_from_users_is_text_everywhere(full):
    _, folder, _ = full
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert" in page
    markdown = (folder / "report.md").read_text()
    assert "<script" not in markdown.replace("\\<script", "")
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) >= 3 for row in rows)
    hostile = [row for row in rows if "script" in row]
    assert hostile
    assert all(r"\|\*\_" in row for row in hostile)
    assert r"| lines | one \# two \| three |" in rows


SECTIONS = {
    "Difference to random": "start, difference, in per cent, interval, detectable, pairs, verdict",
    "At equal steps": "",
    "At equal total time": "",
    "Forgetting at equal task loss": "",
    "Learning curves": "",
    "Final loss by learning rate": "start, 1e-4, 3e-4, 1e-3, 3e-3",
    "Each start at its best rate": "start, rate, lora_alpha, runs, mean loss, lowest to highest, steps to random's "
    "best, loss at step 0",
    "Metrics": "start, accuracy, accuracy, start − random, macro F1, macro F1, start − random, MCC, MCC, start − "
    "random",
    "Cost": "start, parameters, scale of A, start, s, start, in steps, training, s, peak, MB",
    "Forgetting": "start, retained before, retained after, change",
    "Every run": "start, rate, seed, status, loss, accuracy, macro F1, MCC, retained, training, s",
    "Settings": "setting, value",
}


def test_each_section_and_column_has_the_name_by_which_a_reader_finds_it(full):
    """A change of a name shows here: scripts read the tables, and pages of this project point to sections."""
    markdown = (full[1] / "report.md").read_text().replace("\\_", "_")
    found = {}
    for section in markdown.split("\n## ")[1:]:
        head = next((line for line in section.splitlines() if line.startswith("|")), "")
        found[section.partition("\n")[0]] = ", ".join(cell.strip() for cell in head.split("|")[1:-1])
    assert found == SECTIONS and list(found) == list(SECTIONS)


# best/: the trained adapter of the best start, the very one of its run, never replaced unasked


@pytest.mark.slow
def test_the_adapter_of_the_best_start_is_kept_once_and_not_replaced(home, tmp_path, monkeypatch):
    lines, out = [], tmp_path / "out"
    found = compare(home, out, starts=["random", "orthogonal"], learning_rates=[1e-2], say=lines.append)
    kept = json.loads((out / "best" / "run.json").read_text())
    twin = next(run for run in found.records if Run.of(run) == Run.of(kept))
    assert kept["report_loss"] == twin["report_loss"] and kept["start"] == found.summary.start == "random"
    assert twin["selection_loss"] == min(run["selection_loss"] for run in found.records if run["start"] == "random")
    bench = set_up_bench(home, tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "llama"), out / "best")
    assert evaluate(model, bench.task, bench.task.report).loss == pytest.approx(kept["report_loss"][-1], rel=1e-5)
    card = (out / "best" / "README.md").read_text()
    assert "library_name: peft" in card and "`random` on" in card and "No start is shown to be better" in card
    assert sum(line.startswith("run ") for line in lines) == len(lines) - 1 == len(found.records)
    # Another best run leaves it as it is, and says so.
    before = {file.name: file.read_bytes() for file in (out / "best").iterdir()}
    (out / "best" / "run.json").write_text(json.dumps(kept | {"start": "eva"}))
    monkeypatch.setattr(workbench, "train", None)  # nothing is trained
    compare(home, out, starts=["random", "orthogonal"], learning_rates=[1e-2], say=lines.append)
    assert f"holds eva, 0.01, seed {kept['seed']} and stays; the best is now random, 0.01, seed" in lines[-1]
    after = {file.name: file.read_bytes() for file in (out / "best").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"run.json"}


class Chosen(Exception):
    """Which run is trained once more."""


class Chooser:
    """A worker that trains nothing."""

    def submit(self, run, title, keep):
        raise Chosen(run.seed, keep)


def test_the_run_that_is_kept_is_chosen_by_the_examples_to_select_by(tmp_path):
    """Those to report are looked at by nobody before the report, or the figure of what is kept would be too good."""
    runs = planted({"eva": -0.01}, rates=(1e-3,))
    for run in runs:
        run["selection_loss"] += {0: 0.1, 1: 0.0, 2: 0.2}[run["seed"]]
        run["report_loss"] = [loss + {0: 0.0, 1: 0.2, 2: 0.1}[run["seed"]] for loss in run["report_loss"]]
    log = RunDirectory(tmp_path, settings(), {Run.of(run): run for run in runs})
    with pytest.raises(Chosen, match=r"^\(1, True\)$"):
        keep_best(log, Chooser(), print)


class Done(Chooser):
    """A worker whose training ends with this record or exception."""

    def __init__(self, outcome):
        self.outcome = outcome

    def submit(self, run, title, keep):
        future = Future()
        future.set_exception(self.outcome) if isinstance(self.outcome, Exception) else future.set_result(self.outcome)
        return future


def kept(folder, runs, worker, **changes):
    """What is told while the best adapter is kept, and its files."""
    lines = []
    asked = settings(task_type="CAUSAL_LM", **changes)
    keep_best(RunDirectory(folder, asked, {Run.of(run): run for run in runs}), worker, lines.append)
    return lines, {file.name: file.read_text() for file in folder.glob("best/*")}


def test_an_adapter_of_a_changed_base_is_not_kept(tmp_path):
    lines, files = kept(tmp_path, planted({"pissa": -0.02}, rates=(1e-3,)), Chooser())
    assert lines == ["pissa changes the weights of the model, so its trained adapter is not kept."] and not files
    loftq = planted({"loftq": -0.02}, rates=(1e-3,))
    assert kept(tmp_path, loftq, Chooser())[0][0].startswith("loftq changes the weights")
    with pytest.raises(Chosen):  # where the base is quantized it changes no weight
        kept(tmp_path, loftq, Chooser(), quantisation={"load_in_4bit": True})


def test_a_best_adapter_that_cannot_be_made_is_told_and_leaves_nothing(tmp_path):
    runs = planted({"eva": -0.02}, rates=(1e-3,))
    said = "best died. The same command makes it. gone.$"
    refused(f"^the worker that trained .*{said}", kept, tmp_path, runs, Done(RuntimeError("gone")))
    for outcome in (broken("failed", "no room"), broken("unstable", "no room")):
        assert kept(tmp_path, runs, Done(outcome)) == ([f"{tmp_path / 'best'} is not made: no room"], {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("model", "quantized"), [("tiny/model", {"load_in_4bit": True}), ("model", None)])
def test_the_card_of_the_best_adapter_names_its_base_and_how_that_was_loaded(model, quantized, tmp_path):
    done = record("eva", adapter={"adapter_config.json": b"{}"})
    lines, files = kept(
        tmp_path, planted({"eva": -0.02}, rates=(1e-3,)), Done(done), model=model, quantisation=quantized
    )
    assert not lines and set(files) == {"adapter_config.json", "run.json", "README.md"}
    assert json.loads(files["run.json"]) == {key: value for key, value in done.items() if key != "adapter"}
    assert re.findall("^base_model: .*", files["README.md"], re.M) == ["base_model: tiny/model"] * ("/" in model)
    loaded = f"The base was quantized, and must be for this adapter: quantization_config={quantized}."
    assert (loaded in files["README.md"]) == ("The base was quantized" in files["README.md"]) == bool(quantized)
    assert "\nNone\n" not in files["README.md"]


def test_a_run_has_one_mean_in_all_tables(tmp_path):
    runs = [one for one in planted({"eva": 0.0}, noise=0.02) if one["seed"] < 2 or one["learning_rate"] == 1e-3]
    tables = run_tables(summarise(runs, settings(sweep="halving")))
    best, rates = (tables[name].set_index("start") for name in ("best", "learning_rates"))
    assert list(best["runs"]) == ["3", "3"] and [cell.rstrip("*") for cell in rates["1e-3"]] == list(best["mean loss"])


def test_the_run_that_sets_the_target_reaches_it():
    losses = [[3.0, 2.0, 1.0], [3.0, 1.0, 0.5], [3.0, 2.0, 2.0]]
    runs = pd.DataFrame({"evaluation_points": [[0, 2, 4]] * 3, "report_loss": losses})
    assert _steps_cell(runs, 1.0) == "4, 2, never" and _steps_cell(runs, math.nan) == "–"


def test_a_comparison_is_described_in_plain_values(tmp_path):
    folder = write(tmp_path / "out", exact())
    described, found = describe_directory(folder), summarise(read_runs(folder), settings())
    said = ("facts", "answer", "caveats", "command", "headline", "headroom", "as_recommended", "equal_time",
            "forgetting", "data_needed", "notes")  # fmt: skip
    assert described == {name: getattr(found, name) for name in said} | {
        "what": "comparison", "path": str(folder), "settings": settings(),
        "runs": {"finished": 49, "unstable": 2, "failed": 2},
        "verdicts": [dataclasses.asdict(verdict) for verdict in found.verdicts],
    }  # fmt: skip
    json.dumps(described)


def test_the_card_says_what_was_trained_and_what_was_found(tmp_path):
    runs = planted({"eva": -0.02}, rates=(1e-3,))
    _, files = kept(tmp_path, runs, Done(record("eva", seed=2, adapter={"adapter_config.json": b"{}"})))
    found = summarise(runs, settings())
    assert (
        files["README.md"]
        == f"""{card_header("tiny/model", "CAUSAL_LM")}
# The best start of a comparison, trained

`eva` on siqa: rank 8, learning rate 1e-3, 60 steps of 2 examples, seed 2. Loss on the examples to report: 0.1700, \
2.3000 of the plain model.

{" ".join([found.answer, *found.caveats, found.headroom])}

{found.facts}

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "best")
```


Compared by lora_init; the runs are beside this directory, the one of this adapter in `run.json`.
"""
    )


def test_the_report_tells_of_the_adapter_that_is_kept_where_it_is_of_the_start_to_use(tmp_path, monkeypatch):
    drawn = {"differences": {"svg": b"<svg>", "png": b"png"}}
    monkeypatch.setattr("lora_init.comparison.report.pictures", lambda summary: drawn)
    folder = write(tmp_path / "out", planted({"eva": -0.02}, rates=(1e-3,)))
    (folder / "best").mkdir()
    for start, holds in ((None, False), ("eva", True), ("random", False)):
        if start:
            (folder / "best" / "run.json").write_text(json.dumps({"start": start}))
        assert write_report(folder) == [folder / name for name in ("differences.png", "report.md", "report.html")]
        assert ("best/ holds the trained adapter of this" in (folder / "report.md").read_text()) == holds
    assert (folder / "differences.png").read_bytes() == b"png"
    assert "data:image/svg+xml;base64,PHN2Zz4=" in (folder / "report.html").read_text()


@pytest.mark.parametrize(("held", "told"), [
    (None, None), ("empty", None),
    ("its run", ""),
    ("eva, 0.01, seed 1", "holds eva, 0.01, seed 1 and stays; the best is now eva, 0.001, seed 1. Remove"),
    ("notes.txt", "holds something else and stays; the best is now eva, 0.001, seed 1. Remove"),
])  # fmt: skip
def test_what_is_in_best_already_is_never_replaced(held, told, tmp_path):
    runs = planted({"eva": -0.02}, rates=(1e-3,))
    for run in runs:
        run["selection_loss"] += run["seed"] != 1
    folder = tmp_path / "best"
    if held is not None:
        folder.mkdir()
        if held == "notes.txt":
            (folder / held).touch()
        elif held != "empty":
            rate = 1e-3 if held == "its run" else 1e-2
            (folder / "run.json").write_text(json.dumps(record("eva", rate, 1)))
    if told is None:
        with pytest.raises(Chosen, match=r"^\(1, True\)$"):
            kept(tmp_path, runs, Chooser())
        return
    lines, _ = kept(tmp_path, runs, Chooser())
    assert [line.startswith(f"{folder} {told} {folder} to have that one made") for line in lines] == [True] * bool(told)


def test_without_a_start_to_use_nothing_is_kept(tmp_path):
    assert kept(tmp_path, [], Chooser()) == ([], {})
    done = record("eva", adapter={})
    told = [f"{tmp_path / 'best'} is not made: eva changes the weights of the model"]
    assert kept(tmp_path, planted({"eva": -0.02}, rates=(1e-3,)), Done(done)) == (told, {})


def test_a_directory_is_found_below_the_home_of_a_user(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_init.comparison.report.pictures", lambda summary: {})
    folder = write(tmp_path / "out", planted({"eva": -0.02}, rates=(1e-3,)))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert describe_directory("~/out")["path"] == str(folder)
    assert write_report("~/out") == [folder / "report.md", folder / "report.html"]
