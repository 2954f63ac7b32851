"""Forward passes without gradient: each distinct row once, and kept as long as it will be asked for again."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kullback.lm.cache import row_key
from kullback.lm.layout import Side, lay_out
from kullback.lm.lines import Line, best_lines, cost_of, lay_out_lines, reads_lines
from kullback.lm.models import head_of, hidden_states
from kullback.lm.players import AdapterOff
from kullback.lm.predictions import FullPredictions, HiddenPredictions, LogitPredictions
from kullback.lm.rollout import Rollout
from kullback.lm.shards import in_shards


def read(
    model: Any,
    rollout: Rollout,
    *,
    prompts: list[list[int]] | None = None,
    side: Side = "right",
    pad_id: int = 0,
    wrapped: Any = None,
) -> FullPredictions:
    """Prompts (the student's, unless others are given) and completions, read in as few and as full calls as pay.

    Short rows share a line, and so do the completions of one prompt, where the model can keep them apart; elsewhere
    rows of like length go through the model together.
    """
    prompts, lengths = prompts or rollout.prompts, rollout.lengths.tolist()
    calls: list[tuple[list[int], list[Line] | None]] = [(list(range(len(rollout))), None)]
    if side != "packed" and wrapped is None and not in_shards(model):  # DDP and FSDP count the calls
        # without gradient nothing is kept, and on a CPU a piece that stays in its caches is read faster
        small = not torch.is_grad_enabled() and rollout.completions.device.type == "cpu"
        calls = cheapest(model, prompts, lengths, small=small, lines=side == "right" and reads_lines(model))
    scored, counts, states = rollout.scored, rollout.scored.sum(1).tolist(), []
    for piece, lines in calls:
        part = rollout if len(calls) == 1 else rollout.rows(piece)
        read_before = prompts if len(calls) == 1 else [prompts[i] for i in piece]
        if lines is None:
            layout = lay_out(read_before, part.completions, part.scored, part.lengths, side=side, pad_id=pad_id)
        else:
            own = [lengths[i] for i in piece]
            layout = lay_out_lines(read_before, part.completions, part.scored, own, lines, pad_id=pad_id)
        states.append(hidden_states(model, layout, wrapped=wrapped))
    hidden = states[0]
    if len(calls) > 1:
        order = [i for piece, _ in calls for i in piece]
        by_row = dict(zip(order, torch.cat(states).split([counts[i] for i in order]), strict=True))
        hidden = torch.cat([by_row[i] for i in range(len(order))])
    tokens, head = rollout.completions[scored], head_of(model)
    if head.weight is None:
        return LogitPredictions(scored, tokens, head.logits(hidden))
    return HiddenPredictions(scored, tokens, hidden, head)


def cheapest(
    model: Any, prompts: list[list[int]], lengths: list[int], *, small: bool, lines: bool
) -> list[tuple[list[int], list[Line] | None]]:
    """Which rows are read in one call, and in which lines; None gives each row a line of its own.

    Args:
        small: calls of several rows stay below some hundreds of tokens.
        lines: whether the model can read them.
    """
    widths = [len(prompt) + length - 1 for prompt, length in zip(prompts, lengths, strict=True)]
    cost, hidden = call_cost(model), model.config.get_text_config().hidden_size
    apart = like_widths(widths, cost, most=round(256 + 4 * cost) if small else None)
    if not lines:
        return [(piece, None) for piece in apart]
    together = sum(cost_of(len(piece), max(widths[i] for i in piece), hidden) for piece in apart)
    joint, found = best_lines(prompts, lengths, hidden)
    if together + cost * (len(apart) - 1) <= joint:
        return [(piece, None) for piece in apart]
    return [(list(range(len(prompts))), found)]


def like_widths(widths: list[int], cost: float, most: int | None = None) -> list[list[int]]:
    """Rows in pieces, so that a further piece saves more padding than its `cost` in tokens.

    With `most`, no piece of several rows has more tokens than that, padding included.
    """

    def split(rows: list[int]) -> list[list[int]]:
        widest = widths[rows[-1]]
        saved = [(k * (widest - widths[rows[k - 1]]), k) for k in range(1, len(rows))]
        gain, at = max(saved, default=(0, 0))
        if gain <= cost:
            if most is None or len(rows) * widest <= most or len(rows) == 1:
                return [rows]
            at = len(rows) // 2
        return [*split(rows[:at]), *split(rows[at:])]

    ascending = sorted(range(len(widths)), key=widths.__getitem__)
    pieces = split(ascending)
    return [sorted(piece) for piece in pieces]


def call_cost(model: Any) -> float:
    """What a call of the model costs beyond its tokens, in tokens: launching its operations, reading its weights."""
    config = model.config.get_text_config()
    layer = 12 * config.hidden_size**2  # weights, roughly
    fixed, per_weight = (32, 1e7) if next(model.parameters()).device.type == "cpu" else (512, 1.5e10)
    return fixed + per_weight / layer


Row = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def row_keys(rollout: Rollout, *prompts: list[list[int]]) -> list[str]:
    """What each row's predictions depend on, for readers of these prompts, in a form that can be kept."""
    return [row_key(*map(list, row)) for row in row_contents(rollout, *prompts)]


def row_contents(rollout: Rollout, *prompts: list[list[int]]) -> list[Row]:
    """Of each row what is read before the completion, the completion, which of its tokens count; no padding."""
    completions, scored = rollout.completions.tolist(), rollout.scored.tolist()
    keys = []
    for i, length in enumerate(rollout.lengths.tolist()):
        read_before = list(prompts[0][i])
        for other in prompts[1:]:
            read_before += [-1, *other[i]]  # no token has this id
        counted = tuple(t for t in range(length) if scored[i][t])
        keys.append((tuple(read_before), tuple(completions[i][:length]), counted))
    return keys


def weights_of(model: Any) -> tuple[int, ...] | None:
    """Changes whenever the weights that speak are written in place; None where they are trained."""
    weights = list(model.parameters())
    if isinstance(model, AdapterOff):  # the adapters are trained, but silent
        weights = [weight for weight in weights if not weight.requires_grad]
    if any(weight.requires_grad for weight in weights):
        return None
    return (id(model), sum(weight._version for weight in weights))


class Forwards:
    """What players say of rows. Equal rows are read once; a frozen player's hidden states stay until `begin`.

    Kept are [scored, width] hidden states, never logits: width / vocab of their memory.
    """

    def __init__(self) -> None:
        self._keep: frozenset[str] = frozenset()
        self._rows: dict[str, dict[Row, dict[str, Tensor]]] = {}
        self._weights: dict[str, tuple[int, ...]] = {}

    def begin(self, keep: Collection[str]) -> None:
        """Forget all rows. From here on those of the players `keep` stay, if they are frozen."""
        self._keep = frozenset(keep)
        self._rows = {}

    @torch.no_grad()
    def predict(self, player: str, model: Any, rollout: Rollout, prompts: list[list[int]]) -> FullPredictions:
        """A player's next-token distributions at the scored tokens, without gradient."""
        keys = row_contents(rollout, prompts)
        kept = self._kept(player, model)
        first = {key: i for i, key in reversed(list(enumerate(keys))) if kept is None or key not in kept}
        missing = sorted(first.values())
        if kept is None and len(missing) == len(keys):
            return read(model, rollout, prompts=prompts)
        rows = {} if kept is None else kept
        if missing:
            seen = read(model, rollout.rows(missing), prompts=[prompts[i] for i in missing])
            all_of_it = seen.pick(torch.ones_like(seen.tokens, dtype=torch.bool))
            parts = {name: part.split(seen.scored.sum(1).tolist()) for name, part in all_of_it.items()}
            fresh = {keys[i]: {name: part[n] for name, part in parts.items()} for n, i in enumerate(missing)}
            if isinstance(seen, HiddenPredictions):
                rows |= fresh
            else:
                rows = rows | fresh  # logits are too large to stay
        else:
            seen = HiddenPredictions(rollout.scored[:0], rollout.completions[:0], torch.empty(0), head_of(model))
        whole = {name: torch.cat([rows[key][name] for key in keys]) for name in rows[keys[0]]}
        return replace(seen, scored=rollout.scored, tokens=rollout.completions[rollout.scored], **whole)

    def _kept(self, player: str, model: Any) -> dict[Row, dict[str, Tensor]] | None:
        """The rows that stay of this player; None if none do."""
        weights = weights_of(model) if player in self._keep else None
        if weights is None:
            return None
        if self._weights.get(player) != weights:
            self._rows.pop(player, None)
            self._weights[player] = weights
        return self._rows.setdefault(player, {})
