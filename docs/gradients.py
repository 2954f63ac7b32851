"""What every estimator of a divergence does as a loss or as a reward, by enumeration: no sampling, no noise.

`python -m docs.gradients` draws docs/images/kl-estimators.png; the tests check the same numbers.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import kullback as kb
from kullback.divergence import FDivergence

NAMES = (
    "reverse_kl", "forward_kl", "jeffreys", "jsd(0.5)", "skew_kl(0.1)", "skew_reverse_kl(0.1)", "alpha(0.5)",
    "squared_hellinger", "tv", "pearson_chi2", "neyman_chi2", "chi2_kl", "le_cam",
)  # fmt: skip

Form = Callable[[FDivergence, Tensor, Tensor], Tensor]


def _as_loss(estimator: str) -> Form:
    """The estimate of the value, differentiated through the model's log-probability: autograd of f(l)."""

    def loss(D: FDivergence, target: Tensor, model: Tensor) -> Tensor:
        if estimator == "k2":
            return 0.5 * D.second_derivative_at_one * (target - model) ** 2
        plain = D.weighted_plain if estimator == "k1" else D.weighted_value
        return plain(target - model, torch.zeros_like(model))  # model f(target / model) with model weighing 1

    return loss


def _as_reward(estimator: str) -> Form:
    def loss(D: FDivergence, target: Tensor, model: Tensor) -> Tensor:
        return D.sampled(target, model.detach(), estimator=estimator) * model  # type: ignore[arg-type]

    return loss


FORMS: dict[str, Form] = {
    "loss: squared": lambda D, target, model: D.surrogate(target, model, route="squared"),
    "loss: ratio": lambda D, target, model: _as_loss("k3")(D, target, model) * (model - model.detach()).exp(),
    "reward: -link": lambda D, target, model: D.surrogate(target, model, route="link"),
    "loss: k1": _as_loss("k1"),
    "loss: k2": _as_loss("k2"),
    "loss: k3": _as_loss("k3"),
    "reward: -k1": _as_reward("k1"),
    "reward: -k2": _as_reward("k2"),
    "reward: -k3": _as_reward("k3"),
}


def expected_gradient(form: Form, D: FDivergence, target: Tensor, logits: Tensor) -> Tensor:
    """sum_v model_v d loss_v / d logits, with model_v only a weight: the mean over infinitely many samples."""
    logits = logits.detach().requires_grad_()
    log_p = logits.log_softmax(-1)
    loss = form(D, target.log_softmax(-1), log_p)
    (gradient,) = torch.autograd.grad((log_p.detach().exp() * loss).sum(), logits)
    return gradient


def true_gradient(D: FDivergence, target: Tensor, logits: Tensor) -> Tensor:
    """Of D over the vocabulary: the form `exact`."""
    logits = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(D.categorical(target, logits), logits)
    return gradient


def compare(name: str, form: str, *, pairs: int = 100, vocab: int = 12, seed: int = 0) -> tuple[float, float, float]:
    """Over random pairs: largest relative error, largest relative length, median cosine with the true gradient."""
    D, draw = kb.divergence(name), torch.Generator().manual_seed(seed)
    errors, lengths, cosines = [], [], []
    for _ in range(pairs):
        target, logits = torch.randn(2, vocab, generator=draw, dtype=torch.float64)
        right, found = true_gradient(D, target, logits), expected_gradient(FORMS[form], D, target, logits)
        errors.append(float((found - right).norm() / right.norm()))
        lengths.append(float(found.norm() / right.norm()))
        cosines.append(float(torch.cosine_similarity(found, right, dim=0)))
    return max(errors), max(lengths), float(torch.tensor(cosines).median())


def verdict(name: str, form: str) -> str:
    """ "right", "zero", "none" (it does not exist), or the median cosine."""
    if "k2" in form and not kb.divergence(name).smooth:
        return "none"
    error, length, cosine = compare(name, form)
    if error < 1e-8:
        return "right"
    return "zero" if length < 1e-8 else f"{cosine:.2f}"


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    words = [["right", *(verdict(name, form) for form in FORMS)] for name in NAMES]
    columns = ["exact", *FORMS]

    def shade(word: str) -> int:
        if word in ("right", "zero", "none"):
            return {"right": 0, "zero": 2, "none": 4}[word]
        return 3 if float(word) < 0 else 1

    figure, axes = plt.subplots(figsize=(8.6, 4.9), layout="constrained")
    colors = ListedColormap(["#2a7f62", "#f3d9a4", "#d9d9d9", "#d1605e", "#ffffff"])
    axes.imshow([[shade(word) for word in row] for row in words], cmap=colors, vmin=0, vmax=4, aspect="auto")
    for i, row in enumerate(words):
        for j, word in enumerate(row):
            text = {"none": "", "right": "right", "zero": "0"}.get(word, word)
            axes.text(
                j, i, text, ha="center", va="center", fontsize=8, color="white" if shade(word) in (0, 3) else "black"
            )
    axes.set_xticks(range(len(columns)), [name.replace(": ", ":\n") for name in columns], fontsize=8)
    axes.set_yticks(range(len(NAMES)), NAMES, fontsize=8, family="monospace")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_xticks([x - 0.5 for x in range(1, len(columns))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(NAMES))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.axvline(3.5, color="black", linewidth=2)
    axes.set_xlabel(
        "expected gradient on the policy's own samples: right, zero, or its cosine with the right one\n"
        "(median of 100 random pairs of 12 tokens); red: it climbs the divergence",
        fontsize=9,
    )
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw(Path(__file__).parent / "images" / "kl-estimators.png")
