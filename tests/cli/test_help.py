"""The help: what is on one screen, what is in the whole, and how a range, a default and a choice are written."""

import pytest
import typer

from lora_init.cli.app import app
from lora_init.cli.help import _plain, _short, grouped_options
from tests.commands import run


@pytest.mark.parametrize(("text", "short"), [
    ("One. Two. Default: 3.", "One. Default: 3."), ("One; Two.", "One"), ("One.  Words: a, b.", "One. Words: a, b."),
    ("One, e.g. two. [default: 3]", "One, e.g. two. [default: 3]"), ("One. [required]", "One. [required]"),
    ("One", "One"), ("One; two. Three.", "One; two."),
])  # fmt: skip
def test_the_first_sentence_and_the_default_are_on_one_screen(text, short):
    assert _short(text) == short


@pytest.mark.parametrize(("text", "plain"), [
    ("--n <integer range>", "--n <integer>"), ("x [default: 8; x>=1]", "x [default: 8]"), ("x  [x>=1]", "x"),
    ("x [default: (three)]", "x [default: three]"), ("<list[Path]>", "<path>"), ("<list[text]>", "<text>"),
    ("x [1<=x<=9]", "x"), ("x [default: 2; 1<=x<9]", "x [default: 2]"),
])  # fmt: skip
def test_ranges_are_clutter(text, plain):
    assert _plain(text) == plain


def groups(name, whole):
    command = typer.main.get_command(app).commands[name]
    context = command.make_context(name, [], resilient_parsing=True)
    return grouped_options(command, context, whole)


@pytest.mark.parametrize("name", ["init", "ranks", "compare", "replay"])
def test_the_whole_has_every_option_once_and_one_screen_those_without_a_heading(name):
    command = typer.main.get_command(app).commands[name]
    whole, short = groups(name, True), groups(name, False)
    assert [*short] == ["Arguments", "Options"] and all(whole.values())
    rows = [words.partition(" ")[0].partition(",")[0] for rows in whole.values() for words, _ in rows]
    assert len(rows) == len({*rows}) == sum(not getattr(one, "hidden", False) for one in command.params) + 1  # --help
    of_all = {words.partition(" ")[0] for words, _ in whole["Options"]}
    assert {words.partition(" ")[0] for words, _ in short["Options"]} == of_all
    named = [words.partition(" ")[0] for words, _ in whole["Arguments"]]
    assert named and all(name == name.upper() for name in named)
    for rows in (*whole.values(), *short.values()):
        assert not [words for words, _ in rows if len(words) > (70 if rows in whole.values() else 80)]


@pytest.mark.parametrize("name", [*typer.main.get_command(app).commands])
def test_the_whole_keeps_every_sentence_of_an_option(name):
    command = typer.main.get_command(app).commands[name]
    texts = " ".join(text for rows in groups(name, True).values() for _, text in rows)
    assert not [one.name for one in command.params if not getattr(one, "hidden", False) and one.help not in texts]


def test_choices_that_are_too_many_to_stand_beside_the_option_are_words_of_its_text():
    words, text = next(row for row in groups("ranks", False)["Options"] if row[0].startswith("--format"))
    assert words == "--format WORD" and "Words: " in text and "axolotl" in text
    tools = text.partition("Words: ")[2].rstrip(".").split(", ")
    assert len(tools) > 3 and all("|" not in tool for tool in tools)
    # Where all options are shown there is room.
    assert any(words.startswith("--format <") and "|" in words for words, _ in groups("ranks", True)["Options"])


def test_no_name_is_broken_at_its_hyphen_and_hyphens_are_ordinary_ones():
    for words in (["init", "--help"], ["init", "--help-all"], ["--help"], ["bank", "--help"]):
        shown = run(*words)
        assert shown.exit_code == 0 and "\u2011" not in shown.stdout
        assert not [line for line in shown.stdout.splitlines() if line.endswith("-") and line[-2:-1].isalpha()]
    assert "Usage: lora-init init [OPTIONS] MODEL [DATA]" in run("init", "--help").stdout


def test_commands_are_listed_with_their_whole_first_sentence():
    shown = " ".join(run("--help").stdout.split())
    for name, command in typer.main.get_command(app).commands.items():
        sentence = " ".join(command.help.split()).partition(". ")[0].rstrip(".")
        assert f" {name} {sentence}." in shown


def test_an_option_that_is_hidden_ends_no_list():
    some = typer.Typer()

    @some.command()
    def command(first: int = 1, second: int = typer.Option(2, hidden=True), third: int = 3) -> None: ...

    made = typer.main.get_command(some)
    options = grouped_options(made, made.make_context("some", []))["Options"]
    assert [words.split()[0] for words, _ in options if "completion" not in words] == ["--first", "--third", "--help"]
