"""Below the dense limit: leaving out the columns of the logit gradient that hardly matter, error against time.

The distributions are synthetic, made to look like a trained model's: a Zipf unigram over the whole vocabulary (tails as
heavy as text has them), a Gaussian context with a standard deviation of 2, and five likely continuations per token,
drawn from the unigram and raised until the mean entropy is 1 nat. The target is the same with other noise.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kullback as kb
from benchmarks import harness
from benchmarks.linear import products, with_gradient
from kullback.divergence import kernels, linear

DIVERGENCES = ("reverse_kl",)
TOLERANCES = (0.0, 1e-5, 1e-4, 1e-3, 2**-8, 1e-2, 3e-2)
FULL = {"tokens": 1024, "width": 1024, "vocab": 32768, "repeats": 3}
QUICK = {"tokens": 64, "width": 64, "vocab": 2048, "repeats": 1}
ENTROPY = 1.0  # nats
CONTINUATIONS = (1.0, 0.8, 0.7, 0.6, 0.5)  # logits of the likely tokens, relative to the first


def problem(tokens: int, width: int, vocab: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    unigram = -torch.log(torch.arange(vocab) + 2.7)
    head = torch.randn(vocab, width, generator=rng) * (2 / math.sqrt(width))
    head[:, 0] = unigram / 10
    context = torch.randn(tokens, width, generator=rng)
    context[:, 0] = 10.0
    likely = torch.multinomial(unigram.exp().expand(tokens, -1), len(CONTINUATIONS), generator=rng)
    rows = head[likely]
    rows[..., 0] = 0
    pull = (torch.tensor(CONTINUATIONS)[None, :, None] * rows / rows.square().sum(-1, keepdim=True)).sum(1)

    low, high = 0.0, 60.0
    for _ in range(12):
        strength = (low + high) / 2
        if entropy((context + strength * pull)[:64], head) > ENTROPY:
            low = strength
        else:
            high = strength
    noise = [0.2 * torch.randn(tokens, width, generator=rng) for _ in range(2)]
    states = [context + strength * pull + n for n in noise]
    return {
        "target_hidden": states[0],
        "target_head": head.clone(),
        "model_hidden": states[1].requires_grad_(),
        "model_head": head.requires_grad_(),
    }


def entropy(hidden: Tensor, head: Tensor) -> float:
    log_probs = torch.log_softmax(hidden @ head.t(), -1)
    return -(log_probs.exp() * log_probs).sum(-1).mean().item()


def run(quick: bool = False) -> dict[str, Any]:
    size = QUICK if quick else FULL
    x = problem(size["tokens"], size["width"], size["vocab"])
    measured = entropy(x["model_hidden"][:256].detach(), x["model_head"].detach())
    print(f"entropy of the model: {measured:.2f} nats")
    rows: list[dict[str, Any]] = []
    loads = [harness.other_load()]
    for name in DIVERGENCES:
        D = kb.divergence(name)

        def loss(tolerance: float, D: kb.FDivergence = D) -> Tensor:
            with kernels.kernels("always"):
                return D.linear(**x, gradient_tolerance=tolerance).mean()

        exact = with_gradient(partial(loss, 0.0), x)
        errors: dict[float, dict[str, float]] = {}
        for tolerance in TOLERANCES:
            with Kept() as kept:
                value, hidden, head = with_gradient(partial(loss, tolerance), x)
            harness.agree({"exact": (exact[0].item(),), "skipping": (value.item(),)}, 1e-6)
            token = (hidden - exact[1]).norm(dim=-1) / exact[1].norm(dim=-1)
            errors[tolerance] = {
                "kept": kept.share(),
                "error_hidden": ((hidden - exact[1]).norm() / exact[1].norm()).item(),
                "error_head": ((head - exact[2]).norm() / exact[2].norm()).item(),
                "error_token_median": token.median().item(),
                "error_token_worst": token.max().item(),
            }
        timed = {"L": products(x)} | {str(t): partial(with_gradient, partial(loss, t), x) for t in TOLERANCES}
        result = harness.take_turns(timed, size["repeats"])
        for tolerance, error in errors.items():
            row = result[str(tolerance)]
            rows.append({"divergence": name, "tolerance": tolerance, **error, **row})
            print(
                f"{name:12s} tolerance {tolerance:8.1e} kept {error['kept']:6.1%} {row['over_limit']:5.3f} L  "
                f"error hidden {error['error_hidden']:.1e} head {error['error_head']:.1e}"
            )
        loads.append(harness.other_load())
        print(f"  load of others: {loads[-1]}", flush=True)
    return {
        **{k: size[k] for k in ("tokens", "width", "vocab")},
        "entropy": measured,
        "other_load": loads,
        "rows": rows,
    }


class Kept:
    """The share of columns that `linear` keeps, over its chunks."""

    def __enter__(self) -> Kept:
        self.shares: list[float] = []
        self.original = linear._kept_columns

        def counting(grad: Tensor, tolerance: float) -> Tensor | None:
            kept = self.original(grad, tolerance)
            self.shares.append(1.0 if kept is None else len(kept) / grad.shape[1])
            return kept

        linear._kept_columns = counting
        return self

    def __exit__(self, *_: object) -> None:
        linear._kept_columns = self.original

    def share(self) -> float:
        return sum(self.shares) / len(self.shares) if self.shares else 1.0
