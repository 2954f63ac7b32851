"""Rows in lines of about one width: short ones beside each other, those of one prompt behind it, which is read once.

A mask keeps the texts of a line apart, so what a row says is what it says alone, up to rounding; nothing is padded but
the ends of the lines. Rows in a batch of their own are padded to the longest, and read their prompt again and again.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kullback.lm.layout import Layout, lay_out
from kullback.lm.models import hidden_states

Unit = tuple[int, ...]  # rows that share one prompt
Line = list[Unit]
SHARING = (1, 2, 4, 8, 16)  # completions behind one prompt that are tried


def in_lines(prompts: Sequence[Sequence[int]], lengths: Sequence[int], width: int) -> list[Line]:
    """Every row in one line; no line is longer than `width`, which the longest row fits into.

    Args:
        lengths: tokens of each completion; the last one is not read.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(row)
    units: list[tuple[int, Unit]] = []
    for prompt, rows in groups.items():
        unit, size = [rows[0]], len(prompt) + lengths[rows[0]] - 1
        for row in rows[1:]:
            if size + lengths[row] - 1 > width:
                units.append((size, tuple(unit)))
                unit, size = [], len(prompt)
            unit.append(row)
            size += lengths[row] - 1
        units.append((size, tuple(unit)))
    lines: list[Line] = []
    room: list[tuple[int, int]] = []  # what is left of each line, ascending
    for size, placed in sorted(units, key=lambda unit: -unit[0]):  # the longest first, each where it fits best
        at = bisect_left(room, (size, 0))
        left, line = room.pop(at) if at < len(room) else (width, len(lines))
        if line == len(lines):
            lines.append([])
        lines[line].append(placed)
        insort(room, (left - size, line))
    return lines


def cost_of(lines: int, width: int, hidden: int) -> float:
    """Of reading `lines` lines of `width` tokens, in tokens of a short one: attention grows with the width.

    A layer of width h takes about 24 h^2 operations for a token, and 4 h for each token it looks at, which run a third
    as fast.
    """
    return lines * width * (1 + width / (2 * hidden))


def best_lines(prompts: Sequence[Sequence[int]], lengths: Sequence[int], hidden: int) -> tuple[float, list[Line]]:
    """The cheapest lines of several widths, and what they cost."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        groups.setdefault(tuple(prompt), []).append(length - 1)
    behind = [(len(prompt), sorted(found, reverse=True)) for prompt, found in groups.items()]
    widths = {max(size + sum(found[:many]) for size, found in behind) for many in SHARING}
    tried = [(width, in_lines(prompts, lengths, width)) for width in sorted(widths)]
    return min(((cost_of(len(lines), width, hidden), lines) for width, lines in tried), key=lambda found: found[0])


def lay_out_lines(
    prompts: list[list[int]],
    completions: Int[Tensor, "row completion"],
    scored: Bool[Tensor, "row completion"],
    lengths: Sequence[int],
    lines: list[Line],
    *,
    pad_id: int = 0,
) -> Layout:
    """Inputs for these lines. A completion looks at its prompt and at itself; its positions go on from the prompt's."""
    texts = completions.tolist()
    ids: list[list[int]] = []
    positions: list[list[int]] = []
    own: list[list[int]] = []  # of each token, the column where its own text begins,
    before: list[list[tuple[int, int]]] = []  # and the columns of the prompt that it also looks at
    line_of, first, behind = ([0] * len(prompts) for _ in range(3))  # of each row, where its tokens are predicted
    for number, line in enumerate(lines):
        ids.append([])
        positions.append([])
        own.append([])
        before.append([])
        for unit in line:
            prompt, start = prompts[unit[0]], len(ids[-1])
            end = start + len(prompt)
            ids[-1] += prompt
            positions[-1] += range(len(prompt))
            own[-1] += [start] * len(prompt)
            before[-1] += [(0, 0)] * len(prompt)
            for row in unit:
                begin, count = len(ids[-1]), lengths[row] - 1
                line_of[row], first[row], behind[row] = number, end - 1, begin - 1
                ids[-1] += texts[row][:count]
                positions[-1] += range(len(prompt), len(prompt) + count)
                own[-1] += [begin] * count
                before[-1] += [(start, end)] * count
    width = max(map(len, ids))
    for number in range(len(lines)):
        used = len(ids[number])
        ids[number] += [pad_id] * (width - used)
        positions[number] += [0] * (width - used)
        own[number] += range(used, width)  # padding looks at itself
        before[number] += [(0, 0)] * (width - used)
    device = completions.device
    row_index, token_index = scored.nonzero(as_tuple=True)
    places = torch.tensor([line_of, first, behind], device=device)[:, row_index]
    column = torch.where(token_index == 0, places[1], places[2] + token_index)
    return Layout(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=_mask(torch.tensor(own, device=device), torch.tensor(before, device=device)),
        position_ids=torch.tensor(positions, device=device),
        at=(places[0], column),
        tokens=completions[row_index, token_index],
        scored=scored,
    )


def _mask(own: Int[Tensor, "line width"], before: Int[Tensor, "line width 2"]) -> Bool[Tensor, "line 1 width width"]:
    column = torch.arange(own.shape[1], device=own.device)
    itself = (column >= own[..., None]) & (column <= column[:, None])
    prompt = (column >= before[..., :1]) & (column < before[..., 1:])
    return (itself | prompt)[:, None]


_READS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def reads_lines(model: Any) -> bool:
    """Whether a model keeps to a mask of its own for every token, so that the texts of a line stay apart.

    Known of attention by `sdpa` without a window; asked of each model once, by reading three short texts both ways.
    """
    if model not in _READS:
        _READS[model] = _attends_everywhere(model) and _keeps_apart(model)
    return _READS[model]


def _attends_everywhere(model: Any) -> bool:
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if kinds is None else None
    full = all(kind == "full_attention" for kind in kinds or ())
    return full and window is None and getattr(config, "_attn_implementation", None) == "sdpa"


@torch.no_grad()
def _keeps_apart(model: Any) -> bool:
    device = next(model.parameters()).device
    most = model.config.get_text_config().vocab_size
    prompts = [[1 % most, 2 % most], [1 % most, 2 % most], [3 % most]]
    completions = torch.tensor([[4, 5, 6], [6, 4, 0], [5, 2, 1]], device=device) % most
    lengths = [3, 2, 3]
    scored = torch.arange(3, device=device) < torch.tensor(lengths, device=device)[:, None]
    was_training = model.training
    model.eval()
    try:
        apart = hidden_states(model, lay_out(prompts, completions, scored, scored.sum(1)))
        lines = lay_out_lines(prompts, completions, scored, lengths, [[(0, 1), (2,)]])
        together = hidden_states(model, lines)
    except (ValueError, RuntimeError, IndexError, TypeError):  # it takes no such mask
        return False
    finally:
        model.train(was_training)
    return torch.allclose(together, apart, atol=1e-2 * float(apart.abs().max()) + 1e-4)
