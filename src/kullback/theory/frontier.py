"""Where policies stand against the optimum and best-of-N of one reference, over many prompts, from samples.

The reference's law of the reward is taken, prompt by prompt, to be that of its samples. A budget is a mean over
prompts, so the optimum tilts all prompts by one beta:

    phi(y | x) = p(y | x) exp(beta r(x, y)) / Z(x),    Delta = mean_x KL(phi || p),    R = mean_x E_phi r
    mean_x KL(policy || phi) = mean_x KL(policy || p) - Delta + beta (R - mean_x E_policy r)        for every beta

The second line (arXiv 2404.01730, taken prompt by prompt) says how far a trained policy is from the optimum, and needs
only its reward and its KL. Standard errors are over prompts, by bootstrap: prompts are drawn anew, and everything,
beta too, is computed again.
"""

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import divergence
from kullback.estimate import expand, expectation, find_root, tilt, tilted_kl
from kullback.theory.alignment import best_of_n

REVERSE_KL = divergence("reverse_kl")


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error; NaN where there is none."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Standing:
    """A policy in the reward-KL plane.

    Args:
        kl: KL(policy || reference), nats per completion, mean over prompts.
        reward: expected, mean over prompts.
        attainable: the optimum's reward at this KL.
        distance: KL(policy || that optimum) in nats; NaN from the KL on at which the optimum answers nothing but its
            best samples (beta is infinite there).
        needed: the KL at which the optimum has this reward; NaN where the reference's samples never give as much.
        excess: kl - needed, which is KL(policy || the optimum of equal reward).
    """

    kl: Estimate
    reward: Estimate
    attainable: Estimate
    distance: Estimate
    needed: Estimate
    excess: Estimate

    def as_dict(self) -> dict[str, dict[str, float]]:
        return {
            item.name: {"value": found.value, "standard_error": found.standard_error}
            for item in fields(self)
            if isinstance(found := getattr(self, item.name), Estimate)
        }


class Frontier:
    """The optimum and best-of-N of a reference, from the rewards of its samples.

    With few samples a prompt the curve lies too low: what the reference can do but did not show counts as impossible.

    Args:
        rewards: of the reference's completions, row by row independent draws.
        replicates: of the bootstrap.

    Raises:
        ValueError: fewer than two prompts; a reward is not finite.
    """

    def __init__(self, rewards: Float[Tensor, "prompt sample"], *, replicates: int = 200, seed: int = 0) -> None:
        prompts, samples = rewards.shape
        if prompts < 2:
            raise ValueError(f"rewards of {prompts} prompts: a standard error over prompts needs two")
        if not bool(rewards.isfinite().all()):
            raise ValueError("rewards must be finite: leave out the prompts without a verdict")
        rewards = rewards.double()
        levels = rewards.unique()
        if len(levels) < samples:  # a law over the distinct rewards says the same in less room
            counts = (rewards[..., None] == levels).double().sum(1)
            self.rewards, self.log_p = levels.expand(prompts, -1), (counts / samples).log()
        else:
            self.rewards, self.log_p = rewards, torch.full_like(rewards, -math.log(samples))
        draw = torch.Generator().manual_seed(seed)
        drawn = torch.randint(prompts, (replicates, prompts), generator=draw)
        counts = torch.zeros(replicates, prompts, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones(replicates, prompts, dtype=torch.float64))
        everyone = torch.ones(1, prompts, dtype=torch.float64)  # row 0 is the value, the others its bootstrap
        self.weight: Float[Tensor, "replicate prompt"] = torch.cat([everyone, counts]) / prompts
        spread = float(levels[-1] - levels[0])
        self._unit = 1 / spread if spread > 0 else 1.0

    def at(self, beta: Float[Tensor, "replicate"]) -> tuple[Float[Tensor, "replicate"], Float[Tensor, "replicate"]]:
        """(KL, reward) of the optimum at each replicate's beta, which may be infinite."""
        t = beta[:, None]
        kl = tilted_kl(self.log_p, self.rewards, t)
        return self._mean(kl), self._mean(expectation(tilt(self.log_p, self.rewards, t), self.rewards))

    def curve(self, points: int = 60) -> tuple[Float[Tensor, "point"], Float[Tensor, "point"]]:
        """(KL, reward) of the optimum from beta = 0 to infinity, for drawing."""
        t = torch.logspace(-2, 4, points - 2, base=math.e, dtype=torch.float64) * self._unit
        t = torch.cat([torch.zeros(1, dtype=t.dtype), t, torch.full((1,), math.inf, dtype=t.dtype)])[:, None]
        kl = tilted_kl(self.log_p, self.rewards, t).mean(-1)
        return kl, expectation(tilt(self.log_p, self.rewards, t), self.rewards).mean(-1)

    def best_of(self, n: float) -> Standing:
        """Best-of-n, by the exact law over the reference's samples."""
        law = best_of_n(self.log_p, self.rewards, n)
        return self.place(REVERSE_KL.from_log_probs(self.log_p, law), expectation(law, self.rewards))

    def place(self, kl: Float[Tensor, "prompt"], reward: Float[Tensor, "prompt"]) -> Standing:
        """Where a policy stands that has this KL to the reference and this expected reward on each prompt."""
        spent, earned = self._mean(kl.double()), self._mean(reward.double())
        beta = self._beta(spent, 0)
        attainable = self.at(beta)[1]
        distance = torch.where(beta.isinf(), torch.nan, beta * (attainable - earned))
        needed = self.at(self._beta(earned, 1))[0]
        needed = torch.where(earned > self.at(self._constant(math.inf))[1] + 1e-12, torch.nan, needed)
        return Standing(*map(_estimate, (spent, earned, attainable, distance, needed, spent - needed)))

    def _beta(self, goal: Tensor, which: int) -> Tensor:
        """beta >= 0 at which `at(beta)[which]` is the goal; 0 below its range and infinite above."""
        low, high = (self.at(self._constant(end))[which] for end in (0.0, math.inf))
        inside = (goal > low + 1e-12) & (goal < high - 1e-12)

        def beyond(beta: Tensor) -> Tensor:
            return torch.where(inside, self.at(beta)[which] - goal, torch.zeros_like(goal))

        found = find_root(beyond, self._constant(0.0), expand(beyond, self._constant(self._unit)))
        return torch.where(inside, found, torch.where(goal > low + 1e-12, torch.inf, 0.0))

    def _constant(self, value: float) -> Tensor:
        return torch.full(self.weight.shape[:1], value, dtype=torch.float64)

    def _mean(self, per_prompt: Float[Tensor, "*replicate prompt"]) -> Float[Tensor, "replicate"]:
        return (self.weight * per_prompt).sum(-1)


def _estimate(replicates: Tensor) -> Estimate:
    value, others = float(replicates[0]), replicates[1:]
    others = others[others.isfinite()]  # where few replicates have a value, so has no error
    known = math.isfinite(value) and len(others) > 0.9 * (len(replicates) - 1)
    return Estimate(value, float(others.std()) if known else math.nan)
