"""How much each token counts: pieces that methods combine into columns. All are detached and see the whole step."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def suffix_sum(values: Float[Tensor, "row completion"]) -> Float[Tensor, "row completion"]:
    """Entry t is the sum of entries t, t + 1, ... of its row."""
    return values.flip(1).cumsum(1).flip(1)


def leave_one_out(values: Float[Tensor, "row *rest"], group: Int[Tensor, "row"]) -> Float[Tensor, "row *rest"]:
    """The mean of the other rows of a row's group; 0 where it is alone. Independent of the row, so a fair baseline."""
    _, index = torch.unique(group, return_inverse=True)
    shape = (int(index.max()) + 1, *values.shape[1:])
    total = torch.zeros(shape, dtype=values.dtype, device=values.device).index_add_(0, index, values)[index]
    others = torch.bincount(index)[index].to(values.dtype).view(-1, *[1] * (values.dim() - 1)) - 1
    return torch.where(others > 0, (total - values) / others.clamp(min=1), 0.0)
