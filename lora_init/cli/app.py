"""The command line: `lora-init` and its commands, a file each."""

from __future__ import annotations

import signal
import sys
from typing import Any

import typer

from lora_init.cli import compare, export, init, inspect, merge, ranks
from lora_init.cli.console import process_rank, remember_options, silence

app = typer.Typer(
    name="lora-init",
    help="Compute from your data where LoRA adapters should start and how much rank each layer deserves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _before(context: typer.Context) -> None:
    group: Any = context.command
    remember_options(group.commands[context.invoked_subcommand].params)


app.command(epilog=init.EXAMPLE)(init.init)
app.command()(inspect.inspect)
app.command(epilog=ranks.EXAMPLE)(ranks.ranks)
app.command(epilog=merge.EXAMPLE)(merge.merge)
app.command(epilog=compare.EXAMPLE)(compare.compare)
app.command()(export.export)


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
