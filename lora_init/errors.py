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
from typing import Any, TypeGuard

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


# The same checks serve Python, the command line and trainers, and each names options in its own way: `rank=8`,
# `--rank 8`. So a message keeps its options apart from its text, and is put into words only where it is shown.
Spell = Callable[[str, Any], str]  # writes an option, by name and value, in the words of whoever is spoken to


def in_python(name: str, value: Any) -> str:
    """Write an option as an argument: `rank=8`, and `rank=` where the value is `...`."""
    if value is ...:  # the option is meant, whatever its value
        return f"{name}="
    if isinstance(value, PurePath):  # PosixPath('a') is nothing that anybody typed
        return f"{name}={value}"
    return f"{name}={value!r}"


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
        """Return the message in one line, with each option as `spell` writes it."""
        # Not by `str.format`: a value may have braces of its own, and all are replaced in one go, so that a name in
        # braces within a value stays.
        options = {f"{{{name}}}": spell(name, value) for name, value in self.options.items()}
        names = "|".join(map(re.escape, options)) or "(?!)"  # which matches nothing
        return " ".join(re.sub(names, lambda match: options[match[0]], self.text).split())


# Also a ValueError, which is what Python's own functions raise where an argument is wrong.
class LoraInitError(Message, ValueError):
    """Says where something is wrong, what was got and expected, and what to do about it, in one line."""

    def within(self, where: str = "", remedy: str = "", **options: Any) -> LoraInitError:
        """Return the same error with a place before its text, and a remedy after it."""
        text = f"{where}: {self.text}" if where else self.text
        return LoraInitError(f"{text} {remedy}", **self.options | options)


class LoraInitWarning(Message, UserWarning):
    """Describes a likely mistake, and what to do about it, in one line."""


def warn(text: str, **options: Any) -> str:
    """Warn of a likely mistake, with options as a `Message` has them, at the line that called this package; return it.

    That is what `skip_file_prefixes` of Python 3.12 is for.
    """
    # The outermost frame of this package is looked for, and not the first one outside: libraries that we call may call
    # us back, as hooks are, and their line says nothing to the user.
    frame, level, outermost = inspect.currentframe(), 1, 1
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] == "lora_init":
            outermost = level
        frame, level = frame.f_back, level + 1
    message = LoraInitWarning(text, **options)
    warnings.warn(message, stacklevel=outermost + 1)  # the frame that called the outermost one
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
    if isinstance(error, ImportError):
        library = (error.name or "").partition(".")[0]
        if library in EXTRAS:
            return _how_to_install(library)
    reason = first_line(error)
    if isinstance(error, OSError):
        # Errors from the system have both. transformers and the hub raise some that have a text alone.
        if error.filename is not None and error.strerror:
            return f"{error.filename}: {error.strerror}."
        return reason
    return f"unexpected {type(error).__name__}: {reason} LORA_INIT_DEBUG=1 shows where."


def require(*libraries: str) -> None:
    """Check, before the work, that libraries of `EXTRAS` are installed."""
    missing = [name for name in libraries if find_spec(name) is None]  # without importing them
    if missing:
        raise LoraInitError(_how_to_install(*missing))


def _how_to_install(*libraries: str) -> str:
    extras = {EXTRAS[name] for name in libraries}
    if "compare" in extras:
        extras.discard("plots")  # which it includes
    are, them = ("which is", "it") if len(libraries) == 1 else ("which are", "them")
    command = f"pip install 'lora-init[{','.join(sorted(extras))}]'"
    return f"this needs {', '.join(libraries)}, {are} not installed. Install {them}: {command}"


def require_version(library: str, release: str, what: str) -> None:
    """Check, before the work, that a library is as new as one feature needs, such as `"0.19"`."""
    installed = version(library)
    # As numbers, since "0.9" is older than "0.19". Parts after the first two may have letters, as in 0.19.0.dev0.
    if _numbers(installed.split(".")[:2]) < _numbers(release.split(".")):
        raise LoraInitError(f"{what} needs {library} {release} or newer, and {installed} is installed.")


def _numbers(parts: Iterable[str]) -> list[int]:
    return [int(part) for part in parts]


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Name the choice closest to a word, if one is close, and all of them.

    Example:
        >>> did_you_mean("evva", ["eva", "random"])
        'Did you mean eva? Choose from eva, random.'
    """
    import difflib

    names = {name.lower(): name for name in choices}  # upper and lower case are no difference to a reader
    close = difflib.get_close_matches(str(word).lower(), names, n=1)
    text = f"Choose from {', '.join(names.values())}."
    if close:
        text = f"Did you mean {names[close[0]]}? {text}"
    return text


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, at most 300 characters, ending in a full stop."""
    for line in str(error).splitlines():
        if line.strip():
            return _shortened(line.strip())
    return _shortened(type(error).__name__)  # some say nothing, such as an AssertionError


def in_one_line(error: BaseException) -> str:
    """Join all lines of another library's error, at most 300 characters, ending in a full stop."""
    return _shortened(" ".join(str(error).split()) or type(error).__name__)


def _shortened(text: str) -> str:
    if len(text) > 300:
        text = text[:297] + "..."
    if not text.endswith((".", "!", "?")):
        text += "."
    return text


def is_number(value: Any) -> bool:
    """Return whether a value is a real number, of Python or numpy; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: Any) -> TypeGuard[int]:
    """Return whether a value is a whole number, of Python or numpy; True and False are none, nor is 2.0."""
    return is_number(value) and isinstance(value, Integral)


def check_switches(**switches: Any) -> None:
    """Refuse what is neither True nor False: a text such as "no" would count as true."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise LoraInitError(f"{{{name}}}, expected True or False.", **{name: value})


def check_number(
    name: str, value: Any, least: float = 0, *, whole: bool = False, above: bool = False, hint: str = ""
) -> None:
    """Refuse anything but a finite number of at least `least`; with `above` a larger one, with `whole` a whole one."""
    fits = is_whole(value) if whole else is_number(value)
    # The comparison refuses NaN, too. 2**63 is the first whole number that torch cannot hold.
    if not fits or not least <= value < 2**63 or (above and value == least):
        kind = "whole number" if whole else "number"
        bound = "above" if above else "of at least"
        raise LoraInitError(f"{{{name}}}, expected a {kind} {bound} {least:g}.{hint}", **{name: value})


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out."""
    # By name and by text: torch has a class for CUDA only, and importing torch to look would be slow.
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(sign in text for sign in signs)
