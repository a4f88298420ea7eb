"""Where rows come from: files, a folder, a hub id, standard input or memory, read through `datasets`."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from lora_init.errors import LoraInitError, first_line
from lora_init.loading.hub import why_not_asked

# Always one of the readers inside `datasets`, with explicit files: never a script that lies beside the data.
_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
_KINDS = f"{', '.join(_READERS)}, or one of these with .gz"
# Words in a file's name, within a folder, that mark a split; the conventions of the hub.
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
# Rows of a stream among which the examples are drawn: a stream can be read from its beginning only.
_MOST_STREAMED = 10_000
_T = TypeVar("_T")


@dataclass(frozen=True)
class Rows:
    """A data set as rows.

    Attributes:
        table: The rows, a `datasets.Dataset`.
        label: What to call the data, without the path to it: the name goes into files that users share.
        files: Files that the rows were read from, in this order; none if they are from elsewhere.
    """

    table: Any
    label: str
    files: Sequence[Path] = ()

    def place(self, index: int) -> str:
        """Name a row: by the line where it begins if its file has lines, else by its number, from 1."""
        before = index
        for file in self.files:
            for row, line in enumerate(starts := list(_first_lines(file))):
                if row == before:
                    return f"{self.label if len(self.files) == 1 else file.name}, line {line}"
            if not starts:
                break
            before -= len(starts)
        return f"{self.label}, row {index + 1}"

    def usable(
        self, columns: Sequence[str], read: Callable[[Mapping[str, Any]], _T | str], seed: int, left_out: Counter[str]
    ) -> Iterator[_T]:
        """Read rows in an order that the seed alone decides.

        Args:
            columns: Columns to read.
            read: Makes an example of a row, or says why the row is left out.
            seed: Seed of the order.
            left_out: Counts the rows that are left out by reason, as they are met.

        Raises:
            LoraInitError: What `read` raises, with the place of the row.
        """
        table = self.table.select_columns(list(dict.fromkeys(columns)))
        order = list(range(len(table)))
        random.Random(seed).shuffle(order)
        for index in order:
            try:
                example = read(table[index])
            except LoraInitError as error:
                raise LoraInitError(f"{self.place(index)}: {error}") from error
            if isinstance(example, str):
                left_out[example] += 1
            else:
                yield example


def read_rows(source: Any, subset: str | None = None, split: str = "train", seed: int = 0) -> Rows:
    """Read a data set.

    Args:
        source: A file, a folder, a pattern such as `"data/*.jsonl"`, several files, `"-"` for JSON lines on standard
            input; else a hub id; or a `datasets.Dataset` or `IterableDataset`, a list of mappings, a pandas DataFrame.
        subset: Configuration of a hub data set.
        split: Split of a hub data set, or of a folder whose file names tell splits apart.
        seed: Seed of the order in which a stream is read.

    Raises:
        LoraInitError: Nothing there, nothing in it, or `datasets` cannot read it.
    """
    if isinstance(source, (list, tuple)) and source and all(isinstance(path, (str, Path)) for path in source):
        files, label = [Path(path).expanduser().resolve() for path in source], f"{len(source)} files"
    elif not isinstance(source, (str, Path)):
        files, label = [], "data in memory"
    else:
        files, label = _find_files(str(source), split)
    if files and subset is not None:
        raise LoraInitError(f"subset={subset!r} is for a data set on the hub, and {label} is local.")
    if files:
        table = _read_files(label, files)
    elif not isinstance(source, (str, Path)):
        table = _from_memory(source, split, seed)
    elif str(source) == "-":
        table = _from_lines(sys.stdin)
    else:
        label = f"{source}{f' ({subset})' if subset else ''}, {split}"
        table = _from_hub(label, str(source), subset, split)
    if len(table) == 0:
        raise _empty(label)
    return Rows(table, label, files)


def _empty(label: str) -> LoraInitError:
    return LoraInitError(f"{label}: the data is empty. Expected at least one example.")


def _load(label: str, **arguments: Any) -> Any:
    import datasets

    try:
        with _quiet("data_files" in arguments):
            return datasets.load_dataset(**arguments)
    except LoraInitError:
        raise
    except Exception as error:  # `datasets` raises what its readers, file systems and the hub's client raise
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        reason = first_line(cause or error)
        if "corresponds to no data" in reason:  # how it says that files have a header and no rows
            raise _empty(label) from error
        raise LoraInitError(f"{label}: datasets cannot read it: {reason}") from error


def _from_hub(label: str, name: str, subset: str | None, split: str) -> Any:
    import datasets

    reason = why_not_asked(name, "dataset")
    before = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = before or bool(reason)  # else it would try for half a minute to reach the hub
        return _load(label, path=name, name=subset, split=split)
    except LoraInitError as error:
        if not reason:
            raise
        raise LoraInitError(f"data {name!r}: no such file or folder, not in the hub's cache, and {reason}.") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _read_files(label: str, files: Sequence[Path]) -> Any:
    for file in files:
        if not file.is_file():
            raise LoraInitError(f"data {file.name!r}: no such file.")
        if _suffix(file) not in _READERS:
            raise LoraInitError(f"{file.parent.name}/{file.name}: cannot read a file of this kind. Expected {_KINDS}.")
    kinds = sorted({"tsv" if _suffix(file) == ".tsv" else _READERS[_suffix(file)] for file in files})
    if len(kinds) > 1:
        raise LoraInitError(f"{label}: files of several kinds ({', '.join(kinds)}). Expected files of one kind.")
    if not any(file.stat().st_size for file in files):
        raise _empty(label)
    suffix = _suffix(files[0])
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    tables = [file for file in files if _READERS[suffix] == "csv"]
    for file in tables:  # pandas takes the first field for an index if the first record is too long
        _check_fields(file, label, most=1)
    try:
        table = _load(label, path=_READERS[suffix], data_files=[str(f) for f in files], split="train", **options)
    except LoraInitError:
        for file in tables:
            _check_fields(file, label)
        raise
    if suffix != ".txt":
        return table
    filled = [i for i, line in enumerate(table["text"]) if line.strip()]
    return table if len(filled) == len(table) else table.select(filled)


def _from_memory(source: Any, split: str, seed: int) -> Any:
    import datasets

    if isinstance(source, datasets.DatasetDict):
        if split not in source:
            raise LoraInitError(f"the data has no split {split!r}, only {', '.join(source)}.")
        source = source[split]
    if isinstance(source, datasets.Dataset):
        return source
    if isinstance(source, datasets.IterableDataset):
        stream = source.shuffle(seed=seed, buffer_size=_MOST_STREAMED)
        return datasets.Dataset.from_list(list(islice(stream, _MOST_STREAMED)))
    if type(source).__name__ == "DataFrame":
        return datasets.Dataset.from_pandas(source, preserve_index=False)
    if isinstance(source, Sequence) and all(isinstance(row, Mapping) for row in source):
        return datasets.Dataset.from_list([dict(row) for row in source])
    raise LoraInitError(
        f"data of type {type(source).__name__}: expected a path, a hub id, a datasets.Dataset, a pandas DataFrame or a "
        "list of mappings from column to value."
    )


def _from_lines(lines: Iterable[str]) -> Any:
    import datasets

    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise LoraInitError(f"standard input, line {number} is not JSON: {first_line(error)}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise LoraInitError("standard input: expected JSON lines, an object with the columns on each.")
    return datasets.Dataset.from_list(rows)


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _find_files(source: str, split: str) -> tuple[list[Path], str]:
    """Find the files that a path or a pattern names, and what to call them; none if it names something else."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path.resolve(), split)
    if path.exists():
        if split != "train":
            raise LoraInitError(f"split={split!r} is for a folder or a data set on the hub, and {source} is one file.")
        return [path.resolve()], f"{path.resolve().parent.name}/{path.name}"
    if any(character in source for character in "*?["):
        found = sorted(file.resolve() for file in Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        if not found:
            raise LoraInitError(f"data {source!r}: no file has such a name.")
        return found, f"{len(found)} files named {path.name}"
    if _suffix(path) in _READERS or source.startswith((".", "~", "/")) or source.count("/") > 1:
        raise LoraInitError(f"data {source!r}: no such file or folder.")
    return [], "standard input"


def _folder(folder: Path, split: str) -> tuple[list[Path], str]:
    visible = [p for p in sorted(folder.rglob("*")) if not any(part[0] in "._" for part in p.relative_to(folder).parts)]
    files = [p for p in visible if _suffix(p) in _READERS and p.is_file()]
    if not files:
        raise LoraInitError(f"{folder.name}/: no data file in the folder. Expected {_KINDS}.")
    words = {p: set(re.split(r"[^a-z]+", str(p.relative_to(folder).with_suffix("")).lower())) for p in files}
    there = [name for name, marks in _SPLITS.items() if any(marks & found for found in words.values())]
    if not there and split == "train":
        return files, f"{folder.name}/"
    files = [p for p in files if words[p] & _SPLITS.get(split, {split})]
    if not files:
        only = f"only {', '.join(there)}. Choose one, or name a file" if there else "no file name marks one"
        raise LoraInitError(f"{folder.name}/, {split}: the folder has no such split, {only}.")
    return files, f"{folder.name}/, {split}"


def _opened(file: Path) -> Any:
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return file.open(encoding="utf-8-sig", newline="")


def _first_lines(file: Path) -> Iterator[int]:
    """Yield the line at which each row of a file begins; nothing for a file whose rows are not lines."""
    kind = _READERS[_suffix(file)]
    if kind == "csv":
        yield from (line for line, _ in islice(_records(file), 1, None))
    elif kind in ("json", "text"):
        with _opened(file) as lines:
            for number, line in enumerate(lines, 1):
                if kind == "json" and line.lstrip().startswith("["):
                    return  # one list of rows
                if line.strip():
                    yield number


def _records(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the records of a CSV file that are not blank, the header first, and the line at which each begins."""
    limit = csv.field_size_limit(2**31 - 1)  # a document may be one field
    try:
        with _opened(file) as lines:
            reader = csv.reader(lines, delimiter="\t" if _suffix(file) == ".tsv" else ",")
            start = 1
            for record in reader:
                if len(record) > 1 or any(field.strip() for field in record):
                    yield start, record
                start = reader.line_num + 1
    finally:
        csv.field_size_limit(limit)


def _check_fields(file: Path, label: str, most: int | None = None) -> None:
    """Refuse a CSV file if one of its first `most` records has more fields than the header."""
    header: list[str] | None = None
    try:
        for line, record in islice(_records(file), None if most is None else most + 1):
            header = header or record
            if len(record) > len(header):
                raise LoraInitError(
                    f"{label}, line {line}: {len(record)} fields, and the header names {len(header)}. Put quotes "
                    "around a field that has the separator in it."
                )
    except (csv.Error, UnicodeDecodeError):
        return  # `datasets` says what is wrong with the file


@contextmanager
def _quiet(local: bool) -> Iterator[None]:
    """Keep `datasets` from printing while it converts local files: it is quick, and its errors come as exceptions."""
    import datasets

    logger, shown = logging.getLogger("datasets"), not datasets.are_progress_bars_disabled()
    level = logger.level
    try:
        if local:
            datasets.disable_progress_bars()
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()
