"""One real step, before it is taken: rows token by token, with who wrote them, how much they count and what they cost.

For a token in place t of a row, a term adds coefficient * multiplier * value / denominator to the loss; the denominator
belongs to the whole step. What `inspect` prints in its last column adds up to that.
"""

from typing import Any

import torch
from jaxtyping import Float
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from kullback.lm.api import Plan, assemble, check
from kullback.lm.batch import Batch
from kullback.lm.engine import Engine
from kullback.lm.predictions import FullPredictions, Predictions, TopKPredictions
from kullback.lm.rollout import Origin
from kullback.lm.targets import read
from kullback.run.terms import MEANS, Term, multipliers

TOP = 3


def inspect(plan: Plan, rows: int = 2) -> RenderableType:
    """The objective, the denominators, and `rows` rows of the first step, spread over it, token by token.

    Loads the models and writes whatever the source writes; trains nothing. Dropout is off.

    Raises:
        ValueError: the plan is wrong, see `check`; rows < 1.
    """
    if rows < 1:
        raise ValueError(f"rows={rows}: at least one row must be shown")
    words = check(plan)
    at = assemble(plan)
    engine = Engine(
        plan.method, at, micro_batches=plan.train.micro_batches, controllers=plan.schedule, side=plan.train.padding
    )
    at.model("student").eval()
    with torch.no_grad():
        micro_batches = engine.prepare(0)
        step = engine.step_batch
        assert step is not None
        total = sum(float(engine.loss(micro)) for micro in micro_batches)
        count = len(step.rollout)
        shown = sorted({i * count // rows for i in range(rows)})
        batch = step.rows(shown)
        batch, terms = _terms(engine, batch)
        tables = [
            part for row, number in enumerate(shown) for part in _row(engine, batch, terms, row, f"row {number} of {count}")
        ]
        heading = Text(words)
        return Group(heading, Text(""), _denominators(engine, step, terms, total), *tables)


def _terms(engine: Engine, batch: Batch) -> tuple[Batch, list[Term]]:
    """The rows with their predictions, and the method's terms on them."""
    import dataclasses

    at = engine.at
    model = read(at.model("student"), batch.rollout, side=engine.side, pad_id=at.tokenizer.pad_token_id or 0)
    targets = {name: target.predict(batch.rollout, at) for name, target in engine.targets.items()}
    batch = dataclasses.replace(batch, predictions=model, targets=targets)
    return batch, [dataclasses.replace(term, mean=term.mean or batch.aggregate) for term in at.method.signal(batch)]


def _denominators(engine: Engine, step: Batch, terms: list[Term], total: float) -> RenderableType:
    lines = Text(f"the step: {len(step.rollout)} rows, {int(step['scored'].sum())} scored tokens, loss {total:.6g}\n")
    for term in terms:
        how = MEANS[term.mean or step.aggregate].format(over=term.over, weight=term.weight)
        weight = f", times {term.weight}" if term.weight and term.mean != "weight" else ""
        lines.append(
            f"{term.name}: coefficient {term.coefficient:g}, denominator {float(engine.denominator(term)):g} ({how}{weight})\n"
        )
    return lines


def _row(engine: Engine, batch: Batch, terms: list[Term], row: int, name: str) -> list[RenderableType]:
    """Its prompt and grades, then a table with a line per token."""
    rollout, decode = batch.rollout, engine.at.tokenizer.decode
    facts = [str(rollout.notes[row].get(key)) for key in ("problem_id", "source") if rollout.notes[row].get(key)]
    facts += [f"{reward} {float(values[row]):g}" for reward, values in rollout.rewards.items()]
    facts += [f"{column} {float(values[row]):.4g}" for column, values in _columns(batch, 1).items()]
    title = Text(f"{name}: {', '.join(facts)}\n", style="bold")
    prompt = rollout.prompts[row]
    title.append(f"prompt ({len(prompt)} tokens): {decode(prompt)!r}", style="not bold")

    numbers = _numbers(engine, batch, terms)
    tops = {who: _top(seen) for who, seen in batch.targets.items()}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_footer=True)
    for heading in ("", "token", "id", "writer", "scored"):
        table.add_column(heading, justify="left" if heading in ("token", "writer") else "right", no_wrap=True)
    for heading in numbers:
        table.add_column(Text(heading), justify="right", footer=_sum(numbers, heading, row))
    for who, top in tops.items():
        if top is not None:
            table.add_column(Text(f"{who}'s top {TOP}"), no_wrap=True)
    place = batch["scored"].long().cumsum(1) - 1 + (batch["scored"].sum(1).cumsum(0) - batch["scored"].sum(1))[:, None]
    for t in range(int(rollout.lengths[row])):
        scored, token = bool(batch["scored"][row, t]), int(rollout.completions[row, t])
        line: list[RenderableType] = [str(t), Text(repr(decode([token]))), str(token)]
        line += [Origin(int(rollout.origin[row, t])).name.lower(), "yes" if scored else "no"]
        line += [_show(float(values[row, t])) if scored else "" for values in numbers.values()]
        for top in tops.values():
            if top is not None:
                here = top[int(place[row, t])] if scored else []
                line.append(Text("  ".join(f"{decode([token])!r} {p:.3f}" for token, p in here)))
        table.add_row(*line, style="" if scored else "dim")
    return [Text(""), title, table]


def _numbers(engine: Engine, batch: Batch, terms: list[Term]) -> dict[str, Float[Tensor, "row completion"]]:
    """The columns of numbers: weights, log-probabilities, the value of each term, and what all terms add to the loss."""
    found = {name: values.float() for name, values in _columns(batch, 2).items()}
    found["student log p"] = batch.model.log_probs()
    for who, seen in batch.targets.items():
        found[f"{who} log p"] = seen.log_probs()
    shares = torch.zeros(batch.rollout.completions.shape, device=batch.rollout.completions.device)
    for term in terms:
        weights, mask = multipliers(batch.columns, term.over, term.mean, term.weight)
        share = term.coefficient * torch.where(mask, term.value, 0.0) * weights / engine.denominator(term)
        value = term.value if term.shown is None else term.shown
        if value.dim() == 1:  # of a row: written at its first token, so that sums stay right
            first = torch.zeros_like(shares)
            first[:, 0] = 1.0
            value, share = value[:, None] * first, share[:, None] * first
        found[term.name] = value
        shares = shares + share
    return found | {"in the loss": shares}


def _columns(batch: Batch, dimensions: int) -> dict[str, Tensor]:
    return {
        name: values
        for name, values in batch.columns.items()
        if values.dim() == dimensions and name not in ("scored", "rows")
    }


def _top(seen: Predictions) -> list[list[tuple[int, float]]] | None:
    """The likeliest tokens at each scored position; None where only the written tokens are known."""
    if isinstance(seen, FullPredictions):
        top = seen.top(TOP)
    elif isinstance(seen, TopKPredictions):
        top = seen.top_k
    else:
        return None
    log_probs, order = top.log_probs.topk(min(TOP, top.log_probs.shape[-1]))
    ids = top.token_ids.gather(-1, order)
    return [list(zip(i, p, strict=True)) for i, p in zip(ids.tolist(), log_probs.exp().tolist(), strict=True)]


def _sum(numbers: dict[str, Any], heading: str, row: int) -> str:
    return _show(float(numbers[heading][row].sum())) if heading == "in the loss" else ""


def _show(value: float) -> str:
    return f"{value:.4g}"
