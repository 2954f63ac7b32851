"""A teacher: trained as EDM does it, or loaded, or a mixture whose score is known. And how it draws samples."""

import itertools
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kullback.diffusion.data import Data
from kullback.diffusion.noise import Denoiser, Noise, Scheduled, expand
from kullback.run.learner import Player
from kullback.run.seeds import generator
from kullback.run.terms import Term


class Teacher(Protocol):
    """(x_t, sigma) -> E[x0 | x_t]. The score is (answer - x_t) / sigma^2."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor: ...


class DenoiserTraining:
    """Trains a denoiser on data: the weighted squared error of EDM, with levels log-normal as there.

    Source: Karras et al., arXiv 2206.00364, equation 2 and Table 1: log sigma ~ N(-1.2, 1.2^2).

    Args:
        ema: share of the old average kept at each step; `average` is what to use as teacher.
    """

    def __init__(
        self,
        denoiser: Denoiser | Scheduled,
        data: Data,
        *,
        batch: int = 256,
        learning_rate: float = 1e-3,
        ema: float = 0.999,
        seed: int = 0,
        levels: tuple[float, float] = (-1.2, 1.2),
    ) -> None:
        import copy

        self.denoiser, self.data, self.batch, self.seed, self.levels = denoiser, data, batch, seed, levels
        self.learning_rate, self.ema = learning_rate, ema
        self.average = copy.deepcopy(denoiser)

    def players(self) -> Mapping[str, Player]:
        return {
            "teacher": Player(self.denoiser, self.learning_rate, self.learning_rate / 10),
            "average": Player(self.average),
        }

    def moves(self, step: int) -> tuple[str, ...]:
        return ("teacher",)

    def draw(self, step: int) -> dict[str, Tensor]:
        g = generator(self.seed, "teacher", step)
        x = self.data.sample(self.batch, g)
        return {
            "x": x,
            "noise": torch.randn(x.shape, generator=g),
            "sigma": torch.exp(self.levels[0] + self.levels[1] * torch.randn(self.batch, generator=g)),
        }

    def terms(self, batch: Any, step: int) -> list[Term]:
        x, sigma = batch["x"], batch["sigma"]
        answer = self.denoiser(x + expand(sigma, x) * batch["noise"], sigma)
        error = self.denoiser.loss_weight(sigma) * (answer - x).square().flatten(1).mean(1)
        return [Term("denoise", error)]

    def after(self, step: int) -> None:
        follow(self.average, self.denoiser, min(self.ema, (step + 1) / (step + 10)))


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, keep: float) -> None:
    """average <- keep * average + (1 - keep) * module, parameter by parameter; buffers are copied."""
    for old, new in zip(average.parameters(), module.parameters(), strict=True):
        old.lerp_(new.to(old), 1 - keep)
    for kept, fresh in zip(average.buffers(), module.buffers(), strict=True):
        kept.copy_(fresh)


@torch.no_grad()
def sample(
    teacher: Teacher, count: int, shape: tuple[int, ...], noise: Noise, *, steps: int = 18, seed: int = 0
) -> Float[Tensor, "row *shape"]:
    """EDM's deterministic sampler (Heun), `steps` levels of the grid and then 0: 2 steps - 1 calls.

    Source: Karras et al., arXiv 2206.00364, Algorithm 1.
    """
    levels = [*noise.grid(steps).tolist(), 0.0]
    x = levels[0] * torch.randn(count, *shape, generator=generator(seed, "teacher samples"))
    for now, then in itertools.pairwise(levels):
        slope = (x - teacher(x, torch.full((count,), now))) / now
        ahead = x + (then - now) * slope
        if then > 0:
            slope = (slope + (ahead - teacher(ahead, torch.full((count,), then))) / then) / 2
            ahead = x + (then - now) * slope
        x = ahead
    return x
