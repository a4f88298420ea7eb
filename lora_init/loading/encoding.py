"""One example -> tokens and labels, and several of them -> a batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypeVar

from lora_init.errors import LoraInitError
from lora_init.loading.examples import Example

if TYPE_CHECKING:
    from torch import Tensor

# Batches are cut from pools of this many: long pools save padding, short ones keep every stretch of a pass mixed.
_POOL = 8

Encoded = tuple[list[int], list[int]]  # tokens and labels of one example, not padded
_T = TypeVar("_T")

IGNORED = -100  # as in `masks`, which would bring torch along


def encode(example: Example, tokenizer: Any, limit: int, seq2seq: bool) -> Encoded | None:
    """Tokenise prompt and answer as one text, as training does: tokens at the seam differ from those of the parts."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=not example.rendered, verbose=False)["input_ids"])

    if seq2seq:
        before = example.labelled[0][0] if len(example.labelled) == 1 else ""
        if not before.strip() or not example.text.startswith(before):
            raise LoraInitError(
                "an encoder-decoder model needs a prompt and one completion. Use prompt and completion."
            )
        return _cut(tokens(before), tokenizer, limit), _cut(tokens(example.text[len(before) :]), tokenizer, limit)
    ids = tokens(example.text)
    if not ids:
        return None
    labels = [IGNORED] * len(ids)
    for before, until in example.labelled:
        start = _common(tokens(before), ids) if before else 0
        end = len(ids) if until == example.text else _common(tokens(until), ids)
        labels[start:end] = ids[start:end]
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is not None and ids[-1] != eos and not example.rendered:  # where the answer ends is a thing to learn
        ids.append(eos)
        labels.append(eos)
    cut = _cut(ids, tokenizer, limit)
    return cut, labels[:limit] if cut == ids[:limit] else [*labels[: limit - 1], IGNORED]


def _cut(ids: list[int], tokenizer: Any, limit: int) -> list[int]:
    """Truncate at the end, but keep the separator that encoders such as BERT expect there."""
    if len(ids) > limit and ids[-1] == getattr(tokenizer, "sep_token_id", None):
        return [*ids[: limit - 1], ids[-1]]
    return ids[:limit]


def _common(prefix: list[int], ids: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prefix, ids, strict=False)))


def group_by_length(items: Sequence[_T], batch_size: int, seed: int, length: Callable[[_T], int]) -> Iterator[list[_T]]:
    """Cut pools of random examples into batches of similar length, in random order within the pool."""
    rng = random.Random(seed)
    size = _POOL * batch_size
    for start in range(0, len(items), size):
        pool = sorted(items[start : start + size], key=length)
        groups = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        rng.shuffle(groups)
        yield from groups


def padding_token(tokenizer: Any) -> int:
    """Choose the token to pad with: the tokenizer's, or the one that ends a sequence, or 0."""
    found = (tokenizer.pad_token_id, getattr(tokenizer, "eos_token_id", None))
    return next((token for token in found if token is not None), 0)


def pad_batch(examples: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
    """Pad examples on the right to one length: `input_ids`, `attention_mask`, `labels`, each int64 [batch, length]."""
    import torch

    def stack(rows: list[list[int]], filler: int) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + [filler] * (width - len(row)) for row in rows])  # [batch, length]

    ids = [ids for ids, _ in examples]
    return {
        "input_ids": stack(ids, pad),
        "attention_mask": stack([[1] * len(row) for row in ids], 0),
        "labels": stack([labels for _, labels in examples], IGNORED),
    }
