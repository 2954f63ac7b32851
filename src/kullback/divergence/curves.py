"""One object per divergence: three curves over the log-ratio and their limits.

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

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import categorical as _categorical
from kullback.divergence import linear as _linear
from kullback.divergence import sampled as _sampled
from kullback.divergence import topk as _topk
from kullback.divergence.inverse import solve_link
from kullback.divergence.pair import INF, Limits, Pair, promote, times, together

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
        return _sampled.integrate_link(self, log_ratio)

    def _reversed(self) -> FDivergence:
        return algebra.Reversed(self)

    # The curves ----------------------------------------------------------------------------------------------------

    def value(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """f(u), centred and nonnegative. For measuring: as a loss or a reward its gradient is usually wrong.

        >>> from kullback.divergence import divergence
        >>> divergence("reverse_kl").value(torch.tensor([1.0, 2.0]).log())
        tensor([0.0000, 0.3069])
        """
        end = INF if self.limits.slope_infinity > 0 else 0.0
        return self._at_ratio(log_ratio, self._value, self.limits.value_zero, end)

    def link(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """g(u) = f(u) - u f'(u), falling from `link_at_zero` through 0 at u = 1 to `link_at_infinity`.

        The logit gradient of D is model * (g - E_model g); -g is the reward of its policy gradient.

        >>> from kullback.divergence import divergence
        >>> divergence("forward_kl").link(torch.tensor([1.0, 2.0]).log())  # 1 - u
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
        out = torch.where(lost & ~new, times(no_target, torch.where(lost & ~new, model, zero)), out)
        return torch.where(new & ~lost, times(no_model, torch.where(new & ~lost, target, zero)), out)

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
        return self if scale == 1 else algebra.Unit(self)

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
        return self if share == 0 else algebra.Skewed(self, float(share))

    def __add__(self, other: FDivergence) -> FDivergence:
        return algebra.combine([(1.0, self), (1.0, other)]) if isinstance(other, FDivergence) else NotImplemented

    def __mul__(self, factor: float) -> FDivergence:
        return algebra.combine([(float(factor), self)]) if isinstance(factor, (int, float)) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> FDivergence:
        return self * (1 / factor) if isinstance(factor, (int, float)) else NotImplemented

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f'divergence("{self.name}")'

    # Evaluation ----------------------------------------------------------------------------------------------------
    # Functions whose first argument is the divergence: as methods they keep their signatures and their words.

    categorical = _categorical.categorical
    from_log_probs = _categorical.from_log_probs
    expected_link = _categorical.expected_link
    topk = _topk.topk
    topk_expected_link = _topk.topk_expected_link
    linear = _linear.linear
    linear_topk = _linear.linear_topk
    sampled = _sampled.sampled
    surrogate = _sampled.surrogate

    @staticmethod
    def from_generator(f: Callable[[Tensor], Tensor], *, name: str = "generator", equation: str = "") -> FDivergence:
        from kullback.divergence.generator import from_generator

        return from_generator(f, name=name, equation=equation)


from kullback.divergence import algebra  # noqa: E402  # last: what it combines and wraps are divergences
