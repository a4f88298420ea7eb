"""Functions as commands of the command line: their options, from arguments and dataclasses."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
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
        long_names = [name for name in parameter.opts if name.startswith("--")]
        if long_names and parameter.name is not None:  # arguments, such as MODEL, have none
            on = long_names[0]
            off = parameter.secondary_opts[0] if parameter.secondary_opts else f"no {on}"
            running.options[parameter.name] = on, off
    running.given = set()
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":  # by name, since typer has its own copy of the enum
            running.given.add(name)
    running.quiet, running.as_json = quiet, as_json
    running.verbose = verbose or bool(os.environ.get("LORA_INIT_DEBUG"))


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function, with `common_options`; a dataclass stands for the options that its fields are."""
    # typer makes options of a signature. The one that it sees here has an option for each field of the dataclasses;
    # `run` puts them together again, so that the function gets the dataclasses that it declares.
    own = _parameters(function)
    groups: dict[str, Any] = {}
    for parameter in own:
        if is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation

    @functools.wraps(function)
    def run(context: typer.Context, quiet: bool, verbose: bool, as_json: bool, help_all: bool, **options: Any) -> None:
        common_options(context, quiet, verbose, as_json, help_all)
        with one_line_errors():
            for name, what in WRITES.get(context.command.name or "", {}).items():
                if options[name] is not None:
                    check_output(options[name], what)
            running.wanted = None
            if not options.get("options"):  # a multiple choice reads its columns by rules of its own
                running.wanted = Wanted(**{field.name: options.get(field.name) for field in fields(Wanted)})
            for name, kind in groups.items():
                options[name] = kind(**{field: options.pop(field) for field in offered(kind)})
            function(**options)

    parameters: list[inspect.Parameter] = []
    for parameter in own:
        if parameter.name in groups:
            parameters += _options(parameter.annotation)
        else:
            parameters.append(parameter)
    parameters += _parameters(common_options)
    for parameter in parameters:
        # A switch that is off has no --no- form, which typer leaves out where a name is given: as the "default" of
        # the `Option`, since that is its first argument.
        if parameter.default is False and parameter.annotation.__metadata__[0].default is ...:
            parameter.annotation.__metadata__[0].default = f"--{parameter.name.replace('_', '-')}"
    # By keyword only, or an option with a default could not stand before one without.
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    return run


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [*inspect.signature(function, eval_str=True).parameters.values()]


def _options(kind: Any) -> Iterator[inspect.Parameter]:
    """Yield the fields of a dataclass that are options. `kind` is the type of what is typed, `first` is for --help."""
    for parameter in _parameters(kind):
        metadata = getattr(parameter.annotation, "__metadata__", ())
        declared = metadata[0] if metadata else None
        if isinstance(declared, dict):
            settings = dict(declared)  # or the class would lose what is taken out
            default = settings.pop("default", parameter.default)
            text = settings.pop("kind", parameter.annotation.__origin__)
            panel = None if settings.pop("first", False) else kind.title  # None is for the one screen of --help
            option = Option(rich_help_panel=panel, **settings)
            yield parameter.replace(default=default, annotation=Annotated[text, option])
        elif declared is not None:  # an `Option` already, such as `TrustRemoteCode`
            yield parameter
        # Fields without an annotation of this kind are for Python alone.


def offered(*kinds: Any) -> list[str]:
    """Return the names of those fields of these dataclasses that the command line offers."""
    names = []
    for kind in kinds:
        names += [parameter.name for parameter in _options(kind)]
    return names
