"""A tabular policy with many right answers to each prompt, for paper 04: what does training on some do to the others?

A small network chooses one of 24 answers, 6 classes times 4 styles, from a prompt's random features; every style of the
right class is rewarded. Seeds are the first axis of every tensor: all of them train in one batch, and pass rates and
entropies are exact.
"""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import divergence

CLASSES, STYLES = 6, torch.tensor([0.4, 0.3, 0.2, 0.1])
PROMPTS, WIDTH = 128, 64


@dataclasses.dataclass(frozen=True)
class Arm:
    """How one arm of (a) trains.

    Args:
        held: the divergence on replayed answers, None for no replay.
        eta: its coefficient.
        centred: False is plain rehearsal.
        everything: rollouts on all prompts, not on the open ones alone.
        penalty: coefficient of a KL to the initial policy on the rollouts' prompts.
        exact: that KL is reverse KL over all answers; otherwise k3 of the samples as a loss.
    """

    held: str | None = None
    eta: float = 1.0
    centred: bool = True
    everything: bool = False
    penalty: float = 0.0
    exact: bool = True


TOY: dict[str, Arm] = {
    "GRPO, all prompts": Arm(everything=True),
    "eta = 0": Arm(),
    "forward KL": Arm("forward_kl"),
    "2 JSD": Arm("2*jsd(0.5)"),
    "alpha 0.2": Arm("alpha(0.2)"),
    "4 H^2": Arm("4*squared_hellinger"),
    "reverse KL": Arm("reverse_kl"),
    "NLL": Arm("forward_kl", centred=False),
    "penalty, reverse KL": Arm(everything=True, penalty=0.05),
    "penalty, k3 as released": Arm(everything=True, penalty=0.05, exact=False),
    "forward KL, eta 0.1": Arm("forward_kl", eta=0.1),
    "forward KL, eta 0.0125": Arm("forward_kl", eta=0.0125),
    "forward KL, eta 0.00125": Arm("forward_kl", eta=0.00125),
}
DPH = ("forward KL", "2 JSD", "alpha 0.2", "4 H^2", "reverse KL")


@dataclasses.dataclass
class World:
    """What the seeds' arms share. The first axis of every tensor is the seed."""

    features: Float[Tensor, "seed prompt 16"]
    weights: list[Tensor]  # of the initial policy
    right: Tensor  # class of each prompt
    wanted: Tensor  # the one style that the strict task accepts
    mastered: Tensor
    kept: Tensor  # replayed answers, -1 where the extra answer was wrong


def policy(weights: Sequence[Tensor], features: Float[Tensor, "seed row 16"]) -> Float[Tensor, "seed row 24"]:
    """Log-probabilities of the 24 answers, for every seed's network at once."""
    w1, b1, w2, b2 = weights
    return (torch.tanh(features @ w1 + b1) @ w2 + b2).log_softmax(-1)


def make_world(seeds: int, fit: int, *, first: int = 0) -> World:
    """Prompts, an initial policy fitted to a confidence for each, its mastered prompts and its kept answers."""
    parts = []
    for seed in range(first, first + seeds):
        draw = torch.Generator().manual_seed(seed)
        features = torch.randn(PROMPTS, 16, generator=draw)
        right = torch.randint(CLASSES, (PROMPTS,), generator=draw)
        sure = torch.rand(PROMPTS, generator=draw) < 0.4
        confidence = torch.where(sure, 0.97, 0.24 + 0.36 * torch.rand(PROMPTS, generator=draw))
        chance = torch.full((PROMPTS, CLASSES), 1.0) * ((1 - confidence) / CLASSES)[:, None]
        chance[torch.arange(PROMPTS), right] += confidence
        wanted = torch.multinomial(STYLES.expand(PROMPTS, -1), 1, generator=draw)[:, 0]
        weights = [
            torch.randn(16, WIDTH, generator=draw) / 4,
            torch.zeros(1, WIDTH),
            torch.randn(WIDTH, CLASSES * len(STYLES), generator=draw) / 8,
            torch.zeros(1, CLASSES * len(STYLES)),
        ]
        goal = (chance[:, :, None] * STYLES).flatten(1)
        parts.append((features, right, wanted, goal, *weights))
    features, right, wanted, goal, *weights = (torch.stack(part) for part in zip(*parts, strict=True))
    weights = [part.requires_grad_() for part in weights]
    optimiser = torch.optim.Adam(weights, lr=3e-3)
    for _ in range(fit):
        loss = -(goal * policy(weights, features)).sum(-1).mean(-1).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    weights = [part.detach() for part in weights]
    draw = torch.Generator().manual_seed(1000 + first)
    answers = torch.multinomial(policy(weights, features).exp().flatten(0, 1), 12, replacement=True, generator=draw)
    good = (answers // len(STYLES) == right.flatten()[:, None]).view(seeds, PROMPTS, 12)
    mastered = good[..., :8].all(-1)
    kept = torch.where(good[..., 8:] & mastered[..., None], answers.view(seeds, PROMPTS, 12)[..., 8:], -1)
    return World(features, weights, right, wanted, mastered, kept)


def train_toy(world: World, arm: Arm, steps: int, *, seed: int = 0) -> list[Tensor]:
    """600 Adam steps of 32 prompts, 8 answers each, and 64 kept answers; every mean by itself. Returns the weights."""
    seeds = len(world.features)
    draw = torch.Generator().manual_seed(seed)
    weights = [part.clone().requires_grad_() for part in world.weights]
    optimiser = torch.optim.Adam(weights, lr=3e-3)
    pool = torch.ones_like(world.mastered) if arm.everything else ~world.mastered
    rows = torch.arange(seeds)[:, None]
    initial = policy(world.weights, world.features)
    for _ in range(steps):
        asked = torch.multinomial(pool.float(), 32, generator=draw)
        log_p = policy(weights, world.features[rows, asked])
        drawn = torch.multinomial(log_p.detach().exp().flatten(0, 1), 8, replacement=True, generator=draw)
        drawn = drawn.view(seeds, 32, 8)
        reward = (drawn // len(STYLES) == world.right[rows, asked][..., None]).float()
        advantage = (reward - reward.mean(-1, keepdim=True)) / (reward.std(-1, keepdim=True) + 1e-6)
        written = log_p.gather(-1, drawn)
        loss = -(advantage * written).mean((1, 2))
        if arm.penalty:
            before = initial[rows, asked]
            if arm.exact:
                kl = divergence("reverse_kl").categorical(before.flatten(0, 1), log_p.flatten(0, 1)).view(seeds, 32)
                loss = loss + arm.penalty * kl.mean(1)
            else:
                ratio = before.gather(-1, drawn) - written
                loss = loss + arm.penalty * (ratio.exp() - 1 - ratio).mean((1, 2))
        if arm.held is not None:
            loss = loss + arm.eta * _replayed(world, weights, initial, arm, draw)
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()
    return [part.detach() for part in weights]


def _replayed(world: World, weights: list[Tensor], initial: Tensor, arm: Arm, draw: torch.Generator) -> Tensor:
    rows = torch.arange(len(world.kept))[:, None]
    picked = torch.multinomial((world.kept >= 0).flatten(1).float(), 64, replacement=True, generator=draw)
    prompt, answer = picked // world.kept.shape[-1], world.kept.flatten(1)[rows, picked]
    model = policy(weights, world.features[rows, prompt]).gather(-1, answer[..., None])[..., 0]
    target = initial[rows, prompt, answer]
    assert arm.held is not None
    D = divergence(arm.held)
    value = D.surrogate(target, model, drawn_from="target")
    if not arm.centred:
        value = value + D.plain_slope * (1 - (model - target).exp())
    return value.mean(1)


def measure_toy(world: World, weights: Sequence[Tensor]) -> dict[str, list[float]]:
    """Exact, per seed: accuracy, strict pass@16 and style entropy on mastered prompts, the first two on open ones."""
    p = policy(weights, world.features).exp().view(*world.right.shape, CLASSES, len(STYLES))
    rows, prompts = torch.arange(len(p))[:, None], torch.arange(PROMPTS)[None]
    accuracy = p[rows, prompts, world.right].sum(-1)
    strict = 1 - (1 - p[rows, prompts, world.right, world.wanted]) ** 16
    style = p.sum(-2)
    entropy = -(style * style.clamp_min(1e-30).log()).sum(-1)

    def mean(values: Tensor, mask: Tensor) -> list[float]:
        return ((values * mask).sum(1) / mask.sum(1)).tolist()

    held, rest = world.mastered, ~world.mastered
    return {
        "accuracy": mean(accuracy, held),
        "strict": mean(strict, held),
        "entropy": mean(entropy, held),
        "open accuracy": mean(accuracy, rest),
        "open strict": mean(strict, rest),
    }


def run_toy(*, names: Sequence[str], seeds: int, fit: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """Several arms of one world; "initial" is where they start."""
    world = make_world(seeds, fit)
    found = {"initial": measure_toy(world, world.weights)}
    return found | {name: measure_toy(world, train_toy(world, TOY[name], steps)) for name in names}
