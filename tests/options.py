"""Whether each option of an entry does something: values to try options with, and a call with each."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from lora_init.collection.processes import digest_of
from lora_init.errors import LoraInitError


class Try(NamedTuple):
    """A value to try an option with, what has to be given beside it, and whether a record of it alone is enough."""

    value: Any
    beside: Mapping[str, Any] = MappingProxyType({})
    recorded: bool = False


class Free(NamedTuple):
    """An option that changes nothing of the result, and why it need not."""

    why: str


SHOWN, INPUT, PLACE = Free("what is shown"), Free("what it works on, not a wish"), Free("where it runs")
THERE = Free("of what is there: tests/collection/test_statistics_file.py")
CODE = Free("allows code that these models do not have")


def tried(entry, options, probes):
    """Pair options with how they are tried; fail with what to add where one has no value."""
    missing = [name for name in options if name not in probes]
    if missing:
        pytest.fail(
            f"{entry} has the new option {', '.join(missing)}: add to OPTIONS of its test a Try with a "
            "value that changes what comes out, or a Free that says why it need not.",
            pytrace=False,
        )
    return {name: probes[name] for name in options if isinstance(probes[name], Try)}


def without(value, name):
    """Leave out of a record what it says of an option itself."""
    if isinstance(value, dict):
        return {key: without(one, name) for key, one in value.items() if key not in (name, "seconds", "versions")}
    return [without(one, name) for one in value] if isinstance(value, (list, tuple)) else value


def check(entry, call, options, probes, base=None):
    """Call an entry, which returns a result and its record, with each option; find those that do nothing."""
    idle, plain = [], {}
    for name, probe in tried(entry, options, probes).items():
        given = (base or {}) | dict(probe.beside)
        if str(probe.beside) not in plain:
            plain[str(probe.beside)] = call(**given)
        try:
            changed = call(**given | {name: probe.value})
        except LoraInitError as error:
            assert "\n" not in str(error)
            continue
        (result, record), (other_result, other_record) = plain[str(probe.beside)], changed
        left_out = None if probe.recorded else name
        records = without(record, left_out), without(other_record, left_out)
        if digest_of(result) == digest_of(other_result) and digest_of(records[0]) == digest_of(records[1]):
            idle.append(name)
    remedy = "hand it to what it is for; if a statistics file hides it, add it to the settings in `collect`"
    assert not idle, f"{entry} takes {', '.join(idle)} and does nothing with it: {remedy}"
