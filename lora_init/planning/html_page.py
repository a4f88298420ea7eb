"""Parts of a one-file HTML page without outside resources: shell, tables, heat maps of ranks, plots as inline SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from lora_init.layers.grid import layer_grid
from lora_init.planning.plan_plots import rank_color, text_color


def html_page(title: str, style: str, body: str) -> str:
    """Put a body into a page that may load nothing.

    Args:
        title: Text.
        style: CSS.
        body: HTML.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def html_table(head: Sequence[str], rows: Sequence[Sequence[object]], name: str = "totals") -> str:
    """Write a table, of class `name`, that scrolls sideways where the page is too narrow."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{name}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def html_heat_map(ranks: Mapping[str, int], about: Callable[[str], str]) -> str:
    """Write ranks as a table, blocks from top to bottom, coloured by rank.

    Args:
        ranks: Layer name to rank.
        about: What to say of a layer when a pointer rests on it.
    """
    grid = layer_grid(ranks)
    rows = []
    for block in grid.blocks:
        cells = [_cell(ranks, grid.cells.get((kind, block)), about) for kind in grid.kinds]
        rows.append(f"<tr><th>{block if block >= 0 else ''}</th>{''.join(cells)}</tr>\n")
    top = "".join(f"<th>{escape(kind)}</th>" for kind in grid.kinds)
    head = f"<thead><tr><th></th>{top}</tr></thead>"
    return f'<div class="scroll"><table class="map">{head}<tbody>\n{"".join(rows)}</tbody></table></div>'


def _cell(ranks: Mapping[str, int], name: str | None, about: Callable[[str], str]) -> str:
    if name is None:
        return "<td></td>"
    said = f'title="{escape(about(name), quote=True)}"'
    if not ranks[name]:
        return f"<td {said}>·</td>"
    color = rank_color(ranks[name], ranks)
    return f'<td style="background:{color};color:{text_color(color)}" {said}>{ranks[name]}</td>'


def inline_svg(draw: Callable[[Any], None], width: float, height: float, prefix: str) -> str:
    """Draw on axes of width x height inches and return the <svg> element, with ids that no other on the page has."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure.add_subplot())
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration, which has no place within HTML
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return svg.strip()
