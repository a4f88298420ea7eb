"""What a pass finds depends on the texts alone: not on padding, order or batches, and only in one way on the scale."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from lora_init import collect
from tests.conftest import tiny_llama

WAYS = {
    "rows": {},
    "rows about zero": dict(center=False),
    "labelled rows": dict(token_mask="labels"),
    "gradients": dict(gradients=True),
    "gradients of labelled rows": dict(gradients=True, token_mask="labels"),
}


@cache
def model():
    torch.manual_seed(0)
    return tiny_llama()


@cache
def texts():
    """Texts of several lengths, with the label of each token. None begins with one: padding would predict it."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in (3, 5, 8, 8, 11):
        ids = torch.randint(3, 64, (length,), generator=generator)
        labels = ids.masked_fill(torch.rand(length, generator=generator) < 0.4, -100)
        labels[0], labels[1] = -100, ids[1]
        found.append((ids, labels))
    return found


def laid_out(order, sizes, left, extra, filler):
    """Put the texts, in this order, into batches of these sizes, padded at a side with a token."""
    batches, rest = [], [texts()[place] for place in order]
    for size in sizes:
        some, rest = rest[:size], rest[size:]
        columns = {}
        for name, rows, value in (
            ("input_ids", [ids for ids, _ in some], filler),
            ("labels", [labels for _, labels in some], -100),
            ("attention_mask", [torch.ones_like(ids) for ids, _ in some], 0),
        ):
            padded = pad_sequence(rows, True, value, padding_side="left" if left else "right")
            columns[name] = nn.functional.pad(padded, (extra, 0) if left else (0, extra), value=value)
        batches.append(columns)
    assert not rest
    return batches


def found_by(batches, **options):
    """All directions are kept, so that nothing depends on what was left out."""
    stats = collect(model(), batches, rank=16, rho=3.0, tolerance=0.0, **options)
    found = {"batches": len(batches), "labels": stats.provenance.n_labels}
    for name in stats:
        one = stats[name]
        found[name] = [one.n_samples, one.mean, one.total_variance, *stats.sizes[name], moment(one)]
        if stats.gradients:
            part = stats.gradient(name)
            gradient = part.left.double().T @ torch.diag(part.singular_values) @ part.right.double()
            found[name] += [gradient, part.output_moment, part.weighted.total_variance, moment(part.weighted)]
    return found


def moment(spectrum):
    rows = spectrum.components.double()
    return rows.T @ torch.diag(spectrum.explained_variance.double()) @ rows


def assert_same(one, two):
    assert one["labels"] == two["labels"]
    for name in one.keys() - {"batches", "labels"}:
        for value, other in zip(one[name], two[name], strict=True):
            assert_close(value, other, 1e-4)  # float32 through two blocks


def assert_close(value, other, share):
    """What is small beside the largest entry is rounding."""
    value, other = torch.as_tensor(value).double(), torch.as_tensor(other).double()
    torch.testing.assert_close(value, other, rtol=share, atol=share * float(other.abs().max()))


@cache
def alone(way):
    return found_by(laid_out(range(5), [1] * 5, left=False, extra=0, filler=0), **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=8, deadline=None)
@given(
    order=st.permutations(range(5)),
    sizes=st.sampled_from([[5], [4, 1], [2, 3], [1, 2, 2], [3, 1, 1]]),
    left=st.booleans(),
    extra=st.integers(0, 2),
    filler=st.sampled_from([0, 7, 63]),
)
def test_padding_order_and_batches_change_nothing(way, order, sizes, left, extra, filler):
    assert_same(found_by(laid_out(order, sizes, left, extra, filler), **WAYS[way]), alone(way))


def test_the_same_texts_twice_have_twice_the_rows_and_the_same_means():
    once, twice = (found_by(laid_out(range(5), [2, 3], False, 0, 0) * n, gradients=True, center=False) for n in (1, 2))
    assert twice["labels"] == 2 * once["labels"]
    for name in once.keys() - {"batches", "labels"}:
        n = once[name][0]
        assert twice[name][0] == 2 * n
        bessel = (n - 1) / n * 2 * n / (2 * n - 1)  # variances are over the rows less one
        for place, (value, other) in enumerate(zip(once[name][1:], twice[name][1:], strict=True), 1):
            of_variance = 1.0 if place in (1, 3, 4, 6, 7) else bessel
            assert_close(torch.as_tensor(value) * of_variance, other, 1e-3)


@pytest.mark.parametrize("factor", [0.25, 64.0])
def test_a_loss_that_is_scaled_scales_gradients_alone(factor):
    batches = laid_out(range(5), [2, 3], False, 0, 0)
    plain = collect(model(), batches, rank=8, gradients=True)
    scaled = collect(model(), batches, rank=8, gradients=True, loss=lambda output, batch: output.loss * factor)
    for name in plain:
        one, two = plain.gradient(name), scaled.gradient(name)
        torch.testing.assert_close(two.singular_values, one.singular_values * factor, rtol=1e-4, atol=0.0)
        torch.testing.assert_close(two.output_moment, one.output_moment * factor**2, rtol=1e-4, atol=0.0)
        assert two.weighted.total_variance == pytest.approx(one.weighted.total_variance * factor**2, rel=1e-4)
        assert two.importance == pytest.approx(one.importance * factor, rel=1e-4)
        assert plain.sizes[name] == scaled.sizes[name] and plain.total_variance(name) == scaled.total_variance(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_many_rows_are_not_those_of_sixteen_bits(dtype):
    """A sum in bfloat16 stands still at 256 times what is added, one in float16 overflows at 65504."""
    layer, rows = nn.Linear(32, 8).to(dtype), torch.randn(4, 6000, 32).add(1.0).to(dtype)
    stats = collect(nn.Sequential(layer), [*rows], rank=2)
    exact, weight = rows.double().flatten(0, 1), layer.weight.double()
    assert stats["0"].n_samples == 24_000
    torch.testing.assert_close(stats["0"].mean.double(), exact.mean(0), rtol=1e-3, atol=0.0)
    assert stats.total_variance("0") == pytest.approx(float(exact.var(0).sum()), rel=1e-3)
    assert stats.sizes["0"].input == pytest.approx(float(exact.abs().sum(1).mean()), rel=1e-3)
    assert stats.sizes["0"].output == pytest.approx(float((exact @ weight.T).detach().square().mean().sqrt()), rel=1e-2)
