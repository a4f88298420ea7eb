"""The command `lora-init export`: a trained adapter becomes what an inference engine loads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from lora_init.adapters.asked import Reading
from lora_init.cli.console import FAILED, busy, importing, in_words, offered, print_error, print_result, refuse_idle
from lora_init.cli.options import MaxLength, WrittenAs, of_adapter, one_base
from lora_init.cli.tables import Cells, facts
from lora_init.errors import LoraInitError, explain, require, require_version
from lora_init.serving.engines import ENGINES, find_engine

if TYPE_CHECKING:
    from rich.console import Console

    from lora_init.loading.models import LoadedModel
    from lora_init.serving.export import Exported

EXAMPLE = """\b
Example:
$ lora-init export trained --engine vllm -o served
"""


def export(
    directories: Annotated[list[Path], Argument(help="Directories of trained LoRA adapters.", show_default=False)],
    output: Annotated[
        Path, Option("--output", "-o", help="Directory or GGUF file to write; of several, where.", show_default=False)
    ],
    engine: Annotated[str | None, Option(help=f"One of {', '.join(ENGINES)}. Default: PEFT.")] = None,
    rank: Annotated[int | None, Option(help="Rank of every layer; below the adapter's, it is compressed.")] = None,
    parameters: Annotated[str | None, Option(help="Compress to this many parameters, such as 2.5M.")] = None,
    megabytes: Annotated[
        float | None, Option(rich_help_panel="The adapter", help="Compress to this size, in 10^6 bytes.")
    ] = None,
    keep_ranks: Annotated[bool, Option(help="Let ranks differ, as the trained update needs.")] = False,
    dtype: Annotated[WrittenAs | None, Option(help="Type of A and B. Default: the adapter's own.")] = None,
    start: Annotated[Path | None, Option(help="The adapter before training, if it changed the base.")] = None,
    base: Annotated[str | None, Option(help="Base model. Default: the one that the adapter names.")] = None,
    merge_into: Annotated[str | None, Option(help="Write this whole model with the adapter merged in.")] = None,
    reduce_intruders: Annotated[bool, of_adapter(help="Take most intruders out, by PEFT.")] = False,
    rename: Annotated[bool, of_adapter(help="Write names of tensors that fit the base: see inspect.")] = False,
    data: Annotated[str | None, Option(help="Data to measure the loss on before and after, as for init.")] = None,
    *,
    reading: Reading,
    samples: Annotated[int, Option(rich_help_panel="Data", min=1, help="Examples to draw at random, at most.")] = 64,
    max_length: MaxLength = 512,
    overwrite: Annotated[bool, Option(help="Replace what an earlier export wrote.")] = False,
) -> None:
    """Bring trained adapters into the form that an engine loads, with the same outputs.

    Several are written into OUTPUT under the names of their DIRECTORIES. If some fail, the others are written, and the
    exit status is 1.
    """
    if data is not None and (merge_into or start or not find_engine(engine).writes_peft):
        raise LoraInitError("--data: PEFT measures the loss. Leave --merge-into, --start and --engine away.")
    if data is None:
        refuse_idle([*offered(Reading), "samples", "max_length"], "that is for --data")
    require(*find_engine(engine).libraries)
    if reduce_intruders:
        require("scipy")
        require_version("peft", "0.19", "--reduce-intruders")
    places = _places(directories, output, engine)
    if start is not None and len(places) > 1:
        raise LoraInitError("--start is one adapter before its training. Export those that have one one by one.")
    with importing(data=data):
        from lora_init.adapters.directory import AdapterDirectory
        from lora_init.loading.batches import load_batches
        from lora_init.serving.export import Exported, check_before_loading, check_output, export_adapter
    for place, directory in places.items():  # before a model is loaded
        check_output(place, engine, overwrite)
        if data is not None or reduce_intruders:
            with suppress(*[LoraInitError] * (len(places) > 1)):  # of several, the others are written
                check_before_loading(AdapterDirectory(directory), base, rank)
    loaded = _load(directories, base) if data is not None or reduce_intruders else None
    batches = None
    if loaded is not None and data is not None:
        batches = load_batches(
            data, loaded.tokenizer, **vars(reading), samples=samples, max_length=max_length, seq2seq=loaded.seq2seq
        )
    exports: list[Exported] = []
    summaries: list[dict[str, Any]] = []
    for place, directory in places.items():
        try:
            exported = export_adapter(
                directory, place, engine, rank, parameters=parameters, megabytes=megabytes, keep_ranks=keep_ranks,
                dtype=dtype, start=start, base=base, merge_into=merge_into, rename=rename, overwrite=overwrite,
                reduce_intruders=loaded.model if loaded is not None and reduce_intruders else None,
            )  # fmt: skip
            summary = exported.to_dict() | ({"failed": None} if len(places) > 1 else {})
            if loaded is not None and batches is not None:
                summary["losses"] = [_loss(loaded, one, batches) for one in (directory, exported.path)]
            exports.append(exported)
        except LoraInitError as error:
            if len(places) == 1:
                raise
            text = explain(error, in_words)
            text = text if str(directory) in text else f"{directory}: {text}"
            summary = {one.name: None for one in fields(Exported)} | {"path": str(place), "failed": text}
            print_error(text)
        summaries.append(summary)
    if len(places) == 1:
        print_result(summaries[0], lambda console, values: _show(console, exports[0], values.get("losses")), True)
        return
    one_base = base or len({AdapterDirectory(places[one.path]).base for one in exports}) == 1
    of = base or "" if one_base else None
    print_result(summaries, lambda console, values: _show_all(console, exports, values, of), written=True)
    if len(exports) < len(places):
        raise SystemExit(FAILED)


def _places(directories: list[Path], output: Path, engine: str | None) -> dict[Path, Path]:
    if len(directories) == 1:
        return {output: directories[0]}
    suffix = ".gguf" if find_engine(engine).is_file else ""
    names = [directory.expanduser().resolve().name for directory in directories]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise LoraInitError(f"several directories have the name {twice!r}, under which each would be written.")
    root = output.expanduser().resolve()
    return {root / f"{name}{suffix}": directory for name, directory in zip(names, directories, strict=True)}


def _load(directories: Sequence[Path], base: str | None) -> LoadedModel:
    """Load the one base of adapters; those that cannot be read are left to `export_adapter`."""
    from lora_init.adapters.directory import AdapterDirectory
    from lora_init.loading.models import load_model

    bases = []
    for directory in directories:
        with suppress(LoraInitError):
            bases.append(base or AdapterDirectory(directory).base)
    source = one_base(bases) if bases else AdapterDirectory(directories[0]).base  # which raises
    with busy(f"loading {source}"):
        return load_model(source, dtype="float32")


def _loss(loaded: LoadedModel, directory: Path, batches: Any) -> float:
    from lora_init.adapters.directory import AdapterDirectory
    from lora_init.adapters.peft_model import with_adapter
    from lora_init.collection.losses import mean_loss

    with with_adapter(loaded.model, AdapterDirectory(directory)) as peft_model:
        return mean_loss(peft_model, batches)


def _show(console: Console, exported: Exported, losses: list[float] | None) -> None:
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
    if exported.smaller is not None:
        rows["smaller"] = "rank {} would lose {:.2%} of the update".format(*exported.smaller)
    if losses is not None:
        rows["loss"] = "{:.4f} before, {:.4f} after".format(*losses)
    if exported.error_share is not None:
        moved = f"rounding its weights moved them {exported.error_share:.3g} times as far as the adapter does"
        much = ": on float weights it is not what was trained" if exported.error_share > 3.0 else ""
        rows["quantized base"] = moved + much
    if exported.intruders is not None:
        rows["intruders"] = "{} before, {} after".format(*exported.intruders)
    console.print(facts(rows))
    for note in exported.notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"\n{exported.command}", markup=False)
    if exported.verify:
        console.print(exported.verify, markup=False)


def _show_all(console: Console, exports: list[Exported], summaries: list[dict[str, Any]], base: str | None) -> None:
    """Show a table, and the commands; `base` is None where there are several, and empty where none was named."""
    from lora_init.serving.export import command_for_all, verify_for_all

    rows = []
    for about in summaries:
        done, smaller = about["failed"] is None, about["smaller"]
        rows.append(
            {
                "adapter": Path(about["path"]).name,
                "rank": str(about["rank"] or "merged") if done else "failed",
                "MB": f"{about['n_bytes'] / 10**6:.2f}" if done else "",
                "update lost": f"{about['error']:.2%}" if done else "",
                "at the next smaller rank": "rank {}: {:.2%}".format(*smaller) if smaller else "",
            }
            | ({"loss before, after": "{:.4f}, {:.4f}".format(*about["losses"])} if "losses" in about else {})
        )
    console.print(Cells(rows))
    together = command_for_all(exports) if exports and base is not None else ""
    each = [(together, verify_for_all(exports, base))] if together else [(one.command, one.verify) for one in exports]
    for serve, verify in each:
        console.print(f"\n{serve}", markup=False)
        if verify:
            console.print(verify, markup=False)
