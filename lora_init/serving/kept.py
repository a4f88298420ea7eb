"""What a merge keeps of an adapter: W + s B A is rounded to a type, and rounding may take what was learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_init.adapters.directory import AdapterDirectory
from lora_init.adapters.peft_model import adapter_layers, with_adapter
from lora_init.errors import LoraInitError, require
from lora_init.layers.running import on_device_of
from lora_init.layers.targets import PREFIX, is_conv1d
from lora_init.serving.base import Base, MergeSource, is_transposed, merged
from lora_init.serving.trained import Trained
from lora_init.statistics.second_moment import SecondMoment
from lora_init.statistics.statistics import Statistics

_MOST_TOKENS = 512  # whose log-probabilities of the whole vocabulary are held
_LITTLE, _MUCH = 0.02, 0.1  # of the effect lost: up to the first a merge is advised, beyond the second the adapter


def _int8(weight: Tensor) -> Tensor:
    """Round each row of a weight [d_out, d_in] to 255 steps, as LLM.int8 does."""
    step = weight.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127  # a row of zeros stays one
    return (weight / step).round() * step


def _nf4(weight: Tensor) -> Tensor:
    """Round blocks of 64 along the rows to NF4, by bitsandbytes."""
    require("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    rounded: Tensor = dequantize_4bit(*quantize_4bit(weight.contiguous(), quant_type="nf4"))
    return rounded


# What a float32 weight [d_out, d_in] is in a type, as float32.
ROUNDINGS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": lambda weight: weight.bfloat16().float(),
    "float16": lambda weight: weight.half().float(),
    "int8": _int8,
    "nf4": _nf4,
}


@dataclass(frozen=True)
class Kept:
    """What is left of a layer's change, or of all: squares of Frobenius norms, or of what outputs change by."""

    change: float = 0.0  # of C = s B A
    along: float = 0.0  # the part of round(W + C) - round(W) along C, times C
    noise: float = 0.0  # of round(W + C) - (W + C)

    @property
    def arrives(self) -> float:
        """The share of the change that is there: 1 for all of it, 0 where rounding gives W again."""
        return self.along / self.change if self.change else 1.0

    @property
    def ratio(self) -> float:
        """How large the noise of rounding is, in sizes of the change."""
        return math.sqrt(self.noise / self.change) if self.change else 0.0

    def __add__(self, other: Kept) -> Kept:
        return Kept(self.change + other.change, self.along + other.along, self.noise + other.noise)

    @property
    def is_doubtful(self) -> bool:
        """Whether rounding takes half of the change, or brings more noise than there is change."""
        return self.ratio > 1.0 or self.arrives < 0.5

    def advice(self, lost: float | None = None) -> str:
        """Write what to do: by the share of the adapter's effect that was measured to be lost, where it is known."""
        keep = "Keep the adapter, or merge in a wider type"
        if lost is not None:
            what = "Merge"
            if lost > _MUCH:
                what = keep
            elif lost > _LITTLE:
                what = "Merge in a wider type where you can"
            return f"{what}: answers move by {lost:.1%} of what the adapter moves them."
        what = "Merge"
        if self.arrives < 0.5:
            what = keep
        elif self.is_doubtful:
            what = "Measure on data before you merge"
        return f"{what}: {self.arrives:.1%} of the change arrives, under {self.ratio:.2g} times as much noise."


def kept_by_merge(
    base: Base,
    trained: Trained,
    sources: Mapping[str, MergeSource],
    dtype: str | None = None,  # a name of `ROUNDINGS`; None for the type that each weight is stored in
    stats: Statistics | None = None,
) -> dict[str, Kept]:
    """Compute what is there of each layer's change after the merge; nothing of those that are stored in float32.

    With statistics squares are of outputs, E |M x|^2 over the rows x that a layer reads. It costs as much as the
    merge, a tensor at a time.

    With R for rounding, R(W + C) - R(W) is what the merged model has of a change C. Its part along C is what arrives.
    What rounding adds to W + C is noise: a type with steps as large as C may give back W, or jump by a whole step.
    """
    kept: dict[str, Kept] = {}
    for source in sources.values():
        # A tensor that was trained whole replaces the base's, and has no change B A.
        if not source.parameter or PREFIX + source.parameter in trained.others:
            continue
        stored = source.read()
        if dtype is None and stored.dtype == torch.float32:
            continue
        name, weight = source.parameter.removesuffix(".weight"), stored.float()
        summed = merged(weight.clone(), source, trained, base)  # which changes fused experts in place
        if source.piece == "" and weight.dim() == 2 and is_transposed(base.model.get_submodule(name)):
            weight, summed = weight.mT, summed.mT  # [d_in, d_out] -> [d_out, d_in]: types round along the rows
        before, after = _rounded(weight, dtype, stored.dtype), _rounded(summed, dtype, stored.dtype)
        change, arrived, noise = summed - weight, after - before, after - summed
        if stats is not None:
            change, arrived, noise = _of_outputs(stats, name, change, arrived, noise)
        of_tensor = Kept(_sum(change.square()), _sum(arrived * change), _sum(noise.square()))
        kept[name] = kept.get(name, Kept()) + of_tensor  # experts stored one by one add up to their parameter
    return kept


def _sum(squares: Tensor) -> float:
    return float(squares.sum(dtype=torch.float64))  # there are as many as a weight has numbers


def _rounded(weight: Tensor, dtype: str | None, stored: torch.dtype) -> Tensor:
    """Round a weight to a type of `ROUNDINGS`, or else to the one that it is stored in, and return it as float32."""
    if dtype:
        return ROUNDINGS[dtype](weight)
    return weight.to(stored).float()


def _of_outputs(stats: Statistics, name: str, *changes: Tensor) -> Iterator[Tensor]:
    """Multiply changes M [d_out, d_in] of a layer by the root of its inputs' second moment: |M root|^2 is E |M x|^2."""
    if name not in stats or changes[0].shape[-1] != stats.targets[name].in_features:
        raise LoraInitError(f"the statistics do not know layer {name!r} as it is stored. Leave them out.")
    moment = SecondMoment.of(stats[name]).to(changes[0])
    return (moment.times(change, 0.5) for change in changes)


@dataclass(frozen=True)
class Divergence:
    """Kullback-Leibler divergences of next-token distributions from the adapter's on its base, in nats."""

    merged: float  # of the merged model
    base: float  # of the base without the adapter
    tokens: int

    @property
    def lost(self) -> float | None:
        """The first in sizes of the second; None if the adapter does nothing."""
        return self.merged / self.base if self.base > 0.0 else None


@torch.no_grad()
def divergence(
    model: Any, directory: AdapterDirectory, batches: Iterable[Mapping[str, Tensor]], dtype: str
) -> Divergence:
    """Measure what a merge does to a loaded float32 base on examples; its weights are the rounded ones afterwards."""
    with with_adapter(model.eval(), directory) as peft_model:

        def answers() -> list[Tensor]:
            rows, n = [], 0
            for batch in batches:
                moved = on_device_of(model, batch)
                labeled = moved["labels"][:, 1:] != -100  # [examples, tokens - 1]: a token is predicted one before it
                inputs = {key: value for key, value in moved.items() if key != "labels"}
                logits = peft_model(**inputs).logits[:, :-1][labeled][: _MOST_TOKENS - n]  # [labeled, vocabulary]
                rows.append(logits.float().log_softmax(-1).cpu())
                n += len(logits)
                if n >= _MOST_TOKENS:
                    break
            return rows

        adapted = answers()
        with peft_model.disable_adapter():
            plain = answers()
        peft_model.merge_adapter()
        for layer in adapter_layers(peft_model).values():
            own = layer.get_base_layer()
            weight = own.weight.data.float()
            # A Conv1D has [d_in, d_out], and types round along the rows of [d_out, d_in].
            rounded = ROUNDINGS[dtype](weight.mT).mT if is_conv1d(own) else ROUNDINGS[dtype](weight)
            own.weight.data = rounded.to(own.weight)
        rounded_answers = answers()
    n = sum(map(len, adapted))
    if not n:
        raise LoraInitError("no example has a token with a label to compare. Use other data.")

    def far(others: list[Tensor]) -> float:  # mean over tokens of sum p (log p - log q), with p the adapter's
        return sum(float((p.exp() * (p - q)).sum()) for p, q in zip(adapted, others, strict=True)) / n

    return Divergence(far(rounded_answers), far(plain), n)
