"""Learning with divergences.

    D(target, model) = sum_x model(x) f(target(x) / model(x))

A training objective here is a divergence between a *target* and a *model*, measured on somebody's samples, with a
weight for each of them. `kullback.divergence` holds the first half of that sentence and needs nothing but torch;
`kullback.lm` holds the second half for language models and is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kullback.divergence import FDivergence, divergence, divergences

if TYPE_CHECKING:
    from kullback.lm.api import evaluate, train

__version__ = "0.1.0"
__all__ = ["FDivergence", "__version__", "divergence", "divergences", "evaluate", "train"]

_LAZY = {"train": "kullback.lm.api", "evaluate": "kullback.lm.api"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kullback' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
