"""How far apart the distributions of whole completions are, and how far one has shrunk, from one sampler's draws.

Every function returns one number per row whose mean over rows of the sampler is the quantity in its name; all arguments
are detached log-probabilities of whole completions, [row], in nats.
"""

import math
from collections import Counter

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import FDivergence
from kullback.lm.rollout import Rollout


def forward_kl(
    log_p: Float[Tensor, "row"], model: Float[Tensor, "row"], sampler: Float[Tensor, "row"]
) -> Float[Tensor, "row"]:
    """KL(p || model) = E_sampler[ p / sampler log(p / model) ]; 0 where p is."""
    weight = (log_p - sampler).exp()
    return torch.where(weight == 0, weight, weight * torch.where(weight == 0, 0.0, log_p - model))


def to_target(
    D: FDivergence,
    log_p: Float[Tensor, "row"],
    student: Float[Tensor, "row"],
    sampler: Float[Tensor, "row"],
    *,
    p_can_be_zero: bool,
) -> dict[str, Float[Tensor, "row"]]:
    """From a target p to the student: D itself, forward KL, total variation, and reverse KL where it can be finite.

    Args:
        log_p: nan where it is unknown, and there so is the result.
    """
    unknown, weight = log_p.isnan(), (student - sampler).exp()
    found = {
        "divergence": weight * D.value(torch.where(unknown, 0.0, log_p - student)),
        "target_forward_kl": forward_kl(log_p, student, sampler),
        "target_tv": 0.5 * (weight - (log_p - sampler).exp()).abs(),
    }
    if not p_can_be_zero:
        found["target_reverse_kl"] = weight * (student - log_p)
    return {name: torch.where(unknown, torch.nan, values) for name, values in found.items()}


def agreements(rollout: Rollout) -> Float[Tensor, "row"]:
    """The share of its group's other rows that say the same; nan where a row is alone."""
    ids, lengths, groups = rollout.completions.tolist(), rollout.lengths.tolist(), rollout.group.tolist()
    texts = [(group, *row[:length]) for group, row, length in zip(groups, ids, lengths, strict=True)]
    same, sizes = Counter(texts), Counter(groups)
    shares = [
        (same[text] - 1) / (sizes[group] - 1) if sizes[group] > 1 else math.nan
        for text, group in zip(texts, groups, strict=True)
    ]
    return torch.tensor(shares, dtype=torch.float64)
