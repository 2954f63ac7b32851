"""Roots of monotone functions of one number, many at once, never leaving their brackets."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Function = Callable[[Tensor], Tensor]


def find_root(
    function: Function, low: Float[Tensor, "*batch"], high: Float[Tensor, "*batch"], *, iterations: int = 400
) -> Float[Tensor, "*batch"]:
    """x in [low, high] with function(x) = 0, for each element by itself; without gradient.

    Chandrupatla's method: inverse quadratic interpolation where the last three points allow it, bisection otherwise, so
    it never does much worse than bisection. Where the function jumps over 0 the place of the jump is returned.

    Args:
        function: elementwise, monotone in between; infinite values are fine.
        low, high: float64, of one shape; the function's values there must not have the same sign.

    Returns:
        Accurate to a few units in the last place of x itself, so small roots keep their digits.

    Raises:
        ValueError: the function has one sign at both ends, or is NaN.

    Source: Chandrupatla, Advances in Engineering Software 28(3), 1997.

    >>> round(find_root(lambda x: x**2 - 2, torch.tensor(0.0), torch.tensor(2.0)).item(), 6)
    1.414214
    """
    with torch.no_grad():
        b, a = torch.broadcast_tensors(low.detach().double(), high.detach().double())
        fb, fa = _values(function, b), _values(function, a)
        if bool((torch.sign(fa) * torch.sign(fb) > 0).any()):
            bad = (torch.sign(fa) * torch.sign(fb) > 0).flatten().nonzero()[0, 0]
            raise ValueError(
                f"low={b.flatten()[bad]:g}, high={a.flatten()[bad]:g}: the function is {fb.flatten()[bad]:.3g} and "
                f"{fa.flatten()[bad]:.3g} there, so no root is known to lie between; widen the bracket"
            )
        best, share = torch.where(fa == 0, a, b), torch.full_like(a, 0.5)
        done = (fa == 0) | (fb == 0)
        for _ in range(iterations):
            x = torch.where(done, best, a + share * (b - a))
            fx = _values(function, x)
            same = torch.sign(fx) == torch.sign(fa)
            c, fc = torch.where(same, a, b), torch.where(same, fa, fb)
            b, fb = torch.where(same, b, a), torch.where(same, fb, fa)
            a, fa = x, fx
            nearer = fa.abs() < fb.abs()
            best = torch.where(done, best, torch.where(nearer, a, b))
            least = 2 * torch.finfo(a.dtype).eps * best.abs() / (b - a).abs()  # the share that is one rounding error
            done = done | (least > 0.5) | (torch.where(nearer, fa, fb) == 0) | (a == b)
            if done.all():
                break
            xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
            smooth = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi)
            inverse = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
            share = torch.where(smooth & inverse.isfinite(), inverse, torch.full_like(a, 0.5))
            share = torch.maximum(torch.minimum(share, 1 - least), least)
        return best


def expand(function: Function, start: Float[Tensor, "*batch"], *, factor: float = 4.0, most: int = 300) -> Tensor:
    """`start` times a power of `factor`, the first at which an elementwise function is not negative; the last where
    none is."""
    with torch.no_grad():
        x = start.double()
        for _ in range(most):
            short = _values(function, x) < 0
            if not short.any():
                break
            x = torch.where(short, x * factor, x)
        return x


def _values(function: Function, x: Tensor) -> Tensor:
    found = function(x).double()
    if bool(found.isnan().any()):
        at = x.expand_as(found)[found.isnan()].flatten()[0]
        raise ValueError(f"x={at:g}: the function whose root is wanted is NaN there")
    return found
