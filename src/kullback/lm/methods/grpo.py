"""Group relative policy optimisation: verifiable rewards, compared among the answers to one prompt.

    max over theta   E_{x, y_1..n ~ old}  mean_t  min( ratio_t A_i, clip(ratio_t, 1 - low, 1 + high) A_i )
                     - penalty * D( reference, model )
    A_i = (r_i - b_i) / (s_i + epsilon),    ratio_t = model(y_t) / old(y_t)

r is the weighted sum of the verifier's grades; "accuracy" itself stays as it is, in the metrics and in the ledger. A
and the old policy are detached. A penalty in its reward form is added to A after the division by s: before it, s would
rescale the penalty from group to group, and its coefficient would mean nothing.

Paper -> here:  G -> samples,  epsilon_low, epsilon_high -> clip,  beta -> penalty,  pi_ref -> reference,
mu -> updates,  "std normalisation" -> scale,  "length normalisation" -> aggregate.
Source: Shao et al., arXiv 2402.03300; DAPO, 2503.14476; Dr. GRPO, 2503.20783; RLOO, 2402.14740; GSPO, 2507.18071.
Differs from the papers: (1) tokens are averaged over the step, as DAPO does; `aggregate=row` is GRPO's, `row_sum`,
divided by `max_completion`, Dr. GRPO's; (2) no penalty unless asked for, and then with the gradient of the divergence
it names: GRPO's own penalty is `divergence=forward_kl, form=loss`, TRL's by now `reverse_kl, form=ratio`; (3) a row
whose verifier failed is left out.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, final

import torch
from torch import Tensor

from kullback.divergence import divergence
from kullback.lm import Batch, Method, answer, match, policy, sampling, sources, targets
from kullback.lm.advantages import (
    Baseline,
    Horizon,
    Level,
    Scale,
    divergence_cost,
    group_advantage,
    importance,
    informative,
    later,
    sampler_gap,
    shaped_reward,
)
from kullback.lm.moment import Moment
from kullback.lm.rollout import Rollout
from kullback.lm.signals import Route, refuse_estimator
from kullback.lm.weights import leave_one_out
from kullback.run.terms import Term

ROUTES: dict[str, Route] = {"loss": "squared", "ratio": "ratio", "exact": "pathwise"}


@final
@dataclass(frozen=True, kw_only=True)
class GRPO(Method):
    """Policy gradient on verifiable rewards, with the other answers to a prompt as the baseline.

    Args:
        rewards: weights of the grades whose sum is maximised; None is {accuracy: 1}. "finished" is 1 where an answer
            ended by itself.
        updates: optimiser steps over one draw; from the second on the ratio and its limits act.
        redraws: dynamic sampling: how often a prompt whose answers all have the same reward is replaced by another.
        pass_rate: problems solved less or more often than this, so far, are passed over.
        clip: how far below and above 1 the ratio is followed.
        dual: a second limit where A < 0: the loss of a token is at most dual * |A|.
        level: one ratio per "token" or, GSPO, per "sequence".
        baseline: "group" mean, "leave_one_out" or "none".
        scale: divide by the standard deviation of the "group", of the "batch", or "none".
        epsilon: added to it.
        negative: multiplies negative advantages; below 1 mistakes count less than successes.
        drop_equal: leave groups of equal reward out of the mean; otherwise they count, as tokens that ask for nothing.
        drop_unfinished: leave out answers that were cut at `max_completion`.
        correction: cap of the importance weight student / sampler, where the text was written at another temperature
            or by another engine; None trusts the sampler.
        correction_level: of that weight, "token" or "sequence".
        reference: the model that the penalty keeps the student near to: "initial", a path or a hub name.
        penalty: coefficient of the divergence to it.
        divergence: a name `kb.divergence` parses; the reference is its target.
        form: "loss", a surrogate of sampled tokens; "ratio", their values times the live ratio; "exact", over the
            vocabulary; "reward", minus their link, inside the clipped ratio. All have the gradient of the divergence.
        horizon: "token" takes prefixes as they are; "sequence" also charges a token for the divergence at the
            prefixes it leads to; "whole" (form=reward) is the divergence between whole completions.
        penalty_on: rows that it counts: "all", or those "right" or "wrong"; "undecided" weighs each token by the
            reference's entropy, in nats.
        penalty_ratio: weigh form=loss by the ratio to the old policy, which its gradient needs from the second update
            on; GRPO's code does not.
    """

    samples: int = answer("source", 8)
    updates: int = answer("source", 1)
    redraws: int = answer("source", 0)
    pass_rate: tuple[float, float] = answer("source", (0.0, 1.0))
    reference: Any = answer("target", None)
    clip: tuple[float, float] = answer("signal", (0.2, 0.28))
    dual: float | None = answer("signal", None)
    level: Level = answer("signal", "token")
    penalty: float = answer("signal", 0.0)
    divergence: str = answer("signal", "reverse_kl")
    form: str = answer("signal", "loss")
    horizon: Horizon = answer("signal", "token")
    penalty_ratio: bool = answer("signal", True)
    rewards: dict[str, float] | None = answer("weight", None)
    baseline: Baseline = answer("weight", "group")
    scale: Scale = answer("weight", "group")
    epsilon: float = answer("weight", 1e-4)
    negative: float = answer("weight", 1.0)
    drop_equal: bool = answer("weight", False)
    drop_unfinished: bool = answer("weight", False)
    correction: float | None = answer("weight", None)
    correction_level: Level = answer("weight", "token")
    penalty_on: Literal["all", "right", "wrong", "undecided"] = answer("weight", "all")

    def __post_init__(self) -> None:
        refuse_estimator(self.form, "signal.form")
        if self.form not in (*ROUTES, "reward"):
            raise ValueError(f"signal.form={self.form!r} is not known: write {', '.join(ROUTES)} or reward")
        if self.horizon == "whole" and self.form != "reward":
            raise ValueError(f"signal.horizon='whole' has signal.form='reward' only, not {self.form!r}")
        if self.horizon == "whole" and self.penalty_on == "undecided":
            raise ValueError("weight.penalty_on='undecided' weighs tokens, signal.horizon='whole' knows only rows")
        if self.penalty < 0:
            raise ValueError(f"signal.penalty={self.penalty:g} must be at least 0")
        if self.penalty > 0 and self.reference is None:
            raise ValueError(
                f"signal.penalty={self.penalty:g} needs a model to be near to: set target.reference=initial"
            )
        if self.baseline != "none" and self.samples < 2:
            raise ValueError(
                f"source.samples={self.samples} leaves an answer nothing to be compared with: raise it, or set "
                "weight.baseline=none"
            )
        if self.baseline == "none" and self.scale == "group":
            raise ValueError("weight.baseline='none' with weight.scale='group' divides rewards by zero where all agree")
        if self.dual is not None and self.dual <= 1 + self.clip[1]:
            raise ValueError(f"signal.dual={self.dual:g} must be above the ratio's own limit, {1 + self.clip[1]:g}")
        if self.sampling_temperature != 1 and self.correction is None:
            raise ValueError(
                f"source.sampling_temperature={self.sampling_temperature:g} draws from another distribution than the "
                "one that is trained: set it to 1, or correct for it with weight.correction, for example 2"
            )
        dropping = "drop_equal" if self.drop_equal else "drop_unfinished" if self.drop_unfinished else None
        if dropping and self.penalty > 0 and (self.form == "reward" or self.horizon != "token"):
            raise ValueError(
                f"weight.{dropping}=true leaves rows out by how they ended, and what the penalty adds to the advantage "
                "needs all of them: set it to false, or signal.form=loss and signal.horizon=token"
            )
        if self.updates < 1:
            raise ValueError(f"source.updates={self.updates} must be at least 1")

    @property
    def passes(self) -> int:
        return self.updates

    @property
    def scores(self) -> tuple[str, ...]:
        names: list[str] = []
        rewarded = self.penalty > 0 and self.form == "reward"
        if self.updates > 1 or self.correction is not None or rewarded:
            names.append("log_prob:student")
        if rewarded:
            names.append("log_prob:reference")
        if self.penalty > 0 and self.horizon == "sequence":
            names.append(f"{self.divergence}:reference,student")
        if self.penalty > 0 and self.penalty_on == "undecided":
            names.append("entropy:reference")
        return tuple(names)

    def begin(self, at: Moment) -> None:
        if at.task.verifier is None:
            raise ValueError(f"task={at.task.name!r} grades nothing: give it answers or a verifier")

    def players(self) -> dict[str, Any]:
        return {"reference": self.reference}

    def targets(self) -> dict[str, targets.Target]:
        return {"reference": targets.frozen("reference")} if self.penalty > 0 and self.form != "reward" else {}

    def source(self) -> sources.Source:
        written = sampling.by_pass_rate(sources.student(grades=tuple(self.rewards or ())), *self.pass_rate)
        return sampling.informative(written, partial(_reward, weights=self.rewards), self.redraws)

    def weight(self, step: Batch) -> dict[str, Tensor]:
        rollout, scored = step.rollout, step["scored"]
        reward = _reward(rollout, self.rewards)
        advantage = group_advantage(
            reward, rollout.group, baseline=self.baseline, scale=self.scale, epsilon=self.epsilon
        )
        equal, unknown = ~informative(reward, rollout.group), reward.isnan()
        columns = {
            "rollout/reward": reward,
            "rollout/informative": (~equal).float(),
            "rollout/unknown": unknown.float(),
        }
        dropped = unknown | (equal & self.drop_equal)
        if self.drop_unfinished:
            dropped = dropped | (rollout.rewards["finished"] != 1)
        advantage = (advantage * torch.where(advantage < 0, self.negative, 1.0))[:, None] * scored
        if self.redraws:
            columns["rollout/redraws"] = torch.tensor([float(note.get("turn", 0)) for note in rollout.notes])
        if self.pass_rate != (0.0, 1.0):
            step.ledger.add("accuracy", [note["problem_id"] for note in rollout.notes], rollout.rewards["accuracy"])
        if self.penalty > 0:
            counts = columns["penalty"] = self._penalty_on(step)
            cost = self._cost(step, counts)
            if self.form == "reward":  # no term shows it
                value = divergence(self.divergence).sampled(step["log_prob:reference"], step["log_prob:student"])
                columns["rollout/penalty"] = torch.where(scored, value, torch.nan)
            if cost is not None:
                if self.baseline != "none":
                    cost = cost - leave_one_out(cost, rollout.group)
                advantage = advantage - self.penalty * cost * scored
        if self.correction is not None:
            student, sampler = step["log_prob:student"], rollout.log_probs
            columns["correction"] = importance(
                student, sampler, scored, cap=self.correction, level=self.correction_level
            )
            columns["rollout/correction"] = columns["correction"]
            if self.penalty > 0:
                columns["penalty"] = columns["penalty"] * columns["correction"]
            columns["rollout/sampler_kl"] = sampler_gap(student, sampler, scored)
        return columns | {"advantage": advantage, "trained": scored & ~dropped[:, None]}

    def signal(self, batch: Batch) -> list[Term]:
        per = 1 / self.max_completion if batch.aggregate == "row_sum" else 1.0  # Dr. GRPO's constant
        weight = "correction" if self.correction is not None else None
        surrogate = policy(
            batch, clip=self.clip, dual=self.dual, level=self.level, weight=weight, over="trained", coefficient=per
        )
        terms = [replace(surrogate, says=f"{surrogate.says}; {self._says()}")]
        if self.penalty > 0 and self.form != "reward":
            terms.append(
                match(
                    self.divergence,
                    batch,
                    target="reference",
                    route=ROUTES[self.form],
                    corrected=self.penalty_ratio,
                    name="penalty",
                    weight=None if self.penalty_on == "all" and self.correction is None else "penalty",
                    coefficient=self.penalty * per,
                )
            )
        return terms

    def _says(self) -> str:
        """The advantage in words."""
        grades = " + ".join(f"{weight:g} {name}" for name, weight in (self.rewards or {"accuracy": 1.0}).items())
        minus = {"group": " - mean of the group", "leave_one_out": " - mean of the group's others", "none": ""}
        over = {"group": ", over the group's deviation", "batch": ", over the step's deviation", "none": ""}
        says = f"A = {grades}{minus[self.baseline]}{over[self.scale]}"
        if self.penalty > 0 and self.form == "reward":
            says += f"; then - {self.penalty:g} times the link of {self.divergence} to the reference"
        if self.penalty > 0 and self.horizon == "sequence":
            says += f"; then - {self.penalty:g} times the later {self.divergence} to the reference"
        return says

    def _penalty_on(self, step: Batch) -> Tensor:
        """How much the penalty counts at each token."""
        if self.penalty_on == "undecided":
            return step["entropy:reference"]
        right = step.rollout.rewards["accuracy"] == 1
        rows = {"all": torch.ones_like(right), "right": right, "wrong": ~right}[self.penalty_on]
        return rows[:, None] * step["scored"].float()

    def _cost(self, step: Batch, counts: Tensor) -> Tensor | None:
        """What a token is charged through its advantage: all of the penalty as a reward, else what comes later."""
        values = step[f"{self.divergence}:reference,student"] if self.horizon == "sequence" else None
        if self.form != "reward":
            return None if values is None else later(values * counts * step["scored"])
        cost = divergence_cost(
            divergence(self.divergence),
            step["log_prob:reference"],
            step["log_prob:student"],
            step["scored"],
            horizon=self.horizon,
            values=values,
            weight=counts if self.horizon != "whole" else 1.0,
        )
        return cost * counts if self.horizon == "whole" else cost


def _reward(rollout: Rollout, weights: dict[str, float] | None) -> Tensor:
    return shaped_reward(rollout.rewards, weights)
