"""What all commands share: results on stdout, all else on stderr, and one line per error."""

from __future__ import annotations

import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from lora_init.errors import LoraInitError, LoraInitWarning, Message, explain, in_one_line, in_python
from lora_init.loading.examples import Wanted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status


FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130  # exit statuses; 128 + 2 is what a shell reports after SIGINT
# Output that goes to a file or a pipe: wide enough for the ranks of 30 blocks.
_PIPE_WIDTH = 100


def make_console(stderr: bool = False) -> Console:
    """Open a rich console on stdout or stderr."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_WIDTH
    return console


def busy(text: str) -> Status:
    """Return a context manager that shows on stderr what is going on, if that is a terminal."""
    console = make_console(stderr=True)
    console.quiet = running.quiet
    return console.status(text)  # prints nothing where stderr is no terminal


def say(text: str) -> None:
    """Print one line to stderr; of several processes the first one does."""
    if not process_rank() and not running.quiet:
        print(text, file=sys.stderr, flush=True)  # at once: a log is read while the command runs


def print_error(text: str) -> None:
    """Print the one line that an error is, on stderr."""
    # Each process of a launch may fail for a reason of its own, so all of them print it.
    rank = process_rank()
    where = f"rank {rank}: " if rank else ""
    print(f"{where}error: {text}", file=sys.stderr, flush=True)


def print_result(content: Any, show: Callable[[Console, Any], None], written: object = False) -> None:
    """Print plain values as `--json` or `show` has them; with `-q` no summary of what was `written`."""
    if running.as_json:
        typer.echo(json.dumps(content, indent=2, allow_nan=False))
    elif not (written and running.quiet):  # what was asked for is printed in spite of -q
        show(make_console(), content)


def print_next(console: Console, command: str) -> None:
    """Print the command that one runs next: the last line of a result."""
    console.print(f"Next: {command}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user or a machine can cause into one line on stderr and an exit code; `-v` lets it through."""
    try:
        with _quiet_libraries():
            yield
    except KeyboardInterrupt:
        say("interrupted")
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        # Whoever read our output has left, as `head` does. What Python still wants to flush has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(FAILED) from None
    except Exception as error:
        if running.verbose:
            raise
        # In the words of the command line: an error names `--rank 8` where Python's would be `rank=8`.
        print_error(explain(error, in_words))
        raise SystemExit(FAILED) from None


@dataclass
class Running:
    """The command that runs: how its options are typed, by argument, on and off; and how much it prints."""

    options: dict[str, tuple[str, str]] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)  # arguments that are on the command line
    wanted: Wanted | None = None  # what is read of its data
    quiet: bool = False
    verbose: bool = False
    as_json: bool = False
    warned: set[str] = field(default_factory=set)  # warnings that were printed, in Python's words, as notes have them


# One process runs one command, and what it is asked to print is needed in every corner: passed along, it would be an
# argument of nearly every function here. `common_options` sets it.
running = Running()


def given(arguments: Iterable[str]) -> list[str]:
    """Return the options of those arguments that are on the command line."""
    return [running.options[name][0] for name in arguments if name in running.given]


def refuse_idle(arguments: Iterable[str], why: str) -> None:
    """Refuse options that are on the command line and would have no effect."""
    idle = given(arguments)
    if not idle:
        return
    them = "it" if len(idle) == 1 else "them"
    raise LoraInitError(f"{', '.join(idle)}: {why}. Leave {them} out.")


def in_words(name: str, value: Any) -> str:
    """Write an option as it is typed: `--rank 64`, `--overwrite`, `--no-center`; as an argument if there is none."""
    if name not in running.options:
        return in_python(name, value)
    on, off = running.options[name]
    if value is ...:  # the option itself is meant, whatever its value
        return on
    if isinstance(value, bool):
        return on if value else off
    # Lists are typed with commas between their items. 8.0 was typed as 8.
    items = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    text = ",".join(str(item).removesuffix(".0") for item in items)
    return f"{on} {shlex.quote(text)}"


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Print warnings of this package alone, each as one line on stderr, and once."""
    if running.verbose:
        yield
        return
    printed: set[str] = set()
    running.warned.clear()

    # Python prints a warning once for each line of code that warns; the same text may come from several.
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        if isinstance(message, Message):
            text = message.spelled(in_words)
        if text not in printed and not process_rank():
            print(f"warning: {text}", file=sys.stderr, flush=True)
            running.warned.add(str(message))
        printed.add(text)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=LoraInitWarning)
        warnings.showwarning = show
        yield


@contextmanager
def importing(model: str | None = None, data: str | None = None) -> Iterator[None]:
    """Import torch and transformers in the block, quietly, after a quick look whether a model and data can be had."""
    from lora_init.loading.models import check_model_source
    from lora_init.loading.reader import check_columns
    from lora_init.loading.sources import check_data

    # Importing torch takes seconds, and a misspelt name need not wait for it.
    if model is not None:
        check_model_source(model)
    if data is not None:
        check_data(data)
        if running.wanted is not None:
            check_columns(data, running.wanted)
    import logging

    with busy("importing torch and transformers"):
        yield
        if not running.verbose:
            # They write to stderr by logging and progress bars of their own, which no filter of warnings reaches.
            import transformers

            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
            transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
            transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def process_rank() -> int | None:
    """Return the number of this process in its launch; None if it is alone."""
    # torchrun sets all four; a single one of them is no launch that could be joined.
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(os.environ.get(name) for name in names) or os.environ["WORLD_SIZE"] == "1":
        return None
    return int(os.environ["RANK"])


def silence() -> None:
    """Print nothing more to stdout from this process: the first one prints the same."""
    sys.stdout.flush()
    # The descriptor and not `sys.stdout` alone, so that libraries in C are silent, too.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes of one launch, if there is one."""
    if process_rank() is None:
        yield
        return
    import torch

    # Only statistics travel, and they travel by gloo, also between GPUs.
    try:
        torch.distributed.init_process_group("gloo")
    except RuntimeError as error:
        raise LoraInitError(
            f"the processes cannot reach each other: {in_one_line(error)} Where a machine's own name is 127.0.0.1, "
            "set GLOO_SOCKET_IFNAME there to its network, as `ip address` names it."
        ) from error
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
