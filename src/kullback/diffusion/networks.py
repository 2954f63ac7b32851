"""Networks: (x [row, ...], sigma [row]) -> something of the shape of x, and the discriminator's logits."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kullback.diffusion.by_name import from_diffusers
from kullback.diffusion.noise import Denoiser, Scheduled, expand


class Mlp(nn.Module):
    """Two hidden layers (SiLU) on the flattened sample and (log sigma / 2, sin log sigma, cos log sigma).

    Args:
        shape: of one sample.
        out: numbers per row; None gives back the shape of the sample.
    """

    def __init__(self, shape: tuple[int, ...], width: int = 64, out: int | None = None) -> None:
        super().__init__()
        self.shape, self.out = shape, out
        size = math.prod(shape)
        self.layers = nn.Sequential(
            nn.Linear(size + 3, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, size if out is None else out),
        )

    def forward(self, x: Float[Tensor, "row *shape"], sigma: Float[Tensor, "row"]) -> Tensor:
        level = sigma.to(x).log()
        out = self.layers(torch.cat([x.flatten(1), torch.stack([level / 2, level.sin(), level.cos()], 1)], 1))
        return out.unflatten(1, self.shape) if self.out is None else out


class Affine(nn.Module):
    """x0 = A z + b on the flattened sample: a student that cannot be two modes, so it shows what a divergence keeps.

    Args:
        shape: of one sample.
        deviation: A starts as the identity times it.
        offset: where b starts, of the shape of a sample; 0 by default.
    """

    def __init__(self, shape: tuple[int, ...], deviation: float = 1.0, offset: Tensor | None = None) -> None:
        super().__init__()
        self.shape, size = shape, math.prod(shape)
        self.matrix = nn.Parameter(deviation * torch.eye(size))
        self.offset = nn.Parameter(torch.zeros(size) if offset is None else offset.flatten().clone())

    def forward(self, latent: Float[Tensor, "row *shape"]) -> Float[Tensor, "row *shape"]:
        return (latent.flatten(1) @ self.matrix.T + self.offset).unflatten(1, self.shape)


class Unet(nn.Module):
    """A network of diffusers that is called as network(x, timestep), such as UNet2DModel, as one of this package.

    Positional time embeddings get 250 log sigma, which spreads the levels over their range; "fourier" ones take the
    logarithm themselves and get sigma.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Float[Tensor, "row c h w"], sigma: Float[Tensor, "row"]) -> Float[Tensor, "row c h w"]:
        level, embedding = sigma.to(x), getattr(self.unet.config, "time_embedding_type", "positional")
        return self.unet(x, level if embedding == "fourier" else 250 * level.log()).sample


def new_denoiser(
    network: Mapping[str, Any] | str, scheduler: str | None, shape: tuple[int, ...], deviation: float, width: int
) -> nn.Module:
    """An untrained denoiser for samples of this shape.

    Args:
        network: "mlp"; or a network of diffusers for images, by the name of its class or as its settings with that
            name as "name". UNet2DModel, the default, is given channels, size and two small levels where the settings
            do not say otherwise.
        scheduler: whose noise and prediction type the network learns, by name; None is EDM's preconditioning.
        deviation: sigma_data.
        width: of the hidden layers; a UNet's two levels get a quarter and half of it.

    Raises:
        ValueError: an unknown name, or a network that does not take such samples.
    """
    if network == "mlp":
        if scheduler is not None:
            raise ValueError(f"scheduler={scheduler!r} needs a network of diffusers; set network, or leave it out")
        return Denoiser(Mlp(shape, width), deviation)
    settings = {"name": network} if isinstance(network, str) else dict(network)
    name = settings.pop("name", "UNet2DModel")
    if len(shape) != 3:
        raise ValueError(f'network={name!r} is for images, but a sample has shape {shape}; use network="mlp"')
    if name == "UNet2DModel":
        settings = _small_unet(shape, width) | settings
    made = from_diffusers(name)(**settings)
    denoiser = Denoiser(Unet(made), deviation) if scheduler is None else Scheduled(made, scheduler)
    check_denoiser(denoiser, shape, f"network={name!r}")
    return denoiser


def _small_unet(shape: tuple[int, ...], width: int) -> dict[str, Any]:
    channels, height, across = shape
    levels = [max(8, width // 4 // 8 * 8), max(8, width // 2 // 8 * 8)]
    return {
        "sample_size": [height, across],
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": levels,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    }


@torch.no_grad()
def check_denoiser(denoiser: Any, shape: tuple[int, ...], field: str) -> None:
    """Raises ValueError where (x [row, *shape], sigma [row]) does not give something finite of the shape of x."""
    x = torch.zeros(2, *shape)
    try:
        out = denoiser(x, torch.ones(2))
    except Exception as error:  # whatever a network of somebody else's raises
        raise ValueError(f"{field} does not take samples of shape {shape}: {error}") from error
    if out.shape != x.shape or not out.isfinite().all():
        raise ValueError(f"{field} gives {tuple(out.shape[1:])} for samples of shape {shape}, or no finite numbers")


def pretrained(path: str) -> nn.Module:
    """A teacher from a diffusers pipeline folder or hub name: its `unet` and its `scheduler`, as a denoiser.

    Both are of the classes that their own settings name. See `Scheduled` for the schedulers that fit.
    """
    read = from_diffusers("UNet2DModel").load_config(path, subfolder="unet")
    network = from_diffusers(read["_class_name"]).from_pretrained(path, subfolder="unet", use_safetensors=True)
    read = from_diffusers("DDPMScheduler", "scheduler").load_config(path, subfolder="scheduler")
    return Scheduled(network, from_diffusers(read["_class_name"], "scheduler").from_config(read))


class Discriminator(nn.Module):
    """Logits that are high for real samples at the same noise level: log(data / model) once trained.

    Args:
        network: (c_in x, sigma) -> [row, heads].
        sigma_data: scales the input as the denoiser's.
    """

    def __init__(self, network: nn.Module, sigma_data: float) -> None:
        super().__init__()
        self.network, self.sigma_data = network, sigma_data

    def forward(self, x: Float[Tensor, "row *shape"], sigma: Float[Tensor, "row"]) -> Float[Tensor, "row heads"]:
        scale = (sigma.to(x) ** 2 + self.sigma_data**2).rsqrt()
        return self.network(x * expand(scale, x), sigma)


class TeacherHead(nn.Module):
    """A discriminator that reads what a layer of the frozen teacher made of (x_t, sigma), as in the paper.

    The teacher is no child module: its weights are not saved and not trained here. Its features carry gradient to x,
    so a GAN term reaches the student through them.

    Args:
        teacher: called as teacher(x, sigma).
        layer: name of a submodule whose output [row, channels, ...] is read, such as "network.unet.mid_block".
        x, sigma: a few rows, to learn the number of channels.

    Raises:
        ValueError: the teacher has no such submodule.
    """

    def __init__(self, teacher: nn.Module, layer: str, x: Tensor, sigma: Tensor, width: int = 64) -> None:
        super().__init__()
        modules = dict(teacher.named_modules())
        if layer not in modules:
            raise ValueError(
                f"discriminator layer={layer!r}: the teacher has no such submodule; one is {[*modules][-1]!r}"
            )
        self._teacher = (teacher, modules[layer])
        with torch.no_grad():
            channels = self.features(x, sigma).shape[-1]
        self.head = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, 1))

    def features(self, x: Tensor, sigma: Tensor) -> Float[Tensor, "row place channels"]:
        teacher, layer = self._teacher
        seen: list[Tensor] = []
        handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            teacher(x, sigma)
        finally:
            handle.remove()
        return seen[0].flatten(2).transpose(1, 2) if seen[0].dim() > 2 else seen[0][:, None]

    def forward(self, x: Float[Tensor, "row *shape"], sigma: Float[Tensor, "row"]) -> Float[Tensor, "row heads"]:
        return self.head(self.features(x, sigma)).squeeze(-1)


class OneStep(nn.Module):
    """A denoiser as a one-step generator: G(z) = denoiser(sigma_max z, sigma_max). The denoiser is copied."""

    def __init__(self, denoiser: nn.Module, sigma_max: float) -> None:
        super().__init__()
        self.denoiser, self.sigma_max = copy.deepcopy(denoiser), sigma_max

    def forward(self, latent: Float[Tensor, "row *shape"]) -> Float[Tensor, "row *shape"]:
        return self.denoiser(self.sigma_max * latent, latent.new_full((len(latent),), self.sigma_max))
