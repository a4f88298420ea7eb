"""Statistics of several passes, merged: the reference is one pass over all rows, or the rows written out."""

import math
import types
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from torch import nn

import lora_init
from lora_init import ExactPCA, IncrementalSVD, LoraInitError, Statistics, allocate_ranks, build_adapter, collect
from lora_init.layers.targets import Target
from lora_init.statistics import merging
from lora_init.statistics.merging import mix
from lora_init.statistics.statistics import Provenance
from tests.adapters.made import made_up_statistics
from tests.collection.made import counts_of, exact
from tests.commands import tokenizer_of
from tests.conftest import batches_for, refused, tiny_llama
from tests.layers.made import BOTH, mixtral
from tests.reference import captured
from tests.statistics.made import llama, passed

K = 8


def sets_of_rows(sizes=(300, 120, 60), width=24, seed=0, distance=3.0):
    """Sets with means and directions of their own, and variances that fall as 1 / j."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    found = []
    for size in sizes:
        own = torch.linalg.qr(common + 0.3 * torch.randn(width, width, generator=generator) / width**0.5).Q
        scale = torch.arange(1.0, width + 1).rsqrt()
        mean = distance * torch.randn(width, generator=generator) / width**0.5
        found.append((torch.randn(size, width, generator=generator) * scale) @ own.T + mean)
    return found


def spectrum_of(rows, k=K, center=True):
    return ExactPCA(k, center).partial_fit(rows).spectrum()


def covariance_of(sets, shares, center):
    """The mixture written out: sum w E, less the outer product of the mean, times n / (n - 1)."""
    rows = [one.double().numpy() for one in sets]
    n = sum(map(len, rows))
    second = sum(w * one.T @ one / len(one) for w, one in zip(shares, rows, strict=True))
    mean = sum(w * one.mean(0) for w, one in zip(shares, rows, strict=True))
    return (second - np.outer(mean, mean) * center) * n / (n - 1), mean * center


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shares", [None, (0.2, 0.5, 0.3), (0.98, 0.01, 0.01)])
def test_whole_spectra_mix_exactly(center, shares):
    sets = sets_of_rows()
    merged = mix([spectrum_of(one, None, center) for one in sets], 24, shares)
    expected, mean = covariance_of(sets, shares or [len(one) / 480 for one in sets], center)
    components = merged.components.double().numpy()
    found = components.T * merged.explained_variance.numpy() @ components
    # float32 components and means
    assert np.abs(found - expected).max() < 1e-5 * expected.max()
    assert merged.total_variance == pytest.approx(np.trace(expected), rel=1e-6)
    assert np.abs(merged.mean.numpy() - mean).max() < 1e-6
    assert merged.n_samples == 480


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shares", [None, (0.2, 0.5, 0.3)])
def test_cut_spectra_mix_within_the_bound(center, shares):
    sets = sets_of_rows()
    spectra = [spectrum_of(one, K, center) for one in sets]
    merged = mix(spectra, K, shares)
    shares = shares or [len(one) / 480 for one in sets]
    covariance, _ = covariance_of(sets, shares, center)
    best = np.linalg.eigvalsh(covariance)[::-1][:K]
    components = merged.components.double().numpy()
    along = np.einsum("kd,de,ke->k", components, covariance, components)
    said = merged.explained_variance.numpy()
    bound = sum(w * float(one.explained_variance[-1]) for w, one in zip(shares, spectra, strict=True))
    rounding = 1e-6 * best[0]
    assert said.sum() <= 1.004 * along.sum()
    assert (said >= best - bound - rounding).all()
    for r in range(1, K + 1):
        assert along[:r].sum() >= best[:r].sum() - r * bound
    # The bound is for the worst case; of these rows the eight components capture nearly all that any eight could.
    assert along.sum() >= 0.98 * best.sum()
    assert merged.total_variance == pytest.approx(np.trace(covariance), rel=1e-6)


@pytest.mark.parametrize(("exact", "power", "width", "k", "least"), [
    (False, 0.5, 576, 32, 0.975),
    (False, 0.25, 576, 32, 0.95),
    (False, 0.5, 256, 16, 0.991),
    (False, 0.25, 256, 16, 0.98),
    # What is missing above is what the running decompositions understate, so nothing is missing here.
    (True, 0.5, 256, 16, 0.998),
    (True, 0.25, 256, 16, 0.998),
])  # fmt: skip
def test_what_is_said_of_two_different_sets_is_what_is_captured(exact, power, width, k, least):
    generator = torch.Generator().manual_seed(0)
    sets, spectra = [], []
    for _ in range(2):
        turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        scale = torch.arange(1.0, width + 1) ** (-power / 2)
        sets.append((torch.randn(4000, width, generator=generator) * scale) @ turn)
        decomposition = ExactPCA(k) if exact else IncrementalSVD(k)
        for batch in sets[-1].split(1000):
            decomposition.partial_fit(batch)
        spectra.append(decomposition.spectrum())
    merged = mix(spectra, k)
    real = captured(torch.cat(sets), merged.components) / 7999
    assert least < float(merged.explained_variance.sum()) / real < 1.004


def test_it_agrees_with_the_merge_of_running_decompositions():
    sets = sets_of_rows()
    running = [IncrementalSVD(K).partial_fit(one) for one in sets]
    merged = mix([one.spectrum() for one in running], K)
    reference = running[0].merge(running[1]).merge(running[2]).spectrum()
    assert merged.n_samples == reference.n_samples
    assert merged.total_variance == pytest.approx(reference.total_variance, rel=1e-6)
    # The running ones keep half as many directions again, so they have a little more to merge.
    assert float(merged.explained_variance.sum()) == pytest.approx(float(reference.explained_variance.sum()), rel=0.02)


# Whole statistics

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def shards():
    """Two data sets of different size, and all batches."""
    one, other = batches_for("llama", n_batches=5), batches_for("llama", n_batches=2, seed=1)
    return passed(batches=one), passed(batches=other, data="e"), passed(batches=one + other)


def test_two_shards_are_the_whole(shards):
    a, b, whole = shards
    merged = a.merge(b)
    assert list(merged) == list(whole) and merged.group_of == whole.group_of and merged.targets == whole.targets
    assert merged.unsupported == whole.unsupported
    for name in whole:
        found, expected = merged[name], whole[name]
        assert found.n_samples == expected.n_samples
        assert found.components.shape == expected.components.shape == (8, whole.targets[name].in_features)
        # Counts and sums are exact: what is left is float32.
        assert found.total_variance == pytest.approx(expected.total_variance, rel=1e-5)
        assert torch.allclose(found.mean, expected.mean, atol=1e-6)
        # Random rows have flat spectra, where the 24 directions that each part has lost hold as much as those it kept.
        assert 0.85 < float(found.explained_variance.sum() / expected.explained_variance.sum()) < 1.0 + 1e-6
    for name, size in whole.sizes.items():
        assert merged.sizes[name] == pytest.approx(size, rel=1e-5)


def test_weights_are_shares_whatever_the_rows(shards):
    a, b, _ = shards
    merged = a.merge(b, weights=[0.2, 0.8])
    for name in merged:
        one, other = a[name], b[name]
        n = one.n_samples + other.n_samples
        means = [one.mean.double(), other.mean.double()]
        mean = 0.2 * means[0] + 0.8 * means[1]
        total = sum(
            w * (s.total_variance * (s.n_samples - 1) / s.n_samples + float((m - mean) @ (m - mean)))
            for w, s, m in zip((0.2, 0.8), (one, other), means, strict=True)
        )
        assert merged[name].total_variance == pytest.approx(total * n / (n - 1), rel=1e-9)
        assert torch.allclose(merged[name].mean.double(), mean, atol=1e-6)
        assert merged[name].n_samples == n
    for name, size in merged.sizes.items():
        assert size.input == pytest.approx(0.2 * a.sizes[name].input + 0.8 * b.sizes[name].input, rel=1e-9)
    assert merged.provenance.data == "0.2 x d; 0.8 x e"
    again = merged.merge(passed(batches=batches_for("llama", seed=2)), weights=[0.5, 0.5])
    assert again.provenance.data == "0.5 x (0.2 x d; 0.8 x e); 0.5 x d"


def test_the_result_is_a_file_like_any_other(shards, tmp_path):
    a, b, _ = shards
    a, b = (Statistics.load(one.save(tmp_path / f"{i}")) for i, one in enumerate((a, b)))
    merged = a.merge(b, weights=[0.7, 0.3])
    back = Statistics.load(merged.save(tmp_path / "c"))
    assert back.provenance == merged.provenance
    for name in merged:
        assert torch.equal(back[name].components, merged[name].components)
    ranks = allocate_ranks(back, rank=4, rho=2.0)
    assert sum(ranks.values()) == 4 * len(back)
    model = llama()
    before = model(torch.arange(3, 9)[None]).logits
    assert torch.equal(build_adapter(back, ranks).apply(model)(torch.arange(3, 9)[None]).logits, before)


class Towers(nn.Module):
    """Two towers, of which a batch may reach one only."""

    def __init__(self):
        super().__init__()
        self.left, self.both, self.right = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, way="left"):
        return getattr(self, way)(x) + self.both(x)


def test_experts_that_ran_in_one_part_only_come_from_it_in_either_order():
    model, batches = mixtral(), batches_for("llama", n_batches=4)
    asked = dict(targets=["q_proj"], target_parameters=BOTH, rank=2)
    both, other = passed(model, batches[:2], **asked), passed(model, batches[2:], **asked)
    experts = {name for name, target in both.targets.items() if target.experts}
    lacking = {name: target.kind for name, target in other.targets.items() if target.experts}
    alone = replace(
        other,
        groups={name: one for name, one in other.groups.items() if not any(name.startswith(some) for some in experts)},
        group_of={name: group for name, group in other.group_of.items() if name not in experts},
        targets={name: target for name, target in other.targets.items() if name not in experts},
        unsupported=lacking, sizes={},
    )  # fmt: skip
    for merged in (both.merge(alone), alone.merge(both), alone.merge(both, weights=[0.4, 0.6])):
        assert {*merged.groups} == {*both.groups} and merged.targets == both.targets
        for name in experts:
            for found, own in zip(merged.of_experts(name), both.of_experts(name), strict=True):
                assert torch.equal(found.components, own.components) and found.n_samples == own.n_samples


def test_layers_that_ran_in_one_part_only_come_from_it():
    model = Towers()
    generator = torch.Generator().manual_seed(0)
    batches = {
        way: [{"x": torch.randn(20, 6, generator=generator), "way": way} for _ in range(3)] for way in ("left", "right")
    }
    a, b = (passed(model, batches[way], ["left", "both", "right"], rank=2, rho=1.0) for way in ("left", "right"))
    assert list(a) == ["left", "both"] and a.group_of["both"] == "left" and b.group_of["both"] == "right"
    merged = a.merge(b, weights=[0.1, 0.9])
    # Each has another set of layers that share its input, so none do.
    assert list(merged) == ["left", "both", "right"] and merged.group_of == {name: name for name in merged}
    assert merged.unsupported == {} and list(merged.targets) == list(merged)
    assert torch.equal(merged["left"].components, a["left"].components)
    assert torch.equal(merged["right"].components, b["right"].components)
    assert all(math.isnan(share) for share in merged.held_out.values())
    assert merged["both"].n_samples == 120
    # A root mean square over all rows, in the shares asked for; of one part alone its own.
    (x_a, y_a), (x_b, y_b) = (part.sizes["both"] for part in (a, b))
    assert merged.sizes["both"] == pytest.approx((0.1 * x_a + 0.9 * x_b, math.sqrt(0.1 * y_a**2 + 0.9 * y_b**2)))
    assert all(merged.sizes[way] == pytest.approx(part.sizes[way]) for way, part in (("left", a), ("right", b)))
    older = replace(b, sizes={})  # which lacks them: nothing is known of all rows of what it ran
    assert {*a.merge(older).sizes} == {"left"} and {*replace(a, sizes={}).merge(b).sizes} == {"right"}
    assert "part 1, right: never ran; PEFT's own initialization." in merged.provenance.notes
    assert list(b.merge(a)) == ["left", "both", "right"]


# Experts and convolutions


def test_experts_count_by_what_the_router_sends_them():
    model = mixtral()
    targets = dict(targets=["q_proj"], target_parameters=BOTH, rank=2)
    a = passed(model, batches_for("llama", n_batches=3), **targets)
    b = passed(model, batches_for("llama", n_batches=6, seed=1), **targets)
    merged = a.merge(b, weights=[0.9, 0.1])
    assert set(merged.groups) == set(a.groups)
    for name in (n for n, target in merged.targets.items() if target.experts):
        n_experts = merged.targets[name].experts
        groups = [f"{name}.{expert}" for expert in range(n_experts)]
        sums = [sum(part.groups[group].n_samples for group in groups) for part in (a, b)]
        for group in groups:
            one, other = a.groups[group], b.groups[group]
            counts = np.array([0.9 * one.n_samples / sums[0], 0.1 * other.n_samples / sums[1]])
            shares = counts / counts.sum()
            mean = shares[0] * one.mean.double() + shares[1] * other.mean.double()
            assert torch.allclose(merged.groups[group].mean.double(), mean, atol=1e-6)
        assert len(merged.of_experts(name)) == n_experts
    build_adapter(merged, allocate_ranks(merged, rank=2)).apply(model)


# Gradients

TWO = ("q_proj", "down_proj")


@pytest.fixture(scope="module")
def gradients():
    """Two data sets of different size with the gradients of all their directions, and both sets' batches."""
    one, other = batches_for("llama", n_batches=3), batches_for("llama", n_batches=2, seed=1)
    a, b = (passed(batches=batches, targets=TWO, rank=24, gradients=True) for batches in (one, other))
    return a, b, (one, other)


def dense(found):
    return found.left.double().T @ torch.diag(found.singular_values) @ found.right.double()


def assert_sums(merged, model, batches, counts, share_of_loss, share_of_rows):
    """Everything is that of autograd, with these shares of the two sets."""
    for name in merged:
        (g1, x1, y1), (g2, x2, y2) = (
            exact(model, part, [name], count)[name] for part, count in zip(batches, counts, strict=True)
        )
        found = merged.gradient(name)
        mean = share_of_loss[0] * g1 + share_of_loss[1] * g2
        # All of it is kept, so what is left is float32.
        torch.testing.assert_close(dense(found), mean, rtol=0.0, atol=1e-5 * float(found.singular_values[0]))
        # Padding has no gradient, so that sums over all tokens are sums over those that count.
        sizes = [int(sum(batch["attention_mask"].sum() for batch in part)) for part in batches]
        moments = [y.square().sum(0) / n for y, n in zip((y1, y2), sizes, strict=True)]
        expected = share_of_rows[0] * moments[0] + share_of_rows[1] * moments[1]
        torch.testing.assert_close(found.output_moment, expected, rtol=1e-5, atol=1e-12)
        assert found.n_samples == found.weighted.n_samples == sum(sizes)
        weighted = [y.norm(dim=1, keepdim=True) * x for x, y in ((x1, y1), (x2, y2))]
        second = sum(w * rows.T @ rows / n for w, rows, n in zip(share_of_rows, weighted, sizes, strict=True))
        n = sum(sizes)
        assert found.weighted.total_variance == pytest.approx(float(second.trace()) * n / (n - 1), rel=1e-5)
        largest = torch.linalg.eigvalsh(second).flip(0)[:8] * n / (n - 1)
        # Turned by one step of the iteration for each batch, not to the end.
        torch.testing.assert_close(found.weighted.explained_variance[:8], largest, rtol=0.02, atol=0.0)
        assert math.isnan(found.importance)


@pytest.mark.parametrize("weights", [None, [0.2, 0.8]])
def test_gradients_are_those_of_all_labels(gradients, weights):
    a, b, batches = gradients
    model = llama()
    counts = [counts_of(model, part) for part in batches]
    labels = [sum(count) for count in counts]
    merged = a.merge(b, weights=weights)
    assert merged.provenance.gradients and merged.provenance.n_labels == sum(labels)
    assert not any("gradient" in note for note in merged.provenance.notes)
    rows = [part.gradient(DOWN).n_samples for part in (a, b)]
    by_number = [[n / sum(counted) for n in counted] for counted in (labels, rows)]
    assert_sums(merged, model, batches, counts, *(by_number if weights is None else [weights] * 2))


def test_a_part_in_which_a_layer_did_not_run_adds_no_gradient_to_it():
    model = Towers()
    batches = {way: [{"x": torch.randn(20, 6), "way": way} for _ in range(3)] for way in ("left", "right")}
    settings = dict(targets=["left", "both", "right"], rank=3, gradients=True, loss=lambda y, batch: y.square().mean())
    a, b, whole = (
        passed(model, part, **settings)
        for part in (batches["left"], batches["right"][:1], [*batches["left"], *batches["right"][:1]])
    )
    for merged, share in ((a.merge(b), 0.75), (a.merge(b, weights=[0.1, 0.9]), 0.1)):
        torch.testing.assert_close(dense(merged.gradient("left")), share * dense(a.gradient("left")))
        assert torch.equal(merged.gradient("left").output_moment, a.gradient("left").output_moment)
        assert merged.gradient("both").n_samples == 80
    for name in whole:
        expected = dense(whole.gradient(name))
        torch.testing.assert_close(dense(a.merge(b).gradient(name)), expected, rtol=0.0, atol=1e-6)


# What is refused


def test_bad_weights(shards):
    a, b, _ = shards
    for weights, words in (
        ([0.7, 0.2], "their sum is 0.9, expected positive numbers whose sum is 1"),
        ([0.7, 0.30001], "their sum is 1.00001, expected"),
        ([1.5, -0.5], "expected positive numbers"),
        ([1.0, 0.0], "expected positive numbers"),
        ([math.nan, 1.0], "expected positive numbers"),
        ([math.inf, 1.0], "their sum is inf"),
        ([1.0], "1 for 2 parts"),
        (0.5, "weights=0.5, expected a list with a number for each part"),
        ([None, 1.0], "expected a list with a number for each part"),
        ([0.2, 0.3, 0.5], "3 for 2 parts"),
    ):
        refused(words, a.merge, b, weights=weights)
    for other in ("stats.safetensors", [b], None):
        refused(f"merge got a {type(other).__name__}, not Statistics", a.merge, other)
    refused("one part alone", a.merge)
    assert a.merge(b, weights=[1 / 3, 0.6666667]).provenance.n_batches == 7


def test_parts_that_do_not_fit(shards, tmp_path):
    a, rotated = shards[0], llama()
    rotated.config.rope_parameters["rope_theta"] = 5.0
    torch.manual_seed(1)
    for other, words in (
        (passed(rotated), r"part 2 was made with rope_parameters.rope_theta 5.0 instead of 10000.0 of part 1"),
        (passed(tiny_llama()), r"part 2 was made from another model \(LlamaForCausalLM\) than part 1"),
        (passed(center=False), "part 2 was made with center=False, part 1 with center=True"),
        (passed(token_mask="labels"), "token_mask='labels', part 1 with token_mask='attention'"),
        (passed(task_type="CAUSAL_LM"), "task_type='CAUSAL_LM', part 1 with task_type=None"),
        (passed(targets=["q_proj", "o_proj", "embed_tokens"]), r"4 are missing, 2 too many.*'model.layers.0.mlp.down"),
    ):
        refused(words, a.merge, other)
        with pytest.raises(LoraInitError):
            other.merge(a)
    files = [Statistics.load(one.save(tmp_path / name)) for one, name in ((a, "a"), (passed(center=False), "b"))]
    refused(r"b was made with center=False, \S*a with center=True", files[0].merge, files[1])


def test_layers_of_another_width_are_other_layers():
    one, other = (made_up_statistics(tiny_llama(intermediate_size=width), ["gate_proj"]) for width in (48, 64))
    words = (
        r"part 2 is not about the layers that part 1 is about: 0 are missing, 0 too many, 2 of another shape \(first: "
    )
    refused(words + "'model.layers.0.mlp.gate_proj'", one.merge, other)


def test_what_is_no_statistics_is_named(shards):
    a, b, _ = shards
    refused("merge got a list, not Statistics", Statistics.merge, [a], [b])
    refused("merge got a list, not Statistics", Statistics.merge, [a], [b], weights=[0.5, 0.5])


def test_data_of_one_name_are_told_apart_by_their_rows():
    model, tokenizer, stats = tiny_llama(), tokenizer_of(["cat", "dog", *map(str, range(20))]), []
    for word in ("cat", "dog"):
        rows = [{"text": f"{word} {i}"} for i in range(20)]
        for seed in (0, 1):
            batches = lora_init.load_batches(rows, tokenizer, samples=8, seed=seed)
            stats.append(collect(model, batches, rank=2, progress=False, data=batches.description))
    for seed in (2, 3):  # the same with a picture in each row, and columns in another order
        images = Dataset.from_list([{"image": np.zeros((2, 2, 3), np.uint8), "text": f"cat {i}"} for i in range(20)])
        images = images.cast_column("image", Image())
        batches = lora_init.load_batches(images, tokenizer, samples=8, seed=seed, template="{text}")
        stats.append(collect(model, batches, rank=2, progress=False, data=batches.description))
    assert stats[4].merge(stats[5]).provenance.settings["rows"] == 20
    same, other = stats[0].merge(stats[1]), stats[0].merge(stats[3])
    assert same.provenance.settings["rows"] == 20 and other.provenance.settings["rows"] == 40


def test_the_same_statistics_twice(shards):
    a, b, _ = shards
    refused("part 3 and part 1 hold the same rows", a.merge, b, a)
    refused("hold the same rows", a.merge, passed(batches=batches_for("llama", n_batches=5)), weights=[0.5, 0.5])


def test_rows_that_begin_at_one_place_are_the_same_whatever_the_batches():
    rows, tokenizer = [{"text": f"cat {i}"} for i in range(20)], tokenizer_of(["cat", *map(str, range(20))])
    model = tiny_llama()

    def made(**options):
        batches = lora_init.load_batches(rows, tokenizer, **{"samples": 8, **options})
        return collect(model, batches, rank=2, progress=False, data=batches.description)

    first = made()
    for same in ({"batch_size": 3}, {"samples": 12}):
        refused("part 2 and part 1 hold the same rows, which would count twice", first.merge, made(**same))
    for other in ({"offset": 8}, {"seed": 1}, {"template": "{text} {text}"}):
        first.merge(made(**other))
    asked = {"template": "{text}"}
    made(**asked, completion="{text}").merge(made(**asked, completion="{text} {text}"))


A, B = "en/a.jsonl: 64 of 200 examples", "en/b.jsonl: 64 of 300 examples"


@pytest.mark.parametrize(("sources", "rows"), [
    (((A, 200, 0), ("en/b.jsonl: 64 of 200 examples", 200, 0)), 400),
    (((A, 200, 0), (f"{A}, after the first 64", 200, 64)), 200),
    (((A, 200, 0), (B, 300, 0)), 500),
    (((f"0.5 x {A}; 0.5 x {B}", 500, None), (A, 200, 64)), None),
    (((f"0.5 x {A}; 0.5 x {B}", 500, None), ("c.jsonl: 64 of 100 examples", 100, 0)), 600),
    (((A, 200, 0), (A, 200, 0)), None),  # two files of one name
    (((A, 200, 0), ("batches", None, None)), None),
    (((A, 200, 0, "file 1"), (A, 200, 64, "file 2")), 400),  # two files of one name
    (((A, 200, 0, "file 1"), (A, 200, 64, "file 1")), 200),
    (((A, 200, 0, "file 1"), (A, 200, 0, "file 1")), 200),
    (((A, 200, 0, "file 1"), ("elsewhere/a.jsonl: 64 of 200 examples", 200, 64, "file 1"), (B, 300, 0, "file 2")), 500),
    (((A, 200, 0, "file 1"), (A, 190, 64, "file 1")), 200),  # estimates, for some rows make no example
    ((("", 200, 0, "file 1"), ("", 200, 64, "file 2")), 400),
    ((("", 200, 0), ("", 200, 64)), None),  # nobody knows
    ((("data in memory: 9 of 200 examples", 200, 0), ("data in memory: 9 of 200 examples", 200, 64)), None),
    (((f"0.5 x {A}; 0.5 x {B}", 500, None), (A, 200, 64, "file 1")), None),
    ((("0.5 x not described; 0.5 x not described", 500, None), ("", 200, 64, "file 1")), None),
])  # fmt: skip
def test_a_merged_training_has_the_rows_of_all_data(sources, rows):
    model, batches, parts = tiny_llama(), batches_for("llama"), []
    for (data, n, offset, *file), some in zip(sources, (batches[:1], batches[1:2], batches[2:]), strict=False):
        made = collect(model, some, rank=2, progress=False)
        settings = {**made.provenance.settings, **({"rows": n, "offset": offset} if n else {})}
        settings |= {"digest of the rows": file[0]} if file else {}
        parts.append(replace(made, provenance=replace(made.provenance, data=data, settings=settings)))
    assert parts[0].merge(*parts[1:]).provenance.settings.get("rows") == rows


def test_the_part_without_gradients_is_named_by_its_number():
    made = [
        types.SimpleNamespace(
            groups={"g": types.SimpleNamespace(n_components=2)},
            provenance=types.SimpleNamespace(
                n_samples=1, n_batches=1, stop_reason="exhausted", seed=0, data="d", gradients=has
            ),
        )
        for has in (True, False)
    ]
    *_, said = merging._origins(made, None, 2)
    assert said == "part 2 of 2 has no gradients, so the others' are left out."


def part(rows, k, **about):
    spectrum = ExactPCA(k).partial_fit(rows).spectrum()
    known = dict(model_id="m", model_class="C", fingerprint="f", target_modules=[], n_samples=len(rows))
    target = Target("a", "Linear", rows.shape[1], 4)
    made = Provenance(**known | about)
    return Statistics({"a": spectrum}, {"a": "a"}, {"a": target}, made, {"a": 0.5}, {"lost": "Embedding"})


def test_what_a_merge_says_of_its_parts():
    a = part(
        torch.randn(20, 12), 3, data="x", rank=4, n_batches=2, n_labels=7, gradients=True, complete=False, keeps=0.5,
        stop_reason="converged, failed", seconds={"forward": 0.1234, "data": 1.0}, seed=3,
        settings={"rho": 2.0, "offset": 0, "rows": 10}, notes=["a: odd.", "lost: never ran."],
    )  # fmt: skip
    b = part(
        torch.randn(30, 12) + 1, 5, rank=2, n_batches=3, n_labels=9, stop_reason="exhausted, failed", seed=4,
        seconds={"forward": 0.1, "decomposition": 2.0004}, settings={"rho": 2.0, "offset": 5, "other": 1},
        notes=["lost: never ran.", "b: small."],
    )  # fmt: skip
    merged = a.merge(b)
    assert asdict(merged.provenance) == asdict(a.provenance) | {
        "data": "x", "rank": 2, "gradients": False, "n_labels": 0, "n_batches": 5, "n_samples": 50, "keeps": None,
        "stop_reason": "converged, failed, exhausted", "settings": {"rho": 2.0},
        "seconds": {"forward": 0.223, "data": 1.0, "decomposition": 2.0},
        "notes": [
            "part 1 of 2: 20 rows in 2 batches, stopped: converged, failed, seed 3, x.",
            "part 2 of 2: 30 rows in 3 batches, stopped: exhausted, failed, seed 4, data not described.",
            "the parts have up to 3 and 5 components of a layer; 3 are kept.",
            "part 2 of 2 has no gradients, so the others' are left out.",
            "lost: never ran.", "part 1, a: odd.", "part 2, b: small.",
        ],
    }  # fmt: skip
    assert merged["a"].n_components == 3 and merged.unsupported == {"lost": "Embedding"} and merged.path is None
    weighted = b.merge(b.merge(a), weights=[0.25, 0.75]).provenance
    assert weighted.data == "0.25 x not described; 0.75 x x" and weighted.seed == 4
    assert weighted.notes[0] == (
        "part 1 of 2 with weight 0.25: 30 rows in 3 batches, stopped: exhausted, failed, seed 4, data not described."
    )
    whole = part(torch.randn(20, 12), 3).merge(part(torch.randn(20, 12), 3)).provenance
    assert whole.complete and not any("components" in note for note in whole.notes)


def test_by_labels_rows_with_gradients_are_others_than_those_without():
    labels = dict(token_mask="labels")
    a, b = part(torch.randn(20, 12), 3, gradients=True, **labels), part(torch.randn(30, 12), 3, **labels)
    words = r"^part 2 was made with gradients=False, part 1 with gradients=True\. Collect both the same way\.$"
    refused(words, a.merge, b)
    words = words.replace("False", "?").replace("True", "False").replace("?", "True")
    refused(words, b.merge, a)


def test_rows_with_other_means_in_one_layer_are_other_rows():
    """Also where numbers and variances are the same: of whole numbers both are exact."""
    rows = torch.randint(0, 4, (16, 12)).float()
    one, other = part(rows, 3), part(rows + 8.0, 3)
    assert one.total_variance("a") == other.total_variance("a")
    assert one.merge(other)["a"].n_samples == 32
    targets = {name: replace(one.targets["a"], name=name) for name in "ab"}
    pairs = [
        replace(one, groups={"a": one["a"], "b": of_b["a"]}, group_of={"a": "a", "b": "b"}, targets=targets)
        for of_b in (one, other)
    ]
    assert pairs[0].merge(pairs[1])["b"].n_samples == 32
    refused("hold the same rows", pairs[0].merge, replace(pairs[0]))


def test_the_rest_of_a_pass_may_begin_with_the_same_rows():
    rows = torch.randn(20, 12)
    a, b = part(rows, 3), part(rows, 3)
    refused("^part 2 and part 1 hold the same rows", a.merge, b)
    assert a.continued_by(b)["a"].n_samples == 40


@pytest.mark.parametrize(("parts", "size"), [
    ([[(3, 1.0)], [(5, 0.9)]], 5),  # the first has left nothing out
    ([[(3, 0.9)], [(5, 0.9)]], 3),
    ([[(3, 1.0)], [(2, 1.0)]], 7),  # all directions of both, and of their means
    ([[(2, 0.9), (5, 0.9)], [(4, 0.9)]], 4),
    ([[(2, 0.9), (5, 1.0)], [(4, 0.9)]], 2),
    ([[(3, 1 - 1e-6)], [(5, 0.9)]], 5),
    ([[(3, 1 - 1e-4)], [(5, 0.9)]], 3),
])  # fmt: skip
def test_as_many_components_are_kept_as_all_parts_have_that_left_any_out(parts, size):
    def of(k, share):
        variances = torch.full((k,), share / k, dtype=torch.float64)
        return types.SimpleNamespace(n_components=k, explained_variance=variances, total_variance=1.0)

    assert merging._common_size([[of(*one) for one in spectra] for spectra in parts]) == size


@pytest.mark.parametrize(("counts", "kept"), [((4, 3), 4), ((3, 2), 5), ((6, 4), 4), ((6, 9), 6)])
def test_as_many_triplets_are_kept_as_all_parts_have_that_left_any_out(counts, kept):
    """Two for each rank are what a pass keeps at least; of fewer it has all."""
    parts = [
        types.SimpleNamespace(
            gradients={i: types.SimpleNamespace(singular_values=torch.ones(n)) for i, n in enumerate((1, count))},
            provenance=types.SimpleNamespace(rank=2),
        )
        for count in counts
    ]
    assert merging._n_triplets(parts) == kept


@pytest.mark.parametrize(("texts", "weights", "words"), [
    (("a", "b"), None, "a; b"),
    (("a", "", "a"), None, "a"),
    (("a", "a"), (0.25, 0.75), "0.25 x a; 0.75 x a"),
    (("", "a; b"), (0.5, 0.5), "0.5 x not described; 0.5 x (a; b)"),
    (("a", "a"), (0.5, 0.5), "0.5 x a"),
])  # fmt: skip
def test_the_data_of_all_parts_in_words(texts, weights, words):
    assert merging._data_in_words([types.SimpleNamespace(data=text) for text in texts], weights) == words


def test_notes_about_experts_are_written_anew():
    notes = [["x and 2 other layers: few.", "x: few.", "y: kept.", "plain"], ["x and 1 other layer: more.", "plain"]]
    targets = {"x": Target("x", "P", 2, 2, experts=4), "y": Target("y", "Linear", 2, 2)}
    parts = [types.SimpleNamespace(targets=targets, provenance=types.SimpleNamespace(notes=own)) for own in notes]
    assert list(merging._notes(parts)) == ["plain", "part 1, y: kept."]


def test_one_set_alone_is_only_cut():
    whole = spectrum_of(sets_of_rows()[0], 6)
    found = mix([whole], 4, [0.1])
    assert torch.equal(found.components, whole.components[:4]) and found.total_variance == whole.total_variance
    assert torch.equal(found.explained_variance, whole.explained_variance[:4]) and found.n_samples == 300


@pytest.mark.parametrize("center", [True, False])
def test_a_set_of_one_row_counts_as_one(center):
    sets = [torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])]
    merged = mix([spectrum_of(one, None, center) for one in sets], 2)
    whole = spectrum_of(torch.cat(sets), None, center)
    assert merged.total_variance == pytest.approx(whole.total_variance) and merged.n_samples == 3
    torch.testing.assert_close(merged.explained_variance, whole.explained_variance, rtol=1e-6, atol=1e-6)
