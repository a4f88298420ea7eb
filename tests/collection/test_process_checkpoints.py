"""An interrupted pass of several processes goes on and ends as if it had not been interrupted."""

import random
import time

import pytest
import torch
from torch import nn

from lora_init import LoraInitError, Statistics, collect
from lora_init.collection.processes import FORMAT, FORMAT_VERSION
from lora_init.statistics.tensorfile import TensorFile
from tests.collection.test_checkpoint import assert_same, assert_same_gradients
from tests.collection.test_process_failures import message
from tests.collection.test_processes import kept, llama
from tests.conftest import batches_for
from tests.processes import Processes, run

SETTINGS = {"rank": 8, "tolerance": 0.0, "max_batches": 240}


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 4))


def inputs(n_batches=240):
    torch.manual_seed(2)
    return [torch.randn(64, 96) for _ in range(n_batches)]


def uninterrupted(rank, size, folder):
    return kept(collect(net(), inputs(), **SETTINGS), folder, f"whole-{rank}")


def going_on(rank, size, folder):
    def slowly():
        for batch in inputs():
            time.sleep(0.01)
            yield batch

    settings = {"checkpoint": folder / "c", "checkpoint_every": 0.0, "resume": True}
    return kept(collect(net(), slowly(), **SETTINGS, **settings), folder, f"resumed-{rank}")


def batches_in(file, whole=True):
    """Say how many batches a checkpoint is of; read all of it, unless it may be replaced meanwhile.

    safetensors opens a file twice, for its header and for its tensors, and between the two it can be another one.
    """
    if not file.exists():
        return 0
    found = TensorFile(file, FORMAT, FORMAT_VERSION)
    assert not whole or all(found.tensor(name) is not None for name in found.header["digests"])
    return found.header["n_batches"]


def test_killed_at_any_moment_two_processes_end_with_the_result_of_two(tmp_path):
    expected, same = run(uninterrupted, 2, tmp_path)
    assert same == expected
    rng, at = random.Random(0), [0]
    for victims in (1, 2, 1, 2):
        processes = Processes(going_on, 2, tmp_path)
        # Once the pass has gone on: before that, the one left over would wait for the other to begin.
        alive = processes.running
        while batches_in(tmp_path / "c", whole=False) <= at[-1] and any(process.is_alive() for process in alive):
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.2))
        for process in rng.sample(processes.running, victims):  # the other one then ends by itself
            process.kill()
        processes.wait()
        at.append(batches_in(tmp_path / "c"))
    assert at == sorted(set(at))  # each got further
    assert len(set(run(going_on, 2, tmp_path))) == 1
    assert_same(Statistics.load(tmp_path / "resumed-0"), Statistics.load(tmp_path / "whole-0"))


def with_gradients(rank, size, folder):
    def dying(batches):
        yield from batches[: 12 if rank else 13]
        raise RuntimeError("the machine went away")

    batches, found = batches_for("llama", 40)[rank::size], {}
    settings = {"rank": 4, "tolerance": 0.0, "gradients": True, "seed": 3}
    file = {"checkpoint": folder / "c", "checkpoint_every": 0.0, "resume": True}
    found["whole"] = kept(collect(llama(), batches, **settings), folder, f"whole-{rank}")
    found["died"] = message(lambda: collect(llama(), dying(batches), **settings, **file))
    found["at"] = batches_in(folder / "c") if rank == 0 else 0
    found["without"] = message(lambda: collect(llama(), batches, **settings | {"gradients": False}, **file))
    found["resumed"] = kept(collect(llama(), batches, **settings, **file), folder, f"resumed-{rank}")
    return found


def test_a_pass_with_gradients_of_two_processes_goes_on_and_ends_the_same(tmp_path):
    first, second = run(with_gradients, 2, tmp_path)
    assert first["whole"] == second["whole"] and first["resumed"] == second["resumed"]
    assert first["died"][1] and second["died"][1] and 0 < first["at"] < 40
    assert "was begun with gradients True, this pass has False" in first["without"][1]
    whole, resumed = (Statistics.load(tmp_path / f"{name}-0") for name in ("whole", "resumed"))
    assert_same(whole, resumed)
    assert_same_gradients(whole, resumed)


def refused(rank, size, folder):
    settings = SETTINGS | {"checkpoint": folder / "c", "resume": True}
    other = inputs()
    other[3] = other[0]  # the second of rank 1
    return {
        "other": message(lambda: collect(net(), inputs(), **settings, data="other")),
        "data": message(lambda: collect(net(), other[rank::size], **settings)),
        "without resume": message(lambda: collect(net(), inputs(), **settings | {"resume": False})),
    }


def begun(rank, size, folder):
    return message(
        lambda: collect(
            net(), inputs(40), **SETTINGS | {"max_batches": 40}, checkpoint=folder / "c", checkpoint_every=0.0
        )
    )


def test_another_number_of_processes_and_other_data_are_refused(tmp_path):
    run(begun, 2, tmp_path)
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(LoraInitError, match=r"c was begun by 2 processes, this pass has 1. Start as many as before"):
        collect(net(), inputs(), **SETTINGS, checkpoint=tmp_path / "c", resume=True)
    begins = f"rank 0 failed: {tmp_path / 'c'}"
    for found in run(refused, 3, tmp_path):
        assert found["data"][1].startswith(f"{begins} was begun by 2 processes, this pass has 3. Start as many")
    for found in run(refused, 2, tmp_path):
        assert found["other"][1].startswith(
            f"{begins} was begun with data '', this pass has 'other'. Name another file"
        )
        assert found["without resume"][1].startswith(f"{begins} exists, from a pass that was interrupted after 40")
        assert found["data"][1].startswith(f"rank 1 failed: batch 1 is not the one that {tmp_path / 'c'} has used")
        assert all(kind == "RankFailedError" for kind, *_ in found.values())
    assert (tmp_path / "c").read_bytes() == before
