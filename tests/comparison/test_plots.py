"""Pictures of a comparison: labels stand apart, and no mark hides another."""

from itertools import pairwise

import pytest

from lora_init.comparison import plots
from lora_init.comparison.findings import summarise
from tests.comparisons import broken, record, settings

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


def test_labels_of_rates_do_not_overprint_and_best_rates_have_one(rates):
    for axes, best in zip(rates.axes, ("1.2e-3", "1.4e-3"), strict=True):
        labels = axes.get_xticklabels()
        boxes = [label.get_window_extent() for label in labels]
        assert all(one.x1 <= other.x0 for one, other in pairwise(boxes)) and len(boxes) >= 5
        assert best in [label.get_text() for label in labels]


def test_no_cross_hides_another(rates):
    for axes in rates.axes:
        crosses = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_marker() == "x"]
        (one, other) = (axes.transData.transform(points[0]) for points in crosses)
        assert abs(one[1] - other[1]) > 6 * rates.dpi / 72  # the size of a cross, in points
        assert all(axes.get_ylim()[0] < y < axes.get_ylim()[1] for points in crosses for _, y in points)
