"""Functions that Triton's language lacks, exact to a few units in the last place in float32 and float64.

They need exp and log only, so that the compiler and Triton's interpreter run the same formulas.
"""

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """exp(x) - 1: its power series for |x| < 1/2, where the difference would cancel."""
    near = tl.abs(x) < 0.5
    s = tl.where(near, x, 0.0).to(x.dtype)
    TERMS: tl.constexpr = 15 if x.dtype == tl.float64 else 8
    series = s * 0.0 + 1.0
    for k in tl.static_range(TERMS, 1, -1):  # 1 + s / 2 (1 + s / 3 (1 + ...
        series = 1.0 + series * (s * (1.0 / k))
    return tl.where(near, s * series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x): 2 artanh(x / (2 + x)) as a series for |x| < 1/2, where 1 + x would round."""
    near = tl.abs(x) < 0.5
    y = tl.where(near, x, 0.0).to(x.dtype)
    s = y / (2.0 + y)
    square = s * s
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 7
    series = s * 0.0
    for k in tl.static_range(TERMS, -1, -1):
        series = series * square + 1.0 / (2 * k + 1)
    return tl.where(near, 2.0 * s * series, tl.log(1.0 + x))


@triton.jit
def tanh(x):
    """From exp(-2 |x|), which neither overflows nor cancels."""
    fall = expm1(-2.0 * tl.abs(x))
    size = -fall / (2.0 + fall)
    return tl.where(x < 0, -size, size)


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)
