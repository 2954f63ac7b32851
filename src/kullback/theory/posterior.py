"""The posterior that KL-penalised RL converges to, exactly: identities, exact samplers, and how a policy collapses.

    J(policy) = E_policy r - beta KL(policy || prior),    p = prior exp(r / beta) / Z
    J(policy) = -beta KL(policy || p) + beta log Z,       so J / beta is a lower bound of the evidence log Z

Laws are log-probabilities [..., outcome], float64; everything is in nats. Source: arXiv 2205.11275, sections 3 and 4.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kullback.divergence import divergence
from kullback.estimate import check_laws, ends, expectation, log_partition, tilt

REVERSE_KL = divergence("reverse_kl")


def posterior(
    prior: Float[Tensor, "*batch outcome"], reward: Float[Tensor, "*batch outcome"], beta: float
) -> Float[Tensor, "*batch outcome"]:
    """log p of p = prior exp(reward / beta) / Z. Equal rewards keep the odds that they have under the prior.

    beta = 0 is the prior given that the reward is the largest there is, beta = inf the prior itself.

    Raises:
        ValueError: beta is negative or nan.
    """
    return tilt(*check_laws(prior, reward, name="prior"), _inverse(beta))


def log_evidence(
    prior: Float[Tensor, "*batch outcome"], reward: Float[Tensor, "*batch outcome"], beta: float
) -> Float[Tensor, "*batch"]:
    """log Z = log E_prior exp(reward / beta); with rewards of at most 0 the log-probability of being optimal."""
    return log_partition(*check_laws(prior, reward, name="prior"), _inverse(beta))


def evidence_bound(
    policy: Float[Tensor, "*batch outcome"],
    prior: Float[Tensor, "*batch outcome"],
    reward: Float[Tensor, "*batch outcome"],
    beta: float,
) -> Float[Tensor, "*batch"]:
    """J / beta = E_policy reward / beta - KL(policy || prior): log Z less KL(policy || posterior). Differentiable."""
    return expectation(policy, reward) * _inverse(beta) - REVERSE_KL.from_log_probs(prior, policy)


def reject(
    prior: Float[Tensor, "outcome"],
    reward: Float[Tensor, "outcome"],
    beta: float,
    proposals: int,
    *,
    generator: torch.Generator,
) -> Int[Tensor, "kept"]:
    """Independent exact draws of the posterior: of `proposals` from the prior each is kept with probability
    exp((r - max r) / beta), which is Z exp(-max r / beta) on average."""
    prior, reward = check_laws(prior, reward, name="prior")
    drawn = torch.multinomial(prior.exp(), proposals, replacement=True, generator=generator)
    highest = ends(prior, reward)[1]
    accept = ((reward[drawn] - highest) * _inverse(beta)).exp()
    return drawn[torch.rand(proposals, generator=generator, dtype=accept.dtype) < accept]


def resample(
    prior: Float[Tensor, "outcome"],
    reward: Float[Tensor, "outcome"],
    beta: float,
    proposals: int,
    draws: int,
    *,
    generator: torch.Generator,
) -> Int[Tensor, "draws"]:
    """Draws of the posterior by self-normalised importance: from the prior, then again by weight exp(r / beta). Biased
    by O(1 / proposals), and not independent."""
    prior, reward = check_laws(prior, reward, name="prior")
    drawn = torch.multinomial(prior.exp(), proposals, replacement=True, generator=generator)
    weight = (reward[drawn] * _inverse(beta)).softmax(-1)
    return drawn[torch.multinomial(weight, draws, replacement=True, generator=generator)]


@dataclass(frozen=True)
class Collapse:
    """How much of a prior a policy still is.

    Args:
        reward: its expectation.
        entropy: nats.
        effective_support: exp(entropy), as many equally likely outcomes.
        distinct: the number of different outcomes that 1000 draws are expected to show.
        tie_odds: the largest factor by which the odds of two outcomes of equal reward have moved from the prior's; 1
            for every posterior, and without a limit where a policy picks one of several equals.
        prior_kl: KL(policy || prior), nats.
    """

    reward: Tensor
    entropy: Tensor
    effective_support: Tensor
    distinct: Tensor
    tie_odds: Tensor
    prior_kl: Tensor


DRAWS = 1000


def collapse(
    policy: Float[Tensor, "*batch outcome"],
    prior: Float[Tensor, "*batch outcome"],
    reward: Float[Tensor, "*batch outcome"],
) -> Collapse:
    """The diagnostics of a policy beside its prior. Without gradient.

    Raises:
        ValueError: laws that do not sum to 1, or rewards that are not finite.
    """
    with torch.no_grad():
        check_laws(policy, reward, name="policy")
        prior, reward = check_laws(prior, reward, name="prior")
        h = -expectation(policy, policy)
        seen = (-torch.expm1(DRAWS * torch.log1p(-policy.exp().clamp(max=1.0)))).sum(-1)  # 1 - (1 - p)^draws
        return Collapse(
            reward=expectation(policy, reward),
            entropy=h,
            effective_support=h.exp(),
            distinct=seen,
            tie_odds=_tie_odds(policy, prior, reward),
            prior_kl=REVERSE_KL.from_log_probs(prior, policy),
        )


def _tie_odds(policy: Tensor, prior: Tensor, reward: Tensor) -> Tensor:
    possible = (prior > -torch.inf).expand_as(policy)
    shift = torch.where(possible, policy - prior, 0.0)
    widest = torch.zeros(policy.shape[:-1], dtype=policy.dtype)
    for level in torch.unique(reward):
        here = possible & (reward == level)
        spread = torch.where(here, shift, -torch.inf).amax(-1) - torch.where(here, shift, torch.inf).amin(-1)
        widest = torch.where(here.sum(-1) > 1, torch.maximum(widest, spread), widest)
    return widest.exp()


def _inverse(beta: float) -> float:
    if not beta >= 0:
        raise ValueError(f"beta={beta:g}: must not be negative")
    return float("inf") if beta == 0 else 1 / beta
