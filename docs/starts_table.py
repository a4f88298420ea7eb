"""Sphinx extension: put the registry of starts, as a table, in the place of `{{ starts }}` on a page."""

from typing import Any

from lora_init.adapters.starts import STARTS, Start

_NEEDS = {
    "bank": "a bank",
    "errors": "data and the float weights",
    "gradients": "labelled data",
    "inputs": "data",
    "weights": "the weights",
}


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", _fill_in)
    return {"parallel_read_safe": True}


def _fill_in(app: Any, page: str, source: list[str]) -> None:
    head = "| start | what it is | needs | before training | recommended |\n|---|---|---|---|---|\n"
    source[0] = source[0].replace("{{ starts }}", head + "\n".join(map(_row, STARTS)))


def _row(start: Start) -> str:
    before = "base changed" if start.changes_base else "output changed" if start.changes_output else "unchanged"
    rate = start.learning_rate
    advice = f"{start.scaling:g} x rank as alpha, {rate:.0e}".replace("e-0", "e-") if rate else "tune the rate"
    needs = next((words for need, words in _NEEDS.items() if need in start.needed), "–")
    return f"| `{start.name}` | {start.summary} | {needs} | {before} | {advice} |"
