"""A run that is described and checked, but not yet loaded."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from kullback.divergence import FDivergence, divergence
from kullback.lm.method import Method
from kullback.lm.models import check_loadable
from kullback.lm.players import INITIAL
from kullback.lm.rehearse import objective, rehearse
from kullback.lm.settings import EvaluateSettings, TrainSettings, describe
from kullback.lm.tasks import Task
from kullback.run.controllers import Controller


@dataclass
class Plan:
    """Everything a run needs, checked but not yet loaded.

    Args:
        student, teacher: a path, a hub name, "embedded:student", or a loaded model; the student also a specification
            of a new small one ({"architecture": "qwen3", ...}).
        tokenizer: None takes the student's.
        recipe: what recipe.yaml will show.
    """

    method: Method
    student: Any
    task: Task
    output: Path
    tokenizer: Any = None
    train: TrainSettings = field(default_factory=TrainSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    schedule: tuple[Controller, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def players(self) -> dict[str, Any]:
        """The models beside the student, those that are left out left out."""
        return {name: model for name, model in self.method.players().items() if model is not None}


def check(plan: Plan) -> str:
    """Find everything that can be known to be wrong before models are loaded; return the objective in words.

    Raises:
        ValueError: the first thing that is wrong, in a sentence.
    """
    terms = rehearse(plan.method, plan.schedule)
    named = {"student": plan.student} | {f"target.{name}": model for name, model in plan.players.items()}
    for role, name in named.items():
        if isinstance(name, str) and name != INITIAL:
            check_loadable(name, role=role)
    if not len(plan.task.train):
        raise ValueError(f"task={plan.task.name!r} has no training problems")
    if not plan.evaluate.probe_every:
        for controller in [*plan.method.schedule(), *plan.schedule]:
            if controller.when == "probe":
                wanted = " and ".join(controller.reads)
                raise ValueError(
                    f"evaluate.probe_every=0: {type(controller).__name__} reads {wanted} and would never act; "
                    "set it to a number of steps"
                )
    return objective(plan.method, terms, plan.schedule)


def make_method(kind: type[Method], values: Mapping[str, Any]) -> Method:
    """A method from named fields, with types checked.

    Raises:
        ValueError: a field does not exist (with the nearest names), is missing, or has a wrong value.
    """
    known = {item.name for item in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            near = get_close_matches(name, [*known, *TrainSettings.model_fields], n=3, cutoff=0.5) or sorted(known)
            raise ValueError(
                f"{name}={values[name]!r}: no such setting of {kind.__name__}; did you mean {' or '.join(near)}?"
            )
    values = {name: _by_name(name, value, kind) for name, value in values.items()}
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        raise ValueError(describe(error)) from error


def _by_name(name: str, value: Any, kind: type[Method]) -> Any:
    """A divergence as the text that reads back as it; anything else as it is."""
    if not isinstance(value, FDivergence):
        return value
    try:
        same = divergence(str(value)) == value
    except ValueError:
        same = False
    if not same:
        raise ValueError(
            f"{name}={value}: this name is not known; kb.divergence.register it, or give the method itself, "
            f"{kind.__name__}({name}=...)"
        )
    return str(value)


def describe_plan(plan: Plan) -> dict[str, Any]:
    """A plan as a recipe would write it; loaded objects by their class."""

    def plain(value: Any) -> Any:
        return (
            value if isinstance(value, str | int | float | bool | list | dict | None) else f"<{type(value).__name__}>"
        )

    answers: dict[str, dict[str, Any]] = {}
    for item in dataclasses.fields(plan.method):
        answers.setdefault(item.metadata["question"], {})[item.name] = plain(getattr(plan.method, item.name))
    return {
        "method": type(plan.method).__module__.rpartition(".")[2],
        "student": plain(plan.student),
        "task": plan.task.name,
        **answers,
        "train": plan.train.model_dump(),
        "evaluate": plan.evaluate.model_dump(),
    }
