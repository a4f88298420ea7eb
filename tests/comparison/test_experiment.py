"""The plan of runs, and what makes runs comparable."""

import pytest

from lora_init.comparison.runs import Run, Variant, check_fair, check_plan, plan_runs, run_key, variants
from lora_init.errors import LoraInitError

RATES, SEEDS = (1e-3, 1e-2), (0, 1, 2)
RANDOM, EVA = Variant("random"), Variant("eva")


def record(run, loss, status="finished", **changes):
    return dict(
        task="t", start=run.variant.start, matched_scale=run.variant.matched_scale,
        equal_parameters=run.variant.equal_parameters, seed=run.seed, learning_rate=run.learning_rate, status=status,
        validation_loss=[1.0, loss], data_order=f"order{run.seed}", ranks=None, trainable_parameters=100,
    ) | changes  # fmt: skip


def carry_out(sweep, loss, starts=(RANDOM, EVA)):
    """Do what is planned, as compare() does, and return the runs in the order they were done in."""
    records, done = {}, []
    while True:
        planned = plan_runs("t", starts, RATES, SEEDS, sweep, records)
        left = [run for run in planned if run.key("t") not in records]
        if not left:
            return done, planned
        assert left[0].learning_rate is not None
        made = record(left[0], *loss(left[0]))
        records[run_key(made)] = made
        done.append(left[0])


def test_halving_sweeps_one_seed_and_takes_the_best_rate_to_the_others():
    best = {"random": 1e-2, "eva": 1e-3}
    done, planned = carry_out("halving", lambda run: (abs(run.learning_rate - best[run.variant.start]), "finished"))
    assert done[:4] == [Run(v, 0, rate) for rate in RATES for v in (RANDOM, EVA)]
    assert done[4:] == [Run(v, seed, best[v.start]) for seed in (1, 2) for v in (RANDOM, EVA)]
    assert planned == done


def test_before_the_sweep_has_ended_the_rates_are_open():
    planned = plan_runs("t", [RANDOM], RATES, SEEDS, "halving", {})
    assert [run.learning_rate for run in planned] == [*RATES, None, None]
    assert planned[-1].title == "random, best rate, seed 2"


def test_a_rate_that_is_unstable_is_not_chosen():
    def loss(run):
        return (0.1, "unstable") if run.learning_rate == 1e-2 else (0.5, "finished")

    done, _ = carry_out("halving", loss, [EVA])
    assert [run.learning_rate for run in done] == [1e-3, 1e-2, 1e-3, 1e-3]


def test_a_rate_that_is_unstable_on_another_seed_gives_way_to_the_next():
    def loss(run):
        return (0.1, "unstable" if run.seed == 1 else "finished") if run.learning_rate == 1e-2 else (0.5, "finished")

    done, _ = carry_out("halving", loss, [EVA])
    assert [(run.seed, run.learning_rate) for run in done] == [(0, 1e-3), (0, 1e-2), (1, 1e-2), (1, 1e-3), (2, 1e-3)]


def test_a_start_that_never_finishes_gets_no_more_seeds():
    done, planned = carry_out("halving", lambda run: (9.0, "unstable" if run.variant == EVA else "finished"))
    assert len(done) == len(planned) == 4 + 2
    assert {run.variant for run in planned[4:]} == {RANDOM}


def test_full_is_everything():
    done, planned = carry_out("full", lambda run: (0.5, "finished"))
    assert len(set(done)) == 12 and done == planned
    assert [run.seed for run in done] == [0] * 4 + [1] * 4 + [2] * 4


def test_what_is_run_beside_the_starts():
    starts = ["random", "eva", "eva-rho1", "eva-ranks", "eva-frozen-a", "pissa"]
    plain = [Variant(start) for start in starts]
    assert variants(starts, False, True) == [*plain, Variant("eva-frozen-a", equal_parameters=True)]
    moved = [Variant(start, equal_parameters=True) for start in ("eva", "eva-frozen-a")]
    assert variants(starts, False, False) == [*plain, *moved]
    scaled = [Variant(start, matched_scale=True) for start in ("eva", "eva-rho1", "eva-frozen-a")]
    assert variants(starts, True, False) == [*plain, *moved, *scaled]


def test_other_data_or_parameters_are_noticed():
    runs = [Run(RANDOM, 0, 1e-3), Run(EVA, 0, 1e-3)]
    check_fair([record(run, 0.5) for run in runs])
    with pytest.raises(LoraInitError, match=r"seed 0: eva at 0.001 saw other data than random at 0.001"):
        check_fair([record(runs[0], 0.5), record(runs[1], 0.5, data_order="x")])
    with pytest.raises(LoraInitError, match=r"eva at 0.001 trains 99 parameters and random at 0.001 100"):
        check_fair([record(runs[0], 0.5), record(runs[1], 0.5, trainable_parameters=99)])
    check_fair([record(runs[0], 0.5), record(runs[1], 0.5, trainable_parameters=99)], own={"eva": None})
    check_fair([record(runs[0], 0.5), record(runs[1], 0.5, trainable_parameters=99, ranks={"a": 1})])
    check_fair([record(runs[0], 0.5), record(runs[1], 0.5, "unstable", data_order="x")])
    check_fair([record(runs[0], 0.5), record(Run(RANDOM, 1, 1e-3), 0.5)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(learning_rates=[1e-3, 0.0]), "learning_rates: 0.0; expected positive numbers"),
        (dict(learning_rates=[-1e-3]), "learning_rates: -0.001"),
        (dict(learning_rates=[float("nan")]), "learning_rates: nan"),
        (dict(learning_rates=[float("inf")]), "learning_rates: inf"),
        (dict(learning_rates=[]), "learning_rates: none"),
        (dict(learning_rates=[1e-3, 1e-3]), "expected different ones"),
        (dict(seeds=[]), "expected different ones"),
        (dict(seeds=[0, 0]), "expected different ones"),
        (dict(points=[0, 5, 20, 10]), "expected rising steps from 0 to 10"),
        (dict(points=[0, 20]), "expected rising steps from 0 to 10"),
        (dict(steps=0, points=[0]), "expected rising steps"),
        (dict(warmup=1.0), "warmup=1.0"),
        (dict(sweep="grid"), "sweep='grid' is unknown"),
    ],
)
def test_bad_input(changes, message):
    settings = dict(learning_rates=[1e-3], seeds=[0], steps=10, points=[0, 10], warmup=0.1, sweep="full")
    check_plan(**settings)
    with pytest.raises(LoraInitError) as error:
        check_plan(**settings | changes)
    assert message in str(error.value)
