"""Text that a model writes by itself, which stands for what it knows: for training beside a task, and for `dial`."""

from __future__ import annotations

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

    A text begins with a token drawn from the whole vocabulary, so that few begin alike, and is as long as asked for.

    Args:
        model: A causal language model of transformers, or a PEFT model of one.
        tokenizer: Its tokenizer.
        n: Number of texts.
        length: New tokens of a text, of an answer at most.
        seed: Seed of what is drawn.
        chat: Ask short questions by the chat template in place of it. A small model's answers end after a few tokens.

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
    place, pad = model.device, padding_token(tokenizer)
    n_tokens = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    base = model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
    with torch.random.fork_rng([place] if place.type == "cuda" else []), evaluating(model), base:
        torch.manual_seed(seed)
        for first in range(0, n, _BATCH):
            asked = [questions[(first + i) * 37 % len(questions)] for i in range(_BATCH)]
            drawn = torch.randint(n_tokens, (_BATCH, 1)).tolist()
            prompts = [_question(tokenizer, one) for one in asked] if chat else drawn
            longest = max(map(len, prompts))
            ids = torch.tensor([[pad] * (longest - len(one)) + one for one in prompts], device=place)
            mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=place)
            answers = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=length, min_new_tokens=0 if chat else length, pad_token_id=pad,
            )  # fmt: skip
            yield from zip(asked, answers[:, longest if chat else 0 :].tolist(), strict=True)


def _question(tokenizer: Any, question: str) -> list[int]:
    """Write a question in the chat template."""
    turns = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"])
