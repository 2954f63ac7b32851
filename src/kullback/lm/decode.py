"""The rows that are being written together: their cache, and how they join and leave it.

All rows go on at the same column, so a shorter one begins further right and a mask covers what lies before it. Where
every layer of the model keeps all its keys (no sliding window, no recurrent state), rows that are done give their place
to new ones, and a step writes its column in place; transformers' `DynamicLayer` copies the whole cache for each token.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64  # columns, at least, that are made at a time


class Room(DynamicLayer):
    """Keys and values of one layer in memory that is larger than them: `rows` of the lines, columns `first` to `last`.

    Args:
        like: a layer that a prefill has filled; only its sizes are read.
        lines: rows there is room for.
        before: columns left of the first step, at least the widest prompt.
        after: columns for the steps.
    """

    def __init__(self, like: Any, lines: int, before: int, after: int) -> None:
        super().__init__()
        self.lazy_initialization(like.keys, like.values)
        self.rows, self.first, self.last = 0, before, before
        self.store = [self._make(x, lines, before, after) for x in (like.keys, like.values)]

    @staticmethod
    def _make(like: Tensor, lines: int, before: int, after: int) -> Tensor:
        store = like.new_empty(lines, like.shape[1], before + after, like.shape[3])
        store[:, :, :before] = 0  # a column that is masked still enters the attention, as 0 times its value
        return store

    def get_seq_length(self) -> int:
        return self.last - self.first

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.last + key_states.shape[-2]
        for store, new in zip(self.store, (key_states, value_states), strict=True):
            store[: self.rows, :, self.last : end] = new
        self.last = end
        self.keys, self.values = (store[: self.rows, :, self.first : end] for store in self.store)
        return self.keys, self.values

    def join(self, layer: Any, owner: Int[Tensor, "row"]) -> None:
        """New rows with the keys and values of a prefill, whose line `owner` is theirs."""
        for store, filled in zip(self.store, (layer.keys, layer.values), strict=True):
            store[self.rows : self.rows + len(owner), :, self.last - filled.shape[-2] : self.last] = filled[owner]
        self.rows += len(owner)

    def move(self, holes: Int[Tensor, "hole"], movers: Int[Tensor, "hole"], rows: int) -> None:
        """The last rows move into the holes; `rows` are left."""
        for store in self.store:
            store[holes, :, self.first : self.last] = store[movers, :, self.first : self.last]
        self.rows = rows

    def enlarge(self, lines: int, before: int, after: int) -> None:
        """Take new memory and leave behind what no row needs any more."""
        width = self.last - self.first
        for i, old in enumerate(self.store):
            self.store[i] = self._make(old, lines, before, after)
            self.store[i][: self.rows, :, before - width : before] = old[: self.rows, :, self.first : self.last]
        self.first, self.last = before - width, before


class Decoding:
    """Rows in the middle of their completions.

    Args:
        lines: rows that share the cache, at most.
        widest: tokens of the longest prompt that will come.
        limit: tokens of a completion, at most.
    """

    def __init__(self, model: Any, lines: int, widest: int, limit: int) -> None:
        self.model, self.lines, self.widest, self.limit = model, lines, widest, limit
        self.device = next(model.parameters()).device
        self.cache: Any = None
        self.length = torch.zeros(0, dtype=torch.long, device=self.device)  # tokens of each row, its prompt's included
        self.shortest = self.width = 0

    @property
    def room(self) -> int:
        """How many rows may join now."""
        if len(self.length) and not isinstance(self.cache.layers[0], Room):
            return 0
        return self.lines - len(self.length)

    def join(self, prompts: list[list[int]]) -> Float[Tensor, "row vocab"]:
        """Read new rows' prompts, each different one once; returns the logits of their first tokens."""
        index = {tuple(prompt): i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        widths = [len(prompt) for prompt in index]
        ids = torch.zeros(len(index), max(widths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(index):
            ids[i, max(widths) - len(prompt) :], mask[i, max(widths) - len(prompt) :] = torch.tensor(prompt), 1
        owner = torch.tensor([index[tuple(prompt)] for prompt in prompts], device=self.device)
        out = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(self.device),
            use_cache=True,
            logits_to_keep=1,
        )
        self._take(out.past_key_values, owner)
        self.length = torch.cat([self.length, torch.tensor(widths, device=self.device)[owner]])
        self._measure()
        return out.logits[:, -1][owner]

    def _take(self, filled: Any, owner: Int[Tensor, "row"]) -> None:
        if any(type(layer) is not DynamicLayer or not layer.is_initialized for layer in filled.layers):
            filled.reorder_cache(owner)
            self.cache = filled
            return
        if self.cache is None:
            after = min(self.limit, ROOM)
            self.cache = Cache(layers=[Room(layer, self.lines, self.widest, after) for layer in filled.layers])
        for i, layer in enumerate(self.cache.layers):
            layer.join(filled.layers[i], owner)
            filled.layers[i].reset()

    def keep(self, alive: Bool[Tensor, "row"], count: int, waiting: int) -> Int[Tensor, "row"]:
        """Drop the other rows; returns which of the old rows stands in each line now.

        Args:
            count: rows that are alive.
            waiting: rows that have yet to join.
        """
        self.lines = min(self.lines, count + waiting)
        holes, movers = (~alive[:count]).nonzero()[:, 0], alive[count:].nonzero()[:, 0] + count
        order = torch.arange(count, device=self.device)
        order[holes] = movers
        self.length = self.length[order]
        self._measure()
        if isinstance(self.cache.layers[0], Room):
            for layer in self.cache.layers:
                layer.move(holes, movers, count)
        elif count:
            self.cache.reorder_cache(order)
        return order

    def _measure(self) -> None:
        """How many columns the texts fill: what lies left of the longest is not looked at again."""
        bounds = torch.stack(self.length.aminmax()).tolist() if len(self.length) else [0, 0]
        self.shortest, self.width = bounds
        if isinstance(self.cache.layers[0], Room):
            for layer in self.cache.layers:
                layer.first = layer.last - self.width
        else:
            self.width = self.cache.get_seq_length()

    def step(self, token: Int[Tensor, "row"]) -> Float[Tensor, "row vocab"]:
        """Read one more token in every row; returns the logits of the next."""
        room = self.cache.layers[0]
        if isinstance(room, Room) and room.last == room.store[0].shape[2]:
            after, before = min(self.limit, max(ROOM, self.width // 2)), max(self.width, self.widest)
            for layer in self.cache.layers:
                layer.enlarge(self.lines, before, after)
        position = self.length[:, None]
        self.length, self.width, self.shortest = self.length + 1, self.width + 1, self.shortest + 1
        mask = None
        if self.shortest < self.width:  # without padding the fastest kernels of every attention will do
            mask = torch.arange(self.width, device=self.device) >= self.width - self.length[:, None]
        logits: Tensor = self.model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        return logits[:, -1]
