"""What a view prints, as lines; and what a change of its input takes from them and adds to them."""

import io

from rich.console import Console


def printed(view, *about):
    """The lines of a result, with one space between words, on a terminal that is wide enough for each."""
    out = io.StringIO()
    view(Console(file=out, width=240, soft_wrap=True, highlight=False), *about)
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def changed(view, about, changes):
    """The lines that changes of a result take away, and those that they add."""
    before, after = printed(view, about), printed(view, about | changes)
    return [line for line in before if line not in after], [line for line in after if line not in before]
