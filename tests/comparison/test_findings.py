"""Verdicts, notes and tables of a comparison, from records with planted results."""

import re

import numpy as np
import pytest
from scipy import stats

from lora_init.comparison.findings import data_needed, equal_loss, make_command, notes, summarise
from lora_init.comparison.runs import run_table
from lora_init.comparison.tables import run_tables
from lora_init.comparison.variants import Variant
from lora_init.comparison.wording import in_words, percent
from tests.comparisons import broken, exact, planted, record, settings


def verdict(summary, label="eva"):
    return next(v for v in summary.verdicts if v.start == label)


def cells(summary, name, label):
    table = run_tables(summary)[name].set_index("start")
    return dict(table.loc[label])


# Verdicts


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


@pytest.mark.parametrize(("added", "extend"), [([], None), ([1.8e-4], 3)])
def test_rates_that_are_rounded_as_they_are_planned_are_not_taken_for_added_ones(added, extend):
    """A third of 1.6e-3 is planned as 5.3e-4. Interrupted there, the same command goes on."""
    losses = {4.8e-3: 0.3, 1.6e-3: 0.2, 5.3e-4: 0.17, **dict.fromkeys(added, 0.16)}
    runs = [
        record(name, rate, seed, loss)
        for name in ("random", "eva")
        for seed in range(3)
        for rate, loss in losses.items()
    ]
    found = summarise(runs, settings(learning_rates=None, extend=1, recommended={"random": 1.6e-3, "eva": 1.6e-3}))
    assert "is the lowest tried" in found.answer and ("--extend 3" in found.answer) == (extend == 3), found.answer


@pytest.mark.parametrize(("added", "extend"), [([], None), ([1.8e-4], 3)])
@pytest.mark.parametrize("way", ["equal-parameters", "32-alpha", "32-alpha+equal-parameters"])
@pytest.mark.slow
def test_a_way_to_run_a_start_has_the_first_rates_of_what_was_measured(way, added, extend):
    losses = {4.8e-3: 0.3, 1.6e-3: 0.2, 5.3e-4: 0.17, **dict.fromkeys(added, 0.16)}
    runs = [
        record(name, rate, seed, loss - 0.05 * (name != "random"))
        for name in ("random", f"eva-rho2+{way}")
        for seed in range(3)
        for rate, loss in (losses if name != "random" else {1.6e-4: 0.3, 4.8e-4: 0.2, 1.6e-3: 0.3}).items()
    ]
    found = summarise(runs, settings(learning_rates=None, extend=1, recommended={"random": 4.8e-4, "eva-rho2": 1.6e-3}))
    assert "is the lowest tried" in found.answer and ("--extend 3" in found.answer) == (extend == 3), found.answer


@pytest.mark.parametrize(("best", "said"), [
    (1e-4, "is the lowest tried"), (1e-2, "is the highest tried"),
])  # fmt: skip
def test_where_it_is_not_known_which_rates_were_added_the_command_is_still_named(best, said):
    """A start whose rate could not be measured has no first ends."""
    runs = [
        record(name, rate, seed, 0.2 - 0.05 * (rate == best))
        for name in ("random", "eva")
        for seed in range(3)
        for rate in (1e-4, 1e-3, 1e-2)
    ]
    asked = settings(learning_rates=None, recommended={}, extend=2)
    found = summarise(runs, asked)
    # Of rates above none all count as added: there are as many as may be, and more are asked for.
    assert said in found.answer and ("--extend 4" in found.answer) == (best == 1e-2), found.answer


@pytest.mark.parametrize(("tried", "extend"), [
    ((1e-4, 3e-4, 1e-3), None), ((3e-5, 1e-4, 3e-4, 1e-3), 3), ((1e-4, 3e-4, 1e-3, 3e-3), 3),
])  # fmt: skip
@pytest.mark.parametrize("given", [dict(learning_rates=[1e-4, 3e-4, 1e-3]),
                                   dict(learning_rates=None, recommended={"random": 3e-4, "eva": 3e-4})])  # fmt: skip
@pytest.mark.slow
def test_rates_beyond_those_that_were_tried_first_count_as_added_on_their_own_side(given, tried, extend):
    best = tried[0] if tried[0] < 1e-4 else tried[-1]
    runs = [
        record(name, rate, seed, 0.2 - 0.05 * (rate == best))
        for name in ("random", "eva") for seed in range(3) for rate in tried
    ]  # fmt: skip
    found = summarise(runs, settings(extend=1, init="lora-init init", **given))
    assert ("--extend 3" in found.answer) == (extend == 3) and found.answer.startswith("No advice yet"), found.answer
    # The caveats are told, but nothing is advised and no command is given.
    assert found.start is found.command is None and "tried" in found.caveats[0]


def test_statistics_of_fewer_batches_are_compared_with_those_of_most():
    shifts = {"eva+1-batches": 0.02, "eva+8-batches": 0.0, "eva+16-batches": -0.01, "orthogonal": 0.0}
    lost = broken("failed", "no room", start="eva+4-batches")
    found = data_needed(run_table([*planted(shifts, rates=(1e-3,), spread=0.0001), lost]))
    assert [said.partition(":")[0] for said in found] == [
        "eva with 1 batches instead of 16", "eva with 8 batches instead of 16",
    ]  # fmt: skip
    few, more = (float(re.search(r"differs by \+([\d.]+) %", said)[1]) for said in found)
    assert (few, more) == pytest.approx((18.75, 6.25), abs=0.5) and "worse" in found[0]  # 0.03 and 0.01 above 0.16
    assert data_needed(run_table(planted({"eva+2-batches": 0.02}, rates=(1e-3,)))) == []
    # In the order of the table, which is that in which starts were named.
    named = {f"{start}+{n}-batches": 0.0 for start in ("orthogonal", "eva") for n in (2, 4)}
    found = data_needed(run_table(planted(named, rates=(1e-3,))))
    assert [said.partition(" ")[0] for said in found] == ["orthogonal", "eva"]


def test_a_start_is_said_with_how_it_is_run():
    for name, words in (
        ("eva", "eva"),
        ("eva+16-batches", "eva with statistics of 16 batches (eva+16-batches)"),
        ("eva+32-alpha+16-batches+equal-parameters",
         "eva with lora_alpha 32 and as many parameters as random and statistics of 16 batches "
         "(eva+32-alpha+16-batches+equal-parameters)"),
    ):  # fmt: skip
        assert in_words(name) == words


@pytest.mark.parametrize(("name", "options"), [
    ("eva-uncentred", ["--method", "eva", "--rho", "2", "--no-center"]),
    ("eva-frozen-a", ["--method", "eva", "--rho", "2", "--freeze-a"]),
    ("random-frozen-a", ["--method", "random", "--rho", "1", "--freeze-a"]),
    ("eva-rho1", ["--method", "eva", "--rho", "1"]),
    ("eva+equal-parameters", None), ("mine", None), ("gradient-ranks", None), ("full", None), ("full+9-steps", None),
])  # fmt: skip
def test_the_options_that_make_a_start(name, options):
    assert Variant.parse(name).init_options() == options


def test_the_same_run_twice_is_no_winner():
    assert judged([0.1, 0.2], [0.1, 0.2]).outcome == "no difference shown"


def test_a_planted_winner_a_loser_and_a_tie():
    summary = summarise(planted({"eva": -0.01, "pissa": 0.01, "orthogonal": 0.0}), settings())
    found = verdict(summary)
    assert found.sentence.startswith("eva is better; its final loss is ")
    assert f"{-100 * found.mean / found.reference:.1f} % lower than random's (−0.0" in found.sentence
    assert "; 3 runs of each; eva at 1e-3, random at 1e-3). A difference of 0." in found.sentence
    assert verdict(summary, "pissa").outcome == "worse"
    assert verdict(summary, "orthogonal").sentence.startswith("orthogonal: no difference shown; ")
    assert summary.headline.startswith(
        "3 compared with random: 1 better, 1 worse, 1 no difference shown. Runs: 48 finished."
    )
    row = cells(summary, "differences", "eva")
    assert row["verdict"] == "better" and row["pairs"] == "3" and row["detectable"].endswith(" %")


def test_a_difference_inside_the_interval_wins_nothing_however_large():
    found = judged((0.10, 0.19, 0.21), (0.2, 0.2, 0.2))
    assert found.outcome == "no difference shown"
    assert "16.7 % lower" in found.sentence and "better" not in found.sentence
    assert found.detectable > abs(found.mean)


def test_each_start_is_compared_at_its_own_best_rate():
    runs = [record("random", 1e-3, s, 0.20 + s / 1000) for s in range(3)]
    runs += [record("random", 1e-4, s, 0.15 + s / 1000) for s in range(3)]
    runs += [record("eva", 1e-3, s, 0.16 + s / 900) for s in range(3)]
    runs += [record("eva", 1e-4, s, 0.30) for s in range(3)]
    # At 1e-3 eva is 0.04 ahead, the trap; tuned, random is 0.01 ahead.
    found = verdict(summarise(runs, settings()))
    assert (found.outcome, "eva at 1e-3, random at 1e-4" in found.sentence) == ("worse", True)


def test_without_a_pair_the_reason_and_the_loss_of_random_are_said():
    random = [record(seed=seed) for seed in (0, 1)]
    apart = verdict(summarise([*random, record("eva", seed=2)], settings()))
    assert apart.sentence == "eva: no statement possible, since no seed finished both here and with random."
    failed = verdict(summarise([*random, broken("failed", "no room", start="eva")], settings()))
    assert failed.sentence.endswith("since eva has no rate with a finished run and no unstable one.")
    for found in (apart, failed):
        assert (found.differences, found.mean, found.reference) == ({}, None, pytest.approx(0.17))
    # Where both lack a rate, it is the start that its own sentence names.
    neither = [broken("failed", "no room", start=start) for start in ("random", "eva")]
    for runs, lacking in ((neither, "eva"), ([neither[0], record("eva")], "random")):
        alone = verdict(summarise(runs, settings()))
        assert alone.reference is None and f"since {lacking} has no rate with a finished run" in alone.sentence


# Rates


def test_an_unstable_run_is_named_not_averaged_and_the_next_lower_rate_is_given():
    runs = planted({"eva": -0.01})
    bad = next(run for run in runs if (run["start"], run["learning_rate"], run["seed"]) == ("eva", 3e-3, 1))
    bad.update(status="unstable", error="loss rose to 9.1 at step 12", report_loss=[2.3, 9.1])
    summary = summarise(runs, settings())
    said = "eva is unstable at 3e-3 (seed 1: loss rose to 9.1 at step 12), so this rate is not averaged."
    assert said in summary.notes
    assert cells(summary, "learning_rates", "eva")["3e-3"] == "unstable, 1 of 3"


def test_unstable_rates_are_named_in_the_order_of_the_starts():
    runs = planted({"pissa": 0.0, "eva": 0.0})
    runs += [broken("unstable", "NaN", start=start, rate=rate) for start in ("eva", "pissa") for rate in (3e-2, 1e-2)]
    found = summarise(runs, settings(starts=["random", "pissa", "eva"])).notes
    named = [said.partition(" (")[0] for said in found if " is unstable at " in said]
    assert named == [f"{start} is unstable at {rate}" for start in ("pissa", "eva") for rate in ("1e-2", "3e-2")]


def test_a_best_rate_at_the_end_of_the_sweep_is_a_part_of_the_verdict():
    def caveats(losses):
        runs = [record("eva", rate, 0, loss) for rate, loss in zip((1e-4, 3e-4, 1e-3), losses, strict=True)]
        return verdict(summarise([*runs, *planted({}, seeds=(0,))], settings())).caveats

    assert caveats((0.3, 0.2, 0.1)) == ["its best rate, 1e-3, is the highest tried, so a higher may be better"]
    assert caveats((0.1, 0.2, 0.3)) == ["its best rate, 1e-4, is the lowest tried, so a lower may be better"]
    assert caveats((0.3, 0.1, 0.2)) == []


# The answer


def test_the_answer_names_the_best_start_and_the_command_that_makes_it():
    runs = planted({"eva-rho1": -0.01, "pissa": -0.005, "orthogonal": 0.0})
    summary = summarise(runs, settings(init="lora-init init m d.jsonl --rank 8"))
    assert summary.answer == (
        "Use eva-rho1 at 1e-3: its final loss is 6.0 % lower than random's at 1e-3 (−0.0102). At random's task "
        "loss it is not shown to forget less or more: the loss on other text changes by +0.0400, with random by "
        "+0.0400."
    )
    not_timed = "At equal total time nothing can be said of eva-rho1, since random was not trained longer."
    assert summary.caveats == [not_timed]
    assert (
        summary.command
        == "lora-init init m d.jsonl --rank 8 --samples 8 --max-batches 4 --lora-alpha 16 --method eva --rho 1 "
        "--learning-rate 1e-3 --output adapter"
    )
    assert summary.facts.startswith("tiny/model, rank 8, on siqa")
    summary = summarise([run for run in runs if run["learning_rate"] == 1e-3], settings())
    only = "was run at 1e-3 only, so it is not known to be tuned."
    assert summary.caveats == [f"It {only}", f"Random {only}", not_timed]


def test_without_a_winner_the_answer_is_what_could_have_been_shown():
    summary = summarise(planted({"eva": 0.0}), settings(init="lora-init init"))
    assert summary.answer.startswith("No start is shown to be better than random at 1e-3; a difference of 0.")
    options = "--samples 8 --max-batches 4 --lora-alpha 16 --method random --rho 1"
    assert summary.command == f"lora-init init {options} --learning-rate 1e-3 --output adapter"
    assert summarise([record()], settings()).answer == "The runs do not say yet which start to use."


@pytest.mark.parametrize(("name", "rate", "options"), [
    ("eva-rho1+32-alpha+6-batches", 3e-4,
     "--samples 12 --max-batches 6 --lora-alpha 32 --method eva --rho 1 --learning-rate 3e-4"),
    ("eva-rho1", None, "--samples 8 --max-batches 4 --lora-alpha 16 --method eva --rho 1"),
    ("bank-nearest", 3e-4,
     "--samples 8 --max-batches 4 --lora-alpha 16 --method from-bank --by nearest --bank BANK"),
    ("eva-rho1+equal-parameters", 3e-4, None), (None, 3e-4, None),
])  # fmt: skip
def test_the_command_of_a_start_has_what_is_special_about_it(name, rate, options):
    made = make_command(name, settings(init="lora-init init m d"), rate)
    assert made == (options and f"lora-init init m d {options} --output adapter")
    assert make_command(name, settings(), rate) is None


def test_as_long_as_nothing_can_be_shown_no_start_is_advised():
    found = summarise([record(), record(seed=1), record("eva")], settings(init="lora-init init"))
    assert (found.answer, found.start, found.command, found.caveats) == (
        "The runs do not say yet which start to use.", None, None, [],
    )  # fmt: skip


def test_runs_are_judged_without_any_settings():
    runs = planted({"eva": -0.01, "pissa": 0.01}, rates=(3e-4, 1e-3))
    found, usual = summarise(runs, {}), summarise(runs, settings(learning_rates=[3e-4, 1e-3]))
    assert found.verdicts == usual.verdicts and (found.title, found.command) == ("Starts compared", None)
    assert [*found.alphas] == ["random", "eva", "pissa"] and np.isnan([*found.alphas.values()]).all()
    assert found.answer.endswith("To go on, give the same command with --extend 2.")


def test_a_start_is_told_with_its_own_lora_alpha_if_it_has_one():
    runs = [record(name) for name in ("random", "eva", "eva+32-alpha", "full")]
    assert summarise(runs, settings()).alphas == {"random": 16.0, "eva": 16.0, "eva+32-alpha": 32}


def test_a_recommended_start_is_judged_at_its_own_rate_too():
    runs = planted({"eva+32-alpha": 0.0, "natural-gradient+80-alpha": 0.0})  # which end lowest at 1e-3
    rates = {"eva+32-alpha": 1e-4, "natural-gradient+80-alpha": 1e-3, "pissa": 1e-3}
    own, best = summarise(runs, settings(recommended=rates)).as_recommended
    assert own.startswith("eva+32-alpha at 1e-4, the measured rate: worse; its final loss differs by +")
    assert best.startswith("natural-gradient+80-alpha at 1e-3, the measured rate: no difference shown;")
    assert best.endswith("That is the best of its rates.") and "best of" not in own
    [few] = summarise(
        [run for run in runs if run["seed"] == 0], settings(recommended={"eva+32-alpha": 1e-4})
    ).as_recommended
    assert few == "eva+32-alpha at 1e-4, the measured rate: no statement possible with so few runs."
    assert summarise(runs, settings()).as_recommended == []


# Headroom

ENDS = ("random", "full")


@pytest.mark.parametrize(("left", "said"), [
    (0.05, "So random goes 98 % of the way, and 29.4 % is left. A difference of 3.3 % or more would have shown."),
    (0.0002, ": nothing to win here that would show."),
    (-0.01, "That is no lower than random: nothing to win here."),
])  # fmt: skip
def test_headroom(left, said):
    summary = summarise(with_headroom(left, 0.0), settings(starts=["random", "eva", "full"]))
    assert said in summary.headroom and summary.headroom.startswith("The plain model has a loss of 2.3000, and random")
    best = summary.table[summary.table["best"]]
    random, full = (best[best["start"].eq(name)]["loss"].mean() for name in ENDS)
    against = percent((full - random) / random, "+")
    assert f"ends at {full:.4f}, at 1e-3: {against} against random ({against} to {against})." in summary.headroom
    assert [verdict.start for verdict in summary.verdicts] == ["eva"]


def with_headroom(left, gain):
    """Runs in which full fine-tuning ends `left` below random on each seed, and eva about `gain`."""
    runs = planted({"eva": -gain, "full": 0.0}, spread=0.002)
    random = {(r["learning_rate"], r["seed"]): r["report_loss"][-1] for r in runs if r["start"] == "random"}
    for run in runs:
        if run["start"] == "full":
            run["report_loss"] = [*run["report_loss"][:-1], random[run["learning_rate"], run["seed"]] - left]
    return runs


def test_the_share_of_the_headroom_that_a_start_closes_is_said():
    summary = summarise(with_headroom(0.05, 0.04), settings())
    (eva,) = summary.verdicts
    assert eva.closed == pytest.approx(-eva.mean / 0.05) and 0.7 < eva.closed < 0.9
    ends = [f"{100 * -end / 0.05:.0f} %" for end in (eva.high, eva.low)]
    assert f"It closes {100 * eva.closed:.0f} % of the headroom ({ends[0]} to {ends[1]})." in eva.sentence
    assert run_tables(summary)["differences"]["of the headroom"].tolist() == [f"{100 * eva.closed:.0f} %"]
    small = summarise(with_headroom(0.0002, 0.04), settings())
    assert small.verdicts[0].closed is None and "of the headroom" not in run_tables(small)["differences"]


def test_the_headroom_is_of_the_seeds_that_both_have():
    """Seeds differ far more than starts do, so a seed that is missing on one side must not count on the other."""
    runs = [run for run in with_headroom(0.05, 0.04) if (run["start"], run["seed"]) != ("full", 2)]
    (eva,) = summarise(runs, settings()).verdicts
    assert eva.closed == pytest.approx(-eva.mean / 0.05, rel=1e-6)


@pytest.mark.parametrize("left", [0.0002, -0.01])
def test_what_a_start_has_won_was_there_to_win(left):
    runs = with_headroom(left, 0.04)
    runs += [run | {"start": "olora", "report_loss": [2.3, 0.3]} for run in runs[:12]]
    found = summarise(runs, settings())
    assert [verdict.outcome for verdict in found.verdicts] == ["better", "worse"]
    assert "nothing to win" not in found.headroom and found.headroom.endswith(
        "would have shown." if left > 0 else "That is no lower than random."
    )


def test_the_plain_model_is_the_one_of_the_runs_of_random():
    """On another seed, that of other starts alone, it may have another loss."""
    plain = [2.2, 2.4, 9.0]
    runs = [record("random", seed=seed, plain_loss=plain[seed]) for seed in (0, 1)]
    runs += [record("eva", seed=seed, plain_loss=plain[seed]) for seed in range(3)]
    assert summarise(runs, settings()).headroom.startswith("The plain model has a loss of 2.3000, and random")


def test_a_start_with_fewer_runs_needs_a_larger_difference_to_show():
    runs = [run for run in planted({"eva": 0.0, "pissa": 0.0}) if (run["start"], run["seed"]) != ("eva", 2)]
    summary = summarise(runs + [run | {"start": "full"} for run in runs[:12]], settings())
    few, all_ = (percent(one.detectable / one.reference) for one in summary.verdicts)
    assert few != all_ and f"; a difference of {all_} to {few} or more would have shown." in summary.answer
    left = summarise(runs + [run | {"start": "full", "report_loss": [2.3, 0.1]} for run in runs[:12]], settings())
    assert left.headroom.endswith(f"A difference of {all_} or more would have shown.")


# Forgetting and cost


def test_forgetting_is_judged_at_equal_task_loss_over_all_rates():
    runs = planted({"eva": -0.02, "pissa": 0.02}, rates=(1e-4, 1e-3), spread=0.0002)
    for run in runs:  # the higher rate forgets ten times as much; eva is as good as random at the lower one
        rise = {1e-4: 0.003, 1e-3: 0.03}[run["learning_rate"]] + run["seed"] / 1e4
        run["retain_loss"] = [3.0, 3.0 + rise]
        if run["start"] == "eva":
            run["report_loss"][-1] = next(
                r["report_loss"][-1] for r in runs
                if (r["start"], r["learning_rate"], r["seed"]) == ("random", 1e-3, run["seed"])
            )  # fmt: skip
    said = summarise(runs, settings()).forgetting
    assert said[0].startswith(
        "Forgetting at equal task loss, eva: less than random. The loss on other text changes by "
    )
    assert "+0.0031, with random by +0.0301 (difference −0.0270" in said[0]
    assert said[1] == "Forgetting at equal task loss, pissa: it reaches random's loss with too few seeds to tell."
    noise = [0.5, -0.4, 0.9]  # of what is a reference and not compared
    full = [run | {"start": "full", "retain_loss": [3.0, 3.0 + noise[run["seed"]]]} for run in runs[:6]]
    assert {run["start"] for run in runs[:6]} == {"random"} and summarise([*runs, *full], settings()).forgetting == said
    assert summarise([run | {"retain_loss": None} for run in runs], settings()).forgetting == []


def test_what_is_forgotten_is_of_the_seeds_that_both_have():
    """Seeds differ far more than starts do: one on which a start does not reach the loss must not count for random."""
    runs = planted({"eva": 0.0}, rates=(1e-3,), seeds=range(4), spread=0.0)
    for run in runs:
        run["retain_loss"] = [3.0, 3.1 + run["seed"]]
        if (run["start"], run["seed"]) == ("eva", 3):
            run["report_loss"][-1] += 0.1
    assert "changes by +1.1000, with random by +1.1000" in summarise(runs, settings()).forgetting[0]


def test_the_strength_that_keeps_most_is_chosen_at_the_loss_of_random():
    runs = planted({"eva": -0.02}, rates=(1e-3,), spread=0.0002)
    for run in runs:  # both forget the same at full strength; eva has task loss to spare, and needs half of it
        loss, rise = run["report_loss"][-1], 0.03 + run["seed"] / 1e4
        run["retain_loss"] = [3.0, 3.0 + rise]
        run["dial"] = [[s, loss + 0.04 * (1 - s), 3.0 + rise * s] for s in (0.4, 0.7, 1.0)]
    found = summarise(runs, settings())
    eva, random = (run_tables(found)["frontiers"].set_index("start").loc[name] for name in ("eva", "random"))
    # 0.5 % of random's loss are 0.00085: random can be turned down to 0.98, eva by 0.52 to 0.48, seeds 1 / 1e4 apart.
    assert random["rise on other text"] == "+0.0295" and eva["rise on other text"].startswith("+0.014")
    assert found.forgetting[0].startswith("Forgetting at equal task loss, eva: less than random.")
    assert found.forgetting[0].endswith("each adapter at the strength that keeps most.")
    assert "At random's task loss it forgets less: the loss on other text changes by +0.014" in found.answer
    assert "frontiers" not in run_tables(summarise(planted({"eva": 0.0}), settings()))


def test_of_a_winner_whose_forgetting_was_not_measured_nothing_is_told():
    runs = planted({"eva": -0.02}, rates=(1e-3,), spread=0.0002)
    for run in runs:
        if run["start"] == "eva":
            run["retain_loss"] = None
    found = summarise(runs, settings())
    assert found.start == "eva" and "forget" not in found.answer


def test_of_a_rate_with_an_unstable_run_nothing_counts_as_kept():
    runs = planted({"eva": 0.0}, rates=(1e-3,), spread=0.0)
    runs += [record("eva", 1e-2, 0, 0.01, retain_loss=[3.1, 3.1]), broken("unstable", "NaN", start="eva", rate=1e-2)]
    runs[-1]["seed"] = 1
    assert "changes by +0.0400, with random by +0.0400" in summarise(runs, settings()).forgetting[0]


def test_of_a_start_whose_forgetting_was_not_measured_nothing_is_said():
    runs = planted({"eva": 0.0, "pissa": 0.0}, rates=(1e-3,))
    runs = [run | {"retain_loss": None} if run["start"] == "eva" else run for run in runs]
    (said,) = summarise(runs, settings()).forgetting
    assert said.startswith("Forgetting at equal task loss, pissa: ")
    alone = summarise([run for run in runs if run["start"] != "random"], settings())
    assert alone.forgetting == [] and [one.outcome for one in alone.verdicts] == ["no statement"] * 2


def test_that_strengths_were_chosen_is_said_where_some_runs_have_none():
    runs = planted({"eva": 0.0}, rates=(1e-3,))
    for run in runs:
        run["dial"] = [[1.0, run["report_loss"][-1], run["retain_loss"][-1]]]
    (said,) = summarise([*runs, broken("failed", "no room", start="pissa")], settings()).forgetting
    assert said.endswith(", each adapter at the strength that keeps most.")


@pytest.mark.parametrize("dialed", [False, True])
@pytest.mark.parametrize(("above", "final", "rise"), [
    (0.0, 0.2, 0.1), (0.0, 0.2001, None), (0.25, 0.25, 0.1), (0.25, 0.2501, None), (-0.25, 0.15, 0.1),
])  # fmt: skip
def test_a_run_that_ends_at_the_very_task_loss_reaches_it(above, final, rise, dialed):
    runs = [record("random", final=0.2), record("eva", final=final, retain_loss=[3.0, 3.1])]
    if dialed:
        runs[1]["dial"] = [[0.0, 2.3, 3.0], [1.0, final, 3.1]]
    found = equal_loss(run_table(runs), above)
    assert ("eva" in found.index) == (rise is not None)
    if rise:
        assert found.loc["eva", 0] == pytest.approx(rise)


# Other numbers


def test_fewer_parameters_are_a_part_of_the_verdict():
    runs = planted({"eva": 0.0})
    for run in runs:
        run["trainable_parameters"] = 900 if run["start"] == "eva" else 1000
    found = verdict(summarise(runs, settings()))
    assert found.caveats == ["it trains 900 parameters, 10.0 % fewer than random"]
    assert found.sentence.endswith("Keep in mind: it trains 900 parameters, 10.0 % fewer than random.")
    for number, told in ((985, ["it trains 985 parameters, 1.5 % fewer than random"]), (999, [])):
        for run in runs:
            run["trainable_parameters"] = number if run["start"] == "eva" else 1000
        assert verdict(summarise(runs, settings())).caveats == told


def test_before_any_run_has_ended_that_is_all_that_is_said():
    assert summarise([], settings()).notes == ["No run has ended yet, so there is nothing to compare."]


def test_where_runs_were_done_is_said_if_processors_differ():
    places = [("A", None), ("A", "gpu-1"), ("B", "gpu-2"), ("B", "gpu-2")]
    runs = [
        record(seed=seed, circumstances={"processor": processor, "threads": 1, "versions": {}}, node=node)
        for seed, (processor, node) in enumerate(places)
    ]
    (note,) = [note for note in summarise(runs, settings()).notes if "Runs differ in" in note]
    assert "processor (A on the first machine: 1 runs, A on gpu-1: 1 runs, B on gpu-2: 2 runs)" in note
    assert not [note for note in summarise(runs[:2], settings()).notes if "Runs differ in" in note]


@pytest.mark.parametrize(("places", "said"), [
    ([("A", 1, None), ("B", 1, None)], "processor (A: 1 runs, B: 1 runs)"),
    ([("A", 1, "x"), ("A", 2, "y")], "threads (1: 1 runs, 2: 1 runs)"),
    ([("A", 1, "x"), ("B", 1, "y"), None], "processor (A on x: 1 runs, B on y: 1 runs)"),
])  # fmt: skip
def test_nodes_are_named_where_they_have_names_and_processors_differ(places, said):
    runs = []
    for seed, place in enumerate(places):
        processor, threads, node = place or (None, None, "z")
        about = {"processor": processor, "threads": threads, "versions": {}} if place else None
        runs.append(record(seed=seed, circumstances=about, node=node))
    told = noted(runs, starts=["random"], seeds=[*range(len(places))])
    assert told == [f"Runs differ in {said}, so equal ones may differ by rounding."]


# All that is said


def test_each_sentence_from_its_first_word_to_its_last():
    starts = ["random", "eva", "eva+2-batches", "pissa", "olora", "full", "nobody"]
    rates = {"random": 1e-3, "eva": 1e-3, "pissa": 3e-3, "nobody": 1e-3}
    asked = dict(starts=starts, seeds=[0, 1, 2, 3], init="lora-init init m d", recommended=rates, kind="causal-lm")
    found = summarise(exact(), settings(**asked, folds={"report": 99}))
    said = {name: value for name, value in vars(found).items() if name not in ("table", "verdicts")}
    assert [verdict.sentence for verdict in found.verdicts] == [
        "eva is better; its final loss is 9.5 % lower than random's (−0.0200; interval −9.5 % to −9.5 %; 3 runs of "
        "each; eva at 1e-3, random at 1e-3). A difference of 0.00 % or more would have shown. It closes 50 % of the "
        "headroom (50 % to 50 %).",
        "eva+2-batches is better; its final loss is 4.8 % lower than random's (−0.0100; interval −4.8 % to −4.8 %; 3 "
        "runs of each; eva+2-batches at 1e-3, random at 1e-3). A difference of 0.00 % or more would have shown. It "
        "closes 25 % of the headroom (25 % to 25 %).",
        "pissa is worse; its final loss is 4.8 % higher than random's (+0.0100; interval +4.8 % to +4.8 %; 3 runs of "
        "each; pissa at 1e-3, random at 1e-3). A difference of 0.00 % or more would have shown. It closes −25 % of the "
        "headroom (−25 % to −25 %). Keep in mind: it trains 1,300 parameters, 5.3 % more than random.",
        "olora: no statement possible, since olora has no rate with a finished run and no unstable one.",
    ]
    assert said == {
        "title": "Starts compared · siqa · tiny/model",
        "facts": "tiny/model, rank 8, on siqa (causal-lm): 60 steps of 2 examples, 3 seeds, 53 runs. siqa.jsonl, 800 "
        "rows.",
        "answer": "Use eva at 1e-3: its final loss is 9.5 % lower than random's at 1e-3 (−0.0200). At random's task "
        "loss it forgets less: the loss on other text changes by +0.0100, with random by +0.1000.",
        "caveats": [],
        "start": "eva",
        "command": "lora-init init m d --samples 8 --max-batches 4 --lora-alpha 16 --method eva --rho 1 "
        "--learning-rate 1e-3 --output adapter",
        "headline": "4 compared with random: 2 better, 1 worse, 1 no statement. Runs: 49 finished, 2 unstable, 2 "
        "failed.",
        "headroom": "The plain model has a loss of 2.3000 (2.1000 before it was quantized), and random ends at 0.2100. "
        "Full fine-tuning of the model before it was quantized ends at 0.1700, at 1e-4: −19.0 % against random (−19.0 "
        "% to −19.0 %). So random goes 98 % of the way, and 19.0 % is left. A difference of 0.00 % or more would have "
        "shown.",
        "as_recommended": [
            "eva at 1e-3, the measured rate: better; its final loss differs by −9.5 % (interval −9.5 % to −9.5 %). "
            "That is the best of its rates.",
            "pissa at 3e-3, the measured rate: worse; its final loss differs by +9.5 % (interval +9.5 % to +9.5 %).",
        ],
        # Random ends 0.03 lower after twice the steps: after 80 of them by 0.0125, and 0.02 are worth 59 % more steps.
        "equal_time": [
            "At equal total time eva is still better than random: the final loss of eva differs by −3.8 % (interval "
            "−3.8 % to −3.8 %). Its start takes as long as 20.0 steps. Its lead is worth 59 % further steps of random: "
            "it pays from 34 steps on, if that share is the same there.",
            "At equal total time eva+2-batches is still better than random: the final loss of eva+2-batches differs by "
            "−4.3 % (interval −4.3 % to −4.3 %). Its start takes as long as 1.5 steps. Its lead is worth 26 % further "
            "steps of random: it pays from 6 steps on, if that share is the same there.",
        ],
        "forgetting": [
            "Forgetting at equal task loss, eva: less than random. The loss on other text changes by +0.0100, with "
            "random by +0.1000 (difference −0.0900, interval −0.0900 to −0.0900).",
            "Forgetting at equal task loss, eva+2-batches: more than random. The loss on other text changes by "
            "+0.1500, with random by +0.1000 (difference +0.0500, interval +0.0500 to +0.0500).",
            "Forgetting at equal task loss, pissa: it reaches random's loss with too few seeds to tell.",
        ],
        "data_needed": [],
        "notes": [
            "Not run yet: nobody.",
            "random, eva, eva+2-batches, pissa, full: no finished run with seed 3 at the best rate.",
            "Every figure is from 99 examples. So few decide nothing but large differences.",
            "eva is unstable at 1e-2 (seeds 0, 2: loss 9; no finite loss), so this rate is not averaged.",
            "2 runs failed (no room): pissa, olora.",
        ],
        "alphas": dict.fromkeys(["random", "random+120-steps", "eva", "eva+2-batches", "pissa", "olora"], 16.0),
    }  # fmt: skip


@pytest.mark.parametrize(("status", "is_edge"), [("unstable", False), ("failed", True)])
def test_a_rate_at_which_a_start_diverged_was_tried_and_one_at_which_it_failed_was_not(status, is_edge):
    runs = planted({"eva": -0.02}, rates=(1e-4, 3e-4, 1e-3))
    runs += [broken(status, "no finite loss.", start="eva", rate=3e-3, seed=seed) for seed in range(3)]
    caveats = " ".join(verdict(summarise(runs, settings())).caveats)
    assert ("highest" in caveats) == is_edge


def noted(records, **changes):
    return notes(run_table(records), settings(**changes))


def test_notes_tell_what_a_reader_could_be_misled_by():
    runs = planted({"eva": 0.0})
    assert (
        noted(runs, folds={"report": 100}) == noted(runs) == noted(runs, seeds=[0, 1, 2, 3], budget={"time": 9}) == []
    )
    only = [run for run in runs if run["seed"] == 0]
    few_rates = [run for run in only if run["learning_rate"] > 3e-4]
    for some in (only, few_rates):
        assert noted(some, seeds=[0]) == ["Rates were chosen on a single seed, so another may well be better."]
    assert noted([run for run in only if run["learning_rate"] == 1e-3], seeds=[0]) == []
    assert noted([run for run in runs if run["start"] == "eva"])[0].startswith(
        "Every start is compared with random, and"
    )
    small = (
        "The limit of time made this a comparison of 60 steps a run{}. A lead is often larger after few steps: with "
    )
    small += "more time, name another directory."
    assert noted(runs, size={"tuned": True}) == [small.format("")]
    alone = ", with other starts than random at their measured rate alone"
    assert noted(runs, size={"tuned": False}) == [small.format(alone)]
    # The best start gains 2.13 on each seed, and eva half of that at least, or less.
    few = "Learned less than half of what the best start with the same seed did: eva on 2 of 3 seeds."
    for gain, told in ((1.07, []), (1.06, [few])):
        slow = [record(seed=seed) for seed in range(3)]
        slow += [record("eva", seed=seed, final=2.3 - gain if seed else 0.17) for seed in range(3)]
        assert noted(slow) == told
    fewer = [run for run in slow if (run["start"], run["seed"]) != ("eva", 2)]  # the seeds of the start count
    assert noted(fewer, seeds=[0, 1]) == [few.replace("2 of 3", "1 of 2")]
    # Where no start improves on the plain model, half of the best is nothing to go by.
    for best, told in ((3.0, []), (2.3, []), (1.0, [few.replace("2 of 3", "3 of 3")])):
        ends = (("random", best), ("eva", 4.0))
        assert noted([record(start, seed=seed, final=end) for start, end in ends for seed in range(3)]) == told
    lost = [broken("failed", why, start=start) for why, start in (("z", "eva"), ("a", "pissa"), ("z", "olora"))]
    assert noted([record(), *lost], seeds=[0]) == ["2 runs failed (z): eva, olora.", "1 run failed (a): pissa."]


def test_of_what_runs_differ_in_each_value_is_counted():
    def of(number, **versions):
        about = {"processor": "A", "threads": number, "versions": {"torch": "2.1", **versions}}
        return record(seed=number, circumstances=about)

    runs = [of(1, peft="1"), of(2), of(2, peft="1") | {"start": "eva"}, record(seed=0)]  # of the last nothing is known
    (note,) = (note for note in noted(runs) if "Runs differ" in note)
    said = "Runs differ in threads (1: 1 runs, 2: 2 runs); peft (1: 2 runs, None: 1 runs), so equal ones may differ by "
    assert note == f"{said}rounding."


def test_an_advice_for_random_says_what_is_special_about_its_runs():
    runs = planted({"eva": -0.01, "pissa": -0.02, "orthogonal": 0.0})
    for run in runs:
        if run["start"] == "random" and run["seed"] == 0:
            run["report_loss"] = [*run["report_loss"][:-1], run["report_loss"][-1] + 2.0]
    found = summarise(runs, settings())
    assert found.start == "random" and len(found.caveats) == 1
    assert found.caveats[0].startswith("Random's runs spread ") and found.caveats[0].endswith("not pooled with others.")
