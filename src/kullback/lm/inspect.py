"""One real step, before it is taken: rows token by token, with who wrote them, how much they count and what they cost.

For a token in place t of a row, a term adds coefficient * multiplier * value / denominator to the loss; the denominator
belongs to the whole step. What `inspect` prints in its last column adds up to that.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from torch import Tensor

from kullback.lm.assemble import assemble
from kullback.lm.batch import Batch
from kullback.lm.engine import Engine
from kullback.lm.plan import Plan, check
from kullback.lm.predictions import FullPredictions, Predictions, TopKPredictions
from kullback.lm.rollout import Origin
from kullback.run.terms import Term, multipliers

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
        engine.begin()
        micro_batches = engine.prepare(0)
        step = engine.step_batch
        assert step is not None
        total = sum(float(engine.loss(micro)) for micro in micro_batches)
        count = len(step.rollout)
        shown = sorted({i * count // rows for i in range(rows)})
        if plan.method.together != "row":  # a row's loss needs the rows it is coupled with
            groups = step.rollout.group
            shown = torch.isin(groups, groups[shown]).nonzero()[:, 0].tolist()
        batch = engine.read(step.rows(shown))
        terms = [replace(term, mean=term.mean or batch.aggregate) for term in at.method.signal(batch)]
        return Group(
            Text(words + "\n"),
            _denominators(engine, step, terms, total),
            *_rows(engine, batch, terms, [f"row {number} of {count}" for number in shown]),
        )


def _denominators(engine: Engine, step: Batch, terms: list[Term], total: float) -> Text:
    lines = [f"the step: {len(step.rollout)} rows, {int(step['scored'].sum())} scored tokens, loss {total:.6g}"]
    for term in terms:
        count = float(engine.denominator(term))
        lines.append(f"{term.name}: coefficient {term.coefficient:g}, denominator {count:g} ({term.averaged})")
    return Text("\n".join(lines))


def _rows(engine: Engine, batch: Batch, terms: list[Term], names: list[str]) -> list[RenderableType]:
    """For each row its grades and prompt, then a table with a line per token."""
    rollout, decode, scored = batch.rollout, engine.at.tokenizer.decode, batch["scored"]
    numbers, costs = _numbers(engine, batch, terms)
    tops = {
        f"{who}'s top {TOP}": (top, seen.scored, seen.scored.flatten().long().cumsum(0).view_as(scored) - 1)
        for who, seen in batch.targets.items()
        if (top := _top(seen)) is not None
    }
    parts: list[RenderableType] = []
    for row, name in enumerate(names):
        note, prompt = rollout.notes[row], rollout.prompts[row]
        about = [str(note[key]) for key in ("problem_id", "source") if note.get(key)]
        grades = {**rollout.rewards, **_columns(batch, 1)}
        about += [f"{grade} {float(value[row]):.4g}" for grade, value in grades.items() if not value[row].isnan()]
        title = Text(f"\n{name}: {', '.join(about)}; adds {float(costs[row].sum()):.6g} to the loss\n", style="bold")
        parts.append(title.append(f"prompt ({len(prompt)} tokens): {decode(prompt)!r}", style="not bold"))

        facts, values, likeliest = [], [], []
        for t in range(int(rollout.lengths[row])):
            token, here = int(rollout.completions[row, t]), bool(scored[row, t])
            writer = Origin(int(rollout.origin[row, t])).name.lower()
            facts.append([str(t), repr(decode([token])), str(token), writer, "yes" if here else "no"])
            values.append(
                [f"{float(seen[row, t]) + 0.0:.3g}" if mask[row, t] else "" for seen, mask in numbers.values()]
            )
            tops_here = [top[int(place[row, t])] if read[row, t] else [] for top, read, place in tops.values()]
            likeliest.append(["  ".join(f"{decode([other])!r} {p:.2f}" for other, p in top) for top in tops_here])
        parts.append(_RowTable(list(numbers), facts, values, list(tops), likeliest))
    return parts


@dataclass(frozen=True)
class _RowTable:
    """A line per token; on a console too narrow for all columns, the numbers come first and the others below."""

    numbers: list[str]
    facts: list[list[str]]
    values: list[list[str]]
    tops: list[str]
    likeliest: list[list[str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole = self.table(facts=True, numbers=True)
        if Measurement.get(console, options.update(max_width=10_000), whole).maximum <= options.max_width:
            yield whole
        else:
            yield self.table(facts=False, numbers=True)
            yield self.table(facts=True, numbers=False)

    def table(self, *, facts: bool, numbers: bool) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        known = 5 if facts else 2
        for heading in ("", "token", "id", "writer", "scored")[:known]:
            table.add_column(heading, justify="left" if heading in ("token", "writer") else "right", no_wrap=True)
        for heading in self.numbers if numbers else ():
            table.add_column(Text(_fold(heading)), justify="right", overflow="fold")
        for heading in self.tops if facts else ():
            table.add_column(Text(heading))
        for line, values, likeliest in zip(self.facts, self.values, self.likeliest, strict=True):
            cells = [*line[:known], *(values if numbers else ()), *(likeliest if facts else ())]
            table.add_row(*map(Text, cells), style="" if line[4] == "yes" else "dim")
        return table


def _numbers(
    engine: Engine, batch: Batch, terms: list[Term]
) -> tuple[dict[str, tuple[Tensor, Tensor]], Float[Tensor, "row completion"]]:
    """The columns of numbers, each with the mask of where it says something, and what all terms add to the loss."""
    scored = batch["scored"]
    found = {name: (values.float(), scored) for name, values in _columns(batch, 2).items()}
    found["student log p"] = (batch.model.log_probs(), scored)
    found |= {f"{who} log p": (seen.log_probs(), seen.scored) for who, seen in batch.targets.items()}
    costs, any_mask = torch.zeros(scored.shape, device=scored.device), torch.zeros_like(scored)
    for term in terms:
        weights, mask = multipliers(batch.columns, term.over, term.mean, term.weight)
        cost = term.coefficient * torch.where(mask, term.value, 0.0) * weights / engine.denominator(term)
        value = term.value if term.shown is None else term.shown
        if value.dim() == 1:  # of a row: it stands at the first token
            value, cost, mask = (_at_first(numbers, scored) for numbers in (value, cost, mask))
        found[term.name] = (value, mask)
        costs, any_mask = costs + cost, any_mask | mask
    return found | {"in the loss": (costs, any_mask)}, costs


def _at_first(values: Tensor, like: Tensor) -> Tensor:
    grid = torch.zeros(like.shape, dtype=values.dtype, device=values.device)
    grid[:, 0] = values
    return grid


def _columns(batch: Batch, dimensions: int) -> dict[str, Tensor]:
    own = {name: values for name, values in batch.columns.items() if name not in ("scored", "rows")}
    return {name: values for name, values in own.items() if values.dim() == dimensions}


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


def _fold(heading: str) -> str:
    """On several short lines: "log_prob:student" would be wider than its numbers."""
    name = heading.replace("log_prob:", "log p:")
    name = name.replace(" log p", "\nlog\u00a0p").replace(":", ":\n").replace("/", "/\n")
    return name.replace("in the loss", "in\u00a0the\nloss")
