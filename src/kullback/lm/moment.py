"""What a run knows at one step: its weights, its data, its memory. All of it that changes is in the checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kullback.lm.method import Method
from kullback.lm.tasks import Problem, Task
from kullback.run.seeds import generator

if TYPE_CHECKING:
    from kullback.lm.cache import TopKCache


class Lazy:
    """A model that is loaded when it is first needed: a teacher whose cache is full never is."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load, self._model = load, None

    def get(self) -> Any:
        if self._model is None:
            self._model = self._load()
        return self._model


@dataclass
class Moment:
    """
    Args:
        players: models by name: "student", "teacher"; a `Lazy` one is loaded when it is first asked for.
        method: with its fields as the controllers have set them for this step.
        prompts_per_step: over all ranks.
        store: completions that are written once and read again, by name and problem id.
        caches: teachers' predictions on disk, by directory.
        rank, world: this process, and how many there are.
        rows_at_once: how many rows are written or scored together where no gradient is kept.
    """

    players: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    task: Task
    method: Method
    seed: int = 0
    step: int = 0
    prompts_per_step: int = 8
    store: dict[str, dict[str, Any]] = field(default_factory=dict)
    caches: dict[str, "TopKCache"] = field(default_factory=dict)
    rank: int = 0
    world: int = 1
    rows_at_once: int = 1024

    def model(self, name: str) -> Any:
        """A player's model."""
        player = self.players[name]
        return player.get() if isinstance(player, Lazy) else player

    def problems(self) -> list[tuple[int, Problem]]:
        """This rank's share of the step's problems, each with its place in the step.

        Problems are shuffled anew each epoch; the order is a function of the seed alone.
        """
        count, size = self.prompts_per_step, len(self.task.train)
        chosen = []
        for slot in range(self.rank, count, self.world):
            epoch, place = divmod(self.step * count + slot, size)
            order = self._orders.get(epoch)
            if order is None:
                order = torch.randperm(size, generator=generator(self.seed, "epoch", epoch)).tolist()
                self._orders = {epoch: order} | {e: o for e, o in self._orders.items() if e == epoch - 1}
            chosen.append((slot, self.task.train[order[place]]))
        return chosen

    _orders: dict[int, list[int]] = field(default_factory=dict, repr=False)

    def uniforms(self, purpose: str, keys: list[tuple[int | str, ...]], width: int) -> Float[Tensor, "row width"]:
        """Numbers in [0, 1) that belong to a purpose and a key each, whatever else is drawn."""
        rows = [torch.rand(width, generator=generator(self.seed, purpose, *key), dtype=torch.float64) for key in keys]
        return torch.stack(rows)
