"""How a function becomes a command: its options, those of its dataclasses, and those that every command has."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
import typer
from typer import Argument, Option
from typer.testing import CliRunner

from lora_init.cli import commands, console
from lora_init.cli.commands import command, offered
from lora_init.cli.help import GroupedCommand
from lora_init.loading.examples import Wanted


@dataclass(frozen=True, kw_only=True)
class Group:
    """Options of a group, one of its own class, and a field for Python alone."""

    title: ClassVar = "A group"
    size: Annotated[int, dict(min=1, help="A size.", first=True)] = 3
    names: Annotated[list[str] | None, dict(kind=str, default="x,y", help="Names.")] = None
    flag: Annotated[bool, dict(help="A flag.")] = False
    center: Annotated[bool, dict(help="Center.")] = True
    trusted: Annotated[bool, Option(rich_help_panel="Other", help="Trusted.")] = False
    hidden: int = 7


@pytest.fixture
def made(monkeypatch):
    fresh, got = console.Running(), []
    for module in (commands, console):
        monkeypatch.setattr(module, "running", fresh)
    app = typer.Typer()

    @app.callback()
    def _several():
        pass

    def work(
        data: Annotated[str, Argument(help="Data.")],
        template: Annotated[str | None, Option(help="Template.")] = None,
        output: Annotated[Path | None, Option("--output", "--into", "-o", help="To write.")] = None,
        options: Annotated[str | None, Option(help="Options.")] = None,
        *,
        group: Group,
    ) -> None:
        """Work."""
        got.append((data, template, output, group))

    app.command("merge", cls=GroupedCommand)(command(work))

    def run(*words):
        return CliRunner().invoke(app, ["merge", *map(str, words)])

    run.running, run.got, run.command = fresh, got, typer.main.get_command(app).commands["merge"]
    return run


def test_the_fields_of_a_dataclass_are_options_but_those_for_python():
    assert (
        offered(Group) == ["size", "names", "flag", "center", "trusted"] and offered(Group, Group) == offered(Group) * 2
    )
    assert offered() == []


def test_a_command_gets_its_dataclass_of_what_was_typed(made):
    assert made("d").exit_code == 0, made("d").output
    typed = made("d", "--size", 5, "--names", "z", "--flag", "--no-center", "--trusted", "--template", "{a}")
    assert typed.exit_code == 0, typed.output
    assert [(data, template, group) for data, template, _, group in made.got[-1:]] == [
        ("d", "{a}", Group(size=5, names="z", flag=True, center=False, trusted=True)),
    ]  # fmt: skip
    assert made.got[0] == ("d", None, None, Group(names="x,y"))
    assert made.running.given == {"data", "size", "names", "flag", "center", "trusted", "template"}
    assert made.running.options["center"] == ("--center", "--no-center")
    assert made.running.options["flag"] == ("--flag", "no --flag") and "data" not in made.running.options
    assert made.running.options["output"] == ("--output", "no --output")
    assert (
        made("d", "--no-flag").exit_code == made("d", "--size", 0).exit_code == made("d", "--hidden", 1).exit_code == 2
    )


def test_what_is_read_of_the_data_is_known_but_of_a_multiple_choice(made):
    made("d", "--template", "{a}")
    assert made.running.wanted == Wanted(template="{a}")
    made("d", "--template", "{a}", "--options", "x")
    assert made.running.wanted is None


@pytest.mark.parametrize(("words", "debug", "expected"), [
    ([], None, (False, False, False)), (["-q"], None, (True, False, False)), (["--quiet"], None, (True, False, False)),
    (["-v"], None, (False, True, False)), ([], "1", (False, True, False)), (["--json"], None, (False, False, True)),
    ([], "", (False, False, False)),
])  # fmt: skip
def test_every_command_may_be_quiet_verbose_or_print_json(words, debug, expected, made, monkeypatch):
    if debug is not None:
        monkeypatch.setenv("LORA_INIT_DEBUG", debug)
    assert made("d", *words).exit_code == 0
    assert (made.running.quiet, made.running.verbose, made.running.as_json) == expected


def test_what_a_command_writes_is_looked_at_first(made, tmp_path):
    done = made("d", "-o", tmp_path / "none" / "x")
    assert done.exit_code == 1 and made.got == [] and "there is no directory" in done.output
    assert made("d", "-o", tmp_path / "x").exit_code == 0 and made.got[0][2] == tmp_path / "x"


def test_an_option_is_in_its_group_unless_it_comes_first(made):
    panels = {one.name: getattr(one, "rich_help_panel", None) for one in made.command.params}
    own = {"data": None, "template": None, "output": None, "options": None, "size": None}
    groups = {"names": "A group", "flag": "A group", "center": "A group", "trusted": "Other"}
    common = {"quiet": "Output", "verbose": "Output", "as_json": "Output", "help_all": None}
    assert panels == own | groups | common
