"""A method is five answers: whose text, match what, which divergence, how much a token counts, what changes over time.

A method is a frozen dataclass. Every field belongs to one of the five questions, under which a recipe names it; the
methods below return the parts that the one trainer runs. The order of a step: controllers write into the fields,
`source` draws, `readers` add notes, `scores` are measured, `weight` makes detached columns, `signal` makes the terms,
the optimiser steps, `after` copies weights.
"""

import dataclasses
import importlib
import importlib.util
import pkgutil
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from kullback.run.controllers import Controller
from kullback.run.terms import Mean, Term

if TYPE_CHECKING:
    from kullback.lm.batch import Batch
    from kullback.lm.moment import Moment
    from kullback.lm.parts import Part
    from kullback.lm.players import Copy
    from kullback.lm.readers import Reader
    from kullback.lm.sources import Source
    from kullback.lm.targets import Target

Question = Literal["source", "target", "signal", "weight", "schedule"]
Together = Literal["row", "group", "step"]
QUESTIONS: tuple[Question, ...] = ("source", "target", "signal", "weight", "schedule")


def answer(question: Question, default: Any = dataclasses.MISSING) -> Any:
    """A field of a method, and the question it answers: `divergence: str = answer("signal", "reverse_kl")`."""
    return dataclasses.field(default=default, metadata={"question": question})


@dataclass(frozen=True, kw_only=True)
class Method:
    """What every method has. Write one by subclassing it once, answering `source` and `signal` and what else it needs.

    Args:
        max_prompt: tokens; a longer prompt is an error, never cut.
        max_completion: tokens; what is drawn is cut here.
        samples: completions per prompt, where the source writes them.
        sampling_temperature: divides the logits of whoever writes; 0 is greedy.
        aggregate: how a term without a `mean` of its own is averaged: "token", "row" or "row_sum".
    """

    max_prompt: int = answer("source", 1024)
    max_completion: int = answer("source", 256)
    samples: int = answer("source", 1)
    sampling_temperature: float = answer("source", 1.0)
    aggregate: Mean = answer("weight", "token")

    @property
    def scores(self) -> tuple[str, ...]:
        """Numbers per token to measure, without gradient, before `weight`.

        Written like "log_prob:student" or "forward_kl:teacher,student".
        """
        return ()

    @property
    def passes(self) -> int:
        """Optimiser steps over one draw."""
        return 1

    @property
    def together(self) -> Together:
        """What stays in one micro-batch: a live value of `signal` may couple the rows of a group, or the whole step."""
        return "row"

    def players(self) -> dict[str, Any]:
        """Models beside the student, by name: a path, a hub name, a loaded model, or `INITIAL`; None leaves it out.

        They are frozen; only `after` changes them.
        """
        return {}

    def parts(self) -> "dict[str, Part]":
        """What is trained beside the student, such as a value head."""
        return {}

    def begin(self, at: "Moment") -> None:
        """Once before the first step, never on resume: what is collected beforehand goes into `at.store`."""

    def readers(self) -> "list[Reader]":
        """What reads the rows between writing and scoring, and adds notes to them."""
        return []

    def after(self, step: int) -> "list[Copy]":
        """Weights that are copied from one player to another once `step` optimiser steps are done."""
        return []

    def source(self) -> "Source":
        raise NotImplementedError(f"{type(self).__name__} does not say whose text it trains on: define source()")

    def targets(self) -> dict[str, "Target"]:
        return {}

    def signal(self, batch: "Batch") -> list[Term]:
        raise NotImplementedError(f"{type(self).__name__} does not say what it minimises: define signal()")

    def weight(self, step: "Batch") -> dict[str, Tensor]:
        return {}

    def schedule(self) -> list[Controller]:
        return []


@dataclass(frozen=True, kw_only=True)
class Distillation(Method):
    """A method with a teacher.

    Args:
        teacher: path or hub name, or a loaded model.
        teacher_system: a system prompt that only the teacher reads.
        top_k: keep only the teacher's k likeliest tokens at each position; None keeps the whole vocabulary.
        cache: directory where the teacher's top-k is kept on disk and found again.
    """

    teacher: Any = answer("target")
    teacher_system: str | None = answer("target", None)
    top_k: int | None = answer("target", None)
    cache: str | None = answer("target", None)

    def players(self) -> dict[str, Any]:
        return {"teacher": self.teacher}

    def targets(self) -> dict[str, "Target"]:
        from kullback.lm import targets

        return {"teacher": targets.frozen("teacher", system=self.teacher_system, top_k=self.top_k, cache=self.cache)}


def fields_of(method: type[Method]) -> dict[Question, dict[str, dataclasses.Field[Any]]]:
    """The fields of a method under the questions they answer."""
    table: dict[Question, dict[str, dataclasses.Field[Any]]] = {question: {} for question in QUESTIONS}
    for field in dataclasses.fields(method):
        table[field.metadata["question"]][field.name] = field
    return table


@cache
def methods() -> dict[str, type[Method]]:
    """The methods by name: one module of `kullback.lm.methods` each."""
    import kullback.lm.methods as package

    found = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        found[module_info.name] = _method_in(module)
    return found


def find_method(name: str) -> type[Method]:
    """A method by name, or a person's own as `file.py:Class`.

    Raises:
        ValueError: no such method, with the nearest names; no such file or class.
    """
    if ".py" in name:
        path, _, attribute = name.partition(":")
        if not Path(path).is_file():
            raise ValueError(f"method={name!r}: no file {path!r} here; give the path as file.py or file.py:Class")
        module = _load(str(Path(path).resolve()), Path(path).stat().st_mtime_ns)
        return getattr(module, attribute) if attribute else _method_in(module)
    known = methods()
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)
        raise ValueError(
            f"method={name!r} is not known; did you mean {' or '.join(near)}? `kullback methods` lists all"
        )
    return known[name]


@cache
def _load(path: str, changed: int) -> Any:
    """A file as a module; run once for each time it was changed, so that what it registers is registered once."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _method_in(module: Any) -> type[Method]:
    own = [
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Method) and item.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise ValueError(f"{module.__name__}: a method file defines one Method, this one has {len(own)}")
    return own[0]
