"""What a comparison is said to do and to take beforehand, counted by hand; nothing is trained."""

import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from lora_init.comparison import outlook
from lora_init.comparison.effects import detectable
from lora_init.comparison.outlook import Outlook, Pace, look_ahead, measure
from lora_init.comparison.runs import RunPlan
from lora_init.comparison.tasks import CLASSIFICATION, Item, Task
from lora_init.comparison.training import Training
from lora_init.comparison.variants import Variant
from tests.comparisons import record

STEP, EXAMPLE = 10.0, 0.1  # seconds
PACE = Pace(STEP, EXAMPLE)
PLAN = RunPlan([*map(Variant, ("random", "eva", "eva-grad"))], [1e-4, 1e-3, 1e-2], range(5), "halving", extend=3)


def bench(kind="language", strengths=(), retain=None):
    """24 steps of 4; 12 examples to report with 3 options each, at 2 evaluations, and 8 to select by."""
    examples = [SimpleNamespace(choices=["a", "b", "c"])] * 12
    task = SimpleNamespace(report=examples, selection=[None] * 8, train=[None] * 200, kind=kind)
    training = SimpleNamespace(steps=24, batch_size=4, evaluation_points=[0, 24])
    return SimpleNamespace(
        task=task, training=training, strengths=strengths, retain=retain, folds={"train": 200},
        n_batches=lambda wanted: wanted or 32,
    )  # fmt: skip


RUN = 24 * STEP + (12 * 2 + 8 + 36) * EXAMPLE
# For each seed a pass for eva, and one that goes backward, too, for eva-grad.
PASSES = 32 * 4 * EXAMPLE * (1.2 + 3.5)


@pytest.fixture
def ahead(monkeypatch):
    monkeypatch.setattr(outlook, "measure", lambda bench: PACE)

    def ahead(plan=PLAN, ended=(), n_workers=1, **about):
        records = {
            run: record(run.start, run.learning_rate, run.seed, 0.1 + (run.learning_rate != 1e-3)) for run in ended
        }
        runs = plan.runs(plan.starts, records)
        return look_ahead(bench(**about), plan, runs, records, n_workers), runs

    return ahead


def test_the_time_is_that_of_all_runs_and_of_each_pass_over_data_once(ahead):
    found, runs = ahead()
    assert found.n_runs == len(runs) == 3 * 3 * 2 + 3 * 3 and (found.ended, found.dial_seconds) == (0, 0.0)
    assert found.seconds == pytest.approx(len(runs) * RUN + 5 * PASSES)
    alone, some = ahead(replace(PLAN, starts=PLAN.starts[:1]))
    assert alone.seconds == pytest.approx(len(some) * RUN)  # random reads no data
    # Statistics that are centered differ from those that are not; ranks, rates and scales share a pass.
    for starts, n_passes in (("eva-uncentred", 2), ("eva-rho2", 1), ("eva+32-alpha", 1)):
        both, some = ahead(replace(PLAN, starts=[*map(Variant.parse, ("random", "eva", starts))]))
        assert both.seconds == pytest.approx(len(some) * RUN + 5 * n_passes * 32 * 4 * EXAMPLE * 1.2)


def test_what_has_ended_takes_no_time_again(ahead):
    _, runs = ahead()
    done = [run for run in runs if run.seed in (0, 1)]
    found, _ = ahead(ended=done)
    assert found.ended == len(done) == 18 and found.n_runs == 27
    assert found.seconds == pytest.approx(9 * RUN + 3 * PASSES)


def test_several_processes_share_the_time(ahead):
    (one, _), (four, _) = (ahead(strengths=(0.5, 1.0), n_workers=n) for n in (1, 4))
    for name in ("seconds", "most_seconds", "dial_seconds"):
        assert getattr(four, name) == pytest.approx(getattr(one, name) / 4) and getattr(one, name) > 0.0


def test_each_strength_but_full_strength_scores_what_is_reported_and_kept(ahead):
    retain = [{"input_ids": [0] * 8}, {"input_ids": [0] * 5}]
    (plain, runs), (found, _) = ahead(), ahead(strengths=(0.4, 0.7, 1.0), retain=retain)
    assert found.dial_seconds == pytest.approx(len(runs) * 2 * (12 + 13) * EXAMPLE)
    assert found.seconds == pytest.approx(plain.seconds + found.dial_seconds + len(runs) * 13 * EXAMPLE)
    changed, some = ahead(replace(PLAN, starts=[*map(Variant, ("random", "pissa", "full"))]), strengths=(0.5, 1.0))
    dialed = sum(str(run.start) == "random" for run in some)  # the others change the base, or have no adapter
    assert changed.dial_seconds == pytest.approx(dialed * 12 * EXAMPLE)


def test_what_may_be_added_is_counted_and_takes_its_time(ahead):
    found, runs = ahead()
    longer, rates = 5, 3 * 2 * 3  # random on all seeds for twice the steps; 3 times a rate on 2 seeds for each start
    assert found.may_add == {"rates": rates, "seeds": 0, "longer": longer}
    assert found.most_runs == len(runs) + rates + longer
    assert found.most_seconds == pytest.approx(found.seconds + (rates + longer) * RUN + longer * 24 * STEP)
    alone, _ = ahead(replace(PLAN, starts=PLAN.starts[:1], extend=0))
    assert alone.may_add == {"rates": 0, "seeds": 0, "longer": 0} and alone.most_seconds == alone.seconds


@pytest.mark.parametrize(("kind", "scatter"), [("language", 0.005), (CLASSIFICATION, 0.03)])
@pytest.mark.parametrize(("n_seeds", "said"), [(5, [5]), (3, [3, 5]), (1, [5])])
def test_what_can_be_shown_is_said_for_these_seeds_and_for_five(ahead, kind, scatter, n_seeds, said):
    found, _ = ahead(replace(PLAN, seeds=range(n_seeds)), kind=kind)
    assert list(found.detectable) == said and found.scatter == scatter
    assert all(shown == pytest.approx(detectable(2, n) * scatter) for n, shown in found.detectable.items())
    assert found.swept + found.others == list(range(n_seeds)) and len(found.swept) == min(2, n_seeds)


def test_each_start_has_a_row_with_its_rates_and_runs_in_the_order_asked_for(ahead):
    found, _ = ahead(replace(PLAN, learning_rates=[], recommended={"random": 1e-3, "eva": 2e-3, "eva-grad": 3e-3}))
    assert [row["name"] for row in found.starts] == ["random", "eva", "eva-grad"]
    assert [row["own_rate"] for row in found.starts] == [1e-3, 2e-3, 3e-3]
    for row in found.starts:
        assert len(row["rates"]) == 3 and row["rates"] == sorted(row["rates"]) and row["own_rate"] in row["rates"]
    assert sum(row["runs"] for row in found.starts) == found.n_runs


@pytest.fixture
def timed(monkeypatch):
    """A workbench of texts of 2 to 9 tokens; trainings of 9 and 2 seconds and a scoring of 6 are noted."""
    seconds, now, seen = iter([9.0, 2.0]), [0.0], []

    def train(model, task, training, **options):
        seen.append((model, task.train, task.report, task.selection, training, options))
        return SimpleNamespace(training_seconds=next(seconds))

    def evaluate(model, task, items):
        seen.append((model, items))
        now[0] += 6.0

    prepared = SimpleNamespace(peft_model="model", release=lambda: seen.append("released"))
    monkeypatch.setattr(outlook, "prepare", lambda variant, inputs: seen.append((variant, inputs.seed)) or prepared)
    monkeypatch.setattr(outlook, "train", train)
    monkeypatch.setattr(outlook, "evaluate", evaluate)
    monkeypatch.setattr(outlook.time, "perf_counter", lambda: now[0])
    texts = [Item(([0] * n, [])) for n in (2, 3, 5, 6, 7, 9)]
    task = Task("causal-lm", texts, texts[:1], texts[:1], (), 0, False, "", "", {})
    about = dict(training=SimpleNamespace(steps=9, batch_size=2), shape=None, loaded=SimpleNamespace(model="plain"))
    return SimpleNamespace(task=task, **about), seen


def test_a_step_and_an_example_are_timed_the_second_time_on_a_batch_of_usual_size(timed):
    bench, seen = timed
    order = bench.task.order(0, 9, 2)
    sizes = [2 * max(len(item.tokens[0]) for item in items) for items in order]
    mean = sum(sizes) / len(sizes)
    assert measure(bench) == Pace(2.0, 6.0 / 2)
    (start, *trained, scored, end) = seen
    usual = scored[1]
    assert usual in order and abs(2 * len(usual[-1].tokens[0]) - mean) == min(abs(size - mean) for size in sizes)
    assert 2 * len(usual[-1].tokens[0]) not in (min(sizes), max(sizes))
    assert (start, scored, end) == ((Variant("random"), 0), ("model", usual), "released")
    options = dict(learning_rate=1e-6, seed=0, plain_loss=math.inf)
    assert trained == [("model", usual, usual, usual, Training(1, 2, 0.0, [0, 1]), options)] * 2


def test_the_model_is_put_back_where_it_cannot_be_timed(timed, monkeypatch):
    bench, seen = timed
    monkeypatch.setattr(outlook, "evaluate", None)
    with pytest.raises(TypeError):
        measure(bench)
    assert seen[-1] == "released"


def test_starts_that_were_added_come_last_and_it_is_told_in_plain_values(ahead):
    later = Variant.parse("eva+equal-parameters")
    plan = replace(PLAN, starts=[later, *PLAN.starts[:2]], sweep="full", seeds=(4, 7))
    found, runs = ahead(plan)
    assert [row["name"] for row in found.starts] == ["eva+equal-parameters", "random", "eva"]
    assert (found.swept, found.others) == ([4, 7], []) and found.folds == {"train": 200}
    assert found.to_dict() == asdict(found) | {"pace": {"step": STEP, "example": EXAMPLE}}
    assert found.starts[1] == {"name": "random", "rates": [1e-4, 1e-3, 1e-2], "own_rate": None, "runs": 6}
    records = {run: record(run.start, run.learning_rate, run.seed) for run in runs}
    ended = look_ahead(bench(), replace(plan, starts=plan.starts[1:]), [*runs[::-1]], records)
    assert isinstance(ended, Outlook) and [row["name"] for row in ended.starts][:2] == ["random", "eva"]
    assert (ended.seconds, ended.ended, ended.starts[2]["name"]) == (0.0, len(runs), "eva+equal-parameters")
