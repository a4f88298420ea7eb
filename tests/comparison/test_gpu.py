"""What a comparison does on a machine with GPUs, as far as it can be seen on one without: CUDA's functions are ours."""

from functools import partial

import pytest
import torch

from lora_init.comparison import compare as comparing
from lora_init.comparison import workers
from lora_init.comparison.budget import RunBudget
from lora_init.comparison.runs import Run
from lora_init.comparison.training import peak_bytes, reset_peak
from lora_init.comparison.variants import Variant
from lora_init.comparison.workbench import circumstances
from tests.comparison.made import set_up_bench


@pytest.fixture
def asked(monkeypatch):
    """Pretend that there are two GPUs; note what is asked of them, in order."""
    asked = []

    def note(name, answer, *given):
        asked.append((name, *given))
        return answer

    answers = {
        "is_available": True, "device_count": 2, "get_device_name": "A GPU", "max_memory_allocated": 12_345,
        "reset_peak_memory_stats": None, "empty_cache": None, "set_device": None,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, partial(note, name, answer))
    return asked


def of(asked, name):
    return [one for one in asked if one[0] == name]


def test_memory_is_that_of_the_gpu(asked):
    reset_peak()
    assert len(of(asked, "reset_peak_memory_stats")) == 1
    assert peak_bytes() == 12_345


@pytest.fixture
def bench(home, tmp_path):
    return set_up_bench(home, tmp_path)


def test_a_run_names_the_gpu_and_leaves_its_memory_to_the_next(bench, asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # whose generators would be saved
    assert circumstances()["processor"] == "A GPU"
    asked.clear()
    record = bench.carry_out(Run(Variant("random"), 0, 1e-2))
    assert record["peak_memory_bytes"] == 12_345 and record["status"] == "finished"
    names = [one[0] for one in asked if one[0] != "is_available"]
    assert names.index("reset_peak_memory_stats") < names.index("max_memory_allocated")
    assert len(of(asked, "empty_cache")) == 1 and names[-1] == "empty_cache"


@pytest.mark.parametrize(("place", "gpu"), [(0, 0), (1, 1), (2, 0), (5, 1)])
def test_workers_share_the_gpus_out(place, gpu, asked, monkeypatch):
    monkeypatch.setattr(workers.signal, "signal", lambda *_: None)
    monkeypatch.setattr(workers.threading.Thread, "start", lambda _: None)  # which waits for the end of a parent
    workers._begin(place)
    assert of(asked, "set_device") == [("set_device", gpu)]


def test_all_rates_get_all_seeds_where_a_gpu_makes_that_quick(asked, monkeypatch):
    assert comparing._sweep_by_default(RunBudget()) == "full"
    assert comparing._sweep_by_default(RunBudget(seconds=60.0)) == "halving"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert comparing._sweep_by_default(RunBudget()) == "halving"
