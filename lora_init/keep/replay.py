"""Text that a model writes by itself, which stands for what it knows: for training beside a task, and for `dial`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from lora_init.errors import LoraInitError, check_number, check_switches
from lora_init.layers.running import disabled, evaluating, restoring
from lora_init.layers.wrappers import without_adapter
from lora_init.loading.batches import check_tokenizer, pad_batch, padding_token
from lora_init.packages import check_takes
from lora_init.progress import Progress, Say

# What a model writes stands in for real text if it is plain text: a small model ends answers to short questions after a
# few words, and then less is kept (benchmarks/STUDIES.md). So the dial uses text; `chat` is to be mixed with chats.

_FORMS = (
    "Explain {}.", "Write a short story about {}.", "What should I know about {}?", "List five facts about {}.",
    "Write a dialogue about {}.", "Give me advice on {}.",
)  # fmt: skip
_TOPICS = (
    "the sea", "cooking", "a computer program", "history", "mathematics", "health", "a journey", "money", "animals",
    "music", "school", "the law", "friendship", "the weather", "engines", "language",
)  # fmt: skip
_QUESTIONS = [form.format(topic) for topic in _TOPICS for form in _FORMS]
_BATCH = 32  # texts that are written at once
TEXTS = 256  # of the command, too
LENGTH = 64  # tokens of a text


def replay(
    model: Any, tokenizer: Any, n: int = TEXTS, length: int = LENGTH, seed: int = 0, chat: bool = False,
    say: Say = lambda text: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Let a model write texts at temperature 1; of a PEFT model the base writes.

    A text begins with a token drawn from the whole vocabulary, so that few texts begin alike. All texts have the length
    asked for, since the end is never drawn. Every other token is drawn from the model's own distribution: settings for
    generation that a checkpoint brings along are ignored.

    Args:
        model: A causal language model of transformers, or a PEFT model of one.
        tokenizer: Its tokenizer.
        n: Number of texts.
        length: New tokens of a text; with `chat`, the most tokens of an answer.
        seed: Seed of the tokens that are drawn.
        chat: Ask short questions by the chat template instead. A small model's answers end after a few tokens.
        say: Receives lines about the progress.

    Returns:
        Rows that `load_batches` reads: `text`, or `messages` of a question and the answer.

    Raises:
        LoraInitError: The model cannot write, or writes nothing; a chat without a chat template.
    """
    rows: list[dict[str, Any]] = []
    with closing(_write(model, tokenizer, n, length, seed, chat, say)) as written:
        for question, ids in written:
            text = tokenizer.decode(ids, skip_special_tokens=True)
            if not text.strip():
                continue
            if chat:
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
                rows.append({"messages": turns})
            else:
                rows.append({"text": text})
            if len(rows) == n:
                return rows
    if not rows:
        raise LoraInitError(f"{type(model).__name__} writes only empty texts. Pass text to keep instead.")
    return rows


def replayed(
    model: Any, tokenizer: Any, n: int, seed: int, batch_size: int, say: Say = lambda text: None
) -> list[dict[str, Tensor]]:
    """Let a model write texts as for `replay`, and return batches of the tokens that it drew.

    Text that is read back has other tokens, and an end that it never had: an adapter that ends early would seem to keep
    what the model knew.
    """
    with closing(_write(model, tokenizer, n, LENGTH, seed, False, say)) as written:
        texts = [(ids, ids) for _, ids in islice(written, n)]  # every token is a label, too
    return [pad_batch(texts[i : i + batch_size], padding_token(tokenizer)) for i in range(0, n, batch_size)]


def _write(
    model: Any, tokenizer: Any, n: int, length: int, seed: int, chat: bool, say: Say
) -> Generator[tuple[str, list[int]], None, None]:
    """Yield what a model writes, each with the question that a chat begins with.

    A caller that stops early closes the generator: only then do the model and the random state become as they were.
    """
    check_switches(chat=chat)
    check_number("n", n, 1, whole=True)
    check_number("length", length, 1, whole=True)
    check_number("seed", seed, -(2**63), whole=True)
    check_takes(say, "say=", "text")
    check_tokenizer(tokenizer)
    if not hasattr(model, "generate") or getattr(model.config, "is_encoder_decoder", False):
        raise LoraInitError(f"{type(model).__name__} continues no text. Pass text to keep instead.")
    check_texts(model.config, tokenizer, length, chat)
    # An embedding may be padded beyond the vocabulary, and a tokenizer may have tokens that the model lacks.
    n_tokens = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    device = model.device
    base: AbstractContextManager[Any] = nullcontext()
    if hasattr(model, "disable_adapter"):
        base = disabled(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(model), base:
        torch.manual_seed(int(seed))  # which takes no number of numpy
        progress = Progress(n, say)
        for first in range(0, 4 * n, _BATCH):  # some texts end before they begin
            # 37 has no divisor in common with the number of questions: all are asked before one comes again, and
            # neighbors differ in topic and in form.
            questions = [_QUESTIONS[(first + i) * 37 % len(_QUESTIONS)] for i in range(_BATCH)]
            first_tokens = torch.randint(n_tokens, (_BATCH, 1)).tolist()
            prompts = first_tokens
            if chat:
                prompts = [_question(tokenizer, question) for question in questions]
            texts = sample_texts(model, prompts, length, padding_token(tokenizer), _ends(model, tokenizer), chat)
            progress.ended(f"{min(first + _BATCH, n)} of {n} texts written", _BATCH)
            for question, prompt, text in zip(questions, prompts, texts, strict=True):
                # Of plain text the token that was drawn is a part; of a chat the question is not a part of the answer.
                yield question, text if chat else prompt + text


def check_texts(config: Any, tokenizer: Any, length: int, chat: bool) -> None:
    """Refuse a chat without a template, and texts for which a model has no positions; the last token needs none."""
    if chat and not getattr(tokenizer, "chat_template", None):
        raise LoraInitError(
            "the tokenizer has no chat template, so it can ask no question. Leave {chat} out.", chat=True
        )
    longest_prompt = 1
    if chat:
        longest_prompt = max(len(_question(tokenizer, question)) for question in _QUESTIONS)
    tokens = length + longest_prompt
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    # The last token is drawn, and never read.
    if isinstance(most, int) and tokens - 1 > most:
        raise LoraInitError(
            f"{{length}}: with its beginning a text has {tokens} tokens, and the model takes {most}.", length=length
        )


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Collect the tokens that end a text; a checkpoint may name several, and others than its tokenizer."""
    ends: set[Any] = set()
    for tokens in (getattr(model.generation_config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if isinstance(tokens, list):
            ends.update(tokens)
        else:
            ends.add(tokens)
    return sorted(ends - {None})


def sample_texts(
    model: Any, prompts: list[list[int]], length: int, pad: int, ends: list[int], stops: bool
) -> list[list[int]]:
    """Draw tokens from the model's own distribution; the tokens `ends` end a text if it `stops`, or are never drawn.

    Settings for generation that a checkpoint brings along, such as penalties or the likeliest tokens, do not count.
    """
    plain: Any = without_adapter(model)
    longest = max(map(len, prompts))
    # On the left, so that every text goes on where its prompt ends: prompts -> [prompts, longest].
    ids, mask = [], []
    for prompt in prompts:
        n_pad = longest - len(prompt)
        ids.append([pad] * n_pad + prompt)
        mask.append([0] * n_pad + [1] * len(prompt))
    final, suppressed = None, None
    if stops:
        final = ends or None
    else:
        suppressed = ends or None
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, top_k=0, max_new_tokens=length, pad_token_id=pad, eos_token_id=final, suppress_tokens=suppressed
    )
    inputs = torch.tensor(ids, device=model.device)
    is_text = torch.tensor(mask, device=model.device)
    # Not as an argument: `generate` fills what is left open there from the model's own settings.
    with restoring("generation_config", [plain]):
        plain.generation_config = settings
        texts = plain.generate(input_ids=inputs, attention_mask=is_text)
    return list(texts[:, longest:].tolist())  # without the prompts


def _question(tokenizer: Any, question: str) -> list[int]:
    turns = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"])
