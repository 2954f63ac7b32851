"""39 chi-PO: does a chi-squared penalty stop preference learning from trusting what its pairs do not cover?

A bandit of 101 actions of which the pairs see a part: DPO and chi-PO, each with and without chi-PO's clip, at six
coefficients and three sizes of the data, trained for exactly as long.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kullback.divergence import divergence
from kullback.estimate import expectation
from kullback.lm.preferences import OUTERS, score
from kullback.papers.page import Direction, Result, Spread, Table, new_figure, write_page
from kullback.run.seeds import generator
from kullback.theory import tabular

if TYPE_CHECKING:
    from rich.console import Console

NUMBER = 39
TITLE = "chi-PO: preferences under partial coverage"
CLAIM = "Adding chi-squared to DPO's KL, one line in the link, stops the over-optimisation that a KL allows."
SOURCE = (
    "*Correcting the Mythos of KL-Regularization: Direct Alignment without Overoptimization via Chi-Squared Preference "
    "Optimization*, [arXiv 2407.13399](https://arxiv.org/abs/2407.13399), ICLR 2025"
)

ACTIONS, MAX_REWARD = 101, 1.0
COEFFICIENTS = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0)
PAIRS = (100, 400, 1600)
METHODS: dict[str, tuple[str, float | None]] = {  # divergence, clip
    "DPO": ("reverse_kl", None),
    "DPO, clipped": ("reverse_kl", MAX_REWARD),
    "chi-PO": ("chi2_kl", MAX_REWARD),
    "chi-PO, no clip": ("chi2_kl", None),
}
WATCHED = (0, 10, 30, 100, 300, 1000, 4000)
FULL = {"steps": 4000, "seeds": 8}
QUICK = {"steps": 300, "seeds": 2}
CHI2 = divergence("alpha(-1)")  # 1/2 sum (model - reference)^2 / reference


@dataclass(frozen=True)
class Runs:
    """One method on data of one size.

    Args:
        reward: expected reward by step, coefficient and seed.
        chi2: D_chi2(policy || reference) at the end, nats; the coverage of a policy is 1 + 2 D_chi2.
        clipped: share of pairs that the clip cuts at the end, on the right side and on the wrong one.
    """

    steps: list[int]
    reward: Float[Tensor, "step coefficient seed"]
    chi2: Float[Tensor, "coefficient seed"]
    clipped: Float[Tensor, "side coefficient"]

    @property
    def end(self) -> Float[Tensor, "coefficient seed"]:
        return self.reward[-1]

    def best(self) -> tuple[float, list[float]]:
        """The coefficient with the highest mean reward at the end, and its rewards by seed."""
        place = int(self.end.mean(1).argmax())
        return COEFFICIENTS[place], self.end[place].tolist()


def reproduce(quick: bool = False, console: "Console | None" = None, docs: Path | None = None) -> Result:
    """Run the study and write the page.

    Args:
        quick: few steps and seeds.
        docs: folder of the page; by default docs/papers, and runs/papers for a quick run.
    """
    started, size = time.monotonic(), QUICK if quick else FULL
    runs = {(name, pairs): train(name, pairs, size["steps"], size["seeds"]) for name in METHODS for pairs in PAIRS}
    unseen = {pairs: [unseen_actions(seed, pairs) for seed in range(size["seeds"])] for pairs in PAIRS}
    reference = [float(expectation(reference_policy(), rewards(seed))) for seed in range(size["seeds"])]
    return write_page(
        number=NUMBER,
        slug="chi-po",
        title=TITLE,
        claim=CLAIM,
        source=SOURCE,
        setup=SETUP.format(**size),
        directions=_directions(runs, reference),
        tables=[_reward_table(runs), _best_table(runs, unseen), _distance_table(runs), _path_table(runs)],
        figure=_figure(runs, reference),
        caption="From left: expected reward at the end against the coefficient, for 100, 400 and 1600 pairs (mean over "
        "seeds, bars one standard error; grey: the reference); and expected reward during training with 100 pairs.",
        reading=READING,
        differs=DIFFERS,
        seconds=time.monotonic() - started,
        quick=quick,
        processes=1,
        docs=docs,
        console=console,
        numbers={"runs": runs, "reference": reference, "unseen": unseen},
    )


# The bandit


def reference_policy() -> Float[Tensor, "action"]:
    """Half of the mass on action 0, the rest shared alike; log-probabilities."""
    p = torch.full((ACTIONS,), 0.5 / (ACTIONS - 1), dtype=torch.float64)
    p[0] = 0.5
    return p.log()


def rewards(seed: int) -> Float[Tensor, "action"]:
    """1 for action 0, uniform in [0, 0.5] for the others."""
    found = 0.5 * torch.rand(ACTIONS, generator=generator(seed, "reward"), dtype=torch.float64)
    found[0] = 1.0
    return found


def sample_pairs(seed: int, pairs: int) -> Int[Tensor, "pair 2"]:
    """(preferred, other): two different actions of the reference, labelled by Bradley-Terry."""
    draw, found = generator(seed, "pairs", pairs), torch.empty(0, 2, dtype=torch.long)
    while len(found) < pairs:
        both = torch.multinomial(reference_policy().exp(), 4 * pairs, replacement=True, generator=draw).view(-1, 2)
        found = torch.cat([found, both[both[:, 0] != both[:, 1]]])
    found = found[:pairs]
    reward = rewards(seed)[found]
    flip = torch.rand(pairs, generator=draw, dtype=torch.float64) > torch.sigmoid(reward[:, 0] - reward[:, 1])
    return torch.where(flip[:, None], found.flip(1), found)


def unseen_actions(seed: int, pairs: int) -> int:
    """Actions that no pair contains: the loss says nothing about them."""
    return ACTIONS - len(sample_pairs(seed, pairs).unique())


def train(name: str, pairs: int, steps: int, seeds: int) -> Runs:
    """Softmax policies from the reference, full-batch Adam at 0.02, all coefficients and seeds side by side."""
    which, clip = METHODS[name]
    D, reference = divergence(which), reference_policy()
    data = torch.stack([sample_pairs(seed, pairs) for seed in range(seeds)])
    reward = torch.stack([rewards(seed) for seed in range(seeds)])
    coefficient = torch.tensor(COEFFICIENTS, dtype=torch.float64)[:, None, None]
    index = data.flatten(1).expand(len(COEFFICIENTS), -1, -1)

    def margins(policy: Tensor) -> Float[Tensor, "coefficient seed pair"]:
        seen = score(D, policy - reference).gather(-1, index).unflatten(-1, (pairs, 2))
        return coefficient * (seen[..., 0] - seen[..., 1])

    def loss(policy: Tensor) -> Tensor:
        margin = margins(policy)
        margin = margin if clip is None else margin.clamp(-2 * clip, 2 * clip)
        return OUTERS["logistic"](margin, 1.0).mean(-1)

    watched = [step for step in WATCHED if step < steps] + [steps]
    path: list[Tensor] = []

    def watch(step: int, policy: Tensor) -> None:
        if step in watched:
            path.append(expectation(policy, reward))

    start = reference.expand(len(COEFFICIENTS), seeds, ACTIONS)
    policy = tabular.descend(loss, start, steps=steps, learning_rate=0.02, watch=watch)
    margin, bound = margins(policy), 2 * MAX_REWARD
    clipped = torch.stack([(margin > bound).double().mean((1, 2)), (margin < -bound).double().mean((1, 2))])
    return Runs(watched, torch.stack(path), CHI2.from_log_probs(reference, policy), clipped)


# The page


def _directions(runs: Mapping[tuple[str, int], Runs], reference: list[float]) -> list[Direction]:
    base = sum(reference) / len(reference)
    ends = {key: found.end.mean(1) for key, found in runs.items()}
    gap = {
        name: [float(ends["chi-PO", n].max() - ends[name, n].max()) for n in PAIRS] for name in ("DPO", "DPO, clipped")
    }
    chi2 = {key: found.chi2.mean(1) for key, found in runs.items()}
    smaller = [bool((chi2["chi-PO", n] < chi2["DPO", n]).all()) for n in PAIRS]
    few = PAIRS[0]
    dpo_below = int((ends["DPO", few] < base).sum())
    chi_above = bool((ends["chi-PO", few][2:] > base).all())
    wins = sum(int((ends["chi-PO", n] > ends["DPO", n]).sum()) for n in PAIRS)
    early = {n: float(runs["DPO", n].reward.mean(2).max()) for n in PAIRS}
    late = {n: float(ends["chi-PO", n].max()) for n in PAIRS}
    falls = [float(runs[name, few].reward.mean(2).max(0).values[0] - ends[name, few][0]) for name in ("DPO", "chi-PO")]
    unclipped = [float(ends["chi-PO", n].max() - ends["chi-PO, no clip", n].max()) for n in PAIRS]
    return [
        Direction(
            "at its best coefficient chi-PO earns more than DPO at its own, at each size of the data",
            all(value > 0 for value in gap["DPO"]),
            "by " + _list(gap["DPO"]),
            asserted=True,
        ),
        Direction(
            "with 100 pairs DPO ends below the reference at every coefficient; chi-PO above it from 0.5 on",
            dpo_below == len(COEFFICIENTS) and chi_above,
            f"reference {base:.2f}; DPO at most {float(ends['DPO', few].max()):.2f}, chi-PO from 0.5 on at least "
            f"{float(ends['chi-PO', few][2:].min()):.2f}",
            asserted=True,
        ),
        Direction(
            "chi-PO stays nearer to the reference: smaller D_chi2 at every coefficient and size",
            all(smaller),
            f"{', '.join(f'{float(chi2[name, few][0]):.0f}' for name in ('DPO', 'chi-PO'))} at 100 pairs and 0.05",
            asserted=True,
        ),
        Direction(
            "the link does it, not the clip: DPO with chi-PO's clip is still below chi-PO, each at its best",
            all(value > 0 for value in gap["DPO, clipped"]),
            f"by {_list(gap['DPO, clipped'])}; the clip alone closes the rest of the gap",
            asserted=True,
            claimed=False,
        ),
        Direction(
            "chi-PO needs its clip: without it, it earns less at its best coefficient",
            all(value > 0 for value in unclipped),
            "by " + _list(unclipped),
            claimed=False,
        ),
        Direction(
            "chi-PO earns more than DPO at every coefficient",
            wins == len(PAIRS) * len(COEFFICIENTS),
            f"in {wins} of {len(PAIRS) * len(COEFFICIENTS)}; where both collapse, or at 5, DPO can be ahead",
            claimed=False,
        ),
        Direction(
            "chi-PO does not over-optimise: at the smallest coefficient it keeps what it gained on the way",
            falls[1] < 0.05,
            f"with 100 pairs DPO loses {falls[0]:.2f} from its best step on, chi-PO {falls[1]:.2f}",
            claimed=False,
        ),
        Direction(
            "chi-PO at the end beats DPO stopped at its best step and coefficient",
            all(late[n] > early[n] for n in PAIRS),
            "; ".join(f"{n} pairs: {late[n]:.2f} against {early[n]:.2f}" for n in PAIRS)
            + " (DPO's step is chosen by the true reward, among those watched)",
            claimed=False,
        ),
    ]


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _short(values: list[float]) -> str:
    spread = Spread(values)
    return f"{spread.mean:.2f}" + (f" ± {spread.error:.2f}" if len(values) > 1 else "")


def _reward_table(runs: Mapping[tuple[str, int], Runs]) -> Table:
    rows = [
        [f"{n} pairs, {name}", *(_short(values) for values in runs[name, n].end.tolist())]
        for n in PAIRS
        for name in METHODS
    ]
    return Table(
        "Expected reward after the last step",
        ["", *(f"{c:g}" for c in COEFFICIENTS)],
        rows,
        "Columns: the coefficient. Mean over seeds ± its standard error.",
    )


def _best_table(runs: Mapping[tuple[str, int], Runs], unseen: Mapping[int, list[int]]) -> Table:
    rows = []
    for n in PAIRS:
        for name in METHODS:
            coefficient, values = runs[name, n].best()
            rows.append([f"{n} pairs, {name}", coefficient, Spread(values)])
    seen = "; ".join(f"{n} pairs: {sum(unseen[n]) / len(unseen[n]):.0f}" for n in PAIRS)
    return Table(
        "At each method's best coefficient, by seed",
        ["", "coefficient", "expected reward"],
        rows,
        f"Of {ACTIONS} actions, those in no pair (mean over seeds): {seen}.",
    )


def _distance_table(runs: Mapping[tuple[str, int], Runs]) -> Table:
    rows = []
    for n in PAIRS:
        for name in METHODS:
            found = runs[name, n]
            cut = [f"{right:.0%} / {wrong:.0%}" for right, wrong in found.clipped.T.tolist()]
            rows.append(
                [
                    f"{n} pairs, {name}",
                    *(f"{value:.2g}; {share}" for value, share in zip(found.chi2.mean(1).tolist(), cut, strict=True)),
                ]
            )
    return Table(
        "D_chi2 to the reference; share of pairs beyond the clip, rightly / wrongly ordered",
        ["", *(f"{c:g}" for c in COEFFICIENTS)],
        rows,
        "Coverage is 1 + 2 D_chi2. For methods without a clip the shares say how many pairs it would have cut.",
    )


def _path_table(runs: Mapping[tuple[str, int], Runs]) -> Table:
    steps = runs["DPO", PAIRS[0]].steps
    rows = []
    for n in PAIRS:
        for name in ("DPO", "chi-PO"):
            path = runs[name, n].reward.mean(2)
            rows += [[f"{n} pairs, {name}, {COEFFICIENTS[c]:g}", *(f"{x:.2f}" for x in path[:, c])] for c in (0, 2, 3)]
    return Table("Expected reward on the way", ["", *(f"step {step}" for step in steps)], rows, "Mean over seeds.")


COLORS = {"DPO": "#d55e00", "DPO, clipped": "#c98a00", "chi-PO": "#0072b2", "chi-PO, no clip": "#009e73"}


def _figure(runs: Mapping[tuple[str, int], Runs], reference: list[float]) -> Any:
    figure, axes = new_figure(4, width=3.3, height=3.1)
    base = sum(reference) / len(reference)
    for axis, n in zip(axes, PAIRS, strict=False):
        for name, color in COLORS.items():
            spreads = [Spread(values) for values in runs[name, n].end.tolist()]
            errors = [0.0 if len(s.values) == 1 else s.error for s in spreads]
            axis.errorbar(
                COEFFICIENTS, [s.mean for s in spreads], errors, color=color, marker="o", markersize=3, label=name
            )
        axis.set_title(f"{n} pairs", fontsize=9)
        axis.set_xlabel("coefficient", fontsize=9)
    path = axes[3]
    for name, color in list(COLORS.items())[::2]:
        found = runs[name, PAIRS[0]]
        for place, line in ((0, ":"), (2, "--"), (3, "-")):
            path.plot(
                found.steps,
                found.reward.mean(2)[:, place],
                color=color,
                linestyle=line,
                label=f"{name}, {COEFFICIENTS[place]:g}",
            )
    path.set_xscale("symlog", linthresh=10)
    path.set_title(f"{PAIRS[0]} pairs, during training", fontsize=9)
    path.set_xlabel("step", fontsize=9)
    for axis in axes:
        axis.axhline(base, color="#777777", linewidth=0.8)
        axis.set_ylim(0.15, 0.95)
    for axis in axes[:3]:
        axis.set_xscale("log")
        axis.set_xticks([0.05, 0.2, 1, 5], ["0.05", "0.2", "1", "5"])
        axis.minorticks_off()
    axes[0].set_ylabel("expected reward", fontsize=9)
    axes[0].legend(fontsize=7, frameon=False)
    path.legend(fontsize=7, frameon=False, ncols=2, loc="lower left")
    return figure


SETUP = """\
101 actions. The reference gives action 0 one half and shares the rest alike; action 0 has reward 1, the others uniform
in [0, 0.5]. n pairs of two different actions are drawn from the reference and labelled by Bradley-Terry: rare actions
are in few pairs or in none. A softmax over the actions starts at the reference and is trained on all pairs at once by
Adam at 0.02 for exactly {steps} steps, {seeds} seeds (rewards and pairs both), R = 1: the margin of a pair is clipped
at 2. The score of a response is the one `method: dpo` and `method: chi_po` train with."""

READING = (
    "A rare action that won its one pair looks as good as DPO's coefficient lets it: its ratio to the reference may "
    "grow like exp(R / coefficient), and there are a hundred such actions. Under the mixed penalty it may grow like "
    "R / coefficient. The clip is the second half of the method: it lets go of pairs that are far enough apart, and "
    "alone it already repairs part of DPO; so the row `DPO, clipped` belongs next to every comparison. Actions in no "
    "pair are moved by the softmax alone, so neither method is at rest after the last step, and the number of steps is "
    "part of the result: it is not convergence."
)

DIFFERS = (
    "A bandit in place of summarisation with a language model: what the paper's theory is about, not its experiment.",
    "The paper's R_max, optimiser and learning rate are not known to us; R is the true range of the reward here.",
    "The paper's construction, on which the best DPO learns at a rate of 1 / log n, is not repeated.",
    "Pairs of one action twice are drawn again, so n counts pairs that say something.",
)
