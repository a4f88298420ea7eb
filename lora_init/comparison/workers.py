"""Who does the runs: this process, or others on this machine. Each run is one call, and one record."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import cache
from statistics import fmean
from typing import Any, Protocol

import torch
import transformers
from tqdm.auto import tqdm

from lora_init.comparison.budget import RunBudget
from lora_init.comparison.runs import Record, Run, RunDirectory
from lora_init.comparison.workbench import Workbench, failed
from lora_init.errors import LoraInitError, first_line
from lora_init.progress import time_left


class Worker(Protocol):
    """Does one run at a time."""

    def submit(self, run: Run, title: str, keep: bool = False) -> Future[Record]:
        """Begin `Workbench.carry_out`."""

    def take(self, future: Future[Record]) -> Record | None:
        """Wait for what `submit` began; None if the process that did it is gone, after which one may submit again."""
        return future.result()

    def close(self) -> None:
        """End, at once."""


class Here(Worker):
    """This process, with a bar for the steps. A run is done when `submit` returns."""

    def __init__(self, bench: Workbench, show: bool) -> None:
        self._bench, self._show = bench, show

    def submit(self, run: Run, title: str, keep: bool = False) -> Future[Record]:
        """See `Worker`."""
        future: Future[Record] = Future()
        steps = self._bench.training.steps
        with tqdm(desc=title, total=steps, unit="step", leave=False, disable=not self._show) as bar:
            future.set_result(self._bench.carry_out(run, bar.update, keep))
        return future

    def close(self) -> None:
        """There is nothing to end."""


class Process:
    """A process of its own on this machine; the i-th has the i-th GPU, if there are any."""

    def __init__(self, make: Callable[[], Workbench], place: int) -> None:
        self._arguments = (place, make, torch.get_num_threads())
        self._pool: ProcessPoolExecutor | None = None
        self._busy = False

    def submit(self, run: Run, title: str, keep: bool = False) -> Future[Record]:
        """See `Worker`."""
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")  # a fork would share CUDA, and threads that are in the middle
            self._pool = ProcessPoolExecutor(1, spawn, initializer=_begin, initargs=self._arguments)
            self._id = self._pool.submit(os.getpid)
        try:
            future = self._pool.submit(_carry_out, run, keep)
        except BrokenProcessPool:  # it was killed while it had nothing to do
            self._pool = None
            return self.submit(run, title, keep)
        self._busy = True
        return future

    def take(self, future: Future[Record]) -> Record | None:
        """See `Worker`."""
        try:
            record = future.result()
        except BrokenProcessPool:
            self._pool, self._busy = None, False
            if self._id.exception() is None:
                return None
            raise LoraInitError(
                "a worker ended while it started. In a script of your own, call compare() under "
                "`if __name__ == '__main__':`, as new processes read the script again."
            ) from None
        self._busy = False
        return record

    def close(self) -> None:
        """See `Worker`."""
        if self._pool is not None:
            if self._busy:
                with suppress(BrokenProcessPool, ProcessLookupError):
                    os.kill(self._id.result(), signal.SIGKILL)
            self._pool.shutdown()
        self._pool = None


_makes: list[Callable[[], Workbench]] = []  # in another process: what makes its workbench


def _begin(place: int, make: Callable[[], Workbench], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the first one ends the others
    tqdm.set_lock(threading.RLock())  # its own is for several processes, and outlives one that is killed
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    torch.set_num_threads(threads)  # which may change numbers in the last bits
    _makes.append(make)


@cache
def _bench() -> Workbench:
    """Make the workbench of this process, with its first run."""
    warnings.simplefilter("ignore")  # the first process has shown them
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return _makes[0]()


def _end_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)


def _carry_out(run: Run, keep: bool) -> Record:
    return _bench().carry_out(run, keep=keep)


def start_processes(make: Callable[[], Workbench], count: int) -> list[Worker]:
    """Prepare processes, each of which makes a workbench of its own with its first run."""
    try:
        pickle.dumps(make)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise LoraInitError(
            f"a start cannot be sent to a worker: {first_line(error)} Define its function in a module of its own."
        ) from error
    return [Process(make, place) for place in range(count)]


def run_all(
    due: Callable[[Mapping[Run, Record]], tuple[list[Run], list[str]]],
    log: RunDirectory,
    workers: Sequence[Worker],
    budget: RunBudget,
    say: Callable[[str], None],
) -> None:
    """Carry out what is due and has not ended, until nothing is or the time is out.

    Failed runs get one more chance each time this is called. A worker that dies costs its run, which is done again; a
    second time it counts as failed.
    """
    for run in [run for run, record in log.records.items() if record["status"] == "failed"]:
        del log.records[run]
    seconds = [record["run_seconds"] or 0.0 for record in log.records.values() if "run_seconds" in record][-20:]
    told, died = 0, Counter[Run]()
    idle, running = list(workers), dict[Future[Record], tuple[Worker, Run, str]]()
    while True:
        planned, decided = due(log.records)
        for line in decided[told:]:
            say(line)
        told = max(told, len(decided))
        begun = {run for _, run, _ in running.values()}
        left = [run for run in planned if run not in log.records]
        ready = [run for run in left if run.learning_rate is not None and run not in begun]
        expected = fmean(seconds) if seconds else 0.0
        while idle and ready and budget.fits(expected * (1 + _times_longer(ready[0], log))):  # 1 for the best adapter
            run, worker = ready.pop(0), idle.pop(0)
            title = f"run {len(planned) - len(left) + len(running) + 1}/{len(planned)} {run.title}"
            running[worker.submit(run, title)] = worker, run, title
        if not running:
            if left:
                say(f"The time is out with {len(left)} runs left; the same command goes on from there.")
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            worker, run, title = running.pop(future)
            idle.append(worker)
            record = worker.take(future)
            if record is None:
                died[run] += 1
                if died[run] < 2:
                    say(f"{title}: the worker that did it is gone; it is done again.")
                    continue
                why = "two workers died while they did it, as when memory runs out"
                record = failed(run, why)
            log.add(record)
            seconds.append(record["run_seconds"] or 0.0)
            say(f"{title}: {_ended(record, len(left) - 1, seconds, len(workers))}")
            left = left[1:]


def _times_longer(run: Run, log: RunDirectory) -> float:
    """Return how many times the steps of all a run trains for."""
    steps: int = log.settings["steps"]
    return (run.start.steps or steps) / steps


def _ended(record: Mapping[str, Any], n_left: int, seconds: Sequence[float], n_workers: int) -> str:
    """Report how a run ended, and how long those that are left may take if they are like those that ended."""
    losses = record["report_loss"]
    how = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}" if record["status"] == "finished" else record["error"]
    left = time_left(n_left * fmean(seconds) / n_workers)
    return f"{record['status']}, {how}, {record['run_seconds'] or 0:.0f} s{left}"
