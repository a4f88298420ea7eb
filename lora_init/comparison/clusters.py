"""Executors of Ray, Dask and SLURM, by name; another package brings its own by an entry point.

An engine is a function of its address, the GPUs of a run, and a directory that all machines see. It returns an
executor, which may have `nodes`: a function that returns the machines at work, key to name.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_init.comparison.workers import Begun, Remote
from lora_init.errors import LoraInitError, did_you_mean, in_one_line, require
from lora_init.packages import Group, check_takes


def _ray(address: str, gpus: float, directory: Path) -> Executor:
    import ray

    if not ray.is_initialized():  # a second `ray.init` would raise
        where = address or "auto"  # "auto" reads RAY_ADDRESS
        if address.startswith("//"):  # of `ray://HOST:PORT`, whose first word was taken for the engine's name
            where = f"ray:{address}"
        ray.init(where, log_to_driver=False, logging_level="error")
    if not ray.cluster_resources().get("GPU"):  # a task that asks for what no node has would never begin
        gpus = 0
    # A run that is lost is counted and done again by the comparison, so not by Ray.
    options: Any = {"num_cpus": 1, "num_gpus": gpus, "max_retries": 0}

    def begin(function: Callable[..., Any], *arguments: Any) -> Begun:
        task = ray.remote(**options)(function).remote(*arguments)
        return partial(ray.get, task), partial(ray.cancel, task, force=True)  # by force: also a call that runs

    def nodes() -> dict[Any, Any]:
        return {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}

    return Remote(begin, nodes)


def _dask(address: str, gpus: float, directory: Path) -> Executor:
    from distributed import Client

    client: Any = Client(address, timeout=10, set_as_default=False)

    def nodes(what: str = "host") -> dict[Any, Any]:
        # Not `client.scheduler_info`: it returns what the client asked for last, now and then without any worker.
        state = client.sync(client.scheduler.identity, n_workers=-1)  # -1: all of them, and not the first few
        return {key: worker[what] for key, worker in state["workers"].items()}

    # Dask knows of GPUs only where a worker was started with `--resources GPU=N`.
    resources = None
    if any("GPU" in declared for declared in nodes("resources").values()):
        resources = {"GPU": gpus}

    def begin(function: Callable[..., Any], *arguments: Any) -> Begun:
        # Not pure: Dask would answer a call that is repeated from the one before.
        task = client.submit(function, *arguments, pure=False, resources=resources)

        def end() -> None:  # a call that runs ends with its process, which a nanny starts again
            busy = [worker for worker, keys in client.processing().items() if task.key in keys]
            task.cancel()
            client.restart_workers(busy)

        return task.result, end

    return Remote(begin, nodes, client.close)


def _slurm(address: str, gpus: float, directory: Path) -> Executor:
    import yaml  # type: ignore[import-untyped]
    from submitit import SlurmExecutor

    options: dict[str, Any] = {"job_name": "lora-init", "time": 60}  # minutes
    if torch.cuda.is_available():  # here: the machine that submits stands for those that compute
        options["gpus_per_node"] = gpus
    requested: Any = {}
    if address:
        requested = yaml.safe_load(Path(address).read_text(encoding="utf-8"))
    if not isinstance(requested, dict):  # an empty file is None
        raise ValueError(f"{address} holds no options, such as `partition: gpu`.")
    executor = SlurmExecutor(directory / ".submitit")  # a name with a dot is no part of a comparison, see `check_there`
    executor.update_parameters(**options | requested)
    return of_jobs(executor)


def of_jobs(executor: Any) -> Executor:
    """Make an executor of one that returns jobs, such as submitit's, whose end nobody reports: they are polled."""
    lock = threading.Lock()  # one question at a time: all jobs share its answer

    def result(job: Any) -> Any:
        done = False
        while not done:
            time.sleep(1)
            with lock:
                done = job.done()
        return job.result()

    def begin(function: Callable[..., Any], *arguments: Any) -> Begun:
        job = executor.submit(function, *arguments)
        return partial(result, job), job.cancel

    return Remote(begin)


# For each engine: its function, the library that it needs, and what to do if there is no such cluster.
CLUSTERS = {
    "ray": (_ray, "ray", "Start one with `ray start --head`, or name its address: ray://HOST:10001."),
    "dask": (_dask, "distributed", "Start one with `dask scheduler`, and name its address: dask:tcp://HOST:8786."),
    "slurm": (_slurm, "submitit", "Run this where `sbatch` works; slurm:FILE.yaml has its options, such as partition."),
}
_THEIRS = Group("lora_init.clusters", "cluster")


def open_executor(given: Any, gpus: float, directory: Path) -> Executor:
    """Return an executor as it is; for a name such as `"ray"` or `"dask:tcp://HOST:PORT"`, make one."""
    if not isinstance(given, str):
        return _check_executor(given)
    name, _, address = given.partition(":")
    if name in _THEIRS.entries and name not in CLUSTERS:
        with _THEIRS.loading(name) as (entry, where):
            theirs = entry.load()
            check_takes(theirs, where, "address", "gpus", "directory")
            executor: Executor = theirs(address, gpus, directory)
            return executor
    if name not in CLUSTERS:
        raise LoraInitError(f"cluster {name!r} is unknown. {did_you_mean(name, [*CLUSTERS, *_THEIRS.entries])}")
    make, library, remedy = CLUSTERS[name]
    if address and not address.strip("/:"):  # Ray would try for half a minute to connect to it
        raise LoraInitError(f"cluster {given!r} names no address. {remedy}")
    require(library)
    try:
        return make(address, gpus, directory)
    except Exception as error:  # each engine has its own kinds
        raise LoraInitError(f"cluster {given!r}: {in_one_line(error)} {remedy}") from error


def _check_executor(given: Any) -> Executor:
    # A class has `submit`, too: it is an executor that somebody forgot to make.
    if isinstance(given, type):
        raise LoraInitError(f"executor= takes an executor, or a cluster's name, and got the class {given.__name__}.")
    if not callable(getattr(given, "submit", None)):
        raise LoraInitError(f"executor= takes an executor, or a cluster's name, and got a {type(given).__name__}.")
    if isinstance(given, Executor):
        return given
    return of_jobs(given)  # what submits but is no `Executor` returns jobs, as submitit does
