"""Value and logit gradient of rows of logits on a GPU: one Triton program per row, three passes over it.

    pass 1, first tile to last   online normalisers of both sides: each lane keeps its own maximum and sum
    pass 2, last tile to first   sum_v m f and sum_v m g
    pass 3, first tile to last   factor * (m g - m * sum_v m g), written over the model's logits

Two passes are enough only where no gradient is asked for: for a general f, E_model g needs all normalised ratios, and
the first gradient needs E_model g. What memory sees is less, because a pass starts where the one before ended. With
one row in flight on each of P processors and a cache of C bytes, about C / (2 P V width) of a pass is still there: all
of it up to V = 40,000 in float32 or 80,000 in half precision on an H200 (50 MB, 132 processors); and with the 152,000
tokens of a large vocabulary in half precision half of it, so that each logit comes from memory twice and goes back
once. In float32 it is two and a half times.

These shares follow from the sizes; they were not measured.

Everything is computed in float32, or in float64 for float64 logits, whatever dtype the logits are stored in. A GPU's
float32 exp(x) is exact to about |x| / 10^7 relative, which matters only to tokens of hardly any weight.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from kullback.divergence.triton_curves import DTYPES, jitted, source

if TYPE_CHECKING:
    from kullback.divergence.curves import FDivergence
    from kullback.divergence.kernels import Kernel

TILE = 4096  # logits of each side that a program holds at a time; half of it where float64 takes two registers
WARPS = 16  # of a program; eight or four logits in each lane; a processor has registers for one or two programs
LOWEST = tl.constexpr(-3e38)  # below every logit; unlike -inf it can be subtracted from -inf


@triton.jit
def _include(top, total, x):
    """The running maximum and sum of exp(x - maximum) of each lane, with one exp; -inf adds nothing."""
    rise = x - top
    shrink = tl.exp(-tl.abs(rise))
    return tl.maximum(top, x), tl.where(rise > 0, total * shrink + 1.0, total + shrink)


@triton.jit
def _normaliser(top, total):
    """log sum exp of what all lanes have seen; -inf where that is nothing."""
    highest = tl.max(top, axis=0)
    return highest + tl.log(tl.sum(total * tl.exp(top - highest), axis=0))


@triton.jit
def divergence_rows(
    target,
    model,
    factor,
    values,
    target_stride,
    model_stride,
    vocab,
    POINTWISE: tl.constexpr,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target += row * target_stride
    model += row * model_stride
    lane = tl.arange(0, TILE)
    tiles = tl.cdiv(vocab, TILE)

    top_t = tl.full((TILE,), LOWEST, DTYPE)
    top_m = tl.full((TILE,), LOWEST, DTYPE)
    sum_t = tl.zeros((TILE,), DTYPE)
    sum_m = tl.zeros((TILE,), DTYPE)
    for tile in range(0, tiles):
        at = tile * TILE + lane
        inside = at < vocab
        top_t, sum_t = _include(top_t, sum_t, tl.load(target + at, mask=inside, other=float("-inf")).to(DTYPE))
        top_m, sum_m = _include(top_m, sum_m, tl.load(model + at, mask=inside, other=float("-inf")).to(DTYPE))
    z_t = _normaliser(top_t, sum_t)
    z_m = _normaliser(top_m, sum_m)

    value = tl.zeros((TILE,), DTYPE)
    link = tl.zeros((TILE,), DTYPE)
    size = tl.zeros((TILE,), DTYPE)
    for back in range(0, tiles):
        at = (tiles - 1 - back) * TILE + lane
        inside = at < vocab
        t = tl.load(target + at, mask=inside, other=float("-inf")).to(DTYPE)
        m = tl.load(model + at, mask=inside, other=float("-inf")).to(DTYPE)
        _, v, g = POINTWISE(t, m, z_t, z_m)
        value += v
        link += g
        size += tl.abs(g)
    tl.store(values + row, tl.sum(value, axis=0))

    if GRADIENT:
        mean = tl.sum(link, axis=0)
        endless = tl.sum(size, axis=0) == float("inf")  # no finite step would help this row
        by = tl.load(factor).to(DTYPE)
        for tile in range(0, tiles):
            at = tile * TILE + lane
            inside = at < vocab
            t = tl.load(target + at, mask=inside, other=float("-inf")).to(DTYPE)
            m = tl.load(model + at, mask=inside, other=float("-inf")).to(DTYPE)
            log_m, _, g = POINTWISE(t, m, z_t, z_m)
            gradient = tl.where(endless, 0.0, (g - tl.exp(log_m) * mean) * by)
            tl.store(model + at, gradient.to(model.dtype.element_ty), mask=inside)


@lru_cache(maxsize=256)
def compiled(divergence: FDivergence, dtype: torch.dtype, with_gradient: bool) -> Kernel:
    """The kernel for logits stored in `dtype`. The target's logits stay as they are.

    Raises:
        triton_curves.Unprintable: the divergence uses an operation that has no translation.
    """
    compute = torch.promote_types(dtype, torch.float32)
    text = source(divergence, compute)
    function, most = jitted(text), largest_tile(text)

    def run(target: Tensor, model: Tensor, factor: Tensor) -> Tensor:
        rows, vocab = model.shape
        values = torch.empty(rows, dtype=compute, device=model.device)
        if not rows:
            return values
        if target.stride(1) != 1 or model.stride(1) != 1:
            raise ValueError("the logits of a row must lie side by side")
        tile, warps = shape(vocab, most)
        divergence_rows[(rows,)](
            target,
            model,
            factor,
            values,
            target.stride(0),
            model.stride(0),
            vocab,
            POINTWISE=function,
            DTYPE=getattr(tl, DTYPES[compute].removeprefix("tl.")),
            TILE=tile,
            GRADIENT=with_gradient,
            num_warps=warps,
            enable_fp_fusion=True,
        )
        return values

    return run


def largest_tile(text: str) -> int:
    return TILE // 2 if "tl.float64" in text else TILE


def shape(vocab: int, most: int) -> tuple[int, int]:
    """Logits of a tile and warps of a program, powers of two; at most `most` logits."""
    per_warp = most // WARPS
    tile = min(most, max(per_warp, triton.next_power_of_2(vocab)))
    return tile, tile // per_warp
