"""The whole path on a model small enough to watch: collect, allocate, build, save, load, train.

    python examples/quickstart.py

Everything is random and made here, so it runs offline in a few seconds.
"""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import lora_init


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_batches(n_batches: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Sequences that count upwards in steps of one to four, as a tokenizer would return them."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(n_batches):
        start, step = (torch.randint(1, high, (8, 1), generator=generator) for high in (61, 5))
        ids = 3 + (start + step * torch.arange(16)) % 61
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return batches


def main() -> None:
    model = make_model()

    # Once: what does each layer see? The file serves any rank up to the one it was collected for.
    stats = lora_init.collect(model, make_batches(24, seed=0), rank=4, rho=2.0, progress=False)
    ranks = lora_init.allocate_ranks(stats, rank=4, rho=2.0)
    print(f"{stats.provenance.n_samples} tokens seen; stopped because: {stats.provenance.stop_reason}")
    for name, rank in ranks.items():
        captured = float(stats.explained_variance_ratio(name)[:rank].sum())
        print(f"  {name:35} rank {rank}, {captured:4.0%} of its input's variance")

    # A standard PEFT directory, which any tool that reads PEFT adapters can load ...
    init = lora_init.build_adapter(stats, ranks)
    with tempfile.TemporaryDirectory() as folder:
        path = init.save_pretrained(Path(folder) / "adapter")
        peft_model = PeftModel.from_pretrained(make_model(), path, is_trainable=True)
    print(f"the adapter has {init.n_parameters():,} parameters in {len(init.ranks)} layers")

    # ... or the same adapter straight onto the model: peft_model = init.apply(model)
    # A model of this size wants a higher rate than a real one, which trains at what `lora-init init` prints.
    optimizer = torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=2e-2)
    for step, batch in enumerate(make_batches(61, seed=1)):
        loss = peft_model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step:2}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
