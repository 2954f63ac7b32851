"""One optimiser step: controllers, rollout, scores, columns, denominators, then loss after loss of its micro-batches.

Whatever crosses rows comes first, for the whole step and without gradient; a micro-batch is only ever added. So how a
step is cut into micro-batches, and over how many processes, changes nothing but rounding.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.lm.batch import Batch, base_columns
from kullback.lm.layout import Side
from kullback.lm.method import Method
from kullback.lm.moment import Moment
from kullback.lm.parts import read_part
from kullback.lm.players import copy_weights
from kullback.lm.predictions import FullPredictions, HiddenPredictions
from kullback.lm.rollout import Origin, Rollout
from kullback.lm.scores import Scores, players_of
from kullback.lm.shards import whole
from kullback.lm.targets import FrozenTarget, Target, read
from kullback.run.controllers import Controller
from kullback.run.processes import sum_over_ranks
from kullback.run.tally import Tally
from kullback.run.terms import Mean, Term, denominator, numerator


class Engine:
    """Runs one method at one moment.

    Args:
        method: its fields as the recipe gives them; controllers write copies of it into `at.method`.
        at: players, data and memory of the run.
        micro_batches: how many pieces a step is cut into, on this rank.
        controllers: of the recipe, beside the method's own.
        side: where the student's inputs are padded, or "packed".
    """

    def __init__(
        self,
        method: Method,
        at: Moment,
        *,
        micro_batches: int = 1,
        controllers: tuple[Controller, ...] = (),
        side: Side = "right",
    ) -> None:
        self.method, self.at, self.micro_batches, self.side = method, at, micro_batches, side
        self.controllers = [*method.schedule(), *controllers]
        self.states: list[dict[str, Any]] = []
        self.written: dict[str, float] = {}
        for controller in self.controllers:
            state, values = controller.start()
            self.states.append(state)
            self.written |= values
        at.method = with_fields(method, self.written)
        self.seen: dict[str, float] = {}
        self.tally = Tally()
        self.step_batch: Batch | None = None
        self.targets: dict[str, Target] = {}
        self.scores = Scores(at, self._parts)
        self.moved: set[str] = set()  # players whose weights are no longer what was loaded
        self._denominators: dict[tuple[str, Mean | None, str | None], Tensor] = {}
        self._told = False

    def control(self, when: str, step: int) -> None:
        """Let the controllers of this occasion write into the method's fields."""
        for index, controller in enumerate(self.controllers):
            if controller.when == when:
                self.states[index], values = controller.update(self.states[index], step, self.seen)
                self.written |= values
        self.at.method = with_fields(self.method, self.written)

    def prepare(self, update: int) -> list[Batch]:
        """The micro-batches of optimiser step `update`; several passes go over one draw."""
        draw, turn = divmod(update, self.method.passes)
        self.at.step = draw
        if turn == 0 or self.step_batch is None:
            self.control("step", draw)
            with whole(self.at.model("student")) if self._asks_student() else nullcontext():
                self.step_batch = self.draw()
        return self.cut(self.step_batch)

    def _asks_student(self) -> bool:
        """Whether a draw calls the student, which not every process then does equally often."""
        method = self.at.method
        asked = {name for score in method.scores for name in players_of(score)}
        asked |= {target.player for target in method.targets().values() if isinstance(target, FrozenTarget)}
        return "student" in asked or Origin.STUDENT in method.source().writes

    def begin(self) -> None:
        """What the method does once, before the first step of a run that does not resume."""
        self.at.method.begin(self.at)

    def draw(self) -> Batch:
        """Rows, scores and columns of a whole step on this rank."""
        method = self.at.method
        device = next(self.at.model("student").parameters()).device
        rollout = method.source().draw(self.at)
        for reader in method.readers():
            rollout = reader.read(rollout, self.at)
            self._count_failures(rollout)
        rollout = rollout.to(device)
        self.targets = method.targets()
        columns = base_columns(rollout)
        asked = {name for score in method.scores for name in players_of(score)}
        frozen = {name: target for name, target in self.targets.items() if isinstance(target, FrozenTarget)}
        again = {t.player for name, t in frozen.items() if method.passes > 1 or not asked.isdisjoint((name, t.player))}
        self.at.forwards.begin(keep=again)
        columns |= self.scores.measure(method.scores, rollout, self.targets)
        step = Batch(
            rollout,
            columns,
            aggregate=method.aggregate,
            sampling_temperature=method.sampling_temperature,
            ledger=self.at.ledger,
        )
        made = method.weight(step)
        live = [name for name, values in made.items() if values.requires_grad]
        if live:
            raise ValueError(
                f"{type(method).__name__}.weight: {', '.join(live)} carries a gradient; "
                "weights are detached: use scores"
            )
        self._denominators = {}
        self._count(rollout)
        for name, values in made.items():
            if name.startswith("rollout/"):  # a metric, not a weight
                known = ~values.isnan() & columns["rows" if values.dim() == 1 else "scored"]
                self.tally.add(name, values[known].sum(), known.sum())
        return dataclasses.replace(step, columns=columns | made)

    def cut(self, step: Batch) -> list[Batch]:
        """Rows of like length go together, so that little is padded; there are always `micro_batches` pieces."""
        sizes = [
            length + len(prompt)
            for length, prompt in zip(step.rollout.lengths.tolist(), step.rollout.prompts, strict=True)
        ]
        units: dict[int, list[int]] = {}
        for row, group in enumerate(step.rollout.group.tolist()):
            units.setdefault({"row": row, "group": group, "step": 0}[self.at.method.together], []).append(row)
        order = sorted(units.values(), key=lambda rows: max(sizes[row] for row in rows))
        borders = [len(order) * i // self.micro_batches for i in range(self.micro_batches + 1)]
        return [
            step.rows([row for unit in order[start:stop] for row in unit]) if stop > start else _silent(step.rows([0]))
            for start, stop in pairwise(borders)
        ]

    def read(self, micro: Batch, *, wrapped: Any = None) -> Batch:
        """A micro-batch with the distributions of the student, with gradient, and of its targets."""
        model = self.at.model("student")
        predictions = read(
            model, micro.rollout, side=self.side, pad_id=self.at.tokenizer.pad_token_id or 0, wrapped=wrapped
        )
        targets = {name: target.predict(micro.rollout, self.at) for name, target in self.targets.items()}
        return dataclasses.replace(micro, predictions=predictions, targets=targets, parts=self._parts(predictions))

    def loss(self, micro: Batch, *, wrapped: Any = None) -> Float[Tensor, ""]:
        """A micro-batch's share of the objective, with gradient. `wrapped` is the student inside DDP or FSDP."""
        micro = self.read(micro, wrapped=wrapped)
        terms = self.at.method.signal(micro)
        total = torch.zeros((), device=micro.model.tokens.device)
        for term in terms:
            term = dataclasses.replace(term, mean=term.mean or micro.aggregate)
            count = self.denominator(term)
            part = numerator(term, micro.columns)
            total = total + term.coefficient * part / count.clamp(min=torch.finfo(count.dtype).tiny)
            shown = (
                part if term.shown is None else numerator(dataclasses.replace(term, value=term.shown), micro.columns)
            )
            local = float(denominator(micro.columns, *term.key)) if count > 0 else 0.0
            self.tally.add(f"term/{term.name}", shown, local)
            for name, values in term.seen.items():
                noted = dataclasses.replace(
                    term, value=values.float(), weight=None, mean="token", over=term.seen_over or term.over
                )
                self.tally.add(
                    f"{term.name}/{name}", numerator(noted, micro.columns), denominator(micro.columns, *noted.key)
                )
        return total

    def _parts(self, predictions: FullPredictions) -> dict[str, Float[Tensor, "row completion"]]:
        """What the parts that are trained beside the student say at each scored position."""
        if not self.at.parts:
            return {}
        described = self.at.method.parts()
        if not isinstance(predictions, HiddenPredictions):
            raise ValueError("parts read the student's hidden states, which an adapted output layer does not show")
        return {
            name: predictions.grid(read_part(module, predictions.hidden, described[name].detach))
            for name, module in self.at.parts.items()
        }

    def denominator(self, term: Term) -> Float[Tensor, ""]:
        """Of the whole step, over all ranks. It is counted before the step's first backward pass."""
        if term.key not in self._denominators:
            assert self.step_batch is not None
            self._denominators[term.key] = sum_over_ranks(denominator(self.step_batch.columns, *term.key))
        return self._denominators[term.key]

    def _count(self, rollout: Rollout) -> None:
        rows = len(rollout)
        self.tally.add("rollout/length", rollout.lengths.sum(), rows)
        for name, values in rollout.rewards.items():
            known = ~values.isnan()
            self.tally.add(f"rollout/{name}", values[known].sum(), known.sum())
        sampled = rollout.scored & (rollout.origin != Origin.DATASET) & ~rollout.log_probs.isnan()
        self.tally.add("rollout/entropy", -rollout.log_probs[sampled].sum(), sampled.sum())
        for origin in (Origin.DATASET, Origin.STUDENT, Origin.TEACHER):
            self.tally.add(f"rollout/from_{origin.name.lower()}", ((rollout.origin == origin).any(1)).sum(), rows)
        self.tally.add("tokens", rollout.scored.sum(), 1)

    def _count_failures(self, rollout: Rollout) -> None:
        """How many rows a reader failed on; the first time also why."""
        failed = [str(note["failed"]) for note in rollout.notes if "failed" in note]
        self.tally.add("reader/failed", len(failed), 1)
        if failed and not self._told:
            self._told = True
            warnings.warn(
                f"step {self.at.step}: {len(failed)} of {len(rollout)} rows could not be read and train without notes "
                f"(metric reader/failed counts them); the first: {failed[0]}",
                stacklevel=2,
            )

    def after(self, step: int) -> list[Tensor]:
        """Copy the weights that the method copies after `step` optimiser steps; returns the student's that moved."""
        moved: list[Tensor] = []
        for copy in self.at.method.after(step):
            parameters = copy_weights(self.at.model(copy.source), self.at.model(copy.to), copy.rate)
            if copy.to == "student":
                moved += parameters
            else:
                self.moved.add(copy.to)
        return moved

    def metrics(self) -> dict[str, float]:
        """The means of the step that has just run; controllers see them at the next."""
        means = self.tally.take(sums=("tokens", "reader/failed"))
        means |= {f"schedule/{name}": value for name, value in self.written.items()}
        self.seen |= means
        return means

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights."""
        return {
            "controllers": self.states,
            "written": self.written,
            "seen": self.seen,
            "store": self.at.store,
            "ledger": self.at.ledger.state(),
            "scores": self.scores.kept.state(),
            "parts": {name: dict(part.named_parameters()) for name, part in self.at.parts.items()},
            "players": {name: dict(self.at.model(name).named_parameters()) for name in sorted(self.moved)},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self.states, self.written, self.seen = list(state["controllers"]), dict(state["written"]), dict(state["seen"])
        self.at.store = dict(state["store"])
        self.at.ledger.restore(state["ledger"])
        self.scores.kept.restore(state["scores"], next(self.at.model("student").parameters()).device)
        self.moved = set(state["players"])
        kept = [(self.at.parts[name], weights) for name, weights in state["parts"].items()]
        for module, weights in kept + [(self.at.model(name), weights) for name, weights in state["players"].items()]:
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    parameter.copy_(weights[name])
        self.at.method = with_fields(self.method, self.written)


def with_fields(method: Method, values: Mapping[str, float]) -> Method:
    """A method with some fields replaced, named as a recipe names them; whole numbers stay whole."""
    changed: dict[str, Any] = {}
    for name, value in values.items():
        field = name.partition(".")[2]
        changed[field] = round(value) if isinstance(getattr(method, field), int) else value
    return dataclasses.replace(method, **changed) if changed else method


def _silent(batch: Batch) -> Batch:
    """A row that counts nothing: what a micro-batch without rows runs, so that every rank makes the same calls."""
    columns = {
        name: torch.zeros_like(values) if values.dtype == torch.bool else values
        for name, values in batch.columns.items()
    }
    origin = torch.where(batch.rollout.origin > 0, int(Origin.TOOL), 0)
    return dataclasses.replace(batch, rollout=dataclasses.replace(batch.rollout, origin=origin), columns=columns)
