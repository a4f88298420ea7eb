"""Where rows come from: files, a folder, a hub id, standard input or memory, read through `datasets`."""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import logging
import random
import re
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from lora_init.errors import LoraInitError, first_line
from lora_init.loading.hub import check_hub, stay_offline

# Always one of the readers inside `datasets`, with explicit files: never a script that lies beside the data.
FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
_OF_TEXT = ("json", "csv", "text")  # the readers of files in UTF-8, which are looked at before
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Rows of a stream among which the examples are drawn: a stream can be read from its beginning only.
MOST_STREAMED = 10_000
# pandas would make 7.0 of 007, and nothing of None. It knows columns by number; more than there are do no harm.
_CELLS_AS_TEXT = {"keep_default_na": False, "na_values": [""], "converters": dict.fromkeys(range(1000), str)}
_EMPTY = "the data is empty. Expected at least one example."
# How JSON begins whose rows are no objects; `datasets` would take numbers in a list for texts.
_NO_OBJECT = re.compile(r'\s*(?:(?:\[\s*)?(?:-?\d|true|false|null)|\[\s*\[|")')
# How much of a file is looked at for its encoding, before anything else reads it.
_LOOKED_AT = 1 << 24
# How `datasets` says that files are empty, or have a header and no rows; the last of them until 4.8.
_NOTHING = (
    "StopIteration", "No columns to parse", 'Instruction "train" corresponds to no data', "Please pass `features` or"
)  # fmt: skip
_T = TypeVar("_T")


@dataclass(frozen=True)
class Rows:
    """A data set as rows."""

    table: Any  # a `datasets.Dataset`
    label: str  # what to call the data, without the path to it: it goes into files that users share
    file: Path | None = None  # if it is one

    @property
    def digest(self) -> str:
        """Hash how many rows there are and 16 of them, to tell data sets apart."""
        n = len(self.table)
        # As they are stored, for an image is read into an object that is made anew each time. By sorted columns, since
        # their order says nothing.
        stored = self.table.select_columns(sorted(self.table.column_names)).with_format("arrow")
        some = stored[[n * i // 16 for i in range(16)]].to_pylist()
        return hashlib.sha256(repr((n, some)).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def place(self, index: int) -> str:
        """Return the name of a row: the line where it begins if its file has lines, else its number, from 1."""
        line = None
        if self.file and self.file.is_file():
            line = _first_line_of(self.file, index)
        if line is None:
            return f"{self.label}, row {index + 1}"
        return f"{self.label}, line {line}"

    def texts(self, but: str | None = None) -> list[str]:
        """Return the columns that could be the text of an example, by falling length in the first rows; no lists."""
        head = self.table.select(range(min(100, len(self.table)))).to_dict()
        lengths = {}
        for name, values in head.items():
            is_nested = any(isinstance(value, (list, dict)) for value in values)
            if name != but and not is_nested:
                lengths[name] = sum(len(str(value)) for value in values)
        return sorted(lengths, key=lambda name: (-lengths[name], name))

    def usable(
        self, columns: Sequence[str], read: Callable[[Mapping[str, Any]], _T | str], seed: int, left_out: Counter[str]
    ) -> Iterator[_T]:
        """Read some columns of the rows, in an order that the seed alone decides.

        `read` makes an example of a row, or says why it is left out; `left_out` counts these reasons, as they are met.
        """
        # Columns that nobody reads may be costly, such as pictures.
        table = self.table.select_columns(list(dict.fromkeys(columns)))
        # All rows are shuffled, however few are read: so a smaller sample is the start of a larger one.
        order = list(range(len(table)))
        random.Random(seed).shuffle(order)
        for index in order:
            try:
                example = read(table[index])
            except LoraInitError as error:
                raise error.within(self.place(index)) from error
            if isinstance(example, str):
                left_out[example] += 1
            else:
                yield example


def read_rows(source: Any, subset: str | None = None, split: str = "train", seed: int = 0) -> Rows:
    """Read a data set: what `load_batches` takes; of a stream the beginning, in an order drawn by `seed`."""
    files = _find_files(source)
    with _quiet():
        label, table = _read_table(source, files, subset, split, seed)
        if table.info.builder_name == "text":  # a blank line is no example
            table = table.filter(lambda row: bool(row["text"].strip()))
    if len(table) == 0:
        raise LoraInitError(f"{label}: {_EMPTY}")
    if files and len(files) == 1:
        return Rows(table, label, files[0])
    return Rows(table, label)


def _read_table(source: Any, files: list[Path] | None, subset: str | None, split: str, seed: int) -> tuple[str, Any]:
    """Read what `_find_files` found for a source; return what to call it, too."""
    configuration = f" ({subset})" if subset else ""
    if files is None:
        check_hub(str(source), "dataset")
        label = f"{source}{configuration}, {split}"
        return label, _load(label, path=str(source), name=subset, split=split)
    if files and files[0].is_dir():
        folder = files[0].resolve()
        if glob.has_magic(str(folder)):
            raise LoraInitError(
                f"{folder}: datasets takes this name for a pattern. Rename the folder, or name its files."
            )
        label = f"{folder.name}/{configuration}"
        if split != "train":
            label += f", {split}"
        return label, _load(label, path=str(folder), name=subset, split=split)
    _check_unsplit(source, subset, split)
    if files:
        label = f"{len(files)} files"
        if len(files) == 1:
            label = _label_of(files[0])
        return label, _from_files(label, files)
    if isinstance(source, str):
        label = "standard input"
        return label, _from_memory(_json_lines(sys.stdin, label), split, seed)
    return "data in memory", _from_memory(source, split, seed)


def _check_unsplit(source: Any, subset: str | None, split: str) -> None:
    """Refuse a subset or a split of what has neither: files, and data in memory."""
    # "train" is the default, so it asks for nothing.
    if subset is None and split == "train":
        return
    kind = source if isinstance(source, (str, Path)) else "files or data in memory"
    name = "split" if subset is None else "subset"
    raise LoraInitError(
        f"{{{name}}} is for a folder or a data set on the hub, not for {kind}.", **{name: subset or split}
    )


def _label_of(file: Path) -> str:
    """Return what to call a file: its folder says more than `train.jsonl`, and its path may be nobody's business."""
    return f"{file.resolve().parent.name}/{file.name}"


def check_data(source: str) -> None:
    """Refuse a name that is neither here nor can be had, before `datasets` is imported."""
    files = _find_files(source)
    for path in files or ():
        if (path / "config.json").is_file():
            raise LoraInitError(f"data {path}: this is the directory of a model. Name a file, or a folder of data.")
    if files is None and not check_hub(source, "dataset"):
        stay_offline()


def columns_of(source: str) -> list[str]:
    """Read which columns the first row of a local file has, in no time; none if that takes `datasets`."""
    file, *more = _find_files(source) or [Path()]
    suffix = _suffix(file)
    # What is wrong with a file is said when it is read.
    with suppress(OSError, ValueError, EOFError, csv.Error, zlib.error), _opened(file) as lines:
        if not more and suffix in _DELIMITERS:
            return next(csv.reader(lines, delimiter=_DELIMITERS[suffix]), [])
        if not more and suffix == ".jsonl":
            row = json.loads(next(lines, ""))
            return list(row) if isinstance(row, dict) else []
    return []


def _find_files(source: Any) -> list[Path] | None:
    """Find the files or the folder that a name, a pattern or several names mean.

    None for a hub id; an empty list for what is no name, such as rows in memory.
    """
    if isinstance(source, (list, tuple)) and source and all(isinstance(path, (str, Path)) for path in source):
        return [Path(path).expanduser() for path in source]
    if not isinstance(source, (str, Path)) or str(source) == "-":
        return []
    path = Path(source).expanduser()
    if path.exists():  # also a name with brackets, which would be a pattern
        return [path]
    # Sorted, since the order of a folder's files differs between machines, and the seed's sample with it.
    folder = path.parent
    while not folder.exists():  # a folder that is there is a name, too
        folder = folder.parent
    try:
        matches = sorted(folder.glob(str(path.relative_to(folder))))
    except ValueError as error:  # as of "a**"
        raise LoraInitError(f"data {str(source)!r}: {first_line(error)}.") from error
    if matches:
        return matches
    # A hub id is a name, or an owner and a name: anything else was meant as a path.
    if _suffix(path) in FILE_TYPES or str(source).startswith((".", "~", "/")) or str(source).count("/") > 1:
        raise LoraInitError(f"data {str(source)!r}: no such file or folder.")
    return None


def _suffix(path: Path) -> str:
    """Return the ending that says what is in a file: .csv of data.csv.gz."""
    if path.suffix.lower() == ".gz":
        path = path.with_suffix("")
    return path.suffix.lower()


def _first_line_of(file: Path, index: int) -> int | None:
    """Find the line at which row `index` of a file begins, counted from 0; None if its rows are not lines."""
    suffix = _suffix(file)
    with _opened(file) as lines:
        if suffix == ".jsonl":
            # A blank line is no row.
            numbers = (number for number, line in enumerate(lines, 1) if line.strip())
            return next(islice(numbers, index, None), None)
        if suffix not in _DELIMITERS:
            return None
        # A record may go over several lines, in quotes, so that only the reader knows where the next one begins.
        starts, begins, reader = [], 1, csv.reader(lines, delimiter=_DELIMITERS[suffix])
        for record in reader:
            if record:  # a blank line is none
                starts.append(begins)
            begins = reader.line_num + 1
        return starts[index + 1]  # after the header


def _opened(file: Path) -> Any:
    # "utf-8-sig" drops the mark that spreadsheets begin a file with; newline="" leaves line ends to the csv module.
    return io.TextIOWrapper(_opened_bytes(file), encoding="utf-8-sig", newline="")


def _opened_bytes(file: Path) -> Any:
    return gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb")


def _load(label: str, **arguments: Any) -> Any:
    import datasets

    # What is a pattern to `datasets` is a name here: `[` in the name of a file or of a folder above it, also of the
    # current one.
    names = dict(arguments)
    if "data_files" in names:
        names["data_files"] = [glob.escape(str(Path(file).absolute())) for file in names["data_files"]]
    try:
        table = datasets.load_dataset(**names)
        if arguments["path"] == "json":
            table.data.validate(full=True)  # its reader takes what is no UTF-8, far into a file
            table = _as_written(table, arguments["data_files"])
        return table
    except Exception as error:  # `datasets` raises what its readers, file systems and the hub's client raise
        cause = None
        if isinstance(error, datasets.exceptions.DatasetGenerationError):  # its text says only that something failed
            cause = error.__cause__
        reason = first_line(cause or error)
        if reason.startswith(_NOTHING):
            raise LoraInitError(f"{label}: {_EMPTY}") from error
        files = arguments.get("data_files", ())
        _check_lines(files)
        # In the name of a file these begin a chain of addresses, or, of a compressed one, one of the internet.
        marks = [mark for mark in ("::", "[", "]") if any(mark in str(file) for file in files)]
        if marks:
            reason = f"{reason.rstrip('.')}. If that is not the reason, leave {marks[0]!r} out of its name."
        raise LoraInitError(f"{label}: datasets cannot read it: {reason}") from error


def _from_files(label: str, files: Sequence[Path]) -> Any:
    from pandas.errors import ParserWarning

    kinds = sorted({_suffix(file) for file in files})
    if not any(file.exists() for file in files):
        # A list of texts looks like a list of names.
        raise LoraInitError(f"{label}: no such files. For texts in memory, make rows of them: [{{'text': ...}}, ...].")
    kind = kinds[0]
    if kind not in FILE_TYPES or len(kinds) > 1:
        raise LoraInitError(
            f"{label}: cannot read files of this kind ({', '.join(kinds)}). Expected one of {', '.join(FILE_TYPES)}, "
            "or one of these with .gz."
        )
    reader = FILE_TYPES[kind]
    if reader in _OF_TEXT:
        for file in files:
            _check_text(_label_of(file), file, kind)
    options: dict[str, Any] = {}
    if reader == "csv":  # pandas would take the first field for an index if the first record is too long
        options = {"sep": _DELIMITERS[kind], "index_col": False, **_CELLS_AS_TEXT}
    with warnings.catch_warnings():
        warnings.simplefilter("error", ParserWarning)  # of records that are longer than the header
        return _load(label, path=reader, data_files=[str(file) for file in files], split="train", **options)


def _check_text(label: str, file: Path, kind: str) -> None:
    """Refuse a file in another encoding, with another separator, or with other rows than are read."""
    try:
        with _opened_bytes(file) as opened:
            start = opened.read(_LOOKED_AT).removeprefix(codecs.BOM_UTF8)
    except (OSError, EOFError, zlib.error):
        return  # `datasets` says what is wrong with it
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)  # the last character may be cut off
    except UnicodeDecodeError as error:
        encoding = "LATIN1"  # a guess; UTF-16 says so itself
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            encoding = "UTF-16"
        line = start.count(b"\n", 0, error.start) + 1
        raise LoraInitError(
            f"{label}, line {line}: byte 0x{start[error.start]:02x} is not valid UTF-8, the encoding expected. Save "
            f"the file as UTF-8, for example as `CSV UTF-8` in a spreadsheet, or with iconv -f {encoding} -t UTF-8."
        ) from None
    if FILE_TYPES[kind] == "json" and _NO_OBJECT.match(text):
        raise LoraInitError(f"{label}: its rows are numbers, texts or lists. Expected objects: {{'text': ...}}.")
    if kind == ".csv":
        _check_separator(label, text.partition("\n")[0])


def _check_separator(label: str, header: str) -> None:
    """Refuse a CSV file whose first line has semicolons or tabs, and no comma: it would be read as one column."""
    if "," in header:
        return
    match = re.search("[;\t]", header)
    if match is None:
        return
    separator, remedy = "a tab", ", or name it .tsv"
    if match[0] == ";":
        separator, remedy = "a semicolon", ""
    raise LoraInitError(
        f"{label}: its columns are separated by {separator}, expected a comma. Save it with commas{remedy}."
    )


def _check_lines(files: Sequence[str]) -> None:
    """Find the line of JSON lines that is none, as of a file that was cut off."""
    for name in files:
        file = Path(name)
        if _suffix(file) != ".jsonl":
            continue
        with suppress(OSError, EOFError, zlib.error, UnicodeDecodeError), _opened(file) as lines:
            _json_lines(lines, _label_of(file))


def _as_written(table: Any, files: Sequence[str]) -> Any:
    """Read JSON again of which `datasets` makes points in time: they are text in the file."""
    if not any("timestamp" in str(kind) for kind in table.features.values()):
        return table
    rows: list[Any] = []
    for file in files:
        rows += _json_rows(Path(file))
    return _from_memory(rows, "train", 0)


def _json_rows(file: Path) -> Iterator[Any]:
    """Read rows one after the other, on lines or not, or an array of them."""
    with _opened(file) as opened:
        content, at = opened.read().strip(), 0
    # Not strict: `datasets` has read the file by now, and takes control characters inside texts.
    decoder, space = json.JSONDecoder(strict=False), re.compile(r"\s*")
    while at < len(content):
        value, at = decoder.raw_decode(content, at)
        if isinstance(value, list):
            yield from value
        else:
            yield value
        at = space.match(content, at).end()  # type: ignore[union-attr]


def _from_memory(source: Any, split: str, seed: int) -> Any:
    import datasets
    import pandas
    import pyarrow  # type: ignore[import-untyped]

    if isinstance(source, datasets.DatasetDict):
        if split not in source:
            raise LoraInitError(f"the data has no split {split!r}, only {', '.join(source)}. Pass one of them alone.")
        source = source[split]
    if isinstance(source, datasets.Dataset):
        return source
    if isinstance(source, datasets.IterableDataset):
        # The buffer is as large as what is taken, so that the draw reaches twice as far.
        stream = source.shuffle(seed=seed, buffer_size=MOST_STREAMED)
        return _from_memory(list(islice(stream, MOST_STREAMED)), split, seed)
    try:
        if type(source).__name__ == "DataFrame":
            return datasets.Dataset.from_pandas(source, preserve_index=False)
        if isinstance(source, Sequence) and all(isinstance(row, Mapping) for row in source):
            frame = pandas.DataFrame(map(dict, source), dtype=object)  # of all rows; `datasets` takes the first row's
            return datasets.Dataset.from_dict(frame.where(frame.notna(), None).to_dict("list"))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        said = " ".join(map(str, error.args))
        raise LoraInitError(f"the rows mix kinds of values in a column: {said}. Write all of it as text.") from error
    raise LoraInitError(
        f"data of type {type(source).__name__}: expected a path, a hub id, a datasets.Dataset, a pandas DataFrame or a "
        "list of mappings from column to value."
    )


def _json_lines(lines: Iterable[str], place: str) -> list[Any]:
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise LoraInitError(f"{place}, line {number} is not JSON: {first_line(error)} Is it cut off?") from error
    return rows


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep `datasets` from printing while it converts: it is quick, and its errors come as exceptions."""
    import datasets

    logger, shown = logging.getLogger("datasets"), not datasets.are_progress_bars_disabled()
    level = logger.level
    try:
        datasets.disable_progress_bars()
        logger.setLevel(logging.CRITICAL)
        yield
    finally:
        logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()
