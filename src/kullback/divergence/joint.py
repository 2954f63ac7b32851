"""Value and link of a divergence together, in few transcendentals and without a branch on data.

The members' own curves keep every digit of every token; these keep every digit of the link and, in a sum over tokens,
of the value. They are what `kernels` compiles, and are tested against the members' curves on the whole table.
"""

from __future__ import annotations

import math
from functools import singledispatch

import torch
from torch import Tensor

from kullback.divergence.algebra import Combination, Named, Reversed, Skewed, Unit
from kullback.divergence.curves import FDivergence
from kullback.divergence.generator import Generator, _continue, _near
from kullback.divergence.members import JSD, Alpha, LeCam
from kullback.divergence.pair import INF, Pair


@singledispatch
def curves(divergence: FDivergence, pair: Pair) -> tuple[Tensor, Tensor]:
    """m f(t / m) and m g(t / m) of finite log-weights."""
    return divergence._value(pair), divergence._link(pair)


@curves.register
def _(divergence: Combination, pair: Pair) -> tuple[Tensor, Tensor]:
    parts = [(c, *curves(inner, pair)) for c, inner in divergence.terms]
    value, link = parts[0][0] * parts[0][1], parts[0][0] * parts[0][2]
    for c, v, g in parts[1:]:
        value, link = value + c * v, link + c * g
    return value, link


@curves.register(Unit)
@curves.register(Named)
def _(divergence: Unit | Named, pair: Pair) -> tuple[Tensor, Tensor]:
    value, link = curves(divergence.inner, pair)
    return divergence._scale(value), divergence._scale(link)


@curves.register
def _(divergence: Reversed, pair: Pair) -> tuple[Tensor, Tensor]:
    if divergence.inner.bounds[1] == INF:
        return divergence._value(pair), divergence._link(pair)
    value, other = curves(divergence.inner, pair.swap())
    return value, value - other  # Euler: m f = m g + t f'. Near ratio 0 value is of second order, so no digit is lost


@curves.register
def _(divergence: Skewed, pair: Pair) -> tuple[Tensor, Tensor]:
    mixed, to_model = _skewed(divergence, pair)
    value, link = curves(divergence.inner, mixed)
    return value, link * torch.exp(math.log1p(-divergence.share) - to_model)


def _skewed(divergence: Skewed, pair: Pair) -> tuple[Pair, Tensor]:
    """`Pair.mix`, without a branch on data."""
    to_mix, to_model = mix(pair.ratio, divergence.share)
    x = torch.where(pair.ratio > 0, pair.target - to_mix, pair.model + to_model)  # add to the nearer of the two
    return Pair(pair.target, x, to_mix), to_model


@curves.register
def _(divergence: Alpha, pair: Pair) -> tuple[Tensor, Tensor]:
    """Near ratio 0 the power series, elsewhere the definition."""
    a, r = divergence.a, pair.ratio
    t, m, power = _powers(a, pair)
    value = _alpha_value(a, r, t, m, power)
    if a == 0:
        return divergence.scale * value, divergence.scale * (-m * r)
    edge, terms = _series(a, r)
    near, x = r.abs() <= edge, r.clamp(-edge, edge)
    g = torch.full_like(x, -(a ** (terms - 1)) / math.factorial(terms))
    for k in range(terms - 1, 0, -1):
        g = g * x - a ** (k - 1) / math.factorial(k)
    link = torch.where(near, m * g * x, (m - power) / a)
    return divergence.scale * value, divergence.scale * link


def _powers(a: float, pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """t, m and t^a m^(1 - a)."""
    t, m = torch.exp(pair.target), torch.exp(pair.model)
    return t, m, m if a == 0 else t if a == 1 else torch.exp(pair.model + a * pair.ratio)


def _alpha_value(a: float, r: Tensor, t: Tensor, m: Tensor, power: Tensor) -> Tensor:
    if a == 0:
        value = t - m - m * r
    elif a == 1:
        value = t * r + m - t
    else:
        value = (power - (1 - a) * m - a * t) / (a * (a - 1))
    edge, terms = _series(a, r)
    near, x = r.abs() <= edge, r.clamp(-edge, edge)
    v = torch.full_like(x, _coefficient(a, terms))
    for k in range(terms - 1, 1, -1):
        v = v * x + _coefficient(a, k)
    return torch.where(near, m * v * x * x, value)


def _series(a: float, r: Tensor) -> tuple[float, int]:
    """Up to which |ratio| the power series is taken, and to which power."""
    return 0.5 / max(1.0, abs(a)), 18 if r.dtype == torch.float64 else 9


@curves.register
def _(divergence: JSD, pair: Pair) -> tuple[Tensor, Tensor]:
    b = divergence.beta
    to_mix, to_model = mix(pair.ratio, b)
    link = (b - 1) * torch.exp(pair.model) * to_model
    return b * torch.exp(pair.target) * to_mix + link, link


@curves.register
def _(divergence: LeCam, pair: Pair) -> tuple[Tensor, Tensor]:
    t, m, tanh = torch.exp(pair.target), torch.exp(pair.model), torch.tanh(pair.ratio / 2)
    return 0.5 * (t + m) * tanh * tanh, -m * (1 + tanh / 2) * tanh


@curves.register
def _(divergence: Generator, pair: Pair) -> tuple[Tensor, Tensor]:
    ratio = pair.ratio
    inner = ratio.clamp(-divergence.left.reach, divergence.right.reach)
    near = _near(divergence.f, divergence.gauge, inner.double())  # float64: f - u f' cancels
    weight = torch.exp(torch.where(ratio > 0, pair.target - inner, pair.model))
    both = []
    for curve in ("value", "link"):
        out = weight * near[curve].to(ratio.dtype)
        for tail, side in ((divergence.left, -1.0), (divergence.right, 1.0)):
            beyond = ratio * side > tail.reach
            x = torch.where(beyond, ratio * side - tail.reach, 0.0)
            heavier = pair.target if side > 0 else pair.model
            out = torch.where(beyond, _continue(tail, x, heavier, curve, side > 0), out)
        both.append(out)
    return both[0], both[1]


@singledispatch
def value(divergence: FDivergence, pair: Pair) -> Tensor:
    """m f(t / m) alone, where nobody asks for the link."""
    return curves(divergence, pair)[0]


@value.register
def _(divergence: Combination, pair: Pair) -> Tensor:
    parts = [c * value(inner, pair) for c, inner in divergence.terms]
    return sum(parts[1:], parts[0])


@value.register(Unit)
@value.register(Named)
def _(divergence: Unit | Named, pair: Pair) -> Tensor:
    return divergence._scale(value(divergence.inner, pair))


@value.register
def _(divergence: Reversed, pair: Pair) -> Tensor:
    return value(divergence.inner, pair.swap())


@value.register
def _(divergence: Skewed, pair: Pair) -> Tensor:
    return value(divergence.inner, _skewed(divergence, pair)[0])


@value.register
def _(divergence: Alpha, pair: Pair) -> Tensor:
    return divergence.scale * _alpha_value(divergence.a, pair.ratio, *_powers(divergence.a, pair))


def mix(ratio: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """log(target / x) and log(x / model) with x = share * target + (1 - share) * model, without cancellation."""
    right, near = ratio > 1, ratio.abs() <= 1
    rise = torch.expm1(torch.where(right, -ratio, ratio))
    part = torch.where(right, (1 - share) * rise, share * rise)
    first = _log1p(part)
    second = _log1p(torch.where(near, (1 - share) * rise / (1 + part), 0.0))
    to_mix = torch.where(right, -first, torch.where(near, second, ratio - first))
    return to_mix, torch.where(right, ratio + first, first)


def _log1p(x: Tensor) -> Tensor:
    """log(1 + x) to a few roundings, at half the price of `torch.log1p` in a compiled kernel.

    1 + x = u is rounded; log(u) / (u - 1) hardly changes over that rounding, so times x it is right (Kahan).
    """
    u = 1 + x
    return torch.where(u == 1, x, torch.log(u) * (x / (u - 1)))


def _coefficient(a: float, k: int) -> float:
    """Of ratio^k in (u^a - (1 - a) - a u) / (a (a - 1))."""
    return math.fsum(a**i for i in range(k - 1)) / math.factorial(k)
