"""The rows that are being written together: their cache, and how they join and leave it.

All rows go on at the same column, so a shorter one begins further right and a mask covers what lies before it. Where
every layer of the model keeps all its keys (no sliding window, no recurrent state), rows that are done give their place
to new ones, and a step writes its column in place; transformers' `DynamicLayer` copies the whole cache for each token.

Such steps can be compiled, once for all numbers of rows and columns: into memory that is there, which inductor needs.
That saves what a step costs beside its matrix products and the reading of the cache. On one core, for 2 layers of width
128: more than half of a step of 3 rows (1.2 to 0.5 ms), a tenth of one of 512, after 12 to 19 s in the compiler.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ROOM = 64  # columns, at least, that are made at a time
PACKED = "kullback_one_token"  # what transformers calls `_attend`
_steps: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # compiled ones by model


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

    def open(self) -> None:
        """Show the model the columns of the texts and the one that its next call fills."""
        self.keys, self.values = (store[: self.rows, :, self.first : self.last + 1] for store in self.store)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
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
        compiled: steps of several rows are.

    Raises:
        ValueError: such a model's steps cannot be compiled.
    """

    def __init__(self, model: Any, lines: int, widest: int, limit: int, compiled: bool = False) -> None:
        if compiled:
            check_compiles(model)
        self.model, self.lines, self.widest, self.limit, self.compiled = model, lines, widest, limit, compiled
        self.own_mask = takes_masks(model)
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
        if self.shortest < self.width or self.compiled:  # without padding the fastest kernels of any attention will do
            mask = torch.arange(self.width, device=self.device) >= self.width - self.length[:, None]
        if not isinstance(room, Room):
            return _forward(self.model, token, mask, position, self.cache)
        if mask is not None and self.own_mask:
            mask = mask[:, None, None]  # as its layers read it: transformers has nothing to work out
        for layer in self.cache.layers:
            layer.open()
        if self.compiled and len(token) > 1:  # the compiler would make code of its own for one row
            with _packed_attention(self.model):
                logits = _compiled(self.model)(self.model, token, mask, position, self.cache)
        else:
            logits = _forward(self.model, token, mask, position, self.cache)
        for layer in self.cache.layers:
            layer.last += 1
        return logits


def _forward(
    model: Any,
    token: Int[Tensor, "row"],
    mask: Bool[Tensor, "..."] | None,
    position: Int[Tensor, "row 1"],
    cache: Any,
) -> Float[Tensor, "row vocab"]:
    logits: Tensor = model(
        input_ids=token[:, None], attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
    ).logits
    return logits[:, -1]


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """One token's attention. Query heads that share keys stand in for several tokens, so that no key is copied.

    So does transformers' own, except when it is compiled.
    """
    rows, heads, _one, width = query.shape
    out = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(rows, key.shape[1], heads // key.shape[1], width), key, value, attn_mask=mask, scale=scaling
    )
    return out.reshape(rows, 1, heads, value.shape[-1]), None


ALL_ATTENTION_FUNCTIONS.register(PACKED, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def _packed_attention(model: Any) -> Iterator[None]:
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, PACKED
    try:
        yield
    finally:
        config._attn_implementation = before


def _compiled(model: Any) -> Any:
    """The model's step, compiled once for all numbers of rows and columns."""
    if model not in _steps:
        own = FunctionType(_forward.__code__.replace(), globals())  # torch limits the recompilations of a code object
        _steps[model] = torch.compile(own, dynamic=True, fullgraph=True)
    return _steps[model]


def takes_masks(model: Any) -> bool:
    """Whether each layer hands the mask it is given, True where it may look, to torch's own attention."""
    attention = model.config.get_text_config()._attn_implementation
    return attention == "sdpa" and getattr(model, "_supports_attention_backend", False)


def check_compiles(model: Any) -> None:
    """
    Raises:
        ValueError: a layer does not keep all its keys, or the attention is not torch's own.
    """
    config = model.config.get_text_config()
    if not takes_masks(model):
        raise ValueError(
            f"train.compile_decode=True: {type(model).__name__} computes its attention by "
            f"{config._attn_implementation!r} or in a way of its own; load it with attn_implementation='sdpa', "
            "or leave the option out"
        )
    kinds = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer}
    if kinds:
        raise ValueError(
            f"train.compile_decode=True: {type(model).__name__} has layers that forget "
            f"({', '.join(sorted(kind.__name__ for kind in kinds))}); leave the option out"
        )
