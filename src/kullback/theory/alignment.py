"""Best-of-N against the optimum under a KL budget, exactly and as sequences grow.

    pi_N    the law of the best of N draws from p, ties broken evenly
    phi     the optimum: argmax E_phi r subject to KL(phi || p) <= Delta; p exp(beta r) / Z

For a sequence of m independent symbols with an additive reward, N = exp(m delta) and Delta = m delta, both earn the
same reward per symbol and their KL per symbol vanishes as m grows; in total it grows as log(m) / 2. beta multiplies
the reward: 1 / beta is the coefficient of the KL.

Source: Yang et al., arXiv 2404.01730; the law of best-of-N and its bound as in arXiv 2407.14622 and 2401.01879.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import divergence
from kullback.estimate import beta_for_kl, check_laws, expectation, tilt, tilted_kl

REVERSE_KL = divergence("reverse_kl")


def best_of_n(
    log_p: Float[Tensor, "*batch outcome"], reward: Float[Tensor, "*batch outcome"], n: float
) -> Float[Tensor, "*batch outcome"]:
    """log pi_N, exactly: the law of the best of n independent draws, ties broken evenly.

        pi_N(y) = p(y) (F^n - F_^n) / (F - F_),    F = P(r <= r(y)),  F_ = P(r < r(y))

    Depends on the order of the rewards alone. In log space, from whichever tail is the smaller, so n = exp(100) is as
    good as n = 2.

    Args:
        n: at least 1 and finite; it need not be whole, the law is meaningful for any.

    Raises:
        ValueError: n < 1 or not finite; a reward is not finite; p does not sum to 1.

    >>> coin = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    >>> [round(p, 12) for p in best_of_n(coin, torch.tensor([0.0, 1.0]), 2).exp().tolist()]
    [0.25, 0.75]
    """
    if not 1 <= n < math.inf:
        raise ValueError(f"n={n:g}: the best of n draws needs n >= 1 and finite")
    log_p, reward = check_laws(log_p.double(), reward.double())
    order = reward.argsort(-1)
    levels, p = reward.gather(-1, order), log_p.gather(-1, order).contiguous()
    first = torch.searchsorted(levels, levels)
    last = torch.searchsorted(levels, levels, right=True) - 1
    nothing = torch.full_like(p[..., :1], -torch.inf)
    up_to = torch.cat([nothing, torch.logcumsumexp(p, -1)], -1)  # [i] = log P(one of the i lowest)
    from_on = torch.cat([torch.logcumsumexp(p.flip(-1), -1).flip(-1), nothing], -1)  # [i] = log P(none of them)

    below = _log_up_to(up_to, from_on, first)  # log F_
    at_most = _log_up_to(up_to, from_on, last + 1)  # log F
    level = _sum_within(p, first)  # log (F - F_)
    share = (level - at_most).clamp(max=0)
    to_below = torch.where(share < -0.7, _log1m(share), below - at_most).clamp(max=0)  # log (F_ / F)
    won = n * at_most + _log1m(n * to_below)
    out = torch.where(p == -torch.inf, -torch.inf, p - level + won)
    return torch.empty_like(out).scatter(-1, order, out).log_softmax(-1)


def best_of_n_bound(n: float) -> float:
    """log n - (n - 1) / n >= KL(pi_N || p) in nats, with equality where the reward has no ties."""
    if not n >= 1:
        raise ValueError(f"n={n:g}: the best of n draws needs n >= 1")
    return math.log(n) - (n - 1) / n


def renyi_cross_entropy(
    log_p: Float[Tensor, "*batch outcome"], log_q: Float[Tensor, "*batch outcome"], order: float
) -> Float[Tensor, "*batch"]:
    """H_a(p || q) = log( sum_y p(y) q(y)^(a - 1) ) / (1 - a); the cross entropy -sum p log q at a = 1.

    With q = exp(r) / sum exp(r), the scaled cumulant function of the reward under p is
    log E_p exp(t r) = -t H_{1 + t}(p || q) + t log sum exp(r).
    """
    log_q = torch.where(log_p == -torch.inf, torch.zeros_like(log_q), log_q)
    if order == 1:
        return -expectation(log_p, log_q)
    return torch.logsumexp(log_p + (order - 1) * log_q, -1) / (1 - order)


def sum_law(
    log_p: Float[Tensor, "outcome"], reward: Float[Tensor, "outcome"], length: int, *, step: float = 1.0
) -> tuple[Float[Tensor, "total"], Float[Tensor, "total"]]:
    """The law of the total reward of `length` independent symbols: (log-probabilities, totals), ascending.

    Best-of-N and every tilt of the sequences change p by a function of the total alone, so their rewards and KLs are
    those of this law: the 4^400 sequences of four letters become 1201 totals.

    Args:
        step: the rewards are whole multiples of it, up to a common constant.

    Raises:
        ValueError: they are not; length < 1.
    """
    if length < 1:
        raise ValueError(f"length={length}: at least one symbol")
    log_p, reward = check_laws(log_p.double(), reward.double())
    least = reward.min()
    places = ((reward - least) / step).round()
    if not bool(((reward - least - places * step).abs() <= 1e-9 * step).all()):
        raise ValueError(f"step={step:g}: the rewards do not lie on a lattice of this step; choose another")
    one = torch.stack(
        [
            torch.logsumexp(log_p[places == place], -1)
            if bool((places == place).any())
            else log_p.new_tensor(-torch.inf)
            for place in range(int(places.max()) + 1)
        ]
    )
    law, power, left = torch.zeros(1, dtype=torch.float64), one, length
    while left:  # repeated squaring, in log space: 0.3 ** 1000 is no float
        if left % 2:
            law = _convolve(law, power)
        left //= 2
        power = _convolve(power, power) if left else power
    return law, length * least + step * torch.arange(len(law), dtype=torch.float64)


@dataclass(frozen=True)
class Agreement:
    """Best of exp(m delta) beside the optimum with budget m delta, for m independent symbols; all per symbol, nats.

    Args:
        length, budget: m and delta.
        beta: of the optimum, the same for all m.
        optimum_reward, best_of_n_reward: expected.
        best_of_n_kl, bound: KL(pi_N || p), and the bound on it; both at most delta.
        distance: KL(pi_N || optimum).
    """

    length: int
    budget: float
    beta: float
    optimum_reward: float
    best_of_n_reward: float
    best_of_n_kl: float
    bound: float
    distance: float

    @property
    def gap(self) -> float:
        """The reward that best-of-N lacks."""
        return self.optimum_reward - self.best_of_n_reward

    @property
    def predicted_gap(self) -> float:
        """log m / (2 beta m), to which the gap tends."""
        return math.log(self.length) / (2 * self.beta * self.length)

    @property
    def identity(self) -> float:
        """What identity 2 says of the distance, from rewards and KLs alone."""
        return self.best_of_n_kl - self.budget + self.beta * self.gap

    @property
    def total_distance(self) -> float:
        """KL(pi_N || optimum) of whole sequences: grows as log(m) / 2."""
        return self.length * self.distance


def agreement(
    log_p: Float[Tensor, "outcome"], reward: Float[Tensor, "outcome"], length: int, budget: float, *, step: float = 1.0
) -> Agreement:
    """Compare best-of-N with the optimum at N = exp(length * budget), not rounded, without drawing anything.

    Args:
        log_p, reward: of one symbol.
        budget: delta, nats per symbol; below -log p(best symbol).

    Raises:
        ValueError: the budget is not between 0 and that, or N overflows.
    """
    beta = float(beta_for_kl(log_p.double(), reward.double(), budget))
    if not 0 < beta < math.inf:
        raise ValueError(
            f"budget={budget:g}: choose one above 0 and below -log p(best symbol) = "
            f"{float(tilted_kl(log_p.double(), reward.double(), math.inf)):g} nats per symbol"
        )
    if length * budget > 700:
        raise ValueError(f"length={length}: N = exp({length * budget:g}) is too large a number; at most exp(700)")
    n = math.exp(length * budget)
    law, totals = sum_law(log_p, reward, length, step=step)
    best, phi = best_of_n(law, totals, n), tilt(law, totals, beta)

    def each(total: Tensor) -> float:
        return float(total) / length

    return Agreement(
        length,
        budget,
        beta,
        optimum_reward=each(expectation(phi, totals)),
        best_of_n_reward=each(expectation(best, totals)),
        best_of_n_kl=each(REVERSE_KL.from_log_probs(law, best)),
        bound=best_of_n_bound(n) / length,
        distance=each(REVERSE_KL.from_log_probs(phi, best)),
    )


def _log1m(log_x: Tensor) -> Tensor:
    """log(1 - exp(log_x)) for log_x <= 0."""
    near = log_x > -0.7
    return torch.where(near, torch.log(-torch.expm1(log_x)), torch.log1p(-torch.exp(log_x)))


def _log_up_to(up_to: Tensor, from_on: Tensor, i: Tensor) -> Tensor:
    """log P(one of the i lowest), from the smaller of the two tails."""
    lower, upper = up_to.gather(-1, i), from_on.gather(-1, i)
    return torch.where(lower < upper, lower.clamp(max=0), _log1m(upper.clamp(max=0)))


def _sum_within(p: Tensor, first: Tensor) -> Tensor:
    """For each outcome, the log of the sum over those that share its `first`."""
    top = torch.full_like(p, -torch.inf).scatter_reduce(-1, first, p, "amax").gather(-1, first)
    part = torch.where(p == -torch.inf, torch.zeros_like(p), (p - top).exp())
    return top + torch.zeros_like(p).scatter_add(-1, first, part).gather(-1, first).log()


def _convolve(a: Tensor, b: Tensor) -> Tensor:
    """log sum_i exp(a[i] + b[k - i]) for every k."""
    a, b = (a, b) if len(a) <= len(b) else (b, a)
    padding = torch.full((len(a) - 1,), -torch.inf, dtype=a.dtype)
    windows = torch.cat([padding, b, padding]).unfold(0, len(a), 1)  # [k, j] = b[k - len(a) + 1 + j]
    return torch.logsumexp(windows + a.flip(0), -1)
