"""Tasks that a tiny model can learn in seconds: an answer that the task's own rule gives to each prompt."""

import torch
from peft import LoraConfig, get_peft_model

from lora_init.bank.embeddings import embed
from lora_init.bank.store import Bank, add_entry
from lora_init.layers.identity import fingerprint
from lora_init.serving.trained import read_trained
from tests.conftest import tiny_llama

IGNORED = -100


def base():
    torch.manual_seed(0)
    return tiny_llama()


def batches(task, n=8, seed=0):
    """Prompts of tokens that are the task's own, and one answer for all of them."""
    generator = torch.Generator().manual_seed(1000 * task + seed)
    made = []
    for _ in range(n):
        ids = torch.randint(3 + 10 * task, 13 + 10 * task, (4, 8), generator=generator)
        ids[:, -2:] = 60 - task
        labels = ids.clone()
        labels[:, :-2] = IGNORED
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def train(task, folder, steps=30, rank=4, seed=0):
    """Train an adapter for a task from PEFT's random start and save it."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(base(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for step in range(steps):
        batch = batches(task, 8, seed=1)[step % 8]
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def add(bank, task, folder, name=None, **more):
    """Add a trained adapter to a bank in Python."""
    model = base()
    new = Bank(bank, more.pop("fingerprint", fingerprint(model)), more.pop("model", "a Llama"), more.pop("encoder", ""))
    about = dict(task=f"task{task}", data="made")
    return add_entry(new, name or f"task{task}", read_trained(folder), embed(model, batches(task)), **(about | more))


def fit(base, batches, seed, wrong=False):
    """Put an adapter of rank 2 on a model and train it on each batch once; the wrong way round, if asked."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch).loss
        (-loss if wrong else loss).backward()
        optimizer.step()
    return model
