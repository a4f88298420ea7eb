"""Where the examples come from: a file, a folder or a hub id -> rows, read through `datasets`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_init.errors import LoraInitError

# Always one of the readers inside `datasets`, with explicit files: never a script that lies beside the data.
_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
# Words in a file's name, within a folder, that mark a split; the conventions of the hub.
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


def read_rows(source: str | Path, subset: str | None, split: str) -> tuple[Any, str]:
    """Read a data set and name it, without the path to it: the name goes into files that users share.

    Args:
        source: A file or folder if there is one of that name, else a hub id.
        subset: Configuration of a hub data set.
        split: Split of a hub data set, or of a folder whose file names tell splits apart.

    Returns:
        The rows (a `datasets.Dataset`) and the name.

    Raises:
        LoraInitError: Nothing there, nothing in it, or `datasets` cannot read it.
    """
    path = Path(source).expanduser()
    if path.exists():
        files, label = _files(path, split)
        if not any(file.stat().st_size for file in files):
            raise _empty(label)
        arguments: dict[str, Any] = dict(
            path=_READERS[files[0].suffix.lower()], data_files=[str(file) for file in files], split="train"
        )
    elif path.suffix.lower() in _READERS or str(source).startswith((".", "~", "/")) or str(source).count("/") > 1:
        raise LoraInitError(f"data {str(source)!r}: no such file or folder.")
    else:
        arguments = dict(path=str(source), name=subset, split=split)
        label = f"{source}{f' ({subset})' if subset else ''}, {split}"
    import datasets

    try:
        with _quiet("data_files" in arguments):
            rows = datasets.load_dataset(**arguments)
    except Exception as error:  # `datasets` raises what its readers, file systems and the hub's client raise
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        reason = next(iter(str(cause or error).splitlines()), "") or type(error).__name__
        if "corresponds to no data" in reason:  # how it says that files have a header and no rows
            raise _empty(label) from error
        raise LoraInitError(f"{label}: datasets cannot read it: {reason.rstrip('.')}.") from error
    if len(rows) == 0:
        raise _empty(label)
    return rows, label


def _empty(label: str) -> LoraInitError:
    return LoraInitError(f"{label}: the data is empty. Expected at least one example.")


def _files(path: Path, split: str) -> tuple[list[Path], str]:
    path = path.resolve()
    kinds = ", ".join(_READERS)
    if path.is_file():
        label = f"{path.parent.name}/{path.name}"
        if path.suffix.lower() not in _READERS:
            raise LoraInitError(f"{label}: cannot read a file of this kind. Expected one of {kinds}.")
        return [path], label
    visible = [p for p in sorted(path.rglob("*")) if not any(part[0] in "._" for part in p.relative_to(path).parts)]
    files = [p for p in visible if p.suffix.lower() in _READERS and p.is_file()]
    words = {p: set(re.split(r"[^a-z]+", str(p.relative_to(path).with_suffix("")).lower())) for p in files}
    there = [name for name, marks in _SPLITS.items() if any(marks & found for found in words.values())]
    label = f"{path.name}/"
    if there:
        files = [p for p in files if words[p] & _SPLITS.get(split, {split})]
        label += f", {split}"
    found = sorted({_READERS[p.suffix.lower()] for p in files})
    if there and not files:
        raise LoraInitError(
            f"{label}: the folder has no such split, only {', '.join(there)}. Choose one, or name a file."
        )
    if len(found) != 1:
        got = f"files of several kinds ({', '.join(found)})" if found else "no data file"
        raise LoraInitError(
            f"{label}: {got} in the folder. Expected files of one kind among {kinds}, or name one file."
        )
    return files, label


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
