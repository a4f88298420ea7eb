"""Who does the runs: this process, or those of a `concurrent.futures.Executor`. Each run is a call, and a record."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import platform
import signal
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any
from uuid import uuid4

import torch
import transformers
from tqdm.auto import tqdm

from lora_init.comparison.budget import RunBudget
from lora_init.comparison.runs import Record, Run, RunDirectory
from lora_init.comparison.workbench import Workbench, circumstances, failed
from lora_init.errors import LoraInitError, first_line, in_one_line
from lora_init.progress import time_left

AHEAD = 1000  # runs that wait in the queue of an executor at most
PATIENCE = 120.0  # seconds without the end of a first run, after which the user is told to look at the queue


@dataclass(frozen=True)
class Worker:
    """Something that does runs: this process, or an executor."""

    # Takes a run, its title, and whether to keep its adapter. Begins the run, and returns a future; None if the worker
    # takes no more now
    submit: Callable[..., Any]
    at_once: int = 1  # runs that it takes before one has ended
    nodes: Callable[[], Mapping[Any, str]] = dict  # machines at work, key to name, as far as they are known
    close: Callable[[], None] = lambda: None  # ends all, at once

    @property
    def queues(self) -> bool:
        """Whether runs may wait in a queue until a machine is free."""
        return self.at_once == AHEAD


def here(bench: Workbench, show: bool) -> Worker:
    """Return this process as a worker, with a bar for the steps. A run is done when `submit` returns."""

    def submit(run: Run, title: str, keep: bool = False) -> Future[Any]:
        future, steps = Future[Record](), bench.training.steps
        with tqdm(desc=title, total=steps, unit="step", leave=False, disable=not show) as bar:
            future.set_result(bench.carry_out(run, bar.update, keep))  # what it raises is raised here, as it should be
        return future

    return Worker(submit)


@dataclass(frozen=True)
class Job:
    """What makes a workbench in another process, and what it has to be like. It travels with each run."""

    make: Callable[[], Workbench]
    expected: Mapping[str, Any]  # as `describe` has it in the first process
    node: str = field(default_factory=platform.node)
    threads: int = field(default_factory=torch.get_num_threads)  # which may change numbers in the last bits
    key: str = field(default_factory=lambda: uuid4().hex)


def elsewhere(executor: Any, job: Job, is_ours: bool, at_once: int | None = None) -> Worker:
    """Return the processes of an executor as a worker, on this machine or on others."""
    try:
        pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise LoraInitError(
            f"a start cannot be sent to a worker: {first_line(error)} Define its function in a module of its own."
        ) from error
    pending = set[Future[Any]]()

    def submit(run: Run, title: str, keep: bool = False) -> Future[Any] | None:
        n_others = len(pending)  # counted before, as one may end while this is submitted
        try:
            future: Future[Any] = executor.submit(carry_out, job, run, keep, uuid4().hex)
        except Exception as error:
            if n_others:  # a queue may take no more of one user, until another run has ended
                return None
            raise LoraInitError(f"{title}: it cannot be submitted: {first_line(error)}") from error
        pending.add(future)
        future.add_done_callback(pending.discard)
        return future

    def close() -> None:
        for future in [*pending]:  # a copy: a canceled future discards itself from the set
            future.cancel()
        if is_ours:
            executor.shutdown(wait=False, cancel_futures=True)

    return Worker(submit, at_once or AHEAD, getattr(executor, "nodes", dict), close)


# One run at a time: it changes the model and seeds what is random, and an executor's process may have threads.
_one_run = threading.Lock()
_benches: dict[str, Workbench] = {}  # in another process: the workbench of the comparison it works for, by its key


def carry_out(job: Job, run: Run, keep: bool, call: str) -> Record | tuple[Exception, str]:
    """Carry out a run in a process of an executor.

    What the run raises is returned, with its traceback as text. So whatever the executor raises is about its processes,
    and the run may be done again. `call` is another each time: Dask takes equal calls for one.
    """
    node = None if platform.node() == job.node else platform.node()  # the comparison's own machine needs no name
    try:
        with _one_run, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first process has shown them
            torch.set_num_threads(job.threads)
            if job.key not in _benches:
                _benches.clear()  # of a comparison before, whose model would stay in memory
                _benches[job.key] = _set_up(job)
            record: Record = _benches[job.key].carry_out(run, keep=keep) | {"node": node}
            return record
    except Exception as error:
        written = traceback.format_exc()
        if node and isinstance(error, LoraInitError):
            return error.within(f"node {node}"), written
        return error, written


def _set_up(job: Job) -> Workbench:
    """Make the workbench, and check that its runs can be compared with other processes' runs."""
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    bench = job.make()
    differing = []
    for name, value in describe(bench, job.expected["model"]).items():
        if value != job.expected[name]:
            differing.append(f"{name} is {value!r}, not {job.expected[name]!r}")
    if differing:
        raise LoraInitError(
            f"{'; '.join(differing)}. All nodes need the same versions, model, data and kind of device."
        )
    return bench


def describe(bench: Workbench, model: str) -> dict[str, Any]:
    """Describe what has to be equal in all processes; the version of Python does not."""
    versions: dict[str, Any] = circumstances()["versions"]
    return bench.settings(model) | versions | {"python": None}


def come_back(future: Future[Any]) -> Record | str:
    """Return the record of a run, or why there is none: the process that did it is gone, and it may be done again."""
    try:
        outcome: Record | tuple[Exception, str] = future.result()
    except LoraInitError:  # from `processes`: a worker that cannot start will not start the next time either
        raise
    except Exception as error:
        return f"{in_one_line(error).partition('. ')[0].rstrip('.')}."
    if isinstance(outcome, tuple):
        raised, written = outcome
        raise raised from RuntimeError(written)  # a traceback itself cannot be sent
    return outcome


Begun = tuple[Callable[[], Any], Callable[[], Any]]  # what waits for the result of a call, and what ends the call


@dataclass(eq=False)
class Remote(Executor):
    """An executor made of a function, `begin`, that begins a call elsewhere and returns how to wait for it and end it.

    A thread waits for each call. A future that is canceled ends its call, even one that runs.
    """

    begin: Callable[..., Begun]
    nodes: Callable[[], Mapping[Any, str]] = dict
    end: Callable[[], Any] = lambda: None

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        """Begin a call."""
        future, (result, end) = Future[Any](), self.begin(function, *arguments)

        # The future counts as waiting until its result is there: one that runs could not be canceled.
        def wait_for_result() -> None:
            try:
                outcome = result()
            except Exception as error:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            else:
                if future.set_running_or_notify_cancel():
                    future.set_result(outcome)

        def end_if_canceled(future: Future[Any]) -> None:
            if future.cancelled():
                with suppress(Exception):  # it may have ended meanwhile
                    end()

        future.add_done_callback(end_if_canceled)
        # A daemon: a call that nobody waits for any more keeps no interpreter from ending.
        threading.Thread(target=wait_for_result, daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let go of what does the calls."""
        self.end()


def processes(n: int) -> Remote:
    """Make an executor of processes of this machine for n calls at once, the i-th with the i-th GPU if there are any.

    Each process is a pool of its own. One that is killed costs its call alone; a `ProcessPoolExecutor` of several would
    lose the others' calls, too.
    """
    idle, pools = [*range(n)], dict[int, tuple[ProcessPoolExecutor, Future[int]]]()  # with the id of the process

    def begin(function: Callable[..., Any], *arguments: Any) -> Begun:
        place = idle.pop(0)
        if place not in pools:
            spawn = multiprocessing.get_context("spawn")  # a fork would share CUDA, and threads that are in the middle
            pool = ProcessPoolExecutor(1, spawn, initializer=_begin, initargs=(place,))
            pools[place] = pool, pool.submit(os.getpid)
        pool, number = pools[place]
        try:
            future = pool.submit(function, *arguments)
        except BrokenProcessPool:  # it was killed while it had nothing to do
            del pools[place]
            idle.insert(0, place)
            return begin(function, *arguments)

        def result() -> Any:
            try:
                return future.result()
            except BrokenProcessPool:
                del pools[place]
                if number.exception() is None:  # it had started, and told its id: it was killed in its call
                    raise
                raise LoraInitError(
                    "a worker ended while it started. In a script of your own, call compare() under "
                    "`if __name__ == '__main__':`, as new processes read the script again."
                ) from None
            finally:
                idle.append(place)

        return result, lambda: None  # a call is ended with its process, see `end`

    def end() -> None:
        for pool, number in [*pools.values()]:
            with suppress(BrokenProcessPool, ProcessLookupError):
                os.kill(number.result(), signal.SIGKILL)  # a pool would wait for the call that runs
            pool.shutdown()

    return Remote(begin, end=end)


def _begin(place: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the first one ends the others
    tqdm.set_lock(threading.RLock())  # its own is for several processes, and outlives one that is killed
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())


def _end_with_parent() -> None:
    """Wait for the end of the process that started this one, which may be killed, and end with it."""
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)


def run_all(
    due: Callable[[Mapping[Run, Record]], tuple[list[Run], list[str]]],
    log: RunDirectory,
    worker: Worker,
    budget: RunBudget,
    say: Callable[[str], None],
) -> None:
    """Carry out what is due and has not ended, until nothing is or the time is out.

    Failed runs get one more chance each time this is called. A worker that dies costs its run, which is done again; a
    second time it counts as failed.
    """
    for run, record in [*log.records.items()]:
        if record["status"] == "failed":
            del log.records[run]
    runs, n_reported, patience = _Running(log, worker, budget, say), 0, None
    if worker.queues:
        patience = PATIENCE
    # Every run that ends may change what is due, as best rates decide on later runs. So it is computed anew each time.
    while True:
        planned, decisions = due(log.records)
        for line in decisions[n_reported:]:
            say(line)
        n_reported = max(n_reported, len(decisions))
        left = [run for run in planned if run not in log.records]
        runs.begin(left, len(planned))
        if not runs.begun:
            if left:
                say(f"The time is out with {len(left)} runs left; the same command goes on from there.")
            return
        done = wait(runs.begun, runs.longest_wait(patience), FIRST_COMPLETED).done
        if patience and not done:
            say("No run has come back yet: look whether the cluster has begun one. Ctrl-C ends the wait.")
        patience = None  # the advice is given once
        runs.watch_nodes()
        n_left = len(left)
        for future in done:
            if runs.take_in(future, n_left - 1):
                n_left -= 1


class _Running:
    """The runs that a worker has begun, and how long those took that have ended."""

    def __init__(self, log: RunDirectory, worker: Worker, budget: RunBudget, say: Callable[[str], None]) -> None:
        self.log, self.worker, self.budget, self.say = log, worker, budget, say
        self.begun: dict[Future[Any], tuple[Run, str]] = {}  # each with its title
        self.lost = Counter[Run]()  # how often its worker has died
        self.nodes = worker.nodes()
        seconds = [record["run_seconds"] or 0.0 for record in log.records.values() if "run_seconds" in record]
        self.seconds = seconds[-20:]  # of the last ones, which tell most of the next
        self.n_ended, self.began = 0, 0.0  # in this call: how many, since when

    def begin(self, left: Sequence[Run], n_planned: int) -> None:
        """Begin as many of the runs that are left as the worker takes and the time allows."""
        runs_begun = {run for run, _ in self.begun.values()}
        expected = fmean(self.seconds) if self.seconds else 0.0  # of a first run nothing is known: it is begun
        for run in left:
            if run.learning_rate is None or run in runs_begun:  # its rate depends on runs that have not ended
                continue
            fits = self.budget.fits(expected * (1 + _times_longer(run, self.log)))  # 1 for the best adapter
            if len(self.begun) >= self.worker.at_once or not fits:
                break
            title = f"run {n_planned - len(left) + len(self.begun) + 1}/{n_planned} {run.title}"
            future = self.worker.submit(run, title)
            if future is None:
                break
            self.begun[future] = run, title
        # Here a run ends in time or was not begun; in a queue nobody knows when it begins.
        if self.worker.queues and not self.budget.fits(0.0):
            for future in [*self.begun]:
                if future.cancel():
                    del self.begun[future]

    def longest_wait(self, patience: float | None) -> float | None:
        """Return the seconds to wait for the end of a run at most; None without a limit."""
        limits = []
        if patience:
            limits.append(patience)
        if self.budget.seconds:
            left = self.budget.seconds - self.budget.spent
            if left > 0:  # once the time is out, what runs is waited for
                limits.append(left)
        return min(limits, default=None)

    def watch_nodes(self) -> None:
        """Report nodes that are lost."""
        now = self.worker.nodes()
        for key in self.nodes.keys() - now.keys():
            self.say(f"Node {self.nodes[key]} is lost, and its runs are done again. Nodes at work: {len(now)}.")
        self.nodes = now

    def take_in(self, future: Future[Any], n_left: int) -> bool:
        """Keep the record of a run that has ended, after which so many are left; False if it is done again."""
        run, title = self.begun.pop(future)
        record = come_back(future)
        if isinstance(record, str):  # why there is none
            self.lost[run] += 1
            if self.lost[run] < 2:
                self.say(f"{title}: the worker that did it is gone; it is done again. {record}")
                return False
            record = _given_up(run, record, self.log)
        self.log.add(record)
        self.seconds.append(record["run_seconds"] or 0.0)
        self.n_ended += 1
        if not self.began:  # when the first one to end began: before that, runs may have waited in a queue
            self.began = time.monotonic() - self.seconds[-1]
        seconds_left = n_left * (time.monotonic() - self.began) / self.n_ended  # if they end as fast as those before
        self.say(f"{title}: {_ended(record, seconds_left, len(self.nodes))}")
        return True


def _given_up(run: Run, why: str, log: RunDirectory) -> Record:
    record = failed(run, f"two workers died while they did it, as when memory runs out. {why}")
    if not log.records:  # nor would any other
        raise LoraInitError(f"{run.title}: {record['error']} No run has come back.")
    return record


def _times_longer(run: Run, log: RunDirectory) -> float:
    """Return how many times the steps of all a run trains for."""
    steps: int = log.settings["steps"]
    return (run.start.steps or steps) / steps


def _ended(record: Mapping[str, Any], seconds_left: float, n_nodes: int) -> str:
    """Report how a run ended, and how long those that are left may take."""
    losses, how = record["report_loss"], record["error"]
    if record["status"] == "finished":
        how = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    line = f"{record['status']}, {how}, {record['run_seconds'] or 0:.0f} s"
    if record.get("node"):
        line += f" on {record['node']}"
    line += time_left(seconds_left)
    if n_nodes:
        line += f"; nodes at work: {n_nodes}"
    return line
