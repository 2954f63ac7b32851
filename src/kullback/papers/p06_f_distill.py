"""06 f-distill: is the gradient of every divergence the weighted score difference, and do its fixed points show it?

(a) The gradient, by quadrature, for the whole family. (b) A Gaussian student of a mixture with two modes: exact fixed
points. (c) The same with everything learned: score, ratio, normalisation. (d) A ring of eight modes, as a picture.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kullback.diffusion.data import ring, two_modes
from kullback.diffusion.exact import estimated_gradient, fixed_points, log_uniform, numeric_gradient, weight_variance
from kullback.diffusion.f_distill import FDistill, Normaliser
from kullback.diffusion.measure import modes
from kullback.diffusion.networks import Affine, Discriminator, Mlp
from kullback.diffusion.noise import Denoiser, Noise
from kullback.diffusion.pictures import new_figure, show_samples, show_weights, weight_curve
from kullback.diffusion.weights import RatioWeights
from kullback.divergence import divergence
from kullback.papers.page import Direction, Findings, Spread, Table
from kullback.papers.reproduction import Job, reproduces
from kullback.report.style import COLORS
from kullback.run.learner import fit
from kullback.run.seeds import derive, generator

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
APART = (0.1, 1.0, 2.0)  # distances of two unit Gaussians, for the variance of the weight
LEVELS = (0.2, 4.0)  # sigma of part (c)
FULL = {"exact": 6000, "steps": 1200, "warmup": 300, "seeds": 3, "ring": 1500}
QUICK = {"exact": 100, "steps": 30, "warmup": 10, "seeds": 1, "ring": 20}


@reproduces(6, full=FULL, quick=QUICK, parallel=True)
def reproduce(job: Job) -> Findings:
    """Run the four experiments. (a) is always whole; a quick run has too few steps for (b) to (d) to arrive."""
    size = job.size
    names, teacher, (levels, shares) = [*PAPER.values(), *OTHERS.values()], two_modes(), log_uniform(*LEVELS)
    exact = fixed_points(names, STARTS, teacher, torch.tensor(VARIANCES), steps=size["exact"])
    grid = fixed_points([*PAPER.values()], STARTS[:1], teacher, levels, shares, steps=size["exact"])
    arms = [(name, seed, "none") for name in PAPER for seed in range(size["seeds"])]
    arms += [(name, 0, "dmd") for name in PAPER]
    loop = {"steps": size["steps"], "warmup": size["warmup"]}
    learned = job.spread(
        learn_gaussian,
        [{"name": name, "seed": seed, "normaliser": normaliser, **loop} for name, seed, normaliser in arms],
        "learned",
    )
    rings = job.spread(learn_ring, [{"name": name, "steps": size["ring"]} for name in PAPER], "ring")
    by_arm: dict[str, dict[str, list[Any]]] = {kind: {name: [] for name in PAPER} for kind in ("none", "dmd")}
    for (name, _, normaliser), run in zip(arms, learned, strict=True):
        by_arm[normaliser][name].append(run)
    numbers = {
        "errors": gradient_errors(),
        "variance": {name: [weight_variance(text, distance) for distance in APART] for name, text in PAPER.items()},
        "exact": dict(zip([*PAPER, *OTHERS], exact.tolist(), strict=True)),
        "levels": dict(zip(PAPER, grid[:, 0].tolist(), strict=True)),
        "learned": by_arm,
        "ring": {run["name"]: {key: run[key] for key in ("modes", "near")} for run in rings},
    }
    return Findings(
        setup=SETUP.format(**size),
        directions=_directions(numbers),
        tables=[_exact_table(numbers), _variance_table(numbers), _learned_table(numbers), _ring_table(numbers)],
        figure=_figure(numbers, rings),
        caption="Above: how much a sample counts, by its ratio; where the Gaussian student of (b) ends, from two "
        "starts. Below: the learned student's standard deviation in (c), every seed, with the exact fixed point as a "
        "bar; the ring of (d) and a one-step student of it.",
        reading=READING,
        differs=DIFFERS,
        numbers=numbers,
    )


# (a) The gradient; (b) is `kullback.diffusion.exact` alone


def gradient_errors() -> dict[str, float]:
    """For each divergence, how far the estimator's gradient lies from finite differences of D, relative to its size."""
    found = {}
    for label, name in GRADIENTS.items():
        case = (name, 0.9, 0.4, (1.0, 0.8), 0.5)
        estimate, slopes = estimated_gradient(*case), numeric_gradient(*case)
        found[label] = max(abs(e - s) for e, s in zip(estimate, slopes, strict=True)) / math.hypot(*slopes)
    return found


# (c), (d) Learned


def networks(seed: int, sigma_data: float, width: int = 64) -> tuple[Denoiser, Discriminator]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "networks"))
        return Denoiser(Mlp((2,), width), sigma_data), Discriminator(Mlp((2,), width, out=1), sigma_data)


def learn_gaussian(name: str, seed: int, normaliser: Normaliser, steps: int, warmup: int) -> dict[str, Any]:
    """The whole loop for an affine student. Returns its mean and standard deviation along x."""
    teacher, noise = two_modes(), Noise(*LEVELS, draw="log_uniform")
    student, (fake, ratio) = Affine((2,), offset=torch.tensor([-1.0, 0.0])), networks(seed, 2.0)
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
    covered, near = modes(drawn, teacher)
    return {
        "name": name,
        "modes": covered,
        "near": near,
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
    collapsed = {name: [abs(exact[name][start][0]) < 1 for start in (0, 3)] for name in PAPER}
    variance = {name: found[-1] for name, found in numbers["variance"].items()}
    low, high = ("softened", "JS", "Hellinger"), ("Jeffreys", "forward KL")
    return [
        Direction(
            "the weighted score difference is the gradient of D, for every divergence tried",
            max(errors.values()) < 1e-5,
            f"{len(errors)} divergences, largest relative difference {max(errors.values()):.0e}",
            True,
        ),
        Direction(
            "mode seeking as the paper labels it: reverse and softened reverse KL keep one mode from (1, -1) and from "
            "(0.5, -2); JS and Hellinger (medium) from the second alone; Jeffreys and forward KL from neither",
            all(collapsed[name] == [True, True] for name in ("reverse KL", "softened"))
            and all(collapsed[name] == [False, True] for name in ("JS", "Hellinger"))
            and all(collapsed[name] == [False, False] for name in high),
            "std " + ", ".join(f"{name} {exact[name][0][0]:.2f} / {exact[name][3][0]:.2f}" for name in PAPER),
            True,
        ),
        Direction(
            "the normalised weight does not vary for reverse KL, varies little for softened, JS and Hellinger, much "
            "for Jeffreys and forward KL",
            variance["reverse KL"] < 1e-9
            and max(variance[name] for name in low) < min(variance[name] for name in high),
            "unit Gaussians 2 apart: " + ", ".join(f"{name} {_small(value)}" for name, value in variance.items()),
        ),
        Direction(
            "all learned: reverse and softened reverse KL keep one mode (std < 0.7), the others cover both (> 1.5)",
            max(*runs["reverse KL"], *runs["softened"]) < 0.7 and min(v for name in order for v in runs[name]) > 1.5,
            "; ".join(f"{name} {min(v):.2f} to {max(v):.2f}" for name, v in runs.items()),
            True,
        ),
        Direction(
            "exact width from (1, -1): Jeffreys < Hellinger < JS < forward KL",
            all(std[a] < std[b] for a, b in itertools.pairwise(order)),
            ", ".join(f"{name} {std[name]:.3f}" for name in order),
            asserted=True,
            claimed=False,
        ),
        Direction(
            "all learned: the same order in every seed",
            all(runs[a][seed] < runs[b][seed] for a, b in itertools.pairwise(order) for seed in seeds),
            f"{len(seeds)} seeds; means within {worst:.1%} of the exact fixed points",
            asserted=True,
            claimed=False,
        ),
        Direction(
            "forward KL ends at the teacher's mean and standard deviation from every start",
            off < 1e-3,
            f"furthest {off:.0e} away",
            asserted=True,
            claimed=False,
        ),
        Direction(
            "softened reverse KL stays on the minor mode from b = 1.5",
            exact["softened"][1][0] < 0.7 and exact["softened"][1][1] > 1.5,
            f"({exact['softened'][1][0]:.3f}, {exact['softened'][1][1]:.3f})",
            asserted=True,
            claimed=False,
        ),
        Direction(
            "the DMD normaliser moves every fixed point: reverse KL no longer keeps one mode",
            dmd["reverse KL"] > 1.5 and dmd["softened"] > 1.5,
            ", ".join(f"{name} {value:.2f}" for name, value in dmd.items()),
            asserted=True,
            claimed=False,
        ),
        Direction(
            "the one-step student draws from the eight modes of the ring and from little else (90 % within 3 standard "
            "deviations; the teacher has 99 %), under every divergence",
            all(row["modes"] == 8 and row["near"] > 0.9 for row in numbers["ring"].values()),
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
        "The teacher has standard deviation 1.900 and mean -0.8; its modes are at -2 and 2. From (0.5, -2) Hellinger "
        "is still leaving, slowly. The last column is the gradient of (a) against finite differences.",
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


def _small(value: float) -> str:
    return "0" if value < 1e-12 else f"{value:.3g}"  # rounding of the quadrature


def _variance_table(numbers: Mapping[str, Any]) -> Table:
    return Table(
        "Variance of the normalised weight h / E[h] under the model, two unit Gaussians",
        ["divergence", *(f"{distance:g} apart" for distance in APART)],
        [[name, *map(_small, found)] for name, found in numbers["variance"].items()],
        "By quadrature. Close together it is the variance of the ratio times 0 for reverse KL, 1/4 for softened, "
        "Jeffreys, Hellinger and JS, and 1 for forward KL.",
    )


def _ring_table(numbers: Mapping[str, Any]) -> Table:
    return Table(
        "The ring, one network call per sample",
        ["divergence", "modes covered", "within 3 standard deviations of a mode"],
        [[name, f"{row['modes']} of 8", f"{row['near']:.1%}"] for name, row in numbers["ring"].items()],
        "Covered: at least a tenth of its eighth of the samples lies within 3 standard deviations.",
    )


def _figure(numbers: Mapping[str, Any], rings: Sequence[Mapping[str, Any]]) -> Any:
    figure, (weights, left, right, bars, truth, drawn) = new_figure(6, columns=3)
    show_weights(weights, {name: weight_curve(divergence(text)) for name, text in PAPER.items()})
    for axis, start in ((left, 0), (right, 3)):
        _densities(axis, [numbers["exact"][name][start] for name in PAPER])
        axis.set_title("from (a, b) = ({:g}, {:g})".format(*STARTS[start]), fontsize=9)
    for place, (name, color) in enumerate(zip(PAPER, COLORS, strict=False)):
        bars.plot([place - 0.3, place + 0.3], [numbers["levels"][name][0]] * 2, color=color, linewidth=2)
        seen = [run["std"] for run in numbers["learned"]["none"][name]]
        bars.plot([place] * len(seen), seen, "o", color=color, markersize=4, mfc="none")
    bars.set_xticks(range(len(PAPER)), PAPER, rotation=30, ha="right", fontsize=8)
    bars.set_ylabel("learned student's standard deviation", fontsize=9)
    show_samples(truth, ring().sample(2000, generator(0, "ring")), "teacher", limit=3.2)
    show_samples(drawn, rings[-1]["samples"], f"student, {rings[-1]['name']}, one call", limit=3.2)
    return figure


def _densities(axis: Any, points: Sequence[tuple[float, float]]) -> None:
    """The teacher's density, and the Gaussian students (a, b) in the colours of the weights."""
    x, teacher = torch.linspace(-5, 5, 300, dtype=torch.float64), two_modes()
    parts = torch.distributions.Normal(teacher.means[:, 0].double(), teacher.deviations.double())
    axis.fill_between(x, parts.log_prob(x[:, None]).exp() @ teacher.shares.double(), color="#d5d8dc", linewidth=0)
    for (a, b), color in zip(points, COLORS, strict=False):
        axis.plot(x, torch.distributions.Normal(b, abs(a)).log_prob(x).exp(), color=color, linewidth=1.2)
    axis.set_xlabel("x; grey: the teacher", fontsize=9)
    axis.set_ylabel("density", fontsize=9)
    axis.set_ylim(0, 0.85)


SETUP = """\
(a) Teacher N(1, 0.8²), student 0.9 z + 0.4, noise variance 0.5. The estimator's mean is taken by 80 x 80 Gauss-Hermite
nodes over (z, eps), with exact scores and ratio, and compared with central differences of D between the noised laws.
The variance of the weight is by quadrature too.

(b) Teacher 0.7 N(-2, 0.5²) + 0.3 N(2, 0.5²), student a z + b; D averaged over noise variances 0.05, 0.3, 1 and 4;
{exact} steps of gradient descent at 0.02 on the exact gradient, from four starts.

(c) The same teacher in the plane, its score exact; student A z + b from A = I, b = (-1, 0). The student's score and the
discriminator are MLPs of width 64, trained along: {warmup} steps first, then 4 for each of its {steps} steps.
Sigma log-uniform in [0.2, 4], batch 512, Adam at 3e-3 for both, at 1e-2 falling to 5e-4 for the student, ratio clip
[0.02, 50], ten bins in log sigma, no GAN term, normaliser none; {seeds} seeds. Once more with the DMD normaliser.

(d) Eight modes on a ring of radius 2, exact score; MLP student, {ring} steps, DMD normaliser, clip [0.1, 20], GAN term
1e-3; one seed."""

READING = (
    "A Gaussian cannot be two modes, so what it does instead is the divergence's choice, and it shows which divergence "
    "was really minimised. JS and Hellinger, between the extremes, cover from afar but stay in a mode they start in; "
    "Hellinger creeps out of it, too slowly to matter. The paper's grades of variance hold far from the teacher; close "
    "to it Jeffreys is as quiet as Hellinger. The theorem needs a weight that depends on the sample only through the "
    "ratio. The DMD normaliser divides each sample by its own distance to the teacher's answer: with it the update is "
    "no gradient of any of these divergences, forward KL overshoots the moments, and reverse KL covers. It is the "
    "released code's choice and an option here. The ring "
    "separates nothing: after so few steps the student is a disc, denser at the rim, which reaches all modes and fills "
    "the space between; the shares of all six are alike. It is a picture, not evidence."
)

DIFFERS = (
    "The paper distils image models and reports FID; none of its image experiments is run here.",
    "The affine student and the two-mode teacher are ours: they make the claim about mode seeking decidable.",
    "Mode seeking and variance are graded in words there; the two starts and the distances are ours.",
    "Bins of the ratio are even in log sigma here, in sigma in the released code.",
    "The loss is without the DMD normaliser unless said; the paper always uses it.",
    "Part (c) has no GAN term. The paper needs one for image quality; there the discriminator sees real data, here the "
    "teacher is the data.",
)
