"""What a comparison does on a cluster: SLURM itself with a job canceled, and what executors cost in time and memory.

    python -m benchmarks.clusters slurm      # as root, after: apt-get install slurm-wlm slurmdbd munge mariadb-server
    python -m benchmarks.clusters overhead   # 12 runs that sleep, on two nodes of Ray and with two processes
    python -m benchmarks.clusters scale      # 2,000 runs that sleep on 64 workers, of which some die

`slurm` starts MariaDB, munge, slurmdbd, slurmctld and slurmd, which write into a folder of their own, compares in six
runs, cancels a job in the middle, and checks that the records equal those of one process.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from lora_init.comparison.budget import RunBudget
from lora_init.comparison.clusters import open_executor
from lora_init.comparison.runs import Record, Run, open_runs, read_runs
from lora_init.comparison.variants import Variant
from lora_init.comparison.workers import Job, describe, elsewhere, processes, run_all
from tests.comparisons import make_home, record, settings

SLURM = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MailProg=/bin/true
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePass={folder}/munge.socket
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
ACCOUNTS = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
SlurmUser=root
StorageType=accounting_storage/mysql
StorageLoc=slurm
StorageUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""


def wait_until(answers: list[str], seconds: float = 30.0) -> None:
    """Ask until a command succeeds."""
    until = time.monotonic() + seconds
    while subprocess.run(answers, capture_output=True, check=False).returncode:
        if time.monotonic() > until:
            raise SystemExit(f"{' '.join(answers)} does not succeed")
        time.sleep(0.5)


def start_slurm(folder: Path, stack: ExitStack) -> None:
    """Start all of SLURM on this machine; the stack ends it."""

    def begin(*words: Any, **options: Any) -> None:
        process = subprocess.Popen([*map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
        stack.callback(process.wait)
        stack.callback(process.terminate)

    for name in ("state", "spool", "database"):
        (folder / name).mkdir()
    for name, text in (("slurm.conf", SLURM), ("slurmdbd.conf", ACCOUNTS)):
        (folder / name).write_text(text.format(folder=folder, host=socket.gethostname()))
        (folder / name).chmod(0o600)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    kinds = {"key-file": "key", "socket": "munge.socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    begin("munged", "--foreground", "--force", *(f"--{kind}={folder / name}" for kind, name in kinds.items()))
    where = [f"--datadir={folder}/database", "--user=root", "--auth-root-authentication-method=socket"]
    subprocess.run(["mariadb-install-db", *where], capture_output=True, check=True)
    Path("/run/mysqld").mkdir(exist_ok=True)
    begin("mariadbd", f"--datadir={folder}/database", "--user=root", f"--pid-file={folder}/mariadb.pid")
    wait_until(["mariadb", "-e", "create database if not exists slurm"])
    begin("slurmdbd", "-D", env={**os.environ, "SLURM_CONF": str(folder / "slurm.conf")})
    wait_until(["sacctmgr", "-i", "add", "cluster", "one"])
    begin("slurmctld", "-D")
    begin("slurmd", "-D")
    stack.callback(subprocess.run, ["scancel", "--name", "lora-init"], check=False)
    wait_until(["sinfo", "--noheader", "--states=idle", "-o", "%N"])


def cancel_third(done: threading.Event) -> None:
    """Cancel the third job as soon as it runs: two run at once, so that another one has ended."""
    while not done.is_set():
        states = subprocess.run(["squeue", "-h", "-t", "R", "-o", "%i"], capture_output=True, text=True, check=True)
        if "3" in states.stdout.split():
            subprocess.run(["scancel", "3"], check=True)
            print("scancel 3", flush=True)
            return
        time.sleep(0.2)


def slurm(folder: Path) -> None:
    """Compare in one process and on SLURM, where a job is canceled."""
    home, done = make_home(folder), threading.Event()
    words = ["--template", "{passage}", "--completion", " {options}", "--steps", "6", "--batch-size", "4",
             "--selection-samples", "8", "--report-samples", "12", "--rank", "2", "--learning-rates", "1e-2",
             "--starts", "random,eva", "--seeds", "3"]  # fmt: skip
    base = [sys.executable, "-m", "lora_init", "compare", str(home / "llama"), str(home / "rows.jsonl"), *words]
    subprocess.run([*base, "-o", str(folder / "alone")], check=True, capture_output=True)
    (folder / "options.yaml").write_text("partition: main\ntime: 10\ncpus_per_task: 1\n")
    with ExitStack() as stack:
        start_slurm(folder, stack)
        threading.Thread(target=cancel_third, args=(done,), daemon=True).start()
        began = time.monotonic()
        cluster = ["-o", str(folder / "on-slurm"), "--cluster", f"slurm:{folder}/options.yaml"]
        subprocess.run([*base, *cluster], check=True, stdout=subprocess.DEVNULL)
        print(f"{time.monotonic() - began:.0f} s")
        done.set()
        subprocess.run(["sacct", "-X", "-o", "JobID,State,Elapsed"], check=True)
    same = [without_clock(read_runs(folder / name)) for name in ("alone", "on-slurm")]
    print("records equal those of one process:", same[0] == same[1], len(same[1]))


RUNS = [Run(Variant("random"), seed, 1e-3) for seed in range(2000)]


class Sleeps:
    """A workbench whose runs sleep."""

    def __init__(self, seconds: float, directory: Path) -> None:
        self.seconds = seconds

    def settings(self, model: str) -> dict[str, Any]:
        """Describe it, as a `Workbench` does."""
        return {"model": model}

    def carry_out(self, run: Run, keep: bool = False) -> Record:
        """Sleep."""
        time.sleep(self.seconds)
        return stub(run, self.seconds)


def stub(run: Run, seconds: float) -> Record:
    """Return a record as long as a real one."""
    made: Record = record(run.start, run.learning_rate, run.seed, run_seconds=seconds)
    return made


def measured(executor: Any, is_ours: bool, n: int, seconds: float, at_once: int | None = None) -> tuple[float, int]:
    """Return how long n runs take, and the bytes that are kept when they have ended, if `tracemalloc` traces them."""
    make = partial(Sleeps, seconds, Path())
    worker = elsewhere(executor, Job(make, describe(make(), "none")), is_ours, at_once)  # type: ignore[arg-type]
    took, kept = 0.0, 0
    with tempfile.TemporaryDirectory() as name, closing(worker):
        for part in (RUNS[:2], RUNS[:n]):  # the first two start the processes
            with open_runs(Path(name) / str(len(part)), settings()) as log:
                began = time.monotonic()
                run_all(lambda records, part=part: (part, []), log, worker, RunBudget(), lambda line: None)  # type: ignore[misc]
                took, kept = time.monotonic() - began, tracemalloc.get_traced_memory()[0]
                if len(log.records) != len(part) or len(read_runs(log.path)) != len(part):
                    raise SystemExit(f"{len(log.records)} records of {len(part)} runs")
    return took, kept


def overhead(folder: Path) -> None:
    """Print how long 12 runs take on Ray and with two processes, in turn, on processes that have started."""
    import ray
    from ray.cluster_utils import Cluster

    usual = {"worker_niceness": 0}  # as the processes of --workers have
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": usual}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    took: dict[str, list[float]] = {"--workers 2": [], "ray": []}
    for _ in range(2):
        took["--workers 2"].append(measured(processes(2), True, 12, 60.0, 2)[0])
        took["ray"].append(measured(open_executor("ray", 1, folder), True, 12, 60.0)[0])
        ray.shutdown()
        print({name: [round(one, 1) for one in all_of_it] for name, all_of_it in took.items()}, flush=True)
    medians = {name: median(all_of_it) for name, all_of_it in took.items()}
    print(medians, f"ratio {medians['ray'] / medians['--workers 2']:.3f}")
    cluster.shutdown()


class Dying(ThreadPoolExecutor):
    """Threads that sleep in place of runs; some die in the middle."""

    def __init__(self, n: int, seconds: float, deaths: float) -> None:
        super().__init__(n)
        self.seconds, self.deaths, self.slept, self.random = seconds, deaths, 0.0, random.Random(0)

    def submit(self, function: Any, /, *arguments: Any, **options: Any) -> Any:  # type: ignore[override]
        """Sleep, and return the record of a run."""
        share = self.random.random() if self.random.random() < self.deaths else 1.0
        self.slept += share * self.seconds
        return super().submit(self._sleep, arguments[1], share)

    def _sleep(self, run: Run, share: float) -> Record:
        time.sleep(share * self.seconds)
        if share < 1.0:
            raise BrokenProcessPool("gone")
        return stub(run, self.seconds)


def scale(folder: Path) -> None:
    """Print the makespan of runs on 64 workers over work by workers, and what the driver keeps of each run.

    Memory is traced in other runs, which do not sleep: to trace takes ten times as long as what is traced.
    """
    for n in (500, 1000, 2000):
        with Dying(64, 4.0, 0.03) as pool:
            used = time.process_time()
            took, _ = measured(pool, False, n, 4.0)
            used = time.process_time() - used
        tracemalloc.start()
        with Dying(64, 0.0, 0.03) as idle:
            kept = measured(idle, False, n, 0.0)[1]
        tracemalloc.stop()
        ideal = pool.slept / 64
        print(f"{n} runs: {took:.1f} s, work over workers {ideal:.1f} s, ratio {took / ideal:.3f}; "
              f"{used:.1f} s of a processor; {kept / 1e6:.1f} MB kept, {kept / n / 1e3:.1f} kB a run")  # fmt: skip


def without_clock(records: list[Record]) -> list[dict[str, Any]]:
    """Leave out what differs between two identical comparisons."""
    return [{key: one[key] for key in one if key != "peak_memory_bytes" and "seconds" not in key} for one in records]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["slurm", "overhead", "scale"])
    with tempfile.TemporaryDirectory() as name:
        {"slurm": slurm, "overhead": overhead, "scale": scale}[parser.parse_args().what](Path(name))
