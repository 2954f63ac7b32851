"""01 f-DPO: does DPO keep its closed form under other divergences, and what does their choice trade?

(a), (b) Exact optima: each divergence against the others at one reward, and all at one coefficient. (c) A softmax
trained on sampled pairs. (d) A language model trained by `kb.train` on pairs that its verifier chose. (e) The penalty
of the PPO that the paper compares with, in expectation.
"""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from kullback.divergence import FDivergence, divergence
from kullback.estimate import expectation
from kullback.lm.preferences import calibration_error, score
from kullback.papers import arms
from kullback.papers.page import Direction, Findings, Spread, Table, new_figure
from kullback.papers.reproduction import Job, reproduces
from kullback.run.seeds import generator
from kullback.theory import tabular

NAMES = ("reverse_kl", "alpha(0.3)", "alpha(0.5)", "alpha(0.7)", "forward_kl", "2*jsd(0.5)")
FEW = ("reverse_kl", "forward_kl", "2*jsd(0.5)", "alpha(0.5)")
COEFFICIENTS = (0.01, 0.03, 0.1, 0.2, 0.3, 1.0)
OFFICIAL = {"reverse_kl": "reverse KL", "forward_kl": "forward KL", "2*jsd(0.5)": "jsd", "alpha(0.5)": "alpha 0.5"}
FULL = {
    "draws": 30, "frontiers": 5, "pairs": 40_000, "descent": 1500, "seeds": 4, "laws": 200,
    "lm_seeds": 3, "steps": 40, "prompts": 16, "problems": 640, "graded": 200,
}  # fmt: skip
QUICK = {
    "draws": 3, "frontiers": 2, "pairs": 4000, "descent": 100, "seeds": 1, "laws": 20,
    "lm_seeds": 1, "steps": 2, "prompts": 4, "problems": 16, "graded": 8,
}  # fmt: skip


@reproduces(1, full=FULL, quick=QUICK)
def reproduce(job: Job) -> Findings:
    """The five experiments."""
    size = job.size
    matched = [at_one_reward(seed) for seed in range(size["frontiers"])]
    exact = at_one_coefficient(size["draws"])
    trained = train_softmax(size["pairs"], size["descent"], size["seeds"])
    models = {name: [train_model(name, seed, size, job.folder) for seed in range(size["lm_seeds"])] for name in FEW}
    penalties = {name: ppo_penalty(name, size["laws"]) for name in FEW}
    return Findings(
        setup=SETUP.format(**size),
        directions=_directions(matched, exact, trained, models, penalties),
        tables=[
            _matched_table(matched[0]),
            _exact_table(exact),
            _trained_table(trained),
            _model_table(models),
            _penalty_table(penalties),
        ],
        figure=_figure(exact, trained, models),
        caption="From left: reward against entropy of the exact optima, a line per divergence and a point per "
        "coefficient; the same after training on sampled pairs, a point per seed; accuracy against KL to the reference "
        "of the language model, a point per seed (cross: the reference).",
        reading=READING,
        differs=DIFFERS,
        numbers={"matched": matched, "exact": exact, "trained": trained, "models": models, "penalties": penalties},
    )


# (a) One reward


def at_one_reward(seed: int, size: int = 20) -> dict[str, dict[str, float]]:
    """D_column(reference, optimum under D_row), with the coefficients such that all optima earn the same, nats."""
    reference = tabular.random_policy(size, seed=seed, concentration=2.0)
    reward = torch.randn(size, generator=generator(seed, "reward"), dtype=torch.float64)
    level = 0.6 * reward.max() + 0.4 * expectation(reference, reward)
    best = {name: tabular.optimum(reference, reward, name, expected_reward=level).log_probs for name in FEW}
    return {
        row: {column: float(divergence(column).from_log_probs(reference, best[row])) for column in FEW} for row in FEW
    }


def on_the_diagonal(found: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether each divergence is smallest for the optimum it belongs to."""
    return all(found[name][name] < found[row][name] for name in FEW for row in FEW if row != name)


# (b) One coefficient


def at_one_coefficient(draws: int, size: int = 64) -> dict[str, dict[str, Float[Tensor, "coefficient draw"]]]:
    """Expected reward and entropy (nats) of the exact optima from a uniform reference."""
    reference = torch.full((size,), -math.log(size), dtype=torch.float64).expand(draws, size)
    reward = torch.stack([torch.randn(size, generator=generator(i, "b"), dtype=torch.float64) for i in range(draws)])
    found: dict[str, dict[str, Tensor]] = {}
    for name in NAMES:
        best = [tabular.optimum(reference, reward, name, coefficient=c) for c in COEFFICIENTS]
        found[name] = {
            "reward": torch.stack([b.reward for b in best]),
            "entropy": torch.stack([tabular.entropy(b.log_probs) for b in best]),
        }
    return found


# (c) A softmax


def train_softmax(
    pairs: int, steps: int, seeds: int, size: int = 64, coefficient: float = 0.1
) -> dict[str, dict[str, list[float]]]:
    """Reward and entropy of a softmax after full-batch Adam at 0.05 on labelled pairs, from a uniform reference."""
    reference = torch.full((size,), -math.log(size), dtype=torch.float64).expand(seeds, size)
    reward = torch.stack([torch.randn(size, generator=generator(i, "c"), dtype=torch.float64) for i in range(seeds)])
    counts = torch.stack([_count_pairs(reward[i], pairs, generator(i, "pairs")) for i in range(seeds)])
    found = {}
    for name in NAMES:
        D = divergence(name)

        def loss(policy: Tensor, D: FDivergence = D) -> Tensor:
            s = coefficient * score(D, policy - reference)
            return -(counts * logsigmoid(s[:, :, None] - s[:, None, :])).sum((1, 2)) / pairs

        policy = tabular.descend(loss, reference, steps=steps)
        found[name] = {"reward": expectation(policy, reward).tolist(), "entropy": tabular.entropy(policy).tolist()}
    return found


def _count_pairs(
    reward: Float[Tensor, "action"], pairs: int, draw: torch.Generator
) -> Float[Tensor, "preferred other"]:
    both = torch.randint(len(reward), (pairs, 2), generator=draw)
    prefer = torch.sigmoid(reward[both[:, 0]] - reward[both[:, 1]])
    flip = torch.rand(pairs, generator=draw, dtype=torch.float64) > prefer
    both = torch.where(flip[:, None], both.flip(1), both)
    flat = torch.bincount(both[:, 0] * len(reward) + both[:, 1], minlength=len(reward) ** 2)
    return flat.view(len(reward), -1).double()


# (d) A language model


def train_model(name: str, seed: int, size: Mapping[str, int], folder: Path) -> dict[str, float]:
    """f-DPO on the best and the worst of eight of the student's answers, then graded on held-out problems.

    The coefficient is 0.1 over f''(1), so that all start with the same gradient.
    """
    from kullback.lm.methods.dpo import DPO
    from kullback.lm.models import load_model, load_tokenizer
    from kullback.lm.tasks import load_task

    task = load_task("embedded:arithmetic", seed=seed)
    task.train = list(task.train)[: size["problems"]]
    D, embedded = divergence(name), "embedded:student"
    method = DPO(
        divergence=name,
        coefficient=0.1 / D.second_derivative_at_one,
        pairs="student",
        samples=8,
        max_completion=32,
    )
    run = arms.train(
        method,
        student=embedded,
        data=task,
        output=folder / f"{name}-{seed}",
        steps=size["steps"],
        prompts_per_step=size["prompts"],
        learning_rate=2e-4,
        lr_schedule="cosine",
        warmup_steps=min(5, size["steps"]),
        seed=seed,
        evaluate={"problems": size["graded"], "samples": 4, "shown": 0},
    )
    assert run.evaluation is not None
    grades = {who: run.evaluation[who] for who in ("untrained", "student")}
    with arms.quiet():
        reference, tokenizer = load_model(embedded, role="student").eval(), load_tokenizer(embedded, role="student")
    measured = measure(run.student, reference, tokenizer, task, seed, size["graded"])
    found = {
        "accuracy": grades["student"]["avg@4"]["value"],
        "entropy": grades["student"]["entropy"]["value"],
        "distinct answers": grades["student"]["distinct_completions"]["value"],
        "pass@4": grades["student"]["pass@4"]["value"],
        **measured,
    }
    before = {key: grades["untrained"][key]["value"] for key in ("avg@4", "entropy", "distinct_completions", "pass@4")}
    found |= {
        "before accuracy": before["avg@4"],
        "before entropy": before["entropy"],
        "before distinct answers": before["distinct_completions"],
        "before pass@4": before["pass@4"],
    }
    if name == FEW[0]:  # the same for all
        untrained = measure(reference, reference, tokenizer, task, seed, size["graded"])
        found |= {f"before {key}": value for key, value in untrained.items()}
    return found


@torch.no_grad()
def measure(model: Any, reference: Any, tokenizer: Any, task: Any, seed: int, problems: int) -> dict[str, float]:
    """On held-out problems: KL(model || reference) along the model's own answers, nats per answer; and the paper's ECE
    on pairs of the reference's answers."""
    from kullback.lm import sources
    from kullback.lm.methods.dpo import DPO
    from kullback.lm.moment import Moment
    from kullback.lm.rollout import Rollout
    from kullback.lm.scores import Scores
    from kullback.lm.tasks import Task

    held_out = Task(task.name, list(task.held_out)[:problems], [], task.verifier)
    method = DPO(pairs="reference", samples=8, max_completion=32)
    at = Moment(
        {"student": model.eval(), "reference": reference},
        tokenizer,
        held_out,
        method,
        seed=seed,
        prompts_per_step=len(held_out.train),
    )
    scores = Scores(at, lambda _: {})

    def columns(rollout: Rollout, *names: str) -> list[Tensor]:
        found = scores.measure(names, rollout, {})
        return [found[name] for name in names]

    pairs = method.source().draw(at)
    decided = [i for i, note in enumerate(pairs.notes) if note["side"] != 0]
    (log_probs,) = columns(pairs, "log_prob:student")
    per_token = (log_probs.double().sum(1) / pairs.lengths)[decided].view(-1, 2)
    ece, _ = calibration_error(per_token[:, 0].exp(), (per_token[:, 0] > per_token[:, 1]).double())

    own = sources.student().draw(at)
    (kl,) = columns(own, "reverse_kl:reference,student")
    return {
        "ECE": ece,
        "ordered right": float((per_token[:, 0] > per_token[:, 1]).double().mean()),
        "KL": float(kl.double().sum(1).mean()),
    }


# (e) PPO's penalty


def ppo_penalty(name: str, laws: int, size: int = 7) -> dict[str, Float[Tensor, "law"]]:
    """Cosine between the gradient of D(reference, policy) and what three forms of a penalty descend, in expectation.

    "link": minus the link as a reward. "reward": minus f itself as a reward, f the textbook generator. "loss": f minus
    its tangent, averaged over the policy's samples and differentiated through their log-probabilities. The last two
    are the forms of the official PPO.
    """
    D = divergence(name)
    reference, policy = (tabular.random_policy(size, laws, seed=seed) for seed in (1, 2))
    true = -tabular.gradient(lambda p: D.from_log_probs(reference, p), policy)
    log_ratio = reference - policy
    generator_value = D.value(log_ratio) + D.plain_slope * torch.expm1(log_ratio)
    forms = {
        "link": tabular.score_gradient(policy, -D.link(log_ratio)),
        "reward": tabular.score_gradient(policy, -generator_value),
        "loss": tabular.score_gradient(policy, log_ratio.exp() * D.slope(log_ratio)),
    }
    return {form: torch.cosine_similarity(found, true, dim=-1) for form, found in forms.items()}


# The page


def _directions(
    matched: list[dict[str, dict[str, float]]],
    exact: Mapping[str, Mapping[str, Tensor]],
    trained: Mapping[str, Mapping[str, list[float]]],
    models: Mapping[str, list[dict[str, float]]],
    penalties: Mapping[str, Mapping[str, Tensor]],
) -> list[Direction]:
    small, one = COEFFICIENTS.index(0.03), COEFFICIENTS.index(1.0)
    rewards, entropies = ({name: exact[name][key] for name in NAMES} for key in ("reward", "entropy"))
    half, more, forward, reverse = "alpha(0.5)", "alpha(0.7)", "forward_kl", "reverse_kl"
    at_small = (
        (rewards[forward] < rewards[reverse]) & (rewards[half] > rewards[more]) & (rewards[more] > rewards[forward])
    )[small]
    spread_out = ((entropies[half] < entropies[more]) & (entropies[more] < entropies[forward]))[small]
    at_one = ((rewards[forward] > rewards[reverse]) & (entropies[forward] < entropies[reverse]))[one]
    mean = {name: {key: sum(v) / len(v) for key, v in found.items()} for name, found in trained.items()}
    tradeoff = mean[forward]["reward"] < mean[reverse]["reward"] and mean[forward]["entropy"] > mean[reverse]["entropy"]
    path = [mean[name] for name in (half, more, forward)]
    ordered = all(a["reward"] > b["reward"] and a["entropy"] < b["entropy"] for a, b in itertools.pairwise(path))
    lm = {name: {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]} for name, runs in models.items()}
    gained = [run["accuracy"] - run["before accuracy"] for runs in models.values() for run in runs]
    ece = {name: lm[name]["ECE"] for name in FEW}
    width = max(ece.values()) - min(ece.values())
    errors = [Spread([run["ECE"] for run in models[name]]).error for name in FEW]
    noise = max((error for error in errors if error == error), default=math.nan)
    covering = lm[forward]["distinct answers"] > lm[reverse]["distinct answers"]
    diagonal = sum(on_the_diagonal(found) for found in matched)
    wrong_way = float((penalties[forward]["reward"] < 0).double().mean())
    exactly = min(float(found["link"].min()) for found in penalties.values())
    return [
        Direction(
            "(a) at one expected reward each divergence is smallest for its own optimum",
            diagonal == len(matched),
            f"in {diagonal} of {len(matched)} draws",
            asserted=True,
        ),
        Direction(
            "(b) at coefficient 0.03 forward KL earns less than reverse KL, and alpha 0.5, 0.7, 1 less and less",
            bool(at_small.all()),
            f"in {int(at_small.sum())} of {len(at_small)} draws",
            asserted=True,
        ),
        Direction(
            "(b) and its entropy rises in the same order",
            bool(spread_out.all()),
            f"in {int(spread_out.sum())} of {len(spread_out)} draws",
        ),
        Direction(
            "(b) that order is a matter of the coefficient: at 1 forward KL earns more, with less entropy",
            bool(at_one.all()),
            f"in {int(at_one.sum())} of {len(at_one)} draws",
            asserted=True,
            claimed=False,
        ),
        Direction(
            "(c) trained on pairs, forward KL ends with less reward and more entropy than reverse KL",
            tradeoff,
            f"reward {mean[forward]['reward']:.2f} against {mean[reverse]['reward']:.2f}, entropy "
            f"{mean[forward]['entropy']:.2f} against {mean[reverse]['entropy']:.2f}",
            asserted=True,
        ),
        Direction(
            "(c) and alpha 0.5, 0.7, 1 lie in order",
            ordered,
            ", ".join(f"({m['reward']:.2f}, {m['entropy']:.2f})" for m in path),
            asserted=True,
        ),
        Direction(
            "(d) every divergence trains a language model from pairs without a reward model",
            min(gained) > 0,
            f"accuracy rises by {min(gained):.2f} to {max(gained):.2f}",
        ),
        Direction(
            "(d) forward KL keeps more different answers than reverse KL",
            covering,
            f"{lm[forward]['distinct answers']:.2f} against {lm[reverse]['distinct answers']:.2f} of 4",
        ),
        Direction(
            "(d) the divergence moves the calibration error",
            None if noise != noise else width > 2 * noise,
            ", ".join(f"{OFFICIAL[name]} {value:.3f}" for name, value in ece.items())
            + f"; largest standard error {noise:.3f}",
        ),
        Direction(
            "(e) the official PPO's penalties follow the gradient of their divergence",
            all(bool((p[form] > 0).all()) for p in penalties.values() for form in ("reward", "loss")),
            f"forward KL as a reward points the wrong way in {wrong_way:.0%} of the laws; minus the link is exact "
            f"(cosine at least {exactly:.6f})",
            claimed=False,
        ),
    ]


def _matched_table(found: Mapping[str, Mapping[str, float]]) -> Table:
    rows = [[OFFICIAL[row], *(f"{found[row][column]:.4f}" for column in FEW)] for row in FEW]
    return Table(
        "(a) Optima of equal reward: the divergence of the column, nats, for the optimum of the row",
        ["optimum under", *(OFFICIAL[name] for name in FEW)],
        rows,
        "The first draw. Each column is smallest on the diagonal.",
    )


def _exact_table(exact: Mapping[str, Mapping[str, Tensor]]) -> Table:
    rows = [
        [name, *(f"{r:.2f} / {h:.2f}" for r, h in zip(found["reward"].mean(1), found["entropy"].mean(1), strict=True))]
        for name, found in exact.items()
    ]
    return Table(
        "(b) Exact optima, reward / entropy", ["", *(f"{c:g}" for c in COEFFICIENTS)], rows, "Means over draws."
    )


def _trained_table(trained: Mapping[str, Mapping[str, list[float]]]) -> Table:
    rows = [[name, Spread(found["reward"]), Spread(found["entropy"])] for name, found in trained.items()]
    return Table("(c) A softmax trained on pairs, coefficient 0.1", ["", "reward", "entropy, nats"], rows)


SHOWN = ("accuracy", "pass@4", "distinct answers", "entropy", "KL", "ECE", "ordered right")


def _model_table(models: Mapping[str, list[dict[str, float]]]) -> Table:
    def cell(runs: list[dict[str, float]], key: str) -> str:
        spread = Spread([run[key] for run in runs], digits=3)
        return f"{spread.mean:.3f}" + (f" ± {spread.error:.3f}" if len(runs) > 1 else "")

    rows = [["before", *(cell(models[FEW[0]], f"before {key}") for key in SHOWN)]]
    rows += [[OFFICIAL[name], *(cell(runs, key) for key in SHOWN)] for name, runs in models.items()]
    return Table(
        "(d) The language model, on held-out problems",
        ["", *SHOWN],
        rows,
        "Mean over seeds ± its standard error. Different answers are of 4; entropy is nats per token, KL(model || "
        "reference) nats per answer; ECE and `ordered right` are of pairs of the reference's answers.",
    )


def _penalty_table(penalties: Mapping[str, Mapping[str, Tensor]]) -> Table:
    rows = [
        [OFFICIAL[name], *(f"{float(p.mean()):.2f} ({float((p < 0).double().mean()):.0%})" for p in found.values())]
        for name, found in penalties.items()
    ]
    return Table(
        "(e) Cosine of a penalty's expected gradient with that of its divergence (share of laws where it is negative)",
        ["", "minus link as reward", "minus f as reward", "f less its tangent as loss"],
        rows,
        "The last two are the official PPO's.",
    )


COLORS = dict(zip(NAMES, ("#0072b2", "#7a6fc4", "#b5529b", "#c98a00", "#d55e00", "#009e73"), strict=True))


def _figure(
    exact: Mapping[str, Mapping[str, Tensor]],
    trained: Mapping[str, Mapping[str, list[float]]],
    models: Mapping[str, list[dict[str, float]]],
) -> Any:
    figure, (optima, softmax, model) = new_figure(3, width=3.7, height=3.2)
    for name, color in COLORS.items():
        optima.plot(
            exact[name]["entropy"].mean(1),
            exact[name]["reward"].mean(1),
            color=color,
            marker="o",
            markersize=3,
            label=name,
        )
        softmax.plot(trained[name]["entropy"], trained[name]["reward"], "o", color=color, markersize=4)
    for name, runs in models.items():
        model.plot(
            [run["KL"] for run in runs], [run["accuracy"] for run in runs], "o", color=COLORS[name], markersize=4
        )
    for run in models["reverse_kl"]:
        model.plot([0], [run["before accuracy"]], "x", color="#16191d", markersize=5)
    for axis, label in ((optima, "reward, exact"), (softmax, "reward, trained")):
        axis.set_xlabel("entropy, nats", fontsize=9)
        axis.set_ylabel(label, fontsize=9)
    model.set_xlabel("KL(model || reference), nats per answer", fontsize=9)
    model.set_ylabel("accuracy on held-out problems", fontsize=9)
    optima.legend(fontsize=7, frameon=False)
    return figure


SETUP = """\
(a) 20 actions, reference Dirichlet(2), normal rewards, {frontiers} draws; every optimum earns 0.6 of the highest reward
plus 0.4 of the reference's.

(b) 64 actions, uniform reference, normal rewards, {draws} draws; exact optima at equal coefficients.

(c) The same with {pairs} pairs from the reference, labelled by Bradley-Terry; a softmax, Adam at 0.05, coefficient 0.1,
{descent} full-batch steps, {seeds} seeds.

(d) The embedded student writes eight answers to a problem, afresh at every step; the verifier's best and worst become
the pair. `method: dpo`, coefficient 0.1 / f''(1), {steps} steps of {prompts} prompts at 2e-4, {lm_seeds} seeds; graded
on {graded} held-out problems with 4 answers each. ECE as in the official code: confidence is the (geometric) mean
probability per token of the better answer, right where it is above the worse one's, ten bins.

(e) {laws} pairs of laws over 7 outcomes, every expectation summed."""

READING = (
    "(a) is what the closed form promises: no other penalty reaches this reward at a smaller divergence of that kind. "
    "(b) shows why no order of divergences holds at every coefficient: the same number means different things to each, "
    "and at 1 forward KL is the weaker penalty. Read rows of (b) and (c) as paths, not as ranks. In (d) coefficients "
    "start with equal gradients; the confidence in the paper's ECE is a mean over tokens, high for any trained model, "
    "so the error mostly says how often the better answer is the likelier one."
)

DIFFERS = (
    "No Pythia, no HH, no IMDB: tables that can be summed, and a model of 100 thousand weights on arithmetic.",
    "(c), (d) have their coefficients, not the paper's; the paper searches for each divergence.",
    "The PPO baseline is not trained: (e) computes what its penalties descend, in expectation.",
    "The pairs of (d) are drawn from the student as it is, not from a fixed set: the paper is offline. A first run of "
    "(d) was offline (fixed pairs of the reference, 192 problems, 50 steps), and there every divergence lost accuracy: "
    "0.239 fell to 0.155 (reverse KL), 0.170 (forward KL), 0.126 (JSD) and 0.146 (alpha 0.5). Paper 39's "
    "page suggests why: on fixed pairs DPO first gains and then, gone over them again and again, loses.",
    "The entropy order of (b), with the reward order an assertion at first, held in 27 of 30 draws, not in all; it is "
    "now reported and not asserted.",
    "The suite compares the means of (b) at coefficient 1 with those of the card's own draws, 0.94 and 1.33, to within "
    "0.2: ours are 1.02 and 1.48, so at 0.1 the second would have missed.",
    "Adam in place of RMSprop.",
)
