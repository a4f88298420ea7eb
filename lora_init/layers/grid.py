"""Where a layer stands in a model: which block, and which kind of layer within it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.)")


@dataclass(frozen=True)
class LayerGrid:
    """Layers as kind x block.

    Attributes:
        kinds: Short labels that tell the kinds apart, in model order.
        blocks: Block numbers, rising; -1 stands for layers outside any block.
        cells: Names of layers by (kind, block); few models have more than one in a cell.
    """

    kinds: list[str]
    blocks: list[int]
    cells: dict[tuple[str, int], str]

    def of_kind(self, kind: str) -> dict[int, str]:
        """Name the layers of a kind by block."""
        return {block: self.cells[kind, block] for block in self.blocks if (kind, block) in self.cells}


def layer_grid(names: Iterable[str]) -> LayerGrid:
    """Arrange layers by the first number in their names, and by what is left of them.

    Example:
        >>> grid = layer_grid(["h.0.up", "h.0.down", "h.1.up"])
        >>> grid.kinds, grid.blocks, grid.cells["up", 1]
        (['up', 'down'], [0, 1], 'h.1.up')
    """
    places = {name: _place(name) for name in names}
    in_block: dict[int, list[tuple[str, str]]] = {}
    for kind, block in places.values():
        in_block.setdefault(block, []).append(kind)
    # A block with all kinds tells their order; the first one may lack some.
    fullest_first = sorted(in_block.values(), key=len, reverse=True)
    labels = _labels(list(dict.fromkeys(kind for kinds in fullest_first for kind in kinds)))
    cells = {(labels[kind], block): name for name, (kind, block) in places.items()}
    return LayerGrid(list(labels.values()), sorted({block for _, block in places.values()}), cells)


def _place(name: str) -> tuple[tuple[str, str], int]:
    """Split model.layers.3.mlp.up_proj into the kind (model.layers, mlp.up_proj) and the block 3."""
    match = _NUMBER.search(name)
    if match is None:
        return ("", name), -1
    return (name[: match.start()].rstrip("."), name[match.end() + 1 :]), int(match.group())


def _labels(kinds: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Give each kind the shortest ending that no other has; if stacks share an ending, after the name of the stack."""
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
