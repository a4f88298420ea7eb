"""What a row says: columns, a template or chat messages -> one text, and which stretches of it have labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from string import Formatter
from typing import Any

from lora_init.errors import LoraInitError, did_you_mean, warn

# Defaults of `load_batches` and of the command line: examples, examples in a batch, tokens of an example.
SAMPLES, BATCH_SIZE, MAX_LENGTH = 512, 8, 512


@dataclass(frozen=True)
class Example:
    """One row as text."""

    text: str  # all of it
    labelled: Sequence[tuple[str, str]]  # for each labelled stretch, the text before it, and the text up to its end
    prompt: str  # what is answered; the text itself where nothing comes before the labels
    rendered: bool = False  # by a chat template, so that special tokens are in it


@dataclass(frozen=True)
class ExampleRecipe:
    """How rows become examples."""

    name: str  # the columns or the templates
    columns: list[str]  # those that are read
    to_example: Callable[[Mapping[str, Any]], Example | None]  # None if a field is empty


@dataclass(frozen=True)
class Format:
    """A form of rows."""

    columns: tuple[str, ...]  # those that it is known by
    read: Callable[[Mapping[str, Any], Any], Example | None]  # from a row and the tokenizer; None if a field is empty
    optional: tuple[str, ...] = ()  # columns that are read, too, if they are there
    is_chat: bool = False  # whether the tokenizer must have a chat template


@dataclass(frozen=True)
class Wanted:
    """How the caller wants columns to be read: arguments of `load_batches`."""

    template: str | None = None
    completion: str | None = None
    format: str | None = None
    label: str | None = None  # column of the class


def recipe(names: list[str], place: str, tokenizer: Any, wanted: Wanted, texts: Sequence[str] = ()) -> ExampleRecipe:
    """Decide how to read rows with columns `names`; `texts` are those to propose for a template, the best first."""
    _check_format(wanted)
    if wanted.template is not None:
        return _by_template(wanted.template, wanted.completion, names, place)
    if wanted.completion is not None:
        raise LoraInitError("{completion} needs a template for the prompt, too.", completion=wanted.completion)
    possible = FORMATS
    if wanted.format is not None:
        possible = {wanted.format: FORMATS[wanted.format]}
    for name, form in possible.items():
        if set(form.columns) <= set(names):
            return _by_format(name, form, names, place, tokenizer)
    raise _unknown_columns(names, place, possible, texts)


def _by_format(name: str, form: Format, names: list[str], place: str, tokenizer: Any) -> ExampleRecipe:
    """Read rows by a format, with its optional columns as far as there are any."""
    if form.is_chat:
        _check_chat_template(tokenizer, f"{place} has a column {form.columns[0]!r}")
    optional = [column for column in form.optional if column in names]
    return ExampleRecipe(name.replace("-", " and "), [*form.columns, *optional], lambda row: form.read(row, tokenizer))


def _check_format(wanted: Wanted) -> None:
    """Refuse a format that there is not, and one beside a template."""
    if wanted.format is None:
        return
    if wanted.template is not None:
        raise LoraInitError("{format} and a template say two things. Give one.", format=wanted.format)
    if wanted.format not in FORMATS:
        raise LoraInitError(f"{{format}} is unknown. {did_you_mean(str(wanted.format), FORMATS)}", format=wanted.format)


def _by_template(template: str, completion: str | None, names: list[str], place: str) -> ExampleRecipe:
    """Read rows by a template of the text, or by one of the prompt and one of the completion."""
    prompt, used = _parse(template, "template", names, place)
    if completion is None:
        return ExampleRecipe(f"template {template!r}", used, lambda row: _plain("", _fill(prompt, row)))
    answer, more = _parse(completion, "completion", names, place)
    return ExampleRecipe(
        f"template {template!r} and completion {completion!r}",
        [*dict.fromkeys(used + more)],
        lambda row: _plain(_fill(prompt, row), _fill(answer, row)),
    )


def _unknown_columns(
    names: list[str], place: str, possible: Mapping[str, Format], texts: Sequence[str]
) -> LoraInitError:
    """Make the error about columns that no format has, with a template that fits them."""
    expected = ", or ".join(" and ".join(form.columns) for form in possible.values())
    text, *_ = texts or names or ["column"]
    proposal, options = "{template}", {"template": f"{{{text}}}"}
    if len(names) == len(texts) == 2:  # a question and its answer, more often than not
        proposal += " with {completion}"
        options = {"template": f"{{{names[0]}}}", "completion": f" {{{names[1]}}}"}
    there = f"{place} has the columns {', '.join(names)}"
    return LoraInitError(f"{there}. Expected {expected}; name others, such as {proposal}.", **options)


def _check_chat_template(tokenizer: Any, what: str) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise LoraInitError(
            f"{what}, but this tokenizer has no chat template, as those of base models. Use the model that was "
            "tuned to instructions; or set tokenizer.chat_template, and save the tokenizer beside the model."
        )


_Parts = list[tuple[str, str | None]]  # literal text, and the column whose value follows it


def _parse(template: str, argument: str, names: list[str], label: str) -> tuple[_Parts, list[str]]:
    """Split a template into its parts, and name the columns of these; `label` is what to call the data."""
    try:  # names are only compared with the columns, never evaluated as `str.format` would: {x.__class__}
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise LoraInitError(f"{{{argument}}}: {error}. Write {{{{ for a brace.", **{argument: template}) from None
    parts = []
    for literal, name, spec, conversion in parsed:
        if spec or conversion:
            raise LoraInitError(
                f"{{{argument}}}: only column names go in braces, without '!' or ':'.", **{argument: template}
            )
        if name is not None and name not in names:
            raise LoraInitError(
                f"{{{argument}}}: {label} has no column {name!r}. Its columns: {', '.join(names)}.",
                **{argument: template},
            )
        parts.append((literal, name))
    used = [*dict.fromkeys(name for _, name in parts if name is not None)]
    if not used:
        raise LoraInitError(
            f"{{{argument}}} names no column. Columns of {label}: {', '.join(names)}.", **{argument: template}
        )
    return parts, used


def _fill(parts: _Parts, row: Mapping[str, Any]) -> str | None:
    """Fill a template; None if a field says nothing, so that nobody trains on the word "None"."""
    text = ""
    is_complete = True
    for literal, name in parts:
        text += literal
        if name is None:  # the end of a template has no column
            continue
        value = _text(row, name)
        if value is None:
            is_complete = False  # and not yet None: a later column may hold a list, which is refused
        else:
            text += value
    return text if is_complete else None


def _text(row: Mapping[str, Any], name: str) -> str | None:
    """Read a field as text, never a list as Python writes it; None if it says nothing."""
    value = row[name]
    kind = None
    if isinstance(value, list):
        kind = "a list"
    elif isinstance(value, Mapping):
        kind = "a mapping"
    if kind is not None:
        raise LoraInitError(f"column {name!r} holds {kind}, and text is needed. Make it text first, or name another.")
    return None if is_missing(value) else str(value)


def is_missing(value: Any) -> bool:
    """Return whether a field is empty: null, NaN or blank, as files and tables write a missing value."""
    # NaN alone differs from itself; math.isnan would refuse text.
    return value is None or value != value or not str(value).strip()


def _plain(prompt: str | None, answer: str | None) -> Example | None:
    """Join prompt and answer as they are, with labels on the answer; None if one of them is None."""
    if prompt is None or answer is None:
        return None
    return Example(f"{prompt}{answer}", [(prompt, f"{prompt}{answer}")], prompt.strip() or answer)


# The prompt of Stanford's Alpaca, as axolotl's `type: alpaca` writes it.
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)


def _alpaca(row: Mapping[str, Any], tokenizer: Any) -> Example | None:
    """Read a row of Alpaca's, whose prompt says in another sentence that there is an input."""
    instruction = _text(row, "instruction")
    context = _text(row, "input") if "input" in row else None
    prompt = None
    if instruction is not None:
        described, quoted = "", ""
        if context is not None:
            described, quoted = ", paired with an input that provides further context", f"### Input:\n{context}\n\n"
        prompt = _ALPACA.format(described, instruction, quoted)
    return _plain(prompt, _text(row, "output"))


def _prompt_completion(row: Mapping[str, Any], tokenizer: Any) -> Example | None:
    prompt, answer = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(answer, list):  # both as messages, the other form that TRL knows
        return _chat(prompt + answer, row, tokenizer, first=len(prompt))
    return _plain(_text(row, "prompt"), _text(row, "completion"))


def _chat(messages: Any, row: Mapping[str, Any], tokenizer: Any, first: int = 0) -> Example | None:
    """Render messages, with the tools of the row; labels on the assistant's turns from `first` on."""
    if not messages:
        return None
    turns = _read_turns(messages, tokenizer)
    answers = [i for i, turn in enumerate(turns) if i >= first and turn["role"] == "assistant"]
    if answers and all(_is_blank(turns[i]) for i in answers):
        return None
    options = _without_nulls(row.get("chat_template_kwargs") or {})
    try:
        tools = row.get("tools") or None
        tools = json.loads(tools) if isinstance(tools, str) else _without_nulls(tools)
        render = partial(_render, tokenizer, tools, options)
        whole = render(turns)
        _warn_of_roles(turns, whole, str(tokenizer.chat_template))
        spans = [_span(turns, i, whole, render) for i in answers]
        return Example(whole, spans, str(turns[: first or _first_answer(turns)]), rendered=True)
    except Exception as error:  # a template is a program: it raises what it likes
        raise LoraInitError(f"the chat template refuses the messages: {error}.") from error


def _read_turns(messages: Any, tokenizer: Any) -> list[Mapping[str, Any]]:
    """Read messages as turns of a chat; refuse what is no chat, and turns without content."""
    is_chat = isinstance(messages, list) and all(isinstance(m, Mapping) and {"role", "from"} & set(m) for m in messages)
    if not is_chat:
        raise LoraInitError("messages must be a list of {'role': ..., 'content': ...}.")
    _check_chat_template(tokenizer, "the row has messages")
    turns = [_turn(message) for message in _without_nulls(messages)]
    for number, turn in enumerate(turns, 1):
        # A turn that calls a tool has no content, but `tool_calls`.
        if not turn.keys() - {"role", "name"}:
            raise LoraInitError(f"message {number}, of {turn['role']!r}, has no content. Leave out the row.")
    return turns


def _is_blank(turn: Mapping[str, Any]) -> bool:
    """Return whether a turn has no words, calls no tool and has no thoughts."""
    return turn.keys() <= _BLANK and is_missing(turn.get("content") or None)


def _render(
    tokenizer: Any,
    tools: Any,
    options: Mapping[str, Any],
    turns: Sequence[Mapping[str, Any]],
    answer_next: bool = False,
) -> str:
    """Write turns as the chat template does; with `answer_next` up to where the assistant's answer begins."""
    if not turns:
        return ""
    return str(
        tokenizer.apply_chat_template(turns, tools, tokenize=False, add_generation_prompt=answer_next, **options)
    )


def _warn_of_roles(turns: Sequence[Mapping[str, Any]], whole: str, template: str) -> None:
    """Warn of roles that a chat template does not name, or whose words it leaves out."""
    for turn in turns:
        role, words = str(turn["role"]), turn.get("content")
        # A template that knows a role compares with it, in quotes of either kind.
        is_known = role in _ROLES.values() or f"{role}'" in template or f'{role}"' in template
        # The assistant's words a template may rewrite, as Qwen3's leaves out thoughts.
        is_dropped = isinstance(words, str) and words.strip() not in whole and role not in ("assistant", "tool")
        if is_dropped:
            warn(f"the chat template leaves out the turns of the role {role!r}. Rename it.")
        elif not is_known:
            warn(f"the chat template does not know the role {role!r}. Rename it.")


def _first_answer(turns: Sequence[Mapping[str, Any]]) -> int:
    """Find the first turn of the assistant's that follows one of the user's: a greeting answers nothing."""
    was_asked = all(turn["role"] != "user" for turn in turns)  # without a user's turn the first answer counts
    for i, turn in enumerate(turns):
        if turn["role"] == "user":
            was_asked = True
        elif turn["role"] == "assistant" and was_asked:
            return i
    return len(turns)


def _span(turns: Sequence[Mapping[str, Any]], i: int, whole: str, render: Callable[..., str]) -> tuple[str, str]:
    """Return the text before turn i of a chat, the assistant's, and that up to its end.

    A template may write a turn otherwise once others follow, as Qwen3's does without its thoughts, and none says where
    the first turn begins. There the turn lies where the whole differs from what it is with other words in that turn.
    """
    before, until, words = render(turns[:i], True), render(turns[: i + 1]), turns[i].get("content")
    is_prefix = i > 0 and whole.startswith(until)
    if is_prefix or not isinstance(words, str) or not words.strip():
        return before, until
    # Words that begin and end with another letter, so that no part of them seems to be the same.
    letter = next(letter for letter in "XYZ" if letter not in (words.strip()[0], words.strip()[-1]))
    others = [*turns[:i], {**turns[i], "content": 3 * letter}, *turns[i + 1 :]]
    start, end = _difference(whole, render(others))
    # What ends a turn, such as <|im_end|>, is the same with other words, but belongs to the turn. It is what follows
    # the words both in the whole and where this turn is the last.
    _, after = _difference(until, render(others[: i + 1]))
    end += count_common(whole[end:], until[after:])
    return whole[:start], whole[:end]


def _difference(text: str, other: str) -> tuple[int, int]:
    """Return where a text begins to differ from another, and where it stops."""
    start = count_common(text, other)
    same = count_common(text[start:][::-1], other[start:][::-1])
    return start, len(text) - same


# Who speaks in ShareGPT's conversations, in the words of chat templates.
_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool",
    "user": "user", "assistant": "assistant", "system": "system", "developer": "developer", "tool": "tool",
}  # fmt: skip


def _turn(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Read a message as ShareGPT writes it, too."""
    who = message.get("from")
    if who is None:
        return message
    if who not in _ROLES:
        raise LoraInitError(f"a message is from {who!r}, and expected is one of {', '.join(_ROLES)}. Rename it.")
    turn = {"role": _ROLES[who]}
    if "value" in message:  # without it the turn has no content, which is refused by its number
        turn["content"] = message["value"]
    return turn


def _without_nulls(value: Any) -> Any:
    """Drop keys that are null: readers fill in those that a message lacks, and templates ask whether a key is there."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def count_common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Count how far two sequences begin alike."""
    n_common = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        n_common += 1
    return n_common


_BLANK = {"role", "name", "content"}  # keys of a turn that calls no tool and has no thoughts
# What chat templates take beside messages.
_OF_CHATS = ("tools", "chat_template_kwargs")
# The first whose columns are there is taken. To add a format, add it here; the command line offers what there is.
FORMATS = {
    "messages": Format(
        ("messages",), lambda row, tokenizer: _chat(row["messages"], row, tokenizer), _OF_CHATS, is_chat=True
    ),
    "sharegpt": Format(
        ("conversations",), lambda row, tokenizer: _chat(row["conversations"], row, tokenizer), _OF_CHATS, is_chat=True
    ),
    "prompt-completion": Format(("prompt", "completion"), _prompt_completion, _OF_CHATS),
    "alpaca": Format(("instruction", "output"), _alpaca, ("input",)),
    "text": Format(("text",), lambda row, tokenizer: _plain("", _text(row, "text"))),
}
