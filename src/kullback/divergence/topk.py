"""Truncated targets: what to do with the mass that was not kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kullback.divergence.categorical import from_log_probs, log_probs, total_link
from kullback.divergence.pair import promote, together

if TYPE_CHECKING:
    from kullback.divergence.curves import FDivergence

Tail = Literal["bucket", "drop", "renormalise"]

# Below this a tail computed as 1 - sum is rounding; a cache that knows better stores `log_tail`.
SMALLEST_LOG_TAIL = math.log(torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class TopK:
    """The k most likely tokens of a target, for each position.

    Args:
        log_probs: log-probabilities under the whole vocabulary, not renormalised.
        token_ids: their ids, distinct within a position.
        log_tail: log of the mass outside, if it is known better than 1 - sum(exp(log_probs)).
    """

    log_probs: Float[Tensor, "*batch k"]
    token_ids: Int[Tensor, "*batch k"]
    log_tail: Float[Tensor, "*batch"] | None = None

    def __post_init__(self) -> None:
        if self.log_probs.shape != self.token_ids.shape:
            raise ValueError(
                f"TopK: log_probs has shape {tuple(self.log_probs.shape)}, token_ids {tuple(self.token_ids.shape)}: "
                "both must be [..., k]"
            )
        if self.token_ids.dtype.is_floating_point or self.token_ids.dtype == torch.bool:
            raise ValueError(f"TopK: token_ids has dtype {self.token_ids.dtype}: use an integer dtype")

    @property
    def k(self) -> int:
        return int(self.log_probs.shape[-1])

    @classmethod
    def from_logits(cls, logits: Float[Tensor, "*batch vocab"], k: int, *, temperature: float = 1.0) -> TopK:
        """The top k of softmax(logits / temperature), with the exact tail.

        >>> TopK.from_logits(torch.tensor([0.0, 2.0, 1.0]), 2).token_ids
        tensor([1, 2])
        """
        if not 1 <= k <= logits.shape[-1]:
            raise ValueError(f"k={k}: choose 1 to {logits.shape[-1]}, the size of the vocabulary")
        everything = log_probs(logits, temperature)
        kept = everything.topk(k, dim=-1)
        return cls(kept.values, kept.indices, rest(everything, kept.indices))

    def tail(self) -> Float[Tensor, "*batch"]:
        """log of the mass outside the top k; computed from the kept mass only if it is not stored."""
        if self.log_tail is not None:
            return promote(self.log_tail)
        kept = torch.logsumexp(promote(self.log_probs), dim=-1).clamp(max=0.0)
        return torch.log(-torch.expm1(kept)).clamp(min=SMALLEST_LOG_TAIL)


def topk(
    divergence: FDivergence,
    target_topk: TopK,
    model_logits: Float[Tensor, "*batch vocab"],
    *,
    tail: Tail = "bucket",
    temperature: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """Divergence of the model from a target of which only the set S of k tokens is known.

        bucket       sum_S m f(t / m) + m' f(t' / m'),  t' and m' the masses outside S, as if they were one token.
                     A divergence, and a lower bound of the full one (data processing); the gap is what f sees inside
                     the tail. Zero iff the model agrees on S and on the mass outside.
        drop         sum_S m f(t / m), f centred. Also a lower bound, but blind to where the other mass goes. Zero iff
                     the model agrees on S.
        renormalise  D between the two conditional distributions given S. It says nothing about how much mass the
                     model leaves outside S, and is no bound.

    With k = vocabulary all three are `categorical`, and there is no bucket.

    Args:
        target_topk: log-probabilities of the target at the temperature of this call (they cannot be softened later).
        temperature: divides `model_logits`.

    Returns:
        Nats, one per position, differentiable in `model_logits`; the target is detached.

    >>> from kullback.divergence import TopK, divergence
    >>> teacher, student = torch.tensor([2.0, 1.0, 0.0, -2.0]), torch.zeros(4)
    >>> kl, kept = divergence("forward_kl"), TopK.from_logits(teacher, 2)
    >>> [round(kl.topk(kept, student, tail=tail).item(), 3) for tail in ("bucket", "drop", "renormalise")]
    [0.466, 0.228, 0.111]
    >>> round(kl.categorical(teacher, student).item(), 3)
    0.499
    """
    check(target_topk, model_logits.shape[-1], tail)
    target, model = target_topk.log_probs.detach(), log_probs(model_logits, temperature)
    ids = target_topk.token_ids.long()
    if ids.shape[:-1] != model.shape[:-1]:
        raise ValueError(
            f"target_topk covers positions {tuple(ids.shape[:-1])}, model_logits {tuple(model.shape[:-1])}: "
            "they must be the same positions"
        )
    kept = model.gather(-1, ids)
    if tail == "renormalise":
        return from_log_probs(divergence, log_probs(target), torch.log_softmax(kept, dim=-1))
    if tail == "drop" or target_topk.k == model.shape[-1]:
        return from_log_probs(divergence, target, kept)
    target, kept = together(target, kept)
    outside = target_topk.tail().detach().to(target.dtype).unsqueeze(-1)
    return from_log_probs(
        divergence,
        torch.cat([target, outside], dim=-1),
        torch.cat([kept, rest(model, ids).unsqueeze(-1)], dim=-1),
    )


def topk_expected_link(
    divergence: FDivergence,
    target_log_probs: Float[Tensor, "*batch k"],
    model_log_probs: Float[Tensor, "*batch k"],
) -> Float[Tensor, "*batch"]:
    """sum_S p~ g(q~ / p~) with model p~ and target q~ both renormalised over the tokens of S: a cheap baseline.

    S is usually the model's own top k. Detached, so that it changes no expected gradient, only the variance.
    With S = vocabulary it is `expected_link`. Source: vOPD, card 05.
    """
    with torch.no_grad():
        target, model = together(target_log_probs, model_log_probs)
        return total_link(divergence, torch.log_softmax(target, dim=-1), torch.log_softmax(model, dim=-1))


def rest(everything: Tensor, token_ids: Tensor) -> Tensor:
    """log of the mass outside `token_ids`, summed over the others: 1 - sum would lose a small tail."""
    others = everything.scatter(-1, token_ids, -torch.inf)
    empty = torch.isneginf(others).all(-1)  # there logsumexp would have a NaN gradient
    total = torch.logsumexp(torch.where(empty.unsqueeze(-1), torch.zeros_like(others), others), dim=-1)
    return torch.where(empty, torch.full_like(total, -torch.inf), total)


def check(target_topk: TopK, vocab: int, tail: str) -> None:
    if tail not in get_args(Tail):
        raise ValueError(f'tail="{tail}": choose one of {", ".join(get_args(Tail))}')
    if target_topk.k > vocab:
        raise ValueError(f"target_topk has k={target_topk.k} tokens, the model's vocabulary {vocab}")
