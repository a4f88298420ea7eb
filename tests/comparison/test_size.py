"""How a limit of time makes a comparison smaller, and what it says where none is small enough."""

import re

import pytest

from lora_init.comparison import compare as comparing
from lora_init.comparison.budget import RunBudget
from lora_init.comparison.outlook import Pace
from lora_init.comparison.runs import RunPlan, read_settings
from lora_init.comparison.size import SIZES, RequestedSize, fit
from lora_init.comparison.tasks import LoadingOptions
from lora_init.comparison.variants import Variant
from lora_init.rates.learning_rate import LearningRate, Response
from lora_init.rates.training_length import TrainingLength
from tests.comparison.made import compare, set_up_bench
from tests.comparisons import make_home
from tests.conftest import refused

STARTS = [Variant(name) for name in ("random", "eva", "natural-gradient")]
SLOW = Pace(step=10.0, example=0.1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("size"))


@pytest.fixture(scope="module")
def lay_out(home, tmp_path_factory):
    bench = set_up_bench(home, tmp_path_factory.mktemp("bench"))
    rates = {str(start): LearningRate({"layer": Response(1.0, 0.0)}, TrainingLength(100)) for start in STARTS}
    plan = RunPlan(STARTS, [1.0], range(32), "halving")
    requested = RequestedSize(LoadingOptions(), None, 4, 0.1, None, None, rates)
    return lambda size: requested.lay_out(bench, plan, size)


def test_a_shorter_limit_makes_a_smaller_comparison(lay_out):
    chosen = [fit(lay_out, SLOW, RunBudget(hours * 3600), True) for hours in (1000, 24, 12, 6, 4, 3)]
    places = [SIZES.index(size) for size in chosen]
    assert places[0] == 0 and places == sorted(places) and len(set(places)) > 3
    bench, plan = lay_out(SIZES[-1])
    rate = LearningRate({"layer": Response(1.0, 0.0)}, TrainingLength(24)).rate  # of so short a run
    assert (plan.starts, plan.learning_rates, plan.recommended["eva"]) == (STARTS[:2], [], rate)
    assert plan.given_rates(STARTS[1]) == [rate] and len(plan.given_rates(STARTS[0])) == 3
    assert (bench.training.steps, list(bench.training.evaluation_points)) == (24, [0, 24])


def test_what_was_asked_for_stays(home, tmp_path):
    bench = set_up_bench(home, tmp_path)
    plan = RunPlan(STARTS[:2], [1e-4, 1e-3], range(3), "halving")
    requested = RequestedSize(LoadingOptions(report_samples=12), 6, 4, 0.1, [3])
    small, same = requested.lay_out(bench, plan, SIZES[-1])
    assert (small.training.steps, list(small.training.evaluation_points)) == (6, [0, 3, 6])
    assert (same.starts, same.given_rates(STARTS[1])) == (STARTS[:2], [1e-4, 1e-3])
    assert requested.folds(SIZES[-1]) == (None, 32)


def test_examples_that_are_cut_are_the_first(home, tmp_path):
    task = set_up_bench(home, tmp_path).task
    small = task.cut(5, 3)
    assert (small.report, small.selection, small.train) == (task.report[:5], task.selection[:3], task.train)
    assert small.data.endswith("; the first 3 to select by and 5 to report are used") and task.cut(12, None) is task


def test_a_comparison_in_a_limit_goes_on_at_its_size(home, tmp_path, monkeypatch):
    open_size = dict(steps=None, starts=None, evaluation_points=None, learning_rates=[1e-3, 1e-2])
    monkeypatch.setattr(comparing, "measure", lambda bench: Pace(10.0, 0.1))
    monkeypatch.setattr(comparing, "fit", lambda *_: SIZES[-1])
    found = compare(home, tmp_path / "out", **open_size, time=1e5, dry_run=True)
    assert [start["name"] for start in found.outlook.starts] == ["random", "eva"]
    assert found.settings["steps"] == 24 and found.settings["size"]["tuned"] is False
    first = compare(home, tmp_path / "out", **open_size, time=1e5, seeds=3)
    assert any(note.startswith("The limit of time made this a comparison of 24 steps") for note in first.summary.notes)
    again = compare(home, tmp_path / "out", **open_size, seeds=3)
    assert len(again.records) == len(first.records) and read_settings(tmp_path / "out")["steps"] == 24


def test_a_refused_limit_says_what_each_lever_saves(lay_out):
    said = refused("there is no answer", fit, lay_out, SLOW, RunBudget(1.0), True)
    assert fit(lay_out, SLOW, RunBudget(1.0), False) is SIZES[0]  # of a comparison whose steps were asked for
    assert re.search(r"seeds=2 saves [\d.]+ \w+", said) and re.search(r"steps=12 saves [\d.]+ \w+", said)
