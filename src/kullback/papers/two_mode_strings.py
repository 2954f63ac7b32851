"""Strings of four tokens with two modes, for paper 09: a student that can only hold one, and exact prefixes.

A teacher puts 0.55 on one string and 0.40 on another; the student's tokens are independent. Who writes the prefixes and
which way the KL points are summed over all strings, so nothing is sampled.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kullback.divergence import FDivergence, divergence

Prefix = Literal["teacher", "student"]
SYMBOLS, LENGTH, PROMPTS = 4, 4, 40


def two_modes(prompts: int, draw: torch.Generator) -> tuple[Float[Tensor, "prompt string"], Tensor]:
    """A teacher over all strings (0.55 on one, 0.40 on another, 0.05 spread evenly), and the right string of each "
    "prompt."""
    strings = SYMBOLS**LENGTH
    first = torch.randint(strings, (prompts,), generator=draw)
    second = (first + torch.randint(1, strings, (prompts,), generator=draw)) % strings  # another one
    teacher = torch.full((prompts, strings), 0.05 / strings, dtype=torch.float64)
    rows = torch.arange(prompts)
    teacher[rows, first] += 0.55
    teacher[rows, second] += 0.40
    right = torch.where(torch.arange(prompts) < round(0.75 * prompts), first, second)
    return teacher, right


def conditionals(
    strings: Float[Tensor, "prompt string"],
) -> tuple[Float[Tensor, "prompt prefix"], Float[Tensor, "prompt prefix symbol"]]:
    """P(prefix) and P(token | prefix) for all prefixes, the empty one first, from probabilities of whole strings."""
    joint = [strings.view(len(strings), SYMBOLS**t, SYMBOLS, -1).sum(-1) for t in range(LENGTH)]
    tokens = torch.cat(joint, 1)
    reach = tokens.sum(-1)
    return reach, tokens / reach[..., None]


def reach_of(logits: Float[Tensor, "prompt position symbol"]) -> list[Float[Tensor, "prompt prefix"]]:
    """P(prefix) for prefixes of 0, 1, ... tokens, whole strings last, under a student whose tokens are independent."""
    reach = [torch.ones(len(logits), 1, dtype=logits.dtype)]
    for t in range(logits.shape[1]):
        reach.append((reach[-1][..., None] * logits[:, t].softmax(-1)[:, None]).flatten(1))
    return reach


def tabular_cell(*, prefix: Prefix, weight: float, seeds: int, steps: int) -> dict[str, list[float]]:
    """Descend one cell to its end with exact prefix distributions; a number for each seed.

    The loss is summed over prompts and positions; no gradient flows through who visits a prefix.
    """
    from kullback.lm.methods.four_cells import FourCells

    D = divergence(FourCells(teacher="", prefix=prefix, reverse_weight=weight).divergence)
    drawn = [two_modes(PROMPTS, torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    teacher, right = torch.cat([one for one, _ in drawn]), torch.cat([one for _, one in drawn])
    visits, target = conditionals(teacher)
    target = target.log()
    position = torch.cat([torch.full((SYMBOLS**t,), t) for t in range(LENGTH)])
    logits = torch.zeros(len(teacher), LENGTH, SYMBOLS, dtype=torch.float64)
    for _ in range(steps):
        if prefix == "student":
            visits = torch.cat(reach_of(logits)[:-1], 1)
        logits = logits - cell_gradient(D, target, logits, visits, position)
    return _tabular_numbers(teacher, right, logits, seeds)


def cell_gradient(
    D: FDivergence,
    target: Float[Tensor, "prompt prefix symbol"],
    logits: Float[Tensor, "prompt position symbol"],
    visits: Float[Tensor, "prompt prefix"],
    position: Int[Tensor, "prefix"],
) -> Float[Tensor, "prompt position symbol"]:
    """Of sum over prefixes of visits * D(target, model), in closed form: at each prefix m (g - E_m g)."""
    log_model = logits.log_softmax(-1)[:, position]
    pull = D.weighted_link(target, log_model)
    pull = pull - log_model.exp() * pull.sum(-1, keepdim=True)
    return torch.zeros_like(logits).index_add_(1, position, visits[..., None] * pull)


def _tabular_numbers(teacher: Tensor, right: Tensor, logits: Tensor, seeds: int) -> dict[str, list[float]]:
    student, rows = reach_of(logits)[-1], torch.arange(len(teacher))
    hit = student[rows, right]
    p = logits.softmax(-1)
    numbers = {
        "avg@1": hit,
        "pass@32": 1 - (1 - hit) ** 32,
        "entropy": -(p * p.log()).sum(-1).mean(-1),
        "KL(T||S)": (teacher * (teacher / student).log()).sum(-1),
        "KL(S||T)": (student * (student / teacher).log()).sum(-1),
    }
    return {name: values.view(seeds, -1).mean(-1).tolist() for name, values in numbers.items()}
