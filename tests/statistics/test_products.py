"""Products by whichever library: the same numbers."""

import pytest
import torch

from lora_init.statistics import incremental_svd as products


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_float64(monkeypatch, onednn, dtype, bias):
    if not onednn:
        monkeypatch.setattr(products, "_has_onednn", lambda: False)
    a, b, c = torch.randn(50, 30).to(dtype), torch.randn(7, 30).to(dtype), torch.randn(7).to(dtype)
    expected = a.double() @ b.double().T + (c.double() if bias else 0.0)
    product = products.times_transposed(a, b, c if bias else None)
    assert product.dtype == dtype
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_product_of_two_types_is_of_bfloat16_and_comes_in_float32():
    rows, test, bias = torch.randn(200, 30).bfloat16(), torch.randn(7, 30), torch.randn(7)
    product = products.times_transposed(rows, test, bias)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, rows.float() @ test.T + bias, rtol=0.0, atol=0.1)
    torch.testing.assert_close(products.times_transposed(test, rows), (product - bias).T, rtol=0.0, atol=1e-6)
    assert products.times_transposed(rows, rows[:2]).dtype == torch.bfloat16


def test_transposed_operands_need_no_copies_from_the_caller():
    rows, along = torch.randn(50, 30), torch.randn(50, 7)
    torch.testing.assert_close(products.times_transposed(along.T, rows.T), along.T @ rows, rtol=1e-5, atol=1e-5)


def test_a_torch_without_the_operator_falls_back(monkeypatch):
    monkeypatch.setattr(products, "_OPERATOR", "_no_such_operator")
    assert not products._has_onednn()
    a, b = torch.randn(5, 3), torch.randn(2, 3)
    torch.testing.assert_close(products.times_transposed(a, b), a @ b.T)
