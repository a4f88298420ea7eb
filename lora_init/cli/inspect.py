"""The command `lora-init inspect`: what files and directories hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from lora_init.adapters.init_config import DATA, Reading
from lora_init.cli.commands import offered
from lora_init.cli.console import FAILED, print_result, refuse_idle
from lora_init.cli.describe import damage_of, describe, describe_fit, describe_intruders, describe_merge
from lora_init.cli.options import Length, TrustRemoteCode
from lora_init.cli.views import show
from lora_init.errors import LoraInitError
from lora_init.serving.engines import ENGINES

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = """\b
Example:
$ lora-init inspect trained --base MODEL --engine vllm
"""


def inspect(
    paths: Annotated[
        list[Path], Argument(help="Statistics, plans, or directories of adapters or comparisons.", show_default=False)
    ],
    intruders: Annotated[
        bool, Option(help="Count directions of the trained weights that the base model did not have.")
    ] = False,
    merge_type: Annotated[
        Literal["bfloat16", "float16", "int8", "nf4"] | None,
        Option("--merge", help="How much of a trained adapter is there after a merge that is rounded to this type."),
    ] = None,
    base: Annotated[
        str | None,
        Option(
            "--base", "--model", help="Check that an adapter fits this base, or the base for --intruders or --merge."
        ),
    ] = None,
    engine: Annotated[
        str | None, Option(help=f"Check that an adapter fits its base in one of {', '.join(ENGINES)}.")
    ] = None,
    statistics: Annotated[
        Path | None, Option(help="With --merge: statistics of the base, to count rounding where the data are.")
    ] = None,
    data: Annotated[
        str | None, Option(metavar=DATA, help="With --merge: data to measure the divergence on, as for init.")
    ] = None,
    *,
    length: Length,
    reading: Reading,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Print what statistics, a plan, an adapter or a comparison are: of which model and data, and what is in them.

    With --base or --engine the exit status is 1 if anything of an adapter would not be applied to its base.
    """
    _check_options(merge_type, data, statistics)
    # With --intruders or --merge, --base names the model that they read, and asks for no check.
    checks = engine is not None or (base is not None and not (intruders or merge_type))
    descriptions = []
    for path in paths:
        fit = {}
        if checks:
            fit["fit"] = describe_fit(path, base, engine, trust_remote_code)
        with damage_of(path):
            descriptions.append(describe(path, length, base) | fit)
    # Whether the options about the training have a use is known only now.
    if not any(description.get("train") for description in descriptions):
        refuse_idle(offered(Length), "only the rate of an adapter that is not trained yet depends on it")
    for path, description in zip(paths, descriptions, strict=True):
        # These read weights of a base, so they come after all that is quick to refuse.
        if intruders:
            description["intruders"] = describe_intruders(path, description, base, trust_remote_code)
        if merge_type:
            merge = describe_merge(path, merge_type, base, statistics, data, reading, trust_remote_code)
            description["merge"] = merge

    # Views read fields that `describe` passed on as they are, so a damaged one may first be noticed here.
    with damage_of(*paths):
        content: Any = descriptions if len(paths) > 1 else descriptions[0]
        print_result(content, lambda console, _: _show_all(console, paths, descriptions))
    if checks and not all(description["fit"]["fits"] for description in descriptions):
        raise SystemExit(FAILED)


def _check_options(merge_type: str | None, data: str | None, statistics: Path | None) -> None:
    if not merge_type and (data or statistics):
        raise LoraInitError("--data and --statistics are for --merge.")
    if data is None:
        refuse_idle(offered(Reading), "that is for --data")


def _show_all(console: Console, paths: list[Path], descriptions: list[dict[str, Any]]) -> None:
    for path, description in zip(paths, descriptions, strict=True):
        with damage_of(path):  # the one that is damaged, not all of them
            show(console, description)
