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

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from kullback.divergence import divergence
from kullback.estimate.multipliers import fit_multipliers
from kullback.lm import Batch, Method, answer, policy, sources
from kullback.lm.energies import Energy, energy
from kullback.lm.moment import Moment
from kullback.lm.players import INITIAL, Copy
from kullback.lm.rollout import Origin, Rollout
from kullback.lm.sources import PlayerSource
from kullback.lm.weights import leave_one_out
from kullback.run.controllers import Controller
from kullback.run.processes import from_all
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
        target, D = self.energy, divergence(self.divergence)
        if target.can_be_zero and math.isinf(D.link_at_zero):
            raise ValueError(
                f"signal.divergence={self.divergence!r} is infinite where the target is 0, and {target} is 0 for some "
                "completions: give pointwise() a floor, such as pointwise(accuracy, floor=-8), or use forward_kl, "
                "2*jsd(0.5) or tv"
            )
        if self.reference is None:
            raise ValueError("target.reference is missing: the target is the reference times a factor; write initial")
        if self.sampling_temperature != 1:
            raise ValueError(
                f"source.sampling_temperature={self.sampling_temperature:g} draws from another distribution than the "
                "one that is trained: set it to 1"
            )
        if self.samples < 2:
            raise ValueError(
                f"source.samples={self.samples}: the normaliser of a prompt seen once would be its own completion's "
                "score, and nothing would be learnt; set it to at least 2, better 8"
            )
        counts = {"source.proposal_every": self.proposal_every, "weight.window": self.window}
        counts |= {"target.fit_prompts": self.fit_prompts, "target.fit_samples": self.fit_samples}
        for name, number in counts.items():
            if number < 1:
                raise ValueError(f"{name}={number} must be at least 1")
        for name, limit in (("weight.max_z", self.max_z), ("weight.cap", self.cap)):
            if limit is not None and not limit > 0:
                raise ValueError(f"{name}={limit:g} must be positive")

    @property
    def energy(self) -> Energy:
        """The target's factor over the reference."""
        return energy(self.score)

    @property
    def scores(self) -> tuple[str, ...]:
        return ("log_prob:student", "log_prob:reference")

    def players(self) -> dict[str, Any]:
        return {"reference": self.reference, "proposal": INITIAL if self.proposal == "lagged" else None}

    def source(self) -> sources.Source:
        if self.proposal == "student":
            return sources.student(grades=self.energy.grades)
        return PlayerSource("proposal", Origin.STUDENT, grades=self.energy.grades)

    def after(self, step: int) -> list[Copy]:
        renew = self.proposal == "lagged" and self.adopt and step % self.proposal_every == 0
        return [Copy("student", "proposal")] if renew else []

    def schedule(self) -> list[Controller]:
        gated = self.proposal == "lagged" and self.proposal_gate
        return [NearerToTarget(self.proposal_every)] if gated else []

    def begin(self, at: Moment) -> None:
        if at.task.verifier is None and not set(self.energy.grades) <= {"finished"}:
            raise ValueError(f"task={at.task.name!r} grades nothing: give it answers or a verifier")
        moments = self.energy.moments
        if not moments:
            return
        grades = list(moments)
        values = _reference_grades(self, at)  # [prompt, sample, grade], of all ranks
        try:
            found = fit_multipliers(
                torch.zeros(values.shape[:2]), values, torch.tensor(list(moments.values()), dtype=torch.float64)
            )
        except ValueError as error:
            raise ValueError(
                f"target.score={str(self.energy)!r}: {error} (features: the mean of {', '.join(grades)} over "
                f"{values.shape[1]} completions of each of {values.shape[0]} prompts, in this order)"
            ) from error
        at.ledger.add("multiplier", grades, found)

    def multipliers(self, step: Batch) -> dict[str, float]:
        """lambda by grade, as fitted before the first step."""
        names = list(self.energy.moments)
        return dict(zip(names, step.ledger.mean("multiplier", names, default=0.0).tolist(), strict=True))

    def weight(self, step: Batch) -> dict[str, Tensor]:
        rollout, scored, ledger, D = step.rollout, step["scored"], step.ledger, divergence(self.divergence)

        def row(grid: Tensor) -> Tensor:
            return torch.where(scored, grid, 0.0).double().sum(1)

        student, reference = row(step["log_prob:student"]), row(step["log_prob:reference"])
        sampler = student if self.proposal == "student" else row(rollout.log_probs)
        factor = self.energy.factor(rollout.rewards, self.multipliers(step)).to(student)
        weighed = reference + factor - sampler  # log of P / q
        if bool((weighed > 700).any()):
            raise ValueError(
                f"target.score={str(self.energy)!r}: a score exceeds exp(700) times the probability of its completion; "
                "raise beta, or make the grades smaller"
            )
        if self.max_z is not None:
            weighed = weighed.clamp(max=math.log(self.max_z))
        ids = [note["problem_id"] for note in rollout.notes]
        ledger.add("normaliser", ids, weighed.exp())
        Z = ledger.mean("normaliser", ids).to(student)
        known = ~factor.isnan()
        trained = known & (Z > 0)
        log_p = torch.where(trained, weighed + sampler - Z.log(), torch.nan)
        importance = (student - sampler).exp()
        if self.cap is not None:
            importance = importance.clamp(max=self.cap)
        reward = torch.where(trained, -D.link(torch.where(trained, log_p - student, 0.0)), torch.nan)
        columns = {"trained": scored & trained[:, None]}
        advantage = importance * torch.where(trained, reward - self._baseline(step, reward), 0.0)
        columns["advantage"] = advantage.to(step["log_prob:student"])
        if self.baseline == "window":
            ledger.push("pseudo_reward", reward, self.window)
        seen = {"pseudo_reward": reward, "skipped": torch.where(known, (Z == 0).double(), torch.nan)}
        seen["log_normaliser"] = torch.where(Z > 0, Z.log(), torch.nan)
        seen |= self._distances(log_p, student, reference, sampler) | self._collapse(rollout, student, sampler)
        target_weight = (log_p - sampler).exp()  # a mean with it is one under p
        seen |= {f"target_{grade}": target_weight * rollout.rewards[grade] for grade in self.energy.grades}
        seen |= {"importance": importance} if self.proposal == "lagged" else {}
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
        return [dataclasses.replace(term, says=says)]

    def _baseline(self, step: Batch, reward: Tensor) -> Tensor:
        """Of each row; no row is in its own."""
        if self.baseline == "window":
            before = step.ledger.last("pseudo_reward")
            return torch.full_like(reward, sum(before) / len(before) if before else 0.0)
        if self.baseline == "none":
            return torch.zeros_like(reward)
        known = ~reward.isnan()
        filled, share = torch.where(known, reward, 0.0), leave_one_out(known.to(reward), step.rollout.group)
        return leave_one_out(filled, step.rollout.group) / torch.where(share > 0, share, 1.0)

    def _distances(self, log_p: Tensor, student: Tensor, reference: Tensor, sampler: Tensor) -> dict[str, Tensor]:
        """Estimates of divergences between whole completions; a row is one draw of the sampler, nan where unknown."""
        D, w = divergence(self.divergence), (student - sampler).exp()
        unknown = log_p.isnan()

        def forward(model: Tensor) -> Tensor:  # KL(p || model)
            weight = (log_p - sampler).exp()
            return torch.where(weight == 0, weight, weight * torch.where(weight == 0, 0.0, log_p - model))

        found = {
            "divergence": w * D.value(torch.where(unknown, 0.0, log_p - student)),
            "target_forward_kl": forward(student),
            "target_tv": 0.5 * (w - (log_p - sampler).exp()).abs(),
            "reference_kl": w * (student - reference),
        }
        if not self.energy.can_be_zero:
            found["target_reverse_kl"] = w * (student - log_p)
        if self.proposal == "lagged":
            found["proposal_forward_kl"] = forward(sampler)
        return {name: torch.where(unknown, torch.nan, values) for name, values in found.items()}

    def _collapse(self, rollout: Rollout, student: Tensor, sampler: Tensor) -> dict[str, Tensor]:
        """How far the student's distribution has shrunk: entropy of completions, and how often two of them agree."""
        same = _agreements(rollout)
        return {"completion_entropy": -(student - sampler).exp() * student, "repeated": same.to(student)}


@final
@dataclass(frozen=True)
class NearerToTarget:
    """Lets a proposal be renewed when, since the last time, the student's KL(p || student) was below its own."""

    every: int

    when: Literal["step", "probe"] = "step"
    reads: tuple[str, ...] = ("rollout/target_forward_kl", "rollout/proposal_forward_kl")
    writes: tuple[str, ...] = ("source.adopt",)

    def __str__(self) -> str:
        return f"nearer to the target, over {self.every} steps"

    def start(self) -> tuple[dict[str, Any], dict[str, float]]:
        return {"ahead": 0.0}, {"source.adopt": 0.0}

    def update(
        self, state: dict[str, Any], step: int, seen: Mapping[str, float]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        if any(name not in seen for name in self.reads):
            return state, {"source.adopt": 0.0}
        gain = seen[self.reads[1]] - seen[self.reads[0]]
        ahead = (0.0 if step % self.every == 0 else state["ahead"]) + (gain if math.isfinite(gain) else 0.0)
        return {"ahead": ahead}, {"source.adopt": float(ahead > 0)}


def _reference_grades(method: FDPG, at: Moment) -> Tensor:
    """Grades of the reference's own completions of `fit_prompts` problems, over all ranks: [prompt, sample, grade]."""
    grades = list(method.energy.moments)
    drawing = dataclasses.replace(at, method=dataclasses.replace(method, samples=method.fit_samples))
    source = PlayerSource("reference", Origin.STUDENT, grades=tuple(grades))
    rounds = -(-method.fit_prompts // at.prompts_per_step)
    mine: list[list[list[float]]] = []
    for turn in range(rounds):
        placed = at.problems(turn)
        if not placed:
            continue
        rollout = source.write(placed, drawing)
        absent = [name for name in grades if name not in rollout.rewards]
        if absent:
            raise ValueError(f"target.score={str(method.energy)!r}: the verifier gives no {' or '.join(absent)}")
        values = torch.stack([rollout.rewards[name] for name in grades], -1).view(len(placed), method.fit_samples, -1)
        mine += values[~values.isnan().any(-1).any(-1)].tolist()
    every = [prompt for prompts in from_all(mine) for prompt in prompts]
    if not every:
        raise ValueError(f"target.score={str(method.energy)!r}: no prompt got all its grades, so nothing can be fitted")
    return torch.tensor(every, dtype=torch.float64)


def _agreements(rollout: Rollout) -> Tensor:
    """For each row the share of its group's other rows that say the same; nan where it is alone."""
    places: dict[int, list[int]] = {}
    for place, group in enumerate(rollout.group.tolist()):
        places.setdefault(group, []).append(place)
    texts = [
        tuple(ids[:length]) for ids, length in zip(rollout.completions.tolist(), rollout.lengths.tolist(), strict=True)
    ]
    shares = [math.nan] * len(rollout)
    for rows in places.values():
        counts: dict[tuple[int, ...], int] = {}
        for i in rows:
            counts[texts[i]] = counts.get(texts[i], 0) + 1
        for i in rows:
            shares[i] = (counts[texts[i]] - 1) / (len(rows) - 1) if len(rows) > 1 else math.nan
    return torch.tensor(shares, dtype=torch.float64)
