"""What the names of layers say: the block that one is in, its kind within it, and whether it is attention or MLP."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.)")

ATTENTION, CROSS_ATTENTION, MLP = "attention", "cross-attention", "mlp"
PURPOSES = (ATTENTION, CROSS_ATTENTION, MLP)

# Purposes follow from the names that transformers and diffusers give classes and attributes, and from blocks:
# LlamaAttention, FalconFlashAttention2; self_attn, attn2, EncDecAttention, but no whole block that is named after it.
_CLASS, _ATTRIBUTE = re.compile(r"Attention\d*$"), re.compile(r"(attn|attention)\d*$", re.IGNORECASE)
_BLOCK = re.compile(r"Block|Layer$")
# Where a module does not say so itself: cross_attn, EncDecAttention, BART's encoder_attn, attn2 of diffusers.
_CROSS = re.compile(r"cross|encdec|encoder_att|attn2$", re.IGNORECASE)
# What a cross-attention reads from elsewhere goes into k, v_proj, key, to_v, and GPT-2's c_attn.
_KEY_OR_VALUE = re.compile(r"[._](k|v|kv|key|value|c_attn)(_\w+)?$")
# Within a block: mlp.up_proj, ff.net.2, feed_forward.w1, DenseReluDense.wi_0, intermediate.dense, experts.0.w1, fc1.
_MLP = re.compile(r"mlp|ffn|\bff|\bfc|feed_?forward|dense|expert|^linear[12]$", re.IGNORECASE)
_ROUTER = re.compile(r"(gate|router)(\.|$)")


def one_line_each(said: Mapping[str, str]) -> list[str]:
    """Write texts about layers, by name, in one line for all layers that have the same text."""
    names: dict[str, list[str]] = {}
    for name, text in said.items():
        names.setdefault(text, []).append(name)
    return [f"{some(layers)}: {text}" for text, layers in names.items()]


def span(numbers: Collection[int]) -> str:
    """Write the least and the largest of some numbers."""
    return " to ".join(map(str, sorted({min(numbers), max(numbers)})))


def some(names: Sequence[str]) -> str:
    """Name the first of several layers, and how many others there are."""
    others = len(names) - 1
    return names[0] + (f" and {others} other layer{'s' * (others > 1)}" if others else "")


@dataclass(frozen=True)
class LayerGrid:
    """Layers as kind x block."""

    kinds: list[str]  # short labels that tell the kinds apart, in model order
    blocks: list[int]  # block numbers, rising; -1 stands for layers outside any block
    cells: dict[tuple[str, int], str]  # names of layers by (kind, block); few models have more than one in a cell

    @property
    def by_kind(self) -> dict[str, dict[int, str]]:
        """The layers of each kind by block."""
        return {
            kind: {block: self.cells[kind, block] for block in self.blocks if (kind, block) in self.cells}
            for kind in self.kinds
        }


def layer_grid(names: Iterable[str]) -> LayerGrid:
    """Arrange layers by the first number in their names, and by what is left of them.

    Example:
        >>> grid = layer_grid(["h.0.up", "h.0.down", "h.1.up"])
        >>> grid.kinds, grid.blocks, grid.cells["up", 1]
        (['up', 'down'], [0, 1], 'h.1.up')
    """
    places = {name: place_of(name) for name in names}
    in_block: dict[int, list[tuple[str, str]]] = {}
    for kind, block in places.values():
        in_block.setdefault(block, []).append(kind)
    # A block with all kinds tells their order; the first one may lack some.
    fullest_first = sorted(in_block.values(), key=len, reverse=True)
    labels = _labels(list(dict.fromkeys(kind for kinds in fullest_first for kind in kinds)))
    cells = {(labels[kind], block): name for name, (kind, block) in places.items()}
    return LayerGrid(list(labels.values()), sorted({block for _, block in places.values()}), cells)


def layers_in(name: str) -> int:
    """Count what a model without experts has in place of a layer: fused experts hold gate and up projection in one."""
    return 2 if name.endswith(".experts.gate_up_proj") else 1


def place_of(name: str) -> tuple[tuple[str, str], int]:
    """Split model.layers.3.mlp.up_proj into the kind (model.layers, mlp.up_proj) and the block 3."""
    match = _NUMBER.search(name)
    if match is None:
        return ("", name), -1
    return (name[: match.start()].rstrip("."), name[match.end() + 1 :]), int(match.group())


def _labels(kinds: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Find each kind's shortest ending that no other has; if stacks share an ending, after the name of the stack."""
    labels = {kind: _ending(kind[1], [rest for _, rest in kinds]) for kind in kinds}
    if len(set(labels.values())) == len(kinds):
        return labels
    stacks = dict.fromkeys(_backwards(stack) for stack, _ in kinds)  # encoder and decoder blocks both have a q
    for stack, rest in kinds:
        start = _backwards(_ending(_backwards(stack), stacks))
        labels[stack, rest] = f"{start} {_ending(rest, [r for s, r in kinds if s == stack])}".strip()
    return labels


def _ending(text: str, others: Iterable[str]) -> str:
    parts = text.split(".")
    endings = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
    return next((end for end in endings if sum(f".{other}".endswith(f".{end}") for other in others) == 1), text)


def _backwards(text: str) -> str:
    return ".".join(reversed(text.split(".")))


def by_purpose(modules: Mapping[str, nn.Module], linear: Collection[str]) -> dict[str, list[str]]:
    """Sort linear layers by what they are for; cross-attention is a part of attention.

    A layer belongs to an attention if a module around it does by its class or attribute. One that does not is of an
    MLP if its name says so within a block, one of a numbered row of which some have an attention. Embeddings, heads,
    poolers, projections between the towers of a model, routers, and layers that modulate norms are neither.
    """
    attention = {name: _is_cross(name, module) for name, module in modules.items() if _is_attention(name, module)}
    rows = _rows_around(attention)
    layers: dict[str, list[str]] = {purpose: [] for purpose in PURPOSES}
    for name in linear:
        inside = [attention[owner] for owner in _owners(name) if owner in attention]
        block = _block_in(rows, name)
        if inside:
            layers[ATTENTION].append(name)
        elif block is not None and _MLP.search(name.removeprefix(f"{block}.")) and not _ROUTER.search(name):
            layers[MLP].append(name)
        if any(inside):
            layers[CROSS_ATTENTION].append(name)
    return layers


def _rows_around(names: Iterable[str]) -> set[str]:
    """Name the numbered rows of modules, such as model.layers, that some modules are in."""
    return {owner.rpartition(".")[0] for name in names for owner in _owners(name) if _is_numbered(owner)}


def _block_in(rows: Collection[str], name: str) -> str | None:
    """Name the innermost member of a numbered row that a module is in, such as model.layers.3."""
    return next((o for o in _owners(name) if _is_numbered(o) and o.rpartition(".")[0] in rows), None)


def cross_inputs(modules: Mapping[str, nn.Module]) -> set[str]:
    """Name the layers that make keys and values of cross-attention: they read what an encoder has computed."""
    return set(filter(_KEY_OR_VALUE.search, by_purpose(modules, modules)[CROSS_ATTENTION]))


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
    return any(True for _ in module.children()) and bool(_CLASS.search(kind) or by_attribute)


def _is_cross(name: str, module: nn.Module) -> bool:
    said = getattr(module, "is_cross_attention", None)  # diffusers, BERT, GPT-2
    named = _CROSS.search(name.rpartition(".")[2]) or _CROSS.search(type(module).__name__)
    return said if isinstance(said, bool) else bool(named)
