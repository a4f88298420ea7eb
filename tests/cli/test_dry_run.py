"""What a dry run counts: weights that are multiplied, bytes of a type, and of a quantized base."""

from types import SimpleNamespace

import pytest
import torch

from lora_init.cli import dry_run
from lora_init.cli.options import LoadingQuantized
from tests.conftest import tiny_bert, tiny_llama, tiny_t5
from tests.layers.made import mixtral


def test_embeddings_are_looked_up_and_a_pass_ends_before_the_head():
    model = tiny_llama()
    in_layers = sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)
    assert dry_run._n_multiplied(model) == in_layers
    tied = tiny_llama(tie_word_embeddings=True)
    assert dry_run._n_multiplied(tied) == in_layers
    assert dry_run._n_parameters(tied) == sum(p.numel() for p in tied.parameters()) < dry_run._n_parameters(model)
    bare = tiny_bert(None)  # without a head
    expected = sum(p.numel() for p in bare.parameters() if p.dim() > 1) - bare.get_input_embeddings().weight.numel()
    assert dry_run._n_multiplied(bare) == expected


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_a_token_is_multiplied_with_the_experts_that_it_is_sent_to(at_once):
    """Counted by hand: 4 experts whose three projections have 24 x 32 weights each, in 2 layers."""
    model = mixtral(num_experts_per_tok=at_once)
    of_layers = sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)
    assert dry_run._n_multiplied(model) == of_layers - 2 * (4 - at_once) * 3 * 24 * 32
    model.config = SimpleNamespace(get_text_config=SimpleNamespace)  # which has no such number
    assert dry_run._n_multiplied(model) == of_layers


@pytest.mark.parametrize(("labels", "read"), [((2, 3), 3), ((2,), 9)], ids=["text", "classes"])
def test_a_decoder_behind_an_encoder_reads_what_it_is_to_write(labels, read):
    """Counted by hook: the weights of each linear layer times the rows that it gets, but keys and values across."""
    model, products, across = tiny_t5(), [], set()
    for block in model.decoder.block:
        across |= {block.layer[1].EncDecAttention.k, block.layer[1].EncDecAttention.v}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            module.register_forward_hook(lambda m, args, out: products.append((m, args[0].shape[:-1].numel())))
    batch = {"input_ids": torch.ones(2, 9, dtype=torch.long), "labels": torch.ones(*labels, dtype=torch.long)}
    model(input_ids=batch["input_ids"], decoder_input_ids=torch.ones(2, read, dtype=torch.long))
    counted = sum(2 * m.weight.numel() * (rows if m not in across else 2 * read) for m, rows in products)
    # A table of distances is looked up, and is small.
    tables = [p.numel() for name, p in model.named_parameters() if "relative_attention_bias" in name]
    expected = counted + 2 * (tables[0] * 18 + tables[1] * 2 * read)
    assert dry_run._operations(model, [batch, batch]) == 2 * expected
    if len(labels) == 1:  # and so it does where there is no label
        assert dry_run._operations(model, [{"input_ids": batch["input_ids"]}]) == expected


def test_a_decoder_alone_reads_the_input():
    batches = [{"input_ids": torch.ones(2, 9, dtype=torch.long), "labels": torch.ones(2, 3, dtype=torch.long)}]
    assert dry_run._operations(tiny_llama(), batches) == 2 * 18 * dry_run._n_multiplied(tiny_llama())


@pytest.mark.parametrize(("quantize", "each"), [("nf4", 0.5625), ("fp4", 0.5625), ("int8", 1.0)])
def test_quantized_weights_are_those_of_linear_layers_but_the_head(quantize, each):
    model = tiny_llama()
    every = sum(p.numel() for p in model.parameters())
    packed = sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)
    assert dry_run._weights_bytes(model, torch.bfloat16, None) == 2 * every
    assert dry_run._weights_bytes(model, torch.bfloat16, quantize) == round(2 * (every - packed) + each * packed)


@pytest.mark.parametrize(("saved_in", "asked", "quantize", "better", "expected", "n_bytes"), [
    (None, "auto", None, False, torch.float32, True), (torch.bfloat16, "auto", None, False, torch.bfloat16, True),
    (torch.bfloat16, "auto", None, True, torch.float32, True),
    (torch.bfloat16, "auto", "nf4", True, torch.float32, False),
    (torch.bfloat16, "float16", None, True, torch.float16, None),
    ("bfloat16", "auto", None, False, torch.float32, True),
])  # fmt: skip
def test_the_type_is_the_one_that_load_would_choose(saved_in, asked, quantize, better, expected, n_bytes, monkeypatch):
    looked = []
    monkeypatch.setattr(dry_run, "is_better_in_float32", lambda *words: looked.append(words) or better)
    model, place = torch.nn.Linear(3, 2), torch.device("cpu")
    loading = LoadingQuantized(dtype=asked, quantize=quantize)
    assert dry_run._dtype(model, SimpleNamespace(dtype=saved_in), loading, place) == expected
    of = saved_in if isinstance(saved_in, torch.dtype) else torch.float32
    assert looked == ([] if n_bytes is None else [(of, place, 4 * 8 if n_bytes else 0)])


def test_the_speed_is_two_operations_for_each_entry_of_a_product(monkeypatch):
    clock = iter([0.0, 0.05, 0.1, 0.25, 0.25])
    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: next(clock))
    ones = torch.ones(2, 2)
    monkeypatch.setattr(torch, "ones", lambda *shape, dtype, device: ones if shape == (1024, 1024) else None)
    assert dry_run._speed(torch.float32, torch.device("cpu")) == 2 * 1024**3 * 2 / 0.25
