"""What a run knows at one step: its weights, its data, its memory. All of it that changes is in the checkpoint."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kullback.lm.forwards import Forwards
from kullback.lm.ledger import Ledger
from kullback.lm.method import Method
from kullback.lm.players import Lazy
from kullback.lm.tasks import Problem, Task
from kullback.run.seeds import generator

if TYPE_CHECKING:
    from kullback.lm.cache import TopKCache


@dataclass
class Moment:
    """
    Args:
        players: models by name: "student", "teacher"; a `Lazy` one is loaded when it is first asked for.
        method: with its fields as the controllers have set them for this step.
        prompts_per_step: over all ranks.
        store: completions that are written once and read again, by name and problem id.
        ledger: numbers by name and problem id that outlive a step: pass rates, normalisers.
        parts: what is trained beside the student, by name.
        caches: teachers' predictions on disk, by directory.
        rank, world: this process, and how many there are.
        rows_at_once: how many rows are written or scored together where no gradient is kept.
        compile_decode: whether the steps that write are compiled.
        forwards: what frozen players said of the step's rows.
    """

    players: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    task: Task
    method: Method
    seed: int = 0
    step: int = 0
    prompts_per_step: int = 8
    store: dict[str, dict[str, Any]] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    parts: dict[str, nn.Module] = field(default_factory=dict)
    caches: dict[str, "TopKCache"] = field(default_factory=dict)
    rank: int = 0
    world: int = 1
    rows_at_once: int = 1024
    compile_decode: bool = False
    forwards: Forwards = field(default_factory=Forwards)

    def model(self, name: str) -> Any:
        """A player's model."""
        player = self.players[name]
        return player.get() if isinstance(player, Lazy) else player

    def problems(self, turn: int = 0, among: Collection[int] | None = None) -> list[tuple[int, Problem]]:
        """This rank's share of the step's problems, each with its place in the step.

        Problems are shuffled anew each epoch; the order is a function of the seed alone.

        Args:
            turn: 0, or which more of this step: every turn goes through the problems in an order of its own.
            among: the places in `task.train` that are drawn from; None draws from all.
        """
        count, chosen = self.prompts_per_step, []
        places = range(len(self.task.train)) if among is None else sorted(among)
        if not places:
            raise ValueError("there is no problem to draw from: every one was filtered out")
        for slot in range(self.rank, count, self.world):
            epoch, place = divmod(self.step * count + slot, len(places))
            key = (turn, epoch, len(places))
            order = self._orders.get(key)
            if order is None:
                purpose = "epoch" if turn == 0 else f"epoch/{turn}"
                order = torch.randperm(len(places), generator=generator(self.seed, purpose, epoch)).tolist()
                self._orders[key] = order
                self._orders = {k: o for k, o in self._orders.items() if k[1] >= epoch - 1 or k[0] != turn}
            chosen.append((slot + turn * count, self.task.train[places[order[place]]]))
        return chosen

    _orders: dict[tuple[int, int, int], list[int]] = field(default_factory=dict, repr=False)

    def uniforms(self, purpose: str, keys: list[tuple[int | str, ...]], width: int) -> Float[Tensor, "row width"]:
        """Numbers in [0, 1) that belong to a purpose and a key each, whatever else is drawn."""
        rows = [torch.rand(width, generator=generator(self.seed, purpose, *key), dtype=torch.float64) for key in keys]
        return torch.stack(rows)
