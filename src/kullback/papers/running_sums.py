"""The toy task of the papers' pages: running sums of eight digits, modulo seven, written one token at a time.

    prompt 35216040  ->  completion 31343300                 (one right answer)
    prompt 35216040  ->  completion +31343300 or -46434400   (a choice: a style token, then sums or differences)

Each sum needs the one before it, so what a student writes itself soon differs from what it was shown. Models are the
tiny Qwen3 of `kullback.lm.tiny`, and all training is `kb.train`'s.
"""

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kullback.lm.api import Run
    from kullback.lm.method import Method
    from kullback.lm.tasks import Problem

MODULUS, DIGITS = 7, 8
CONTEXT, LONGEST = 32, 12  # tokens of a prompt with its completion, and of a completion: more than any needs
STYLES = {"+": 0.6, "-": 0.4}  # sums or differences; unequal, so that "which was kept" has an answer


def running_sums(digits: str, style: str = "+") -> str:
    """
    >>> running_sums("35216040"), running_sums("35216040", "-")
    ('31343300', '46434400')
    """
    total, sums = 0, []
    for digit in digits:
        total = (total + (int(digit) if style == "+" else -int(digit))) % MODULUS
        sums.append(str(total))
    return "".join(sums)


def make_rows(count: int, *, seed: int, styles: Mapping[str, float] | None = None) -> list[dict[str, str]]:
    """Rows of a data set as `kb.train(data=...)` takes them; with `styles` each reply starts with one drawn from it."""
    draw = random.Random(f"running sums {seed}")
    rows = []
    for _ in range(count):
        digits = "".join(str(draw.randrange(MODULUS)) for _ in range(DIGITS))
        if styles is None:
            reply = running_sums(digits)
        else:
            (style,) = draw.choices(list(styles), weights=list(styles.values()))
            reply = style + running_sums(digits, style)
        rows.append({"prompt": digits, "completion": reply, "answer": running_sums(digits)})
    return rows


def grade_styles(problem: "Problem", completion: str) -> dict[str, float]:
    """Right is the whole reply of the style that its first token announces. A verifier, as a task takes it."""
    style, sums = completion[:1], completion[1:]
    right = style in STYLES and sums == running_sums(problem.metadata["question"], style)
    return {"accuracy": float(right), "sums": float(style == "+")}


def make_task(count: int, *, seed: int, held_out: int, styles: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What `kb.train(data=...)` takes: rows, and how to grade them (the whole reply must be right)."""
    grading = {"extract": "all"} if styles is None else {"verifier": grade_styles}
    return {"data": make_rows(count + held_out, seed=seed, styles=styles), "held_out": held_out, **grading}


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, runs show no progress of their own: a reproduction has one bar over all its runs."""
    from transformers.utils import logging

    before = os.environ.get("KULLBACK_PROGRESS")
    os.environ["KULLBACK_PROGRESS"] = "0"
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
        os.environ.pop("KULLBACK_PROGRESS")
        if before is not None:
            os.environ["KULLBACK_PROGRESS"] = before


def train(method: "Method", **options: Any) -> "Run":
    """`kb.train`, without words on the way; optimiser, clipping and schedule as it has them by default."""
    from rich.console import Console

    from kullback.lm.api import train as kb_train

    with quiet():
        return kb_train(method, overwrite=True, console=Console(quiet=True), **options)


def new_model(shape: Mapping[str, int], seed: int) -> tuple[Any, Any]:
    """A tiny Qwen3 and its tokenizer.

    Weights start at half the usual 1 / sqrt(inputs): Qwen3's own 0.02 is for wide layers, and a student of width 48
    that starts there learns nothing in 800 steps.
    """
    import torch

    from kullback.lm.tiny import build_model, build_tokenizer

    model = build_model(**shape, max_length=CONTEXT, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.5 * parameter.shape[1] ** -0.5, generator=draw)
    return model, build_tokenizer(CONTEXT)


def fine_tune(
    *,
    name: str,
    folder: Path,
    task: dict[str, Any],
    shape: Mapping[str, int],
    seed: int,
    graded: int = 0,
    **train_options: Any,
) -> dict[str, float]:
    """A new model, fine-tuned on the replies of the task and left in `folder`/`name`/model; returns how good it is."""
    from kullback.lm.methods.sft import SFT

    model, tokenizer = new_model(shape, seed)
    grading = {"problems": graded, "samples": 4, "anchors": False, "shown": 0}
    run = train(
        SFT(max_completion=LONGEST),
        student=model,
        tokenizer=tokenizer,
        data=task,
        output=folder / name,
        evaluate=grading,
        seed=seed,
        **train_options,
    )
    return measured(run, "student")


def measured(run: "Run", who: str) -> dict[str, float]:
    """The values of an evaluation; "accuracy" is its avg@k."""
    graded = (run.evaluation or {}).get(who) or {}
    values = {name: item["value"] for name, item in graded.items() if isinstance(item, dict)}
    tries = [value for name, value in values.items() if name.startswith("avg@")]
    return values | ({"accuracy": tries[0]} if tries else {})


def spread(
    job: Callable[..., Any], todo: Sequence[Mapping[str, Any]], *, processes: int, what: str, console: Any = None
) -> list[Any]:
    """[job(**options) for options in todo], in several processes of one thread each, with one bar over all."""
    from kullback.run.progress import ProgressBar

    with ProgressBar(len(todo), what, console=console) as progress:
        if processes == 1:
            results = []
            for options in todo:
                results.append(job(**options))
                progress.advance()
            return results
        with ProcessPoolExecutor(
            min(processes, len(todo)), mp_context=get_context("spawn"), initializer=_one_thread
        ) as pool:
            futures = [pool.submit(job, **options) for options in todo]
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
