"""Which entries are near, by hand."""

from types import SimpleNamespace

import pytest
import torch

from lora_init.bank.embeddings import embed
from lora_init.bank.similarity import Neighbour, neighbours
from tests.conftest import refused, tiny_llama

# Embeddings of prompts in one dimension, which lie one to either side of their mean: one is a standard deviation.
MEANS = {"early": 90.0, "a": 2.0, "b": 5.0, "c": -1.0}


PLANES = {"a": [0, 1], "b": [0, 2], "c": [2, 3]}


class Made(SimpleNamespace):
    """A bank of three tasks, of which one has two entries, with statistics of planes."""

    def embeddings(self, name):
        return torch.tensor([[MEANS[name] - 1.0], [MEANS[name] + 1.0]])

    def statistics(self, name):
        return statistics(PLANES[name])


BANK = Made(
    path="bank",
    fingerprint="f",
    tasks={"ta": ["early", "a"], "tb": ["b"], "tc": ["c"]},
    entries={name: SimpleNamespace(task=f"t{name}", rank=2) for name in MEANS},
)


class Known(dict):
    """Statistics of three layers, two of which read one tensor."""

    def __init__(self, fingerprint, plane):
        super().__init__(dict.fromkeys("qko", SimpleNamespace(components=torch.eye(4)[plane])))
        self.provenance = SimpleNamespace(fingerprint=fingerprint, model="M m")
        self.group_of = {"q": "q", "k": "q", "o": "o"}


def statistics(plane, fingerprint="f"):
    return Known(fingerprint, plane)


NEW = torch.tensor([[0.0], [1.0], [2.0]])  # their mean is 1


@pytest.mark.parametrize(("similarity", "order"), [
    ("embeddings", ["a", "c", "b"]),
    ("subspaces", ["c", "b", "a"]),  # of two directions: both, one, none
    ("both", ["c", "a", "b"]),  # places 1, 2 and 3
])  # fmt: skip
def test_the_order_of_a_bank_by_hand(similarity, order):
    found = neighbours(BANK, NEW, statistics([2, 3]), similarity)
    assert [one.name for one in found] == order
    overlaps = {"a": 0.0, "b": 0.5, "c": 1.0} if similarity != "embeddings" else dict.fromkeys("abc")
    assert {one.name: (one.task, one.distance, one.overlap) for one in found} == {
        name: (f"t{name}", pytest.approx(distance), overlaps[name])
        for name, distance in (("a", 1.0), ("b", 4.0), ("c", 2.0))
    }


def test_of_equal_places_the_one_whose_prompts_are_nearer_is_first():
    # Each task shares one direction of two: overlaps tie, and so do the places of b (2 and 1) and c (1 and 2).
    assert [one.name for one in neighbours(BANK, NEW, statistics([1, 2]), "both")] == ["a", "c", "b"]


def test_layers_that_read_one_tensor_count_once():
    known = statistics([0, 1])
    known["o"] = SimpleNamespace(components=torch.eye(4)[[2, 3]])  # of which a has neither direction
    overlaps = {one.name: one.overlap for one in neighbours(BANK, NEW, known, "both")}
    assert overlaps == {"a": 0.5, "b": 0.5, "c": 0.5}


@pytest.mark.parametrize(("new", "ranks", "overlap"), [
    ([1], 2, 0.0), ([0], 2, 1.0),  # as many directions as both have
    ([0, 2], 1, 1.0), ([2, 0], 1, 0.0), ([2, 0], 2, 0.5),  # as many as the adapter has ranks
])  # fmt: skip
def test_directions_are_compared_as_far_as_both_have_them_and_the_adapter_has_ranks(new, ranks, overlap):
    entries = {name: SimpleNamespace(task=f"t{name}", rank=ranks) for name in MEANS}
    bank = Made(**vars(BANK) | {"entries": entries})
    found = neighbours(bank, NEW, statistics(new), "subspaces")
    assert {one.name: one.overlap for one in found}["a"] == overlap


def test_a_dimension_that_is_the_same_in_all_prompts_says_nothing():
    class Wider(Made):
        def embeddings(self, name):
            return torch.cat([super().embeddings(name), torch.full((2, 1), 7.0)], dim=1)

    found = neighbours(Wider(**vars(BANK)), torch.cat([NEW, torch.full((3, 1), 7.0)], dim=1))
    # Root mean squares over two dimensions, of which one has no difference.
    distances = [pytest.approx(distance / 2**0.5) for distance in (1.0, 2.0, 4.0)]
    assert [(one.name, one.distance) for one in found] == list(zip("acb", distances, strict=True))


def test_a_neighbour_in_words():
    assert Neighbour("a", "ta", 1.005).in_words() == "a (ta): 1.00 standard deviations away"
    assert Neighbour("a", "ta", 12.0, 0.256).in_words() == (
        "a (ta): 12.00 standard deviations away, subspaces overlap by 26%"
    )
    assert Neighbour("a", "ta", 0.0, 0.0).in_words().endswith("overlap by 0%")


def test_similarity_by_statistics_needs_them():
    words = "^similarity='{}' compares statistics, and there are none. Pass --statistics.$"
    for similarity in ("subspaces", "both"):
        refused(words.format(similarity), neighbours, BANK, NEW, None, similarity)
    assert [one.overlap for one in neighbours(BANK, NEW)] == [None] * 3


def test_the_statistics_are_of_the_model_of_the_bank():
    words = r"^the statistics are of another model \(M m\) than bank.$"
    refused(words, neighbours, BANK, NEW, statistics([0, 1], "g"))


def test_a_prompt_is_embedded_alone_whatever_stands_beside_it():
    """Padding has no label, as a prompt has none, and is no part of it."""
    ids = torch.tensor([[3, 4, 5, 9, 0, 0], [6, 7, 8, 10, 11, 12]])
    labels = torch.tensor([[-100, -100, -100, 9, -100, -100], [-100, -100, -100, 10, 11, 12]])
    model, mask = tiny_llama(), ids.ne(0).long()
    found = embed(model, [{"input_ids": ids, "attention_mask": mask, "labels": labels}])
    torch.testing.assert_close(found, embed(model, [{"input_ids": row[None, :3]} for row in ids]))
