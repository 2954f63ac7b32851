"""One look for one run, in the page and in the figures: colour for what varies first, dash and marker for second."""

from collections.abc import Sequence
from dataclasses import dataclass

from kullback.report.runs import RunData

# Told apart with the common colour-vision deficiencies (after Okabe and Ito); the page has a lighter set for dark mode.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b5529b", "#c98a00", "#3a9bd9", "#6b5bd2", "#77684f")
DASHES = ("", "6 3", "2 3", "8 3 2 3")
MARKERS = ("circle", "square", "triangle", "diamond")


@dataclass(frozen=True)
class Style:
    color: int  # index into COLORS
    dash: int = 0  # index into DASHES and MARKERS


def styles(runs: Sequence[RunData]) -> list[Style]:
    """A style per run. Of two fields varied as a grid, one gives the colour and the other the dash."""
    names = list(dict.fromkeys(name for run in runs for name in run.varied))
    values = {name: list(dict.fromkeys(str(run.varied.get(name)) for run in runs)) for name in names}
    axes = [name for name in names if len(values[name]) > 1]
    if len(axes) == 2 and len(values[axes[0]]) < len(values[axes[1]]) and len(values[axes[0]]) <= len(DASHES):
        axes.reverse()  # the longer one gets the colours
    if len(axes) == 2 and len(values[axes[0]]) <= len(COLORS) and len(values[axes[1]]) <= len(DASHES):
        indices = [[values[axis].index(str(run.varied.get(axis))) for axis in axes] for run in runs]
        if len({tuple(pair) for pair in indices}) == len(runs):
            return [Style(color, dash) for color, dash in indices]
    return [Style(i % len(COLORS), i // len(COLORS) % len(DASHES)) for i in range(len(runs))]
