"""How a paper is reproduced: how large, over how many processes, and what becomes of what is found.

    @reproduces(5, full=FULL, quick=QUICK, parallel=True)
    def reproduce(job: Job) -> Findings: ...

makes `reproduce(quick=False, console=None, docs=None) -> Result`, which is what the command and the tests call.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kullback.papers.page import Findings, Result, write_page

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Job:
    """One reproduction under way.

    Args:
        size: its numbers of steps, seeds and so on.
        folder: for runs; it is gone afterwards.
    """

    number: int
    quick: bool
    size: Mapping[str, int]
    folder: Path
    processes: int = 1
    console: "Console | None" = None

    def spread(self, work: Callable[..., Any], todo: Sequence[Mapping[str, Any]], what: str) -> list[Any]:
        """[work(**options) for options in todo], over this job's processes."""
        return spread(work, todo, processes=self.processes, what=f"{self.number:02d} {what}", console=self.console)


class Reproduce(Protocol):
    """Run the paper's experiments and write its page.

    Args:
        quick: the same code in seconds, with too few steps to mean anything.
        docs: folder of the page; by default docs/papers, and runs/papers for a quick run.
    """

    def __call__(self, quick: bool = False, console: "Console | None" = None, docs: Path | None = None) -> Result: ...


def reproduces(
    number: int, *, full: Mapping[str, int], quick: Mapping[str, int], parallel: bool = False
) -> Callable[[Callable[[Job], Findings]], Reproduce]:
    """Make the command of a paper from the function that runs its experiments.

    Args:
        full, quick: `Job.size` of either kind of run.
        parallel: it spreads work over two processes, where there are two cores and it is no quick run.
    """
    sizes = {False: full, True: quick}

    def made(run: Callable[[Job], Findings]) -> Reproduce:
        def reproduce(quick: bool = False, console: "Console | None" = None, docs: Path | None = None) -> Result:
            started, processes = time.monotonic(), min(2, cores()) if parallel and not quick else 1
            with tempfile.TemporaryDirectory(prefix="kullback-") as folder:
                found = run(Job(number, quick, sizes[quick], Path(folder), processes, console))
            seconds = time.monotonic() - started
            return write_page(
                number=number, **vars(found), seconds=seconds, quick=quick, processes=processes, docs=docs,
                console=console,
            )  # fmt: skip

        reproduce.__doc__, reproduce.__module__ = run.__doc__, run.__module__
        return reproduce

    return made


def spread(
    work: Callable[..., Any], todo: Sequence[Mapping[str, Any]], *, processes: int, what: str, console: Any = None
) -> list[Any]:
    """[work(**options) for options in todo], in several processes of one thread each, with one bar over all."""
    from kullback.run.progress import ProgressBar

    with ProgressBar(len(todo), what, console=console) as progress:
        if processes == 1:
            results = []
            for options in todo:
                results.append(work(**options))
                progress.advance()
            return results
        with ProcessPoolExecutor(
            min(processes, len(todo)), mp_context=get_context("spawn"), initializer=_one_thread
        ) as pool:
            futures = [pool.submit(work, **options) for options in todo]
            try:
                for _ in as_completed(futures):
                    progress.advance()
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
