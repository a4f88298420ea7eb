"""Ranks in a terminal."""

import pytest
from rich.console import Console

from lora_init.cli.tables import facts, rank_table
from lora_init.planning.allocate import allocate_ranks
from tests.planning.made import llama_like


def printed(*renderables, width=100):
    console = Console(width=width, record=True, color_system=None, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    for renderable in renderables:
        console.print(renderable)
    return console.export_text()


@pytest.mark.parametrize(("n_blocks", "width"), [(2, 40), (30, 100), (80, 100), (80, 60)])
def test_the_terminal_shows_each_rank_once_in_as_many_bands_as_fit(n_blocks, width):
    plan = allocate_ranks(llama_like(n_blocks), rank=4, overrides={"layers.1.mlp.*": {"max_rank": 0}})
    lines = printed(rank_table(plan, width), width=width).splitlines()
    assert max(map(len, lines)) <= width
    shown = {}
    for line in lines:
        label, *cells = line.split() or [""]
        if label in ("q_proj", "k_proj", "up_proj", "down_proj"):
            shown.setdefault(label, []).extend(cells)
        elif label:
            shown.setdefault("blocks", []).extend([label, *cells])
    assert shown.pop("blocks") == [str(i) for i in range(n_blocks)]
    for kind, cells in shown.items():
        expected = [rank for name, rank in plan.items() if name.endswith(f".{kind}")]
        assert cells == [str(rank or "·") for rank in expected]


def test_square_brackets_in_a_path_are_no_markup():
    assert printed(facts({"file": "runs/[red]/s"})).split() == ["file", "runs/[red]/s"]
