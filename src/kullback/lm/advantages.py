"""From rewards to advantages: group baselines, generalised advantages, whitening, weights for foreign samplers.

All are detached and see the whole step. What must not depend on how rows are spread over processes is counted over all
of them.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kullback.divergence import FDivergence
from kullback.lm.weights import suffix_sum
from kullback.run.processes import sum_over_ranks

Baseline = Literal["group", "leave_one_out", "none"]
Scale = Literal["group", "batch", "none"]
Level = Literal["token", "sequence"]
Horizon = Literal["token", "sequence", "whole"]

MAX_LOG_RATIO = 20.0  # nats: e^20 is 5e8; beyond it a ratio says only that two policies have nothing in common


def shaped_reward(
    rewards: Mapping[str, Float[Tensor, "row"]], weights: Mapping[str, float] | None
) -> Float[Tensor, "row"]:
    """sum_k weight_k reward_k: what is maximised, apart from the grades it is made of, which stay as they are.

    Args:
        weights: by name of a grade; None is {"accuracy": 1}.

    Returns:
        nan where any of the grades is: nobody knows what the row deserves.

    Raises:
        ValueError: a grade that no row has.
    """
    weights = weights or {"accuracy": 1.0}
    absent = [name for name in weights if name not in rewards]
    if absent:
        raise ValueError(
            f"weight.rewards: the verifier gives no {' or '.join(map(repr, absent))}; it gives {', '.join(rewards)}"
        )
    return torch.stack([weight * rewards[name] for name, weight in weights.items()]).sum(0)


def overlong(lengths: Int[Tensor, "row"], *, longest: int, soft: int) -> Float[Tensor, "row"]:
    """A grade from 0 to -1 that falls over the last `soft` of the `longest` tokens that an answer may have.

    Length is paid for little by little, where a penalty on cut answers alone would come with the last token.

    Source: DAPO, arXiv 2503.14476, equation 13, with L_max = longest and L_cache = soft; there the grade is added to an
    accuracy of -1 or 1, so that beside one of 0 or 1 its weight is 0.5.

    >>> overlong(torch.tensor([10, 16, 18, 20]), longest=20, soft=4).tolist()
    [0.0, 0.0, -0.5, -1.0]
    """
    return ((longest - soft - lengths) / soft).clamp(-1, 0)


def informative(reward: Float[Tensor, "row"], group: Int[Tensor, "row"]) -> Bool[Tensor, "row"]:
    """Whether the rows of a row's group have different rewards; nan is left out. A group of equals teaches nothing."""
    _, index = torch.unique(group, return_inverse=True)
    low, high = (reward.new_full((int(index.max()) + 1,), end) for end in (torch.inf, -torch.inf))
    known = ~reward.isnan()
    low.scatter_reduce_(0, index, torch.where(known, reward, torch.inf), "amin")
    high.scatter_reduce_(0, index, torch.where(known, reward, -torch.inf), "amax")
    return (high > low)[index]


def group_advantage(
    reward: Float[Tensor, "row"],
    group: Int[Tensor, "row"],
    *,
    baseline: Baseline = "group",
    scale: Scale = "group",
    epsilon: float = 1e-4,
) -> Float[Tensor, "row"]:
    """A_i = (r_i - b_i) / (s_i + epsilon), from rows that answer one prompt.

    | baseline        | b_i                                | gradient in expectation                          |
    |-----------------|------------------------------------|--------------------------------------------------|
    | `group`         | mean of the group, with r_i in it  | (n - 1) / n of the right one (GRPO, Dr. GRPO)    |
    | `leave_one_out` | mean of the others of the group    | right (RLOO)                                     |
    | `none`          | 0                                  | right, and noisy                                 |

    s is the standard deviation of the group (GRPO), of the step (over all processes), both with n - 1; `none` leaves
    the division out (Dr. GRPO, RLOO): a group's weight then does not depend on how hard its prompt is.

    Returns:
        0 where the reward is nan (it enters no mean either), where no other row of the group has one, and, with a
        baseline, exactly 0 where the group's rewards are all equal.

    Source: arXiv 2402.03300 (GRPO), 2402.14740 (RLOO), 2503.20783 (Dr. GRPO).
    """
    known = ~reward.isnan()
    r = torch.where(known, reward, 0.0).double()
    _, index = torch.unique(group, return_inverse=True)

    def total(values: Tensor) -> Tensor:
        sums = torch.zeros(int(index.max()) + 1, dtype=torch.float64, device=values.device)
        return sums.index_add_(0, index, torch.where(known, values, 0.0).double())[index]

    count, mean = total(torch.ones_like(r)), total(r) / total(torch.ones_like(r)).clamp(min=1)
    others = count - 1
    if baseline == "none":
        keep, advantage = known, r
    else:
        keep = known & informative(reward, group)
        advantage = r - mean
        if baseline == "leave_one_out":  # r - (total - r) / (n - 1)
            advantage = advantage * count / others.clamp(min=1)
    if scale == "group":
        advantage = advantage / ((total((r - mean) ** 2) / others.clamp(min=1)).sqrt() + epsilon)
    elif scale == "batch":
        _, variance = moments(r, known)
        advantage = advantage / (variance.sqrt() + epsilon)
    return torch.where(keep, advantage, 0.0).to(reward.dtype)


def moments(values: Tensor, mask: Bool[Tensor, "..."]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean and variance (n - 1) of what the mask has, over all processes. Every process must call it."""
    kept = values[mask].double()
    count = sum_over_ranks(torch.tensor(float(kept.numel()), dtype=torch.float64, device=values.device))
    mean = sum_over_ranks(kept.sum()) / count.clamp(min=1)
    return mean, sum_over_ranks(((kept - mean) ** 2).sum()) / (count - 1).clamp(min=1)


def whiten(
    values: Float[Tensor, "row completion"], mask: Bool[Tensor, "row completion"], *, epsilon: float = 1e-8
) -> Float[Tensor, "row completion"]:
    """(x - mean) / (standard deviation + epsilon) over the step, all processes; 0 where masked."""
    mean, variance = moments(values, mask)
    white = (values - mean.to(values.dtype)) / (variance.sqrt() + epsilon).to(values.dtype)
    return torch.where(mask, white, 0.0)


def generalised_advantage(
    reward: Float[Tensor, "row completion"],
    value: Float[Tensor, "row completion"],
    scored: Bool[Tensor, "row completion"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Float[Tensor, "row completion"]:
    """A_t = sum_k (gamma lam)^k delta_{t+k},    delta_t = r_t + gamma V_{t+1} - V_t.

    Args:
        reward: given for the token at t.
        value: of the state before the token at t; 0 after the last.
        scored: the others (padding, a tool's tokens) are passed over: the state after a token is the one before the
            next scored token.
        lam: 1 is reward to go minus value (no bias, most noise), 0 is one step of temporal difference.

    Source: Schulman et al., arXiv 1506.02438, equation 16.
    """
    advantage = torch.zeros_like(value)
    after = next_value = torch.zeros_like(value[:, 0])
    for t in reversed(range(value.shape[1])):
        here = scored[:, t]
        now = reward[:, t] + gamma * next_value - value[:, t] + gamma * lam * after
        after, next_value = torch.where(here, now, after), torch.where(here, value[:, t], next_value)
        advantage[:, t] = torch.where(here, now, 0.0)
    return advantage


def later(values: Float[Tensor, "row completion"]) -> Float[Tensor, "row completion"]:
    """Entry t is the sum of entries t + 1, t + 2, ... of its row."""
    return suffix_sum(values) - values


def divergence_cost(
    D: FDivergence,
    target_log_prob: Float[Tensor, "row completion"],
    model_log_prob: Float[Tensor, "row completion"],
    scored: Bool[Tensor, "row completion"],
    *,
    horizon: Horizon = "token",
    values: Float[Tensor, "row completion"] | None = None,
    weight: Float[Tensor, "row completion"] | float = 1.0,
) -> Float[Tensor, "row completion"]:
    """What a token costs, so that a reward of minus it descends a divergence, on samples of the model.

    With l_t = log target - log model of the written token, g the link, and D_u the divergence at prefix u:

    | horizon    | cost of token t                    | is the gradient of                                          |
    |------------|------------------------------------|-------------------------------------------------------------|
    | `token`    | g(l_t)                             | sum_t D_t at the prefixes as they are                       |
    | `sequence` | g(l_t) + sum_{u > t} D_u           | E_{y ~ model} sum_t D_t: what a token leads to counts       |
    | `whole`    | g(sum_u l_u), the same for all t   | D between the distributions of whole completions            |

    For reverse KL the last two are one objective (the chain rule), for the others they are not.

    Args:
        values: D_u, exact or any unbiased estimate; for `sequence` only.
        weight: of a token in the sum; a constant for the gradient. Not for `whole`.

    Returns:
        Nats, detached; 0 where nothing is scored.
    """
    ratio = torch.where(scored, target_log_prob - model_log_prob, 0.0).detach()
    if horizon == "whole":
        return torch.where(scored, D.link(ratio.sum(1, keepdim=True)), 0.0)
    cost = torch.where(scored, weight * D.link(ratio), 0.0)
    if horizon == "sequence":
        assert values is not None
        cost = cost + later(torch.where(scored, weight * values, 0.0))
    return torch.where(scored, cost, 0.0)


def importance(
    student_log_prob: Float[Tensor, "row completion"],
    sampler_log_prob: Float[Tensor, "row completion"],
    scored: Bool[Tensor, "row completion"],
    *,
    cap: float,
    level: Level = "token",
) -> Float[Tensor, "row completion"]:
    """min(student / sampler, cap): what a row counts that another policy, engine or temperature wrote.

    Args:
        sampler_log_prob: what the writer said when it wrote; nan counts once.
        level: the ratio of each token, or for all tokens of a row the product of its ratios (right for whole
            completions, and of a variance that grows with their length).

    Source: truncated importance sampling, Ionides, J. Comput. Graph. Stat. 17(2), 2008.
    """
    log_ratio = torch.where(scored & ~sampler_log_prob.isnan(), student_log_prob - sampler_log_prob, 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    weights = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)
    return torch.where(scored, weights, 0.0)


def sampler_gap(
    student_log_prob: Float[Tensor, "row completion"],
    sampler_log_prob: Float[Tensor, "row completion"],
    scored: Bool[Tensor, "row completion"],
) -> Float[Tensor, "row completion"]:
    """KL(sampler || student) at each written token, never negative (k3), in nats; 0 where the sampler is unknown."""
    known = scored & ~sampler_log_prob.isnan()
    gap = torch.where(known, student_log_prob - sampler_log_prob, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return gap.exp() - 1 - gap
