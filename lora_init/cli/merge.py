"""The command `lora-init merge`: statistics files of one model become one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from lora_init.cli.console import AsJson, make_console, print_json, read_numbers
from lora_init.cli.tables import facts
from lora_init.files import check_writable

if TYPE_CHECKING:
    from lora_init.statistics.statistics import Statistics

EXAMPLE = """\b
Example:
$ lora-init merge chat.safetensors code.safetensors --weights 0.7,0.3 -o mixed.safetensors
"""


def merge(
    files: Annotated[
        list[Path], Argument(help="Statistics files of one model, from lora-init init.", show_default=False)
    ],
    output: Annotated[Path, Option("--output", "-o", help="Statistics file to write.", show_default=False)],
    weights: Annotated[
        str | None, Option(help="Share of each file, as 0.7,0.3. Default: each row counts once.")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the file that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Merge statistics FILES of one model: shards of one data set, data that came later, or a mixture by weights."""
    check_writable(output, overwrite, "statistics file")
    shares = None if weights is None else read_numbers("--weights", weights, float)
    from lora_init.statistics.statistics import Statistics

    parts = [Statistics.load(file) for file in files]
    merged = parts[0].merge(*parts[1:], weights=shares)
    summary = _summary(merged, merged.save(output.expanduser()), files, parts, shares)
    if as_json:
        print_json(summary)
    else:
        _show(summary)


def _summary(
    merged: Statistics, output: Path, files: list[Path], parts: list[Statistics], shares: list[Any] | None
) -> dict[str, Any]:
    made = merged.provenance
    weights = [None] * len(parts) if shares is None else shares
    return {
        "statistics": str(output),
        "model": made.model_id,
        "model_class": made.model_class,
        "data": made.data,
        "layers": len(merged),
        "n_components": max(len(merged.explained_variance(name)) for name in merged),
        "n_samples": made.n_samples,
        "n_batches": made.n_batches,
        "parts": [
            {
                "file": str(file),
                "weight": weight,
                "n_samples": part.provenance.n_samples,
                "n_batches": part.provenance.n_batches,
                "data": part.provenance.data,
            }
            for file, part, weight in zip(files, parts, weights, strict=True)
        ],
        "notes": made.notes,
    }


def _show(summary: dict[str, Any]) -> None:
    rows = {
        "statistics": f"{summary['statistics']}: {summary['layers']} layers, {summary['n_components']} components",
        "model": f"{summary['model_class']} {summary['model']}".strip(),
        "rows": f"{summary['n_samples']:,} in {summary['n_batches']} batches",
    }
    for number, part in enumerate(summary["parts"], 1):
        weight = f"{part['weight']:g} x " if part["weight"] is not None else ""
        rows[f"part {number}"] = (
            f"{weight}{part['file']}: {part['n_samples']:,} rows in {part['n_batches']} batches, "
            f"{part['data'] or 'data not described'}"
        )
    console = make_console()
    console.print(facts(rows))
    # The first notes say of each part what stands above.
    for note in summary["notes"][len(summary["parts"]) :]:
        console.print(f"note: {note}")
