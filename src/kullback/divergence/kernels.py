"""The curves of a divergence in one pass: value, link and logit gradient of a block of rows, compiled.

`plain_rows` is the explanation and the oracle: it goes through `weighted_value` and `weighted_link`. `eager_rows` says
the same with fewer transcendentals, one torch operation after another. `rows` has no branch on data; traced once per
divergence and compiled by inductor, it passes a few times over a block of logits that stays in the cache, and writes
the gradient over the model's. On a GPU its element-wise part, `weighted`, is printed as Triton (`triton_rows`). A
user's f is traced through its autodiff, so it gets a kernel too.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from kullback.divergence.categorical import finite_rows
from kullback.divergence.pair import INF, Pair, times

if TYPE_CHECKING:
    from kullback.divergence.curves import FDivergence

Mode = Literal["auto", "always", "never"]
# (target logits, model logits, factor) -> values; the gradient is written over the model's logits
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]

WORTH = 2**25  # logits per call from which "auto" compiles: there one call saves a good part of the compile time
COMPILED_BLOCK = 2**20  # logits per call on a CPU: calls cost little against it, and its temporaries are small
EAGER_BLOCK = 2**17  # here each of thirty operations leaves a temporary, and the caches must hold some of them
TRITON_DEVICES = ("cuda",)  # also what torch calls AMD's

_mode: Mode = "auto"
_lock = threading.Lock()


def set_kernels(mode: Mode) -> None:
    """When `linear` compiles a divergence: "auto" for large problems, on a CPU float32 ones; "always"; or "never".

    The first large call of a process waits for the compiler; torch keeps the result on disk for later processes.
    The environment variable KULLBACK_KERNELS sets the mode at import.
    """
    global _mode
    if mode not in get_args(Mode):
        raise ValueError(f'kernels="{mode}": choose one of {", ".join(get_args(Mode))}')
    _mode = mode


@contextmanager
def kernels(mode: Mode) -> Iterator[None]:
    """`set_kernels` inside a with statement."""
    before = _mode
    set_kernels(mode)
    try:
        yield
    finally:
        set_kernels(before)


set_kernels(os.environ.get("KULLBACK_KERNELS", "auto"))  # type: ignore[arg-type]


def choose(divergence: FDivergence, like: Tensor, entries: int, with_gradient: bool) -> tuple[Kernel, int]:
    """The compiled kernel where mode and size of the problem ask for it, else the eager one; and logits per call."""
    large = entries >= WORTH and (like.device.type != "cpu" or like.dtype == torch.float32)
    wanted = _mode == "always" or (_mode == "auto" and large)
    kernel = None
    if wanted and not torch.compiler.is_compiling():
        compile_for = _triton if like.device.type in TRITON_DEVICES else _compiled
        with _lock:
            kernel = compile_for(divergence, like.dtype, like.device, with_gradient)
    if kernel is not None:
        return kernel, COMPILED_BLOCK

    def eager(target: Tensor, model: Tensor, factor: Tensor) -> Tensor:
        return eager_rows(divergence, target, model, factor, with_gradient)

    return eager, EAGER_BLOCK


def plain_rows(
    divergence: FDivergence, target: Tensor, model: Tensor, factor: Tensor, with_gradient: bool = True
) -> Tensor:
    """sum_v m f(t / m) per row; factor * m (g - E_m g) is written over `model`. `target` is overwritten too."""
    target -= torch.logsumexp(target, dim=-1, keepdim=True)
    model -= torch.logsumexp(model, dim=-1, keepdim=True)
    value = divergence.weighted_value(target, model).sum(-1)
    if with_gradient:
        link = finite_rows(divergence.weighted_link(target, model))
        model.exp_().mul_(-link.sum(-1, keepdim=True)).add_(link).mul_(factor)
    return value


def eager_rows(
    divergence: FDivergence, target: Tensor, model: Tensor, factor: Tensor, with_gradient: bool = True
) -> Tensor:
    """`plain_rows` with the curves of `rows`, where no logit is -inf: the uncompiled path."""
    from kullback.divergence.joint import curves, value

    if model.numel() == 0 or (torch.minimum(target.amin(), model.amin()) == -INF).item():
        return plain_rows(divergence, target, model, factor, with_gradient)
    z_t, z_m = (torch.logsumexp(x, dim=-1, keepdim=True) for x in (target, model))
    ratio = (target - model).sub_(z_t - z_m)
    pair = Pair(target.sub_(z_t), model.sub_(z_m), ratio)
    if not with_gradient:
        return value(divergence, pair).sum(-1)
    values, link = curves(divergence, pair)
    link = finite_rows(link)
    model.exp_().mul_(-link.sum(-1, keepdim=True)).add_(link).mul_(factor)
    return values.sum(-1)


def rows(
    divergence: FDivergence, target: Tensor, model: Tensor, factor: Tensor, with_gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The same, out of place and without a branch on data: what inductor compiles."""
    z_t, z_m = (torch.logsumexp(x, dim=-1, keepdim=True) for x in (target, model))
    log_m, value, link = weighted(divergence, target, model, z_t, z_m)
    value = value.sum(-1)
    if not with_gradient:
        return value, None
    endless = torch.isinf(link.abs().sum(-1, keepdim=True))
    mean = link.sum(-1, keepdim=True)
    gradient = torch.where(endless, 0.0, (link - torch.exp(log_m) * mean) * factor)
    return value, gradient


def weighted(
    divergence: FDivergence, target: Tensor, model: Tensor, z_t: Tensor, z_m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log m, m f(t / m) and m g(t / m) of single logits, given the normalisers of their rows: element by element."""
    from kullback.divergence.joint import curves  # not at the top: the members import this module

    log_t, log_m = target - z_t, model - z_m
    lost, new = log_t == -INF, log_m == -INF
    edge = lost | new
    # the logits subtract exactly where they are close; two log-probabilities would not
    ratio = torch.where(edge, 0.0, (target - model) - (z_t - z_m))
    pair = Pair(torch.where(edge, 0.0, log_t), torch.where(edge, 0.0, log_m), ratio)
    value, link = curves(divergence, pair)
    limits = divergence.limits
    only_model, only_target = lost & ~new, new & ~lost

    def ends(inner: Tensor, no_target: float, no_model: float) -> Tensor:
        out = torch.where(edge, 0.0, inner)
        out = torch.where(only_model, times(no_target, log_m), out)
        return torch.where(only_target, times(no_model, log_t), out)

    value = ends(value, limits.value_zero, limits.slope_infinity)
    return log_m, value, ends(link, limits.value_zero, limits.link_per_ratio)


@lru_cache(maxsize=256)
def _triton(divergence: FDivergence, dtype: torch.dtype, device: torch.device, with_gradient: bool) -> Kernel | None:
    """The printed kernel; with one warning, inductor's where that cannot be had."""
    try:
        from kullback.divergence import triton_rows  # Triton is not on every machine

        kernel = triton_rows.compiled(divergence, dtype, with_gradient)
        kernel(*_example(dtype, device))
    except Exception as error:
        _warn(divergence, "Triton", error, "torch's own compiler is asked instead")
        return _compiled(divergence, dtype, device, with_gradient)
    return kernel


@lru_cache(maxsize=256)
def _compiled(divergence: FDivergence, dtype: torch.dtype, device: torch.device, with_gradient: bool) -> Kernel | None:
    """Inductor's; None, with one warning, where there is no compiler."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def kernel(target: Tensor, model: Tensor, factor: Tensor) -> Tensor:
        value, gradient = rows(divergence, target, model, factor, with_gradient)
        if gradient is not None:
            model.copy_(gradient)
        return value

    try:
        with torch.no_grad():
            graph = make_fx(kernel, tracing_mode="symbolic")(*_example(dtype, device))
            compiled = torch.compile(graph, dynamic=True, fullgraph=True)
            compiled(*_example(dtype, device))
    except Exception as error:
        _warn(divergence, "compiled", error, "the plain one is exact too, only slower")
        return None

    def run(target: Tensor, model: Tensor, factor: Tensor) -> Tensor:
        if len(model) < 2 or model.shape[1] < 2:  # sizes 0 and 1 would be compiled again
            return eager_rows(divergence, target, model, factor, with_gradient)
        with torch.no_grad():
            value: Tensor = compiled(target, model, factor)
        return value

    return run


def _example(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    target, model = torch.randn(2, 5, 67, dtype=dtype, device=device).unbind()
    return target.clone(), model.clone(), torch.ones((), dtype=dtype, device=device)


def _warn(divergence: FDivergence, kind: str, error: Exception, instead: str) -> None:
    reason = f"{type(error).__name__}: {str(error)[:200]}"
    warnings.warn(f"kullback: no {kind} kernel for {divergence} ({reason}); {instead}", stacklevel=4)
