"""02 f-DPG: one target, five divergences. Where the policy cannot be the target, the divergence decides how it fails.

All strings of six letters are enumerated. The target is a Markov chain given that one of two letters is missing: two
modes. The policy draws its letters independently and can hold only one of them well. (a) Exact gradients on twelve
chains. (b) The same by samples, as on a language model: Z estimated, a running baseline, and a policy that can become
the target, so that every divergence should end there. (c) A language model and a constraint on how its answers begin,
in four divergences.
"""

import re
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kullback.divergence import divergence
from kullback.papers import arms
from kullback.papers.page import Direction, Findings, Spread, Table, new_figure
from kullback.papers.reproduction import Job, reproduces
from kullback.theory import tabular

if TYPE_CHECKING:
    from kullback.lm.method import Method
    from kullback.lm.tasks import Problem

LETTERS, LENGTH = 3, 6
STRINGS = LETTERS**LENGTH
CHAINS = 12
FLOOR = 1e-12  # of P, so that reverse KL is finite
LOSSES = {
    "forward_kl": "KL (GDC)",
    "2*alpha(2)": "chi-square(p, policy)",
    "tv": "total variation",
    "2*jsd(0.5)": "Jensen-Shannon",
    "reverse_kl": "reverse KL (RLHF)",
}
MEASURES = ("forward_kl", "jsd(0.5)", "tv")
OWN = {"forward_kl": "forward_kl", "2*jsd(0.5)": "jsd(0.5)", "tv": "tv"}
SCORE = "pointwise(other, floor=-4)"  # of the language model
TRAINED = ("forward_kl", "tv", "2*jsd(0.5)", "reverse_kl")
RATE, SAMPLES = 2e-4, 16
FULL = {"steps": 3000, "draws": 600, "samples": 256, "lm_seeds": 2, "lm_steps": 40, "prompts": 8, "problems": 128,
        "asked": 60}  # fmt: skip
QUICK = {"steps": 150, "draws": 30, "samples": 256, "lm_seeds": 1, "lm_steps": 2, "prompts": 2, "problems": 4,
         "asked": 4}  # fmt: skip

Numbers = dict[str, list[float]]


@reproduces(2, full=FULL, quick=QUICK, parallel=True)
def reproduce(job: Job) -> Findings:
    """Both experiments on strings, and four divergences on a language model."""
    size = job.size
    base, allowed = chains(CHAINS)
    exact = {name: measure(train(base, allowed, name, size["steps"]), base, allowed) for name in LOSSES}
    target = measure(log_target(base, allowed), base, allowed)
    sampled = {name: by_samples(base[0], allowed, name, size["draws"], size["samples"]) for name in LOSSES}
    task = {"name": arms.TASK, "verifier": grade, "verifier_timeout": 0}
    models = arms.train_arms(
        job,
        methods(),
        data=[task | {"size": size["problems"]}] * size["lm_seeds"],
        task=task,
        steps=size["lm_steps"],
        marks=arms.marks(size["lm_steps"], 4),
        asked=size["asked"],
        samples=SAMPLES,
        prompts_per_step=size["prompts"],
        learning_rate=RATE,
        lr_schedule="cosine",
        warmup_steps=min(5, size["lm_steps"]),
    )
    return Findings(
        setup=SETUP.format(**size, chains=CHAINS, rate=RATE, answers=SAMPLES, score=SCORE),
        directions=[*_directions(exact, target, sampled), *_model_directions(models)],
        tables=[_exact_table(exact, target), _sampled_table(sampled), *_model_tables(models)],
        figure=_figure(exact, target, sampled, models),
        caption=CAPTION,
        reading=READING,
        differs=DIFFERS,
        numbers={"exact": exact, "target": target, "sampled": sampled, "models": models},
    )


def strings() -> Int[Tensor, "string position"]:
    """All strings, the first letter slowest."""
    return torch.cartesian_prod(*[torch.arange(LETTERS)] * LENGTH)


def chains(count: int) -> tuple[Float[Tensor, "chain string"], Tensor]:
    """log a of random first-order chains (Dirichlet(1), (2) and (5) rows in turn), and which strings lack 0 or 1."""
    text, laws = strings(), []
    for seed in range(count):
        rows = tabular.random_policy(LETTERS, LETTERS + 1, seed=seed, concentration=(1.0, 2.0, 5.0)[seed % 3])
        first, steps = rows[LETTERS][text[:, 0]], rows[text[:, :-1], text[:, 1:]]
        laws.append(first + steps.sum(1))
    return torch.stack(laws), ~((text == 0).any(1) & (text == 1).any(1))


def log_target(base: Tensor, allowed: Tensor) -> Float[Tensor, "chain string"]:
    """log p of p = a b / Z, with P floored."""
    return torch.where(allowed, base, base.new_tensor(FLOOR).log()).log_softmax(-1)


def independent(logits: Float[Tensor, "chain position letter"]) -> Float[Tensor, "chain string"]:
    """log-probabilities of all strings whose letters are drawn independently."""
    log_p, text = logits.log_softmax(-1), strings()
    return torch.stack([log_p[:, t, text[:, t]] for t in range(LENGTH)]).sum(0)


def train(base: Tensor, allowed: Tensor, loss: str, steps: int) -> Float[Tensor, "chain string"]:
    """Adam at 0.02 on D(p, policy), from the base's marginals; the policies it ends at."""
    target, D, text = log_target(base, allowed), divergence(loss), strings()
    marginals = torch.stack(
        [torch.stack([(base.exp() * (text[:, t] == v)).sum(1) for v in range(LETTERS)], -1) for t in range(LENGTH)], 1
    )
    logits = marginals.log().requires_grad_()
    adam = torch.optim.Adam([logits], lr=0.02)
    for _ in range(steps):
        adam.zero_grad()
        D.from_log_probs(target, independent(logits)).sum().backward()
        adam.step()
    return independent(logits.detach())


def measure(policy: Tensor, base: Tensor, allowed: Tensor) -> Numbers:
    """Alignment, entropy and distances to the target, a number for each chain."""
    target = log_target(base, allowed)
    found = {"alignment": (policy.exp() * allowed).sum(-1), "entropy": tabular.entropy(policy)}
    found |= {name: divergence(name).from_log_probs(target, policy) for name in MEASURES}
    return {name: values.tolist() for name, values in found.items()}


def by_samples(base: Tensor, allowed: Tensor, loss: str, draws: int, samples: int, window: int = 1024) -> Numbers:
    """f-DPG itself on a softmax over all strings, from the base: Adam at 0.05 on `samples` draws a step.

    Z is the running mean of P / policy; the baseline the mean of the last `window` pseudo-rewards before the step.

    Returns:
        KL(p || policy), alignment and the estimate of Z over its truth, before the first and after every tenth step.
    """
    D, target = divergence(loss), log_target(base, allowed)
    score = torch.where(allowed, base, base.new_tensor(FLOOR).log())
    truth = torch.logsumexp(score, 0)
    draw, kept, seen = torch.Generator().manual_seed(0), torch.empty(0, dtype=torch.float64), [0.0, 0.0]
    path: Numbers = {"forward_kl": [], "alignment": [], "normaliser": []}

    def estimate(policy: Tensor) -> Tensor:
        nonlocal kept
        now = policy.detach()
        y = torch.multinomial(now.exp(), samples, replacement=True, generator=draw)
        weighed = (score[y] - now[y]).exp()
        seen[0], seen[1] = seen[0] + float(weighed.sum()), seen[1] + samples
        log_z = torch.tensor(seen[0] / seen[1], dtype=torch.float64).log()
        reward = -D.link(score[y] - log_z - now[y])
        baseline = kept.mean() if len(kept) else 0.0
        kept = torch.cat([kept, reward])[-window:]
        return -((reward - baseline) * policy[y]).mean()

    def watch(step: int, policy: Tensor) -> None:
        if step % 10 == 0:
            path["forward_kl"].append(float(divergence("forward_kl").from_log_probs(target, policy)))
            path["alignment"].append(float((policy.exp() * allowed).sum()))
            path["normaliser"].append(seen[0] / seen[1] / float(truth.exp()) if seen[1] else float("nan"))

    tabular.descend(estimate, base, steps=draws, learning_rate=0.05, cooling=True, watch=watch)
    return path


# (c) A language model


def grade(problem: "Problem", completion: str) -> dict[str, float]:
    """Whether the answer is right, and whether it begins other than by adding the first two terms. A verifier."""
    from kullback.lm.verifiers import extract_answer

    first, second = re.findall(r"[+-]?\d+", problem.metadata["expression"].replace(" ", ""))[:2]
    left = completion.startswith(f"{int(first)}{int(second):+d}=")
    right = extract_answer(completion, "equals") == str(problem.answer)
    return {"accuracy": float(right), "other": float(not left)}


def methods() -> "dict[str, Method]":
    """f-DPG to one target, the student as it was given that an answer begins otherwise, in four divergences."""
    from kullback.lm.methods.f_dpg import FDPG

    shared: dict[str, Any] = {"samples": SAMPLES, "max_completion": arms.LONGEST, "baseline": "leave_one_out"}
    return {name: FDPG(**shared, score=SCORE, divergence=name) for name in TRAINED}


# The page


def _directions(exact: Mapping[str, Numbers], target: Numbers, sampled: Mapping[str, Numbers]) -> list[Direction]:
    def in_order(what: str, sign: int) -> int:
        each = zip(*(exact[name][what] for name in ("forward_kl", "2*jsd(0.5)", "reverse_kl")), strict=True)
        return sum(sign * a < sign * b < sign * c for a, b, c in each)

    def mean(name: str, what: str) -> float:
        return statistics.fmean(exact[name][what])

    best = {
        loss: sum(
            min(exact[name][measure][i] for name in OWN | {"reverse_kl": ""}) >= exact[loss][measure][i] - 1e-9
            for i in range(CHAINS)
        )
        for loss, measure in OWN.items()
    }
    own_mean = {
        loss: mean(loss, measure) - min(mean(name, measure) for name in OWN | {"reverse_kl": ""})
        for loss, measure in OWN.items()
    }
    aligned, spread = in_order("alignment", 1), in_order("entropy", -1)
    falls = {name: path["forward_kl"][-1] / path["forward_kl"][0] for name, path in sampled.items()}
    off = max(abs(path["normaliser"][-1] - 1) for path in sampled.values())
    return [
        Direction(
            "alignment: KL < Jensen-Shannon < reverse KL, on every chain",
            aligned == CHAINS,
            f"{aligned} of {CHAINS}",
            True,
        ),
        Direction(
            "diversity the other way round, on the mean over chains",
            mean("forward_kl", "entropy") > mean("2*jsd(0.5)", "entropy") > mean("reverse_kl", "entropy"),
            f"in {spread} of {CHAINS} chains each; entropies "
            + ", ".join(f"{mean(n, 'entropy'):.2f}" for n in ("forward_kl", "2*jsd(0.5)", "reverse_kl")),
            True,
        ),
        Direction(
            "KL is least where KL is minimised",
            best["forward_kl"] == CHAINS,
            f"{best['forward_kl']} of {CHAINS}",
            True,
            claimed=False,
        ),
        *(
            Direction(
                f"{LOSSES[loss]} is least, on the mean, where it is minimised (within 0.015)",
                own_mean[loss] < 0.015,
                f"best in {best[loss]} of {CHAINS} chains; on the mean {own_mean[loss]:.4f} above the best",
                True,
                claimed=False,
            )
            for loss in ("tv", "2*jsd(0.5)")
        ),
        Direction(
            "entropy of the target lies between those of KL and reverse KL",
            mean("reverse_kl", "entropy") < statistics.fmean(target["entropy"]) < mean("forward_kl", "entropy"),
            f"{statistics.fmean(target['entropy']):.2f} nats",
            claimed=False,
        ),
        Direction(
            "a policy that can become the target does, whatever the divergence, by samples",
            all(fall < 0.1 for fall in falls.values()),
            ", ".join(f"{LOSSES[name]} {fall:.3f}" for name, fall in falls.items())
            + " of the first KL(p, policy) left",
            claimed=False,
        ),
        Direction(
            "the running estimate of Z ends within 5 % of the truth", off < 0.05, f"{off:.1%} at most", claimed=False
        ),
    ]


def _model_directions(models: arms.Runs) -> list[Direction]:
    forward, js, reverse = "forward_kl", "2*jsd(0.5)", "reverse_kl"
    start = models[forward][0]["path"][0]
    end = {name: {what: arms.at_end(runs, what).mean for what in SEEN} for name, runs in models.items()}
    falls = {
        (name, what): [arms.last(run, f"rollout/{what}") / run["metrics"][0][f"rollout/{what}"] for run in runs]
        for name, runs in models.items()
        for what in DISTANCES
    }
    late = {
        name: {what: statistics.fmean(arms.last(run, f"rollout/{what}") for run in runs) for what in DISTANCES}
        for name, runs in models.items()
    }
    share = statistics.fmean(arms.last(run, "rollout/target_other") for runs in models.values() for run in runs)

    def ordered(what: str, sign: int) -> tuple[bool, str]:
        values = [end[name][what] for name in (forward, js, reverse)]
        return sign * values[0] < sign * values[1] < sign * values[2], ", ".join(f"{value:.3f}" for value in values)

    worst = {what: max((forward, js, reverse), key=lambda name: late[name][what]) for what in DISTANCES}
    return [
        Direction(
            "(c) every divergence brings the policy nearer to the one target, by all three distances and in every seed",
            all(fall < 1 for falls_ in falls.values() for fall in falls_),
            "; ".join(
                f"{DISTANCES[what]} falls to {min(each):.2f} to {max(each):.2f} of what it was"
                for what in DISTANCES
                for each in [[fall for name in models for fall in falls[name, what]]]
            ),
        ),
        Direction(
            f"(c) the constraint is met: from {start['other']:.2f} of the answers to within 0.1 of the target's share",
            all(abs(value - share) < 0.1 for runs in models.values() for value in arms.at_end(runs, "other").values),
            ", ".join(f"{LOSSES[name]} {found['other']:.2f}" for name, found in end.items()) + f"; target {share:.2f}",
        ),
        Direction("(c) alignment: KL < Jensen-Shannon < reverse KL", *ordered("other", 1)),
        Direction("(c) diversity the other way round: entropy of answers", *ordered("entropy", -1)),
        Direction(
            "(c) Jensen-Shannon is never the worst of the three, by any of the three distances",
            "2*jsd(0.5)" not in worst.values(),
            ", ".join(f"{DISTANCES[what]}: worst {LOSSES[name]}" for what, name in worst.items()),
        ),
        Direction(
            "(c) what the target does not ask about is kept: accuracy within 0.05 of the start",
            all(abs(found["accuracy"] - start["accuracy"]) < 0.05 for found in end.values()),
            f"{start['accuracy']:.3f} before, "
            + ", ".join(f"{LOSSES[name]} {found['accuracy']:.3f}" for name, found in end.items()),
            claimed=False,
        ),
    ]


def _exact_table(exact: Mapping[str, Numbers], target: Numbers) -> Table:
    def cells(numbers: Numbers) -> list[str]:
        return [f"{statistics.fmean(values):.3f} ± {_error(values):.3f}" for values in numbers.values()]

    rows = [[LOSSES[name], *cells(numbers)] for name, numbers in exact.items()]
    return Table(
        "(a) Exact gradients, a policy that cannot become the target",
        ["loss", "alignment P(b = 1)", "entropy, nats", "KL(p, policy)", "half-half JS", "TV"],
        [*rows, ["target", *cells(target)]],
        f"Mean over {CHAINS} chains ± its standard error; chains differ much more than losses on one chain.",
    )


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


def _sampled_table(sampled: Mapping[str, Numbers]) -> Table:
    rows = [
        [LOSSES[name], path["forward_kl"][0], path["forward_kl"][-1], path["alignment"][-1], path["normaliser"][-1]]
        for name, path in sampled.items()
    ]
    return Table(
        "(b) Samples, a policy that can become the target",
        ["loss", "KL(p, policy) first", "last", "alignment", "Z over the truth"],
        rows,
        "One chain, one seed.",
    )


SEEN = {
    "other": "alignment: begins otherwise", "entropy": "entropy of answers, nats", "KL": "KL to the start, nats",
    "repeated": "share of equal pairs", "accuracy": "accuracy",
}  # fmt: skip
DISTANCES = {"target_forward_kl": "KL(p, policy)", "target_reverse_kl": "KL(policy, p)", "target_tv": "TV"}


def _model_tables(models: arms.Runs) -> list[Table]:
    def cell(spread: Spread) -> str:
        return f"{spread.mean:.3f}" + (f" ± {spread.error:.3f}" if len(spread.values) > 1 else "")

    named = {LOSSES[name]: runs for name, runs in models.items()}
    first = [run["metrics"][0] for run in models["forward_kl"]]
    rows = [["before training", *(cell(Spread([row[f"rollout/{what}"] for row in first])) for what in DISTANCES)]]
    rows += [
        [name, *(cell(Spread([arms.last(run, f"rollout/{what}") for run in runs])) for what in DISTANCES)]
        for name, runs in named.items()
    ]
    return [
        arms.end_table(
            "(c) The language model on held-out problems",
            named,
            SEEN,
            note="Mean over seeds ± its standard error. Equal pairs: of two answers to one problem, how often they are "
            "the same text.",
        ),
        Table(
            "(c) Its distances from the target, as `f_dpg` estimates them while it trains",
            ["", *DISTANCES.values()],
            rows,
            "Nats, but TV; the first step, which is of the start, and the mean of the last ten, ± the standard error "
            "over seeds.",
        ),
    ]


COLORS = {
    "forward_kl": "#0072b2",
    "2*alpha(2)": "#56b4e9",
    "tv": "#009e73",
    "2*jsd(0.5)": "#b5529b",
    "reverse_kl": "#d55e00",
}


def _figure(exact: Mapping[str, Numbers], target: Numbers, sampled: Mapping[str, Numbers], models: arms.Runs) -> Any:
    figure, (plane, own, path, aligned, spread, distance) = new_figure(3, rows=2, width=3.8, height=3.2)
    plane.scatter(target["entropy"], target["alignment"], s=14, color="#16191d", label="target")
    for name, numbers in exact.items():
        plane.scatter(numbers["entropy"], numbers["alignment"], s=14, color=COLORS[name], label=LOSSES[name])
        own.scatter(range(1, CHAINS + 1), numbers["forward_kl"], s=14, color=COLORS[name])
        curve = sampled[name]["forward_kl"]
        path.plot([10 * i for i in range(len(curve))], curve, color=COLORS[name], label=LOSSES[name])
    plane.set_xlabel("entropy, nats", fontsize=9)
    plane.set_ylabel("alignment P(b = 1)", fontsize=9)
    plane.legend(fontsize=7, frameon=False, loc="lower left")
    own.set_yscale("log")
    own.set_xlabel("chain", fontsize=9)
    own.set_ylabel("KL(p, policy), nats", fontsize=9)
    path.set_yscale("log")
    path.set_xlabel("steps", fontsize=9)
    path.set_ylabel("KL(p, policy), nats", fontsize=9)
    arms.draw_paths(aligned, models, "other", "answers that begin otherwise", COLORS)
    arms.draw_paths(spread, models, "entropy", "entropy of answers, nats", COLORS)
    for name, runs in models.items():
        seen = [[row["rollout/target_tv"] for row in run["metrics"]] for run in runs]
        means = [statistics.fmean(values) for values in zip(*seen, strict=True)]
        smooth = [statistics.fmean(means[max(0, i - 4) : i + 1]) for i in range(len(means))]
        distance.plot(range(1, len(smooth) + 1), smooth, color=COLORS[name])
    distance.set_xlabel("step", fontsize=9)
    distance.set_ylabel("TV(p, policy), estimated", fontsize=9)
    return figure


CAPTION = (
    "Above: alignment against entropy after exact training, a point per chain (black: the targets); KL(p, policy) of "
    "each loss, chain by chain; a policy that can become the target, trained by samples. Below, the language model, "
    "same colours: share of held-out answers that meet the constraint, and their entropy (a thin line per seed); total "
    "variation from the target, as estimated while training, mean of seeds and of the last five steps."
)


SETUP = """\
(a) {chains} first-order Markov chains over three letters with Dirichlet(1), (2) or (5) rows, strings of six letters,
all 729 enumerated. Target: the chain given that letter 0 or letter 1 does not occur, which has two modes; P is floored
at 1e-12. Policy: a distribution for each position, independent. Adam at 0.02 for {steps} steps of the exact gradient
from the chain's marginals.

(b) The first chain, a softmax over all strings, {draws} steps of {samples} samples, Adam at 0.05 falling to 0: Z is
the running mean of P / policy, the baseline the mean of the last 1024 pseudo-rewards.

(c) `method: f_dpg` with `score: {score}`: the shipped student as it was, given that an answer does not begin by adding
the first two terms, as 0.42 of its answers do; P is exp(-4) times as large where it does, so that reverse KL is finite.
{answers} answers to each of {prompts} problems a step out of {problems}, {lm_steps} steps, AdamW at {rate:g} falling as
a cosine, baseline the problem's other answers, {lm_seeds} seeds, four divergences. Measured on {asked} held-out
problems, {answers} answers each, with the same uniform numbers."""

READING = (
    "The target is one thing, the divergence another: all rows of (a) have the same target, and differ only in how "
    "they fail to be it. KL keeps both modes and pays with strings that the target forbids; reverse KL keeps to what "
    "is allowed and gives a mode up; Jensen-Shannon and total variation lie between. Jensen-Shannon, total variation "
    "and reverse KL have several local optima here, so a loss is not always least where it is minimised. Where the "
    "policy can be the target the choice hardly matters, (b): it tests the estimator, not the trade-off. In (c) the "
    "language model has little to learn: ten steps take it from 0.58 of the answers to 0.83, and there the divergences "
    "part, in the paper's order, alignment one way and diversity the other. None meets the constraint to the end. The "
    "rest is noise: the score of a whole completion weighs every one of its tokens, and at this batch the policy "
    "drifts where the target asks for nothing, as its accuracy shows. The distances are estimated on eight problems a "
    "step and do not tell the divergences apart."
)

DIFFERS = (
    "Enumerated strings and a student of 105 thousand parameters instead of language models of 117M to 1.5B; the "
    "paper's tasks were not at hand.",
    "The target of (c) is the third that was tried, with one seed each. distributional(accuracy=0.5, left=0.2), 60 "
    "steps at 2e-4, ended at 0.24 to 0.26 of answers that begin left and a held-out accuracy of 0.24 to 0.25, under "
    "all four divergences; distributional(accuracy=0.35, left=0.1), 80 steps at 3e-4, at 0.19 to 0.21 and 0.22 to "
    "0.24 (forward and reverse KL). To be right on problems never seen has to be learnt; how to begin need not be.",
    "Whether the distances of (c) fall was first asked of the means of the first and the last ten steps, and missed in "
    "some seed; the start is now the first step alone, and it misses still: one step's estimate is that noisy.",
    "The paper's sentence on Jensen-Shannon is about quality over many tasks. Here it is tested as the order of "
    "alignment and diversity, with a policy that cannot represent the target.",
    "P is floored, so that reverse KL is finite; how the paper treats zeros was not readable to us.",
    "chi-square(p, policy) is a later addition to the paper's code, not in the paper.",
)
