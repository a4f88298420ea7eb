"""A model with LoRA layers of its library, and what an integration reads of a trainer."""

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from tests.conftest import tiny_llama

WORDS = "a the cat dog sat ran on mat road to is big red what where user assistant".split()  # noqa: SIM905
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"
CONFIG = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


def seen_by(integration, monkeypatch):
    """Collect the batches that an integration hands out from here on, as they were then."""
    seen, inner = [], integration.batches

    def record(one, loader):
        for batch in inner(one, loader):
            seen.append({key: value.clone() for key, value in batch.items() if isinstance(value, torch.Tensor)})
            yield batch

    monkeypatch.setattr(integration, "batches", record)
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


def sentences(n=40):
    return [" ".join(WORDS[(i * k) % 12] for k in range(3, 9)) for i in range(1, n + 1)]


def chats():
    return Dataset.from_list([{"prompt": f"what is {text}", "completion": f" {text}"} for text in sentences()])


def settings(kind, tmp_path, **more):
    base = dict(output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=4, logging_steps=1)
    base |= dict(report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=1e-2)
    return kind(**base | more)


def plain(tmp_path, tokenizer, model=None, **more):
    ids = [tokenizer(text)["input_ids"] for text in sentences()]
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    collator = DataCollatorForSeq2Seq(tokenizer)
    return Trainer(model or tiny_llama(), settings(TrainingArguments, tmp_path, **more), collator, data)


def of_class(kind):
    def make(*given):
        trainer = plain(*given)
        return kind(trainer.model, trainer.args, trainer.data_collator, trainer.train_dataset)

    return make
