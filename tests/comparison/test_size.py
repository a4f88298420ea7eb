"""How a limit of time makes a comparison smaller, and what it says where none is small enough."""

import re
from dataclasses import replace

import pytest

from lora_init.comparison import compare as comparing
from lora_init.comparison.budget import RunBudget
from lora_init.comparison.outlook import Pace, seconds_of_run, seconds_of_statistics
from lora_init.comparison.runs import RunPlan, read_settings
from lora_init.comparison.size import SIZES, RequestedSize, fit
from lora_init.comparison.tasks import CLASSIFICATION, LoadingOptions
from lora_init.comparison.training import Training
from lora_init.comparison.variants import Variant
from lora_init.progress import duration
from lora_init.rates.learning_rate import LearningRate, Response
from lora_init.rates.training_length import TrainingLength
from tests.comparison.made import compare, set_up_bench
from tests.comparisons import make_home
from tests.conftest import refused

STARTS = [Variant(name) for name in ("random", "eva", "natural-gradient")]
SLOW = Pace(step=10.0, example=0.1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("size"), num_hidden_layers=1)


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
    assert same.tuned and not SIZES[-1].tuned


def test_examples_that_are_cut_are_the_first(home, tmp_path):
    task = set_up_bench(home, tmp_path).task
    small = task.cut(5, 3)
    assert (small.report, small.selection, small.train) == (task.report[:5], task.selection[:3], task.train)
    assert small.data.endswith("; the first 3 to select by and 5 to report are used") and task.cut(12, None) is task


@pytest.mark.slow
def test_a_comparison_in_a_limit_goes_on_at_its_size(home, tmp_path, monkeypatch):
    open_size = dict(steps=None, starts=None, evaluation_points=None, learning_rates=[1e-2], seeds=2)
    monkeypatch.setattr(comparing, "measure", lambda bench: Pace(10.0, 0.1))
    monkeypatch.setattr(comparing, "fit", lambda *_: SIZES[-1])
    found = compare(home, tmp_path / "out", **open_size, time=1e5, dry_run=True)
    assert [start["name"] for start in found.outlook.starts] == ["random", "eva"]
    assert found.settings["steps"] == 24 and found.settings["size"]["tuned"] is False
    first = compare(home, tmp_path / "out", **open_size, time=1e5)
    assert any(note.startswith("The limit of time made this a comparison of 24 steps") for note in first.summary.notes)
    again = compare(home, tmp_path / "out", **open_size)
    assert len(again.records) == len(first.records) and read_settings(tmp_path / "out")["steps"] == 24


def test_a_refused_limit_says_what_each_lever_saves(lay_out):
    said = refused("there is no answer", fit, lay_out, SLOW, RunBudget(1.0), True)
    assert fit(lay_out, SLOW, RunBudget(1.0), False) is SIZES[0]  # of a comparison whose steps were asked for
    assert re.search(r"seeds=2 saves [\d.]+ \w+", said) and re.search(r"steps=12 saves [\d.]+ \w+", said)


@pytest.mark.parametrize(("steps", "points", "size", "expected"), [
    (None, None, SIZES[0], [0, 25, 50, 75, 100]),
    (6, None, SIZES[0], [0, 2, 3, 4, 6]),
    (None, None, SIZES[-1], [0, 24]),
    (6, [5, 3, 6], SIZES[-1], [0, 3, 5, 6]),
    (6, [], SIZES[0], [0, 6]),  # none between was asked for
])  # fmt: skip
def test_a_loss_is_measured_every_quarter_or_where_it_was_asked_for(steps, points, size, expected):
    requested = RequestedSize(LoadingOptions(), steps, 4, 0.1, points)
    assert requested.training(size) == Training(expected[-1], 4, 0.1, expected)


def test_what_is_asked_for_of_the_folds_is_not_cut():
    for asked, expected in (
        ({}, (64, 32)),
        ({"report_samples": 9}, (None, 32)),
        ({"selection_samples": 9}, (64, None)),
    ):
        assert RequestedSize(LoadingOptions(**asked), None, 4, 0.1, None).folds(SIZES[-1]) == expected


def test_the_start_that_is_recommended_for_the_task_is_the_first_to_stay(lay_out):
    bench, plan = lay_out(SIZES[0])
    assert plan.starts == STARTS[:3] and plan.tuned
    of_classes = replace(bench, task=replace(bench.task, kind=CLASSIFICATION))
    for asked, size, kept in (
        (bench, SIZES[0], ["random", "eva", "natural-gradient"]), (bench, SIZES[-1], ["random", "eva"]),
        (of_classes, SIZES[-1], ["random", "natural-gradient"]),
    ):  # fmt: skip
        assert RequestedSize._first_bases(asked, plan, size) == kept


def test_a_size_fits_if_a_tenth_more_than_it_takes_is_left(lay_out, monkeypatch):
    bench, plan = lay_out(SIZES[-1])
    runs = replace(plan, seeds=[0, 1, 2]).runs(plan.starts, {})
    # Beside them a rate beyond the edge on two seeds, random for twice the steps on three, and the best adapter.
    needed = (len(runs) + 2 + 2 * 3 + 1) * seconds_of_run(bench, SLOW) + seconds_of_statistics(bench, SLOW, runs)
    spent = 2.0 * needed  # which the least time is told with
    monkeypatch.setattr("lora_init.comparison.budget.time.monotonic", lambda: spent)
    assert fit(lay_out, SLOW, RunBudget(spent + 1.1001 * needed, began=0.0), True) == SIZES[-1]
    said = refused("", fit, lay_out, SLOW, RunBudget(spent + 1.0999 * needed, began=0.0), True)
    least = f"about {duration(3.1 * needed)}: random, eva, 24 steps of 10 s a run, 3 seeds. "
    assert f"there is no answer: the least time for one is {least}" in said
    assert said.endswith("Or give it that by time=, shorten examples by max_length=, take fewer in a batch by "
                         "batch_size=, or choose a smaller model.")  # fmt: skip


@pytest.mark.parametrize("rates", [[], [1e-4, 1e-3]])
@pytest.mark.parametrize("pace", [SLOW, Pace(step=0.01, example=10.0)], ids=["steps take long", "scoring does"])
def test_what_saves_time_is_named_the_most_first(lay_out, pace, rates):
    bench, plan = lay_out(SIZES[-1])
    plan = replace(plan, learning_rates=rates)
    half = replace(bench, training=replace(bench.training, steps=12, evaluation_points=[0, 12]))

    def seconds(bench, plan, n):
        runs = replace(plan, seeds=plan.seeds[:n]).runs(plan.starts, {})
        return (len(runs) + 2 + 2 * n + 1) * seconds_of_run(bench, pace) + seconds_of_statistics(bench, pace, runs)

    needed = seconds(bench, plan, 3)
    saved = {
        "a single one of learning_rates=": needed - seconds(bench, replace(plan, learning_rates=[2e-3]), 3),
        "seeds=2": needed - seconds(bench, plan, 2), "steps=12": needed - seconds(half, plan, 3),
    }  # fmt: skip
    names = sorted(saved, key=saved.get, reverse=True)
    said = refused("there is no answer", fit, lambda size: (bench, plan), pace, RunBudget(1.0), True)
    assert f". {', '.join(f'{name} saves {duration(1.1 * saved[name])}' for name in names)}. Or give it that" in said


def test_what_was_measured_of_other_examples_is_measured_again(home, tmp_path):
    bench = set_up_bench(home, tmp_path)
    bench._before[0] = "of all examples"
    requested = RequestedSize(LoadingOptions(selection_samples=8), None, 4, 0.1, None)
    small, plan = requested.lay_out(
        bench, RunPlan(STARTS[:2], [1e-4], range(3), "halving"), replace(SIZES[-1], report=5)
    )
    assert (len(small.task.report), len(small.task.selection), small._before) == (5, 8, {}) and plan.tuned
    assert bench._before and (bench.training.steps, len(bench.task.report)) == (6, 12)
