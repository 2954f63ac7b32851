"""Multipliers of an exponential family from the moments it should have: the distributional constraints of GDC.

    p_lambda(y) = p(y) exp(lambda . phi(y)) / Z(lambda),    E_{p_lambda} phi = moments

lambda minimises the convex dual log Z(lambda) - lambda . moments, here by Newton's method. For a law that is known this
is exact tilting; for equally weighted samples of p it is self-normalised importance sampling.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def fit_multipliers(
    log_p: Float[Tensor, "*batch outcome"],
    features: Float[Tensor, "*batch outcome feature"],
    moments: Float[Tensor, "feature"],
    *,
    tolerance: float = 1e-9,
    iterations: int = 200,
) -> Float[Tensor, "feature"]:
    """One lambda for all laws of the batch, such that the mean over them of E_{p_lambda} phi is `moments`.

    Each law keeps its own Z: these are the prompts of a conditional model. For samples give -log(n) to each.

    Returns:
        float64, without gradient. Where features say the same thing twice the shortest step is taken.

    Raises:
        ValueError: no law over these outcomes has the moments, or only one that gives some outcomes up.

    Source: Khalifa et al., arXiv 2012.11635 (GDC), section 2.2. Differs: Newton to the tolerance, where the code of
    GDC takes at most 1000 gradient steps of 0.05, which end short of moments near 0 or 1.

    >>> coin = torch.tensor([0.5, 0.5]).log()
    >>> (found,) = fit_multipliers(coin, torch.tensor([[0.0], [1.0]]), torch.tensor([0.9]))
    >>> round(found.item(), 4)  # log(0.9 / 0.1)
    2.1972
    """
    with torch.no_grad():
        log_p, features = log_p.double(), features.double()
        log_p = log_p.log_softmax(-1).flatten(0, -2) if log_p.dim() > 1 else log_p.log_softmax(-1)[None]
        phi = features.reshape(*log_p.shape, -1)
        moments = moments.double()
        possible = log_p > -torch.inf
        phi = torch.where(possible[..., None], phi, 0.0)
        _check_range(phi, possible, moments)
        scale = _range(phi, possible)[1] - _range(phi, possible)[0]
        phi, goal = (phi - moments) / scale, torch.zeros_like(moments)
        # KL(q || p) <= -log min p for every law q on the same outcomes, and -dual is at most that where a q has the
        # moments: a dual below is a proof that none has
        floor = torch.where(possible, log_p, 0.0).amin(-1).mean() - 1e-6
        lam, value = goal, _dual(log_p, phi, goal)
        for _ in range(iterations):
            law = (log_p + phi @ lam).softmax(-1)
            mean = (law[..., None] * phi).sum(-2)
            gradient = mean.mean(0)
            if float(gradient.abs().max()) < tolerance:
                return lam / scale
            centred = phi - mean[..., None, :]
            hessian = torch.einsum("bo,boi,boj->ij", law, centred, centred) / len(law)
            hessian = hessian + 1e-14 * torch.eye(len(hessian), dtype=hessian.dtype)
            step = torch.linalg.lstsq(hessian, gradient[:, None], driver="gelsd").solution[:, 0]
            step = step * min(1.0, 8.0 / float(step.abs().max().clamp(min=1e-300)))
            size = 1.0
            slack = 1e-14 * (1 + float(value.abs()))  # at the minimum only rounding is left
            while (lower := _dual(log_p, phi, lam - size * step)) > value + slack and size > 1e-10:
                size /= 2
            lam, value = lam - size * step, lower
            if value < floor:
                break
        if value >= floor and float(gradient.abs().max()) < NEARLY:
            return lam / scale
    raise ValueError(
        f"moments={_shown(moments)}: nothing can meet them together, because no weighting of the outcomes has these "
        "means; change them, or draw more samples if the outcomes are samples"
    )


NEARLY = 1e-8  # of a feature's range: what rounding may leave of a moment that is met


def _dual(log_p: Tensor, phi: Tensor, lam: Tensor) -> Tensor:
    return torch.logsumexp(log_p + phi @ lam, -1).mean()


def _range(phi: Tensor, possible: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest mean that each feature can have, over the laws of the batch."""
    low = torch.where(possible[..., None], phi, torch.inf).amin(-2).mean(0)
    return low, torch.where(possible[..., None], phi, -torch.inf).amax(-2).mean(0)


def _check_range(phi: Tensor, possible: Tensor, moments: Tensor) -> None:
    low, high = _range(phi, possible)
    for place, (least, wanted, most) in enumerate(zip(low.tolist(), moments.tolist(), high.tolist(), strict=True)):
        if not least < wanted < most:
            at_end = wanted in (least, most)
            fix = (
                "only by giving up every outcome but the extreme ones: ask for those with a pointwise constraint"
                if at_end and least < most
                else "by nothing: change it, or draw more samples if the outcomes are samples"
            )
            raise ValueError(
                f"moments[{place}]={wanted:g} can be met {fix}; feature {place} of the outcomes runs from {least:g} "
                f"to {most:g}"
            )


def _shown(moments: Tensor) -> str:
    return "[" + ", ".join(f"{value:g}" for value in moments.tolist()) + "]"
