"""Text that a model writes by itself, which stands for what it knows: for training beside a task, and for `dial`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from lora_init.errors import LoraInitError
from lora_init.layers.running import evaluating
from lora_init.loading.batches import padding_token

_ASKED = (
    "Explain {}.", "Write a short story about {}.", "What should I know about {}?", "List five facts about {}.",
    "Write a dialogue about {}.", "Give me advice on {}.",
)  # fmt: skip
_TOPICS = (
    "the sea", "cooking", "a computer program", "history", "mathematics", "health", "a journey", "money", "animals",
    "music", "school", "the law", "friendship", "the weather", "engines", "language",
)  # fmt: skip
_BATCH = 32


def replay(
    model: Any,
    tokenizer: Any,
    n: int = 64,
    length: int = 64,
    seed: int = 0,
    chat: bool | None = None,
) -> list[dict[str, Any]]:
    """Let a model write texts at temperature 1; of a PEFT model the base does.

    From the empty prompt, or for a chat from short questions that are asked by its template.

    Args:
        model: A causal language model of transformers, or a PEFT model of one.
        tokenizer: Its tokenizer.
        n: Number of texts.
        length: New tokens of a text at most.
        seed: Seed of what is drawn.
        chat: Whether to ask for answers. Default: if the tokenizer has a chat template.

    Returns:
        Rows that `load_batches` reads: `text`, or `messages` of a question and the answer.

    Raises:
        LoraInitError: The model cannot write, or writes nothing.
    """
    if not hasattr(model, "generate") or getattr(model.config, "is_encoder_decoder", False):
        raise LoraInitError(f"{type(model).__name__} continues no text. Pass text to keep instead.")
    chat = bool(tokenizer.chat_template) if chat is None else chat
    questions = [form.format(topic) for topic in _TOPICS for form in _ASKED] if chat else [""]
    place, rows = model.device, []
    pad = padding_token(tokenizer)
    with torch.random.fork_rng([place] if place.type == "cuda" else []), evaluating(model), _base_of(model):
        torch.manual_seed(seed)
        for first in range(0, 4 * n, _BATCH):  # some texts end before they begin
            asked = [questions[(first + i) * 37 % len(questions)] for i in range(_BATCH)]
            prompts = [_tokens(tokenizer, question) for question in asked]
            longest = max(map(len, prompts))
            ids = torch.tensor([[pad] * (longest - len(one)) + one for one in prompts], device=place)
            mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=place)
            written = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=length, pad_token_id=pad,
            )  # fmt: skip
            for question, answer in zip(asked, written[:, longest:], strict=True):
                text = tokenizer.decode(answer, skip_special_tokens=True)
                if text.strip():
                    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
                    rows.append({"messages": turns} if chat else {"text": text})
            if len(rows) >= n:
                return rows[:n]
    if not rows:
        raise LoraInitError(f"{type(model).__name__} writes only empty texts. Pass text to keep instead.")
    return rows


def _tokens(tokenizer: Any, question: str) -> list[int]:
    """Write a prompt: a question in the chat template, or what a text begins with."""
    if question:
        turns = [{"role": "user", "content": question}]
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"])
    found = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return [next((token for token in found if token is not None), padding_token(tokenizer))]


def _base_of(model: Any) -> Any:
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
