"""Whose text: the data set's, the teacher's, the student's own, or a mixture."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from kullback.lm.chat import end_ids, prompt_ids, reply_ids
from kullback.lm.generate import generate
from kullback.lm.models import context_length
from kullback.lm.moment import Moment
from kullback.lm.rollout import Origin, Rollout, build_rollout, concatenate
from kullback.lm.tasks import Problem

Placed = Sequence[tuple[int, Problem]]


class Source(ABC):
    """Draws whole groups of rows. `writes` says whose tokens come out, hence what gradient may be taken on them."""

    writes: frozenset[Origin]
    says: str

    def draw(self, at: Moment) -> Rollout:
        """This rank's rows of the step."""
        return self.write(self.problems(at), at)

    def problems(self, at: Moment, turn: int = 0) -> Placed:
        """This rank's problems, each with its place; further turns are further problems for the same places."""
        return at.problems(turn)

    def rehearse(self, rollout: Rollout) -> Rollout:
        """Made-up rows with the grades and notes that this source's rows have."""
        return rollout

    @abstractmethod
    def write(self, problems: Placed, at: Moment) -> Rollout:
        """Rows for these problems, each given with its place in the step."""


def read_prompt(problem: Problem, at: Moment, completion: int) -> list[int]:
    """Token ids of a problem as the student reads it, with room for `completion` more.

    Raises:
        ValueError: longer than `source.max_prompt`, or prompt and completion exceed the student's context.
    """
    ids = prompt_ids(at.tokenizer, problem.messages)
    limit, room = at.method.max_prompt, context_length(at.model("student"))
    if len(ids) > limit:
        raise ValueError(
            f"problem {problem.id!r}: its prompt has {len(ids)} tokens, source.max_prompt is {limit}; "
            "raise it or drop the problem"
        )
    if room is not None and len(ids) + completion > room:
        raise ValueError(
            f"problem {problem.id!r}: {len(ids)} prompt tokens and up to {completion} of completion "
            f"exceed the student's context of {room}; "
            f"set source.max_completion to at most {max(room - len(ids), 0)}, or drop the problem"
        )
    return ids


def _note(problem: Problem, place: int, source: str) -> dict[str, Any]:
    return {"problem_id": problem.id, "place": place, "messages": problem.messages, "source": source}


@final
@dataclass(frozen=True)
class DatasetSource(Source):
    """The data set's own replies, as they stand."""

    writes = frozenset({Origin.DATASET})
    says = "replies of the data set"

    def write(self, problems: Placed, at: Moment) -> Rollout:
        prompts, completions, origins = [], [], []
        for _, problem in problems:
            if not problem.reply:
                raise ValueError(
                    f"problem {problem.id!r} of {at.task.name} has no reply to train on; "
                    "add a completion column, or let a model write "
                    "with source.student_fraction=1 or method: sequence_kd"
                )
            ids, origin = reply_ids(at.tokenizer, problem.messages, problem.reply)
            completions.append(ids[: at.method.max_completion])
            origins.append(origin[: at.method.max_completion])
            prompts.append(read_prompt(problem, at, len(completions[-1])))
        return build_rollout(
            prompts, completions, origins, notes=[_note(problem, place, "dataset") for place, problem in problems]
        )


@final
@dataclass(frozen=True)
class PlayerSource(Source):
    """A model writes, `samples` completions for each prompt, at the method's sampling temperature.

    With `system` it reads a system prompt that the student, when it is trained on this text, does not.
    With `once`, what it wrote for a problem is kept and read again whenever the problem comes back.
    `grades` are those its reader needs beside "accuracy" and "finished", which every row has.
    """

    player: str
    origin: Origin
    once: bool = False
    system: str | None = None
    grades: tuple[str, ...] = ()

    @property
    def writes(self) -> frozenset[Origin]:  # type: ignore[override]
        return frozenset({self.origin})

    def rehearse(self, rollout: Rollout) -> Rollout:
        every_other = (torch.arange(len(rollout)) % 2).float()
        made_up = dict.fromkeys(self.grades, every_other) | {"finished": torch.ones(len(rollout))}
        return replace(rollout, rewards=made_up | rollout.rewards)

    @property
    def says(self) -> str:  # type: ignore[override]
        own = ", reading a system prompt of its own" if self.system is not None else ""
        return f"text the {self.player} writes{own}" + (", kept and read again" if self.once else "")

    def write(self, problems: Placed, at: Moment) -> Rollout:
        samples = at.method.samples
        drawn_as = (
            f"{self.player}, {samples} samples of {at.method.max_completion} at {at.method.sampling_temperature:g}"
        )
        if self.once:
            kept = at.store.setdefault(drawn_as, {})
            fresh = list({problem.id: (slot, problem) for slot, problem in problems if problem.id not in kept}.values())
            kept |= {problem.id: rows for (_, problem), rows in zip(fresh, self._sample(fresh, at), strict=True)}
            answers = [kept[problem.id] for _, problem in problems]
        else:
            answers = self._sample(problems, at)
        rows = [row for answer in answers for row in answer]
        return build_rollout(
            [prompt for prompt, _, _, _ in rows],
            [completion for _, completion, _, _ in rows],
            [[int(self.origin)] * len(completion) for _, completion, _, _ in rows],
            log_probs=[log_probs for _, _, log_probs, _ in rows],
            group=[i for i in range(len(problems)) for _ in range(samples)],
            rewards=[rewards for _, _, _, rewards in rows],
            notes=[_note(problem, place, self.player) for place, problem in problems for _ in range(samples)],
        )

    def _sample(self, problems: Placed, at: Moment) -> list[list[tuple[Any, ...]]]:
        """For each problem its samples: (prompt, completion, log_probs, rewards)."""
        if not problems:
            return []
        model, samples, limit = at.model(self.player), at.method.samples, at.method.max_completion
        prompts = [read_prompt(problem, at, limit) for _, problem in problems]
        read = prompts
        if self.system is not None:
            read = [prompt_ids(at.tokenizer, problem.messages, system=self.system) for _, problem in problems]
        keys: list[tuple[int | str, ...]] = [
            (problem.id, sample) if self.once else (at.step, slot, sample)
            for slot, problem in problems
            for sample in range(samples)
        ]
        written = generate(
            model,
            read,
            at.uniforms(f"rollout/{self.player}", keys, limit),
            end_ids=end_ids(at.tokenizer, model),
            samples=samples,
            temperature=at.method.sampling_temperature,
            rows_at_once=at.rows_at_once,
            compile_decode=at.compile_decode,
        )
        texts = at.tokenizer.batch_decode(written.completions, skip_special_tokens=True)
        answers: list[list[tuple[Any, ...]]] = [[] for _ in problems]
        for row, text in enumerate(texts):
            place = row // samples
            rewards = {**at.task.verify(problems[place][1], text), "finished": float(written.finished[row])}
            answers[place].append((prompts[place], written.completions[row], written.log_probs[row], rewards))
        return answers


@final
@dataclass(frozen=True)
class MixedSource(Source):
    """Each prompt goes to one of several sources, drawn by weight."""

    parts: tuple[tuple[float, Source], ...]

    @property
    def writes(self) -> frozenset[Origin]:  # type: ignore[override]
        return frozenset().union(*(source.writes for _, source in self.parts))

    @property
    def says(self) -> str:  # type: ignore[override]
        total = sum(weight for weight, _ in self.parts)
        return " and ".join(f"{weight / total:.0%} {source.says}" for weight, source in self.parts)

    def rehearse(self, rollout: Rollout) -> Rollout:
        for _, source in self.parts:
            rollout = source.rehearse(rollout)
        return rollout

    def write(self, problems: Placed, at: Moment) -> Rollout:
        total = sum(weight for weight, _ in self.parts)
        keys: list[tuple[int | str, ...]] = [(at.step, slot) for slot, _ in problems]
        draws = (at.uniforms("mixture", keys, 1)[:, 0] * total).tolist()
        shares: list[list[tuple[int, Problem]]] = [[] for _ in self.parts]
        for placed, draw in zip(problems, draws, strict=True):
            shares[self._which(draw)].append(placed)
        return concatenate(
            [source.write(share, at) for (_, source), share in zip(self.parts, shares, strict=True) if share]
        )

    def _which(self, draw: float) -> int:
        for index, (weight, _) in enumerate(self.parts):
            draw -= weight
            if draw < 0:
                return index
        return len(self.parts) - 1


def dataset() -> Source:
    """The data set's own replies."""
    return DatasetSource()


def student(*, grades: Sequence[str] = ()) -> Source:
    """The student's own completions, fresh at every step; `grades` of the verifier are what the method reads."""
    return PlayerSource("student", Origin.STUDENT, grades=tuple(grades))


def teacher(*, once: bool = True, system: str | None = None) -> Source:
    """The teacher's completions, written once for each problem; `system` is a system prompt that only it reads."""
    return PlayerSource("teacher", Origin.TEACHER, once=once, system=system)


def mix(*parts: tuple[float, Source]) -> Source:
    """Several sources by weight; those of weight 0 are left out.

    Raises:
        ValueError: a weight is negative, or all are 0.
    """
    if any(weight < 0 for weight, _ in parts) or not any(weight > 0 for weight, _ in parts):
        raise ValueError(
            f"a mixture of sources needs weights that are not negative and not all 0, got {[w for w, _ in parts]}"
        )
    left = tuple((float(weight), source) for weight, source in parts if weight > 0)
    return left[0][1] if len(left) == 1 else MixedSource(left)
