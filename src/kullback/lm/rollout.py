"""What was written, and its grades: the one batch layout of the engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Origin(IntEnum):
    """Who wrote a token. Tokens of a tool or of the user stand in a completion to be read, never to be trained on."""

    PAD = 0
    DATASET = 1
    STUDENT = 2
    TEACHER = 3
    TOOL = 4


TRAINED = (Origin.DATASET, Origin.STUDENT, Origin.TEACHER)


@dataclass(frozen=True)
class Rollout:
    """Rows of text. A row is one trained completion; entry t is the token that the distribution at t predicts.

    Args:
        prompts: token ids the student reads; a target may read others.
        completions: token ids, padded on the right. No other shift or padding exists anywhere in the engine.
        origin: who wrote each token (`Origin`).
        log_probs: the sampler's own, in nats; nan where nobody sampled.
        group: rows that answer one prompt in this draw share a number.
        rewards: every verifier apart; "accuracy" is 0 or 1, nan where there is no verdict.
        notes: JSON-like facts of each row: problem_id, messages, answer, source.
    """

    prompts: list[list[int]]
    completions: Int[Tensor, "row completion"]
    origin: Int[Tensor, "row completion"]
    log_probs: Float[Tensor, "row completion"]
    group: Int[Tensor, "row"]
    rewards: dict[str, Float[Tensor, "row"]] = field(default_factory=dict)
    notes: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def scored(self) -> Bool[Tensor, "row completion"]:
        """Tokens that a loss may count."""
        return torch.isin(self.origin, torch.tensor(TRAINED, device=self.origin.device))

    @property
    def lengths(self) -> Int[Tensor, "row"]:
        """Tokens per completion, padding left out."""
        return (self.origin != Origin.PAD).sum(1)

    def rows(self, index: Sequence[int]) -> "Rollout":
        """Some rows, with padding that no row needs cut off."""
        chosen = torch.as_tensor(index, dtype=torch.long, device=self.origin.device)
        width = max(int(self.lengths[chosen].max()) if len(index) else 0, 1)
        return Rollout(
            prompts=[self.prompts[i] for i in index],
            completions=self.completions[chosen, :width],
            origin=self.origin[chosen, :width],
            log_probs=self.log_probs[chosen, :width],
            group=self.group[chosen],
            rewards={name: values[chosen] for name, values in self.rewards.items()},
            notes=[self.notes[i] for i in index],
        )

    def to(self, device: torch.device | str) -> "Rollout":
        """The same rows with their tensors on `device`."""
        return replace(
            self,
            completions=self.completions.to(device),
            origin=self.origin.to(device),
            log_probs=self.log_probs.to(device),
            group=self.group.to(device),
            rewards={name: values.to(device) for name, values in self.rewards.items()},
        )


def build_rollout(
    prompts: list[list[int]],
    completions: list[list[int]],
    origins: list[list[int]],
    *,
    log_probs: list[list[float]] | None = None,
    group: list[int] | None = None,
    rewards: list[dict[str, float]] | None = None,
    notes: list[dict[str, Any]] | None = None,
) -> Rollout:
    """Pad lists into a `Rollout`.

    Raises:
        ValueError: a prompt or a completion is empty, so that its first token has nothing to be predicted from or the
            row nothing to train on.
    """
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not prompt:
            raise ValueError(
                f"row {i}: the prompt has no tokens, so nothing predicts the first one: add a BOS token or text"
            )
        if not completion:
            raise ValueError(f"row {i}: the completion has no tokens: drop the row or give it a reply")
    rows, width = len(completions), max(len(completion) for completion in completions)
    ids = torch.zeros(rows, width, dtype=torch.long)
    origin = torch.full((rows, width), int(Origin.PAD))
    sampled = torch.full((rows, width), torch.nan)
    for i, completion in enumerate(completions):
        ids[i, : len(completion)] = torch.tensor(completion)
        origin[i, : len(completion)] = torch.tensor(origins[i])
        if log_probs is not None:
            sampled[i, : len(completion)] = torch.tensor(log_probs[i])
    names = sorted({name for row in rewards or [] for name in row})
    return Rollout(
        prompts=prompts,
        completions=ids,
        origin=origin,
        log_probs=sampled,
        group=torch.tensor(group if group is not None else list(range(rows))),
        rewards={name: torch.tensor([row.get(name, torch.nan) for row in rewards or []]) for name in names},
        notes=notes if notes is not None else [{} for _ in range(rows)],
    )


def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
    """Rows of several draws one below the other; their groups stay apart."""
    if len(rollouts) == 1:
        return rollouts[0]
    width = max(rollout.completions.shape[1] for rollout in rollouts)

    def pad(values: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)

    group, offset = [], 0
    for rollout in rollouts:
        group.append(rollout.group + offset)
        offset += int(rollout.group.max()) + 1
    names = sorted({name for rollout in rollouts for name in rollout.rewards})
    return Rollout(
        prompts=[prompt for rollout in rollouts for prompt in rollout.prompts],
        completions=torch.cat([pad(rollout.completions, 0) for rollout in rollouts]),
        origin=torch.cat([pad(rollout.origin, Origin.PAD) for rollout in rollouts]),
        log_probs=torch.cat([pad(rollout.log_probs, torch.nan) for rollout in rollouts]),
        group=torch.cat(group),
        rewards={
            name: torch.cat([r.rewards.get(name, torch.full((len(r),), torch.nan)) for r in rollouts]) for name in names
        },
        notes=[note for rollout in rollouts for note in rollout.notes],
    )
