"""Runs on real engines: two nodes of Ray, two workers of Dask, jobs of submitit. All wait for events alone.

To import takes nine seconds of a processor. So Dask's workers and submitit's jobs are forked from a server that has
imported all, and Ray's two workers do all tests, of which the last one kills the second of them.
"""

import os
import random
import re
import runpy
import select
import shlex
import signal
import sys
import threading
from collections import Counter
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Listener, wait
from pathlib import Path
from types import SimpleNamespace

import dask as dask_itself
import pytest
import submitit
import torch
from distributed import LocalCluster
from submitit.local.local import LocalJob
from typer.testing import CliRunner

from lora_init.cli import app as cli
from lora_init.comparison import workers
from lora_init.comparison.budget import RunBudget
from lora_init.comparison.clusters import open_executor
from lora_init.comparison.runs import Run, open_runs, read_runs
from lora_init.comparison.variants import REFERENCE
from lora_init.comparison.workers import Job, carry_out, describe, elsewhere, run_all
from lora_init.errors import LoraInitError
from tests.comparison.made import again, compare, set_up_bench, without_clock
from tests.comparisons import record, settings
from tests.conftest import refused
from tests.processes import FORKS

PAGE = Path(__file__).parent.parent.parent / "docs/more-than-one-machine.md"


def met(folder, model, seed):
    """Run as `again`; the first time on seed 1, write which process and node this is, and wait to be killed."""
    if seed == 1 and not (folder / "before").exists():
        (folder / "before").touch()
        with (folder / "meets").open("w") as pipe:  # which opens as soon as the test reads
            pipe.write(f"{os.getpid()} {node()}")
        threading.Event().wait()
    return again(model, seed)


def node():
    import ray

    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""


class Meeting:
    """Does something about the process in which `met` waits, as soon as it does."""

    def __init__(self, folder, act):
        folder.mkdir()
        os.mkfifo(folder / "meets")
        self.start = ("mine", partial(met, folder))
        self._pipe, self._act = folder / "meets", act
        self.ended = threading.Event()
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self):
        pid, _, node = self._pipe.read_text().partition(" ")
        process = os.pidfd_open(int(pid))
        self._act(int(pid), node)
        select.select([process], [], [])  # until it has ended
        self.ended.set()


def kill(pid, node):
    os.kill(pid, signal.SIGKILL)


def gone(lines):
    return [line for line in lines if "the worker that did it is gone" in line]


@pytest.fixture(scope="module")
def nodes():
    """A cluster of Ray without a processor of its own, and what takes one of its two nodes away."""
    import ray
    from ray.cluster_utils import Cluster

    # At Ray's niceness of 15 the workers would take minutes beside other tests. A node that is slow is not a dead one.
    usual = {"worker_niceness": 0, "health_check_timeout_ms": 300_000, "agent_register_timeout_ms": 300_000}
    head = dict(num_cpus=0, include_dashboard=False, _system_config=usual)
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ours = [cluster.add_node(num_cpus=1) for _ in range(2)]

    def remove(pid, node):
        cluster.remove_node(next(one for one in ours if one.node_id == node), allow_graceful=False)

    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = cluster.address
    yield "ray", remove, gone
    ray.shutdown()
    cluster.shutdown()
    os.environ.pop("RAY_ADDRESS") if before is None else os.environ.update(RAY_ADDRESS=before)


@pytest.fixture(scope="module")
def dask():
    forkserver.ensure_running()  # with our imports; Dask would ask for others
    fork = dask_itself.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
    with fork, LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield f"dask:{cluster.scheduler_address}", kill, lambda lines: [line for line in lines if "is lost" in line]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    with Listener(str(folder / "socket"), backlog=8) as listener, pytest.MonkeyPatch.context() as patched:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        patched.setenv("FORKED_JOBS", listener.address)
        patched.setattr(LocalJob, "_results_timeout_s", 0)  # for a slow disk
        python = shlex.join([sys.executable, str(Path(__file__).parent.parent / "forked_job.py")])
        yield submitit.LocalExecutor(folder / "logs", python=python), kill, gone


def serve(listener):
    with suppress(OSError):  # it is closed
        while True:
            threading.Thread(target=fork_job, args=(listener.accept(),), daemon=True).start()


def fork_job(link):
    with link:
        process = FORKS.Process(target=do_job, args=link.recv())
        process.start()
        wait([process.sentinel, link])
        process.kill()
        process.join()
        with suppress(OSError):  # the job was canceled
            link.send(process.exitcode)


def do_job(words, environment):
    os.environ.update(environment)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__")


@pytest.fixture(scope="module")
def alone(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    (folder / "before").touch()
    starts = ["random", ("mine", partial(met, folder))]
    return compare(home, folder / "out", starts=starts, learning_rates=[1e-2], seeds=[1])


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "cluster"), [("nodes", "ray"), ("dask", "dask:"), ("jobs", "slurm:")])
def test_the_commands_of_the_page_run(engine, cluster, home, tmp_path, request, monkeypatch):
    executor, *_ = request.getfixturevalue(engine)
    (line,) = re.findall(rf"^lora-init (compare .*--cluster) {cluster}", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    if engine == "jobs":  # what SLURM itself does: python -m benchmarks.clusters slurm
        executor.update_parameters = lambda **options: None
        monkeypatch.setattr("submitit.SlurmExecutor", lambda folder: executor)
    names = {"MODEL": home / "llama", "DATA": home / "rows.jsonl", "comparison": tmp_path / "out"}
    words = [names.get(word, word) for word in line.split()] + [executor if isinstance(executor, str) else "slurm"]
    words += ["--template", "{passage}", "--completion", " {options}", "--steps", 4, "--batch-size", 4, "--rank", 2,
              "--starts", "random", "--seeds", 1, "--learning-rates", "1e-2", "--time", "1h"]  # fmt: skip
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    assert "waiting in the queue included" in result.stderr and "run 1/1" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["nodes", "dask", "jobs"])
def test_an_engine_that_loses_a_process_in_the_middle_gives_the_numbers_of_one(engine, home, alone, tmp_path, request):
    executor, act, told = request.getfixturevalue(engine)
    meeting, lines = Meeting(tmp_path / "meeting", act), []
    starts = ["random", meeting.start]
    compare(
        home, tmp_path / "out", starts=starts, learning_rates=[1e-2], seeds=[1], executor=executor, say=lines.append
    )
    assert meeting.ended.is_set()
    assert without_clock(read_runs(tmp_path / "out")) == without_clock(read_runs(alone.directory))
    assert len(told(lines)) == 1, lines


@pytest.mark.slow
def test_dask_names_its_workers_also_while_its_client_looks_for_itself(dask, tmp_path, monkeypatch):
    from distributed import Client

    executor = open_executor(dask[0], 1, tmp_path)
    looked = property(lambda client: {"workers": {}}, lambda client, state: None)
    monkeypatch.setattr(Client, "_scheduler_identity", looked, raising=False)
    with executor:
        assert list(executor.nodes().values()) == ["127.0.0.1"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["nodes", "dask", "jobs"])
def test_ctrl_c_ends_what_runs_elsewhere(engine, home, tmp_path, request):
    executor, *_ = request.getfixturevalue(engine)
    meeting = Meeting(tmp_path / "meeting", lambda pid, node: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        compare(home, tmp_path / "out", starts=[meeting.start], learning_rates=[1e-2], seeds=[1], executor=executor)
    assert meeting.ended.wait(60)


# Without an engine: what a node says, what a queue does, which names there are.


def no_bench(*args, **options):
    raise LoraInitError("model 'here': no such directory.")


@pytest.mark.parametrize(("changes", "message"), [
    ({"torch": "1.0"}, "torch is .*, not '1.0'"),
    ({"lora_init": "0.0"}, "lora_init is .*, not '0.0'"),
    ({"fingerprint": "other"}, "fingerprint is .*, not 'other'"),
    ({"examples": {}}, "examples is "),
    ({"device": "cuda"}, "device is 'cpu', not 'cuda'"),
    (None, "model 'here': no such directory"),
])  # fmt: skip
def test_a_node_that_differs_is_named_before_its_first_run(changes, message, bench, monkeypatch):
    expected = describe(bench, "llama")
    assert expected["python"] is None and expected["fingerprint"]
    job = Job(no_bench if changes is None else lambda: bench, expected | (changes or {}), node="first")
    monkeypatch.setattr("platform.node", lambda: "node-7")
    error, trace = carry_out(job, Run(REFERENCE, 0, 1e-3), False, "")
    assert isinstance(error, LoraInitError) and "Traceback" in trace
    refused(f"^node node-7: {message}", raises, error)


@pytest.fixture(scope="module")
def bench(home, tmp_path_factory):
    return set_up_bench(home, tmp_path_factory.mktemp("bench"))


def raises(error):
    raise error


def test_a_run_on_another_machine_names_it_and_one_on_this_machine_does_not(bench, monkeypatch):
    job, run = Job(lambda: bench, describe(bench, "llama")), Run(REFERENCE, 0, 1e-3)
    here = carry_out(job, run, False, "")
    monkeypatch.setattr("platform.node", lambda: "node-7")
    there = carry_out(job, run, False, "")
    assert here["node"] is None and there["node"] == "node-7"
    assert without_clock([here | {"node": "node-7"}]) == without_clock([there])


@pytest.mark.slow
def test_any_executor_does_the_runs_and_is_left_as_it_is(home, alone, tmp_path):
    (tmp_path / "before").touch()
    starts = ["random", ("mine", partial(met, tmp_path))]
    with ThreadPoolExecutor(2) as pool:
        compare(home, tmp_path / "out", starts=starts, learning_rates=[1e-2], seeds=[1], executor=pool)
        assert pool.submit(max, 1, 2).result() == 2
    assert without_clock(read_runs(tmp_path / "out")) == without_clock(read_runs(alone.directory))


class Queue(Executor):
    """Begins nothing until it is told to."""

    def __init__(self, ready=False):
        self.ready, self.waiting, self.nodes = ready, [], dict

    def submit(self, function, /, *arguments):
        future = Future()
        self.waiting.append((future, arguments[1]))
        if self.ready:
            self.begin()
        return future

    def begin(self):
        self.ready = True
        for future, run in self.waiting:
            if future.set_running_or_notify_cancel():
                future.set_result(record(run.start, run.learning_rate, run.seed, run_seconds=1.0))
        self.waiting.clear()


RUNS = [Run(REFERENCE, seed, 1e-3) for seed in range(5)]


def run_on(executor, directory, say=lambda line: None, budget=None, runs=RUNS):
    worker = elsewhere(executor, Job(no_bench, {}), False)
    with open_runs(directory, settings()) as log:
        run_all(lambda records: (runs, []), log, worker, budget or RunBudget(), say)
        return log.records


def test_a_queue_that_does_not_begin_is_spoken_of(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 0.01)
    queue, lines = Queue(), []
    ended = run_on(queue, tmp_path / "out", say=lambda line: (lines.append(line), queue.begin()))
    assert len(ended) == 5 and "No run has come back yet" in lines[0]
    queue, lines = Queue(), []
    assert run_on(queue, tmp_path / "late", lines.append, RunBudget(0.1)) == {}
    assert sum("No run has come back yet" in line for line in lines) == 1
    assert "time is out with 5 runs left" in lines[-1]
    assert len(queue.waiting) == 5 and all(future.cancelled() for future, _ in queue.waiting)


def test_a_node_that_is_lost_is_a_line(tmp_path):
    queue, lines = Queue(ready=True), []
    there = [{1: "a", 2: "b"}, {1: "a", 2: "b"}, {1: "a"}]
    queue.nodes = lambda: there.pop(0) if len(there) > 1 else there[0]
    run_on(queue, tmp_path / "out", lines.append, runs=RUNS[:1])
    run_on(queue, tmp_path / "out2", lines.append, runs=RUNS[:1])
    assert "nodes at work: 2" in lines[0] and "nodes at work: 1" in lines[1]


class Dying(ThreadPoolExecutor):
    """Its workers die at random, and calls with them."""

    def __init__(self, n):
        super().__init__(n)
        self.random, self.begun = random.Random(0), Counter()

    def submit(self, function, job, run, keep, call):
        self.begun[run] += 1
        return super().submit(self.call, run, self.random.random() < 0.05)

    def call(self, run, dies):
        if dies:
            raise BrokenProcessPool("gone.")
        return record(run.start, run.learning_rate, run.seed, run_seconds=1.0)


def test_hundreds_of_runs_on_workers_that_die_have_one_record_each(tmp_path):
    runs = [Run(REFERENCE, seed, 1e-3) for seed in range(300)]
    with Dying(64) as pool:
        ended = run_on(pool, tmp_path / "out", runs=runs)
    assert set(ended) == set(runs) and len(read_runs(tmp_path / "out")) == 300
    assert set(pool.begun.values()) == {1, 2}
    assert sum(one["status"] == "failed" for one in ended.values()) < 5


class Full(Queue):
    """Takes two calls at most, and begins them when it has refused one, or has the last."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def submit(self, function, /, *arguments):
        if len(self.waiting) >= self.most:
            self.begin()
            raise RuntimeError("QOSMaxSubmitJobPerUserLimit")
        self.ready = arguments[1] == RUNS[-1]
        return super().submit(function, *arguments)


def test_a_queue_that_takes_no_more_is_tried_again(tmp_path):
    assert len(run_on(Full(2), tmp_path / "out")) == 5
    refused("it cannot be submitted: QOSMaxSubmitJobPerUserLimit", run_on, Full(0), tmp_path / "none")


def test_the_first_run_that_two_workers_die_of_stops_all(tmp_path):
    class Dead(Queue):
        def submit(self, function, /, *arguments):
            future = Future()
            future.set_exception(ModuleNotFoundError("No module named 'lora_init'"))
            return future

    refused("two workers died .*No module named 'lora_init'", run_on, Dead(), tmp_path / "out")


def test_names_of_clusters_and_those_of_another_package(installed, tmp_path, monkeypatch):
    refused("cluster 'rya' is unknown. Did you mean ray?", open_executor, "rya", 1, tmp_path)
    refused("executor= takes an executor, or a cluster's name, and got a int", open_executor, 3, 1, tmp_path)
    monkeypatch.setattr("distributed.Client", lambda *args, **options: raises(OSError("Timed out.")))
    refused("cluster 'dask:tcp://nobody:1': Timed out. Start one with `dask scheduler`", open_executor,
            "dask:tcp://nobody:1", 1, tmp_path)  # fmt: skip
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    queue = Queue()
    installed("lora_init.clusters", mine=lambda address, gpus, directory: (address, gpus, queue), bad=lambda: None)
    assert open_executor("mine:there", 0.5, tmp_path) == ("there", 0.5, queue)
    refused("cluster 'bad' .*is called with \\(address, gpus, directory\\)", open_executor, "bad", 1, tmp_path)


def test_options_reach_slurm_and_a_share_of_a_gpu_reaches_ray(tmp_path, monkeypatch):
    class Slurm:
        def __init__(self, folder):
            asked.append(folder)

        def update_parameters(self, **options):
            asked.append(options)

    asked = []
    (tmp_path / "options.yaml").write_text("partition: gpu\ntime: 120\n")
    monkeypatch.setattr("submitit.SlurmExecutor", Slurm)
    open_executor(f"slurm:{tmp_path / 'options.yaml'}", 1, tmp_path)
    assert asked == [tmp_path / ".submitit", {"job_name": "lora-init", "partition": "gpu", "time": 120}]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    open_executor("slurm", 2, tmp_path)
    assert asked[-1] == {"job_name": "lora-init", "time": 60, "gpus_per_node": 2}
    for gpus, share in ((8.0, 0.5), (0.0, 0)):
        there = SimpleNamespace(
            __spec__=1, is_initialized=lambda: True, nodes=list, get=lambda task: 1, cancel=print,
            cluster_resources=lambda gpus=gpus: {"GPU": gpus},
            remote=lambda **options: asked.append(options) or (lambda function: SimpleNamespace(remote=lambda: None)),
        )  # fmt: skip
        monkeypatch.setitem(sys.modules, "ray", there)
        open_executor("ray", 0.5, tmp_path).submit(print).result()
        assert asked[-1] == {"num_cpus": 1, "num_gpus": share, "max_retries": 0}


def test_a_node_of_ray_that_died_is_no_longer_at_work(tmp_path, monkeypatch):
    nodes = [{"NodeID": name, "NodeManagerHostname": f"host {name}", "Alive": name == "a"} for name in "ab"]
    there = SimpleNamespace(
        __spec__=1, is_initialized=lambda: True, cluster_resources=dict, nodes=lambda: nodes, remote=None, get=None,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", there)
    assert open_executor("ray", 1, tmp_path).nodes() == {"a": "host a"}


@pytest.mark.parametrize(("name", "where"), [
    ("ray", "auto"), ("ray:10.0.0.1:6379", "10.0.0.1:6379"), ("ray://head:10001", "ray://head:10001"), ("open", None),
])  # fmt: skip
def test_ray_is_asked_for_the_address_that_was_named_and_once(name, where, tmp_path, monkeypatch):
    asked = []
    there = SimpleNamespace(
        __spec__=1, is_initialized=lambda: name == "open", cluster_resources=dict,
        init=lambda address, **options: asked.append((address, options)),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", there)
    open_executor("ray" if name == "open" else name, 1, tmp_path)
    # What the nodes print is not for this terminal.
    assert asked == ([] if where is None else [(where, {"log_to_driver": False, "logging_level": "error"})])


@pytest.mark.parametrize(("declared", "resources"), [
    ([{}, {"GPU": 2.0}], {"GPU": 0.5}), ([{}, {"memory": 1}], None), ([], None),
])  # fmt: skip
def test_dask_is_asked_for_a_gpu_where_a_worker_has_one(declared, resources, tmp_path, monkeypatch):
    asked, workers = [], list(enumerate(declared))

    class Client:
        scheduler = SimpleNamespace(
            identity=lambda n_workers: {
                "workers": {
                    i: {"resources": r, "host": f"node{i}"} for i, r in workers[: None if n_workers < 0 else n_workers]
                }
            }
        )

        def __init__(self, address, **options):
            asked.append((address, options))

        def sync(self, function, **options):
            return function(**options)

        def submit(self, function, *arguments, **options):
            asked.append(options)
            return SimpleNamespace(result=lambda: function(*arguments))

        def close(self):
            pass

    monkeypatch.setattr("distributed.Client", Client)
    executor = open_executor("dask:tcp://here:1", 0.5, tmp_path)
    assert executor.submit(max, 1, 2).result() == 2
    opened = ("tcp://here:1", {"timeout": 10, "set_as_default": False})
    assert asked == [opened, {"pure": False, "resources": resources}]
    assert executor.nodes() == {i: f"node{i}" for i in range(len(declared))}


def test_runs_of_one_process_take_turns(monkeypatch):
    held, job = [], SimpleNamespace(node="", key="k", threads=torch.get_num_threads())
    bench = SimpleNamespace(carry_out=lambda run, keep: held.append(workers._one_run.locked()) or {})
    monkeypatch.setitem(workers._benches, "k", bench)
    carry_out(job, Run(REFERENCE, 0, 1e-3), False, "")
    assert held == [True] and not workers._one_run.locked()


def test_a_call_that_is_canceled_ends_where_it_runs(tmp_path, monkeypatch):
    """Ray kills its task. Dask has the processes that do it started anew, and no other."""
    asked = []
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(
        __spec__=1, is_initialized=lambda: True, nodes=list, cluster_resources=dict, get=print,
        cancel=lambda *given, **how: asked.append((given, how)),
        remote=lambda **options: lambda function: SimpleNamespace(remote=lambda *given: ("task", *given)),
    ))  # fmt: skip
    _, end = open_executor("ray", 1, tmp_path).begin(max, 1, 2)
    end()
    assert asked == [((("task", 1, 2),), {"force": True})]

    class Client:
        scheduler = SimpleNamespace(identity=lambda n_workers: {"workers": {}})

        def __init__(self, address, **options):
            pass

        def sync(self, function, **options):
            return function(**options)

        def submit(self, function, *arguments, **options):
            return SimpleNamespace(key="the call", result=None, cancel=lambda: asked.append("canceled"))

        def processing(self):
            return {"busy": ("another", "the call"), "other": ("another",), "idle": ()}

        def restart_workers(self, names):
            asked.append(names)

        def close(self):
            asked.append("closed")

    monkeypatch.setattr("distributed.Client", Client)
    asked.clear()
    executor = open_executor("dask:tcp://here:1", 1, tmp_path)
    executor.begin(max, 1, 2)[1]()
    executor.shutdown()
    assert asked == ["canceled", ["busy"], "closed"]


def test_the_end_of_a_job_is_asked_for_once_a_second(monkeypatch):
    asked, done = [], iter([False, False, True])
    job = SimpleNamespace(done=lambda: next(done), result=lambda: 7, cancel=lambda: asked.append("canceled"))
    monkeypatch.setattr("lora_init.comparison.clusters.time.sleep", asked.append)
    jobs = SimpleNamespace(submit=lambda *call: asked.append(call) or job)  # as submitit's, which is no `Executor`
    result, end = open_executor(jobs, 1, None).begin(max, 1, 2)
    assert result() == 7 and asked == [(max, 1, 2), 1, 1, 1]
    end()
    assert asked[-1] == "canceled"


def test_what_names_no_cluster_that_could_be_asked_is_refused(installed, tmp_path, monkeypatch):
    remedy = "Start one with `ray start --head`, or name its address: ray://HOST:10001"
    for name in ("ray://", "ray::", "ray:/"):
        refused(f"^cluster '{name}' names no address. {remedy}", open_executor, name, 1, tmp_path)
    queue = Queue()
    assert open_executor(queue, 1, tmp_path) is queue  # an executor is taken as it is
    refused("and got the class ThreadPoolExecutor", open_executor, ThreadPoolExecutor, 1, tmp_path)
    (tmp_path / "empty.yaml").touch()
    refused("empty.yaml holds no options, such as `partition: gpu`", open_executor, f"slurm:{tmp_path}/empty.yaml", 1,
            tmp_path)  # fmt: skip
    installed("lora_init.clusters", slurm=lambda address, gpus, directory: "theirs", more=lambda **options: None)
    monkeypatch.setattr("submitit.SlurmExecutor", lambda folder: raises(OSError("no sbatch")))
    refused("no sbatch", open_executor, "slurm", 1, tmp_path)  # ours
    refused("cluster 'moer' is unknown. Did you mean more", open_executor, "moer", 1, tmp_path)
    monkeypatch.setattr("lora_init.errors.find_spec", lambda name: None)
    refused("^this needs distributed, which is not installed", open_executor, "dask:tcp://here:1", 1, tmp_path)
