"""Exponential tilting of a finite law: p_t(y) = p(y) exp(t r(y)) / Z(t), and what follows from log Z.

    log Z(t) = log E_p exp(t r)     log Z'(t) = E_{p_t} r     log Z''(t) = Var_{p_t} r
    KL(p_t || p) = t E_{p_t} r - log Z(t) = rate(E_{p_t} r),     rate(a) = sup_t [t a - log Z(t)]

Here t multiplies the reward: it is the inverse of the KL coefficient of RLHF. All functions take log-probabilities
[..., outcome] (-inf for an outcome that cannot occur) and rewards of a shape that broadcasts with them, work in float64
where they are given float64, and give nats. Adding a constant to the rewards changes no tilted law.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import divergence
from kullback.estimate.roots import expand, find_root

Scalar = float | Tensor
REVERSE_KL = divergence("reverse_kl")


class Rate(NamedTuple):
    """rate(a) in nats, and the t at which the supremum is attained (infinite at the ends of the range)."""

    value: Tensor
    t: Tensor


def log_partition(
    log_p: Float[Tensor, "*batch outcome"], reward: Float[Tensor, "*batch outcome"], t: Scalar = 1.0
) -> Float[Tensor, "*batch"]:
    """log Z(t) = log sum_y p(y) exp(t r(y)). Differentiable in all three.

    >>> coin, r = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, 1.0])
    >>> round(log_partition(coin, r, 1.0).item(), 4)  # log((1 + e) / 2)
    0.6201
    """
    exponent, end = _exponent(log_p, reward, t)
    return _scalar(t) * end + torch.logsumexp(log_p + exponent, -1)


def tilt(
    log_p: Float[Tensor, "*batch outcome"], reward: Float[Tensor, "*batch outcome"], t: Scalar = 1.0
) -> Float[Tensor, "*batch outcome"]:
    """log p_t, normalised. Differentiable in all three. t = 1 / coefficient is the optimum of E r - coefficient * KL.

    t = inf is p given that the reward is as large as p allows, -inf as small; equal rewards keep the odds they have
    under p, at every t.

    >>> tilt(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, 1.0]), 0.0).exp()
    tensor([0.5000, 0.5000])
    """
    return (log_p + _exponent(log_p, reward, t)[0]).log_softmax(-1)


def expectation(
    log_p: Float[Tensor, "*batch outcome"], values: Float[Tensor, "*batch outcome"]
) -> Float[Tensor, "*batch"]:
    """E_p x = sum_y p(y) x(y), where 0 times anything, infinity too, is 0."""
    p = log_p.exp()
    values = torch.where(p == 0, torch.zeros_like(values), values)
    return (p * values).sum(-1)


def variance(
    log_p: Float[Tensor, "*batch outcome"], values: Float[Tensor, "*batch outcome"]
) -> Float[Tensor, "*batch"]:
    """E_p (x - E_p x)^2."""
    return expectation(log_p, (values - expectation(log_p, values)[..., None]) ** 2)


def cumulants(
    log_p: Float[Tensor, "*batch outcome"], reward: Float[Tensor, "*batch outcome"], t: Scalar = 0.0, *, order: int = 4
) -> Float[Tensor, "*batch order"]:
    """The first `order` derivatives of log Z at t: mean, variance, third and fourth cumulant of r under p_t.

    From central moments, so a constant added to r costs no digits but in the mean.

    Raises:
        ValueError: order is not 1, 2, 3 or 4.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order={order}: choose 1 to 4")
    tilted = tilt(log_p, reward, t)
    mean = expectation(tilted, reward)
    second, third, fourth = (expectation(tilted, (reward - mean[..., None]) ** k) for k in (2, 3, 4))
    return torch.stack([mean, second, third, fourth - 3 * second**2][:order], -1)


def tilted_kl(
    log_p: Float[Tensor, "*batch outcome"], reward: Float[Tensor, "*batch outcome"], t: Scalar
) -> Float[Tensor, "*batch"]:
    """KL(p_t || p) = t E_{p_t} r - log Z(t) in nats, with derivative t Var_{p_t} r. Differentiable in all three.

    Summed outcome by outcome in a form of which each term is nonnegative: nothing cancels at small t, and nothing is
    NaN where p_t underflows. t may be infinite.
    """
    return REVERSE_KL.from_log_probs(log_p, tilt(log_p, reward, t), target_grad=True)


def beta_for_mean(
    log_p: Float[Tensor, "*batch outcome"], reward: Float[Tensor, "*batch outcome"], mean: Scalar
) -> Float[Tensor, "*batch"]:
    """t with E_{p_t} r = mean; +-inf at the largest and smallest reward that p can give. Without gradient.

    Raises:
        ValueError: the mean lies outside the rewards that p can give.
    """
    log_p, reward = check_laws(log_p, reward)
    lowest, highest = ends(log_p, reward)
    level = torch.as_tensor(mean, dtype=log_p.dtype).expand_as(lowest)
    outside = ~((level >= lowest) & (level <= highest))
    if bool(outside.any()):
        raise ValueError(
            f"mean={_first(level, outside)}: no tilt has it; the reward runs from {lowest[outside][0]:g} to "
            f"{highest[outside][0]:g}"
        )
    away = torch.sign(level - expectation(log_p, reward))
    at_end = ((level == highest) | (level == lowest)) & (lowest < highest)
    inside = ~at_end & (away != 0)
    end = torch.where(away > 0, highest, lowest)
    gap, goal = reward - end[..., None], level - end  # differences from the end that t runs to keep their digits

    def beyond(size: Tensor) -> Tensor:
        excess = (expectation(tilt(log_p, reward, away * size), gap) - goal) * away
        return torch.where(inside, excess, torch.zeros_like(excess))

    found = away * find_root(beyond, torch.zeros_like(goal), expand(beyond, _unit(lowest, highest)))
    found = torch.where(inside, found, torch.zeros_like(found))
    return torch.where(at_end, torch.where(level == highest, torch.inf, -torch.inf), found).to(log_p.dtype)


def beta_for_kl(
    log_p: Float[Tensor, "*batch outcome"], reward: Float[Tensor, "*batch outcome"], kl: Scalar
) -> Float[Tensor, "*batch"]:
    """beta >= 0 with KL(p_beta || p) = kl, the KL budget spent in full; +inf from -log p(argmax r) on. No gradient.

    0 where p gives one reward only: then nothing can be bought.

    Raises:
        ValueError: kl < 0.
    """
    log_p, reward = check_laws(log_p, reward)
    lowest, highest = ends(log_p, reward)
    budget = torch.as_tensor(kl, dtype=log_p.dtype).expand_as(lowest)
    if not bool((budget >= 0).all()):
        raise ValueError(f"kl={_first(budget, ~(budget >= 0))}: a budget is not negative")
    least, most = (tilted_kl(log_p, reward, torch.full_like(lowest, t)) for t in (0.0, torch.inf))  # least: rounding
    flat = highest == lowest
    inside = (budget > least) & (budget < most) & ~flat

    def beyond(beta: Tensor) -> Tensor:
        excess = tilted_kl(log_p, reward, beta) - budget
        return torch.where(inside, excess, torch.zeros_like(excess))

    found = find_root(beyond, torch.zeros_like(budget), expand(beyond, _unit(lowest, highest)))
    found = torch.where(inside, found, torch.zeros_like(found))
    return torch.where((budget >= most) & ~flat, torch.inf, found).to(log_p.dtype)


def legendre(log_p: Float[Tensor, "*batch outcome"], reward: Float[Tensor, "*batch outcome"], mean: Scalar) -> Rate:
    """rate(a) = sup_t [t a - log E_p exp(t r)]: how unlikely it is, per draw, that the mean of many draws is a.

    Equal to KL(p_t || p) at the t with E_{p_t} r = a (Cramer), and computed so. 0 at a = E_p r, -log P(r = max r) at
    the largest reward, infinite beyond. Without gradient; d rate / da = t.

    >>> coin, r = torch.tensor([0.5, 0.5]).log().double(), torch.tensor([0.0, 1.0]).double()
    >>> rate = legendre(coin, r, 0.75)
    >>> round(rate.value.item(), 4), round(rate.t.item(), 4)  # log 2 - H(3/4), log 3
    (0.1308, 1.0986)
    """
    log_p, reward = check_laws(log_p, reward)
    lowest, highest = ends(log_p, reward)
    level = torch.as_tensor(mean, dtype=log_p.dtype).expand_as(lowest)
    within = level.clamp(lowest, highest)
    t = beta_for_mean(log_p, reward, within)
    value = torch.where(level == within, tilted_kl(log_p, reward, t), torch.inf)
    return Rate(value, torch.where(level > highest, torch.inf, torch.where(level < lowest, -torch.inf, t)))


def check_laws(log_p: Tensor, reward: Tensor, *, name: str = "log_p") -> tuple[Tensor, Tensor]:
    """Both broadcast to one shape, after the checks that every solver needs.

    Raises:
        ValueError: a law does not sum to 1 or is NaN, a reward is not finite, or the outcomes differ in number.
    """
    if log_p.shape[-1:] != reward.shape[-1:]:
        raise ValueError(
            f"reward has {reward.shape[-1] if reward.ndim else 'no'} outcomes, {name} {log_p.shape[-1]}: "
            "the last axis of both is the outcome"
        )
    dtype = torch.promote_types(log_p.dtype, reward.dtype)
    log_p, reward = torch.broadcast_tensors(log_p.to(dtype), reward.to(dtype))
    if not bool(reward.isfinite().all()):
        raise ValueError(
            f"reward={_first(reward, ~reward.isfinite())}: rewards must be finite; use -inf in {name} "
            "for an outcome that cannot occur"
        )
    total = torch.logsumexp(log_p.detach(), -1)
    slack = 1e-6 if dtype == torch.float64 else 1e-3
    if not bool((total.abs() < slack).all()):
        raise ValueError(
            f"{name}: its probabilities sum to {_first(total.exp(), ~(total.abs() < slack))}, not 1; "
            "give log-probabilities, for example scores.log_softmax(-1)"
        )
    return log_p, reward


def ends(
    log_p: Float[Tensor, "*batch outcome"], reward: Float[Tensor, "*batch outcome"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """The smallest and the largest reward that p can give."""
    possible = log_p > -torch.inf
    return torch.where(possible, reward, torch.inf).amin(-1), torch.where(possible, reward, -torch.inf).amax(-1)


def _exponent(log_p: Tensor, reward: Tensor, t: Scalar) -> tuple[Tensor, Tensor]:
    """t (r - end) <= 0, and end: the reward to which p_t goes as |t| grows. At infinite t, 0 there, -inf elsewhere."""
    per_law = _scalar(t)[..., None]
    lowest, highest = (end.detach()[..., None] for end in ends(log_p, reward))
    end = torch.where(per_law > 0, highest, lowest)
    gap = torch.where(log_p > -torch.inf, reward - end, torch.zeros_like(reward))
    endless = per_law.isinf()
    finite = (torch.where(endless, torch.zeros_like(per_law), per_law) * gap).to(gap.dtype)
    return torch.where(endless & (gap != 0), -torch.inf, finite), end[..., 0]


def _unit(lowest: Tensor, highest: Tensor) -> Tensor:
    """The t on the scale of the rewards."""
    return torch.where(highest > lowest, 1 / (highest - lowest), torch.ones_like(lowest)).clamp(1e-300, 1e300)


def _scalar(t: Scalar) -> Tensor:
    return t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)


def _first(values: Tensor, where: Tensor) -> str:
    return f"{values[where].flatten()[0]:g}"
