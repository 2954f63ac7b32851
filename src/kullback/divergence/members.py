"""The members that have formulas of their own; every other named divergence is built from these by the algebra."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from kullback.divergence.algebra import number
from kullback.divergence.curves import FDivergence
from kullback.divergence.pair import INF, Limits, Pair, minus_log_mirror, minus_log_series


@final
@dataclass(frozen=True, repr=False)
class Alpha(FDivergence):
    """scale * f,  f(u) = (u^a - (1 - a) - a u) / (a (a - 1)),  g = (1 - u^a) / a,  h = u^a.

    The limits a -> 1 and a -> 0 are forward and reverse KL; every formula below reaches them without cancellation.
    """

    a: float
    scale: float = 1.0
    title: str = ""
    text: str = ""
    textbook_slope: float = 0.0
    mirror: tuple[str, str, float] | None = None  # title, text and textbook slope of the reversal

    @property
    def name(self) -> str:
        return self.title or f"alpha({number(self.a)})"

    @property
    def equation(self) -> str:
        a = number(self.a)
        return self.text or f"sum (target^{a} model^(1-{a}) - model) / ({a} ({a} - 1))"

    @property
    def plain_slope(self) -> float:
        return self.textbook_slope

    @property
    def second_derivative_at_one(self) -> float:
        return self.scale

    @cached_property
    def limits(self) -> Limits:
        a = self.a
        return Limits(
            value_zero=1 / a if a > 0 else INF,
            slope_infinity=1 / (1 - a) if a < 1 else INF,
            link_infinity=-INF if a >= 0 else 1 / a,
            slope_zero=-INF if a <= 1 else -1 / (a - 1),
            link_per_ratio=0.0 if a < 1 else (-1.0 if a == 1 else -INF),
            ratio_slope=0.0 if a > 0 else (-1.0 if a == 0 else -INF),
        ).scaled(self.scale)

    def _value(self, pair: Pair) -> Tensor:
        a, top, gap = self.a, pair.top, pair.gap
        if a == 0.5:
            return 2 * self.scale * torch.exp(top) * torch.expm1(gap / 2) ** 2
        below, above = _half(a, top, gap), _half(1 - a, top, gap)
        return self.scale * torch.where(pair.ratio > 0, above, below)

    def _link(self, pair: Pair) -> Tensor:
        if self.a == 0:
            return -self.scale * torch.exp(pair.model) * pair.ratio
        return (-self.scale / self.a) * _power_minus_one(self.a, pair)

    def _slope(self, pair: Pair) -> Tensor:
        b = 1 - self.a
        if b == 0:
            return self.scale * torch.exp(pair.target) * pair.ratio
        return (-self.scale / b) * _power_minus_one(b, pair.swap())

    def _curvature(self, pair: Pair) -> Tensor:
        return self.scale * torch.exp(_blend(self.a, pair))

    def _plain(self, pair: Pair) -> Tensor:
        if self.a == 0 and self.textbook_slope == -self.scale:
            return -self.scale * torch.exp(pair.model) * pair.ratio
        if self.a == 1 and self.textbook_slope == self.scale:
            return self.scale * torch.exp(pair.target) * pair.ratio
        if self.a == 0.5 and self.textbook_slope == -2 * self.scale:  # 1 - sqrt(u)
            return -4 * self.scale * _power_minus_one(0.5, pair)
        return super()._plain(pair)

    def _inverse_link(self, g: Tensor) -> Tensor:
        if self.a == 0:
            return -g / self.scale
        return torch.log1p((-self.a / self.scale * g).clamp(min=-1.0)) / self.a

    def _potential(self, log_ratio: Tensor) -> Tensor:
        if self.a == 0:
            return self.scale * log_ratio**2 / 2
        z = self.a * log_ratio
        gap = -z.abs()
        top = torch.exp(z.clamp(min=0))
        return (self.scale / self.a**2) * top * torch.where(z > 0, minus_log_mirror(gap), minus_log_series(gap))

    def _reversed(self) -> FDivergence:
        title, text, slope = self.mirror or ("", "", -self.textbook_slope)
        back = (self.title, self.text, self.textbook_slope) if self.title else None
        if title == self.title and title:
            return self
        return Alpha(complement(self.a), self.scale, title, text, slope, back)


def _blend(a: float, pair: Pair) -> Tensor:
    """a log t + (1 - a) log m, exact at a = 0 and 1."""
    if a == 0:
        return pair.model
    return pair.target if a == 1 else pair.model + a * pair.ratio


def _power_minus_one(a: float, pair: Pair) -> Tensor:
    """m (u^a - 1), a != 0."""
    z = a * pair.ratio
    zero = torch.zeros_like(z)
    # exp(z) - 1 = exp(max(z, 0)) * (expm1(min(z, 0)) - expm1(-max(z, 0))): no overflow before the weight is applied
    scale = torch.exp(torch.where(z > 0, _blend(a, pair), pair.model))
    return scale * (torch.expm1(torch.minimum(z, zero)) - torch.expm1(-torch.maximum(z, zero)))


def _half(a: float, top: Tensor, gap: Tensor) -> Tensor:
    """exp(top) * (exp(a n) - 1 - a (exp(n) - 1)) / (a (a - 1)) for n = gap <= 0, without cancellation at any a."""
    weight, b = torch.exp(top), 1 - a
    if a == 0:
        return weight * minus_log_series(gap)
    if a == 1:
        return weight * minus_log_mirror(gap)
    if a == 2:
        return 0.5 * weight * torch.expm1(gap) ** 2
    if a == -1:
        return 0.5 * torch.exp(top - gap) * torch.expm1(gap) ** 2
    if a < 0:
        grown = torch.exp(top + a * gap) * minus_log_mirror(-a * gap) / -a
        return (grown + weight * minus_log_series(gap)) / b
    if a <= 0.5:
        near = gap > -1
        small = torch.where(near, gap, torch.zeros_like(gap))
        close = (minus_log_series(small) - minus_log_series(a * small) / a) / b
        far = (a * torch.expm1(gap) - torch.expm1(a * gap)) / (a * b)
        return weight * torch.where(near, close, far)
    if a < 1:
        return weight * (minus_log_mirror(gap) - torch.exp(a * gap) * minus_log_mirror(b * gap) / b) / a
    return weight * (minus_log_mirror(gap) + torch.exp(gap) * minus_log_series(-b * gap) / -b) / a


def complement(x: float) -> float:
    """1 - x, rounded so that 1 - 0.9 is 0.1 and taking it twice gives x back for every short decimal."""
    return round(1 - x, 15)


FORWARD = Alpha(
    1.0,
    1.0,
    "forward_kl",
    "sum target log(target / model)",
    1.0,
    ("reverse_kl", "sum model log(model / target)", -1.0),
)
REVERSE = FORWARD.reversed


@final
@dataclass(frozen=True, repr=False)
class JSD(FDivergence):
    """beta KL(target || x) + (1 - beta) KL(model || x),  x = beta target + (1 - beta) model, for 0 < beta < 1.

    With M = beta u + 1 - beta:  f = beta u log(u / M) - (1 - beta) log M,  g = -(1 - beta) log M,
    h = beta (1 - beta) u / M.
    """

    beta: float

    @property
    def name(self) -> str:
        return f"jsd({number(self.beta)})"

    @property
    def equation(self) -> str:
        b = number(self.beta)
        return f"{b} KL(target || x) + (1 - {b}) KL(model || x), x = {b} target + (1 - {b}) model"

    @property
    def second_derivative_at_one(self) -> float:
        return self.beta * (1 - self.beta)

    @cached_property
    def limits(self) -> Limits:
        b = self.beta
        return Limits(-(1 - b) * math.log1p(-b), -b * math.log(b), -INF, -INF, 0.0, 0.0)

    def _value(self, pair: Pair) -> Tensor:
        b = self.beta
        mixed, to_model = pair.mix(b)
        other = Pair(pair.model, mixed.model, -to_model)
        return b * FORWARD._value(mixed) + (1 - b) * FORWARD._value(other)  # both terms are nonnegative, token by token

    def _link(self, pair: Pair) -> Tensor:
        return -(1 - self.beta) * torch.exp(pair.model) * pair.mix(self.beta)[1]

    def _slope(self, pair: Pair) -> Tensor:
        return self.beta * torch.exp(pair.target) * pair.mix(self.beta)[0].ratio

    def _curvature(self, pair: Pair) -> Tensor:
        return self.second_derivative_at_one * torch.exp(pair.target - pair.mix(self.beta)[1])

    def _inverse_link(self, g: Tensor) -> Tensor:
        b = self.beta
        mix = -g / (1 - b)  # log M
        zero = torch.zeros_like(mix)
        left, right = torch.minimum(mix, zero), torch.maximum(mix, zero)
        rise = torch.log1p((torch.expm1(left) / b).clamp(min=-1.0))
        return rise + right + torch.log1p((1 - b) / b * -torch.expm1(-right))

    def _reversed(self) -> FDivergence:
        return JSD(complement(self.beta))


@final
@dataclass(frozen=True, repr=False)
class TotalVariation(FDivergence):
    """1/2 sum |target - model|,  f(u) = |u - 1| / 2, with a kink at 1: slope, link and curvature there are set to 0."""

    smooth = False
    name = "tv"
    equation = "1/2 sum |target - model|"
    limits = Limits(0.5, 0.5, -0.5, -0.5, 0.0, 0.0)
    second_derivative_at_one = INF

    def _value(self, pair: Pair) -> Tensor:
        return -0.5 * torch.exp(pair.top) * torch.expm1(pair.gap)

    def _link(self, pair: Pair) -> Tensor:
        return -0.5 * torch.exp(pair.model) * torch.sign(pair.ratio)

    def _slope(self, pair: Pair) -> Tensor:
        return 0.5 * torch.exp(pair.target) * torch.sign(pair.ratio)

    def _curvature(self, pair: Pair) -> Tensor:
        return torch.zeros_like(pair.ratio)

    def _inverse_link(self, g: Tensor) -> Tensor:
        ends = torch.where(g > 0, -INF, INF).to(g)
        return torch.where(g.abs() < 0.5, torch.zeros_like(g), torch.where(g.isnan(), g, ends))

    def _reversed(self) -> FDivergence:
        return self


@final
@dataclass(frozen=True, repr=False)
class LeCam(FDivergence):
    """1/2 sum (target - model)^2 / (target + model),  f(u) = (u - 1)^2 / (2 (u + 1)).

    With s = u / (1 + u):  g = -(1 + 2 s) tanh(log_ratio / 2) / 2,  h = 4 u^2 / (1 + u)^3.
    """

    name = "le_cam"
    equation = "1/2 sum (target - model)^2 / (target + model)"
    limits = Limits(0.5, 0.5, -1.5, -1.5, 0.0, 0.0)
    second_derivative_at_one = 0.5

    def _value(self, pair: Pair) -> Tensor:
        return 0.5 * torch.exp(torch.logaddexp(pair.target, pair.model)) * torch.tanh(pair.ratio / 2) ** 2

    def _link(self, pair: Pair) -> Tensor:
        return -torch.exp(pair.model) * (0.5 + torch.sigmoid(pair.ratio)) * torch.tanh(pair.ratio / 2)

    def _slope(self, pair: Pair) -> Tensor:
        return self._link(pair.swap())

    def _curvature(self, pair: Pair) -> Tensor:
        return 4 * torch.exp(2 * (pair.target + pair.model) - 3 * torch.logaddexp(pair.target, pair.model))

    def _reversed(self) -> FDivergence:
        return self
