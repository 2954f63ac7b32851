"""A divergence between two categorical distributions, exactly, with the closed-form gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence.pair import promote, together

if TYPE_CHECKING:
    from kullback.divergence.curves import FDivergence


def categorical(
    divergence: FDivergence,
    target_logits: Float[Tensor, "*batch vocab"],
    model_logits: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    target_grad: bool = False,
    pad_vocab: bool = False,
) -> Float[Tensor, "*batch"]:
    """Divergence of `model` from `target` over a whole vocabulary, exactly.

        D(target, model) = sum_v model_v f(target_v / model_v),    target = softmax(target_logits / temperature)

    The gradient is the closed form model * (g - E_model g) / temperature, g the link. Where D is +inf no finite step
    reduces it, and the gradient of that position is zero.

    Args:
        target_logits, model_logits: unnormalised; -inf marks a token that cannot occur. A position where all are -inf
            is no distribution and gives NaN.
        temperature: divides both. The value is not multiplied by temperature ** 2.
        target_grad: also differentiate in the target, which is detached otherwise.
        pad_vocab: the vocabularies may differ because one head is padded: the extra columns of the larger one are
            treated as -inf, so an identical student scores exactly 0.

    Returns:
        Nats, one per position, in float32 or wider. +inf where f is unbounded and the supports ask for it; never NaN.
        Differentiable in `model_logits`.

    Raises:
        ValueError: the vocabularies differ, or temperature <= 0.

    >>> from kullback.divergence import divergence
    >>> uniform, skewed = torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0986])
    >>> round(divergence("forward_kl").categorical(uniform, skewed).item(), 4)
    0.1438
    """
    target, model = same_vocab(target_logits, model_logits, pad_vocab)
    return from_log_probs(
        divergence, log_probs(target, temperature), log_probs(model, temperature), target_grad=target_grad
    )


def from_log_probs(
    divergence: FDivergence,
    target_log_probs: Float[Tensor, "*batch outcome"],
    model_log_probs: Float[Tensor, "*batch outcome"],
    *,
    target_grad: bool = False,
) -> Float[Tensor, "*batch"]:
    """sum_x model_x f(target_x / model_x) from log-probabilities that are already normalised (this is not checked).

    Its derivative in log model is model * g; pushed through a log-softmax that is the closed form of `categorical`.

    Returns:
        Nats, one per position. The target is detached unless `target_grad=True`.
    """
    target, model = together(target_log_probs, model_log_probs)
    out: Tensor = _Total.apply(target if target_grad else target.detach(), model, divergence)
    return out


def expected_link(
    divergence: FDivergence,
    target_logits: Float[Tensor, "*batch vocab"],
    model_logits: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    pad_vocab: bool = False,
) -> Float[Tensor, "*batch"]:
    """E_model[g] = sum_v model_v g(target_v / model_v) at each position, exactly: the baseline of the `link` route.

    For reverse KL it is the divergence itself. Detached.
    """
    with torch.no_grad():
        target, model = same_vocab(target_logits, model_logits, pad_vocab)
        return total_link(divergence, log_probs(target, temperature), log_probs(model, temperature))


def total_link(divergence: FDivergence, target_log_probs: Tensor, model_log_probs: Tensor) -> Tensor:
    """sum_x model_x g_x; where tokens pull to both infinities, +inf."""
    parts = divergence.weighted_link(target_log_probs, model_log_probs)
    both = torch.isposinf(parts).any(-1) & torch.isneginf(parts).any(-1)
    total = parts.sum(-1)
    return torch.where(both, torch.full_like(total, torch.inf), total)


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) in float32 or wider."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive; use 1.0 for the distributions as they are")
    logits = promote(logits)
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def same_vocab(target: Tensor, model: Tensor, pad_vocab: bool) -> tuple[Tensor, Tensor]:
    """Both with the smaller vocabulary, if `pad_vocab` says that the extra columns are padding."""
    if target.shape[-1] == model.shape[-1]:
        return target, model
    if not pad_vocab:
        raise ValueError(
            f"target_logits has {target.shape[-1]} columns, model_logits {model.shape[-1]}: if the tokenizers are the "
            "same and one head is padded, pass pad_vocab=True; otherwise the tokens do not correspond"
        )
    size = min(target.shape[-1], model.shape[-1])
    return target[..., :size], model[..., :size]


def finite_rows(parts: Tensor) -> Tensor:
    """`parts`, with rows that contain an infinity set to zero; NaN stays NaN."""
    return torch.where(torch.isinf(parts.abs().sum(-1, keepdim=True)), torch.zeros_like(parts), parts)


class _Total(torch.autograd.Function):
    """sum over the last axis of m f(t / m); d / d log m = m g, d / d log t = t f'."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, model: Tensor, divergence: FDivergence) -> Tensor:
        ctx.save_for_backward(target, model)
        ctx.divergence = divergence
        return divergence.weighted_value(target, model).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        target, model = ctx.saved_tensors
        (grad,) = grads
        grad_target = grad_model = None
        if ctx.needs_input_grad[0]:
            grad_target = finite_rows(ctx.divergence.weighted_slope(target, model)) * grad.unsqueeze(-1)
        if ctx.needs_input_grad[1]:
            grad_model = finite_rows(ctx.divergence.weighted_link(target, model)) * grad.unsqueeze(-1)
        return grad_target, grad_model, None
