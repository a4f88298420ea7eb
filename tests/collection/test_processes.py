"""Several processes find together what one finds alone, and end together."""

import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from datasets.distributed import split_dataset_by_node

from lora_init import Statistics, collect, principal_angles
from lora_init.collection.processes import Processes
from tests import reference
from tests.collection.made import SETTINGS, all_rows, counts_of, exact, kept, llama, low_rank_inputs, two_layers
from tests.conftest import batches_for, refused
from tests.processes import run

pytestmark = pytest.mark.slow  # several processes


def net():
    torch.manual_seed(5)
    return two_layers()


class Sampled(torch.utils.data.Dataset):
    """The rows of a list of batches, for loaders that make the batches."""

    def __init__(self, batches):
        self.rows = torch.cat(batches)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def own_and_common_data(rank, size, folder):
    """Everything that has one result, in each way that a process can come by its batches; hashes of the results."""
    batches, inputs, found = batches_for("llama", 16), low_rank_inputs(60), {}

    def keep(name, model, data, **changes):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            stats = collect(model, data, **SETTINGS | changes)
        found[name] = (
            kept(stats, folder, f"{name}-{rank}"),
            [str(w.message) for w in caught if "rank" in str(w.message)],
        )

    keep("common", llama(), batches)
    keep("own", llama(), batches[rank::size])
    keep("generator", llama(), iter(batches))
    keep(
        "uneven",
        llama(),
        [batches[: 13 if size > 1 else 16], batches[13:15] if size > 2 else batches[13:], batches[15:]][rank],
    )
    keep("empty", llama(), batches if rank == size - 1 else [])
    keep("uncentred", llama(), batches, center=False)
    keep("bounded", llama(), batches, max_batches=9)
    keep("converged", net(), inputs, tolerance=0.02, rank=3)
    sampler = torch.utils.data.DistributedSampler(Sampled(inputs), size, rank, shuffle=False)
    keep("sampler", net(), torch.utils.data.DataLoader(Sampled(inputs), 64, sampler=sampler), rank=3)
    prepared = prepare_data_loader(
        torch.utils.data.DataLoader(Sampled(inputs), 64), num_processes=size, process_index=rank, put_on_device=False
    )
    keep("accelerate", net(), prepared, rank=3)
    stream = Dataset.from_dict({"x": torch.cat(inputs).tolist()}).to_iterable_dataset(num_shards=6).with_format("torch")
    split = torch.utils.data.DataLoader(split_dataset_by_node(stream, rank, size), 64)
    keep("node", net(), split, rank=3, forward=lambda model, batch: model(batch["x"]))
    if size > 1:
        dispatched = type("DataLoaderDispatcher", (), {"__iter__": lambda self: iter(inputs)})()
        refused(r"^the loader reads in one.*dispatch_batches=False", collect, net(), dispatched)
    if size > 2:
        keep("alike", net(), inputs[:4] if rank < 2 else inputs[4:8], rank=3)
    return found


@pytest.fixture(scope="module")
def by_one_process():
    """What one finds, centred and not; the rows of each layer, and the most that any eight directions capture."""
    model, batches = llama(), batches_for("llama", 16)
    alone = {center: collect(model, batches, **SETTINGS, center=center) for center in (True, False)}
    rows = {layer: all_rows(model, batches, layer) for layer in alone[True]}
    best = {
        (layer, center): reference.captured(of, reference.pca(of, 8, center)[0], center)
        for layer, of in rows.items()
        for center in alone
    }
    return alone, rows, best


@pytest.mark.parametrize("size", [1, 2, 3])
def test_several_processes_find_what_one_finds_on_the_same_rows(size, tmp_path, by_one_process):
    ranks = run(own_and_common_data, size, tmp_path)
    assert all(
        {name: of for name, (of, _) in one.items()} == {n: of for n, (of, _) in ranks[0].items()} for one in ranks
    )
    batches, inputs = batches_for("llama", 16), low_rank_inputs(60)
    by_center, rows_of, best_of = by_one_process
    for name in ("common", "own", "generator", "uneven", "empty", "uncentred"):
        stats, center = Statistics.load(tmp_path / f"{name}-0"), name != "uncentred"
        alone = by_center[center]
        assert list(stats) == list(alone) and stats.group_of == alone.group_of
        assert stats.provenance.n_batches == 16 and stats.provenance.stop_reason == "exhausted"
        assert stats.provenance.notes == alone.provenance.notes
        for layer in alone:
            assert stats[layer].n_samples == alone[layer].n_samples
            assert stats.total_variance(layer) == pytest.approx(alone.total_variance(layer), rel=1e-6)
            torch.testing.assert_close(stats[layer].mean, alone[layer].mean, atol=1e-5, rtol=1e-5)
            rows, best = rows_of[layer], best_of[layer, center]
            # What test_svd.py allows any split and merge, on rows whose spectrum falls as slowly as these.
            assert reference.captured(rows, stats[layer].components, center) > 0.98 * best
            assert float(stats.explained_variance(layer).sum()) * (len(rows) - 1) < best * (1 + 1e-5)

    planted = collect(net(), inputs, **SETTINGS | {"rank": 3})
    for name, n_samples in {
        "sampler": 3840,
        "accelerate": 3840,
        "node": 3840,
        "converged": None,
        "alike": 8 * 64 + 4 * 64,
    }.items():
        if name not in ranks[0]:
            continue
        stats = Statistics.load(tmp_path / f"{name}-0")
        # Three directions stand out by a factor of 400 in variance. Of the same rows they are found up to rounding and
        # truncation, of n others up to the sampling error: the root of 21 * 0.0025 / n, which is 0.01 for 640.
        limit = 1e-3 if n_samples == 3840 else 0.02
        assert principal_angles(stats["0"].components[:3], planted["0"].components[:3]).max() < limit
        assert n_samples is None or stats["0"].n_samples == n_samples
    stats = Statistics.load(tmp_path / "converged-0")
    assert stats.provenance.stop_reason == "converged" and 8 <= stats.provenance.n_batches < 30
    stats = Statistics.load(tmp_path / "bounded-0")
    assert stats.provenance.stop_reason == "max_batches" and stats.provenance.n_batches == 9
    expected = collect(llama(), batches, **SETTINGS, max_batches=9)  # the same nine batches
    assert {name: stats[name].n_samples for name in stats} == {name: expected[name].n_samples for name in expected}
    warned = {name: messages for name, (_, messages) in ranks[0].items() if messages}
    assert warned.keys() == ({"alike"} if size > 2 else set())
    if size > 2:
        assert "ranks 0, 1 got a first batch that another one got" in warned["alike"][0]
    assert not any(messages for one in ranks[1:] for _, messages in one.values())


WITH_GRADIENTS = {"rank": 8, "tolerance": 0.0, "gradients": True}


def two_inputs():
    """One layer whose input is planted and soon known, and one whose input is flat; and their batches."""
    torch.manual_seed(5)
    model = torch.nn.ModuleDict({"planted": torch.nn.Linear(24, 4), "flat": torch.nn.Linear(24, 4)})
    return model, [(planted, torch.randn(64, 24)) for planted in low_rank_inputs(30)]


ONE_IS_DONE = {
    "rank": 3, "tolerance": 0.02, "gradients": True, "loss": lambda output, batch: output.square().mean(),
    "forward": lambda m, batch: m["planted"](batch[0]) + m["flat"](batch[1]).tanh(),
}  # fmt: skip


def mean_gradient(layer):
    """That of a layer's weight, by autograd: all batches are of one size."""
    model, batches = two_inputs()
    for batch in batches:
        ONE_IS_DONE["loss"](ONE_IS_DONE["forward"](model, batch), batch).backward()
    return model[layer].weight.grad.double() / len(batches)


def gradients_of_all(rank, size, folder):
    batches, found = batches_for("llama", 16), {}
    uneven = [batches[:13], batches[13:15] if size > 2 else batches[13:], batches[15:]][rank]
    for name, data in (("common", batches), ("uneven", uneven)):
        found[name] = kept(collect(llama(), data, **WITH_GRADIENTS), folder, f"{name}-{size}-{rank}")
    model, inputs = two_inputs()
    found["done"] = kept(collect(model, inputs, **ONE_IS_DONE), folder, f"done-{size}-{rank}")
    return found


@pytest.fixture(scope="module")
def gradients_by_one_process():
    """What one finds, and what autograd says."""
    model, batches = llama(), batches_for("llama", 16)
    alone = collect(model, batches, **WITH_GRADIENTS)
    return alone, exact(model, batches, list(alone), counts_of(model, batches))


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_of_several_processes_are_those_of_one(size, tmp_path, gradients_by_one_process):
    ranks = run(gradients_of_all, size, tmp_path)
    assert all(one == ranks[0] for one in ranks)
    alone, truth = gradients_by_one_process
    for name in ("common", "uneven"):
        stats = Statistics.load(tmp_path / f"{name}-{size}-0")
        for part in ("gradients", "n_labels", "n_batches", "n_samples", "stop_reason", "notes"):
            assert getattr(stats.provenance, part) == getattr(alone.provenance, part), part
        for layer, (mean, x, g) in truth.items():
            found, expected = stats.gradient(layer), alone.gradient(layer)
            # Sums are exact: what is left is the float32 of other products.
            assert (found.n_samples, found.weighted.n_samples) == (expected.n_samples, expected.weighted.n_samples)
            assert found.weighted.total_variance == pytest.approx(expected.weighted.total_variance, rel=1e-5)
            torch.testing.assert_close(found.output_moment, expected.output_moment, rtol=1e-5, atol=1e-12)
            weighted = (g.norm(dim=1, keepdim=True) * x).numpy()
            best = reference.captured(weighted, reference.pca(weighted, 16, False)[0], False)
            assert reference.captured(weighted, found.weighted.components, False) > 0.98 * best
            # Spectra of random models are flat, and what 16 directions of up to 48 miss is lost: most by one process.
            best = torch.linalg.svdvals(mean)[:4].square().sum()
            assert float((mean @ found.right[:4].double().T).square().sum() / best) > 0.94
            assert float((found.left[:4].double() @ mean).square().sum() / best) > 0.94
            kept_by_all, kept_by_one = (float(one.singular_values[:4].square().sum()) for one in (found, expected))
            assert 0.98 * kept_by_one < kept_by_all < 1.05 * best
    stats, alone = Statistics.load(tmp_path / f"done-{size}-0"), collect(*two_inputs(), **ONE_IS_DONE)
    assert stats.gradient("planted").weighted.n_samples == 64 * 30 == stats.gradient("planted").n_samples
    for layer in stats:
        found, expected = stats.gradient(layer), alone.gradient(layer)
        # Four outputs, so its triplets are all of the sum, and nothing is lost.
        sum_of_all = found.left.double().T @ torch.diag(found.singular_values) @ found.right.double()
        torch.testing.assert_close(
            sum_of_all, mean_gradient(layer), rtol=0.0, atol=1e-5 * float(found.singular_values[0])
        )
        torch.testing.assert_close(found.output_moment, expected.output_moment, rtol=1e-5, atol=1e-12)
        assert found.importance == pytest.approx(expected.importance, rel=1e-4)


# What a process does alone, or would do beside others, in this one


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_handler_of_the_program_is_left_alone(number):
    def own(*_):
        pass

    before = signal.signal(number, own)
    try:
        with Processes():
            assert signal.getsignal(number) is own
        assert signal.getsignal(number) is own
    finally:
        signal.signal(number, before)


def test_ctrl_c_is_noted_and_raised_at_the_end_or_at_once_where_nobody_waits():
    done = []
    with pytest.raises(KeyboardInterrupt), Processes() as alone:
        signal.raise_signal(signal.SIGINT)
        done.append("noted")
        with pytest.raises(KeyboardInterrupt), alone.interruptible():
            done.append("begun in spite of it")
    with pytest.raises(KeyboardInterrupt), Processes() as alone, alone.interruptible():
        signal.raise_signal(signal.SIGINT)
        done.append("gone on")
    with pytest.raises(KeyboardInterrupt), Processes() as alone:
        with alone.interruptible():
            done.append("in time")
        signal.raise_signal(signal.SIGINT)
        done.append("noted again")
    with pytest.raises(KeyboardInterrupt), Processes() as alone:
        with suppress(KeyboardInterrupt), alone.interruptible():
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # what was complete is kept meanwhile
        done.append("noted once more")
    with pytest.raises(ValueError, match="first"), Processes() as alone:
        signal.raise_signal(signal.SIGINT)
        raise ValueError("first")
    assert done == ["noted", "in time", "noted again", "noted once more"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_than_the_main_one_a_pass_leaves_signals_alone():
    def handler():
        with Processes() as alone:
            return alone.gather("ours"), signal.getsignal(signal.SIGINT)

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(handler).result() == (["ours"], signal.default_int_handler)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_tensors_travel_by_gloo_whatever_the_default_group_is(backend, monkeypatch):
    """A group of its own is made if the default one is of another backend, is used by all, and is taken back."""
    asked, ours = [], "a group of gloo" if backend != "gloo" else None

    def gather(values, value, group):
        asked.append(group)
        values[:] = [value, "theirs"]

    stand_ins = dict(
        is_initialized=lambda: True, get_rank=lambda: 0, get_world_size=lambda: 2, get_backend=lambda: backend,
        new_group=lambda backend: f"a group of {backend}", all_gather_object=gather,
        broadcast_object_list=lambda values, source, group: asked.append(group), destroy_process_group=asked.append,
    )  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.distributed, name, stand_in)
    with pytest.raises(KeyError), Processes() as both:
        assert both.gather("ours") == ["ours", "theirs"] and both.share("ours") == "ours"
        raise KeyError
    assert asked == [ours] * 2 + [ours] * (backend != "gloo")

    def broken(backend):
        raise RuntimeError("Connection closed by peer\nat socket.cpp:3")

    monkeypatch.setattr(torch.distributed, "new_group", broken)
    if backend != "gloo":
        refused(
            "^rank 0 waited for 1 other process, of which one has ended .*Connection closed by peer",
            Processes().__enter__,
        )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert Processes(alone=True).size == 1
