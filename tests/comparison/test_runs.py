"""Which runs there are, what makes them comparable, and their directory: whole files, never mixed, never lost."""

import itertools
import json
import math
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest

from lora_init.comparison.runs import (
    Run,
    RunPlan,
    _excerpts,
    best_rates,
    by_seed,
    choose_rate,
    half_decade,
    open_runs,
    peek,
    predicted_rate,
    read_runs,
    read_settings,
    run_table,
)
from lora_init.comparison.variants import REFERENCE, Variant
from lora_init.errors import LoraInitError
from lora_init.starts.starts import Start
from tests.comparisons import broken, record, settings
from tests.conftest import refused
from tests.processes import FORKS

RATES, SEEDS = (1e-3, 1e-2), (0, 1, 2)


# The plan


def carry_out(sweep, loss, starts=("random", "eva"), rates=RATES, extend=0):
    """Do what is planned, as compare() does, and return the runs in the order they were done in."""
    starts = [*map(Variant, starts)]
    plan, records, done = RunPlan(starts, rates, SEEDS, sweep, extend), {}, []
    while True:
        planned = plan.runs(starts, records)
        left = [run for run in planned if run not in records]
        if not left:
            return done, planned
        assert left[0].learning_rate is not None
        ends, status = loss(left[0])
        changes = {} if status == "finished" else {"selection_loss": None}
        records[left[0]] = record(left[0].start, left[0].learning_rate, left[0].seed, ends, status=status, **changes)
        done.append(left[0])


def test_halving_sweeps_two_seeds_and_takes_the_best_rate_to_the_others():
    best = {"random": 1e-2, "eva": 1e-3}

    def loss(run):
        # On the first seed alone the other rate would be the best.
        sign = -1 if run.seed == 0 else 2
        return 1.0 + sign * abs(run.learning_rate - best[run.start.base]), "finished"

    done, planned = carry_out("halving", loss)
    assert done[:8] == [Run(Variant(start), seed, rate) for seed in (0, 1) for rate in RATES for start in best]
    assert done[8:] == [Run(Variant(start), 2, rate) for start, rate in best.items()]
    assert planned == done


def test_without_a_list_each_start_has_three_rates_around_its_own():
    own = {"random": 1e-3, "eva": 3e-3}
    plan, records = RunPlan([*map(Variant, (*own, "full"))], [], (0, 1, 2, 3), "halving", 0, recommended=own), {}
    assert [plan.given_rates(start) for start in plan.starts] == [
        [3.3e-4, 1e-3, 3e-3],
        [1e-3, 3e-3, 9e-3],
        [3.3e-5, 1e-4, 3e-4],
    ]
    random, eva, _ = plan.starts
    untuned = replace(plan, tuned=False)
    assert untuned.given_rates(eva) == [3e-3] and len(untuned.given_rates(random)) == 3
    waiting = plan.runs(plan.starts, records)
    assert waiting.count(Run(eva, 3, None)) == waiting.count(Run(eva, 3, 3e-3)) == 1
    for run in waiting:
        if run.learning_rate:
            records[run] = record(run.start, run.learning_rate, run.seed, abs(run.learning_rate - 1e-3))
    planned = plan.runs(plan.starts, records)
    of_eva = [(run.seed, run.learning_rate) for run in planned if run.start == eva]
    assert sorted(of_eva) == [*((seed, rate) for seed in (0, 1) for rate in (1e-3, 3e-3, 9e-3)), (2, 1e-3), (2, 3e-3),
                           (3, 1e-3), (3, 3e-3)]  # fmt: skip
    assert [run.learning_rate for run in planned if run.start == random and run.seed > 1] == [1e-3, 1e-3]


@pytest.mark.parametrize("name", [
    "eva-rho2", "eva-rho2+32-alpha", "eva-rho2+4-batches", "eva-rho2+32-alpha+4-batches", "random-frozen-a", "full",
])  # fmt: skip
def test_a_start_with_equal_parameters_has_the_rates_that_it_has_without(name):
    """What was measured is the start with its lora_alpha and batches. Without rates it would not be run at all."""
    start = Variant.parse(name)
    measured = {"random": 1e-3} | ({name: 2e-4} if name != "full" else {})
    plan = RunPlan([REFERENCE, start], [], SEEDS, "halving", recommended=measured)
    compared = plan.compared(ranks_cost_the_same=False)
    assert compared[2:] == [replace(start, equal_parameters=True)] * (name != "full")
    rate = 1e-4 if name == "full" else 2e-4
    expected = [float(f"{rate * factor:.2g}") for factor in (1 / 3, 1, 3)]
    for one in compared[1:]:
        assert plan.given_rates(one) == expected
    planned = plan.runs(compared, {})
    assert {run.start for run in planned} == {*compared}
    other = Variant.parse("eva-uncentred+8-alpha")
    assert (
        predicted_rate(other, {"eva-uncentred": 0.5, "eva": 0.1}) == 0.5 and predicted_rate(other, {"eva": 0.1}) is None
    )


def test_before_the_sweep_has_ended_the_rates_are_open():
    planned = RunPlan([REFERENCE], RATES, SEEDS, "halving").runs([REFERENCE], {})
    assert [run.learning_rate for run in planned] == [*RATES, *RATES, None]
    assert planned[-1].title == "random, best rate, seed 2"


@pytest.mark.parametrize(("optimum", "tried"), [
    (1e-3, [3e-4, 1e-3, 3e-3]),
    (3e-3, [3e-4, 1e-3, 3e-3, 1e-2]),
    (1.0, [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]),  # twice on a side, no more
    (1e-9, [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]),
])  # fmt: skip
def test_the_grid_grows_while_the_best_rate_is_at_its_edge(optimum, tried):
    def loss(run):
        return abs(math.log(run.learning_rate / optimum)), "finished"

    done, planned = carry_out("halving", loss, ["eva"], (3e-4, 1e-3, 3e-3), extend=2)
    assert sorted({run.learning_rate for run in done}) == tried and set(done) == set(planned)
    assert [run.seed for run in done].count(2) == 1 and len(done) == 2 * len(tried) + 1


@pytest.mark.parametrize(("statuses", "tried"), [
    (["unstable"], [1e-4, 3e-4, 1e-3, 1e-2]),  # a lower rate may be stable
    (["failed"], [1e-3, 1e-2]),  # no rate would help
    (["failed", "failed", "unstable", "failed"], [1e-4, 3e-4, 1e-3, 1e-2]),
])  # fmt: skip
def test_where_no_rate_is_stable_lower_ones_are_tried(statuses, tried):
    status = itertools.cycle(statuses)
    done, planned = carry_out("halving", lambda run: (1.0, next(status)), ["eva"], extend=2)
    assert sorted({run.learning_rate for run in done}) == tried and {run.seed for run in planned} == {0, 1}


def test_a_start_without_a_stable_rate_leaves_the_others_their_other_seeds():
    def loss(run):
        return 1.0, "unstable" if run.start == REFERENCE else "finished"

    done, _ = carry_out("halving", loss)
    assert [(run.start.base, run.learning_rate) for run in done if run.seed == 2] == [("eva", 1e-3)]


def test_a_rate_that_is_unstable_adds_none_where_the_best_one_is_in_the_middle():
    def loss(run):
        return abs(math.log(run.learning_rate / 1e-3)), "unstable" if run.learning_rate == 3e-3 else "finished"

    done, _ = carry_out("halving", loss, ["eva"], (3e-4, 1e-3, 3e-3), extend=2)
    assert {run.learning_rate for run in done} == {3e-4, 1e-3, 3e-3}


def test_of_a_start_that_is_not_tuned_no_other_rate_is_tried():
    own = {"random": 1e-3, "eva": 3e-3}
    plan, records = RunPlan([*map(Variant, own)], [], SEEDS, "halving", 2, own, tuned=False), {}
    for run in plan.runs(plan.starts, records):
        if run.learning_rate:
            records[run] = record(run.start, run.learning_rate, run.seed, abs(math.log(run.learning_rate / 1e-3)))
    planned = plan.runs(plan.starts, records)
    assert {run.learning_rate for run in planned if run.start.base == "eva"} == {3e-3}
    assert {run.learning_rate for run in planned if run.start == REFERENCE} == {3.3e-4, 1e-3, 3e-3}


def test_rates_are_tried_in_rising_order_whatever_order_they_are_given_in():
    plan = RunPlan([REFERENCE, Variant("full")], [3e-3, 1e-3], [7, 4], "full", extend=0)
    assert [plan.given_rates(start) for start in plan.starts] == [[1e-3, 3e-3], [1e-4, 3e-4]]
    of_seed = [("full", 1e-4), ("full", 3e-4), ("random", 1e-3), ("random", 3e-3)]
    planned = plan.runs(plan.starts, {})
    assert [(run.start.base, run.learning_rate) for run in planned] == of_seed * 2
    assert [run.seed for run in planned] == [7] * 4 + [4] * 4


def test_a_start_whose_rate_was_not_measured_has_none_to_be_tried_at():
    plan = RunPlan([REFERENCE, Variant("mine")], [], [0], "full", recommended={"random": 1e-3})
    assert plan.given_rates(REFERENCE) and plan.given_rates(Variant("mine")) == []


def test_a_plan_is_told_in_plain_values(installed):
    installed("lora_init.starts", theirs=Start("theirs", "", function=lambda rank: rank))
    starts = [Variant.parse(name) for name in ("random", "eva+32-alpha", "theirs")]
    assert RunPlan(starts, [1e-3], [0, 2], "full", 3, {"random": 2e-3}, tuned=False).settings() == {
        "starts": ["random", "eva+32-alpha", "theirs"], "learning_rates": [1e-3], "seeds": [0, 2], "sweep": "full",
        "extend": 3, "recommended": {"random": 2e-3}, "tuned": False, "packages": {"theirs": starts[2].start.package},
    }  # fmt: skip
    assert "packages" not in RunPlan(starts[:2], [1e-3], [0], "full").settings()
    both = RunPlan([*map(Variant.parse, ("eva-rho2", "eva-rho2+equal-parameters"))], [1e-3], [0], "full")
    assert both.compared(ranks_cost_the_same=False) == both.compared(ranks_cost_the_same=True) == both.starts


def test_a_run_has_a_title_and_a_file_of_its_own():
    run = Run(Variant.parse("my/own start+32-alpha"), 3, 1e-3)
    assert run.title == "my/own start+32-alpha, 0.001, seed 3"
    assert run.file == "my%2Fown%20start+32-alpha_0.001_seed3.json"
    assert Run.of({"start": "my/own start+32-alpha", "seed": "3", "learning_rate": "1e-3"}) == run


def test_a_single_rate_and_failed_runs_add_no_rates():
    assert {
        run.learning_rate for run in carry_out("halving", lambda run: (1.0, "finished"), rates=[1e-3], extend=2)[0]
    } == {1e-3}
    assert len(carry_out("halving", lambda run: (1.0, "failed"), ["eva"], extend=2)[0]) == 4


def test_full_fine_tuning_has_rates_of_a_tenth():
    done, _ = carry_out("halving", lambda run: (1.0, "finished"), ["random", "full"], (1e-3, 3e-3))
    assert {run.learning_rate for run in done if run.start.base == "full"} == {1e-4, 3e-4}
    plan = RunPlan([Variant("full")], [1.25e-3, 1.234e-2, 3e-3], SEEDS, "halving")
    assert plan.given_rates(Variant("full")) == [1.25e-4, 3e-4, 1.234e-3]


def test_a_start_has_the_rate_of_the_nearest_that_was_measured():
    """That of itself, else that of the same without equal parameters, else that of its base alone."""
    names = ["eva+32-alpha+equal-parameters", "eva+32-alpha", "eva"]
    start, measured = Variant.parse(names[0]), dict(zip(names, (1e-3, 2e-3, 3e-3), strict=True))
    for name in names:
        assert predicted_rate(start, measured) == measured.pop(name)
    assert predicted_rate(start, {"random": 1e-3}) is None


@pytest.mark.parametrize(("rate", "up", "expected"), [
    (2e-4, True, 6e-4), (2e-4, False, 6e-5), (1e-2, True, 3e-2),
    *[(3 * ten, True, 10 * ten) for ten in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)],
    *[(3 * ten, False, ten) for ten in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)],
])  # fmt: skip
def test_half_decades(rate, up, expected):
    assert half_decade(rate, up) == expected


@pytest.mark.parametrize(("unstable_on", "expected"), [
    ((0, 1, 2), [(0, 1e-3), (0, 1e-2), (1, 1e-3), (1, 1e-2), (2, 1e-3)]),
    ((2,), [(0, 1e-3), (0, 1e-2), (1, 1e-3), (1, 1e-2), (2, 1e-2), (2, 1e-3)]),
])  # fmt: skip
def test_a_rate_that_is_unstable_is_not_chosen_or_gives_way_to_the_next(unstable_on, expected):
    def loss(run):
        if run.learning_rate == 1e-2:
            return 0.1, "unstable" if run.seed in unstable_on else "finished"
        return 0.5, "finished"

    done, _ = carry_out("halving", loss, ["eva"])
    assert [(run.seed, run.learning_rate) for run in done] == expected


@pytest.mark.parametrize(("changes", "message"), [
    (dict(learning_rates=[1e-3, 0.0]), r"learning_rates=\[0.001, 0.0\]: expected positive numbers up to 1, each once"),
    (dict(learning_rates=[-1e-3]), r"learning_rates=\[-0.001\]"),
    (dict(learning_rates=[float("nan")]), r"learning_rates=\[nan\]"),
    (dict(learning_rates=[float("inf")]), r"learning_rates=\[inf\]"),
    (dict(learning_rates=[]), r"learning_rates=\[\]"),
    (dict(learning_rates=[1e-3, 1e-3]), "each once"),
    (dict(seeds=[]), r"seeds=\[\]: expected whole numbers"),
    (dict(seeds=[0, 0]), "each once"),
    (dict(seeds=[3, -1]), r"seeds=\[3, -1\]: expected whole numbers from 0 on, each once"),
    (dict(seeds=[0, 1.0]), r"seeds=\[0, 1.0\]: expected whole numbers from 0 on, each once"),
    (dict(learning_rates=[1.01]), r"learning_rates=\[1.01\]: expected positive numbers up to 1"),
    (dict(seeds=["0"]), r"learning_rates=\[0.001\] and seeds=\['0'\]: expected numbers\."),
    (dict(sweep="grid"), "sweep='grid' is unknown"),
])  # fmt: skip
def test_bad_plans(changes, message):
    refused(message, RunPlan, **dict(starts=[REFERENCE], learning_rates=[1e-3], seeds=[0], sweep="full") | changes)


def test_other_data_is_noticed(tmp_path):
    with open_runs(tmp_path, settings()) as log:
        log.add(record("random", 1e-3))
        with pytest.raises(LoraInitError, match=r"eva, 0.001, seed 0 saw other data than random, 0.001, seed 0"):
            log.add(record("eva", 1e-3, data_order="x"))
        log.add(record("eva", 1e-3, status="unstable", data_order="x"))
        log.add(record(seed=1))
    assert len(read_runs(tmp_path)) == 3


def test_runs_of_one_length_saw_the_same_data_however_often_they_were_evaluated(tmp_path):
    with open_runs(tmp_path / "new" / "runs", settings()) as log:
        log.add(record(evaluation_points=[0, 4, 8]))
        log.add(record("eva", evaluation_points=[0, 4, 9], data_order="longer"))
        log.add(record("pissa", evaluation_points=[0, 8]))
        refused("saw other data than random", log.add, record("olora", evaluation_points=[0, 8], data_order="x"))


# Results


def best_of(*records):
    return best_rates(run_table(records)).get("eva")


def test_the_best_rate_is_picked_on_the_seeds_that_all_rates_have():
    sweep = [record("eva", rate, 0, loss) for rate, loss in ((1e-4, 0.30), (1e-3, 0.20), (3e-3, 0.21))]
    # Seed 1 is harder for every rate, and only the best one is run with it.
    assert best_of(*sweep, record("eva", 1e-3, 1, 0.50)) == 1e-3
    assert best_of() is None
    equal = [record("eva", 1e-3, 0, 0.2), record("eva", 1e-4, 0, 0.2)]
    assert best_of(*equal) == choose_rate(equal) == choose_rate(equal[::-1]) == 1e-4  # the lower of the two
    # Without a seed in common each rate has the mean of its own.
    assert best_of(record("eva", 1e-3, 0, 0.3), record("eva", 1e-3, 2, 0.1), record("eva", 1e-4, 1, 0.21)) == 1e-3


def test_an_unstable_run_takes_its_rate_out_of_the_race():
    sweep = [record("eva", rate, 0, loss) for rate, loss in ((1e-4, 0.30), (1e-3, 0.20), (3e-3, 0.10))]
    assert best_of(*sweep) == 3e-3
    assert best_of(*sweep, broken("unstable", "", start="eva", rate=3e-3, seed=1)) == 1e-3
    assert best_of(*sweep, broken("failed", "", start="eva", rate=3e-3, seed=1)) == 3e-3


def test_random_is_first_and_the_rest_in_the_order_asked_for():
    runs = [record("pissa"), record("eva+equal-parameters"), record("eva"), record("random")]
    table = run_table(runs, ["eva", "pissa"])
    assert table["start"].tolist() == ["random", "eva", "eva+equal-parameters", "pissa"]
    names = ["eva+16-batches", "eva+2-batches", "eva+32-alpha", "theirs", "eva"]
    assert [*run_table(map(record, names), ["theirs+2-alpha"])["start"]] == [
        "theirs", "eva", "eva+2-batches", "eva+16-batches", "eva+32-alpha",
    ]  # fmt: skip


def test_rows_go_by_start_then_by_rate_then_by_seed():
    order = [(start, rate, seed) for start in ("random", "pissa", "pissa+4-batches", "eva") for rate in (1e-4, 1e-3)
             for seed in (0, 1)]  # fmt: skip
    runs = [record(start, rate, seed, rate + seed) for start, rate, seed in sorted(order, key=lambda run: run[::-1])]
    table = run_table(reversed(runs), ["pissa", "eva"])
    assert [*zip(table["start"], table["learning_rate"], table["seed"], strict=True)] == order
    starts = [*dict.fromkeys(table["start"])]
    assert [*best_rates(table).items()] == [(start, 1e-4) for start in starts]
    losses = by_seed(table)
    assert [*losses.index] == starts and losses.to_numpy().tolist() == [[1e-4, 1e-4 + 1]] * 4


def test_a_row_of_the_table_has_what_the_record_and_its_name_say():
    whole = record("eva+4-batches", 1e-3, 5, 0.2, node="n", dial=[[1.0, 2.0, 3.0]], gamma=7, float_loss=None)
    lost = broken("unstable", "NaN", start="eva+4-batches", rate=1e-3, seed=6)
    table = run_table([lost, whole, record("eva", 1e-3, 5, 0.3, retain_loss=None, metrics=None)])
    row = table[table["batches"].eq(4) & table["seed"].eq(5)].iloc[0].dropna().to_dict()
    kept = ("start", "learning_rate", "seed", "status", "data_order", "evaluation_points", "report_loss", "node",
            "dial", "plain_loss", "selection_loss", "trainable_parameters", "a_scale", "gamma",
            "initialisation_seconds", "training_seconds", "peak_memory_bytes")  # fmt: skip
    assert row == {name: whole[name] for name in kept} | whole["metrics"] | {
        "base": "eva", "any_batches": "eva", "batches": 4, "loss": 0.2, "first_loss": 2.3, "retained_before": 3.1,
        "retained_after": 3.1 + 0.04, "rise": row["rise"], "counts": False, "best": False,
    }  # fmt: skip
    assert row["rise"] == pytest.approx(0.04) and list(table["counts"]) == list(table["best"]) == [True, False, False]
    assert math.isnan(table["loss"].iloc[2]) and table["first_loss"].iloc[2] == 2.3


# The directory


def keep(path, *records, **changes):
    with open_runs(path, settings(**changes)) as log:
        for one in records:
            log.add(one)
    return log


@pytest.mark.parametrize("loss", [None, math.nan])
def test_a_run_without_a_loss_to_select_by_is_unstable(loss):
    lost = record(rate=1e-2, selection_loss=loss)
    table = run_table([record(), lost])
    assert list(table["status"]) == ["finished", "unstable"] and best_rates(table) == {"random": 1e-3}


def test_another_configuration_is_refused_and_named(tmp_path):
    keep(tmp_path, record())
    before = (tmp_path / "settings.json").read_bytes()
    for changes, message in (
        ({"rank": 4}, "rank was 8, now 4"),
        ({"rank": 4, "data": "x"}, "rank was 8, now 4; data was 'siqa.jsonl, 800 rows', now 'x'"),
        ({"new": 1}, "new was None, now 1"),
    ):
        for opening in (keep, lambda path, **changes: peek(path, settings(**changes))):
            refused(message, opening, tmp_path, **changes)
    assert (tmp_path / "settings.json").read_bytes() == before
    keep(tmp_path, threads=2, versions={"torch": "9"}, command="x")


def test_a_setting_that_is_left_out_is_another_configuration_unless_it_may_change(tmp_path):
    keep(tmp_path, record(), replay="texts", strengths=[0.5, 1.0], size={"steps": 4}, budget={"time": 9})
    refused(r"strengths was \[0.5, 1.0\], now None", keep, tmp_path, replay="texts")
    refused("replay was 'texts', now None", keep, tmp_path, strengths=[0.5, 1.0])
    keep(tmp_path, replay="texts", strengths=[0.5, 1.0], bank=None)
    assert len(read_runs(tmp_path)) == 1


def test_numbers_of_numpy_are_kept_as_those_of_python(tmp_path):
    theirs = dict(steps=np.int64(60), lora_alpha=np.float32(16), seeds=[np.int64(0)], warmup=np.float64(0.5))
    log = keep(tmp_path, record(seed=np.int64(3), final=np.float32(0.5)), **theirs)
    assert read_settings(tmp_path)["steps"] == 60 and read_settings(tmp_path)["seeds"] == [0]
    assert [one["selection_loss"] for one in log.records.values()] == [0.5]
    again = keep(tmp_path, steps=60, warmup=0.5, seeds=[0])
    assert again.records == log.records


# What may be another when a comparison goes on: it shapes no run that is there.
FREE = {
    "sweep", "extend", "match_scale", "tuned", "size", "threads", "versions", "processor", "command", "init", "budget",
    "folds", "starts", "learning_rates", "seeds",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted({*settings(), *FREE, "examples", "own", "packages", "recommended"}))
def test_each_setting_may_change_or_is_refused_by_its_name(name, tmp_path):
    other = {"other": "4"} if name in ("examples", "own", "packages", "recommended") else [4, 5]
    keep(tmp_path, record(), **({name: {"other": "3"}} if isinstance(other, dict) else {}))
    before = (tmp_path / "settings.json").read_bytes()
    if name in FREE:
        keep(tmp_path, **{name: other})
        assert read_settings(tmp_path)[name][-2:] == [4, 5]
        assert len(read_runs(tmp_path)) == 1
    else:
        refused(f"{name} was|: other", keep, tmp_path, **{name: other})
        assert (tmp_path / "settings.json").read_bytes() == before


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    refused("holds no comparison", keep, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    refused(r"thesis\.tex is a file, and a directory is needed", keep, tmp_path / "thesis.tex")
    assert peek(tmp_path, settings()) == {}


def test_what_is_no_comparison_of_this_version_is_refused(tmp_path):
    refused(r"settings\.json: no such file. Name the directory of a comparison", read_settings, tmp_path)
    for version in (2, 4, None):
        (tmp_path / "settings.json").write_text(json.dumps(settings(format=version)))
        said = rf"is a comparison of another version \(format {version}, this one has 3\).*Name another directory"
        refused(said, read_settings, tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '"text"', '{"start": "eva", "seed": 0}', '{"start": 3, "seed": 0}'])
@pytest.mark.parametrize("packed", [True, False])
def test_a_damaged_run_is_named(packed, text, tmp_path):
    whole = json.dumps(record())
    if packed:
        (tmp_path / "runs.jsonl").write_text(f"{whole}\n{text}\n")
        said = r"runs\.jsonl, line 2: not a run \(.*\)\. Remove the line; the run is repeated"
    else:
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "a.json").write_text(whole)
        (tmp_path / "runs" / "b.json").write_text(text)
        said = r"runs/b\.json: not a run \(.*\)\. Remove the file; the run is repeated"
    refused(said, read_runs, tmp_path)


def hold(directory, link):
    """Hold a comparison's directory until the other end of the link is closed."""
    with open_runs(directory, settings()):
        link.send("held")
        with suppress(EOFError):
            link.recv()


@pytest.mark.slow
def test_a_second_process_waits_for_nothing(tmp_path):
    here, there = FORKS.Pipe()
    process = FORKS.Process(target=hold, args=(tmp_path, there), daemon=True)
    process.start()
    there.close()
    with here:
        assert here.recv() == "held"
        refused(rf"is in use by process {process.pid} on .*\. Wait until", keep, tmp_path)
    process.join(60)
    assert process.exitcode == 0
    keep(tmp_path, record())
    assert len(read_runs(tmp_path)) == 1


def test_a_table_has_the_number_of_batches_that_a_start_learned_from():
    table = run_table([record("eva+16-batches"), record("eva"), record("random")])
    assert dict(zip(table["start"], table["batches"], strict=True)) == {"eva+16-batches": 16, "eva": 0, "random": 0}
    assert {*table["any_batches"]} == {"eva", "random"}


def test_a_loss_that_is_no_number_is_null_for_other_readers(tmp_path):
    with open_runs(tmp_path / "runs", settings()) as runs:
        runs.add(record(report_loss=[2.3, math.nan], evaluation_points=[0, 4], selection_loss=math.inf))
    (file,) = (path for path in (tmp_path / "runs").rglob("*.json") if path.name != "settings.json")
    assert "NaN" not in file.read_text() and "Infinity" not in file.read_text()


def test_of_two_records_of_a_run_the_one_in_a_file_counts(tmp_path):
    lines = [record(seed=seed, final=0.3) for seed in (1, 0)]
    (tmp_path / "runs.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    (tmp_path / "runs").mkdir()
    for name, one in (("b", record(seed=2)), ("a", record(seed=1, final=0.1))):
        (tmp_path / "runs" / f"{name}.json").write_text(json.dumps(one))
    found = [(one["seed"], one["selection_loss"]) for one in read_runs(tmp_path)]
    assert found == [(1, 0.1), (0, 0.3), (2, 0.17)]


def test_what_a_kill_has_left_is_no_other_content(tmp_path):
    for name in (".new", "runs", "statistics"):
        (tmp_path / name).mkdir()
    keep(tmp_path, record())
    assert len(read_runs(tmp_path)) == 1


EXCERPTS = {
    ("a" * 120, "b"): ("a" * 120, "b"),
    ("a" * 200 + "b", "a" * 200 + "c"): ("..." + "a" * 40 + "b", "..." + "a" * 40 + "c"),
    ("b" + "a" * 200, "c"): ("b" + "a" * 119 + "...", "c"),
    ("a" * 121, "a" * 122): ("..." + "a" * 40, "..." + "a" * 41),
    ("a" * 119 + "b", "a" * 119 + "c"): ("a" * 119 + "b", "a" * 119 + "c"),
    ("a" * 120 + "b", "a" * 120 + "c"): ("..." + "a" * 40 + "b", "..." + "a" * 40 + "c"),
    ("b" + "a" * 120, "c"): ("b" + "a" * 119 + "...", "c"),
}


def test_what_is_asked_for_later_is_added_to_what_was_asked_for(tmp_path):
    asked = dict(starts=["random", "eva"], seeds=[0, 1], learning_rates=[1e-3], recommended={"random": 1e-3})
    keep(tmp_path, **asked, own={"mine": "a"})
    more = dict(starts=["pissa", "random"], seeds=[3], learning_rates=[1e-2], recommended={"pissa": 2e-3})
    log = keep(tmp_path, **more, examples={"to report": "x"}, sweep="halving")
    expected = dict(
        starts=["random", "eva", "pissa"], seeds=[0, 1, 3], learning_rates=[1e-3, 1e-2],
        recommended={"random": 1e-3, "pissa": 2e-3}, own={"mine": "a"}, examples={"to report": "x"}, sweep="halving",
    )  # fmt: skip
    assert read_settings(tmp_path) == log.settings == settings() | expected
    for texts, short in EXCERPTS.items():
        assert tuple(_excerpts(*texts)) == short
    said = "rank was 8, now 4"
    what = f"{tmp_path} has runs of another configuration: {said}"
    instead = "Name another directory, or use the settings of this one."
    assert refused(said, keep, tmp_path, rank=4) == f"{what}. {instead}"
