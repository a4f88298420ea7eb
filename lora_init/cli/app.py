"""The command line: `lora-init`, its commands, and `env`, which prints what a bug report needs."""

from __future__ import annotations

import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from typing import TYPE_CHECKING, Annotated, Any

import typer

import lora_init
from lora_init.cli import bank, compare, dial, export, init, inspect, merge, ranks, rate, verify
from lora_init.cli.commands import command
from lora_init.cli.console import (
    WRONG_USAGE,
    busy,
    print_error,
    print_next,
    print_result,
    process_rank,
    silence,
)
from lora_init.cli.help import GroupedCommand, ListedCommands
from lora_init.cli.tables import facts
from lora_init.errors import did_you_mean
from lora_init.third_party_internals import usage_error

if TYPE_CHECKING:
    from rich.console import Console

_UsageError = usage_error()


@contextmanager
def _one_line_usage() -> Iterator[None]:
    """Print in one line what is wrong with the words of a command, with the closest choice of an option."""
    try:
        yield
    except _UsageError as error:
        if type(error).show is not _UsageError.show:
            raise  # which prints the help, where a command has no words at all
        # Of pydantic, which names neither value nor option.
        wrong: list[Any] = getattr(error.__cause__, "errors", list)()
        if wrong:
            reason = wrong[0]["msg"].removeprefix("Input ").partition(", unable")[0]
            error.message = f"{wrong[0]['input']} {reason}"
        # The text is all that says which word it is and which choices there are: 'evva' is not one of 'eva', 'random'.
        if "is not one of" in error.message:
            word, *choices = re.findall("'([^']*)'", error.message)
            if choices:
                error.message = f"{word!r} is none of the choices. {did_you_mean(word, choices)}"
        text = " ".join(error.format_message().split())
        if not text.endswith((".", "?")):
            text += "."
        command_path = error.ctx.command_path if error.ctx else "lora-init"
        print_error(f"{text} See {command_path} --help.")
        raise typer.Exit(WRONG_USAGE) from None


class _Commands(ListedCommands):
    # The first reads options of the program, the second reads options of its commands.
    def make_context(self, *words: Any, **more: Any) -> Any:
        with _one_line_usage():
            return super().make_context(*words, **more)

    def invoke(self, ctx: Any) -> Any:
        with _one_line_usage():
            return super().invoke(ctx)


app = typer.Typer(
    name="lora-init",
    cls=_Commands,
    help="Know the learning rate before you train, keep what the model knew, and serve what you trained.",
    epilog="Where to begin: lora-init. Options of a command: lora-init COMMAND --help.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,  # one line, by `one_line_errors`; a traceback with -v is Python's own
    rich_markup_mode=None,  # rich would draw boxes around the help
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"lora-init {lora_init.__version__}")
        raise typer.Exit


FOUR_THINGS = """\
lora-init makes LoRA adapters from your data. Four things to do with it:

1. Start an adapter from your data, and learn which rate to train it with:
   lora-init init MODEL DATA --steps 300 -o adapter
2. Turn a trained adapter down where it does harm, to keep what the model knew:
   lora-init dial trained HELD-OUT-DATA -o kept
3. Write it for an engine, and check that the engine serves it as trained:
   lora-init export kept --engine vllm -o served
   lora-init verify served --url http://127.0.0.1:8000/v1
4. Compare starts on your data:
   lora-init compare MODEL DATA --time 1h -o comparison

MODEL is a directory or a hub id, DATA a file, a folder or a hub id.
All commands: lora-init --help"""


@app.callback()
def _before(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(FOUR_THINGS)


# What `env` prints, where it is installed or set.
_PACKAGES = (
    "lora-init", "torch", "transformers", "peft", "datasets", "accelerate", "safetensors", "tokenizers", "numpy",
    "pandas", "typer", "matplotlib", "scikit-learn", "scipy", "gguf",
)  # fmt: skip
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTORCH_CUDA_ALLOC_CONF",
    "WORLD_SIZE",
)  # fmt: skip


def env() -> None:
    """Print what a bug report needs: versions, processor, memory, GPUs, and variables that change what runs."""
    with busy("importing torch"):
        import torch
    gpus = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        gpus.append(f"{gpu.name} {gpu.total_memory / 10**9:.0f} GB")
    # From their metadata: importing them all would take long, and one that is broken would end the command.
    versions = {package.name: package.version for package in distributions() if package.name in _PACKAGES}
    content = {
        "python": platform.python_version(),
        "system": platform.platform(),
        **versions,
        "torch": torch.__version__,  # says for which CUDA it was built, as its distribution need not
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} of them for torch",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 10**9:.0f} GB",
        "gpus": ", ".join(gpus) or "none",
        **{name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }

    def show(console: Console, values: Any) -> None:
        console.print(facts(values))
        print_next(console, "LORA_INIT_DEBUG=1 lora-init COMMAND  # shows where an error comes from")

    print_result(content, show)


# With the examples at the end of their helps; in the order of the list of commands.
_COMMANDS: dict[Callable[..., None], str | None] = {
    init.init: init.EXAMPLE,
    inspect.inspect: inspect.EXAMPLE,
    rate.rate: rate.EXAMPLE,
    ranks.ranks: ranks.EXAMPLE,
    merge.merge: merge.EXAMPLE,
    compare.compare: compare.EXAMPLE,
    dial.dial: dial.EXAMPLE,
    dial.replay: dial.REPLAY_EXAMPLE,
    export.export: export.EXAMPLE,
    verify.verify: verify.EXAMPLE,
    env: None,
}
for _function, _example in _COMMANDS.items():
    app.command(cls=GroupedCommand, epilog=_example)(command(_function))
app.add_typer(bank.app, name="bank")


def main() -> None:
    """Run the command line and exit: 0, 1 after an error that was explained, 2 after wrong usage, 130 after Ctrl-C.

    In several processes all do the pass of `init`; everything else is done by the first, which alone writes and speaks.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clusters end jobs so; what Ctrl-C keeps is kept
    # Beside other work, threads that spin while they wait for each other took 3.3 times as long, and as much of the
    # processor. On an idle machine it makes no difference. OpenMP reads it when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if process_rank():
        silence()
        if sys.argv[1:2] != ["init"]:  # before the options are read, which the first process does for all
            return
    app()
