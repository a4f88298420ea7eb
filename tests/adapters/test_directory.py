"""What an adapter directory says of itself."""

import pytest
import torch

from lora_init.adapters.directory import is_zero_update, start_digest
from lora_init.starts.weights import LoraWeights


def test_the_digest_of_a_start_is_of_all_its_numbers_in_bfloat16():
    a, b = torch.randn(4, 8), torch.zeros(6, 4)
    one = start_digest({"q": LoraWeights(a, b)})
    assert start_digest({"q": LoraWeights(a.bfloat16().float(), b)}) == one
    a[3, 7] += 1.0
    assert len({one, start_digest({"q": LoraWeights(a, b)}), start_digest({"k": LoraWeights(a, b)})}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_update_is_zero_to_the_rounding_that_its_numbers_have(dtype):
    """Columns of one orthogonal matrix, as in PEFT's "orthogonal", made in a type and saved in float32."""
    q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    full = q[:, :4] @ torch.randn(4, 16, dtype=torch.float64), torch.randn(16, 4, dtype=torch.float64) @ q[:, 4:].T
    a, b = (part.to(dtype).float() for part in full)
    assert is_zero_update(a, b)
    assert not is_zero_update(a, b + 0.01 * a.T)
    assert not is_zero_update(torch.randn(8, 16), torch.randn(16, 8))
