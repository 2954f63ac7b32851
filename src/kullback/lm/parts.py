"""What is trained beside the student and reads its hidden states: a value head."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kullback.run.seeds import derive

ATTRIBUTE = "kullback_parts"  # under this name the parts hang on the student, so that DDP and checkpoints see them


@dataclass(frozen=True)
class Part:
    """A module from a hidden state to one number.

    Args:
        build: makes it, from the width of the student's hidden states.
        learning_rate: its own; None takes the student's.
        detach: do not let its gradient reach the student's trunk.
    """

    build: Callable[[int], nn.Module]
    learning_rate: float | None = None
    detach: bool = False


def linear(width: int) -> nn.Module:
    """A linear read-out that starts at zero, so that the first values say nothing."""
    head = nn.Linear(width, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def build_parts(parts: dict[str, Part], width: int, *, seed: int, device: str | torch.device) -> dict[str, nn.Module]:
    """The modules, in float32, the same for every rank."""
    made = {}
    for name, part in parts.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "part", name))
            made[name] = part.build(width).to(device=device, dtype=torch.float32)
    return made


def read_part(module: nn.Module, hidden: Float[Tensor, "scored width"], detach: bool) -> Float[Tensor, "scored"]:
    """What a part says at each scored position."""
    return module((hidden.detach() if detach else hidden).float()).squeeze(-1)
