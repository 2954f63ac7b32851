"""Which prompts are worth drawing: sources around a source.

Every place of a step is filled on its own, so a draw does not depend on how places are spread over processes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from kullback.lm.advantages import informative as informative_rows
from kullback.lm.moment import Moment
from kullback.lm.rollout import Origin, Rollout, concatenate
from kullback.lm.sources import Placed, Source
from kullback.lm.tasks import Problem

Reward = Callable[[Rollout], Float[Tensor, "row"]]

TRIES = 8  # problems looked at for a place before the last is taken whatever it is


@dataclass(frozen=True)
class Around(Source):
    """A source that another one writes for."""

    source: Source

    @property
    def writes(self) -> frozenset[Origin]:  # type: ignore[override]
        return self.source.writes

    def rehearse(self, rollout: Rollout) -> Rollout:
        return self.source.rehearse(rollout)

    def write(self, problems: Placed, at: Moment) -> Rollout:
        return self.source.write(problems, at)


@final
@dataclass(frozen=True)
class InformativeSource(Around):
    """See `informative`."""

    reward: Reward
    turns: int

    @property
    def says(self) -> str:  # type: ignore[override]
        often = "once" if self.turns == 1 else f"{self.turns} times"
        return f"{self.source.says}; groups of equal reward are drawn again, at most {often}"

    def draw(self, at: Moment) -> Rollout:
        kept, count = [], at.prompts_per_step
        placed = self.source.problems(at)
        for turn in range(self.turns + 1):
            rollout = self.write(placed, at)
            for note in rollout.notes:
                note["turn"] = turn
            good = informative_rows(self.reward(rollout), rollout.group) | (turn == self.turns)
            kept += [rollout.rows(good.nonzero()[:, 0].tolist())] if good.any() else []
            left = {note["place"] % count for note, fine in zip(rollout.notes, good.tolist(), strict=True) if not fine}
            if not left:
                break
            placed = [item for item in self.source.problems(at, turn + 1) if item[0] % count in left]
        return concatenate(kept)


@final
@dataclass(frozen=True)
class PassRateSource(Around):
    """See `by_pass_rate`."""

    low: float
    high: float

    @property
    def says(self) -> str:  # type: ignore[override]
        return f"{self.source.says}; on problems solved in {self.low:.0%} to {self.high:.0%} of the attempts so far"

    def problems(self, at: Moment, turn: int = 0) -> Placed:
        chosen: dict[int, tuple[int, Problem]] = {}
        found: set[int] = set()
        for attempt in range(TRIES):
            placed = self.source.problems(at, turn * TRIES + attempt)
            rates = at.ledger.mean("accuracy", [problem.id for _, problem in placed]).tolist()
            for item, rate in zip(placed, rates, strict=True):
                place = item[0] % at.prompts_per_step
                if place not in found:
                    chosen[place] = item
                    if rate != rate or self.low <= rate <= self.high:  # nan: never tried
                        found.add(place)
            if len(found) == len(chosen):
                break
        return list(chosen.values())


def informative(source: Source, reward: Reward, turns: int) -> Source:
    """Dynamic sampling: a place whose group has equal rewards is drawn again, for another problem.

    After `turns` further draws the last group stays, informative or not, so a step always has its rows.

    Args:
        reward: of a rollout's rows; nan where it is unknown.

    Source: DAPO, arXiv 2503.14476, section 3.2. Differs: only the places that need it are drawn again.
    """
    if turns < 0:
        raise ValueError(f"source.redraws={turns} must be at least 0")
    return InformativeSource(source, reward, turns) if turns else source


def by_pass_rate(source: Source, low: float, high: float) -> Source:
    """Pass over problems whose mean accuracy so far, in the ledger, is outside low to high; untried ones are in.

    The method must count: `step.ledger.add("accuracy", ids, accuracy)` in `weight`.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"source.pass_rate={[low, high]} must be two numbers between 0 and 1, the lower one first")
    return source if (low, high) == (0, 1) else PassRateSource(source, low, high)
