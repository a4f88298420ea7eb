"""What an adapter directory says of itself."""

import torch

from lora_init.adapters.directory import start_digest
from lora_init.adapters.weights import LoraWeights


def test_the_digest_of_a_start_is_of_all_its_numbers_in_bfloat16():
    a, b = torch.randn(4, 8), torch.zeros(6, 4)
    one = start_digest({"q": LoraWeights(a, b)})
    assert start_digest({"q": LoraWeights(a.bfloat16().float(), b)}) == one
    a[3, 7] += 1.0
    assert len({one, start_digest({"q": LoraWeights(a, b)}), start_digest({"k": LoraWeights(a, b)})}) == 3
