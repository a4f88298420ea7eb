"""A process whose batch fails tells the others, which keep what is complete; all end when one is killed or hangs."""

import os
import signal
import time
import warnings

import pytest
import torch

from lora_init import LoraInitError, Statistics, collect
from lora_init.collection import loop
from lora_init.collection.processes import Processes
from tests import processes
from tests.collection.made import SETTINGS, Q, llama, message
from tests.conftest import batches_for, tiny_llama
from tests.processes import run

pytestmark = pytest.mark.slow  # several processes


def different_arguments(rank, size, folder):
    batches, second = batches_for("llama", 12), rank == 1
    nan = llama()
    with torch.no_grad():
        nan.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan if second else 0.0
    found = {
        "weights": message(lambda: collect(nan, batches, **SETTINGS)),
        "model": message(lambda: collect(tiny_llama(hidden_size=16) if second else llama(), batches, **SETTINGS)),
        "targets": message(lambda: collect(llama(), batches, ["q_proj"] if second else ["k_proj"], **SETTINGS)),
        "arguments": message(lambda: collect(llama(), batches, **SETTINGS, center=second)),
        "no data": message(lambda: collect(llama(), [], **SETTINGS)),
    }
    found["afterwards"] = len(collect(llama(), batches, **SETTINGS))
    return found


def test_different_models_and_arguments_are_said_by_all(tmp_path):
    expected = {
        "weights": "rank 1 has fingerprint",
        "model": "rank 1 has fingerprint",
        "targets": "rank 1 has layers '2 (",
        "arguments": "rank 1 has center True, rank 0 has False. Give all processes the same model and arguments.",
        "no data": "there is no batch to learn from",
    }
    for found in run(different_arguments, 3, tmp_path):
        assert found.pop("afterwards") == 14
        for case, start in expected.items():
            assert found[case][0] == "LoraInitError" and found[case][1].startswith(start), found[case]


def failing(rank, size, folder, victim, moment):
    def fail():
        if moment == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if moment == "hangs":
            signal.pause()
        raise RuntimeError("the disk went away")

    def stream():
        for position, batch in enumerate(batches_for("llama", 40)):
            if rank == int(victim) and position == 20 and moment != "killed in merge":
                fail()
            yield batch

    if rank == int(victim) and moment == "killed in merge":
        Processes.merge = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    found = message(lambda: collect(llama(), stream(), **SETTINGS))
    if rank == int(victim):
        assert found == ("RuntimeError", "the disk went away")  # its own error, with its own traceback
        os._exit(9)
    return found


@pytest.mark.parametrize(("victim", "moment"), [(0, "raises"), (1, "raises"), (0, "killed"), (2, "killed in merge")])
def test_a_process_that_ends_ends_the_others(victim, moment, tmp_path):
    running = processes.Processes(failing, 3, tmp_path, str(victim), moment)
    exits = running.wait()
    assert exits[victim] == (9 if moment == "raises" else -9), running.stderr(victim)
    for rank in {0, 1, 2} - {victim}:
        kind, text = running.result(rank)
        said = f"rank {rank} waited for 2 other processes, of which one has ended or did not answer"
        if moment == "raises":
            said = f"rank {victim} failed: the data: RuntimeError: the disk went away."
        assert (kind, text[: len(said)]) == ("LoraInitError", said)


def test_a_process_that_hangs_ends_the_others_after_the_timeout_of_the_group(tmp_path):
    running = processes.Processes(failing, 3, tmp_path, "1", "hangs", TIMEOUT="3")
    for rank in (0, 2):
        running.running[rank].join(60)
        assert running.result(rank)[1].startswith(f"rank {rank} waited for 2 other processes")
    running.running[1].kill()


class Forward:
    """Run a batch, and be interrupted in the middle of one."""

    def __init__(self, interrupted_at=0, by=signal.SIGINT):
        self.n, self.interrupted_at, self.by = 0, interrupted_at, by

    def __call__(self, model, batch):
        self.n += 1
        if self.n == self.interrupted_at:
            os.kill(os.getpid(), self.by)
        model(**batch)


def interrupted(rank, size, folder, moment):
    def stream():
        for position, batch in enumerate(batches_for("llama", 40)):
            if moment == "reading" and position == 10 and rank == 1:
                raise KeyboardInterrupt
            yield batch

    forward = Forward(4 + rank if moment == "running" else 0)  # in both
    try:
        collect(llama(), stream(), **SETTINGS, statistics=folder / "stats", forward=forward)
    except KeyboardInterrupt as stop:
        return stop.statistics.provenance.n_batches, stop.statistics.provenance.stop_reason
    return None


@pytest.mark.parametrize("moment", ["reading", "running"])
def test_ctrl_c_in_one_ends_all_with_what_there_is(moment, tmp_path):
    first, second = run(interrupted, 2, tmp_path, moment)
    assert first == second and first[1] == "interrupted" and 8 <= first[0] < 30
    whole = collect(llama(), batches_for("llama", 40), **SETTINGS)
    # Whatever number of processes comes next, it goes on after the batches that were used: each counts once.
    for size in (1, 3):
        (tmp_path / f"stats-{size}").write_bytes((tmp_path / "stats").read_bytes())
        for n_batches, complete, mean, ran in run(go_on, size, tmp_path):
            assert (n_batches, complete, ran) == (40, True, 40 - first[0])
            torch.testing.assert_close(torch.tensor(mean), whole[Q].mean, atol=1e-6, rtol=1e-5)


def go_on(rank, size, folder):
    """Batches, completeness and a mean of the whole pass, and the batches that this part of it ran in all processes."""
    forward = Forward()
    stats = collect(llama(), batches_for("llama", 40), **SETTINGS, statistics=folder / f"stats-{size}", forward=forward)
    with Processes() as together:
        made = stats.provenance
        return [made.n_batches, made.complete, stats[Q].mean.tolist(), *together.sum(forward.n)]


def converging(rank, size, folder, killed):
    """Take in the common batches, of which the first two processes have seen enough after a few of their own."""
    enough = (2, 5, 40)[rank]
    loop.SAVE_EVERY = 0.0
    loop.Pass.converged = property(lambda run: run.found.n_batches[0] >= enough)
    forward = Forward(9 if killed and rank == 2 else 0, signal.SIGKILL)
    stats = collect(llama(), batches_for("llama", 40), **SETTINGS, statistics=folder / "stats", forward=forward)
    return [stats.provenance.n_batches, stats.provenance.stop_reason, stats[Q].n_samples, stats[Q].mean.tolist()]


def test_processes_that_have_enough_at_different_batches_leave_none_out(tmp_path):
    cut = processes.Processes(converging, 3, tmp_path, True)
    cut.running[2].join(60)
    for process in cut.running:
        process.kill()
    kept = Statistics.load(tmp_path / "stats").provenance
    assert not kept.complete and kept.n_batches >= 10 and kept.settings["used"] == [kept.n_batches]
    whole = collect(llama(), batches_for("llama", 40), **SETTINGS)
    for n_batches, stop_reason, n_samples, mean in run(converging, 3, tmp_path, False):
        assert (n_batches, stop_reason, n_samples) == (40, "exhausted", whole[Q].n_samples)
        torch.testing.assert_close(torch.tensor(mean), whole[Q].mean, atol=1e-6, rtol=1e-5)


class Broken(Forward):
    """Run a batch, unless it is one that nothing can run."""

    def __call__(self, model, batch):
        super().__call__(model, batch)
        if torch.equal(batch["input_ids"], batches_for("llama", 21)[20]["input_ids"]):
            raise RuntimeError("broken")


class Behind:
    """The slowest writer, beside the fastest reader: rank 0 writes when rank 1 has begun again."""

    def __init__(self, monkeypatch, rank, folder):
        check, save, begun = Processes.check_alike, Statistics.save, folder / "begun again"

        def checked(processes, asked):
            if rank and self.again:
                begun.touch()
            check(processes, asked)

        def saved(statistics, file):
            while not rank and not begun.exists():
                time.sleep(0.01)
            save(statistics, file)

        self.again = False
        monkeypatch.setattr(Processes, "check_alike", checked)
        monkeypatch.setattr(Statistics, "save", saved)


def skipping(rank, size, folder):
    batches, found, behind = batches_for("llama", 40), [], Behind(pytest.MonkeyPatch(), rank, folder)
    for skip in (0, 1):
        behind.again = bool(skip)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                stats = collect(
                    llama(), batches, **SETTINGS, statistics=folder / "stats", forward=Broken(), skip_bad_batches=skip
                )
            except (RuntimeError, LoraInitError) as error:
                stats = error.statistics
                found.append([type(error).__name__, str(error)])
        made = stats.provenance
        found.append([made.complete, made.n_batches, made.settings["used"], made.settings["bad_batches"]])
    return [*found, stats[Q].mean.tolist()]


def test_a_batch_that_fails_in_one_process_is_taken_by_none_and_skipped_by_all(tmp_path):
    """They read one list, so that with the next start every batch but the bad one counts once."""
    batches = batches_for("llama", 40)
    expected = collect(llama(), batches[:20] + batches[21:], **SETTINGS)[Q].mean
    for rank, (failed, kept, skipped, mean) in enumerate(run(skipping, 2, tmp_path)):
        said = "rank 0 failed: batch 20: RuntimeError: broken. skip_bad_batches=1 goes on without it."
        assert failed == (["LoraInitError", said] if rank else ["RuntimeError", "broken"])
        assert kept == [False, 20, [20], 0] and skipped == [True, 39, [40], 1]
        torch.testing.assert_close(torch.tensor(mean), expected, atol=1e-6, rtol=1e-5)


def test_alone_everything_is_a_message_to_oneself():
    with Processes() as alone:
        assert (alone.rank, alone.size) == (0, 1)
        assert alone.gather({"a": 1}) == [{"a": 1}] and alone.sum(1, True) == [1, 1]
        assert alone.share(b"x") == b"x"
