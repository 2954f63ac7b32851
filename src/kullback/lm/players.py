"""The models beside the student: loaded when first needed, the student as it started, and weights copied between."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kullback.lm.shards import in_shards, whole

INITIAL = "initial"  # a player of this name for a model is the student as it starts


class Lazy:
    """A model that is loaded when it is first needed: a teacher whose cache is full never is."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load, self._model = load, None

    @property
    def loaded(self) -> Any | None:
        """The model if it has been needed already."""
        return self._model

    def get(self) -> Any:
        if self._model is None:
            self._model = self._load()
        return self._model


class AdapterOff:
    """A student with adapters as it was without them: the reference of a LoRA run costs no memory of its own."""

    def __init__(self, student: Any) -> None:
        if type(student.get_output_embeddings()) is not nn.Linear:
            raise ValueError(
                "target.reference='initial': train.lora.target_modules adapts the output layer, which is read outside "
                "the model; give the reference as a path, or leave the output layer out"
            )
        self._student = student

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._student.disable_adapter():
            return self._student(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._student, name)


def initial(student: Any) -> Any:
    """The student as it is now, frozen: its base where it has adapters, otherwise a copy."""
    if hasattr(student, "disable_adapter"):
        return AdapterOff(student)
    return copy.deepcopy(student).eval().requires_grad_(False)


@dataclass(frozen=True)
class Copy:
    """to <- (1 - rate) * to + rate * source, for all weights of two players of one architecture."""

    source: str
    to: str
    rate: float = 1.0


@torch.no_grad()
def copy_weights(source: Any, to: Any, rate: float) -> Iterable[Tensor]:
    """Move the parameters of `to`, in place; returns them.

    Raises:
        ValueError: the two have different parameters, or `to` is in shards.
    """
    if in_shards(to):
        raise ValueError("weights cannot be copied into a model in shards: launch without FSDP (DDP)")
    with whole(source):
        return _copy_weights(source, to, rate)


def _copy_weights(source: Any, to: Any, rate: float) -> Iterable[Tensor]:
    theirs, ours = dict(source.named_parameters()), dict(to.named_parameters())
    if theirs.keys() != ours.keys() or any(theirs[name].shape != ours[name].shape for name in ours):
        raise ValueError("weights can only be copied between two models of one architecture, both without adapters")
    for name, parameter in ours.items():
        if rate == 1.0:
            parameter.copy_(theirs[name])
        else:
            parameter.lerp_(theirs[name].to(parameter), rate)
    return ours.values()
