"""Bring a trained adapter into the form that an engine loads, with the same outputs."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from lora_init.adapters.directory import CARD_FILE, LORA_A, LORA_B, WEIGHTS_FILE, AdapterDirectory, card_header
from lora_init.errors import LoraInitError, check_number, check_switches, warn
from lora_init.files import (
    as_path,
    check_free,
    check_writable,
    digests_of,
    is_as_written,
    is_same_place,
    new_directory,
    new_file,
    read_json,
    write_json,
)
from lora_init.layers.targets import PREFIX
from lora_init.loading.models import CLASS_OF_TASK, kind_of
from lora_init.on_demand import on_demand
from lora_init.planning.budgets import bytes_per_parameter, parse_count
from lora_init.serving.base import bring_checkpoint, plan_merge, write_merged
from lora_init.serving.compress import check_most_rank, error_at, fit
from lora_init.serving.engines import ENGINES, PEFT, VLLM_RANKS, Engine, check_rank, find_engine, vllm_rank
from lora_init.serving.experts import is_single
from lora_init.serving.fit import compare
from lora_init.serving.kept import Kept, kept_by_merge
from lora_init.serving.support import WRITE_NO_TEXT, note_without_text, on_base
from lora_init.serving.trained import Trained, note_of, read_trained

RECORD_FILE = "export.json"  # for which engine, what it lost, and hashes of what was written
_UNTRAINED = "B A is zero in every layer: the adapter was never trained, and changes nothing."


@dataclass(frozen=True, eq=False)
class Exported:
    """What `export_adapter` wrote.

    Attributes:
        path: The directory, or the GGUF file, as an absolute path.
        engine: The engine that it is for; None for PEFT, and for a merged model.
        rank: Largest rank of a layer; 0 for a merged model.
        scaling: What every layer's B A is multiplied by.
        command: What serves it.
        added: Layers that got an adapter which adds nothing, because others of their kind have one.
        errors: For each layer that lost rank, the relative error of its update in Frobenius norm.
        error: The same for all layers at once; 0 if nothing was left out. Rounding does not count: where layers have
            scalings of their own, B is rounded once more in a narrow type (0.16 % of an update in bfloat16).
        parameters: Numbers in all A and B.
        n_bytes: Size of all that was written.
        intruders: Intruder dimensions before and after `reduce_intruders`.
        error_share: Of an adapter that began by correcting a quantized base: |W - Q| over the size of the update,
            without what it began with if that was subtracted. None for others.
        verify: What asks that server whether it serves the adapter as trained; empty for PEFT, and where what was
            written is not PEFT's to load and the trained adapter was compressed or does not fit the plain base.
        smaller: Where a rank was chosen above the adapter's largest: the next smaller one that vLLM makes room for, and
            the relative error of the update there.
        notes: What to know about the adapter, such as that it was never trained.
    """

    path: Path
    engine: str | None
    rank: int
    scaling: float
    command: str
    added: tuple[str, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    error: float = 0.0
    parameters: int = 0
    n_bytes: int = 0
    intruders: tuple[int, int] | None = None
    verify: str = ""
    error_share: float | None = None
    smaller: tuple[int, float] | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that `json.dumps` takes."""
        return asdict(self) | {"path": str(self.path)}


def export_adapter(
    directory: str | Path,
    output: str | Path,
    engine: str | None = None,
    rank: int | None = None,
    *,
    parameters: int | str | None = None,
    megabytes: float | None = None,
    keep_ranks: bool = False,
    dtype: str | None = None,
    start: str | Path | None = None,
    base: str | None = None,
    merge_into: str | None = None,
    reduce_intruders: nn.Module | None = None,
    rename: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Exported:
    """Write a trained adapter in the form that an engine loads.

    Without more it becomes a PEFT directory of one rank and one scaling for all layers, which does exactly what the
    adapter does: A and B are padded with zeros, scalings that differ are multiplied into B, and layers without an
    adapter whose kind has one elsewhere get one that adds nothing. A rank below the adapter's largest, or a budget,
    compresses: each layer becomes the closest one of its rank (Eckart-Young), through QR of the thin factors.

    Memory: about four times the adapter in float32; a merge holds 2 GB of the model at a time.

    Args:
        directory: What PEFT's `save_pretrained`, or ours, wrote.
        output: Where to: a directory, or for llama.cpp a file.
        engine: A name of `engines.ENGINES`, such as `"vllm"`, `"sglang"` or `"llama.cpp"`. None is for PEFT, with what
            the engines refuse still in it.
        rank: Rank of every layer; with `keep_ranks`, the average. Default: the smallest of vLLM's that is large enough.
        parameters: Most numbers in A and B, such as `2_000_000` or `"2M"`.
        megabytes: Most 10^6 bytes of A and B, in the type that is written.
        keep_ranks: Let layers have ranks of their own. Under a budget those go where the trained update's singular
            values are largest.
        dtype: Type of A and B that is written: `"float32"`, `"bfloat16"` or `"float16"`. Default: the adapter's own.
        start: The adapter as it was before training, for a start that changed the base weights (lora-ga, PiSSA, OLoRA,
            CorDA); or for one that corrects a quantized base (qera), to serve or merge what was trained on the float
            model.
        base: Base model, directory or hub id. Default: the one that the adapter names.
        merge_into: Write a whole model instead: this one with the adapter merged in, in its own dtype.
        reduce_intruders: The plain base model, loaded, for PEFT's `reduce_intruder_dimension` to work with.
        rename: Write the adapter's tensors under the names that fit the base, where each has just one, see `check_fit`.
        overwrite: Replace what an earlier export wrote.
        trust_remote_code: Run code that comes with the base, whose names only that code knows. Read it first.

    Raises:
        LoraInitError: No adapter there, one of another base, damaged or incomplete, a start is missing, the engine is
            unknown or does not take what the adapter has, the arguments contradict each other, or the output exists.

    Example:
        >>> exported = export_adapter("trained", "served", engine="vllm")  # doctest: +SKIP
        >>> exported.command  # doctest: +SKIP
        'vllm serve base --enable-lora --max-lora-rank 32 --lora-modules served=/home/user/served'
    """
    # What needs neither the adapter nor its base is refused first, and nothing is written before all else is done.
    check_switches(keep_ranks=keep_ranks, rename=rename, overwrite=overwrite, trust_remote_code=trust_remote_code)
    wanted, size = find_engine(engine), _Size(rank, parameters, megabytes, keep_ranks, dtype)
    _check_options(engine, wanted, size, merge_into, base)
    path = check_output(output, engine, overwrite)
    check_reduction(reduce_intruders is not None, rename, start)
    _check_other(start, directory)
    began = AdapterDirectory(directory)
    source = next(one for one in (merge_into, base, began.base) if one is not None)
    renames: Mapping[str, str] = {}
    if rename:  # names come first: what is read next has the new ones
        renames = compare(directory, source, engine, trust_remote_code).to_rename(str(began.path))
    trained = read_trained(directory, start, renames)
    _check_start(began, start, merge_into)
    if not rename:
        compare(directory, source, engine, trust_remote_code).check()
    bring_checkpoint(merge_into, trained)
    trained, model = on_base(engine, trained, source, start, began.origin, trust_remote_code)
    share = began.error_size / trained.update_size if began.error_size else None
    sources = intruders = None
    if merge_into is not None:
        trained = _as_in_model(trained)
        sources = plan_merge(model, trained)
        kept = sum(kept_by_merge(model, trained, sources).values(), Kept())
        if kept.is_doubtful:
            remedy = "`lora-init inspect ADAPTER --merge TYPE --data FILE` measures it."
            warn(f"{merge_into}, in the type of its weights: {kept.advice()} {remedy}")
    if reduce_intruders is not None:
        trained, intruders = on_demand("without intruders")(trained, Path(directory).expanduser(), reduce_intruders)
    trained = trained.with_one_scaling()  # not earlier: what PEFT has reduced is for the scalings as they were read
    result = Exported(
        path, engine, 0, trained.scaling, f"vllm serve {shlex.quote(str(path))}", intruders=intruders,
        error_share=share, notes=(*_notes(trained, began), *note_without_text(engine, model)),
    )  # fmt: skip
    if sources is not None:
        server = ENGINES["vllm"].server.replace("{name}", "{path}")  # which serves a whole model under its path
        verify = _verify(server, path, Path(directory), False, start is None, _other_than(began, merge_into))
        result = replace(result, verify=verify)
        # One form for all engines.
        return _write(result, lambda place: write_merged(place, trained, model, sources), overwrite, trained)
    final, errors, error = fit(trained, rank, size.most(wanted, trained), keep_ranks, model.widths)
    if dtype is not None:
        final = _in_type(final, getattr(torch, dtype))
    check_rank(engine, final.rank)  # also where it was not given
    # PEFT reads experts one by one of some families only, and drops others without a word.
    is_peft = wanted.writes_peft and not any(map(is_single, wanted.with_experts(final, model).layers))
    result = replace(
        result, rank=final.rank, smaller=None if size.is_given else _next_smaller(trained, final.rank),
        command=_command(wanted, path, model.source, final.rank, final.config, final.other_shapes),
        errors=errors, error=error, added=tuple(final.layers_beside(trained)), parameters=final.n_parameters,
        verify=_verify(wanted.server, path, Path(directory), is_peft, start is None and not error, base),
    )  # fmt: skip
    return _write(result, lambda place: wanted.write_form(place, final, model), overwrite, final)


@dataclass(frozen=True)
class _Size:
    """How large the exported adapter may be: arguments of `export_adapter`."""

    rank: int | None
    parameters: int | str | None
    megabytes: float | None
    keep_ranks: bool
    dtype: str | None

    @property
    def limits(self) -> dict[str, int | str | float]:
        """The limits that are given, by the names of the arguments."""
        limits = {"rank": self.rank, "parameters": self.parameters, "megabytes": self.megabytes}
        return {name: value for name, value in limits.items() if value is not None}

    @property
    def is_given(self) -> bool:
        """Whether the ranks are the user's choice, and not those for which vLLM makes room."""
        return bool(self.limits) or self.keep_ranks

    def most(self, engine: Engine, trained: Trained) -> int | None:
        """Return how many numbers A and B may have together; None without a limit."""
        if self.parameters is not None:
            return parse_count(self.parameters, "parameters")
        if self.megabytes is None:
            return None
        if self.dtype is not None:
            own = bytes_per_parameter(self.dtype)
        else:
            own = next(iter(trained.layers.values())).a.itemsize
        return int(self.megabytes * 10**6 / (engine.bytes_each or own))  # an engine's form may have a type of its own


def _as_in_model(trained: Trained) -> Trained:
    """Name the biases as a merged model has them: a bias beside an adapter has another name in the adapter's file."""
    others = {key.replace(".base_layer.bias", ".bias"): tensor for key, tensor in trained.others.items()}
    return replace(trained, others=others)


def _in_type(trained: Trained, dtype: torch.dtype) -> Trained:
    """Bring each A to a type; B is written in the type of A."""
    layers = {name: replace(layer, a=layer.a.to(dtype)) for name, layer in trained.layers.items()}
    return replace(trained, layers=layers)


def _notes(trained: Trained, began: AdapterDirectory) -> tuple[str, ...]:
    """List what to know about an adapter: that it was never trained, or on which base it was made."""
    notes = (_UNTRAINED,) if trained.adds_nothing else note_of(began.path)
    if trained.quantized and not began.error_size:
        on = f"it was made on a base in {trained.quantized}: on another one, as --data measures it, it acts otherwise"
        return (*notes, on)
    return notes


def _next_smaller(trained: Trained, rank: int) -> tuple[int, float] | None:
    """Return the next rank below that vLLM makes room for, and the error there, if `rank` is above the adapter's."""
    below = [allowed for allowed in VLLM_RANKS if allowed < rank]
    if not below or rank <= trained.rank:
        return None
    return below[-1], error_at(trained, below[-1])


def check_reduction(reduces: bool, rename: bool, start: str | Path | None) -> None:
    """Refuse to reduce an adapter that PEFT, which does it, cannot load as it is: misnamed, or on its start."""
    if reduces and (rename or start is not None):
        raise LoraInitError(
            "{reduce_intruders} is of an adapter as PEFT loads it. Export it by {rename} or {start} first, and reduce "
            "what that writes.",
            reduce_intruders=..., rename=True, start=...,
        )  # fmt: skip


def _check_other(start: str | Path | None, directory: str | Path) -> None:
    if start is not None and is_same_place(as_path(start, "start: the adapter before training"), directory):
        raise LoraInitError("{start} is the trained adapter itself. Name it as it was before training.", start=start)


def _check_start(began: AdapterDirectory, start: str | Path | None, merge_into: str | None) -> None:
    """Refuse to subtract a start for nothing, and to merge what corrects another base."""
    if merge_into is not None and start is None and began.error_size:
        raise LoraInitError(
            f"{began.path} began by correcting the weights of a quantized base, and a merge is into float weights, "
            "which lack nothing. Name the adapter before training by {start}, which is subtracted, or serve it on the "
            "quantized base.",
            start=...,
        )
    if start is not None and began.origin and not (began.base_change or began.error_size):
        raise LoraInitError(
            f"{{start}}: {began.path} fits the plain base already, since its start left that alone or PEFT has "
            "converted it, and it would be subtracted for nothing. Leave start away.",
            start=start,
        )


def check_output(output: str | Path, engine: str | None, overwrite: bool) -> Path:
    """Check, before the work, that an export for an engine may be written there; return the absolute path."""
    path = as_path(output, "output").resolve()
    if find_engine(engine).is_file:
        check_writable(Path(output).expanduser(), overwrite, "GGUF file")
    else:
        check_free(output, overwrite, RECORD_FILE, _replaceable(path))
    return path


def check_before_loading(
    adapter: AdapterDirectory, base: str | None, rank: int | None, trust_remote_code: bool = False
) -> None:
    """Refuse, before its base is loaded, an adapter that does not fit it, has no loss of text, or not that rank."""
    compare(adapter.path, base, None, trust_remote_code).check()
    if kind := WRITE_NO_TEXT.get(str(adapter.config.get("task_type"))):
        raise LoraInitError(f"{adapter.path} is of {kind}, and the loss is that of text. Leave --data out.")
    shapes, most = adapter.shapes, []
    for name in adapter.layers:  # A is [r, d_in] and B [d_out, r]
        d_in, d_out = shapes[f"{PREFIX}{name}{LORA_A}"][-1], shapes[f"{PREFIX}{name}{LORA_B}"][0]
        most.append(min(d_in, d_out))
    if most:  # an adapter of an embedding alone has none
        check_most_rank(rank, max(most))


def _check_options(
    name: str | None, engine: Engine, size: _Size, merge_into: str | None, base: str | None = None
) -> None:
    """Refuse sizes and types that contradict each other, or that the engine or a merged model does not have."""
    if size.dtype is not None:
        bytes_per_parameter(size.dtype)  # refuses a type that has no name here
        if merge_into is not None:
            raise LoraInitError("{dtype}: a merged model has its own type. Leave dtype away.", dtype=size.dtype)
        if engine.bytes_each:
            raise LoraInitError(f"{{dtype}}: {engine.title} reads float32 alone. Leave dtype away.", dtype=size.dtype)
    _check_limits(size.limits)
    if merge_into is not None and base not in (None, merge_into):
        raise LoraInitError(
            "{base} with {merge_into}: the model that is merged into is the base. Name one.",
            base=base, merge_into=merge_into,
        )  # fmt: skip
    if merge_into is not None and (name is not None or size.is_given):
        raise LoraInitError(
            "a merged model has no ranks and is for every engine: with {merge_into} leave {engine}, {rank}, "
            "{keep_ranks} and budgets away.",
            merge_into=..., engine=..., rank=..., keep_ranks=True,
        )  # fmt: skip
    # llama.cpp and Ollama read each pair's own rank, vLLM patterns; others read one rank for all.
    if size.keep_ranks and not engine.ranks:
        takers = ", ".join(key for key, other in ENGINES.items() if other.ranks)
        raise LoraInitError(f"{name} takes one rank for all layers. Ranks of their own are for PEFT, {takers}.")
    if size.parameters is not None:
        parse_count(size.parameters, "parameters")
    if size.rank is not None:
        check_number("rank", size.rank, 1, whole=True)
        check_rank(name, size.rank)


def _check_limits(limits: Mapping[str, int | str | float]) -> None:
    if len(limits) > 1:
        named = " and ".join(f"{{{name}}}" for name in limits)  # which the error writes as `rank=8` or `--rank 8`
        raise LoraInitError(f"{named} are both given. One of them says how large it may be.", **limits)
    check_number("megabytes", limits.get("megabytes", 1.0), above=True)


def _command(
    engine: Engine, path: Path, base: str, rank: int, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> str:
    quote = repr if engine is PEFT else shlex.quote  # PEFT's is a line of Python, and the others are for a shell
    filled = {"base": quote(base), "path": quote(str(path)), "name": _name(path), "rank": vllm_rank(rank)}
    command, task = engine.command.format_map(filled), config.get("task_type")
    if engine is not PEFT:
        return command
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        for key, shape in shapes.items():
            if key.endswith(("classifier.weight", "score.weight")):  # [labels, width]
                command = command.replace("), ", f", num_labels={shape[0]}), ", 1)  # into the model's parentheses
                break
    named = kind_of(str((config.get("auto_mapping") or {}).get("base_model_class")), False)
    auto_class = CLASS_OF_TASK.get(task or "", named[1] if named else "AutoModelForCausalLM")
    return command.replace("AutoModelForCausalLM", auto_class)


def command_for_all(exports: Sequence[Exported]) -> str:
    """Write the command that serves exports for one engine and of one base; empty if it takes one at a time."""
    several = find_engine(exports[0].engine).several
    if not several:
        return ""
    # The command of the largest makes room for all, and ends with its own name and path: all stand there instead.
    largest = max(exports, key=lambda exported: exported.rank)
    words = [_name_and_path(exported.path) for exported in exports]
    return largest.command.removesuffix(_name_and_path(largest.path)) + several.join(words)


def exported_as(path: Path, base: str | None = None) -> dict[str, str] | None:
    """Write the commands that serve and verify what `export_adapter` wrote there, moved or not; None of another.

    `base` takes the place of the one that the adapter names. The record says for which engine. A command that stands in
    it is not passed on: the directory may be anybody's.
    """
    if not is_as_written(path, RECORD_FILE):
        return None
    name = read_json(path / RECORD_FILE).get("engine")
    if name not in [None, *ENGINES]:
        return None
    engine, path, adapter = find_engine(name), path.resolve(), AdapterDirectory(path)
    rank, named = max(adapter.ranks.values(), default=0), adapter.base
    source = base or named
    if not base and named.startswith("-"):  # which a shell would read as an option
        source = "BASE"
    command, verify = _command(engine, path, source, rank, adapter.config, adapter.shapes), ""
    if not any(map(is_single, adapter.layers)):  # of some families PEFT drops single experts
        other = None if source == named else source
        verify = _verify(engine.server, path, path, is_peft=True, fits=True, base=other)
    return {"command": command, "verify": verify}


def verify_for_all(exports: Sequence[Exported], base: str | None = None) -> str:
    """Write the command that asks one server about all of them, by the names under which it serves them."""
    server = find_engine(exports[0].engine).server
    paths = " ".join(shlex.quote(str(exported.path)) for exported in exports)
    # Without a name for all: each is asked for by its own.
    return _with_base(f"lora-init verify {paths} {server.partition(' --model')[0]}", base)


def _name(path: Path) -> str:
    """Write the name under which an engine serves what was exported."""
    return shlex.quote(path.stem if path.suffix == ".gguf" else path.name)


def _with_base(command: str, base: str | None) -> str:
    return f"{command} --base {shlex.quote(base)}" if base else command


def _name_and_path(path: Path) -> str:
    return f"{_name(path)}={shlex.quote(str(path))}"


def _other_than(adapter: AdapterDirectory, base: str | None) -> str | None:
    """Return a base as commands have to name it; None where the adapter names it itself."""
    return None if adapter.base and is_same_place(str(base), adapter.base) else str(base)


def _verify(server: str, path: Path, trained: Path, is_peft: bool, fits: bool, base: str | None) -> str:
    """Write the command that asks a server about what was written, by what PEFT can load of the two."""
    if not server or not (is_peft or fits):
        return ""
    adapter = path if is_peft else trained.expanduser().resolve()
    options = server.format(name=_name(path), path=shlex.quote(str(path)))
    return _with_base(f"lora-init verify {shlex.quote(str(adapter))} {options}", base)


def _replaceable(path: Path) -> list[str]:
    """List the files that an earlier export wrote into a directory."""
    try:
        return [RECORD_FILE, *read_json(path / RECORD_FILE)["files"]]
    except (OSError, ValueError, KeyError, TypeError):  # no record or a damaged one: then nothing is known to be ours
        return []


def _write(result: Exported, write: Callable[[Path], None], overwrite: bool, trained: Trained) -> Exported:
    """Write a file or a directory in one piece, a directory with a card and a record of what was done."""
    path = result.path
    if find_engine(result.engine).is_file:
        with new_file(path) as fresh:
            write(fresh)
        return replace(result, n_bytes=path.stat().st_size)
    with new_directory(path, overwrite, RECORD_FILE, _replaceable(path)) as fresh:
        try:
            write(fresh)
        except SafetensorError as error:  # no space, as a rule: what a full disk is elsewhere
            raise OSError(str(error)) from error
        if not (fresh / CARD_FILE).exists():
            (fresh / CARD_FILE).write_text(_card(result, trained), encoding="utf-8")
        n_bytes, mode = 0, (fresh / CARD_FILE).stat().st_mode
        for file in fresh.rglob("*"):
            if file.is_file():
                file.chmod(mode)  # safetensors lets only the owner read its files, and an engine may be another user
                n_bytes += file.stat().st_size
        result = replace(result, n_bytes=n_bytes)
        # The record comes last: it has the hashes of what was written, and by it a later export replaces the files.
        record = {"files": sorted(entry.name for entry in fresh.iterdir()), "sha256": digests_of(fresh, [WEIGHTS_FILE])}
        write_json(fresh / RECORD_FILE, record | result.to_dict())
    return result


def _card(result: Exported, trained: Trained) -> str:
    header = card_header(trained.base, trained.config.get("task_type"), is_adapter=bool(result.rank))
    what = f"rank {result.rank} at most." if result.rank else "merged into its base model."
    if result.error:
        what += f" Compressed, at a relative error of {result.error:.2%}."
    return (
        f"{header}\n# A trained LoRA adapter, ready to serve\n\n"
        f"Exported by lora_init: {what}\n\n```\n{result.command}\n```\n"
    )
