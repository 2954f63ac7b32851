"""What changes over time: (state, metrics seen) -> (state, values). A plain schedule reads nothing."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, final


class Controller(Protocol):
    """Writes fields of a method while it runs.

    `reads` names metrics ("rollout/accuracy", "probe/entropy"), `writes` fields as a recipe names them
    ("signal.temperature"). `when` is "step" (before every optimiser step) or "probe" (after each held-out probe).
    `start` gives the first state and what is written before the first step. The state holds numbers and tensors only
    and is kept in every checkpoint.
    """

    @property
    def reads(self) -> tuple[str, ...]: ...
    @property
    def writes(self) -> tuple[str, ...]: ...
    @property
    def when(self) -> Literal["step", "probe"]: ...
    def start(self) -> tuple[dict[str, Any], dict[str, float]]: ...
    def update(
        self, state: dict[str, Any], step: int, seen: Mapping[str, float]
    ) -> tuple[dict[str, Any], dict[str, float]]: ...


@final
@dataclass(frozen=True)
class Ramp:
    """From one value to another over `steps` optimiser steps after `hold` steps at the first; then it stays.

    `shape` is "linear" or "cosine". Counts steps from 0: the first step has the first value.
    """

    field: str
    first: float
    last: float
    steps: int
    shape: Literal["linear", "cosine"] = "linear"
    hold: int = 0

    when: Literal["step", "probe"] = "step"
    reads: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 1 or self.hold < 0:
            raise ValueError(
                f"schedule of {self.field}: steps={self.steps} and hold={self.hold} must be at least 1 and 0"
            )

    def __str__(self) -> str:
        hold = f", hold={self.hold}" if self.hold else ""
        return f"{self.shape}({self.first:g} -> {self.last:g}, steps={self.steps}{hold})"

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.field,)

    def start(self) -> tuple[dict[str, Any], dict[str, float]]:
        return {}, {self.field: self.first}

    def update(
        self, state: dict[str, Any], step: int, seen: Mapping[str, float]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        share = min(max(step - self.hold, 0) / self.steps, 1.0)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return state, {self.field: self.first + (self.last - self.first) * share}


def parse_schedule(field: str, text: str) -> Ramp:
    """Read "linear(2.0 -> 1.0, steps=200)" or "cosine(0.5 -> 0, steps=100, hold=10)".

    >>> parse_schedule("signal.temperature", "linear(2 -> 1, steps=4)").update({}, 1, {})
    ({}, {'signal.temperature': 1.75})

    Raises:
        ValueError: the text is not of that form.
    """
    number = r"\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*"
    match = re.fullmatch(
        rf"\s*(linear|cosine)\({number}->{number},\s*steps\s*=\s*(\d+)(?:\s*,\s*hold\s*=\s*(\d+))?\s*\)\s*", text
    )
    if match is None:
        raise ValueError(
            f'schedule.{field}={text!r} is not understood; write "linear(2.0 -> 1.0, steps=200)" or "cosine(...)"'
        )
    shape, first, last, steps, hold = match.groups()
    return Ramp(
        field, float(first), float(last), int(steps), "cosine" if shape == "cosine" else "linear", int(hold or 0)
    )
