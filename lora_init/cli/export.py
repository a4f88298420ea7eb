"""The command `lora-init export`: a trained adapter becomes what an inference engine loads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from lora_init.adapters.init_config import DATA, Reading, Sample
from lora_init.cli.commands import offered
from lora_init.cli.console import FAILED, busy, importing, in_words, print_error, print_result, refuse_idle
from lora_init.cli.options import BaseModel, MaxLength, TrustRemoteCode, WrittenAs, as_declared, of_adapter, one_base
from lora_init.cli.tables import Cells, facts
from lora_init.errors import LoraInitError, explain, require, require_version
from lora_init.loading.examples import MAX_LENGTH
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
    megabytes: Annotated[float | None, of_adapter(help="Compress to this size, in 10^6 bytes.")] = None,
    keep_ranks: Annotated[bool, Option(help="Let ranks differ, as the trained update needs.")] = False,
    dtype: Annotated[WrittenAs | None, Option(help="Type of A and B. Default: the adapter's own.")] = None,
    start: Annotated[Path | None, Option(help="The adapter before training, if it changed the base.")] = None,
    base: BaseModel = None,
    merge_into: Annotated[str | None, Option(help="Write this whole model with the adapter merged in.")] = None,
    reduce_intruders: Annotated[bool, of_adapter(help="Take most intruders out, by PEFT.")] = False,
    rename: Annotated[bool, of_adapter(help="Write names of tensors that fit the base: see inspect.")] = False,
    data: Annotated[
        str | None, Option(metavar=DATA, help="Data to measure the loss on before and after, as for init.")
    ] = None,
    *,
    reading: Reading,
    samples: Annotated[int, Option(rich_help_panel="Data", **as_declared(Sample, "samples"))] = 64,
    max_length: MaxLength = MAX_LENGTH,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Annotated[bool, Option(help="Replace what an earlier export wrote.")] = False,
) -> None:
    """Bring trained adapters into the form that an engine loads, with the same outputs.

    Several are written into OUTPUT under the names of their DIRECTORIES. If some fail, the others are written, and the
    exit status is 1.
    """
    _check_options(data, engine, merge_into, start, reduce_intruders)
    places = _places(directories, output, engine, start)
    with importing(data=data):
        from lora_init.adapters.directory import AdapterDirectory
        from lora_init.loading.batches import load_batches
        from lora_init.serving.export import check_output, check_reduction, export_adapter
    check_reduction(reduce_intruders, rename, start)
    # The base is read only where something is measured on it; everything else goes from file to file.
    needs_base = data is not None or reduce_intruders
    # Of several adapters all places are looked at before the first is written.
    for place in places:
        check_output(place, engine, overwrite)
    loaded = batches = None
    if needs_base:
        _check_before_loading(places.values(), base, rank, data, engine, trust_remote_code)
        loaded = _load(directories, base, trust_remote_code)
    if loaded is not None and data is not None:
        batches = load_batches(
            data, loaded.tokenizer, **vars(reading), samples=samples, max_length=max_length, seq2seq=loaded.seq2seq
        )
    # Exports that worked, and a summary of each adapter in the order of the command line.
    exports: list[Exported] = []
    summaries: list[dict[str, Any]] = []
    for place, directory in places.items():
        try:
            # In the loop, too: an adapter that cannot be exported is reported beside those that can.
            _check_experts(data, engine, AdapterDirectory(directory).config)
            exported = export_adapter(
                directory, place, engine, rank, parameters=parameters, megabytes=megabytes, keep_ranks=keep_ranks,
                dtype=dtype, start=start, base=base, merge_into=merge_into, rename=rename, overwrite=overwrite,
                reduce_intruders=loaded.model if loaded is not None and reduce_intruders else None,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
            # The loss after is of the directory that was written, as it will be loaded.
            losses = _losses(loaded, batches, directory, exported.path)
        except LoraInitError as error:
            if len(places) == 1:  # a single one ends the command, as errors of other commands do
                raise
            summaries.append(_failure(error, directory, place, measured=data is not None))
            continue
        exports.append(exported)
        summary = exported.to_dict()
        if len(places) > 1:  # the key by which a reader of --json finds those that were not written
            summary["failed"] = None
        summaries.append(summary | losses)
    if len(places) == 1:
        print_result(summaries[0], lambda console, values: _show(console, exports[0], values.get("losses")), True)
        return
    show = partial(_show_all, exports, _base_named([places[exported.path] for exported in exports], base))
    print_result(summaries, show, written=True)
    if len(exports) < len(places):
        raise SystemExit(FAILED)


def _check_options(
    data: str | None, engine: str | None, merge_into: str | None, start: Path | None, reduce_intruders: bool
) -> None:
    """Refuse options that contradict each other, and those for which a package is missing."""
    if data is not None and (merge_into or start or not find_engine(engine).writes_peft):
        raise LoraInitError("--data: PEFT measures the loss. Leave --merge-into, --start and --engine away.")
    if data is None:
        refuse_idle([*offered(Reading), "samples", "max_length"], "that is for --data")
    # Missing packages are found out now, and not after minutes of work.
    require(*find_engine(engine).libraries)
    if reduce_intruders:
        require("scipy")
        require_version("peft", "0.19", "--reduce-intruders")


def _check_before_loading(
    directories: Collection[Path], base: str | None, rank: int | None, data: str | None, engine: str | None,
    trust_remote_code: bool = False,
) -> None:  # fmt: skip
    """Refuse an adapter that its base need not be loaded for; one of several is left to `export_adapter`."""
    from lora_init.adapters.directory import AdapterDirectory
    from lora_init.serving.export import check_before_loading

    for directory in directories:
        try:
            adapter = AdapterDirectory(directory)
            _check_experts(data, engine, adapter.config)
            check_before_loading(adapter, base, rank, trust_remote_code)
        except LoraInitError:
            if len(directories) == 1:  # what is wrong with one of several is printed when it is exported
                raise


def _base_named(directories: Sequence[Path], base: str | None) -> str | None:
    """Return the base that commands name: none if all adapters name the same; None where these are several."""
    from lora_init.adapters.directory import AdapterDirectory

    if base:
        return base
    bases = {AdapterDirectory(directory).base for directory in directories}
    return "" if len(bases) == 1 else None


def _failure(error: LoraInitError, directory: Path, place: Path, measured: bool) -> dict[str, Any]:
    """Print why one of several adapters was not written; return its summary, in which all else is empty.

    It has the keys that the others have, as the table needs: also the losses, where they are `measured`.
    """
    from lora_init.serving.export import Exported

    text = explain(error, in_words)
    if str(directory) not in text:  # most name it already
        text = f"{directory}: {text}"
    print_error(text)
    empty = {field.name: None for field in fields(Exported)}
    if measured:
        empty["losses"] = None
    return empty | {"path": str(place), "failed": text}


# What an engine gets of experts is not in PEFT's form, so PEFT cannot measure it.
def _check_experts(data: str | None, engine: str | None, config: Mapping[str, Any]) -> None:
    if data is not None and engine and config.get("target_parameters"):
        raise LoraInitError(f"--data: PEFT measures the loss, and {engine} gets experts in another form.")


def _places(directories: list[Path], output: Path, engine: str | None, start: Path | None) -> dict[Path, Path]:
    """Choose where each adapter is written: to the output, or several under their names in it."""
    if len(directories) == 1:
        return {output: directories[0]}  # as it was typed, since messages name it
    # For llama.cpp an adapter is one file.
    suffix = ".gguf" if find_engine(engine).is_file else ""
    names = [directory.expanduser().resolve().name for directory in directories]  # `.` and links have names, too
    for name in names:
        if names.count(name) > 1:
            raise LoraInitError(f"several directories have the name {name!r}, under which each would be written.")
    if start is not None:
        raise LoraInitError("--start is one adapter before its training. Export those that have one one by one.")
    root = output.expanduser().resolve()
    return {root / f"{name}{suffix}": directory for name, directory in zip(names, directories, strict=True)}


def _load(directories: Sequence[Path], base: str | None, trust_remote_code: bool = False) -> LoadedModel:
    """Load the one base of adapters; those that cannot be read are left to `export_adapter`."""
    from lora_init.adapters.directory import AdapterDirectory
    from lora_init.loading.models import load_model

    bases = []
    for directory in directories:
        with suppress(LoraInitError):
            bases.append(base or AdapterDirectory(directory).base)
    # Those that can be read must have one base, since it is loaded once. Where none can be read, reading the first one
    # again raises what is wrong with it.
    source = one_base(bases) if bases else AdapterDirectory(directories[0]).base
    with busy(f"loading {source}"):
        # Losses before and after are to differ by the export alone, not by the rounding of a narrow type.
        return load_model(source, dtype="float32", trust_remote_code=trust_remote_code)


def _losses(loaded: LoadedModel | None, batches: Any, *directories: Path) -> dict[str, list[float]]:
    """Measure the loss of a base with each of some adapters, as a summary has it; nothing without batches."""
    if loaded is None or batches is None:
        return {}
    from lora_init.adapters.directory import AdapterDirectory
    from lora_init.adapters.peft_model import with_adapter
    from lora_init.collection.losses import mean_loss

    # One base for all: an adapter is put on it for its measurement and taken off again.
    losses = []
    for directory in directories:
        with with_adapter(loaded.model, AdapterDirectory(directory)) as peft_model:
            losses.append(mean_loss(peft_model, batches))
    return {"losses": losses}


def _show(console: Console, exported: Exported, losses: list[float] | None) -> None:
    # Rows are there for what was done: without compression nothing is lost, a merge has no rank.
    rows = {"written": f"{exported.path}: {exported.n_bytes / 10**6:.2f} MB"}
    if exported.rank:
        rows["rank"] = f"{exported.rank}, scaling {exported.scaling:g}, {exported.parameters:,} parameters"
    if exported.added:
        rows["added"] = f"{len(exported.added)} layers that do nothing, because others of their kind have an adapter"
    if exported.errors:
        # A mean over the layers hides one that lost most of what it had learned.
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
        text = f"rounding its weights moved them {exported.error_share:.3g} times as far as the adapter does"
        if exported.error_share > 3.0:
            text += ": on float weights it is not what was trained"
        rows["quantized base"] = text
    if exported.intruders is not None:
        rows["intruders"] = "{} before, {} after".format(*exported.intruders)
    console.print(facts(rows))
    for note in exported.notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"\n{exported.command}", markup=False)
    if exported.verify:
        console.print(exported.verify, markup=False)


def _show_all(exports: list[Exported], base: str | None, console: Console, summaries: list[dict[str, Any]]) -> None:
    """Show a table, and the commands; `base` is None where there are several, and empty where none was named."""
    from lora_init.serving.export import command_for_all, verify_for_all

    console.print(Cells([_row(summary) for summary in summaries]))
    # One server takes all adapters of one base, in engines that serve several.
    together = command_for_all(exports) if exports and base is not None else ""
    if together:
        commands = [(together, verify_for_all(exports, base))]
    else:
        commands = [(exported.command, exported.verify) for exported in exports]
    for serve, verify in commands:
        console.print(f"\n{serve}", markup=False)
        if verify:
            console.print(verify, markup=False)


def _row(summary: Mapping[str, Any]) -> dict[str, str]:
    """Write the summary of one adapter as a row of the table of several."""
    row = {"adapter": Path(summary["path"]).name, "rank": "failed", "MB": "", "update lost": ""}
    if summary["failed"] is None:
        row["rank"] = str(summary["rank"] or "merged")
        row["MB"] = f"{summary['n_bytes'] / 10**6:.2f}"
        row["update lost"] = f"{summary['error']:.2%}"
    smaller = summary["smaller"]
    row["at the next smaller rank"] = "rank {}: {:.2%}".format(*smaller) if smaller else ""
    if "losses" in summary:
        losses = summary["losses"]
        row["loss before, after"] = "{:.4f}, {:.4f}".format(*losses) if losses else ""
    return row
