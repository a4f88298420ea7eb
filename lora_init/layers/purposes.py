"""Which linear layers are attention, which of them cross-attention, and which MLP, in models of any architecture.

Told by how transformers and diffusers name classes and attributes, and by the blocks that a model repeats.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

ATTENTION, CROSS_ATTENTION, MLP = "attention", "cross-attention", "mlp"
PURPOSES = (ATTENTION, CROSS_ATTENTION, MLP)

# LlamaAttention, FalconFlashAttention2; self_attn, attn2, EncDecAttention, but no whole block that is named after it.
_CLASS, _ATTRIBUTE = re.compile(r"Attention\d*$"), re.compile(r"(attn|attention)\d*$", re.IGNORECASE)
_BLOCK = re.compile(r"Block|Layer$")
# Where a module does not say so itself: cross_attn, EncDecAttention, BART's encoder_attn, attn2 of diffusers.
_CROSS = re.compile(r"cross|encdec|encoder_att|attn2$", re.IGNORECASE)
# Within a block: mlp.up_proj, ff.net.2, feed_forward.w1, DenseReluDense.wi_0, intermediate.dense, experts.0.w1, fc1.
_MLP = re.compile(r"mlp|ffn|\bff|\bfc|feed_?forward|dense|expert|^linear[12]$", re.IGNORECASE)
_ROUTER = re.compile(r"(gate|router)(\.|$)")


def by_purpose(modules: Mapping[str, nn.Module], linear: Collection[str]) -> dict[str, list[str]]:
    """Sort linear layers by what they are for; cross-attention is a part of attention.

    A layer belongs to an attention if a module around it does by its class or attribute. One that does not is of an
    MLP if its name says so within a block, one of a numbered row of which some have an attention. Embeddings, heads,
    poolers, projections between the towers of a model, routers, and layers that modulate norms are neither.
    """
    attention = {name: _is_cross(name, module) for name, module in modules.items() if _is_attention(name, module)}
    rows = {owner.rpartition(".")[0] for name in attention for owner in _owners(name) if _is_numbered(owner)}
    found: dict[str, list[str]] = {purpose: [] for purpose in PURPOSES}
    for name in linear:
        inside = [attention[owner] for owner in _owners(name) if owner in attention]
        block = next((o for o in _owners(name) if _is_numbered(o) and o.rpartition(".")[0] in rows), None)
        if inside:
            found[ATTENTION].append(name)
        elif block is not None and _MLP.search(name.removeprefix(f"{block}.")) and not _ROUTER.search(name):
            found[MLP].append(name)
        if any(inside):
            found[CROSS_ATTENTION].append(name)
    return found


def _owners(name: str) -> Iterator[str]:
    """Name the modules around one, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _is_numbered(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()


def _is_attention(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__
    by_attribute = _ATTRIBUTE.search(name.rpartition(".")[2]) and not _BLOCK.search(kind)
    return bool(module._modules) and bool(_CLASS.search(kind) or by_attribute)


def _is_cross(name: str, module: nn.Module) -> bool:
    said = getattr(module, "is_cross_attention", None)  # diffusers, BERT, GPT-2
    named = _CROSS.search(name.rpartition(".")[2]) or _CROSS.search(type(module).__name__)
    return said if isinstance(said, bool) else bool(named)
