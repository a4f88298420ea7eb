"""Text that a model writes by itself, which stands for what it knows: for training beside a task, and for `dial`."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Generator
from contextlib import closing, nullcontext
from typing import Any

import torch
from torch import Tensor

from lora_init.errors import LoraInitError
from lora_init.layers.running import evaluating
from lora_init.loading.batches import pad_batch, padding_token

_ASKED = (
    "Explain {}.", "Write a short story about {}.", "What should I know about {}?", "List five facts about {}.",
    "Write a dialogue about {}.", "Give me advice on {}.",
)  # fmt: skip
_TOPICS = (
    "the sea", "cooking", "a computer program", "history", "mathematics", "health", "a journey", "money", "animals",
    "music", "school", "the law", "friendship", "the weather", "engines", "language",
)  # fmt: skip
_BATCH = 32
_CACHES = ("cache", "past_key_values")  # what transformers calls it, newest first
LENGTH = 64  # tokens of a text


def replay(
    model: Any,
    tokenizer: Any,
    n: int = 64,
    length: int = LENGTH,
    seed: int = 0,
    chat: bool = False,
) -> list[dict[str, Any]]:
    """Let a model write texts at temperature 1; of a PEFT model the base does.

    A text begins with a token drawn from the whole vocabulary, so that few begin alike, and is as long as asked for: an
    end is never drawn. All else is as the model's distribution has it, whatever the checkpoint says on generation.

    Args:
        model: A causal language model of transformers, or a PEFT model of one.
        tokenizer: Its tokenizer.
        n: Number of texts.
        length: New tokens of a text, of an answer at most.
        seed: Seed of what is drawn.
        chat: Ask short questions by the chat template instead. A small model's answers end after a few tokens.

    Returns:
        Rows that `load_batches` reads: `text`, or `messages` of a question and the answer.

    Raises:
        LoraInitError: The model cannot write, or writes nothing; a chat without a chat template.
    """
    rows: list[dict[str, Any]] = []
    with closing(_write(model, tokenizer, 4 * n, length, seed, chat)) as written:  # some texts end before they begin
        for question, ids in written:
            text = tokenizer.decode(ids, skip_special_tokens=True)
            if text.strip():
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
                rows.append({"messages": turns} if chat else {"text": text})
            if len(rows) == n:
                return rows
    if not rows:
        raise LoraInitError(f"{type(model).__name__} writes only empty texts. Pass text to keep instead.")
    return rows


def replayed(model: Any, tokenizer: Any, n: int, seed: int, batch_size: int) -> list[dict[str, Tensor]]:
    """Let a model write texts as for `replay`, and return batches of the tokens that it drew.

    Text that is read back has other tokens, and an end that it never had: an adapter that ends early would seem to keep
    what the model knew.
    """
    texts = [(ids, ids) for _, ids in _write(model, tokenizer, n, seed=seed)][:n]
    return [pad_batch(texts[i : i + batch_size], padding_token(tokenizer)) for i in range(0, n, batch_size)]


def _write(
    model: Any, tokenizer: Any, n: int, length: int = LENGTH, seed: int = 0, chat: bool = False
) -> Generator[tuple[str, list[int]], None, None]:
    """Yield what a model writes, and for a chat the question before it."""
    if min(n, length) < 1:
        raise LoraInitError(f"n={n} and length={length} must be at least 1.")
    if not hasattr(model, "generate") or getattr(model.config, "is_encoder_decoder", False):
        raise LoraInitError(f"{type(model).__name__} continues no text. Pass text to keep instead.")
    if chat and not tokenizer.chat_template:
        raise LoraInitError("the tokenizer has no chat template, so it can ask no question. Leave chat away.")
    questions = [form.format(topic) for topic in _TOPICS for form in _ASKED]
    check_length(model.config, length + max(len(_question(tokenizer, one)) if chat else 1 for one in questions), length)
    n_tokens = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    place, base = model.device, model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
    with torch.random.fork_rng([place] if place.type == "cuda" else []), evaluating(model), base:
        torch.manual_seed(seed)
        for first in range(0, n, _BATCH):
            asked = [questions[(first + i) * 37 % len(questions)] for i in range(_BATCH)]
            drawn = torch.randint(n_tokens, (_BATCH, 1)).tolist()
            prompts = [_question(tokenizer, one) for one in asked] if chat else drawn
            texts = _sample(model, prompts, length, padding_token(tokenizer), _ends(model, tokenizer), chat)
            yield from zip(asked, texts if chat else map(operator.add, drawn, texts), strict=True)


def check_length(config: Any, tokens: int, length: int) -> None:
    """Refuse texts for which a model has no positions; the last token needs none."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and tokens - 1 > most:
        raise LoraInitError(
            f"length={length}: with its beginning a text has {tokens} tokens, and the model takes {most}."
        )


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Find the tokens at which the model stops."""
    found = [getattr(model.generation_config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    return sorted({token for one in found for token in (one if isinstance(one, list) else [one]) if token is not None})


@torch.inference_mode()
def _sample(
    model: Any, prompts: list[list[int]], length: int, pad: int, ends: list[int], stops: bool
) -> list[list[int]]:
    """Draw tokens from the model's own distribution; what ends a text does so, or else is never drawn.

    Not by `generate`, which does what the checkpoint says: penalties, the likeliest tokens, processors of its own.
    """
    plain, longest = model.get_base_model() if hasattr(model, "get_base_model") else model, max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(one)) + one for one in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=model.device)
    ended, cache = torch.zeros(len(ids), dtype=torch.bool, device=ids.device), None
    takes = inspect.signature(plain.forward).parameters
    kept = next((name for name in _CACHES if name in takes), "")
    for _ in range(length):
        new = ids if cache is None else ids[:, -1:]
        inputs = {"input_ids": new, "attention_mask": mask, kept: cache, "use_cache": bool(kept)}
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
        output = plain(**{name: value for name, value in inputs.items() if name in takes})
        cache = getattr(output, kept, None)  # without one, all is read again
        logits = output.logits[:, -1].float()
        if not stops:
            logits[:, ends] = -torch.inf
        token = torch.multinomial(logits.softmax(-1), 1).masked_fill(ended[:, None], pad)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        ended |= torch.isin(token[:, 0], torch.tensor(ends, device=ids.device)) & stops
        if bool(ended.all()):
            break
    return list(ids[:, longest:].tolist())


def _question(tokenizer: Any, question: str) -> list[int]:
    """Write a question in the chat template."""
    turns = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"])
