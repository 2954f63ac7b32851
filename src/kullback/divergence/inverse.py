"""The link turned round: the log_ratio at which a decreasing link takes a given value."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kullback.divergence.curves import FDivergence

MAX_ITERATIONS = 200


def solve_link(divergence: FDivergence, g: Tensor) -> Tensor:
    """log_ratio with link(log_ratio) = g, by Newton's method kept inside a bracket; differentiable: d/dg = -1 / h.

    Where the link jumps over g (tv between -1/2 and 1/2) the position of the jump is returned.
    """
    with torch.no_grad():
        root = _solve(divergence, g.detach().double())
    if not (torch.is_grad_enabled() and g.requires_grad):
        return root.to(g.dtype)
    slope = divergence.curvature(root.detach())
    step = torch.where(torch.isfinite(root) & (slope > 0), -1 / slope, torch.zeros_like(slope))
    return root.to(g.dtype) + step.to(g.dtype) * (g - g.detach())


def _solve(divergence: FDivergence, goal: Tensor) -> Tensor:
    above, below = goal >= divergence.link_at_zero, goal <= divergence.link_at_infinity
    inside = ~(above | below | goal.isnan())
    safe = torch.where(inside, goal, torch.zeros_like(goal))

    side = -torch.sign(safe)  # the link falls: a negative g lies at positive log_ratio
    near, far = torch.zeros_like(safe), side.clone()
    for _ in range(MAX_ITERATIONS):  # double until the far end is beyond the goal
        short = ((divergence.link(far) - safe) * side > 0) & (side != 0)
        if not short.any():
            break
        near, far = torch.where(short, far, near), torch.where(short, 2 * far, far)
    low, high = torch.minimum(near, far), torch.maximum(near, far)

    x = (low + high) / 2
    for _ in range(MAX_ITERATIONS):
        excess = divergence.link(x) - safe
        low, high = torch.where(excess > 0, x, low), torch.where(excess > 0, high, x)  # link too high: go right
        newton = x + excess / divergence.curvature(x)
        usable = torch.isfinite(newton) & (newton > low) & (newton < high)
        following = torch.where(usable, newton, (low + high) / 2)
        following = torch.where(excess == 0, x, following)
        if bool(((following - x).abs() <= 1e-15 * x.abs()).all()):
            x = following
            break
        x = following

    x = torch.where(above, torch.full_like(x, -torch.inf), torch.where(below, torch.full_like(x, torch.inf), x))
    return torch.where(goal.isnan(), goal, x)
