"""Pairs of completions, the better and the worse one: from the data set, or picked among several by their grades.

A pair is two rows of one group, the chosen one first. `note["side"]` is 1 for the chosen row, -1 for the rejected one,
and 0 for both where the grades do not say which is better: such a pair is kept, so that a step always has its rows, and
counts nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.lm.chat import prompt_ids, reply_ids
from kullback.lm.models import load_tokenizer
from kullback.lm.moment import Moment
from kullback.lm.problems import Problem, Turn
from kullback.lm.rollout import Origin, Rollout, build_rollout
from kullback.lm.sampling import Around
from kullback.lm.sources import Placed, PlayerSource, Source, read_prompt

Side = Literal[1, 0, -1]


@final
@dataclass(frozen=True)
class PairSource(Source):
    """The data set's pairs, as they stand."""

    writes = frozenset({Origin.DATASET})
    says = "pairs of the data set"

    def rehearse(self, rollout: Rollout) -> Rollout:
        return _sided(rollout, [1, -1] * (len(rollout) // 2))

    def write(self, problems: Placed, at: Moment) -> Rollout:
        prompts, completions, origins, notes = [], [], [], []
        for place, problem in problems:
            if not problem.reply or not problem.rejected:
                raise ValueError(
                    f"problem {problem.id!r} of {at.task.name} has no pair to learn from: give it the columns chosen "
                    "and rejected, or let a model write and the verifier choose with source.pairs=student"
                )
            pair = [self._cut(problem, turns, at) for turns in (problem.reply, problem.rejected)]
            if pair[0][0] == pair[1][0]:
                raise ValueError(
                    f"problem {problem.id!r}: chosen and rejected have the same first {len(pair[0][0])} tokens, so the "
                    f"pair prefers nothing; raise source.max_completion={at.method.max_completion}, or drop the pair"
                )
            prompt = read_prompt(problem, at, max(len(ids) for ids, _ in pair))
            for side, (ids, origin) in zip((1, -1), pair, strict=True):
                prompts.append(prompt)
                completions.append(ids)
                origins.append(origin)
                notes.append(
                    {
                        "problem_id": problem.id,
                        "place": place,
                        "messages": problem.messages,
                        "source": "dataset",
                        "side": side,
                    }
                )
        return build_rollout(
            prompts, completions, origins, group=[i for i in range(len(problems)) for _ in range(2)], notes=notes
        )

    @staticmethod
    def _cut(problem: Problem, turns: list[Turn], at: Moment) -> tuple[list[int], list[int]]:
        ids, origin = reply_ids(at.tokenizer, problem.messages, turns)
        return ids[: at.method.max_completion], origin[: at.method.max_completion]


@final
@dataclass(frozen=True)
class JudgedSource(Around):
    """See `judged`."""

    by: str

    @property
    def says(self) -> str:  # type: ignore[override]
        return f"pairs, the best and the worst by {self.by}, of {self.source.says}"

    def draw(self, at: Moment) -> Rollout:
        return self._pick(self.source.draw(at))

    def write(self, problems: Placed, at: Moment) -> Rollout:
        return self._pick(self.source.write(problems, at))

    def rehearse(self, rollout: Rollout) -> Rollout:
        return _sided(self.source.rehearse(rollout), [1, -1] * (len(rollout) // 2))

    def _pick(self, rollout: Rollout) -> Rollout:
        grade = _grade(rollout, self.by)
        rows, sides, means = [], [], []
        for group in torch.unique(rollout.group, sorted=True).tolist():
            members = (rollout.group == group).nonzero()[:, 0].tolist()
            best, worst, side = best_and_worst(grade[members])
            rows += [members[best], members[worst]]
            sides += [side, -side]
            means += [grade[members].nanmean()] * 2
        picked = rollout.rows(rows)
        return _sided(replace(picked, rewards=picked.rewards | {"judged": torch.stack(means)}), sides)


def best_and_worst(grade: Float[Tensor, "sample"]) -> tuple[int, int, Side]:
    """Places of the best and the worst of some samples, and 1; or two of them and 0 where no two grades differ.

    >>> best_and_worst(torch.tensor([0.2, torch.nan, 0.9, 0.1]))
    (2, 3, 1)
    >>> best_and_worst(torch.tensor([1.0, torch.nan, 1.0]))
    (0, 1, 0)
    """
    known = ~grade.isnan()
    best = int(torch.where(known, grade, -torch.inf).argmax())
    worst = int(torch.where(known, grade, torch.inf).argmin())
    if known.sum() < 2 or not bool(grade[best] > grade[worst]):
        return 0, 1, 0
    return best, worst, 1


def pairs() -> Source:
    """The data set's `chosen` and `rejected`, two rows for each problem."""
    return PairSource()


def judged(source: Source, by: str = "accuracy") -> Source:
    """Of several completions of a prompt, the best and the worst by a grade of the verifier become a pair.

    The metric rollout/judged is the mean grade of all that was written, before the choice. Ties and groups of which
    fewer than two are graded give a pair of side 0.

    Args:
        source: writes at least two completions for each prompt.
        by: a grade; "accuracy" and "finished" are always there, others are what the task's verifier returns, for
            instance a reward model's.
    """
    return JudgedSource(source, by)


def grade_of(by: str) -> Callable[[Rollout], Float[Tensor, "row"]]:
    """A grade of a rollout's rows, for `sampling.informative`.

    Raises:
        ValueError: when it is called on rows that have no such grade.
    """

    def grade(rollout: Rollout) -> Float[Tensor, "row"]:
        return _grade(rollout, by)

    return grade


def reward_model(name: str) -> Callable[[Problem, str], float]:
    """A verifier that asks a reward model: a sequence classifier with one output, by path or hub name.

    Its number is the grade "score"; judge pairs by it with source.judge=score:

        kb.train("dpo", data={"name": "prompts.jsonl", "verifier": reward_model("path/to/model")}, judge="score",
                 pairs="student", samples=4, ...)

    Raises:
        ValueError: the model has more than one output.
    """
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(name).eval()
    tokenizer = load_tokenizer(name, role="judge")
    if model.config.num_labels != 1:
        raise ValueError(f"judge={name!r} has {model.config.num_labels} outputs; a reward model has one")

    @torch.no_grad()
    def score(problem: Problem, completion: str) -> float:
        reply, _ = reply_ids(tokenizer, problem.messages, [{"role": "assistant", "content": completion}])
        ids = prompt_ids(tokenizer, problem.messages) + reply
        return float(model(input_ids=torch.tensor([ids], device=model.device)).logits[0, 0])

    return score


def written_by(player: Literal["student", "reference"], by: str) -> Source:
    """Completions to choose from: the student's, fresh at every step, or the reference's, written once and kept."""
    origin = Origin.STUDENT if player == "student" else Origin.TEACHER
    return PlayerSource(player, origin, once=player == "reference", grades=(by,))


def _grade(rollout: Rollout, by: str) -> Float[Tensor, "row"]:
    if by not in rollout.rewards:
        raise ValueError(
            f"source.judge={by!r} is not a grade of these rows, which have {', '.join(sorted(rollout.rewards))}: name "
            "one of them, or return it from task.verifier"
        )
    return rollout.rewards[by]


def _sided(rollout: Rollout, sides: list[Any]) -> Rollout:
    notes = [dict(note, side=side) for note, side in zip(rollout.notes, sides, strict=True)]
    return replace(rollout, notes=notes)
