"""Two log-weights with their exact difference, and the limits that say what happens where one of them is zero.

A curve is never evaluated from the ratio alone when it is to be multiplied by a probability: `Pair` carries
log target, log model and log_ratio side by side, so that products stay in log space and a small log_ratio keeps all
its digits.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

INF = math.inf


class Pair(NamedTuple):
    """log target, log model and their difference, kept apart because subtracting again would lose digits."""

    target: Tensor
    model: Tensor
    ratio: Tensor

    def swap(self) -> "Pair":
        """The same pair with the roles exchanged."""
        return Pair(self.model, self.target, -self.ratio)

    def shift(self, by: Tensor) -> "Pair":
        """Both weights times exp(by): every perspective m f(t / m) is multiplied by exp(by) too."""
        return Pair(self.target + by, self.model + by, self.ratio)

    def mix(self, share: float) -> tuple["Pair", Tensor]:
        """(target, x) with x = share * target + (1 - share) * model, and log x - log model."""
        log_share, log_rest = _log(share), _log1m(share)
        ratio = self.ratio
        near = ratio.abs() <= 1
        small = torch.where(near, ratio, torch.zeros_like(ratio))  # the branch that is not taken must stay finite too
        far = torch.where(near, torch.full_like(ratio, 2.0), ratio)
        to_model = torch.where(near, torch.log1p(share * torch.expm1(small)), _logaddexp(far + log_share, log_rest))
        to_mix = torch.where(
            near, -torch.log1p((1 - share) * torch.expm1(-small)), -_logaddexp(-far + log_rest, log_share)
        )
        mixed = torch.where(ratio > 0, self.target - to_mix, self.model + to_model)  # add to the nearer of the two
        return Pair(self.target, mixed, to_mix), to_model

    @property
    def top(self) -> Tensor:
        """log of the larger of the two."""
        return torch.maximum(self.target, self.model)

    @property
    def gap(self) -> Tensor:
        """-|log_ratio|."""
        return -self.ratio.abs()


class Limits(NamedTuple):
    """What f, its slope and its link tend to at both ends; zero weights are replaced by these."""

    value_zero: float  # f(0), which is also link(0)
    slope_infinity: float  # f'(inf) = lim f(u) / u: the value of a token that the model cannot produce, per target mass
    link_infinity: float  # link(inf)
    slope_zero: float  # f'(0)
    link_per_ratio: float  # lim link(u) / u, u -> inf
    ratio_slope: float  # lim u f'(u), u -> 0

    def reversed(self) -> "Limits":
        a, b, c, d, e, f = self
        return Limits(b, a, d, c, f, e)

    def scaled(self, by: float) -> "Limits":
        return Limits(*(by * x for x in self))

    def plus(self, other: "Limits") -> "Limits":
        return Limits(*(x + y for x, y in zip(self, other, strict=True)))


def promote(x: Tensor | float) -> Tensor:
    """Half precision and integers become float32; float32 and float64 stay."""
    x = torch.as_tensor(x)
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def together(a: Tensor | float, b: Tensor | float) -> tuple[Tensor, Tensor]:
    """Both in one dtype of at least float32, broadcast to one shape."""
    x, y = promote(a), promote(b)
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = torch.broadcast_tensors(x.to(dtype), y.to(dtype))
    return x, y


def times(factor: float, log_weight: Tensor) -> Tensor:
    """factor * exp(log_weight); an infinite factor wins against a weight that has underflowed."""
    if math.isinf(factor) or factor == 0:
        return torch.full_like(log_weight, factor)
    return factor * torch.exp(log_weight)


def minus_log_series(gap: Tensor) -> Tensor:
    """exp(n) - 1 - n for n <= 0, to full relative precision (about n^2 / 2 near 0, -n far away)."""
    terms, edge = (14, 0.4) if gap.dtype == torch.float64 else (7, 0.25)
    near = gap > -edge
    small = torch.where(near, gap, torch.zeros_like(gap))
    series = torch.full_like(gap, 1 / math.factorial(terms))
    for k in range(terms - 1, 1, -1):
        series = torch.addcmul(torch.full_like(gap, 1 / math.factorial(k)), series, small)
    return torch.where(near, series * small * small, torch.expm1(gap) - gap)


def minus_log_mirror(gap: Tensor) -> Tensor:
    """1 - exp(n) + n exp(n) for n <= 0, to full relative precision (about n^2 / 2 near 0, 1 far away)."""
    edge = 0.4 if gap.dtype == torch.float64 else 0.25
    near = gap > -edge
    small = torch.where(near, gap, torch.zeros_like(gap))
    far = gap.clamp(min=-2000.0)  # exp is 0 long before; -inf * 0 would be NaN
    rise = torch.expm1(far)
    return torch.where(near, small * torch.expm1(small) - minus_log_series(small), far * torch.exp(far) - rise)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -INF


def _log1m(x: float) -> float:
    return math.log1p(-x) if x < 1 else -INF


def _logaddexp(a: Tensor, b: float) -> Tensor:
    return torch.logaddexp(a, torch.full_like(a, b))
