"""An adapter before training: on a model, in a directory, or as a LoraConfig."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_init.adapters.directory import (
    LORA_A,
    LORA_B,
    ORIGIN_FILE,
    AdapterDirectory,
    card_header,
    carrying,
    hub_id,
    start_digest,
    write_start,
)
from lora_init.adapters.learning_rate import TRAINING, LearningRate, Response, one_epoch, training_in_words
from lora_init.adapters.peft_model import (
    as_it_was,
    attach,
    check_fits,
    check_plain,
    fill_in_place,
    is_filled,
    remove_adapters,
)
from lora_init.adapters.starts import Start, find_start
from lora_init.adapters.weights import LoraWeights, Weights
from lora_init.errors import LoraInitError
from lora_init.layers.identity import fingerprint
from lora_init.layers.targets import HEADS, PREFIX, Target, file_prefixes, is_conv1d
from lora_init.layers.wrappers import unwrapped
from lora_init.planning.heat_map import heat_map_figure
from lora_init.planning.lora_config import exact_pattern, listed_or_pattern, lora_config, scaling_of
from lora_init.statistics.statistics import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from peft import LoraConfig, PeftModel

_FREEZE = """# A is meant to stay as it is. PEFT has no setting for that, so say it before the trainer is made:
for name, parameter in model.named_parameters():
    parameter.requires_grad &= ".lora_A." not in name
"""
_HEAD = """from transformers import AutoModelForSequenceClassification

# The adapter holds the head, whose outputs are these classes. Llama and its like also need a pad_token_id.
labels = {labels}
base_model = AutoModelForSequenceClassification.from_pretrained({base!r}, id2label=labels)
"""
_QUANTIZED = """from transformers import {model_class}

# The adapter was made for the base quantized like this; whatever trains or serves it must quantize it the same way.
quantization = {how}
base_model = {model_class}.from_pretrained({base!r}, quantization_config=quantization)
"""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AdapterInit:
    """Everything about an adapter before its first step of training. Made by `build_adapter`.

    Attributes:
        weights: For each layer that takes an adapter, in model order, A float32 [r, d_in] and B float32 [d_out, r];
            of a convolution and of experts in the shapes of `Target.shapes`. B is zero, but for the methods that take
            a step.
        targets: Kind and widths of those layers.
        unsupported: Targeted layers that keep PEFT's own initialization, name to kind. They get rank `rank`.
        rank: `r` of the config: the rank of layers that `rank_pattern` doesn't name, and the base of the scaling.
        lora_alpha: Numerator of the scaling.
        use_rslora: Whether the scaling is lora_alpha / sqrt(rank) instead of lora_alpha / rank.
        use_dora: Whether PEFT adds DoRA's magnitude vectors.
        lora_dropout: Dropout on what A reads, in training.
        method: As given to `build_adapter`.
        whiten: Whether A's rows were divided by `initializers.whitening_scale`.
        unit_rows: Whether the rows of A have the length that the method gives them, one for `"eva"`.
        seed: Seed of the random numbers.
        left_out: Layers without an adapter: of rank 0, without a direction in the data, or trained whole.
        explained: For each layer, the share of the variance of its input that its first r components capture; empty if
            it is not known.
        provenance: Where the statistics come from.
        modules_to_save: As in PEFT: endings of the names of modules that are trained whole.
        gamma: What B A was divided by, where B is not zero.
        freeze_a: Whether A stays as it is in training.
        learning_rate: What to train it with, where a comparison found that; None for what `rate` says.
        responses: For each layer, how far its output moves at a learning rate, see `rate`; empty if not known.
        steps: How many steps it is going to be trained for; None for an epoch of the data.
        losses: Where `changes_output` and it was measured: the loss of the plain model, and that with this adapter.
        errors: Where the base is quantized and the adapter corrects that: for each layer |(W - Q) S^1/2| before and
            after, with S the second moment of its input. Squared it is E |(W - Q) x|^2.
        error_size: There, |W - Q| in Frobenius norm, of all layers at once.
        dtype: Type of A and B in a directory: what a budget in megabytes counts, else float32.
        exact_loss: Of the model whose layers have the weights that they had before they were quantized, with `losses`.
    """

    weights: Weights
    targets: Mapping[str, Target]
    unsupported: Mapping[str, str] = field(default_factory=dict)
    rank: int
    lora_alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: float = 0.0
    method: str
    whiten: bool = False
    unit_rows: bool = False
    seed: int = 0
    left_out: tuple[str, ...] = ()
    explained: Mapping[str, float] = field(default_factory=dict)
    provenance: Provenance
    modules_to_save: tuple[str, ...] = ()
    gamma: float | None = None
    freeze_a: bool = False
    learning_rate: float | None = None
    responses: Mapping[str, Response] = field(default_factory=dict)
    steps: int | None = None
    losses: tuple[float, float] | None = None
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    error_size: float = 0.0
    exact_loss: float | None = None
    dtype: str = "float32"

    @property
    def share_closed(self) -> float | None:
        """Share of what quantization costs, in the loss, that the adapter gives back; None if it was not measured."""
        if self.losses is None or self.exact_loss is None or self.losses[0] <= self.exact_loss:
            return None
        return (self.losses[0] - self.losses[1]) / (self.losses[0] - self.exact_loss)

    @property
    def correction(self) -> dict[str, Any]:
        """What quantization cost and what the adapter gives back, in plain values: losses, their share, errors."""
        before, after = self.losses or (None, None)
        return {
            "losses": {"float": self.exact_loss, "quantised": before, "corrected": after},
            "share_closed": self.share_closed,
            "errors": {name: list(pair) for name, pair in self.errors.items()},
        }

    def __repr__(self) -> str:
        ranks = self.ranks.values()
        return (
            f"AdapterInit({self.method}: {len(ranks)} layers of rank {min(ranks)} to {max(ranks)}, r={self.rank}, "
            f"scaling {self.scaling:.4g}, {self.n_parameters():,} trainable parameters)"
        )

    def _repr_html_(self) -> str:
        table = self.to_pandas().to_html(max_rows=20, float_format="{:.3f}".format, border=0)
        return f"<p>{self!r}</p>{table}"

    def to_pandas(self) -> pd.DataFrame:
        """Make a table with a row for each layer: kind, widths, rank, trainable parameters, explained variance."""
        import pandas as pd

        table = pd.DataFrame([vars(self.targets[name]) for name in self.weights])
        table = table[["name", "kind", "in_features", "out_features"]].set_index("name").rename_axis("layer")
        table["rank"] = list(self.ranks.values())
        table["parameters"] = list(self._parameters())
        table["explained_variance"] = [self.explained.get(name) for name in self.weights]
        return table

    def plot(self) -> Figure:
        """Draw the ranks as a heat map, blocks from top to bottom, and return the matplotlib figure."""
        return heat_map_figure(self.ranks)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each layer that takes an adapter, in model order."""
        return {name: len(own.a) // max(self.targets[name].experts, 1) for name, own in self.weights.items()}

    @property
    def start(self) -> Start:
        """What is known of the method."""
        return find_start(self.method)

    @property
    def scaling(self) -> float:
        """What B A x is multiplied by, the same in every layer whatever its rank."""
        return scaling_of(self.lora_alpha, self.rank, self.use_rslora)

    @property
    def corrects_base(self) -> bool:
        """Whether the base weights have to give up what B A adds, so that the output stays as it was."""
        return self.start.corrects_base

    @property
    def changes_output(self) -> bool:
        """Whether the model's output is another one with this adapter, before any training."""
        return self.start.changes_output

    @cached_property
    def rate(self) -> LearningRate | None:
        """The learning rate that the pass over the data tells; None if it did not measure sizes, and with DoRA."""
        if not self.responses or self.use_dora:
            return None
        steps, why = one_epoch(self.provenance.settings)
        left_out = [name for name in (*self.weights, *self.unsupported) if name not in self.responses]
        return LearningRate(
            self.responses, self.steps or steps, self.provenance.task_type in HEADS, left_out, "" if self.steps else why
        )

    @property
    def recommended(self) -> dict[str, Any] | None:
        """Learning rate, warm-up, schedule and optimizer to train with; None if no rate is known."""
        if self.learning_rate is not None:
            return {"learning_rate": self.learning_rate, **TRAINING}
        return None if self.rate is None else self.rate.training

    @property
    def how_to_train(self) -> str:
        """What to train it with, in words."""
        return training_in_words(self.rate, self.learning_rate, self.use_dora)

    def n_parameters(self) -> int:
        """Count the trainable parameters: all A and B, or all B if A is frozen, and DoRA's magnitudes."""
        return sum(self._parameters())

    def _parameters(self) -> Iterator[int]:
        for name, rank in self.ranks.items():
            yield self.targets[name].parameters(rank, self.freeze_a, self.use_dora)

    def to_peft_config(self, model: nn.Module | None = None) -> LoraConfig:
        """Describe the adapter as a plain LoRA config: ranks and scalings, no weights, no init-specific keys.

        `rank_pattern` and `alpha_pattern` have a key for each rank, a regular expression of the full names of its
        layers. Given to `get_peft_model`, it makes an adapter of the same shape with PEFT's random A. PEFT has no
        setting for a frozen A. `model` is as for `save_pretrained`.
        """
        from peft import LoraConfig

        return LoraConfig(**self._config(model))

    def apply(self, model: nn.Module, adapter_name: str = "default", correct_base: bool = True) -> PeftModel:
        """Put the adapter on the model and return a PeftModel, ready for Trainer.

        The model is wrapped in place, as `get_peft_model` does; its output doesn't change, unless `changes_output`.
        With `corrects_base` the base weights change, and to the plain base belongs what
        `save_pretrained(directory, path_initial_model_for_weight_conversion=initial)` of the PeftModel writes, with
        `initial` a directory that this object has saved: an ordinary adapter of twice the rank. A compiled model comes
        back as a PeftModel that is not, to compile anew. A and B are float32 also on a half-precision or quantized
        model, and A is frozen if it should be. If anything fails, the model is as it was.

        A model that has fresh LoRA layers from `add_adapter` of transformers or diffusers is filled and returned: A and
        B are copied into the layers that are there, of one rank, so that an optimizer may hold them already.

        Args:
            model: The model the statistics come from, or one with layers of the same names and widths (quantized, say).
            adapter_name: PEFT's name for the adapter; one from `add_adapter` has its own.
            correct_base: With `corrects_base`: False leaves the base weights alone and takes the adapter's own start
                off in the forward pass, by a hook on each layer, at the cost of a second adapter. Merging does not
                know of it: convert.

        Raises:
            LoraInitError: The model already has an adapter that is a PeftModel's, is in use, or has other layers,
                ranks or scaling; or a layer of the plan is missing or has other widths, or is quantized and should
                change, or the base weights should and the adapter is from `add_adapter`.
        """
        adapted: Any = unwrapped(model) if isinstance(model, nn.Module) else model
        if is_filled(adapted):
            fill_in_place(adapted, self)
        else:
            check_plain(model, "apply()")
            model = adapted
            check_fits(model, self, adapter_name)
            if self.corrects_base and correct_base:
                check_correctable(model, self.targets)
            adapted = attach(model, self, adapter_name)
        if self.corrects_base and correct_base:
            correct_weights(model, self.weights, self.scaling)
        elif self.corrects_base:
            correct_outputs(model, self.weights, self.scaling)
        if self.freeze_a:
            freeze_a(adapted)
        result: PeftModel = adapted
        return result

    def save_pretrained(self, directory: str | Path, overwrite: bool = False, model: nn.Module | None = None) -> Path:
        """Write a standard PEFT adapter directory.

        `PeftModel.from_pretrained(base, directory, is_trainable=True)` reads it. It holds adapter_model.safetensors,
        adapter_config.json, a short README.md, and lora_init.json, which says where the statistics come from; no other
        tool reads it. The directory appears under its name complete or not at all.

        Args:
            directory: Where to. An empty directory is used as it is.
            overwrite: Replace a directory that this wrote. One that PEFT wrote, or that holds more, is never replaced.
            model: The model, plain or as `apply` left it; it is not changed. Needed only if modules are trained whole,
                as a head is for some of PEFT's task types (`SEQ_CLS`, `TOKEN_CLS`, `QUESTION_ANS`): their weights
                belong in the file. With `use_dora=True` it adds the magnitude vectors, and PEFT's own start of layers
                in `unsupported`; without it PEFT makes both while loading, correctly, but warns of missing keys. A list
                of `target_modules` is checked against the model's other modules; without it short names become a
                pattern.

        Returns:
            The directory as an absolute path.

        Raises:
            LoraInitError: The directory exists or cannot be written, or weights of the model are needed and no model
                was given.
        """
        model = None if model is None else unwrapped(model)
        config = self._config(model) | {"inference_mode": True}
        kind = getattr(torch, self.dtype)
        tensors = {
            name: tensor.to(kind) if name.endswith((LORA_A, LORA_B)) else tensor
            for name, tensor in self._tensors(model).items()
        }
        return write_start(
            directory, tensors, config, self._origin(), self._card(Path(directory).resolve().name), overwrite
        )

    def start_in_words(self) -> str:
        """Return what the adapter does to the model before it is trained, and what of it is trained."""
        frozen = "; A stays as it is in training, see README.md" if self.freeze_a else ""
        if self.corrects_base:
            return (
                "B is not zero: the base weights must give up what the adapter adds, and what was trained is converted "
                f"while it is saved (path_initial_model_for_weight_conversion){frozen}"
            )
        if self.start.by_error:
            share = self.share_closed
            closed = "" if share is None else f", {share:.0%} of the way to the loss before it was quantized"
            measured = "" if self.losses is None else f" (loss {self.losses[0]:.4g} -> {self.losses[1]:.4g}{closed})"
            return f"B A gives the quantized base back what rounding took from its weights{measured}{frozen}"
        if self.changes_output:
            words = "B is not zero, and the model's output is another one"
            measured = "" if self.losses is None else ", loss {:.4g} -> {:.4g} before any training".format(*self.losses)
            size = "" if self.gamma is None else f" (gamma {self.gamma:g}{measured})"
            return f"{words}{size}{frozen}"
        return f"B is zero, so the adapter changes nothing until it is trained{frozen}"

    def _config(self, model: nn.Module | None = None) -> dict[str, Any]:
        parameters = [name for name in self.weights if self.targets[name].experts]
        parameters += [name for name, kind in self.unsupported.items() if kind == "Parameter"]
        names = [name for name in (*self.weights, *self.unsupported) if name not in parameters]
        others = self.left_out if model is None else {name for name, _ in model.named_modules()} - set(names)
        # Without the model, short names are not trusted: in a hand-made nn.Sequential they often end another module's
        # name. The full name of a transformer's layer starts at its root and doesn't. A heuristic.
        listed = model is not None or all(name.count(".") >= 2 for name in names)
        return lora_config(
            self.ranks,
            self.rank,
            self.scaling,
            listed_or_pattern(names, others) if listed else exact_pattern(names),
            self.use_rslora,
            use_dora=self.use_dora,
            lora_dropout=self.lora_dropout,
            task_type=self.provenance.task_type,
            base_model_name_or_path=self.provenance.model_id,
            target_parameters=parameters,
            fan_in_fan_out=any(target.kind == "Conv1D" for target in self.targets.values()),
            modules_to_save=list(self.modules_to_save),
            **carrying(self._origin(short=True), self.provenance.task_type),
        )

    def _tensors(self, model: nn.Module | None) -> dict[str, Tensor]:
        """Return all tensors of the adapter's file: A and B, and by PEFT what else it keeps there."""
        heads = HEADS.get(self.provenance.task_type or "", ())
        whole = [*([f"the head ({' or '.join(heads)})"] if heads else []), *self.modules_to_save]
        if whole and model is None:
            raise LoraInitError(
                f"task_type={self.provenance.task_type!r}, modules_to_save={list(self.modules_to_save)}: PEFT trains "
                f"{', '.join(whole)} whole and expects its weights in the directory. Pass model=, or save the "
                "PeftModel that apply() returns."
            )
        if model is None or not (whole or self.use_dora or self.unsupported):
            tensors = {}
            for name, prefix in file_prefixes(self.targets.values()).items():
                tensors[prefix + LORA_A], tensors[prefix + LORA_B] = (w.contiguous() for w in self.weights[name])
            return tensors
        from peft.utils import get_peft_model_state_dict

        with as_it_was(model):
            remove_adapters(model)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                check_fits(model, self, "default")
                state = get_peft_model_state_dict(attach(model, self, "default"), save_embedding_layers=False)
            return {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}

    def _origin(self, short: bool = False) -> dict[str, Any]:
        """Lay out as plain values where the adapter comes from; in short without what each layer would add."""
        provenance = asdict(self.provenance)
        # PEFT doubles the rank when it converts a start that changed the base.
        origin = {
            name: getattr(self, name) for name in ("method", "whiten", "unit_rows", "seed", "gamma", "freeze_a", "rank")
        }
        origin["recommended"] = self.recommended
        if self.learning_rate is not None:
            origin["learning_rate"] = self.learning_rate
        if self.rate and not short:
            origin["rate"] = self.rate.stored()
        if self.corrects_base or self.start.by_error:
            kind = getattr(torch, self.dtype)
            origin["start"] = start_digest({name: own.to(kind) for name, own in self.weights.items()})
        if self.errors:
            origin["error_size"] = self.error_size
        if self.start.package:  # which need not be installed where the adapter is trained or exported
            origin |= {"package": self.start.package, "corrects_base": self.corrects_base}
        if short:
            kept = {key: value for key, value in provenance.items() if key not in ("notes", "seconds", "versions")}
            return origin | {"provenance": kept}
        return origin | {
            "left_out": list(self.left_out),
            "unsupported": dict(self.unsupported),
            "explained": {name: round(share, 4) for name, share in self.explained.items()},
            **({"correction": self.correction} if self.errors else {}),
            "provenance": provenance,
        }

    def _card(self, directory: str) -> str:
        origin, ranks = self.provenance, self.ranks.values()
        base_model = origin.model_id or "BASE_MODEL"
        classes = [str(name) for name in origin.settings.get("classes", ())]
        base = hub_id(origin.model_id) or origin.model_class
        corrected = "import lora_init\n\nlora_init.correct_base(base_model, directory)\n" if self.corrects_base else ""
        head = _HEAD.format(base=base_model, labels=dict(enumerate(classes))) if classes else ""
        if origin.quantisation is not None and not head:
            head = _QUANTIZED.format(model_class=origin.model_class, base=base_model, how=origin.quantisation)
        return f"""{card_header(origin.model_id, origin.task_type)}
# A LoRA adapter before training

Made by lora_init for {base}: method `{self.method}`, {len(ranks)} layers, rank {min(ranks)} to \
{max(ranks)} (average {statistics.fmean(ranks):.3g}), {self.n_parameters():,} trainable parameters. \
{self.start_in_words()}:

```python
from peft import PeftModel
{head}
directory = {directory!r}  # where this file is
{corrected}model = PeftModel.from_pretrained(base_model, directory, is_trainable=True)
{_FREEZE if self.freeze_a else ""}```

{self.how_to_train}
"""


def freeze_a(adapted: nn.Module) -> None:
    """Keep every A as it is in training, for which PEFT has no setting."""
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad &= ".lora_A." not in name


def check_correctable(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse layers that are not there, quantized or tied: their weights cannot give up what an adapter adds."""
    modules = dict(model.named_modules())
    owners = Counter(id(weight) for module in modules.values() for weight in module.parameters(recurse=False))
    for name in names:
        if name not in modules:
            raise LoraInitError(f"{type(model).__name__} has no layer {name!r}. Give the base of this adapter.")
        weight = modules[name].weight
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise LoraInitError(
                f"layer {name!r} is quantized, so that its weight cannot give up what B A adds. "
                "Load the model in float, or pass correct_base=False to apply()."
            )
        if owners[id(weight)] > 1:
            raise LoraInitError(
                f"layer {name!r} shares its weight with another module, as tied embeddings do, which must not give up "
                "what B A adds. Leave it out of the targets, or pass correct_base=False to apply()."
            )


@torch.no_grad()
def correct_weights(model: nn.Module, weights: Weights, scaling: float) -> None:
    """Take scaling * B A off the base weights, in place, also where PEFT has wrapped the layers already."""
    for name, (a, b) in weights.items():
        layer: Any = model.get_submodule(name)
        plain = getattr(layer, "base_layer", layer)
        added = scaling * (b @ a).to(plain.weight.device)
        plain.weight.copy_(plain.weight.float() - (added.T if is_conv1d(plain) else added))


def correct_outputs(model: nn.Module, weights: Weights, scaling: float) -> None:
    """Take scaling * B A x off the output of each layer by a hook, and leave the base weights alone."""
    for name, (a, b) in weights.items():
        layer: Any = model.get_submodule(name)
        device = next(layer.parameters()).device
        layer.register_forward_hook(partial(_subtract, a.to(device, copy=True), b.to(device) * scaling))


def _subtract(a: Tensor, b: Tensor, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return output - ((args[0].to(a.dtype) @ a.T) @ b.T).to(output.dtype)


def correct_base(model: nn.Module, directory: str | Path) -> None:
    """Make the base weights ready for an adapter directory of a start that needs that, such as `lora-ga`.

    Takes off in place what the adapter adds before its training; then `PeftModel.from_pretrained(model, directory,
    is_trainable=True)` leaves the output as it was. Once trained,
    `save_pretrained(other, path_initial_model_for_weight_conversion=directory)` of the PeftModel writes an ordinary
    adapter of twice the rank, for the plain base.

    Args:
        model: The plain model.
        directory: From `AdapterInit.save_pretrained` or `lora-init init`.

    Raises:
        LoraInitError: Not an adapter directory, a trained one, one of another model, or quantized weights.
    """
    check_plain(model, "correct_base()")
    model, files = unwrapped(model), AdapterDirectory(directory)
    if not files.is_start:
        raise LoraInitError(
            f"{files.path} has no {ORIGIN_FILE} of its weights, so it is no adapter before training. Name what "
            "`lora-init init` wrote."
        )
    made_for = files.origin.get("provenance", {}).get("fingerprint")
    if made_for and made_for != fingerprint(model):
        raise LoraInitError(
            f"{files.path} was made for another model than this {type(model).__name__}, or its weights have been "
            "corrected already. Load the base model anew, in float32 or bfloat16."
        )
    check_correctable(model, files.layers)
    tensors, config = files.tensors(), files.config
    ends = {name: f"{PREFIX}{name}" for name in files.layers}
    weights = {name: LoraWeights(tensors[end + LORA_A], tensors[end + LORA_B]) for name, end in ends.items()}
    scaling = scaling_of(config["lora_alpha"], config["r"], bool(config.get("use_rslora")))
    correct_weights(model, weights, scaling)
