"""09 Decoupling KL: who writes the prefix and which way the KL points, as two separate choices.

(a) Exact. Strings of four tokens with two modes, a student that can only hold one of them, prefix distributions
summed over all strings: the four cells and the mixtures between them, without sampling. (b) Training. A one-layer
student of running sums or differences learns from a three-layer teacher through `kb.train`, for every prefix and
direction, and with lengths that an entropy gate sets.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kullback.papers import arms, running_sums
from kullback.papers.page import Direction, Findings, Spread, Table, new_figure
from kullback.papers.reproduction import Job, reproduces
from kullback.papers.two_mode_strings import Prefix, tabular_cell

PREFIXES: tuple[Prefix, ...] = ("teacher", "student")
GRID = (0.0, 0.25, 0.5, 0.75, 1.0)  # weight of the reverse term in (a)
WEIGHTS = (0.0, 0.5, 1.0)  # and in (b)
NAMES = {0.0: "forward", 0.5: "half", 1.0: "reverse"}
TEACHER = {"hidden_size": 96, "layers": 3, "heads": 4}
STUDENT = {"hidden_size": 24, "layers": 1, "heads": 4}
PER_STEP, RATE = 32, 3e-3
LADDER = (4, 7, 10)  # tokens: the style and three sums, six sums, all with the end
GATE = 0.5  # the least entropy, as a share of the student's first
FULL = {
    "seeds": 3,
    "teacher": 400,
    "student": 550,
    "steps": 400,
    "rows": 2048,
    "more": 20_000,
    "held_out": 256,
    "descent": 400,
}
QUICK = {"seeds": 1, "teacher": 3, "student": 2, "steps": 4, "rows": 200, "more": 200, "held_out": 16, "descent": 20}


@reproduces(9, full=FULL, quick=QUICK, parallel=True)
def reproduce(job: Job) -> Findings:
    """Both experiments."""
    size, seeds = job.size, 1 if job.quick else 4
    keys = [(prefix, weight) for prefix in PREFIXES for weight in GRID]
    todo = [{"prefix": prefix, "weight": weight, "seeds": seeds, "steps": size["descent"]} for prefix, weight in keys]
    exact = dict(zip(keys, job.spread(tabular_cell, todo, "exact"), strict=True))
    found = _train_all(job)
    return Findings(
        setup=SETUP.format(**size, exact_seeds=seeds, probe=_probe_every(size["steps"])),
        directions=[*_exact_directions(exact), *_training_directions(found)],
        tables=[_exact_table(exact), _training_table(found), _gate_table(found)],
        figure=_figure(exact, found),
        caption="Left and middle: the exact cells, accuracy and pass@32 against entropy, lambda from 0 to 1. "
        "Right: accuracy against entropy after training, a point per seed.",
        reading=_reading(found),
        differs=DIFFERS,
        numbers={"exact": exact, **found},
    )


# (b) Training


def train_arm(
    *,
    folder: Path,
    prefix: Prefix,
    weight: float,
    student: str,
    rows: int,
    held_out: int,
    seed: int,
    steps: int,
    gate: float | None = None,
) -> dict[str, Any]:
    """One cell from the shared start; with `gate`, nats, the lengths of the ladder under an entropy gate."""
    from kullback.lm.methods.four_cells import FourCells

    curriculum: dict[str, Any] = {"lengths": LADDER, "minimum_entropy": gate} if gate is not None else {}
    method = FourCells(
        teacher=str(folder / "teacher" / "model"),
        prefix=prefix,
        reverse_weight=weight,
        max_completion=running_sums.LONGEST,
        **curriculum,
    )
    run = arms.train(
        method,
        student=str(folder / student / "model"),
        data=running_sums.make_task(rows, seed=seed, held_out=held_out, styles=running_sums.STYLES),
        output=folder / f"{prefix}-{weight}-{gate}-{seed}",
        steps=steps,
        prompts_per_step=PER_STEP,
        learning_rate=RATE,
        seed=seed,
        evaluate={
            "problems": held_out,
            "samples": 8,
            "anchors": False,
            "divergence_problems": min(128, held_out),
            "shown": 0,
            "probe_every": _probe_every(steps) if gate is not None else 0,
            "probe_problems": min(64, held_out),
        },
    )
    path = {
        "length": [row.get("schedule/source.max_completion", running_sums.LONGEST) for row in run.metrics],
        "probed": [row["probe/entropy"] for row in run.metrics if "probe/entropy" in row],
    }
    return {"after": arms.measured(run, "student"), "path": path}


def _probe_every(steps: int) -> int:
    return max(1, steps // 8)


def _train_all(job: Job) -> dict[str, Any]:
    folder, size = job.folder, job.size
    seeds, steps, held_out = range(size["seeds"]), size["steps"], size["held_out"]
    task = running_sums.make_task(size["more"], seed=100, held_out=held_out, styles=running_sums.STYLES)
    teacher, students = running_sums.make_models(
        job, task=task, teacher=TEACHER, student=STUDENT, prompts=PER_STEP, learning_rate=RATE, graded=held_out
    )
    cells = [(prefix, weight, False) for prefix in PREFIXES for weight in WEIGHTS] + [("student", 1.0, True)]
    todo = [
        {
            "folder": folder,
            "rows": size["rows"],
            "held_out": held_out,
            "steps": steps,
            "prefix": prefix,
            "weight": weight,
        }
        | {"student": f"student-{seed}", "seed": seed, "gate": GATE * students[seed]["entropy"] if gated else None}
        for prefix, weight, gated in cells
        for seed in seeds
    ]
    runs = job.spread(train_arm, todo, "arms")
    by_cell = {cell: runs[place * len(seeds) : (place + 1) * len(seeds)] for place, cell in enumerate(cells)}
    gated = by_cell.pop(("student", 1.0, True))
    return {
        "teacher": teacher,
        "before": students,
        "cells": {(prefix, weight): found for (prefix, weight, _), found in by_cell.items()},
        "gated": gated,
    }


# The page


def _monotone(rows: Sequence[Sequence[float]], rising: bool) -> tuple[int, int]:
    """Of the seeds, how many go one way all along. rows[i] holds the seeds at the i-th weight."""
    seeds = list(zip(*rows, strict=True))
    good = sum(all((b > a) == rising for a, b in itertools.pairwise(one)) for one in seeds)
    return good, len(seeds)


def _exact_directions(exact: Mapping[tuple[Prefix, float], Mapping[str, list[float]]]) -> list[Direction]:
    def along(name: str, prefix: Prefix, rising: bool) -> tuple[int, int]:
        return _monotone([exact[prefix, weight][name] for weight in GRID], rising)

    def both(name: str, rising: bool) -> tuple[bool, str]:
        counts = [along(name, prefix, rising) for prefix in PREFIXES]
        ends = "; ".join(
            f"{p} prefix {_mean(exact[p, 0.0][name]):.3f} -> {_mean(exact[p, 1.0][name]):.3f}" for p in PREFIXES
        )
        return all(
            good == total for good, total in counts
        ), f"{sum(g for g, _ in counts)} of {sum(t for _, t in counts)}; {ends}"

    accurate, accurate_words = both("avg@1", True)
    narrow, narrow_words = both("entropy", False)
    passing, total = along("pass@32", "teacher", False)
    student_wins = [
        s > t for w in GRID for s, t in zip(exact["student", w]["avg@1"], exact["teacher", w]["avg@1"], strict=True)
    ]
    corners = [(prefix, weight) for prefix in PREFIXES for weight in (0.0, 1.0)]
    least = {}
    for name in ("KL(T||S)", "KL(S||T)"):
        values = [_mean(exact[corner][name]) for corner in corners]
        least[name] = corners[values.index(min(values))]
    return [
        Direction("reverse KL raises avg@1, step by step in lambda (exact)", accurate, accurate_words, True),
        Direction("reverse KL lowers entropy, step by step in lambda (exact)", narrow, narrow_words, True),
        Direction(
            "reverse KL lowers pass@32 on teacher prefixes (exact)", passing == total, f"{passing} of {total}", True
        ),
        Direction(
            "student prefixes give the higher avg@1 (exact)",
            all(student_wins),
            f"{sum(student_wins)} of {len(student_wins)}",
        ),
        Direction(
            "KL(T||S) is least at teacher/forward, KL(S||T) at student/reverse (exact)",
            least == {"KL(T||S)": ("teacher", 0.0), "KL(S||T)": ("student", 1.0)},
            "; ".join(f"{name}: {p}/{NAMES[w]}" for name, (p, w) in least.items()),
            claimed=False,
        ),
    ]


def _training_directions(found: Mapping[str, Any]) -> list[Direction]:
    cells, gated = found["cells"], [run["after"] for run in found["gated"]]
    accuracy, entropy = (
        {cell: [run["after"][name] for run in runs] for cell, runs in cells.items()} for name in ("accuracy", "entropy")
    )
    fell = [_monotone([entropy[prefix, weight] for weight in WEIGHTS], rising=False) for prefix in PREFIXES]
    seeds = range(len(gated))

    def wins(test: Callable[..., bool], cases: Sequence[tuple[Any, ...]]) -> tuple[bool, str]:
        seen = [test(*case) for case in cases]
        return all(seen), f"{sum(seen)} of {len(seen)}"

    pairs = [(prefix, seed) for prefix in PREFIXES for seed in seeds]
    _, lower_words = wins(lambda p, i: entropy[p, 1.0][i] < entropy[p, 0.0][i], pairs)
    mixed, mixed_words = wins(
        lambda p, i: accuracy[p, 0.5][i] >= max(accuracy[p, w][i] for w in WEIGHTS) - NEARLY, pairs
    )
    sharper, sharper_words = wins(lambda p, i: accuracy[p, 1.0][i] > accuracy[p, 0.0][i], pairs)
    own, own_words = wins(
        lambda w, i: accuracy["student", w][i] > accuracy["teacher", w][i], [(w, i) for w in WEIGHTS for i in seeds]
    )
    closed = sum(max(run["path"]["length"]) < LADDER[-1] for run in found["gated"])
    kept, kept_words = wins(
        lambda i: (
            gated[i]["entropy"] > entropy["student", 1.0][i]
            and gated[i]["accuracy"] >= accuracy["student", 1.0][i] - NEARLY
        ),
        [(i,) for i in seeds],
    )
    return [
        Direction(
            "entropy falls with lambda (trained)",
            all(g == t for g, t in fell),
            f"{sum(g for g, _ in fell)} of {len(pairs)} step by step; {lower_words} from forward to reverse",
            True,
        ),
        Direction(f"the mixture has the best accuracy, or within {NEARLY} (trained)", mixed, mixed_words, True),
        Direction("reverse KL is more accurate than forward KL (trained)", sharper, sharper_words),
        Direction("student prefixes are more accurate at equal steps (trained)", own, own_words),
        Direction("forward KL is the better start for RL", None, "the RL half is not run"),
        Direction(
            "gated lengths keep more entropy and as much accuracy as the full length from the start, reverse KL",
            kept if closed else None,
            f"{kept_words}; "
            + (f"the gate closed early in {closed} of {len(gated)}" if closed else "the gate never closed early"),
        ),
    ]


NEARLY = 0.05


def _exact_table(exact: Mapping[tuple[Prefix, float], Mapping[str, list[float]]]) -> Table:
    names = ("avg@1", "pass@32", "entropy", "KL(T||S)", "KL(S||T)")
    rows = [
        [f"{prefix}, {weight:g}", *(_short(numbers[name]) for name in names)]
        for (prefix, weight), numbers in exact.items()
    ]
    return Table(
        "(a) The cells at the end of descent, exact prefix distributions",
        ["prefix, lambda", *names],
        rows,
        "Mean ± standard error over seeds, each of 40 prompts. Entropy in nats per token; the last two columns in "
        "nats per string.",
    )


def _training_table(found: Mapping[str, Any]) -> Table:
    rows = [_line("student before", found["before"], teacher=False)]
    for (prefix, weight), runs in found["cells"].items():
        rows.append(_line(f"{prefix}, {weight:g}", [run["after"] for run in runs]))
    rows.append(
        _line(f"student, 1, gated lengths {', '.join(map(str, LADDER))}", [run["after"] for run in found["gated"]])
    )
    teacher = found["teacher"]
    note = "Mean ± standard error over seeds (each seed). Held-out problems, 8 samples each at temperature 1; "
    note += "right means the whole reply in the style it starts with. Sums: share of replies that start with +, "
    note += "0.6 in the data. "
    accuracy, entropy = (teacher.get(name, math.nan) for name in ("accuracy", "entropy"))
    note += f"The teacher: accuracy {accuracy:.3f}, entropy {entropy:.3f}."
    return Table("(b) After training", ["prefix, lambda", *(title for title, _, _ in SHOWN)], rows, note)


SHOWN = (
    ("accuracy", "accuracy", 2),
    ("pass@8", "pass@8", 2),
    ("entropy", "entropy", 2),
    ("sums", "reward/sums", 2),
    ("KL(T||S), teacher text", "forward_kl_teacher_text", 2),
    ("KL(S||T), own text", "reverse_kl_student_text", 2),
)


def _line(name: str, graded: Sequence[Mapping[str, float]], teacher: bool = True) -> list[Any]:
    cells: list[Any] = []
    for _, key, digits in SHOWN:
        there = all(key in one for one in graded)
        cells.append(Spread([one[key] for one in graded], digits) if there else "")
    return [name, *cells]


def _gate_table(found: Mapping[str, Any]) -> Table:
    rows = []
    for seed, (run, before) in enumerate(zip(found["gated"], found["before"], strict=True)):
        lengths = run["path"]["length"]
        stages = [f"{int(length)} ({lengths.count(length)} steps)" for length in dict.fromkeys(lengths)]
        probed = " ".join(f"{value:.2f}" for value in run["path"]["probed"])
        rows.append([f"seed {seed}", f"{GATE * before['entropy']:.2f}", " -> ".join(stages), probed])
    return Table(
        "(b) The entropy-gated length curriculum, reverse KL on student prefixes",
        ["", "gate, nats", "lengths trained", "entropy at probes"],
        rows,
        f"The gate is {GATE:g} of the student's first entropy. A probe samples held-out problems at full length.",
    )


def _figure(exact: Mapping[tuple[Prefix, float], Mapping[str, list[float]]], found: Mapping[str, Any]) -> Any:
    figure, (left, middle, right) = new_figure(3)
    for axis, name in ((left, "avg@1"), (middle, "pass@32")):
        for prefix in PREFIXES:
            color = COLORS[prefix]
            points = [(_mean(exact[prefix, w]["entropy"]), _mean(exact[prefix, w][name])) for w in GRID]
            axis.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=f"{prefix} prefix")
            axis.annotate("forward", points[0], fontsize=7, xytext=(-4, 6), textcoords="offset points", ha="right")
        axis.set_xlabel("entropy, nats per token")
        axis.set_ylabel(f"{name} (exact)")
    left.legend(fontsize=7, frameon=False)
    for (prefix, weight), runs in found["cells"].items():
        points = [(run["after"]["entropy"], run["after"]["accuracy"]) for run in runs]
        right.scatter(
            *zip(*points, strict=True),
            color=COLORS[prefix],
            marker=MARKERS[weight],
            s=26,
            label=f"{prefix}, {NAMES[weight]}",
        )
    points = [(run["after"]["entropy"], run["after"]["accuracy"]) for run in found["gated"]]
    right.scatter(*zip(*points, strict=True), color="#777777", marker="*", s=40, label="gated lengths")
    right.set_xlabel("entropy, nats per token")
    right.set_ylabel("accuracy (trained)")
    right.legend(fontsize=6, frameon=False)
    return figure


COLORS: dict[Prefix, str] = {"teacher": "#d55e00", "student": "#0072b2"}
MARKERS = {0.0: "o", 0.5: "s", 1.0: "^"}


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _short(values: Sequence[float]) -> str:
    spread = Spread(values, 3)
    return f"{spread.mean:.3f}" + (f" ± {spread.error:.3f}" if len(values) > 1 else "")


SETUP = """\
(a) 40 prompts, strings of 4 tokens out of 4. The teacher puts 0.55 on one string, 0.40 on another and spreads the
rest evenly; the first is right for three quarters of the prompts, the second for the others. The student is a product
of four independent softmaxes for each prompt, so it cannot hold both. {descent} steps of exact gradient descent (rate
1, sums over prompts and positions) from uniform, {exact_seeds} seeds. lambda is the weight of the reverse term.

(b) Eight digits; the reply is a style token, then their running sums (60% of the data) or running differences (40%)
modulo seven. Teacher: a Qwen3 of 3 layers and width 96, {teacher} supervised steps on the mixture. Student: 1 layer,
width 24, {student} supervised steps. Then {steps} steps of 32 prompts out of {rows}, AdamW at 3e-3, gradient norm
clipped at 1: method `four_cells` for both prefixes and lambda 0, 0.5, 1, {seeds} seeds. Teacher text is written once
for each prompt, student text anew at every step. The gated run starts at completions of 4 tokens and may lengthen
after a probe every {probe} steps."""


def _reading(found: Mapping[str, Any]) -> str:
    shares = [run["after"].get("reward/sums", math.nan) for runs in found["cells"].values() for run in runs]
    return (
        "In (a) the direction decides which mode is held and how firmly: forward KL spreads over both strings "
        "(entropy, pass@32), reverse KL picks one (avg@1). Only the teacher/forward cell is the gradient of a "
        "divergence between whole strings, so only there is a sequence KL minimised on purpose. In (b) a student can "
        f"hold both styles, and does: the share of sums ends between {min(shares):.2f} and {max(shares):.2f}. So "
        "entropy there says how far a student came, not which mode it gave up: read it beside accuracy, and (a) for "
        "the direction."
    )


DIFFERS = (
    "**The RL half is not run**: GRPO from each cell's student comes with a later release, so which cell is the "
    "better start for RL is open here.",
    "A token mean over the step instead of the sum over positions; models of 10 thousand to 300 thousand parameters "
    "on one synthetic task.",
    "The card's second style, sums from right to left, is replaced by differences: with rotary positions a teacher "
    "of this size had not learned "
    "the reversed order after 1200 steps.",
    "H_min, the ladder and the stage length are not published; here they are half the first entropy, 4/7/10 tokens "
    "and an eighth of the run. Where the gate fails, the length in use is kept, not the one before it.",
    "Replies have one length, so length inflation under reverse KL cannot show.",
    "Compute is not equalised: student prefixes cost a rollout at every step.",
)
