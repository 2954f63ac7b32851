"""The fused linear divergence: time and memory of loss and gradients, against the limit of its matrix products.

L is the time of the four `torch.mm` that no exact loss can avoid (target logits, model logits, gradient of the hidden
states, gradient of the head), into memory that is already there, in the same run.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kullback as kb
from benchmarks import harness
from kullback.divergence import TopK, kernels

Loss = Callable[[], Tensor]

# f in the user's words; (u + 1) log((u + 1) / 2u) is TRL's and f-distill's "softened" reverse KL
OWN = "f given in code"
WITH_PEERS = ("reverse_kl", "forward_kl", "jsd(0.5)")
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd(0.5)": 0.5}  # in TRL and in Liger
COMBINED = "0.7*forward_kl + 0.3*reverse_kl"
SLOW = ("naive", "TRL chunked", "Liger chunked, eager")  # one round: they are far from the others

FULL = {"tokens": 2048, "width": 1024, "vocab": 32768, "repeats": 5}
QUICK = {"tokens": 128, "width": 256, "vocab": 8192, "repeats": 2}
TIMES = (0.25, 0.5, 1, 2)  # of tokens, and of vocabulary, for the growth


def generator(u: Tensor) -> Tensor:
    return (u + 1) * torch.log((u + 1) / (2 * u))


def problem(tokens: int, width: int, vocab: int) -> dict[str, Tensor]:
    """Hidden states and heads whose logits have a standard deviation of 2: about 8.4 nats of entropy at V = 32768."""
    rng = torch.Generator().manual_seed(0)
    names = {"target_hidden": tokens, "target_head": vocab, "model_hidden": tokens, "model_head": vocab}
    x = {name: torch.randn(rows, width, generator=rng) for name, rows in names.items()}
    for side in ("target", "model"):
        x[f"{side}_head"] *= 2 / math.sqrt(width)
    if torch.cuda.is_available():
        x = {name: tensor.to("cuda", torch.bfloat16) for name, tensor in x.items()}
    for name in ("model_hidden", "model_head"):
        x[name].requires_grad_()
    return x


def products(x: dict[str, Tensor], *, target: bool = True, head: bool = True) -> Callable[[], None]:
    """The four products; without the target's logits, or without the gradient of the model's head, three."""
    states, weight, th, tw = (x[n].detach() for n in ("model_hidden", "model_head", "target_hidden", "target_head"))
    logits = states.new_empty(len(states), len(weight))
    grad_states, grad_head = torch.empty_like(states), torch.empty_like(weight)

    def run() -> None:
        if target:
            torch.mm(th, tw.t(), out=logits)
        torch.mm(states, weight.t(), out=logits)
        torch.mm(logits, weight, out=grad_states)
        if head:
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


def family() -> dict[str, kb.FDivergence]:
    """Every member at its default parameter, a combination, and a user's f."""
    named = {str(member()): member() for member in kb.divergences().values()}
    return {**named, COMBINED: kb.divergence(COMBINED), OWN: kb.FDivergence.from_generator(generator, name="own")}


def ours(D: kb.FDivergence, x: dict[str, Tensor]) -> Loss:
    """Compiled here on a small problem, so that neither time nor memory of a measured call is the compiler's."""

    def loss(x: dict[str, Tensor]) -> Tensor:
        with kernels.kernels("always"):
            return D.linear(**x).mean()

    small = problem(8, 8, 64)
    with_gradient(partial(loss, small), small)
    return partial(loss, x)


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
    labels = torch.zeros(len(x["model_hidden"]), dtype=torch.long, device=x["model_hidden"].device)
    for title, compiled in (("Liger chunked, eager", False), ("Liger chunked, compiled", True)):
        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled)
        out[title] = lambda loss=loss: loss(
            x["model_hidden"], x["model_head"], x["target_hidden"], x["target_head"], labels
        )
    if labels.is_cuda:
        from liger_kernel.transformers import LigerFusedLinearJSD

        fused = LigerFusedLinearJSD(jsd_beta=beta)
        out["Liger fused, Triton"] = lambda: fused(
            x["model_hidden"], x["model_head"], x["target_hidden"], x["target_head"]
        )
    return out


def with_gradient(loss: Loss, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The value and the gradients of whatever is trained."""
    value = loss()
    wanted = [x[n] for n in ("model_hidden", "model_head") if x[n].requires_grad]
    return value.detach(), *torch.autograd.grad(value, wanted)


def probe(loss: Loss, x: dict[str, Tensor]) -> tuple[float, ...]:
    """Value, norm of each gradient and its cosine with a random direction (plus 1, so that it is not near 0)."""
    value, *gradients = with_gradient(loss, x)
    rng = torch.Generator().manual_seed(1)
    out = [value.item()]
    for g in gradients:
        along = torch.randn(g.shape, generator=rng).to(g.device)
        g = g.float()
        out += [g.norm().item(), ((g * along).sum() / along.norm() / g.norm()).item() + 1]
    return tuple(out)


def against_peers(name: str, size: dict[str, int]) -> list[dict[str, Any]]:
    """One divergence by everyone who has it: the fast ones in every round, the slow ones in the first."""
    x = problem(size["tokens"], size["width"], size["vocab"])
    losses: dict[str, Loss] = {"naive": lambda: naive(name, x), "kullback": ours(kb.divergence(name), x)}
    losses |= peers(BETA[name], x)
    half = x["model_hidden"].dtype != torch.float32
    apart = harness.agree({who: probe(loss, x) for who, loss in losses.items()}, 5e-2 if half else 2e-4)
    timed: dict[str, Callable[[], Any]] = {"L": products(x)}
    timed |= {who: partial(with_gradient, loss, x) for who, loss in losses.items()}
    fast = {who: run for who, run in timed.items() if who not in SLOW}
    result = harness.take_turns(timed, 1)
    more = harness.take_turns(fast, size["repeats"] - 1)
    for who, row in more.items():  # L first
        row["seconds"] = result[who]["seconds"] + row["seconds"]
        row["median"] = statistics.median(row["seconds"])
        row["over_limit"] = statistics.median(a / b for a, b in zip(row["seconds"], more["L"]["seconds"], strict=True))
        row["peak_bytes"] = result[who]["peak_bytes"]
    return rows({**result, **more}, divergence=name, tokens=size["tokens"], apart=apart)


def members(size: dict[str, int]) -> list[dict[str, Any]]:
    """Every member of the family in turn with L, at half the tokens."""
    x = problem(size["tokens"] // 2, size["width"], size["vocab"])
    timed: dict[str, Callable[[], Any]] = {"L": products(x)}
    timed |= {name: partial(with_gradient, ours(D, x), x) for name, D in family().items()}
    return [
        {**row, "divergence": row["who"], "who": "L" if row["who"] == "L" else "kullback"}
        for row in rows(harness.take_turns(timed, max(1, size["repeats"] - 2)), tokens=size["tokens"] // 2)
    ]


def three(size: dict[str, int]) -> list[dict[str, Any]]:
    """Where one product is not needed: a frozen head of the model, and a target cached as its top 64."""
    out = []
    D = kb.divergence("reverse_kl")
    x = problem(size["tokens"], size["width"], size["vocab"])
    frozen = {**x, "model_head": x["model_head"].detach()}
    result = harness.take_turns(
        {"L": products(x, head=False), "kullback": partial(with_gradient, ours(D, frozen), frozen)}, size["repeats"]
    )
    out += rows(result, divergence="reverse_kl, frozen head", tokens=size["tokens"])
    with torch.no_grad():
        kept = [
            TopK.from_logits(part @ x["target_head"].t(), min(64, size["vocab"]))
            for part in x["target_hidden"].split(256)
        ]
    topk = TopK(
        torch.cat([k.log_probs for k in kept]),
        torch.cat([k.token_ids for k in kept]),
        torch.cat([k.tail() for k in kept]),
    )

    def cached() -> Tensor:
        return D.linear_topk(topk, x["model_hidden"], x["model_head"]).mean()

    result = harness.take_turns(
        {"L": products(x, target=False), "kullback": partial(with_gradient, cached, x)}, size["repeats"]
    )
    return out + rows(result, divergence="reverse_kl, top-64 target", tokens=size["tokens"])


def growth(size: dict[str, int]) -> list[dict[str, Any]]:
    """Time and memory of reverse KL as tokens grow, and as the vocabulary grows at half the tokens."""
    out = []
    grid = [(int(size["tokens"] * t), size["vocab"]) for t in TIMES]
    grid += [(size["tokens"] // 2, int(size["vocab"] * t)) for t in TIMES if t != 1]
    for tokens, vocab in grid:
        x = problem(tokens, size["width"], vocab)
        timed = {"L": products(x), "kullback": partial(with_gradient, ours(kb.divergence("reverse_kl"), x), x)}
        out += rows(harness.take_turns(timed, 3), divergence="reverse_kl", tokens=tokens, vocab=vocab)
    return out


def rows(result: dict[str, dict[str, Any]], apart: dict[str, float] | None = None, **same: Any) -> list[dict[str, Any]]:
    out = []
    for who, row in result.items():
        out.append({**same, "who": who, **row, "apart": (apart or {}).get(who)})
        memory = f"{row['peak_bytes'] / 2**20:8.0f} MiB" if row["peak_bytes"] is not None else ""
        what = " ".join(str(v) for v in same.values())
        print(f"{what:30s} {who:26s} {row['median']:7.3f} s {row['over_limit']:6.3f} L {memory}", flush=True)
    return out


PIECES: dict[str, Callable[[dict[str, int]], list[dict[str, Any]]]] = {
    **{name: partial(against_peers, name) for name in WITH_PEERS},
    "members": members,
    "three": three,
    "growth": growth,
}


def run(quick: bool = False, only: Sequence[str] = ()) -> dict[str, Any]:
    """All pieces, or some."""
    size = QUICK if quick else FULL
    pieces = {name: (lambda _, measure=measure: measure(size)) for name, measure in PIECES.items()}
    half = torch.cuda.is_available()
    return {
        **size,
        "dtype": "bfloat16" if half else "float32",
        "device": "cuda" if half else "cpu",
        "pieces": harness.in_pieces("linear", pieces, quick, only),
    }
