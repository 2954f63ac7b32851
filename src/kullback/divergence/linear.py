"""A divergence straight from hidden states and heads: exact, and the [tokens, vocab] logits never exist.

Tokens are taken a chunk at a time. For one chunk the work is four matrix products: target logits, model logits and,
while the model's log-probabilities are still there, the closed-form logit gradient times head and times hidden states.
So the gradient is finished in the forward pass; backward only scales it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence.categorical import finite_rows
from kullback.divergence.topk import Tail, TopK, check, rest

if TYPE_CHECKING:
    from kullback.divergence.curves import FDivergence

METHODS = ("linear", "linear_topk")

CHUNK_ENTRIES = 2**22  # logits of one chunk by default: 16 MiB in float32

# From the tokens of a chunk and the model's log-probabilities there: the values, and if asked their gradient in the
# model's log-softmax inputs.
RowLoss = Callable[[slice, Tensor, bool], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Head:
    """logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    temperature: float

    def logits(self, hidden: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits of these tokens, written into `buffer`, and d logits / d product where that is not constant."""
        logits = buffer[: len(hidden)]
        if logits.dtype == hidden.dtype:
            torch.mm(hidden, self.weight.t(), out=logits)
        else:  # half precision: the product in its own dtype, everything after it in float32
            logits.copy_(torch.mm(hidden, self.weight.t()))
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1:
            logits *= self.scale
        bend = None
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_()
            bend = 1 - logits**2
            logits *= self.softcap
        if self.temperature != 1:
            logits /= self.temperature
        return logits, bend

    def log_probs(self, hidden: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor | None]:
        logits, bend = self.logits(hidden, buffer)
        logits -= torch.logsumexp(logits, dim=-1, keepdim=True)
        return logits, bend


def linear(
    divergence: FDivergence,
    target_hidden: Float[Tensor, "*batch target_width"],
    target_head: Float[Tensor, "vocab target_width"],
    model_hidden: Float[Tensor, "*batch model_width"],
    model_head: Float[Tensor, "vocab model_width"],
    *,
    target_bias: Float[Tensor, "vocab"] | None = None,
    model_bias: Float[Tensor, "vocab"] | None = None,
    temperature: float = 1.0,
    target_logit_scale: float = 1.0,
    model_logit_scale: float = 1.0,
    target_softcap: float | None = None,
    model_softcap: float | None = None,
    token_weight: Float[Tensor, "*batch"] | None = None,
    chunk: int | None = None,
    pad_vocab: bool = False,
) -> Float[Tensor, "*batch"]:
    """`categorical` of softmax(logits / temperature) on both sides, without ever holding the logits of all tokens.

        logits = softcap * tanh(logit_scale * (hidden @ head.T + bias) / softcap)

    Matrix products run in the dtype of hidden states and head (autocast is respected); everything after them, and the
    sum of the head's gradient over chunks, in float32 or wider.

    Args:
        token_weight: the factor by which each value will enter the loss, default 1. The gradient of the head is built
            with it in the forward pass. If backward receives gradients that are not a multiple of it, the head's
            gradient is recomputed: exact as well, at the price of a second pass.
        chunk: tokens at a time; by default about 4 million logits.
        pad_vocab: heads of different sizes for one tokenizer; the extra rows of the larger are ignored.

    Returns:
        Nats, one per token, not multiplied by `token_weight`. Differentiable in `model_hidden`, `model_head` and
        `model_bias`, once; the target is detached.

    Raises:
        ValueError: shapes that do not fit, or temperature, soft-cap or chunk <= 0.
    """
    if target_head.shape[0] != model_head.shape[0]:
        if not pad_vocab:
            raise ValueError(
                f"target_head has {target_head.shape[0]} rows, model_head {model_head.shape[0]}: if the tokenizers are "
                "the same and one head is padded, pass pad_vocab=True; otherwise the tokens do not correspond"
            )
        size = min(target_head.shape[0], model_head.shape[0])
        target_head, model_head = target_head[:size], model_head[:size]
        target_bias = target_bias if target_bias is None else target_bias[:size]
        model_bias = model_bias if model_bias is None else model_bias[:size]
    _positive(temperature=temperature, target_softcap=target_softcap, model_softcap=model_softcap)
    if target_hidden.shape[:-1] != model_hidden.shape[:-1]:
        raise ValueError(
            f"target_hidden covers tokens {tuple(target_hidden.shape[:-1])}, model_hidden "
            f"{tuple(model_hidden.shape[:-1])}: they must be the same tokens"
        )
    _fits("target", target_hidden, target_head, target_bias)

    states = _matmul_ready(target_hidden.detach().flatten(0, -2), target_head.detach())
    head = Head(states[1], _detach(target_bias), target_logit_scale, target_softcap, temperature)
    buffer: list[Tensor] = []

    def row_loss(rows: slice, model: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        if not buffer or len(buffer[0]) < len(model):
            buffer[:] = [torch.empty_like(model)]
        target, _ = head.log_probs(states[0][rows], buffer[0])
        value = divergence.weighted_value(target, model).sum(-1)
        return value, divergence.weighted_link(target, model) if with_gradient else None

    return _fused(
        row_loss,
        model_hidden,
        model_head,
        model_bias,
        model_logit_scale,
        model_softcap,
        temperature,
        token_weight,
        chunk,
    )


def linear_topk(
    divergence: FDivergence,
    target_topk: TopK,
    model_hidden: Float[Tensor, "*batch width"],
    model_head: Float[Tensor, "vocab width"],
    *,
    tail: Tail = "bucket",
    model_bias: Float[Tensor, "vocab"] | None = None,
    temperature: float = 1.0,
    model_logit_scale: float = 1.0,
    model_softcap: float | None = None,
    token_weight: Float[Tensor, "*batch"] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "*batch"]:
    """`topk` of a truncated target against softmax(logits / temperature), the model's logits a chunk at a time.

    Arguments and guarantees as in `linear` and `topk`; the target's log-probabilities are already at `temperature`.

    Raises:
        ValueError: an unknown tail, shapes that do not fit, or temperature, soft-cap or chunk <= 0.
    """
    check(target_topk, model_head.shape[0], tail)
    _positive(temperature=temperature, model_softcap=model_softcap)
    if target_topk.log_probs.shape[:-1] != model_hidden.shape[:-1]:
        raise ValueError(
            f"target_topk covers tokens {tuple(target_topk.log_probs.shape[:-1])}, model_hidden "
            f"{tuple(model_hidden.shape[:-1])}: they must be the same tokens"
        )
    dtype = torch.promote_types(torch.float32, torch.promote_types(target_topk.log_probs.dtype, model_hidden.dtype))
    target = target_topk.log_probs.detach().flatten(0, -2).to(dtype)
    ids = target_topk.token_ids.flatten(0, -2).long()
    bucket = tail == "bucket" and target_topk.k < model_head.shape[0]
    if tail == "renormalise":
        target = torch.log_softmax(target, dim=-1)
    if bucket:
        target = torch.cat([target, target_topk.tail().detach().to(dtype).flatten().unsqueeze(-1)], dim=-1)

    def row_loss(rows: slice, model: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        kept = model.gather(-1, ids[rows])
        if tail == "renormalise":
            kept = torch.log_softmax(kept, dim=-1)
        if bucket:
            outside = rest(model, ids[rows]).unsqueeze(-1)
            kept = torch.cat([kept, outside], dim=-1)
        value = divergence.weighted_value(target[rows], kept).sum(-1)
        if not with_gradient:
            return value, None
        link = finite_rows(divergence.weighted_link(target[rows], kept))
        if tail == "renormalise":
            link = link - kept.exp() * link.sum(-1, keepdim=True)
        if not bucket:
            return value, torch.zeros_like(model).scatter_(-1, ids[rows], link)
        # the bucket's share goes to the tokens inside it in proportion to their probabilities
        inside = torch.exp(model - outside.clamp(min=torch.finfo(model.dtype).min)) * link[:, -1:]
        return value, inside.scatter_(-1, ids[rows], link[:, :-1])

    return _fused(
        row_loss,
        model_hidden,
        model_head,
        model_bias,
        model_logit_scale,
        model_softcap,
        temperature,
        token_weight,
        chunk,
    )


def _fused(
    row_loss: RowLoss,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    token_weight: Tensor | None,
    chunk: int | None,
) -> Tensor:
    _fits("model", hidden, weight, bias)
    shape = hidden.shape[:-1]
    flat = hidden.flatten(0, -2)
    count, vocab = len(flat), weight.shape[0]
    chunk = chunk if chunk is not None else max(1, CHUNK_ENTRIES // max(vocab, 1))
    _positive(chunk=chunk)
    weights = None
    if token_weight is not None:
        if token_weight.shape != shape:
            raise ValueError(f"token_weight has shape {tuple(token_weight.shape)}: use one per token, {tuple(shape)}")
        weights = token_weight.detach().flatten()
    flat, head = _matmul_ready(flat, weight)
    job = _Job(row_loss, logit_scale, softcap, temperature, min(chunk, max(count, 1)))
    values: Tensor = _Fused.apply(flat, head, bias, weights, job, torch.is_grad_enabled())
    return values.reshape(shape)


@dataclass(frozen=True)
class _Job:
    """One fused loss, with everything but the tensors that are differentiated."""

    row_loss: RowLoss
    logit_scale: float
    softcap: float | None
    temperature: float
    chunk: int

    def run(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_weight: Tensor | None,
        wants: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Values; gradients of each value in its hidden state; gradients of the weighted sum in head and bias."""
        count, vocab = len(hidden), weight.shape[0]
        dtype = torch.promote_types(torch.float32, hidden.dtype)
        head = Head(weight, bias, self.logit_scale, self.softcap, self.temperature)
        values = torch.zeros(count, dtype=dtype, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if wants[0] else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if wants[1] else None
        grad_bias = torch.zeros(vocab, dtype=dtype, device=hidden.device) if wants[2] else None
        buffer = torch.empty(self.chunk, vocab, dtype=dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, count, self.chunk):
                rows = slice(start, min(start + self.chunk, count))
                model, bend = head.log_probs(hidden[rows], buffer)
                values[rows], grad = self.row_loss(rows, model, any(wants))
                if grad is None:
                    continue
                grad = finite_rows(grad)
                grad.sub_(model.exp_() * grad.sum(-1, keepdim=True))  # m (g - E_m g), in place
                if bend is not None:
                    grad *= bend
                grad *= self.logit_scale / self.temperature
                if grad_hidden is not None:
                    torch.mm(grad.to(weight.dtype), weight, out=grad_hidden[rows])
                if token_weight is not None and (wants[1] or wants[2]):
                    grad *= token_weight[rows].to(dtype).unsqueeze(-1)
                if grad_weight is not None:
                    if grad_weight.dtype == hidden.dtype:
                        grad_weight.addmm_(grad.t(), hidden[rows])
                    else:  # the sum over chunks stays in float32
                        grad_weight += torch.mm(grad.to(hidden.dtype).t(), hidden[rows])
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
        return values, grad_hidden, grad_weight, grad_bias


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_weight: Tensor | None,
        job: _Job,
        grad_enabled: bool,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        wants = (grad_enabled and needs[0], grad_enabled and needs[1], grad_enabled and needs[2])
        values, grad_hidden, grad_weight, grad_bias = job.run(hidden, weight, bias, token_weight, wants)
        if token_weight is None:
            token_weight = torch.ones_like(values)
        ctx.job, ctx.wants, ctx.dtypes = job, wants, (weight.dtype, bias.dtype if bias is not None else None)
        ctx.save_for_backward(hidden, weight, bias, token_weight, grad_hidden, grad_weight, grad_bias)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, bias, token_weight, grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        (grad,) = grads
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad.unsqueeze(-1)).to(hidden.dtype)
        if grad_weight is not None or grad_bias is not None:
            factor = _common_factor(grad, token_weight)
            if factor is None:
                wants = (False, ctx.wants[1], ctx.wants[2])
                _, _, grad_weight, grad_bias = ctx.job.run(hidden, weight, bias, grad, wants)
                factor = torch.ones_like(grad[:1]).squeeze()
            grad_weight = grad_weight if grad_weight is None else (grad_weight * factor).to(ctx.dtypes[0])
            grad_bias = grad_bias if grad_bias is None else (grad_bias * factor).to(ctx.dtypes[1])
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _common_factor(grad: Tensor, token_weight: Tensor) -> Tensor | None:
    """The c with grad = c * token_weight up to rounding, or None."""
    if grad.numel() == 0:
        return torch.ones((), dtype=grad.dtype, device=grad.device)
    weight = token_weight.to(grad.dtype)
    at = weight.abs().argmax()
    if weight[at] == 0:
        return torch.zeros_like(grad[0]) if not grad.any() else None
    factor = grad[at] / weight[at]
    rounding = 4 * torch.finfo(grad.dtype).eps * grad.abs()
    return factor if bool(((grad - factor * weight).abs() <= rounding).all()) else None


def _matmul_ready(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype in which they are multiplied: autocast's if that is on, otherwise the wider one."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    else:
        dtype = torch.promote_types(hidden.dtype, head.dtype)
    return hidden.to(dtype), head.to(dtype)


def _fits(side: str, hidden: Tensor, head: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() < 2 or head.dim() != 2 or hidden.shape[-1] != head.shape[1]:
        raise ValueError(
            f"{side}_hidden has shape {tuple(hidden.shape)}, {side}_head {tuple(head.shape)}: "
            "they must be [..., width] and [vocab, width]"
        )
    if bias is not None and bias.shape != head.shape[:1]:
        raise ValueError(f"{side}_bias has shape {tuple(bias.shape)}: it must be [{head.shape[0]}], one per head row")


def _positive(**fields: float | None) -> None:
    for name, value in fields.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value}: must be positive")


def _detach(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
