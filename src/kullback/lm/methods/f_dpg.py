"""f-DPG: become an unnormalised target, in any divergence, by policy gradient.

    min over theta   mean_x D_f( p(. | x), model(. | x) ),    p = P / Z,    log P = log reference + factor
    gradient = E_{y ~ q} w (g - B) grad log model(y | x),    g = -link(log P - log Z - log model),    w = model / q

with the sign of an ascent; y is a whole completion and every log-probability a sum over its tokens. g, Z, B and w are
detached. Z of a prompt is the mean of P / q over all its completions so far, those of the step included. The target and
the divergence are two choices: (posterior, reverse KL) is KL-penalised RL, (constraint, forward KL) is GDC.

Paper -> here:  a -> reference,  pi_theta -> model,  q -> proposal,  f'(pi / p) -> link(log_ratio),  B -> baseline.
Source: Go et al., arXiv 2302.08215, algorithm 1; constraints and multipliers Khalifa et al., 2012.11635.
Differs from the paper: (1) a step has several prompts of a few completions, where the paper has one of many; the mean
of the prompt's other completions is offered as a baseline; (2) multipliers are fitted by Newton's method; (3) `max_z`
limits every P / q, not only the largest; (4) the advantage, not the reward alone, is multiplied by w.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from kullback.divergence import divergence
from kullback.lm import Batch, Method, answer, policy, sources
from kullback.lm.beforehand import fit_to_moments, fitted
from kullback.lm.distances import agreements, forward_kl, to_target
from kullback.lm.energies import Energy, energy
from kullback.lm.moment import Moment
from kullback.lm.players import INITIAL, Copy
from kullback.lm.rewarded import refuse_temperature, refuse_ungraded
from kullback.lm.rollout import Origin
from kullback.lm.schedules import NearerToTarget
from kullback.lm.sources import PlayerSource
from kullback.lm.weights import leave_one_out
from kullback.run.controllers import Controller
from kullback.run.terms import Mean, Term


@final
@dataclass(frozen=True, kw_only=True)
class FDPG(Method):
    """Match an unnormalised target distribution over whole completions.

    Args:
        proposal: who writes: the "student", or "lagged", a copy of it that is renewed now and then.
        proposal_every: optimiser steps after which a lagged proposal may be renewed.
        proposal_gate: renew it only if the student has been nearer to the target than it, by estimated KL(p || .).
        adopt: whether the next renewal takes place; the gate writes it.
        reference: the model whose probabilities the target multiplies.
        score: the target's factor, see `kullback.lm.energies`: "posterior(accuracy, beta=0.1)".
        fit_prompts, fit_samples: problems, and the reference's completions of each, from which the multipliers of
            distributional() are fitted before the first step.
        divergence: a name `kb.divergence` parses; the target is its target.
        baseline: "window", the mean of the last pseudo-rewards before this step; "leave_one_out", the mean of the
            prompt's other completions; "none".
        window: how many pseudo-rewards the first remembers.
        max_z: limit of P / q in the estimate of Z, and of P itself; None has none.
        cap: limit of w; None has none.
    """

    samples: int = answer("source", 8)
    proposal: Literal["student", "lagged"] = answer("source", "student")
    proposal_every: int = answer("source", 16)
    proposal_gate: bool = answer("source", True)
    adopt: int = answer("source", 1)
    reference: Any = answer("target", INITIAL)
    score: Any = answer("target", "posterior(accuracy, beta=0.1)")
    fit_prompts: int = answer("target", 64)
    fit_samples: int = answer("target", 64)
    divergence: str = answer("signal", "2*jsd(0.5)")
    aggregate: Mean = answer("weight", "row_sum")
    baseline: Literal["window", "leave_one_out", "none"] = answer("weight", "window")
    window: int = answer("weight", 1024)
    max_z: float | None = answer("weight", None)
    cap: float | None = answer("weight", None)

    def __post_init__(self) -> None:
        refuse_temperature(self.sampling_temperature)
        target, D = self.energy, divergence(self.divergence)
        if target.can_be_zero and math.isinf(D.link_at_zero):
            raise ValueError(
                f"signal.divergence={self.divergence!r} is infinite where the target is 0, and {target} is 0 for some "
                "completions: give pointwise() a floor, such as pointwise(accuracy, floor=-8), or use forward_kl, "
                "2*jsd(0.5) or tv"
            )
        if self.reference is None:
            raise ValueError("target.reference is missing: the target is the reference times a factor; write initial")
        if self.samples < 2:
            raise ValueError(
                f"source.samples={self.samples}: the normaliser of a prompt seen once would be its own completion's "
                "score, and nothing would be learnt; set it to at least 2, better 8"
            )
        counts = {"source.proposal_every": (self.proposal_every, 1), "weight.window": (self.window, 1)}
        counts |= {"target.fit_prompts": (self.fit_prompts, 1), "target.fit_samples": (self.fit_samples, 2)}
        for name, (number, least) in counts.items():
            if number < least:
                raise ValueError(f"{name}={number} must be at least {least}")
        for name, limit in (("weight.max_z", self.max_z), ("weight.cap", self.cap)):
            if limit is not None and not limit > 0:
                raise ValueError(f"{name}={limit:g} must be positive")

    @property
    def energy(self) -> Energy:
        """The target's factor over the reference."""
        return energy(self.score)

    @property
    def lagged(self) -> bool:
        return self.proposal == "lagged"

    @property
    def scores(self) -> tuple[str, ...]:
        return ("log_prob:student", "log_prob:reference")

    def players(self) -> dict[str, Any]:
        return {"reference": self.reference, "proposal": INITIAL if self.lagged else None}

    def source(self) -> sources.Source:
        return PlayerSource("proposal" if self.lagged else "student", Origin.STUDENT, grades=self.energy.grades)

    def after(self, step: int) -> list[Copy]:
        renew = self.lagged and self.adopt and step % self.proposal_every == 0
        return [Copy("student", "proposal")] if renew else []

    def schedule(self) -> list[Controller]:
        return [NearerToTarget(self.proposal_every)] if self.lagged and self.proposal_gate else []

    def begin(self, at: Moment) -> None:
        refuse_ungraded(at.task, self.energy.grades)
        if self.energy.moments:
            fit_to_moments(at, self.energy, player="reference", prompts=self.fit_prompts, samples=self.fit_samples)

    def weight(self, step: Batch) -> dict[str, Tensor]:
        rollout, scored, D = step.rollout, step["scored"], divergence(self.divergence)

        def row(grid: Tensor) -> Tensor:
            return torch.where(scored, grid, 0.0).double().sum(1)

        student, reference = row(step["log_prob:student"]), row(step["log_prob:reference"])
        sampler = row(rollout.log_probs) if self.lagged else student
        factor = self.energy.factor(rollout.rewards, fitted(step.ledger, self.energy)).to(student)
        weighed = self._limited(reference + factor - sampler)  # log of P / q
        ids = [note["problem_id"] for note in rollout.notes]
        step.ledger.add("normaliser", ids, weighed.exp())
        Z = step.ledger.mean("normaliser", ids).to(student)
        known = ~factor.isnan()
        trained = known & (Z > 0)
        log_p = torch.where(trained, weighed + sampler - Z.log(), torch.nan)
        importance = (student - sampler).exp()
        w = importance if self.cap is None else importance.clamp(max=self.cap)
        g = torch.where(trained, -D.link(torch.where(trained, log_p - student, 0.0)), torch.nan)
        advantage = w * torch.where(trained, g - self._baseline(step, g), 0.0)
        if self.baseline == "window":
            step.ledger.push("pseudo_reward", g, self.window)
        seen = {
            "pseudo_reward": g,
            "skipped": torch.where(known, (Z == 0).double(), torch.nan),
            "log_normaliser": torch.where(Z > 0, Z.log(), torch.nan),
            "reference_kl": torch.where(trained, importance * (student - reference), torch.nan),
            "completion_entropy": -importance * student,
            "repeated": agreements(rollout).to(student),
        }
        seen |= to_target(D, log_p, student, sampler, p_can_be_zero=self.energy.can_be_zero)
        target_weight = (log_p - sampler).exp()  # a mean with it is one under p
        seen |= {f"target_{grade}": target_weight * rollout.rewards[grade] for grade in self.energy.grades}
        if self.lagged:
            seen |= {"importance": w, "proposal_forward_kl": forward_kl(log_p, sampler, sampler)}
        columns = {"trained": scored & trained[:, None], "advantage": advantage.to(step["log_prob:student"])}
        return columns | {f"rollout/{name}": values for name, values in seen.items()}

    def signal(self, batch: Batch) -> list[Term]:
        D, target = divergence(self.divergence), self.energy
        baseline = {
            "window": f"mean of the {self.window} before this step",
            "leave_one_out": "mean of the prompt's other completions",
            "none": "no baseline",
        }[self.baseline]
        weight = ", times model / proposal" if self.proposal == "lagged" else ""
        term = policy(batch, clip=None, over="trained")
        says = (
            f"{D} of whole completions to p = P / Z, P = reference * {target.says}, Z estimated for each prompt; "
            f"{term.says}, A = -link(log p - log model) - {baseline}{weight}"
        )
        return [replace(term, says=says)]

    def _limited(self, weighed: Tensor) -> Tensor:
        if bool((weighed > 700).any()):
            raise ValueError(
                f"target.score={str(self.energy)!r}: a score exceeds exp(700) times the probability of its completion; "
                "raise beta, or make the grades smaller"
            )
        return weighed if self.max_z is None else weighed.clamp(max=math.log(self.max_z))

    def _baseline(self, step: Batch, g: Tensor) -> Tensor:
        """Of each row; no row is in its own."""
        if self.baseline == "leave_one_out":
            return leave_one_out(g, step.rollout.group)
        before = step.ledger.last("pseudo_reward") if self.baseline == "window" else []
        return torch.full_like(g, sum(before) / len(before) if before else 0.0)
