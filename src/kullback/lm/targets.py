"""Match what: a frozen model reading a prompt of its own, whole or as the k likeliest tokens, fresh or from a cache."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch

from kullback.lm.cache import row_key
from kullback.lm.chat import prompt_ids
from kullback.lm.layout import Layout, Side, lay_out
from kullback.lm.models import head_of, hidden_states
from kullback.lm.moment import Moment
from kullback.lm.predictions import FullPredictions, HiddenPredictions, LogitPredictions, Predictions, TopKPredictions
from kullback.lm.rollout import Rollout


class Target(ABC):
    """Next-token distributions for the tokens of a rollout, without gradient to their parameters."""

    says: str

    @abstractmethod
    def predict(self, rollout: Rollout, at: Moment) -> Predictions: ...

    def rehearse(self, full: FullPredictions) -> Predictions:
        """Made-up predictions of the kind this target gives."""
        return full


def read(
    model: Any,
    rollout: Rollout,
    *,
    prompts: list[list[int]] | None = None,
    side: Side = "right",
    pad_id: int = 0,
    wrapped: Any = None,
) -> FullPredictions:
    """One forward pass over prompts (the student's, unless others are given) and completions."""
    layout: Layout = lay_out(
        prompts or rollout.prompts, rollout.completions, rollout.scored, rollout.lengths, side=side, pad_id=pad_id
    )
    hidden, head = hidden_states(model, layout, wrapped=wrapped), head_of(model)
    if head.weight is None:
        return LogitPredictions(layout.scored, layout.tokens, head.logits(hidden))
    return HiddenPredictions(layout.scored, layout.tokens, hidden, head)


@final
@dataclass(frozen=True)
class FrozenTarget(Target):
    """See `frozen`."""

    player: str
    system: str | None
    top_k: int | None
    cache: str | None

    @property
    def says(self) -> str:  # type: ignore[override]
        own = ", reading a system prompt of its own" if self.system is not None else ""
        kept = f", its {self.top_k} likeliest tokens" if self.top_k else ""
        return f"{self.player}{own}{kept}" + (f" (kept in {self.cache})" if self.cache else "")

    def rehearse(self, full: FullPredictions) -> Predictions:
        return full if self.top_k is None else _likeliest(full, self.top_k)

    def predict(self, rollout: Rollout, at: Moment) -> Predictions:
        prompts = rollout.prompts
        if self.system is not None:
            prompts = [prompt_ids(at.tokenizer, note["messages"], system=self.system) for note in rollout.notes]

        def full(part: Rollout, part_prompts: list[list[int]]) -> FullPredictions:
            with torch.no_grad():
                return read(at.model(self.player), part, prompts=part_prompts)

        if self.top_k is None:
            return full(rollout, prompts)
        if self.cache is None:
            return _likeliest(full(rollout, prompts), self.top_k)
        return self._from_cache(rollout, prompts, full, at)

    def _from_cache(
        self,
        rollout: Rollout,
        prompts: list[list[int]],
        full: Callable[[Rollout, list[list[int]]], FullPredictions],
        at: Moment,
    ) -> Predictions:
        assert self.cache is not None
        assert self.top_k is not None
        kept = at.caches[self.cache]
        keys = [
            row_key(
                prompts[i],
                rollout.completions[i, : int(rollout.lengths[i])].tolist(),
                rollout.scored[i].nonzero()[:, 0].tolist(),
            )
            for i in range(len(rollout))
        ]
        missing = [i for i, key in enumerate(keys) if key not in kept]
        if missing:
            seen = _likeliest(full(rollout.rows(missing), [prompts[i] for i in missing]), self.top_k)
            counts = seen.scored.sum(1).tolist()
            top = seen.top_k
            parts = (top.log_probs, top.token_ids, top.tail(), seen.written)
            for i, *row in zip(missing, *(part.split(counts) for part in parts), strict=True):
                kept.add(keys[i], *row)
        return kept.predictions(keys, rollout)


@torch.no_grad()
def _likeliest(full: FullPredictions, k: int) -> TopKPredictions:
    return TopKPredictions(full.scored, full.tokens, full.top(k), full.token_log_probs())


def frozen(player: str, *, system: str | None = None, top_k: int | None = None, cache: str | None = None) -> Target:
    """A player's next-token distributions at the written tokens.

    Args:
        player: which weights.
        system: a system prompt that only this target reads.
        top_k: keep the k likeliest tokens; the divergence accounts for the rest in a bucket.
        cache: directory on disk where those are kept, written as they are first needed.

    Raises:
        ValueError: a cache without top_k.
    """
    if cache is not None and top_k is None:
        raise ValueError(
            "target.cache keeps the teacher's likeliest tokens: say how many with target.top_k, for example 64"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"target.top_k={top_k} must be at least 1")
    return FrozenTarget(player, system, top_k, cache)
