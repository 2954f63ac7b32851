"""The plain driver for every domain but text: a `Learner` says who moves and by which terms, `fit` does the rest.

A learner has players: modules with an optimiser each, and modules that are only kept (an average, running means). In
every step some of them move. The others' parameters take no gradient in that step, so a term that runs through them
cannot train them by accident. Draws come from `generator(seed, purpose, step)`, so a resumed run needs no generator
state: on one CPU it ends with the same bits as a run that was never stopped.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kullback.run.directory import RunDirectory
from kullback.run.progress import ProgressBar
from kullback.run.state import load_state, save_state
from kullback.run.terms import Term, denominator, numerator


@dataclass(frozen=True)
class Player:
    """A module and how it is trained, by Adam with decoupled weight decay.

    Args:
        learning_rate: None keeps the module in the checkpoint but gives it no optimiser.
        last_learning_rate: the rate falls linearly to it over the steps in which the player moves; None keeps it.
        max_grad_norm: clips the norm of the player's gradient.
    """

    module: nn.Module
    learning_rate: float | None = None
    last_learning_rate: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = None


class Learner(Protocol):
    """What `fit` asks of a training run without text. A step is one draw and one move of some players."""

    def players(self) -> Mapping[str, Player]: ...
    def moves(self, step: int) -> tuple[str, ...]:
        """Who is updated in this step, counted from 0."""
        ...

    def draw(self, step: int) -> Any:
        """The step's batch: data, noise. All randomness is here, and depends on the seed and the step alone."""
        ...

    def terms(self, batch: Any, step: int) -> list[Term]:
        """What is minimised: values per row. Their sum is differentiated for the players that move."""
        ...

    def after(self, step: int) -> None:
        """Once the players have moved: averages, copies."""
        ...


@dataclass(frozen=True)
class Fitted:
    """What `fit` hands back: steps done, whether all of them, and the rows that were logged."""

    steps: int
    finished: bool
    metrics: list[dict[str, Any]]


def fit(
    learner: Learner,
    steps: int,
    directory: RunDirectory | None = None,
    *,
    resume: bool = False,
    save_every: int = 0,
    log_every: int = 1,
    watch: Callable[[int], Mapping[str, float]] | None = None,
    what: str = "train",
) -> Fitted:
    """Train for `steps` steps.

    Args:
        directory: where metrics and checkpoints go; None keeps the metrics in memory and writes nothing.
        resume: go on from the last complete checkpoint of the directory, if there is one.
        save_every: steps between checkpoints; 0 writes one only when stopped.
        log_every: steps between rows; a row has the mean of each term over the steps since the last one.
        watch: more numbers for a row, after that many steps; it may not draw from a shared generator.

    On Ctrl-C or SIGTERM the step is finished, a checkpoint is written and `finished` is False; a second signal stops
    at once.

    Raises:
        ValueError: steps < 1, a player that moves has no learning rate, or a loss is not finite.
    """
    if steps < 1 or log_every < 1 or save_every < 0:
        raise ValueError(f"steps={steps}, log_every={log_every}, save_every={save_every}: must be >= 1, >= 1 and >= 0")
    players = dict(learner.players())
    counts = {name: sum(name in learner.moves(step) for step in range(steps)) for name in players}
    for name, count in counts.items():
        if count and players[name].learning_rate is None:
            raise ValueError(f"player {name!r} moves but has no learning_rate: give it one, or leave it out of moves")
    optimisers = {name: _optimiser(player) for name, player in players.items() if player.learning_rate is not None}
    moved, start = dict.fromkeys(players, 0), 0
    checkpoint = directory.last_checkpoint() if resume and directory is not None else None
    if checkpoint is not None:
        moved = _restore(load_state(checkpoint), players, optimisers)
        start = RunDirectory.checkpoint_step(checkpoint)
    if directory is not None:
        directory.truncate_after(start)
    rows: list[dict[str, Any]] = []
    sums: dict[str, list[float]] = {}
    began, done = time.monotonic(), start
    with ProgressBar(steps, what, start=start) as progress, stop_between_steps() as stopped:
        for step in range(start, steps):
            who = learner.moves(step)
            for name, value in _step(learner, step, who, players, optimisers, moved, counts).items():
                sums.setdefault(name, []).append(value)
            learner.after(step)
            done = step + 1
            if done % log_every == 0 or done == steps:
                means = {name: sum(values) / len(values) for name, values in sums.items()}
                row = {"step": done, "time": time.monotonic() - began, **means, **(watch(done) if watch else {})}
                sums = {}
                rows.append(row)
                if directory is not None:
                    directory.append_metrics(row)
                progress.advance(done - progress.done, **dict(list(means.items())[:3]))
            due = bool(save_every) and done % save_every == 0
            if directory is not None and (due or stopped() or (save_every and done == steps)):
                save_state(_state(players, optimisers, moved), directory.checkpoint(done))
                directory.mark_complete(directory.checkpoint(done))
            if stopped():
                break
    return Fitted(done, done == steps, rows)


def _step(
    learner: Learner,
    step: int,
    who: tuple[str, ...],
    players: Mapping[str, Player],
    optimisers: Mapping[str, torch.optim.Optimizer],
    moved: dict[str, int],
    counts: Mapping[str, int],
) -> dict[str, float]:
    """One draw, one backward pass, one step of the optimisers of those who move. Returns the mean of each term."""
    for name, player in players.items():
        player.module.requires_grad_(name in who)
    terms = learner.terms(learner.draw(step), step)
    total: Tensor | None = None
    seen: dict[str, float] = {}
    for term in terms:
        columns = {"scored": torch.ones(len(term.value), dtype=torch.bool, device=term.value.device)}
        mean = numerator(term, columns) / denominator(columns, term.over, term.mean, term.weight)
        total = term.coefficient * mean + (0.0 if total is None else total)
        seen[term.name] = float((term.value if term.shown is None else term.shown).detach().mean())
        seen.update({f"{term.name}/{name}": float(value.float().mean()) for name, value in term.seen.items()})
    if total is None or not torch.isfinite(total):
        raise ValueError(f"step {step}: the loss of {', '.join(who)} is {total}; lower the learning rate")
    for name in who:
        optimisers[name].zero_grad(set_to_none=True)
    total.backward()
    for name in who:
        player, optimiser = players[name], optimisers[name]
        if player.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(player.module.parameters(), player.max_grad_norm)
        if player.last_learning_rate is not None and player.learning_rate is not None:
            share = moved[name] / max(counts[name] - 1, 1)
            for group in optimiser.param_groups:
                group["lr"] = player.learning_rate + share * (player.last_learning_rate - player.learning_rate)
        optimiser.step()
        moved[name] += 1
    return seen


def _optimiser(player: Player) -> torch.optim.Optimizer:
    assert player.learning_rate is not None
    return torch.optim.AdamW(
        player.module.parameters(),
        lr=player.learning_rate,
        betas=player.betas,
        weight_decay=player.weight_decay,
        fused=True,
    )


def _state(
    players: Mapping[str, Player], optimisers: Mapping[str, torch.optim.Optimizer], moved: Mapping[str, int]
) -> dict[str, Any]:
    return {
        "modules": {name: dict(player.module.state_dict()) for name, player in players.items()},
        "optimisers": {name: optimiser.state_dict()["state"] for name, optimiser in optimisers.items()},
        "moved": dict(moved),
    }


def _restore(
    state: dict[str, Any], players: Mapping[str, Player], optimisers: Mapping[str, torch.optim.Optimizer]
) -> dict[str, int]:
    for name, player in players.items():
        player.module.load_state_dict(state["modules"][name])
    for name, optimiser in optimisers.items():
        kept = {int(index): moments for index, moments in state["optimisers"][name].items()}
        optimiser.load_state_dict({"state": kept, "param_groups": optimiser.state_dict()["param_groups"]})
    return {name: int(count) for name, count in state["moved"].items()}


@contextmanager
def stop_between_steps() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C or SIGTERM has asked to stop; the second signal stops at once."""
    asked, before = [False], {}

    def ask(number: int, frame: Any) -> None:
        if asked[0]:
            raise KeyboardInterrupt
        asked[0] = True

    if threading.current_thread() is threading.main_thread():  # elsewhere the owner of the signals decides
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
