"""Networks and schedulers of diffusers, by the name of their class."""

from difflib import get_close_matches
from typing import Any


def from_diffusers(name: str, field: str = "network") -> Any:
    """A class of diffusers by its name: a network such as "UNet2DModel", or with field="scheduler" a scheduler.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: it has no such class.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f'{field}={name!r} needs diffusers: pip install "kullback[diffusion]"') from error
    kind = "SchedulerMixin" if field == "scheduler" else "ModelMixin"
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, getattr(diffusers, kind))):
        ending = "Scheduler" if field == "scheduler" else "Model"
        near = get_close_matches(name, [known for known in dir(diffusers) if known.endswith(ending)], n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{field}={name!r}: diffusers has no {field} of that name{hint}")
    return found
