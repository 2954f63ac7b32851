"""From prompts and completions to what a model reads, and back to one row per predicted token.

Row t of what a model returns holds the distribution of token t + 1. That shift is made here and nowhere else: token t
of a completion is predicted at input column `len(prompt) + t - 1`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Side = Literal["right", "left", "packed"]


@dataclass(frozen=True)
class Layout:
    """Inputs of one forward pass and where the scored tokens are predicted.

    Args:
        attention_mask: None for a packed row, whose borders are where `position_ids` start again.
        at: (row, column) of the hidden state that predicts each scored token, in the order of `scored.nonzero()`.
        tokens: those tokens.
        scored: which completion tokens they are.
    """

    input_ids: Int[Tensor, "batch length"]
    attention_mask: Int[Tensor, "batch length"] | None
    position_ids: Int[Tensor, "batch length"]
    at: tuple[Int[Tensor, "scored"], Int[Tensor, "scored"]]
    tokens: Int[Tensor, "scored"]
    scored: Bool[Tensor, "row completion"]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a Hugging Face causal language model."""
        named = {"input_ids": self.input_ids, "position_ids": self.position_ids}
        return named if self.attention_mask is None else {**named, "attention_mask": self.attention_mask}


def lay_out(
    prompts: list[list[int]],
    completions: Int[Tensor, "row completion"],
    scored: Bool[Tensor, "row completion"],
    lengths: Int[Tensor, "row"],
    *,
    side: Side = "right",
    pad_id: int = 0,
) -> Layout:
    """Join prompts and completions; the last token of each is not read, since nothing is predicted from it.

    `side` is where padding goes; "packed" puts all rows one after the other into a single one without padding.
    """
    device = completions.device
    rows = [
        prompt + completions[i, : int(lengths[i])].tolist()[:-1] for i, prompt in enumerate(prompts)
    ]  # the completion's last token predicts nothing
    widths = torch.tensor([len(row) for row in rows])
    width = int(widths.max())
    row_index, token_index = scored.nonzero(as_tuple=True)
    column = torch.tensor([len(prompt) for prompt in prompts], device=device)[row_index] + token_index - 1
    tokens = completions[row_index, token_index]

    if side == "packed":
        starts = (widths.cumsum(0) - widths).to(device)
        return Layout(
            input_ids=torch.tensor([[token for row in rows for token in row]], device=device),
            attention_mask=None,
            position_ids=torch.cat([torch.arange(len(row)) for row in rows])[None].to(device),
            at=(torch.zeros_like(row_index), starts[row_index] + column),
            tokens=tokens,
            scored=scored,
        )
    padding = [[pad_id] * (width - len(row)) for row in rows]
    left = side == "left"
    ids = torch.tensor([[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, padding, strict=True)])
    missing = width - widths if left else torch.zeros_like(widths)
    positions = torch.arange(width) - missing[:, None]
    real = (positions >= 0) & (positions < widths[:, None])
    column = column + missing.to(device)[row_index]
    positions = torch.where(real, positions, 0).to(device)
    return Layout(ids.to(device), real.long().to(device), positions, (row_index, column), tokens, scored)
