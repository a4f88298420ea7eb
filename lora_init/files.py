"""Write a file or a directory in one piece: all of it appears under its name, or nothing; and one command at a time."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import uuid
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from filelock import FileLock, Timeout

from lora_init.errors import LoraInitError

Made = TypeVar("Made")
# How a file of each kind begins. Only a file of the same kind may be replaced: --output may have been mistyped, and
# neither somebody's data nor a picture of theirs is lost by that.
_BEGINNINGS = {
    "plan": rb'\{\s*"format": "lora_init\.plan"',
    "statistics file": rb'.{8}\{.*"format":"lora_init\.statistics"',  # safetensors: a length, then JSON
    "PNG picture": rb"\x89PNG\r\n\x1a\n",
    "SVG picture": rb"(<\?xml.*?)?<svg",
    "HTML page": rb"<!(?i:doctype html)",
    "GGUF file": rb"GGUF",
}
# What a terminal obeys, but tab and ends of lines. Files may be from anybody, and a name in one of them could clear the
# screen.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format


def as_path(value: Any, needed: str) -> Path:
    """Return a path that the caller passed; refuse anything that is none, such as a model."""
    if not isinstance(value, (str, os.PathLike)):
        raise LoraInitError(f"{needed} is needed, as a path, and got {type(value).__name__}.")
    return Path(value).expanduser()


def check_writable(path: str | Path, overwrite: bool, kind: str) -> None:
    """Check, before the work, that a command may write its file to this path.

    An existing file is replaced only if `overwrite`, and only if it is of the same kind, one of `_BEGINNINGS`.
    """
    path = Path(path).expanduser()
    check_output(path, "file")
    if path.exists():
        # The kind comes first: --overwrite does not help with a file of another one.
        if not re.match(_BEGINNINGS[kind], _beginning(path), re.DOTALL):
            raise LoraInitError(f"{path} exists and is no {kind}, so it is never replaced. Choose another name.")
        if not overwrite:
            raise LoraInitError(f"{path} exists. Choose another name, or pass --overwrite to replace this {kind}.")


def check_output(path: Path, what: str) -> None:
    """Check that there is room for what a command writes: a `"file"`, a `"directory"`, or files into a `"folder"`.

    Whether something that is there may be replaced is for `check_writable` and `check_free`. Empty is for any of them.
    """
    path = path.expanduser()
    # `.`, `..` and `/` have no name of their own under which something new could be put in their place.
    if what in ("file", "directory", "") and not path.name:
        raise LoraInitError(f"output '{path}': this directory itself cannot be written anew. Name one in it.")
    if what == "file" and not path.parent.is_dir():
        raise LoraInitError(f"{path}: there is no directory {path.parent}. Create it first.")
    if what == "file" and path.is_dir():
        raise LoraInitError(f"{path} is a directory, and a file is needed. Choose another name.")
    if what in ("directory", "folder") and path.exists() and not path.is_dir():
        raise LoraInitError(f"{path} is a file, and a directory is needed. Choose another name.")
    check_place(path / "file" if what == "folder" else path)


def is_same_place(one: str | Path, other: str | Path) -> bool:
    """Return whether two paths lead to one place, however they are written."""
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def check_place(path: Path) -> None:
    """Write a file of 4 KiB beside a path and remove it: permissions do not tell of a disk that is full or read-only.

    Where that directory does not exist yet, in the nearest one above it.
    """
    place = next(parent for parent in path.absolute().parents if parent.exists())
    probe = _temporary(place / path.name, "tmp")
    try:
        probe.write_bytes(bytes(4096))  # an empty file fits on a full disk, too
    except OSError as error:
        reason = error.strerror or error
        raise LoraInitError(f"{path}: {place} cannot be written to ({reason}). Choose another place.") from error
    finally:
        with suppress(OSError):  # it may be half there, or not at all
            probe.unlink()


def _beginning(path: Path) -> bytes:
    """Read the part that shows what kind a file is: the first 4 KiB, of a safetensors file the whole header."""
    with path.open("rb") as file:
        start = file.read(4096)
        # A header with thousands of layers is longer than that, and its `format` may stand at the end.
        length = int.from_bytes(start[:8], "little")
        if start[8:9] == b"{" and length <= _LONGEST_HEADER:
            start += file.read(length)
    return start


def _temporary(path: Path, ending: str) -> Path:
    """Name a file or directory beside a path after the process and the machine that make it, for `_sweep`."""
    # Beside it, since a file can be renamed in one step only within its file system. With a dot in front, so that
    # neither `ls` nor a pattern such as *.safetensors shows it.
    return path.with_name(f".{path.name}.{os.getpid()}-{_machine()}-{uuid.uuid4().hex[:8]}.{ending}")


def _machine() -> str:
    # Several machines may share a directory, and the numbers of another one's processes mean nothing here. As a
    # checksum, which has none of the hyphens and dots of a machine's name.
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _sweep(path: Path, ending: str) -> None:
    """Remove what processes of this machine that were killed have left beside a path."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d{{1,9}})-{_machine()}-[0-9a-f]{{8}}\.{ending}")
    with suppress(OSError):  # no directory, or one that may not be listed
        for entry in os.scandir(path.parent):  # a comparison may have thousands
            match = pattern.fullmatch(entry.name)
            if match is None or _runs(int(match[1])):  # a process that runs is still writing
                continue
            leftover = Path(entry)
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)  # another process may sweep, too


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 is not sent: it asks whether one could be
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


@contextmanager
def locked(path: Path, remedy: str) -> Iterator[None]:
    """Keep other processes away from the same file or directory; they get a line that says who has it.

    The kernel holds the lock, so it goes with the process, however that ends.
    """
    lock = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    holder = ""
    with suppress(OSError, UnicodeDecodeError):
        holder = _shown(lock.read_text(encoding="utf-8"))  # before: older versions of filelock empty the file
    try:
        held = FileLock(lock, timeout=0).acquire()
    except Timeout:
        raise LoraInitError(f"{path} is in use by {holder or 'another process'}. {remedy}") from None
    with held:
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        lock.write_text(f"process {os.getpid()} on {platform.node()} since {now}", encoding="utf-8")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to; the file gets its own when the block ends, and is gone if that raises."""
    fresh = _temporary(path, "tmp")
    _sweep(path, "tmp")
    try:
        yield fresh
        fresh.replace(path)  # in one step: a reader sees the old file or the new one
    except OSError as error:
        raise LoraInitError(
            f"{path}: cannot be written: {error.strerror or error}. Nothing was changed; free some space or choose "
            "another place."
        ) from error
    finally:
        with suppress(OSError):  # it has its name by now, unless something was raised
            fresh.unlink()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it. A crash or Ctrl-C leaves the old file or the new one."""
    with new_file(path) as fresh, fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # before the renaming, which may reach the disk earlier than the content


@contextmanager
def new_directory(directory: str | Path, overwrite: bool, marker: str, replaceable: Collection[str]) -> Iterator[Path]:
    """Yield an empty directory to write into; it gets its name when the block ends, and is gone if that raises.

    An existing empty directory is used. An existing directory with content is replaced only if `overwrite`, and only if
    it has a file named `marker` and nothing but files named in `replaceable`, so that no checkpoint is lost to a typo.
    """
    # resolve() follows a symbolic link to a directory: the target is replaced, the link stays.
    final = Path(directory).expanduser().resolve()
    check_free(directory, overwrite, marker, replaceable)
    fresh, old = _temporary(final, "tmp"), _temporary(final, "old")
    _sweep(final, "tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        yield fresh
        check_free(directory, overwrite, marker, replaceable)  # another process may have written meanwhile
        # A directory that is not empty cannot be replaced in one step, so there are two. Between them the old one has
        # the name `old`, from which it is brought back if the second fails.
        if final.exists():
            final.rename(old)
        fresh.rename(final)
    except BaseException as error:  # Ctrl-C too must leave what was there before
        shutil.rmtree(fresh, ignore_errors=True)
        if old.exists() and not final.exists():
            old.rename(final)
        if isinstance(error, OSError):
            raise LoraInitError(
                f"{directory}: cannot be written: {error.strerror or error}. Nothing was changed; "
                "free some space or choose another directory."
            ) from error
        raise
    shutil.rmtree(old, ignore_errors=True)
    _sweep(final, "old")  # not before: of a process that was killed between two names it is all there is


def check_free(path: str | Path, overwrite: bool, marker: str, replaceable: Collection[str]) -> None:
    """Check that `new_directory` may write here, and can, so that nobody finds out after the work."""
    final = Path(path).expanduser().resolve()
    check_output(Path(path).expanduser(), "directory")
    if final.is_mount():  # it cannot be renamed, as a volume of a container
        raise LoraInitError(f"{path} is a mount point, which cannot be replaced. Name a directory in it.")
    present = []
    if final.is_dir():
        present = sorted(entry.name for entry in final.iterdir())
    if not present:
        return
    if not overwrite:
        raise LoraInitError(
            f"{path} exists and is not empty. Choose another directory, or pass {{overwrite}}.", overwrite=True
        )
    if marker not in present:
        raise LoraInitError(
            f"{path} has no {marker}, so lora_init did not write it, and it is not overwritten. "
            "Choose another directory, or delete this one yourself."
        )
    if not is_as_written(final, marker):
        raise LoraInitError(
            f"{path} was written by lora_init and has been changed since, as by a training that saved into it. "
            "Choose another directory, or delete this one yourself."
        )
    others = [name for name in present if name not in replaceable]
    if others:
        examples = ", ".join(others[:3])
        if len(others) > 3:
            examples += ", ..."
        raise LoraInitError(
            f"{path} holds more than an adapter ({examples}), which "
            "overwriting would delete. Choose another directory, or delete this one yourself."
        )


def digests_of(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Hash the files of these names that a directory has."""
    digests = {}
    for name in names:
        path = directory / name
        if path.is_file():
            digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def is_as_written(directory: Path, record: str) -> bool:
    """Return whether a record of ours is there, and the files that it has hashes of are unchanged.

    PEFT saves into the same directory without a word, and leaves the record of what was there.
    """
    path = directory / record
    if not path.is_file():
        return False
    digests = read_json(path).get("sha256", {})  # a record without hashes decides nothing
    return isinstance(digests, dict) and digests_of(directory, digests) == digests


def parse_json(text: str | bytes) -> Any:
    """Parse JSON that may come from elsewhere: what a terminal would obey becomes a sign that it shows."""
    try:
        return _shown(json.loads(text))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, dict):
        return {_shown(key): _shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return value


def read_fields(kind: type[Made], values: Mapping[str, Any]) -> Made:
    """Make a dataclass of values from JSON; keys that it does not know, of other versions, are ignored."""
    hints = get_type_hints(kind)
    # Types are checked here, once, so that code which computes with a field need not expect a text in it.
    for name, hint in hints.items():
        if name in values and not is_of(values[name], hint):
            raise ValueError(f"{kind.__name__} has {name}={values[name]!r}")
    return kind(**{name: values[name] for name in hints if name in values})


def is_of(value: Any, hint: Any) -> bool:
    """Check whether a value from JSON is of a type such as `list[str] | None`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):  # Optional[X] is the first, X | None the second
        return any(is_of(value, part) for part in inner)
    if origin is list:
        return isinstance(value, list) and all(is_of(item, inner[0]) for item in value)
    if origin in (dict, Mapping):  # keys of JSON are texts
        return isinstance(value, dict) and all(is_of(item, inner[1]) for item in value.values())
    if hint is float:  # JSON writes 1.0 as 1 where another program has saved it
        return isinstance(value, (int, float))
    return hint is Any or isinstance(value, hint)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        # A file of JSON lines is no damaged file: it is data that somebody took for a plan or an adapter.
        if getattr(error, "msg", "") == "Extra data":
            raise LoraInitError(f"{path} holds more than one JSON object, as data on JSON lines do.") from error
        raise LoraInitError(f"{path} is not JSON: {error}. The file is damaged.") from error
    if not isinstance(content, dict):
        raise LoraInitError(f"{path}: expected a JSON object. The file is damaged.")
    return content


def as_plain(value: Any) -> Any:
    """Return a setting as JSON has it: numbers of numpy and torch are no numbers there, nor is a tuple a list."""
    if isinstance(value, Mapping):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_plain(item) for item in value]
    if hasattr(value, "item"):
        return value.item()
    return value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
