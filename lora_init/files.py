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
# How a file of each kind begins. Only a file of the same kind may be replaced.
_BEGINNINGS = {
    "plan": rb'\{\s*"format": "lora_init\.plan"',
    "statistics file": rb'.{8}\{.*"format":"lora_init\.statistics"',  # safetensors: a length, then JSON
    "PNG picture": rb"\x89PNG\r\n\x1a\n",
    "SVG picture": rb"(<\?xml.*?)?<svg",
    "HTML page": rb"<!(?i:doctype html)",
    "GGUF file": rb"GGUF",
}
# What a terminal obeys, but tab and ends of lines.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format


def as_path(value: Any, needed: str) -> Path:
    """Return a path of the caller's; refuse what is none, such as a model."""
    if not isinstance(value, (str, os.PathLike)):
        raise LoraInitError(f"{needed} is needed, as a path, and got {type(value).__name__}.")
    return Path(value).expanduser()


def check_writable(path: str | Path, overwrite: bool, kind: str) -> None:
    """Find out, before the work, whether a command may write a file of its own to this path.

    An existing file is replaced only if `overwrite`, and only if it is of the same kind, one of `_BEGINNINGS`.
    """
    path = Path(path).expanduser()
    check_output(path, "file")
    if path.exists():
        if not re.match(_BEGINNINGS[kind], _beginning(path), re.DOTALL):
            raise LoraInitError(f"{path} exists and is no {kind}, so it is never replaced. Choose another name.")
        if not overwrite:
            raise LoraInitError(f"{path} exists. Choose another name, or pass --overwrite to replace this {kind}.")


def check_output(path: Path, what: str) -> None:
    """Check that there is room for what a command writes: a `"file"`, a `"directory"`, or files into a `"folder"`.

    Whether something that is there may be replaced is for `check_writable` and `check_free`. Empty is for any of them.
    """
    path = path.expanduser()
    if what in ("file", "directory", "") and not path.name:
        raise LoraInitError(f"output '{path}': this directory itself cannot be written anew. Name one in it.")
    if what == "file" and not path.parent.is_dir():
        raise LoraInitError(f"{path}: there is no directory {path.parent}. Create it first.")
    if what == "file" and path.is_dir():
        raise LoraInitError(f"{path} is a directory, and a file is needed. Choose another name.")
    if what in ("directory", "folder") and path.exists() and not path.is_dir():
        raise LoraInitError(f"{path} is a file, and a directory is needed. Choose another name.")
    check_place(path / "file" if what == "folder" else path)


def check_place(path: Path) -> None:
    """Write a file of 4 KiB beside a path and remove it: permissions do not tell of a disk that is full or read-only.

    Beside it, or in the nearest directory above that exists.
    """
    place = next(parent for parent in path.absolute().parents if parent.exists())
    probe = _temporary(place / path.name, "tmp")
    try:
        probe.write_bytes(bytes(4096))
    except OSError as error:
        reason = error.strerror or error
        raise LoraInitError(f"{path}: {place} cannot be written to ({reason}). Choose another place.") from error
    finally:
        with suppress(OSError):
            probe.unlink()


def _beginning(path: Path) -> bytes:
    """Read what tells the kind of a file: the first 4 KiB, of a safetensors file the whole header."""
    with path.open("rb") as file:
        start = file.read(4096)
        length = int.from_bytes(start[:8], "little")
        if start[8:9] == b"{" and length <= _LONGEST_HEADER:
            start += file.read(length)
    return start


def _temporary(path: Path, ending: str) -> Path:
    """Name a file or directory beside a path that says which process of which machine made it, for `_sweep`."""
    return path.with_name(f".{path.name}.{os.getpid()}-{_machine()}-{uuid.uuid4().hex[:8]}.{ending}")


def _machine() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _sweep(path: Path, ending: str) -> None:
    """Remove what processes of this machine that were killed have left beside a path."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d{{1,9}})-{_machine()}-[0-9a-f]{{8}}\.{ending}")
    with suppress(OSError):  # no directory, or one that may not be listed
        for entry in os.scandir(path.parent):  # a comparison may have thousands
            match = pattern.fullmatch(entry.name)
            if match is None or _runs(int(match[1])):
                continue
            left = Path(entry)
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


@contextmanager
def locked(path: Path, remedy: str) -> Iterator[None]:
    """Keep other processes that ask for the same file or directory out; they get a line that says who has it.

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
        fresh.replace(path)
    except OSError as error:
        raise LoraInitError(
            f"{path}: cannot be written: {error.strerror or error}. Nothing was changed; free some space or choose "
            "another place."
        ) from error
    finally:
        with suppress(OSError):
            fresh.unlink()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it. A crash or Ctrl-C leaves the old file or the new one."""
    with new_file(path) as fresh, fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


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
    if final.is_mount():
        raise LoraInitError(f"{path} is a mount point, which cannot be replaced. Name a directory in it.")
    present = sorted(entry.name for entry in final.iterdir()) if final.is_dir() else []
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
        raise LoraInitError(
            f"{path} holds more than an adapter ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}), which "
            "overwriting would delete. Choose another directory, or delete this one yourself."
        )


def digests_of(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Hash the files of these names that a directory has."""
    there = (directory / name for name in names)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in there if path.is_file()}


def is_as_written(directory: Path, record: str) -> bool:
    """Return whether a record of ours is there, and the files that it has hashes of are unchanged.

    PEFT saves into the same directory without a word, and leaves the record of what was there.
    """
    path = directory / record
    digests = read_json(path).get("sha256", {}) if path.is_file() else None
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
    return [_shown(item) for item in value] if isinstance(value, list) else value


def read_fields(kind: type[Made], values: Mapping[str, Any]) -> Made:
    """Make a dataclass of values from JSON; those that it does not know, of other versions, are left alone."""
    hints = get_type_hints(kind)
    for name, hint in hints.items():
        if name in values and not is_of(values[name], hint):
            raise ValueError(f"{kind.__name__} has {name}={values[name]!r}")
    return kind(**{name: values[name] for name in hints if name in values})


def is_of(value: Any, hint: Any) -> bool:
    """Check whether a value from JSON is of a type such as `list[str] | None`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(is_of(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(is_of(each, inner[0]) for each in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(is_of(each, inner[1]) for each in value.values())
    if hint is float:
        return isinstance(value, (int, float))
    return hint is Any or isinstance(value, hint)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data":
            raise LoraInitError(f"{path} holds more than one JSON object, as data on JSON lines do.") from error
        raise LoraInitError(f"{path} is not JSON: {error}. The file is damaged.") from error
    if not isinstance(content, dict):
        raise LoraInitError(f"{path}: expected a JSON object. The file is damaged.")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
