"""Noise levels and the EDM preconditioning.

    x_t = x0 + sigma * eps          variance exploding: sigma is the noise level and the time
    x0(x, sigma) = c_skip x + c_out F(c_in x, sigma)

Source: Karras et al., arXiv 2206.00364, Table 1 (their "ours" column).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kullback.diffusion.by_name import from_diffusers

Draw = Literal["log_uniform", "edm"]
Spacing = Literal["log_sigma", "sigma"]


@dataclass(frozen=True)
class Noise:
    """Which noise levels are used.

    Args:
        low, high: the smallest and the largest sigma.
        draw: "log_uniform" in [low, high], or "edm": a uniform index into the grid of `steps` levels with `rho`.
    """

    low: float = 0.02
    high: float = 80.0
    draw: Draw = "edm"
    rho: float = 7.0
    steps: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high or self.steps < 2:
            raise ValueError(
                f"noise low={self.low:g}, high={self.high:g}, steps={self.steps}: needs 0 < low < high and 2 steps"
            )
        if self.draw not in ("log_uniform", "edm"):
            raise ValueError(f'noise draw={self.draw!r} is unknown; choose "log_uniform" or "edm"')

    def grid(self, steps: int | None = None) -> Float[Tensor, "steps"]:
        """From `high` down to `low`, evenly spaced in sigma^(1 / rho); float64."""
        share = torch.linspace(0, 1, steps or self.steps, dtype=torch.float64)
        ends = self.high ** (1 / self.rho), self.low ** (1 / self.rho)
        return (ends[0] + share * (ends[1] - ends[0])) ** self.rho

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "row"]:
        if self.draw == "edm":
            return self.grid()[torch.randint(self.steps, (count,), generator=generator)].float()
        share = torch.rand(count, generator=generator)
        return torch.exp(math.log(self.low) + share * math.log(self.high / self.low))

    def bins(self, sigma: Float[Tensor, "row"], count: int, spacing: Spacing = "log_sigma") -> Int[Tensor, "row"]:
        """Which of `count` bins of equal width, in log sigma or in sigma, each level lies in."""
        if spacing == "log_sigma":
            share = torch.log(sigma / self.low) / math.log(self.high / self.low)
        else:
            share = (sigma - self.low) / (self.high - self.low)
        return (share * count).long().clamp(0, count - 1)


def expand(sigma: Float[Tensor, "row"], like: Tensor) -> Tensor:
    """[row] -> [row, 1, ...], to multiply `like`."""
    return sigma.to(like).reshape(-1, *[1] * (like.dim() - 1))


class Denoiser(nn.Module):
    """A network with EDM preconditioning: (x [row, ...], sigma [row]) -> the expected x0, of the shape of x.

    Args:
        network: called as network(c_in * x, sigma); it chooses its own embedding of sigma.
        sigma_data: the standard deviation of the data.
    """

    def __init__(self, network: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"sigma_data={sigma_data}: the standard deviation of the data must be positive")
        self.network, self.sigma_data = network, sigma_data

    def forward(self, x: Float[Tensor, "row *shape"], sigma: Float[Tensor, "row"]) -> Float[Tensor, "row *shape"]:
        level, data = expand(sigma, x), self.sigma_data
        total = (level**2 + data**2).sqrt()
        return (data / total) ** 2 * x + level * data / total * self.network(x / total, sigma)

    def loss_weight(self, sigma: Float[Tensor, "row"]) -> Float[Tensor, "row"]:
        """1 / sigma^2 + 1 / sigma_data^2: every level's loss starts at one."""
        return 1 / sigma**2 + 1 / self.sigma_data**2


class Scheduled(nn.Module):
    """A network trained with one of diffusers' schedulers, as a denoiser of this package.

    Such a network reads x_t = alpha x0 + s eps at a whole number t. With sigma = s / alpha that is alpha times our x,
    so it is called at the nearest t with alpha x, and its answer (noise, x0 or v) becomes x0.

    Args:
        network: a diffusers model whose output has `.sample`, or any module called as network(x, timestep).
        scheduler: one with `alphas_cumprod`, such as DDPMScheduler, or the name of its class in diffusers.

    Raises:
        ValueError: the scheduler has no `alphas_cumprod`, or an unknown prediction type.
    """

    alphas_cumprod: Tensor

    def __init__(self, network: nn.Module, scheduler: Any) -> None:
        super().__init__()
        if isinstance(scheduler, str):
            scheduler = from_diffusers(scheduler, "scheduler")()
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"scheduler={type(scheduler).__name__}: has no alphas_cumprod; use DDPMScheduler or DDIMScheduler"
            )
        self.predicts = scheduler.config.prediction_type
        if self.predicts not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f"scheduler prediction_type={self.predicts!r} is unknown here")
        self.network = network
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.clone(), persistent=False)

    @property
    def sigmas(self) -> Float[Tensor, "steps"]:
        """Our sigma of each of the scheduler's steps, rising."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    def loss_weight(self, sigma: Float[Tensor, "row"]) -> Float[Tensor, "row"]:
        """What turns the squared error of x0 into that of the network's own answer, as it was trained."""
        if self.predicts == "sample":
            return torch.ones_like(sigma)
        return sigma**-2 + (1.0 if self.predicts == "v_prediction" else 0.0)

    def forward(self, x: Float[Tensor, "row *shape"], sigma: Float[Tensor, "row"]) -> Float[Tensor, "row *shape"]:
        timestep = (self.sigmas.log()[None] - sigma.to(x).log()[:, None]).abs().argmin(1)
        level = expand(sigma, x)
        alpha = (1 + level**2).rsqrt()
        out = self.network(alpha * x, timestep)
        out = out.sample if hasattr(out, "sample") else out
        if self.predicts == "sample":
            return out
        if self.predicts == "epsilon":
            return x - level * out
        return alpha * (alpha * x) - alpha * level * out  # v = alpha eps - s x0 with s = alpha sigma
