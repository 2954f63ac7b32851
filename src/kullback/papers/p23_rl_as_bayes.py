"""23 RL as Bayes: what reward maximisation does to a distribution, and what the KL penalty makes of it instead.

All 4096 strings of six letters are enumerated. The prior is a random Markov chain, the reward 1 where a letter occurs.
(a) Plain reward, by plain, sampled and Adam's gradients. (b) Reward with a KL penalty, (c) forward KL to the posterior,
(d) to the prior given the constraint. (e) Twelve actions, two of them equally good. (f) Reward alone and three ways to
the posterior on a language model, by sampling.
"""

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kullback.papers import arms
from kullback.papers.page import Direction, Findings, Table, new_figure
from kullback.papers.posterior_strings import (
    BETAS,
    SAMPLES,
    Path,
    bandit,
    identities,
    match,
    numbers,
    problem,
    reward_only,
)
from kullback.papers.reproduction import Job, reproduces

if TYPE_CHECKING:
    from kullback.lm.method import Method

FULL = {
    "steps": 3000, "sampled": 2000, "bandit": 20_000, "seeds": 3,
    "lm_seeds": 2, "lm_steps": 60, "prompts": 16, "asked": 60, "drawn": 64,
}  # fmt: skip
QUICK = {
    "steps": 100, "sampled": 60, "bandit": 200, "seeds": 1,
    "lm_seeds": 1, "lm_steps": 2, "prompts": 2, "asked": 4, "drawn": 8,
}  # fmt: skip
BETA = 0.25  # of the language model's posterior
RATE = 3e-4


@reproduces(23, full=FULL, quick=QUICK, parallel=True)
def reproduce(job: Job) -> Findings:
    """The exact experiments, and reward with and without a KL on a language model."""
    size = job.size
    prior, reward = problem(size["seeds"])
    plain = {
        "plain gradient": reward_only(prior, reward, size["steps"], "plain"),
        "sampled gradient, Adam": reward_only(prior, reward, size["sampled"], "sampled"),
        "exact gradient, Adam": reward_only(prior, reward, size["steps"], "adam"),
    }
    matched = match(prior, reward, size["steps"])
    tied = bandit(size["bandit"])
    errors = identities(200)
    models = arms.train_arms(
        job,
        methods(),
        data=[arms.TASK] * size["lm_seeds"],
        steps=size["lm_steps"],
        marks=arms.marks(size["lm_steps"], 4),
        asked=size["asked"],
        samples=16,
        prompts_per_step=size["prompts"],
        learning_rate=RATE,
        warmup_steps=min(5, size["lm_steps"]),
    )
    wanted = posterior_of_start(size["asked"], size["drawn"])
    return Findings(
        setup=SETUP.format(**size, samples=SAMPLES, beta=BETA, rate=RATE),
        directions=[*_directions(plain, matched, tied, errors), *_model_directions(models, wanted)],
        tables=[
            _plain_table(plain, prior, reward),
            _matched_table(matched),
            _bandit_table(tied),
            _model_table(models, wanted),
        ],
        figure=_figure(plain, matched, tied, models, wanted),
        caption=CAPTION,
        reading=READING,
        differs=DIFFERS,
        numbers={"plain": plain, "matched": matched, "tied": tied, "errors": errors, "models": models,
                 "posterior": wanted},
    )  # fmt: skip


# (f) A language model


ALONE, PENALISED, REVERSE_KL, FORWARD_KL = (
    "reward alone", "reward - beta KL", "reverse KL to the posterior", "forward KL to the posterior",
)  # fmt: skip


def methods() -> "dict[str, Method]":
    """Reward alone; reward under a KL penalty; matching its optimum in the same divergence; and in the other one."""
    from kullback.lm.methods.f_dpg import FDPG
    from kullback.lm.methods.grpo import GRPO

    both: dict[str, Any] = {"samples": 8, "max_completion": arms.LONGEST, "baseline": "leave_one_out"}
    near: dict[str, Any] = {"reference": "initial", "penalty": BETA, "form": "exact", "horizon": "sequence"}
    score = f"posterior(accuracy, beta={BETA})"
    return {
        ALONE: GRPO(**both, scale="none"),
        PENALISED: GRPO(**both, **near, scale="none", divergence="reverse_kl"),
        REVERSE_KL: FDPG(**both, score=score, divergence="reverse_kl"),
        FORWARD_KL: FDPG(**both, score=score, divergence="forward_kl"),
    }


def posterior_of_start(asked: int, drawn: int) -> dict[str, float]:
    """Accuracy, entropy and KL to the start of the posterior: `drawn` answers of the start, weighed by exp(r / beta).

    Means over the problems of the arms; self-normalised, so a problem that none of the answers solves counts 0.
    """
    from kullback.lm.models import load_model, load_tokenizer
    from kullback.lm.tasks import load_task

    task = load_task(arms.TASK, seed=0)
    with arms.quiet():
        model, tokenizer = load_model(arms.START, role="student"), load_tokenizer(arms.START, role="student")
    seen = arms.ask(model, tokenizer, task, task.held_out[:asked], samples=drawn, seed=1)
    score = (seen.grades["accuracy"].double() / BETA).view(asked, drawn)
    log_z = torch.logsumexp(score, 1) - math.log(drawn)
    weight = score.softmax(1)
    surprise = log_z[:, None] - score - seen.log_prob.view(asked, drawn)
    return {
        "accuracy": float((weight * score).sum(1).mean()) * BETA,
        "entropy": float((weight * surprise).sum(1).mean()),
        "KL": float(((weight * score).sum(1) - log_z).mean()),
    }


# The page


def _directions(
    plain: Mapping[str, Path], matched: Mapping[str, Any], tied: Mapping[str, Any], errors: Mapping[str, float]
) -> list[Direction]:
    table = matched["table"]

    def falls(name: str) -> tuple[bool, str]:
        path = plain[name]
        steps = sorted(path)
        late = [_mean(path[step]["entropy"]) for step in steps]
        return all(a > b for a, b in itertools.pairwise(late[1:])) and late[-1] < 0.1 * late[0], (
            f"{late[0]:.2f} to {late[-1]:.3f} nats, reward {_mean(path[steps[-1]]['reward']):.4f}"
        )

    collapsed = {name: falls(name) for name in ("plain gradient", "sampled gradient, Adam")}
    near = max(_mean(table[name, b][way]) for name in ("reward - beta KL", "forward KL") for b in BETAS
               for way in ("to_target", "from_target"))  # fmt: skip
    entropy_off = max(
        abs(_mean(table["reward - beta KL", b]["entropy"]) - _mean(table["posterior", b]["entropy"])) for b in BETAS
    )
    last = matched["gaps"][max(matched["gaps"])]
    odds = [numbers["odds"] for numbers in tied["path"].values()]
    adam, hard = plain["exact gradient, Adam"], matched["constrained"]
    return [
        Direction(
            "J = -beta KL(policy, posterior) + beta log Z, and so do the gradients",
            errors["value"] < 1e-12 and errors["gradient"] < 1e-12,
            f"largest errors {errors['value']:.0e} and {errors['gradient']:.0e}",
            True,
        ),
        *(
            Direction(f"reward alone collapses: entropy goes to 0 ({name})", held, evidence, True)
            for name, (held, evidence) in collapsed.items()
        ),
        Direction(
            "reward with a KL penalty ends at the posterior, for every beta; so does forward KL",
            near < 1e-3,
            f"KLs to and from it at most {near:.0e} nats, entropies apart at most {entropy_off:.0e}",
            True,
        ),
        Direction(
            "the gap of the evidence bound goes to 0",
            max(last) < 1e-3,
            ", ".join(f"{gap:.0e}" for gap in last) + " nats",
            True,
        ),
        Direction(
            "distribution matching without RL works: forward KL to the constrained prior",
            _mean(matched["constrained"]["from_target"]) < 1e-2
            and abs(_mean(hard["entropy"]) - _mean(hard["target_entropy"])) < 0.05,
            f"KL {_mean(hard['from_target']):.0e}, entropy "
            f"{_mean(hard['entropy']):.2f} (target "
            f"{_mean(hard['target_entropy']):.2f}), reward {_mean(hard['reward']):.4f}",
            True,
        ),
        Direction(
            "equally good actions keep the prior's odds in the posterior and lose them under reward alone",
            abs(tied["posterior"]["odds"] / odds[0] - 1) < 1e-9 and odds[-1] > 100 * odds[0],
            f"{odds[0]:.2f} to {odds[-1]:.2g}; posterior {tied['posterior']['odds']:.2f}",
            True,
        ),
        Direction(
            "collapse depends on the optimiser: exact gradients with Adam keep the entropy when rewards tie",
            _mean(adam[max(adam)]["entropy"]) > 0.95 * _mean(adam[0]["entropy"]),
            f"{_mean(adam[0]['entropy']):.2f} to {_mean(adam[max(adam)]['entropy']):.2f} nats",
            claimed=False,
        ),
    ]


def _model_directions(models: arms.Runs, wanted: Mapping[str, float]) -> list[Direction]:
    def against_all(what: str, sign: int) -> tuple[bool, str]:
        ends = {name: arms.at_end(runs, what).values for name, runs in models.items()}
        others = [ends[name] for name in (PENALISED, REVERSE_KL, FORWARD_KL)]
        held = all(sign * a > sign * b for other in others for a, b in zip(ends[ALONE], other, strict=True))
        return held, ", ".join(f"{name} {_mean(list(values)):.3f}" for name, values in ends.items())

    end = {name: {what: arms.at_end(runs, what).mean for what in SEEN} for name, runs in models.items()}
    alone = end[ALONE]
    apart = {what: abs(end[PENALISED][what] - end[REVERSE_KL][what]) for what in ("entropy", "KL")}
    gap = {what: abs(end[PENALISED][what] - alone[what]) for what in apart}
    gained = [run["path"][max(run["path"])]["accuracy"] - run["path"][0]["accuracy"] for run in models[FORWARD_KL]]
    return [
        Direction("(f) reward alone leaves less entropy of answers than any way to the posterior, in every seed",
                  *against_all("entropy", -1)),
        Direction("(f) and more answers to a problem that are the same text", *against_all("repeated", 1)),
        Direction("(f) and moves further from the start in KL", *against_all("KL", 1)),
        Direction(
            "(f) that is more narrowing than being right asks for: less entropy than the posterior, and less often "
            "right",
            alone["entropy"] < wanted["entropy"] and alone["accuracy"] < wanted["accuracy"],
            f"entropy {alone['entropy']:.2f} against {wanted['entropy']:.2f} nats, accuracy {alone['accuracy']:.2f} "
            f"against {wanted['accuracy']:.2f}",
        ),
        Direction(
            "(f) penalised reward and reverse KL to the posterior are one objective: they end alike, in entropy and KL",
            all(apart[what] < 0.25 * gap[what] for what in apart),
            ", ".join(f"{what} {apart[what]:.2f} apart, {gap[what]:.2f} from reward alone" for what in apart),
        ),
        Direction(
            "(f) matching the posterior without RL works: forward KL raises accuracy in every seed",
            min(gained) > 0,
            ", ".join(f"{gain:+.3f}" for gain in gained),
        ),
        Direction(
            "(f) the posterior is reached",
            all(abs(end[name]["accuracy"] - wanted["accuracy"]) < 0.1 for name in (PENALISED, REVERSE_KL, FORWARD_KL)),
            ", ".join(f"{name} {end[name]['accuracy']:.2f}" for name in (PENALISED, REVERSE_KL, FORWARD_KL))
            + f" right; the posterior {wanted['accuracy']:.2f}",
            claimed=False,
        ),
        Direction(
            "(f) the penalty costs accuracy: reward alone is more often right in every seed",
            *against_all("accuracy", 1),
            claimed=False,
        ),
    ]  # fmt: skip


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _cells(numbers: Mapping[str, list[float]], *names: str) -> list[str]:
    return [f"{_mean(numbers[name]):.4g}" for name in names]


def _plain_table(plain: Mapping[str, Path], prior: Tensor, reward: Tensor) -> Table:
    rows = [
        ["prior", "", *_cells(numbers(prior, prior, reward), "reward", "entropy", "distinct", "tie_odds", "prior_kl")]
    ]
    for name, path in plain.items():
        for step in sorted(path)[1:]:
            rows.append([name, str(step), *_cells(path[step], "reward", "entropy", "distinct", "tie_odds", "prior_kl")])
    return Table(
        "(a) Reward alone",
        ["", "step", "E r", "entropy", "distinct of 1000", "odds of ties moved by", "KL(policy, prior)"],
        rows,
        f"Mean over {len(prior)} priors. Distinct: expected number of different strings in 1000 draws.",
    )


def _matched_table(matched: Mapping[str, Any]) -> Table:
    names = ("reward", "entropy", "distinct", "tie_odds", "prior_kl", "to_target", "from_target")
    rows = [[f"{name}, beta {beta:g}", *_cells(numbers, *names)] for (name, beta), numbers in matched["table"].items()]
    rows.append(["forward KL to the constraint", *_cells(matched["constrained"], *names)])
    return Table(
        "(b), (c), (d) Distribution matching, last step",
        ["", "E r", "entropy", "distinct of 1000", "odds of ties moved by", "KL(policy, prior)", "KL(policy, target)",
         "KL(target, policy)"],
        rows,
    )  # fmt: skip


def _bandit_table(tied: Mapping[str, Any]) -> Table:
    steps = [step for step in tied["path"] if step in (0, 100, 1000, max(tied["path"]))]
    rows = [[f"reward alone, step {step}", *map(float, tied["path"][step].values())] for step in steps]
    rows.append(["posterior, beta 0.1", *map(float, tied["posterior"].values())])
    return Table("(e) Twelve actions, two tied", ["", "entropy", "E r", "odds of the tied pair"], rows)


SEEN = {
    "accuracy": "accuracy", "entropy": "entropy of answers, nats", "repeated": "share of equal pairs",
    "KL": "KL to the start, nats per answer", "length": "tokens",
}  # fmt: skip


def _model_table(models: arms.Runs, wanted: Mapping[str, float]) -> Table:
    star = [f"{wanted[what]:.3f}" if what in wanted else "" for what in SEEN]
    return arms.end_table(
        f"(f) The language model on held-out problems, beta {BETA:g}",
        models,
        SEEN,
        more=[["the posterior itself", *star]],
        note="Mean over seeds ± its standard error. Equal pairs: of two answers to one problem, how often they are the "
        "same text. The posterior's numbers weigh answers of the start.",
    )


COLORS = ("#d55e00", "#b5529b", "#0072b2")
MODEL_COLORS = {ALONE: "#d55e00", PENALISED: "#0072b2", REVERSE_KL: "#009e73", FORWARD_KL: "#b5529b"}


def _figure(
    plain: Mapping[str, Path],
    matched: Mapping[str, Any],
    tied: Mapping[str, Any],
    models: arms.Runs,
    wanted: Mapping[str, float],
) -> Any:
    figure, (entropy, gap, odds, spread, equal, plane) = new_figure(3, rows=2, width=3.8, height=3.2)
    for color, (name, path) in zip(COLORS, plain.items(), strict=True):
        steps = sorted(path)
        entropy.plot([s + 1 for s in steps], [_mean(path[s]["entropy"]) for s in steps], marker="o", markersize=3,
                     color=color, label=name)  # fmt: skip
    entropy.set_xscale("log")
    entropy.set_xlabel("steps + 1", fontsize=9)
    entropy.set_ylabel("entropy, nats", fontsize=9)
    entropy.legend(fontsize=7, frameon=False, loc="lower left")
    place = BETAS.index(0.1)
    steps = sorted(matched["gaps"])
    gap.plot(steps, [max(matched["gaps"][s][place], 1e-16) for s in steps], color="#0072b2")
    gap.set_yscale("log")
    gap.set_xlabel("steps", fontsize=9)
    gap.set_ylabel("log Z - J / beta, nats", fontsize=9)
    path = tied["path"]
    odds.plot(
        [s + 1 for s in path], [numbers["odds"] for numbers in path.values()], color="#d55e00", label="reward alone"
    )
    odds.axhline(tied["posterior"]["odds"], color="#0072b2", label="posterior, beta 0.1")
    odds.set_xscale("log")
    odds.set_yscale("log")
    odds.set_xlabel("steps + 1", fontsize=9)
    odds.set_ylabel("odds of the tied pair", fontsize=9)
    odds.legend(fontsize=7, frameon=False)
    arms.draw_paths(spread, models, "entropy", "entropy of answers, nats", MODEL_COLORS)
    spread.axhline(wanted["entropy"], color="#777777", linewidth=0.8)
    spread.legend(fontsize=7, frameon=False)
    arms.draw_paths(equal, models, "repeated", "share of equal pairs", MODEL_COLORS)
    for name, runs in models.items():
        kl, right = (list(arms.mean_path(runs, what).values()) for what in ("KL", "accuracy"))
        plane.plot(kl, right, color=MODEL_COLORS[name], marker="o", markersize=3)
    plane.plot(wanted["KL"], wanted["accuracy"], "*", color="#16191d", markersize=10)
    plane.annotate("posterior", (wanted["KL"], wanted["accuracy"]), (6, -8), textcoords="offset points", fontsize=7)
    plane.set_xlabel("KL to the start, nats per answer", fontsize=9)
    plane.set_ylabel("accuracy", fontsize=9)
    return figure


CAPTION = (
    "Above, exact: entropy as the expected reward is maximised alone; KL(policy, posterior) under the KL penalty, beta "
    "0.1, which is the gap of the bound on log Z; two equally good actions of twelve, whose odds drift under plain "
    "reward and cannot under the posterior. Below, the language model on held-out problems, a thin line per seed: "
    "entropy of answers (grey: the posterior's), share of equal pairs, and accuracy against KL to the start."
)


SETUP = """\
Strings of six letters over four, all 4096 enumerated; {seeds} priors, first-order chains with Dirichlet(2) rows; reward
1 where the last letter occurs. A softmax over all strings starts at the prior.

(a) Maximise E r: {steps} steps of plain ascent with rate 30; Adam at 0.05 on {samples} samples a step, {sampled} steps;
Adam at 0.05 on the exact gradient. (b) E r - beta KL(policy, prior) and (c) KL(posterior, policy), beta 0.05, 0.1, 0.3
and 1, exact gradients, Adam at 0.05, {steps} steps. (d) KL(target, policy) with the target prior given r = 1. (e)
Twelve actions, prior Dirichlet(5), two with reward 1, the others below 0.3: plain ascent with rate 1, {bandit}
steps.

(f) The shipped student, reward 1 for a right answer, beta {beta:g}, 8 answers to each of {prompts} fresh problems a
step, {lm_steps} steps, AdamW at {rate:g}, {lm_seeds} seeds, baseline the problem's other answers. Reward alone is
`method: grpo` without a penalty. Reward - beta KL is `grpo` with the exact penalty at every prefix and its later cost
in the advantage (`form: exact`, `horizon: sequence`), which is the gradient of the KL between whole answers. The other
two are `method: f_dpg` with `score: posterior(accuracy, beta={beta:g})`. All are asked {asked} held-out problems, 16
answers each, with the same uniform numbers. The posterior's own numbers: {drawn} answers of the start to each of them,
weighed by exp(r / beta)."""

READING = (
    "J and -beta KL(policy, posterior) differ by a constant, so they have the same gradient: the penalty does not slow "
    "reward maximisation, it replaces its optimum by a distribution. That distribution can be reached without RL, by "
    "forward KL. Reward alone has no preference among equally good strings and keeps going after the reward is "
    "saturated: entropy falls, and odds of ties move. How soon depends on the optimiser: exact Adam moves tied strings "
    "alike and keeps their odds, so collapse is of plain and of sampled gradients. `kullback.theory.posterior` has the "
    "identities, the exact samplers and the diagnostics. In (f) the three ways to the posterior slow down together, in "
    "entropy and in KL, while reward alone goes on narrowing. Reward alone is right most often in the end, at two to "
    "four times the KL; per nat it gains less than the two arms in reverse KL. The three do not reach the posterior: "
    "to be as often right as it, on problems that were never seen, is a matter of calculating, not of choosing among "
    "one's answers. The diagnostics of (f) are those that `f_dpg` logs while it trains, rollout/completion_entropy, "
    "rollout/repeated and rollout/reference_kl, here for all arms alike and on held-out problems."
)

DIFFERS = (
    "The paper is an argument without experiments; all numbers here are ours.",
    "Its text was read in the first author's web version, not in the conference PDF.",
    "The language model has 105 thousand parameters and one task; rate, steps and beta of (f) are those of one trial "
    "with one seed (60 steps at 3e-4; 20 at 5e-4 before it showed the same).",
    "Two entropy directions were first asserted against 7 nats, a figure of the card's single chain. The priors here "
    "start at 6.97, so both missed; they now compare with the target's and the prior's own entropy.",
)
