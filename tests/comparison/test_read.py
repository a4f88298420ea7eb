"""What reports say and pictures draw has been read: a line, a number or a mark that changes shows here.

python -m tests.comparison.test_read  # writes tests/comparison/read.txt anew: read what changed
"""

import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from matplotlib.ticker import FixedLocator

from lora_init.comparison import plots
from lora_init.comparison.report import write_report
from tests.comparisons import broken, exact, planted, record, write

AGAIN = "If that is meant, run `python -m tests.comparison.test_read`, and read what changed."
KEPT = Path(__file__).with_name("read.txt")


def told():
    """With all that there is to tell: recommended rates, few examples, starts that failed or were not run."""
    rates = {"random": 1e-3, "eva": 1e-3, "pissa": 3e-3}
    starts = ["random", "eva", "eva+2-batches", "pissa", "olora", "full", "nobody"]
    about = dict(starts=starts, init="lora-init init m d", recommended=rates, kind="causal-lm", folds={"report": 99})
    return exact(), about | {"seeds": [0, 1, 2, 3]}


def dialed():
    """Runs that scatter, each at several strengths, on two machines; the best rate of one start is at the edge."""
    runs = planted({"eva": -0.01, "orthogonal": -0.002}, rates=(1e-4, 1e-3, 3e-3), spread=0.001)
    for number, run in enumerate(runs):
        loss, rise = run["report_loss"][-1], 30 * run["learning_rate"] + run["seed"] / 100
        run["retain_loss"] = [3.1, 3.1 + rise]
        run["dial"] = [[s, loss + 0.02 * (1 - s), 3.1 + rise * s] for s in (0.4, 0.7, 1.0)]
        run["circumstances"] = {"processor": "AB"[number % 2], "threads": 1, "versions": {"torch": "2.13.0"}}
        run["node"] = ["one", "two"][number % 2]
        if run["start"] == "orthogonal":
            run["report_loss"][-1] -= 20 * run["learning_rate"]
            run["selection_loss"] = run["report_loss"][-1]
    return runs, {"starts": ["random", "eva", "orthogonal"]}


def small():
    """Under a limit of time, on one seed but for two runs, of which a start hardly learned anything."""
    runs = planted({"eva": -0.01, "pissa": 0.0}, rates=(1e-3, 3e-3), seeds=(0,))
    runs = [run | {"retain_loss": None, "plain_loss": 0.5} for run in runs]
    runs += [record("lora-ga", final=0.4, gamma=32.0, plain_loss=0.5), record(seed=1, plain_loss=0.5)]
    runs += [broken("unstable", "NaN", start="olora", rate=3e-3)]
    return runs, {"size": {"tuned": False}, "budget": {"time": 600}, "starts": ["random", "eva", "pissa", "olora"]}


def nothing():
    """Before the first run has ended."""
    return [], {}


SETS = {"told": told, "dialed": dialed, "small": small, "nothing": nothing}


def numbers(values):
    return " ".join(f"{value:.4g}" for value in np.ravel(values) + 0.0)  # no minus zero


def drawn(figure, kind):
    """What is in a picture, as lines: its panels, their axes, lines, marks and bands."""
    lines = [f"{numbers(figure.get_size_inches())} inches"]
    for axes in figure.axes:
        if axes.get_visible():
            lines.append(f"panel {axes.get_title()!r}")
            lines += axis_of(axes, "x") + axis_of(axes, "y")
            lines += [mark(line) for line in axes.get_lines()]
            for band in axes.collections:
                color = numbers(band.get_facecolor().round(2))
                lines.append(f"  band {color}: {numbers(band.get_paths()[0].vertices)}")
            lines += [f"  above: {one.get_xlabel()!r}" for one in axes.child_axes]
    for legend in figure.legends:
        lines.append(f"legend {', '.join(text.get_text() for text in legend.get_texts())}")
    return "\n".join(lines).encode()


def axis_of(axes, which):
    axis, limits = getattr(axes, f"{which}axis"), getattr(axes, f"get_{which}lim")()
    lines = [f"  {which} {axis.get_label_text()!r}, {axis.get_scale()}, from {numbers(limits)}"]
    if isinstance(axis.get_major_locator(), FixedLocator):  # the others are matplotlib's
        labels = [label.get_text() for label in axis.get_ticklabels()]
        lines.append(f"  {which} has {labels} at {numbers(axis.get_ticklocs())}")
    return lines


def mark(line):
    name = line.get_label()
    if name.startswith("_"):
        name = "-"
    look = f"{line.get_color()} {line.get_linestyle()} {line.get_linewidth():g} {line.get_marker()}"
    filled = f"{line.get_markersize():g} {line.get_fillstyle()} {line.get_markerfacecolor()}"
    return f"  {name}: {look} {filled}: {numbers(line.get_xdata())} | {numbers(line.get_ydata())}"


def read():
    texts = []
    for name, make in SETS.items():
        runs, about = make()
        with tempfile.TemporaryDirectory() as place:
            directory = write(Path(place) / "runs", runs, **about)
            with patch.object(plots, "_saved", drawn):
                write_report(directory)
            texts.append(f"==== {name}: {make.__doc__}\n\n{(directory / 'report.md').read_text(encoding='utf-8')}")
            for file in sorted(directory.glob("*.png")):
                texts.append(f"== {file.name}\n{file.read_text(encoding='utf-8')}\n")
    return "\n".join(texts)


@pytest.mark.slow
def test_what_reports_say_and_pictures_draw_has_been_read():
    assert read().splitlines() == KEPT.read_text(encoding="utf-8").splitlines(), AGAIN


if __name__ == "__main__":
    KEPT.write_text(read(), encoding="utf-8")
