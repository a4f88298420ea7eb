"""Verdicts, notes and tables of a comparison, from records with planted results."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lora_init.comparison.findings import interval, summarise
from lora_init.comparison.tables import run_tables
from tests.comparisons import broken, planted, record, settings


def verdict(summary, label="eva"):
    return next(v for v in summary.verdicts if v.start == label)


def cells(summary, name, label):
    table = run_tables(summary)[name].set_index("start")
    return dict(table.loc[label])


# Verdicts


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=12))
def test_the_interval_is_that_of_the_paired_t_test(pairs):
    ours, theirs = zip(*pairs, strict=True)
    differences = np.subtract(ours, theirs)
    if np.std(differences) < 1e-6:
        return  # SciPy warns of lost digits there
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    # Both are exact up to float64 rounding of numbers near 5.
    assert interval(differences) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-9)


def test_few_differences_or_equal_ones():
    assert interval([]) is None and interval([1.0]) is None
    assert interval([0.0, 0.0]) == (0.0, 0.0)


def judged(ours, theirs):
    """The verdict on runs that end at these losses, by seed."""
    runs = [record("random", seed=seed, final=loss) for seed, loss in enumerate(theirs)]
    runs += [record("eva", seed=seed, final=loss) for seed, loss in enumerate(ours)]
    return verdict(summarise(runs, settings()))


@pytest.mark.parametrize(("sign", "word"), [(-1, "better"), (1, "worse")])
def test_a_planted_winner_wins_through_noise_that_seeds_share(sign, word):
    rng = np.random.default_rng(0)
    base = rng.normal(5, 1, 5)  # varies far more than the difference: only pairing can find it
    ours = base + sign * 0.05 + rng.normal(0, 0.01, 5)
    found = judged(ours, base)
    assert found.outcome == word
    assert found.low < sign * 0.05 < found.high
    assert stats.ttest_ind(ours, base).pvalue > 0.5  # unpaired, nothing would show


def test_a_planted_tie_is_called_a_winner_in_one_case_of_twenty():
    rng = np.random.default_rng(0)
    ends = [interval(differences) for differences in rng.normal(size=(2000, 3))]
    wrong = sum(low > 0 or high < 0 for low, high in ends) / len(ends)
    assert wrong == pytest.approx(0.05, abs=0.015)  # three standard errors of a share of 0.05 in 2000


def test_the_same_run_twice_is_no_winner():
    assert judged([0.1, 0.2], [0.1, 0.2]).outcome == "no difference shown"


def test_a_planted_winner_a_loser_and_a_tie():
    summary = summarise(planted({"eva": -0.01, "pissa": 0.01, "orthogonal": 0.0}), settings())
    assert verdict(summary).sentence.startswith("eva is better; its final loss is 0.0")
    assert "lower than random's on average, with 3 runs of each (95 % interval −" in verdict(summary).sentence
    assert verdict(summary, "pissa").outcome == "worse"
    assert verdict(summary, "orthogonal").sentence.startswith("orthogonal: no difference shown; ")
    assert summary.headline.startswith(
        "3 compared with random: 1 better, 1 worse, 1 no difference shown. Runs: 48 finished."
    )


def test_a_difference_inside_the_interval_wins_nothing_however_large():
    found = judged((0.10, 0.19, 0.21), (0.2, 0.2, 0.2))
    assert found.outcome == "no difference shown"
    assert "0.0333 lower" in found.sentence and "better" not in found.sentence


def test_each_start_is_compared_at_its_own_best_rate():
    runs = [record("random", 1e-3, s, 0.20 + s / 1000) for s in range(3)]
    runs += [record("random", 1e-4, s, 0.15 + s / 1000) for s in range(3)]
    runs += [record("eva", 1e-3, s, 0.16 + s / 900) for s in range(3)]
    runs += [record("eva", 1e-4, s, 0.30) for s in range(3)]
    # At 1e-3 eva is 0.04 ahead, the trap; tuned, random is 0.01 ahead.
    found = verdict(summarise(runs, settings()))
    assert (found.outcome, "eva at 1e-3, random at 1e-4" in found.sentence) == ("worse", True)


def test_one_seed_allows_no_statement():
    summary = summarise(planted({"eva": -0.05}, seeds=(0,)), settings(seeds=[0]))
    assert verdict(summary).sentence.startswith("eva: no statement possible with 1 run;")
    assert (verdict(summary).outcome, verdict(summary).low) == ("no statement", None)


def test_without_random_nothing_is_said_of_any_start():
    summary = summarise([r for r in planted({"eva": -0.1}) if r["start"] != "random"], settings())
    assert verdict(summary).outcome == "no statement"
    assert summary.notes[0].startswith("Every start is compared with random")


def test_random_with_another_scale_is_not_the_random_to_compare_with():
    runs = planted({"eva": -0.01})
    for run in runs:
        run["start"] = run["start"].replace("random", "random+matched-scale")
    assert [v.outcome for v in summarise(runs, settings()).verdicts] == ["no statement", "no statement"]


def test_seeds_without_a_partner_are_left_out_and_named():
    runs = [run for run in planted({"eva": -0.01}) if (run["start"], run["seed"]) != ("eva", 2)]
    summary = summarise(runs, settings())
    assert list(verdict(summary).differences) == [0, 1]
    assert "eva: no finished run with seed 2 at its best rate." in summary.notes


def test_variants_of_a_start_are_judged_apart():
    runs = planted({"eva": -0.01})
    runs += [{**run, "start": "eva+matched-scale", "report_loss": [2.3, 0.2, 0.2, 0.2 + run["seed"] / 1000]}
             for run in runs if run["start"] == "eva"]  # fmt: skip
    summary = summarise(runs, settings())
    assert [(v.start, v.outcome) for v in summary.verdicts] == [("eva", "better"), ("eva+matched-scale", "worse")]
    assert cells(summary, "best", "eva+matched-scale")["mean loss"] == "0.2010"


# Rates


def test_an_unstable_run_is_named_not_averaged_and_the_next_lower_rate_is_given():
    runs = planted({"eva": -0.01})
    bad = next(run for run in runs if (run["start"], run["learning_rate"], run["seed"]) == ("eva", 3e-3, 1))
    bad.update(status="unstable", error="loss rose to 9.1 at step 12", report_loss=[2.3, 9.1])
    summary = summarise(runs, settings())
    said = "eva is unstable at 3e-3 (seed 1: loss rose to 9.1 at step 12), so this rate is not averaged."
    assert said in summary.notes
    assert cells(summary, "learning_rates", "eva")["3e-3"] == "unstable, 1 of 3"


def test_a_finished_run_without_a_finite_loss_is_unstable():
    summary = summarise([record("random", 1e-3), record("random", 3e-3, final=float("nan"))], settings())
    assert any(note.startswith("random is unstable at 3e-3") for note in summary.notes)
    assert cells(summary, "learning_rates", "random")["1e-3"] == "0.1700*"


def test_rates_are_compared_on_the_seeds_that_all_have():
    losses = {("random", 1e-4): 0.30, ("random", 1e-3): 0.20, ("eva", 1e-4): 0.22, ("eva", 1e-3): 0.19}
    runs = [record(start, rate, 0, loss) for (start, rate), loss in losses.items()]
    # A second seed that only one start and rate has must not move the table.
    runs.append(record("eva", 1e-3, 1, 0.90))
    summary = summarise(runs, settings())
    assert cells(summary, "learning_rates", "random") == {"1e-4": "0.3000", "1e-3": "0.2000*"}
    assert cells(summary, "learning_rates", "eva") == {"1e-4": "0.2200", "1e-3": "0.1900*"}


def test_a_best_rate_at_the_end_of_the_sweep_is_pointed_out():
    runs = [record("random", rate, 0, loss) for rate, loss in ((1e-4, 0.3), (3e-4, 0.2), (1e-3, 0.1))]
    assert any("best rate is the highest that was tried" in note for note in summarise(runs, settings()).notes)
    inside = [record("random", rate, 0, loss) for rate, loss in ((1e-4, 0.3), (3e-4, 0.1), (1e-3, 0.2))]
    assert not any("that was tried" in note for note in summarise(inside, settings()).notes)


# Other numbers


def test_steps_until_the_best_random_run_is_reached():
    runs = [record("random", final=0.17), record("eva", final=0.15), record("random", final=0.16, seed=1)]
    summary = summarise([*runs, record("eva", final=0.17, seed=1)], settings(seeds=[0, 1]))
    # Of random the run with seed 1 is the best, 0.16; eva has 0.155 at step 40 with seed 0, never with seed 1.
    assert cells(summary, "best", "eva")["steps to random's best"] == "40, never"
    assert cells(summary, "best", "random")["steps to random's best"] == "never, 60"


def test_an_unstable_rate_sets_no_target_for_the_others():
    runs = [record("random", 3e-3, 0, 0.10), broken("unstable", "nan", start="random", rate=3e-3, seed=1)]
    runs += [record("random", 1e-3, s, 0.17) for s in range(2)] + [record("eva", 1e-3, s, 0.16) for s in range(2)]
    assert cells(summarise(runs, settings()), "best", "eva")["steps to random's best"] == "40, 40"


def test_what_a_step_does_before_training():
    runs = planted({"eva": 0.0, "lora-one": 0.0}, seeds=(0, 1))
    for run in runs:
        if run["start"] == "lora-one":
            run["gamma"] = 64.0 * (1 + run["seed"])
            run["report_loss"] = [run["report_loss"][0] / 2, *run["report_loss"][1:]]
    summary = summarise(runs, settings(seeds=[0, 1]))
    found, plain = cells(summary, "best", "lora-one"), cells(summary, "best", "random")
    assert (found["gamma"], plain["gamma"]) == ("64, 128", "–")
    assert (found["loss at step 0"], plain["loss at step 0"]) == ("1.1500", "2.3000")
    assert "gamma" not in run_tables(summarise(planted({"eva": 0.0}), settings()))["best"]


def test_fewer_parameters_are_said():
    runs = planted({"eva": 0.0})
    for run in runs:
        run["trainable_parameters"] = 900 if run["start"] == "eva" else 1000
    said = "eva trains 900 parameters, 10.0% fewer than random."
    assert said in summarise(runs, settings()).notes
    twins = [
        run | {"start": "eva+equal-parameters", "trainable_parameters": 999} for run in runs if run["start"] == "eva"
    ]
    assert len([note for note in summarise([*runs, *twins], settings()).notes if "parameters, " in note]) == 1


def test_forgetting_is_averaged_over_seeds():
    runs = [record("random", seed=s, retain_loss=[3.0, 3.0 + s]) for s in range(3)]
    row = cells(summarise(runs, settings()), "forgetting", "random")
    assert row["change"] == "+1.0000"


def test_metrics_are_paired_too():
    runs = [record("random", seed=s, metrics={"accuracy": 0.5 + s / 100}) for s in range(3)]
    runs += [record("eva", seed=s, metrics={"accuracy": 0.6 + s / 100 + s * s / 1000}) for s in range(3)]
    row = cells(summarise(runs, settings()), "metrics", "eva")
    # Differences 0.100, 0.101, 0.104: mean 0.10167, standard deviation 0.00208; 4.3027 * 0.00208 / sqrt(3) = 0.0052.
    assert row == {"accuracy": "0.612", "accuracy, start − random": "+0.096 to +0.107"}


def test_failed_runs_are_named_by_reason():
    runs = [*planted({}), *(broken("failed", "out of memory.", start="eva", seed=s) for s in range(9))]
    assert "9 runs failed (out of memory): eva." in summarise(runs, settings()).notes


@pytest.mark.parametrize("runs", [[], [record()], [broken("failed", "no", start="eva")], [broken("unstable", "no")]])
def test_few_runs_or_none_still_make_a_summary(runs):
    summary = summarise(runs, settings())
    assert summary.notes and summary.headline
    assert set(run_tables(summary)) <= {
        "differences",
        "learning_rates",
        "best",
        "metrics",
        "cost",
        "forgetting",
        "runs",
    }
