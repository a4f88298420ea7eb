"""The report of a comparison: report.html, report.md and pictures, from settings.json and runs.jsonl."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from lora_init.comparison.plots import DARK, Picture, pictures, rank_maps, rank_picture
from lora_init.comparison.runs import read_runs, read_settings
from lora_init.comparison.tables import RunTable, Summary, summarise
from lora_init.errors import LoraInitError
from lora_init.files import write_whole
from lora_init.planning.pictures import html_heat_map, html_page, html_table

# What is shown in which order; a name stands for a picture and for a table, where there are such.
_ORDER = (
    "learning_curves", "learning_rates", "regret", "differences", "best", "before", "metrics", "scale", "cost",
    "forgetting",
)  # fmt: skip

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --soft: #f3f4f6; --line: #c9ccd1; --quiet: #5b6168;
  --better: #00685a; --worse: #b03a00; LIGHT }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --soft: #1f2429; --line: #444b53; --quiet: #a4abb3;
  --better: #45cdb3; --worse: #ff9a62; DARK } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--c1a1a1a); background: var(--page); margin: 0 auto;
  padding: 1rem; max-width: 78rem; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2rem 0 .2rem; }
h3 { font-size: .95rem; margin: .3rem 0; max-width: 18rem; }
p { margin: .3rem 0 .8rem; max-width: 50rem; overflow-wrap: anywhere; } .quiet { color: var(--quiet); }
.headline { font-size: 1.1rem; font-weight: 600; }
ul { padding: 0; margin: .5rem 0; max-width: 58rem; list-style: none; }
li { overflow-wrap: anywhere; padding: .2rem .7rem; margin: .35rem 0; border-left: 4px solid var(--line); }
li.better { border-color: var(--better); } li.worse { border-color: var(--worse); }
.number { white-space: nowrap; }
.notes li { border-left-width: 1px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; }
.totals td, .totals th { padding: .2rem 1rem .2rem 0; text-align: right; vertical-align: top; }
.totals td { white-space: nowrap; border-bottom: 1px solid var(--soft); }
.totals td:first-child, .totals th:first-child { text-align: left; position: sticky; left: 0;
  background: var(--page); }
.totals th { font-weight: 600; border-bottom: 1px solid var(--line); vertical-align: bottom; }
.settings td { padding: .2rem 1rem .2rem 0; vertical-align: top; border-bottom: 1px solid var(--soft);
  overflow-wrap: anywhere; } .settings td:first-child { color: var(--quiet); white-space: nowrap; }
.map td { min-width: 1.9rem; height: 1.2rem; text-align: center; font-size: .78rem; border: 1px solid var(--line); }
.map thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; font-weight: 500;
  font-size: .8rem; padding: .3rem 0; }
.map tbody th { font-weight: 400; font-size: .75rem; color: var(--quiet); text-align: right; padding-right: .4rem; }
.maps { display: flex; flex-wrap: wrap; gap: 1rem 2rem; } .maps div { max-width: 100%; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: .6rem; }
@media (max-width: 32rem) { .panels { grid-template-columns: 1fr 1fr; gap: .3rem; }
  .totals td:first-child { white-space: normal; min-width: 6.5rem; } }
figure { margin: 0; } .single { max-width: 34rem; }
svg { width: 100%; height: auto; display: block; }
"""


def write_report(directory: str | Path) -> list[Path]:
    """Write report.html, report.md and the pictures into the directory of a comparison, from what ended so far.

    Args:
        directory: Has settings.json, and runs.jsonl if a run has ended.

    Returns:
        The files.

    Raises:
        LoraInitError: settings.json is missing or damaged, runs of more tasks than one, or a file can't be written.
    """
    directory = Path(directory).expanduser()
    settings = read_settings(directory)
    summary = summarise(read_runs(directory), settings)
    drawn = pictures(summary)
    ranks = rank_picture(summary.groups)
    files = {f"{picture.name}.png": picture.png() for picture in [*drawn, *([ranks] if ranks else [])]}
    files["report.md"] = _markdown(summary, drawn, ranks, settings).encode()
    files["report.html"] = _html(summary, drawn, settings).encode()
    try:
        for name, content in files.items():
            write_whole(directory / name, content)
    except OSError as error:
        raise LoraInitError(f"{directory}: the report can't be written: {error.strerror or error}.") from error
    return [directory / name for name in files]


def _html(summary: Summary, drawn: list[Picture], settings: Mapping[str, Any]) -> str:
    tables = {table.name: table for table in summary.tables}
    verdicts = "".join(f'<li class="{v.outcome.split()[0]}">{_unbroken(v.sentence)}</li>\n' for v in summary.verdicts)
    notes = "".join(f"<li>{_unbroken(note)}</li>\n" for note in summary.notes)
    body = [
        f"<h1>{escape(summary.title)}</h1>",
        f'<p class="headline">{escape(summary.headline)}</p>',
        f"<ul>\n{verdicts}</ul>" if verdicts else "",
        f'<h2>What else to know</h2>\n<ul class="notes">\n{notes}</ul>' if notes else "",
        *_html_parts({picture.name: picture for picture in drawn}, tables),
        _html_ranks(summary),
        _html_table(tables["runs"]) if "runs" in tables else "",
        "<h2>Settings</h2>",
        html_table(("", ""), list(_flat(settings)), "settings"),
    ]
    colors = [" ".join(f"--c{light[1:]}: {pair[i]};" for light, pair in _pairs()) for i in (0, 1)]
    style = _STYLE.replace("LIGHT", colors[0]).replace("DARK", colors[1])
    return html_page(summary.title, style, "\n".join(filter(None, body)))


def _unbroken(text: str) -> str:
    """Write text so that no line ends within a number."""
    return re.sub(r"\b(\d+ %|[\d.]+e-\d+)", r'<span class="number">\1</span>', escape(text))


def _pairs() -> Iterator[tuple[str, tuple[str, str]]]:
    yield from ((light, (light, dark)) for light, dark in DARK.items())


def _html_parts(drawn: Mapping[str, Picture], tables: Mapping[str, RunTable]) -> Iterator[str]:
    for name in _ORDER:
        if name in drawn:
            picture = drawn[name]
            yield f"<h2>{escape(picture.title)}</h2>\n<p>{escape(picture.caption)}</p>\n{picture.html()}"
        if name in tables:
            yield _html_table(tables[name], heading=name not in drawn)


def _html_table(table: RunTable, heading: bool = True) -> str:
    title = f"<h2>{escape(table.title)}</h2>\n" if heading else ""
    return f"{title}<p>{escape(table.caption)}</p>\n{html_table(table.head, table.rows)}"


def _html_ranks(summary: Summary) -> str:
    maps = [
        f"<div><h3>{escape(label)}</h3>{html_heat_map(ranks, partial(_about, ranks))}</div>"
        for label, ranks in rank_maps(summary.groups).items()
    ]
    if not maps:
        return ""
    return (
        "<h2>Rank of each layer</h2>\n<p>For the starts that move ranks, in the run with the first seed; blocks from "
        f'top to bottom, a dot is a layer without an adapter.</p>\n<div class="maps">{"".join(maps)}</div>'
    )


def _about(ranks: Mapping[str, int], name: str) -> str:
    return f"{name}: rank {ranks[name]}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Write nested settings as rows of name and value."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _markdown(summary: Summary, drawn: list[Picture], ranks: Picture | None, settings: Mapping[str, Any]) -> str:
    tables = {table.name: table for table in summary.tables}
    by_name = {picture.name: picture for picture in drawn}
    parts = [f"# {_plain(summary.title)}", f"**{_plain(summary.headline)}**"]
    parts += [_bullets([verdict.sentence for verdict in summary.verdicts])]
    parts += ["## What else to know", _bullets(summary.notes)] if summary.notes else []
    for name in (*_ORDER, "ranks", "runs"):
        picture = ranks if name == "ranks" else by_name.get(name)
        if picture:
            parts += [f"## {picture.title}", f"![{picture.title}]({picture.name}.png)", _plain(picture.caption)]
        if name in tables:
            table = tables[name]
            parts += [] if picture else [f"## {table.title}"]
            parts += [_plain(table.caption), _markdown_table(table.head, table.rows)]
    parts += ["## Settings", _markdown_table(("setting", "value"), list(_flat(settings)))]
    return "\n\n".join(filter(None, parts)) + "\n"


def _bullets(sentences: list[str]) -> str:
    return "\n".join(f"- {_plain(sentence)}" for sentence in sentences)


def _markdown_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *(map(_plain, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Keep Markdown from reading signs in text as its own."""
    return re.sub(r"([\\`*_\[\]<>|#$~])", r"\\\1", " ".join(text.split()))
