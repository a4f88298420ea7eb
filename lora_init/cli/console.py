"""What the command line promises whatever happens: results on stdout, all else on stderr, one line per error."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lora_init.errors import explain

if TYPE_CHECKING:
    from rich.console import Console

FAILED, INTERRUPTED = 1, 130
# Output that goes to a file or a pipe: wide enough for the ranks of 30 blocks.
_PIPE_WIDTH = 100


def make_console(stderr: bool = False) -> Console:
    """Open a rich console on stdout or stderr."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_WIDTH
    return console


def say(text: str) -> None:
    """Print one line to stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user or a machine can cause into one line on stderr, and an exit code.

    `LORA_INIT_DEBUG=1` lets the traceback through.
    """
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
        if os.environ.get("LORA_INIT_DEBUG"):
            raise
        say(f"error: {explain(error)}")
        raise SystemExit(FAILED) from None


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Let only this package's warnings through, each as one line on stderr."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        say(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"lora_init\b")
        warnings.showwarning = show
        yield


def quiet_transformers() -> None:
    """Stop transformers and the hub's client from logging and drawing bars of their own."""
    import logging

    import transformers

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
