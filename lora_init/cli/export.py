"""The command `lora-init export`: a trained adapter becomes what an inference engine loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_init.cli.console import AsJson, make_console, one_line_errors, print_json, quiet_transformers, unescape
from lora_init.cli.tables import facts
from lora_init.errors import LoraInitError

if TYPE_CHECKING:
    from lora_init.loading.models import LoadedModel
    from lora_init.serving.export import Exported


def export(
    directory: Annotated[Path, typer.Argument(help="Directory of a trained LoRA adapter.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory to write; for llama.cpp a file.", show_default=False)
    ],
    engine: Annotated[
        str | None,
        typer.Option(help="vllm, sglang, tgi, lorax, llama.cpp, ollama or mlx. Default: PEFT's own form, one rank."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of every layer; below the adapter's largest it is compressed.")
    ] = None,
    parameters: Annotated[str | None, typer.Option(help="Compress to this many parameters, such as 2.5M.")] = None,
    megabytes: Annotated[float | None, typer.Option(help="Compress to this size, in 10^6 bytes.")] = None,
    keep_ranks: Annotated[
        bool,
        typer.Option("--keep-ranks", help="Ranks may differ: as they are, or where the trained update needs them."),
    ] = False,
    start: Annotated[
        Path | None, typer.Option(help="The adapter before training, if that changed the base, as lora-ga does.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model. Default: the one that the adapter names.")] = None,
    merge_into: Annotated[
        str | None, typer.Option(help="Write this whole model with the adapter merged in, not an adapter.")
    ] = None,
    reduce_intruders: Annotated[
        bool, typer.Option("--reduce-intruders", help="Take most of the intruder dimensions out, by PEFT.")
    ] = False,
    data: Annotated[str | None, typer.Option(help="Data to measure the loss on before and after, as for init.")] = None,
    template: Annotated[str | None, typer.Option(help="Text of an example, for --data.")] = None,
    completion: Annotated[str | None, typer.Option(help="What the model should answer, for --data.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Examples to draw, for --data.")] = 64,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of an example at most, for --data.")] = 512,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier export wrote.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the trained adapter in DIRECTORY into the form that an engine loads, with the same outputs."""
    with one_line_errors():
        place = output.expanduser()
        if place.exists() and not overwrite and (place.is_file() or any(place.iterdir())):
            raise LoraInitError(f"--output {output} exists. Name another, or pass --overwrite.")
        if data is not None and (merge_into or start or engine in ("llama.cpp", "ollama", "mlx")):
            raise LoraInitError("--data: PEFT measures the loss. Leave --merge-into, --start and --engine away.")
        with make_console(stderr=True).status("importing torch and transformers"):
            from lora_init.serving.export import export_adapter

            quiet_transformers()
        loaded = _load(directory, base) if data is not None or reduce_intruders else None
        batches = None
        if loaded is not None and data is not None:
            batches = _batches(loaded, data, unescape(template), unescape(completion), samples, max_length)
        exported = export_adapter(
            directory, output, engine, rank, parameters=parameters, megabytes=megabytes, keep_ranks=keep_ranks,
            start=start, base=base, merge_into=merge_into, overwrite=overwrite,
            reduce_intruders=loaded.model if loaded is not None and reduce_intruders else None,
        )  # fmt: skip
        summary = exported.to_dict()
        if loaded is not None and batches is not None:
            summary["losses"] = [_loss(loaded, place, batches) for place in (directory, exported.path)]
        if as_json:
            print_json(summary)
        else:
            _show(exported, summary.get("losses"))


def _load(directory: Path, base: str | None) -> LoadedModel:
    from lora_init.loading.models import load_model
    from lora_init.serving.trained import read_trained

    source = base or read_trained(directory).base
    with make_console(stderr=True).status(f"loading {source}"):
        return load_model(source, dtype="float32")


def _batches(
    loaded: LoadedModel, data: str, template: str | None, completion: str | None, samples: int, max_length: int
) -> Any:
    from lora_init.loading.batches import load_batches

    return load_batches(
        data, loaded.tokenizer, template=template, completion=completion, samples=samples, max_length=max_length,
        seq2seq=loaded.seq2seq,
    )  # fmt: skip


def _loss(loaded: LoadedModel, directory: Path, batches: Any) -> float:
    from lora_init.adapters.peft_model import load_adapter, remember
    from lora_init.adapters.step_size import mean_loss

    restore = remember(loaded.model)
    try:
        return mean_loss(load_adapter(loaded.model, directory, trainable=False), batches)
    finally:
        restore()


def _show(exported: Exported, losses: list[float] | None) -> None:
    rows = {"written": f"{exported.path}: {exported.n_bytes / 10**6:.2f} MB"}
    if exported.rank:
        rows["rank"] = f"{exported.rank}, scaling {exported.scaling:g}, {exported.parameters:,} parameters"
    if exported.added:
        rows["added"] = f"{len(exported.added)} layers that do nothing, because others of their kind have an adapter"
    if exported.errors:
        worst = max(exported.errors, key=lambda name: exported.errors[name])
        rows["error"] = (
            f"{exported.error:.2%} of the update; of {len(exported.errors)} compressed layers {worst} has most, "
            f"{exported.errors[worst]:.2%}"
        )
    if losses is not None:
        rows["loss"] = "{:.4f} before, {:.4f} after".format(*losses)
    if exported.intruders is not None:
        rows["intruders"] = "{} before, {} after".format(*exported.intruders)
    console = make_console()
    console.print(facts(rows))
    console.print(f"\n{exported.command}", markup=False)
