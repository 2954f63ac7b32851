"""Networks: (x [row, ...], sigma [row]) -> something of the shape of x, and the discriminator's logits."""

import copy
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


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


class Unet(nn.Module):
    """diffusers' UNet2DModel as a network of this package.

    Positional time embeddings get 250 log sigma, which spreads the levels over their range; "fourier" ones take the
    logarithm themselves and get sigma.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Float[Tensor, "row c h w"], sigma: Float[Tensor, "row"]) -> Float[Tensor, "row c h w"]:
        config: Any = self.unet.config
        level = sigma.to(x)
        return self.unet(x, level if config.time_embedding_type == "fourier" else 250 * level.log()).sample


def unet(path: str | None = None, **config: Any) -> nn.Module:
    """A diffusers UNet2DModel: loaded from a path or hub name, or new, with these settings.

    Raises:
        ImportError: diffusers is not installed.
    """
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError('a UNet2DModel needs diffusers: pip install "kullback[diffusion]"') from error
    made: Any = UNet2DModel.from_pretrained(path, use_safetensors=True) if path else UNet2DModel(**config)
    return made


def pretrained(path: str) -> nn.Module:
    """A teacher from a diffusers pipeline folder or hub name: its `unet` and its `scheduler`, as a denoiser.

    See `Scheduled` for the schedulers that fit.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f'teacher={path!r} needs diffusers: pip install "kullback[diffusion]"') from error
    from kullback.diffusion.noise import Scheduled

    config = diffusers.DDPMScheduler.load_config(path, subfolder="scheduler")
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    network = diffusers.UNet2DModel.from_pretrained(path, subfolder="unet", use_safetensors=True)
    return Scheduled(network, scheduler)


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
        return self.network(x * scale.reshape(-1, *[1] * (x.dim() - 1)), sigma)


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
