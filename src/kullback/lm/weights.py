"""How much each token counts: pieces that methods combine into columns. All are detached and see the whole step."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def suffix_sum(values: Float[Tensor, "row completion"]) -> Float[Tensor, "row completion"]:
    """Entry t is the sum of entries t, t + 1, ... of its row."""
    return values.flip(1).cumsum(1).flip(1)


def leave_one_out(values: Float[Tensor, "row *rest"], group: Int[Tensor, "row"]) -> Float[Tensor, "row *rest"]:
    """The mean of the other rows of a row's group. Independent of the row, so a fair baseline.

    nan is in no mean; 0 where no other row has a value.
    """
    _, index = torch.unique(group, return_inverse=True)
    known = ~values.isnan()

    def others(each: Tensor) -> Tensor:
        shape = (int(index.max()) + 1, *each.shape[1:])
        return torch.zeros(shape, dtype=each.dtype, device=each.device).index_add_(0, index, each)[index] - each

    count = others(known.to(values.dtype))
    return torch.where(count > 0, others(torch.where(known, values, 0.0)) / count.clamp(min=1), 0.0)
