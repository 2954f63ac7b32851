"""Numbers per token of next-token distributions, all of them in one pass over the vocabulary.

Tokens are taken a chunk at a time. The logits of every side are made once; then, block by block in the cache, each pair
is read twice: once for its normalisers, once for every sum that is asked of it. No [tokens, vocab] tensor is made.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kullback.divergence import kernels, linear
from kullback.divergence.joint import value
from kullback.divergence.pair import INF, Pair
from kullback.divergence.parse import divergence

if TYPE_CHECKING:
    from kullback.divergence.curves import FDivergence

ENTRIES = 2**24  # logits of one side that are held at a time: 64 MiB in float32
LEAST_ROWS = 128  # a chunk reads the heads once, so fewer rows would cost time
GROUP = 64  # columns whose largest logit stands for them while the k likeliest are looked for

ALONE = ("log_prob", "entropy")  # of one side; everything else is of two
_OVERLAP = re.compile(r"overlap\((\d+)\)")
_HELLINGER = "squared_hellinger"


@dataclass(frozen=True)
class Side:
    """A distribution per token: `logits(tokens)` are [n, vocab], float32 or wider, and are only read."""

    vocab: int
    logits: Callable[[slice], Tensor]


@torch.no_grad()
def linear_statistics(
    target_hidden: Float[Tensor, "*batch target_width"],
    target_head: Float[Tensor, "vocab target_width"],
    model_hidden: Float[Tensor, "*batch model_width"],
    model_head: Float[Tensor, "vocab model_width"],
    statistics: Iterable[str],
    *,
    tokens: Int[Tensor, "*batch"] | None = None,
    target_bias: Float[Tensor, "vocab"] | None = None,
    model_bias: Float[Tensor, "vocab"] | None = None,
    temperature: float = 1.0,
    target_logit_scale: float = 1.0,
    model_logit_scale: float = 1.0,
    target_softcap: float | None = None,
    model_softcap: float | None = None,
    pad_vocab: bool = False,
) -> dict[str, Float[Tensor, "*batch"]]:
    """What t = softmax(target logits / temperature) and m (model) say at each token, exactly and without gradient.

        entropy = -sum_v m_v log m_v                     log_prob = log m(written token)
        target_entropy, target_log_prob                  the same of t
        bhattacharyya = -log sum_v sqrt(t_v m_v)         bhattacharyya_coefficient = sum_v sqrt(t_v m_v)
        agreement                                        1 where both find the same token likeliest, else 0
        overlap(k)                                       share of t's k likeliest tokens that are among m's k likeliest
        any name that `kb.divergence` parses             D(t, m): forward_kl, reverse_kl, jsd(0.1), squared_hellinger

    Tokens of probability 0 are never among the likeliest. Logits are made as in `FDivergence.linear`.

    Args:
        statistics: their names.
        tokens: the written ones; needed for log-probabilities.
        pad_vocab: heads of different sizes for one tokenizer. What compares the two ignores the extra rows; what is of
            one side has all of its own.

    Returns:
        By name; float32 or wider. Nats, except the coefficient and the shares.

    Raises:
        ValueError: a name that means nothing; log-probabilities without `tokens`; shapes that do not fit; logits that
            are NaN, saying whose.

    >>> states, head = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    >>> seen = linear_statistics(states, head, states, -head, ["entropy", "overlap(1)", "reverse_kl"])
    >>> [round(x, 4) for x in seen["entropy"].tolist()]
    [1.0174, 0.8854]
    """
    names = list(statistics)
    if target_head.shape[0] != model_head.shape[0] and not pad_vocab:
        raise ValueError(
            f"target_head has {target_head.shape[0]} rows, model_head {model_head.shape[0]}: if the tokenizers are the "
            "same and one head is padded, pass pad_vocab=True; otherwise the tokens do not correspond"
        )
    linear._positive(temperature=temperature, target_softcap=target_softcap, model_softcap=model_softcap)
    batch = model_hidden.shape[:-1]
    for what, shape in (
        ("target_hidden", target_hidden.shape[:-1]),
        ("tokens", batch if tokens is None else tokens.shape),
    ):
        if shape != batch:
            raise ValueError(f"{what} covers {tuple(shape)}, model_hidden {tuple(batch)}: they must be the same tokens")
    if tokens is None and any(name.endswith("log_prob") for name in names):
        raise ValueError("statistics: log-probabilities are of written tokens; give tokens=")
    sides = {
        "target": linear_side(
            target_hidden.flatten(0, -2), target_head, target_bias, target_logit_scale, target_softcap, temperature
        ),
        "model": linear_side(
            model_hidden.flatten(0, -2), model_head, model_bias, model_logit_scale, model_softcap, temperature
        ),
    }
    written = model_hidden.new_zeros(batch, dtype=torch.long) if tokens is None else tokens
    table = measure(sides, {name: asked(name) for name in names}, written.flatten())
    return {name: values.reshape(batch) for name, values in table.items()}


def asked(name: str) -> tuple[str, ...]:
    """A name of `linear_statistics` as (kind, side) or (kind, "target", "model")."""
    kind = name.removeprefix("target_")
    if kind in ALONE:
        return kind, "model" if kind == name else "target"
    return name, "target", "model"


def linear_side(
    hidden: Float[Tensor, "n width"],
    head: Float[Tensor, "vocab width"],
    bias: Float[Tensor, "vocab"] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Side:
    """Logits of hidden states and a head, into one buffer that every chunk uses again."""
    linear._fits("hidden", hidden, head, bias)
    states, weight = linear._matmul_ready(hidden.detach(), head.detach())
    side = linear.Head(weight, linear._detach(bias), logit_scale, softcap, temperature)
    buffer: list[Tensor] = []

    def logits(rows: slice) -> Tensor:
        part = states[rows]
        if not buffer or len(buffer[0]) < len(part):
            dtype = torch.promote_types(torch.float32, part.dtype)
            buffer[:] = [torch.empty(len(part), len(weight), dtype=dtype, device=part.device)]
        with torch.autocast(part.device.type, enabled=False):
            out = side.product(part, buffer[0])
        for block in linear._blocks(out, kernels.EAGER_BLOCK):
            side.finish(out[block])
        return out

    return Side(len(weight), logits)


@torch.no_grad()
def measure(
    sides: Mapping[str, Side], wanted: Mapping[str, tuple[str, ...]], tokens: Int[Tensor, "n"]
) -> dict[str, Float[Tensor, "n"]]:
    """What is `wanted` by name, as (kind, side) or (kind, target side, model side): kinds as in `linear_statistics`.

    The logits of each side are made once, however much is asked of it.

    Raises:
        ValueError: a kind that means nothing; logits that are NaN, saying whose.
    """
    answers = [_answer(kind, *names) for kind, *names in wanted.values()]
    pairs = _pairs(wanted.values())
    used = list(dict.fromkeys(name for _, *names in wanted.values() for name in names))
    parts: list[Tensor] = []
    for rows in chunks(len(tokens), max(sides[name].vocab for name in used)):
        logits = {name: sides[name].logits(rows) for name in used}
        widest = max(logits.values(), key=lambda x: x.shape[-1])
        fast = _worth_compiling(widest, len(tokens) * widest.shape[-1])
        for block in linear._blocks(widest, kernels.COMPILED_BLOCK if fast else kernels.EAGER_BLOCK):
            seen = _Block({name: x[block] for name, x in logits.items()}, tokens[rows][block], pairs, fast)
            columns = [answer(seen) for answer in answers] + [seen.check(name) for name in used]
            parts.append(torch.stack(columns, -1))
    table = torch.cat(parts)
    for name, broken in zip(used, table[:, len(answers) :].isnan().sum(0).tolist(), strict=True):
        if broken:
            raise ValueError(
                f"the {name}'s logits are NaN at {broken} of {len(tokens)} positions: its weights are damaged, or the "
                "run has diverged"
            )
    return dict(zip(wanted, table[:, : len(answers)].unbind(-1), strict=True))


def chunks(count: int, vocab: int) -> list[slice]:
    """Tokens at a time."""
    size = max(ENTRIES // max(vocab, 1), LEAST_ROWS)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)] or [slice(0, 0)]


def _worth_compiling(like: Tensor, entries: int) -> bool:
    """As `linear` decides it, except that on a GPU only "always" compiles."""
    large = like.device.type == "cpu" and like.dtype == torch.float32 and entries >= kernels.WORTH
    return (kernels._mode == "always" or (kernels._mode == "auto" and large)) and not torch.compiler.is_compiling()


class Own(NamedTuple):
    """The logsumexp and the entropy of one side."""

    normaliser: Float[Tensor, "n"]
    entropy: Float[Tensor, "n"]


def of_one(logits: Float[Tensor, "n vocab"]) -> Own:
    """See `Own`."""
    z = torch.logsumexp(logits, -1, keepdim=True)
    return Own(z[:, 0], _entropy(logits - z))


class Pairing(NamedTuple):
    """What is asked of two sides beside their own numbers."""

    measures: tuple[FDivergence, ...] = ()
    affinity: bool = False


def of_two(
    measures: tuple[FDivergence, ...],
    affinity: bool,
    edges: bool,
    target: Float[Tensor, "n vocab"],
    model: Float[Tensor, "n vocab"],
) -> tuple[Tensor, ...]:
    """Normaliser and entropy of both, the values of `measures`, and log sum_v sqrt(t_v m_v) where it is asked for.

    Args:
        edges: whether some logit may be -inf.
    """
    z_t, z_m = (torch.logsumexp(x, dim=-1, keepdim=True) for x in (target, model))
    log_affinity = [torch.logsumexp((target + model) / 2, -1) - (z_t + z_m)[:, 0] / 2] if affinity else []
    log_t, log_m = target - z_t, model - z_m
    if edges:
        parts = [kernels.weighted(measure, target, model, z_t, z_m)[1] for measure in measures]
    else:
        pair = Pair(log_t, log_m, (target - model) - (z_t - z_m))
        parts = [value(measure, pair) for measure in measures]
    values = [part.sum(-1) for part in parts]
    return z_t[:, 0], _entropy(log_t, edges), z_m[:, 0], _entropy(log_m, edges), *values, *log_affinity


def _entropy(log_p: Tensor, edges: bool = True) -> Tensor:
    finite = log_p.clamp_min(torch.finfo(log_p.dtype).min) if edges else log_p  # 0 * -inf would be NaN
    return -(log_p.exp() * finite).sum(-1)


@lru_cache(maxsize=256)
def _compiled(pair: Pairing | None, dtype: torch.dtype, device: torch.device) -> Any:
    """The kernel of a pair, or of one side; None, with one warning, where there is no compiler."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def kernel(*logits: Tensor) -> tuple[Tensor, ...]:
        return of_one(*logits) if pair is None else of_two(*pair, True, *logits)

    def example() -> tuple[Tensor, ...]:
        return torch.randn(1 if pair is None else 2, 5, 67, dtype=dtype, device=device).unbind()

    what = "entropies" if pair is None else ", ".join(map(str, pair.measures)) or "pairs"
    try:
        graph = make_fx(kernel, tracing_mode="symbolic")(*example())
        fast = torch.compile(graph, dynamic=True, fullgraph=True)
        fast(*example())
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        warnings.warn(
            f"kullback: no compiled kernel for {what} ({reason}); the plain one is exact too, only slower", stacklevel=4
        )
        return None
    return fast


class _Block:
    """Some tokens, and what is already known of them."""

    def __init__(
        self, logits: dict[str, Tensor], tokens: Tensor, pairs: Mapping[tuple[str, str], Pairing], fast: bool
    ) -> None:
        self.logits, self.tokens, self.fast = logits, tokens, fast
        self.two: dict[tuple[str, str], tuple[Own, Own]] = {}
        self.values: dict[tuple[str, str], dict[Any, Tensor]] = {}
        self.one: dict[str, Own] = {}
        for names, pairing in pairs.items():
            shared = self.shared(*names)
            z_t, h_t, z_m, h_m, *values = self._of_two(pairing, *shared)
            self.two[names] = Own(z_t, h_t), Own(z_m, h_m)
            self.values[names] = dict(zip([*pairing.measures, "affinity"], values, strict=False))
            for name, own, part in zip(names, self.two[names], shared, strict=True):
                if part.shape == logits[name].shape:
                    self.one.setdefault(name, own)

    def shared(self, target: str, model: str) -> tuple[Tensor, Tensor]:
        """The logits of the columns that both have."""
        t, m = self.logits[target], self.logits[model]
        size = min(t.shape[-1], m.shape[-1])
        return t[:, :size].contiguous(), m[:, :size].contiguous()

    def own(self, name: str) -> Own:
        if name not in self.one:
            logits = self.logits[name]
            kernel = self._kernel(None, logits)
            self.one[name] = of_one(logits) if kernel is None else Own(*kernel(logits))
        return self.one[name]

    def check(self, name: str) -> Tensor:
        """NaN where the logits are."""
        known = [own for names, both in self.two.items() for side, own in zip(names, both, strict=True) if side == name]
        return (known[0] if known else self.own(name)).entropy

    def _of_two(self, pairing: Pairing, target: Tensor, model: Tensor) -> tuple[Tensor, ...]:
        kernel = self._kernel(pairing, target)
        if kernel is not None:
            return kernel(target, model)
        edges = target.numel() > 0 and not bool(torch.minimum(target.amin(), model.amin()) > -INF)  # nan too
        return of_two(*pairing, edges, target, model)

    def _kernel(self, pairing: Pairing | None, like: Tensor) -> Any:
        if not self.fast or min(like.shape) < 2:  # sizes 0 and 1 would be compiled again
            return None
        with kernels._lock:
            return _compiled(pairing, like.dtype, like.device)


def _pairs(wanted: Iterable[tuple[str, ...]]) -> dict[tuple[str, str], Pairing]:
    found: dict[tuple[str, str], Pairing] = {}
    for kind, *names in wanted:
        if kind in ALONE:
            continue
        key = (names[0], names[1])
        measures, affinity = found.get(key, Pairing())
        of = _HELLINGER if kind in AFFINITY else kind
        if kind != "agreement" and not _OVERLAP.fullmatch(kind):
            measures = tuple(dict.fromkeys((*measures, divergence(of))))
        found[key] = Pairing(measures, affinity or kind in AFFINITY)
    return found


def _answer(kind: str, *names: str) -> Callable[[_Block], Tensor]:
    """How a block answers one question."""
    if len(names) != (1 if kind in ALONE else 2):
        count = "one distribution" if kind in ALONE else "two distributions, target first"
        raise ValueError(f'statistics="{kind}" is of {count}, not of {", ".join(names) or "none"}')
    if kind == "entropy":
        return lambda block: block.own(names[0]).entropy
    if kind == "log_prob":
        return lambda block: _written(block.logits[names[0]], block.tokens) - block.own(names[0]).normaliser
    pair = (names[0], names[1])
    if kind == "agreement":

        def agree(block: _Block) -> Tensor:
            target, model = block.shared(*pair)
            return (first(target) == first(model)).to(target.dtype)

        return agree
    if found := _OVERLAP.fullmatch(kind):
        k = int(found[1])
        if k < 1:
            raise ValueError(f'statistics="{kind}": k must be at least 1')
        return lambda block: _overlap(*(likeliest(x, k) for x in block.shared(*pair)))
    if kind in AFFINITY:
        return lambda block: AFFINITY[kind](_bhattacharyya(block.values[pair]))
    measure = divergence(kind)
    return lambda block: block.values[pair][measure]


def _bhattacharyya(values: Mapping[Any, Tensor]) -> Tensor:
    """-log sum sqrt(t m): by way of Hellinger where it is small, whose digits a logarithm near 1 would lose."""
    hellinger, log_affinity = values[divergence(_HELLINGER)], values["affinity"]
    return torch.where(hellinger < 0.5, -torch.log1p(-hellinger.clamp(max=0.5)), -log_affinity)


AFFINITY: dict[str, Callable[[Tensor], Tensor]] = {
    "bhattacharyya": lambda distance: distance,
    "bhattacharyya_coefficient": lambda distance: torch.exp(-distance),
}


def _written(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.gather(-1, tokens[:, None])[:, 0]


def first(logits: Float[Tensor, "n vocab"]) -> Int[Tensor, "n"]:
    """argmax, group by group: several times faster on a CPU."""
    count, vocab = logits.shape
    whole = vocab // GROUP
    if whole < 2:
        return logits.argmax(-1)
    groups = logits[:, : whole * GROUP].unflatten(-1, (whole, GROUP))
    best, at = groups.amax(-1).max(-1)
    inside = groups[torch.arange(count, device=logits.device), at].argmax(-1)
    rest = logits[:, whole * GROUP :]
    if not rest.shape[1]:
        return at * GROUP + inside
    beyond, place = rest.max(-1)
    return torch.where(beyond > best, whole * GROUP + place, at * GROUP + inside)


def likeliest(logits: Float[Tensor, "n vocab"], k: int) -> Int[Tensor, "n k"]:
    """The columns of the k largest logits, in no order; different negative numbers where fewer are possible.

    Of equal ones any, but of equal rows the same.
    """
    count, vocab = logits.shape
    k = min(k, vocab)
    whole = vocab // GROUP
    if whole < 2 * k:
        values, ids = logits.topk(k, -1)
    else:  # all of the k likeliest lie in the k groups with the largest maxima, or in what is left over
        largest = logits[:, : whole * GROUP].unflatten(-1, (whole, GROUP)).amax(-1).topk(k, -1).indices
        steps = torch.arange(GROUP, device=logits.device)
        rest = torch.arange(whole * GROUP, vocab, device=logits.device).expand(count, -1)
        columns = torch.cat([(largest[:, :, None] * GROUP + steps).flatten(1), rest], -1)
        values, at = logits.gather(-1, columns).topk(k, -1)
        ids = columns.gather(-1, at)
    return torch.where(values == -INF, -1 - torch.arange(k, device=logits.device), ids)


def _overlap(target: Int[Tensor, "n k"], model: Int[Tensor, "n k"]) -> Float[Tensor, "n"]:
    """The share of the target's columns that the model has too."""
    model = torch.where(model < 0, model - target.shape[1], model)  # never equal to the target's missing ones
    both = torch.cat([target, model], -1).sort(-1).values  # a column stands there twice if both have it
    return (both[:, 1:] == both[:, :-1]).sum(-1) / (target >= 0).sum(-1)
