"""The command `lora-init merge`: several statistics as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from lora_init.adapters.init_config import LIST
from lora_init.cli.console import print_result
from lora_init.cli.describe import describe
from lora_init.cli.options import read_numbers
from lora_init.cli.views import show
from lora_init.files import check_writable

EXAMPLE = """\b
Example:
$ lora-init merge chat.safetensors code.safetensors --weights 0.7,0.3 \\
    -o mixed.safetensors
"""


def merge(
    files: Annotated[
        list[Path], Argument(help="Statistics files of one model, from lora-init init.", show_default=False)
    ],
    output: Annotated[Path, Option("--output", "-o", help="Statistics file to write.", show_default=False)],
    weights: Annotated[
        str | None,
        Option(metavar=LIST, help="Share of each file, as 0.7,0.3. Default: each row counts once."),
    ] = None,
    overwrite: Annotated[bool, Option(help="Replace the file that is there.")] = False,
) -> None:
    """Merge statistics FILES of one model: shards of one data set, data that came later, or a mixture by weights."""
    # What is wrong with the words comes before the import, which takes torch's seconds.
    check_writable(output, overwrite, "statistics file")
    shares = None if weights is None else read_numbers("--weights", weights, float)
    from lora_init.statistics.statistics import Statistics

    # By default each row counts once, as in one pass over all the data. With weights a file counts as its share says,
    # however many rows it has.
    parts = [Statistics.load(file) for file in files]
    merged = parts[0].merge(*parts[1:], weights=shares)
    print_result(describe(merged.save(output.expanduser())), show, written=True)
