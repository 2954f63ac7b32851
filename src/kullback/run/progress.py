"""A progress bar with rate, time left and a few live metrics. On a terminal a bar; elsewhere a line now and then."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn
from rich.text import Text

Item = TypeVar("Item")


class ProgressBar:
    """Counts `total` steps of one activity.

        with ProgressBar(200, "train") as progress:
            for batch in batches:
                progress.advance(loss=0.41, accuracy=0.3)

    Writes to standard error, so that standard output stays for results. KULLBACK_PROGRESS=0 silences it.

    Args:
        total: steps of the whole activity.
        description: what is counted, a word or two.
        start: steps done before (a resumed run); they do not count in the rate.
        every: seconds between lines where there is no terminal.
    """

    def __init__(
        self, total: int, description: str = "", *, start: int = 0, every: float = 10.0, console: Console | None = None
    ) -> None:
        self.total, self.description, self.start, self.every = total, description, start, every
        self.done = start
        self.live: dict[str, Any] = {}
        self.console = console or Console(file=sys.stderr, highlight=False)
        self._silent = os.environ.get("KULLBACK_PROGRESS") == "0"
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._began = self._told = time.monotonic()

    def __enter__(self) -> Self:
        self._began = self._told = time.monotonic()
        if not self._silent and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}", markup=True),
                BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
                MofNCompleteColumn(),
                _Live(self),
                console=self.console,
                expand=True,
            )
            self._task = self._bar.add_task(_escape(self.description), total=self.total, completed=self.start)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif not self._silent:
            self._line()

    def advance(self, steps: int = 1, **live: Any) -> None:
        """`steps` more are done; `live` are numbers to show, the latest of each name."""
        self.done += steps
        self.live.update(live)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif not self._silent and time.monotonic() - self._told >= self.every:
            self._line()

    def print(self, message: str) -> None:
        """A line above the bar, also where there is no terminal; nothing when silent."""
        if not self._silent:
            self.console.print(message, markup=False)

    @property
    def rate(self) -> float:
        """Steps per second since the bar was entered, 0 before the first."""
        return (self.done - self.start) / max(time.monotonic() - self._began, 1e-9)

    def status(self) -> str:
        """Rate, time left (or taken, when done) and live metrics: "1.9/s, 1:24 left, loss 0.41"."""
        rate, parts = self.rate, []
        if rate:
            parts.append(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")
        if self.done >= self.total:
            parts.append(f"took {_clock(time.monotonic() - self._began)}")
        elif rate:
            parts.append(f"{_clock((self.total - self.done) / rate)} left")
        parts += [f"{name} {_short(value)}" for name, value in self.live.items() if value is not None]
        return ", ".join(parts)

    def _line(self) -> None:
        self._told = time.monotonic()
        self.console.print(
            f"{self.description} {self.done}/{self.total}  {self.status()}".strip(), markup=False, soft_wrap=True
        )


def track(items: Iterable[Item], description: str = "", *, total: int | None = None) -> Iterator[Item]:
    """The items one by one, counted by a `ProgressBar`."""
    if total is None:
        items = list(items)
        total = len(items)
    with ProgressBar(total, description) as progress:
        for item in items:
            yield item
            progress.advance()


class _Live(TextColumn):
    def __init__(self, progress: ProgressBar) -> None:
        super().__init__("")
        self.progress = progress

    def render(self, task: Task) -> Text:
        return Text(self.progress.status(), style="dim")


def _short(value: Any) -> str:
    return f"{float(value):.3g}" if hasattr(value, "__float__") else str(value)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
