"""Divergences made of divergences: weighted sums, other scales and names, exchanged roles, mixed models.

Write them with + and *, `D.unit`, `D.reversed` and `D.skew(share)`; the classes here say what these do to the curves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from kullback.divergence.curves import FDivergence
from kullback.divergence.inverse import solve_link
from kullback.divergence.pair import INF, Limits, Pair


@final
@dataclass(frozen=True, repr=False)
class Combination(FDivergence):
    """sum_i c_i D_i with c_i > 0. Built by + and *, which merge equal terms."""

    terms: tuple[tuple[float, FDivergence], ...]

    @property
    def name(self) -> str:
        return " + ".join(d.name if c == 1 else f"{number(c)}*{d.name}" for c, d in self.terms)

    @property
    def equation(self) -> str:
        return " + ".join(d.equation if c == 1 else f"{c:.6g} * [{d.equation}]" for c, d in self.terms)

    @property
    def smooth(self) -> bool:
        return all(d.smooth for _, d in self.terms)

    @cached_property
    def limits(self) -> Limits:
        total = Limits(0, 0, 0, 0, 0, 0)
        for c, d in self.terms:
            total = total.plus(d.limits.scaled(c))
        return total

    @property
    def second_derivative_at_one(self) -> float:
        return sum(c * d.second_derivative_at_one for c, d in self.terms)

    @property
    def plain_slope(self) -> float:
        return sum(c * d.plain_slope for c, d in self.terms)

    def _value(self, pair: Pair) -> Tensor:
        return _sum([c * d._value(pair) for c, d in self.terms])

    def _link(self, pair: Pair) -> Tensor:
        return _sum([c * d._link(pair) for c, d in self.terms])

    def _slope(self, pair: Pair) -> Tensor:
        return _sum([c * d._slope(pair) for c, d in self.terms])

    def _curvature(self, pair: Pair) -> Tensor:
        return _sum([c * d._curvature(pair) for c, d in self.terms])

    def _plain(self, pair: Pair) -> Tensor:
        return _sum([c * d._plain(pair) for c, d in self.terms])

    def _inverse_link(self, g: Tensor) -> Tensor:
        if len(self.terms) == 1:
            ((factor, only),) = self.terms
            return only._inverse_link(g / factor)
        return solve_link(self, g)

    def _potential(self, log_ratio: Tensor) -> Tensor:
        return _sum([c * d._potential(log_ratio) for c, d in self.terms])

    def _reversed(self) -> FDivergence:
        return combine([(c, d.reversed) for c, d in self.terms])

    @property
    def unit(self) -> FDivergence:
        return self.terms[0][1].unit if len(self.terms) == 1 else super().unit


class _Wrapper(FDivergence):
    """Another divergence, changed by a factor or a name only."""

    inner: FDivergence

    @property
    def factor(self) -> float:
        return 1.0

    @property
    def equation(self) -> str:
        return f"{self.factor:.6g} * [{self.inner.equation}]"

    @property
    def smooth(self) -> bool:
        return self.inner.smooth

    @cached_property
    def limits(self) -> Limits:
        return self.inner.limits.scaled(self.factor)

    @property
    def second_derivative_at_one(self) -> float:
        return self.factor * self.inner.second_derivative_at_one

    @property
    def plain_slope(self) -> float:
        return self.factor * self.inner.plain_slope

    def _scale(self, x: Tensor) -> Tensor:
        return x if self.factor == 1 else self.factor * x

    def _value(self, pair: Pair) -> Tensor:
        return self._scale(self.inner._value(pair))

    def _link(self, pair: Pair) -> Tensor:
        return self._scale(self.inner._link(pair))

    def _slope(self, pair: Pair) -> Tensor:
        return self._scale(self.inner._slope(pair))

    def _curvature(self, pair: Pair) -> Tensor:
        return self._scale(self.inner._curvature(pair))

    def _plain(self, pair: Pair) -> Tensor:
        return self._scale(self.inner._plain(pair))

    def _inverse_link(self, g: Tensor) -> Tensor:
        return self.inner._inverse_link(g / self.factor)

    def _potential(self, log_ratio: Tensor) -> Tensor:
        return self._scale(self.inner._potential(log_ratio))


@final
@dataclass(frozen=True, repr=False)
class Unit(_Wrapper):
    """D / f''(1)."""

    inner: FDivergence

    @property
    def name(self) -> str:
        return f"unit({self.inner.name})"

    @property
    def factor(self) -> float:
        return 1 / self.inner.second_derivative_at_one

    @property
    def second_derivative_at_one(self) -> float:
        return 1.0

    @property
    def unit(self) -> FDivergence:
        return self

    def _reversed(self) -> FDivergence:
        return self.inner.reversed.unit


@final
@dataclass(frozen=True, repr=False)
class Named(_Wrapper):
    """A divergence built from others and known by a name of its own."""

    title: str
    inner: FDivergence
    text: str
    mirror: str = ""  # the name of its reversal, where that has one; its own name if it is symmetric

    @property
    def name(self) -> str:
        return self.title

    @property
    def equation(self) -> str:
        return self.text

    def _reversed(self) -> FDivergence:
        if self.mirror == self.title:
            return self
        if self.mirror:
            from kullback.divergence.parse import divergence

            return divergence(self.mirror)
        return Reversed(self)


@final
@dataclass(frozen=True, repr=False)
class Reversed(FDivergence):
    """D(model, target): f*(u) = u f(1 / u). Link and slope change places."""

    inner: FDivergence

    @property
    def name(self) -> str:
        return f"reversed({self.inner.name})"

    @property
    def equation(self) -> str:
        return f"[{self.inner.equation}] with target and model exchanged"

    @property
    def smooth(self) -> bool:
        return self.inner.smooth

    @cached_property
    def limits(self) -> Limits:
        return self.inner.limits.reversed()

    @property
    def second_derivative_at_one(self) -> float:
        return self.inner.second_derivative_at_one

    @property
    def plain_slope(self) -> float:
        return -self.inner.plain_slope

    def _value(self, pair: Pair) -> Tensor:
        return self.inner._value(pair.swap())

    def _link(self, pair: Pair) -> Tensor:
        return self.inner._slope(pair.swap())

    def _slope(self, pair: Pair) -> Tensor:
        return self.inner._link(pair.swap())

    def _curvature(self, pair: Pair) -> Tensor:
        return self.inner._curvature(pair.swap())

    def _plain(self, pair: Pair) -> Tensor:
        return self.inner._plain(pair.swap())

    def _reversed(self) -> FDivergence:
        return self.inner


@final
@dataclass(frozen=True, repr=False)
class Skewed(FDivergence):
    """D(target, x) with x = share * target + (1 - share) * model.

    With s = (1 - share) m / x:  m g = x s g_D,  m h = x s^2 h_D,  g_D and h_D taken at target / x.
    """

    inner: FDivergence
    share: float

    @property
    def name(self) -> str:
        return f"skew({self.inner.name}, {number(self.share)})"

    @property
    def equation(self) -> str:
        a = number(self.share)
        return f"[{self.inner.equation}] with model replaced by {a} target + (1 - {a}) model"

    @property
    def smooth(self) -> bool:
        return self.inner.smooth

    @cached_property
    def limits(self) -> Limits:
        a, inner = self.share, self.inner.limits
        far = torch.tensor(-math.log(a), dtype=torch.float64)  # log(target / x) where the model is zero
        return Limits(
            value_zero=(1 - a) * inner.value_zero,
            slope_infinity=a * self.inner.value(far).item(),
            link_infinity=(1 - a) * self.inner.link(far).item(),
            slope_zero=-INF if inner.slope_zero == -INF else inner.slope_zero + a * inner.value_zero,
            link_per_ratio=0.0,
            ratio_slope=(1 - a) * inner.ratio_slope,
        )

    @property
    def second_derivative_at_one(self) -> float:
        return (1 - self.share) ** 2 * self.inner.second_derivative_at_one

    @property
    def plain_slope(self) -> float:
        return (1 - self.share) * self.inner.plain_slope

    def _value(self, pair: Pair) -> Tensor:
        return self.inner._value(pair.mix(self.share)[0])

    def _link(self, pair: Pair) -> Tensor:
        mixed, to_model = pair.mix(self.share)
        return self.inner._link(mixed.shift(math.log1p(-self.share) - to_model))

    def _slope(self, pair: Pair) -> Tensor:
        mixed, _ = pair.mix(self.share)
        slope = self.inner._slope(mixed)
        link = self.inner._link(mixed.shift(math.log(self.share) + mixed.ratio))
        return torch.where(torch.isinf(slope), slope, slope + link)  # the slope decides where both overflow

    def _curvature(self, pair: Pair) -> Tensor:
        mixed, to_model = pair.mix(self.share)
        return self.inner._curvature(mixed.shift(2 * (math.log1p(-self.share) - to_model)))

    def _plain(self, pair: Pair) -> Tensor:
        return self.inner._plain(pair.mix(self.share)[0])


def combine(terms: list[tuple[float, FDivergence]]) -> FDivergence:
    """sum_i c_i D_i, flattened, equal terms merged; a single term with coefficient 1 is that term."""
    merged: dict[FDivergence, float] = {}
    for coefficient, d in terms:
        if not 0 < coefficient < INF:
            raise ValueError(
                f'divergence="{number(coefficient)}*{d}": a coefficient must be positive and finite; '
                "a negative one would move the model away from the target"
            )
        for inner, part in ((p, q) for q, p in d.terms) if isinstance(d, Combination) else ((d, 1.0),):
            merged[inner] = merged.get(inner, 0.0) + coefficient * part
    if len(merged) == 1 and next(iter(merged.values())) == 1:
        return next(iter(merged))
    return Combination(tuple((c, d) for d, c in merged.items()))


def number(x: float) -> str:
    """The shortest text that reads back as x."""
    return repr(int(x)) if x == int(x) and abs(x) < 1e15 else repr(x)


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
