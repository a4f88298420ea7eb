"""What other packages bring: none is chosen where two have the same name, and messages name the package."""

from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest

from lora_init.errors import LoraInitError, LoraInitWarning
from lora_init.packages import Group, check_takes, package_of
from tests.conftest import refused


def entry(package, release="1.0"):
    made = EntryPoint("odd", "theirs:THING", "lora_init.policies")
    vars(made).update(dist=SimpleNamespace(name=package, version=release))
    return made


def test_of_a_name_that_two_packages_have_neither_is_loaded(monkeypatch):
    group = Group("lora_init.policies", "policy")
    monkeypatch.setattr(
        "lora_init.packages.entry_points", lambda group: [entry("one"), entry("two", "2.1"), entry("3")]
    )
    assert [package_of(one) for one in group.entries["odd"]] == ["one 1.0", "two 2.1", "3 1.0"]
    assert group.entries is group.entries  # asked once
    said = "^policy 'odd' of one 1.0 is also in two 2.1, 3 1.0. Uninstall all but one.$"
    refused(said, group.loading("odd").__enter__)


def test_what_a_module_does_as_it_is_imported_is_one_line_and_ctrl_c_ends_it(installed):
    installed("lora_init.policies", odd=1)
    group = Group("lora_init.policies", "policy")

    def load(error):
        with group.loading("odd"):
            raise error

    refused("^policy 'odd' of an unknown package cannot be imported: SystemExit: 3", load, SystemExit(3))
    with pytest.raises(KeyboardInterrupt):
        load(KeyboardInterrupt())


def test_a_function_that_does_not_say_what_it_takes_is_taken():
    check_takes(max, "f", "a", "b")  # written in C
    check_takes(lambda a, *more: 0, "f", "a", "b")
    refused(r"^f takes \(a\), and is called with \(a, b\)", check_takes, lambda a: 0, "f", "a", "b")
    refused(r"^f takes \(a, b\), and is called with \(a\)", check_takes, lambda a, b: 0, "f", "a")
    refused(r"^f is 3, expected a function of \(a, b\)", check_takes, 3, "f", "a", "b")


def test_a_name_of_ours_is_ours_whoever_brings_it(monkeypatch):
    monkeypatch.setattr("lora_init.packages.entry_points", lambda group: [entry("one")])
    group = Group("lora_init.policies", "policy")
    with pytest.warns(LoraInitWarning) as warned:
        group.warn_of("odd"), group.warn_of("even")
    assert [str(one.message) for one in warned] == [
        "policy 'odd' of one 1.0 is not used: this name is lora_init's own."
    ]


def test_what_an_entry_brings_is_yielded_with_what_messages_call_it_and_our_errors_stay(installed):
    installed("lora_init.policies", odd=1)
    group = Group("lora_init.policies", "policy")
    with group.loading("odd") as (found, where):
        assert (found.load(), where) == (1, "policy 'odd' of an unknown package")
    with pytest.raises(LoraInitError, match=r"^as it is\.$"), group.loading("odd"):
        raise LoraInitError("as it is.")
