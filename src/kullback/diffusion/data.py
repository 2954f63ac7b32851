"""What a teacher is trained on and a discriminator takes for real: mixtures in the plane, digits, folders of images."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kullback.diffusion.noise import expand

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class Data(Protocol):
    """Samples of one shape, without the row axis: (2,) or (channels, height, width)."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def deviation(self) -> float:
        """The standard deviation over all coordinates, EDM's sigma_data."""
        ...

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "row *shape"]: ...


@final
class Mixture(nn.Module):
    """Round Gaussians in any dimension, with the exact score at every noise level; it is its own perfect teacher.

    Args:
        shares [k]: positive; they are divided by their sum.
        means [k, d].
        deviations [k]: one for all coordinates of a component.
    """

    shares: Tensor
    means: Tensor
    deviations: Tensor

    def __init__(self, shares: Tensor, means: Tensor, deviations: Tensor) -> None:
        super().__init__()
        if means.dim() != 2 or shares.shape != means.shape[:1] or deviations.shape != shares.shape:
            raise ValueError(
                f"mixture: shares {tuple(shares.shape)}, means {tuple(means.shape)} and deviations "
                f"{tuple(deviations.shape)} must be [k], [k, d] and [k]"
            )
        if not (shares > 0).all() or not (deviations > 0).all():
            raise ValueError("mixture: shares and deviations must be positive")
        self.register_buffer("shares", shares / shares.sum())
        self.register_buffer("means", means)
        self.register_buffer("deviations", deviations)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.means.shape[1],)

    @property
    def deviation(self) -> float:
        center = self.shares @ self.means
        spread = self.shares @ (self.deviations[:, None] ** 2 + (self.means - center) ** 2)
        return float(spread.mean().sqrt())

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "row d"]:
        which = torch.multinomial(self.shares, count, replacement=True, generator=generator)
        noise = torch.randn(count, *self.shape, generator=generator).to(self.means)
        return self.means[which] + self.deviations[which][:, None] * noise

    def _parts(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Joint log-densities [row, k] and variances [row, k] at noise level sigma."""
        variance = self.deviations.to(x) ** 2 + sigma.to(x)[:, None] ** 2
        distance = ((x[:, None] - self.means.to(x)) ** 2).sum(-1)
        density = -distance / (2 * variance) - self.means.shape[1] / 2 * torch.log(2 * torch.pi * variance)
        return self.shares.to(x).log() + density, variance

    def log_prob(self, x: Float[Tensor, "row d"], sigma: Float[Tensor, "row"]) -> Float[Tensor, "row"]:
        return torch.logsumexp(self._parts(x, sigma)[0], 1)

    def score(self, x: Float[Tensor, "row d"], sigma: Float[Tensor, "row"]) -> Float[Tensor, "row d"]:
        joint, variance = self._parts(x, sigma)
        share = joint.softmax(1) / variance
        return share @ self.means.to(x) - share.sum(1, keepdim=True) * x

    def forward(self, x: Float[Tensor, "row d"], sigma: Float[Tensor, "row"]) -> Float[Tensor, "row d"]:
        """E[x0 | x], as a teacher answers: x + sigma^2 score."""
        return x + expand(sigma, x) ** 2 * self.score(x, sigma)


def two_modes() -> Mixture:
    """70 % at (-2, 0) and 30 % at (2, 0), standard deviation 0.5."""
    return Mixture(torch.tensor([0.7, 0.3]), torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), torch.tensor([0.5, 0.5]))


def ring(modes: int = 8, radius: float = 2.0, deviation: float = 0.25) -> Mixture:
    """Equal Gaussians on a circle."""
    angle = torch.arange(modes) * (2 * torch.pi / modes)
    return Mixture(
        torch.ones(modes), radius * torch.stack([angle.cos(), angle.sin()], 1), torch.full((modes,), deviation)
    )


@final
@dataclass(frozen=True, eq=False)
class Images:
    """Images in memory, values in [-1, 1]: [image, channels, height, width]."""

    images: Float[Tensor, "image channels height width"]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    @property
    def deviation(self) -> float:
        return float(self.images.std())

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "row channels height width"]:
        return self.images[torch.randint(len(self.images), (count,), generator=generator)]


def digits() -> Images:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, which come with the package."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('data="digits" needs scikit-learn: pip install "kullback[diffusion]"') from error
    return Images(torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1)


def folder(path: str | Path) -> Images:
    """All images of a folder and its subfolders, in order of their names; grey ones stay grey if all are.

    Raises:
        ValueError: no images there, a file that is not readable as one, or images of several sizes.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    files = sorted(file for file in Path(path).rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"data={path}: no images there ({', '.join(SUFFIXES)})")
    sizes: Counter[tuple[int, int]] = Counter()
    first: dict[tuple[int, int], Path] = {}
    modes = set()
    for file in files:  # headers only, so that a mistake shows before all pixels are read
        try:
            with Image.open(file) as image:
                sizes[image.size] += 1
                first.setdefault(image.size, file)
                modes.add(image.mode)
        except UnidentifiedImageError as error:
            raise ValueError(f"data={path}: {file.name} is not an image; remove it") from error
    if len(sizes) > 1:
        (usual, count), (other, _), *_ = sizes.most_common()
        raise ValueError(
            f"data={path}: images must be of one size, but {count} of {len(files)} are {usual[0]}x{usual[1]} and "
            f"{first[other].name} is {other[0]}x{other[1]}; resize or crop them first"
        )
    mode = "L" if modes <= {"L", "1"} else "RGB"
    arrays = []
    for file in files:
        with Image.open(file) as image:
            arrays.append(np.asarray(image.convert(mode), dtype=np.float32))
    pixels = torch.from_numpy(np.stack(arrays)) / 127.5 - 1
    return Images(pixels[:, None] if mode == "L" else pixels.permute(0, 3, 1, 2).contiguous())


NAMED: dict[str, Callable[[], Data]] = {"two_modes": two_modes, "ring": ring, "digits": digits}


def load(data: str | Path | Data) -> Data:
    """A name ("two_modes", "ring", "digits"), a folder of images, or a `Data` as it is.

    Raises:
        ValueError: neither.
    """
    if not isinstance(data, str | Path):
        return data
    if str(data) in NAMED:
        return NAMED[str(data)]()
    if Path(data).is_dir():
        return folder(data)
    raise ValueError(f"data={str(data)!r} is neither one of {', '.join(NAMED)} nor a folder of images")
