"""What an adapter is to be like: which arguments were given, and whether they say what a `LoraConfig` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar, cast

from lora_init.errors import LoraInitError

T = TypeVar("T")


class _Default(Generic[T]):
    """A default in a signature. It looks like its value there, and is not mistaken for an argument that equals it."""

    def __init__(self, value: T) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


def default(value: T) -> T:
    """Mark the default of a parameter, so that `only_given` knows whether an argument was given."""
    return cast("T", _Default(value))


def only_given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the arguments that were not given."""
    return {name: value for name, value in arguments.items() if not isinstance(value, _Default)}


def with_defaults(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Put defaults in the place of the arguments that were not given.

    Example:
        >>> arguments = dict(rank=default(16), lora_alpha=16)
        >>> only_given(arguments), with_defaults(arguments)
        ({'lora_alpha': 16}, {'rank': 16, 'lora_alpha': 16})
    """
    return {name: value.value if isinstance(value, _Default) else value for name, value in arguments.items()}


def check_agreement(given: Mapping[str, Any], said: Mapping[str, Any], whose: str) -> None:
    """Refuse arguments that say otherwise than a configuration does."""
    for name, value in given.items():
        if _plain(value) != _plain(said[name]):
            raise LoraInitError(f"{name}={value!r}: {whose} decides that and says {said[name]!r}. Leave it out here.")


def _plain(value: Any) -> Any:
    """Compare lists of names as sets, and none as an empty one."""
    return value if isinstance(value, (str, int, float)) else frozenset(value or ())
