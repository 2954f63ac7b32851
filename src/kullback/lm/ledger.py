"""Numbers that belong to problems and outlive a step: pass rates, normalisers. The same on every rank."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.run.processes import from_all


class Ledger:
    """Running means by name and problem id, and the last numbers of a name. It is part of every checkpoint."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, list[float]]] = {}
        self._last: dict[str, list[float]] = {}

    def add(self, name: str, ids: Sequence[str], values: Float[Tensor, "row"]) -> None:
        """Count a number for each row's problem; nan is left out. Every rank must call it, with rows of its own."""
        mine = [(i, float(value)) for i, value in zip(ids, values.tolist(), strict=True) if value == value]
        table = self._sums.setdefault(name, {})
        for rows in from_all(mine):
            for problem, value in rows:
                entry = table.setdefault(problem, [0.0, 0.0])
                entry[0] += value
                entry[1] += 1

    def mean(self, name: str, ids: Sequence[str], default: float = torch.nan) -> Float[Tensor, "row"]:
        """The mean of what was counted for each problem; `default` where nothing was."""
        table = self._sums.get(name, {})
        means = [table[i][0] / table[i][1] if i in table else default for i in ids]
        return torch.tensor(means, dtype=torch.float64)

    def ids(self, name: str) -> list[str]:
        """The problems with a number of this name, in the order in which they came."""
        return list(self._sums.get(name, {}))

    def push(self, name: str, values: Float[Tensor, "row"], keep: int) -> None:
        """Append numbers of all ranks and forget all but the last `keep`; nan is left out. Every rank must call it."""
        mine = [value for value in values.tolist() if value == value]
        self._last[name] = (self._last.get(name, []) + [value for rows in from_all(mine) for value in rows])[-keep:]

    def last(self, name: str) -> list[float]:
        """What was pushed under this name and is still kept, the oldest first."""
        return list(self._last.get(name, []))

    def state(self) -> dict[str, Any]:
        sums = {name: {problem: list(entry) for problem, entry in table.items()} for name, table in self._sums.items()}
        return {"sums": sums, "last": {name: list(values) for name, values in self._last.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._sums = {name: {i: list(entry) for i, entry in table.items()} for name, table in state["sums"].items()}
        self._last = {name: list(values) for name, values in state["last"].items()}
