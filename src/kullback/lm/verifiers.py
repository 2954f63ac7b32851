"""Verifiers: a function of (problem, completion text) that says whether the completion is right.

Every verifier returns a dict of floats. "accuracy" is 0 or 1; "score" is the graded value where a verifier has one.
`verifier(...)` builds one from its name; `Task.verify` calls it and turns a failure (an exception, no answer in time, a
value that is no number) into {"accuracy": nan, "error": 1}.
"""

import atexit
import difflib
import importlib.util
import inspect
import json
import math
import os
import queue
import re
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kullback.lm.tasks import Problem

Verifier = Callable[["Problem", str], dict[str, float]]

EXTRACTS = ("auto", "tag", "last_line", "equals", "boxed", "all")
NAMES = ("exact", "reasoning_gym", "math")


def extract_answer(text: str, how: str = "auto") -> str | None:
    r"""The answer inside a completion, stripped; None where the text has none.

    Args:
        how: "tag", the last <answer>...</answer>; "last_line", the last line that is not empty; "equals", what follows
            the last "=" of that line; "boxed", the last \boxed{...}; "all", the whole text; "auto", the tag if there
            is one, else the last line.

    >>> extract_answer("12+7=19;19-5=14", "equals")
    '14'
    >>> extract_answer("Sure.\n<answer> 14 </answer> Bye!")
    '14'
    """
    if how not in EXTRACTS:
        raise ValueError(f"extract={how!r}: choose one of {', '.join(EXTRACTS)}{_nearest(how, EXTRACTS)}")
    if how in ("auto", "tag"):
        tags = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
        if tags:
            return str(tags[-1]).strip()
        if how == "tag":
            return None
    if how == "all":
        return text.strip() or None
    if how == "boxed":
        return _last_boxed(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    if how == "equals":
        _, found, answer = lines[-1].rpartition("=")
        return (answer.strip() or None) if found else None
    return lines[-1]


def exact(extract: str = "auto") -> Verifier:
    """1 where the extracted answer and the gold answer are the same text, up to runs of white space."""

    def verify(problem: "Problem", completion: str) -> dict[str, float]:
        answer = extract_answer(completion, extract)
        gold = " ".join(str(problem.answer).split())
        return {"accuracy": float(answer is not None and " ".join(answer.split()) == gold)}

    return verify


def reasoning_gym(score_answer: Callable[[str | None, dict[str, Any]], float], extract: str = "auto") -> Verifier:
    """reasoning-gym's own grading; "score" is its graded value, and only a full score counts as accurate."""

    def verify(problem: "Problem", completion: str) -> dict[str, float]:
        entry = {"question": problem.metadata["question"], "answer": problem.answer, "metadata": problem.metadata}
        score = float(score_answer(extract_answer(completion, extract), entry))
        return {"accuracy": float(score >= 1.0), "score": score}

    return verify


def math_answer(extract: str | None = None, timeout: float = 5.0) -> Verifier:
    """math-verify: 1 where the two are the same mathematical object (1/2 and 0.5, sets, intervals, LaTeX).

    Args:
        extract: None lets math-verify find the answer in the whole completion; otherwise as in `extract_answer`.
        timeout: seconds before a comparison is given up and reported as an error.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("verifier='math' needs math-verify: pip install 'math-verify[antlr4_13_2]'")

    def verify(problem: "Problem", completion: str) -> dict[str, float]:
        answer = completion if extract is None else extract_answer(completion, extract)
        if answer is None or not answer.strip():
            return {"accuracy": 0.0}
        return {"accuracy": float(_MATH.equal(str(problem.answer), answer, timeout))}

    return verify


def user_function(where: str) -> Verifier:
    """A person's own verifier, `path/to/file.py:function`; see `from_callable`."""
    return from_callable(load_function(where, "task.verifier"))


def from_callable(function: Callable[["Problem", str], Any]) -> Verifier:
    """A verifier from any function of (problem, completion text).

    It returns a bool or a float (then "score" is the value and "accuracy" whether it reaches 1) or a dict of floats,
    which is kept as it is and needs an "accuracy".

    Raises:
        ValueError: when it is called and what the function returns is no finite number, or has no accuracy. A nan would
            otherwise pass for an answer that is wrong.
    """

    def verify(problem: "Problem", completion: str) -> dict[str, float]:
        value = function(problem, completion)
        if isinstance(value, Mapping):
            return checked({str(name): _number(number, str(name)) for name, number in value.items()})
        score = _number(value, "score")
        return {"accuracy": float(score >= 1.0), "score": score}

    return verify


def checked(grades: dict[str, float]) -> dict[str, float]:
    """Grades as they are.

    Raises:
        ValueError: there is no accuracy, or one of them is nan or infinite.
    """
    if "accuracy" not in grades:
        raise ValueError(f"the verifier returned no accuracy; it returned {', '.join(grades) or 'nothing'}")
    for name, value in grades.items():
        _number(value, name)
    return grades


def in_time(verify: Verifier, seconds: float) -> Verifier:
    """The same verifier, given up after so many seconds: a call that hangs costs its own sample and no other.

    Calls run in a daemon thread, a new one after one was given up. Python cannot end a thread, so that one goes on
    until its call returns or the process ends: it keeps its memory, and a core if it computes, but it never holds up
    the end of the process. C code that never gives the interpreter back stops all threads, this limit too. A signal
    (SIGALRM) cannot be used in a thread: a verifier that sets one, as math-verify's own time limits do, needs
    `task.verifier_timeout=0`, or `verifier: math`, which runs math-verify in a process.

    Raises:
        TimeoutError: when it is called and gives no answer in time.
    """

    of_caller = threading.local()  # callers in several threads do not wait for each other

    def verify_in_time(problem: "Problem", completion: str) -> dict[str, float]:
        worker: _Worker | None = getattr(of_caller, "worker", None)
        if worker is None or worker.process != os.getpid():  # a fork takes no threads along
            worker = of_caller.worker = _Worker(verify)
        answers: queue.SimpleQueue[dict[str, float] | BaseException] = queue.SimpleQueue()
        worker.calls.put((answers, problem, completion))
        try:
            answer = answers.get(timeout=seconds)
        except queue.Empty:
            of_caller.worker = None
            raise TimeoutError(f"the verifier gave no answer within {seconds:g} s") from None
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, BaseException):  # SystemExit of a user's function ends a thread, not the run
            raise RuntimeError(f"the verifier raised {type(answer).__name__}: {answer}")
        return answer

    return verify_in_time


class _Worker:
    """A daemon thread that verifies one completion after another; it ends when it is no longer held."""

    def __init__(self, verify: Verifier) -> None:
        self.process = os.getpid()
        self.calls: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        threading.Thread(target=_work, args=(verify, self.calls), name="verifier", daemon=True).start()

    def __del__(self) -> None:
        self.calls.put(None)


def _work(verify: Verifier, calls: "queue.SimpleQueue[tuple[Any, ...] | None]") -> None:
    while (call := calls.get()) is not None:
        answers, *given = call
        try:
            answers.put(verify(*given))
        except BaseException as error:  # whatever it is, the caller gets it
            answers.put(error)


def _number(value: Any, name: str) -> float:
    if isinstance(value, str | bytes):
        raise ValueError(f"the verifier returned {name}={value!r}, which is text and not a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"the verifier returned {name}={number}, which is not a finite number")
    return number


def load_function(where: str, field: str) -> Callable[..., Any]:
    """The function that `path/to/file.py:function` names; `field` is the option to blame in an error."""
    path_text, _, name = where.rpartition(":")
    path = Path(path_text).expanduser()
    if not path_text.endswith(".py") or not name.isidentifier():
        raise ValueError(f"{field}={where!r}: write it as path/to/file.py:function")
    if not path.is_file():
        raise ValueError(f"{field}={where!r}: there is no file {path.resolve()}")
    spec = importlib.util.spec_from_file_location(f"kullback_user_{path.stem}", path)
    assert spec is not None  # a .py path always has both
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{field}={where!r}: the file fails on import with {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(
            f"{field}={where!r}: the file defines no function {name!r}; it has {', '.join(names) or 'none'}"
        )
    return function


def _last_boxed(text: str) -> str | None:
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len(r"\boxed{")
    for at in range(begin - 1, len(text)):  # braces nest, so a regular expression will not do
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[begin:at].strip()
    return None


def _nearest(name: str, names: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""


_MATH_WORKER = """
import json, sys
from math_verify import parse, verify
print("ready", flush=True)
for line in sys.stdin:
    gold, answer = json.loads(line)
    try:
        result = bool(verify(parse("$" + gold + "$") or parse(gold), parse(answer)))
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    print(json.dumps(result), flush=True)
"""


class _MathWorker:
    """math-verify in a process of its own, one question at a time.

    Its own time limit is a SIGALRM, which works in the main thread only and cannot stop C code; a process can be
    killed from any thread, and takes the memory of a runaway simplification with it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def equal(self, gold: str, answer: str, timeout: float) -> bool:
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            process.stdin.write(json.dumps([gold, answer]) + "\n")
            process.stdin.flush()
            result = json.loads(self._line(process, timeout))
        if isinstance(result, str):
            raise RuntimeError(f"math-verify failed on {answer[-80:]!r}: {result}")
        return bool(result)

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _MATH_WORKER],
                stdin=pipe,
                stdout=pipe,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self._line(self._process, 120.0)  # importing sympy takes seconds; not part of anyone's time limit
        return self._process

    def _line(self, process: "subprocess.Popen[str]", timeout: float) -> str:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], timeout)
        line = process.stdout.readline() if ready else ""
        if not line:
            process.kill()
            process.wait()
            self._process = None
            raise TimeoutError(f"math-verify gave no answer within {timeout:g} s")
        return line

    def close(self) -> None:
        """End the process; the next question starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


_MATH = _MathWorker()
atexit.register(_MATH.close)
