"""What a reproduction hands back, and the page of docs/papers that it writes.

A page says what the paper claims, whether each direction of the claim showed here, the tables with seeds and standard
errors, a figure, what was measured on what, and what differs from the paper. It is written by the command alone.
"""

import math
import os
import platform
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kullback.papers import Paper, find_paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

Held = bool | Literal["partly"]


@dataclass(frozen=True)
class Direction:
    """One direction of a paper's claim, or of what its card expects, and what was seen.

    Args:
        says: what should be seen.
        held: None where this experiment does not decide it; then it does not count.
        evidence: the numbers behind it, in a few words.
        asserted: the card asks for it; the others are reported whichever way they fall.
        claimed: a claim of the paper; only these make the verdict.
    """

    says: str
    held: bool | None
    evidence: str = ""
    asserted: bool = False
    claimed: bool = True


@dataclass(frozen=True)
class Table:
    """Rows of cells; a cell is text, a number or a `Spread`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", "| " + " | ".join(map(_escaped, self.columns)) + " |"]
        lines.append("|" + "|".join("---" if column == 0 else "---:" for column in range(len(self.columns))) + "|")
        lines += ["| " + " | ".join(_escaped(_cell(cell)) for cell in row) + " |" for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])])


@dataclass(frozen=True)
class Spread:
    """Numbers of several seeds, shown as their mean, its standard error, and each of them.

    >>> str(Spread([0.31, 0.25, 0.28]))
    '0.28 ± 0.017 (0.31, 0.25, 0.28)'
    """

    values: Sequence[float]
    digits: int = 2

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def error(self) -> float:
        """Standard error of the mean over seeds; nan for one seed."""
        return statistics.stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else math.nan

    def __str__(self) -> str:
        each = ", ".join(f"{value:.{self.digits}f}" for value in self.values)
        if len(self.values) == 1:
            return each
        return f"{self.mean:.{self.digits}f} ± {self.error:.{self.digits + 1}f} ({each})"


@dataclass(frozen=True)
class Findings:
    """What a paper's module gives to its page.

    Args:
        setup, reading: what was done, and how to read what came out; Markdown.
        differs: from the paper, an item each; also what missed at first and was changed.
        numbers: the measured numbers by name, for tests and for whoever wants to plot them otherwise.
    """

    setup: str
    directions: list[Direction]
    tables: list[Table]
    figure: "Figure"
    caption: str
    reading: str
    differs: Sequence[str]
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """What `reproduce` found.

    Args:
        held: True where every decided direction that the paper claims was seen, False where none, else "partly".
        text: the page, as Markdown.
        numbers: the measured numbers by name, for tests and for whoever wants to plot them otherwise.
    """

    paper: Paper
    held: Held
    directions: list[Direction]
    tables: list[Table]
    figures: list[Path]
    seconds: float
    text: str
    page: Path
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def missed(self) -> list[str]:
        """What the card asks to be asserted and was not seen; empty is good."""
        return [direction.says for direction in self.directions if direction.asserted and direction.held is False]


def verdict(directions: Sequence[Direction]) -> Held:
    """
    >>> verdict([Direction("a", True), Direction("b", False), Direction("c", None)])
    'partly'
    """
    decided = [direction.held for direction in directions if direction.claimed and direction.held is not None]
    if decided and all(decided):
        return True
    return "partly" if any(decided) else False


def write_page(
    *,
    number: int,
    setup: str,
    directions: list[Direction],
    tables: list[Table],
    figure: "Figure",
    caption: str,
    reading: str,
    differs: Sequence[str],
    seconds: float,
    quick: bool,
    processes: int,
    docs: Path | None,
    console: "Console | None" = None,
    numbers: dict[str, Any] | None = None,
) -> Result:
    """Put a page together, write it to `docs/NN-slug.md` and its figure to `docs/figures/NN-slug.png`, and show it.

    Its title, claim and source are the registry's. Without `docs` that is docs/papers, and runs/papers for a quick run,
    which would otherwise replace real numbers.
    """
    paper = find_paper(number)
    docs = docs or Path("runs" if quick else "docs") / "papers"
    held = verdict(directions)
    name = f"{number:02d}-{paper.slug}"
    parts = [*head(paper), f"**Verdict: {VERDICTS[held]}.** Each direction by itself:", _directions(directions)]
    if quick:
        parts.insert(
            4,
            "> This is the `--quick` run: the same code for seconds, too few steps for its numbers to mean anything.",
        )
    parts += [f"![{caption}](figures/{name}.png)", f"*{caption}*", "## What was done", setup]
    parts += ["## What was measured", *(table.markdown() for table in tables), "## How to read it", reading]
    parts += ["## What differs from the paper", "\n".join(f"{i}. {line}" for i, line in enumerate(differs, start=1))]
    command = [*paper.command.split(), *(["--quick"] if quick else [])]
    parts += ["## Measured on", f"{machine(seconds, processes)}\n\n```console\n{shlex.join(command)}\n```"]
    text = "\n\n".join(parts) + "\n"

    drawn, page = docs / "figures" / f"{name}.png", docs / f"{name}.md"
    drawn.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(drawn, dpi=110, metadata={"Software": None})
    page.write_text(text, encoding="utf-8")
    result = Result(paper, held, directions, tables, [drawn], seconds, text, page, numbers or {})
    show(result, console)
    return result


def head(paper: Paper) -> list[str]:
    """The first parts of a paper's page."""
    return [
        f"<!-- Written by `{paper.command}`. Edit src/kullback/papers instead. -->",
        f"# {paper.number:02d} {paper.name}",
        paper.source,
        f"**Claim.** {paper.claim}",
    ]


def show(result: Result, console: "Console | None" = None) -> None:
    """The verdict and the tables, on a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    console = console or Console(highlight=False)

    def grid(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Grid:
        made = Grid(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
        for place, column in enumerate(columns):
            made.add_column(column, justify="left" if place == 0 else "right")
        for row in rows:
            made.add_row(*map(_cell, row))
        return made

    for table in result.tables:
        console.print(grid(table.title, table.columns, table.rows))
    words = {True: "yes", False: "no", None: "not decided"}
    rows = [[item.says, words[item.held], item.evidence] for item in result.directions]
    name = f"{result.paper.number:02d} {result.paper.name}"
    console.print(grid(name, ["direction", "held", "seen"], rows))
    console.print(f"{name}: {VERDICTS[result.held]}, {result.seconds:.0f} s", markup=False)


VERDICTS: dict[Held, str] = {True: "held", "partly": "partly held", False: "not reproduced"}


def machine(seconds: float, processes: int) -> str:
    """What a number was measured on, in a sentence."""
    names = ("torch", "transformers", "kullback")
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    each = "one process" if processes == 1 else f"{processes} processes of one thread each"
    where = f"{cores} CPU core{'' if cores == 1 else 's'} ({platform.machine()}), {each}"
    return f"{where}, {seconds:.0f} s in all; Python {platform.python_version()}, {versions}."


def new_figure(panels: int, *, rows: int = 1, width: float = 3.6, height: float = 3.0) -> "tuple[Figure, Any]":
    """Panels, so many in each row, row after row; without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height * rows), layout="constrained")
    axes = figure.subplots(rows, panels, squeeze=False).flatten()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def _directions(directions: Sequence[Direction]) -> str:
    words = {True: "yes", False: "**no**", None: "not decided"}
    lines = ["| direction | held | seen | |", "|---|---|---|---|"]
    for item in directions:
        kind = "the paper's" if item.claimed else "the card's"
        kind += ", asserted" if item.asserted else ", reported"
        lines.append(f"| {_escaped(item.says)} | {words[item.held]} | {_escaped(item.evidence)} | {kind} |")
    return "\n".join(lines)


def _cell(cell: Any) -> str:
    if isinstance(cell, float):
        return "" if math.isnan(cell) else f"{cell:.3g}"
    return str(cell)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def _version(name: str) -> str:
    try:
        return version(name)
    except Exception:  # not installed, but imported from a checkout
        import kullback

        return kullback.__version__ if name == "kullback" else "unknown"
