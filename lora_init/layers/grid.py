"""What the name of a layer tells: its block, its kind within the block, and whether it is attention or MLP."""

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


def one_line_each(texts: Mapping[str, str]) -> list[str]:
    """Write texts about layers, by name, in one line for all layers that have the same text."""
    names: dict[str, list[str]] = {}
    for name, text in texts.items():
        names.setdefault(text, []).append(name)
    return [f"{some(layers)}: {text}" for text, layers in names.items()]


def span(numbers: Collection[int]) -> str:
    """Write the smallest and the largest of some numbers, such as `2 to 5`; a single number if they are equal."""
    return " to ".join(map(str, sorted({min(numbers), max(numbers)})))


def some(names: Sequence[str]) -> str:
    """Name the first of several layers, and how many others there are."""
    others = len(names) - 1
    if not others:
        return names[0]
    return f"{names[0]} and {others} other layer{'s' * (others > 1)}"


@dataclass(frozen=True)
class LayerGrid:
    """Layers as kind x block."""

    kinds: list[str]  # short labels that tell the kinds apart, in model order
    blocks: list[int]  # block numbers, rising; -1 stands for layers outside any block
    cells: dict[tuple[str, int], str]  # names of layers by (kind, block); few models have more than one in a cell

    @property
    def by_kind(self) -> dict[str, dict[int, str]]:
        """The layers of each kind by block."""
        rows: dict[str, dict[int, str]] = {}
        for kind in self.kinds:
            rows[kind] = {}
            for block in self.blocks:
                if (kind, block) in self.cells:  # some blocks lack a kind
                    rows[kind][block] = self.cells[kind, block]
        return rows


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
    # A block with all kinds tells their order; the first one may lack some, as DeepSeek's has no experts.
    ordered: dict[tuple[str, str], None] = {}
    for kinds in sorted(in_block.values(), key=len, reverse=True):
        ordered.update(dict.fromkeys(kinds))
    labels = _labels(list(ordered))
    cells = {(labels[kind], block): name for name, (kind, block) in places.items()}
    return LayerGrid(list(labels.values()), sorted(in_block), cells)


def layers_in(name: str) -> int:
    """Count the layers that a model without experts has instead: fused experts hold gate and up projection in one."""
    return 2 if name.endswith(".experts.gate_up_proj") else 1


# The first number is the block: what follows it, experts.0 or a position in an nn.Sequential, tells kinds apart.
def place_of(name: str) -> tuple[tuple[str, str], int]:
    """Split model.layers.3.mlp.up_proj into the kind (model.layers, mlp.up_proj) and the block 3."""
    match = _NUMBER.search(name)
    if match is None:
        return ("", name), -1
    return (name[: match.start()].rstrip("."), name[match.end() + 1 :]), int(match.group())


def _labels(kinds: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Find each kind's shortest ending that no other has; if stacks share an ending, after the name of the stack.

    A stack is what stands before the number of the block, such as model.layers.
    """
    names_in: dict[str, list[str]] = {}  # of each stack
    for stack, name in kinds:
        names_in.setdefault(stack, []).append(name)
    every = [name for _, name in kinds]
    labels = {(stack, name): _ending(name, every) for stack, name in kinds}
    if len(set(labels.values())) == len(kinds):
        return labels
    # Encoder and decoder blocks both have a q. Stacks differ where they begin, so their shortest beginning is taken.
    stacks = [_backwards(stack) for stack in names_in]
    for stack, name in kinds:
        start = _backwards(_ending(_backwards(stack), stacks))
        labels[stack, name] = f"{start} {_ending(name, names_in[stack])}".strip()
    return labels


def _ending(text: str, others: Collection[str]) -> str:
    """Return the shortest ending, at a dot, that only one of the others has: `text` itself is one of them."""
    parts = text.split(".")
    for length in range(1, len(parts) + 1):
        ending = ".".join(parts[-length:])
        # Dots in front: up_proj is no ending of gate_up_proj.
        if sum(f".{other}".endswith(f".{ending}") for other in others) == 1:
            return ending
    return text


def _backwards(text: str) -> str:
    return ".".join(reversed(text.split(".")))


def by_purpose(modules: Mapping[str, nn.Module], linear: Collection[str]) -> dict[str, list[str]]:
    """Sort linear layers by what they are for; cross-attention is a part of attention.

    A layer belongs to an attention if a module around it is one, by its class or attribute. Any other layer belongs to
    an MLP if its name within a block says so; a block is a member of a numbered row of modules, some of which have an
    attention. Embeddings, heads, poolers, projections between the towers of a model, routers, and layers that modulate
    norms are neither.
    """
    is_cross: dict[str, bool] = {}  # of each attention
    for name, module in modules.items():
        if _is_attention(name, module):
            is_cross[name] = _is_cross(name, module)
    stacks = _stacks_around(is_cross)
    layers: dict[str, list[str]] = {ATTENTION: [], CROSS_ATTENTION: [], MLP: []}
    for name in linear:
        # Attentions nest: EncDecAttention stands in a layer that is an attention by its class.
        attentions = []
        for owner in _owners(name):
            if owner in is_cross:
                attentions.append(is_cross[owner])
        block = _block_in(stacks, name)
        if attentions:
            layers[ATTENTION].append(name)
        # By the name within the block: names above it describe more than this layer.
        elif block is not None and _MLP.search(name.removeprefix(f"{block}.")) and not _ROUTER.search(name):
            layers[MLP].append(name)
        if any(attentions):
            layers[CROSS_ATTENTION].append(name)
    return layers


def _stacks_around(names: Iterable[str]) -> set[str]:
    """Name the numbered rows of modules, such as model.layers, that some modules are in."""
    stacks = set()
    for name in names:
        for owner in _owners(name):
            if _is_numbered(owner):
                stacks.add(owner.rpartition(".")[0])
    return stacks


def _block_in(stacks: Collection[str], name: str) -> str | None:
    """Name the innermost member of a numbered row that a module is in, such as model.layers.3."""
    for owner in _owners(name):
        if _is_numbered(owner) and owner.rpartition(".")[0] in stacks:
            return owner
    return None


def cross_inputs(modules: Mapping[str, nn.Module]) -> set[str]:
    """Name the layers that make keys and values of cross-attention: they read what an encoder has computed."""
    # Of all modules, not of linear layers alone: it is the names that decide here.
    return set(filter(_KEY_OR_VALUE.search, by_purpose(modules, modules)[CROSS_ATTENTION]))


def _owners(name: str) -> Iterator[str]:
    """Yield the names of the modules around a module, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _is_numbered(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()


def _is_attention(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__
    by_attribute = _ATTRIBUTE.search(name.rpartition(".")[2]) and not _BLOCK.search(kind)
    has_parts = next(module.children(), None) is not None
    return has_parts and bool(_CLASS.search(kind) or by_attribute)


def _is_cross(name: str, module: nn.Module) -> bool:
    flag = getattr(module, "is_cross_attention", None)  # diffusers, BERT, GPT-2
    if isinstance(flag, bool):
        return flag
    return bool(_CROSS.search(name.rpartition(".")[2]) or _CROSS.search(type(module).__name__))
