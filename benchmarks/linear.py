"""The fused linear divergence: time and memory of loss and gradients, against the limit of its matrix products.

L is the time of the four `torch.mm` that no exact loss can avoid (target logits, model logits, gradient of the hidden
states, gradient of the head), into memory that is already there, in the same run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kullback as kb
from benchmarks import harness
from kullback.divergence import kernels

Loss = Callable[[], Tensor]

# f in the user's words; (u + 1) log((u + 1) / 2u) is TRL's and f-distill's "softened" reverse KL
OWN = "f given in code"
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd(0.5)", "squared_hellinger", OWN)
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd(0.5)": 0.5}  # in TRL and in Liger
WITH_PEERS = ("reverse_kl", "jsd(0.5)")  # forward KL costs them what reverse KL does
FULL = {"tokens": (2048,), "width": 1024, "vocab": 32768, "repeats": 3}
QUICK = {"tokens": (128,), "width": 256, "vocab": 8192, "repeats": 2}
AT_HALF = ("reverse_kl", "jsd(0.5)")  # at the second size: to see the growth, and our own uncompiled path


def generator(u: Tensor) -> Tensor:
    return (u + 1) * torch.log((u + 1) / (2 * u))


def problem(tokens: int, width: int, vocab: int) -> dict[str, Tensor]:
    """Hidden states and heads whose logits have a standard deviation of 2: about 8.4 nats of entropy at V = 32768."""
    rng = torch.Generator().manual_seed(0)
    names = {"target_hidden": tokens, "target_head": vocab, "model_hidden": tokens, "model_head": vocab}
    x = {name: torch.randn(rows, width, generator=rng) for name, rows in names.items()}
    for side in ("target", "model"):
        x[f"{side}_head"] *= 2 / math.sqrt(width)
    for name in ("model_hidden", "model_head"):
        x[name].requires_grad_()
    return x


def products(x: dict[str, Tensor], count: int = 4) -> Callable[[], None]:
    """The four products, or the three without the target's."""
    tokens, vocab = len(x["model_hidden"]), len(x["model_head"])
    logits = torch.empty(tokens, vocab)
    states, head, th, tw = (x[n].detach() for n in ("model_hidden", "model_head", "target_hidden", "target_head"))
    grad_states, grad_head = torch.empty_like(states), torch.empty_like(head)

    def run() -> None:
        if count == 4:
            torch.mm(th, tw.t(), out=logits)
        torch.mm(states, head.t(), out=logits)
        torch.mm(logits, head, out=grad_states)
        torch.mm(logits.t(), states, out=grad_head)

    return run


def naive(name: str, x: dict[str, Tensor]) -> Tensor:
    """What one would write: both logits, log-softmax, the formula, autograd."""
    t = torch.log_softmax(x["target_hidden"] @ x["target_head"].t(), -1)
    m = torch.log_softmax(x["model_hidden"] @ x["model_head"].t(), -1)
    if name == "forward_kl":
        total = (t.exp() * (t - m)).sum(-1)
    elif name == "reverse_kl":
        total = (m.exp() * (m - t)).sum(-1)
    elif name == "jsd(0.5)":
        mix = torch.logaddexp(t, m) - math.log(2)
        total = 0.5 * (t.exp() * (t - mix)).sum(-1) + 0.5 * (m.exp() * (m - mix)).sum(-1)
    elif name == "squared_hellinger":
        total = 1 - (0.5 * (t + m)).exp().sum(-1)
    else:
        total = (m.exp() * generator((t - m).exp())).sum(-1)
    return total.mean()


def contestants(name: str, x: dict[str, Tensor], plain: bool) -> dict[str, Loss]:
    D = kb.FDivergence.from_generator(generator, name="own") if name == OWN else kb.divergence(name)

    def ours(mode: kernels.Mode) -> Tensor:
        with kernels.kernels(mode):
            return D.linear(**x).mean()

    out: dict[str, Loss] = {"naive": lambda: naive(name, x), "kullback": lambda: ours("always")}
    if plain:
        out["kullback, not compiled"] = lambda: ours("never")
    if name in WITH_PEERS:
        out |= peers(BETA[name], x)
    return out


def peers(beta: float, x: dict[str, Tensor]) -> dict[str, Loss]:
    """Each as its own library calls it, hard loss off, defaults otherwise."""
    out: dict[str, Loss] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

            out["TRL chunked"] = lambda: ChunkedDivergenceFunction.apply(
                x["model_hidden"], x["model_head"], None, x["target_hidden"], x["target_head"], None, beta
            )[0].mean()
        except ImportError:
            pass
        try:
            from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss
        except ImportError:
            return out
    labels = torch.zeros(len(x["model_hidden"]), dtype=torch.long)
    for title, compiled in (("Liger chunked, eager", False), ("Liger chunked, compiled", True)):
        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled)
        out[title] = lambda loss=loss: loss(
            x["model_hidden"], x["model_head"], x["target_hidden"], x["target_head"], labels
        )
    return out


def with_gradient(loss: Loss, x: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    value = loss()
    grad_hidden, grad_head = torch.autograd.grad(value, (x["model_hidden"], x["model_head"]))
    return value.detach(), grad_hidden, grad_head


def run(quick: bool = False) -> dict[str, Any]:
    size = QUICK if quick else FULL
    width, vocab = size["width"], size["vocab"]
    rows: list[dict[str, Any]] = []
    loads = [harness.other_load()]
    for tokens in size["tokens"]:
        x = problem(tokens, width, vocab)
        for name in DIVERGENCES if tokens == size["tokens"][0] else AT_HALF:
            makers = contestants(name, x, plain=quick or tokens != size["tokens"][0])
            measures: dict[str, tuple[float, ...]] = {}
            probe = torch.Generator().manual_seed(1)
            along = [torch.randn(s, generator=probe) for s in (x["model_hidden"].shape, x["model_head"].shape)]
            for who, loss in makers.items():
                value, *gradients = with_gradient(loss, x)
                measures[who] = (
                    value.item(),
                    *(g.norm().item() for g in gradients),
                    *(
                        (g * d).sum().item() / d.norm().item() / g.norm().item() + 1
                        for g, d in zip(gradients, along, strict=True)
                    ),
                )
            apart = harness.agree(measures, 2e-4)
            timed: dict[str, Callable[[], Any]] = {"L": products(x)}
            timed |= {who: partial(with_gradient, loss, x) for who, loss in makers.items()}
            result = harness.take_turns(timed, size["repeats"])
            for who, row in result.items():
                rows.append(
                    {
                        "divergence": name,
                        "tokens": tokens,
                        "who": who,
                        **row,
                        "apart": apart.get(who),
                    }
                )
                memory = f"{row['peak_bytes'] / 2**20:8.0f} MiB" if row["peak_bytes"] is not None else ""
                print(f"N={tokens} {name:18s} {who:26s} {row['median']:7.3f} s {row['over_limit']:6.3f} L {memory}")
            loads.append(harness.other_load())
            print(f"  load of others: {loads[-1]}", flush=True)
    return {
        **{k: size[k] for k in ("width", "vocab", "repeats")},
        "dtype": "float32",
        "other_load": loads,
        "rows": rows,
    }
