"""Means over micro-batches and ranks, by name."""

import torch
import torch.distributed as dist
from torch import Tensor

from kullback.run.processes import several


class Tally:
    """Sums and counts that are added up while a step runs and turned into means at its end."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Count `total` over `count` items; a name whose count stays 0 is left out of the means."""
        pair = torch.stack([torch.as_tensor(part, dtype=torch.float64).detach().cpu() for part in (total, count)])
        self._sums.setdefault(name, []).append(pair)

    def take(self, *, sums: tuple[str, ...] = ()) -> dict[str, float]:
        """The means over all ranks (the totals for names in `sums`); starts anew."""
        local = {name: torch.stack(pairs).sum(0) for name, pairs in self._sums.items()}
        self._sums = {}
        if several():
            gathered: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(gathered, local)
            names = {name for part in gathered for name in part}
            local = {
                name: sum((part[name] for part in gathered if name in part), torch.zeros(2)) for name in sorted(names)
            }
        return {
            name: float(total if name in sums else total / count)
            for name, (total, count) in ((name, pair.tolist()) for name, pair in local.items())
            if count > 0
        }
