"""Verdicts, notes and tables of a comparison, from records with planted results."""

import pytest

from lora_init.comparison.runs import Variant, best_rate, group_runs
from lora_init.comparison.tables import show_comparison, steps_until, summarise
from lora_init.errors import LoraInitError
from tests.comparison_records import broken, planted, record, settings


def verdict(summary, label="eva"):
    return next(v for v in summary.verdicts if v.label == label)


def cells(summary, name, label):
    table = next(t for t in summary.tables if t.name == name)
    row = next(row for row in table.rows if row[0] == label)
    return dict(zip(table.head, row, strict=True))


# --- Verdicts -------------------------------------------------------------------------------------------------------


def test_a_planted_winner_a_loser_and_a_tie():
    summary = summarise(planted({"eva": -0.01, "pissa": 0.01, "orthogonal": 0.0}), settings())
    assert verdict(summary).sentence.startswith("eva is better than random: its final validation loss is 0.0")
    assert "lower than random's on average, with 3 runs of each (95 % interval −" in verdict(summary).sentence
    assert verdict(summary, "pissa").outcome == "worse"
    assert verdict(summary, "orthogonal").sentence.startswith("orthogonal: no difference shown with 3 runs.")
    assert summary.headline.startswith(
        "3 compared with random: 1 better, 1 worse, 1 with no difference shown. 48 runs: 48 finished."
    )


def test_a_difference_inside_the_interval_wins_nothing_however_large():
    runs = [record("random", seed=s, final=0.2) for s in range(3)]
    runs += [record("eva", seed=s, final=f) for s, f in enumerate((0.10, 0.19, 0.21))]
    summary = summarise(runs, settings())
    assert verdict(summary).outcome == "no difference shown"
    assert "0.0333 lower" in verdict(summary).sentence
    assert "better" not in verdict(summary).sentence


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
    assert verdict(summary).sentence.startswith("eva: no statement possible with 1 run.")
    assert verdict(summary).outcome == "no statement"


def test_without_random_nothing_is_said_of_any_start():
    summary = summarise([r for r in planted({"eva": -0.1}) if r["start"] != "random"], settings())
    assert verdict(summary).outcome == "no statement"
    assert summary.notes[0].startswith("Every start is compared with random")


def test_random_with_another_scale_is_not_the_random_to_compare_with():
    runs = [{**run, "matched_scale": run["start"] == "random"} for run in planted({"eva": -0.01})]
    summary = summarise(runs, settings())
    assert [v.outcome for v in summary.verdicts] == ["no statement", "no statement"]


def test_seeds_without_a_partner_are_left_out_and_named():
    runs = [run for run in planted({"eva": -0.01}) if (run["start"], run["seed"]) != ("eva", 2)]
    summary = summarise(runs, settings())
    assert verdict(summary).pairs.n == 2
    assert any(note.startswith("eva: no finished run with seed 2 at its best rate, 1e-3") for note in summary.notes)


def test_variants_of_a_start_are_judged_apart():
    runs = planted({"eva": -0.01})
    runs += [{**run, "matched_scale": True, "validation_loss": [2.3, 0.2, 0.2, 0.2 + run["seed"] / 1000]}
             for run in runs if run["start"] == "eva"]  # fmt: skip
    summary = summarise(runs, settings())
    assert [(v.label, v.outcome) for v in summary.verdicts] == [("eva", "better"), ("eva, matched scale", "worse")]
    assert cells(summary, "scale", "eva, matched scale")["final loss"] == "0.2010"


# --- Rates ----------------------------------------------------------------------------------------------------------


def test_the_best_rate_is_picked_on_the_seeds_that_all_rates_have():
    sweep = [record("eva", rate, 0, loss) for rate, loss in ((1e-4, 0.30), (1e-3, 0.20), (3e-3, 0.21))]
    # Seed 1 is harder for every rate, and only the best one is run with it.
    assert best_rate([*sweep, record("eva", 1e-3, 1, 0.50)]) == 1e-3
    assert best_rate([]) is None


def test_an_unstable_run_takes_its_rate_out_of_the_race():
    sweep = [record("eva", rate, 0, loss) for rate, loss in ((1e-4, 0.30), (1e-3, 0.20), (3e-3, 0.10))]
    assert best_rate(sweep) == 3e-3
    assert best_rate([*sweep, broken("unstable", "", start="eva", rate=3e-3, seed=1)]) == 1e-3
    assert best_rate([*sweep, broken("failed", "", start="eva", rate=3e-3, seed=1)]) == 3e-3


def test_an_unstable_run_is_named_not_averaged_and_the_next_lower_rate_is_told():
    runs = planted({"eva": -0.01})
    bad = next(run for run in runs if (run["start"], run["learning_rate"], run["seed"]) == ("eva", 3e-3, 1))
    bad.update(status="unstable", error="loss rose to 9.1 at step 12", validation_loss=[2.3, 9.1])
    summary = summarise(runs, settings())
    lower = [run["validation_loss"][-1] for run in runs if run["start"] == "eva" and run["learning_rate"] == 1e-3]
    note = next(note for note in summary.notes if "unstable" in note)
    assert note.startswith(
        "eva is unstable at 3e-3 (seed 1: loss rose to 9.1 at step 12), so this rate is not averaged."
    )
    assert f"The next lower rate, 1e-3, ends at {sum(lower) / 3:.4f} (3 runs)." in note
    assert cells(summary, "learning_rates", "eva")["3e-3"] == "unstable, 1 of 3"
    assert cells(summary, "regret", "eva")["3e-3"] == "unstable"


def test_a_finished_run_without_a_finite_loss_is_unstable():
    summary = summarise([record("random", 1e-3), record("random", 3e-3, final=float("nan"))], settings())
    assert any(note.startswith("random is unstable at 3e-3") for note in summary.notes)
    assert cells(summary, "learning_rates", "random")["1e-3"] == "0.1700*"


def test_regret_by_hand():
    losses = {("random", 1e-4): 0.30, ("random", 1e-3): 0.20, ("eva", 1e-4): 0.22, ("eva", 1e-3): 0.19}
    runs = [record(start, rate, 0, loss) for (start, rate), loss in losses.items()]
    # A second seed that only one cell has must not move the table.
    runs.append(record("eva", 1e-3, 1, 0.90))
    summary = summarise(runs, settings())
    assert cells(summary, "regret", "random") == {"start": "random", "1e-4": "0.1100", "1e-3": "0.0100"}
    assert cells(summary, "regret", "eva") == {"start": "eva", "1e-4": "0.0300", "1e-3": "0.0000"}
    assert (
        "Untuned, at 1e-4, random ends 0.1100 above the best of all starts and rates; "
        "closest is eva, 0.0300 above (seed 0)." in summary.notes
    )


def test_it_is_told_when_no_rate_that_people_use_untuned_was_tried():
    told = "What is lost without a sweep is not known: 1e-4 and 3e-4, which people use untuned, were not tried."
    assert told in summarise(planted({"eva": 0.0}, rates=(1e-3, 3e-3)), settings()).notes
    assert told not in summarise(planted({"eva": 0.0}), settings()).notes


def test_a_best_rate_at_the_end_of_the_sweep_is_pointed_out():
    runs = [record("random", rate, 0, loss) for rate, loss in ((1e-4, 0.3), (3e-4, 0.2), (1e-3, 0.1))]
    assert any("best rate is the highest that was tried" in note for note in summarise(runs, settings()).notes)
    inside = [record("random", rate, 0, loss) for rate, loss in ((1e-4, 0.3), (3e-4, 0.1), (1e-3, 0.2))]
    assert not any("that was tried" in note for note in summarise(inside, settings()).notes)


# --- Other numbers --------------------------------------------------------------------------------------------------


def test_steps_until_the_best_random_run_is_reached():
    run = record(validation_loss=[2.0, 0.3, 0.2, 0.1], evaluation_points=[0, 5, 10, 20])
    assert [steps_until(run, target) for target in (0.3, 0.25, 0.1, 0.05)] == [5, 10, 20, None]
    runs = [record("random", final=0.17), record("eva", final=0.15), record("random", final=0.16, seed=1)]
    summary = summarise([*runs, record("eva", final=0.17, seed=1)], settings(seeds=[0, 1]))
    # Of random the run with seed 1 is the best, 0.16; eva has 0.155 at step 40 with seed 0, never with seed 1.
    assert cells(summary, "best", "eva")["steps to random's best"] == "40, never"
    assert cells(summary, "best", "random")["steps to random's best"] == "never, 60"


def test_what_a_step_does_before_training_is_told_of_those_that_step():
    runs = planted({"eva": 0.0, "lora-one": 0.0}, seeds=(0, 1))
    for run in runs:
        if run["start"] == "lora-one":
            run["gamma"] = 64.0 * (1 + run["seed"])
            run["validation_loss"] = [run["validation_loss"][0] / 2, *run["validation_loss"][1:]]
    summary = summarise(runs, settings(seeds=[0, 1]))
    plain = next(run for run in runs if run["start"] == "random")["validation_loss"][0]
    found = cells(summary, "before", "lora-one")
    assert found["gamma"] == "64, 128" and float(found["step 0"]) == pytest.approx(float(found["plain model"]) / 2)
    assert float(found["plain model"]) == pytest.approx(plain)
    assert len(next(table for table in summary.tables if table.name == "before").rows) == 1
    assert not any(table.name == "before" for table in summarise(planted({"eva": 0.0}), settings()).tables)


def test_an_unstable_rate_sets_no_target_for_the_others():
    runs = [record("random", 3e-3, 0, 0.10), broken("unstable", "nan", start="random", rate=3e-3, seed=1)]
    runs += [record("random", 1e-3, s, 0.17) for s in range(2)] + [record("eva", 1e-3, s, 0.16) for s in range(2)]
    assert cells(summarise(runs, settings()), "best", "eva")["steps to random's best"] == "40, 40"


def test_fewer_parameters_are_told_and_so_is_the_run_with_equal_ones():
    runs = planted({"eva": 0.0})
    for run in runs:
        run["trainable_parameters"] = 900 if run["start"] == "eva" else 1000
    told = "eva trains 900 parameters, 10.0% fewer than random; it was not run with equal parameters."
    assert told in summarise(runs, settings()).notes
    near = [{**run, "equal_parameters": True, "trainable_parameters": 950} for run in runs if run["start"] == "eva"]
    told_of_twin = "eva, equal parameters trains 950 parameters, 5.0% fewer than random; whole ranks come no closer."
    assert told_of_twin in summarise([*runs, *near], settings()).notes
    twins = [{**run, "equal_parameters": True, "trainable_parameters": 999} for run in runs if run["start"] == "eva"]
    assert told.replace("was not", "was also") in summarise([*runs, *twins], settings()).notes


def test_forgetting_and_intruders_are_averaged_over_seeds():
    runs = [record("random", seed=s, retain_loss=[3.0, 3.0 + s], intruders={"count": s, "of": 70, "energy_share": 0.1})
            for s in range(3)]  # fmt: skip
    row = cells(summarise(runs, settings()), "forgetting", "random")
    assert (row["change"], row["intruders"], row["share of energy"]) == ("+1.0000", "1.0 of 70", "10.0%")


def test_metrics_are_paired_too():
    runs = [record("random", seed=s, metrics={"accuracy": 0.5 + s / 100}) for s in range(3)]
    runs += [record("eva", seed=s, metrics={"accuracy": 0.6 + s / 100 + s * s / 1000}) for s in range(3)]
    row = cells(summarise(runs, settings()), "metrics", "eva")
    # Differences 0.100, 0.101, 0.104: mean 0.10167, standard deviation 0.00208; 4.3027 * 0.00208 / sqrt(3) = 0.0052.
    assert (row["accuracy"], row["start − random"]) == ("0.612", "+0.096 to +0.107")


def test_failed_runs_are_named_by_reason():
    runs = [*planted({}), *(broken("failed", "out of memory.", start="eva", seed=s) for s in range(9))]
    note = next(note for note in summarise(runs, settings()).notes if "failed" in note)
    assert note.startswith("9 runs failed (out of memory): eva at 1e-3 with seed 0; ")
    assert note.endswith(" and 3 more.")


def test_the_later_of_two_records_of_a_run_counts():
    runs = [broken("failed", "disk full", start="random"), record("random", final=0.4)]
    (group,) = group_runs(runs)
    assert (group.best, group.best_runs[0]["validation_loss"][-1]) == (1e-3, 0.4)


def test_random_is_first_and_the_rest_in_the_order_asked_for():
    runs = [record(start) for start in ("pissa", "eva", "random")]
    groups = group_runs(runs, ["eva", "pissa"])
    assert [group.variant for group in groups] == [Variant("random"), Variant("eva"), Variant("pissa")]


def test_runs_of_two_tasks_are_refused():
    with pytest.raises(LoraInitError, match=r"2 tasks \(siqa, boolq\)"):
        summarise([record(), record(task="boolq")], settings())


@pytest.mark.parametrize("runs", [[], [record()], [broken("failed", "no", start="eva")], [broken("unstable", "no")]])
def test_few_runs_or_none_still_make_a_summary(runs):
    summary = summarise(runs, settings())
    assert summary.notes
    assert summary.headline


def test_on_a_terminal_every_verdict_is_a_line_and_no_cell_is_cut():
    summary = summarise(planted({"eva": -0.01, "[red]own[/red]": 0.0}), settings())
    console_text = printed_summary(summary)
    assert "[red]own[/red]: no difference shown" in " ".join(console_text.split())
    assert "…" not in console_text
    for table in summary.tables:
        if table.name != "runs":
            assert table.title in console_text


def printed_summary(summary):
    from rich.console import Console

    console = Console(width=100, record=True, color_system=None, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    show_comparison(console, summary)
    return console.export_text()
