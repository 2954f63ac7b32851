"""23 RL as Bayes: what reward maximisation does to a distribution, and what the KL penalty makes of it instead.

All 4096 strings of six letters are enumerated. The prior is a random Markov chain, the reward 1 where a letter occurs.
(a) Plain reward, by plain, sampled and Adam's gradients. (b) Reward with a KL penalty, (c) forward KL to the posterior,
(d) to the prior given the constraint. (e) Twelve actions, two of them equally good.
"""

import itertools
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import divergence
from kullback.papers.page import Direction, Result, Table, new_figure, write_page
from kullback.theory import tabular
from kullback.theory.posterior import collapse, evidence_bound, log_evidence, posterior

if TYPE_CHECKING:
    from rich.console import Console

NUMBER = 23
TITLE = "RL with KL penalties as Bayesian inference"
CLAIM = "KL-penalised RL is variational inference to a posterior; without the penalty the policy collapses."
SOURCE = (
    "*RL with KL penalties is better viewed as Bayesian inference*, [arXiv 2205.11275](https://arxiv.org/abs/2205.11275),"
    " Findings of EMNLP 2022"
)

LETTERS, LENGTH = 4, 6
BETAS = (0.05, 0.1, 0.3, 1.0)
FORWARD, REVERSE = divergence("forward_kl"), divergence("reverse_kl")
FULL = {"steps": 3000, "sampled": 2000, "bandit": 20_000, "seeds": 3}
QUICK = {"steps": 100, "sampled": 60, "bandit": 200, "seeds": 1}
SAMPLES = 256


def reproduce(quick: bool = False, console: "Console | None" = None, docs: Path | None = None) -> Result:
    """Run the five experiments and write the page.

    Args:
        quick: far fewer steps, one prior.
        docs: folder of the page; by default docs/papers, and runs/papers for a quick run.
    """
    started, size = time.monotonic(), QUICK if quick else FULL
    prior, reward = problem(size["seeds"])
    plain = {
        "plain gradient": reward_only(prior, reward, size["steps"], "plain"),
        "sampled gradient, Adam": reward_only(prior, reward, size["sampled"], "sampled"),
        "exact gradient, Adam": reward_only(prior, reward, size["steps"], "adam"),
    }
    matched = match(prior, reward, size["steps"])
    tied = bandit(size["bandit"])
    errors = identities(200)
    return write_page(
        number=NUMBER,
        slug="rl-as-bayes",
        title=TITLE,
        claim=CLAIM,
        source=SOURCE,
        setup=SETUP.format(**size, samples=SAMPLES),
        directions=_directions(plain, matched, tied, errors),
        tables=[_plain_table(plain, prior, reward), _matched_table(matched), _bandit_table(tied)],
        figure=_figure(plain, matched, tied),
        caption="Left: entropy as the expected reward is maximised alone. Middle: KL(policy, posterior) under the KL "
        "penalty, beta 0.1; it is the gap of the bound on log Z. Right: two equally good actions of twelve; under "
        "plain reward their odds drift, under the posterior they cannot.",
        reading=READING,
        differs=DIFFERS,
        seconds=time.monotonic() - started,
        quick=quick,
        processes=1,
        docs=docs,
        console=console,
        numbers={"plain": plain, "matched": matched, "tied": tied, "errors": errors},
    )


def problem(seeds: int) -> tuple[Float[Tensor, "seed string"], Float[Tensor, "string"]]:
    """log pi_0 of random first-order chains with Dirichlet(2) rows, and r = 1 where the last letter occurs."""
    text = torch.cartesian_prod(*[torch.arange(LETTERS)] * LENGTH)
    laws = []
    for seed in range(seeds):
        rows = tabular.random_policy(LETTERS, LETTERS + 1, seed=seed, concentration=2.0)
        laws.append(rows[LETTERS][text[:, 0]] + rows[text[:, :-1], text[:, 1:]].sum(1))
    return torch.stack(laws), (text == LETTERS - 1).any(1).double()


Path_ = dict[int, dict[str, list[float]]]  # by step, then by what is measured: a number for each prior


def _numbers(policy: Tensor, prior: Tensor, reward: Tensor) -> dict[str, list[float]]:
    seen = collapse(policy, prior, reward)
    shown = ("reward", "entropy", "distinct", "tie_odds", "prior_kl")
    return {name: getattr(seen, name).tolist() for name in shown}


def reward_only(prior: Tensor, reward: Tensor, steps: int, how: str) -> Path_:
    """Maximise E r from the prior: "plain" ascent with rate 30, "adam" at 0.05, or "sampled", Adam on 256 draws."""
    marks = {0, 50, 100, 300, 500, 1000, steps}
    path: Path_ = {}

    def watch(step: int, policy: Tensor) -> None:
        if step in marks:
            path[step] = _numbers(policy, prior, reward)

    if how == "plain":
        logits = prior.clone()
        for step in range(steps + 1):
            policy = logits.log_softmax(-1)
            watch(step, policy)
            logits = logits + 30 * tabular.score_gradient(policy, reward.expand_as(policy))
        return path
    draw = torch.Generator().manual_seed(0)

    def loss(policy: Tensor) -> Tensor:
        if how == "adam":
            return -(policy.exp() * reward).sum(-1)
        y = torch.multinomial(policy.detach().exp(), SAMPLES, replacement=True, generator=draw)
        earned = reward[y]
        return -((earned - earned.mean(-1, keepdim=True)) * policy.gather(-1, y)).mean(-1)

    tabular.descend(loss, prior, steps=steps, watch=watch)
    return path


def match(prior: Tensor, reward: Tensor, steps: int) -> dict[str, Any]:
    """Exact Adam at 0.05 from the prior, all betas and priors at once.

    Returns:
        by method and beta, the last policy's numbers and its distances from the target; and for the penalised reward
        the gap of the bound on the way.
    """
    wide = prior[:, None].expand(-1, len(BETAS), -1)
    target = torch.stack([posterior(prior, reward.expand_as(prior), beta) for beta in BETAS], 1)
    beta = torch.tensor(BETAS, dtype=torch.float64)
    gaps: dict[int, list[float]] = {}
    highest = torch.stack([log_evidence(prior, reward.expand_as(prior), b) for b in BETAS], 1)

    def gap(policy: Tensor) -> Tensor:
        bound = [evidence_bound(policy[:, i], prior, reward.expand_as(prior), b) for i, b in enumerate(BETAS)]
        return highest - torch.stack(bound, 1)

    def watch(step: int, policy: Tensor) -> None:
        if step % 20 == 0 or step == steps:
            gaps[step] = gap(policy).mean(0).tolist()

    def penalised(policy: Tensor) -> Tensor:
        return beta * REVERSE.from_log_probs(wide, policy) - (policy.exp() * reward).sum(-1)

    found = {
        "reward - beta KL": tabular.descend(penalised, wide, steps=steps, watch=watch),
        "forward KL": tabular.descend(lambda policy: FORWARD.from_log_probs(target, policy), wide, steps=steps),
    }
    table = {
        (name, b): _numbers(policy[:, i], prior, reward)
        | {
            "to_target": REVERSE.from_log_probs(target[:, i], policy[:, i]).tolist(),
            "from_target": FORWARD.from_log_probs(target[:, i], policy[:, i]).tolist(),
        }
        for name, policy in (*found.items(), ("posterior", target))
        for i, b in enumerate(BETAS)
    }
    hard = torch.where(reward == 1, prior, -torch.inf).log_softmax(-1)
    policy = tabular.descend(lambda policy: FORWARD.from_log_probs(hard, policy), prior, steps=steps)
    share = (prior.exp() * reward).sum(-1)
    constrained = _numbers(policy, prior, reward) | {
        "from_target": FORWARD.from_log_probs(hard, policy).tolist(),
        "to_target": [math.inf] * len(prior),
        "target_entropy": tabular.entropy(hard).tolist(),
        "cost_error": (REVERSE.from_log_probs(prior, hard) + share.log()).abs().tolist(),
    }
    return {"table": table, "gaps": gaps, "constrained": constrained, "highest": highest}


def bandit(steps: int) -> dict[str, Any]:
    """Twelve actions, prior Dirichlet(5), two best actions at reward 1: plain ascent on E r with rate 1."""
    prior = tabular.random_policy(12, seed=0, concentration=5.0)
    reward = 0.3 * torch.rand(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reward[:2] = 1.0
    logits, path = prior.clone(), {}
    marks = sorted({0, *(int(10 ** (k / 4)) for k in range(30)), steps})
    for step in range(steps + 1):
        policy = logits.log_softmax(-1)
        if step in marks:
            seen = collapse(policy, prior, reward)
            odds = float((policy[0] - policy[1]).abs().exp())
            path[step] = {"entropy": float(seen.entropy), "reward": float(seen.reward), "odds": odds}
        logits = logits + tabular.score_gradient(policy, reward)
    kept = posterior(prior, reward, 0.1)
    seen = collapse(kept, prior, reward)
    odds = float((kept[0] - kept[1]).abs().exp())
    return {"path": path, "posterior": {"entropy": float(seen.entropy), "reward": float(seen.reward), "odds": odds}}


def identities(problems: int) -> dict[str, float]:
    """Largest errors over random policies, priors, rewards and betas: J's identity, and its gradient's."""
    draw = torch.Generator().manual_seed(0)
    value, slope = 0.0, 0.0
    for _ in range(problems):
        logits, prior = torch.randn(2, 20, generator=draw, dtype=torch.float64)
        reward, prior = torch.randn(20, generator=draw, dtype=torch.float64), prior.log_softmax(-1)
        beta = float(torch.rand(1, generator=draw, dtype=torch.float64)) * 2 + 0.1
        policy, p = logits.log_softmax(-1), posterior(prior, reward, beta)
        kl = (policy.exp() * (policy - p)).sum()
        J = (policy.exp() * (reward - beta * (policy - prior))).sum()
        value = max(value, float((J - beta * (log_evidence(prior, reward, beta) - kl)).abs()))

        def distance(x: Tensor, p: Tensor = p) -> Tensor:
            return (x.exp() * (x - p)).sum()

        towards = tabular.gradient(distance, logits)
        rl = tabular.score_gradient(policy, reward - beta * (policy - prior))
        slope = max(slope, float((rl + beta * towards).abs().max()))
    return {"value": value, "gradient": slope}


def _directions(
    plain: Mapping[str, Path_], matched: Mapping[str, Any], tied: Mapping[str, Any], errors: Mapping[str, float]
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


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _cells(numbers: Mapping[str, list[float]], *names: str) -> list[str]:
    return [f"{_mean(numbers[name]):.4g}" for name in names]


def _plain_table(plain: Mapping[str, Path_], prior: Tensor, reward: Tensor) -> Table:
    rows = [
        ["prior", "", *_cells(_numbers(prior, prior, reward), "reward", "entropy", "distinct", "tie_odds", "prior_kl")]
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


COLORS = ("#d55e00", "#b5529b", "#0072b2")


def _figure(plain: Mapping[str, Path_], matched: Mapping[str, Any], tied: Mapping[str, Any]) -> Any:
    figure, (entropy, gap, odds) = new_figure(3, width=3.8, height=3.2)
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
    return figure


SETUP = """\
Strings of six letters over four, all 4096 enumerated; {seeds} priors, first-order chains with Dirichlet(2) rows; reward
1 where the last letter occurs. A softmax over all strings starts at the prior.

(a) Maximise E r: {steps} steps of plain ascent with rate 30; Adam at 0.05 on {samples} samples a step, {sampled} steps;
Adam at 0.05 on the exact gradient. (b) E r - beta KL(policy, prior) and (c) KL(posterior, policy), beta 0.05, 0.1, 0.3
and 1, exact gradients, Adam at 0.05, {steps} steps. (d) KL(target, policy) with the target prior given r = 1. (e)
Twelve actions, prior Dirichlet(5), two with reward 1, the others below 0.3: plain ascent with rate 1, {bandit}
steps."""

READING = (
    "J and -beta KL(policy, posterior) differ by a constant, so they have the same gradient: the penalty does not slow "
    "reward maximisation, it replaces its optimum by a distribution. That distribution can be reached without RL, by "
    "forward KL. Reward alone has no preference among equally good strings and keeps going after the reward is "
    "saturated: entropy falls, and odds of ties move. How soon depends on the optimiser: exact Adam moves tied strings "
    "alike and keeps their odds, so collapse is of plain and of sampled gradients. `kullback.theory.posterior` has the "
    "identities, the exact samplers and the diagnostics; `method: f_dpg` with `posterior(...)` and reverse_kl is "
    "(b) on a language model, and its metrics are the sampled diagnostics."
)

DIFFERS = (
    "The paper is an argument without experiments; all numbers here are ours.",
    "Its text was read in the first author's web version, not in the conference PDF.",
    "No language model is trained here.",
    "Two entropy directions were first asserted against 7 nats, a figure of the card's single chain. The priors here "
    "start at 6.97, so both missed; they now compare with the target's and the prior's own entropy.",
)
