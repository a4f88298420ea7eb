"""The running sum of gradients against the sum itself."""

import json
import math

import pytest
import torch

from lora_init import ExactPCA
from lora_init.errors import LoraInitError
from lora_init.statistics.gradient_spectrum import GradientSpectrum, MeanGradient, freeze_gradient


def batches(rank=None, d_out=24, d_in=40, n_batches=6, seed=0):
    """Tokens g [n, d_out] and x [n, d_in] in batches of different sizes, whose G has a spectrum that falls."""
    generator = torch.Generator().manual_seed(seed)
    k = rank or min(d_out, d_in)
    left, right = (torch.linalg.qr(torch.randn(d, k, generator=generator)).Q.T for d in (d_out, d_in))
    scale = 0.7 ** torch.arange(k, dtype=torch.float32)
    found = []
    for n in (50, 30, 1, 70, 40, 60)[:n_batches]:
        code = torch.randn(n, k, generator=generator)
        found.append(((code * scale) @ left, (code + 0.3 * torch.randn(n, k, generator=generator)) @ right))
    return found


def fitted(data, k, **options):
    mean = MeanGradient(k, **options)
    for g, x in data:
        mean.project(g, x)
        mean.update()
    return mean


def exact(data):
    return sum(g.double().T @ x.double() for g, x in data)


def dense(triplets):
    left, values, right = triplets
    return left.double().T @ torch.diag(values) @ right.double()


@pytest.mark.parametrize(("d_out", "d_in"), [(24, 40), (40, 24), (6, 40)])
def test_a_sum_of_low_rank_is_exact(d_out, d_in):
    data = batches(rank=5, d_out=d_out, d_in=d_in)
    left, values, right = fitted(data, 8).triplets(8)
    s = torch.linalg.svdvals(exact(data))
    torch.testing.assert_close(values[:5], s[:5], rtol=1e-5, atol=0.0)  # float32 products
    assert len(values) == 5 or bool((values[5:] < 1e-5 * values[0]).all())
    torch.testing.assert_close(dense((left[:5], values[:5], right[:5])), exact(data), rtol=0.0, atol=1e-4 * float(s[0]))
    for rows in (left[:5], right[:5]):
        torch.testing.assert_close(rows @ rows.T, torch.eye(5), rtol=0.0, atol=1e-5)


def test_leading_triplets_are_those_of_the_full_svd():
    """Of a sum of full rank the leading half of what is kept is right to a thousandth of the energy."""
    data = batches()
    left, values, right = fitted(data, 8).triplets(8)
    s = torch.linalg.svdvals(exact(data))
    best = s[:4].square().sum()
    assert float((exact(data) @ right[:4].double().T).square().sum() / best) > 0.999
    assert float((left[:4].double() @ exact(data)).square().sum() / best) > 0.999
    torch.testing.assert_close(values[:4], s[:4], rtol=5e-3, atol=0.0)
    first = fitted(data[:1], 8).triplets(8)
    assert float((exact(data) @ first[2][:4].double().T).square().sum() / best) < 0.999  # so the later batches count


def test_a_module_that_runs_twice_in_a_pass_counts_twice():
    data = batches(rank=5)
    twice = MeanGradient(8)
    for g, x in data:
        twice.project(g[: len(g) // 2], x[: len(g) // 2])
        twice.project(g[len(g) // 2 :], x[len(g) // 2 :])
        twice.update()
    once = fitted(data, 8)
    torch.testing.assert_close(twice.triplets(5)[1], once.triplets(5)[1], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(twice.squares, once.squares)
    assert twice.n_samples == once.n_samples == sum(len(g) for g, _ in data)


def test_directions_are_chosen_anew_where_there_are_half_as_many_rows_again_and_once_a_batch():
    (g, x), mean, chosen = batches(n_batches=1)[0], MeanGradient(4), []
    for number in range(24):
        before, tried = mean._state and mean._state.outputs, []
        for part in (slice(0, 40), slice(40, 50)):
            mean.project(g[part], x[part])
            tried.append(mean._pending.outputs)
        mean.update()
        assert torch.equal(*tried)  # sums are images of one Q and V
        if before is None or not torch.equal(before, mean._state.outputs):
            chosen.append(number)
    assert chosen == [0, 2, 3, 5, 8, 12, 18]


def test_squares_are_exact():
    data = batches()
    torch.testing.assert_close(
        fitted(data, 4).squares, sum(g.double().square().sum(0) for g, _ in data), rtol=1e-6, atol=0
    )


def test_what_is_not_finite_is_refused_and_nothing_updated():
    data = batches(rank=5)
    mean = fitted(data[:2], 8)
    before = mean.triplets(8)
    for bad in (float("nan"), float("inf")):
        g, x = data[3]
        g = g.clone()
        g[3, 2] = bad
        mean.project(g, x)
        with pytest.raises(LoraInitError, match="NaN or inf"):
            mean.check_batch()
    mean.update()
    assert all(torch.equal(a, b) for a, b in zip(before, mean.triplets(8), strict=True))


def test_merging_parts_is_the_whole():
    data = batches(rank=5)
    parts = [fitted(data[:2], 8), MeanGradient(8), fitted(data[2:], 8)]
    merged = MeanGradient(8)
    for part in parts:
        merged.merge(part)
    whole = fitted(data, 8)
    torch.testing.assert_close(dense(merged.triplets(8)), dense(whole.triplets(8)), rtol=0.0, atol=1e-4)
    torch.testing.assert_close(merged.squares, whole.squares)
    assert merged.n_samples == whole.n_samples


def test_batches_that_cancel_leave_nothing_behind():
    """Two of 100 times the size, first; then the estimate is that of the others alone."""
    data = batches(d_out=60, d_in=80)
    g, x = data[0]
    left, _, right = fitted([(100 * g, x), (-100 * g, x), *data], 4).triplets(4)
    best = torch.linalg.svdvals(exact(data))[:4].square().sum()
    assert float((exact(data) @ right.double().T).square().sum() / best) > 0.98
    assert float((left.double() @ exact(data)).square().sum() / best) > 0.98


def slowly_falling(n_batches=24, width=96):
    """Noise beside a mean of slowly falling singular values, as gradients have it."""
    generator = torch.Generator().manual_seed(0)
    turns = [torch.linalg.qr(torch.randn(width, width, generator=generator)).Q for _ in range(2)]
    scale = torch.arange(1.0, width + 1) ** -0.7
    for _ in range(n_batches):
        code = torch.randn(200, width, generator=generator)
        noise = torch.randn(200, width, generator=generator)
        yield (scale * (code + noise)) @ turns[0], (code + 0.5 * noise.flip(1)) @ turns[1]


def test_both_sides_are_near_the_best():
    data = list(slowly_falling())
    left, _, right = fitted(data, 16).triplets(16)
    u, s, _ = torch.linalg.svd(exact(data))
    best = s[:8].square().sum()
    assert float((left[:8].double() @ exact(data)).square().sum() / best) > 0.99
    assert float((exact(data) @ right[:8].double().T).square().sum() / best) > 0.99
    # The B of lora-ga.
    assert float((left[8:].double() @ u[:, 8:16]).square().sum() / 8) > 0.8


def test_a_layer_keeps_the_mean_over_labels_and_its_importance():
    data, weight = batches(rank=5), torch.randn(24, 40)
    weighted = ExactPCA(2).partial_fit(data[0][1]).spectrum()
    found = freeze_gradient(fitted(data, 8), weighted, n_labels=10).with_importance(weight)
    gradient = exact(data) / 10
    torch.testing.assert_close(dense((found.left, found.singular_values, found.right)), gradient, rtol=0.0, atol=1e-4)
    moment = sum(g.double().square().sum(0) for g, _ in data) / sum(len(g) for g, _ in data)
    torch.testing.assert_close(found.output_moment, moment, rtol=1e-5, atol=0.0)
    assert found.importance == pytest.approx(float((weight.double() * gradient).abs().mean()), rel=1e-4)


def test_two_sums_agree_by_the_cosine_between_them():
    data = batches(rank=5)
    one, other = exact(data[:2]), exact(data[2:])
    cosine = float((one * other).sum() / (one.norm() * other.norm()))
    assert fitted(data[:2], 8).agreement(fitted(data[2:], 8), 4) == pytest.approx(cosine, rel=1e-3)
    assert fitted(data, 8).agreement(fitted([(-g, x) for g, x in data], 8), 4) == 0.0


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_they_agree_as_much_whatever_their_size(scale):
    data = batches(rank=5)
    parts = [fitted([(g * scale, x) for g, x in part], 8) for part in (data[:2], data[2:])]
    assert parts[0].agreement(parts[1], 4) == pytest.approx(fitted(data[:2], 8).agreement(fitted(data[2:], 8), 4))


def test_a_seed_alone_decides_which_directions_are_tried_first():
    data, found = batches(), []
    for of_caller, seed in ((1, 3), (2, 3), (2, 4)):
        torch.manual_seed(of_caller)
        state = torch.get_rng_state()
        found.append(dense(fitted(data, 4, seed=seed).triplets(4)))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_of_one_token_with_one_label_the_mean_is_its_own_gradient():
    g, x = torch.tensor([[3.0, 0.0, 4.0]]), torch.tensor([[1.0, 2.0]])
    weighted = ExactPCA(2).partial_fit(x).spectrum()
    found = freeze_gradient(fitted([(g, x)], 2), weighted, n_labels=1)
    made = dense((found.left, found.singular_values, found.right))
    torch.testing.assert_close(made, (g.T @ x).double(), rtol=1e-5, atol=1e-5)
    assert found.output_moment.tolist() == [9.0, 0.0, 16.0] and found.n_samples == 1


def test_nothing_agrees_with_nothing_and_zeros_with_all():
    data, zeros = batches(rank=5)[:2], [(torch.zeros(9, 24), torch.randn(9, 40))]
    one, empty, idle = fitted(data, 4), MeanGradient(4), fitted(zeros, 4)
    assert one.agreement(empty, 4) == empty.agreement(one, 4) == 0.0
    assert one.agreement(idle, 4) == idle.agreement(one, 4) == 1.0
    left, values, right = idle.triplets(4)
    assert left.shape == (0, 24) and values.shape == (0,) and right.shape == (0, 40)
    assert empty.n_samples == 0 and idle.n_samples == 9


def test_what_is_merged_stays_as_it_was():
    one, other = fitted(batches(rank=5)[:3], 8), fitted(batches(rank=5, seed=1), 8)
    before, n_samples = dense(other.triplets(8)), other.n_samples
    merged = MeanGradient(8).merge(other).merge(one)
    assert merged.n_samples == n_samples + one.n_samples and other.n_samples == n_samples
    assert torch.equal(dense(other.triplets(8)), before)
    torch.testing.assert_close(dense(merged.triplets(10)), before + dense(one.triplets(8)), rtol=0.0, atol=1e-4)


def test_a_batch_that_is_forgotten_leaves_nothing_behind():
    data = batches(rank=5)
    mean = fitted(data[:2], 8)
    mean.project(*data[2])
    mean.check_batch()
    mean.forget_batch()
    mean.update()
    assert mean.n_samples == 80 and torch.equal(dense(mean.triplets(8)), dense(fitted(data[:2], 8).triplets(8)))


@pytest.mark.parametrize("d_out", [3, 256, 600])
def test_importance_is_a_mean_over_all_entries_however_many(d_out):
    left = torch.linalg.qr(torch.randn(d_out, 2)).Q.T.contiguous()
    right = torch.linalg.qr(torch.randn(5, 2)).Q.T.contiguous()
    values = torch.tensor([3.0, 0.5]).double()
    weighted = ExactPCA(2).partial_fit(torch.randn(9, 5)).spectrum()
    found = GradientSpectrum(weighted, left, values, right, torch.ones(d_out).double(), math.nan, 9)
    weight = torch.randn(d_out, 5)
    expected = float((weight.double() * dense((left, values, right))).abs().mean())
    assert found.with_importance(weight).importance == pytest.approx(expected, rel=1e-5)
    assert found.with_importance(weight.bfloat16()).importance == pytest.approx(expected, rel=1e-2)
    assert math.isnan(found.importance)


@pytest.mark.parametrize("importance", [math.nan, 0.0, 0.25])
def test_a_gradient_is_read_back_from_its_parts(importance):
    weighted = ExactPCA(2, center=False).partial_fit(torch.randn(9, 5)).spectrum()
    parts = [torch.randn(2, 3), torch.tensor([2.0, 1.0]).double(), torch.randn(2, 5), torch.ones(3).double()]
    numbers, tensors = GradientSpectrum(weighted, *parts, importance, 7).pack()
    assert numbers == {
        "total_variance": weighted.total_variance, "n_samples": 9, "n_tokens": 7,
        "importance": None if math.isnan(importance) else importance,
    }  # fmt: skip
    found = GradientSpectrum.unpack(json.loads(json.dumps(numbers)), tensors.__getitem__)
    for name, tensor in zip(("left", "singular_values", "right", "output_moment"), parts, strict=True):
        assert getattr(found, name) is tensor is tensors[name]
    assert found.importance == pytest.approx(importance, nan_ok=True) and found.n_samples == 7
    again = found.weighted
    assert torch.equal(again.components, weighted.components) and torch.equal(again.mean, torch.zeros(5))
    assert torch.equal(again.explained_variance, weighted.explained_variance)
    assert (again.total_variance, again.n_samples) == (weighted.total_variance, 9)
    del numbers["n_tokens"]  # as in older files
    assert GradientSpectrum.unpack(numbers, tensors.__getitem__).n_samples == 9
