"""All numbers per token in one pass over the vocabulary, against the limit of its two products and the usual way.

L2 is the time of the two `torch.mm` that make the logits of both sides, into memory that is already there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.linear import problem
from kullback.divergence import kernels
from kullback.divergence.statistics import linear_statistics

FULL = {"tokens": 1024, "width": 1024, "vocab": 32768, "repeats": 5}
QUICK = {"tokens": 64, "width": 32, "vocab": 512, "repeats": 1}
K = 16
SETS = {
    "log-probability and entropy of both": ("log_prob", "entropy", "target_log_prob", "target_entropy"),
    "all": (
        "log_prob",
        "entropy",
        "target_log_prob",
        "target_entropy",
        "forward_kl",
        "reverse_kl",
        "jsd(0.5)",
        "squared_hellinger",
        "bhattacharyya",
        f"overlap({K})",
        "agreement",
    ),
}


def products(x: dict[str, Tensor]) -> Callable[[], None]:
    logits = torch.empty(len(x["model_hidden"]), len(x["model_head"]))

    def run() -> None:
        torch.mm(x["target_hidden"], x["target_head"].t(), out=logits)
        torch.mm(x["model_hidden"], x["model_head"].t(), out=logits)

    return run


def naive(x: dict[str, Tensor], tokens: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """What one would write: both log-softmaxes whole, then a reduction per number."""
    t = torch.log_softmax(x["target_hidden"] @ x["target_head"].t(), -1)
    m = torch.log_softmax(x["model_hidden"] @ x["model_head"].t(), -1)

    def jsd() -> Tensor:
        middle = torch.logaddexp(t, m) - math.log(2)
        return 0.5 * (t.exp() * (t - middle)).sum(-1) + 0.5 * (m.exp() * (m - middle)).sum(-1)

    def overlap() -> Tensor:
        a, b = t.topk(K, -1).indices, m.topk(K, -1).indices
        return (a[:, :, None] == b[:, None, :]).any(-1).float().mean(-1)

    formulas: dict[str, Callable[[], Tensor]] = {
        "log_prob": lambda: m.gather(-1, tokens[:, None])[:, 0],
        "entropy": lambda: -(m.exp() * m).sum(-1),
        "target_log_prob": lambda: t.gather(-1, tokens[:, None])[:, 0],
        "target_entropy": lambda: -(t.exp() * t).sum(-1),
        "forward_kl": lambda: (t.exp() * (t - m)).sum(-1),
        "reverse_kl": lambda: (m.exp() * (m - t)).sum(-1),
        "jsd(0.5)": jsd,
        "squared_hellinger": lambda: 1 - (0.5 * (t + m)).exp().sum(-1),
        "bhattacharyya": lambda: -(0.5 * (t + m)).exp().sum(-1).log(),
        f"overlap({K})": overlap,
        "agreement": lambda: (t.argmax(-1) == m.argmax(-1)).float(),
    }
    return {name: formulas[name]() for name in names}


@torch.no_grad()
def run(quick: bool = False) -> dict[str, Any]:
    size = QUICK if quick else FULL
    x = {name: value.detach() for name, value in problem(size["tokens"], size["width"], size["vocab"]).items()}
    tokens = torch.randint(size["vocab"], (size["tokens"],), generator=torch.Generator().manual_seed(2))
    rows: list[dict[str, Any]] = []
    loads = [harness.other_load()]
    for title, names in SETS.items():

        def ours(mode: kernels.Mode, names: tuple[str, ...] = names) -> dict[str, Tensor]:
            with kernels.kernels(mode):
                return linear_statistics(**x, statistics=names, tokens=tokens)

        contestants: dict[str, Callable[[], dict[str, Tensor]]] = {
            "naive": lambda names=names: naive(x, tokens, names),  # type: ignore[misc]
            "kullback": lambda ours=ours: ours("always"),  # type: ignore[misc]
            "kullback, not compiled": lambda ours=ours: ours("never"),  # type: ignore[misc]
        }
        means = {who: tuple(v.mean().item() for v in make().values()) for who, make in contestants.items()}
        apart = harness.agree(means, 1e-4)
        for who, row in harness.take_turns({"L2": products(x), **contestants}, size["repeats"]).items():
            rows.append({"what": title, "who": who, **row, "apart": apart.get(who)})
            memory = f"{row['peak_bytes'] / 2**20:8.0f} MiB" if row["peak_bytes"] is not None else ""
            print(f"{title:36s} {who:24s} {row['median']:7.3f} s {row['over_limit']:6.3f} L2 {memory}", flush=True)
        loads.append(harness.other_load())
    return {**{k: size[k] for k in ("tokens", "width", "vocab", "repeats")}, "k": K, "other_load": loads, "rows": rows}
