"""An adapter before training: on a model, in a directory, or as a LoraConfig."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_init.adapters.initializers import GRADIENT_METHODS, changes_output, kaiming, layer_generator, zero_b
from lora_init.adapters.peft_model import (
    CONFIG_FILE,
    LORA_A,
    LORA_B,
    ORIGIN_FILE,
    PREFIX,
    WEIGHTS_FILE,
    adapted_layers,
    attach,
    check_model,
    exact_pattern,
    magnitude_tensors,
    read_config,
    read_shapes,
    selects,
)
from lora_init.errors import LoraInitError
from lora_init.files import write_directory
from lora_init.layers.targets import HEADS, Target, file_prefixes, find_targets
from lora_init.layers.wrappers import unwrapped
from lora_init.statistics.statistics import Provenance

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def check_modules_to_save(model: nn.Module, modules_to_save: Collection[str]) -> None:
    """Check that each name is the ending of a module's, as PEFT matches it, which leaves out silently what is not.

    Raises:
        LoraInitError: One is not.
    """
    names = [name for name, _ in model.named_modules() if name]
    for ending in modules_to_save:
        if not any(name.endswith(ending) for name in names):
            endings = sorted({name.rpartition(".")[2] for name in names})
            close = difflib.get_close_matches(ending.rpartition(".")[2], endings, n=3, cutoff=0.4)
            hint = f" Closest: {', '.join(close)}." if close else ""
            raise LoraInitError(f"modules_to_save: {ending!r} is no module of {type(model).__name__}.{hint}")


def head_tensors(model: nn.Module, heads: tuple[str, ...]) -> dict[str, Tensor]:
    """Read the weights of the heads that PEFT trains whole, under the names they have in an adapter's file.

    Args:
        model: The plain model, or the same after `attach`.
        heads: Endings of the modules' names, matched as PEFT matches `modules_to_save`.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        inside_wrapper = ".original_module" in name or ".modules_to_save" in name
        if heads and name.endswith(heads) and not inside_wrapper:
            state = getattr(module, "original_module", module).state_dict()
            tensors |= {f"base_model.model.{name}.{key}": value.detach().cpu().clone() for key, value in state.items()}
    return tensors


def own_start_tensors(model: nn.Module, unsupported: Collection[str], rank: int, seed: int) -> dict[str, Tensor]:
    """Draw PEFT's own start for layers that have no spectrum, so that PEFT finds all that it looks for in the file.

    Those of an embedding, a linear layer and a convolution; PEFT draws what else it misses, and says so.

    Args:
        model: The plain model, or the same after `attach`.
        unsupported: Names of the layers.
        rank: Their rank.
        seed: Seed of the numbers; each layer's depend on it and on the layer's name.
    """
    tensors: dict[str, Tensor] = {}
    for name, wrapped in model.named_modules():
        if name not in unsupported:
            continue
        layer = getattr(wrapped, "base_layer", wrapped)
        generator, prefix = layer_generator(seed, name), f"base_model.model.{name}"
        if isinstance(layer, nn.Embedding):
            tensors[f"{prefix}.lora_embedding_A"] = torch.zeros(rank, layer.num_embeddings)
            tensors[f"{prefix}.lora_embedding_B"] = torch.randn(layer.embedding_dim, rank, generator=generator)
        elif not isinstance(layer, nn.MultiheadAttention):
            target = find_targets(nn.ModuleDict({"layer": layer}), ["layer"]).layers["layer"]
            a, b = target.shapes(rank)
            tensors[f"{prefix}.lora_A.weight"] = kaiming(rank, target.in_features, generator).reshape(a)
            tensors[f"{prefix}.lora_B.weight"] = zero_b(*b)
    return tensors


Weights = Mapping[str, tuple[Tensor, Tensor]]


def check_correctable(model: nn.Module, names: Iterable[str]) -> None:
    """Make sure that the base weights can give up what an adapter adds.

    Raises:
        LoraInitError: A layer is quantised.
    """
    for name in names:
        weight: Any = model.get_submodule(name).weight
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise LoraInitError(
                f"layer {name!r} is quantised, so that its weight cannot give up what B A adds. "
                "Load the model in float, or pass correct_base=False to apply()."
            )


@torch.no_grad()
def correct_weights(model: nn.Module, targets: Mapping[str, Target], weights: Weights, scaling: float) -> None:
    """Take scaling * B A off the base weights, in place.

    Args:
        model: The plain model, or the same after PEFT has wrapped its layers.
        targets: Kind of each layer.
        weights: A and B of each layer.
        scaling: What their product is multiplied by.
    """
    for name, (a, b) in weights.items():
        layer: Any = model.get_submodule(name)
        weight = getattr(layer, "base_layer", layer).weight
        added = scaling * (b.to(weight.device) @ a.to(weight.device))
        weight.copy_(weight.float() - (added.T if targets[name].kind == "Conv1D" else added))


def correct_outputs(model: nn.Module, weights: Weights, scaling: float) -> None:
    """Take scaling * B A x off the output of each layer by a hook, and leave the base weights alone."""
    for name, (a, b) in weights.items():
        layer: Any = model.get_submodule(name)
        device = next(layer.parameters()).device
        layer.register_forward_hook(partial(_less, a.to(device, copy=True), b.to(device) * scaling))


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
        LoraInitError: Not an adapter directory, one of another model, or quantised weights.
    """
    from safetensors.torch import load_file

    model, directory = unwrapped(model), Path(directory).expanduser()
    config = read_config(directory)
    names = adapted_layers(read_shapes(directory))
    missing = next((name for name in names if name not in dict(model.named_modules())), None)
    if missing is not None:
        raise LoraInitError(f"{directory} has layer {missing!r}, and {type(model).__name__} does not. Give its base.")
    found = find_targets(model, names).layers
    check_correctable(model, names)
    tensors = load_file(directory / WEIGHTS_FILE)
    weights = {name: (tensors[f"{PREFIX}{name}{LORA_A}"], tensors[f"{PREFIX}{name}{LORA_B}"]) for name in names}
    rank = config["r"] ** (0.5 if config.get("use_rslora") else 1.0)
    correct_weights(model, found, weights, config["lora_alpha"] / rank)


def _less(a: Tensor, b: Tensor, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    x = args[0]
    less: Tensor = output - ((x.to(a.dtype) @ a.T) @ b.T).to(output.dtype)
    return less


CARD_FILE = "README.md"


@dataclass(frozen=True, eq=False)
class AdapterInit:
    """Everything about an adapter before its first step of training. Made by `build_adapter`.

    Attributes:
        weights: For each layer that takes an adapter, in model order, A float32 [r, d_in] and B float32 [d_out, r];
            of a convolution and of experts in the shapes of `Target.shapes`. B is zero, but for the methods that take
            a step.
        targets: Kind and widths of those layers.
        unsupported: Targeted layers that keep PEFT's own initialisation, name to kind. They get rank `rank`.
        rank: `r` of the config: the rank of layers that `rank_pattern` doesn't name, and the base of the scaling.
        lora_alpha: Numerator of the scaling.
        use_rslora: Whether the scaling is lora_alpha / sqrt(rank) instead of lora_alpha / rank.
        use_dora: Whether PEFT adds DoRA's magnitude vectors.
        lora_dropout: Dropout on what A reads, in training.
        method: As given to `build_adapter`.
        whiten: Whether A's rows were divided by `initializers.whitening_scale`.
        seed: Seed of the random numbers.
        left_out: Layers that the plan gives rank 0, or that are trained whole: they have no adapter.
        explained: For each layer, the share of the variance of its input that its first r components capture.
        provenance: Where the statistics come from.
        modules_to_save: As in PEFT: endings of the names of modules that are trained whole.
        gamma: What B A was divided by, where B is not zero.
        losses: Where `changes_output` and it was measured: the loss of the plain model, and that with this adapter.
    """

    weights: Mapping[str, tuple[Tensor, Tensor]]
    targets: Mapping[str, Target]
    unsupported: Mapping[str, str]
    rank: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    lora_dropout: float
    method: str
    whiten: bool
    seed: int
    left_out: tuple[str, ...]
    explained: Mapping[str, float]
    provenance: Provenance
    modules_to_save: tuple[str, ...] = ()
    gamma: float | None = None
    losses: tuple[float, float] | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each layer that takes an adapter, in model order."""
        return {name: a.shape[0] // max(self.targets[name].experts, 1) for name, (a, _) in self.weights.items()}

    @property
    def scaling(self) -> float:
        """What B A x is multiplied by, the same in every layer whatever its rank."""
        return self.lora_alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def corrects_base(self) -> bool:
        """Whether the base weights have to give up what B A adds, so that the output stays as it was."""
        return self.method in GRADIENT_METHODS and GRADIENT_METHODS[self.method].corrects

    @property
    def changes_output(self) -> bool:
        """Whether the model's output is another one with this adapter, before any training."""
        return changes_output(self.method)

    def n_parameters(self) -> int:
        """Count the trainable parameters of all A and B."""
        return sum(a.numel() + b.numel() for a, b in self.weights.values())

    def to_peft_config(self) -> LoraConfig:
        """Describe the adapter as a plain LoRA config: ranks and scalings, no weights, no init-specific keys.

        Each key of `rank_pattern` and `alpha_pattern` is `^` + the escaped full name of one layer. Given to
        `get_peft_model`, it makes an adapter of the same shape with PEFT's random A.
        """
        from peft import LoraConfig

        return LoraConfig(**self._config())

    def apply(self, model: nn.Module, adapter_name: str = "default", correct_base: bool = True) -> PeftModel:
        """Put the adapter on the model and return a PeftModel, ready for Trainer.

        The model is wrapped in place, as `get_peft_model` does; its output doesn't change, unless `changes_output`.
        With `corrects_base` the base weights change, and to the plain base belongs what
        `save_pretrained(directory, path_initial_model_for_weight_conversion=initial)` of the PeftModel writes, with
        `initial` a directory that this object has saved: an ordinary adapter of twice the rank. A compiled model comes
        back as a PeftModel that is not, to compile anew. A and B are float32 also on a half-precision or quantised
        model. If anything fails, the model is as it was.

        Args:
            model: The model the statistics come from, or one with layers of the same names and widths (quantised, say).
            adapter_name: PEFT's name for the adapter.
            correct_base: With `corrects_base`: False leaves the base weights alone and takes the adapter's own start
                off in the forward pass, by a hook on each layer, at the cost of a second adapter. Merging does not
                know of it: convert.

        Raises:
            LoraInitError: The model already has an adapter, or a layer of the plan is missing or has other widths, or
                is quantised and should change.
        """
        origin = self.provenance.model_id or self.provenance.model_class
        model = unwrapped(model)
        check_model(model, self.targets, self.unsupported, origin, adapter_name)
        check_modules_to_save(model, self.modules_to_save)
        if self.corrects_base and correct_base:
            check_correctable(model, self.targets)
        config = self.to_peft_config()
        adapted = attach(model, config, self.weights, self.ranks, self.unsupported, self.scaling, adapter_name)
        if self.corrects_base and correct_base:
            correct_weights(model, self.targets, self.weights, self.scaling)
        elif self.corrects_base:
            correct_outputs(model, self.weights, self.scaling)
        return adapted

    def save_pretrained(self, directory: str | Path, overwrite: bool = False, model: nn.Module | None = None) -> Path:
        """Write a standard PEFT adapter directory.

        `PeftModel.from_pretrained(base, directory, is_trainable=True)` reads it. It holds adapter_model.safetensors,
        adapter_config.json, a short README.md, and lora_init.json, which says where the statistics come from; no other
        tool reads it. The directory appears under its name complete or not at all.

        Args:
            directory: Where to. An empty directory is used as it is.
            overwrite: Replace an existing adapter directory. One that holds anything else is never replaced.
            model: The model, plain or as `apply` left it. Needed only if modules are trained whole, as a head is
                for some of PEFT's task types (`SEQ_CLS`, `TOKEN_CLS`, `QUESTION_ANS`): their weights belong in the
                file. With `use_dora=True` it adds the magnitude vectors, and PEFT's own start of layers in
                `unsupported`; without it PEFT makes both while loading, correctly, but warns of missing keys. A list
                of `target_modules` is checked against the model's other modules; without it short names become a
                pattern.

        Returns:
            The directory as an absolute path.

        Raises:
            LoraInitError: The directory exists or cannot be written, or weights of the model are needed and no model
                was given.
        """
        from safetensors.torch import save

        model = None if model is None else unwrapped(model)
        tensors: dict[str, Tensor] = {}
        for name, prefix in file_prefixes(self.targets.values()).items():
            a, b = self.weights[name]
            tensors[f"{prefix}.lora_A.weight"] = a.contiguous()
            tensors[f"{prefix}.lora_B.weight"] = b.contiguous()
        tensors |= self._tensors_of_the_model(model)
        files = {
            WEIGHTS_FILE: save(tensors, metadata={"format": "pt"}),
            CONFIG_FILE: _json(self._config(model) | {"inference_mode": True}),
            ORIGIN_FILE: _json(self._origin()),
            CARD_FILE: self._card().encode(),
        }
        return write_directory(directory, files, overwrite, marker=CONFIG_FILE, replaceable=tuple(files))

    def _config(self, model: nn.Module | None = None) -> dict[str, Any]:
        # Old PEFT releases refuse keys they don't know: newer keys only where they say something.
        parameters = [name for name in self.weights if self.targets[name].experts]
        parameters += [name for name, kind in self.unsupported.items() if kind == "Parameter"]
        names = [name for name in (*self.weights, *self.unsupported) if name not in parameters]
        others = self.left_out if model is None else {name for name, _ in model.named_modules()} - set(names)
        listed = not any(selects(names, name) for name in others)
        # Without the model, short names are not trusted: in a hand-made nn.Sequential they often end another module's
        # name. The full name of a transformer's layer starts at its root and doesn't. A heuristic.
        listed = listed and (model is not None or all(name.count(".") >= 2 for name in names))
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": self.provenance.task_type,
            "base_model_name_or_path": self.provenance.model_id or None,
            "r": self.rank,
            "lora_alpha": _as_number(self.lora_alpha),
            "lora_dropout": self.lora_dropout,
            "target_modules": names if listed else exact_pattern(names),
            **({"target_parameters": parameters} if parameters else {}),
            "fan_in_fan_out": any(target.kind == "Conv1D" for target in self.targets.values()),
            **({"modules_to_save": list(self.modules_to_save)} if self.modules_to_save else {}),
            "bias": "none",
            "init_lora_weights": True,
        }
        other = {name: rank for name, rank in self.ranks.items() if rank != self.rank}
        config["rank_pattern"] = {f"^{re.escape(name)}": rank for name, rank in other.items()}
        config["alpha_pattern"] = {f"^{re.escape(name)}": self._alpha(rank) for name, rank in other.items()}
        return config | {flag: True for flag in ("use_rslora", "use_dora") if getattr(self, flag)}

    def _alpha(self, rank: int) -> float:
        divisor = math.sqrt(rank) if self.use_rslora else rank
        alpha = self.scaling * divisor
        near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, 0.0))
        return _as_number(next((value for value in near if value / divisor == self.scaling), alpha))

    def _tensors_of_the_model(self, model: nn.Module | None) -> dict[str, Tensor]:
        heads = HEADS.get(self.provenance.task_type or "", ())
        if model is None:
            if heads or self.modules_to_save:
                why = [f"task_type={self.provenance.task_type!r}"] if heads else []
                what = [f"the head ({' or '.join(heads)})"] if heads else []
                why += [f"modules_to_save={list(self.modules_to_save)}"] if self.modules_to_save else []
                raise LoraInitError(
                    f"{' and '.join(why)}: PEFT trains {', '.join((*what, *self.modules_to_save))} whole and "
                    "expects its weights in the directory. Pass model=, or save the PeftModel that apply() returns."
                )
            return {}
        check_modules_to_save(model, self.modules_to_save)
        dora = magnitude_tensors(model, self.targets) if self.use_dora else {}
        own = own_start_tensors(model, self.unsupported, self.rank, self.seed)
        return own | head_tensors(model, (*heads, *self.modules_to_save)) | dora

    def _origin(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "whiten": self.whiten,
            "seed": self.seed,
            "left_out": list(self.left_out),
            "experts": {
                name: {"tensors": prefix.removeprefix("base_model.model."), "experts": self.targets[name].experts}
                for name, prefix in file_prefixes(self.targets.values()).items()
                if self.targets[name].experts
            },
            "unsupported": dict(self.unsupported),
            "explained": {name: round(share, 4) for name, share in self.explained.items()},
            "provenance": asdict(self.provenance),
        }

    def start_in_words(self) -> str:
        """Say what the adapter does to the model before it is trained."""
        if self.corrects_base:
            return (
                "B is not zero: the base weights must give up what the adapter adds, and what was trained is converted "
                "while it is saved (path_initial_model_for_weight_conversion)"
            )
        if self.changes_output:
            words = "B is not zero: the adapter is a step down the gradient, and the model's output is another one"
            measured = "" if self.losses is None else ", loss {:.4g} -> {:.4g} before any training".format(*self.losses)
            return f"{words} (gamma {self.gamma:g}{measured})"
        return "B is zero, so the adapter changes nothing until it is trained"

    def _card(self) -> str:
        origin = self.provenance
        # A path of this machine is no model id: it says nothing elsewhere, and the hub refuses it.
        base = origin.model_id if origin.model_id and not Path(origin.model_id).exists() else ""
        ranks = self.ranks.values()
        return (
            "---\nlibrary_name: peft\n"
            + (f"base_model: {json.dumps(base)}\n" if base else "")
            + "tags:\n- lora\n- lora_init\n---\n\n# A LoRA adapter before training\n\n"
            f"Made by lora_init for {base or origin.model_class}: method `{self.method}`, {len(self.weights)} layers, "
            f"rank {min(ranks)} to {max(ranks)} (average {self.rank}), {self.n_parameters():,} parameters. "
            f"{self.start_in_words()}:\n\n"
            "```python\nfrom peft import PeftModel\n\n"
            + ("import lora_init\n\nlora_init.correct_base(base_model, directory)\n" if self.corrects_base else "")
            + "model = PeftModel.from_pretrained(base_model, directory, is_trainable=True)\n```\n"
        )


def _as_number(value: float) -> float:
    """Write 16.0 as 16, as PEFT's configs have it."""
    return int(value) if float(value).is_integer() else float(value)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
