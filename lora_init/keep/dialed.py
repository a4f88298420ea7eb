"""What the dial found: the losses at each strength, the strengths that were chosen, and the adapter that has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_init.adapters.directory import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, card_header
from lora_init.files import digests_of, new_directory, read_json, write_json
from lora_init.layers.targets import PREFIX
from lora_init.planning.lora_config import alpha_for, to_patterns
from lora_init.serving.base import Base
from lora_init.serving.trained import DIAL_FILE, Trained, strength_of
from lora_init.serving.writers import write_peft

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE_FILE = "dial.png"
BEST = "best"  # the one strength with the least loss on the task, where the rule is about that loss
UNIFORM = "uniform"  # the best strength for all layers, where layers have their own
# What `new_directory` takes a directory for one of the dial's by, and which files it may then replace.
OURS: dict[str, Any] = {
    "marker": DIAL_FILE,
    "replaceable": (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, DIAL_FILE, PICTURE_FILE),
}


@dataclass(frozen=True)
class Point:
    """Strengths, and what they do on the examples to choose by.

    Attributes:
        strength: The one of all layers, or their mean.
        task: Loss on the task.
        rise: Loss on text to keep, above the base's.
        weight: What the loss on text to keep was multiplied by in the fit; None of one strength for all layers.
        layers: The strength of each layer.
    """

    strength: float
    task: float
    rise: float
    weight: float | None
    layers: Mapping[str, float]


@dataclass(frozen=True)
class Change:
    """A loss on held-out examples, and how far it is from another, with half of a 95 % interval."""

    loss: float
    change: float
    error: float

    def __str__(self) -> str:
        reference = self.loss - self.change
        share = ""
        if reference:  # a loss of 0 has no per cent
            share = f", {signed(100 * self.change / reference, 1)} %"
        return f"{self.loss:.3f} ({signed(self.change, 3)} ± {self.error:.3f}{share})"


def signed(number: float, digits: int) -> str:
    """Write a difference with its sign; one that rounds to nothing is +0."""
    # -0.0 + 0.0 is 0.0, so that no difference reads as -0.000.
    return f"{round(number, digits) + 0.0:+.{digits}f}"


@dataclass(frozen=True)
class Dial:
    """The strengths that `dial` chose, and what it measured.

    Attributes:
        rule: The rule that decided, in words.
        chosen: The strengths, with their losses on the examples to choose by.
        curve: Losses at one strength for all layers, rising from 0.
        fitted: Losses at strengths that were fitted for each layer.
        task: Loss on held-out examples of the task, compared with the loss of the adapter as trained: of the base, as
            trained, and as chosen; at the best strength for all layers if each layer has its own (`uniform`); at the
            strength with the lowest loss on the task if the rule limits that loss (`best`).
        keep: The same losses on held-out text to keep, compared with the base's.
        examples: Numbers of held-out examples of the task, and of texts to keep.
        notes: What a user should know, such as that no strength satisfies the rule.
        read: Numbers of examples of the task, and of texts to keep, that were read in all.
    """

    rule: str
    chosen: Point
    curve: tuple[Point, ...]
    fitted: tuple[Point, ...]
    task: Mapping[str, Change]
    keep: Mapping[str, Change]
    examples: tuple[int, int]
    notes: tuple[str, ...] = ()
    read: tuple[int, int] = (0, 0)

    @classmethod
    def unmeasured(cls, rule: str, layers: Mapping[str, float]) -> Dial:
        """Return a dial with one given strength, at which nothing was measured."""
        chosen = Point(next(iter(layers.values())), math.nan, math.nan, None, layers)
        return cls(rule, chosen, (), (), {}, {}, (0, 0))

    @property
    def strengths(self) -> Mapping[str, float]:
        """The strength of each layer, by its name in the plain model."""
        return self.chosen.layers

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that `json.dumps` takes."""
        values = asdict(self)
        for point in values["curve"]:
            del point["layers"]  # which all have its strength
        if not self.curve:
            # Not measured: they are NaN, which JSON does not know.
            del values["chosen"]["task"], values["chosen"]["rise"]
        return values

    def summary(self) -> dict[str, str]:
        """Return the result in words, a line for each topic."""
        return summary_of(self.to_dict())

    def plot(self) -> Figure:
        """Draw both losses over one strength for all layers, and what each choice costs of the one for the other."""
        from matplotlib.figure import Figure

        # Not pyplot, which keeps figures alive and picks a window system.
        figure = Figure(figsize=(11.0, 4.6), dpi=110, layout="constrained")
        left, right = figure.subplots(1, 2)
        steps, base = [point.strength for point in self.curve], self.curve[0].task
        # Both above the base's, so that one axis holds losses of different size.
        left.plot(steps, [point.task - base for point in self.curve], "o-", color="#0072B2", label="task")
        left.plot(steps, [point.rise for point in self.curve], "^--", color="#D55E00", label="text to keep")
        left.set(xlabel="strength, the same in all layers", ylabel="loss above the base's")
        uniform = self.curve[1:]  # the task's loss at the base would hide the differences
        for points, label, style in (
            (uniform, "one strength", {"fmt": "o-", "color": "#555555"}),
            (self.fitted, "one for each layer", {"fmt": "D", "color": "#009E73"}),
            ([self.chosen], "chosen", {"fmt": "*", "color": "#CC0066", "markersize": 13}),
        ):
            if points:  # none is fitted where one strength for all layers is chosen
                right.errorbar([point.rise for point in points], [point.task for point in points], label=label, **style)
        for point in uniform:
            right.annotate(f" {point.strength:g}", (point.rise, point.task), fontsize=10)
        right.set(xlabel="rise of the loss on text to keep", ylabel="loss on the task")
        # Where the curves leave room: the one rises, the other falls. The "best" place is searched for, with a warning
        # where that takes a second.
        for axes, place in ((left, "upper left"), (right, "upper right")):
            axes.grid(alpha=0.25)
            axes.legend(loc=place)
        # A rule is plain text: "$" in it begins no formula.
        figure.suptitle(f"Examples to choose by: {self.rule}", fontsize=11, parse_math=False)
        return figure


def summary_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Put a `Dial` as plain values into words, a line for each topic."""
    task = _changes(values["task"])
    keep = _changes(values["keep"])
    rows = {"strength": strength_of(values), "chosen by": values["rule"]}
    if not task:
        return rows | {"measured on": "nothing: no data were given"}
    rows["task"] = f"{task['base'].loss:.3f} base, {task['trained'].loss:.3f} as trained, {task['chosen']} now"
    rows["text to keep"] = f"{keep['base'].loss:.3f} base, {keep['trained']} as trained, {keep['chosen']} now"
    if UNIFORM in task:
        rows["at one strength"] = f"{task[UNIFORM]} task, {keep[UNIFORM]} text to keep"
    n_read = ""
    if values.get("read"):  # older files lack it
        n_read = " of {} and {} that were read".format(*values["read"])
    rows["measured on"] = "{} and {} other examples{}; ± is a 95 % interval".format(*values["examples"], n_read)
    for i, note in enumerate(values["notes"], 1):
        rows[f"note {i}"] = note
    return rows


def _changes(values: Mapping[str, Mapping[str, float]]) -> dict[str, Change]:
    return {name: Change(**change) for name, change in values.items()}


def write_dialed(
    path: str | Path, trained: Trained, base: Base, dialed: Dial, overwrite: bool = False, alpha_pattern: bool = False
) -> Path:
    """Write an adapter at its strengths as a PEFT directory, with a card, the numbers and a picture.

    One strength for all layers scales `lora_alpha`; others are multiplied into B, or B stays as trained and
    `alpha_pattern` has them. Layers of strength 0 are left out, or get a B of zeros.
    """
    layers = {}
    for name, layer in trained.layers.items():
        if dialed.strengths[name]:
            layers[name] = layer
        elif f"{PREFIX}{name}.base_layer.weight" in trained.others:  # which is read beside an adapter alone
            layers[name] = replace(layer, b=0 * layer.b)
    kept = replace(trained, layers=layers)
    if not alpha_pattern:
        # One `lora_alpha` can then stand for all layers.
        kept = kept.with_one_scaling()
    # A weight says that layers were fitted, so that they differ: their strengths go into B, scaled as before.
    in_b = dialed.chosen.weight is not None and not alpha_pattern
    dialed_layers = {}
    for name, layer in kept.layers.items():
        dialed_layers[name] = replace(layer, scaling=layer.scaling * (dialed.strengths[name] or 1.0))
        if in_b:
            dialed_layers[name] = dialed_layers[name].rescaled(kept.scaling)
    with new_directory(path, overwrite, **OURS) as fresh:
        write_peft(fresh, replace(kept, layers=dialed_layers), base)
        # Few engines read these, but B stays as trained.
        if alpha_pattern:
            config = read_json(fresh / CONFIG_FILE)
            alphas = {name: alpha_for(layer.scaling, layer.rank) for name, layer in dialed_layers.items()}
            write_json(fresh / CONFIG_FILE, config | {"alpha_pattern": to_patterns(alphas, config["lora_alpha"])})
        if dialed.curve:
            dialed.plot().savefig(fresh / PICTURE_FILE)
        # With the hash of the weights a reader sees whether the record is about them.
        write_json(fresh / DIAL_FILE, {"sha256": digests_of(fresh, [WEIGHTS_FILE])} | dialed.to_dict())
        (fresh / CARD_FILE).write_text(_card(trained, dialed), encoding="utf-8")
    return Path(path).expanduser().resolve()


def _card(trained: Trained, dialed: Dial) -> str:
    lines = "\n".join(f"- {topic}: {text}" for topic, text in dialed.summary().items())
    picture = ""
    if dialed.curve:
        picture = f"\n\n![losses over strength]({PICTURE_FILE})"
    return (
        f"{card_header(trained.base, trained.config.get('task_type'))}\n"
        f"# A trained LoRA adapter, at the strength that keeps what the model knew\n\n{lines}\n\n"
        f"The strengths are in it: load it as any adapter.{picture}\n"
    )
