"""When a pass ends: the tolerance, the limit, Ctrl-C; and what is said of it."""

import io
import itertools
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lora_init import collect, principal_angles
from lora_init.collection import loop
from lora_init.collection.collect import Interrupted
from lora_init.collection.loop import (
    MIN_BATCHES,
    Collected,
    GroupRecord,
    Halves,
    _line,
    _outcome,
    falls_sharply,
    is_enough,
    progress_bar,
    row_norms,
)
from lora_init.errors import LoraInitError
from lora_init.statistics.incremental_svd import IncrementalSVD
from tests import reference
from tests.collection.made import low_rank_inputs, two_layers


def test_the_held_out_share_is_what_earlier_batches_predict():
    model, batches = two_layers(), low_rank_inputs(3)
    stats = collect(model, batches, rank=2, rho=1.5)
    components, _, _ = reference.pca(batches[0], 3)  # the second goes to the other half
    unseen = np.asarray(batches[2] - batches[0].mean(0), dtype=np.float64)
    expected = ((unseen @ components.T) ** 2).sum() / (unseen**2).sum()
    assert stats.held_out["0"] == pytest.approx(expected, rel=1e-3)


def test_stops_as_converged_when_unseen_rows_are_captured_as_well_as_seen_ones():
    stats = collect(two_layers(), iter(low_rank_inputs(60)), rank=3)
    assert stats.provenance.stop_reason == "converged"
    assert 8 <= stats.provenance.n_batches < 20
    assert stats.held_out["0"] > 0.9


def drifting(n_other, n=64, d=256, rows=500, seed=0, power=1.0):
    """Batches with variances j^-power, the first along other directions; and rows of the later kind to test on."""
    generator = torch.Generator().manual_seed(seed)
    kinds = [torch.linalg.qr(torch.randn(d, d, generator=generator)).Q for _ in range(2)]
    scale = torch.arange(1, d + 1).float() ** (-power / 2)
    drawn = [torch.randn(rows, d, generator=generator) * scale for _ in range(n + 8)]
    rotated = [batch @ kinds[i < n_other].T for i, batch in enumerate(drawn)]
    return rotated[:n], torch.cat(rotated[n:])


@pytest.mark.filterwarnings("ignore:batch")
@pytest.mark.parametrize("power", [1.0, 0.5])  # the exact components of all rows capture 0.97 where it is 0.5
@pytest.mark.parametrize(("n_other", "least"), [(0, 0.95), (1, 0.95), (4, 0.95)])  # the tolerance
def test_does_not_stop_while_the_components_still_follow_a_drift(n_other, least, power):
    batches, unseen = drifting(n_other, power=power)
    layer = nn.Sequential(nn.Linear(256, 4))
    stats = collect(layer, batches, rank=8)
    best = reference.captured(unseen, reference.pca(unseen, 16)[0])
    assert reference.captured(unseen, stats["0"].components) > least * best
    assert n_other or stats.provenance.n_batches < 16 / power  # negative: steady data stop soon


def test_what_the_whole_keeps_follows_from_how_its_halves_agree():
    record = Halves([SimpleNamespace(agreement=lambda other, rank: 0.6)] * 2)
    record.compare(4)
    assert record.reliability == pytest.approx(2 * 0.6 / 1.6)  # Spearman and Brown


# How well each of the batches after the first two was captured, against the rows before it; the later half counts.
STEADY = [0.5] * 4 + [1.0] * 4


@pytest.mark.parametrize(("keeps", "relative", "enough"), [
    (1.0, STEADY, True),
    (0.951, STEADY, True),
    (0.949, STEADY, False),  # another sample would give another start
    (1.0, [1.0] * (MIN_BATCHES - 2), True),
    (1.0, [1.0] * (MIN_BATCHES - 3), False),  # too few to tell
    (1.0, [1.0] * 4 + [0.951] * 4, True),
    (1.0, [1.0] * 4 + [0.949] * 4, False),  # later batches are captured worse than those before
    (1.0, [1.0] * 4 + [1.051] * 4, False),  # or better, as the components follow them
    (1.0, [1.0] * 4 + [0.951, 0.951, 1.049, 1.049], True),
    (1.0, [1.0] * 4 + [0.949, 0.949, 1.051, 1.051], False),  # a rise by more than twice the tolerance
    (1.0, [1.0] * 4 + [1.1, 1.1, 0.9, 0.9], True),  # a fall is no sign that the components follow
    (1.0, [1.0] * 4 + [0.8, 1.2, 0.8, 1.2], True),  # single batches differ
])  # fmt: skip
def test_data_are_enough_where_halves_agree_and_later_batches_bring_nothing_new(keeps, relative, enough):
    assert is_enough(keeps, relative, 0.05) is enough


def test_a_share_falls_sharply_by_a_quarter_and_by_five_deviations():
    assert falls_sharply([0.9, 0.91, 0.9, 0.6]) and falls_sharply([0.85, 0.9, 0.95, 0.6])
    assert not falls_sharply([0.8, 0.9, 1.0, 0.45])  # by less than five deviations
    assert not any(map(falls_sharply, ([0.9, 0.9001, 0.9, 0.8], [0.9, 0.3, 0.8, 0.5], [0.9, 0.9, 0.6])))


def test_data_that_are_sorted_are_a_warning():
    batches, _ = drifting(6, n=12)
    with pytest.warns(UserWarning, match="batch 6: far less of it is captured .* in 1 of 1 inputs.*Shuffle the data"):
        collect(nn.Sequential(nn.Linear(256, 4)), batches, rank=8)


def test_a_layer_that_is_not_done_keeps_the_pass_going_for_all():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.easy, self.hard = nn.Linear(24, 2), nn.Linear(24, 2)

        def forward(self, easy, hard):
            return self.easy(easy) + self.hard(hard)

    batches = [
        {"easy": easy, "hard": torch.randn(64, 24, generator=torch.Generator().manual_seed(i)) * 2**i}
        for i, easy in enumerate(low_rank_inputs(20, noise=0.0))
    ]
    stats = collect(Two(), batches, rank=3)
    assert (stats.provenance.stop_reason, stats["easy"].n_samples) == ("exhausted", 20 * 64)
    assert collect(Two(), batches, "easy", rank=3).provenance.n_batches == 8


def test_reads_no_more_batches_than_it_may():
    drawn = []

    def stream():
        for batch in low_rank_inputs(10):
            drawn.append(1)
            yield batch

    collect(two_layers(), stream(), rank=2, max_batches=3)
    assert len(drawn) == 3


def test_interrupted_keeps_the_batches_that_were_complete():
    def stream():
        yield from low_rank_inputs(3)
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        collect(two_layers(), stream(), rank=2)
    stats = caught.value.statistics
    assert (stats.provenance.stop_reason, stats.provenance.n_batches) == ("interrupted", 3)
    expected = collect(two_layers(), low_rank_inputs(3), rank=2)
    assert principal_angles(stats["0"].components, expected["0"].components).max() < 1e-5

    def at_once():
        raise KeyboardInterrupt
        yield

    with pytest.raises(Interrupted) as caught:
        collect(two_layers(), at_once(), rank=2)
    assert caught.value.statistics is None


@pytest.mark.parametrize("gradients", [False, True])
def test_a_layer_that_first_ran_in_an_interrupted_batch_is_as_if_it_never_ran(gradients):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.early, self.late, self.n = nn.Linear(24, 24), nn.Linear(24, 2), 0

        def forward(self, x):
            self.n += 1
            y = self.early(x)
            if self.n < 3:
                return y
            self.late(y)
            raise KeyboardInterrupt

    loss = {"gradients": True, "loss": lambda output, batch: output.square().mean()} if gradients else {}
    with pytest.raises(Interrupted) as caught:
        collect(Late(), low_rank_inputs(5), rank=2, **loss)
    stats = caught.value.statistics
    assert list(stats) == ["early"] and stats.provenance.n_batches == 2
    assert stats.provenance.notes == ["late: never ran; PEFT's own initialization."]


def test_the_progress_bar_is_quiet_unless_asked(capsys):
    collect(two_layers(), low_rank_inputs(3), rank=2)
    assert capsys.readouterr().err == ""
    collect(two_layers(), low_rank_inputs(9), rank=2, progress=True)
    said = capsys.readouterr().err
    assert "the start would keep" in said and re.search("collect: .*[1-9]/9 .*batch", said)
    for n_batches in (3, MIN_BATCHES - 1, MIN_BATCHES):
        collect(two_layers(), low_rank_inputs(n_batches), rank=2, progress=True)
        # Of few batches that is not known.
        assert ("would keep" in capsys.readouterr().err) is (n_batches == MIN_BATCHES)


def record(*batches):
    one = GroupRecord((IncrementalSVD(4), IncrementalSVD(4)))
    for batch in batches:
        one.current.project(batch)
        one.update()
    return one


@pytest.mark.parametrize("counts", [(1, 1), (3, 1), (3, 3), (1, 4)])
def test_shares_of_processes_count_by_the_batches_that_they_are_of(counts):
    """The later half, of all processes."""
    one, other = record(), record()
    one.shares = [(2 * i, 0.1 * i, 1.0) for i in range(counts[0])]
    other.shares = [(2 * i + 1, 0.5 + 0.1 * i, 1.0) for i in range(counts[1])]
    both = sorted(one.shares + other.shares)
    one.merge(other)
    assert one.held_out() == pytest.approx(np.mean([share for _, share, _ in both[len(both) // 2 :]]))


@pytest.mark.parametrize("counts", [(1, 1), (3, 1), (3, 3), (1, 4)])
def test_halves_of_processes_merge_into_halves(counts):
    """Whatever number of batches each has; what they would keep is known as soon as there are two batches."""
    rows = torch.randn(sum(counts), 100, 32, generator=torch.Generator().manual_seed(0)) * 0.8 ** torch.arange(32)
    one, other = record(*rows[: counts[0]]), record(*rows[counts[0] :])
    one.merge(other)
    few, many = sorted(half.n_samples for half in one.halves)
    assert few + many == 100 * sum(counts) and many - few <= 100 * (sum(counts) % 2)
    one.compare(4)
    assert one.reliability > 0.9


def test_what_processes_found_is_put_together_as_one_would_have_found_it():
    """Layers that ran in one of them alone are taken over, others merged; what is counted adds up, time does not."""
    rows = torch.randn(4, 100, 32, generator=torch.Generator().manual_seed(0))
    one = Collected({"a": record(rows[0]), "b": record(rows[1])}, n_labels=3, group_of={"a": "a", "a2": "a", "b": "b"})
    other = Collected({"b": record(rows[2]), "c": record(rows[3])}, n_labels=4, group_of={"b": "b", "c": "c", "a": "c"})
    one.sums.update({("inputs", "a"): 1.0, ("tokens", "a"): 5.0})
    other.sums.update({("inputs", "a"): 2.0, ("tokens", "c"): 7.0})
    one.n_batches, other.n_batches, one.empty, other.empty, one.bad, other.bad = [2], [1], ["x"], ["y"], ["p"], ["q"]
    one.seconds, other.seconds = (dict(forward=1.0, data=4.0), dict(forward=3.0, data=2.0))
    one.merge(other)
    assert {name: halves.n_samples for name, halves in one.groups.items()} == {"a": 100, "b": 200, "c": 100}
    assert (one.n_labels, one.n_batches, one.empty, one.bad) == (7, [2, 1], ["x", "y"], ["p", "q"])
    assert one.sums == {("inputs", "a"): 3.0, ("tokens", "a"): 5.0, ("tokens", "c"): 7.0}
    assert one.group_of == {"a": "a", "a2": "a", "b": "b", "c": "c"} and one.seconds == dict(forward=3.0, data=4.0)


def test_what_the_start_keeps_is_the_least_of_its_kinds_in_the_mean_over_layers():
    def halves(*values):
        return {i: Halves((None, None), value) for i, value in enumerate(values)}

    assert Collected().keeps == 0.0
    assert Collected(halves(0.4, 0.8)).keeps == pytest.approx(0.6)
    assert Collected(halves(0.4, 0.8), halves(0.5), halves(0.9)).keeps == 0.5
    assert Collected(halves(0.4, 0.8), halves(0.9), halves(0.3, 0.2)).keeps == 0.25


def test_a_batch_is_as_new_as_it_is_to_the_layers_that_ran():
    one = GroupRecord((None, None), shares=[(2, 0.5, 0.8), (4, 0.5, 1.0)])
    other = GroupRecord((None, None), shares=[(4, 0.5, 0.6), (3, 0.5, 0.9)])
    assert Collected({"a": one}, {"a": other}).relative == pytest.approx([0.8, 0.9, 0.8])


@pytest.mark.parametrize(("held_out", "captured", "share", "relative"), [
    (([3.0, 1.0, 9.0], 8.0), 1.0, 0.5, 0.5),  # of the components to report, of which there are two
    (([3.0, 1.0, 9.0], 8.0), 0.8, 0.5, 0.625), (([0.25, 0.125, 1.0], 0.75), 0.5, 0.5, 1.0),
    (([0.0, 0.0, 0.0], 0.0), 0.5, 1.0, 2.0),  # a batch without variance is no surprise
    (([3.0, 1.0, 9.0], 8.0), 0.0, 0.5, 1.0),
])  # fmt: skip
def test_how_well_a_batch_was_predicted(held_out, captured, share, relative):
    captured_of_it, total = held_out
    half = SimpleNamespace(held_out=(torch.tensor(captured_of_it), total), captured=captured, n_components=2)
    found = GroupRecord((SimpleNamespace(held_out=None), half))
    assert found.record_share(5) and found.shares == [(5, share, pytest.approx(relative))]
    nothing_before = GroupRecord((half, SimpleNamespace(held_out=None)))
    assert not nothing_before.record_share(5) and nothing_before.shares == []


@pytest.mark.parametrize(("shares", "mean"), [
    ([0.2], 0.2), ([0.2, 0.4], 0.4), ([0.2, 0.4, 0.8], 0.6), ([0.0] * 3 + [0.5] * 3, 0.5),
])  # fmt: skip
def test_the_later_half_of_the_batches_counts(shares, mean):
    found = GroupRecord((None, None), shares=[(i, share, 1.0) for i, share in enumerate(shares)])
    assert found.held_out() == pytest.approx(mean)
    assert np.isnan(GroupRecord((None, None)).held_out())


@pytest.mark.parametrize(("order", "norms"), [(1, [7.0, 2.0, 0.0, 60000.0]), (2, [5.0, 2.0, 0.0, 30000 * 2**0.5])])
def test_norms_of_rows_are_in_32_bits_at_least(order, norms):
    x = torch.tensor([[[3.0, -4.0], [0.0, 2.0]], [[0.0, 0.0], [30000.0, 30000.0]]])
    for dtype in (torch.float16, torch.float32, torch.float64):
        found = row_norms(x.to(dtype), None, order)
        assert found.dtype == torch.promote_types(dtype, torch.float32) and found.tolist() == pytest.approx(norms)
        assert torch.equal(row_norms(x.to(dtype), torch.tensor([3, 0]), order), found[[3, 0]])


@pytest.mark.parametrize(("flags", "reason"), [
    ((False, False, False, False), "exhausted"),
    ((False, False, False, True), "max_batches"),
    ((False, False, True, True), "converged"),
    ((False, True, True, True), "failed"),
    ((True, True, True, True), "interrupted"),
])  # fmt: skip
def test_why_a_pass_ended(flags, reason):
    """The first of these reasons that there is; an error of this process comes before those of others."""
    own = ValueError("bad")
    run = SimpleNamespace(failure=own, failed="batch 3")
    processes = SimpleNamespace(gather=lambda line: [None, line or "batch 7: other"])
    error, found = _outcome(run, processes, *flags)
    kinds = {"failed": ValueError, "interrupted": KeyboardInterrupt}
    assert found == reason and type(error) is kinds.get(reason, type(None))
    run.failure = None
    if reason == "failed":
        assert str(_outcome(run, processes, *flags)[0]) == "rank 1 failed: batch 7: other"


@pytest.mark.parametrize(("n_converged", "reason"), [(1, "exhausted"), (2, "converged")])
def test_a_pass_has_converged_where_every_process_has(n_converged, reason, monkeypatch):
    found = SimpleNamespace(keeps=None, bad=[], stop_reason="")
    run = SimpleNamespace(found=found, failure=None, failed="", converged=False, forget=lambda: None)
    processes = SimpleNamespace(
        size=2, rank=1, interrupted=False, merge=lambda one: one, sum=lambda *flags: [0, n_converged, 0, 0, 0]
    )
    monkeypatch.setattr(loop, "_next_batch", lambda *arguments: (0, None))
    assert loop.run_pass(run, None, 8, processes, None).stop_reason == reason


def test_an_error_of_a_batch_in_a_line():
    assert _line(LoraInitError("batch 1: said."), "batch 2") == "batch 1: said."
    assert _line(ValueError("bad\nmore"), "batch 2").startswith("batch 2: ValueError: bad")
    assert _line(ValueError("bad"), "").startswith("the data: ValueError: bad")


@pytest.mark.parametrize(("batches", "most", "total"), [
    ([1, 2, 3], 5, 3), ([1, 2, 3], 2, 2), ((i for i in range(3)), 5, 5),
])  # fmt: skip
def test_the_progress_bar_ends_where_the_pass_does(batches, most, total):
    with progress_bar(batches, most, False) as bar:
        assert bar.total == total and bar.disable


@pytest.mark.parametrize("progress", [None, True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_bar_is_shown_on_a_terminal_or_where_it_is_asked_for(progress, terminal, monkeypatch):
    shown = io.StringIO()
    shown.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", shown)
    with progress_bar([1], 5, progress) as bar:
        assert bar.disable is not (terminal if progress is None else progress)


def test_the_time_of_a_pass_is_that_of_the_model_of_decompositions_and_of_the_data(monkeypatch):
    """By a clock that goes on by a second each time it is read: forward passes have what decompositions do not."""
    ticks = itertools.count(1.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(ticks), monotonic=lambda: 0.0))
    made = collect(two_layers(), low_rank_inputs(5), rank=2).provenance
    # For each batch one reading, two layers' rows and two updates, beside which the forward pass has three.
    assert made.seconds == {"forward": 15.0, "decomposition": 20.0, "data": 6.0}


class Both(nn.Module):
    """Two layers of one width, each with an input of its own."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(256, 4), nn.Linear(256, 4)

    def forward(self, one, other):
        return self.one(one) + self.other(other)


@pytest.mark.parametrize("all_fall", [True, False])
def test_a_fall_is_told_where_it_is_that_of_more_than_half_of_the_inputs(all_fall, recwarn):
    sorted_batches, steady = drifting(6, n=9)[0], drifting(0, n=9, seed=1)[0]
    pairs = zip(sorted_batches, sorted_batches if all_fall else steady, strict=True)
    # A copy, or the two would read one tensor and be one input.
    collect(Both(), [{"one": one, "other": other.clone()} for one, other in pairs], rank=8)
    said = [str(one.message).partition(", as if")[0] for one in recwarn]
    words = "batch 6: far less of it is captured than of all batches before, in 2 of 2 inputs"
    assert said[:1] == [words] if all_fall else said == []


def test_a_steady_pass_warns_of_nothing(recwarn):
    collect(two_layers(), low_rank_inputs(9), rank=2)
    collect(two_layers(), low_rank_inputs(1), rank=2)
    assert not recwarn


@pytest.mark.parametrize("where", ["in the model", "in the data"])
def test_ctrl_c_ends_what_runs_at_once_and_no_batch_is_read_any_more(where):
    drawn, gone_on = [], []

    def interrupt(here):
        if where == here and len(drawn) == 3:
            signal.raise_signal(signal.SIGINT)
            gone_on.append(here)

    def stream():
        for batch in low_rank_inputs(6):
            drawn.append(1)
            interrupt("in the data")
            yield batch

    def forward(model, batch):
        interrupt("in the model")
        return model(batch)

    with pytest.raises(Interrupted) as caught:
        collect(two_layers(), stream(), rank=2, forward=forward)
    assert len(drawn) == 3 and not gone_on and caught.value.statistics.provenance.n_batches == 2


def test_a_pass_needs_no_gradients_of_the_model():
    seen = []
    collect(
        two_layers(), low_rank_inputs(2), rank=2,
        forward=lambda model, batch: seen.append(torch.is_grad_enabled()) or model(batch),
    )  # fmt: skip
    assert seen == [False, False]


def test_another_seed_draws_other_directions_to_begin_with():
    """Decompositions are random: of rows with a flat spectrum each seed finds others."""
    model, batches = nn.Sequential(nn.Linear(64, 64)), [torch.randn(200, 64) for _ in range(6)]
    asked = dict(rank=2, gradients=True, loss=lambda output, batch: output.square().mean())
    one, same, other = (collect(model, batches, **asked, seed=seed) for seed in (3, 3, 4))
    for part in (lambda s: s["0"].components, lambda s: s.gradient("0").right):
        assert torch.equal(part(one), part(same)) and not torch.equal(part(one), part(other))
