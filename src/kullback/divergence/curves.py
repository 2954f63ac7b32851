"""One object per divergence: three curves over the log-ratio, their limits, and the algebra that combines them.

    D(target, model) = sum_x model(x) f(u(x)),    u = target / model,    log_ratio = log target - log model

| curve       | definition                                    |
|-------------|-----------------------------------------------|
| `value`     | f(u), centred: f(1) = f'(1) = 0, so f >= 0    |
| `link`      | g(u) = d/dm [m f(t / m)] = f(u) - u f'(u)     |
| `slope`     | f'(u) = d/dt [m f(t / m)]                     |
| `curvature` | h(u) = u^2 f''(u) = -d link / d log u         |

Everything is in nats and float32 or wider. A member implements four products (`_value` = m f, `_link` = m g,
`_slope` = t f', `_curvature` = m h) over a `Pair` of finite log-weights; zero weights are handled here, once, by
`Limits`. The curves themselves are those products with log model = 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import categorical, linear, sampled, topk
from kullback.divergence.inverse import solve_link
from kullback.divergence.pair import INF, Limits, Pair, promote, together
from kullback.divergence.sampled import Estimator, Route

if TYPE_CHECKING:
    from kullback.divergence.topk import Tail, TopK

Curve = Callable[[Pair], Tensor]


class FDivergence(ABC):
    """An f-divergence. Get one from `kb.divergence("jsd(0.1)")` or `FDivergence.from_generator`; combine with + and *.

    Two divergences are equal when they are built alike; `str(D)` is text that `kb.divergence` parses back to D.
    """

    # What a member says about itself -------------------------------------------------------------------------------

    @property
    @abstractmethod
    def name(self) -> str:
        """Text that parses back to this divergence."""

    @property
    @abstractmethod
    def equation(self) -> str:
        """The definition in words and symbols, target first."""

    @property
    @abstractmethod
    def limits(self) -> Limits:
        """Ends of the curves."""

    @property
    @abstractmethod
    def second_derivative_at_one(self) -> float:
        """f''(1): the scale. KL has 1."""

    @property
    def smooth(self) -> bool:
        """Whether f has a second derivative at 1."""
        return True

    @property
    def plain_slope(self) -> float:
        """f'(1) of the textbook generator: f_plain(u) = f(u) + plain_slope * (u - 1). It only matters to estimators."""
        return 0.0

    @abstractmethod
    def _value(self, pair: Pair) -> Tensor:
        """m f(t / m)."""

    @abstractmethod
    def _link(self, pair: Pair) -> Tensor:
        """m g(t / m)."""

    @abstractmethod
    def _slope(self, pair: Pair) -> Tensor:
        """t f'(t / m)."""

    @abstractmethod
    def _curvature(self, pair: Pair) -> Tensor:
        """m h(t / m)."""

    def _plain(self, pair: Pair) -> Tensor:
        """m f_plain(t / m)."""
        value, slope = self._value(pair), self.plain_slope
        if slope == 0:
            return value
        return torch.where(torch.isinf(value), value, value + slope * (torch.exp(pair.target) - torch.exp(pair.model)))

    def _inverse_link(self, g: Tensor) -> Tensor:
        return solve_link(self, g)

    def _potential(self, log_ratio: Tensor) -> Tensor:
        return sampled.integrate_link(self, log_ratio)

    def _reversed(self) -> FDivergence:
        return Reversed(self)

    # The curves ----------------------------------------------------------------------------------------------------

    def value(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """f(u), centred and nonnegative. For measuring: as a loss or a reward its gradient is usually wrong.

        >>> from kullback.divergence import divergence
        >>> divergence("reverse_kl").value(torch.tensor([0.0, math.log(2)]))
        tensor([0.0000, 0.3069])
        """
        end = INF if self.limits.slope_infinity > 0 else 0.0
        return self._at_ratio(log_ratio, self._value, self.limits.value_zero, end)

    def link(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """g(u) = f(u) - u f'(u), falling from `link_at_zero` through 0 at u = 1 to `link_at_infinity`.

        The logit gradient of D is model * (g - E_model g); -g is the reward of its policy gradient.

        >>> from kullback.divergence import divergence
        >>> divergence("forward_kl").link(torch.tensor([0.0, math.log(2)]))  # 1 - u
        tensor([-0., -1.])
        """
        return self._at_ratio(log_ratio, self._link, self.limits.value_zero, self.limits.link_infinity)

    def slope(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """f'(u), the derivative with respect to the target's mass; it is the link of `reversed` at -log_ratio."""
        return self.reversed.link(-torch.as_tensor(log_ratio))

    def curvature(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """h(u) = u^2 f''(u) = -d link / d log_ratio >= 0; f''(1) at log_ratio = 0.

        >>> from kullback.divergence import divergence
        >>> divergence("jsd(0.5)").curvature(torch.tensor([-200.0, 0.0, 200.0]))
        tensor([0.0000, 0.2500, 0.5000])
        """
        ratio = promote(log_ratio)
        ratio = ratio.clamp(-1e30, 1e30)
        return self._curvature(Pair(ratio, torch.zeros_like(ratio), ratio))

    def inverse_link(self, g: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The log_ratio whose link is g; -inf at or above `link_at_zero`, +inf at or below `link_at_infinity`.

        The optimum of reward - D(reference, policy) is log policy = log reference - inverse_link(reward - normaliser).
        Closed form where there is one, otherwise Newton's method in log_ratio inside a shrinking bracket, in float64.
        """
        return self._inverse_link(promote(g))

    def weighted_value(
        self, target_log_prob: Float[Tensor, "*shape"], model_log_prob: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """model * f(target / model), the product taken in log space, with 0 f(0 / 0) = 0."""
        return self._at_weights(
            target_log_prob, model_log_prob, self._value, self.limits.value_zero, self.limits.slope_infinity
        )

    def weighted_link(
        self, target_log_prob: Float[Tensor, "*shape"], model_log_prob: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """model * g(target / model) in log space: finite where g alone overflows (forward KL: model - target)."""
        return self._at_weights(
            target_log_prob, model_log_prob, self._link, self.limits.value_zero, self.limits.link_per_ratio
        )

    def weighted_slope(
        self, target_log_prob: Float[Tensor, "*shape"], model_log_prob: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """target * f'(target / model) in log space: the derivative with respect to log target."""
        return self._at_weights(
            target_log_prob, model_log_prob, self._slope, self.limits.ratio_slope, self.limits.slope_infinity
        )

    def weighted_plain(
        self, target_log_prob: Float[Tensor, "*shape"], model_log_prob: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """model * f_plain(target / model), the textbook generator: reverse KL -model log u, forward KL target log u."""
        f_zero, f_infinity, slope = self.limits.value_zero, self.limits.slope_infinity, self.plain_slope
        plain = self._at_weights(target_log_prob, model_log_prob, self._plain, f_zero - slope, f_infinity + slope)
        if not plain.isnan().any():
            return plain
        # far out, where parts of a sum overflow with both signs, f and f_plain are equally infinite
        return torch.where(plain.isnan(), self.weighted_value(target_log_prob, model_log_prob), plain)

    def _at_ratio(self, log_ratio: Tensor | float, curve: Curve, at_zero: float, at_infinity: float) -> Tensor:
        ratio = promote(log_ratio)
        ends = torch.isinf(ratio)
        inner = torch.where(ends, torch.zeros_like(ratio), ratio)
        out = curve(Pair(inner, torch.zeros_like(inner), inner))
        limit = torch.where(ratio > 0, torch.full_like(out, at_infinity), torch.full_like(out, at_zero))
        return torch.where(ends, limit, out)

    def _at_weights(self, target: Tensor, model: Tensor, curve: Curve, no_target: float, no_model: float) -> Tensor:
        target, model = together(target, model)
        lost, new = torch.isneginf(target), torch.isneginf(model)
        edge = lost | new
        if edge.device.type == "cpu" and not edge.any():
            return curve(Pair(target, model, target - model))
        zero = torch.zeros_like(target)
        t, m = torch.where(edge, zero, target), torch.where(edge, zero, model)
        out = torch.where(edge, zero, curve(Pair(t, m, t - m)))
        out = torch.where(lost & ~new, _times(no_target, torch.where(lost & ~new, model, zero)), out)
        return torch.where(new & ~lost, _times(no_model, torch.where(new & ~lost, target, zero)), out)

    # The ends ------------------------------------------------------------------------------------------------------

    @property
    def f_at_zero(self) -> float:
        """f(0): what D charges per unit of model mass where the target has none."""
        return self.limits.value_zero

    @property
    def f_slope_at_infinity(self) -> float:
        """lim f(u) / u: what D charges per unit of target mass where the model has none."""
        return self.limits.slope_infinity

    @property
    def link_at_zero(self) -> float:
        """lim g(u), u -> 0; always equal to f(0)."""
        return self.limits.value_zero

    @property
    def link_at_infinity(self) -> float:
        """lim g(u), u -> inf."""
        return self.limits.link_infinity

    @property
    def has_closed_form(self) -> bool:
        """Whether the link falls to -inf, so that a preference pair cancels the normaliser (as in DPO)."""
        return self.limits.link_infinity == -INF

    @property
    def bounds(self) -> tuple[float, float]:
        """(0, sup D), the supremum reached by disjoint supports: f(0) + lim f(u) / u."""
        return 0.0, self.limits.value_zero + self.limits.slope_infinity

    # Algebra -------------------------------------------------------------------------------------------------------

    @property
    def unit(self) -> FDivergence:
        """D / f''(1): near equality it is KL to second order, so a coefficient means the same for every divergence.

        Raises:
            ValueError: f has a kink at 1, or no curvature there.
        """
        scale = self.second_derivative_at_one
        if not self.smooth or not 0 < scale < INF:
            raise ValueError(
                f'divergence="{self}": no unit scale, because f has no positive second derivative at 1; '
                "use it at its textbook scale"
            )
        return self if scale == 1 else Unit(self)

    @property
    def reversed(self) -> FDivergence:
        """D with target and model exchanged: f*(u) = u f(1 / u)."""
        return self._reversed()

    def skew(self, share: float) -> FDivergence:
        """D(target, share * target + (1 - share) * model): bounded for share > 0, D itself at 0.

        >>> from kullback.divergence import divergence
        >>> print(divergence("forward_kl").skew(0.1))
        skew(forward_kl, 0.1)
        """
        if not 0 <= share < 1:
            raise ValueError(
                f'divergence="skew({self}, {share:g})": the share must be in [0, 1); at 1 it is always zero'
            )
        return self if share == 0 else Skewed(self, float(share))

    def __add__(self, other: FDivergence) -> FDivergence:
        return combine([(1.0, self), (1.0, other)]) if isinstance(other, FDivergence) else NotImplemented

    def __mul__(self, factor: float) -> FDivergence:
        return combine([(float(factor), self)]) if isinstance(factor, (int, float)) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> FDivergence:
        return self * (1 / factor) if isinstance(factor, (int, float)) else NotImplemented

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f'divergence("{self.name}")'

    # Evaluation ----------------------------------------------------------------------------------------------------

    def categorical(
        self,
        target_logits: Float[Tensor, "*batch vocab"],
        model_logits: Float[Tensor, "*batch vocab"],
        *,
        temperature: float = 1.0,
        target_grad: bool = False,
        pad_vocab: bool = False,
    ) -> Float[Tensor, "*batch"]:
        return categorical.categorical(
            self,
            target_logits,
            model_logits,
            temperature=temperature,
            target_grad=target_grad,
            pad_vocab=pad_vocab,
        )

    def from_log_probs(
        self,
        target_log_probs: Float[Tensor, "*batch outcome"],
        model_log_probs: Float[Tensor, "*batch outcome"],
        *,
        target_grad: bool = False,
    ) -> Float[Tensor, "*batch"]:
        return categorical.from_log_probs(self, target_log_probs, model_log_probs, target_grad=target_grad)

    def expected_link(
        self,
        target_logits: Float[Tensor, "*batch vocab"],
        model_logits: Float[Tensor, "*batch vocab"],
        *,
        temperature: float = 1.0,
        pad_vocab: bool = False,
    ) -> Float[Tensor, "*batch"]:
        return categorical.expected_link(
            self, target_logits, model_logits, temperature=temperature, pad_vocab=pad_vocab
        )

    def topk_expected_link(
        self,
        target_log_probs: Float[Tensor, "*batch k"],
        model_log_probs: Float[Tensor, "*batch k"],
    ) -> Float[Tensor, "*batch"]:
        return topk.topk_expected_link(self, target_log_probs, model_log_probs)

    def topk(
        self,
        target_topk: TopK,
        model_logits: Float[Tensor, "*batch vocab"],
        *,
        tail: Tail = "bucket",
        temperature: float = 1.0,
    ) -> Float[Tensor, "*batch"]:
        return topk.topk(self, target_topk, model_logits, tail=tail, temperature=temperature)

    def linear(
        self,
        target_hidden: Float[Tensor, "*batch target_width"],
        target_head: Float[Tensor, "vocab target_width"],
        model_hidden: Float[Tensor, "*batch model_width"],
        model_head: Float[Tensor, "vocab model_width"],
        *,
        target_bias: Float[Tensor, "vocab"] | None = None,
        model_bias: Float[Tensor, "vocab"] | None = None,
        temperature: float = 1.0,
        target_logit_scale: float = 1.0,
        model_logit_scale: float = 1.0,
        target_softcap: float | None = None,
        model_softcap: float | None = None,
        token_weight: Float[Tensor, "*batch"] | None = None,
        chunk: int | None = None,
        gradient_tolerance: float = 0.0,
        pad_vocab: bool = False,
    ) -> Float[Tensor, "*batch"]:
        return linear.linear(
            self,
            target_hidden,
            target_head,
            model_hidden,
            model_head,
            target_bias=target_bias,
            model_bias=model_bias,
            temperature=temperature,
            target_logit_scale=target_logit_scale,
            model_logit_scale=model_logit_scale,
            target_softcap=target_softcap,
            model_softcap=model_softcap,
            token_weight=token_weight,
            chunk=chunk,
            gradient_tolerance=gradient_tolerance,
            pad_vocab=pad_vocab,
        )

    def linear_topk(
        self,
        target_topk: TopK,
        model_hidden: Float[Tensor, "*batch width"],
        model_head: Float[Tensor, "vocab width"],
        *,
        tail: Tail = "bucket",
        model_bias: Float[Tensor, "vocab"] | None = None,
        temperature: float = 1.0,
        model_logit_scale: float = 1.0,
        model_softcap: float | None = None,
        token_weight: Float[Tensor, "*batch"] | None = None,
        chunk: int | None = None,
        gradient_tolerance: float = 0.0,
    ) -> Float[Tensor, "*batch"]:
        return linear.linear_topk(
            self,
            target_topk,
            model_hidden,
            model_head,
            tail=tail,
            model_bias=model_bias,
            temperature=temperature,
            model_logit_scale=model_logit_scale,
            model_softcap=model_softcap,
            token_weight=token_weight,
            chunk=chunk,
            gradient_tolerance=gradient_tolerance,
        )

    def sampled(
        self,
        target_log_prob: Float[Tensor, "*sample"],
        model_log_prob: Float[Tensor, "*sample"],
        *,
        drawn_from: Literal["model", "target"] = "model",
        estimator: Estimator = "centred",
    ) -> Float[Tensor, "*sample"]:
        return sampled.sampled(self, target_log_prob, model_log_prob, drawn_from=drawn_from, estimator=estimator)

    def surrogate(
        self,
        target_log_prob: Float[Tensor, "*sample"],
        model_log_prob: Float[Tensor, "*sample"],
        *,
        route: Route | None = None,
        drawn_from: Literal["model", "target"] = "model",
        baseline: Float[Tensor, "*sample"] | float | None = None,
        target_grad: bool = False,
    ) -> Float[Tensor, "*sample"]:
        return sampled.surrogate(
            self,
            target_log_prob,
            model_log_prob,
            route=route,
            drawn_from=drawn_from,
            baseline=baseline,
            target_grad=target_grad,
        )

    @staticmethod
    def from_generator(f: Callable[[Tensor], Tensor], *, name: str = "generator", equation: str = "") -> FDivergence:
        from kullback.divergence.generator import from_generator

        return from_generator(f, name=name, equation=equation)


for _module in (categorical, topk, linear, sampled):  # a method's documentation is that of the function it calls
    for _name in _module.METHODS:
        getattr(FDivergence, _name).__doc__ = getattr(_module, _name).__doc__


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


def _times(factor: float, log_weight: Tensor) -> Tensor:
    """factor * exp(log_weight); an infinite factor wins against a weight that has underflowed."""
    if math.isinf(factor) or factor == 0:
        return torch.full_like(log_weight, factor)
    return factor * torch.exp(log_weight)
