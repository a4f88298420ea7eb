"""Which batches a process reads, without a second process: a stand-in says what the others have."""

from contextlib import nullcontext

import pytest
import torch

from lora_init.collection.processes import digest_of, own_batches

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
