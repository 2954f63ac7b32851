"""Several processes as one: who writes, and numbers that agree for all. With one process everything is at once."""

import os
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


def several() -> bool:
    """More than one process runs together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_main() -> bool:
    """The process that writes files and speaks. Known from the launcher before processes have met."""
    return dist.get_rank() == 0 if several() else os.environ.get("RANK", "0") == "0"


def wait_for_all() -> None:
    """Return when every process has come here."""
    if several():
        dist.barrier()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of every process's value."""
    if several():
        value = value.clone()
        dist.all_reduce(value)
    return value


def from_all(value: Value) -> list[Value]:
    """Every process's value, in the order of their ranks, on every process."""
    if not several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Value) -> Value:
    """The main process's value, on every process."""
    if not several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
