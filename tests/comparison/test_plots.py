"""Pictures of a comparison: labels stand apart, and no mark hides another."""

import io
from itertools import pairwise

import numpy as np
import pytest
from matplotlib import style
from matplotlib.colors import is_color_like

from lora_init.comparison import plots
from lora_init.comparison.findings import summarise
from lora_init.comparison.runs import run_table
from tests.comparisons import broken, exact, record, settings

OWN = {"random": 1.6e-3, "eva": 1.2e-3, "natural-gradient": 1.4e-3}


@pytest.fixture
def rates(monkeypatch):
    """The picture of losses by rate, drawn: three starts with rates of their own, all unstable at the highest."""
    records = [
        record(start, float(f"{rate * factor:.2g}"), seed, 0.17 + 0.02 * abs(factor - 1))
        for start, rate in OWN.items() for factor in (1 / 9, 1 / 3, 1, 3, 9) for seed in (0, 1)
    ]  # fmt: skip
    records += [broken("unstable", "NaN", start=start, rate=0.1, seed=seed) for start in OWN for seed in (0, 1)]
    monkeypatch.setattr(plots, "_saved", lambda figure, kind: figure)
    figure = plots.pictures(summarise(records, settings(starts=[*OWN])))["learning_rates"]["png"]
    figure.draw_without_rendering()
    return figure


@pytest.mark.slow
def test_labels_of_rates_do_not_overprint_and_best_rates_have_one(rates):
    for axes, best in zip(rates.axes, ("1.2e-3", "1.4e-3"), strict=True):
        labels = axes.get_xticklabels()
        boxes = [label.get_window_extent() for label in labels]
        assert all(one.x1 <= other.x0 for one, other in pairwise(boxes)) and len(boxes) >= 5
        assert best in [label.get_text() for label in labels]
        assert axes.get_xlim() == pytest.approx((1.3e-4 / 1.6, 0.1 * 1.6))  # all rates, with room beside them


def test_no_cross_hides_another(rates):
    for axes in rates.axes:
        crosses = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_marker() == "x"]
        (one, other) = (axes.transData.transform(points[0]) for points in crosses)
        assert abs(one[1] - other[1]) > 6 * rates.dpi / 72  # the size of a cross, in points
        assert all(axes.get_ylim()[0] < y < axes.get_ylim()[1] for points in crosses for _, y in points)


@pytest.fixture
def figures(monkeypatch):
    """Of runs whose numbers are known, by name; with `dialed` as if each adapter was evaluated at three strengths."""
    monkeypatch.setattr(plots, "_saved", lambda figure, kind: figure)

    def draw(dialed=False, seeds=(0, 1, 2)):
        runs = [run for run in exact() if run["seed"] in seeds]
        for run in runs:
            if dialed and run["status"] == "finished":
                loss, kept = run["report_loss"][-1], run["retain_loss"][-1]
                run["dial"] = [[s, loss + 0.01 * (1 - s), 3.0 + (kept - 3.0) * s] for s in (0.0, 0.5, 1.0)]
        asked = settings(starts=["random", "eva", "eva+2-batches", "pissa", "full"])
        return {name: kinds["svg"] for name, kinds in plots.pictures(summarise(runs, asked)).items()}

    return draw


def panels(figure):
    """Title and lines with a label of each panel: label to points."""
    shown = [axes for axes in figure.axes if axes.get_visible()]
    lines = [[line for line in axes.get_lines() if not line.get_label().startswith("_")] for axes in shown]
    titles = [axes.get_title() for axes in shown]
    return dict(zip(titles, [{one.get_label(): one.get_xydata() for one in some} for some in lines], strict=True))


def labels(figure):
    """What is written below the panels, the same below each, and to the left of each of them."""
    shown = [axes for axes in figure.axes if axes.get_visible()]
    (below,) = {axes.get_xlabel() for axes in shown}
    return below, [axes.get_ylabel() for axes in shown]


def test_each_picture_has_a_panel_for_each_start_with_random_beside_it(figures):
    drawn = figures()
    assert {name: labels(figure) for name, figure in drawn.items()} == {
        "learning_curves": ("steps", ["loss", "", "loss"]),  # once in a row
        "learning_rates": ("learning rate", ["final loss", "", "final loss"]),
        "differences": ("final loss, start − random\n← start better · random better →", [""]),
        "forgetting": ("final loss", ["rise on other text", "", "rise on other text"]),
    }
    assert [*drawn] == ["learning_curves", "learning_rates", "differences", "forgetting"]
    beside = {"eva": ["random", "eva", "eva+2-batches"], "pissa": ["random", "pissa"], "full": ["random", "full"]}
    for name in ("learning_curves", "learning_rates", "forgetting"):
        assert {title: [*lines] for title, lines in panels(drawn[name]).items()} == beside
        assert [text.get_text() for text in drawn[name].legends[0].get_texts()] == [
            "random", "eva", "eva+2-batches", "pissa", "full",
        ]  # fmt: skip
        assert len({axes.get_ylim() for axes in drawn[name].axes}) == 1
    of_eva = panels(drawn["learning_curves"])["eva"]["eva"]
    np.testing.assert_allclose(of_eva, [[20, 0.21], [40, 0.195], [60, 0.19]])
    of_eva = panels(drawn["learning_rates"])["eva"]["eva"]  # at 1e-2 runs were unstable
    np.testing.assert_allclose(of_eva, [[1e-4, 0.21], [1e-3, 0.19], [3e-3, 0.20]])
    of_eva = panels(drawn["forgetting"])["eva"]["eva"]
    np.testing.assert_allclose(of_eva, [[0.21, 0.01], [0.19, 0.1], [0.20, 0.3]], atol=1e-9)
    (axes,) = drawn["differences"].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["eva", "eva\n+2-batches", "pissa"]
    points = [line.get_xydata() for line in axes.get_lines()]
    found = {tuple(one[:, 1]): one[:, 0] for one in points[1:]}
    for y, shift in enumerate((-0.02, -0.01, 0.01)):
        for places in ((y + 0.22,) * 3, (y, y), (y,)):
            np.testing.assert_allclose(found[places], [shift] * len(places), atol=1e-8)
    assert axes.get_ylim() == (2.5, -0.6) and points[0][:, 0].tolist() == [0, 0]


def test_of_one_seed_each_mean_is_hollow_and_has_no_interval(figures):
    (axes,) = figures(seeds=[0])["differences"].axes
    found = [(line.get_xydata().tolist(), line.get_markerfacecolor()) for line in axes.get_lines()[1:]]
    shifts = [-0.02, -0.01, 0.01]
    pairs, means = found[::2], found[1::2]
    assert [points for points, _ in pairs] == [[[pytest.approx(x), y + 0.22]] for y, x in enumerate(shifts)]
    assert means == [([[pytest.approx(x), y]], "none") for y, x in enumerate(shifts)]
    low, high = axes.get_xlim()
    assert -0.022 - 1e-9 <= low < -0.02 and 0.01 < high <= 0.022 + 1e-9


def test_what_is_forgotten_is_drawn_where_it_is_known(monkeypatch):
    monkeypatch.setattr(plots, "_saved", lambda figure, kind: figure)
    runs = [record("random"), record("eva", retain_loss=None), record("eva", seed=1)]
    drawn = plots.pictures(summarise(runs, settings()))["forgetting"]["svg"]
    np.testing.assert_allclose(panels(drawn)["eva"]["eva"], [[0.17, 0.04]])
    unknown = [run | {"retain_loss": None} for run in runs]
    assert "forgetting" not in plots.pictures(summarise(unknown, settings()))


def test_a_picture_is_the_same_whatever_style_its_user_has():
    made = []
    for theirs in ("default", "dark_background"):
        with style.context(theirs):
            made.append(plots._saved(plots._draw(["a"], 1.0, lambda axes, _: axes.plot([1.0, 2.0])), "png"))
    assert made[0] == made[1]


@pytest.mark.slow
def test_with_strengths_a_picture_has_the_least_rise_at_each_task_loss(figures):
    drawn = figures(dialed=True)
    drawn["frontiers"].savefig(io.BytesIO(), dpi=20)  # the others are rendered for a report
    assert [*drawn] == ["learning_curves", "learning_rates", "differences", "frontiers"]
    rise = "rise on other text"
    assert labels(drawn["frontiers"]) == ("task loss, %\nabove random's", [rise, "", rise])
    lines = panels(drawn["frontiers"])["eva"]
    assert [*lines] == ["random", "eva", "eva+2-batches"]
    x, y = lines["eva"].T
    np.testing.assert_allclose(x, np.arange(-10, 13) / 2)
    # Random ends at 0.2 to 0.22 and eva 0.02 below: at 5 % less than random's loss on every seed at some strength.
    assert np.isfinite(y).all() and (np.diff(y) <= 1e-12).all() and y[0] > y[-1] >= 0.0
    random = lines["random"][:, 1]
    assert np.isnan(random[:10]).all() and random[10] == pytest.approx(0.1)


def test_a_start_keeps_its_color_however_it_is_run():
    names = ["random", "a", "a+32-alpha", "b", "full", "a+2-batches", "random+9-steps", "a"]
    looks = plots.looks(names)
    assert [*looks] == names[:-1]
    assert {looks[name][:2] for name in ("a", "a+32-alpha", "a+2-batches")} == {(plots.COLORS[0], "o")}
    assert [looks[name][2:] for name in ("a", "a+32-alpha", "a+2-batches")] == [
        ("-", "full"),
        ("--", "none"),
        (":", "left"),
    ]
    assert looks["b"] == (plots.COLORS[1], "^", "-", "full")
    assert looks["random"] == (plots.RANDOM_COLOR, "s", "-", "full") and looks["full"][:2] == (plots.INK, "*")
    assert looks["random+9-steps"] == (plots.RANDOM_COLOR, "s", "--", "none")
    many = plots.looks([f"s{i}" for i in range(43)]).values()
    assert len({look[:2] for look in many}) == 42 and len({look.color for look in [*many][:6]}) == 6


def test_colors_are_colors():
    assert all(map(is_color_like, (*plots.COLORS, plots.INK, plots.RANDOM_COLOR)))


def test_what_is_drawn_has_room_around_it_and_labels_stand_apart():
    for ends, room in (((1.0, 3.0), (0.8, 3.2)), ((2.0, 2.0), (1.9, 2.1)), ((-2, -2), (-2.1, -1.9)), ((0, 0), (-1, 1))):
        assert plots._with_room(*ends, 0.1) == pytest.approx(room)
    assert plots._apart([3.0, 1.0, 1.05, 2.9, 1.1, 9.0], 1.1) == [1.0, 1.1, 3.0, 9.0]


def test_rates_far_above_the_others_are_cut_off_in_the_picture():
    ends = {1e-5: 9.0, 1e-4: 0.3, 1e-3: 0.2, 3e-3: 0.25, 1e-2: 0.4}
    runs = [record("eva", rate, seed, end + 0.01 * seed) for rate, end in ends.items() for seed in (0, 1)]
    # The lowest mean is 0.205, the median 0.305: means up to 0.605 are drawn, of which 0.41 is the highest run.
    low, high = plots._rate_limits(run_table(runs))
    assert (low, high) == pytest.approx((0.2 - 0.08 * 0.21, 0.41 + 0.08 * 0.21))


@pytest.fixture
def draw(monkeypatch):
    """Draw the pictures of any runs: figures by name."""
    monkeypatch.setattr(plots, "_saved", lambda figure, kind: figure)
    return lambda runs: {name: kinds["svg"] for name, kinds in plots.pictures(summarise(runs, settings())).items()}


def test_of_random_alone_there_are_pictures_without_a_legend(draw):
    drawn = draw([record(seed=seed) for seed in (0, 1)])
    assert [*drawn] == ["learning_curves", "learning_rates", "forgetting"]
    assert all([*panels(figure)] == ["random"] and not figure.legends for figure in drawn.values())


@pytest.mark.parametrize(("points", "is_drawn"), [([0, 60], False), ([0, 30, 60], True)])
def test_a_curve_is_drawn_from_two_points_on(points, is_drawn, draw):
    losses = [2.3, *[0.2] * (len(points) - 1)]
    assert ("learning_curves" in draw([record(evaluation_points=points, report_loss=losses)])) == is_drawn


@pytest.mark.slow
def test_strengths_are_drawn_where_one_start_has_none(draw):
    runs = exact()
    for run in runs:
        if run["status"] == "finished" and run["start"] != "pissa":  # whose base is changed
            run["dial"] = [[1.0, run["report_loss"][-1], run["retain_loss"][-1]]]
    drawn = draw(runs)
    assert "frontiers" in drawn and "forgetting" not in drawn


def test_differences_are_in_per_cent_of_the_loss_of_random_above(figures):
    figure = figures()["differences"]
    figure.draw_without_rendering()
    (axes,) = figure.axes
    (above,) = axes.child_axes
    assert above.get_xlim() == pytest.approx([100 * x / 0.21 for x in axes.get_xlim()])
    there, back = above._functions
    assert (there(0.021), back(10.0)) == pytest.approx((10.0, 0.021))


def test_runs_without_any_difference_have_a_picture(draw):
    (axes,) = draw([record(start, seed=seed) for start in ("random", "eva") for seed in range(3)])["differences"].axes
    low, high = axes.get_xlim()
    assert low < 0.0 < high


@pytest.mark.parametrize("place", [1, 4])
@pytest.mark.slow
def test_an_interval_far_longer_than_others_leaves_the_picture_but_no_pair_does(place, draw):
    """Whether its start is the first or the last."""
    starts = ["random", "a", "b", "c"]
    shifts = {start: [0.001 * ((seed * k) % 3) for seed in range(4)] for k, start in enumerate(starts)}
    shifts["wide"] = [0.0, 0.0, 0.05, 0.0]
    starts.insert(place, "wide")
    runs = [record(start, seed=seed, final=0.2 + shifts[start][seed] + 0.01 * seed)
            for start in starts for seed in range(4)]  # fmt: skip
    (axes,) = draw(runs)["differences"].axes
    low, high = axes.get_xlim()
    pairs = [x for line in axes.get_lines() if line.get_marker() == "." for x in line.get_xdata()]
    assert high == pytest.approx(1.1 * max(pairs)) and low == -high
    ends = [max(line.get_xdata()) for line in axes.get_lines() if line.get_linewidth() == 1.8]
    assert max(ends) > high > sorted(ends)[-2]


def test_a_run_at_a_best_rate_is_shown_however_high_it_ends():
    runs = [record("eva", rate, seed, end) for rate, ends in
            {1e-4: (0.3, 0.3), 3e-4: (0.31, 0.31), 1e-3: (0.1, 0.9), 3e-3: (9.0, 9.0), 1e-2: (0.32, 0.32)}.items()
            for seed, end in enumerate(ends)]  # fmt: skip
    for run in runs:
        run["selection_loss"] = 0.1 if run["learning_rate"] == 1e-3 else 1.0
    low, high = plots._rate_limits(run_table(runs))
    assert (low, high) == pytest.approx((0.1 - 0.08 * 0.8, 0.9 + 0.08 * 0.8))


def test_dots_beyond_the_picture_are_left_out_and_many_rates_are_written_upright(draw):
    ends = {1e-5: 9.0, 1e-4: 0.3, 1e-3: 0.2, 3e-3: 0.25, 1e-2: 0.4}
    runs = [record("eva", rate, seed, end + 0.01 * seed) for rate, end in ends.items() for seed in (0, 1)]
    (axes,) = draw(runs)["learning_rates"].axes
    (dots,) = (line.get_ydata() for line in axes.get_lines() if line.get_marker() == ".")
    assert len(dots) == 8 and max(dots) == pytest.approx(0.41)
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {90.0}
    few = [run for run in runs if 1e-5 < run["learning_rate"] < 1e-2]
    (axes,) = draw(few)["learning_rates"].axes
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {0.0} and len(axes.get_xticklabels()) == 3
    assert not len(axes.get_xticks(minor=True))


def test_a_long_name_is_broken_above_its_panel():
    figure = plots._draw(["one-start+of-my-own+and-yours"], 1.0, lambda axes, name: axes.plot([1.0], label=name))
    assert figure.axes[0].get_title() == "one-start +of-my-own\n+and-yours"


def test_a_picture_holds_no_date_and_no_program_and_is_large_enough_to_print():
    made = plots._draw(["a"], 1.0, lambda axes, _: axes.plot([1.0, 2.0]))
    svg, png = plots._saved(made, "svg"), plots._saved(made, "png")
    assert b"<svg" in svg and b"dc:date" not in svg and b"Software" not in png
    width, height = (int.from_bytes(png[place : place + 4], "big") for place in (16, 20))
    assert (width, height) == (860, 280)  # 4.3 to 1.4 inches
    again = plots._draw(["a"], 1.0, lambda axes, _: axes.plot([1.0, 2.0]))
    assert plots._saved(again, "svg") == svg
