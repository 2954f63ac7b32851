"""One addend of an objective, and how it is averaged.

    loss = sum over terms of  coefficient * numerator / denominator

The numerator is summed over micro-batches, the denominator is counted once for the whole optimiser step, over all
micro-batches and ranks, before the first backward pass. So how a step is cut into pieces cannot change its gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Mean = Literal["token", "row", "row_sum", "weight"]

MEANS: dict[Mean, str] = {
    "token": "mean over {over} of the step",
    "row": "mean over rows of each row's mean over {over} of the step",
    "row_sum": "mean over rows of each row's sum over {over} of the step",
    "weight": "mean over {over} of the step, weighted by {weight}",
}


@dataclass(frozen=True)
class Term:
    """coefficient * mean over `over` of (weight * value).

    Args:
        name: what the metrics call it.
        value: one number per token or per row, with gradient.
        weight: a column of detached multipliers, per token or per row; None counts every position once.
        over: the mask column that is averaged over.
        mean: "token" divides by the positions counted; "row" averages each row first; "row_sum" sums each row and
            averages the rows; "weight" divides by the sum of the weights. None takes the method's `aggregate`.
        coefficient: multiplies the mean.
        says: the term in words: direction, scale, support, route.
        shown: what the metrics show in its place, where the value is only a surrogate with the right gradient.
        seen: more that the metrics show, as plain means over `over`, such as the share of clipped ratios.
        seen_over: another mask for `seen`, where that says nothing about most of what `over` counts.
    """

    name: str
    value: Float[Tensor, "row completion"] | Float[Tensor, "row"]
    weight: str | None = None
    over: str = "scored"
    mean: Mean | None = None
    coefficient: float = 1.0
    says: str = ""
    shown: Tensor | None = None
    seen: Mapping[str, Tensor] = field(default_factory=dict)
    seen_over: str | None = None

    @property
    def key(self) -> tuple[str, Mean | None, str | None]:
        """What its denominator depends on."""
        return (self.over, self.mean, self.weight)

    @property
    def averaged(self) -> str:
        """How it is averaged, in words.

        Raises:
            ValueError: `mean` is left to the method.
        """
        if self.mean is None:
            raise ValueError(f"term {self.name!r} has no mean of its own; put the method's aggregate in its place")
        mean, over = self.mean, f"{self.over} tokens"
        if self.value.dim() == 1:  # one number a row: nothing to average within it
            mean, over = "weight" if mean == "weight" else "token", self.over
        times = f", each times {self.weight}" if self.weight is not None and self.mean != "weight" else ""
        return MEANS[mean].format(over=over, weight=self.weight) + times


def multipliers(
    columns: Mapping[str, Tensor], over: str, mean: Mean | None, weight: str | None
) -> tuple[Float[Tensor, "..."], Bool[Tensor, "..."]]:
    """What each value is multiplied by before the sum, and which positions are in it.

    A row mean needs the whole row, which is always in one micro-batch: its own length is divided out here.
    """
    mask = columns[over].bool()
    weights = mask.float()
    if weight is not None:
        given = columns[weight]
        if mask.dim() == 2 and given.shape == mask.shape[:1]:  # one number per row
            given = given[:, None].expand_as(mask)
        if given.shape != mask.shape:
            raise ValueError(f"weight={weight!r} has shape {tuple(given.shape)}, but over={over!r} {tuple(mask.shape)}")
        weights = torch.where(mask, given.float(), 0.0)
    if mean == "row" and mask.dim() == 2:
        weights = weights / mask.sum(1, keepdim=True).clamp(min=1)
    return weights, mask


def denominator(columns: Mapping[str, Tensor], over: str, mean: Mean | None, weight: str | None) -> Float[Tensor, ""]:
    """This rank's share of a term's denominator, from the columns of the whole step."""
    mask = columns[over].bool()
    if mean == "weight":
        return multipliers(columns, over, mean, weight)[0].sum()
    if mean in ("row", "row_sum") and mask.dim() == 2:
        return mask.any(1).sum().float()
    return mask.sum().float()


def numerator(term: Term, columns: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """A micro-batch's share of a term, without its coefficient. What is masked takes no part, be it NaN."""
    weights, mask = multipliers(columns, term.over, term.mean, term.weight)
    if term.value.shape != mask.shape:
        raise ValueError(
            f"term {term.name!r}: value has shape {tuple(term.value.shape)}, "
            f"but over={term.over!r} has {tuple(mask.shape)}"
        )
    return (torch.where(mask, term.value, 0.0) * weights).sum()
