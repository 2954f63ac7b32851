"""What is asked and how it is graded: a problem, a task, and how the options of either are read."""

import difflib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from kullback.lm import verifiers
from kullback.lm.worked import WRITERS

Turn = dict[str, str]

ROLES = ("system", "user", "assistant", "tool")
SHARED_OPTIONS = {"system", "verifier", "verifier_timeout", "extract", "reply", "held_out"}
VERIFIER_TIMEOUT = 30.0  # seconds for one completion, where the verifier is somebody's code
PREFIX = "reasoning_gym/"
PRESETS: dict[str, dict[str, Any]] = {
    "embedded:arithmetic": {  # what the shipped teacher and student were trained on
        "name": "reasoning_gym/chain_sum",
        "min_terms": 4,
        "max_terms": 4,
        "max_digits": 1,
        "question": "{expression}",
        "reply": "sum_steps",
        "extract": "equals",
    }
}


@dataclass(frozen=True)
class Problem:
    """One thing to answer."""

    id: str
    messages: list[Turn]  # what the student reads; ends before the first assistant turn
    reply: list[Turn] | None  # the data set's continuation, from its first assistant turn on; None: prompts only
    answer: Any = None  # gold answer for the verifier
    metadata: dict[str, Any] = field(default_factory=dict)
    rejected: list[Turn] | None = None  # in preference data the worse continuation; `reply` is then the better one


@final
@dataclass
class Task:
    """Problems and how to grade them. `spec` is what `load_task` was given, without loaded objects."""

    name: str
    train: Sequence[Problem]
    held_out: Sequence[Problem]
    verifier: verifiers.Verifier | None = None
    spec: dict[str, Any] = field(default_factory=dict)
    errors: int = 0  # how often the verifier failed
    last_error: str = ""

    def verify(self, problem: Problem, completion: str) -> dict[str, float]:
        """Grades: "accuracy" 0 or 1, and whatever else the verifier says. It never raises.

        nan accuracy means nobody knows: the problem has no gold answer, or the verifier failed: it raised, gave no
        answer in time, or returned what is no finite number. Then "error" is 1, and `errors` and `last_error` say how
        often and why.
        """
        if self.verifier is None:
            return {"accuracy": float("nan")}
        try:
            return verifiers.checked(self.verifier(problem, completion))
        except Exception as error:  # a user's function may raise anything, and one row must not end a run
            self.errors += 1
            self.last_error = f"{problem.id}: {type(error).__name__}: {error}"
            return {"accuracy": float("nan"), "error": 1.0}


# Options


def verifier_of(
    name: Any, extract: str | None, score_answer: Callable[..., float] | None, timeout: Any = None
) -> verifiers.Verifier:
    """The verifier that `task.verifier` names. Others' code runs at most `timeout` seconds a call; 0 sets no limit."""
    if timeout is not None and (
        isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 <= timeout < float("inf")
    ):
        raise ValueError(f"task.verifier_timeout={timeout!r}: write seconds for one completion, or 0 to set no limit")
    seconds = VERIFIER_TIMEOUT if timeout is None else timeout

    def limited(verifier: verifiers.Verifier) -> verifiers.Verifier:
        return verifiers.in_time(verifier, seconds) if seconds else verifier

    if callable(name):
        return limited(verifiers.from_callable(name))
    if not isinstance(name, str):
        raise ValueError(f"task.verifier={name!r}: write a name or path/to/file.py:function")
    verifiers.extract_answer("", extract or "auto")  # an unknown way of extracting is refused now, not while training
    if name == "reasoning_gym" and score_answer is not None:
        return limited(verifiers.reasoning_gym(score_answer, extract or "auto"))
    if name == "exact":
        return verifiers.exact(extract or "auto")
    if name == "math":
        return verifiers.math_answer(extract, *([timeout] if timeout else []))
    if ".py" in name:
        return limited(verifiers.user_function(name))
    names = ["auto", "exact", "math"]
    raise ValueError(
        f"task.verifier={name!r}: choose auto, exact, math or path/to/file.py:function{nearest(name, names)}"
    )


def writer_of(name: Any) -> Callable[..., str] | None:
    if name is None:
        return None
    if callable(name):
        return name
    if name == "answer":
        return lambda question, answer, metadata, rng: "" if answer is None else str(answer)
    if name in WRITERS:
        return WRITERS[name]
    if isinstance(name, str) and ".py" in name:
        return verifiers.load_function(name, "task.reply")
    names = ["answer", *WRITERS]
    raise ValueError(
        f"task.reply={name!r}: choose {', '.join(names)} or path/to/file.py:function{nearest(str(name), names)}"
    )


def check_options(name: str, options: dict[str, Any], valid: set[str]) -> None:
    for key in options:
        if key not in valid | {"name"}:
            raise ValueError(
                f"task.{key}={options[key]!r}: {name} has no such option{nearest(key, valid)} "
                f"(it has {', '.join(sorted(valid - {'data'}))})"
            )


def count_option(options: dict[str, Any], key: str, default: int, least: int) -> int:
    value = options.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"task.{key}={value!r}: choose a whole number, {least} or more")
    return value


def system_turns(options: dict[str, Any]) -> list[Turn]:
    return [{"role": "system", "content": str(options["system"])}] if options.get("system") else []


def roles_of(turns: Sequence[Turn]) -> str:
    return ", ".join(turn["role"] for turn in turns) or "no turn"


def known_names() -> list[str]:
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        return list(PRESETS)
    return [*PRESETS, *(PREFIX + name for name in DATASETS)]


def nearest(name: str, names: Any, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(prefix + match for match in close)}?" if close else ""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def digest(text: str) -> bytes:
    """What decides, whatever the seed, on which side of the split a text falls."""
    return hashlib.sha256(text.encode()).digest()
