"""What Python calls: training and grading, from names or loaded objects."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from kullback.lm.assemble import assemble
from kullback.lm.evaluate import Evaluation, grade
from kullback.lm.method import Method, find_method
from kullback.lm.plan import Plan, describe_plan, make_method
from kullback.lm.run import Run, run
from kullback.lm.settings import EvaluateSettings, TrainSettings, describe
from kullback.lm.tasks import Task, load_task
from kullback.run.controllers import parse_schedule


def train(
    method: Method | str,
    *,
    student: Any,
    data: Any,
    tokenizer: Any = None,
    output: str | Path = "runs/latest",
    schedule: Mapping[str, str] | None = None,
    evaluate: EvaluateSettings | Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    **options: Any,
) -> Run:
    """Train a student with a method, from names or loaded objects.

        kb.train("on_policy_distillation", student=student, teacher=teacher, tokenizer=tokenizer, data=rows, steps=100)

    Args:
        method: a method, or the name of one; its fields may then stand among the options.
        student: path, hub name, "embedded:student" or a loaded causal language model.
        data: a task as a recipe writes it, a `Task`, a `datasets.Dataset`, or a list of rows.
        tokenizer: needed beside a loaded student.
        output: the run directory.
        schedule: fields that change over time: {"signal.temperature": "linear(2 -> 1, steps=100)"}.
        evaluate: see `EvaluateSettings`; left out, data without held-out problems is not graded.
        resume: go on from the last checkpoint in `output`.
        overwrite: replace a run that is there.
        console: where the objective and the memory forecast are printed; standard error by default.
        options: fields of the method (where it is named) and of `TrainSettings`.

    Raises:
        ValueError: an option is unknown or out of range, naming it.
    """
    own = {name: options.pop(name) for name in list(options) if name in TrainSettings.model_fields}
    try:
        settings = TrainSettings(**own)
        grading = evaluate if isinstance(evaluate, EvaluateSettings) else EvaluateSettings(**(evaluate or {}))
    except ValidationError as error:
        raise ValueError(describe(error)) from error
    if isinstance(method, str):
        method = make_method(find_method(method), options)
    elif options:
        raise ValueError(
            f"{next(iter(options))!r} is no training setting; fields of a method go into the method itself"
        )
    task = data if isinstance(data, Task) else load_task(data, seed=settings.seed)
    if evaluate is None and not len(task.held_out):
        grading = EvaluateSettings(problems=0)  # nothing was asked for, and there is nothing to grade on
    controllers = tuple(parse_schedule(name, text) for name, text in (schedule or {}).items())
    plan = Plan(method, student, task, Path(output), tokenizer, settings, grading, controllers)
    plan.recipe = describe_plan(plan)
    return run(plan, resume=resume, overwrite=overwrite, console=console)


def evaluate(
    student: Any,
    *,
    data: Any,
    teacher: Any = None,
    tokenizer: Any = None,
    **settings: Any,
) -> dict[str, Any]:
    """Grade a model on held-out problems; with a teacher, also how far apart the two are. See `EvaluateSettings`."""
    from kullback.lm.methods.on_policy_distillation import OnPolicyDistillation

    try:
        grading = EvaluateSettings(**settings)
    except ValidationError as error:
        raise ValueError(describe(error)) from error
    task = data if isinstance(data, Task) else load_task(data, seed=0)  # held-out problems are the same for every seed
    plan = Plan(OnPolicyDistillation(teacher=teacher), student, task, Path("."), tokenizer, evaluate=grading)
    at = assemble(plan)
    return grade(Evaluation(grading, at, plan.method.max_completion), at, "student", label="evaluate")
