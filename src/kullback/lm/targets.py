"""Match what: a frozen model reading a prompt of its own, whole or as the k likeliest tokens, fresh or from a cache."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from kullback.lm.chat import prompt_ids
from kullback.lm.forwards import read as read
from kullback.lm.forwards import row_keys
from kullback.lm.models import context_length, head_of
from kullback.lm.moment import Moment
from kullback.lm.predictions import (
    FullPredictions,
    HiddenPredictions,
    LogitPredictions,
    Predictions,
    TopKPredictions,
)
from kullback.lm.rollout import Rollout


class Target(ABC):
    """Next-token distributions for the tokens of a rollout, without gradient to their parameters."""

    says: str

    @abstractmethod
    def predict(self, rollout: Rollout, at: Moment) -> Predictions: ...

    def rehearse(self, full: FullPredictions) -> Predictions:
        """Made-up predictions of the kind this target gives."""
        return full


@final
@dataclass(frozen=True)
class FrozenTarget(Target):
    """See `frozen`."""

    player: str
    system: str | None
    top_k: int | None
    cache: str | None
    hint: str | None = None
    template: str = "{prompt}"

    @property
    def says(self) -> str:  # type: ignore[override]
        own = ", reading a system prompt of its own" if self.system is not None else ""
        own += f", reading the {self.hint} of each row too" if self.hint is not None else ""
        kept = f", its {self.top_k} likeliest tokens" if self.top_k else ""
        return f"{self.player}{own}{kept}" + (f" (kept in {self.cache})" if self.cache else "")

    def rehearse(self, full: FullPredictions) -> Predictions:
        return full if self.top_k is None else _likeliest(full, self.top_k)

    @property
    def own_prompt(self) -> bool:
        """Whether it reads another prompt than the student."""
        return self.system is not None or self.hint is not None

    def prompts(self, rollout: Rollout, at: Moment) -> list[list[int]]:
        """What the player reads before the completions; with `hint`, of rows that have one."""
        if self.hint is not None:
            return [self._hinted(note, at) for note in rollout.notes]
        if self.system is None:
            return rollout.prompts
        return [prompt_ids(at.tokenizer, note["messages"], system=self.system) for note in rollout.notes]

    def _hinted(self, note: dict[str, Any], at: Moment) -> list[int]:
        """The row's turns with the hint put into the last one, and nothing else that a reader noted."""
        assert self.hint is not None
        *before, last = note["messages"]
        asked = self.template.format(prompt=last["content"], hint=note.get(self.hint, ""))
        ids = prompt_ids(at.tokenizer, [*before, {**last, "content": asked}])
        room = context_length(at.model(self.player))
        if room is not None and len(ids) + at.method.max_completion > room:
            raise ValueError(
                f"problem {note.get('problem_id')!r}: with its hint the prompt has {len(ids)} tokens, which with "
                f"source.max_completion={at.method.max_completion} exceed the {self.player}'s context of {room}: "
                "shorten target.template, or lower source.max_completion"
            )
        return ids

    def predict(self, rollout: Rollout, at: Moment) -> Predictions:
        """With `hint`, only of rows that have one: nothing is said about the others, and they are not read."""
        if self.hint is None:
            return self._predict(rollout, at)
        index = [i for i, note in enumerate(rollout.notes) if note.get(self.hint)]
        if not index:
            head = head_of(at.model(self.player))
            nothing = torch.zeros_like(rollout.scored), rollout.completions[rollout.scored][:0]
            if head.weight is None:
                return LogitPredictions(*nothing, head.matrix.new_zeros(0, len(head.matrix)))
            return HiddenPredictions(*nothing, head.matrix.new_zeros(0, head.matrix.shape[1]), head)
        seen = self._predict(rollout.rows(index), at)
        scored = torch.zeros_like(rollout.scored)
        scored[index, : seen.scored.shape[1]] = seen.scored
        return replace(seen, scored=scored)

    def _predict(self, rollout: Rollout, at: Moment) -> Predictions:
        prompts = self.prompts(rollout, at)

        def full(part: Rollout, part_prompts: list[list[int]]) -> FullPredictions:
            return at.forwards.predict(self.player, at.model(self.player), part, part_prompts)

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
        keys = row_keys(rollout, prompts)
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


def reading(player: str, *, hint: str, template: str = "{prompt}\nHint: {hint}") -> Target:
    """A player that reads something about the row which the student does not: a note that a reader made.

    Its distributions are those at the row's own tokens, after a prompt whose last turn is the template; they are
    aligned by the place in the completion. No other note reaches the prompt. Rows without the note are not read.

    Args:
        player: which weights; the student itself sees its own present ones, without gradient.
        hint: name of the note, such as "label".
        template: of the last turn, from {prompt}, its content, and {hint}.

    Raises:
        ValueError: the template leaves one of the two out, or names something else.
    """
    try:
        found = template.format(prompt="\0", hint="\1")
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"target.template={template!r}: it may name {{prompt}} and {{hint}} only") from error
    if "\0" not in found or "\1" not in found:
        raise ValueError(f"target.template={template!r} must contain {{prompt}} and {{hint}}")
    return FrozenTarget(player, None, None, None, hint, template)
