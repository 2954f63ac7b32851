"""24 Alignment asymptotics: does best-of-N become the optimum under a KL budget as sequences grow?

Everything but the last experiment is exact: the law of best-of-N and the optimum change the reference by a function of
the total reward alone, so sequences of 400 letters are compared through the law of their total. (a) A grid of lengths
and budgets. (b) The reward-KL frontier. (c) Sequences with memory, enumerated. (d) A softmax trained to the optimum.
"""

import itertools
import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import divergence
from kullback.estimate import beta_for_kl, expectation, tilt, tilted_kl
from kullback.papers.page import Direction, Findings, Spread, Table, new_figure
from kullback.papers.reproduction import Job, reproduces
from kullback.run.seeds import generator
from kullback.theory import tabular
from kullback.theory.alignment import Agreement, agreement, best_of_n, best_of_n_bound, sum_law

KL = divergence("reverse_kl")
SYMBOLS = {
    "coin": (torch.tensor([0.7, 0.3], dtype=torch.float64).log(), torch.arange(2, dtype=torch.float64)),
    "letters": (torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log(), torch.arange(4, dtype=torch.float64)),
}
BUDGETS = (0.02, 0.1, 0.3)
LENGTHS = (10, 20, 50, 100, 200, 400)
FRONTIER = (1, 10, 100)  # lengths
MEMORY = (6, 8, 10, 12, 14)  # lengths that are enumerated
STAY = 0.8
COEFFICIENT = 1 / 1.5
FULL = {"steps": 1000, "seeds": 5, "last": 400, "samples": 256}
QUICK = {"steps": 100, "seeds": 1, "last": 40, "samples": 256}


@reproduces(24, full=FULL, quick=QUICK)
def reproduce(job: Job) -> Findings:
    """The four experiments; a quick run searches fewer lengths for lattice effects and trains less."""
    size = job.size
    grid = compare_grid()
    rises = lattice_effect(range(5, size["last"] + 1))
    curves = {name: frontier(*SYMBOLS[name]) for name in SYMBOLS}
    memory = {name: [with_memory(name, length) for length in MEMORY] for name in ("sticky chain", "pair reward")}
    trained = train(size["steps"], size["seeds"], size["samples"])
    return Findings(
        setup=SETUP.format(**size),
        directions=_directions(grid, rises, curves, memory, trained),
        tables=[_grid_table(grid), _sharp_table(grid), _memory_table(memory), _trained_table(trained)],
        figure=_figure(grid, curves),
        caption="Per symbol, from left: the reward that best-of-N lacks, and its KL to the optimum, for both alphabets "
        "and three budgets; the gap over its predicted size, log m / (2 beta m); the frontier of the letters, with "
        "best-of-N below it.",
        reading=READING,
        differs=DIFFERS,
        numbers={"grid": grid, "rises": rises, "frontier": curves, "memory": memory, "trained": trained},
    )


# (a) Length and budget


def compare_grid() -> dict[tuple[str, float], list[Agreement]]:
    """An `Agreement` for each alphabet, budget and length."""
    return {
        (name, budget): [agreement(*SYMBOLS[name], length, budget) for length in LENGTHS]
        for name in SYMBOLS
        for budget in BUDGETS
    }


def lattice_effect(lengths: range, budget: float = 0.3) -> tuple[int, int]:
    """At how many of the single steps in length the coin's KL per symbol goes up, and of how many."""
    seen = [agreement(*SYMBOLS["coin"], length, budget).distance for length in lengths]
    return sum(b > a for a, b in itertools.pairwise(seen)), len(seen) - 1


# (b) The frontier


def frontier(
    log_p: Float[Tensor, "outcome"], reward: Float[Tensor, "outcome"], points: int = 60
) -> dict[str, list[tuple[float, float]]]:
    """(KL, reward) per symbol: the optimum's curve, the same for all lengths, and best-of-N for N = 1, 2, 4, ..."""
    most = 0.98 * float(tilted_kl(log_p, reward, math.inf))
    budgets = torch.linspace(0, 1, points, dtype=torch.float64) ** 2 * most
    laws = (log_p.expand(points, -1), reward.expand(points, -1))
    beta = beta_for_kl(*laws, budgets)
    found = {"optimum": list(zip(budgets.tolist(), expectation(tilt(*laws, beta), laws[1]).tolist(), strict=True))}
    for length in FRONTIER:
        law, totals = sum_law(log_p, reward, length)
        seen = []
        for n in (2.0**k for k in range(200)):
            best = best_of_n(law, totals, n)
            kl = float(KL.from_log_probs(law, best)) / length
            if kl > most or best_of_n_bound(n) / length > 1.5 * most:
                break
            seen.append((kl, float(expectation(best, totals)) / length))
        found[f"best of N, m = {length}"] = seen
    return found


def below_the_curve(curves: Mapping[str, list[tuple[float, float]]], name: str) -> tuple[int, int, float]:
    """Of the points of best-of-N, how many lie below the optimum at their own KL; and by how much at most."""
    log_p, reward = SYMBOLS[name]
    gaps = [
        float(expectation(tilt(log_p, reward, beta_for_kl(log_p, reward, kl)), reward)) - gained
        for label, points in curves.items()
        if label != "optimum"
        for kl, gained in points
    ]
    return sum(gap > -1e-12 for gap in gaps), len(gaps), max(gaps)


# (c) Memory


def sequences_with_memory(name: str, length: int) -> tuple[Float[Tensor, "sequence"], Float[Tensor, "sequence"]]:
    """All 2^length sequences: log-probabilities and rewards.

    "sticky chain": a symmetric Markov chain that stays with probability 0.8, reward sum y_t. "pair reward": independent
    coins with P(1) = 0.3, reward sum y_t y_{t+1}.
    """
    every = ((torch.arange(2**length)[:, None] >> torch.arange(length)) & 1).double()
    if name == "sticky chain":
        stays = (every[:, 1:] == every[:, :-1]).double()
        return (
            math.log(0.5) + (stays * math.log(STAY) + (1 - stays) * math.log(1 - STAY)).sum(1),
            every.sum(1),
        )
    log_p, _ = SYMBOLS["coin"]
    return log_p[every.long()].sum(1), (every[:, 1:] * every[:, :-1]).sum(1)


def with_memory(name: str, length: int, budget: float = 0.1) -> dict[str, float]:
    """Best-of-exp(length * budget) beside the optimum, per symbol, by enumeration; and how exact identity 2 is."""
    log_p, reward = sequences_with_memory(name, length)
    best = tabular.optimum(log_p, reward, KL, budget=budget * length)
    law = best_of_n(log_p, reward, math.exp(budget * length))
    distance = float(KL.from_log_probs(best.log_probs, law))
    identity = float(best.gap(KL.from_log_probs(log_p, law), expectation(law, reward)))
    return {
        "length": length,
        "gap": float(best.reward - expectation(law, reward)) / length,
        "distance": distance / length,
        "error": abs(identity - distance),
    }


# (d) Training


def train(steps: int, seeds: int, samples: int) -> dict[str, Any]:
    """KL(policy || optimum), directly and by identity 2, of a softmax over 50 outcomes trained from the reference.

    Adam, learning rate 0.05; the exact gradient of E r - coefficient KL, and REINFORCE with `samples` draws a step.
    """
    found: dict[str, Any] = {"exact": [], "sampled": []}
    for seed in range(seeds):
        p = tabular.random_policy(50, seed=seed)
        reward = torch.randn(50, generator=generator(seed, "reward"), dtype=torch.float64)
        best = tabular.optimum(p, reward, KL, coefficient=COEFFICIENT)
        draw = generator(seed, "samples")

        def sampled(policy: Tensor, p: Tensor = p, reward: Tensor = reward, draw: torch.Generator = draw) -> Tensor:
            y = torch.multinomial(policy.detach().exp(), samples, replacement=True, generator=draw)
            earned = (reward - COEFFICIENT * KL.link(p - policy.detach()))[y]
            leave_one_out = (earned.sum() - earned) / (samples - 1)
            return -((earned - leave_one_out) * policy[y]).mean()

        losses = {"exact": lambda policy, p=p, r=reward: -tabular.objective(policy, p, r, KL, COEFFICIENT)}
        for name, loss in {**losses, "sampled": sampled}.items():
            path: dict[int, tuple[float, float]] = {}

            def watch(
                step: int,
                policy: Tensor,
                path: dict[int, tuple[float, float]] = path,
                p: Tensor = p,
                reward: Tensor = reward,
                best: tabular.Optimum = best,
            ) -> None:
                if step in (0, 100, steps):
                    gap = best.gap(KL.from_log_probs(p, policy), expectation(policy, reward))
                    path[step] = (float(KL.from_log_probs(best.log_probs, policy)), float(gap))

            tabular.descend(loss, p, steps=steps, cooling=name == "sampled", watch=watch)
            found[name].append(path)
    return found


# The page


def _directions(
    grid: Mapping[tuple[str, float], list[Agreement]],
    rises: tuple[int, int],
    curves: Mapping[str, Mapping[str, Any]],
    memory: Mapping[str, list[dict[str, float]]],
    trained: Mapping[str, Any],
) -> list[Direction]:
    pairs = [pair for row in grid.values() for pair in itertools.pairwise(row)]
    gap_falls = sum(b.gap < a.gap for a, b in pairs)
    kl_falls = sum(b.distance < a.distance for a, b in pairs)
    cells = [cell for row in grid.values() for cell in row]
    off = max(abs(cell.identity - cell.distance) for cell in cells)
    ends = [row[-1] for row in grid.values()]
    ratio = {key: row[-1].gap / row[-1].predicted_gap for key, row in grid.items()}
    closer = [
        abs(row[-1].gap / row[-1].predicted_gap - 1) < abs(row[2].gap / row[2].predicted_gap - 1)
        for row in grid.values()
    ]
    added = [
        b.total_distance - a.total_distance
        for (_, budget), row in grid.items()
        if budget == 0.1
        for a, b in itertools.pairwise(row[3:])
    ]
    below = [below_the_curve(curves[name], name) for name in curves]
    shrink = {
        name: all(b["distance"] < a["distance"] and b["gap"] < a["gap"] for a, b in itertools.pairwise(rows[::2]))
        for name, rows in memory.items()
    }
    wrong = max(row["error"] for rows in memory.values() for row in rows)
    paths = [path for paths in trained.values() for path in paths]
    apart = max(abs(direct - gap) for path in paths for direct, gap in path.values())
    return [
        Direction(
            "the reward that best-of-N lacks, per symbol, falls at every step of the grid",
            gap_falls == len(pairs),
            f"{gap_falls} of {len(pairs)}; {max(cell.gap for cell in ends):.4f} at most at {LENGTHS[-1]} symbols",
            True,
        ),
        Direction(
            "KL(best-of-N, optimum) per symbol falls at every step of the grid",
            kl_falls == len(pairs),
            f"{kl_falls} of {len(pairs)}; {max(cell.distance for cell in ends):.4f} at most at {LENGTHS[-1]} symbols",
            True,
        ),
        Direction(
            "a policy's reward and KL give its distance from the optimum (identity 2), here that of best-of-N",
            off < 1e-9,
            f"largest error {off:.0e} nats per symbol",
            True,
        ),
        Direction(
            "best-of-N lies below the frontier at its own KL",
            all(good == total for good, total, _ in below),
            f"{sum(good for good, _, _ in below)} of {sum(total for _, total, _ in below)} points",
            True,
        ),
        Direction(
            "the gap per symbol tends to log m / (2 beta m)",
            all(closer),
            f"nearer at 400 than at 50 in {sum(closer)} of {len(closer)}; ratios at 400 "
            + ", ".join(f"{value:.2f}" for value in ratio.values()),
            claimed=False,
        ),
        Direction(
            "doubling the length adds about log(2) / 2 = 0.35 to the total KL (delta 0.1)",
            all(0.28 < value < 0.37 for value in added),
            ", ".join(f"{value:.2f}" for value in added),
            asserted=True,
            claimed=False,
        ),
        Direction(
            "the KL per symbol does not fall at every single step in length: lattice effects (coin, delta 0.3)",
            rises[0] > 0,
            f"it rises at {rises[0]} of {rises[1]}",
            claimed=False,
        ),
        Direction(
            "with memory, gap and KL per symbol still shrink from 6 to 14 symbols: Markov chain",
            shrink["sticky chain"],
            ", ".join(f"{row['distance']:.4f}" for row in memory["sticky chain"][::2]),
            claimed=False,
        ),
        Direction(
            "the same for a reward on pairs of symbols",
            shrink["pair reward"],
            ", ".join(f"{row['distance']:.4f}" for row in memory["pair reward"][::2]),
            claimed=False,
        ),
        Direction(
            "identity 2 is exact with memory too, and for policies in training",
            wrong < 1e-10 and apart < 1e-10,
            f"largest errors {wrong:.0e} and {apart:.0e} nats",
            True,
        ),
        Direction(
            "KL-regularised policy gradient reaches the optimum",
            all(path[max(path)][0] < 0.02 * path[0][0] for path in trained["exact"]),
            f"{_mean(trained['exact'], 0):.2f} to {_mean(trained['exact'], None):.0e} nats",
            asserted=True,
            claimed=False,
        ),
    ]


def _mean(paths: list[dict[int, tuple[float, float]]], step: int | None) -> float:
    return statistics.fmean(path[max(path) if step is None else step][0] for path in paths)


def _grid_table(grid: Mapping[tuple[str, float], list[Agreement]]) -> Table:
    rows = [
        [f"{name}, delta {budget:g}", *(f"{cell.gap:.4f} / {cell.distance:.4f}" for cell in row)]
        for (name, budget), row in grid.items()
    ]
    return Table(
        "(a) Reward gap / KL(best-of-N, optimum), both per symbol",
        ["", *(f"m = {length}" for length in LENGTHS)],
        rows,
        "N = exp(m delta), not rounded. Exact: no sampling error. Rewards per symbol run from 0 to 1 (coin) and to 3 "
        "(letters).",
    )


def _sharp_table(grid: Mapping[tuple[str, float], list[Agreement]]) -> Table:
    rows = []
    for (name, budget), row in grid.items():
        cell = row[-1]
        rows.append(
            [
                f"{name}, delta {budget:g}",
                f"{cell.beta:.3f}",
                " ".join(f"{one.gap / one.predicted_gap:.2f}" for one in row[2:]),
                " ".join(f"{one.total_distance:.2f}" for one in row[2:]),
                f"{cell.best_of_n_kl:.4f}",
                f"{cell.bound:.4f}",
            ]
        )
    return Table(
        "(a) How fast, and what best-of-N spends",
        ["", "beta", "gap over prediction", "total KL, nats", "KL(best-of-N, p) / m", "its bound / m"],
        rows,
        "Third and fourth column: m = 50, 100, 200, 400. The prediction is log m / (2 beta m). Last two: at m = 400; "
        "the bound is log N - (N - 1) / N.",
    )


def _memory_table(memory: Mapping[str, list[dict[str, float]]]) -> Table:
    rows = [
        [
            name,
            *(f"{row['gap']:.4f} / {row['distance']:.4f}" for row in found),
            f"{max(row['error'] for row in found):.0e}",
        ]
        for name, found in memory.items()
    ]
    return Table(
        "(c) With memory, delta 0.1: reward gap / KL, per symbol",
        ["", *(f"m = {length}" for length in MEMORY), "error of identity 2"],
        rows,
        "All 2^m sequences are enumerated.",
    )


def _trained_table(trained: Mapping[str, Any]) -> Table:
    steps = list(trained["exact"][0])
    rows = []
    for name, paths in trained.items():
        for what, place in (("directly", 0), ("identity 2", 1)):
            cells = [_scientific([path[step][place] for path in paths]) for step in steps]
            rows.append([f"{name} gradient, {what}", *cells])
    return Table(
        "(d) KL(policy, optimum) of a trained softmax, nats",
        ["", *(f"step {step}" for step in steps)],
        rows,
        "Mean over seeds ± its standard error. Identity 2 uses the policy's expected reward and its KL to p alone.",
    )


def _scientific(values: list[float]) -> str:
    spread = Spread(values)
    return f"{spread.mean:.2e}" + (f" ± {spread.error:.0e}" if len(values) > 1 else "")


COLORS = {"coin": "#0072b2", "letters": "#d55e00"}
LINES = {0.02: ":", 0.1: "--", 0.3: "-"}


def _figure(
    grid: Mapping[tuple[str, float], list[Agreement]], curves: Mapping[str, Mapping[str, list[tuple[float, float]]]]
) -> Any:
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    figure, (gaps, distances, ratios, plane) = new_figure(4, width=3.4, height=3.2)
    for (name, budget), row in grid.items():
        look: dict[str, Any] = {"color": COLORS[name], "linestyle": LINES[budget], "marker": "o", "markersize": 3}
        gaps.plot(LENGTHS, [cell.gap for cell in row], label=f"{name}, δ = {budget:g}", **look)
        distances.plot(LENGTHS, [cell.distance for cell in row], **look)
        ratios.plot(LENGTHS, [cell.gap / cell.predicted_gap for cell in row], **look)
    ratios.axhline(1, color="#777777", linewidth=0.8)
    for axis, label in (
        (gaps, "reward gap per symbol"),
        (distances, "KL to the optimum per symbol, nats"),
        (ratios, "reward gap / predicted gap"),
    ):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(LENGTHS))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticklabels([str(length) for length in LENGTHS])
        axis.set_xlabel("m, symbols", fontsize=9)
        axis.set_ylabel(label, fontsize=9)
    for axis in (gaps, distances):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    gaps.legend(fontsize=7, frameon=False, handlelength=3)
    looks = (("#16191d", ""), ("#b5529b", "^"), ("#009e73", "o"), ("#c98a00", "s"))
    for (label, points), (color, marker) in zip(curves["letters"].items(), looks, strict=True):
        shown = [point for point in points if point[0] <= SHOWN]
        every = max(1, len(shown) // 12)  # markers; the line has all points
        plane.plot(
            *zip(*shown, strict=True),
            color=color,
            marker=marker,
            markevery=every,
            markersize=4,
            linewidth=1.2,
            label=label,
        )
    plane.set_xlabel("KL to the reference per symbol, nats", fontsize=9)
    plane.set_ylabel("reward per symbol, letters", fontsize=9)
    plane.legend(fontsize=7, frameon=False, loc="lower right")
    return figure


SHOWN = 0.6  # nats per symbol in the last panel


SETUP = """\
(a) Sequences of m independent symbols, reward added over symbols. Coin: P(1) = 0.3, reward y. Letters: p = (0.4, 0.3,
0.2, 0.1), reward (0, 1, 2, 3). Best-of-N with N = exp(m delta), kept real, against the optimum with budget m delta.
Both change p by a function of the total reward alone, so they are compared exactly through the law of the total, for
m from 10 to 400; and for the coin at delta 0.3 at every m from 5 to {last}.

(b) The optimum's (KL, reward) for all budgets, and best-of-N for N = 1, 2, 4, ... at 1, 10 and 100 symbols.

(c) All 2^m sequences for m up to 14: a symmetric Markov chain that stays with probability 0.8, reward the sum of the
symbols; and independent coins with the reward on pairs of neighbours, sum y_t y_(t+1).

(d) A softmax over 50 outcomes, reference Dirichlet(1), normal rewards, trained from the reference by Adam at 0.05 on
E r - KL / beta with beta = 1.5: {steps} steps of the exact gradient, and of REINFORCE with {samples} samples a step and
a learning rate that falls to 0; {seeds} seeds."""

READING = (
    "The equivalence is one of averages: per symbol both differences vanish, while the KL between whole sequences "
    "keeps growing, slowly. N grows exponentially with the length, so no sampling could show this. At delta = 0.02 the "
    "budget is below a nat until m = 50 and the asymptotic size of the gap is not yet reached at 400. log N is a bound "
    "on what best-of-N spends, not what it spends. (d) is the diagnostic at work: two numbers of a policy, its reward "
    "and its KL to the reference, say how far all of it is from the optimum, to rounding."
)

DIFFERS = (
    "The paper has no experiments; all numbers here are ours. Its text beyond abstract and first page was not at hand: "
    "the formulas are standard consequences of its setting, checked against enumeration.",
    "The paper's statement is for m to infinity; here m ends at 400.",
    "N is not rounded to a whole number. Rounded, N = 1 until m delta > log 1.5, and nothing moves at small m delta.",
    "The log m / (2 beta m) rate and the growth of the total KL are not in the abstract; they are the card's.",
    "(c) is outside the paper's assumptions, on purpose.",
)
