"""Which batches a process reads, without a second process: a stand-in says what the others have."""

import itertools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from queue import Queue
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lora_init.collection.loop import Collected
from lora_init.collection.processes import Processes, Shard, digest_of, own_batches
from tests.conftest import refused

OURS, THEIRS = torch.ones(2), torch.zeros(2)


class TwoProcesses:
    """The first of two processes, of which the other has some batches first; it counts what is sent."""

    rank, size = 0, 2

    def __init__(self, theirs):
        self.theirs, self.sent = theirs, []

    def interruptible(self):
        return nullcontext()

    def gather(self, own):
        return [own, [digest_of(batch) for batch in self.theirs]]

    def share(self, value, source):
        self.sent.append(source)
        return value if source == self.rank else self.theirs


@pytest.mark.parametrize("ours, theirs, spare, sent", [
    ([OURS], [THEIRS], OURS, []),
    ([OURS], [], OURS, [0]),
    ([], [THEIRS], THEIRS, [1]),
    ([], [], None, []),
])  # fmt: skip
def test_a_batch_is_lent_where_one_process_has_none_and_another_has(ours, theirs, spare, sent):
    """A sharded model runs in all processes or in none; a batch that nobody wants is sent to nobody."""
    processes = TwoProcesses(theirs)
    shard = own_batches(processes, ours, [], in_step=True)
    assert processes.sent == sent and (shard.spare is spare if spare is None else torch.equal(shard.spare, spare))
    assert TwoProcesses(theirs).sent == [] and own_batches(TwoProcesses(theirs), ours, [], in_step=False).spare is None


def test_a_pass_goes_on_where_each_process_was_and_with_as_many():
    assert own_batches(TwoProcesses([THEIRS]), [OURS], [3, 4], in_step=False).start == 3
    assert own_batches(TwoProcesses([OURS]), [OURS], [3, 4, 5], in_step=False).start == 12  # of one loader for all
    for used in ([3], [3, 4, 5]):
        said = f"was made by {len(used)} processes, each with data of its own, and this one by 2. Start as many as"
        refused(said, own_batches, TwoProcesses([THEIRS]), [OURS], used, in_step=False)


class Called:
    """What can be called counts by its type alone, whatever it holds."""

    def __init__(self, held):
        self.held = held

    def __call__(self):
        """Do nothing."""


# In each row what is told apart; in one place what is the same in another form.
DIGESTED = [
    [(np.array([1, 2]), [1, 2]), np.array([2, 1]), np.array([1, 2, 3])],
    [(np.float32(0.5), 0.5), np.float32(0.25)],
    [({1, 2, 30}, {30, 2, 1}, frozenset({1, 2, 30})), {1, 2}, {12, 30}, set()],
    [({0, 8}, {8, 0})],  # which go round in the order they came in
    [([1, 23], (1, 23)), [12, 3], [1, [23]], [123]],
    [({"a": 1},), {"a": 2}, {"b": 1}],
    [(None,), "None", 0, False, b"0", "0"],
    [(torch.ones(2, 3),), torch.ones(3, 2), torch.ones(6), torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, 3)],
    [(torch.ones(2, dtype=torch.bfloat16),), torch.ones(2, dtype=torch.float16)],
    [(SimpleNamespace(a=1), SimpleNamespace(a=1)), SimpleNamespace(a=2), SimpleNamespace()],
    [(print, len), "print"],
    [(object(), object()), SimpleNamespace()],
    [(Called(1), Called(2)), SimpleNamespace()],
]


@pytest.mark.parametrize("row", DIGESTED)
def test_a_digest_is_of_what_a_batch_holds_whatever_holds_it(row):
    alike, *others = row
    digests = {digest_of(value) for value in alike}
    assert len(digests) == 1 and len(digests | {digest_of(other) for other in others}) == 1 + len(others)
    within = {digest_of({"x": [value]}) for value in alike}
    assert len(within) == 1 and len(within | {digest_of({"x": [other]}) for other in others}) == 1 + len(others)


def test_a_batch_that_holds_itself_has_a_digest():
    batch = SimpleNamespace(x=1)
    batch.whole = batch
    assert digest_of(batch) != digest_of(SimpleNamespace(x=1))


class Broken:
    """Six batches, of which the third and the fifth cannot be read."""

    def __init__(self):
        self.n = -1

    def __iter__(self):
        return self

    def __next__(self):
        self.n += 1
        if self.n == 6:
            raise StopIteration
        if self.n in (2, 4):
            raise ValueError(f"batch {self.n}")
        return self.n


def test_batches_are_read_by_where_they_are_also_past_those_that_cannot_be_read():
    shard = Shard(Broken(), None, "", False, 0)
    assert shard.read(1) == 1 and shard.error is None
    with pytest.raises(ValueError, match="batch 2"):
        shard.read(2)
    assert str(shard.error) == "batch 2"
    assert shard.read(5) == 5 and shard.error is None  # past the one that failed
    with pytest.raises(StopIteration):
        shard.read(6)


def test_no_more_is_read_to_begin_with_than_the_first_batch():
    drawn = []
    stream = (drawn.append(1) or batch for batch in (OURS, THEIRS, OURS))
    shard = own_batches(Processes(alone=True), stream, [], in_step=False)
    assert len(drawn) == 1 and shard.first == digest_of(OURS)
    assert [torch.equal(shard.read(i), one) for i, one in enumerate((OURS, THEIRS, OURS))] == [True] * 3


class Three(TwoProcesses):
    size = 3

    def gather(self, own):
        return [own, *([digest_of(batch)] for batch in self.theirs)]


def test_processes_with_the_same_first_batch_are_named():
    words = (
        "^ranks 0, 2 got a first batch that another one got; what they read alike counts as often. Give each rank "
        "data of its own, or all of them the same loader.$"
    )
    with pytest.warns(UserWarning, match=words):
        shard = own_batches(Three([THEIRS, OURS]), [OURS], [], in_step=False)
    assert (shard.common, shard.start, shard.first) == (False, 0, digest_of(OURS))
    other = Three([THEIRS, OURS])
    other.rank = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said by the first alone
        own_batches(other, [OURS], [], in_step=False)
        same = own_batches(Three([OURS, OURS]), iter([OURS, THEIRS]), [2, 1], in_step=False)
    assert (same.common, same.start) == (True, 3) and torch.equal(same.read(1), THEIRS)
    empty = own_batches(TwoProcesses([THEIRS]), [], [], in_step=False)
    assert empty.first == "" and not empty.common


def test_processes_that_are_two_by_two_alike_have_no_loader_in_common():
    four = Three([OURS, THEIRS, THEIRS])
    four.size = 4
    with pytest.warns(UserWarning, match="^ranks 0, 1, 2, 3 got a first batch that another one got;"):
        shard = own_batches(four, iter([OURS, THEIRS]), [0, 0, 1, 1], in_step=False)
    assert (shard.common, shard.start) == (False, 0)
    assert torch.equal(shard.read(1), THEIRS)  # as it is, and not every fourth


def test_a_loader_that_reads_in_one_process_is_refused_where_there_are_several():
    class DataLoaderDispatcher(list):
        pass

    words = "^the loader reads in one process .* Prepare it with dispatch_batches=False.$"
    refused(words, own_batches, TwoProcesses([THEIRS]), DataLoaderDispatcher([OURS]), [], in_step=False)
    alone = Processes(alone=True)
    assert torch.equal(own_batches(alone, DataLoaderDispatcher([OURS]), [7], in_step=False).read(0), OURS)
    assert own_batches(alone, [OURS], [7], in_step=False).start == 7


class Told(Processes):
    """One of several processes, of which all that they say is known."""

    def __init__(self, *said):
        super().__init__(alone=True)
        self.said, self.size = said, len(said)

    def gather(self, value):
        return list(self.said)


def test_what_was_given_to_one_process_alone_is_named():
    words = "^rank 2 has rho 3, rank 0 has 2. Give all processes the same model and arguments.$"
    refused(words, Told({"rank": 1, "rho": 2}, {"rho": 2, "rank": 1}, {"rank": 1, "rho": 3}).check_alike, {})
    refused("^rank 1 has rho None, rank 0 has 2.", Told({"rho": 2}, {}).check_alike, {})
    Told({"rho": 2}, {"rho": 2}).check_alike({})
    assert Told((1, 2), (3, True), (0, 0)).sum(1, 2) == [4, 3]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_what_all_have_found_is_put_together_in_the_order_of_ranks(size, monkeypatch):
    """Each process is a thread here, and sends by queues; in the end all have the same, and what each had stays."""
    queues, here = {pair: Queue() for pair in itertools.product(range(size), repeat=2)}, threading.local()

    def send(values, to, group):
        queues[here.rank, to].put(values[0])

    def receive(values, source, group):
        values[0] = queues[source, here.rank].get(timeout=10)

    def broadcast(values, source, group):
        if here.rank != source:
            return receive(values, source, group)
        return [queues[source, other].put(values[0]) for other in range(size) if other != source]

    for name, stand_in in (("send", send), ("recv", receive), ("broadcast", broadcast)):
        monkeypatch.setattr(torch.distributed, f"{name}_object_list", stand_in)

    def one(rank):
        here.rank, processes = rank, Processes(alone=True)
        processes.rank, processes.size = rank, size
        own = Collected(n_labels=10**rank, n_batches=[rank], bad=[f"of {rank}"])
        whole = processes.merge(own)
        assert (own.n_labels, own.n_batches) == (10**rank, [rank])
        return whole.n_labels, whole.n_batches, whole.bad

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(one, range(size)))
    everyone = list(range(size))
    assert found == [(int("1" * size), everyone, [f"of {rank}" for rank in everyone])] * size


@pytest.mark.parametrize(("size", "others"), [(2, "1 other process"), (4, "3 other processes")])
def test_a_process_that_waits_in_vain_says_for_how_many(size, others, monkeypatch):
    def broken(*_, **options):
        raise RuntimeError("Connection closed\nat socket.cpp:3")

    for name in ("all_gather_object", "broadcast_object_list", "send_object_list"):
        monkeypatch.setattr(torch.distributed, name, broken)
    processes = Processes(alone=True)
    processes.rank, processes.size = 1, size
    words = (
        f"^rank 1 waited for {others}, of which one has ended or did not answer: Connection closed. "
        "What the others printed says why.$"
    )
    for wait in (processes.gather, processes.share):
        refused(words, wait, 3)
    refused(words, processes.merge, Collected())
