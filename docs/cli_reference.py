"""Sphinx extension: write the commands and their options, as the code has them, below the text of command-line.md."""

import textwrap
from typing import Any

import typer

from lora_init.cli.app import app as cli
from lora_init.cli.help import grouped_options


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", _append_commands)
    return {"parallel_read_safe": True}


def _append_commands(app: Any, page: str, source: list[str]) -> None:
    if page == "command-line":
        group = typer.main.get_command(cli)
        for name, command in group.commands.items():
            parts = {f"{name} {own}": part for own, part in getattr(command, "commands", {}).items()} or {name: command}
            source[0] += "".join(_describe(*part) for part in parts.items())


def _describe(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join(["lora-init", name, *command.collect_usage_pieces(context)])
    parts = [f"\n## lora-init {name}\n\n```text\n{usage}\n```\n\n{textwrap.dedent(command.help)}\n"]
    for title, rows in grouped_options(command, context).items():
        parts.append(f"\n**{title}**\n")
        # <...> would be read as HTML.
        parts += [f"\n`{words}`\n: {' '.join(text.replace('<', '&lt;').split())}\n" for words, text in rows]
    if command.epilog:
        title, _, example = command.epilog.replace("\b\n", "").partition("\n")
        parts.append(f"\n{title}\n\n```text\n{example.rstrip()}\n```\n")
    return "".join(parts)
