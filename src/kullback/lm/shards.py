"""A student in shards (FSDP2): what works under them, whole again where it must be, and refused where it cannot.

Every process has to call a model in shards equally often, since each call gathers weights. Training does. What writes
text, measures scores, grades or saves does not: it runs inside `whole`, for which the weights are gathered once.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from kullback.lm.method import Method
from kullback.lm.settings import TrainSettings
from kullback.run.processes import is_main


def in_shards(model: Any) -> bool:
    """Whether FSDP2 has the model's weights, so that every process must call it equally often."""
    return any(kind.__name__ == "FSDPModule" for kind in type(model).__mro__)


@contextmanager
def whole(model: Any) -> Iterator[None]:
    """While inside, each process holds all weights and may call the model as often as it likes; only to read them.

    Every process enters and leaves together. A model that is not in shards is as it was.
    """
    if not in_shards(model):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    parts: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    model._get_fsdp_state()._lazy_init()  # the first forward pass would decide anew what is sharded after it
    states = [part._get_fsdp_state() for part in parts]
    groups = [group for state in states for group in _groups(state)]
    before = [group.post_forward_mesh_info for group in groups]
    for part in parts:
        part.unshard()
    for group in groups:
        group.post_forward_mesh_info = None  # not sharded again after a forward pass
    try:
        yield
    finally:
        for group, mesh in zip(groups, before, strict=True):
            group.post_forward_mesh_info = mesh
        for part in parts:
            part.reshard()


def _groups(state: Any) -> list[Any]:
    """Weights that are gathered together; torch below 2.12 has one group in a module, or none."""
    several = getattr(state, "_fsdp_param_groups", None)
    return [group for group in ([state._fsdp_param_group] if several is None else several) if group is not None]


def whole_state(model: Any) -> dict[str, Tensor] | None:
    """All weights by name on the main process's CPU, to be saved; nothing on the others, which must call it too.

    None where the model is not in shards: `save_pretrained` then finds the weights itself.
    """
    if not in_shards(model):
        return None
    from torch.distributed.tensor import DTensor

    made: dict[int, Tensor] = {}  # tied weights stay one
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in made:
            full = value.full_tensor() if isinstance(value, DTensor) else value
            made[id(value)] = full.detach().cpu() if is_main() else full.new_empty(0)
        if is_main():
            state[name] = made[id(value)]
    return state


def check_launch(method: Method, players: Mapping[str, Any], settings: TrainSettings) -> None:
    """Whether what `accelerate launch` was asked for can train this.

    Raises:
        ValueError: weights would be sharded in a way that the run cannot be trained with, saying what to use instead.
    """
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        raise ValueError(
            "zero_stage=3 shards the head, which the loss needs whole: use zero_stage=2, or FSDP with fsdp_version=2"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(
            f"fsdp_version={version} keeps the head in a flat buffer, from which the loss cannot take it with its "
            "gradient: set fsdp_version=2"
        )
    if parts := ", ".join(method.parts()):
        raise ValueError(
            f"fsdp_version=2 would shard {parts}, which {type(method).__name__} trains beside the student and reads "
            "apart from it: launch without FSDP (DDP), or choose a method without such parts"
        )
    for name, player in players.items():
        if settings.lora is not None and isinstance(player, str) and player == "initial":
            raise ValueError(
                f"target.{name}='initial' with train.lora is the student in shards without its adapters, which not "
                "every process calls equally often: give it as a path, or launch without FSDP (DDP)"
            )
