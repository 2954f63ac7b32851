"""Who marks the tokens that decided: a rule for the built-in task, a model of the run, a served one, or your function.

An annotator sees the problem, the response and whether it was right, and answers with spans of the response and a label
for their type. It never sees what the label is used for. Whatever it does wrong costs the row it was asked about.
"""

import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, final

import torch

from kullback.lm.chat import end_ids, prompt_ids
from kullback.lm.generate import generate
from kullback.lm.models import context_length
from kullback.lm.moment import Moment
from kullback.lm.verifiers import load_function

LONGEST_LABEL = 80  # characters: a type, not an explanation
AT_ONCE = 16  # how many calls wait for an answer together
KEY = "OPENAI_API_KEY"  # environment variable that an endpoint's key is read from

QUESTION = """\
Below are a problem and a solution, cut into numbered segments. The solution is {verdict}.
Which segments {what}? Name as few as possible.
Answer with JSON alone: {{"segments": [2], "label": "type of step"}}. The label says in a few words what kind of step \
this is, without numbers and without the answer.

Problem:
{problem}

Solution:
{solution}
"""


@dataclass(frozen=True)
class Asked:
    """One row: the turns that the student read, what it wrote, and whether that was right."""

    messages: Sequence[Mapping[str, str]]
    response: str
    correct: bool

    @property
    def problem(self) -> str:
        return self.messages[-1]["content"] if self.messages else ""


@dataclass(frozen=True)
class Annotation:
    """Spans of characters [start, end) of a response, the most decisive first, and the type of step that they are."""

    spans: tuple[tuple[int, int], ...]
    label: str


class Annotator(ABC):
    says: str

    @abstractmethod
    def annotate(self, asked: Sequence[Asked], at: Moment) -> list[Annotation | Exception]:
        """An annotation for each, or what went wrong with it."""


def segments(response: str) -> list[tuple[int, int]]:
    """Characters [start, end) of the numbered pieces of a response: lines, sentences, what stands between semicolons.

    >>> text = "2+3=5;5+1=6"
    >>> [text[start:end] for start, end in segments(text)]
    ['2+3=5', '5+1=6']
    """
    found = re.finditer(r"[^\s;](?:[^\n;]*?[.!?](?=\s)|[^\n;]*)", response)
    return [match.span() for match in found]


def read_annotation(answer: Any, response: str) -> Annotation:
    """An annotator's answer, checked: {"spans": [[start, end], ...]} or {"segments": [number, ...]}, and "label".

    Raises:
        ValueError: it is of another form, or a span or segment is not in the response.
    """
    if isinstance(answer, Annotation):
        answer = {"spans": answer.spans, "label": answer.label}
    if not isinstance(answer, Mapping) or ("spans" in answer) == ("segments" in answer):
        raise ValueError(f"an annotation has spans or segments, and a label; this is {_short(answer)}")
    label = answer.get("label", "")
    if not isinstance(label, str) or not label.strip() or len(label) > LONGEST_LABEL:
        raise ValueError(f"a label is a text of 1 to {LONGEST_LABEL} characters; this is {_short(label)}")
    if "segments" in answer:
        known, spans = segments(response), []
        for number in answer["segments"]:
            if not isinstance(number, int) or not 0 <= number < len(known):
                raise ValueError(f"segment {_short(number)} is not in the response, which has {len(known)} segments")
            spans.append(known[number])
    else:
        spans = [tuple(span) for span in answer["spans"]]
        for span in spans:
            whole = len(span) == 2 and all(isinstance(end, int) and not isinstance(end, bool) for end in span)
            if not whole or not 0 <= span[0] < span[1] <= len(response):
                raise ValueError(
                    f"span {_short(list(span))} is not in the response, which has {len(response)} characters"
                )
    return Annotation(tuple(spans), " ".join(label.split()))


def read_json(text: str) -> Any:
    """The last JSON object in what a model wrote.

    >>> read_json('Let me see. <think>{}</think> ```json {"segments": [1], "label": "sign"}```')
    {'segments': [1], 'label': 'sign'}

    Raises:
        ValueError: there is none.
    """
    start, found = 0, None
    while (start := text.find("{", start)) >= 0:
        try:
            found, length = json.JSONDecoder().raw_decode(text[start:])
            start += length
        except json.JSONDecodeError:
            start += 1
    if found is None:
        raise ValueError(f"no JSON object in the annotation {_short(text)}")
    return found


# A rule


@final
@dataclass(frozen=True)
class Rule(Annotator):
    """For sums worked out step by step, as `worked.sum_steps` writes them: "2+7=9;9-4=5".

    Of a right response the result of the step with the largest numbers, of a wrong one the first step that is not
    right: its result where the step itself may be taken, else the whole step. Labels: "carry", "borrow", "negative" or
    "plain" sum, and for mistakes also "not a step", "terms not there", "too short".
    """

    says = "a rule for worked sums"

    def annotate(self, asked: Sequence[Asked], at: Moment) -> list[Annotation | Exception]:
        return [_attempt(lambda row=row: self.one(row)) for row in asked]  # type: ignore[misc]

    def one(self, row: Asked) -> Annotation:
        """
        >>> turns = [{"role": "user", "content": "12 + 7 - 5"}]
        >>> Rule().one(Asked(turns, "12+7=18;18-5=13", correct=False))
        Annotation(spans=((5, 7),), label='plain')
        >>> Rule().one(Asked(turns, "7-5=2;12+2=14", correct=True))
        Annotation(spans=((11, 13),), label='plain')
        """
        left, steps, pieces = sum_terms(row.problem), [], segments(row.response)
        for start, end in pieces:
            step = re.fullmatch(r"(-?\d+)([+-]\d+)=(-?\d+)", row.response[start:end].replace(" ", ""))
            if step is None:
                break
            first, second, result = map(int, step.groups())
            after = start + row.response[start:end].index("=") + 1
            steps.append((abs(first) + abs(second), (after, end), _kind(first, second)))
            if not row.correct:
                if first not in left or second not in [*left[: left.index(first)], *left[left.index(first) + 1 :]]:
                    return Annotation(((start, end),), "terms not there")
                if first + second != result:
                    return Annotation(((after, end),), _kind(first, second))
                left.remove(first)
                left.remove(second)
                left.append(result)
        if row.correct:
            if not steps:
                return Annotation(tuple(pieces[-1:]), "result")
            _, span, label = max(steps, key=lambda step: step[0])
            return Annotation((span,), label)
        if len(steps) < len(pieces):
            return Annotation((pieces[len(steps)],), "not a step")
        return Annotation(tuple(pieces[-1:]), "too short")


def sum_terms(question: str) -> list[int]:
    """The signed terms of the chain of sums in a question.

    >>> sum_terms("What is 12 + 7 - 5?")
    [12, 7, -5]

    Raises:
        ValueError: there is no such chain.
    """
    chain = re.search(r"-?\d+(?:\s*[+-]\s*\d+)+", question)
    if chain is None:
        raise ValueError(f"no chain of sums in the question {_short(question)}")
    return [int(term) for term in re.findall(r"[+-]?\d+", "".join(chain.group().split()))]


def _kind(first: int, second: int) -> str:
    if first + second < 0:
        return "negative"
    ones = abs(first) % 10, abs(second) % 10
    if first >= 0 and second >= 0:
        return "carry" if sum(ones) >= 10 else "plain"
    larger, smaller = ones if abs(first) >= abs(second) else ones[::-1]
    return "borrow" if larger < smaller else "plain"


# Models


def ask(row: Asked) -> str:
    """The question that a model is asked about a row."""
    solution = "\n".join(f"{i}: {row.response[start:end]}" for i, (start, end) in enumerate(segments(row.response)))
    verdict, what = ("right", "decide that it is right") if row.correct else ("wrong", "contain its first error")
    return QUESTION.format(verdict=verdict, what=what, problem=row.problem, solution=solution)


@final
@dataclass(frozen=True)
class Player(Annotator):
    """A model of the run, by default the student as it is now; greedy, and its answer must be JSON."""

    player: str = "student"
    tokens: int = 128

    @property
    def says(self) -> str:  # type: ignore[override]
        return f"the {self.player} itself" if self.player == "student" else f"the {self.player}"

    def annotate(self, asked: Sequence[Asked], at: Moment) -> list[Annotation | Exception]:
        model = at.model(self.player)
        room = context_length(model)
        prompts = [prompt_ids(at.tokenizer, [{"role": "user", "content": ask(row)}]) for row in asked]
        fits = [i for i, ids in enumerate(prompts) if room is None or len(ids) + self.tokens <= room]
        found: list[Annotation | Exception] = [
            ValueError(
                f"the question has {len(ids)} tokens, and with {self.tokens} of answer the context of {room} is full"
            )
            for ids in prompts
        ]
        if fits:
            training = model.training
            model.eval()
            try:
                uniforms = torch.zeros(len(fits), self.tokens, dtype=torch.float64)  # greedy: they are not used
                ends = end_ids(at.tokenizer, model)
                chosen = [prompts[i] for i in fits]
                written = generate(model, chosen, uniforms, end_ids=ends, temperature=0.0, rows_at_once=at.rows_at_once)
            finally:
                model.train(training)
            texts = at.tokenizer.batch_decode(written.completions, skip_special_tokens=True)
            for i, text in zip(fits, texts, strict=True):
                found[i] = _attempt(lambda i=i, text=text: read_annotation(read_json(text), asked[i].response))  # type: ignore[misc]
        return found


@final
@dataclass(frozen=True)
class Endpoint(Annotator):
    """A served model that speaks OpenAI's chat completions.

    Args:
        url: up to and without "/chat/completions".
        model: the name that the server knows it by.
        timeout: seconds for one call.
        retries: after a lost connection, a full queue (429) or a server's error (5xx), each after twice the pause.
    """

    url: str
    model: str
    timeout: float = 60.0
    retries: int = 2
    pause: float = 1.0

    @property
    def says(self) -> str:  # type: ignore[override]
        return f"{self.model} at {self.url}"

    def annotate(self, asked: Sequence[Asked], at: Moment) -> list[Annotation | Exception]:
        patience = self.timeout * (self.retries + 1) + self.pause * (2**self.retries - 1)
        calls = [lambda row=row: read_annotation(read_json(self.reply(ask(row))), row.response) for row in asked]
        return in_time(calls, patience)

    def reply(self, question: str) -> str:
        """What the model answers.

        Raises:
            OSError: no answer after all tries.
            ValueError: the answer is not one of a chat endpoint.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": question}], "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    answer = json.load(response)
                break
            except urllib.error.HTTPError as error:
                error.close()
                if attempt == self.retries or not (error.code == 429 or error.code >= 500):
                    raise
            except OSError:  # no connection, or no answer in time
                if attempt == self.retries:
                    raise
            time.sleep(self.pause * 2**attempt)
        try:
            return str(answer["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"the endpoint's answer has no choices[0].message.content: {_short(answer)}") from error


# Functions


@final
@dataclass(frozen=True)
class Function(Annotator):
    """Your own: annotate(problem, response, correct) -> {"spans" or "segments": [...], "label": "..."}.

    `problem` is the text of the last turn that the student read.
    """

    function: Callable[[str, str, bool], Any]
    timeout: float = 60.0
    says = "a function of your own"

    def annotate(self, asked: Sequence[Asked], at: Moment) -> list[Annotation | Exception]:
        return in_time(
            [
                lambda row=row: read_annotation(self.function(row.problem, row.response, row.correct), row.response)  # type: ignore[misc]
                for row in asked
            ],
            self.timeout,
        )


def in_time(calls: Sequence[Callable[[], Annotation]], timeout: float) -> list[Annotation | Exception]:
    """Each call in a thread of its own, `AT_ONCE` together; one that hangs is left behind after `timeout` seconds."""
    found: list[Annotation | Exception] = [TimeoutError(f"no annotation after {timeout:g} seconds") for _ in calls]

    def run(i: int) -> None:
        found[i] = _attempt(calls[i])

    for start in range(0, len(calls), AT_ONCE):
        some = range(start, min(start + AT_ONCE, len(calls)))
        wave = [threading.Thread(target=run, args=(i,), daemon=True) for i in some]
        for thread in wave:
            thread.start()
        deadline = time.monotonic() + timeout
        for thread in wave:
            thread.join(max(deadline - time.monotonic(), 0))
    return list(found)  # a copy, which no late answer changes


def _attempt(call: Callable[[], Annotation]) -> Annotation | Exception:
    try:
        return call()
    except Exception as error:  # a user's function may raise anything, and one row must not end a run
        return error


def annotator(which: Any, *, model: str | None = None, timeout: float = 60.0) -> Annotator:
    """
    Args:
        which: "rule", "model" (the student as it is now), the URL of a chat endpoint, path/to/file.py:function, a
            function, or an annotator.
        model: the name that an endpoint knows its model by.
        timeout: seconds for one call of an endpoint or of a function.

    Raises:
        ValueError: none of these.
    """
    if timeout <= 0:
        raise ValueError(f"source.timeout={timeout:g} must be above 0 seconds")
    if isinstance(which, Annotator):
        return which
    if callable(which):
        return Function(which, timeout)
    if isinstance(which, str) and which.startswith(("http://", "https://")):
        if not model:
            raise ValueError(
                f"source.annotator={which!r} needs the name its server knows the model by: set source.annotator_model"
            )
        return Endpoint(which, model, timeout)
    if model:
        raise ValueError(f"source.annotator_model={model!r} is read by an endpoint only; leave it out")
    if which == "rule":
        return Rule()
    if which == "model":
        return Player()
    if isinstance(which, str) and ".py" in which:
        return Function(_loaded(which), timeout)
    raise ValueError(
        f"source.annotator={which!r}: write rule, model, the URL of a chat endpoint, or path/to/file.py:function"
    )


@cache
def _loaded(where: str) -> Callable[..., Any]:
    return load_function(where, "source.annotator")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
