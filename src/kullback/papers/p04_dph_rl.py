"""04 DPH-RL: does a divergence to what the student was, on what it could do, keep what plain RL loses?

(a) A tabular policy with many right answers to each prompt, all seeds in one batch of small networks; pass rates and
entropies are exact. (b) Sums of two to four numbers: the shipped student, briefly fine-tuned on all three lengths,
is trained by verifiable rewards through `kb.train`, with and without replay, under five divergences.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kullback.papers import arms
from kullback.papers.page import Direction, Findings, Spread, Table, new_figure
from kullback.papers.replayed_policy import DPH, STYLES, TOY, run_toy
from kullback.papers.reproduction import Job, reproduces

if TYPE_CHECKING:
    from kullback.lm.method import Method

SUMS = {
    "name": "reasoning_gym/chain_sum",
    "min_terms": 2,
    "max_terms": 4,
    "max_digits": 1,
    "question": "{expression}",
    "reply": "sum_steps",
    "extract": "equals",
}
LONGEST, RATE = 28, 5e-4
KS = (1, 2, 4, 8, 16, 32, 64)
ETA = 0.5  # of the replayed divergence in (b)
FULL = {
    "toy_seeds": 6,
    "toy_steps": 600,
    "fit": 1500,
    "seeds": 2,
    "base": 120,
    "steps": 40,
    "size": 300,
    "pool": 300,
    "asked": 32,
}
QUICK = {
    "toy_seeds": 2,
    "toy_steps": 30,
    "fit": 300,
    "seeds": 1,
    "base": 3,
    "steps": 2,
    "size": 24,
    "pool": 12,
    "asked": 4,
}


@reproduces(4, full=FULL, quick=QUICK, parallel=True)
def reproduce(job: Job) -> Findings:
    """Both experiments."""
    found = _run_all(job)
    toy, trained, base = found["toy"], found["arms"], found["base"]
    return Findings(
        setup=SETUP.format(**job.size, eta=ETA),
        directions=[*_toy_directions(toy), *_trained_directions(trained, base)],
        tables=[_toy_table(toy), *_trained_tables(trained, base)],
        figure=_figure(toy, trained, base),
        caption="Left: the tabular policy on what it had mastered, accuracy against strict pass@16, a cross for each "
        "arm (mean and standard error of the seeds). Middle and right: pass@k of the trained student relative to the "
        "initial one, on held-out sums that it had mastered and on the others.",
        reading=READING,
        differs=DIFFERS,
        numbers=found,
    )


# (b) A language model


def methods() -> "dict[str, Method]":
    from kullback.lm.methods.dph_rl import DPHRL
    from kullback.lm.methods.grpo import GRPO

    shared: dict[str, Any] = {"samples": 8, "max_completion": LONGEST}
    dph: dict[str, Any] = shared | {"attempts": 8, "threshold": 8, "replay": 64, "coefficient": ETA}
    near: dict[str, Any] = shared | {"reference": "initial", "penalty": 0.05}
    return {
        "GRPO, all prompts": GRPO(**shared),
        "eta = 0": DPHRL(**(dph | {"coefficient": 0.0})),
        "forward KL": DPHRL(**dph, divergence="forward_kl"),
        "2 JSD": DPHRL(**dph, divergence="2*jsd(0.5)"),
        "alpha 0.2": DPHRL(**dph, divergence="alpha(0.2)"),
        "4 H^2": DPHRL(**dph, divergence="4*squared_hellinger"),
        "reverse KL": DPHRL(**dph, divergence="reverse_kl"),
        "NLL": DPHRL(**dph, divergence="forward_kl", centred=False),
        "penalty, reverse KL": GRPO(**near, divergence="reverse_kl"),
        "penalty, k3 as released": GRPO(**near, divergence="forward_kl"),
    }


def names_of_arms() -> list[str]:
    return [*methods(), *(arm + TWICE for arm in FAST)]


def train_base(*, folder: Path, steps: int, pool: int, asked: int) -> dict[str, Any]:
    """The common start, held-out problems that it has mastered (15 of 16 answers right) and others, and its answers.

    The draw that decides is not the one that is measured.
    """
    from kullback.lm.methods.sft import SFT

    run = arms.train(
        SFT(max_completion=LONGEST),
        student="embedded:student",
        data=SUMS | {"size": 20_000, "held_out": 1},
        output=folder / "base",
        steps=steps,
        prompts_per_step=64,
        learning_rate=2e-3,
        seed=0,
        evaluate={"problems": 0},
    )
    first = answers_of(run.student, run.tokenizer, range(pool), pool, samples=16, seed=1)
    sure = [index for index, right in enumerate(first["right"]) if sum(right) >= 15]
    rest = [index for index in range(pool) if index not in set(sure)]
    problems = [*sure[:asked], *rest[:asked]]
    found = answers_of(run.student, run.tokenizer, problems, pool)
    return {"mastered": len(sure[:asked]), "problems": problems, "found": found}


def answers_of(
    model: Any, tokenizer: Any, problems: Sequence[int], pool: int, *, samples: int = KS[-1], seed: int = 0
) -> dict[str, Any]:
    """For some of `pool` held-out problems: which answers are right, how many right ones differ, -log p and tokens."""
    from kullback.lm.tasks import load_task

    task = load_task(SUMS | {"held_out": pool}, seed=0)
    asked = [task.held_out[place] for place in problems]
    seen = arms.ask(model, tokenizer, task, asked, samples=samples, longest=LONGEST, seed=seed)
    found: dict[str, list[Any]] = {"right": [], "different": [], "surprise": [], "tokens": []}
    for rows in map(seen.of, range(len(problems))):
        right, texts = (seen.grades["accuracy"][rows] == 1).int().tolist(), seen.texts[rows]
        found["right"].append(right)
        found["different"].append(len({text for text, good in zip(texts, right, strict=True) if good}))
        found["surprise"].append(-float(seen.log_prob[rows].sum()))
        found["tokens"].append(sum(map(len, texts)))
    return found


FAST = ("GRPO, all prompts", "eta = 0", "forward KL")  # these are also trained at twice the learning rate
TWICE = ", twice the rate"


def train_arm(
    *, folder: Path, arm: str, steps: int, size: int, seed: int, problems: Sequence[int], pool: int
) -> dict[str, Any]:
    """One arm from the common start, and what it answers afterwards."""
    run = arms.train(
        methods()[arm.removesuffix(TWICE)],
        student=str(folder / "base" / "model"),
        data=SUMS | {"size": size, "held_out": 1},
        output=folder / f"{arm}-{seed}",
        steps=steps,
        prompts_per_step=32,
        learning_rate=2 * RATE if arm.endswith(TWICE) else RATE,
        lr_schedule="cosine",
        warmup_steps=3,
        seed=seed,
        evaluate={"problems": 0},
    )
    path = [row.get("rollout/accuracy", math.nan) for row in run.metrics]
    return {"path": path, "found": answers_of(run.student, run.tokenizer, problems, pool)}


def summary(found: Mapping[str, Any], problems: Sequence[int]) -> dict[str, float]:
    """pass@k (unbiased), nats per token and different right answers, over some problems; nan without any."""
    from kullback.lm.evaluate import pass_at

    samples = len(found["right"][0])
    counts = [sum(found["right"][i]) for i in problems]
    numbers = {f"pass@{k}": [pass_at(right, samples, k) for right in counts] for k in KS if k <= samples}
    numbers["different"] = [found["different"][i] for i in problems]
    means = {name: statistics.fmean(values) if values else math.nan for name, values in numbers.items()}
    tokens = sum(found["tokens"][i] for i in problems)
    return means | {"entropy": sum(found["surprise"][i] for i in problems) / tokens if tokens else math.nan}


def _run_all(job: Job) -> dict[str, Any]:
    folder, size = job.folder, job.size
    names = list(TOY)
    half = -(-len(names) // job.processes)
    toy_jobs = [
        {"names": names[i : i + half], "seeds": size["toy_seeds"], "fit": size["fit"], "steps": size["toy_steps"]}
        for i in range(0, len(names), half)
    ]
    parts = job.spread(run_toy, toy_jobs, "tabular")
    toy = {name: found for part in parts for name, found in part.items()}
    base = train_base(folder=folder, steps=size["base"], pool=size["pool"], asked=size["asked"])
    todo = [
        {"folder": folder, "arm": arm, "seed": seed, "problems": base["problems"]}
        | {"steps": size["steps"], "size": size["size"], "pool": size["pool"]}
        for seed in range(size["seeds"])
        for arm in names_of_arms()
    ]
    done = job.spread(train_arm, todo, "arms")
    count = base["mastered"]
    groups = {"mastered": range(count), "open": range(count, len(base["problems"]))}
    trained: dict[str, list[dict[str, Any]]] = {arm: [] for arm in names_of_arms()}
    for one, run in zip(todo, done, strict=True):
        each = {name: summary(run["found"], places) for name, places in groups.items()}
        trained[one["arm"]].append(each | {"path": run["path"]})
    start = {name: summary(base["found"], places) for name, places in groups.items()}
    return {"toy": toy, "base": start | {"counts": {n: len(p) for n, p in groups.items()}}, "arms": trained}


# The page


def _gaps(found: Mapping[str, Any], a: str, b: str, key: str) -> tuple[bool, str]:
    """Whether a is above b in every seed, and the words for it."""
    gaps = Spread([x - y for x, y in zip(found[a][key], found[b][key], strict=True)])
    wins = sum(gap > 0 for gap in gaps.values)
    return wins == len(gaps.values), f"{gaps.mean:+.3f}, {wins} of {len(gaps.values)}"


def _toy_directions(toy: Mapping[str, Mapping[str, list[float]]]) -> list[Direction]:
    def over(other: str, keys: Sequence[str]) -> tuple[bool, str]:
        seen = {(name, key): _gaps(toy, name, other, key) for name in DPH for key in keys}
        low = {key: min(seen[name, key][1] for name in DPH) for key in keys}
        words = "; ".join(f"{key} {low[key]}" for key in keys)
        return all(held for held, _ in seen.values()), f"smallest of {len(DPH)} divergences: {words} seeds"

    plain = over("eta = 0", ("accuracy", "entropy", "strict"))
    grpo = over("GRPO, all prompts", ("entropy", "strict"))
    mean = {name: {key: statistics.fmean(values) for key, values in found.items()} for name, found in toy.items()}
    sweep = [
        mean[name]["strict"] for name in ("forward KL, eta 0.00125", "forward KL, eta 0.0125", "forward KL, eta 0.1")
    ]
    sweep.append(mean["forward KL"]["strict"])
    spread = [mean[name]["strict"] for name in DPH]
    accuracy = mean["forward KL"]["accuracy"]
    nll, kl = mean["NLL"], mean["forward KL"]
    penalty = mean["penalty, reverse KL"]
    return [
        Direction(
            "tabular, mastered prompts: replay above eta = 0 in accuracy, style entropy and strict pass@16",
            *plain,
            True,
        ),
        Direction("tabular, mastered prompts: replay above GRPO in style entropy and strict pass@16", *grpo, True),
        Direction(
            "tabular: a mass-covering divergence does better than reverse KL, replayed (strict pass@16, by 0.02)",
            max(mean[name]["strict"] for name in DPH[:-1]) > mean["reverse KL"]["strict"] + 0.02,
            f"all {len(DPH)} divergences lie in {min(spread):.3f} to {max(spread):.3f}",
        ),
        Direction(
            "tabular: a reverse KL penalty on all prompts loses diversity (strict pass@16 under forward KL replay)",
            penalty["strict"] < kl["strict"],
            f"{penalty['strict']:.3f} against {kl['strict']:.3f}, at accuracy {penalty['accuracy']:.3f} against "
            f"{kl['accuracy']:.3f}",
        ),
        Direction(
            "tabular: replay keeps the accuracy of the initial policy on mastered prompts",
            accuracy > mean["initial"]["accuracy"] - 0.01,
            f"{accuracy:.3f} against {mean['initial']['accuracy']:.3f}",
        ),
        Direction(
            "tabular: strict pass@16 grows with eta (0.00125, 0.0125, 0.1, 1)",
            sweep == sorted(sweep),
            ", ".join(f"{value:.3f}" for value in sweep),
            claimed=False,
        ),
        Direction(
            "tabular: plain rehearsal keeps accuracy and not diversity",
            nll["accuracy"] > kl["accuracy"] and nll["strict"] < kl["strict"] - 0.05,
            f"accuracy {nll['accuracy']:.3f} against {kl['accuracy']:.3f}, strict {nll['strict']:.3f} against "
            f"{kl['strict']:.3f}",
            claimed=False,
        ),
    ]


def _trained_directions(trained: Mapping[str, Any], base: Mapping[str, Any]) -> list[Direction]:
    def mean(arm: str, group: str, key: str) -> float:
        return statistics.fmean(run[group][key] for run in trained[arm])

    def above(group: str, key: str, other: str) -> tuple[bool, str]:
        values = {arm: mean(arm, group, key) for arm in DPH}
        low = min(values, key=values.__getitem__)
        reference = mean(other, group, key)
        return values[low] > reference, f"lowest {values[low]:.3f} ({low}) against {reference:.3f}"

    large = max(int(name[5:]) for name in base["open"] if name.startswith("pass@"))
    forgotten = {arm: base["mastered"]["pass@1"] - mean(arm, "mastered", "pass@1") for arm in trained}
    worst = max(DPH, key=forgotten.__getitem__)
    return [
        Direction(
            "sums, mastered: every replayed divergence keeps more pass@1 than eta = 0",
            *above("mastered", "pass@1", "eta = 0"),
        ),
        Direction(
            "sums, mastered: none of them loses more than 0.02 of the initial pass@1",
            forgotten[worst] < 0.02,
            f"most forgotten {forgotten[worst]:+.3f} ({worst}); eta = 0 {forgotten['eta = 0']:+.3f}, "
            f"GRPO {forgotten['GRPO, all prompts']:+.3f}",
        ),
        Direction(
            f"sums, open: every one has a higher pass@{large} than GRPO",
            *above("open", f"pass@{large}", "GRPO, all prompts"),
        ),
        Direction(
            "sums, open: every one writes more different right answers than GRPO",
            *above("open", "different", "GRPO, all prompts"),
        ),
        Direction(
            "sums, open: every one has a higher entropy than GRPO", *above("open", "entropy", "GRPO, all prompts")
        ),
        Direction(
            "sums at twice the learning rate, mastered: forward KL replay keeps more pass@1 than GRPO and eta = 0",
            mean(f"forward KL{TWICE}", "mastered", "pass@1")
            > max(mean(arm + TWICE, "mastered", "pass@1") for arm in FAST[:2]),
            ", ".join(f"{mean(arm + TWICE, 'mastered', 'pass@1'):.3f} ({arm})" for arm in reversed(FAST)),
        ),
        Direction(
            "sums, open: pass@1 rises in every replay arm",
            all(mean(arm, "open", "pass@1") > base["open"]["pass@1"] for arm in DPH),
            f"from {base['open']['pass@1']:.3f} to " + ", ".join(f"{mean(arm, 'open', 'pass@1'):.3f}" for arm in DPH),
            claimed=False,
        ),
    ]


def _toy_table(toy: Mapping[str, Mapping[str, list[float]]]) -> Table:
    keys = {
        "accuracy": "mastered: accuracy",
        "strict": "strict pass@16",
        "entropy": "style entropy",
        "open accuracy": "open: accuracy",
        "open strict": "strict pass@16",
    }

    def cell(values: list[float]) -> str:
        spread = Spread(values)
        return f"{spread.mean:.3f}" + ("" if math.isnan(spread.error) else f" ± {spread.error:.3f}")

    rows = [[name, *(cell(found[key]) for key in keys)] for name, found in toy.items()]
    seeds = len(next(iter(toy.values()))["accuracy"])
    return Table(
        "(a) The tabular policy",
        ["arm", *keys.values()],
        rows,
        f"Mean ± standard error of {seeds} seeds; every number of a seed is exact. Entropy in nats, at most "
        f"{math.log(len(STYLES)):.3f}.",
    )


def _trained_tables(trained: Mapping[str, Any], base: Mapping[str, Any]) -> list[Table]:
    ks = [name for name in base["open"] if name.startswith("pass@")]
    tables = []
    for group, title in (("mastered", "that the start had mastered"), ("open", "that it had not")):
        rows: list[list[Any]] = [["initial", *(f"{base[group][key]:.3f}" for key in (*ks, "entropy", "different"))]]
        for arm, runs in trained.items():
            spreads = [Spread([run[group][key] for run in runs]) for key in (*ks, "entropy", "different")]
            error = spreads[0].error
            cells = [f"{spread.mean:.3f}" for spread in spreads]
            rows.append([arm, cells[0] + ("" if math.isnan(error) else f" ± {error:.3f}"), *cells[1:]])
        note = f"{base['counts'][group]} held-out sums, 64 answers each; pass@k unbiased; entropy in nats per token; "
        note += (
            "different: right answers of a problem that are not the same text. Mean of the seeds, ± its standard error."
        )
        tables.append(Table(f"(b) Held-out sums {title}", ["arm", *ks, "entropy", "different"], rows, note))
    return tables


def _figure(toy: Mapping[str, Any], trained: Mapping[str, Any], base: Mapping[str, Any]) -> Any:
    figure, (left, middle, right) = new_figure(3, width=4.2, height=3.6)
    swept = [name for name in toy if ", eta " in name]
    for place, (name, found) in enumerate(toy.items()):
        x, y = Spread(found["accuracy"]), Spread(found["strict"])
        color = "0.6" if name in swept else COLORS[place % len(COLORS)]
        left.errorbar(x.mean, y.mean, xerr=x.error, yerr=y.error, fmt="o", ms=4, lw=1, color=color)
    below = ("eta = 0", "GRPO, all prompts", "forward KL, eta 0.1", "forward KL, eta 0.0125")
    shown = ["initial", "GRPO, all prompts", "eta = 0", "forward KL", "NLL", "penalty, reverse KL", *swept]
    for name in shown:
        at = (statistics.fmean(toy[name]["accuracy"]), statistics.fmean(toy[name]["strict"]))
        text = "five divergences, eta 1" if name == "forward KL" else name.removeprefix("forward KL, ")
        shift = (-4, -11 if name in below else 6)
        left.annotate(text, at, shift, textcoords="offset points", fontsize=6.5, ha="right")
    left.margins(x=0.3, y=0.1)
    left.set_xlabel("accuracy on mastered prompts")
    left.set_ylabel("strict pass@16 on mastered prompts")
    ks = [int(name[5:]) for name in base["open"] if name.startswith("pass@")]
    for axis, group in ((middle, "mastered"), (right, "open")):
        for arm, runs in trained.items():
            curve = [statistics.fmean(run[group][f"pass@{k}"] for run in runs) - base[group][f"pass@{k}"] for k in ks]
            style = "-" if arm in DPH else ":" if arm.endswith(TWICE) else "--"
            color = COLORS[list(trained).index(arm.removesuffix(TWICE))]
            axis.plot(ks, curve, style, color=color, lw=1.3, label=arm)
        axis.axhline(0, color="0.7", lw=0.8, zorder=0)
        axis.set_xlim(0.9 * ks[0], 1.1 * ks[-1])  # also where a quick run masters nothing and all curves are nan
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.set_xlabel("k")
        axis.set_title(f"{group} sums", fontsize=9)
    middle.set_ylabel("pass@k - initial pass@k")
    right.legend(fontsize=6, frameon=False)
    return figure


COLORS = (
    "#000000", "#888888", "#0072b2", "#d55e00", "#009e73", "#b5529b", "#e69f00", "#56b4e9", "#7a5c3e", "#a03030",
)  # fmt: skip

SETUP = """\
(a) 128 prompts of 16 random features; a network of 64 tanh units chooses one of 24 answers, 6 classes times 4 styles.
The initial policy is fitted ({fit} Adam steps) to a class distribution that is right with 0.97 on 40 % of the prompts
and with about 0.24 to 0.6 on the others, times the styles (.4, .3, .2, .1). Any style of the right class is rewarded.
Mastered: 8 of 8 answers right; of 4 further answers to each mastered prompt the right ones are kept. Then {toy_steps}
Adam steps (3e-3) of 32 prompts with 8 answers each and, beside them, 64 kept answers; each mean by itself, eta 1 unless
said. Strict pass@16 asks for one hidden style of each prompt, drawn from the styles. The penalties (0.05) act on
all prompts and use no replay. {toy_seeds} seeds.

(b) reasoning-gym's `chain_sum`, two to four one-digit numbers. The shipped student (105 thousand parameters) is
fine-tuned for {base} steps on worked solutions of all three lengths; this is the initial policy of every arm. Then
{steps} steps of 32 prompts with 8 answers each on {size} training sums, AdamW at 5e-4 falling as a cosine: `grpo`
on all of them, or `dph_rl`, which first draws 9 answers to each, takes those with 8 of 8 right for mastered, keeps the
ninth where it is right, and replays 64 kept answers a step with eta {eta:g}. NLL is the forward KL with its textbook
generator. Penalties have coefficient 0.05. Measured on held-out sums; which of them the start had mastered (15 of 16
right) was decided on other answers than those of the table. Three arms are repeated at 1e-3.
{seeds} seeds, which share the start."""

READING = (
    "In (a) replay keeps much of the accuracy that is forgotten without it, and most of the variety of answers; "
    "it stays below the initial policy and below GRPO in accuracy on mastered prompts. Which divergence is "
    "replayed matters little: all have like curvature near equality, and replay keeps the student near it. "
    "Reverse KL, estimated on the initial policy's text, does as well as the others. A reverse KL penalty on all "
    "prompts keeps both accuracy and diversity, because its optimum is the initial policy tilted by the reward: "
    "that reverse KL collapses diversity is not seen at this scale. Plain rehearsal keeps accuracy and not "
    "variety. In (b) there is little to rescue at the smaller learning rate: sums are learned together, nothing "
    "is forgotten without replay, and replay does not help. At twice the rate both arms without replay lose a "
    "tenth of pass@1 on what they had mastered, and forward KL replay loses little: there it steadies training; "
    "that rate was added after a trial at it had shown GRPO losing its way. The largest pass@k is near 1 for "
    "every arm and tells them not apart. `k3` as a loss on own samples has the expected gradient of forward KL: "
    "the released reverse KL baseline is that."
)

DIFFERS = (
    "The learning rate of the runs on sums, 5e-4 with a cosine, was chosen after a trial at a constant 1e-3 (one seed) "
    "in which GRPO collapsed: mastered prompts 0.445, eta = 0 0.613, forward KL 0.885.",
    "A tabular policy and a model of 105 thousand parameters on sums, not Llama and Qwen on SQL and mathematics; "
    "larger learning rates and far fewer steps.",
    "Each term is a mean of its own. The official runs pool 256 replayed and 2048 fresh sequences, so that their "
    "coefficient 0.01 is an eta of about 0.00125, which in (a) does next to nothing.",
    "Everything is drawn at temperature 1 from the whole distribution. The official replay is drawn with top-p 0.9, "
    "so it is not the initial policy's.",
    "Mastered means 8 of 8; the paper reports 6 and 7 of 8 for its two models.",
    "No Jensen-Shannon in its definition form, whose released half has another gradient than it names.",
    "In (b) the clamp of the official forward KL (10 nats a token) acts on every divergence.",
)
