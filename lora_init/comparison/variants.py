"""A start and how it is run, as one value: parsed from its name here, and printed here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lora_init.errors import LoraInitError
from lora_init.starts.starts import RANDOM, Recipe, Start, compared_names, find_recipe, find_start

_WAY = re.compile(r"\+(?:([1-9]\d*)-(alpha|batches|steps)|equal-parameters)\Z")


@dataclass(frozen=True)
class Variant:
    """A start and how it is run: `eva+32-alpha+16-batches`. A start that is unknown is the user's own.

    Example:
        >>> Variant.parse("eva+32-alpha+equal-parameters")
        Variant(base='eva', alpha=32, batches=None, steps=None, equal_parameters=True)
        >>> str(Variant.parse("eva+16-batches+32-alpha"))
        'eva+32-alpha+16-batches'
        >>> Variant.parse("mine+yours").base
        'mine+yours'
    """

    base: str  # name of the start
    alpha: int | None = None  # lora_alpha, if it has one of its own
    batches: int | None = None  # number of batches for statistics, likewise
    steps: int | None = None  # of training, likewise
    equal_parameters: bool = False  # whether it gets as many trainable parameters as the random start

    @classmethod
    def parse(cls, name: str) -> Variant:
        """Read what follows the name of a start, from its end.

        Raises:
            LoraInitError: A setting is given twice.
        """
        base, ways = name, dict[str, int]()
        # From the end, as the name of a start of the user's may have a plus itself.
        while match := _WAY.search(base):
            number, kind = match.groups()  # of `+equal-parameters` both are None
            way = kind or "equal_parameters"
            if way in ways:
                raise LoraInitError(
                    f"start {name!r}: what follows a plus can be said once, such as eva+32-alpha+16-batches."
                )
            ways[way] = int(number) if number else True
            base = base[: match.start()]
        return cls(base, **ways)  # type: ignore[arg-type]

    def __str__(self) -> str:
        # In one order, so that a variant has one name, by which runs are told apart.
        name = self.base
        for kind, number in (("alpha", self.alpha), ("batches", self.batches), ("steps", self.steps)):
            if number is not None:
                name += f"+{number}-{kind}"
        if self.equal_parameters:
            name += "+equal-parameters"
        return name

    @property
    def recipe(self) -> Recipe | None:
        """How its adapter is built; None if `build_adapter` does not make it."""
        return find_recipe(self.base) if self.base in compared_names() else None

    @property
    def start(self) -> Start | None:
        """What the registry knows of it; None if it is the user's own."""
        if self.recipe is not None:  # several names may be recipes of one start, as `eva` and `eva-rho1` are
            return self.recipe.start
        return find_start(self.base) if self.base in compared_names() else None

    @property
    def is_plain(self) -> bool:
        """Whether nothing says how the start is run."""
        return self == Variant(self.base)

    @property
    def changes_base(self) -> bool:
        """Whether the trained adapter is none for the plain model, since its weights were changed."""
        return self.start is not None and self.start.changes_base

    def differs_in_parameters(self, ranks_cost_the_same: bool) -> bool:
        """Return whether it trains another number of parameters than `random`, so that it is run with as many, too."""
        recipe = self.recipe
        if recipe is None or self.equal_parameters:  # one with equal parameters is that other run itself
            return False
        if recipe.freeze_a:  # it trains B alone
            return True
        return recipe.moves_ranks and recipe.resized and not ranks_cost_the_same

    def init_options(self) -> list[str] | None:
        """Return the options with which `lora-init init` makes its adapter; None if it does not make that one.

        Example:
            >>> Variant("eva-rho1").init_options(), Variant("pissa").init_options()
            (['--method', 'eva', '--rho', '1'], None)
        """
        if self.start is None:
            return None
        options, recipe = list(self.start.init_options), self.recipe
        if recipe is None:
            return options if options and self.is_plain else None
        if not recipe.is_made_by_init or self.equal_parameters:
            return None
        options += ["--rho", f"{recipe.rho:g}"]
        if not recipe.center:
            options.append("--no-center")
        if recipe.freeze_a:
            options.append("--freeze-a")
        return options


REFERENCE = Variant(RANDOM)  # which all are compared with


def by_batches(starts: Iterable[Variant], numbers: Sequence[int]) -> list[Variant]:
    """Replace each start from data that has no number of batches of its own by the same start with each number.

    Example:
        >>> [str(one) for one in by_batches([Variant("random"), Variant("eva"), Variant("eva", batches=8)], [4, 16])]
        ['random', 'eva+4-batches', 'eva+16-batches', 'eva+8-batches']
    """
    if len(numbers) < 2:  # one number is a setting of all runs, and no part of a name
        return list(starts)
    varied: list[Variant] = []
    for start in starts:
        if start.recipe is None or not start.recipe.reads_data or start.batches:
            varied.append(start)
        else:
            varied += [replace(start, batches=n) for n in numbers]
    return varied
