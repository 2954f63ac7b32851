"""All strings of six letters under a prior, for paper 23: reward maximisation and distribution matching, exactly.

The prior is a random Markov chain, the reward 1 where the last letter occurs; a policy is a softmax over all 4096
strings. Also twelve actions of which two are equally good, and the identities behind it all.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import divergence
from kullback.theory import tabular
from kullback.theory.posterior import collapse, evidence_bound, log_evidence, posterior

LETTERS, LENGTH = 4, 6
BETAS = (0.05, 0.1, 0.3, 1.0)
FORWARD, REVERSE = divergence("forward_kl"), divergence("reverse_kl")
SAMPLES = 256  # of a sampled gradient


def problem(seeds: int) -> tuple[Float[Tensor, "seed string"], Float[Tensor, "string"]]:
    """log pi_0 of random first-order chains with Dirichlet(2) rows, and r = 1 where the last letter occurs."""
    text = torch.cartesian_prod(*[torch.arange(LETTERS)] * LENGTH)
    laws = []
    for seed in range(seeds):
        rows = tabular.random_policy(LETTERS, LETTERS + 1, seed=seed, concentration=2.0)
        laws.append(rows[LETTERS][text[:, 0]] + rows[text[:, :-1], text[:, 1:]].sum(1))
    return torch.stack(laws), (text == LETTERS - 1).any(1).double()


Path = dict[int, dict[str, list[float]]]  # by step, then by what is measured: a number for each prior


def numbers(policy: Tensor, prior: Tensor, reward: Tensor) -> dict[str, list[float]]:
    seen = collapse(policy, prior, reward)
    shown = ("reward", "entropy", "distinct", "tie_odds", "prior_kl")
    return {name: getattr(seen, name).tolist() for name in shown}


def reward_only(prior: Tensor, reward: Tensor, steps: int, how: str) -> Path:
    """Maximise E r from the prior: "plain" ascent with rate 30, "adam" at 0.05, or "sampled", Adam on 256 draws."""
    marks = {0, 50, 100, 300, 500, 1000, steps}
    path: Path = {}

    def watch(step: int, policy: Tensor) -> None:
        if step in marks:
            path[step] = numbers(policy, prior, reward)

    if how == "plain":
        logits = prior.clone()
        for step in range(steps + 1):
            policy = logits.log_softmax(-1)
            watch(step, policy)
            logits = logits + 30 * tabular.score_gradient(policy, reward.expand_as(policy))
        return path
    draw = torch.Generator().manual_seed(0)

    def loss(policy: Tensor) -> Tensor:
        if how == "adam":
            return -(policy.exp() * reward).sum(-1)
        y = torch.multinomial(policy.detach().exp(), SAMPLES, replacement=True, generator=draw)
        earned = reward[y]
        return -((earned - earned.mean(-1, keepdim=True)) * policy.gather(-1, y)).mean(-1)

    tabular.descend(loss, prior, steps=steps, watch=watch)
    return path


def match(prior: Tensor, reward: Tensor, steps: int) -> dict[str, Any]:
    """Exact Adam at 0.05 from the prior, all betas and priors at once.

    Returns:
        by method and beta, the last policy's numbers and its distances from the target; and for the penalised reward
        the gap of the bound on the way.
    """
    wide = prior[:, None].expand(-1, len(BETAS), -1)
    target = torch.stack([posterior(prior, reward.expand_as(prior), beta) for beta in BETAS], 1)
    beta = torch.tensor(BETAS, dtype=torch.float64)
    gaps: dict[int, list[float]] = {}
    highest = torch.stack([log_evidence(prior, reward.expand_as(prior), b) for b in BETAS], 1)

    def gap(policy: Tensor) -> Tensor:
        bound = [evidence_bound(policy[:, i], prior, reward.expand_as(prior), b) for i, b in enumerate(BETAS)]
        return highest - torch.stack(bound, 1)

    def watch(step: int, policy: Tensor) -> None:
        if step % 20 == 0 or step == steps:
            gaps[step] = gap(policy).mean(0).tolist()

    def penalised(policy: Tensor) -> Tensor:
        return beta * REVERSE.from_log_probs(wide, policy) - (policy.exp() * reward).sum(-1)

    found = {
        "reward - beta KL": tabular.descend(penalised, wide, steps=steps, watch=watch),
        "forward KL": tabular.descend(lambda policy: FORWARD.from_log_probs(target, policy), wide, steps=steps),
    }
    table = {
        (name, b): numbers(policy[:, i], prior, reward)
        | {
            "to_target": REVERSE.from_log_probs(target[:, i], policy[:, i]).tolist(),
            "from_target": FORWARD.from_log_probs(target[:, i], policy[:, i]).tolist(),
        }
        for name, policy in (*found.items(), ("posterior", target))
        for i, b in enumerate(BETAS)
    }
    hard = torch.where(reward == 1, prior, -torch.inf).log_softmax(-1)
    policy = tabular.descend(lambda policy: FORWARD.from_log_probs(hard, policy), prior, steps=steps)
    share = (prior.exp() * reward).sum(-1)
    constrained = numbers(policy, prior, reward) | {
        "from_target": FORWARD.from_log_probs(hard, policy).tolist(),
        "to_target": [math.inf] * len(prior),
        "target_entropy": tabular.entropy(hard).tolist(),
        "cost_error": (REVERSE.from_log_probs(prior, hard) + share.log()).abs().tolist(),
    }
    return {"table": table, "gaps": gaps, "constrained": constrained, "highest": highest}


def bandit(steps: int) -> dict[str, Any]:
    """Twelve actions, prior Dirichlet(5), two best actions at reward 1: plain ascent on E r with rate 1."""
    prior = tabular.random_policy(12, seed=0, concentration=5.0)
    reward = 0.3 * torch.rand(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reward[:2] = 1.0
    logits, path = prior.clone(), {}
    marks = sorted({0, *(int(10 ** (k / 4)) for k in range(30)), steps})
    for step in range(steps + 1):
        policy = logits.log_softmax(-1)
        if step in marks:
            seen = collapse(policy, prior, reward)
            odds = float((policy[0] - policy[1]).abs().exp())
            path[step] = {"entropy": float(seen.entropy), "reward": float(seen.reward), "odds": odds}
        logits = logits + tabular.score_gradient(policy, reward)
    kept = posterior(prior, reward, 0.1)
    seen = collapse(kept, prior, reward)
    odds = float((kept[0] - kept[1]).abs().exp())
    return {"path": path, "posterior": {"entropy": float(seen.entropy), "reward": float(seen.reward), "odds": odds}}


def identities(problems: int) -> dict[str, float]:
    """Largest errors over random policies, priors, rewards and betas: J's identity, and its gradient's."""
    draw = torch.Generator().manual_seed(0)
    value, slope = 0.0, 0.0
    for _ in range(problems):
        logits, prior = torch.randn(2, 20, generator=draw, dtype=torch.float64)
        reward, prior = torch.randn(20, generator=draw, dtype=torch.float64), prior.log_softmax(-1)
        beta = float(torch.rand(1, generator=draw, dtype=torch.float64)) * 2 + 0.1
        policy, p = logits.log_softmax(-1), posterior(prior, reward, beta)
        kl = (policy.exp() * (policy - p)).sum()
        J = (policy.exp() * (reward - beta * (policy - prior))).sum()
        value = max(value, float((J - beta * (log_evidence(prior, reward, beta) - kl)).abs()))

        def distance(x: Tensor, p: Tensor = p) -> Tensor:
            return (x.exp() * (x - p)).sum()

        towards = tabular.gradient(distance, logits)
        rl = tabular.score_gradient(policy, reward - beta * (policy - prior))
        slope = max(slope, float((rl + beta * towards).abs().max()))
    return {"value": value, "gradient": slope}
