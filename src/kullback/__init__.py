"""Learning with divergences.

    D(target, model) = sum_x model(x) f(target(x) / model(x))

A training objective here is a divergence between a *target* and a *model*, measured on somebody's samples, with a
weight for each of them. `kullback.divergence` holds the first half of that sentence and needs nothing but torch;
`kullback.lm` holds the second half for language models and is imported when it is first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kullback.divergence import FDivergence, divergence, divergences
    from kullback.lm.api import evaluate, train

__version__ = "0.1.0"
__all__ = ["FDivergence", "__version__", "divergence", "divergences", "evaluate", "train"]

_LAZY = {
    "train": "kullback.lm.api",
    "evaluate": "kullback.lm.api",
    "FDivergence": "kullback.divergence",
    "divergence": "kullback.divergence",
    "divergences": "kullback.divergence",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
        setattr(sys.modules[__name__], name, value)
        return value
    raise AttributeError(f"module 'kullback' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps `kb.divergence` the function: importing the submodule `divergence` would bind its name to the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "divergence" and isinstance(value, ModuleType):
            value = value.divergence
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
