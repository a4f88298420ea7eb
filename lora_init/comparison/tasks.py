"""What is to be learned: examples to train on, others to score by, in an order that the seed alone decides."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lora_init.adapters.init_config import Checked
from lora_init.errors import LoraInitError, check_number, warn
from lora_init.loading.batches import group_by_length, pad_batch, padding_token
from lora_init.loading.examples import Wanted
from lora_init.loading.reader import Encoded, Reader, open_reader
from lora_init.loading.sources import read_rows

if TYPE_CHECKING:
    from torch import Tensor


def read_choices(row: Mapping[str, Any], options: str, answer: str) -> tuple[list[str], int] | None:
    """Read the options of a row, or those named, and the position of the right one; None if the row does not say.

    Example:
        >>> read_choices({"right": "no"}, "yes, no", "right")
        (['yes', 'no'], 1)
    """
    choices = split_options(row[options] if options in row else options.split(","))
    right = find_answer(row[answer], choices)
    # With one option there is nothing to choose.
    return None if right is None or len(choices) < 2 else (choices, right)


def split_options(value: Any) -> list[str]:
    """Read options: a list, a mapping with a list under `text` (as on the hub), or a text with one option a line."""
    if isinstance(value, Mapping):
        value = value.get("text", [])
    if not isinstance(value, list):
        value = str(value or "").splitlines()
    stripped = [str(part).strip() for part in value]
    return [part for part in stripped if part]


def find_answer(value: Any, options: Sequence[str]) -> int | None:
    """Find the right option: by its text, else by a letter (A is the first), else by a number (0 is the first).

    Example:
        >>> find_answer("B", ["red", "blue"]), find_answer("red", ["red", "blue"]), find_answer(1, ["red", "blue"])
        (1, 0, 1)
    """
    text = str(value).strip().casefold()
    lowered = [option.casefold() for option in options]
    if text in lowered:  # first, since options may be letters or numbers themselves
        return lowered.index(text)
    if len(text) == 1 and "a" <= text <= "z":
        position = ord(text) - ord("a")
    elif text.isdecimal():
        position = int(text)
    else:
        return None
    return position if position < len(options) else None


CAUSAL_LM, CLASSIFICATION, MULTIPLE_CHOICE = "causal-lm", "classification", "multiple-choice"


@dataclass(frozen=True)
class Item:
    """One example."""

    tokens: Encoded  # what training sees
    choices: tuple[Encoded, ...] = ()  # the example as it reads with each option, for multiple choice
    answer: int | None = None  # position of the right option, or the class; None for text alone


@dataclass(frozen=True)
class Task:
    """Examples in three folds. No example is there twice, and no prompt in two folds."""

    kind: str
    train: Sequence[Item]  # also for statistics
    selection: Sequence[Item]  # learning rates are chosen by these
    report: Sequence[Item]  # every figure is from these
    classes: tuple[str, ...]
    padding: int  # token to pad with
    normalize: bool  # whether an option's log-likelihood is divided by its number of tokens
    data: str  # which examples of which data these are
    label: str  # name of the task in the report
    rows_of: Mapping[str, int]  # of the data, by class
    spelled_out: bool = True  # whether the column of the answer has its text, as `init` reads it, and no letter

    def batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Pad examples to a batch, with the class as label for classification."""
        return pad_batch([item.tokens for item in items], self.padding, self.kind == CLASSIFICATION)

    def cut(self, n_report: int | None, n_selection: int | None) -> Task:
        """Return the task with at most so many examples to report and to select by; None leaves them."""
        report, selection = self.report[:n_report], self.selection[:n_selection]
        if (len(report), len(selection)) == (len(self.report), len(self.selection)):
            return self
        data = f"{self.data}; the first {len(selection)} to select by and {len(report)} to report are used"
        return replace(self, report=report, selection=selection, data=data)

    def order(self, seed: int, steps: int, batch_size: int) -> list[list[Item]]:
        """Draw the batches of a run. They depend on the seed alone: every start sees the same, in the same order.

        Every epoch is a new shuffle, without its last, incomplete batch; batches hold examples of similar length.
        """
        rng = random.Random(seed)
        batches: list[list[Item]] = []
        # Epoch by epoch: the batches of a run with fewer steps are the first ones of a longer run.
        while len(batches) < steps:
            epoch = rng.sample(self.train, len(self.train))
            whole = epoch[: len(epoch) // batch_size * batch_size]  # another example is left out in each epoch
            batches += group_by_length(whole, batch_size, rng.randrange(2**31), item_length)
        return batches[:steps]


def item_length(item: Item) -> int:
    """Count the tokens of an example."""
    return len(item.tokens[0])


@dataclass(frozen=True)
class LoadingOptions(Checked):
    """How examples are read from a data set, how it is split, and how the model is loaded: options of `compare`."""

    template: str | None = None  # text of an example, or the prompt if there is a completion
    format: str | None = None  # as for `load_batches`
    completion: str | None = None  # what the model should answer; of a multiple choice a space and the column `answer`
    label: str | None = None  # column of the class; makes this a classification
    options: str | None = None  # column with the options, or options by commas; makes this a multiple choice
    answer: str = "answer"  # column that says which option is right: its text, its letter or its position
    normalize: bool = False  # divide an option's log-likelihood by its number of tokens
    subset: str | None = None  # configuration of a hub data set
    split: str = "train"  # of a hub data set or a folder
    train_samples: Annotated[int, dict(min=0)] = 1024  # training examples at most
    selection_samples: int | None = None  # examples that learning rates are chosen by: 128, but see `fold_sizes`
    report_samples: int | None = None  # examples that every figure is from: 256, but see `fold_sizes`
    max_length: Annotated[int, dict(min=2)] = 256  # tokens of an example at most
    data_seed: int = 0  # of the split
    name: str | None = None  # of the task in the report; by default the data's name
    retain_data: str | Path | None = None  # text of another kind: its loss before and after tells what was forgotten
    retain_template: str | None = None  # how an example of it reads
    retain_samples: Annotated[int, dict(min=1)] = 64
    dial: bool = True  # with `retain_data`, evaluate each trained adapter at several strengths
    replay: str | Path | None = None  # text to train on beside the examples, one with each step, weighed 0.25
    dtype: str = "auto"  # of the base: the checkpoint's, or float32 where the processor emulates that, or to classify
    quantize: str | None = None  # how the base is quantized while it is loaded, one of `models.QUANTIZATIONS`
    weights: str | Path | None = None  # the float model that a quantized one was made of; by default the model itself
    device: str = "auto"  # where the model runs
    trust_remote_code: bool = False  # allow code that comes with the model


REPORT, SELECTION = 256, 128
# With fewer examples to report only large differences mean anything.
FEW = 100


def fold_sizes(loading: LoadingOptions, n_prompts: int) -> tuple[int, int]:
    """Compute how many examples to report and to select by: a third and a sixth of few data, so that half train.

    What is asked for stays; the other is then a share of what that leaves.

    Example:
        >>> fold_sizes(LoadingOptions(), 1000), fold_sizes(LoadingOptions(), 60)
        ((256, 128), (20, 10))
        >>> fold_sizes(LoadingOptions(report_samples=40), 60)
        (40, 5)
    """
    report, selection = loading.report_samples, loading.selection_samples
    if report is None:
        share = n_prompts // 3 if selection is None else 2 * (n_prompts - selection) // 5
        report = max(1, min(REPORT, share))
    if selection is None:  # a quarter of what is left: of two thirds, a sixth of all
        selection = max(1, min(SELECTION, (n_prompts - report) // 4))
    return report, selection


def load_task(
    source: str | Path, tokenizer: Any, loading: LoadingOptions, batch_size: int, known_classes: Sequence[str] = ()
) -> Task:
    """Read a data set and split it: rows to report come first in the seeded order, then those to select by.

    So more training moves neither. Rows are read as by `load_batches`. Of rows with the same tokens the first counts,
    and a row whose prompt is in a fold before is left out: the model would have seen the question that it is scored by.
    """
    _check_sizes(selection_samples=loading.selection_samples, report_samples=loading.report_samples)
    data = read_rows(source, loading.subset, loading.split)
    names, name = list(data.table.column_names), data.label
    kind = _kind(loading, names, name)
    wanted = Wanted(loading.template, _completion(loading, kind), loading.format, loading.label)
    reader = open_reader(
        data, tokenizer, loading.max_length, wanted, needs_labels=kind != MULTIPLE_CHOICE, known_classes=known_classes
    )
    left_out: Counter[str] = Counter()
    usable = data.usable(
        _columns(reader, loading, names), partial(_read, reader=reader, loading=loading), loading.data_seed, left_out
    )
    # Rows are read as they are asked for: of large data, no more than the folds need.
    distinct, first = _distinct(usable), list[tuple[str, Item]]()
    if loading.report_samples is None or loading.selection_samples is None:
        # With so many prompts both folds have their full size, see `fold_sizes`.
        first = _until(distinct, 2 * (REPORT + SELECTION))
    n_report, n_selection = fold_sizes(loading, len({prompt for prompt, _ in first}))
    used: set[str] = set()  # prompts of the folds before
    rest = _without_prompts(chain(first, distinct), used, left_out)

    def take(count: int) -> list[Item]:
        """Take a fold off the rows that are left. Within a fold a prompt may come again."""
        drawn = list(islice(rest, max(count, 0)))
        used.update(prompt for prompt, _ in drawn)
        return [item for _, item in drawn]

    report, selection, train = map(take, (n_report, n_selection, loading.train_samples))
    counted = f"{name}: {len(train)} examples to train on, {len(selection)} to select by and {len(report)} to report"
    skipped = [f"{count} left out {why}" for why, count in left_out.items()]
    if len(train) < batch_size or len(selection) < n_selection:
        reasons = f" ({', '.join(skipped)})" if skipped else ""
        raise LoraInitError(
            f"{counted}; expected {batch_size} or more, {n_selection} and {n_report}{reasons}. "
            "Lower --report-samples, --selection-samples or --batch-size, raise --train-samples, or use more data."
        )
    if len(report) < FEW and loading.report_samples is None:
        warn(f"{counted}. So few decide nothing but large differences. Use more data.")
    described = ", ".join([f"{counted} of {len(data.table)}", *_how_read(reader, loading), *skipped])
    padding, title = padding_token(tokenizer), loading.name or name
    spelled_out = _is_spelled_out(islice(data.table, 100), loading)
    classes, rows_of = tuple(reader.rows_of), reader.rows_of
    return Task(
        kind, train, selection, report, classes, padding, loading.normalize, described, title, rows_of, spelled_out
    )


def _check_sizes(**folds: int | None) -> None:
    for option, value in folds.items():
        if value is not None:
            check_number(option, value, 1, whole=True, hint=f" {FEW} or more say something.")


def _columns(reader: Reader, loading: LoadingOptions, names: Sequence[str]) -> list[str]:
    """List the columns to read, with options and answer of a multiple choice."""
    columns = [*reader.columns]
    if loading.options:  # which need not be a column
        columns += [column for column in (loading.answer, loading.options) if column in names]
    return columns


def _how_read(reader: Reader, loading: LoadingOptions) -> Iterator[str]:
    """Describe how rows were split and read."""
    yield f"split seed {loading.data_seed}, at most {reader.limit} tokens, {reader.recipe.name}"
    if loading.label:
        yield f"label {loading.label}, {len(reader.rows_of)} classes"
    if loading.options:
        yield f"options {loading.options}, answer {loading.answer}"


def _distinct(usable: Iterable[tuple[str, Item]]) -> Iterator[tuple[str, Item]]:
    """Leave out what has the tokens of an example before: shortened texts may be alike."""
    seen: set[tuple[int, ...]] = set()
    for prompt, item in usable:
        if tuple(item.tokens[0]) not in seen:
            seen.add(tuple(item.tokens[0]))
            yield prompt, item


def _until(rows: Iterator[tuple[str, Item]], n_prompts: int) -> list[tuple[str, Item]]:
    """Take examples until they have so many different prompts, or there are no more."""
    taken, prompts = [], set[str]()
    while len(prompts) < n_prompts and (row := next(rows, None)) is not None:
        taken.append(row)
        prompts.add(row[0])
    return taken


def _without_prompts(
    rows: Iterable[tuple[str, Item]], used: set[str], left_out: Counter[str]
) -> Iterator[tuple[str, Item]]:
    """Leave out rows whose prompt is in a fold before; `used` grows while this is read."""
    for prompt, item in rows:
        if prompt in used:
            left_out["with a prompt of another fold"] += 1
        else:
            yield prompt, item


def _is_spelled_out(rows: Iterable[Mapping[str, Any]], loading: LoadingOptions) -> bool:
    """Return whether the column of the answer has the right option's text in all these rows."""
    if not loading.options:
        return True
    return all(_has_text(row, loading.options, loading.answer) for row in rows)


def _has_text(row: Mapping[str, Any], options: str, answer: str) -> bool:
    choices = read_choices(row, options, answer)
    if choices is None:  # a row that is left out says nothing
        return True
    texts, right = choices
    return str(row[answer]).strip() == texts[right]


def _read(row: Mapping[str, Any], reader: Reader, loading: LoadingOptions) -> tuple[str, Item] | str:
    """Return a row's prompt and the row as an item, or why it is left out."""
    example = reader.recipe.to_example(row)
    tokens = reader.encode(example, row)
    if example is None or isinstance(tokens, str):
        return str(tokens)
    if loading.options is None:
        if loading.label is None:
            return example.prompt, Item(tokens)
        return example.prompt, Item(tokens, answer=tokens[1][0])  # the labels of a classification are its class
    choices = read_choices(row, loading.options, loading.answer)
    if choices is None:
        return "whose answer is none of the options"
    options, right = choices
    encoded = []
    for option in options:  # the row as it reads if this option were the answer
        choice = reader({**row, loading.answer: option})
        # A shortened option would be likelier than it is; at the limit it may have been shortened.
        if not isinstance(choice, str) and len(choice[0]) < reader.limit:
            encoded.append(choice)
    if len(encoded) < len(options):
        return f"with {reader.limit} or more tokens"
    return example.prompt, Item(encoded[right], tuple(encoded), right)


def _kind(loading: LoadingOptions, names: Sequence[str], name: str) -> str:
    """Return what kind of task is asked for, after a check of its columns."""
    columns = f"Columns of {name}: {', '.join(names)}."
    if loading.label is not None and loading.options is not None:
        raise LoraInitError("label makes this a classification, options a multiple choice. Give one of them.")
    if loading.label is not None:
        return CLASSIFICATION
    if loading.options is None:
        return CAUSAL_LM
    if loading.options not in names and len(split_options(loading.options.split(","))) < 2:
        raise LoraInitError(
            f"{{options}} is not a column, and not a list of options such as 'yes,no'. {columns}",
            options=loading.options,
        )
    if loading.answer not in names:
        raise LoraInitError(f"{{answer}} is not a column. {columns}", answer=loading.answer)
    return MULTIPLE_CHOICE


def _completion(loading: LoadingOptions, kind: str) -> str | None:
    """Check prompt and completion against what the task needs, and complete what is plain from it."""
    template, completion = loading.template, loading.completion
    if kind != MULTIPLE_CHOICE:
        return completion
    if template is None:
        raise LoraInitError("multiple choice needs a template for the prompt, such as '{question}\\nAnswer:'.")
    named = f"{{{loading.answer}}}"
    if named in template:
        raise LoraInitError(f"{{template}} gives the answer away: it names {named}. Take it out.", template=template)
    if completion is not None and named not in completion:
        raise LoraInitError(
            f"{{completion}} must name {named}, where one option after the other is put.", completion=completion
        )
    return completion or f" {named}"
