"""Defaults are promises: who leaves an option out gets what it was yesterday. A default that changes shows here.

python -m tests.test_defaults  # writes tests/defaults.json; CHANGELOG.md says what changed
"""

import inspect
import json
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import typer

import lora_init
from lora_init.cli.app import app

AGAIN = "If that is meant, run `python -m tests.test_defaults`."
KEPT = Path(__file__).with_name("defaults.json")


def shown(default):
    return getattr(default, "__qualname__", repr(default))  # of a function its name, not its place


def of_signature(entry):
    every = inspect.signature(entry).parameters.values()
    return {one.name: shown(one.default) for one in every if one.default is not inspect.Parameter.empty}


def of_fields(entry):
    made = {one.name: one.default_factory for one in fields(entry) if one.default_factory is not MISSING}
    plain = {one.name: shown(one.default) for one in fields(entry) if one.default is not MISSING}
    return plain | {name: repr(make()) for name, make in made.items()}


def of_commands(group, path=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from of_commands(command, (*path, name))
        else:
            given = {one.name: repr(one.default) for one in command.params if one.default not in (None, False, ())}
            yield " ".join(("lora-init", *path, name)), given


def defaults():
    found = {}
    for name in lora_init.__all__:
        entry = getattr(lora_init, name)
        if callable(entry):
            found[name] = of_fields(entry) if is_dataclass(entry) else of_signature(entry)
    return {name: given for name, given in (found | dict(of_commands(typer.main.get_command(app)))).items() if given}


def test_who_leaves_an_option_out_gets_what_it_was():
    kept, now = json.loads(KEPT.read_text(encoding="utf-8")), defaults()
    assert now.keys() == kept.keys(), AGAIN
    for name, given in kept.items():
        assert now[name] == given, f"{name}. {AGAIN}"


if __name__ == "__main__":
    KEPT.write_text(json.dumps(defaults(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
