"""What is run under a limit: seeds in stages, starts that cannot win or are known well enough stop, and all ends."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lora_init.comparison.budget import STAGES, RunBudget, longer_runs, stops
from lora_init.comparison.effects import effects
from lora_init.comparison.findings import equal_time, summarise
from lora_init.comparison.runs import Run, RunPlan, run_table
from lora_init.comparison.variants import REFERENCE, Variant
from tests.comparisons import broken, planted, record, settings
from tests.conftest import refused


def layout(shifts, n_seeds, noise=0.01):
    rng = np.random.default_rng(0)
    losses = {start: shift + rng.normal(0, noise, n_seeds) for start, shift in {"random": 1.0, **shifts}.items()}
    return pd.DataFrame(losses).T


def test_who_is_worse_than_random_or_than_another_stops_and_who_may_win_goes_on():
    over, left = stops(layout({"good": 0.8, "bad": 1.2, "like random": 1.0}, 4), None)
    assert over["bad"] == "bad gets no more, as it cannot win any more against good"
    assert set(over) == {"bad", "like random"} and left["good"].startswith(
        "good gets more, its difference to random is known within "
    )
    over, left = stops(layout({"bad": 1.2, "like random": 1.0}, 4), None)
    assert over == {"bad": "bad gets no more, as it cannot win any more against random"} and set(left) == {
        "like random"
    }


def test_who_is_known_well_enough_stops_better_or_not():
    losses = layout({"good": 0.8, "like random": 1.0}, 4)
    over, left = stops(losses, 0.05)
    assert over["good"].startswith("good gets no more, as its difference to random is known within ")
    assert "like random" in over and not left
    assert set(stops(losses, 0.001)[1]) == {"good"}


def test_no_one_stops_for_a_difference_that_a_single_look_would_call_worse():
    losses = layout({"a": 1.012, "b": 1.0, "c": 1.0}, 4)
    assert effects(losses, "random")["a"].low > 0
    assert "a" in stops(losses, None)[1]


def spend(losses, budget, plan, order=1):
    """Do what is due, nine runs at a time in the order given or from its end, and return what was done and said."""
    records = {}
    while True:
        due, said = budget.due(plan, plan.starts, records)
        left = [run for run in due if run not in records and run.learning_rate is not None]
        if not left:
            return records, said
        for run in left[::order][:9]:
            records[run] = record(run.start, run.learning_rate, run.seed, losses(run), run_seconds=1.0)


def loss(run):
    rng = np.random.default_rng([run.seed, len(str(run.start))])
    best = {"random": 1.0, "eva": 0.99, "orthogonal": 1.3, "full": 0.5}[run.start.base]
    return best + 0.2 * (run.learning_rate != 1e-3) + 0.01 * rng.normal() + 0.1 * np.sin(run.seed)


PLAN = RunPlan(
    [*map(Variant, ("random", "eva", "orthogonal", "full"))], [1e-3, 1e-2], range(STAGES[-1]), "halving", extend=0
)


@pytest.mark.slow
def test_seeds_are_added_until_every_verdict_is_precise():
    records, said = spend(loss, RunBudget(precision=0.012), PLAN)
    counts = {one.base: len({run.seed for run in records if run.start == one}) for one in PLAN.starts}
    assert counts["full"] == counts["orthogonal"] == 3 < counts["eva"] == counts["random"] <= 16
    assert said[0] == (
        "After 3 seeds: eva gets more, its difference to random is known within 1.4 % (1.2 % is wanted); "
        "orthogonal gets no more, as it cannot win any more against random."
    )
    assert said[-1] == "After 16 seeds: eva gets no more, as its difference to random is known within 1.1 %."
    backwards, again = spend(loss, RunBudget(precision=0.012), PLAN, order=-1)
    assert backwards == records and again == said


@pytest.mark.parametrize(("limits", "said"), [
    (dict(seconds=0.0), "time=0.0: expected a number above zero, in seconds."),
    (dict(seconds="20m"), "time='20m': expected a number above zero, in seconds."),
    (dict(precision=-0.1), "precision=-0.1: expected a number above zero and below 1, such as 0.01."),
    (dict(precision=0), "precision=0: expected a number above zero and below 1, such as 0.01."),
    (dict(precision=float("nan")), "precision=nan: expected a number above zero and below 1, such as 0.01."),
    (dict(seconds=9, precision=1.0), "precision=1.0: expected a number above zero and below 1, such as 0.01."),
])  # fmt: skip
def test_a_limit_is_above_zero_and_a_share_below_one(limits, said):
    assert refused("", lambda: RunBudget(**limits)) == said


def test_a_budget_is_what_is_left_of_its_seconds(monkeypatch):
    monkeypatch.setattr("lora_init.comparison.budget.time.monotonic", lambda: 130.0)
    budget = RunBudget(40.0, began=100.0)
    assert budget.spent == 30.0 and [budget.fits(seconds) for seconds in (0.0, 10.0, 10.1)] == [True, True, False]
    assert RunBudget().fits(1e9) and RunBudget(precision=0.1).fits(1e9) and RunBudget(9.0).fits(9.0)
    kinds = (RunBudget(), RunBudget(40.0), RunBudget(precision=0.1))
    assert [one.limited for one in kinds] == [False, True, True] and RunBudget().settings() == {}
    assert budget.settings() == {"budget": {"time": 40.0, "precision": None}}


def test_one_who_is_surely_better_sets_what_the_others_have_to_reach():
    losses = pd.DataFrame({"random": [1.0] * 4, "good": [0.8] * 4, "bad": [0.81] * 4}).T
    over, left = stops(losses, None)
    more = "good gets more, its difference to random is known within 0.00 %"
    assert over == {"bad": "bad gets no more, as it cannot win any more against good"}
    assert left == {"good": more} and stops(losses, 1e-12)[1] == {"good": f"{more} (0.00 % is wanted)"}
    enough = {"good": "good gets no more, as its difference to random is known within 0.00 %"}
    assert stops(losses, 0.01) == (over | enough, {})


def test_the_best_of_those_that_are_surely_better_is_the_one_to_reach():
    ends = {"random": 1.0, "good": 0.8, "best": 0.7, "bad": 0.9}
    for names in (["good", "best", "bad"], ["best", "bad"]):
        over, left = stops(pd.DataFrame({name: [ends[name]] * 4 for name in ("random", *names)}).T, None)
        assert {*left} == {"best"} and {*over} == {*names} - {"best"}
        assert all(said.endswith("gets no more, as it cannot win any more against best") for said in over.values())


def test_a_start_whose_difference_is_known_exactly_as_wanted_stops():
    losses = layout({"good": 0.8}, 4)
    known = effects(losses, "random")["good"].detectable / float(losses.loc["random"].mean())
    assert "good" in stops(losses, known)[0] and "good" in stops(losses, np.nextafter(known, 0.0))[1]


@pytest.mark.parametrize("n_seeds", [3, 5])
def test_no_more_stages_are_decided_on_than_there_are_seeds_for(n_seeds):
    plan = replace(PLAN, seeds=range(n_seeds), starts=PLAN.starts[:2])
    records, said = spend(loss, RunBudget(precision=1e-6), plan)
    stages = {3: [3], 5: [3, 4, 5]}[n_seeds]
    assert [line.partition(" seeds:")[0] for line in said] == [f"After {n}" for n in stages]
    assert {run.seed for run in records} == {*range(n_seeds)}


# What a better start is worth in time


def timed(took, longer, better=-0.01, steps=120):
    """Runs of 60 steps of 1 s; eva takes `took` s to start, and random with `steps` steps ends `longer` lower."""
    runs = planted({"eva": better}, rates=(1e-3,), spread=0.0002)
    for run in runs:
        run["training_seconds"], run["initialisation_seconds"] = 60.0, took if run["start"] == "eva" else 0.0
    twins = [run for run in runs if run["start"] == "random"]
    return runs + [
        run | {"start": f"random+{steps}-steps", "evaluation_points": [0, steps], "data_order": "longer",
               "report_loss": [2.3, run["report_loss"][-1] - longer]} for run in twins
    ]  # fmt: skip


def test_if_a_start_is_better_random_trains_twice_as_long():
    runs = {Run.of(run): run for run in timed(10.0, 0.0) if "steps" not in run["start"]}
    assert longer_runs(runs) == [Run(Variant("random", steps=120), seed, 1e-3) for seed in range(3)]
    assert longer_runs({run: found for run, found in runs.items() if run.start == REFERENCE}) == []


def test_the_verdict_at_equal_total_time():
    # Twice the steps lower the loss by 0.02, and so 30 more, as the start takes, by 0.02 * log2(1.5) = 0.0117.
    found = summarise(timed(30.0, 0.02), settings())
    assert [verdict.start for verdict in found.verdicts] == ["eva"]
    (said,) = found.equal_time
    # The lead of 0.01 is worth 2 ** 0.5 - 1 = 41 % more steps, and 30 steps are 41 % of 73.
    assert said.startswith(
        "At equal total time random is better than eva: the final loss of eva differs by +1.2 % (interval +1.0 % to "
    )
    assert "takes as long as 30.0 steps. Its lead is worth 40 % further steps of random" in said
    assert "it pays from 74 steps on" in said
    cheap = summarise(timed(3.0, 0.02), settings()).equal_time[0]
    assert cheap.startswith("At equal total time eva is still better than random: ")


@pytest.mark.parametrize(("took", "longer", "outcome", "said"), [
    (30.0, -0.01, "better", "eva is as at equal steps, since random gains nothing by more of them at its rate. "
     "Its start takes as long as 30.0 steps."),
    (900.0, 0.001, "no statement", "nothing can be said of eva, since random was trained for 120 steps, and could train"
     " for 960."),
    (30.0, 0.0, "better", "eva is as at equal steps, since random gains nothing by more of them at its rate. "
     "Its start takes as long as 30.0 steps."),
    (60.0, 0.002, "better", "eva is still better than random"),  # just long enough
    (900.0, 0.05, "worse", "random is better than eva"),  # too short, and lower all the same
])  # fmt: skip
@pytest.mark.slow
def test_the_verdict_where_more_steps_do_not_decide(took, longer, outcome, said):
    runs = timed(took, longer)
    found = summarise(runs, settings())
    assert f"At equal total time {said}" in found.equal_time[0]
    assert equal_time(run_table(runs), found.verdicts)["eva"].outcome == outcome


def with_start(runs, start, better, took):
    """One start more, which ends as much below eva."""
    own = [run for run in runs if run["start"] == "eva"]
    return runs + [
        run | {"start": start, "initialisation_seconds": took, "report_loss": [2.3, run["report_loss"][-1] - better]}
        for run in own
    ]  # fmt: skip


def test_a_start_that_random_beats_in_the_same_time_is_not_advised():
    runs = timed(30.0, 0.02)
    found = summarise(runs, settings())
    assert found.answer == (
        "Use random at 1e-3 and train it for longer: eva ends 5.8 % lower after as many steps, but random ends lower "
        "in the same total time. With random the loss on other text changes by +0.0400."
    )
    assert found.start == "random" and found.caveats[-1] == found.equal_time[0]
    # Of two better starts the one that lasts is advised, though it ends higher.
    other = summarise(with_start(runs, "orthogonal", -0.002, 0.0), settings())
    assert other.start == "orthogonal" and other.answer.startswith("Use orthogonal at 1e-3")
    assert [said.split(":")[0] for said in other.equal_time] == [
        "At equal total time random is better than eva", "At equal total time orthogonal is still better than random",
    ]  # fmt: skip
    assert len(other.caveats) == 2 and all("was run at 1e-3 only" in doubt for doubt in other.caveats)


def test_what_a_lead_is_worth_is_told_as_far_as_random_was_trained():
    least = summarise(timed(3.0, 0.005), settings()).equal_time[0]
    assert least.endswith("steps. Its lead is worth more than 100 % further steps of random.")
    short = summarise(timed(900.0, 0.05), settings()).equal_time[0]
    assert short.endswith(
        "Random was trained for 120 steps, which is less time than that, and ends lower all the same."
    )


def test_the_longer_run_that_is_nearest_to_the_time_of_a_start_counts():
    runs = timed(30.0, 0.02)
    more = [run for run in timed(30.0, 0.9, steps=240) if "-steps" in run["start"]]
    other = [run | {"start": f"random+32-alpha+{n}-steps", "evaluation_points": [0, n], "data_order": str(n)}
             for n in (120, 240) for run in more]  # fmt: skip
    expected = summarise(runs, settings()).equal_time
    assert summarise([*runs, *more, *other], settings()).equal_time == expected
    slow = [run | {"initialisation_seconds": 900.0 * (run["start"] == "eva")} for run in runs]
    few = [run for run in timed(30.0, 0.001, steps=240) if "-steps" in run["start"]]
    assert "trained for 240 steps, and could train for 960" in summarise([*slow, *few], settings()).equal_time[0]
    # With a single seed of the longer run nothing can be shown.
    once = [run for run in runs if "-steps" not in run["start"] or run["seed"] == 0]
    said = "At equal total time nothing can be said of eva, since random was trained for 120 steps on too few seeds."
    assert summarise(once, settings()).equal_time == [said]


def test_random_trains_longer_for_the_sake_of_better_starts_alone():
    """What is worse than random may take as long as it likes; and a rate at which random broke off has few steps."""
    runs = [run for run in timed(10.0, 0.0) if "-steps" not in run["start"]]
    runs = [*with_start(runs, "pissa", -0.03, 900.0), broken("unstable", "NaN", rate=1e-05)]
    longer = longer_runs({Run.of(run): run for run in runs})
    assert longer == [Run(Variant("random", steps=120), seed, 1e-3) for seed in range(3)]


@pytest.mark.parametrize(("took", "steps"), [(10.0, 120), (60.0, 120), (61.0, 240), (900.0, 480)])
def test_random_trains_for_the_time_that_the_start_takes(took, steps):
    runs = {Run.of(run): run for run in timed(took, 0.0) if "steps" not in run["start"]}
    assert {run.start for run in longer_runs(runs)} == {Variant("random", steps=steps)}


def test_under_a_limit_random_alone_ends_and_a_better_start_is_timed():
    budget, plan = RunBudget(precision=0.5), replace(PLAN, starts=PLAN.starts[:2])
    only, said = spend(loss, budget, replace(PLAN, starts=PLAN.starts[:1]))
    assert {run.seed for run in only} == {0, 1, 2} and said == ["After 3 seeds: nothing to compare."]
    records, _ = spend(lambda run: loss(run) - 0.5 * (run.start.base == "eva") * (run.seed != 9), budget, plan)
    longer = {run for run in records if run.start.steps}
    assert longer == {Run(Variant("random", steps=120), seed, 1e-3) for seed in (0, 1, 2)}


def test_a_better_start_is_timed_when_all_runs_have_ended_and_not_before():
    plan = RunPlan([REFERENCE, Variant("eva")], [1e-3], range(4), "full", extend=0)
    records = {run: record(run.start, run.learning_rate, run.seed, loss(run) - 0.5 * (run.start.base == "eva"))
               for run in plan.runs(plan.starts, {})}  # fmt: skip
    some = {run: one for run, one in records.items() if run.seed < 3 or run.start == REFERENCE}
    assert {run.start for run in longer_runs(some)} == {Variant("random", steps=120)}
    for ended, timed_seeds in ((some, []), (records, [0, 1, 2, 3])):
        due, said = RunBudget().due(plan, plan.starts, ended)
        assert [run.seed for run in due if run.start.steps] == timed_seeds and said == []
        assert [run for run in due if not run.start.steps] == [*records]
