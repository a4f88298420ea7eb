"""Who does the runs: this process, others on this machine, or a Ray cluster. Each run is one call, and one record."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from statistics import fmean
from typing import Any, Protocol

import torch
import transformers
from tqdm.auto import tqdm

from lora_init.comparison.budget import Budget
from lora_init.comparison.runs import Record, Run, RunDirectory
from lora_init.comparison.workbench import RunRecord, Workbench
from lora_init.errors import LoraInitError, first_line


class WorkerDied(Exception):
    """The process that did a run is gone."""


class Worker(Protocol):
    """Does one run at a time."""

    def carry_out(self, run: Run, title: str, keep: bool = False) -> Record:
        """See `Workbench.carry_out`; raises WorkerDied, after which it may be called again."""

    def close(self) -> None:
        """End, at once."""


class Here:
    """This process, with a bar for the steps."""

    def __init__(self, bench: Workbench, show: bool) -> None:
        self._bench, self._show = bench, show

    def carry_out(self, run: Run, title: str, keep: bool = False) -> Record:
        """See `Worker`."""
        steps = self._bench.training.steps
        with tqdm(desc=title, total=steps, unit="step", leave=False, disable=not self._show) as bar:
            return self._bench.carry_out(run, bar.update, keep)

    def close(self) -> None:
        """See `Worker`."""


class Process:
    """A process of its own on this machine; the i-th has the i-th GPU, if there are any."""

    def __init__(self, make: Callable[[], Workbench], place: int) -> None:
        self._arguments = (make, torch.get_num_threads(), place)
        self._process: Any = None
        self._busy = False

    def carry_out(self, run: Run, title: str, keep: bool = False) -> Record:
        """See `Worker`."""
        self._busy = True
        if self._process is None:
            self._start()
        try:
            self._pipe.send((run, keep))
            record = dict(self._answer())
        except (EOFError, OSError):
            self.close()
            raise WorkerDied from None
        self._busy = False
        return record

    def close(self) -> None:
        """See `Worker`."""
        if self._process is not None:
            if self._busy:
                self._process.kill()
            self._pipe.close()  # upon which an idle one ends
            self._process.join()
        self._process = None

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would share CUDA, and threads that are in the middle
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except (EOFError, OSError):
            self._process.join()
            code, self._process = self._process.exitcode, None
            if code < 0:  # killed
                raise WorkerDied from None
            raise LoraInitError(
                f"a worker ended while it started (exit code {code}). In a script of your own, call "
                "compare() under `if __name__ == '__main__':`, as new processes read the script again."
            ) from None

    def _answer(self) -> Any:
        answer = self._pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(pipe: Any, make: Callable[[], Workbench], threads: int, place: int) -> None:
    """Do runs as they come, until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the first one ends the others
    warnings.simplefilter("ignore")  # the first process has shown them
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    with suppress(EOFError, OSError):
        try:
            torch.set_num_threads(threads)  # which may change numbers in the last bits
            bench = make()
            pipe.send(None)
            while True:
                run, keep = pipe.recv()
                pipe.send(bench.carry_out(run, keep=keep))
        except (LoraInitError, RuntimeError) as error:
            pipe.send(error)


class RayActor:
    """An actor of a Ray cluster."""

    def __init__(self, make: Callable[[], Workbench], gpus: int) -> None:
        self._arguments = (make, torch.get_num_threads())
        self._options = {"num_cpus": 1, "num_gpus": gpus}
        self._actor: Any = None

    def carry_out(self, run: Run, title: str, keep: bool = False) -> Record:
        """See `Worker`."""
        import ray

        if self._actor is None:
            self._actor = ray.remote(**self._options)(_Actor).remote(*self._arguments)
        try:
            return dict(ray.get(self._actor.carry_out.remote(run, keep)))
        except ray.exceptions.RayTaskError as error:
            self.close()
            raise error.cause from None
        except ray.exceptions.RayError:  # killed, out of memory, or its machine is gone
            self.close()
            raise WorkerDied from None

    def close(self) -> None:
        """See `Worker`."""
        import ray

        if self._actor is not None:
            ray.kill(self._actor)
        self._actor = None


class _Actor:
    def __init__(self, make: Callable[[], Workbench], threads: int) -> None:
        self._make, self._threads = make, threads
        self._bench: Workbench | None = None

    def carry_out(self, run: Run, keep: bool) -> Record:
        if self._bench is None:  # not before: what an actor raises while it is made has no type
            torch.set_num_threads(self._threads)
            self._bench = self._make()
        return self._bench.carry_out(run, keep=keep)


def find_workers(make: Callable[[], Workbench], count: int | None, ray: str | None) -> list[Worker]:
    """Start with Ray where an address is given, else processes.

    Args:
        make: Sets up what a worker works on.
        count: How many. Default with Ray: a worker for each GPU of the cluster or, without any, for each processor.
        ray: `"auto"` or the address of a cluster.

    Raises:
        LoraInitError: Ray has no cluster there, or a start cannot be sent to another process.
    """
    if ray is None:
        try:
            pickle.dumps(make)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise LoraInitError(
                f"a start cannot be sent to a worker: {first_line(error)} Define its function in a module of its own."
            ) from error
        return [Process(make, place) for place in range(count or 1)]
    import ray as cluster

    if not cluster.is_initialized():
        try:
            cluster.init(address=ray, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise LoraInitError(
                f"ray={ray!r}: there is no cluster: {first_line(error)} Start one with `ray start --head`."
            ) from error
    there = cluster.cluster_resources()
    gpus = int(there.get("GPU", 0))
    return [RayActor(make, min(gpus, 1)) for _ in range(count or gpus or int(there.get("CPU", 1)))]


class _AtOnce(Executor):
    """Calls in this thread, so that Ctrl-C and tests find the call where they expect it."""

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*arguments, **options))
        return future


def run_all(
    due: Callable[[Mapping[Run, Record]], tuple[list[Run], list[str]]],
    log: RunDirectory,
    workers: Sequence[Worker],
    budget: Budget,
    say: Callable[[str], None],
) -> None:
    """Do what is due and has not ended, until nothing is or the time is out.

    Failed runs get one more chance each time this is called. A worker that dies costs its run, which is done again; a
    second time it counts as failed.

    Args:
        due: Lists runs by those that ended, and says what was decided; see `Budget.due`.
        log: Where runs are kept.
        workers: Who does them.
        budget: How long it may take.
        say: Receives a line for each run.
    """
    for run in [run for run, record in log.records.items() if record["status"] == "failed"]:
        del log.records[run]
    seconds = [record["run_seconds"] or 0.0 for record in log.records.values() if "run_seconds" in record][-20:]
    told, died = 0, Counter[Run]()
    idle, running = list(workers), dict[Future[Any], tuple[Worker, Run, str]]()
    with _AtOnce() if isinstance(workers[0], Here) else ThreadPoolExecutor(len(workers)) as pool:
        try:
            while True:
                planned, decided = due(log.records)
                for line in decided[told:]:
                    say(line)
                told = max(told, len(decided))
                begun = {run for _, run, _ in running.values()}
                left = [run for run in planned if run not in log.records]
                ready = [run for run in left if run.learning_rate is not None and run not in begun]
                expected = 2 * fmean(seconds) if seconds else 0.0  # the second is for the best adapter
                while idle and ready and budget.fits(expected):
                    run, worker = ready.pop(0), idle.pop(0)
                    title = f"run {len(planned) - len(left) + len(running) + 1}/{len(planned)} {run.title}"
                    running[pool.submit(worker.carry_out, run, title)] = worker, run, title
                if not running:
                    if left:
                        say(f"The time is out with {len(left)} runs left; the same command goes on from there.")
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    worker, run, title = running.pop(future)
                    idle.append(worker)
                    record = _record_of(future, run, died)
                    if record is None:
                        say(f"{title}: the worker that did it is gone; it is done again.")
                        continue
                    log.add(record)
                    seconds.append(record["run_seconds"] or 0.0)
                    say(f"{title}: {_ended(record, len(left) - 1, seconds, len(workers))}")
                    left = left[1:]
        finally:
            for worker in workers if running else ():
                worker.close()  # and the thread that waits for it ends


def _record_of(future: Future[Any], run: Run, died: Counter[Run]) -> Record | None:
    """Take the record of a run that ended; None if its worker died and it is to be done again."""
    try:
        return dict(future.result())
    except WorkerDied:
        died[run] += 1
        if died[run] < 2:
            return None
    record = RunRecord(start=run.start, seed=run.seed, learning_rate=run.learning_rate or 0.0, status="failed")
    record.error = "two workers died while they did it, as when memory runs out"
    return asdict(record)


def _ended(record: Mapping[str, Any], n_left: int, seconds: Sequence[float], n_workers: int) -> str:
    """Say how a run ended, and how long those that are left may take if they are like those that ended."""
    losses = record["report_loss"]
    how = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}" if record["status"] == "finished" else record["error"]
    left = f"; {n_left} left, about {n_left * fmean(seconds) / n_workers / 60:.1f} min" if n_left else ""
    return f"{record['status']}, {how}, {record['run_seconds'] or 0:.0f} s{left}"
