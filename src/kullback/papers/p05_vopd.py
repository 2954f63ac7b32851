"""05 vOPD: does the value of the state, used as a baseline, quieten sampled on-policy distillation?

(a) Exact. At 400 random states the variance of the one-sample estimator is summed over the vocabulary, baseline by
baseline: nothing is sampled. (b) Training. A one-layer student of running sums learns from a three-layer teacher
through `kb.train`, by four estimators of one gradient; at the common start the variance of each is measured over
repeated batches.
"""

import itertools
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import FDivergence, divergence
from kullback.papers import arms, running_sums
from kullback.papers.page import Direction, Findings, Spread, Table, new_figure
from kullback.papers.reproduction import Job, reproduces

if TYPE_CHECKING:
    from kullback.lm.method import Method

ARMS = ("sampled", "vOPD, top 5", "vOPD", "full vocabulary")
SCALES = (0.3, 1.0, 3.0)  # of the student's logits in (a)
TEACHER = {"hidden_size": 96, "layers": 3, "heads": 4}
STUDENT = {"hidden_size": 48, "layers": 1, "heads": 4}
PROMPTS, RATE = 32, 3e-3
FULL = {"seeds": 3, "teacher": 400, "student": 110, "steps": 300, "batches": 32, "rows": 20_000, "held_out": 256}
QUICK = {"seeds": 1, "teacher": 3, "student": 2, "steps": 3, "batches": 3, "rows": 200, "held_out": 16}


@reproduces(5, full=FULL, quick=QUICK, parallel=True)
def reproduce(job: Job) -> Findings:
    """Both experiments; (a) is whole in a quick run too."""
    exact = {scale: exact_variances(scale) for scale in SCALES}
    found = _train_all(job)
    return Findings(
        setup=SETUP.format(**job.size),
        directions=[*_exact_directions(exact), *_training_directions(found, job.size["seeds"])],
        tables=[_exact_table(exact), *_training_tables(found)],
        figure=_figure(exact, found),
        caption="Left: exact variance at random states, relative to no baseline. Middle: variance over repeated "
        "batches at the common start, per seed. Right: accuracy of own samples while training, mean of the seeds.",
        reading=_reading(found),
        differs=DIFFERS,
        numbers={"exact": exact, **found},
    )


# (a) Exact


def random_states(
    scale: float, *, states: int = 400, vocab: int = 50, seed: int = 0
) -> tuple[Float[Tensor, "state vocab"], Float[Tensor, "state vocab"]]:
    """Log-probabilities (target, model): logits N(0, scale^2), and a teacher at a distance that differs from state "
    "to state."""
    draw = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(states, vocab, generator=draw, dtype=torch.float64)
    low, high = math.log(0.1), math.log(3.0)
    sigma = (low + (high - low) * torch.rand(states, 1, generator=draw, dtype=torch.float64)).exp()
    teacher = logits + sigma * torch.randn(states, vocab, generator=draw, dtype=torch.float64)
    return teacher.log_softmax(-1), logits.log_softmax(-1)


def advantages(
    D: FDivergence, target: Float[Tensor, "state vocab"], model: Float[Tensor, "state vocab"], baseline: str
) -> Float[Tensor, "state vocab"]:
    """A(v) = B - g(u_v) for every token, with the baseline B that is named: none, constant, top K, exact or optimal.

    `target` may be off by a constant for each state: it is taken as it is.
    """
    reward = -D.link(target - model)
    p = model.exp()
    if baseline == "none":
        return reward
    if baseline.startswith("top "):
        top = model.topk(int(baseline[4:]), -1)
        return reward + D.topk_expected_link(target.gather(-1, top.indices), top.values)[:, None]
    expected = (p * -reward).sum(-1, keepdim=True)
    if baseline == "constant":
        return reward + expected.mean()
    if baseline == "optimal":  # E[|grad log p|^2 r] / E[|grad log p|^2] is what is subtracted
        size = p * score_norm(p)
        return reward - (size * reward).sum(-1, keepdim=True) / size.sum(-1, keepdim=True)
    return reward + expected


def score_norm(p: Float[Tensor, "state vocab"]) -> Float[Tensor, "state vocab"]:
    """|grad_z log p_v|^2 = |e_v - p|^2."""
    return 1 - 2 * p + p.square().sum(-1, keepdim=True)


def moments(
    p: Float[Tensor, "state vocab"], A: Float[Tensor, "state vocab"]
) -> tuple[Float[Tensor, "state vocab"], Float[Tensor, "state"]]:
    """Mean and total variance of the logit gradient -A_y (e_y - p) over y ~ p, by enumeration."""
    mean = -p * A + p * (p * A).sum(-1, keepdim=True)
    return mean, (p * A.square() * score_norm(p)).sum(-1) - mean.square().sum(-1)


BASELINES = ("none", "constant", "top 1", "top 5", "top 10", "exact", "optimal")


def exact_variances(scale: float) -> dict[str, float]:
    """Total variance of each estimator over all states, relative to no baseline; and what else the card says of "
    "them."""
    D = divergence("reverse_kl")
    target, model = random_states(scale)
    p = model.exp()
    mean, variance = {}, {}
    for name in BASELINES:
        mean[name], variance[name] = moments(p, advantages(D, target, model, name))
    found = {name: float(variance[name].sum() / variance["none"].sum()) for name in BASELINES}
    found["difference of means"] = max(float((mean[name] - mean["none"]).abs().max()) for name in BASELINES)
    each = variance["exact"] / variance["none"]
    large = (kl := D.expected_link(target, model)) > kl.median()
    found |= {
        "median": float(each.median()),
        "median, large KL": float(each[large].median()),
        "median, small KL": float(each[~large].median()),
    }
    found |= {"states worse": float((each > 1).double().mean()), "worst": float(each.max())}
    _, undetached = moments(p, advantages(D, target, model, "none") - 1)  # what differentiating r adds
    found["undetached / none"] = float(undetached.sum() / variance["none"].sum())
    return found


# (b) Training


def method_of(arm: str, teacher: Any) -> "Method":
    from kullback.lm.methods.on_policy_distillation import OnPolicyDistillation
    from kullback.lm.methods.vopd import VOPD

    if arm == "full vocabulary":
        return OnPolicyDistillation(teacher=teacher, divergence="reverse_kl", max_completion=running_sums.LONGEST)
    baseline: Any = {"sampled": "none", "vOPD, top 5": 5, "vOPD": "exact"}[arm]
    return VOPD(teacher=teacher, baseline=baseline, max_completion=running_sums.LONGEST)


def gradient_noise(
    *, folder: Path, student: str, rows: int, held_out: int, seed: int, batches: int
) -> dict[str, dict[str, float]]:
    """Over `batches` batches at one fixed student: the total variance of each arm's gradient, through the engine.

    Every arm sees the same text. "offset" is |mean difference to the full-vocabulary gradient|^2 over what it is on
    average for two estimators of one gradient: about 1 where they are, far more where they are not.
    """
    from kullback.lm.assemble import assemble
    from kullback.lm.engine import Engine
    from kullback.lm.plan import Plan
    from kullback.lm.settings import TrainSettings
    from kullback.lm.tasks import load_task

    task = load_task(running_sums.make_task(rows, seed=seed, held_out=held_out), seed=seed)
    gradients = {}
    for arm in ARMS:
        method = method_of(arm, str(folder / "teacher" / "model"))
        plan = Plan(
            method,
            str(folder / student / "model"),
            task,
            folder,
            train=TrainSettings(seed=seed, prompts_per_step=PROMPTS),
        )
        with arms.quiet():
            engine = Engine(method, at := assemble(plan))
        parameters = list(at.model("student").parameters())
        batch_gradients = []
        for update in range(batches):
            loss = torch.stack([engine.loss(micro) for micro in engine.prepare(update)]).sum()
            batch_gradients.append(
                torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)]).double()
            )
        gradients[arm] = torch.stack(batch_gradients)
    exact = gradients["full vocabulary"]
    found = {}
    for arm, seen in gradients.items():
        each = (seen - seen.mean(0)).square().sum(1) * batches / (batches - 1)
        found[arm] = {"variance": float(each.mean()), "standard error": float(each.std() / math.sqrt(batches))}
        apart = seen - exact
        noise = (apart - apart.mean(0)).square().sum() / (batches - 1) / batches
        found[arm]["offset"] = float(apart.mean(0).square().sum() / noise) if noise > 0 else math.nan
    return found


def train_arm(
    *, folder: Path, arm: str, student: str, rows: int, held_out: int, seed: int, steps: int
) -> dict[str, Any]:
    """One arm from the shared start: accuracy and divergence afterwards, accuracy and gradient norm on the way."""
    run = arms.train(
        method_of(arm, str(folder / "teacher" / "model")),
        student=str(folder / student / "model"),
        data=running_sums.make_task(rows, seed=seed, held_out=held_out),
        output=folder / f"{arm}-{seed}",
        steps=steps,
        prompts_per_step=PROMPTS,
        learning_rate=RATE,
        seed=seed,
        evaluate={
            "problems": held_out,
            "samples": 4,
            "anchors": arm == ARMS[0],
            "divergence_problems": held_out,
            "shown": 0,
        },
    )
    path = {
        name: [row[key] for row in run.metrics]
        for name, key in (("accuracy", "rollout/accuracy"), ("norm", "gradient_norm"))
    }
    return {
        "after": arms.measured(run, "student"),
        "before": arms.measured(run, "untrained"),
        "path": path,
    }


def _train_all(job: Job) -> dict[str, Any]:
    folder, size, seeds = job.folder, job.size, range(job.size["seeds"])
    same = {"folder": folder, "rows": size["rows"], "held_out": size["held_out"]}
    task = running_sums.make_task(size["rows"], seed=100, held_out=size["held_out"])
    teacher, _ = running_sums.make_models(
        job, task=task, teacher=TEACHER, student=STUDENT, prompts=PROMPTS, learning_rate=RATE
    )
    todo = [
        same | {"arm": arm, "student": f"student-{seed}", "seed": seed, "steps": size["steps"]}
        for seed in seeds
        for arm in ARMS
    ]
    runs = job.spread(train_arm, todo, "arms")
    todo = [same | {"student": f"student-{seed}", "seed": seed, "batches": size["batches"]} for seed in seeds]
    noise = job.spread(gradient_noise, todo, "variance")
    by_arm = {arm: runs[place :: len(ARMS)] for place, arm in enumerate(ARMS)}
    return {"teacher": teacher, "before": [run["before"] for run in by_arm[ARMS[0]]], "arms": by_arm, "noise": noise}


# The page


def _exact_directions(exact: Mapping[float, Mapping[str, float]]) -> list[Direction]:
    order = ("exact", "top 10", "top 5", "constant", "none")
    ordered = all(found[a] < found[b] for found in exact.values() for a, b in itertools.pairwise(order))
    apart = max(found["difference of means"] for found in exact.values())
    low, high = (f([found["exact"] for found in exact.values()]) for f in (min, max))
    return [
        Direction(
            "every baseline leaves the mean gradient as it is (exact)",
            apart < 1e-12,
            f"largest difference {apart:.0e}",
            True,
        ),
        Direction(
            "variance: exact < top 10 < top 5 < constant < none (exact, three scales)",
            ordered,
            f"exact baseline leaves {low:.2f} to {high:.2f} of it",
            True,
        ),
        Direction(
            "the value of the state is the best baseline, or nearly",
            max(f["exact"] - f["optimal"] for f in exact.values()) < 0.02,
            ", ".join(f"{found['exact']:.2f} against {found['optimal']:.2f}" for found in exact.values()),
            claimed=False,
        ),
    ]


def _training_directions(found: Mapping[str, Any], seeds: int) -> list[Direction]:
    noise, order = found["noise"], ("sampled", "vOPD, top 5", "vOPD", "full vocabulary")
    falls = [all(one[a]["variance"] > one[b]["variance"] for a, b in itertools.pairwise(order)) for one in noise]
    offsets = [one[arm]["offset"] for one in noise for arm in order[:3]]
    accuracy = {arm: [run["after"]["accuracy"] for run in runs] for arm, runs in found["arms"].items()}
    ratio = statistics.fmean(one["vOPD"]["variance"] / one["sampled"]["variance"] for one in noise)

    def above(a: str, b: str, margin: float = 0.0) -> tuple[bool, str]:
        gaps = Spread([x - y for x, y in zip(accuracy[a], accuracy[b], strict=True)])
        error = "" if math.isnan(gaps.error) else f" ± {gaps.error:.2f}"
        wins = sum(gap > -margin for gap in gaps.values)
        return gaps.mean > -margin, f"difference {gaps.mean:+.2f}{error}, {wins} of {seeds} seeds"

    better, better_words = above("vOPD", "sampled")
    level, level_words = above("vOPD", "full vocabulary", 0.05)
    cheap, cheap_words = above("vOPD, top 5", "vOPD", 0.05)
    return [
        Direction(
            "variance at the common start: sampled > top 5 > vOPD > full vocabulary",
            all(falls),
            f"{sum(falls)} of {seeds} seeds; vOPD has {ratio:.2f} of sampled's",
            True,
        ),
        Direction(
            "sampled arms have the full-vocabulary gradient on average",
            max(offsets) < 2,
            f"offset {min(offsets):.2f} to {max(offsets):.2f}, 1 expected",
        ),
        Direction("accuracy after training, mean of the seeds: vOPD above sampled", better, better_words, True),
        Direction("the top-k baseline loses nothing (within 0.05)", cheap, cheap_words),
        Direction("vOPD is on par with the full vocabulary (within 0.05)", level, level_words),
    ]


def _exact_table(exact: Mapping[float, Mapping[str, float]]) -> Table:
    rows: list[list[Any]] = [
        [f"baseline: {name}", *(f"{found[name]:.2f}" for found in exact.values())] for name in BASELINES
    ]
    rows += [["none, r not detached / detached", *(f"{found['undetached / none']:.2f}" for found in exact.values())]]
    for name in ("median", "median, large KL", "median, small KL", "worst"):
        rows.append([f"exact / none, per state: {name}", *(f"{found[name]:.2f}" for found in exact.values())])
    rows.append(
        ["states where the exact baseline is worse", *(f"{found['states worse']:.0%}" for found in exact.values())]
    )
    title = "(a) Total variance of the one-sample gradient over 400 states of 50 tokens, relative to no baseline"
    return Table(
        title,
        ["", *(f"logits x {scale:g}" for scale in exact)],
        rows,
        "Enumerated in float64: there is no sampling error.",
    )


def _training_tables(found: Mapping[str, Any]) -> list[Table]:
    noise, before = found["noise"], found["before"]
    rows = [
        [
            arm,
            *("{variance:.2f} ± {standard error:.2f}".format(**one[arm]) for one in noise),
            Spread([one[arm]["variance"] / one["sampled"]["variance"] for one in noise]),
            Spread([one[arm]["offset"] for one in noise]) if arm != ARMS[-1] else "",
        ]
        for arm in ARMS
    ]
    seeds = [f"seed {seed}" for seed in range(len(noise))]
    variance = Table(
        "(b) Total gradient variance over repeated batches at the common start",
        ["arm", *seeds, "relative to sampled", "offset"],
        rows,
        "± is one standard error over batches. Offset: squared mean difference to the full-vocabulary gradient on "
        "the same text, "
        "over its expectation for an unbiased estimator.",
    )

    def row(name: str, runs: list[Mapping[str, float]], *rest: Any) -> list[Any]:
        return [
            name,
            *(Spread([run[key] for run in runs], digits) for key, digits in SHOWN.values()),
            *(rest or ("", "")),
        ]

    lines = [row("student before", before)]
    for arm, runs in found["arms"].items():
        way = [Spread([statistics.fmean(run["path"][name]) for run in runs]) for name in ("accuracy", "norm")]
        lines.append(row(arm, [run["after"] for run in runs], *way))
    note = "Mean ± standard error over seeds (each seed). Held-out problems, 4 samples each at temperature 1; "
    note += "right means the whole reply. "
    note += f"The teacher's accuracy is {found['teacher'].get('accuracy', math.nan):.3f}."
    return [
        variance,
        Table("(b) After training", ["arm", *SHOWN, "mean accuracy on the way", "mean gradient norm"], lines, note),
    ]


SHOWN = {
    "accuracy": ("accuracy", 2),
    "KL(student, teacher), own text": ("reverse_kl_student_text", 2),
    "entropy": ("entropy", 2),
}


def _figure(exact: Mapping[float, Mapping[str, float]], found: Mapping[str, Any]) -> Any:
    figure, (left, middle, right) = new_figure(3)
    for place, (scale, one) in enumerate(exact.items()):
        positions = [i + 0.27 * (place - 1) for i in range(len(BASELINES))]
        left.bar(
            positions,
            [one[name] for name in BASELINES],
            0.25,
            label=f"logits x {scale:g}",
            color=COLORS[place],
            alpha=0.85,
        )
    left.set_xticks(range(len(BASELINES)), BASELINES, rotation=40, ha="right")
    left.set_ylabel("variance / none")
    left.legend(fontsize=7, frameon=False)
    for place, arm in enumerate(ARMS):
        values = [one[arm]["variance"] for one in found["noise"]]
        middle.scatter([place] * len(values), values, color=COLORS[place], s=22)
        curves = torch.tensor([run["path"]["accuracy"] for run in found["arms"][arm]]).mean(0)
        window = max(1, len(curves) // 20)
        smooth = curves[: len(curves) // window * window].view(-1, window).mean(1)
        right.plot([(i + 0.5) * window for i in range(len(smooth))], smooth, color=COLORS[place], label=arm)
    middle.set_yscale("log")
    middle.set_xticks(range(len(ARMS)), ARMS, rotation=40, ha="right")
    middle.set_ylabel("gradient variance at the start")
    right.set_xlabel("step")
    right.set_ylabel("accuracy of own samples")
    right.legend(fontsize=7, frameon=False)
    return figure


COLORS = ("#0072b2", "#d55e00", "#009e73", "#b5529b")

SETUP = """\
(a) 400 states of 50 tokens; student logits N(0, 1) times the scale, the teacher's at a distance drawn log-uniformly
from 0.1 to 3 for each state. The gradient estimate for a sampled token y is -A_y (e_y - p); its mean and variance are
summed over y.

(b) The task is the running sums of eight digits modulo seven (`kullback.papers.running_sums`). Teacher: a Qwen3 of 3
layers and width 96, {teacher} supervised steps. Student: 1 layer, width 48, {student} supervised steps, which leaves
it far from the teacher. Then {steps} on-policy steps of 32 prompts with AdamW at 3e-3, gradient norm clipped at 1,
for each of {seeds} seeds: `vopd` with `baseline=none` (sampled), 5 (top 5) and `exact` (vOPD), and
`on_policy_distillation` with reverse KL (full vocabulary). All are means over the tokens of the step. A seed's arms
share the student they start from, the prompts and the random numbers. The variance is taken over {batches} batches at
that shared start; along different runs it could not be compared."""

DIFFERS = (
    "Models of 26 thousand to 300 thousand parameters and one synthetic task, not Qwen3-1.7B on mathematics; no "
    "LoRA; learning rate 3e-3, constant.",
    "All four arms are means over the tokens of a step. In the released code the full-vocabulary and top-k losses "
    "are 64 times larger "
    "before clipping and weight every response alike.",
    "r is detached in every arm. The released un-clipped sampled path differentiates it too, which by itself about "
    "doubles the variance (table a).",
    "Sampler and trainer are one program, so there is no importance weight between them; the PPO clip is inert at "
    "one update per draw.",
    "Top-k distillation (biased) and reward clipping, which the paper also compares, are not run.",
)


def _reading(found: Mapping[str, Any]) -> str:
    kl = statistics.fmean(run["reverse_kl_student_text"] for run in found["before"])
    arms = found["arms"].items()
    mean = {arm: statistics.fmean(run["after"]["accuracy"] for run in runs) for arm, runs in arms}
    accuracies = ", ".join(f"{value:.2f} ({arm})" for arm, value in mean.items())
    return (
        f"The student starts {kl:.1f} nats per token from the teacher, where the value of a state is large and "
        "differs from state to state: there the baseline has most to remove. It does not remove what is left, the "
        "choice of the one token, so the sum over the vocabulary stays quieter. After training the accuracies are "
        f"{accuracies}. The value of the state is not the best baseline for very peaked students (logits x 3), "
        "where in a third of the states it is worse than none."
    )
