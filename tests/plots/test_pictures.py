"""Pictures of a plan: what is in them, for 1 to 80 blocks, and hostile names."""

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.layout_engine import ConstrainedLayoutEngine

from lora_init.errors import LoraInitError
from lora_init.planning.allocate import allocate_ranks
from lora_init.plots import pictures
from lora_init.plots.pictures import budget_curves, make_figure, picture_kind, save_picture
from tests.conftest import refused
from tests.planning.made import PLAIN, llama_like

# --- Figures --------------------------------------------------------------------------------------------------------


def every_axes(figure):
    return list(figure.axes)


@pytest.mark.parametrize("n_blocks", [1, 2, 30, 80])
def test_the_figure_has_all_layers_kinds_and_policies(n_blocks):
    stats = llama_like(n_blocks)
    plan = allocate_ranks(stats, rank=4)
    figure = make_figure(plan, stats)
    heat_map, *panels, curve = [axes for axes in every_axes(figure) if axes.get_visible()]
    assert [text.get_text() for text in heat_map.texts] == [str(rank or "·") for rank in plan.values()]
    assert [label.get_text() for label in heat_map.get_xticklabels()] == ["q_proj", "k_proj", "up_proj", "down_proj"]
    assert [label.get_text() for label in heat_map.get_yticklabels()] == [str(i) for i in range(n_blocks)]
    assert [axes.get_title().split(":")[0] for axes in panels] == ["q_proj", "k_proj", "up_proj", "down_proj"]
    for axes in panels:
        assert len(axes.lines) == 2 * n_blocks  # a curve and a dot for each block
        assert all(len(line.get_xdata()) == 9 and line.get_ydata()[0] == 0.0 for line in axes.lines[::2])
    ends = [(line.get_xdata()[0], line.get_ydata()[0]) for line in panels[0].lines[1::2]]
    assert ends == [(rank, pytest.approx(plan.explained[name])) for name, rank in plan.items() if "q_proj" in name]
    assert [line.get_label().split(":")[0] for line in curve.lines] == [*PLAIN, "this plan"]
    assert curve.lines[-1].get_xdata()[0] == plan.parameters
    assert any(text.endswith("a dot at its rank") for text in titles(figure))  # no kind is left out
    caption = " ".join(figure.get_supxlabel().split())
    assert "policy eva, budget rank=4" in caption and "some/model on some data: 500 rows in 5 batches" in caption
    # Nothing overlaps: a cell is at least as high as its text.
    heights = figure.get_figheight() * 72 * 0.8 / n_blocks
    assert heights >= 7
    # Beside a map that is taller than nine inches, panels stand two in a row, else four.
    assert panels[0].get_subplotspec().get_gridspec().get_geometry() == ((2, 2) if n_blocks == 80 else (1, 4))
    assert [*figure.get_size_inches()] == pytest.approx(
        {1: [12.84, 6.1], 2: [12.84, 6.1], 30: [12.84, 7.5], 80: [8.04, 16.0]}[n_blocks]
    )


def test_panels_show_what_is_explained_from_nothing_to_all_in_per_cent():
    stats = llama_like(2)
    plan = allocate_ranks(stats, rank=4, rho=2)
    figure = make_figure(plan, stats)
    _, *panels, curve = every_axes(figure)
    for axes, kind in zip(panels, ("q_proj", "k_proj", "up_proj", "down_proj"), strict=True):
        ranks = [rank for name, rank in plan.items() if name.endswith(f".{kind}")]
        assert axes.get_title() == f"{kind}: average rank {sum(ranks) / 2:.1f}"
        assert axes.get_ylim() == (0, 1.02) and axes.get_xlim()[0] == 0
        assert axes.yaxis.get_major_formatter()(0.5) == "50%"
        lines = axes.lines
        assert [line.get_color() for line in lines[::2]] == [line.get_color() for line in lines[1::2]]
        assert lines[0].get_color() != lines[2].get_color() and [line.get_marker() for line in lines[1::2]] == ["o"] * 2
    assert curve.get_xscale() == "log" and (curve.get_xlabel(), curve.get_ylabel()) == (
        "adapter parameters", "variance explained,\nmean over layers",
    )  # fmt: skip
    major, minor = curve.xaxis.get_major_formatter(), curve.xaxis.get_minor_formatter()
    assert [major(1000), minor(2000), minor(5e6), minor(3000)] == ["1k", "2k", "5M", ""]
    assert curve.yaxis.get_major_formatter()(0.25) == "25%"
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in curve.lines}
    assert len(looks) == len(curve.lines) == len(curve.get_legend().get_texts()) == len(PLAIN) + 1
    star = curve.lines[-1]
    assert star.get_label() == f"this plan: 4.6k, {plan.explained_variance:.1%}" and star.get_marker() == "*"
    assert star.get_xydata().tolist() == [[plan.parameters, plan.explained_variance]]


@pytest.fixture(scope="module")
def drawn():
    stats = llama_like(2)
    return make_figure(replace(allocate_ranks(stats, rank=4), policy="$^$"), stats)


def test_lines_are_thin_and_words_small_and_names_stand_as_they_are(drawn):
    _, *panels, curve = every_axes(drawn)
    assert {(axes.title.get_fontsize(), axes.title.get_parse_math()) for axes in panels} == {(9, False)}
    for axes in (*panels, curve):
        for axis in (axes.xaxis, axes.yaxis):
            assert axis.get_tick_params()["labelsize"] == 8 and axis.get_tick_params()["grid_alpha"] == 0.25
            assert axis.get_tick_params()["gridOn"]
    lines, dots = panels[0].lines[::2], panels[0].lines[1::2]
    assert {(line.get_linewidth(), line.get_alpha()) for line in lines} == {(0.7, 0.55)}
    edges = {(dot.get_markersize(), dot.get_markeredgecolor(), dot.get_markeredgewidth()) for dot in dots}
    assert edges == {(4, "black", 0.5)}
    *lines, star = curve.lines
    assert {(line.get_linewidth(), line.get_markersize()) for line in lines} == {(1.4, 3.5)}
    assert (star.get_markersize(), star.get_markeredgecolor(), star.get_color()) == (15, "white", "#CC0066")
    assert star.get_zorder() > max(line.get_zorder() for line in lines)
    assert curve.xaxis.label.get_fontsize() == curve.yaxis.label.get_fontsize() == 9
    minor = curve.xaxis.get_tick_params("minor")
    assert (minor["labelsize"], minor["grid_alpha"], minor["gridOn"]) == (8, 0.25, True)
    legend = curve.get_legend()
    assert {text.get_fontsize() for text in legend.get_texts()} == {8} and legend.get_frame().get_alpha() == 0.9


def test_what_stands_beside_and_below_the_pictures_has_room(drawn):
    left, right = drawn.subfigs
    upper, lower = right.subfigs
    sizes = [text.get_fontsize() for part in (left, upper, lower, drawn) for text in part.texts]
    assert sizes == [11, 10, 9, 10, 8]
    assert not drawn.texts[0].get_parse_math() and "policy $^$, " in drawn.get_supxlabel()
    assert [part.get_suptitle().count("\n") for part in (left, upper, lower)] == [0, 0, 0]  # there is room for a line
    assert drawn.get_supxlabel().count("\n") == 0 and upper.get_supxlabel() == "components"
    assert left.bbox.width / right.bbox.width == pytest.approx(2.64 / 10.2)
    assert upper.bbox.height / lower.bbox.height == pytest.approx(1.9 / 3.4)
    panels = [axes for axes in every_axes(drawn) if "average rank" in axes.get_title()]
    assert all(panels[0].get_shared_y_axes().joined(panels[0], other) for other in panels)
    assert isinstance(drawn.get_layout_engine(), ConstrainedLayoutEngine) and drawn.dpi == 110


def test_curves_have_what_each_policy_explains_from_an_eighth_of_the_parameters_to_all_components():
    stats = llama_like(2)
    limits = {"exclude": ["model.layers.1.mlp.up_proj"], "tie": ["q_proj", "k_proj"]}
    plan = allocate_ranks(stats, rank=2, rho=3, **limits)
    available = sum(8 * (target.in_features + target.out_features) for target in stats.targets.values()) - 8 * 192
    curves = budget_curves(plan, stats)
    assert [*curves] == PLAIN
    for policy, curve in curves.items():
        assert len(curve) > 10 and sorted(curve) == [*curve]
        least = allocate_ranks(stats, parameters=plan.parameters // 8, policy=policy, rho=3, **limits)
        assert (min(curve), max(curve)) == (least.parameters, available)
        for parameters, explained in curve.items():
            again = allocate_ranks(stats, parameters=parameters, policy=policy, rho=3, **limits)
            assert (again.parameters, again.explained_variance) == (parameters, explained)
    least = allocate_ranks(stats, rank=2, rho=3, min_rank=2)  # fewer parameters are no plan, and have no point
    for curve in budget_curves(least, stats).values():
        assert len(curve) > 5 and min(curve) >= least.parameters and max(curve) == available + 8 * 192
    small = allocate_ranks(stats, rank=1)  # rho is 1, at which there is nothing to decide
    curves = budget_curves(small, stats)
    assert max(curves["eva"]) <= 8 * small.parameters
    assert small.settings["rho"] == 1 and curves == budget_curves(
        replace(small, settings={**small.settings, "rho": 2.0}), stats
    )
    assert any(share != curves["uniform"].get(cost) for cost, share in curves["eva"].items())


def test_the_picture_has_its_text_as_text_and_is_the_same_each_time(tmp_path):
    stats = llama_like(2)
    plan = allocate_ranks(stats, rank=4)
    text = save_picture(plan, stats, tmp_path / "plan.svg").read_text(encoding="utf-8")
    assert "Rank of each layer" in text and "q_proj: average rank" in text
    assert not [word for word in ("<dc:date", "<dc:creator", "<dc:type", "<dc:format") if word in text]
    for again in ("again.svg", "AGAIN.SVG"):
        assert text == save_picture(plan, stats, tmp_path / again).read_text(encoding="utf-8")


def test_kinds_that_have_no_place_are_counted(monkeypatch):
    stats = llama_like(2)
    plan = allocate_ranks(stats, rank=4)
    monkeypatch.setattr(pictures, "_MOST_KINDS", 3)
    figure = make_figure(plan, stats)
    assert (
        len([axes for axes in every_axes(figure) if axes.get_visible()]) == 3 + 2
    )  # beside the heat map and the curve
    (title,) = (text for text in titles(figure) if text.startswith("Variance explained by the first"))
    assert title.endswith("a dot at its rank; 1 more kinds not shown")


def titles(figure):
    subfigures = [*figure.subfigs]
    for one in figure.subfigs:
        subfigures += one.subfigs
    return [" ".join(one.get_suptitle().split()) for one in subfigures]


def test_bad_input(tmp_path):
    stats = llama_like(2)
    plan = allocate_ranks(stats, rank=4)
    refused(r"pictures are written as \.png, \.svg", save_picture, plan, stats, tmp_path / "plan.pdf")
    with pytest.raises(LoraInitError, match=r"made for some/model .* another"):
        save_picture(plan, llama_like(2, fingerprint="f2"), tmp_path / "plan.png")
    nothing = replace(plan, ranks=dict.fromkeys(plan, 0))
    words = "^the plan gives no layer any rank, so there is nothing to draw.$"
    refused(words, save_picture, nothing, stats, tmp_path / "plan.png")
    assert not list(tmp_path.iterdir())
    assert [picture_kind(Path(f"a.b{ending}")) for ending in (".PNG", ".svg")] == ["PNG picture", "SVG picture"]
    for ending in ("png", "svg"):
        refused("cannot be written: No such file", save_picture, plan, stats, tmp_path / "no" / f"plan.{ending}")
