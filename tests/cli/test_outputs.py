"""Every command finds out before its work whether it can write what it is asked for."""

from pathlib import Path

import pytest
import typer

from lora_init.cli import app as cli
from lora_init.cli.commands import WRITES
from tests.commands import assert_one_line_error, run

# What goes with an output; names of models and data that are nowhere show what is looked at first.
WORDS = {
    "init": ["model", "data.jsonl"],
    "ranks": ["statistics"],
    "merge": ["one", "two"],
    "compare": ["model", "data.jsonl"],
    "dial": ["adapter", "data.jsonl"],
    "replay": ["model"],
    "export": ["adapter", "--engine", "llama.cpp"],
    "add": ["adapter", "--data", "data.jsonl"],
    "train": [],
}
OUTPUTS = [(command, option) for command, options in WRITES.items() for option in options]
PLACES = {
    "in a file": ("file/x", "cannot be written to (Not a directory)"),
    "read-only": ("/proc/x", "/proc cannot be written to"),
    "in no directory": ("none/x", "there is no directory none. Create it first."),
    "a directory": ("directory", "directory is a directory, and a file is needed. Choose another name."),
    "a file": ("file", "file is a file, and a directory is needed. Choose another name."),
}


def commands(group=None, path=()):
    for name, one in (group or typer.main.get_command(cli.app)).commands.items():
        if hasattr(one, "commands"):
            yield from commands(one, (name,))
        else:
            yield (*path, name), one


def test_no_command_has_an_output_that_is_not_looked_at():
    found = {}
    for path, one in commands():
        said = {p.name: f"{p.help or ''} {p.name}".lower() for p in one.params}
        names = [name for name, text in said.items() if text.endswith((" output", " plot")) or "to write" in text]
        found[path[-1]] = [*names, *(["bank"] if path in (("bank", "add"), ("bank", "train")) else [])]
    assert {name: names for name, names in found.items() if names} == {name: [*names] for name, names in WRITES.items()}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("command", "option"), OUTPUTS)
def test_what_cannot_be_written_is_refused_before_the_work(command, option, place, tmp_path, monkeypatch):
    (path, error), what = PLACES[place], WRITES[command][option]
    of_files, of_directories = place in ("in no directory", "a directory"), place in ("in a file", "a file")
    if (of_files and what != "file") or (of_directories and what not in ("directory", "folder")):
        pytest.skip("there it may be")
    if path.startswith("/proc") and not Path("/proc/self").is_dir():
        pytest.skip("no directory in which not even root makes files")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    where = [path, *WORDS[command]] if option == "bank" else [*WORDS[command], f"--{option}", path]
    made = run(*(["bank"] if option == "bank" else []), command, *where)
    assert_one_line_error(made, error)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["directory", "file"]
