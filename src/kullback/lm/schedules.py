"""What changes over time in language-model runs: controllers that read metrics."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final


@final
@dataclass(frozen=True)
class EntropyGate:
    """Lengthen training text only while the student stays undecided enough (arXiv 2605.16826, curriculum).

    Starts at the first of `lengths`. After each probe: entropy on the student's own held-out text at least
    `minimum_entropy` nats per token moves to the next length; the first time it is less, the length stays for good.
    """

    lengths: tuple[int, ...]
    minimum_entropy: float

    reads: tuple[str, ...] = ("probe/entropy",)
    writes: tuple[str, ...] = ("source.max_completion",)
    when: Literal["step", "probe"] = "probe"

    def __post_init__(self) -> None:
        if list(self.lengths) != sorted(set(self.lengths)) or self.lengths[0] < 1:
            raise ValueError(f"schedule.lengths={list(self.lengths)} must be positive and increasing")

    def __str__(self) -> str:
        rungs = ", ".join(map(str, self.lengths))
        return f"a length of {rungs} while entropy is at least {self.minimum_entropy:g} nats per token"

    def start(self) -> tuple[dict[str, Any], dict[str, float]]:
        return {"rung": 0, "stopped": False}, {"source.max_completion": float(self.lengths[0])}

    def update(
        self, state: dict[str, Any], step: int, seen: Mapping[str, float]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        rung, stopped = state["rung"], state["stopped"] or seen["probe/entropy"] < self.minimum_entropy
        if not stopped:
            rung = min(rung + 1, len(self.lengths) - 1)
        return {"rung": rung, "stopped": stopped}, {"source.max_completion": float(self.lengths[rung])}


@final
@dataclass(frozen=True)
class NearerToTarget:
    """Lets a proposal be renewed when, since the last time, the student's KL(p || student) was below its own."""

    every: int

    when: Literal["step", "probe"] = "step"
    reads: tuple[str, ...] = ("rollout/target_forward_kl", "rollout/proposal_forward_kl")
    writes: tuple[str, ...] = ("source.adopt",)

    def __str__(self) -> str:
        return f"nearer to the target, over {self.every} steps"

    def start(self) -> tuple[dict[str, Any], dict[str, float]]:
        return {"ahead": 0.0}, {"source.adopt": 0.0}

    def update(
        self, state: dict[str, Any], step: int, seen: Mapping[str, float]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        if any(name not in seen for name in self.reads):
            return state, {"source.adopt": 0.0}
        gain = seen[self.reads[1]] - seen[self.reads[0]]
        ahead = (0.0 if step % self.every == 0 else state["ahead"]) + (gain if math.isfinite(gain) else 0.0)
        return {"ahead": ahead}, {"source.adopt": float(ahead > 0)}
