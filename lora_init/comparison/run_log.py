"""The directory of a comparison: its settings, and one line for each run that ended. Killed anywhere, it goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_init.errors import LoraInitError
from lora_init.files import write_whole

SETTINGS_FILE, RUNS_FILE = "settings.json", "runs.jsonl"
# What tells one run from another.
KEYS = ("task", "start", "matched_scale", "equal_parameters", "seed", "learning_rate")
# More of these may be asked of a directory that has some: they shape no single run.
_GROWING = ("starts", "learning_rates", "seeds")
_FREE = ("sweep", "match_scale", "threads", "versions", "processor", "command")

Record = dict[str, Any]


class RunLog:
    """The runs of a comparison in their directory. Opening one makes it, or goes on with what is there.

    Attributes:
        directory: Where it is.
        settings: What all runs share, and the starts, rates and seeds asked for so far.
        records: The runs that ended, by `KEYS`; of two for the same run the later.

    Raises:
        LoraInitError: The directory has runs with other settings, or holds something else, or cannot be written.
    """

    def __init__(self, directory: str | Path, settings: Mapping[str, Any]) -> None:
        self.directory = Path(directory).expanduser()
        self._runs = self.directory / RUNS_FILE
        self.settings = dict(settings)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if (self.directory / SETTINGS_FILE).exists():
                self.settings = _merged(self.directory, read_settings(self.directory), self.settings)
            elif any(self.directory.iterdir()):
                raise LoraInitError(
                    f"{self.directory} is not empty and has no {SETTINGS_FILE}, so it holds no comparison. "
                    "Name another directory."
                )
            write_whole(self.directory / SETTINGS_FILE, (json.dumps(self.settings, indent=2) + "\n").encode())
            self._drop_torn_line()
        except OSError as error:
            raise self._unwritable(error) from error
        self.records = {run_key(record): record for record in read_runs(self.directory)}

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a run that ended; it is on the disk when this returns.

        Raises:
            LoraInitError: It cannot be written; the runs before it are as they were.
        """
        line = (json.dumps(_finite(record), allow_nan=False) + "\n").encode()
        size = self._runs.stat().st_size if self._runs.exists() else 0
        try:
            with self._runs.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                os.truncate(self._runs, size)  # half a line
            raise self._unwritable(error) from error
        self.records[run_key(record)] = json.loads(line)

    def _drop_torn_line(self) -> None:
        """Cut off what a run that was killed while it wrote has left."""
        if self._runs.exists():
            content = self._runs.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(self._runs, whole)

    def _unwritable(self, error: OSError) -> LoraInitError:
        return LoraInitError(
            f"{self.directory}: cannot be written: {error.strerror or error}. The runs that ended before are kept. "
            "Free some space and give the same command again."
        )


def peek(directory: Path, settings: Mapping[str, Any]) -> dict[tuple[Any, ...], Record]:
    """Read the runs in a directory, if there are any, and change nothing.

    Raises:
        LoraInitError: They have other settings, or are damaged.
    """
    if not (directory / SETTINGS_FILE).exists():
        return {}
    _merged(directory, read_settings(directory), settings)
    return {run_key(record): record for record in read_runs(directory)}


def run_key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Tell a run from others."""
    return tuple(record[name] for name in KEYS)


def read_settings(directory: Path) -> dict[str, Any]:
    """Read `settings.json`.

    Raises:
        LoraInitError: It is missing or no JSON object.
    """
    path = directory / SETTINGS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoraInitError(f"{path}: cannot be read ({error}). Name the directory of a comparison.") from error
    if not isinstance(content, dict):
        raise LoraInitError(f"{path}: not an object. Name the directory of a comparison.")
    return content


def read_runs(directory: Path) -> list[Record]:
    """Read `runs.jsonl`, whole lines only; of two for the same run the later, in its own place.

    Raises:
        LoraInitError: A line is not a run.
    """
    path = directory / RUNS_FILE
    if not path.exists():
        return []
    found: dict[tuple[Any, ...], Record] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            key = run_key(record)
        except (ValueError, KeyError, TypeError) as error:
            raise LoraInitError(
                f"{path}, line {number}: not a run ({error}). Remove the line; the run is repeated."
            ) from error
        found.pop(key, None)
        found[key] = record
    return list(found.values())


def _merged(directory: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    differing = [
        f"{name} was {_short(old.get(name))}, now {_short(new.get(name))}"
        for name in [*new, *(name for name in old if name not in new)]
        if name not in (*_GROWING, *_FREE) and old.get(name) != json.loads(json.dumps(new.get(name)))
    ]
    if differing:
        raise LoraInitError(
            f"{directory} has runs of another configuration: {'; '.join(differing)}. "
            "Name another directory, or use the settings of this one."
        )
    grown = {name: [*old[name], *(value for value in new[name] if value not in old[name])] for name in _GROWING}
    return {**new, **grown}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _finite(value: Any) -> Any:
    """Write NaN and infinity as null, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value
