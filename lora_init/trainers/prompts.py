"""Reinforcement learning in TRL: the data are prompts, and the model itself gives the answers that it is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_init.adapters.model_handles import ModelHandle
from lora_init.errors import LoraInitError
from lora_init.layers.masks import IGNORED
from lora_init.trainers.trl import TRLIntegration

_SAMPLED_BY = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class PromptIntegration(TRLIntegration):
    """GRPOTrainer and RLOOTrainer; the statistics are of prompts with one answer each, as training samples them."""

    def find_handle(self) -> ModelHandle:
        """Find how the model holds an adapter; without it the model is the reference."""
        handle = super().find_handle()
        handle.base_stays = f"{self.name} compares what it trains with the model without its adapter"
        return handle

    @torch.no_grad()
    def batches(self, loader: Any) -> Iterator[Any]:
        """Sample an answer to each prompt, in the trainer's own way of doing so."""
        trainer, model, before = self.trainer, self.handle.model, None
        for rows in loader:
            # Each prompt comes once for every answer of its group. Not a set: messages have no hash.
            prompts: list[Any] = []
            for row in rows:
                prompt = row.get("prompt")
                if prompt not in prompts:
                    prompts.append(prompt)
            if prompts == before:  # each batch of prompts comes again for every step of its group
                continue
            before = prompts
            yield answered(prompts, trainer, model)


def answered(prompts: list[Any], trainer: Any, model: Any) -> dict[str, Tensor]:
    """Let the model answer prompts, and return a batch of prompts with their answers, padded on the left."""
    tokenizer, args = trainer.processing_class, trainer.args
    chats = all(isinstance(prompt, list) for prompt in prompts)
    if not chats and not all(isinstance(prompt, str) for prompt in prompts):
        raise LoraInitError(
            f"the batches of {type(trainer).__name__} have no column prompt of texts or messages. Initialize the plain "
            "model on load_batches(...), and give the trainer the result."
        )
    if chats:
        more = getattr(args, "chat_template_kwargs", None) or {}
        render = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True, **more)
        prompts = [render(prompt) for prompt in prompts]
    # On the left, so that every answer begins where its prompt ends. A chat template writes special tokens itself.
    tokens = tokenizer(
        text=prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not chats
    )
    ids, is_prompt = tokens["input_ids"].to(model.device), tokens["attention_mask"].to(model.device)
    sampling = _sampling(trainer)
    whole = model.generate(input_ids=ids, attention_mask=is_prompt, **sampling)  # prompts x (length + answer)
    length, ends = ids.shape[1], sampling.get("eos_token_id", model.generation_config.eos_token_id)
    if ends is None:
        ends = []
    ended = torch.isin(whole[:, length:], torch.as_tensor(ends, device=whole.device)).long()
    # Tokens after the first end are padding. Up to there the running number of ends is what `ended` is, 0 and at the
    # end 1; afterwards it is larger. So the first end counts, too.
    is_answer = (ended.cumsum(1) == ended).long()
    mask = torch.cat([is_prompt, is_answer], dim=1)
    labels = whole.masked_fill(mask == 0, IGNORED)
    labels[:, :length] = IGNORED
    return {"input_ids": whole, "attention_mask": mask, "labels": labels}


def _sampling(trainer: Any) -> dict[str, Any]:
    """Return the trainer's own settings of `generate`; what it leaves open is the checkpoint's, as it is in training.

    A trainer with vLLM has none. Its arguments are used then, but for those that only vLLM knows.
    """
    args = trainer.args
    settings = getattr(trainer, "generation_kwargs", None)
    if settings is None:
        wanted = {name: getattr(args, name) for name in _SAMPLED_BY} | (args.generation_kwargs or {})
        settings = {name: value for name, value in wanted.items() if hasattr(trainer.model.generation_config, name)}
        settings |= {"do_sample": True, "max_new_tokens": args.max_completion_length}
    return {name: value for name, value in settings.items() if value is not None}
