"""Policy gradient on a verifier's grades of what the student wrote: what such methods share.

    r = sum_k weight_k grade_k,    -min( ratio_t A_t, clip(ratio_t, 1 - low, 1 + high) A_t ),    ratio_t = model / old

`RewardMethod` has the reward, the surrogate and several passes over one draw; what A is made of is the method's.
`GroupMethod` compares the answers to one prompt: A_i = (r_i - b_i) / (s_i + epsilon). A and the old policy are
detached. A row whose verifier failed has no reward (nan).

Source: PPO, arXiv 1707.06347; GRPO, 2402.03300; DAPO, 2503.14476 (redraws, soft overlong punishment).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.lm import sampling, sources
from kullback.lm.advantages import Baseline, Scale, group_advantage, informative, overlong, shaped_reward
from kullback.lm.batch import Batch
from kullback.lm.method import Method, answer
from kullback.lm.moment import Moment
from kullback.lm.problems import Task
from kullback.lm.rollout import Rollout
from kullback.lm.signals import policy
from kullback.lm.sources import Source
from kullback.run.terms import Term


@dataclass(frozen=True, kw_only=True)
class RewardMethod(Method):
    """A method that reinforces what a verifier rewards.

    Args:
        updates: optimiser steps over one draw; from the second on the ratio and its limits act.
        clip: how far below and above 1 the ratio is followed.
        dual: a second limit where A < 0: the loss of a token is at most dual * |A|.
        rewards: weights of the grades whose sum is maximised; None is {accuracy: 1}. "finished" is 1 where an answer
            ended by itself.
        soft: tokens before `max_completion` over which the grade "overlong" falls from 0 to -1 (DAPO); it counts with
            its weight in `rewards`. 0 has no such grade.
    """

    updates: int = answer("source", 1)
    clip: tuple[float, float] = answer("signal", (0.2, 0.28))
    dual: float | None = answer("signal", None)
    rewards: dict[str, float] | None = answer("weight", None)
    soft: int = answer("weight", 0)

    def __post_init__(self) -> None:
        if not self.corrected:
            refuse_temperature(self.sampling_temperature, "; grpo can also correct for it with weight.correction")
        if self.updates < 1:
            raise ValueError(f"source.updates={self.updates} must be at least 1")
        if self.dual is not None and self.dual <= 1 + self.clip[1]:
            raise ValueError(f"signal.dual={self.dual:g} must be above the ratio's own limit, {1 + self.clip[1]:g}")
        if not 0 <= self.soft <= self.max_completion:
            raise ValueError(
                f"weight.soft={self.soft} counts the last of source.max_completion={self.max_completion} tokens: "
                "choose 0 to that many"
            )
        if (self.soft > 0) != ("overlong" in (self.rewards or {})):
            raise ValueError(
                f"weight.soft={self.soft} makes the grade 'overlong', which weight.rewards={self.rewards} must weigh: "
                "set both, for example soft=64 and rewards={accuracy: 1, overlong: 0.5}, or neither"
            )

    @property
    def corrected(self) -> bool:
        """Whether text that was drawn at another temperature gets the weights that make its gradient right."""
        return False

    @property
    def passes(self) -> int:
        return self.updates

    @property
    def scores(self) -> tuple[str, ...]:
        return ("log_prob:student",) if self.updates > 1 or self.corrected else ()

    def begin(self, at: Moment) -> None:
        refuse_ungraded(at.task)

    def source(self) -> Source:
        return sources.student(grades=tuple(self.rewards or ()))

    def reward(self, rollout: Rollout) -> Float[Tensor, "row"]:
        """What is maximised; nan where a grade is missing."""
        grades = dict(rollout.rewards)
        if self.soft:
            grades["overlong"] = overlong(rollout.lengths, longest=self.max_completion, soft=self.soft)
        return shaped_reward(grades, self.rewards)

    def shown(self, rollout: Rollout, reward: Float[Tensor, "row"]) -> dict[str, Tensor]:
        """Metrics of a draw."""
        return {"rollout/reward": reward, "rollout/unknown": reward.isnan().float()}

    def surrogate(self, batch: Batch, says: str, over: str = "trained", **options: Any) -> Term:
        """The clipped surrogate of the column "advantage", which is `says`; options are those of `policy`."""
        term = policy(batch, clip=self.clip, dual=self.dual, over=over, **options)
        return replace(term, says=f"{term.says}; {says}")

    def reward_in_words(self) -> str:
        return " + ".join(f"{weight:g} {name}" for name, weight in (self.rewards or {"accuracy": 1.0}).items())


@dataclass(frozen=True, kw_only=True)
class GroupMethod(RewardMethod):
    """A method whose baseline is the other answers to the same prompt.

    Args:
        samples: answers to a prompt, compared with each other.
        redraws: dynamic sampling: how often a prompt whose answers all have the same reward is replaced by another.
        baseline: "group" mean, "leave_one_out" or "none".
        scale: divide by the standard deviation of the "group", of the "batch", or "none".
        epsilon: added to it.
    """

    samples: int = answer("source", 8)
    redraws: int = answer("source", 0)
    baseline: Baseline = answer("weight", "group")
    scale: Scale = answer("weight", "group")
    epsilon: float = answer("weight", 1e-4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline != "none" and self.samples < 2:
            raise ValueError(
                f"source.samples={self.samples} leaves an answer nothing to be compared with: raise it, or set "
                "weight.baseline=none"
            )
        if self.baseline == "none" and self.scale == "group":
            raise ValueError("weight.baseline='none' with weight.scale='group' divides rewards by zero where all agree")

    def writer(self) -> Source:
        """Who writes, before groups of equal reward are drawn again."""
        return super().source()

    def source(self) -> Source:
        return sampling.informative(self.writer(), self.reward, self.redraws)

    def advantage(self, reward: Float[Tensor, "row"], rollout: Rollout) -> Float[Tensor, "row"]:
        return group_advantage(reward, rollout.group, baseline=self.baseline, scale=self.scale, epsilon=self.epsilon)

    def shown(self, rollout: Rollout, reward: Float[Tensor, "row"]) -> dict[str, Tensor]:
        metrics = super().shown(rollout, reward)
        metrics["rollout/informative"] = informative(reward, rollout.group).float()
        if self.redraws:
            turns = [float(note.get("turn", 0)) for note in rollout.notes]
            metrics["rollout/redraws"] = torch.tensor(turns, device=reward.device)
        return metrics

    def per_row(self, batch: Batch) -> float:
        """Dr. GRPO's constant: rows that are summed are divided by the longest that they might have been."""
        return 1 / self.max_completion if batch.aggregate == "row_sum" else 1.0

    def advantage_in_words(self) -> str:
        minus = {"group": " - mean of the group", "leave_one_out": " - mean of the group's others", "none": ""}
        over = {"group": ", over the group's deviation", "batch": ", over the step's deviation", "none": ""}
        return f"A = {self.reward_in_words()}{minus[self.baseline]}{over[self.scale]}"


def refuse_ungraded(task: Task, grades: Iterable[str] = ("accuracy",)) -> None:
    """
    Raises:
        ValueError: the task has no verifier, and a grade is read beside "finished", which needs none.
    """
    if task.verifier is None and not set(grades) <= {"finished"}:
        raise ValueError(f"task={task.name!r} grades nothing: give it answers or a verifier")


def refuse_temperature(temperature: float, remedy: str = "") -> None:
    """
    Raises:
        ValueError: the student writes at another temperature than 1, so a gradient through the choice of its words is
            not that of what it is called.
    """
    if temperature != 1:
        raise ValueError(
            f"source.sampling_temperature={temperature:g} draws from another distribution than the one that is "
            f"trained: set it to 1{remedy}"
        )
