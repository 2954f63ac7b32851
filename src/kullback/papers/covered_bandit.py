"""A bandit of which pairs see a part, for paper 39: DPO and chi-PO with and without a clip, trained alike.

101 actions; the reference gives action 0 one half and shares the rest alike. Action 0 has reward 1, the others less
than one half. Rare actions are in few pairs or in none.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kullback.divergence import divergence
from kullback.estimate import expectation
from kullback.lm.preferences import OUTERS, score
from kullback.run.seeds import generator
from kullback.theory import tabular

ACTIONS, MAX_REWARD = 101, 1.0
COEFFICIENTS = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0)
PAIRS = (100, 400, 1600)
METHODS: dict[str, tuple[str, float | None]] = {  # divergence, clip
    "DPO": ("reverse_kl", None),
    "DPO, clipped": ("reverse_kl", MAX_REWARD),
    "chi-PO": ("chi2_kl", MAX_REWARD),
    "chi-PO, no clip": ("chi2_kl", None),
}
WATCHED = (0, 10, 30, 100, 300, 1000, 4000)
CHI2 = divergence("alpha(-1)")  # 1/2 sum (model - reference)^2 / reference


@dataclass(frozen=True)
class Runs:
    """One method on data of one size.

    Args:
        reward: expected reward by step, coefficient and seed.
        chi2: D_chi2(policy || reference) at the end, nats; the coverage of a policy is 1 + 2 D_chi2.
        clipped: share of pairs that the clip cuts at the end, on the right side and on the wrong one.
    """

    steps: list[int]
    reward: Float[Tensor, "step coefficient seed"]
    chi2: Float[Tensor, "coefficient seed"]
    clipped: Float[Tensor, "side coefficient"]

    @property
    def end(self) -> Float[Tensor, "coefficient seed"]:
        return self.reward[-1]

    def best(self) -> tuple[float, list[float]]:
        """The coefficient with the highest mean reward at the end, and its rewards by seed."""
        place = int(self.end.mean(1).argmax())
        return COEFFICIENTS[place], self.end[place].tolist()


def reference_policy() -> Float[Tensor, "action"]:
    """Half of the mass on action 0, the rest shared alike; log-probabilities."""
    p = torch.full((ACTIONS,), 0.5 / (ACTIONS - 1), dtype=torch.float64)
    p[0] = 0.5
    return p.log()


def rewards(seed: int) -> Float[Tensor, "action"]:
    """1 for action 0, uniform in [0, 0.5] for the others."""
    found = 0.5 * torch.rand(ACTIONS, generator=generator(seed, "reward"), dtype=torch.float64)
    found[0] = 1.0
    return found


def sample_pairs(seed: int, pairs: int) -> Int[Tensor, "pair 2"]:
    """(preferred, other): two different actions of the reference, labelled by Bradley-Terry."""
    draw, found = generator(seed, "pairs", pairs), torch.empty(0, 2, dtype=torch.long)
    while len(found) < pairs:
        both = torch.multinomial(reference_policy().exp(), 4 * pairs, replacement=True, generator=draw).view(-1, 2)
        found = torch.cat([found, both[both[:, 0] != both[:, 1]]])
    found = found[:pairs]
    reward = rewards(seed)[found]
    flip = torch.rand(pairs, generator=draw, dtype=torch.float64) > torch.sigmoid(reward[:, 0] - reward[:, 1])
    return torch.where(flip[:, None], found.flip(1), found)


def unseen_actions(seed: int, pairs: int) -> int:
    """Actions that no pair contains: the loss says nothing about them."""
    return ACTIONS - len(sample_pairs(seed, pairs).unique())


def train(name: str, pairs: int, steps: int, seeds: int) -> Runs:
    """Softmax policies from the reference, full-batch Adam at 0.02, all coefficients and seeds side by side."""
    which, clip = METHODS[name]
    D, reference = divergence(which), reference_policy()
    data = torch.stack([sample_pairs(seed, pairs) for seed in range(seeds)])
    reward = torch.stack([rewards(seed) for seed in range(seeds)])
    coefficient = torch.tensor(COEFFICIENTS, dtype=torch.float64)[:, None, None]
    index = data.flatten(1).expand(len(COEFFICIENTS), -1, -1)

    def margins(policy: Tensor) -> Float[Tensor, "coefficient seed pair"]:
        seen = score(D, policy - reference).gather(-1, index).unflatten(-1, (pairs, 2))
        return coefficient * (seen[..., 0] - seen[..., 1])

    def loss(policy: Tensor) -> Tensor:
        margin = margins(policy)
        margin = margin if clip is None else margin.clamp(-2 * clip, 2 * clip)
        return OUTERS["logistic"](margin, 1.0).mean(-1)

    watched = [step for step in WATCHED if step < steps] + [steps]
    path: list[Tensor] = []

    def watch(step: int, policy: Tensor) -> None:
        if step in watched:
            path.append(expectation(policy, reward))

    start = reference.expand(len(COEFFICIENTS), seeds, ACTIONS)
    policy = tabular.descend(loss, start, steps=steps, learning_rate=0.02, watch=watch)
    margin, bound = margins(policy), 2 * MAX_REWARD
    clipped = torch.stack([(margin > bound).double().mean((1, 2)), (margin < -bound).double().mean((1, 2))])
    return Runs(watched, torch.stack(path), CHI2.from_log_probs(reference, policy), clipped)
