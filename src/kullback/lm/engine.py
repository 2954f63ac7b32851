"""One optimiser step: controllers, rollout, scores, columns, denominators, then loss after loss of its micro-batches.

Whatever crosses rows comes first, for the whole step and without gradient; a micro-batch is only ever added. So how a
step is cut into micro-batches, and over how many processes, changes nothing but rounding.
"""

import dataclasses
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import divergence
from kullback.lm.batch import Batch, base_columns
from kullback.lm.layout import Side
from kullback.lm.method import Method
from kullback.lm.moment import Moment
from kullback.lm.predictions import FullPredictions, over_vocabulary
from kullback.lm.rollout import Origin, Rollout
from kullback.lm.targets import Target, read
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
        self._denominators: dict[tuple[str, Mean | None, str | None], Tensor] = {}

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
            self.step_batch = self.draw()
        return self.cut(self.step_batch)

    def draw(self) -> Batch:
        """Rows, scores and columns of a whole step on this rank."""
        method = self.at.method
        device = next(self.at.model("student").parameters()).device
        rollout = method.source().draw(self.at).to(device)
        self.targets = method.targets()
        columns = base_columns(rollout)
        for score in method.scores:
            columns[score] = self.score(score, rollout)
        step = Batch(rollout, columns, aggregate=method.aggregate, sampling_temperature=method.sampling_temperature)
        made = method.weight(step)
        live = [name for name, values in made.items() if values.requires_grad]
        if live:
            raise ValueError(
                f"{type(method).__name__}.weight: {', '.join(live)} carries a gradient; "
                "weights are detached: use scores"
            )
        self._denominators = {}
        self._count(rollout)
        return dataclasses.replace(step, columns=columns | made)

    def cut(self, step: Batch) -> list[Batch]:
        """Rows of like length go together, so that little is padded; there are always `micro_batches` pieces."""
        order = step.rollout.lengths.tolist()
        order = sorted(range(len(order)), key=lambda i: order[i] + len(step.rollout.prompts[i]))
        borders = [len(order) * i // self.micro_batches for i in range(self.micro_batches + 1)]
        return [
            step.rows(order[start:stop]) if stop > start else _silent(step.rows(order[:1]))
            for start, stop in pairwise(borders)
        ]

    def loss(self, micro: Batch, *, wrapped: Any = None) -> Float[Tensor, ""]:
        """A micro-batch's share of the objective, with gradient. `wrapped` is the student inside DDP or FSDP."""
        model = self.at.model("student")
        predictions = read(
            model, micro.rollout, side=self.side, pad_id=self.at.tokenizer.pad_token_id or 0, wrapped=wrapped
        )
        targets = {name: target.predict(micro.rollout, self.at) for name, target in self.targets.items()}
        terms = self.at.method.signal(dataclasses.replace(micro, predictions=predictions, targets=targets))
        total = torch.zeros((), device=predictions.tokens.device)
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
        return total

    def denominator(self, term: Term) -> Float[Tensor, ""]:
        """Of the whole step, over all ranks. It is counted before the step's first backward pass."""
        if term.key not in self._denominators:
            assert self.step_batch is not None
            self._denominators[term.key] = sum_over_ranks(denominator(self.step_batch.columns, *term.key))
        return self._denominators[term.key]

    @torch.no_grad()
    def score(self, what: str, rollout: Rollout) -> Float[Tensor, "row completion"]:
        """One number per token, for all rows of a step.

        `what` reads "log_prob:student", "entropy:teacher" or "hellinger:reference,student" (target first).
        """
        kind, _, names = what.partition(":")
        rows_each = max(self.at.rows_at_once // 8, 1)
        parts = []
        model = self.at.model("student")
        was_training = model.training
        model.eval()
        for start in range(0, len(rollout), rows_each):
            index = range(start, min(start + rows_each, len(rollout)))
            part = dataclasses.replace(rollout.rows(index))
            players = [self._predict(name, part) for name in names.split(",")]
            if kind == "log_prob":
                grid = players[0].log_probs()
            elif kind == "entropy":
                grid = players[0].entropy()
            else:
                D = divergence(kind)
                target, other = players
                grid = target.grid(
                    over_vocabulary(lambda t, m, _, D=D: D.categorical(t, m, pad_vocab=True), target, other)
                )
            parts.append(torch.nn.functional.pad(grid, (0, rollout.completions.shape[1] - grid.shape[1])))
        model.train(was_training)
        return torch.cat(parts)

    def _predict(self, name: str, rollout: Rollout) -> FullPredictions:
        if name in self.targets:
            seen = self.targets[name].predict(rollout, self.at)
            if not isinstance(seen, FullPredictions):
                raise ValueError(
                    f"scores: {name!r} has {seen.kind!r} predictions; this score needs the whole vocabulary"
                )
            return seen
        return read(self.at.model(name), rollout)

    def _count(self, rollout: Rollout) -> None:
        rows = len(rollout)
        self.tally.add("rollout/length", rollout.lengths.sum(), rows)
        for name, values in rollout.rewards.items():
            known = ~values.isnan()
            self.tally.add(f"rollout/{name}", values[known].sum(), known.sum())
        sampled = rollout.scored & ~rollout.log_probs.isnan()
        self.tally.add("rollout/entropy", -rollout.log_probs[sampled].sum(), sampled.sum())
        for origin in (Origin.DATASET, Origin.STUDENT, Origin.TEACHER):
            self.tally.add(f"rollout/from_{origin.name.lower()}", ((rollout.origin == origin).any(1)).sum(), rows)
        self.tally.add("tokens", rollout.scored.sum(), 1)

    def metrics(self) -> dict[str, float]:
        """The means of the step that has just run; controllers see them at the next."""
        means = self.tally.take(sums=("tokens",))
        means |= {f"schedule/{name}": value for name, value in self.written.items()}
        self.seen |= means
        return means

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights."""
        return {"controllers": self.states, "written": self.written, "seen": self.seen, "store": self.at.store}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self.states, self.written, self.seen = list(state["controllers"]), dict(state["written"]), dict(state["seen"])
        self.at.store = dict(state["store"])
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
