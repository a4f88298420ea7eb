"""What a row says: columns, a template or chat messages -> one text -> tokens, some of them with labels; its class."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from string import Formatter
from typing import Any

from lora_init.errors import LoraInitError, did_you_mean

Encoded = tuple[list[int], list[int]]  # tokens and labels of one example, not padded
IGNORED = -100  # the label of a token that has none, as in layers.masks
NO_COMPLETION = "a classification has no completion: the class is what --label names. Leave it out."
_MOST_CLASSES = 100


@dataclass(frozen=True)
class Example:
    """One row as text. `labelled`: for each labelled stretch, the text before it, and the text up to its end."""

    text: str
    labelled: Sequence[tuple[str, str]]
    rendered: bool = False  # by a chat template, so special tokens are already in the text


@dataclass(frozen=True)
class Recipe:
    """How rows become examples.

    Attributes:
        name: What to call it: the columns or the templates.
        columns: Columns that are read.
        to_example: From a row to an example; None if a field is empty.
    """

    name: str
    columns: list[str]
    to_example: Callable[[Mapping[str, Any]], Example | None]


# Columns of each format. The first whose columns are there is taken.
FORMATS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_OPTIONAL = ("tools", "chat_template_kwargs", "input")


def recipe(
    names: list[str],
    label: str,
    tokenizer: Any,
    template: str | None = None,
    completion: str | None = None,
    data_format: str | None = None,
) -> Recipe:
    """Decide how to read rows with columns `names`, and refuse what the columns or the tokenizer do not allow."""
    if data_format is not None and (template is not None or data_format not in FORMATS):
        unknown = f"is unknown. {did_you_mean(str(data_format), FORMATS)}"
        both = "and a template say two things. Give one."
        raise LoraInitError(f"format={data_format!r} {unknown if template is None else both}")
    if template is not None:
        return _template_recipe(names, label, template, completion)
    if completion is not None:
        raise LoraInitError(f"completion={completion!r} needs a template for the prompt, too.")
    possible = FORMATS if data_format is None else {data_format: FORMATS[data_format]}
    found = next((name for name, columns in possible.items() if set(columns) <= set(names)), None)
    if found is None:
        expected = ", or ".join(" and ".join(columns) for columns in possible.values())
        answer = f" with the completion ' {{{names[1]}}}'" if len(names) == 2 else ""
        raise LoraInitError(
            f"{label} has the columns {', '.join(names)}. Expected {expected}; "
            f"name others in a template, such as '{{{names[0] if names else 'column'}}}'{answer}."
        )
    if found in ("messages", "sharegpt") and not getattr(tokenizer, "chat_template", None):
        raise LoraInitError(
            f"{label} has a column {FORMATS[found][0]!r}, but this tokenizer has no chat template. "
            "Use an instruction-tuned model's tokenizer, or name columns in a template."
        )
    columns = [*FORMATS[found], *(name for name in _OPTIONAL if name in names)]
    return Recipe(found.replace("-", " and "), columns, lambda row: _read(found, row, tokenizer))


def _template_recipe(names: list[str], label: str, template: str, completion: str | None) -> Recipe:
    prompt, used = _parse(template, "template", names, label)
    if completion is None:
        return Recipe(f"template {template!r}", used, lambda row: _plain("", _fill(prompt, row)))
    answer, more = _parse(completion, "completion", names, label)
    return Recipe(
        f"template {template!r} and completion {completion!r}",
        [*dict.fromkeys(used + more)],
        lambda row: _plain(_fill(prompt, row), _fill(answer, row)),
    )


def class_names(rows: Any, name: str, column: str, used: Collection[str], known: Sequence[str] = ()) -> tuple[str, ...]:
    """Name the classes of a column in the order in which labels count them.

    That is the checkpoint's order if it `known` them all, so that its head keeps its meaning; else the order of their
    numbers, if they are numbers, so that 0, 1, 2 stay what they are; else that of their names.

    Args:
        rows: A `datasets.Dataset`.
        name: What to call the data.
        column: Column of the class.
        used: Columns that the text is from.
        known: Classes of the checkpoint, in its order.

    Raises:
        LoraInitError: No such column, or it is a part of the text; too few or too many values for classes.
    """
    if column not in rows.column_names:
        raise LoraInitError(f"label={column!r} is not a column. Columns of {name}: {', '.join(rows.column_names)}.")
    values = {str(value) for value in rows[column] if value is not None}
    if not 2 <= len(values) <= _MOST_CLASSES:
        raise LoraInitError(
            f"{name}: column {column!r} has {len(values)} different values, and a classification needs 2 to "
            f"{_MOST_CLASSES} classes. Name the column of the class."
        )
    if column in used:
        raise LoraInitError(f"label={column!r} is a part of the text, which gives the class away. Take it out.")
    if values <= set(known):
        return tuple(known)
    return tuple(sorted(values, key=int if all(value.isdecimal() for value in values) else None))


_Parts = list[tuple[str, str | None]]  # literal text, and the column whose value follows it


def _parse(template: str, argument: str, names: list[str], label: str) -> tuple[_Parts, list[str]]:
    """Split a template into its parts and the columns it names.

    Names are only compared with the columns, never evaluated as `str.format` would: `{x.__class__}` is no column.
    """
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise LoraInitError(f"{argument}={template!r}: {error}. Write {{{{ for a brace.") from None
    parts = []
    for literal, name, spec, conversion in parsed:
        if spec or conversion:
            raise LoraInitError(f"{argument}={template!r}: only column names go in braces, without '!' or ':'.")
        if name is not None and name not in names:
            raise LoraInitError(
                f"{argument}={template!r}: {label} has no column {name!r}. Its columns: {', '.join(names)}."
            )
        parts.append((literal, name))
    used = [*dict.fromkeys(name for _, name in parts if name is not None)]
    if not used:
        raise LoraInitError(f"{argument}={template!r} names no column. Columns of {label}: {', '.join(names)}.")
    return parts, used


def _fill(parts: _Parts, row: Mapping[str, Any]) -> str | None:
    """Fill a template; None if a field is null or blank, so that nobody trains on the word "None"."""
    values = {name: _text(row, name) for _, name in parts if name is not None}
    if None in values.values():
        return None
    return "".join(literal + ((values[name] or "") if name is not None else "") for literal, name in parts)


def _text(row: Mapping[str, Any], name: str) -> str | None:
    """Read a field as text, never a list as Python writes it; None if it is null or blank."""
    value = row[name]
    if isinstance(value, (list, Mapping)):
        kind = "a list" if isinstance(value, list) else "a mapping"
        raise LoraInitError(f"column {name!r} holds {kind}, and text is needed. Make it text first, or name another.")
    return None if value is None or not str(value).strip() else str(value)


def _plain(prompt: str | None, answer: str | None) -> Example | None:
    if prompt is None or answer is None:
        return None
    return Example(f"{prompt}{answer}", [(prompt, f"{prompt}{answer}")])


# The prompt of Stanford's Alpaca, as axolotl's `type: alpaca` writes it.
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)


def _read(data_format: str, row: Mapping[str, Any], tokenizer: Any) -> Example | None:
    """Read a row of one of `FORMATS`."""
    if data_format == "text":
        return _plain("", _text(row, "text"))
    if data_format == "alpaca":
        instruction, given = _text(row, "instruction"), _text(row, "input") if "input" in row else None
        context = (", paired with an input that provides further context", f"### Input:\n{given}\n\n")
        before, after = context if given else ("", "")
        return _plain(instruction and _ALPACA.format(before, instruction, after), _text(row, "output"))
    if data_format != "prompt-completion":
        return _chat(row[FORMATS[data_format][0]], row, tokenizer)
    prompt, answer = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(answer, list):  # both as messages, the other form that TRL knows
        return _chat(prompt + answer, row, tokenizer, first=len(prompt))
    return _plain(_text(row, "prompt"), _text(row, "completion"))


def _chat(messages: Any, row: Mapping[str, Any], tokenizer: Any, first: int = 0) -> Example | None:
    """Render messages, with the tools of the row; labels on the assistant's turns from `first` on."""
    if not messages:
        return None
    known = isinstance(messages, list) and all(isinstance(m, Mapping) and {"role", "from"} & set(m) for m in messages)
    if not known:
        raise LoraInitError("messages must be a list of {'role': ..., 'content': ...}.")
    turns = [_turn(message) for message in _without_nulls(messages)]
    options = _without_nulls(row.get("chat_template_kwargs") or {})

    def render(some: Sequence[Mapping[str, Any]], answer_next: bool = False) -> str:
        if not some:
            return ""
        rendered = tokenizer.apply_chat_template(
            some, tools, tokenize=False, add_generation_prompt=answer_next, **options
        )
        return str(rendered)

    try:
        tools = row.get("tools") or None
        tools = json.loads(tools) if isinstance(tools, str) else _without_nulls(tools)
        whole = render(turns)
        spans = [
            _span(turns, i, whole, render) for i, turn in enumerate(turns) if i >= first and turn["role"] == "assistant"
        ]
        return Example(whole, spans, rendered=True)
    except Exception as error:  # a template is a program: it raises what it likes
        raise LoraInitError(f"the chat template refuses the messages: {error}.") from error


def _span(turns: Sequence[Mapping[str, Any]], i: int, whole: str, render: Callable[..., str]) -> tuple[str, str]:
    """Give the text before turn i of a chat, the assistant's, and that up to its end.

    A template may write a turn otherwise once others follow, as Qwen3's does without its thoughts, and none says where
    the first turn begins. There the turn lies where the whole differs from what it is with other words in that turn.
    """
    before, until, words = render(turns[:i], True), render(turns[: i + 1]), turns[i].get("content")
    if (i and whole.startswith(until)) or not isinstance(words, str) or not words.strip():
        return before, until
    letter = next(letter for letter in "XYZ" if letter not in (words.strip()[0], words.strip()[-1]))
    others = [*turns[:i], {**turns[i], "content": 3 * letter}, *turns[i + 1 :]]
    start, end = _difference(whole, render(others))
    _, after = _difference(until, render(others[: i + 1]))
    end += _common(whole[end:], until[after:])  # what ends a turn
    return whole[:start], whole[:end]


def _difference(text: str, other: str) -> tuple[int, int]:
    """Say where a text begins to differ from another, and from where on it does no longer."""
    start = _common(text, other)
    same = _common(text[start:][::-1], other[start:][::-1])
    return start, len(text) - same


# Who speaks in ShareGPT's conversations, in the words of chat templates.
_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool",
    **{role: role for role in ("user", "assistant", "system", "developer", "tool")},
}  # fmt: skip


def _turn(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Read a message as ShareGPT writes it, too."""
    who = message.get("from")
    if who is None:
        return message
    if who not in _ROLES:
        raise LoraInitError(f"a message is from {who!r}, and expected is one of {', '.join(_ROLES)}. Rename it.")
    return {"role": _ROLES[who], "content": message.get("value", "")}


def _without_nulls(value: Any) -> Any:
    """Drop keys that are null: readers fill in those that a message lacks, and templates ask whether a key is there."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def encode(example: Example, tokenizer: Any, limit: int, seq2seq: bool) -> Encoded | None:
    """Tokenise prompt and answer as one text, as training does: tokens at the seam differ from those of the parts."""

    def tokens(text: str, role: str = "text") -> list[int]:
        return list(tokenizer(**{role: text}, add_special_tokens=not example.rendered, verbose=False)["input_ids"])

    if seq2seq:
        before = example.labelled[0][0] if len(example.labelled) == 1 else ""
        if not before.strip() or not example.text.startswith(before):
            raise LoraInitError(
                "an encoder-decoder model needs a prompt and one completion. Use prompt and completion."
            )
        answer = tokens(example.text[len(before) :], "text_target")  # in the target language, if there are two
        return _cut(tokens(before), tokenizer, limit), _cut(answer, tokenizer, limit)
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


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Count how far two sequences begin alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
