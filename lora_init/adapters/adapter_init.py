"""An adapter before training: on a model, in a directory, or as a LoraConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_init.adapters.base_weights import check_correctable, correct_outputs, correct_weights
from lora_init.adapters.card import card_of, origin_of
from lora_init.adapters.directory import LORA_A, LORA_B, carrying, write_start
from lora_init.adapters.init_config import Shape
from lora_init.adapters.peft_model import (
    as_it_was,
    attach,
    check_fits,
    check_plain,
    fill_in_place,
    freeze_a,
    is_filled,
    remove_adapters,
)
from lora_init.errors import LoraInitError, check_switches
from lora_init.layers.grid import layers_in
from lora_init.layers.targets import HEADS, Target, file_prefixes, trains_new_head
from lora_init.layers.wrappers import unwrapped
from lora_init.on_demand import on_demand
from lora_init.planning.lora_config import exact_pattern, listed_or_pattern, lora_config, scaling_of
from lora_init.rates.learning_rate import TRAINING, LearningRate, Response, share_of, training_in_words
from lora_init.rates.training_length import TrainingLength
from lora_init.starts.starts import Start
from lora_init.starts.weights import Weights
from lora_init.statistics.statistics import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from peft import LoraConfig, PeftModel


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AdapterInit(Shape):
    """An adapter before its first step of training. `build_adapter` makes it; it has the fields of `Shape`.

    Attributes:
        weights: For each layer that takes an adapter, in model order, A float32 [r, d_in] and B float32 [d_out, r];
            of a convolution and of experts in the shapes of `Target.shapes`. B is zero, but for the methods that take
            a step.
        targets: Kind and widths of those layers.
        unsupported: Targeted layers that keep PEFT's own initialization, name to kind. They get rank `rank`.
        rank: `r` of the config: the rank of layers that `rank_pattern` doesn't name, and the base of the scaling.
        lora_alpha: Numerator of the scaling.
        gamma: The number that B A was divided by, where B is not zero.
        start: The method's entry in the registry of starts.
        seed: Seed of the random numbers.
        left_out: Layers without an adapter: of rank 0, without a direction in the data, or trained whole.
        explained: For each layer, the share of the variance of its input that its first r components capture; empty if
            it is not known.
        provenance: Where the statistics come from.
        learning_rate: The learning rate that a comparison found for the adapter; None for the one of `rate`.
        responses: For each layer, how far its output moves at a learning rate, see `rate`; empty if not known.
        length: Length of the planned training; None for an epoch of the data.
        losses: The loss of the plain model and the loss with this adapter, if `changes_output` and both were measured.
        errors: If the adapter corrects a quantized base: for each layer |(W - Q) S^1/2| before and after, with S the
            second moment of its input. The square is E |(W - Q) x|^2.
        error_size: If the adapter corrects a quantized base: |W - Q| in Frobenius norm, of all layers at once.
        dtype: Type in which A and B are saved: the one that a budget in megabytes counts, else float32.
        trains_head: Whether a head that begins at random is trained beside the adapter, which decides on `rate`; None
            if that follows from the task type and `modules_to_save`.
        exact_loss: Loss of the model with the weights from before quantization, measured together with `losses`.
    """

    # `Shape` compares its own fields, and two adapters of one form are two.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    weights: Weights
    targets: Mapping[str, Target]
    unsupported: Mapping[str, str] = field(default_factory=dict)
    rank: int
    lora_alpha: float
    start: Start
    seed: int = 0
    left_out: tuple[str, ...] = ()
    explained: Mapping[str, float] = field(default_factory=dict)
    provenance: Provenance
    learning_rate: float | None = None
    responses: Mapping[str, Response] = field(default_factory=dict)
    length: TrainingLength | None = None
    losses: tuple[float, float] | None = None
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    error_size: float = 0.0
    exact_loss: float | None = None
    dtype: str = "float32"
    trains_head: bool | None = None

    @property
    def share_closed(self) -> float | None:
        """Share of what quantization costs, in the loss, that the adapter gives back; None if it was not measured."""
        if self.losses is None or self.exact_loss is None:
            return None
        quantized, corrected = self.losses
        if quantized <= self.exact_loss:  # quantization cost nothing, so there is no gap to take a share of
            return None
        return (quantized - corrected) / (quantized - self.exact_loss)

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
        table["parameters"] = list(self.parameters().values())
        table["explained_variance"] = [self.explained.get(name) for name in self.weights]
        return table

    def plot(self) -> Figure:
        """Draw the ranks as a heat map, blocks from top to bottom, and return the matplotlib figure."""
        figure: Figure = on_demand("heat map")(self.ranks)
        return figure

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each layer that takes an adapter, in model order."""
        # PEFT stacks the A of all experts of a layer: experts * r rows, and r where there are none.
        return {name: len(own.a) // max(self.targets[name].experts, 1) for name, own in self.weights.items()}

    @property
    def method(self) -> str:
        """The name of the start."""
        return self.start.name

    @property
    def scaling(self) -> float:
        """The factor of B A x, which is the same in every layer whatever its rank."""
        return scaling_of(self.lora_alpha, self.rank, self.use_rslora)

    @property
    def corrects_base(self) -> bool:
        """Whether s B A is subtracted from the base weights, so that the output stays as it was."""
        return self.start.corrects_base

    @property
    def changes_output(self) -> bool:
        """Whether this adapter changes the model's output before any training."""
        return self.start.changes_output

    @cached_property
    def rate(self) -> LearningRate | None:
        """The learning rate that follows from the pass over the data; None if the pass did not measure sizes."""
        if not self.responses:
            return None
        adapted = (*self.weights, *self.unsupported)
        left_out = [name for name in adapted if name not in self.responses]
        # A head that begins at random wants a larger change than a pretrained one, see `rates.learning_rate`.
        new_head = self.trains_head
        if new_head is None:
            heads = self.provenance.settings.get("heads", ())
            new_head = trains_new_head(heads, self.provenance.task_type, self.modules_to_save)
        linear = [name for name in adapted if "Embedding" not in self.unsupported.get(name, "")]
        share = share_of(sum(map(layers_in, linear)), self.provenance.n_linear)
        length = self.length or TrainingLength.plan(self.provenance.settings.get("rows"))
        return LearningRate(self.responses, length, new_head, left_out, share)

    @property
    def recommended(self) -> dict[str, Any] | None:
        """Learning rate, warm-up, schedule and optimizer to train with; None if no rate is known."""
        if self.learning_rate is not None:  # a comparison tried it, so it goes before the predicted one
            return {"learning_rate": self.learning_rate, **TRAINING}
        return None if self.rate is None else self.rate.training

    @property
    def how_to_train(self) -> str:
        """Learning rate, schedule and optimizer to train with, in words."""
        return training_in_words(self.rate, self.learning_rate)

    def n_parameters(self) -> int:
        """Count the trainable parameters: all A and B, or all B if A is frozen, and DoRA's magnitudes."""
        return sum(self.parameters().values())

    def parameters(self) -> dict[str, int]:
        """Count the trainable parameters of each layer."""
        counts = {}
        for name, rank in self.ranks.items():
            counts[name] = self.targets[name].parameters(rank, self.freeze_a, self.use_dora)
        return counts

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
        model, and A is frozen if it should be. If anything fails, the model is unchanged.

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
        check_switches(correct_base=correct_base)
        plain: Any = model
        if isinstance(model, nn.Module):
            plain = unwrapped(model)
        adapted: Any
        if is_filled(plain):
            fill_in_place(plain, self)  # refuses starts that correct the base, so nothing is corrected below
            adapted = plain
        else:
            check_plain(model, "apply()")
            check_fits(plain, self, adapter_name)
            if self.corrects_base and correct_base:
                check_correctable(plain, self.targets)
            adapted = attach(plain, self, adapter_name)
            if self.freeze_a:
                freeze_a(adapted, adapter_name)
        # After `attach`: where that fails, it leaves the model as it was.
        if self.corrects_base and correct_base:
            correct_weights(plain, self.weights, self.scaling)
        elif self.corrects_base:
            correct_outputs(plain, self.weights, self.scaling)
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
        check_switches(overwrite=overwrite)
        if model is not None:
            model = unwrapped(model)
        config = self._config(model) | {"inference_mode": True}  # as PEFT writes it for every saved adapter
        dtype = getattr(torch, self.dtype)
        tensors = self._tensors(model)
        for name, tensor in tensors.items():
            if name.endswith((LORA_A, LORA_B)):  # heads and magnitudes keep the type that they have
                tensors[name] = tensor.to(dtype)
        card = card_of(self, Path(directory).resolve().name)
        return write_start(directory, tensors, config, origin_of(self), card, overwrite)

    def _config(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Return the fields of a LoraConfig for this adapter."""
        # PEFT names fused experts by `target_parameters`, all other layers by `target_modules`.
        modules, parameters = [], []
        for name in (*self.weights, *self.unsupported):
            is_parameter = self.unsupported.get(name) == "Parameter"
            if is_parameter or (name in self.weights and self.targets[name].experts):
                parameters.append(name)
            else:
                modules.append(name)
        return lora_config(
            self.ranks,
            self.rank,
            self.scaling,
            self._target_modules(modules, model),
            self.use_rslora,
            use_dora=self.use_dora,
            lora_dropout=self.lora_dropout,
            task_type=self.provenance.task_type,
            base_model_name_or_path=self.provenance.model_id,
            target_parameters=parameters,
            fan_in_fan_out=any(target.kind == "Conv1D" for target in self.targets.values()),
            modules_to_save=list(self.modules_to_save),
            **carrying(origin_of(self, short=True), self.provenance.task_type),
        )

    def _target_modules(self, names: list[str], model: nn.Module | None) -> list[str] | str:
        """Return what selects these layers and no other in PEFT: their names, or a regular expression."""
        # PEFT takes each name of a list for the end of a name. A list is therefore safe only if none of its names ends
        # the name of another module.
        if model is not None:
            others = {name for name, _ in model.named_modules()} - set(names)
            return listed_or_pattern(names, others)
        # Without the model, short names are not trusted: in a hand-made nn.Sequential they often end another module's
        # name. The full name of a transformer's layer starts at its root and doesn't. A heuristic.
        if all(name.count(".") >= 2 for name in names):
            return listed_or_pattern(names, self.left_out)
        return exact_pattern(names)

    def _tensors(self, model: nn.Module | None) -> dict[str, Tensor]:
        """Return all tensors of the adapter's file: A and B, and by PEFT what else it keeps there."""
        trained_whole = list(self.modules_to_save)
        heads = HEADS.get(self.provenance.task_type or "", ())
        if heads:
            trained_whole.insert(0, f"the head ({' or '.join(heads)})")
        if trained_whole and model is None:
            raise LoraInitError(
                f"task_type={self.provenance.task_type!r}, modules_to_save={list(self.modules_to_save)}: PEFT trains "
                f"{', '.join(trained_whole)} whole and expects its weights in the directory. Pass model=, or save the "
                "PeftModel that apply() returns."
            )
        if model is None or not (trained_whole or self.use_dora or self.unsupported):
            tensors = {}
            for name, prefix in file_prefixes(self.targets.values()).items():
                a, b = self.weights[name]
                # safetensors refuses tensors that are not contiguous.
                tensors[prefix + LORA_A], tensors[prefix + LORA_B] = a.contiguous(), b.contiguous()
            return tensors
        from peft.utils import get_peft_model_state_dict

        # PEFT's own names and PEFT's own start of what we do not start: on the model, for a moment.
        with as_it_was(model):
            remove_adapters(model)
            with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator, which is the caller's
                torch.manual_seed(self.seed)
                check_fits(model, self, "default")
                state = get_peft_model_state_dict(attach(model, self, "default"), save_embedding_layers=False)
            # Copies, since the model is put back and its weights change in training.
            return {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
