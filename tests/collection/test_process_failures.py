"""A process that raises, dies, hangs, or was given other things ends all of them, with its rank and the reason."""

import os
import signal
import time

import pytest
import torch

from lora_init import LoraInitError, collect
from lora_init.collection.processes import Exchange, Message, RankFailedError, Team
from tests.collection.test_processes import SETTINGS, llama
from tests.conftest import batches_for, tiny_llama
from tests.processes import run


def message(work):
    """The error of some work: its type and text, and the seconds until it came."""
    started = time.monotonic()
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "", "", time.monotonic() - started


def broken(batches, at, error):
    """Batches of which one cannot be read."""
    yield from batches[:at]
    raise error


def ends_that_leave_the_processes_alive(rank, size, folder):
    batches, second = batches_for("llama", 12), rank == 1
    nan = llama()
    with torch.no_grad():
        nan.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan if second else 0.0

    def late(layers=3):
        time.sleep(2.0 * second)
        return broken(batches, layers, RuntimeError("the disk went away"))

    found = {
        "rows": message(lambda: collect(nan, batches, **SETTINGS, max_batches=8)),
        "loader": message(lambda: collect(llama(), late() if second else iter(batches), **SETTINGS)),
        "first batch": message(lambda: collect(llama(), late(0) if second else iter(batches), **SETTINGS)),
        "model": message(lambda: collect(tiny_llama() if second else llama(), batches, **SETTINGS)),
        "class": message(lambda: collect(llama().model if second else llama(), batches, **SETTINGS)),
        "targets": message(lambda: collect(llama(), batches, ["q_proj"] if second else ["k_proj"], **SETTINGS)),
        "nothing": message(lambda: collect(llama(), batches, ["qproj" if second else "q_proj"], **SETTINGS)),
        "arguments": message(lambda: collect(llama(), batches, **SETTINGS, center=second)),
        "rank": message(lambda: collect(llama(), batches, rank=0 if second else 4)),
        "no data": message(lambda: collect(llama(), [], **SETTINGS)),
        "read-only": message(
            lambda: collect(llama(), batches, checkpoint=folder / "none" / "c" if second else "/proc/c", **SETTINGS)
        ),
    }
    found["afterwards"] = len(collect(llama(), batches, **SETTINGS))
    return found


def test_whoever_fails_is_named_by_all(tmp_path):
    ranks = run(ends_that_leave_the_processes_alive, 3, tmp_path)
    expected = {
        "loader": "rank 1 failed: RuntimeError: the disk went away",
        "first batch": "rank 1 failed: RuntimeError: the disk went away",
        "model": "rank 1 has model 'LlamaForCausalLM",
        "class": "rank 1 has model 'LlamaModel",
        "targets": "rank 1 has layers '2 (",
        "nothing": "rank 1 failed: target_modules=['qproj'] matches no layer",
        "arguments": "rank 1 has center True, rank 0 has False. Give all processes the same model and arguments.",
        "rank": "rank 1 failed: rank=0, rho=2.0",
        "no data": "there is no batch to learn from",
        "read-only": "rank 0 failed: /proc/c: cannot be written",
    }
    for rank, found in enumerate(ranks):
        assert found.pop("afterwards") == 14
        for case, start in expected.items():
            kind, text, _ = found[case]
            if rank == 1 and case in ("loader", "first batch"):
                assert (kind, text) == ("RuntimeError", "the disk went away")  # its own error, with its own traceback
            else:
                assert text.startswith(start), (rank, case)
                assert kind == ("LoraInitError" if case == "no data" else "RankFailedError")
        # The weights differ before the rows do.
        assert found["rows"][1].startswith("rank 1 has model")


def killed(rank, size, folder, victim, moment):
    batches = batches_for("llama", 40)

    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def stream():
        for position, batch in enumerate(batches):
            if rank == int(victim) and position == 20 and moment == "batch":
                kill()
            yield batch

    if rank == int(victim) and moment == "merge":
        Exchange._pack = kill
    return message(lambda: collect(llama(), stream(), **SETTINGS))


@pytest.mark.parametrize(("victim", "moment"), [(0, "batch"), (2, "merge"), (3, "merge")])
def test_a_killed_process_ends_the_others_at_once(victim, moment, tmp_path):
    # Four processes: 3 sends to 2, which sends to 0.
    for rank, found in enumerate(run(killed, 4, tmp_path, str(victim), moment)):
        if rank == victim:
            assert found is None
        else:
            kind, text, seconds = found
            assert kind == "RankFailedError" and seconds < 20
            assert text.startswith(f"rank {victim} failed: its process has ended, or cannot be reached (")


def hanging(rank, size, folder, victim):
    def stream():
        for position, batch in enumerate(batches_for("llama", 40)):
            if position == 9 and rank == int(victim):
                time.sleep(9)
            yield batch

    return message(lambda: collect(llama(), stream(), **SETTINGS))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_does_not_come_ends_all(victim, tmp_path):
    for rank, (kind, text, seconds) in enumerate(run(hanging, 3, tmp_path, str(victim), LORA_INIT_TIMEOUT="2")):
        assert kind == "RankFailedError"
        if rank != victim:  # which comes too late to be told, if those that could tell are gone
            assert text.startswith(f"rank {victim} failed: it did not answer for")
            assert "LORA_INIT_TIMEOUT sets how long to wait" in text
            assert seconds < 15


def absent(rank, size, folder):
    time.sleep(6.0 * rank)
    return message(lambda: rank or collect(llama(), batches_for("llama"), **SETTINGS))


def test_a_process_that_never_calls_is_waited_for_no_longer_than_said(tmp_path):
    (kind, text, seconds), _ = run(absent, 2, tmp_path, LORA_INIT_TIMEOUT="2")
    assert kind == "RankFailedError" and seconds < 6
    assert "the 2 processes did not find each other within 2 s" in text
    assert "Each of them has to call this function" in text


def interrupted(rank, size, folder):
    def stream():
        for position, batch in enumerate(batches_for("llama", 40)):
            if position == 10 and rank == 1:
                raise KeyboardInterrupt
            yield batch

    try:
        collect(llama(), stream(), **SETTINGS)
    except KeyboardInterrupt as stop:
        return stop.statistics.provenance.n_batches, stop.statistics.provenance.stop_reason
    return None


def test_ctrl_c_in_one_ends_all_with_what_there_is(tmp_path):
    first, second = run(interrupted, 2, tmp_path)
    assert first == second and first[1] == "interrupted" and first[0] > 8


@pytest.mark.parametrize("given", ["soon", "0", "nan"])
def test_a_timeout_that_is_no_time_is_refused(given, monkeypatch, tmp_path):
    meet = f"file://{tmp_path}/meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    try:
        monkeypatch.setenv("LORA_INIT_TIMEOUT", given)
        with pytest.raises(LoraInitError, match=f"LORA_INIT_TIMEOUT={given}, expected a number of seconds above 0"):
            Team()
    finally:
        torch.distributed.destroy_process_group()


def test_alone_everything_is_a_message_to_oneself():
    with Team() as team:
        assert (team.rank, team.size) == (0, 1)
        assert team.meet({"a": 1}) == [{"a": 1}]
        tensors = {"x": torch.arange(3), "empty": torch.empty(0, 2)}
        made = team.combine(lambda: Message({"b": 2}, tensors), lambda one, other: pytest.fail("nobody to merge with"))
        assert made.header == {"b": 2} and all(torch.equal(made.tensors[name], tensors[name]) for name in tensors)
        with pytest.raises(RankFailedError, match="rank 0 failed: ZeroDivisionError"):
            team.share(lambda: 1 / 0)
        assert team.bytes_sent == 0
