"""A user's own f: checked, centred, differentiated, and continued to the ends of the log-ratio.

Only f is given. f' and f'' come from autodiff in float64. Beyond |log_ratio| = 20 (or where f'' has lost its digits)
the curvature h = u^2 f'' is continued by the power of u it has there, link and value by the integrals of that power; so
exp never overflows, and 1 / u, log u, u log u or u^2 keep their growth. That is exact for the alpha family and tends to
the truth for every f whose curvature ends as a power of u.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from kullback.divergence.curves import FDivergence
from kullback.divergence.pair import INF, Limits, Pair

REACH = 20.0  # exp(20) = 5e8: f and f' have converged to their asymptote, and f - u f' still has its digits
REACHES = (REACH, 14.0, 10.0, 7.0)  # nearer ones for an f whose second derivative cancels far out
POWERS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)


class _Tail(NamedTuple):
    """h exp(power * x) is the curvature at x = |log u| - reach > 0; the derivatives start from those at x = 0."""

    reach: float
    h: float  # per unit of the larger mass, as all of these
    power: float
    link: float  # the partial derivative in the larger mass at x = 0: g on the left (u -> 0), f' on the right
    other: float  # the partial derivative in the smaller mass


def from_generator(f: Callable[[Tensor], Tensor], *, name: str = "generator", equation: str = "") -> FDivergence:
    """The divergence sum model f(target / model) of a convex f with f(1) = 0, given as a function of the tensor u > 0.

    Adding c (u - 1) to f changes no divergence, so f is centred to f'(1) = 0; the `plain` estimator keeps f as given.

    Args:
        f: element-wise, written with torch operations, twice differentiable almost everywhere.

    Raises:
        ValueError: f(1) != 0, f is not finite on u > 0, not convex, or not made of torch operations.

    >>> D = FDivergence.from_generator(lambda u: (u - 1) ** 2, name="mine")
    >>> D.link(torch.tensor(0.0)).item(), D.second_derivative_at_one
    (0.0, 2.0)
    """
    return Generator(f, name, equation or "sum model f(target / model), f given in code", *_study(f, name))


@final
@dataclass(frozen=True, repr=False)
class Generator(FDivergence):
    """sum model f(target / model) for a function f; equal to another only if f is the same object."""

    f: Callable[[Tensor], Tensor]
    title: str
    text: str
    gauge: float  # f'(1) as given
    bend: float  # f''(1)
    kinked: bool
    ends: Limits
    left: _Tail
    right: _Tail

    @property
    def name(self) -> str:
        return self.title

    @property
    def equation(self) -> str:
        return self.text

    @property
    def limits(self) -> Limits:
        return self.ends

    @property
    def smooth(self) -> bool:
        return not self.kinked

    @property
    def second_derivative_at_one(self) -> float:
        return INF if self.kinked else self.bend

    @property
    def plain_slope(self) -> float:
        return self.gauge

    def _value(self, pair: Pair) -> Tensor:
        return self._evaluate(pair, "value")

    def _link(self, pair: Pair) -> Tensor:
        return self._evaluate(pair, "link")

    def _slope(self, pair: Pair) -> Tensor:
        return self._evaluate(pair, "slope")

    def _curvature(self, pair: Pair) -> Tensor:
        return self._evaluate(pair, "curvature")

    def _evaluate(self, pair: Pair, curve: str) -> Tensor:
        wide = Pair(*(x.double() for x in pair))
        inner = wide.ratio.clamp(-self.left.reach, self.right.reach)
        near = _near(self.f, self.gauge, inner)[curve]
        log_weight = torch.where(wide.ratio > 0, wide.target - inner, wide.model)  # m = t / u, from the larger side
        out = torch.exp(log_weight) * near
        for tail, side in ((self.left, -1.0), (self.right, 1.0)):
            beyond = wide.ratio * side > tail.reach
            if beyond.any():
                x = torch.where(beyond, wide.ratio * side - tail.reach, torch.zeros_like(inner))
                weight = wide.target if side > 0 else wide.model
                # the right end is the left end of the reversed divergence: slope and link change places
                out = torch.where(beyond, _continue(tail, x, weight, curve, side > 0), out)
        return out.to(pair.ratio.dtype)


def _near(f: Callable[[Tensor], Tensor], gauge: float, log_ratio: Tensor) -> dict[str, Tensor]:
    """The four curves (per model mass) from f by autodiff, differentiable in log_ratio if that asks for it."""
    live = log_ratio.requires_grad and torch.is_grad_enabled()
    with torch.enable_grad():
        u = torch.exp(log_ratio if live else log_ratio.detach())
        if not u.requires_grad:
            u = u.requires_grad_()
        first, second = _derivatives(f, u)
        value = f(u) - gauge * (u - 1)
        slope = first - gauge
        curves = {"value": value, "link": value - u * slope, "slope": u * slope, "curvature": u * u * second}
    return curves if live else {k: v.detach() for k, v in curves.items()}


def _derivatives(f: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """f' and f'' at u; zero where f is (piecewise) constant or linear."""

    def derive(y: Tensor) -> Tensor:
        if not y.requires_grad:
            return torch.zeros_like(u)
        (dy,) = torch.autograd.grad(y.sum(), u, create_graph=True, allow_unused=True)
        return torch.zeros_like(u) if dy is None else torch.zeros_like(u) + dy  # + : a lazy zero becomes a tensor

    first = derive(f(u))
    return first, derive(first)


def _continue(tail: _Tail, x: Tensor, log_weight: Tensor, curve: str, right: bool) -> Tensor:
    """A curve at distance x beyond the reach, times the larger weight exp(log_weight).

    With v = min(u, 1 / u), the partial derivative in the larger mass (g on the left, f' on the right) grows like the
    integral of h, the other one falls like that of h / v, and the value is their weighted sum (Euler's theorem).
    """
    p, h = tail.power, tail.h
    if curve == "curvature":
        return h * torch.exp(p * x + log_weight) if h > 0 else torch.zeros_like(x)
    own, crossing = tail.link * torch.exp(log_weight), tail.other * torch.exp(log_weight - x - tail.reach)
    if h > 0:
        own, crossing = own + h * _growth(p, x, log_weight), crossing - h * _growth(p + 1, x, log_weight - x)
    if curve == "value":
        return torch.where(torch.isinf(own), own, own + crossing)
    return crossing if (curve == "slope") != right else own


def _growth(power: float, x: Tensor, log_weight: Tensor) -> Tensor:
    """exp(log_weight) * integral of exp(power s) ds from 0 to x."""
    if power == 0:
        return torch.exp(log_weight) * x
    if power < 0:
        return torch.exp(log_weight) * torch.expm1(power * x) / power
    return -torch.exp(log_weight + power * x) * torch.expm1(-power * x) / power


def _study(f: Callable[[Tensor], Tensor], name: str) -> tuple[float, float, bool, Limits, _Tail, _Tail]:
    """Check f and measure what the curves need: slope and curvature at 1, kinks, both tails."""
    one = torch.ones(1, dtype=torch.float64)
    grid = torch.exp(torch.linspace(-REACH, REACH, 961, dtype=torch.float64))
    try:
        at_one, values = f(one), f(grid)
        with torch.enable_grad():
            gauge, bend = (x.item() for x in _derivatives(f, one.clone().requires_grad_()))
    except Exception as error:
        raise ValueError(
            f'generator "{name}": f must map a tensor u > 0 to a tensor, element-wise ({error})'
        ) from error
    if not isinstance(values, Tensor) or values.shape != grid.shape:
        raise ValueError(f'generator "{name}": f must return one value per entry of u, written with torch operations')
    if not torch.isfinite(values).all():
        where = grid[~torch.isfinite(values)][0].item()
        raise ValueError(
            f'generator "{name}": f({where:.3g}) = {f(torch.tensor([where])).item()}; it must be finite for u > 0'
        )
    if abs(at_one.item()) > 1e-9:
        raise ValueError(f'generator "{name}": f(1) = {at_one.item():.6g}; it must be 0, so subtract that number')
    _check_convex(grid, values, name)

    wide, narrow = ((f(one + step) + f(one - step)).item() / step**2 for step in (2e-4, 1e-4))
    kinked = not math.isfinite(bend) or narrow > 1.3 * wide + 1e-6  # second differences that grow: no second derivative
    tails = [_tail(f, gauge, side) for side in (-1.0, 1.0)]
    return gauge, bend, kinked, _limits(*tails), tails[0], tails[1]


def _check_convex(grid: Tensor, values: Tensor, name: str) -> None:
    a, b, c = grid[:-2], grid[1:-1], grid[2:]
    chord = ((c - b) * values[:-2] + (b - a) * values[2:]) / (c - a)
    excess = values[1:-1] - chord
    size = values.abs()
    tolerance = 1e-9 * (1e-3 + torch.maximum(torch.maximum(size[:-2], size[2:]), size[1:-1]))
    if (excess > tolerance).any():
        where = b[excess > tolerance][0].item()
        raise ValueError(
            f"generator \"{name}\": f is not convex near u = {where:.3g}; a divergence needs f'' >= 0, "
            "otherwise equal distributions are not its minimum"
        )


def _tail(f: Callable[[Tensor], Tensor], gauge: float, side: float) -> _Tail:
    """Fit the power of the curvature as far out as three neighbours agree on it."""
    right = side > 0
    for reach in REACHES:
        at = side * torch.tensor([reach, reach - 1, reach - 2], dtype=torch.float64)
        curves = {k: v.tolist() for k, v in _near(f, gauge, at).items()}
        u = math.exp(side * reach)
        h = [c / math.exp(x) if right else c for c, x in zip(curves["curvature"], at.tolist(), strict=True)]
        power, agree = 0.0, all(c == 0 for c in h)
        if all(c > 1e-290 for c in h):
            power = math.log(h[0] / h[1])
            agree = abs(power - math.log(h[1] / h[2])) < 1e-3
        if agree:
            break
    power = next((exact for exact in POWERS if abs(power - exact) < 1e-4), power)
    link, slope = curves["link"][0], curves["slope"][0] / u
    return _Tail(reach, max(h[0], 0.0), power, *((slope, link) if right else (link, slope)))


def _limits(left: _Tail, right: _Tail) -> Limits:
    def own(tail: _Tail) -> float:
        if tail.h == 0:
            return tail.link
        return INF if tail.power >= 0 else tail.link - tail.h / tail.power

    def other(tail: _Tail) -> float:
        """Limit of the other partial derivative: its rate in x is -h exp(x + reach) per unit of the larger mass."""
        if tail.h == 0:
            return tail.other
        rate = tail.power + 1
        return -INF if rate >= 0 else tail.other + math.exp(tail.reach) * tail.h / rate

    def product(tail: _Tail) -> float:
        """Limit of v * other."""
        if tail.h == 0 or tail.power < 0:
            return 0.0
        return -tail.h / (tail.power + 1) if tail.power == 0 else -INF

    return Limits(own(left), own(right), other(right), other(left), product(right), product(left))
