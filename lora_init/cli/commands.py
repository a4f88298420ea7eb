"""Functions as commands of the command line: their options, from arguments and dataclasses."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Annotated, Any

import typer
from typer import Option

from lora_init.cli.console import one_line_errors, running
from lora_init.cli.help import print_whole
from lora_init.files import check_output
from lora_init.loading.examples import Wanted

# What commands write, by argument, as for `check_output`: looked at before anything else.
WRITES = {
    "init": {"output": "directory"}, "dial": {"output": "directory"}, "compare": {"output": "folder"},
    "ranks": {"output": "file", "plot": "file"}, "merge": {"output": "file"}, "replay": {"output": "file"},
    "export": {"output": ""}, "add": {"bank": "folder"}, "train": {"bank": "folder"},
}  # fmt: skip


def common_options(
    context: typer.Context,
    quiet: Annotated[
        bool,
        Option("--quiet", "-q", rich_help_panel="Output", help="Print no progress and no summary of what was written."),
    ] = False,
    verbose: Annotated[
        bool,
        Option("--verbose", "-v", rich_help_panel="Output", help="Let other libraries speak, and show tracebacks."),
    ] = False,
    as_json: Annotated[
        bool, Option("--json", rich_help_panel="Output", help="Print JSON, and nothing else, to stdout.")
    ] = False,
    help_all: Annotated[
        bool, Option("--help-all", is_eager=True, callback=print_whole, help="Show every option in full, and exit.")
    ] = False,
) -> None:
    """Take in the options that every command has, and how each option of this one is written."""
    running.options = {}
    for parameter in context.command.params:
        on = next((name for name in parameter.opts if name.startswith("--")), None)
        if on is not None and parameter.name is not None:
            running.options[parameter.name] = on, next(iter(parameter.secondary_opts), f"no {on}")
    sources = {name: context.get_parameter_source(name) for name in context.params}
    running.given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    running.quiet, running.as_json = quiet, as_json
    running.verbose = verbose or bool(os.environ.get("LORA_INIT_DEBUG"))


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function, with `common_options`; a dataclass stands for the options that its fields are."""
    own = _parameters(function)
    shared: dict[str, Any] = {one.name: one.annotation for one in own if is_dataclass(one.annotation)}

    @functools.wraps(function)
    def run(context: typer.Context, quiet: bool, verbose: bool, as_json: bool, help_all: bool, **options: Any) -> None:
        common_options(context, quiet, verbose, as_json, help_all)
        with one_line_errors():
            for name, what in WRITES.get(context.command.name or "", {}).items():
                if options[name] is not None:
                    check_output(options[name], what)
            wanted = {one.name: options.get(one.name) for one in fields(Wanted)}
            running.wanted = None if options.get("options") else Wanted(**wanted)
            for name, kind in shared.items():
                options[name] = kind(**{one.name: options.pop(one.name) for one in _options(kind)})
            function(**options)

    groups = (_options(one.annotation) if one.name in shared else [one] for one in own)
    parameters = [*chain.from_iterable(groups), *_parameters(common_options)]
    for one in parameters:
        if one.default is False and one.annotation.__metadata__[0].default is ...:  # a switch, without a --no-
            one.annotation.__metadata__[0].default = f"--{one.name.replace('_', '-')}"  # where Option("--name") has it
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [one.replace(kind=one.KEYWORD_ONLY) for one in parameters]
    )
    return run


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [*inspect.signature(function, eval_str=True).parameters.values()]


def _options(kind: Any) -> Iterator[inspect.Parameter]:
    """Yield as options the fields of a dataclass that say how: `kind` is the type of the text, `first` comes first."""
    for one in _parameters(kind):
        how = next(iter(getattr(one.annotation, "__metadata__", ())), None)
        if isinstance(how, dict):
            said = dict(how)
            default, text = said.pop("default", one.default), said.pop("kind", one.annotation.__origin__)
            panel = None if said.pop("first", False) else kind.title
            yield one.replace(default=default, annotation=Annotated[text, Option(rich_help_panel=panel, **said)])
        elif how is not None:
            yield one


def offered(*kinds: Any) -> list[str]:
    """Return the names of those fields of these dataclasses that the command line offers."""
    return [one.name for kind in kinds for one in _options(kind)]
