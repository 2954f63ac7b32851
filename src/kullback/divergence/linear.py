"""A divergence straight from hidden states and heads: exact, and the [tokens, vocab] logits never exist.

Tokens are taken a chunk at a time. For one chunk the work is four matrix products: target logits, model logits and,
where the model's logits stood, the closed-form logit gradient times head and times hidden states. Products want many
rows; the rest wants few, so that its passes stay in the cache: it goes over the chunk block by block, in place.
The gradient is finished in the forward pass; backward only scales it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import kernels, products
from kullback.divergence.categorical import finite_rows
from kullback.divergence.topk import Tail, TopK, check

if TYPE_CHECKING:
    from kullback.divergence.curves import FDivergence


LEAST_ENTRIES = 2**22  # logits of one chunk, whatever the widths: 16 MiB in float32
MOST_ENTRIES = 2**27  # and at most: 512 MiB

SKIP_WORTH = 0.1  # the share of columns from which leaving them out pays for packing the others
SKIP_PART = 4096  # columns at a time after packing: their rows of the head are copied
SKIP_RANK = 16  # directions of head and hidden states in which what is left out still counts

# (tokens of the chunk, the model's logits there before bias and scale, whether a gradient is wanted) -> the values;
# the gradient in these logits, times the factor, replaces them.
RowLoss = Callable[[slice, Tensor, bool], Tensor]


@dataclass(frozen=True)
class Head:
    """logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    temperature: float

    def product(self, hidden: Tensor, out: Tensor) -> Tensor:
        """hidden @ weight.T, written into the first rows of `out`."""
        return products.logits(hidden, self.weight, out[: len(hidden)])

    def finish(self, logits: Tensor) -> Tensor | None:
        """Make the product the logits, in place. Returns d logits / d product up to `factor`, unless it is 1."""
        if self.bias is not None:
            logits += self.bias
        if self.softcap is None:
            if self.factor != 1:
                logits *= self.factor
            return None
        logits.mul_(self.scale / self.softcap).tanh_()
        bend = 1 - logits**2
        logits *= self.softcap / self.temperature
        return bend

    @property
    def factor(self) -> float:
        return self.scale / self.temperature


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
    gradient_tolerance: float = 0.0,
    pad_vocab: bool = False,
) -> Float[Tensor, "*batch"]:
    """`categorical` of softmax(logits / temperature) on both sides, without ever holding the logits of all tokens.

        logits = softcap * tanh(logit_scale * (hidden @ head.T + bias) / softcap)

    Matrix products run in the dtype of hidden states and head (autocast is respected); everything after them, and the
    sum of the head's gradient over chunks, in float32 or wider. Inside `torch.compile` the call is one graph break: it
    runs as it does outside, with its own compiled kernels.

    Args:
        token_weight: the factor by which each value will enter the loss, default 1. The gradient of the head is built
            with it in the forward pass. If backward receives gradients that are not a multiple of it, the head's
            gradient is recomputed: exact as well, at the price of a second pass.
        chunk: tokens at a time; by default as many as the head is wide, within 4 to 128 million logits. Two
            such buffers are all that is held beside the gradients.
        gradient_tolerance: leave out of both gradient products the tokens of the vocabulary that matter least to a
            chunk: with G its logit gradient, so many columns that |G - G_kept| <= gradient_tolerance * |G| (Frobenius).
            What they add along the 16 main directions of head and hidden states is kept. The gradients of hidden states
            and head are then off by at most gradient_tolerance * |G| times the largest singular value of what is left
            of head and hidden states without those directions; values and the gradient of the bias stay exact. 0, the
            default, leaves out nothing: a row of the head that is left out gets a coarser gradient of a very small
            size, which an optimiser that rescales each parameter (Adam) takes as seriously as a large one.
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

    states, weight = _matmul_ready(target_hidden.detach().flatten(0, -2), target_head.detach())
    target_side = Head(weight, _detach(target_bias), target_logit_scale, target_softcap, temperature)
    model_side = Head(model_head, _detach(model_bias), model_logit_scale, model_softcap, temperature)
    buffer: list[Tensor] = []

    def row_loss(rows: slice, model: Tensor, with_gradient: bool) -> Tensor:
        if not buffer or len(buffer[0]) < len(model):
            buffer[:] = [torch.empty_like(model)]
        target = target_side.product(states[rows], buffer[0])
        kernel, size = kernels.choose(divergence, model, len(states) * model.shape[1], with_gradient)
        factor = torch.tensor(model_side.factor, dtype=model.dtype, device=model.device)
        values = model.new_empty(len(model))
        for block in _blocks(model, size):
            target_side.finish(target[block])
            bend = model_side.finish(model[block])
            values[block] = kernel(target[block], model[block], factor)
            if bend is not None and with_gradient:
                model[block] *= bend
        return values

    return _fused(row_loss, model_hidden, model_head, model_bias, token_weight, chunk, gradient_tolerance)


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
    gradient_tolerance: float = 0.0,
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

    side = Head(model_head, _detach(model_bias), model_logit_scale, model_softcap, temperature)

    def row_loss(rows: slice, model: Tensor, with_gradient: bool) -> Tensor:
        values = model.new_empty(len(model))
        for block in _blocks(model, kernels.EAGER_BLOCK):
            at = slice(rows.start + block.start, rows.start + block.stop)
            bend = side.finish(model[block])
            values[block] = _topk_rows(divergence, target[at], ids[at], model[block], tail, side.factor, with_gradient)
            if bend is not None and with_gradient:
                model[block] *= bend
        return values

    return _fused(row_loss, model_hidden, model_head, model_bias, token_weight, chunk, gradient_tolerance)


def _topk_rows(
    divergence: FDivergence,
    target: Tensor,
    ids: Tensor,
    model: Tensor,
    tail: Tail,
    factor: float,
    with_gradient: bool,
) -> Tensor:
    """Values of these rows; the gradient in the model's logits, times `factor`, replaces them.

    The k kept logits are taken out first, so that what is left normalises the mass outside without cancellation.
    """
    bucket = target.shape[-1] > ids.shape[-1]
    inside = model.gather(-1, ids)
    model.scatter_(-1, ids, -torch.inf)
    outside = torch.logsumexp(model, dim=-1, keepdim=True)  # -inf where nothing is left
    total = torch.logaddexp(torch.logsumexp(inside, dim=-1, keepdim=True), outside)
    kept = torch.log_softmax(inside, dim=-1) if tail == "renormalise" else inside - total
    if bucket:
        kept = torch.cat([kept, outside - total], dim=-1)
    values = divergence.weighted_value(target, kept).sum(-1)
    if not with_gradient:
        return values
    link = finite_rows(divergence.weighted_link(target, kept))
    mean = link.sum(-1, keepdim=True)
    if tail == "renormalise":
        model.zero_()
        at_kept = link - kept.exp() * mean
    else:
        # outside, link and mean are shared in proportion to the probabilities there
        share = -mean * torch.exp(outside - total)
        if bucket:
            share = share + link[:, -1:]
            link, kept = link[:, :-1], kept[:, :-1]
        empty = torch.isneginf(outside)
        model.sub_(torch.where(empty, torch.zeros_like(outside), outside)).exp_().mul_(share * factor)
        at_kept = link - kept.exp() * mean
    model.scatter_(-1, ids, at_kept * factor)
    return values


def _blocks(logits: Tensor, size: int) -> Iterator[slice]:
    """Rows at a time: on a CPU about `size` logits, in equal parts; elsewhere all."""
    count, vocab = logits.shape
    parts = round(count * vocab / size) if logits.device.type == "cpu" else 1
    parts = max(1, min(parts, count // 2))
    for i in range(parts):
        yield slice(count * i // parts, count * (i + 1) // parts)


@torch._disable_dynamo  # Dynamo would trace the chunks one by one: the call stays one step between compiled graphs
def _fused(
    row_loss: RowLoss,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_weight: Tensor | None,
    chunk: int | None,
    gradient_tolerance: float,
) -> Tensor:
    if not 0 <= gradient_tolerance < 1:
        raise ValueError(f"gradient_tolerance={gradient_tolerance}: must be in [0, 1); 0 leaves out nothing")
    _fits("model", hidden, weight, bias)
    shape = hidden.shape[:-1]
    flat = hidden.flatten(0, -2)
    if chunk is None:
        chunk = _chunk(len(flat), *weight.shape)
    _positive(chunk=chunk)
    weights = None
    if token_weight is not None:
        if token_weight.shape != shape:
            raise ValueError(f"token_weight has shape {tuple(token_weight.shape)}: use one per token, {tuple(shape)}")
        weights = token_weight.detach().flatten()
    flat, head = _matmul_ready(flat, weight)
    values: Tensor = _Fused.apply(
        flat, head, bias, weights, _Job(row_loss, chunk, gradient_tolerance), torch.is_grad_enabled()
    )
    return values.reshape(shape)


def _chunk(count: int, vocab: int, width: int) -> int:
    """Tokens at a time: their logits are no larger than the head's gradient, within the limits above.

    Fewer would cost time: every chunk reads the heads and reads and writes the head's gradient once.
    """
    vocab = max(vocab, 1)
    most = max(1, LEAST_ENTRIES // vocab, min(width, MOST_ENTRIES // vocab))
    return -(-count // -(-count // most)) if count else 1  # in equal parts


@dataclass(frozen=True)
class _Job:
    """One fused loss, with everything but the tensors that are differentiated."""

    row_loss: RowLoss
    chunk: int
    tolerance: float

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
        exact = dtype == hidden.dtype
        head = Head(weight, None, 1.0, None, 1.0)
        values = torch.zeros(count, dtype=dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        # without skipping the first chunk writes all of it
        fresh = torch.zeros_like if self.tolerance or not count else torch.empty_like
        grad_weight = fresh(weight, dtype=dtype) if wants[1] else None
        grad_bias = torch.zeros(vocab, dtype=dtype, device=hidden.device) if wants[2] else None
        buffer = torch.empty(min(self.chunk, count), vocab, dtype=dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, count, self.chunk):
                rows = slice(start, min(start + self.chunk, count))
                grad = head.product(hidden[rows], buffer)
                values[rows] = self.row_loss(rows, grad, any(wants))
                if not any(wants):
                    continue
                if grad_bias is not None:
                    grad_bias += grad.sum(0) if token_weight is None else token_weight[rows].to(dtype) @ grad
                kept = _kept_columns(grad, self.tolerance) if self.tolerance else None
                rest = None if kept is None or grad_hidden is None else _Rest(grad, weight)
                if kept is not None and grad_weight is not None:
                    states = hidden[rows].to(dtype)
                    states = states if token_weight is None else states * token_weight[rows].to(dtype).unsqueeze(-1)
                    directions = _main_directions(states)
                    left_out = (grad.t() @ (states @ directions)).index_fill_(0, kept, 0)
                    grad_weight.addmm_(left_out, directions.t())
                parts: Iterable[tuple[Tensor, Tensor, Tensor | None]]
                parts = [(grad, weight, None)] if kept is None else _kept_parts(grad, weight, kept)
                for index, (part, head_rows, at) in enumerate(parts):
                    if grad_hidden is not None:
                        if index == 0:
                            products.times_head(part, head_rows, grad_hidden[rows])
                        else:
                            grad_hidden[rows].addmm_(part.to(weight.dtype), head_rows)
                        if rest is not None:
                            rest.without(part, head_rows)
                    if grad_weight is None:
                        continue
                    states = hidden[rows]
                    if token_weight is not None:
                        by = token_weight[rows].to(dtype).unsqueeze(-1)
                        if exact:
                            states = states * by  # narrower than the gradient
                        else:
                            part *= by
                    if at is not None:
                        grad_weight.index_add_(0, at, torch.mm(part.to(hidden.dtype).t(), states).to(dtype))
                    else:  # the sum over chunks stays in float32
                        products.add_outer(part, states, grad_weight, first=start == 0 and not self.tolerance)
                if rest is not None and grad_hidden is not None:
                    grad_hidden[rows] += rest.product().to(grad_hidden.dtype)
        return values, grad_hidden, grad_weight, grad_bias


class _Rest:
    """The left-out columns in the gradient of the hidden states, along the main directions of the head.

    Most of what they would add lies there: a row of the logit gradient sums to zero, so what is kept does not, and
    without this the part that all rows of the head have in common would no longer cancel.
    """

    def __init__(self, grad: Tensor, weight: Tensor) -> None:
        self.directions = _main_directions(weight)
        self.along = grad @ (weight @ self.directions.to(weight.dtype)).to(grad.dtype)

    def without(self, part: Tensor, head_rows: Tensor) -> None:
        self.along -= part @ (head_rows @ self.directions.to(head_rows.dtype)).to(part.dtype)

    def product(self) -> Tensor:
        return self.along @ self.directions.t()


def _main_directions(matrix: Tensor) -> Tensor:
    """Orthonormal columns [width, SKIP_RANK], close to the leading right singular vectors of `matrix` [*, width].

    One power iteration from a fixed draw (Halko, Martinsson and Tropp 2011, algorithm 4.3): as good directions as any
    for a bound, and the closer to the leading ones the less is left out.
    """
    width = matrix.shape[1]
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(width, min(SKIP_RANK, width), generator=rng).to(matrix)
    found = matrix.t() @ (matrix @ start)
    found = (
        matrix.t() @ (matrix @ torch.linalg.qr(found.to(torch.promote_types(torch.float32, matrix.dtype))).Q.to(matrix))
        if len(matrix)
        else start
    )
    return torch.linalg.qr(found.to(torch.promote_types(torch.float32, matrix.dtype))).Q


def _kept_columns(grad: Tensor, tolerance: float) -> Tensor | None:
    """The columns to keep, ascending, so that the others hold tolerance^2 of the square sum; None if that is most."""
    if grad.device.type == "cpu":
        energy = torch.zeros_like(grad[0])
        for row in grad:  # one pass, the sum stays in the cache
            energy.addcmul_(row, row)
    else:
        energy = torch.linalg.vector_norm(grad, dim=0).square()
    ascending, order = energy.sort()
    dropped = int((ascending.cumsum(0, dtype=torch.float64) <= tolerance**2 * ascending.sum()).sum())
    return None if dropped < SKIP_WORTH * len(order) else order[dropped:].sort().values


def _kept_parts(grad: Tensor, weight: Tensor, kept: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """(columns of the gradient, their rows of the head, their numbers), `grad` packed in place: no new chunk."""
    count, width = len(grad), len(kept)
    packed = grad.reshape(-1)[: count * width].view(count, width)
    for block in _blocks(grad, kernels.EAGER_BLOCK):  # a row never moves beyond its old place
        packed[block] = grad[block].index_select(1, kept)
    for start in range(0, width, SKIP_PART):
        at = kept[start : start + SKIP_PART]
        yield packed[:, start : start + SKIP_PART], weight.index_select(0, at), at
    if not width:
        yield packed, weight[:0], kept


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
        ctx.save_for_backward(hidden, weight, bias, token_weight, grad_hidden, grad_bias)
        ctx.grad_weight = grad_weight  # not saved: the first backward hands this very tensor over, scaled in place
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, bias, token_weight, grad_hidden, grad_bias = ctx.saved_tensors
        (grad,) = grads
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad.unsqueeze(-1)).to(hidden.dtype)
        grad_weight, ctx.grad_weight = ctx.grad_weight, None
        _, wants_weight, wants_bias = ctx.wants
        if wants_weight or wants_bias:
            factor = _common_factor(grad, token_weight)
            if factor is None or (wants_weight and grad_weight is None):  # other weights, or a second backward
                _, _, grad_weight, grad_bias = ctx.job.run(hidden, weight, bias, grad, (False, *ctx.wants[1:]))
                factor = torch.ones_like(grad[:1]).squeeze()
            grad_weight = grad_weight if grad_weight is None else grad_weight.mul_(factor).to(ctx.dtypes[0])
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
