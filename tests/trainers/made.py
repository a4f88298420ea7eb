"""A model with LoRA layers of its library, and what a door reads of a trainer."""

import torch
from peft import LoraConfig, inject_adapter_in_model

CONFIG = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


def seen_by(door, monkeypatch):
    """Collect the batches that a door hands out from here on, as they were then."""
    seen, inner = [], door.batches

    def record(one, loader):
        for batch in inner(one, loader):
            seen.append({key: value.clone() for key, value in batch.items() if isinstance(value, torch.Tensor)})
            yield batch

    monkeypatch.setattr(door, "batches", record)
    return seen


def add_adapter(model, **changes):
    config = LoraConfig(**CONFIG | changes)
    try:
        model.add_adapter(config)
    except ValueError as error:  # transformers 5.24 asks for a PEFT that is not released; it does what follows
        assert "version" in str(error)
        inject_adapter_in_model(config, model)
        model._hf_peft_config_loaded = True
    return model
