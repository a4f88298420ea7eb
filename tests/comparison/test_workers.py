"""Who does the runs: processes give the numbers of one, and one that dies costs its run only."""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import warnings
import weakref
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from types import SimpleNamespace

import pytest

from lora_init.comparison import workers
from lora_init.comparison.budget import RunBudget
from lora_init.comparison.runs import Run, open_runs, read_runs
from lora_init.comparison.variants import REFERENCE, Variant
from lora_init.comparison.workers import Job, Remote, Worker, come_back, elsewhere, processes, run_all
from lora_init.errors import LoraInitError
from lora_init.layers.targets import find_targets
from tests.comparison.made import again, compare, set_up_bench, without_clock
from tests.comparisons import broken, record, settings
from tests.conftest import refused
from tests.processes import FORKS


@pytest.fixture(scope="module")
def alone(home, tmp_path_factory):
    return compare(home, tmp_path_factory.mktemp("alone") / "out", learning_rates=[1e-2], seeds=3)


@pytest.fixture
def forks(monkeypatch):
    """Workers that a server with all imports forks; `test_a_process_that_begins_anew_gives_them_too` spawns one."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: FORKS)


def die(mark, model, seed):
    """Run as `again`, but end the process that does it, the first time that it is called."""
    if seed == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return again(model, seed)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(forks, home, alone, tmp_path):
    found = compare(home, tmp_path / "out", learning_rates=[1e-2], seeds=3, workers=2)
    assert without_clock(read_runs(tmp_path / "out")) == without_clock(read_runs(alone.directory))
    assert [verdict.mean for verdict in found.summary.verdicts] == [v.mean for v in alone.summary.verdicts]
    assert (tmp_path / "out" / "best" / "adapter_model.safetensors").read_bytes() == (
        alone.directory / "best" / "adapter_model.safetensors"
    ).read_bytes()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_process_that_begins_anew_gives_them_too(home, alone, tmp_path):
    found = compare(home, tmp_path / "out", starts=["random"], learning_rates=[1e-2], seeds=1, workers=1)
    expected = [one for one in read_runs(alone.directory) if (one["start"], one["seed"]) == ("random", 0)]
    assert without_clock(found.records) == without_clock(expected)
    assert not multiprocessing.active_children()


def test_a_process_that_was_killed_while_it_had_nothing_to_do_costs_nothing(monkeypatch):
    class Pool:
        gone = True

        def __init__(self, *args, **options):
            pass

        def submit(self, function, *args):
            if function is max and Pool.gone:
                Pool.gone = False
                raise BrokenProcessPool
            future = Future()
            future.set_result(args)
            return future

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Pool)
    assert processes(1).submit(max, 1, 2).result() == (1, 2)


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_its_run_only(forks, home, tmp_path):
    lines = []
    starts = ["random", ("mine", partial(die, tmp_path / "mark"))]
    found = compare(home, tmp_path / "out", starts=starts, learning_rates=[1e-2], seeds=3, workers=2, say=lines.append)
    assert [line for line in lines if "the worker that did it is gone; it is done again" in line]
    assert {record["status"] for record in found.records} == {"finished"} and len(found.records) == 6
    losses = {(record["start"], record["seed"]): record["report_loss"] for record in found.records}
    assert all(losses["mine", seed] == losses["random", seed] for seed in range(3))


def stub(deaths=(), at_once=1, ended=lambda: None):
    """A worker without a process, that dies as often as it is told."""
    deaths = list(deaths)

    def submit(run, title, keep=False):
        future = Future()
        if run in deaths:
            deaths.remove(run)
            future.set_exception(BrokenProcessPool("gone."))
        else:
            ended()
            future.set_result(record(run.start, run.learning_rate, run.seed, run_seconds=10.0))
        return future

    return Worker(submit, at_once)


@pytest.mark.parametrize(("deaths", "status"), [(1, "finished"), (2, "failed")])
def test_a_run_that_two_workers_died_of_has_failed_and_the_others_go_on(tmp_path, deaths, status):
    runs = [Run(REFERENCE, seed, 1e-3) for seed in range(4)]
    with open_runs(tmp_path / "out", settings()) as log:
        run_all(lambda records: (runs, []), log, stub([runs[1]] * deaths), RunBudget(), lambda text: None)
        ended = {run.seed: record["status"] for run, record in log.records.items()}
    assert ended == {0: "finished", 1: status, 2: "finished", 3: "finished"}


def test_no_run_begins_that_would_not_end_in_time(tmp_path, monkeypatch):
    runs, now, lines = [Run(REFERENCE, seed, 1e-3) for seed in range(9)], [0.0], []
    monkeypatch.setattr("lora_init.comparison.budget.time.monotonic", lambda: now[0])

    def ended():
        now[0] += 10.0

    with open_runs(tmp_path / "out", settings()) as log:
        run_all(lambda records: (runs, []), log, stub(ended=ended), RunBudget(45.0, began=0.0), lines.append)
        # After three runs, at 30 s, there is no time for one more and the one that is kept for the adapter.
        assert len(log.records) == 3
        assert lines[-1] == "The time is out with 6 runs left; the same command goes on from there."
    longer, now[0] = [*runs[:2], Run(Variant("random", steps=180), 0, 1e-3)], 0.0  # three times the steps of all
    with open_runs(tmp_path / "longer", settings()) as log:
        run_all(lambda records: (longer, []), log, stub(ended=ended), RunBudget(59.0, began=0.0), lines.append)
        assert len(log.records) == 2


def test_a_start_that_cannot_be_sent_is_refused():
    job = Job(partial(set_up_bench, lambda model, seed: model), {})
    refused("a start cannot be sent to a worker: .*Define its function in a module", elsewhere, None, job, True)


def dies_at_once():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_as_it_sets_up_costs_its_run(forks, tmp_path, monkeypatch):
    worker = one_process(dies_at_once)
    assert "terminated abruptly" in carry_out(worker, Run(REFERENCE, 0, 1e-3))
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit(1)")  # as one that calls compare() without a guard ends
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=None, __file__=str(script)))
    refused("a worker ended while it started", carry_out, worker, Run(REFERENCE, 0, 1e-3))


def test_a_worker_leaves_ctrl_c_to_the_first_process_and_watches_for_its_end(monkeypatch):
    begun, before = [], signal.getsignal(signal.SIGINT)

    def thread(**options):
        return SimpleNamespace(start=lambda: begun.append(options))

    monkeypatch.setattr(workers, "threading", SimpleNamespace(RLock=threading.RLock, Thread=thread))
    monkeypatch.setattr(workers.tqdm, "set_lock", begun.append)
    try:
        workers._begin(0)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert isinstance(begun[0], type(threading.RLock()))
    assert begun[1:] == [{"target": workers._end_with_parent, "daemon": True}]


def test_a_worker_ends_after_the_process_that_started_it(monkeypatch):
    done = []
    parent = SimpleNamespace(join=lambda: done.append("the first has ended"))
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setattr(os, "_exit", done.append)
    workers._end_with_parent()
    assert done == ["the first has ended", 1]


def one_process(make):
    return elsewhere(processes(1), Job(make, {"model": "llama"}), True, 1)


def carry_out(worker, run):
    return come_back(worker.submit(run, ""))


def test_a_worker_that_cannot_set_up_says_why(forks, home, tmp_path):
    worker = one_process(partial(set_up_bench, home, tmp_path, "nothing-here"))
    refused("nothing-here", carry_out, worker, Run(REFERENCE, 0, 1e-3))
    worker.close()


def test_the_model_is_released_before_workers_load_theirs(home, tmp_path, monkeypatch):
    """A GPU may have room for the models of the workers alone."""
    loaded, alive = [], []

    def watched(model, *given, **more):
        loaded.append(weakref.ref(model))
        return find_targets(model, *given, **more)

    def look(*_):
        gc.collect()
        alive.extend(one() is not None for one in loaded)
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_init.comparison.compare.find_targets", watched)
    monkeypatch.setattr("lora_init.comparison.compare._do_runs", look)
    with pytest.raises(KeyboardInterrupt):
        compare(home, tmp_path / "out", workers=2)
    assert alive == [False]


def test_how_a_run_ended_is_told():
    done = record(run_seconds=2.0)
    for one, n_nodes, line in (
        (done, 0, "finished, loss 2.3000 -> 0.1700, 2 s; about 7 s left"),
        (
            done | {"node": "node-7"},
            3,
            "finished, loss 2.3000 -> 0.1700, 2 s on node-7; about 7 s left; nodes at work: 3",
        ),
        (broken("failed", "no room") | {"run_seconds": None}, 0, "failed, no room, 0 s; about 7 s left"),
    ):
        assert workers._ended(one, 7.0, n_nodes) == line


def test_a_call_elsewhere_returns_raises_or_is_ended():
    gate, ended = threading.Event(), []

    def begin(function, *arguments):
        def result():
            gate.wait(60)
            return function(*arguments)

        return result, lambda: ended.append(arguments)

    remote = Remote(begin, end=lambda: ended.append("all"))
    sums, wrong, canceled = remote.submit(sum, [1, 2]), remote.submit(int, "x"), remote.submit(sum, [3])
    assert canceled.cancel() and ended == [([3],)] and not sums.done()
    gate.set()
    assert sums.result(60) == 3 and remote.nodes() == {}
    with pytest.raises(ValueError, match="invalid literal"):
        wrong.result(60)
    remote.shutdown()
    assert ended == [([3],), "all"]


class Full(Executor):
    """Takes no call, or one and then no more."""

    def __init__(self, takes):
        self.takes, self.closed = [Future() for _ in range(takes)], []

    def submit(self, *arguments):
        if not self.takes:
            raise OSError("queue full\nsecond line")
        return self.takes.pop()

    def shutdown(self, **options):
        self.closed.append(options)


def test_an_executor_is_given_each_call_once_and_may_tell_its_nodes():
    given, job = [], Job(dies_at_once, {})

    def submit(*words):
        given.append(words)
        return Future()

    worker = elsewhere(SimpleNamespace(submit=submit, nodes=lambda: {1: "a"}), job, False, at_once=3)
    for how in ({}, {"keep": True}, {}):
        worker.submit("a run", "its title", **how)
    assert [words[:-1] for words in given] == [(workers.carry_out, job, "a run", keep) for keep in (False, True, False)]
    assert len({words[-1] for words in given}) == 3
    assert worker.nodes() == {1: "a"} and worker.at_once == 3 and not worker.queues
    assert elsewhere(SimpleNamespace(submit=submit), job, False).nodes() == {}


@pytest.mark.parametrize("is_ours", [True, False])
def test_an_executor_that_is_not_ours_stays_open_and_its_calls_are_canceled(is_ours):
    first, executor = Run(REFERENCE, 0, 1e-3), Full(1)
    worker = elsewhere(executor, Job(dies_at_once, {}), is_ours)
    future = worker.submit(first, "the first")
    assert worker.submit(first, "the second") is None and worker.queues and worker.at_once == 1000
    worker.close()
    assert future.cancelled() and executor.closed == [{"wait": False, "cancel_futures": True}] * is_ours
    said = refused("", worker.submit, first, "the third")
    assert said == "the third: it cannot be submitted: queue full."


def test_runs_have_numbers_and_one_that_failed_before_gets_one_more_chance(tmp_path):
    runs, titles, worker = [Run(REFERENCE, seed, 1e-3) for seed in range(4)], [], stub()

    def submit(run, title):
        titles.append(title)
        return worker.submit(run, title)

    lines = []
    with open_runs(tmp_path / "out", settings()) as log:
        log.add(record(seed=0))
        log.add(broken("failed", "no room", seed=1))
        run_all(lambda records: (runs, ["decided"]), log, replace(worker, submit=submit), RunBudget(), lines.append)
        assert {one["status"] for one in log.records.values()} == {"finished"}
    assert titles == [f"run {number}/4 random, 0.001, seed {number - 1}" for number in (2, 3, 4)]
    assert lines[0] == "decided" and [line.partition(":")[0] for line in lines[1:]] == titles
    assert lines[-1] == f"{titles[-1]}: finished, loss 2.3000 -> 0.1700, 10 s"


def test_the_end_of_a_run_is_waited_for_until_the_time_is_out_or_patience_is(tmp_path, monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr("lora_init.comparison.budget.time.monotonic", lambda: now[0])
    nodes = {1: "a", 2: "b"}
    worker = replace(stub(), nodes=lambda: dict(nodes))
    with open_runs(tmp_path / "out", settings()) as log:
        for budget, limits in ((RunBudget(), (None, 5.0)), (RunBudget(8.0, began=0.0), (8.0, 5.0))):
            running = workers._Running(log, worker, budget, lines.append)
            assert (running.longest_wait(None), running.longest_wait(5.0)) == limits
        now[0] = 6.0
        assert (running.longest_wait(None), running.longest_wait(5.0)) == (2.0, 2.0)
        now[0] = 8.0
        assert (running.longest_wait(None), running.longest_wait(5.0)) == (None, 5.0)
        del nodes[2]
        nodes[3] = "c"
        running.watch_nodes()
        running.watch_nodes()
    assert lines == ["Node b is lost, and its runs are done again. Nodes at work: 2."]


def test_how_long_the_last_runs_took_tells_most_of_the_next():
    records = {i: {"run_seconds": float(i) or None} for i in range(30)} | {"being done": {}}
    log = SimpleNamespace(records=records)
    running = workers._Running(log, stub(), RunBudget(), print)
    assert running.seconds == [float(i) for i in range(10, 30)]
    log.records = {i: records[i] for i in range(3)}
    assert workers._Running(log, stub(), RunBudget(), print).seconds == [0.0, 1.0, 2.0]


def test_a_run_here_has_a_bar_of_its_steps_and_is_told_whether_to_keep_its_adapter(monkeypatch):
    bars, asked = [], []

    class Bar:
        def __init__(self, **options):
            bars.append(options)

        def __enter__(self):
            return SimpleNamespace(update="a step more")

        def __exit__(self, *_):
            bars.append("closed")

    def carry_out(*arguments):
        asked.append(arguments)
        return {"a": "record"}

    monkeypatch.setattr(workers, "tqdm", Bar)
    bench = SimpleNamespace(training=SimpleNamespace(steps=9), carry_out=carry_out)
    assert workers.here(bench, True).submit("a run", "run 1/2").result() == {"a": "record"}
    workers.here(bench, False).submit("the best", "again", keep=True)
    assert asked == [("a run", "a step more", False), ("the best", "a step more", True)]
    assert workers.here(bench, True).at_once == 1 and workers.here(bench, True).nodes() == {}
    shown = {"desc": "run 1/2", "total": 9, "unit": "step", "leave": False, "disable": False}
    assert bars == [shown, "closed", shown | {"desc": "again", "disable": True}, "closed"]


def test_a_process_keeps_the_workbench_of_its_comparison_alone(monkeypatch):
    made, threads = [], []

    def carry_out(run, keep):
        warnings.warn("the first process has shown it", stacklevel=1)
        return {"run": run, "keep": keep}

    def make(name):
        made.append(name)
        return SimpleNamespace(carry_out=carry_out, settings=lambda model: {"model": model})

    monkeypatch.setattr(workers, "describe", lambda bench, model: bench.settings(model))
    monkeypatch.setattr(workers, "_benches", {"before": "of another comparison"})
    monkeypatch.setattr(workers.torch, "set_num_threads", threads.append)
    first, second = (Job(partial(make, name), {"model": "llama"}, threads=n) for name, n in (("a", 5), ("b", 6)))
    with warnings.catch_warnings(action="error"):
        filters = [*warnings.filters]
        for job, keep in ((first, False), (first, True), (second, False)):
            done = workers.carry_out(job, "a run", keep, "")
            assert done == {"run": "a run", "keep": keep, "node": None}
            assert [*workers._benches] == [job.key] and warnings.filters == filters
    assert made == ["a", "b"] and threads == [5, 5, 6] and first.key != second.key


def test_all_that_differs_in_a_process_is_named(monkeypatch):
    monkeypatch.setattr(workers, "describe", lambda bench, model: {"model": model, "rank": 8, "torch": "2", "seed": 1})
    job = Job(lambda: None, {"model": "llama", "rank": 4, "torch": "3", "seed": 1})
    said = "rank is 8, not 4; torch is '2', not '3'. All nodes need the same versions, model, data and kind of device."
    assert refused("", workers._set_up, job) == said


def test_what_came_back_is_a_record_or_why_there_is_none_or_what_was_raised():
    def ended(outcome):
        future = Future()
        future.set_exception(outcome) if isinstance(outcome, Exception) else future.set_result(outcome)
        return future

    assert come_back(ended({"a": "record"})) == {"a": "record"}
    for text, why in (("It is gone. See\nthe log.", "It is gone."), ("gone", "gone."), ("gone...", "gone.")):
        assert come_back(ended(RuntimeError(text))) == why
    with pytest.raises(KeyError) as caught:
        come_back(ended((KeyError("a"), "Traceback: there")))
    assert str(caught.value.__cause__) == "Traceback: there"
    refused("^it cannot start", come_back, ended(LoraInitError("it cannot start.")))


class Pools:
    """Pools of one process each, that do what they are told: answer, or die in a call or before it."""

    def __init__(self, monkeypatch):
        self.made, self.ended, self.dies = [], [], set()
        monkeypatch.setattr(workers, "ProcessPoolExecutor", self.make)

    def make(self, n, context, initializer, initargs):
        (place,), number = initargs, len(self.made)
        self.made.append((n, context.get_start_method(), initializer, place))

        def submit(function, *arguments):
            future = Future()
            if (function is os.getpid and (number, "as it starts") in self.dies) or (
                function is not os.getpid and (number, "in its call") in self.dies
            ):
                future.set_exception(BrokenProcessPool("gone."))
            elif function is not os.getpid and (number, "before") in self.dies:
                raise BrokenProcessPool("gone.")
            else:
                future.set_result(100 + number if function is os.getpid else function(*arguments))
            return future

        return SimpleNamespace(submit=submit, shutdown=lambda: self.ended.append(f"pool {number}"))


def test_each_process_has_a_place_and_another_takes_that_of_one_that_died(monkeypatch):
    pools = Pools(monkeypatch)
    monkeypatch.setattr(os, "kill", lambda pid, number: pools.ended.append((pid, number)))
    executor = processes(3)
    calls = [executor.begin(max, 1, n) for n in range(2)]  # two at once
    assert [call() for call, _ in calls] == [1, 1] and [place for *_, place in pools.made] == [0, 1]
    pools.dies = {(0, "before"), (1, "in its call")}
    last = executor.begin(max, 5, 6)[0]  # the third place had no call yet
    assert executor.begin(max, 5, 7)[0]() == 7 and last() == 6
    assert pools.made == [(1, "spawn", workers._begin, place) for place in (0, 1, 2, 0)]
    with pytest.raises(BrokenProcessPool):
        executor.begin(max, 1, 2)[0]()
    calls = [executor.begin(max, 1, n) for n in (7, 8, 9)]
    assert [call() for call, _ in calls] == [7, 8, 9] and [place for *_, place in pools.made[4:]] == [1]
    executor.shutdown()
    assert sorted(pools.ended, key=str) == sorted(
        [f"pool {number}" for number in (2, 3, 4)] + [(number, signal.SIGKILL) for number in (102, 103, 104)], key=str
    )


def test_processes_that_have_ended_already_are_let_go_of(monkeypatch):
    def kill(pid, number):
        raise ProcessLookupError

    pools = Pools(monkeypatch)
    monkeypatch.setattr(os, "kill", kill)
    executor = processes(2)
    calls = [executor.begin(max, 1, 2), executor.begin(max, 1, 2)]
    pools.dies = {(2, "as it starts")}
    executor.shutdown()
    assert len(calls) == 2 and pools.ended == ["pool 0", "pool 1"]


def test_how_long_the_rest_takes_is_told_by_the_runs_that_ended(tmp_path, monkeypatch):
    now, lines, runs = [100.0], [], [Run(REFERENCE, seed, 1e-3) for seed in range(4)]

    def ended():
        now[0] += 10.0 if now[0] < 120.0 else 40.0  # the first two take 10 s

    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    with open_runs(tmp_path / "out", settings()) as log:
        run_all(lambda records: (runs, []), log, stub(ended=ended), RunBudget(), lines.append)
    left = [line.partition("10 s")[2] for line in lines]
    assert left == ["; about 30 s left", "; about 20 s left", "; about 20 s left", ""]
    now[0] = 100.0
    lines.clear()
    with open_runs(tmp_path / "two", settings()) as log:  # of which two end before they are looked at
        run_all(lambda records: (runs, []), log, stub(ended=ended, at_once=2), RunBudget(), lines.append)
    left = [line.partition("10 s")[2] for line in lines]
    assert left == ["; about 30 s left", "; about 10 s left", "; about 30 s left", ""]


def test_a_run_that_cannot_begin_yet_keeps_no_other_from_it(tmp_path):
    """One runs already, and the rate of another is not known: what comes after them begins, as many as are taken."""
    begun = []

    def submit(run, title):
        begun.append((run.seed, title.partition(" random")[0]))
        return None if run.seed == 5 else Future()

    runs = [Run(REFERENCE, seed, None if seed == 1 else 1e-3) for seed in range(7)]
    with open_runs(tmp_path / "out", settings()) as log:
        running = workers._Running(log, Worker(submit, at_once=3), RunBudget(), print)
        running.begin(runs[:1], 7)
        running.begin(runs, 7)
        assert begun == [(0, "run 7/7"), (2, "run 2/7"), (3, "run 3/7")]
        running.worker = Worker(submit, at_once=9)
        running.begin(runs, 7)  # of which the worker takes no more than one
    assert begun[3:] == [(4, "run 4/7"), (5, "run 5/7")] and [run.seed for run, _ in running.begun.values()] == [
        0,
        2,
        3,
        4,
    ]


def test_the_end_of_the_first_of_several_runs_is_not_waited_for_with_the_others(tmp_path):
    runs, first, late = [Run(REFERENCE, seed, 1e-3) for seed in range(3)], Future(), []

    def submit(run, title):
        if run.seed == 0:
            return first
        if run.seed == 2:  # which begins when the second has ended
            first.set_result(record(run_seconds=1.0))
        future = Future()
        future.set_result(record(run.start, run.learning_rate, run.seed, run_seconds=1.0))
        return future

    def end():
        late.append(1)
        first.set_result(record(run_seconds=1.0))

    timer = threading.Timer(2.0, end)
    timer.start()
    with open_runs(tmp_path / "out", settings()) as log:
        run_all(lambda records: (runs, []), log, Worker(submit, at_once=2), RunBudget(), print)
        timer.cancel()
        assert len(log.records) == 3 and not late


def test_what_was_decided_is_reported_once_though_it_may_be_taken_back(tmp_path):
    runs, lines = [Run(REFERENCE, seed, 1e-3) for seed in range(3)], []
    decided = iter([["a"], [], ["a"], ["a", "b"]])
    with open_runs(tmp_path / "out", settings()) as log:
        run_all(lambda records: (runs, next(decided)), log, stub(), RunBudget(), lines.append)
    assert [line for line in lines if len(line) == 1] == ["a", "b"]


@pytest.mark.parametrize(("at_once", "n_left"), [(2, 2), (workers.AHEAD, 0)])
def test_once_the_time_is_out_what_waits_in_a_queue_is_canceled_and_what_runs_here_is_not(
    at_once, n_left, tmp_path, monkeypatch
):
    now, runs = [0.0], [Run(REFERENCE, seed, 1e-3) for seed in range(2)]
    monkeypatch.setattr("lora_init.comparison.budget.time.monotonic", lambda: now[0])
    with open_runs(tmp_path / "out", settings()) as log:
        running = workers._Running(log, Worker(lambda *_: Future(), at_once), RunBudget(9.0, began=0.0), print)
        running.begin(runs, 2)
        futures, now[0] = [*running.begun], 9.5
        running.begin(runs, 2)
    assert len(futures) == 2 and len(running.begun) == n_left
    assert [future.cancelled() for future in futures] == [n_left == 0] * 2


def test_a_run_that_is_done_again_is_one_that_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "wait", lambda begun, *_: SimpleNamespace(done=[*begun]))
    monkeypatch.setattr(workers.time, "monotonic", lambda: 100.0)
    lines, runs = [], [Run(REFERENCE, seed, 1e-3) for seed in range(4)]
    with open_runs(tmp_path / "out", settings()) as log:
        run_all(lambda records: (runs, []), log, stub([runs[0]], at_once=2), RunBudget(), lines.append)
    left = [line.partition("10 s")[2] for line in lines if "gone" not in line]
    assert left == ["; about 30 s left", "; about 10 s left", "; about 3 s left", ""] and len(lines) == 5


def test_what_is_raised_on_the_machine_of_the_comparison_names_no_node(monkeypatch):
    def make():
        raise LoraInitError("no such model.")

    monkeypatch.setattr(workers, "_benches", {})
    for job, said in ((Job(make, {}), "no such model."), (Job(make, {}, node="other"), "node here: no such model.")):
        monkeypatch.setattr("platform.node", lambda job=job: "here" if job.node == "other" else job.node)
        error, written = workers.carry_out(job, Run(REFERENCE, 0, 1e-3), False, "")
        assert str(error) == said and "Traceback" in written


def test_all_is_lost_where_no_run_has_come_back_and_one_is_where_some_have(tmp_path):
    run = Run(REFERENCE, 1, 1e-3)
    with open_runs(tmp_path / "out", settings()) as log:
        refused("two workers died while they did it, as when memory runs out. gone. No run has come back",
                workers._given_up, run, "gone.", log)  # fmt: skip
        log.add(record(seed=0))
        failed = workers._given_up(run, "gone.", log)
    assert (failed["status"], failed["seed"], failed["report_loss"]) == ("failed", 1, [])
    assert failed["error"] == "two workers died while they did it, as when memory runs out. gone."


def test_a_canceled_call_has_no_result_and_what_ending_it_raises_is_nobodys_matter(caplog, monkeypatch):
    gate, began, raised = threading.Event(), SimpleQueue(), []

    def begin(function, *arguments):
        def result():
            began.put(threading.current_thread())
            gate.wait(60)
            return function(*arguments)

        def end():
            raise OSError("it has ended")

        return result, end

    monkeypatch.setattr(threading, "excepthook", raised.append)
    calls = [Remote(begin).submit(int, text) for text in ("7", "x")]
    assert all(call.cancel() for call in calls)
    gate.set()
    for _ in calls:
        thread = began.get(timeout=60)
        thread.join(60)
        assert thread.daemon
    assert all(call.cancelled() for call in calls) and not caplog.records and not raised
