"""The toy task of the papers' pages: running sums of eight digits, modulo seven, written one token at a time.

    prompt 35216040  ->  completion 31343300                 (one right answer)
    prompt 35216040  ->  completion +31343300 or -46434400   (a choice: a style token, then sums or differences)

Each sum needs the one before it, so what a student writes itself soon differs from what it was shown. Models are the
tiny Qwen3 of `kullback.lm.tiny`, and all training is `kb.train`'s.
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kullback.papers.arms import measured, train
from kullback.papers.reproduction import Job

if TYPE_CHECKING:
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


def make_models(
    job: Job,
    *,
    task: dict[str, Any],
    teacher: Mapping[str, int],
    student: Mapping[str, int],
    prompts: int,
    learning_rate: float,
    graded: int = 0,
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """A teacher and a student for each seed of the job, fine-tuned; left in its folder as "teacher" and "student-SEED".

    Args:
        teacher, student: their shapes; how many steps each is trained for is in the job's size under these names.
        graded: problems that a student is graded on; the teacher is always, on the held-out ones of the size.

    Returns:
        How good they are.
    """
    size, start = job.size, {"folder": job.folder, "task": task}
    models: list[dict[str, Any]] = [
        start
        | {"name": "teacher", "shape": teacher, "steps": size["teacher"], "seed": 0, "graded": size["held_out"]}
        | {"prompts_per_step": 2 * prompts, "learning_rate": 2e-3}
        | {"lr_schedule": "cosine", "warmup_steps": size["teacher"] // 20}
    ]
    models += [
        start
        | {"name": f"student-{seed}", "shape": student, "steps": size["student"], "seed": seed, "graded": graded}
        | {"prompts_per_step": prompts, "learning_rate": learning_rate}
        for seed in range(size["seeds"])
    ]
    made, *students = job.spread(fine_tune, models, "models")
    return made, students
