"""What several processes have found, made one: only states travel, and each ends with the same bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_init.collection.mail import Message
from lora_init.collection.state import KEPT_BATCHES, Collected, GroupRecord, pack_means, unpack_means
from lora_init.collection.team import Team
from lora_init.statistics.gradient_spectrum import mean_group
from lora_init.statistics.incremental_svd import IncrementalSVD, settle
from lora_init.statistics.mean_gradient import MeanGradient
from lora_init.statistics.tensorfile import flatten, nest


class Exchange:
    """Make one `Collected` of what all processes have found since they last met, the same in each.

    Between two meetings every process goes on from the common state with its share of the weight: all shares together,
    merged, are the state that one process would have. Decompositions that are done travel no more; mean gradients go on
    to the end of the pass.

    Args:
        team: The processes.
        make: Makes an empty decomposition for a group.
        tolerance: See `collect`.
    """

    def __init__(self, team: Team, make: Callable[[str], IncrementalSVD], tolerance: float) -> None:
        self._team, self._make, self._tolerance = team, make, tolerance
        self._n_batches = self._n_labels = 0
        self._known: dict[str, tuple[list[float], list[Tensor]]] = {}  # shares and ratios, as of the last meeting

    def bring_together(self, found: Collected) -> Collected:
        """Merge, and decide which layers are done.

        Args:
            found: What this process has found. Not changed.

        Returns:
            What all have found, on the CPU, equal bit for bit in all processes.

        Raises:
            RankFailedError: A process failed or died.
        """
        settle(record.svd for record in found.groups.values())
        done = {name: record for name, record in found.groups.items() if record.converged_at is not None}
        message = self._team.combine(lambda: self._pack(found), self._merge, self._conclude)
        return self._whole(message, done)

    def spread(self, read: Callable[[Collected], list[list[str]]]) -> tuple[Collected, list[list[str]]]:
        """Give what the first process reads from a file to all.

        Args:
            read: Brings an empty `Collected` to where the file is; returns the hashes of the batches used, by rank.

        Returns:
            The same in all processes: what was read, and the hashes.
        """

        def make() -> Message:
            found = Collected()
            used = read(found)
            header, tensors = found.pack()
            return Message({**header, "used": used}, tensors)

        message = self._team.share(make)
        return self._whole(message, {}), message.header["used"]

    def hand_out(self, whole: Collected, found: Collected) -> None:
        """Let this process go on with its share of what all have found.

        Args:
            whole: From `bring_together` or `spread`, the same in all processes.
            found: Is changed.
        """
        for record in whole.groups.values():
            if record.converged_at is None:
                record.svd.load_state_dict(record.svd.state_dict(), self._team.rank, self._team.size)
        for mean in whole.gradients.values():
            mean.load_state_dict(mean.state_dict(), self._team.rank, self._team.size)
        self._n_batches, self._n_labels = whole.n_batches, whole.n_labels
        self._known = {name: (list(r.shares), list(r.ratios)) for name, r in whole.groups.items()}
        take_over(whole, found)

    def _whole(self, message: Message, done: dict[str, GroupRecord]) -> Collected:
        whole = Collected()
        whole.unpack(message.header, message.tensors, self._make)
        whole.groups = {**done, **whole.groups}
        return whole

    def _pack(self, found: Collected) -> Message:
        """Write what this process has found: the state of each layer, and the shares of the batches since."""
        parts: dict[str, dict[str, Tensor]] = {}
        news: dict[str, list[list[Any]]] = {}
        for name, record in found.groups.items():
            if record.converged_at is not None:
                continue
            shares = record.shares[len(self._known.get(name, ([], []))[0]) :]
            # By this they are put in order: the first of each process, then the second of each, as one would see them.
            news[name] = [[position, self._team.rank, share] for position, share in enumerate(shares)]
            parts[name] = dict(record.svd.state_dict())
            if shares:
                parts[name]["ratios"] = torch.stack(list(record.ratios)[-len(shares) :])
        # One that was made in a batch that was interrupted has seen nothing.
        gradients = {name: mean for name, mean in found.gradients.items() if mean.n_samples}
        parts |= pack_means(gradients)
        header = {
            "news": news,
            "gradients": list(gradients),
            "group_of": found.group_of,
            "n_calls": found.n_calls,
            "n_batches": found.n_batches - self._n_batches,
            "n_labels": found.n_labels - self._n_labels,
            "seconds": found.seconds,
        }
        return Message(header, flatten(parts))

    def _merge(self, one: Message, other: Message) -> Message:
        (parts, gradients), (others, more) = _unpack(one), _unpack(other)
        for name, mean in more.items():
            gradients[name] = gradients[name].merge(mean) if name in gradients else mean
        news: dict[str, list[list[Any]]] = one.header["news"]
        for name, theirs in other.header["news"].items():
            ours = news.setdefault(name, [])
            mine, its = parts.setdefault(name, {}), others[name]
            ratios = list(zip(ours[-KEPT_BATCHES:], mine.pop("ratios", ()), strict=True))
            ratios += zip(theirs[-KEPT_BATCHES:], its.pop("ratios", ()), strict=True)
            svd = self._make(name).load_state_dict(mine)
            parts[name] = dict(svd.merge(self._make(name).load_state_dict(its)).state_dict())
            if ratios:
                kept = sorted(ratios, key=lambda pair: pair[0])[-KEPT_BATCHES:]
                parts[name]["ratios"] = torch.stack([row for _, row in kept])
            news[name] = sorted(ours + theirs)
        parts |= pack_means(gradients)
        a, b = one.header, other.header
        header = {
            "news": news,
            "gradients": list(gradients),
            "group_of": b["group_of"] | a["group_of"],
            "n_calls": dict(Counter(a["n_calls"]) | Counter(b["n_calls"])),  # the larger of each
            "n_batches": a["n_batches"] + b["n_batches"],
            "n_labels": a["n_labels"] + b["n_labels"],
            "seconds": {part: max(a["seconds"][part], b["seconds"][part]) for part in a["seconds"]},
        }
        return Message(header, flatten(parts))

    def _conclude(self, message: Message) -> Message:
        """Decide which layers are done, and write what all processes go on with."""
        header, found = message.header, Collected()
        found.group_of, found.n_calls, found.seconds = header["group_of"], header["n_calls"], header["seconds"]
        found.n_batches = self._n_batches + header["n_batches"]
        found.n_labels = self._n_labels + header["n_labels"]
        groups, found.gradients = _unpack(message)
        for name, parts in groups.items():
            if found.group_of.get(name, name) != name:
                continue  # a process whose first batch did not reach all layers took its input for one of its own
            shares, ratios = self._known.get(name, ([], []))
            news = header["news"][name]
            record = GroupRecord(self._make(name), shares=[*shares, *(share for *_, share in news)])
            record.ratios.extend((*ratios, *parts.pop("ratios", ())))
            record.svd.load_state_dict(parts)
            if news:
                record.decide(self._tolerance, found.n_batches)
            found.groups[name] = record
        return Message(*found.pack())


def _unpack(message: Message) -> tuple[dict[str, dict[str, Tensor]], dict[str, MeanGradient]]:
    """Read a message from `_pack`: the parts of each decomposition, and the mean gradients."""
    names = message.header["gradients"]
    parts = nest(message.tensors, [*message.header["news"], *map(mean_group, names)])
    gradients = unpack_means(names, parts)
    return parts, gradients


def take_over(whole: Collected, found: Collected) -> None:
    """Bring `found`, to which others hold on, to where `whole` is."""
    found.groups, found.gradients = whole.groups, whole.gradients
    found.group_of, found.n_calls = dict(whole.group_of), dict(whole.n_calls)
    found.n_batches, found.n_labels = whole.n_batches, whole.n_labels
    found.seconds.update(whole.seconds)
