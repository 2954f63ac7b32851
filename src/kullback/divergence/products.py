"""The matrix products of a chunk of tokens with a head, written into memory that is already there.

On a CPU the logits are made a block of the head's rows at a time: in float32 by oneDNN, which torch otherwise keeps for
half precision, in half precision by `torch.mm`. Measured at 1,024 tokens, width 1,024 and 32,768 tokens of vocabulary
(AMD Zen 4, 2 threads, torch 2.13): 0.35 s against 0.43 to 0.50 s for `torch.mm` in float32; in bfloat16 0.19 against
0.21 s for logits and 0.20 against 0.26 s for the head's gradient. oneDNN returns new memory, hence blocks: small enough
that the allocator hands out the same pages again, and that the copy finds them in the cache. The gradient products stay
with `torch.mm` in float32: oneDNN wants the logit gradient transposed, and that takes what it gains.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**21  # entries of the product of one block on a CPU: 8 MiB in float32
BLOCK_ELSEWHERE = 2**24  # where one launch has to keep a whole device busy


def logits(hidden: Tensor, head: Tensor, out: Tensor) -> Tensor:
    """hidden @ head.T [tokens, vocab] into `out`, whose dtype may be wider; returns it."""
    one_dnn = has_one_dnn(hidden, out)
    if hidden.dtype == out.dtype and not one_dnn:
        return torch.mm(hidden, head.t(), out=out)
    hidden = hidden.contiguous()
    for at in _blocks(len(head), len(hidden), hidden.device):
        rows = head[at]
        if one_dnn:
            out[:, at] = torch.ops.mkldnn._linear_pointwise(hidden, rows.contiguous(), None, "none", [], "")
        else:
            out[:, at] = torch.mm(hidden, rows.t())
    return out


def times_head(grad: Tensor, head: Tensor, out: Tensor) -> None:
    """grad @ head [tokens, width] into `out`, in the dtype of the head."""
    if grad.dtype == head.dtype:
        torch.mm(grad, head, out=out)
        return
    # one product per token sums over the whole vocabulary in float32: rows can be split, columns could not
    for at in _blocks(len(grad), grad.shape[1] // 8, grad.device):
        torch.mm(grad[at].to(head.dtype), head, out=out[at])


def add_outer(grad: Tensor, hidden: Tensor, out: Tensor, *, first: bool) -> None:
    """out += grad.T @ hidden [vocab, width]; `first` writes instead. The product in the dtype of `hidden`."""
    if grad.dtype == hidden.dtype:
        torch.mm(grad.t(), hidden, out=out) if first else out.addmm_(grad.t(), hidden)
        return
    for at in _blocks(len(out), max(grad.shape[0], out.shape[1]), grad.device):
        product = torch.mm(grad[:, at].to(hidden.dtype).t(), hidden)
        out[at].copy_(product) if first else out[at].add_(product)


def has_one_dnn(hidden: Tensor, out: Tensor) -> bool:
    """Whether oneDNN makes these logits; where not, `torch.mm` does, with the same numbers up to rounding."""
    return (
        hidden.device.type == "cpu"
        and hidden.dtype == out.dtype == torch.float32
        and out.numel() > 0
        and hidden.numel() > 0
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _blocks(count: int, other: int, device: torch.device) -> Iterator[slice]:
    """Slices of `count` rows, each about a block when it meets `other` columns."""
    step = max(64, (BLOCK if device.type == "cpu" else BLOCK_ELSEWHERE) // max(other, 1))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
