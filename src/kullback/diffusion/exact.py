"""A Gaussian student, by quadrature: the gradient of f-distill and where it leads, without sampling error.

Student x0 = a z + b, noised to variance a^2 + sigma^2; teacher a Gaussian, or the first axis of a
mixture. Scores and ratio are exact, means are Gauss-Hermite sums in float64. This is what the learned loop is held
against.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kullback.diffusion.data import Mixture
from kullback.diffusion.f_distill import matching_loss
from kullback.divergence import divergence


def hermite(count: int) -> tuple[Float[Tensor, "node"], Float[Tensor, "node"]]:
    """Nodes and weights of the mean over a standard normal; float64."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def estimated_gradient(
    name: str, a: float, b: float, teacher: tuple[float, float], variance: float, nodes: int = 80
) -> tuple[float, float]:
    """(dD/da, dD/db) by the estimator, its mean taken by quadrature over (z, eps); scores and ratio are exact.

    Teacher N(mean, deviation^2), student a z + b, noise variance as given. It is `matching_loss` with the weights of
    `RatioWeights`, clip and normalisation off.
    """
    node, weight = hermite(nodes)
    z, eps = (part.flatten() for part in torch.meshgrid(node, node, indexing="ij"))
    share = (weight[:, None] * weight[None, :]).flatten()
    sigma = torch.full_like(z, math.sqrt(variance))
    theta = torch.tensor([a, b], dtype=torch.float64, requires_grad=True)
    x = theta[0] * z + theta[1]
    noised = (x + sigma * eps).detach()
    target, model = noised_laws(a, b, teacher, variance)
    scores = [-(noised - law.mean) / law.variance for law in (target, model)]
    teacher_x0, fake_x0 = ((noised + variance * score)[:, None] for score in scores)
    h = divergence(name).curvature(target.log_prob(noised) - model.log_prob(noised))
    loss = matching_loss(x[:, None], teacher_x0, fake_x0, h, sigma)
    (grad,) = torch.autograd.grad((share * loss).sum(), theta)
    return grad[0].item(), grad[1].item()


def noised_laws(
    a: float, b: float, teacher: tuple[float, float], variance: float
) -> tuple[torch.distributions.Normal, torch.distributions.Normal]:
    """Target and model at one noise level, in float64."""
    pairs = torch.tensor([teacher, (b, a)], dtype=torch.float64)
    target, model = (torch.distributions.Normal(mean, (deviation**2 + variance).sqrt()) for mean, deviation in pairs)
    return target, model


def divergence_between(name: str, a: float, b: float, teacher: tuple[float, float], variance: float) -> float:
    """D(target, model) of the noised marginals, by the trapezoid rule on a wide grid."""
    x = torch.linspace(-14, 16, 60_001, dtype=torch.float64)
    target, model = (law.log_prob(x) for law in noised_laws(a, b, teacher, variance))
    return torch.trapezoid(divergence(name).weighted_value(target, model), x).item()


def numeric_gradient(
    name: str, a: float, b: float, teacher: tuple[float, float], variance: float, step: float = 1e-4
) -> tuple[float, float]:
    """(dD/da, dD/db) by central differences of `divergence_between`."""

    def slope(da: float, db: float) -> float:
        ends = (divergence_between(name, a + k * da, b + k * db, teacher, variance) for k in (1, -1))
        return (next(ends) - next(ends)) / (2 * step)

    return slope(step, 0.0), slope(0.0, step)


def weight_variance(name: str, distance: float) -> float:
    """Variance of h / E[h] under the model, for two unit Gaussians `distance` apart: the noise of the weight alone."""
    x = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    target, model = torch.distributions.Normal(distance, 1.0), torch.distributions.Normal(0.0, 1.0)
    h, density = divergence(name).curvature(target.log_prob(x) - model.log_prob(x)), model.log_prob(x).exp()
    relative = h / torch.trapezoid(density * h, x)
    return torch.trapezoid(density * (relative - 1) ** 2, x).item()


def log_uniform(low: float, high: float, count: int = 16) -> tuple[Tensor, Tensor]:
    """Variances and weights of the mean over sigma log-uniform in [low, high]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    sigma = np.exp((nodes + 1) / 2 * math.log(high / low) + math.log(low))
    return torch.from_numpy(sigma**2), torch.from_numpy(weights / 2)


def fixed_points(
    names: Sequence[str],
    starts: Sequence[tuple[float, float]],
    mixture: Mixture,
    variances: Float[Tensor, "level"],
    shares: Float[Tensor, "level"] | None = None,
    *,
    steps: int = 6000,
    rate: float = 0.02,
    nodes: int = 200,  # 60 put Jeffreys at 1.720 instead of 1.694: at the smallest noise the ratio is steep
) -> Float[Tensor, "divergence start 2"]:
    """(a, b) where gradient descent takes the student a z + b of the mixture's first axis, from each start.

    D is averaged over the noise variances, equally without `shares`. Given x_t, z has mean a (x_t - b) / (a^2 +
    variance): so the mean over (z, eps) is one over x_t alone.
    """
    node, weight = hermite(nodes)
    curves = [divergence(name).curvature for name in names]
    variances = variances.double()
    shares = torch.full_like(variances, 1 / len(variances)) if shares is None else shares
    theta = torch.tensor(starts, dtype=torch.float64).expand(len(names), -1, -1).clone()
    logits, means = mixture.shares.double().log(), mixture.means[:, 0].double()
    spread = mixture.deviations.double() ** 2 + variances[:, None]  # [level, component]
    for _ in range(steps):
        a, b = theta[..., 0, None, None], theta[..., 1, None, None]
        total = a**2 + variances[:, None]  # [divergence, start, level, 1]
        x = b + total.sqrt() * node  # [divergence, start, level, node]
        offset = x[..., None] - means
        parts = logits - 0.5 * (spread.log()[:, None] + offset**2 / spread[:, None])
        log_target = torch.logsumexp(parts, -1)
        target_score = -(parts.softmax(-1) * offset / spread[:, None]).sum(-1)
        log_ratio = log_target + 0.5 * (total.log() + node**2)
        h = torch.stack([curve(row) for curve, row in zip(curves, log_ratio, strict=True)])
        pull = weight * h * (target_score + (x - b) / total)
        into_b = (pull.sum(-1) * shares).sum(-1)
        into_a = ((pull * a * (x - b) / total).sum(-1) * shares).sum(-1)
        theta = theta + rate * torch.stack([into_a, into_b], -1)
    return theta
