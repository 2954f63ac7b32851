"""06 f-distill: is the gradient of every divergence the weighted score difference, and do its fixed points show it?

(a) The gradient, by quadrature, for the whole family. (b) A Gaussian student of a mixture with two modes: exact fixed
points. (c) The same with everything learned: score, ratio, normalisation. (d) A ring of eight modes, as a picture.
"""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from kullback.diffusion.data import ring, two_modes
from kullback.diffusion.f_distill import FDistill, Normaliser, matching_loss
from kullback.diffusion.networks import Discriminator, Mlp
from kullback.diffusion.noise import Denoiser, Noise
from kullback.diffusion.pictures import LOOKS, show_samples, show_weights
from kullback.diffusion.weights import RatioWeights
from kullback.divergence import divergence
from kullback.papers import running_sums
from kullback.papers.page import Direction, Result, Spread, Table, new_figure, write_page
from kullback.run.learner import fit
from kullback.run.seeds import derive, generator

if TYPE_CHECKING:
    from rich.console import Console

NUMBER = 6
TITLE = "f-distill: one-step generators under any divergence"
CLAIM = "The gradient of any f-divergence of noised marginals is the score difference weighted by its curvature."
SOURCE = (
    "*One-step Diffusion Models with f-Divergence Distribution Matching*, "
    "[arXiv 2502.15681](https://arxiv.org/abs/2502.15681)"
)

# the paper's six, in its own scale; softened reverse KL is a skewed one, so it has a name here too
PAPER = {
    "reverse KL": "reverse_kl",
    "softened": "2*skew(reverse_kl, 0.5)",
    "Jeffreys": "jeffreys",
    "Hellinger": "squared_hellinger",
    "JS": "2*jsd(0.5)",
    "forward KL": "forward_kl",
}
OTHERS = {"le_cam": "le_cam", "jsd(0.1)": "jsd(0.1)", "jsd(0.9)": "jsd(0.9)", "alpha(0.8)": "alpha(0.8)"}
GRADIENTS = {**PAPER, **OTHERS, "Neyman": "neyman_chi2", "Pearson": "pearson_chi2", "chi2_kl": "chi2_kl"}
STARTS = ((1.0, -1.0), (1.0, 1.5), (0.5, 2.0), (0.5, -2.0))  # (a, b) of the student a z + b
VARIANCES = (0.05, 0.3, 1.0, 4.0)  # noise of part (b)
LEVELS = (0.2, 4.0)  # sigma of part (c)
FULL = {"exact": 6000, "steps": 1200, "warmup": 300, "seeds": 3, "ring": 1500}
QUICK = {"exact": 600, "steps": 30, "warmup": 10, "seeds": 1, "ring": 20}


def reproduce(quick: bool = False, console: "Console | None" = None, docs: Path | None = None) -> Result:
    """Run the four experiments and write the page.

    Args:
        quick: too few steps for (b) to (d) to arrive anywhere; (a) is always whole.
        docs: folder of the page; by default docs/papers, and runs/papers for a quick run.
    """
    started, size = time.monotonic(), QUICK if quick else FULL
    processes = 1 if quick else min(2, running_sums.cores())
    errors = gradient_errors()
    exact = fixed_points([*PAPER.values(), *OTHERS.values()], STARTS, *_plain(VARIANCES), steps=size["exact"])
    grid = fixed_points([*PAPER.values()], STARTS[:1], *_log_uniform(*LEVELS), steps=size["exact"])
    loop = {"steps": size["steps"], "warmup": size["warmup"]}
    todo: list[dict[str, Any]] = [
        {"name": name, "seed": seed, "normaliser": "none", **loop} for name in PAPER for seed in range(size["seeds"])
    ]
    todo += [{"name": name, "seed": 0, "normaliser": "dmd", **loop} for name in PAPER]
    learned = running_sums.spread(learn_gaussian, todo, processes=processes, what="06 learned", console=console)
    rings = running_sums.spread(
        learn_ring,
        [{"name": name, "steps": size["ring"]} for name in ("reverse KL", "JS")],
        processes=processes,
        what="06 ring",
        console=console,
    )
    numbers = {
        "errors": errors,
        "exact": dict(zip([*PAPER, *OTHERS], exact.tolist(), strict=True)),
        "levels": dict(zip(PAPER, grid[:, 0].tolist(), strict=True)),
        "learned": {
            normaliser: {
                name: [
                    run
                    for task, run in zip(todo, learned, strict=True)
                    if (task["name"], task["normaliser"]) == (name, normaliser)
                ]
                for name in PAPER
            }
            for normaliser in ("none", "dmd")
        },
        "ring": {run["name"]: {key: run[key] for key in ("modes", "near")} for run in rings},
    }
    return write_page(
        number=NUMBER,
        slug="f-distill",
        title=TITLE,
        claim=CLAIM,
        source=SOURCE,
        setup=SETUP.format(**size),
        directions=_directions(numbers),
        tables=[_exact_table(numbers), _learned_table(numbers), _ring_table(numbers)],
        figure=_figure(numbers, rings),
        caption="From left: the weight of a sample by its ratio; where the Gaussian student ends, from the same start; "
        "the learned student's standard deviation, every seed, with the exact fixed point as a bar; samples of the "
        "ring and of a one-step student of it.",
        reading=READING,
        differs=DIFFERS,
        seconds=time.monotonic() - started,
        quick=quick,
        processes=processes,
        docs=docs,
        console=console,
        numbers=numbers,
    )


# (a) The gradient


def hermite(count: int) -> tuple[Float[Tensor, "node"], Float[Tensor, "node"]]:
    """Nodes and weights of the mean over a standard normal; float64."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def estimated_gradient(
    name: str, a: float, b: float, teacher: tuple[float, float], variance: float, nodes: int = 80
) -> tuple[float, float]:
    """(dD/da, dD/db) by the estimator, its mean taken by quadrature over (z, eps); scores and ratio are exact.

    Teacher N(mean, deviation^2), student a z + b, noise variance as given. It is `matching_loss` with the weights of
    `RatioWeights`, clip and normalisation off.
    """
    node, weight = hermite(nodes)
    z, eps = (part.flatten() for part in torch.meshgrid(node, node, indexing="ij"))
    share = (weight[:, None] * weight[None, :]).flatten()
    sigma = torch.full_like(z, math.sqrt(variance))
    theta = torch.tensor([a, b], dtype=torch.float64, requires_grad=True)
    x = theta[0] * z + theta[1]
    noised = (x + sigma * eps).detach()
    target, model = noised_laws(a, b, teacher, variance)
    scores = [-(noised - law.mean) / law.variance for law in (target, model)]
    teacher_x0, fake_x0 = ((noised + variance * score)[:, None] for score in scores)
    h = divergence(name).curvature(target.log_prob(noised) - model.log_prob(noised))
    loss = matching_loss(x[:, None], teacher_x0, fake_x0, h, sigma)
    (grad,) = torch.autograd.grad((share * loss).sum(), theta)
    return grad[0].item(), grad[1].item()


def noised_laws(
    a: float, b: float, teacher: tuple[float, float], variance: float
) -> tuple[torch.distributions.Normal, torch.distributions.Normal]:
    """Target and model at one noise level, in float64."""
    pairs = torch.tensor([teacher, (b, a)], dtype=torch.float64)
    target, model = (torch.distributions.Normal(mean, (deviation**2 + variance).sqrt()) for mean, deviation in pairs)
    return target, model


def divergence_between(name: str, a: float, b: float, teacher: tuple[float, float], variance: float) -> float:
    """D(target, model) of the noised marginals, by the trapezoid rule on a wide grid."""
    x = torch.linspace(-14, 16, 60_001, dtype=torch.float64)
    target, model = (law.log_prob(x) for law in noised_laws(a, b, teacher, variance))
    return torch.trapezoid(divergence(name).weighted_value(target, model), x).item()


def gradient_errors() -> dict[str, float]:
    """For each divergence, how far the estimator's gradient lies from finite differences of D, relative to its size."""
    a, b, teacher, variance, step = 0.9, 0.4, (1.0, 0.8), 0.5, 1e-4
    found = {}
    for label, name in GRADIENTS.items():
        estimate = estimated_gradient(name, a, b, teacher, variance)
        slopes = [
            (
                divergence_between(name, a + da, b + db, teacher, variance)
                - divergence_between(name, a - da, b - db, teacher, variance)
            )
            / (2 * step)
            for da, db in ((step, 0.0), (0.0, step))
        ]
        found[label] = max(abs(e - s) for e, s in zip(estimate, slopes, strict=True)) / math.hypot(*slopes)
    return found


# (b) Exact fixed points


def _plain(variances: Sequence[float]) -> tuple[Tensor, Tensor]:
    levels = torch.tensor(variances, dtype=torch.float64)
    return levels, torch.full_like(levels, 1 / len(levels))


def _log_uniform(low: float, high: float, count: int = 16) -> tuple[Tensor, Tensor]:
    """Variances and weights of the mean over sigma log-uniform in [low, high]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    sigma = np.exp((nodes + 1) / 2 * math.log(high / low) + math.log(low))
    return torch.from_numpy(sigma**2), torch.from_numpy(weights / 2)


def fixed_points(
    names: Sequence[str],
    starts: Sequence[tuple[float, float]],
    variances: Float[Tensor, "level"],
    shares: Float[Tensor, "level"],
    *,
    steps: int = 6000,
    rate: float = 0.02,
    nodes: int = 200,  # 60 put Jeffreys at 1.720 instead of 1.694: at the smallest noise the ratio is steep
) -> Float[Tensor, "divergence start 2"]:
    """Where gradient descent takes the student a z + b of the mixture's x-axis, exact scores and ratios.

    Given x_t, z has mean a (x_t - b) / (a^2 + variance): so the mean over (z, eps) is one over x_t alone.
    """
    node, weight = hermite(nodes)
    curves = [divergence(name).curvature for name in names]
    theta = torch.tensor(starts, dtype=torch.float64).expand(len(names), -1, -1).clone()
    mixture = two_modes()
    logits, means = mixture.shares.double().log(), mixture.means[:, 0].double()
    spread = mixture.deviations.double() ** 2 + variances[:, None]  # [level, component]
    for _ in range(steps):
        a, b = theta[..., 0, None, None], theta[..., 1, None, None]
        total = a**2 + variances[:, None]  # [divergence, start, level, 1]
        x = b + total.sqrt() * node  # [divergence, start, level, node]
        offset = x[..., None] - means
        parts = logits - 0.5 * (spread.log()[:, None] + offset**2 / spread[:, None])
        log_target = torch.logsumexp(parts, -1)
        target_score = -(parts.softmax(-1) * offset / spread[:, None]).sum(-1)
        log_ratio = log_target + 0.5 * (total.log() + node**2)
        h = torch.stack([curve(row) for curve, row in zip(curves, log_ratio, strict=True)])
        pull = weight * h * (target_score + (x - b) / total)
        into_b = (pull.sum(-1) * shares).sum(-1)
        into_a = ((pull * a * (x - b) / total).sum(-1) * shares).sum(-1)
        theta = theta + rate * torch.stack([into_a, into_b], -1)
    return theta


# (c), (d) Learned


class Affine(nn.Module):
    """x0 = A z + b, from A = I and b = (-1, 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(2))
        self.offset = nn.Parameter(torch.tensor([-1.0, 0.0]))

    def forward(self, latent: Float[Tensor, "row 2"]) -> Float[Tensor, "row 2"]:
        return latent @ self.matrix.T + self.offset


def networks(seed: int, sigma_data: float, width: int = 64) -> tuple[Denoiser, Discriminator]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "networks"))
        return Denoiser(Mlp((2,), width), sigma_data), Discriminator(Mlp((2,), width, out=1), sigma_data)


def learn_gaussian(name: str, seed: int, normaliser: Normaliser, steps: int, warmup: int) -> dict[str, Any]:
    """The whole loop for an affine student. Returns its mean and standard deviation along x."""
    teacher, noise = two_modes(), Noise(*LEVELS, draw="log_uniform")
    student, (fake, ratio) = Affine(), networks(seed, 2.0)
    weights = RatioWeights(divergence(PAPER[name]), noise, clip=(0.02, 50.0), ema=0.9)
    learner = FDistill(
        student,
        teacher,
        fake,
        ratio,
        teacher,
        weights,
        noise,
        normaliser=normaliser,
        gan=0.0,
        every=5,
        warmup=warmup,
        batch=512,
        learning_rates=(1e-2, 3e-3, 3e-3),
        last_learning_rate=5e-4,
        seed=seed,
    )
    fit(learner, warmup + 5 * steps, log_every=1000, what=f"06 {name}")
    return {
        "std": student.matrix[0].norm().item(),
        "mean": student.offset[0].item(),
        "clipped": int(weights.clipped) / int(weights.seen),
    }


def learn_ring(name: str, steps: int, seed: int = 0) -> dict[str, Any]:
    """An MLP student of eight modes, with the paper's normaliser, clip and GAN term."""
    teacher, noise = ring(), Noise(0.05, 3.0)
    fake, ratio = networks(seed, teacher.deviation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "student"))
        student = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    learner = FDistill(
        student,
        teacher,
        fake,
        ratio,
        teacher,
        RatioWeights(divergence(PAPER[name]), noise),
        noise,
        normaliser="dmd",
        gan=1e-3,
        every=3,
        warmup=300,
        batch=256,
        learning_rates=(1e-3, 2e-3, 2e-3),
        last_learning_rate=1e-4,
        seed=seed,
    )
    fit(learner, 300 + 3 * steps, log_every=1000, what=f"06 ring, {name}")
    with torch.no_grad():
        drawn = student(torch.randn(4000, 2, generator=generator(seed, "shown")))
    distance, which = torch.cdist(drawn, teacher.means).min(1)
    near = distance < 3 * 0.25
    counts = torch.bincount(which[near], minlength=8)
    return {
        "name": name,
        "modes": int((counts > 0.02 * len(drawn)).sum()),
        "near": float(near.float().mean()),
        "samples": drawn[:2000],
    }


# The page


def _directions(numbers: Mapping[str, Any]) -> list[Direction]:
    errors, exact, learned = numbers["errors"], numbers["exact"], numbers["learned"]
    std = {name: exact[name][0][0] for name in PAPER}
    order = ["Jeffreys", "Hellinger", "JS", "forward KL"]
    moments = two_modes()
    mean = float(moments.shares @ moments.means[:, 0])
    deviation = math.sqrt(float(moments.shares @ (moments.means[:, 0] - mean) ** 2) + 0.25)
    kl = list(exact["forward KL"])
    off = max(max(abs(a - deviation), abs(b - mean)) for a, b in kl)
    runs = {name: [run["std"] for run in found] for name, found in learned["none"].items()}
    seeds = range(len(runs["JS"]))
    dmd = {name: found[0]["std"] for name, found in learned["dmd"].items()}
    worst = max(
        abs(sum(runs[name]) / len(runs[name]) - numbers["levels"][name][0]) / numbers["levels"][name][0]
        for name in PAPER
    )
    return [
        Direction(
            "the weighted score difference is the gradient of D, for every divergence tried",
            max(errors.values()) < 1e-5,
            f"{len(errors)} divergences, largest relative difference {max(errors.values()):.0e}",
            True,
        ),
        Direction(
            "exact fixed points from (1, -1): reverse and softened reverse KL keep one mode, then Jeffreys < "
            "Hellinger < JS < forward KL in width",
            max(std["reverse KL"], std["softened"]) < 0.7 < 1.5 < std["Jeffreys"]
            and all(std[a] < std[b] for a, b in itertools.pairwise(order)),
            ", ".join(f"{name} {value:.3f}" for name, value in std.items()),
            True,
        ),
        Direction(
            "forward KL ends at the teacher's mean and standard deviation from every start",
            off < 1e-3,
            f"furthest {off:.0e} away",
            True,
        ),
        Direction(
            "the start decides for the mode-seeking ones: softened stays on the minor mode from b = 1.5",
            exact["softened"][1][0] < 0.7 and exact["softened"][1][1] > 1.5,
            f"({exact['softened'][1][0]:.3f}, {exact['softened'][1][1]:.3f})",
            asserted=True,
            claimed=False,
        ),
        Direction(
            "JS has a collapsed fixed point too, from (0.5, -2), where Jeffreys and forward KL escape",
            exact["JS"][3][0] < 0.7 < 1.5 < min(exact["Jeffreys"][3][0], exact["forward KL"][3][0]),
            ", ".join(f"{name} {exact[name][3][0]:.3f}" for name in ("JS", "Hellinger", "Jeffreys", "forward KL")),
            asserted=True,
            claimed=False,
        ),
        Direction(
            "all learned: reverse and softened reverse KL keep one mode (std < 0.7), the others cover both (> 1.5)",
            max(*runs["reverse KL"], *runs["softened"]) < 0.7 and min(v for name in order for v in runs[name]) > 1.5,
            "; ".join(f"{name} {min(v):.2f} to {max(v):.2f}" for name, v in runs.items()),
            True,
        ),
        Direction(
            "all learned: Jeffreys < Hellinger < JS < forward KL in width, in every seed",
            all(runs[a][seed] < runs[b][seed] for a, b in itertools.pairwise(order) for seed in seeds),
            f"{len(seeds)} seeds; means within {worst:.1%} of the exact fixed points",
            True,
        ),
        Direction(
            "the DMD normaliser moves every fixed point: reverse KL no longer keeps one mode",
            dmd["reverse KL"] > 1.5 and dmd["softened"] > 1.5,
            ", ".join(f"{name} {value:.2f}" for name, value in dmd.items()),
            asserted=True,
            claimed=False,
        ),
        Direction(
            "the one-step student finds all eight modes of the ring",
            all(row["modes"] == 8 for row in numbers["ring"].values()),
            ", ".join(f"{name}: {row['modes']}, {row['near']:.0%} near" for name, row in numbers["ring"].items()),
            claimed=False,
        ),
    ]


def _exact_table(numbers: Mapping[str, Any]) -> Table:
    return Table(
        "Exact fixed points (std, mean) of the Gaussian student, by start (a, b)",
        ["divergence", *(f"({a:g}, {b:g})" for a, b in STARTS), "gradient error"],
        [
            [name, *(f"{abs(a):.3f}, {b:.3f}" for a, b in points), f"{numbers['errors'][name]:.0e}"]
            for name, points in numbers["exact"].items()
        ],
        "The teacher has standard deviation 1.900 and mean -0.8; its modes are at -2 and 2. The last column is the "
        "gradient of (a) against finite differences.",
    )


def _learned_table(numbers: Mapping[str, Any]) -> Table:
    learned = numbers["learned"]
    return Table(
        "Standard deviation along x, everything learned",
        ["divergence", "exact fixed point", "learned", "DMD normaliser, 1 seed", "log-ratios clipped"],
        [
            [
                name,
                f"{numbers['levels'][name][0]:.3f}",
                Spread([run["std"] for run in learned["none"][name]], digits=3),
                f"{learned['dmd'][name][0]['std']:.3f}",
                f"{sum(run['clipped'] for run in learned['none'][name]) / len(learned['none'][name]):.1%}",
            ]
            for name in PAPER
        ],
        "Learned: mean, standard error and each seed.",
    )


def _ring_table(numbers: Mapping[str, Any]) -> Table:
    return Table(
        "The ring, one network call per sample",
        ["divergence", "modes with over 2 %", "within 3 standard deviations of a mode"],
        [[name, row["modes"], f"{row['near']:.1%}"] for name, row in numbers["ring"].items()],
    )


def _figure(numbers: Mapping[str, Any], rings: Sequence[Mapping[str, Any]]) -> Any:
    figure, axes = new_figure(5, width=3.3)
    weights, density, bars, truth, drawn = axes
    show_weights(weights, {name: divergence(text) for name, text in PAPER.items()})
    x = torch.linspace(-5, 5, 300, dtype=torch.float64)
    mixture = two_modes()
    mode = torch.exp(-0.5 * ((x[:, None] - mixture.means[:, 0]) / 0.5) ** 2) / (0.5 * math.sqrt(2 * math.pi))
    density.fill_between(x, mode @ mixture.shares.double(), color="#d5d8dc", label="teacher", linewidth=0)
    for points, color in zip(list(numbers["exact"].values())[: len(PAPER)], LOOKS, strict=False):
        a, b = abs(points[0][0]), points[0][1]
        density.plot(x, torch.exp(-0.5 * ((x - b) / a) ** 2) / (a * math.sqrt(2 * math.pi)), color=color, linewidth=1.2)
    density.set_xlabel("x; colours as at the left", fontsize=9)
    density.set_ylabel("density", fontsize=9)
    density.set_ylim(0, 0.85)
    for place, (name, color) in enumerate(zip(PAPER, LOOKS, strict=False)):
        bars.plot([place - 0.3, place + 0.3], [numbers["levels"][name][0]] * 2, color=color, linewidth=2)
        seen = [run["std"] for run in numbers["learned"]["none"][name]]
        bars.plot([place] * len(seen), seen, "o", color=color, markersize=4, mfc="none")
    bars.set_xticks(range(len(PAPER)), PAPER, rotation=40, ha="right", fontsize=7)
    bars.set_ylabel("student's standard deviation", fontsize=9)
    show_samples(truth, ring().sample(2000, generator(0, "ring")), "teacher", limit=3.2)
    show_samples(drawn, rings[-1]["samples"], f"student, {rings[-1]['name']}, one step", limit=3.2)
    return figure


SETUP = """\
(a) Teacher N(1, 0.8²), student 0.9 z + 0.4, noise variance 0.5. The estimator's mean is taken by 80 x 80 Gauss-Hermite
nodes over (z, eps), with exact scores and ratio, and compared with central differences of D between the noised laws.

(b) Teacher 0.7 N(-2, 0.5²) + 0.3 N(2, 0.5²), student a z + b; D averaged over noise variances 0.05, 0.3, 1 and 4;
{exact} steps of gradient descent at 0.02 on the exact gradient, from four starts.

(c) The same teacher in the plane, its score exact; student A z + b from A = I, b = (-1, 0). The student's score and the
discriminator are MLPs of width 64, trained along: {warmup} steps first, then 4 for each of its {steps} steps.
Sigma log-uniform in [0.2, 4], batch 512, Adam at 3e-3 for both, at 1e-2 falling to 5e-4 for the student, ratio clip
[0.02, 50], ten bins in log sigma, no GAN term, normaliser none; {seeds} seeds. Once more with the DMD normaliser.

(d) Eight modes on a ring of radius 2, exact score; MLP student, {ring} steps, DMD normaliser, clip [0.1, 20], GAN term
1e-3."""

READING = (
    "A Gaussian cannot be two modes, so what it does instead is the divergence's choice, and it shows which divergence "
    "was really minimised. The theorem needs a weight that depends on the sample only through the ratio. The DMD "
    "normaliser divides each sample by its own distance to the teacher's answer: with it the update is no gradient of "
    "any of these divergences, forward KL overshoots the moments, and reverse KL covers. It is the released code's "
    "choice and an option here. The ring does not separate the divergences: it is a picture, not evidence."
)

DIFFERS = (
    "The paper distils image models and reports FID; none of its image experiments is run here.",
    "The affine student and the two-mode teacher are ours: they make the claim about mode seeking decidable.",
    "Bins of the ratio are even in log sigma here, in sigma in the released code.",
    "The loss is without the DMD normaliser unless said; the paper always uses it.",
    "Part (c) has no GAN term. The paper needs one for image quality; there the discriminator sees real data, here the "
    "teacher is the data.",
)
