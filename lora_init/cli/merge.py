"""The command `lora-init merge`: statistics files of one model become one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_init.cli.console import AsJson, make_console, one_line_errors, print_json
from lora_init.cli.tables import facts
from lora_init.errors import LoraInitError
from lora_init.files import check_writable

if TYPE_CHECKING:
    from lora_init.statistics.statistics import Statistics

EXAMPLE = """\b
Example:
$ lora-init merge chat.safetensors code.safetensors --weights 0.7,0.3 -o mixed.safetensors
"""


def merge(
    files: Annotated[
        list[Path], typer.Argument(help="Statistics files of one model, from lora-init init.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Statistics file to write.", show_default=False)],
    weights: Annotated[
        str | None,
        typer.Option(help="Share of each file in the mixture, as 0.7,0.3; sum 1. Default: each row counts once."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Merge statistics FILES of one model: shards of one data set, data that came later, or a mixture by weights."""
    with one_line_errors():
        check_writable(output, overwrite, "statistics file")
        shares = _numbers(weights)
        from lora_init.statistics.statistics import Statistics

        parts = [Statistics.load(file) for file in files]
        merged = parts[0].merge(*parts[1:], weights=shares)
        summary = _summary(merged, merged.save(output.expanduser()), files, parts, shares)
        if as_json:
            print_json(summary)
        else:
            _show(summary)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise LoraInitError(f"--weights {text!r}: write it like 0.7,0.3.") from None


def _summary(
    merged: Statistics, output: Path, files: list[Path], parts: list[Statistics], shares: list[float] | None
) -> dict[str, Any]:
    made = merged.provenance
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
                "weight": None if shares is None else shares[i],
                "n_samples": part.provenance.n_samples,
                "n_batches": part.provenance.n_batches,
                "data": part.provenance.data,
            }
            for i, (file, part) in enumerate(zip(files, parts, strict=True))
        ],
        "notes": made.notes,
    }


def _show(summary: dict[str, Any]) -> None:
    rows = {
        "statistics": f"{summary['statistics']}: {summary['layers']} layers, {summary['n_components']} components",
        "model": f"{summary['model_class']} {summary['model']}".strip(),
        "rows": f"{summary['n_samples']:,} in {summary['n_batches']} batches",
    }
    for i, part in enumerate(summary["parts"]):
        weight = f"{part['weight']:g} x " if part["weight"] is not None else ""
        rows[f"part {i + 1}"] = (
            f"{weight}{part['file']}: {part['n_samples']:,} rows in {part['n_batches']} batches, "
            f"{part['data'] or 'data not described'}"
        )
    console = make_console()
    console.print(facts(rows))
    # The first notes say of each part what stands above.
    for note in summary["notes"][len(summary["parts"]) :]:
        console.print(f"note: {note}")
