"""A divergence from the log-probabilities of samples: unbiased values, and losses whose *gradient* is unbiased.

These are two questions. With l = log target - log model on samples of the model, reverse KL has the values
k1 = -l and k3 = exp(l) - 1 - l, both unbiased; as losses k1 has expected gradient zero and k3 that of forward KL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence.pair import promote, together

if TYPE_CHECKING:
    from kullback.divergence.curves import FDivergence

Estimator = Literal["centred", "plain", "k1", "k2", "k3"]
Route = Literal["link", "squared", "value"]
DrawnFrom = Literal["model", "target"]


def sampled(
    divergence: FDivergence,
    target_log_prob: Float[Tensor, "*sample"],
    model_log_prob: Float[Tensor, "*sample"],
    *,
    drawn_from: DrawnFrom = "model",
    estimator: Estimator = "centred",
) -> Float[Tensor, "*sample"]:
    """One value per sample whose mean over samples estimates D(target, model).

        drawn_from="model":   f(u)          drawn_from="target":   f(u) / u

    | estimator       | f                                           | bias        |                                 |
    |-----------------|---------------------------------------------|-------------|---------------------------------|
    | `centred`, `k3` | f'(1) = 0                                   | none        | never negative, low variance    |
    | `plain`, `k1`   | the textbook generator, f'(1) = plain_slope | none        | may be negative                 |
    | `k2`            | f''(1) l^2 / 2, the same on either sample   | third order | good near equality only         |

    Unbiased means: target and model are normalised and each covers the other; where f is unbounded the variance may
    still be infinite. A member whose textbook generator is centred (jsd, alpha, chi2, tv) has k1 = k3.

    Returns:
        Nats, one per sample, detached: as a loss on model samples the value has the wrong gradient. See `surrogate`.

    >>> from kullback.divergence import divergence
    >>> target, model = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.5])
    >>> divergence("reverse_kl").sampled(target, model, estimator="k1")
    tensor([-0.5000,  0.5000])
    """
    _known(drawn_from, "drawn_from", get_args(DrawnFrom))
    _known(estimator, "estimator", get_args(Estimator))
    with torch.no_grad():
        target, model = together(target_log_prob, model_log_prob)
        ratio, zero = target - model, torch.zeros_like(target)
        if estimator == "k2":
            if not divergence.smooth:
                raise ValueError(f'estimator="k2": {divergence} has no second derivative at 1; use estimator="centred"')
            return 0.5 * divergence.second_derivative_at_one * ratio**2
        # The product m f(t / m) with one weight 1 is f or f / u. A sample its own distribution cannot draw counts as
        # the other end of the range, where only the centred value has a limit for every member.
        t, m = (ratio, zero) if drawn_from == "model" else (zero, -ratio)
        value = divergence.value(ratio) if drawn_from == "model" else divergence.reversed.value(-ratio)
        if estimator in ("centred", "k3"):
            return value
        possible = ~(torch.isposinf(t) | torch.isposinf(m))
        t, m = (torch.where(possible, x, zero) for x in (t, m))
        return torch.where(possible, divergence.weighted_plain(t, m), value)


def surrogate(
    divergence: FDivergence,
    target_log_prob: Float[Tensor, "*sample"],
    model_log_prob: Float[Tensor, "*sample"],
    *,
    route: Route | None = None,
    drawn_from: DrawnFrom = "model",
    baseline: Float[Tensor, "*sample"] | float | None = None,
    target_grad: bool = False,
) -> Float[Tensor, "*sample"]:
    """A loss per sample whose expected gradient is that of D(target, model). Its value means nothing; see `sampled`.

    | drawn_from | route             | loss                                      |                                     |
    |------------|-------------------|-------------------------------------------|-------------------------------------|
    | `model`    | `link` (default)  | stop_grad(g - baseline) * log model       | a reward of -g, any baseline        |
    | `model`    | `squared`         | s(l), ds / d log model = g                | reverse KL: l^2 / 2, i.e. k2        |
    | `model`    | `value`           | refused: f(l) has another gradient        |                                     |
    | `target`   | `value` (default) | f(u) / u, gradient through log model      | forward KL: k3, as in DPH-RL        |
    | `target`   | `link`            | stop_grad(g / u) * log model              | the same gradient, sample by sample |
    | `target`   | `squared`         | refused: its samples must be the model's  |                                     |

    Args:
        target_log_prob, model_log_prob: of the samples. Gradients flow into the model's only.
        baseline: for the `link` route on model samples; detached. `expected_link` is the exact one.
        target_grad: also add the gradient with respect to the target's parameters.

    Raises:
        ValueError: a route whose expected gradient is not D's, with the reason.
    """
    _known(drawn_from, "drawn_from", get_args(DrawnFrom))
    route = route or ("link" if drawn_from == "model" else "value")
    _known(route, "route", get_args(Route))
    _refuse(divergence, route, drawn_from, baseline)

    target, model = together(target_log_prob, model_log_prob)
    ratio = (target - model).detach()
    zero = torch.zeros_like(ratio)
    from_model = drawn_from == "model"
    if from_model:
        pull, target_pull = divergence.link(ratio), divergence.weighted_slope(ratio, zero)
    else:  # divide by u inside the product
        pull, target_pull = divergence.weighted_link(zero, -ratio), divergence.weighted_slope(zero, -ratio)
    if baseline is not None:
        pull = pull - torch.as_tensor(baseline).detach()

    if route == "link":
        loss = pull * model
    else:
        value = divergence._potential(ratio) if route == "squared" else divergence.weighted_value(zero, -ratio)
        loss = value + pull * (model - model.detach())
    return loss + target_pull * (target - target.detach()) if target_grad else loss


def integrate_link(divergence: FDivergence, log_ratio: Tensor) -> Tensor:
    """s(l) = - integral of g from 0 to l, by Gauss-Legendre on panels that double in width. Detached."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    with torch.no_grad():
        ratio = promote(log_ratio).double()
        size, total = ratio.abs(), torch.zeros_like(ratio)
        reach = float(size[torch.isfinite(size)].max()) if torch.isfinite(size).any() else 0.0
        start, stop = 0.0, 1.0
        while start < max(reach, 1e-300):
            width = (size.clamp(max=stop) - start).clamp(min=0)
            for x, w in zip(nodes, weights, strict=True):
                at = start + width * (x + 1) / 2
                part = divergence.link(torch.sign(ratio) * at) * (w / 2)
                total = total + torch.where(width > 0, -torch.sign(ratio) * part * width, torch.zeros_like(width))
            start, stop = stop, 2 * stop
        total = torch.where(torch.isinf(ratio), torch.full_like(total, torch.inf), total)
        return total.to(promote(log_ratio).dtype)


def _refuse(divergence: FDivergence, route: str, drawn_from: str, baseline: object) -> None:
    if drawn_from == "model" and route == "value":
        raise ValueError(
            f'route="value": on samples of the model the gradient of f(l) is not that of {divergence} (for reverse KL '
            "k1 has expected gradient zero and k3 that of forward KL; others are mostly reversed); "
            'use route="link" or route="squared"'
        )
    if drawn_from == "target" and route == "squared":
        raise ValueError(
            'route="squared": its gradient is right on samples of the model only, these are drawn from the target; '
            'use route="value"'
        )
    if baseline is not None and (route != "link" or drawn_from != "model"):
        raise ValueError(
            f'baseline with route="{route}", drawn_from="{drawn_from}": a baseline leaves the gradient unbiased only '
            'for route="link" on samples of the model; leave it out'
        )


def _known(value: str, field: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f'{field}="{value}": choose one of {", ".join(choices)}')
