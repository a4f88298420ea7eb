"""Prompts -> vectors: by the base model's own middle layer, or by a sentence encoder.

A bank finds tasks like a new one by what their prompts look like, so a text counts without its answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.errors import LoraInitError
from lora_init.layers.masks import IGNORED
from lora_init.layers.running import evaluating, on_device_of
from lora_init.loading.models import LoadedModel

MOST_PROMPTS = 128  # as many as one condition of Drag-and-Drop LLMs has (arXiv 2506.16406, its code)


@torch.no_grad()
def embed(
    model: nn.Module, batches: Iterable[Any], tokenizer: Any = None, encoder: LoadedModel | None = None
) -> Tensor:
    """Embed the prompts of some batches, at most 128: the mean hidden state over a prompt's tokens, float32 [n, d].

    Without an encoder the middle layer of the base model is read, else the last layer of the encoder.
    """
    states: list[Tensor] = []
    with evaluating(model):
        for ids, prompt in islice(_prompts(batches), MOST_PROMPTS):
            # One prompt a pass, so that no padding is averaged.
            if encoder is None:
                states.append(_mean_state(model, ids[prompt][None], middle=True))
            else:  # which has other tokens
                text = tokenizer.decode(ids[prompt], skip_special_tokens=True)
                encoder_ids = encoder.tokenizer(text, return_tensors="pt", truncation=True)["input_ids"]
                states.append(_mean_state(encoder.model, encoder_ids, middle=False))
    if not states:
        raise LoraInitError("there is no prompt to embed: the batches have no text. Pass at least one example.")
    embeddings = torch.stack(states)
    if not bool(embeddings.isfinite().all()):
        raise LoraInitError(f"{type(encoder.model if encoder else model).__name__} makes NaN or inf of a prompt.")
    return embeddings


def _prompts(batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tokens of each text, int64 [n], and which of them are its prompt, bool [n]."""
    for batch in batches:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise LoraInitError("a batch has no input_ids, and a bank embeds text. Pass batches of load_batches().")
        ids = batch["input_ids"]
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
        labels, prompts = batch.get("labels"), mask
        if labels is not None and labels.shape == ids.shape:  # a label a token, and not one of a class
            prompts = mask & (labels == IGNORED)
        for row, attended, prompt in zip(ids, mask, prompts, strict=True):
            # A text that has labels throughout has no prompt of its own, and counts whole.
            yield row, prompt if prompt.any() else attended


def _mean_state(model: nn.Module, ids: Tensor, middle: bool) -> Tensor:
    """Return the mean over tokens of the hidden states of one layer, float32 [d], on the CPU."""
    body: Any = getattr(model, "base_model", model)  # without a head, which is not needed
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):  # its decoder would want inputs, too
        body = model.get_encoder()  # type: ignore[operator]
    moved = on_device_of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    states = getattr(body(**moved, output_hidden_states=True), "hidden_states", None)
    if not states:
        raise LoraInitError(f"{type(model).__name__} returns no hidden states to embed prompts by. Pass an encoder.")
    state: Tensor = states[len(states) // 2 if middle else -1][0]  # [tokens, d], of the only text
    return state.float().mean(0).cpu()
