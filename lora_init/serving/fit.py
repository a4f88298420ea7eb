"""Whether an adapter fits its base model, by the headers of their files: nothing is loaded, and no code is run."""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, dropwhile
from pathlib import Path
from typing import Any

import torch

from lora_init.adapters.directory import CONFIG_FILE, WEIGHTS_FILE, AdapterDirectory, form_of
from lora_init.errors import LoraInitError, check_switches, in_one_line, warn
from lora_init.files import as_path, is_same_place
from lora_init.layers.identity import count_parameters, differing_config, fingerprint, model_config
from lora_init.layers.targets import PREFIX
from lora_init.layers.wrappers import plain_name
from lora_init.loading.checkpoint import Stored, checkpoint_of
from lora_init.loading.models import on_meta
from lora_init.planning.lora_config import from_patterns
from lora_init.serving.base import Base, build_base, is_for, parameters_of, read_config, widths_of
from lora_init.serving.engines import find_engine
from lora_init.serving.support import try_export, why_not_as_it_is

# Layer and part in the name of a tensor, also where the adapter's own name stands in it, as it does on the model.
_PARTS = r"lora_(?:embedding_)?[AB]|lora_magnitude_vector"
_TENSOR = re.compile(rf"(?P<layer>.+?)\.(?P<part>{_PARTS})(?:\.[^.]+)??(\.weight)?")
# The part of a model that a tensor is of; the first pattern that its name has counts.
_PARTS_BY_NAME = {
    "experts": r"\.experts\.", "attention": r"(?i)\.\w*(attn|attention)", "head": r"lm_head|\.(score|classifier)\.",
    "embeddings": r"embed|\.wte\.", "router": r"\.(gate|router)\.",
}  # fmt: skip
# The axis of A and of B along which the rank counts.
_RANK_AXIS = {"A": 0, "B": 1}
_FLOATS = ("F64", "F32", "F16", "BF16")  # as headers of safetensors call them
_COMMIT = re.compile(r"[0-9a-f]{40}")  # what the hub calls the directory of a snapshot
# What stands in front of the same layer in one class of a model and not in another.
_WRAPPERS = {"model", "language_model", "text_model", "transformer", "base_model", "module"}
_CLASSIFIES = ("SEQ_CLS", "TOKEN_CLS")
_OTHERWISE = "The adapter was made for this base with {}: that changes what it reads."
_OTHER_WEIGHTS = "with other weights: another revision, or one that was trained further"
# What PEFT and transformers raise where a configuration and a model do not go together.
_REFUSED = (ValueError, TypeError, AttributeError, KeyError, RuntimeError, NotImplementedError, ImportError, re.error)


@dataclass(frozen=True)
class Misfit:
    """A part of an adapter that would not be applied, or not as it was trained."""

    # "name", "config", "missing", "shape", "vocabulary", "rank", "type", "base" or "revision"; "engine" where `export`
    # writes what an engine takes, "export" where it does not
    kind: str
    where: str  # the tensor in the file, or the file
    problem: str


@dataclass(frozen=True)
class FitReport:
    """What `check_fit` found.

    Attributes:
        base: Directory or hub id of the base model.
        model_class: The class of the model that the names were compared with.
        tensors: Number of tensors in the adapter's file.
        misfits: What would not be applied; empty if the adapter fits.
        renames: For each tensor whose name is not that of the model, the name that is; empty unless each has just one,
            and nothing else is wrong.
        notes: What else to know.
    """

    base: str
    model_class: str
    tensors: int
    misfits: tuple[Misfit, ...] = ()
    renames: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """One line for each kind of misfit: the first, and how many there are."""
        by_kind: dict[str, list[Misfit]] = {}
        for misfit in self.misfits:
            by_kind.setdefault(misfit.kind, []).append(misfit)
        lines = []
        for alike in by_kind.values():
            line = f"{alike[0].where}: {alike[0].problem}"
            if len(alike) > 1:
                line += f" {len(alike) - 1} more are alike."
            lines.append(line)
        if lines and self.can_rename:
            lines.append("`lora-init export --rename` writes names that fit.")
        return lines

    @property
    def can_rename(self) -> bool:
        """Whether names are all that is wrong, so that `export` can write others."""
        return bool(self.renames) and {misfit.kind for misfit in self.misfits} <= {"name", "config", "engine"}

    @property
    def stops(self) -> bool:
        """Whether anything would not be applied. A base with other weights than the adapter's own stops nothing."""
        return any(misfit.kind not in ("base", "revision") for misfit in self.misfits)

    def to_rename(self, where: str) -> Mapping[str, str]:
        """Return `renames`; refuse an adapter in which more is wrong than names, or no name is."""
        others = tuple(misfit for misfit in self.misfits if misfit.kind not in ("name", "config"))
        replace(self, misfits=others).check()
        if not self.renames:
            self.check()
            raise LoraInitError(f"rename: {where} has the names of {self.model_class}. Leave rename out.")
        return self.renames

    def check(self) -> None:
        """Refuse an adapter that would not be applied, for what comes first; warn of one that may be for others."""
        if self.stops:
            text = self.lines[0]
            if self.can_rename:
                text += f" {self.lines[-1]}"  # which says how to rename
            raise LoraInitError(text)
        for misfit in self.misfits:
            warn(f"{misfit.where} {misfit.problem} Is it the same base?")
        for note in self.notes:
            warn(note)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that `json.dumps` takes."""
        return asdict(self) | {"fits": not self.misfits}


def check_fit(
    directory: str | Path, base: str | None = None, engine: str | None = None, *, trust_remote_code: bool = False
) -> FitReport:
    """Find out, before anything is loaded, whether each tensor of an adapter finds its layer in a base model.

    PEFT puts the adapter's configuration on the model without weights, in the class that the adapter names, or else the
    checkpoint and for engines always the checkpoint, and names and shapes are compared with the file's header. Where
    the adapter's record has the fingerprint of its base, or both bases are here, 16 numbers of each weight are read.
    For an engine the adapter's tensors are read, as `export_adapter` does.

    Args:
        directory: What PEFT's `save_pretrained`, or ours, wrote.
        base: Directory or cached hub id of the base model. Default: the one that the adapter names.
        engine: A name of `engines.ENGINES`, which takes less than PEFT does. None is for PEFT.
        trust_remote_code: Run code that comes with the base, whose names only that code knows. Read it first.

    Raises:
        LoraInitError: There is no adapter, or a file of it or of the base is damaged, missing or of another form.

    Example:
        >>> check_fit("trained", engine="vllm").misfits  # doctest: +SKIP
        ()
    """
    check_switches(trust_remote_code=trust_remote_code)
    report = compare(directory, base, engine, trust_remote_code)
    # Names that `export --rename` mends are no reason to leave the engine out.
    if engine is None or (report.stops and not report.renames):
        return report
    return _with_engine(report, AdapterDirectory(directory), engine, trust_remote_code)


def _with_engine(report: FitReport, adapter: AdapterDirectory, name: str, trust_remote_code: bool) -> FitReport:
    """Add to a report whether an engine takes the adapter, as it is or by `export`, and how many tensors that is."""
    engine, misfits = find_engine(name), list(report.misfits)
    problem, notes = try_export(name, adapter.path, report.base, report.renames, trust_remote_code)
    if problem:
        misfits.append(Misfit("export", str(adapter.path), problem))
        outcome = "gets none"
    elif reason := why_not_as_it_is(engine, adapter.ranks, adapter.config):
        problem = f"{engine.title} {reason}. `lora-init export --engine {name}` writes what it takes."
        misfits.append(Misfit("engine", str(adapter.path), problem))
        outcome = "gets all by export"
    else:
        outcome = "takes them as they are"
    parts = Counter(map(_part_of, adapter.header))
    counts = ", ".join(f"{count} of {part}" for part, count in parts.items())
    note = " But ".join((f"Tensors: {counts}. {engine.title} {outcome}.", *(f"{text}." for text in notes)))
    return replace(report, misfits=tuple(misfits), notes=(*report.notes, note))


def _part_of(key: str) -> str:
    """Return the part of a model that a tensor is of, by its name."""
    for part, pattern in _PARTS_BY_NAME.items():
        if re.search(pattern, key):
            return part
    return "MLP"


def compare(
    directory: str | Path, base: str | Path | None, engine: str | None, trust_remote_code: bool = False
) -> FitReport:
    """Compare names and shapes as `check_fit` does, with those of the class that an engine loads if one is named."""
    adapter = AdapterDirectory(directory)
    source = adapter.base if base is None else base
    if not isinstance(source, str):
        source = str(as_path(source, "base"))
    if form := form_of(adapter.header):
        raise LoraInitError(f"{adapter.path / WEIGHTS_FILE} {form}. PEFT's save_pretrained() writes what is read here.")
    config = read_config(source, trust_remote_code)
    build = partial(build_base, config=config, trust_remote_code=trust_remote_code)
    fit = _Fit(adapter, partial(build, adapter.config, source, for_engine=engine is not None))
    report = fit.report(source, converts=engine is None)  # PEFT converts older names when it loads; engines do not
    if report.misfits:  # which base it is, is asked only of an adapter that fits its form
        return report
    misfits: list[Misfit] = []
    notes = [*report.notes, *_of_own_class(fit, partial(build, {}, source), engine)]
    for remark in _of_another_base(fit, source, config, build):
        if isinstance(remark, Misfit):
            misfits.append(remark)
        else:
            notes.append(remark)
    return replace(report, misfits=tuple(misfits), notes=tuple(notes))


class _Fit:
    """An adapter on one class of its base model, without weights.

    PEFT itself decides which tensors the adapter's configuration gives the model, under which names and in which
    shapes: it wraps the model on the meta device, and what it would save is compared with the header of the file.
    """

    def __init__(self, adapter: AdapterDirectory, make: Any) -> None:
        from peft import get_peft_model_state_dict

        model = make()  # for each adapter a new one, since PEFT changes the model that it wraps
        self.adapter, self.make, self.name = adapter, make, type(model).__name__
        self.base = Base("", model, widths_of(model), {})
        # Labels of the base's head, and of the adapter's, once a tensor of it was seen.
        self.labels = 0
        self.n_labels = model.config.num_labels if adapter.config.get("task_type") in _CLASSIFIES else 0
        # The modules of fused experts, which no layer is named after, and how many they have.
        self.n_experts: dict[str, int] = {}
        for name, parameter in model.named_parameters():
            if parameter.dim() > 2:
                self.n_experts[_core(name.rpartition(".")[0])] = len(parameter)
        # Names and shapes of what the configuration selects, and of all other weights of the model.
        self.expected: dict[str, list[int]] = {}
        self.whole: dict[str, list[int]] = {}
        self.refused = ""
        try:
            parameters_of(model, adapter.config)  # which refuses experts that this PEFT misreads
            _check_start(adapter.config.get("init_lora_weights"))
            for pattern in ("rank_pattern", "alpha_pattern"):
                from_patterns(adapter.config.get(pattern), (), 0)  # which refuses what is no regular expression
            peft_model = self._adapted(rank_pattern={}, alpha_pattern={})  # which PEFT takes long for; see `_rank_of`
            state, weights = get_peft_model_state_dict(peft_model, save_embedding_layers=False), peft_model.state_dict()
        except _REFUSED as error:
            self.refused = in_one_line(error)
            return
        self.rank = peft_model.active_peft_config.r
        for key, tensor in state.items():
            self.expected[key] = [*tensor.shape]
        for key, tensor in (weights | state).items():
            if ".lora_" not in key:
                self.whole[key] = [*tensor.shape]

    def _adapted(self, **changes: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        # Other releases and trainers write fields that this PEFT does not have.
        fields = LoraConfig.__dataclass_fields__
        settings = {key: value for key, value in self.adapter.config.items() if key in fields}
        if settings.get("task_type") in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):  # which add nothing but generate()
            del settings["task_type"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = LoraConfig(**settings | {"init_lora_weights": True, "inference_mode": True} | changes)
            return get_peft_model(self.make(), config, low_cpu_mem_usage=True)

    def report(self, source: str, converts: bool) -> FitReport:
        """Compare each tensor of the file with what is expected under its name."""
        misfits, strangers = self._compared()
        notes = []
        misnamed = {key: new for key, (misfit, new) in strangers.items() if misfit.kind == "name"}
        new_names = self._new_names(misnamed)
        missing = []
        if new_names is not None:  # otherwise tensors may be there, under names that nobody can tell
            there = {*self.adapter.header, *misnamed.values()}
            lost = f"is not in {WEIGHTS_FILE}, and {CONFIG_FILE} selects its layer."
            for key in self.expected:
                if key not in there:
                    missing.append(Misfit("missing", key, lost))
        renames = {}
        if new_names and not missing and all(misfit.kind == "config" for misfit in misfits):
            renames = new_names
        if misnamed and converts and self._converts():
            notes.append(_converted_by_peft(misnamed))
            misfits += _misread_by_peft(misnamed, self.adapter.config)
        else:
            misfits += [misfit for misfit, _ in strangers.values()]
            misfits += missing
        return FitReport(source, self.name, len(self.adapter.header), tuple(misfits), renames, tuple(notes))

    def _compared(self) -> tuple[list[Misfit], dict[str, tuple[Misfit, str | None]]]:
        """List what is wrong with tensors whose names have a place, and describe those whose names have none.

        A description comes with the name under which the tensor would fit, None if there is no such name.
        """
        misfits: list[Misfit] = []
        if self.refused:
            misfits.append(Misfit("config", CONFIG_FILE, f"does not go with {self.name}: {self.refused}"))
        strangers: dict[str, tuple[Misfit, str | None]] = {}
        for key, (shape, dtype) in self.adapter.header.items():
            if _TENSOR.fullmatch(key) and dtype not in _FLOATS:
                misfits.append(Misfit("type", key, f"is {dtype}, and A and B are float32, float16 or bfloat16."))
            expected = self.expected.get(key, self.whole.get(key))
            if expected is not None:
                wrong = self._of_shape(key, shape, expected)
            else:
                stranger, new = self._stranger(key, shape)
                strangers[key] = stranger, new
                wrong = self._of_either_name(key, new, shape)
            if wrong is not None:
                misfits.append(wrong)
        return misfits, strangers

    def _new_names(self, misnamed: Mapping[str, str | None]) -> dict[str, str] | None:
        """Return the names under which tensors fit, if each has one of its own that is free; else None."""
        new_names = {key: new for key, new in misnamed.items() if new is not None}
        free = {*new_names.values()} - {*self.adapter.header}
        # Fewer: a tensor without a name, two with the same, or a name that is taken.
        return new_names if len(free) == len(misnamed) else None

    def _of_either_name(self, key: str, new: str | None, shape: Sequence[int]) -> Misfit | None:
        """Compare the shape of a misnamed tensor with the one expected; it fits if it does under one of its names.

        Patterns of ranks go by names, and may have been written for the old one or for the new one.
        """
        if new is None or new not in self.expected:
            return None
        under_old = self._of_shape(key, shape, self.expected[new])
        under_new = self._of_shape(new, shape, self.expected[new])
        return under_old if under_new is not None else None

    def _of_shape(self, key: str, shape: Sequence[int], expected: Sequence[int]) -> Misfit | None:
        """Compare the shape of a tensor with the one expected under its name."""
        match, experts = _TENSOR.fullmatch(key), 0
        if match is None:  # a weight that was trained whole
            layer, axis = key.rpartition(".")[0].removeprefix(PREFIX), None
        else:
            layer, axis = match["layer"].removeprefix(PREFIX), _RANK_AXIS.get(match["part"][-1])
            experts = self.n_experts.get(_core(layer.replace(".base_layer", "")), 0)
        wanted = self._shape_wanted(layer, axis, shape, expected, is_whole=match is None)
        if [*shape] == wanted:
            return None
        sizes = zip(shape, wanted, strict=False)  # with another number of axes, what both have is compared
        differing = [i for i, (there, size) in enumerate(sizes) if there != size]
        tokens = self._tokens_of(layer)
        if len(shape) == len(wanted) and axis is not None and differing == [axis]:
            return Misfit("rank", key, self._other_rank(shape[axis], wanted[axis], experts))
        if experts and wanted == [*self._other_shape(key)[::-1]]:
            exchanged = "A and B have each other's widths, as PEFT before 0.19.1 made them for experts."
            return Misfit("shape", key, f"{exchanged} Train it by a newer one.")
        if len(shape) == len(wanted) and len(differing) == 1 and wanted[differing[0]] == tokens:
            sizes_differ = f"is for {shape[differing[0]]} tokens, and the vocabulary of the base has {tokens}. Call"
            return Misfit("vocabulary", key, f"{sizes_differ} resize_token_embeddings() on the base, and save it.")
        return Misfit("shape", key, f"is {[*shape]}, and {wanted} fits {self.name}: a base of another size.")

    def _other_rank(self, there: int, wanted: int, experts: int) -> str:
        """Describe a tensor of another rank than the configuration says, or of other experts than the base has."""
        # PEFT puts the ranks of all experts behind each other: `wanted` is experts times the rank of one.
        if experts and not there * experts % wanted:
            return f"is of {there * experts // wanted} experts, and {self.name} has {experts}."
        return f"has {there} rows of rank, and {CONFIG_FILE} says {wanted}."

    def _tokens_of(self, layer: str) -> int | None:
        """Return the size of the vocabulary if the layer is an embedding; vision models have none."""
        if layer.removesuffix(".base_layer") not in self.base.embeddings:
            return None
        return getattr(self.base.config, "vocab_size", None)

    def _other_shape(self, key: str) -> Sequence[int]:
        """Return the shape of B for the name of A, and the other way round."""
        other = key.replace("lora_A", "lora_B") if "lora_A" in key else key.replace("lora_B", "lora_A")
        return self.adapter.header.get(other, ((), ""))[0]

    def _shape_wanted(
        self, layer: str, axis: int | None, shape: Sequence[int], expected: Sequence[int], is_whole: bool
    ) -> list[int]:
        """Return the shape that the configuration gives a tensor: with the layer's own rank, and as many labels."""
        wanted = [*expected]
        if axis is not None and len(shape) == len(wanted) > axis:  # a bias of B has none
            wanted[axis] = self._rank_of(layer, shape[axis], wanted[axis] // self.rank)
        if is_whole and shape and wanted[:1] == [self.n_labels]:
            self.labels = self.labels or shape[0]  # a head has as many as it was trained for, in each of its tensors
            wanted[0] = self.labels
        return wanted

    def _rank_of(self, layer: str, there: int, experts: int) -> int:
        """Return how many rows of rank a layer has by the configuration.

        Patterns name the parameters of experts, which the file does not: those there if one of them has so many.
        """
        module, config, names = layer.replace(".base_layer", ""), self.adapter.config, [layer]
        if layer not in self.base.widths and config.get("target_parameters"):
            # Sorted, `down_proj` stands before `gate_up_proj`, which PEFT nests one `.base_layer` deeper.
            names = sorted(f"{module}.{key.rpartition('.')[2]}" for key in config["target_parameters"])
        ranks = from_patterns(config.get("rank_pattern"), names, self.rank)
        counts = [int(experts * ranks[name]) for name in names]
        return there if there in counts else counts[layer.count(".base_layer") % len(counts)]

    def _converts(self) -> bool:
        """Return whether PEFT brings all names into the model's form when it loads the adapter."""
        from peft import set_peft_model_state_dict

        tensors = {key: torch.empty(shape, device="meta") for key, (shape, _) in self.adapter.header.items()}
        try:
            result: Any = set_peft_model_state_dict(self._adapted(), tensors, low_cpu_mem_usage=True)
        except _REFUSED:
            return False
        missing = [key for key in result.missing_keys if ".lora_" in key]  # weights of the base are not in the file
        return not result.unexpected_keys and not missing

    def _stranger(self, key: str, shape: Sequence[int]) -> tuple[Misfit, str | None]:
        """Describe a tensor whose name has no place, and find the name under which it fits."""
        match = _TENSOR.fullmatch(key)
        if match is None:
            return self._stranger_beside_lora(key, shape)
        core, end = _core(match["layer"]), match["part"]
        if end in ("lora_A", "lora_B"):  # of an embedding they are parameters themselves
            end += ".weight"
        fitting = [name for name in self._by_core.get(core, ()) if self._takes(name, end, shape)]
        new = f"{PREFIX}{fitting[0]}.{end}" if len(fitting) == 1 else None
        # Of experts PEFT's names are no layer's, so that only their module tells that they are there.
        if new == key or (new is None and core.replace(".base_layer", "") in self.n_experts):
            problem = f"its layer is there, and {CONFIG_FILE} does not select it (target_modules and the like)."
            return Misfit("config", key, problem), None
        if _expert_in(key) >= 0 and self.n_experts:
            problem = f"is of one expert, and the base has its experts fused{self._other_experts()}"
            return Misfit("name", key, problem), new
        nearest = new or self._nearest_layer(core)
        return Misfit("name", key, f"{self.name} has no layer of this name. Nearest: {nearest}."), new

    def _other_experts(self) -> str:
        """End the sentence on an adapter whose experts are single: what to do, or how many it has and the base has."""
        # The experts that the file names are counted from 0.
        there, here = 1 + max(map(_expert_in, self.adapter.header)), max(self.n_experts.values())
        if here == there:
            return ". Load it with PEFT and save it again."
        return f": {here}, and the adapter has {there}."

    def _stranger_beside_lora(self, key: str, shape: Sequence[int]) -> tuple[Misfit, str | None]:
        """Describe a tensor that is no part of A or B, as of a module that was trained whole."""
        same = []
        for name, expected in self.whole.items():
            if expected == [*shape] and _core(name) == _core(key):
                same.append(name)
        new = same[0] if len(same) == 1 else None
        return Misfit("name", key, f"{self.name} with this adapter has no tensor of this name."), new

    def _nearest_layer(self, core: str) -> str:
        """Name the layer whose name is most like one without wrappers; "-" if there is none."""
        names = [*chain.from_iterable(self._by_core.values())]
        alike = [name for name in names if name.endswith(core[core.rfind(".") :])] or names
        near = difflib.get_close_matches(core, alike[:2000], 1, 0.0)  # with the cutoff 0.0 any name is near
        return near[0] if near else "-"

    @cached_property
    def _by_core(self) -> dict[str, list[str]]:
        """The names of all layers, by what is left of them without wrappers."""
        names = dict.fromkeys(self.base.widths)  # a set that keeps its order
        for key in self.expected:
            if match := _TENSOR.fullmatch(key):
                names[match["layer"].removeprefix(PREFIX)] = None
        by_core = defaultdict(list)
        for name in names:
            by_core[_core(name)].append(name)
        return by_core

    def _takes(self, layer: str, end: str, shape: Sequence[int]) -> bool:
        """Return whether a layer has the widths of a tensor, whatever its rank."""
        expected = self.expected.get(f"{PREFIX}{layer}.{end}")
        if expected is None:
            d_in, d_out = self.base.widths.get(layer, (0, 0))
        else:
            d_in, d_out = expected[-1], expected[0]
        if "_A" in end:  # [r, d_in]; B is [d_out, r], and a magnitude [d_out]
            return shape[-1] == d_in
        return shape[0] == d_out


def _check_start(name: Any) -> None:
    """Refuse the name of a start that this PEFT does not know, as PEFT does where it loads the adapter."""
    from peft import LoraConfig, get_peft_model

    if not isinstance(name, str):
        return
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            config = LoraConfig(r=1, init_lora_weights=name, target_modules=["0"])  # type: ignore[arg-type]
            get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), config)
        except _REFUSED as error:
            if f"={name!r}" in str(error):  # other errors are of data or settings that this small model lacks
                raise


def _converted_by_peft(misnamed: Mapping[str, str | None]) -> str:
    """Note that PEFT converts names when it loads them, and how engines get them."""
    if any(_expert_in(key) >= 0 for key in misnamed):  # which no renaming puts together
        how = "for `lora-init export` load and save it by PEFT."
    else:
        how = "for engines `lora-init export --rename` does."
    return f"PEFT brings its names into the model's form; {how}"


def _misread_by_peft(misnamed: Iterable[str], config: Mapping[str, Any]) -> Iterator[Misfit]:
    """Describe a scaling that PEFT does not keep where it makes one parameter of the experts' own adapters."""
    experts = [key.partition(".lora_")[0] for key in misnamed if _expert_in(key) >= 0]
    alphas = from_patterns(config.get("alpha_pattern"), experts, None)
    # Down projections keep a lora_alpha of their own, if all have one. Gate and up projections keep none: they become
    # one parameter, of twice the rank.
    down = {name for name in experts if name.endswith(("w2", "down_proj"))}
    own = len({alphas[name] for name in down}) > 1 or any(alphas[name] for name in {*experts} - down)
    if own or (experts and config.get("use_rslora")):
        which = "an alpha_pattern of experts" if own else "use_rslora"
        problem = f"has {which}, and PEFT brings adapters of single experts into the model's form with another scaling."
        yield Misfit("config", CONFIG_FILE, f"{problem} Merge it with the release that trained it.")


def _expert_in(key: str) -> int:
    """Return which expert a tensor is of by its name; -1 if of none."""
    match = re.search(r"\bexperts\.(\d+)\.", key)
    return int(match[1]) if match else -1


def _core(layer: str) -> str:
    """Take off the beginning of a layer's name, which does not distinguish layers.

    One rule for a prefix of PEFT, a wrapper more or less, and a compiled model.
    """
    return ".".join(dropwhile(_WRAPPERS.__contains__, plain_name(layer).split(".")))


def _of_own_class(fit: _Fit, make: Any, engine: str | None) -> Iterator[str]:
    """Note what the class of the checkpoint would not apply, where the adapter names another one."""
    if engine is None and not fit.adapter.config.get("task_type"):
        own = _Fit(fit.adapter, make)
        if lost := len(own.report("", converts=True).misfits):
            yield f"{fit.name} is what the adapter names. A {own.name}, as the checkpoint is, loses {lost} of it."


def _of_another_base(fit: _Fit, source: str, config: Any, build: Any) -> Iterator[Misfit | str]:
    """Compare the base with the one that the adapter was made for: by its record, or else by the base that it names."""
    import transformers

    adapter, revision = fit.adapter, str(fit.adapter.config.get("revision"))
    folder, tensors = checkpoint_of(source, revision)
    here = "" if folder is None else folder.absolute().name  # the hub's cache names a snapshot by its commit
    if _COMMIT.fullmatch(revision) and _COMMIT.fullmatch(here) and here != revision:
        yield Misfit("revision", CONFIG_FILE, f"names revision {revision}, and this is {here}.")
    record, mapping = adapter.origin.get("provenance") or {}, adapter.config.get("auto_mapping") or {}
    recorded = str(record.get("model_class") or mapping.get("base_model_class"))
    if is_for(recorded, config) is False:  # None is a class that transformers does not have: nothing is known
        yield Misfit("base", CONFIG_FILE, f"says that it is for a {recorded}, and this is a {_architecture(config)}.")
        return
    model = on_meta(getattr(transformers, recorded, None), config)
    # Loaded quantized, the base of the record had other weights than its files.
    if model is not None and record and not record.get("quantisation"):
        misfits = _of_recorded_base(adapter, record, model, tensors)
        # The same weights with another rope_theta or rms_norm_eps give other inputs to every layer.
        if not misfits and (odd := differing_config(record.get("settings"), model_config(model))):
            yield _OTHERWISE.format(odd)
        if misfits is not None:
            yield from misfits
            return
    yield from _of_named_base(adapter, source, config, tensors, build)


def _of_recorded_base(
    adapter: AdapterDirectory, record: Mapping[str, Any], model: Any, tensors: Mapping[str, Stored]
) -> list[Misfit] | None:
    """Compare size and fingerprint of the base with the record; None where that cannot decide."""
    known, here = record.get("n_parameters"), count_parameters(model)
    # What is trained whole, as a head of other classes is, has its own size.
    whole = adapter.config.get("modules_to_save") or adapter.config.get("task_type") in _CLASSIFIES
    if known and known != here and not whole:
        return [Misfit("base", CONFIG_FILE, f"says that the base has {known} parameters, and this one has {here}.")]
    if known != here:
        return None
    fingerprint_here = _fingerprint(model, tensors)
    if not fingerprint_here:
        return None
    if record.get("fingerprint") not in (None, fingerprint_here):
        return [Misfit("base", str(adapter.path), f"is for a base of the same form {_OTHER_WEIGHTS}.")]
    return []


def _of_named_base(
    adapter: AdapterDirectory, source: str, config: Any, tensors: Mapping[str, Stored], build: Any
) -> Iterator[Misfit | str]:
    """Compare the base with the one that the adapter names, if that is here; of classifiers without their heads."""
    named = adapter.base
    if not named:
        yield "The adapter names no base: only names and shapes were compared, which other models may have, too."
        return
    if is_same_place(named, source):
        return
    theirs: Mapping[str, Stored] = {}
    with suppress(LoraInitError):  # that base is damaged or not here: below, it cannot be compared
        folder, theirs = checkpoint_of(named, adapter.config.get("revision"))
        other = config if folder is None else read_config(str(folder), build.keywords["trust_remote_code"])
        if type(other) is not type(config):
            is_a = f"is a {_architecture(other)}, and this is a {_architecture(config)}"
            yield Misfit("base", CONFIG_FILE, f"names {named!r}, which {is_a}.")
            return
    if not theirs or not tensors:
        yield f"The adapter names {named!r} as its base, with which {source!r} could not be compared."
        return
    # The heads of classifiers are the adapter's own: the models below them are compared.
    body = {"task_type": "FEATURE_EXTRACTION"} if adapter.config.get("task_type") in _CLASSIFIES else {}
    named_model, model = build(body, source, config=other), build(body, source)
    odd = differing_config(model_config(named_model), model_config(model))
    named_fingerprint, fingerprint_here = _fingerprint(named_model, theirs), _fingerprint(model, tensors)
    if named_fingerprint != fingerprint_here:
        other_form = odd and not (named_fingerprint and fingerprint_here)  # such as biases that one of them lacks
        is_a = f"this base with {odd}" if other_form else f"a base of the same form {_OTHER_WEIGHTS}"
        yield Misfit("base", CONFIG_FILE, f"names {named!r}, which is {is_a}.")
    elif odd:
        yield _OTHERWISE.format(odd)
    elif not fingerprint_here:  # the files name their tensors otherwise than the model, as those of each expert alone
        yield f"The weights of {source!r} were not compared with {named!r}: only names and shapes were."


def _architecture(config: Any) -> str:
    return str((config.architectures or [config.model_type])[0])


def _fingerprint(model: Any, tensors: Mapping[str, Stored]) -> str:
    """Compute the fingerprint of a checkpoint, in which 16 numbers of a tensor are read; empty in another form."""
    prefix, state = f"{getattr(model, 'base_model_prefix', '')}.", {}
    for name, parameter in model.named_parameters():
        # A checkpoint may be of the class with a head or of the one without, whose names lack the prefix.
        stored = tensors.get(name) or tensors.get(prefix + name) or tensors.get(name.removeprefix(prefix))
        if stored is None or stored.shape != tuple(parameter.shape):
            return ""
        state[name] = stored.read()  # which maps the file into memory
    # `assign`, since nothing can be copied to the meta device; not strict, since buffers stay there.
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return fingerprint(model)
