"""The command line: `lora-init` and its commands, a file each."""

from __future__ import annotations

import re
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import lora_init
from lora_init.cli import compare, env, export, init, inspect, merge, ranks
from lora_init.cli.console import command, process_rank, silence
from lora_init.errors import did_you_mean


class _Commands(TyperGroup):
    """Says which choice of an option is closest to one that is none, as click does for names of options."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            word, *choices = re.findall("'([^']*)'", error.message) if "is not one of" in error.message else [""]
            if choices:
                error.message = f"{word!r} is none of the choices. {did_you_mean(word, choices)}"
            raise


app = typer.Typer(
    name="lora-init",
    cls=_Commands,
    help="Compute from your data where LoRA adapters should start and how much rank each layer deserves.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lora-init {lora_init.__version__}")
        raise typer.Exit


@app.callback()
def _before(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for _module in (init, inspect, ranks, merge, compare, export, env):
    _name = _module.__name__.rpartition(".")[2]
    app.command(_name, epilog=getattr(_module, "EXAMPLE", None))(command(getattr(_module, _name)))


def main() -> None:
    """Run the command line and exit: 0, 1 after an error that was explained, 2 after wrong usage, 130 after Ctrl-C.

    SIGTERM is treated as Ctrl-C.

    In several processes all do the pass of `init`; everything else is done by the first, which alone
    writes and speaks.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if process_rank():
        silence()
        if sys.argv[1:2] != ["init"]:
            return
    app()
