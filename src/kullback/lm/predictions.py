"""Next-token distributions at the scored positions, of a target or of the model: one type for both sides.

Only scored positions are kept, so what is masked cannot reach a loss. Methods see grids [row, completion]; the
divergences see rows [scored]. No kind holds a [scored, vocab] tensor unless it was given one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kullback.divergence import TopK, divergence
from kullback.lm.models import Head, at_least_float32

Kind = Literal["hidden", "logits", "top_k", "sampled"]
LOGITS_PER_CHUNK = 1 << 24  # entries of [chunk, vocab] that statistics hold at a time: 64 MiB in float32


@dataclass(frozen=True)
class Predictions(ABC):
    """What is known of a next-token distribution at each scored position.

    Args:
        scored: which completion tokens.
        tokens: those tokens.
    """

    scored: Bool[Tensor, "row completion"]
    tokens: Int[Tensor, "scored"]
    kind: ClassVar[Kind]

    def grid(self, values: Float[Tensor, "scored"]) -> Float[Tensor, "row completion"]:
        """Put one number per scored token at its place; 0 elsewhere."""
        return torch.zeros(self.scored.shape, dtype=values.dtype, device=values.device).masked_scatter(
            self.scored, values
        )

    def log_probs(self) -> Float[Tensor, "row completion"]:
        """Of the written tokens, in nats."""
        return self.grid(self.token_log_probs())

    @abstractmethod
    def token_log_probs(self) -> Float[Tensor, "scored"]: ...

    @abstractmethod
    def pick(self, keep: Bool[Tensor, "scored"]) -> dict[str, Any]:
        """The fields of this kind at some of the scored positions."""

    def where(self, mask: Bool[Tensor, "row completion"]) -> Self:
        """Only the positions that `mask` has too: what is masked costs nothing."""
        keep = mask[self.scored]
        if bool(keep.all()):
            return self
        return replace(self, scored=self.scored & mask, tokens=self.tokens[keep], **self.pick(keep))


@dataclass(frozen=True)
class FullPredictions(Predictions):
    """The whole vocabulary, one chunk of positions at a time."""

    @property
    @abstractmethod
    def vocab(self) -> int: ...

    @abstractmethod
    def logits_of(self, chunk: slice) -> Float[Tensor, "chunk vocab"]:
        """In float32; -inf where the head has a column for no token."""

    def entropy(self) -> Float[Tensor, "row completion"]:
        """In nats, with gradient."""
        return self.grid(over_vocabulary(lambda logits, _: _entropy(logits), self))

    def top(self, k: int) -> TopK:
        """The k likeliest tokens, their log-probabilities and the mass outside, without gradient."""
        with torch.no_grad():
            parts = [
                TopK.from_logits(self.logits_of(chunk), min(k, self.vocab))
                for chunk in chunks(len(self.tokens), self.vocab)
            ]
        return TopK(
            torch.cat([part.log_probs for part in parts]),
            torch.cat([part.token_ids for part in parts]),
            torch.cat([part.tail() for part in parts]),
        )

    def gather(self, token_ids: Int[Tensor, "scored k"]) -> Float[Tensor, "scored k"]:
        """Log-probabilities of chosen tokens, with gradient."""
        return over_vocabulary(lambda logits, at: logits.log_softmax(-1).gather(-1, token_ids[at]), self)


@dataclass(frozen=True)
class HiddenPredictions(FullPredictions):
    """Hidden states and the head that turns them into logits: the default, and exact."""

    hidden: Float[Tensor, "scored width"]
    head: Head
    kind = "hidden"

    @property
    def vocab(self) -> int:
        return self.head.matrix.shape[0]

    def logits_of(self, chunk: slice) -> Float[Tensor, "chunk vocab"]:
        return self.head.logits(self.hidden[chunk])

    def pick(self, keep: Bool[Tensor, "scored"]) -> dict[str, Any]:
        return {"hidden": self.hidden[keep]}

    def token_log_probs(self) -> Float[Tensor, "scored"]:
        # Forward KL from the written token's point mass is its negative log-probability, so the fused loss serves.
        certain = torch.zeros(len(self.tokens), 1, device=self.tokens.device)
        one_hot = TopK(certain, self.tokens[:, None], torch.full_like(certain[:, 0], -torch.inf))
        return -divergence("forward_kl").linear_topk(
            one_hot,
            self.hidden,
            self.head.matrix,
            model_bias=self.head.bias,
            model_logit_scale=self.head.scale,
            model_softcap=self.head.softcap,
        )


@dataclass(frozen=True)
class LogitPredictions(FullPredictions):
    """Logits as they are."""

    logits: Float[Tensor, "scored vocab"]
    kind = "logits"

    @property
    def vocab(self) -> int:
        return self.logits.shape[-1]

    def logits_of(self, chunk: slice) -> Float[Tensor, "chunk vocab"]:
        return at_least_float32(self.logits[chunk])

    def pick(self, keep: Bool[Tensor, "scored"]) -> dict[str, Any]:
        return {"logits": self.logits[keep]}

    def token_log_probs(self) -> Float[Tensor, "scored"]:
        return at_least_float32(self.logits).log_softmax(-1).gather(-1, self.tokens[:, None])[:, 0]


@dataclass(frozen=True)
class TopKPredictions(Predictions):
    """The k likeliest tokens, and the written one: what a cache or a server keeps."""

    top_k: TopK
    written: Float[Tensor, "scored"]
    kind = "top_k"

    def pick(self, keep: Bool[Tensor, "scored"]) -> dict[str, Any]:
        top = self.top_k
        tail = None if top.log_tail is None else top.log_tail[keep]
        return {"top_k": TopK(top.log_probs[keep], top.token_ids[keep], tail), "written": self.written[keep]}

    def token_log_probs(self) -> Float[Tensor, "scored"]:
        return self.written


@dataclass(frozen=True)
class SampledPredictions(Predictions):
    """Log-probabilities of the written tokens alone."""

    written: Float[Tensor, "scored"]
    kind = "sampled"

    def pick(self, keep: Bool[Tensor, "scored"]) -> dict[str, Any]:
        return {"written": self.written[keep]}

    def token_log_probs(self) -> Float[Tensor, "scored"]:
        return self.written


def chunks(count: int, vocab: int) -> list[slice]:
    """Slices of positions whose logits fit in one buffer."""
    size = max(LOGITS_PER_CHUNK // max(vocab, 1), 1)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)] or [slice(0, 0)]


def over_vocabulary(statistic: Callable[..., Tensor], *predictions: FullPredictions) -> Float[Tensor, "scored *rest"]:
    """statistic(logits of each, chunk) for chunk after chunk, so that no [scored, vocab] tensor is ever kept.

    With gradient the logits are computed a second time in the backward pass.
    """
    first = predictions[0]

    def one(chunk: slice) -> Tensor:
        return statistic(*(prediction.logits_of(chunk) for prediction in predictions), chunk)

    pieces = chunks(len(first.tokens), max(prediction.vocab for prediction in predictions))
    if len(pieces) == 1 or not torch.is_grad_enabled():
        return torch.cat([one(chunk) for chunk in pieces])
    return torch.cat([checkpoint(one, chunk, use_reentrant=False) for chunk in pieces])


def _entropy(logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n"]:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)
