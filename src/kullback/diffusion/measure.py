"""How good a generator's samples are: modes covered, share of the data reached, and the energy distance."""

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.diffusion.data import Mixture


def modes(samples: Float[Tensor, "n d"], mixture: Mixture, radius: float = 3.0) -> tuple[int, float]:
    """(modes covered, share of samples near one). Near: within `radius` standard deviations of the closest mean.

    A mode is covered where at least a tenth of its share of all samples lies near it.
    """
    distance, which = torch.cdist(samples, mixture.means.to(samples)).min(1)
    near = distance < radius * mixture.deviations.to(samples)[which]
    seen = torch.bincount(which[near], minlength=len(mixture.means)) / len(samples)
    return int((seen >= 0.1 * mixture.shares.to(seen)).sum()), near.float().mean().item()


def energy_distance(x: Float[Tensor, "n *shape"], y: Float[Tensor, "m *shape"]) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, without bias: 0 for equal laws, and below it by chance.

    Source: Szekely and Rizzo, Journal of Statistical Planning and Inference 143(8), 2013.
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()
    within = [torch.cdist(part, part).sum() / (len(part) * (len(part) - 1)) for part in (x, y)]
    return (2 * torch.cdist(x, y).mean() - within[0] - within[1]).item()


def coverage(data: Float[Tensor, "n *shape"], samples: Float[Tensor, "m *shape"], neighbours: int = 5) -> float:
    """Share of the data that has a sample within the distance to its own `neighbours`-th nearest datum.

    Source: Naeem et al., arXiv 2002.09797, equation 7. Raises ValueError without that many other data.
    """
    if len(data) <= neighbours:
        raise ValueError(f"coverage: {len(data)} data have no {neighbours}-th neighbour; give more data")
    data, samples = data.flatten(1), samples.flatten(1)
    reach = torch.cdist(data, data).kthvalue(neighbours + 1, dim=1).values  # + 1: the nearest is the datum itself
    return (torch.cdist(data, samples).min(1).values <= reach).float().mean().item()
