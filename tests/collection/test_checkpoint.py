"""A pass that was interrupted goes on and ends as if it had not been; a file of another pass is refused."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_init import LoraInitError, collect
from lora_init.collection.collect import Interrupted
from lora_init.collection.processes import FORMAT, FORMAT_VERSION
from lora_init.statistics.tensorfile import TensorFile
from tests.conftest import MODELS, batches_for, tiny_llama

SETTINGS = {"rank": 4, "tolerance": 0.0, "data": "some data"}


def model(name="llama"):
    torch.manual_seed(5)
    return MODELS[name]()


def stopped_after(n, batches):
    """Batches of which the loader dies."""
    yield from batches[:n]
    raise RuntimeError("the machine went away")


def interrupt(file, n=3, name="llama", batches=None, **changes):
    """Leave the checkpoint of a pass that died after `n` batches."""
    batches = batches or batches_for(name, n_batches=6)
    with pytest.raises(RuntimeError, match="went away"):
        collect(
            changes.pop("model", None) or model(name), stopped_after(n, batches), checkpoint=file, checkpoint_every=0.0,
            **SETTINGS | changes,
        )  # fmt: skip


def assert_same(one, other):
    """Equal bit for bit in all but time."""
    assert list(one) == list(other) and one.group_of == other.group_of
    for name in one:
        for part in ("components", "explained_variance", "mean", "total_variance", "n_samples"):
            a, b = getattr(one[name], part), getattr(other[name], part)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, (name, part)
    assert one.held_out == other.held_out or all(
        a == b or a != a for a, b in zip(one.held_out.values(), other.held_out.values(), strict=True)
    )
    assert one.batch_ratios.keys() == other.batch_ratios.keys()
    assert all(torch.equal(rows, other.batch_ratios[name]) for name, rows in one.batch_ratios.items())
    for part in ("fingerprint", "n_batches", "n_samples", "stop_reason", "notes", "data"):
        assert getattr(one.provenance, part) == getattr(other.provenance, part)


def assert_same_gradients(one, other):
    """Equal bit for bit in what the loss says."""
    assert one.provenance.n_labels == other.provenance.n_labels > 0
    for name in one:
        a, b = one.gradient(name), other.gradient(name)
        assert (a.importance, a.n_samples) == (b.importance, b.n_samples)
        assert a.weighted.total_variance == b.weighted.total_variance
        assert torch.equal(a.weighted.components, b.weighted.components)
        for part in ("left", "singular_values", "right", "output_moment"):
            assert torch.equal(getattr(a, part), getattr(b, part)), (name, part)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("center", [True, False])
def test_a_pass_that_died_goes_on_and_ends_the_same(name, center, tmp_path):
    batches = batches_for(name, n_batches=7)
    interrupt(tmp_path / "c", 4, name, batches, center=center)
    resumed = collect(model(name), batches, checkpoint=tmp_path / "c", resume=True, **SETTINGS, center=center)
    assert_same(resumed, collect(model(name), batches, **SETTINGS, center=center))


def test_a_pass_with_gradients_goes_on_and_ends_the_same(tmp_path):
    batches = batches_for("llama", n_batches=7)
    interrupt(tmp_path / "c", 4, "llama", batches, gradients=True)
    with pytest.raises(LoraInitError, match="was begun with gradients True, this pass has False"):
        collect(model(), batches, checkpoint=tmp_path / "c", resume=True, **SETTINGS)
    resumed = collect(model(), batches, checkpoint=tmp_path / "c", resume=True, **SETTINGS, gradients=True)
    whole = collect(model(), batches, **SETTINGS, gradients=True)
    assert_same(resumed, whole)
    assert_same_gradients(resumed, whole)


@pytest.mark.parametrize("width", [23, 24])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_also_with_odd_widths_few_rows_and_a_large_mean(width, mean, tmp_path):
    torch.manual_seed(1)
    layer = nn.Sequential(nn.Linear(width, 3))
    batches = [torch.randn(n, width) + mean for n in (5, 1, 40, 90, 0, 64, 64, 33)]
    whole = collect(layer, batches, **SETTINGS)
    for n in range(1, 8):
        interrupt(tmp_path / str(n), n, batches=batches, model=layer)
        assert_same(collect(layer, batches, checkpoint=tmp_path / str(n), resume=True, **SETTINGS), whole)


def test_what_the_stopping_rule_remembers_is_kept(tmp_path):
    from tests.collection.test_collect import low_rank_inputs, two_layers

    torch.manual_seed(1)
    net, batches = two_layers(), low_rank_inputs(60)
    settings = SETTINGS | {"tolerance": 0.02, "rank": 3}
    whole = collect(net, batches, **settings)
    assert whole.provenance.stop_reason == "converged"
    n = whole.provenance.n_batches
    for after in (2, n - 1):
        file = tmp_path / str(after)
        interrupt(file, after, batches=batches, model=net, **settings)
        assert_same(collect(net, batches, checkpoint=file, resume=True, **settings), whole)


def test_a_finished_pass_is_read_from_its_file_without_running_the_model(tmp_path):
    batches, ran = batches_for("llama", n_batches=9), []

    def forward(net, batch):
        ran.append(1)
        net(**batch)

    settings = SETTINGS | {"forward": forward, "checkpoint": tmp_path / "c", "checkpoint_every": 0.0}
    whole = collect(model(), batches[:5], **settings)
    again = collect(model(), batches[:5], **settings, resume=True)
    assert len(ran) == 5
    assert_same(whole, again)
    # More batches than there were: the pass goes on with those.
    assert collect(model(), batches, **settings, resume=True, max_batches=8).provenance.n_batches == 8
    assert len(ran) == 8


def test_without_a_file_resume_begins(tmp_path):
    file, batches = tmp_path / "new" / "c.safetensors", batches_for("llama")
    assert_same(
        collect(model(), batches, checkpoint=file, resume=True, **SETTINGS), collect(model(), batches, **SETTINGS)
    )
    assert file.is_file()


@pytest.mark.parametrize("width", [23, 24])
def test_also_with_as_many_directions_as_there_are(width, tmp_path):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    batches, settings = [torch.randn(64, width) for _ in range(6)], SETTINGS | {"rank": 16}
    interrupt(tmp_path / "c", 3, batches=batches, model=net, **settings)
    resumed = collect(net, batches, checkpoint=tmp_path / "c", resume=True, **settings)
    assert_same(resumed, collect(net, batches, **settings))


def test_a_file_without_a_single_batch_is_as_good_as_none(tmp_path):
    with pytest.raises(RuntimeError, match="went away"):
        collect(model(), stopped_after(0, []), checkpoint=tmp_path / "c", **SETTINGS)
    assert (tmp_path / "c").exists()
    settings = SETTINGS | {"rank": 2}
    stats = collect(model(), batches_for("llama"), checkpoint=tmp_path / "c", **settings)
    assert_same(stats, collect(model(), batches_for("llama"), **settings))


def test_ctrl_c_leaves_the_last_state_in_the_file(tmp_path):
    def stream():
        yield from batches_for("llama", n_batches=3)
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        collect(model(), stream(), checkpoint=tmp_path / "c", checkpoint_every=0.0, **SETTINGS)
    batches = batches_for("llama", n_batches=5)
    resumed = collect(model(), batches, checkpoint=tmp_path / "c", resume=True, **SETTINGS)
    assert_same(resumed, collect(model(), batches, **SETTINGS))


def test_the_file_is_written_when_its_time_has_come(tmp_path, monkeypatch):
    now, written = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def stream():
        for batch in batches_for("llama", n_batches=6):
            now[0] += 25.0
            yield batch
            written.append(TensorFile(tmp_path / "c", FORMAT, FORMAT_VERSION).header["n_batches"])

    collect(model(), stream(), checkpoint=tmp_path / "c", checkpoint_every=60.0, **SETTINGS)
    assert written == [0, 0, 3, 3, 3, 6]


# What is refused


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    interrupt(tmp_path / "c")
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(
        LoraInitError,
        match=r"c exists, from a pass that was interrupted after 3 batches\. Pass resume=True to go on from it",
    ):
        collect(model(), batches_for("llama"), checkpoint=tmp_path / "c", **SETTINGS)
    with pytest.raises(LoraInitError, match="resume=True needs checkpoint="):
        collect(model(), batches_for("llama"), resume=True, **SETTINGS)
    assert (tmp_path / "c").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"rank": 3},
            r"^\S+ was begun with rank 4, this pass has 3\. Name another file, or delete this one to begin again\.$",
        ),
        ({"rho": 1.0}, r"begun with rho 2\.0, this pass has 1\.0"),
        ({"seed": 1}, "begun with seed 0, this pass has 1"),
        ({"center": False}, "begun with center True, this pass has False"),
        ({"token_mask": "labels"}, "begun with token_mask 'attention', this pass has 'labels'"),
        ({"tolerance": 0.1}, r"begun with tolerance 0\.0, this pass has 0\.1"),
        ({"data": "other"}, "begun with data 'some data', this pass has 'other'"),
        ({"target_modules": ["q_proj"]}, r"begun with layers '14 \(\w+\)', this pass has '2 \(\w+\)'"),
    ],
)
def test_other_arguments_are_refused(changes, expected, tmp_path):
    interrupt(tmp_path / "c")
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(LoraInitError, match=expected):
        collect(model(), batches_for("llama"), checkpoint=tmp_path / "c", resume=True, **SETTINGS | changes)
    assert (tmp_path / "c").read_bytes() == before


def test_another_model_or_other_batches_are_refused(tmp_path):
    interrupt(tmp_path / "c", 3)

    def resume(net, batches):
        return collect(net, batches, checkpoint=tmp_path / "c", resume=True, **SETTINGS)

    before, batches = (tmp_path / "c").read_bytes(), batches_for("llama", n_batches=6)
    with pytest.raises(LoraInitError, match="begun with model 'LlamaForCausalLM"):
        resume(tiny_llama(), batches)
    with pytest.raises(LoraInitError, match=r"batch 0 is not the one that .*c has used in its place"):
        resume(model(), batches_for("llama", seed=1))
    with pytest.raises(LoraInitError, match="batch 2 is not the one"):
        resume(model(), [batches[0], batches[1], batches[3], batches[2]])
    with pytest.raises(LoraInitError, match="has used 3 batches, the data has 2"):
        resume(model(), batches[:2])
    assert (tmp_path / "c").read_bytes() == before


def test_files_that_are_no_whole_checkpoint_are_refused(tmp_path):
    interrupt(tmp_path / "c")
    content = (tmp_path / "c").read_bytes()
    stats = collect(model(), batches_for("llama"), **SETTINGS).save(tmp_path / "stats")
    broken = bytearray(content)
    broken[-1] ^= 1
    for bad, expected in (
        (content[:-1], "not a whole safetensors file"),
        (bytes(broken), "is not what was written"),
        (stats.read_bytes(), "of format 'lora_init.statistics', expected 'lora_init.checkpoint'"),
    ):
        (tmp_path / "c").write_bytes(bad)
        with pytest.raises(LoraInitError, match=expected):
            collect(model(), batches_for("llama"), checkpoint=tmp_path / "c", resume=True, **SETTINGS)


def test_a_place_that_cannot_be_written_is_said_before_the_pass(tmp_path, monkeypatch):
    ran = []

    def forward(net, batch):
        ran.append(1)
        net(**batch)

    (tmp_path / "file").touch()
    for file, expected in ((tmp_path / "file" / "c", "cannot be written"), (tmp_path, "is not a file")):
        with pytest.raises(LoraInitError, match=expected):
            collect(model(), batches_for("llama"), checkpoint=file, forward=forward, **SETTINGS)

    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "fsync", read_only)
    with pytest.raises(LoraInitError, match="c: cannot be written: Read-only file system"):
        collect(model(), batches_for("llama"), checkpoint=tmp_path / "c", forward=forward, **SETTINGS)
    assert not ran
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fills_up_on_the_way_does_not_end_the_pass(tmp_path, monkeypatch):
    def stream():
        for position, batch in enumerate(batches_for("llama")):
            if position == 2:
                monkeypatch.setattr(os, "fsync", full)
            yield batch

    def full(_):
        raise OSError(28, "No space left on device")

    with pytest.warns(UserWarning, match="No space left on device.*goes on without"):
        stats = collect(model(), stream(), checkpoint=tmp_path / "c", checkpoint_every=0.0, **SETTINGS)
    assert stats.provenance.n_batches == 4


# SIGKILL


def killed_after(seconds, work):
    """Run `work` in a forked process and kill it; return whether it was still at it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_twenty_kills_never_leave_a_half_file_or_a_wrong_result(tmp_path):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 4))
    batches = [torch.randn(64, 96) for _ in range(160)]
    settings = SETTINGS | {"rank": 8, "max_batches": 160}
    started = time.perf_counter()
    expected = collect(net, batches, **settings)
    alone = time.perf_counter() - started
    file, rng = tmp_path / "c", random.Random(0)

    def go_on():
        collect(net, batches, checkpoint=file, checkpoint_every=0.0, resume=True, **settings)

    at, kills = [], 0
    for _ in range(20):
        kills += killed_after(rng.uniform(0.0, alone / 4), go_on)
        if file.exists():  # whole at every moment: opening it checks the header, reading it all digests
            whole = TensorFile(file, FORMAT, FORMAT_VERSION)
            assert all(whole.tensor(name) is not None for name in whole.header["digests"])
            at.append(whole.header["n_batches"])
    assert kills > 10 and at == sorted(at) and len(set(at)) > 5
    resumed = collect(net, batches, checkpoint=file, resume=True, **settings)
    assert_same(resumed, expected)
    assert [entry.name for entry in Path(tmp_path).iterdir()] == ["c"]  # what the killed left is swept up
