"""What is asked before the first step: a model's answers to many problems, their grades, and what is fitted to them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.estimate.multipliers import fit_multipliers
from kullback.lm.energies import Energy
from kullback.lm.ledger import Ledger
from kullback.lm.moment import Moment
from kullback.lm.rollout import Origin, Rollout
from kullback.lm.sources import Placed, PlayerSource
from kullback.run.processes import from_all

MULTIPLIER = "multiplier"  # in the ledger: lambda by grade


def ask(
    player: str,
    chunks: Iterable[Placed],
    at: Moment,
    *,
    samples: int,
    grades: Sequence[str],
    field: str,
    once: bool = False,
) -> Iterator[tuple[Placed, Rollout, Float[Tensor, "problem sample grade"]]]:
    """A player's `samples` answers to each problem, chunk by chunk, and some of their grades; nothing is stored.

    Args:
        chunks: problems of this process that are written together.
        field: of the recipe, with its value, which names the grades; errors begin with it.
        once: draw by problem and sample alone, whatever the step and the place.

    Raises:
        ValueError: the verifier gives no such grade.
    """
    source = PlayerSource(player, Origin.STUDENT, once=once, grades=tuple(grades))
    for placed in chunks:
        if not placed:
            continue
        rollout = source.write(placed, replace(at, method=replace(at.method, samples=samples), store={}))
        absent = [repr(name) for name in grades if name not in rollout.rewards]
        if absent:
            raise ValueError(
                f"{field}: the verifier gives no {' or '.join(absent)}; it gives {', '.join(rollout.rewards)}"
            )
        yield (
            placed,
            rollout,
            torch.stack([rollout.rewards[name] for name in grades], -1).view(len(placed), samples, -1),
        )


def fit_to_moments(at: Moment, energy: Energy, *, player: str, prompts: int, samples: int) -> None:
    """Fit the multipliers of an energy that asks for moments, to a player's own completions; they go into the ledger.

    Every process draws its share of `prompts` problems, `samples` completions of each, and sees all. A prompt of which
    a grade is unknown is left out.

    Raises:
        ValueError: no prompt got all its grades; no tilt of these completions has the moments.
    """
    names, field = list(energy.moments), f"target.score={str(energy)!r}"
    chunks = (at.problems(turn) for turn in range(-(-prompts // at.prompts_per_step)))
    mine: list[list[list[float]]] = []
    for _, _, values in ask(player, chunks, at, samples=samples, grades=names, field=field):
        mine += values[~values.isnan().any(-1).any(-1)].tolist()
    every = [prompt for share in from_all(mine) for prompt in share]
    if not every:
        raise ValueError(f"{field}: no prompt got all its grades, so nothing can be fitted")
    features, wanted = (torch.tensor(one, dtype=torch.float64) for one in (every, list(energy.moments.values())))
    try:
        found = fit_multipliers(torch.zeros(features.shape[:2]), features, wanted)
    except ValueError as error:
        raise ValueError(
            f"{field}: {error} (features: the mean of {', '.join(names)} over {samples} completions of each of "
            f"{len(every)} prompts, in this order)"
        ) from error
    at.ledger.add(MULTIPLIER, names, found)


def fitted(ledger: Ledger, energy: Energy) -> dict[str, float]:
    """lambda by grade, as `fit_to_moments` found it; 0 before."""
    names = list(energy.moments)
    return dict(zip(names, ledger.mean(MULTIPLIER, names, default=0.0).tolist(), strict=True))
