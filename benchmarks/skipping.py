"""Below the dense limit: leaving columns out of the logit gradient, error against time, on a trained model.

Student and teacher are two checkpoints of `benchmarks.trained`, on text that they were trained on many times; on those
of its tokens where the student is surest, where its entropy is at most that of a large model on text; and on text that
they never saw. Trains them first where they are missing: ten minutes.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kullback as kb
from benchmarks import harness, trained
from benchmarks.linear import products, with_gradient
from kullback.divergence import kernels, linear

NAMES = ("reverse_kl", "forward_kl", "jsd(0.5)")
TEXTS = {"surest": NAMES, "repeated": NAMES, "held out": ("reverse_kl",)}
SURE = 1.0  # nats
TOLERANCES = (0.0, 1e-4, 1e-3, 2e-3, 4e-3, 1e-2)
FULL = {"tokens": 1024, "pool": 8192, "repeats": 3}
QUICK = {"tokens": 64, "pool": 128, "repeats": 1}
TINY = trained.Size(
    vocab=512, width=32, heads=1, layers=1, length=16, batch=4, fresh=1, repeated=2048, negatives=64, student=6,
    teacher=9, full=2, warmup=2, files=4,
)  # fmt: skip


def run(quick: bool = False, folder: Path | None = None) -> dict[str, Any]:
    size = QUICK if quick else FULL
    model = TINY if quick else trained.Size()
    folder = folder or (trained.FOLDER / "tiny" if quick else trained.FOLDER)
    if not (folder / "teacher.pt").exists():
        trained.train(model, folder)
    rows: list[dict[str, Any]] = []
    loads = [harness.other_load()]
    entropies: dict[str, dict[str, Any]] = {}
    for text, names in TEXTS.items():
        count = size["pool"] if text == "surest" else size["tokens"]
        x = trained.problem(count, held_out=text == "held out", size=model, folder=folder)
        if text == "surest":
            x = surest(x, size["tokens"])
        entropies[text] = {"tokens": len(x["model_hidden"])} | {
            side: entropy(x[f"{prefix}_hidden"].detach(), x[f"{prefix}_head"].detach()).mean().item()
            for side, prefix in (("student", "model"), ("teacher", "target"))
        }
        print(f"{text}: {len(x['model_hidden'])} tokens, entropy {entropies[text]}", flush=True)
        for name in names:
            rows += [{"text": text, **row} for row in measure(name, x, size["repeats"])]
            loads.append(harness.other_load())
            print(f"  load of others: {loads[-1]}", flush=True)
    return {
        "tokens": size["tokens"],
        "width": model.width,
        "vocab": model.vocab,
        "entropy": entropies,
        "other_load": loads,
        "rows": rows,
    }


def measure(name: str, x: dict[str, Tensor], repeats: int) -> list[dict[str, Any]]:
    """For each tolerance: what is kept, the errors of the gradients and their bounds, and the time."""
    D = kb.divergence(name)

    def loss(tolerance: float) -> Tensor:
        with kernels.kernels("always"):
            return D.linear(**x, gradient_tolerance=tolerance).mean()

    exact = with_gradient(partial(loss, 0.0), x)
    logit_gradient = gradient_norm(D, x)
    bounds = {
        "hidden": logit_gradient * largest_singular_value(x["model_head"].detach()),
        "head": logit_gradient * largest_singular_value(x["model_hidden"].detach()),
    }
    errors: dict[float, dict[str, float]] = {}
    for tolerance in TOLERANCES:
        with Kept() as kept:
            value, *gradients = with_gradient(partial(loss, tolerance), x)
        harness.agree({"exact": (exact[0].item(),), "skipping": (value.item(),)}, 1e-6)
        token = (gradients[0] - exact[1]).norm(dim=-1) / exact[1].norm(dim=-1)
        errors[tolerance] = {
            "kept": kept.share(),
            "error_token_median": token.median().item(),
            "error_token_worst": token.max().item(),
        }
        for side, near, right in zip(bounds, gradients, exact[1:], strict=True):
            errors[tolerance][f"error_{side}"] = ((near - right).norm() / right.norm()).item()
            errors[tolerance][f"bound_{side}"] = tolerance * bounds[side] / right.norm().item()
    del exact, value, gradients
    timed = {"L": products(x)} | {str(t): partial(with_gradient, partial(loss, t), x) for t in TOLERANCES}
    result = harness.take_turns(timed, repeats)
    rows = []
    for tolerance, error in errors.items():
        row = result[str(tolerance)]
        rows.append({"divergence": name, "tolerance": tolerance, **error, **row})
        print(
            f"{name:12s} tolerance {tolerance:7.0e} kept {error['kept']:6.1%} "
            f"{row['over_limit']:5.3f} L  error hidden {error['error_hidden']:.1e} (bound {error['bound_hidden']:.1e}) "
            f"head {error['error_head']:.1e} (bound {error['bound_head']:.1e})",
            flush=True,
        )
    return rows


@torch.no_grad()
def entropy(hidden: Tensor, head: Tensor) -> Tensor:
    """Nats, one per token."""
    rows = (torch.log_softmax(states @ head.t(), -1) for states in hidden.split(256))
    return torch.cat([-(log_p.exp() * log_p).sum(-1) for log_p in rows])


def surest(x: dict[str, Tensor], most: int) -> dict[str, Tensor]:
    """`most` tokens, spread evenly over those of lowest entropy that have a mean of `SURE` nats; at least two."""
    found, order = entropy(x["model_hidden"].detach(), x["model_head"].detach()).sort()
    means = found.cumsum(0) / torch.arange(1, len(found) + 1)
    sure = order[: max(2, int((means <= SURE).sum()))]
    chosen = sure[torch.linspace(0, len(sure) - 1, min(most, len(sure))).round().long()].sort().values
    near = {side: x[f"{side}_hidden"].detach()[chosen] for side in ("target", "model")}
    return x | {"target_hidden": near["target"], "model_hidden": near["model"].requires_grad_()}


def gradient_norm(D: kb.FDivergence, x: dict[str, Tensor]) -> float:
    """|G|: the gradient of the mean in the model's logits, in Frobenius norm."""
    with torch.no_grad():
        target = x["target_hidden"] @ x["target_head"].t()
        model = x["model_hidden"] @ x["model_head"].t()
        for t, m in zip(target.split(64), model.split(64), strict=True):
            kernels.eager_rows(D, t, m, torch.ones(()))
        return model.norm().item() / len(model)


def largest_singular_value(matrix: Tensor) -> float:
    """Of what is left of it without its main directions."""
    directions = linear._main_directions(matrix)
    left = matrix - (matrix @ directions) @ directions.t()
    return math.sqrt(torch.linalg.eigvalsh((left.t() @ left).double())[-1].item())


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
