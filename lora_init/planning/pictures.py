"""Pictures of a plan as a file's name asks for: .png, .svg, or one .html page without outside resources."""

from __future__ import annotations

from functools import partial
from html import escape
from pathlib import Path

from lora_init.errors import LoraInitError
from lora_init.layers.grid import layer_grid
from lora_init.planning.html_page import html_heat_map, html_page, html_table, inline_svg
from lora_init.planning.plan import RankAllocation
from lora_init.planning.plan_numbers import (
    budget_curves,
    kind_spectra,
    kind_totals,
    plan_text,
    source_text,
    uniform_twin,
)
from lora_init.planning.plan_plots import draw_budget_curve, draw_spectra, save_figure, write_picture
from lora_init.statistics.statistics import Statistics

FORMATS = (".png", ".svg", ".html")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; padding: 1rem;
  max-width: 84rem; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
p { margin: .3rem 0 .8rem; max-width: 48rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
.totals td, .totals th { padding: .15rem .7rem .15rem 0; text-align: right; white-space: nowrap; }
.totals td:first-child, .totals th:first-child { text-align: left; }
.totals th { font-weight: 600; border-bottom: 1px solid #bbb; white-space: normal; vertical-align: bottom;
  min-width: 4rem; }
.map td { min-width: 2.1rem; height: 1.3rem; text-align: center; font-size: .8rem; border: 1px solid #e4e4e4; }
.map thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; font-weight: 500;
  font-size: .8rem; padding: .3rem 0; height: auto; }
.map tbody th { font-weight: 400; font-size: .75rem; color: #555; text-align: right; padding-right: .4rem; }
.columns { display: flex; flex-wrap: wrap; gap: 0 2.5rem; }
.left { flex: none; max-width: 100%; } .right { flex: 1 1 24rem; min-width: 0; }
.spectra { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .3rem; }
figure { margin: 0; } .curve { max-width: 38rem; }
svg { width: 100%; height: auto; display: block; }
li { overflow-wrap: anywhere; }
@media (max-width: 32rem) { .totals { font-size: .73rem; } .totals td, .totals th { padding-right: .4rem; }
  .totals th { min-width: 0; } .totals td:first-child { white-space: normal; } }
"""


def save_picture(plan: RankAllocation, stats: Statistics, path: str | Path) -> Path:
    """Draw a plan: heat map of ranks, spectra with the ranks marked, and what other budgets and policies explain.

    Args:
        plan: What to draw.
        stats: What it was made from.
        path: Ends in .png, .svg or .html.

    Raises:
        LoraInitError: Another ending, a plan for another model, or a file that cannot be written.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise LoraInitError(f"{path}: pictures are written as {', '.join(FORMATS)}. Name the file so.")
    if not plan.total_rank:
        raise LoraInitError("the plan gives no layer any rank, so there is nothing to draw.")
    plan.check(stats)
    if path.suffix.lower() == ".html":
        write_picture(path, lambda: path.write_text(_page(plan, stats), encoding="utf-8"))
    else:
        save_figure(plan, stats, path)
    return path


def _page(plan: RankAllocation, stats: Statistics) -> str:
    even = uniform_twin(plan, stats)
    model = plan.provenance.model_id or plan.provenance.model_class if plan.provenance else ""
    used = [rank for rank in plan.values() if rank]
    title = f"Rank plan{f' for {model}' if model else ''}"
    facts = [
        ("layers with an adapter", f"{len(used)} of {len(plan)}", f"{sum(rank > 0 for rank in even.values())}"),
        ("rank", f"{min(used)} to {max(used)}", f"{min(r for r in even.values() if r)} to {max(even.values())}"),
        ("total rank", f"{plan.total_rank:,}", f"{even.total_rank:,}"),
        ("parameters", f"{plan.parameters:,}", f"{even.parameters:,}"),
        ("saved in float32, MB", f"{plan.megabytes():.2f}", f"{even.megabytes():.2f}"),
        ("variance explained, mean", f"{plan.explained_variance:.1%}", f"{even.explained_variance:.1%}"),
    ]
    kinds = [
        (k.kind, k.n_layers, f"{k.least} to {k.most}", f"{k.total_rank:,}", f"{k.parameters:,}", f"{k.explained:.1%}")
        for k in kind_totals(plan)
    ]
    n_blocks = len(layer_grid(plan).blocks)
    spectra = "".join(
        f"<figure>{inline_svg(partial(draw_spectra, spectra=kind, n_blocks=n_blocks), 3.0, 2.2, f's{i}')}</figure>"
        for i, kind in enumerate(kind_spectra(plan, stats))
    )
    curves = budget_curves(plan, stats)
    curve = inline_svg(partial(draw_budget_curve, plan=plan, curves=curves), 4.4, 3.4, "curve")
    notes = "".join(f"<li>{escape(note)}</li>" for note in plan.notes)
    body = f"""<h1>{escape(title)}</h1>
<p>{escape(_sentence(plan_text(plan)))} Computed from {escape(source_text(plan))}.</p>
{html_table(("", "this plan", "uniform, same total rank"), facts)}
<div class="columns">
<section class="left">
<h2>Rank of each layer</h2>
<p>Blocks from top to bottom. A dot: no adapter.</p>
{html_heat_map(plan, partial(_about, plan))}
</section>
<section class="right">
<h2>What the ranks explain</h2>
<p>Share of a layer's variance (upwards) that its first components (to the right) explain: a line per block, the first
dark, the last light. The dot is the rank the layer has.</p>
<div class="spectra">{spectra}</div>
<h2>Other budgets, other policies</h2>
<p>Mean share of the variance explained, for the parameters spent, under the same limits.</p>
<figure class="curve">{curve}</figure>
<h2>By kind of layer</h2>
{html_table(("kind", "layers", "rank", "total rank", "parameters", "explained"), kinds)}
{f"<h2>Notes</h2><ul>{notes}</ul>" if notes else ""}
</section>
</div>"""
    return html_page(title, _STYLE, body)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _about(plan: RankAllocation, name: str) -> str:
    about = f"{name}: rank {plan[name]}, explains {plan.explained[name]:.1%} of its variance"
    if name in plan.unsettled:
        about += "; within the sampling error it could be {} to {}".format(*plan.unsettled[name])
    return about
