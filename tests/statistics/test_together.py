"""Products made together against the same ones made alone."""

import pytest
import torch

from lora_init.statistics import incremental_svd as together
from lora_init.statistics.incremental_svd import Along, Image, IncrementalSVD, apply_updates, multiply
from lora_init.statistics.mean_gradient import MeanGradient
from tests.statistics.test_incremental_svd import decaying_rows


@pytest.fixture
def products(monkeypatch):
    """Shapes of the products that are made of rows."""
    made, plain = [], together.times_transposed

    def counted(a, b, bias=None):
        made.append((*a.shape, len(b)))
        return plain(a, b, bias)

    monkeypatch.setattr(together, "times_transposed", counted)
    return made


def asking(found, key, *wanted):
    """A decomposition that wants these one after the other."""
    for one in wanted:
        found.setdefault(key, []).append((yield one))


def test_what_is_wanted_at_the_same_time_is_one_product(products):
    x, found = torch.randn(30, 6), {}
    v, w, bias, t, s = torch.randn(4, 6), torch.randn(2, 6), torch.randn(2), torch.randn(30, 3), torch.randn(30, 1)
    multiply(
        x,
        [
            asking(found, "both", Along(v), Image(t)),
            asking(found, "with a bias", Along(w, bias), Image(s)),
            asking(found, "image only", Image(s)),  # waits for the images of the others
            asking(found, "nothing"),
        ],
    )
    assert products == [(30, 6, 6), (5, 30, 6)]
    expected = {"both": [x @ v.T, t.T @ x], "with a bias": [x @ w.T + bias, s.T @ x], "image only": [s.T @ x]}
    assert list(found) == list(expected)
    for key, wanted in expected.items():
        for a, b in zip(found[key], wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_who_wants_more_goes_on_alone(products):
    x, found = torch.randn(30, 6), {}
    v, t = torch.randn(4, 6), torch.randn(30, 3)
    multiply(x, [asking(found, "twice", Along(v), Image(t), Along(v), Image(t)), asking(found, "once", Along(v))])
    assert products == [(30, 6, 8), (3, 30, 6), (30, 6, 4), (3, 30, 6)]
    assert torch.equal(found["twice"][0], found["once"][0])
    multiply(x, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decompositions_find_together_what_they_find_alone(products, dtype):
    generator = torch.Generator().manual_seed(0)
    alone, joint = ([IncrementalSVD(4), IncrementalSVD(4, center=False), MeanGradient(8)] for _ in range(2))
    for step in range(12):
        rows = decaying_rows(200, 40, seed=step, mean=0.5)
        x, norms, g = rows.to(dtype), rows.norm(dim=1), torch.randn(200, 6, generator=generator)
        weights = g.norm(dim=1)
        for plain, weighted, mean in (alone, joint):
            steps = plain.steps(x, norms), weighted.steps(x, norms, weights), mean.steps(g, x, g.square().sum(0))
            made = len(products)
            for part in [steps] if mean is joint[2] else [[one] for one in steps]:
                multiply(x, part)
            if step > 0 and mean is joint[2]:
                assert len(products) - made == 2
            apply_updates([plain, weighted])
            mean.commit()
    rtol = 1e-4 if dtype == torch.float32 else 1e-2
    for a, b in zip(alone[:2], joint[:2], strict=True):
        torch.testing.assert_close(
            a.spectrum().explained_variance, b.spectrum().explained_variance, rtol=rtol, atol=0.0
        )
        torch.testing.assert_close(a.spectrum().mean, b.spectrum().mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone[2].triplets(4)[1], joint[2].triplets(4)[1], rtol=rtol, atol=0.0)
