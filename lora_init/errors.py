"""The one exception of this package, and how any error is put into one line."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from importlib.util import find_spec
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any

# Libraries that only some things need, and the extra of this package that installs each.
EXTRAS = {
    "matplotlib": "plots",
    "scipy": "compare",
    "sklearn": "compare",
    "gguf": "serving",
    "httpx2": "verify",
    "bitsandbytes": "quantized",
    "ray": "ray",
    "distributed": "dask",
    "submitit": "slurm",
}


Spell = Callable[[str, Any], str]  # writes an option, by name and value, in the words of whoever is spoken to


def in_python(name: str, value: Any) -> str:
    """Write an option as an argument: `rank=8`, and `rank=` where the value is `...`."""
    shown = str(value) if isinstance(value, PurePath) else repr(value)
    return f"{name}=" + ("" if value is ... else shown)


class Message(Exception):
    """One line about options: `{rank}` in its text reads `rank=8` in Python and `--rank 8` on the command line.

    Example:
        >>> str(LoraInitError("{rank} with {method}: too large.", rank=8, method="eva"))
        "rank=8 with method='eva': too large."
    """

    def __init__(self, text: str, **options: Any) -> None:
        self.text, self.options = text, options
        super().__init__(self.spelled(in_python))

    def spelled(self, spell: Spell) -> str:
        """Write it, with options as `spell` does, in one line; a name that stands in a value stays."""
        options = {f"{{{name}}}": spell(name, value) for name, value in self.options.items()}
        names = "|".join(map(re.escape, options)) or "(?!)"  # which matches nothing
        return " ".join(re.sub(names, lambda match: options[match[0]], self.text).split())


class LoraInitError(Message, ValueError):
    """Says where something is wrong, what was got and expected, and what to do about it, in one line."""

    def within(self, where: str = "", remedy: str = "", **options: Any) -> LoraInitError:
        """Return the same with a place before it, and what else to do about it."""
        text = f"{where}: {self.text}" if where else self.text
        return LoraInitError(f"{text} {remedy}", **self.options | options)


class LoraInitWarning(Message, UserWarning):
    """Describes a likely mistake, and what to do about it, in one line."""


def warn(text: str, **options: Any) -> str:
    """Warn of a likely mistake, with options as a `Message` has them, at the line that called this package; return it.

    That is what `skip_file_prefixes` of Python 3.12 is for.
    """
    frame, level, outermost = inspect.currentframe(), 1, 1
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] == "lora_init":
            outermost = level
        frame, level = frame.f_back, level + 1
    message = LoraInitWarning(text, **options)
    warnings.warn(message, stacklevel=outermost + 1)
    return str(message)


def explain(error: BaseException, spell: Spell = in_python) -> str:
    """Return in one line what went wrong and, where it is known, what to do about it.

    Example:
        >>> explain(MemoryError())
        'out of memory. Try a smaller --batch-size or --max-length, or --dtype bfloat16.'
    """
    if isinstance(error, LoraInitError):
        return error.spelled(spell)
    if is_out_of_memory(error):
        return "out of memory. Try a smaller --batch-size or --max-length, or --dtype bfloat16."
    if isinstance(error, ImportError) and (library := (error.name or "").partition(".")[0]) in EXTRAS:
        return _how_to_install(library)
    reason = first_line(error)
    if isinstance(error, OSError):
        if error.filename is not None and error.strerror:
            return f"{error.filename}: {error.strerror}."
        return reason
    return f"unexpected {type(error).__name__}: {reason} LORA_INIT_DEBUG=1 shows where."


def require(*libraries: str) -> None:
    """Check, before the work, that libraries of `EXTRAS` are installed."""
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        raise LoraInitError(_how_to_install(*missing))


def _how_to_install(*libraries: str) -> str:
    extras = {EXTRAS[name] for name in libraries}
    extras -= {"plots"} if "compare" in extras else set()  # which it includes
    are, them = ("which is", "it") if len(libraries) == 1 else ("which are", "them")
    command = f"pip install 'lora-init[{','.join(sorted(extras))}]'"
    return f"this needs {', '.join(libraries)}, {are} not installed. Install {them}: {command}"


def require_version(library: str, release: str, what: str) -> None:
    """Check, before the work, that a library is as new as one feature needs, such as `"0.19"`."""
    installed = version(library)
    if [int(part) for part in installed.split(".")[:2]] < [int(part) for part in release.split(".")]:
        raise LoraInitError(f"{what} needs {library} {release} or newer, and {installed} is installed.")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Name the choice closest to a word, if one is close, and all of them.

    Example:
        >>> did_you_mean("evva", ["eva", "random"])
        'Did you mean eva? Choose from eva, random.'
    """
    import difflib

    names = {name.lower(): name for name in choices}
    close = difflib.get_close_matches(str(word).lower(), names, n=1)
    return (f"Did you mean {names[close[0]]}? " if close else "") + f"Choose from {', '.join(names.values())}."


def first_line(error: BaseException) -> str:
    """Shorten what another library says to its first line, at most 300 characters, ending in a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _shortened(lines[0] if lines else type(error).__name__)


def in_one_line(error: BaseException) -> str:
    """Join all lines of what another library says, at most 300 characters, ending in a full stop."""
    return _shortened(" ".join(str(error).split()) or type(error).__name__)


def _shortened(text: str) -> str:
    text = text if len(text) <= 300 else text[:297] + "..."
    return text if text.endswith((".", "!", "?")) else f"{text}."


def is_number(value: Any) -> bool:
    """Return whether a value is a real number, as of Python or numpy, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_number(
    name: str, value: Any, least: float = 0, *, whole: bool = False, above: bool = False, hint: str = ""
) -> None:
    """Refuse what is no finite number of at least `least`, or `above` it, or is not `whole` where that is meant."""
    fits = is_number(value) and (isinstance(value, Integral) or not whole)
    if not fits or not least <= value < 2**63 or (above and value == least):
        kind, bound = "whole number" if whole else "number", "above" if above else "of at least"
        raise LoraInitError(f"{{{name}}}, expected a {kind} {bound} {least:g}.{hint}", **{name: value})


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out."""
    # By name and by text: torch has a class for CUDA only, and importing torch to look would be slow.
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(sign in text for sign in signs)
