"""Language models trained for a paper's page, and what their answers are like on the way.

An arm is a method trained by `kb.train` from a common start. It is looked at between its steps, through its
checkpoints: always on the same held-out problems with the same uniform numbers, so that arms differ by what they are.
"""

import math
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.papers.page import Spread, Table
from kullback.papers.reproduction import Job

if TYPE_CHECKING:
    from kullback.lm.api import Run
    from kullback.lm.method import Method
    from kullback.lm.tasks import Problem, Task

START, TASK = "embedded:student", "embedded:arithmetic"
LONGEST = 32  # tokens of an answer: more than a right one needs


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


def measured(run: "Run", who: str) -> dict[str, float]:
    """The values of an evaluation; "accuracy" is its avg@k."""
    graded = (run.evaluation or {}).get(who) or {}
    values = {name: item["value"] for name, item in graded.items() if isinstance(item, dict)}
    tries = [value for name, value in values.items() if name.startswith("avg@")]
    return values | ({"accuracy": tries[0]} if tries else {})


@dataclass(frozen=True)
class Answers:
    """What a model writes to some problems, `samples` rows each, problem after problem. Numbers of a row are sums over
    its tokens, in nats.

    Args:
        texts: tokens of each row.
        grades: the verifier's, and "finished".
        log_prob: of the answer; minus its mean estimates the entropy of answers.
        entropy: of the next token, exact at each; its mean is the entropy of answers too, with less noise.
        kl: KL(model || reference) of the next token, exact at each; its mean is that of whole answers. None without a
            reference.
    """

    samples: int
    texts: list[tuple[int, ...]]
    grades: Mapping[str, Float[Tensor, "row"]]
    log_prob: Float[Tensor, "row"]
    entropy: Float[Tensor, "row"]
    kl: Float[Tensor, "row"] | None

    def of(self, place: int) -> slice:
        """The rows of a problem."""
        return slice(place * self.samples, (place + 1) * self.samples)

    @property
    def repeated(self) -> list[float]:
        """For each problem the share of its pairs of answers that are the same text."""
        pairs = self.samples * (self.samples - 1)
        counts = [Counter(self.texts[self.of(i)]) for i in range(len(self.texts) // self.samples)]
        return [sum(n * (n - 1) for n in count.values()) / pairs for count in counts]

    def means(self) -> dict[str, float]:
        """Of all grades, and "entropy" and "KL" (nats per answer), "length" (tokens) and "repeated"."""
        found = {name: float(values.nanmean()) for name, values in self.grades.items()}
        found |= {"entropy": float(self.entropy.mean()), "repeated": statistics.fmean(self.repeated)}
        found["length"] = statistics.fmean(map(len, self.texts))
        return found | ({} if self.kl is None else {"KL": float(self.kl.mean())})


@torch.no_grad()
def ask(
    model: Any,
    tokenizer: Any,
    task: "Task",
    problems: "Sequence[Problem]",
    *,
    samples: int = 8,
    longest: int = LONGEST,
    seed: int = 0,
    reference: Any = None,
) -> Answers:
    """A model's answers at temperature 1, graded by the task. The uniform numbers belong to `seed` and the problem."""
    from kullback.lm.methods.grpo import GRPO
    from kullback.lm.moment import Moment
    from kullback.lm.rollout import Origin
    from kullback.lm.scores import Scores
    from kullback.lm.sources import PlayerSource

    players = {"student": model.eval(), "reference": reference}
    at = Moment(players, tokenizer, task, GRPO(samples=samples, max_completion=longest), seed=seed)
    source = PlayerSource("student", Origin.STUDENT, once=True)  # once: uniforms belong to the problem
    rollout = source.write(list(enumerate(problems)), at)
    names = ["log_prob:student", "entropy:student", "reverse_kl:reference,student"][: 2 if reference is None else 3]
    scores = Scores(at, lambda _: {}).measure(names, rollout, {})
    log_prob, entropy, *kl = (scores[name].double().sum(1) for name in names)
    texts = [
        tuple(ids[:length]) for ids, length in zip(rollout.completions.tolist(), rollout.lengths.tolist(), strict=True)
    ]
    return Answers(samples, texts, rollout.rewards, log_prob, entropy, kl[0] if kl else None)


def train_arm(
    *,
    method: "Method",
    output: Path,
    data: Any,
    steps: int,
    marks: Sequence[int],
    asked: int,
    seed: int,
    task: Any = TASK,
    samples: int = 8,
    **train_options: Any,
) -> dict[str, Any]:
    """Train a method from the shipped student and ask it the first `asked` held-out problems of a task at some steps.

    Args:
        data, train_options: of `kb.train`.
        marks: steps; 0 is before training, the others are multiples of the smallest of them.

    Returns:
        "path": `Answers.means` by step, with the KL to the start; "metrics": the run's rows.
    """
    from kullback.lm.models import load_model, load_tokenizer
    from kullback.lm.tasks import load_task
    from kullback.run.directory import RunDirectory

    later = [mark for mark in marks if mark]
    run = train(
        method,
        student=START,
        data=data,
        output=output,
        steps=steps,
        seed=seed,
        save_every=min(later),
        keep_checkpoints=steps // min(later) + 1,
        evaluate={"problems": 0},
        **train_options,
    )
    with quiet():
        start, tokenizer = load_model(START, role="student").eval(), load_tokenizer(START, role="student")
        folder = RunDirectory(output).checkpoints
        models = {mark: load_model(str(folder / f"checkpoint-{mark}"), role="student") for mark in later}
    grading, path = load_task(task, seed=0), {}
    problems = grading.held_out[:asked]
    for mark, model in (({0: start} if 0 in marks else {}) | models).items():
        seen = ask(model, tokenizer, grading, problems, samples=samples, reference=start)
        path[mark] = seen.means()
    return {"path": path, "metrics": run.metrics}


Runs = dict[str, list[dict[str, Any]]]  # what `train_arm` returned, by arm, a seed each


def train_arms(job: Job, methods: "Mapping[str, Method]", *, data: Sequence[Any], **options: Any) -> Runs:
    """Every method with every seed.

    Args:
        data: of each seed, which are 0, 1, ...
        options: of `train_arm`.
    """
    todo = [
        {"method": method, "output": job.folder / f"{name}-{seed}", "data": own, "seed": seed} | options
        for name, method in methods.items()
        for seed, own in enumerate(data)
    ]
    runs = job.spread(train_arm, todo, "language model")
    return {name: runs[place * len(data) : (place + 1) * len(data)] for place, name in enumerate(methods)}


def marks(steps: int, count: int) -> list[int]:
    """0 and up to `count` more steps, evenly spaced, the last one last."""
    every = max(1, steps // count)
    return list(range(0, steps + 1, every))


def last(run: Mapping[str, Any], metric: str, steps: int = 10) -> float:
    """Mean of a metric over the last steps that have it; nan where none has."""
    seen = [row[metric] for row in run["metrics"] if not math.isnan(row.get(metric, math.nan))]
    return statistics.fmean(seen[-steps:]) if seen else math.nan


def at_end(runs: Sequence[Mapping[str, Any]], what: str) -> Spread:
    """A number at an arm's last mark, over its seeds."""
    return Spread([run["path"][max(run["path"])][what] for run in runs], 3)


def mean_path(runs: Sequence[Mapping[str, Any]], what: str) -> dict[int, float]:
    """A number by step, mean of the seeds."""
    return {mark: statistics.fmean(run["path"][mark][what] for run in runs) for mark in runs[0]["path"]}


def above(runs: Runs, a: str, b: str, what: str) -> tuple[bool, str]:
    """Whether an arm ends above another in every seed, and the words for it."""
    gaps = Spread([x - y for x, y in zip(at_end(runs[a], what).values, at_end(runs[b], what).values, strict=True)])
    wins = sum(gap > 0 for gap in gaps.values)
    return wins == len(gaps.values), f"{gaps.mean:+.3f}, {wins} of {len(gaps.values)} seeds"


def end_table(
    title: str, runs: Runs, columns: Mapping[str, str], *, note: str, more: Sequence[Sequence[Any]] = ()
) -> Table:
    """The arms at the end, after a row for their start and before rows of `more`.

    Args:
        columns: heading by what is measured.
    """
    first = next(iter(runs.values()))[0]["path"][0]
    rows = [["before training", *(f"{first[what]:.3f}" for what in columns)]]
    for name, seeds in runs.items():
        spreads = [at_end(seeds, what) for what in columns]
        rows.append([name, *(f"{s.mean:.3f}" + (f" ± {s.error:.3f}" if len(seeds) > 1 else "") for s in spreads)])
    return Table(title, ["", *columns.values()], [*rows, *map(list, more)], note)


def draw_paths(axis: Any, runs: Runs, what: str, label: str, colors: Mapping[str, str]) -> None:
    """A number against steps: the mean of the seeds, and each of them thin."""
    for name, seeds in runs.items():
        for run in seeds:
            axis.plot(list(run["path"]), [seen[what] for seen in run["path"].values()], color=colors[name], lw=0.5)
        path = mean_path(seeds, what)
        axis.plot(list(path), list(path.values()), color=colors[name], marker="o", markersize=3, label=name)
    axis.set_xlabel("step", fontsize=9)
    axis.set_ylabel(label, fontsize=9)
