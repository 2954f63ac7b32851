"""docs/performance.md and its figures, from the JSON files under results/: every number on the page was measured."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import harness

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
IMAGES = PAGE.parent / "images"

OPENING = """# Performance

Written by `python -m benchmarks` from the JSON files in `benchmarks/results/`; run it to get the numbers of your own
machine. Contestants take turns in one process; before anything is timed their values and gradients are compared.
"""

LINEAR = """## The fused linear divergence

`D.linear(target_hidden, target_head, model_hidden, model_head).mean()` and both gradients, {dtype} on {device}, H =
{width}. **L** is the time of the four `torch.mm` that no exact loss can do without, into memory that is already there;
the other columns are multiples of it, medians of the ratio within a round. A loss below 1 makes its products faster
than `torch.mm` does (`kullback/divergence/products.py`). In brackets: the memory in MiB that one call adds at its peak,
gradients included. {other}

**Against others**, N = {tokens:,}, V = {vocab:,}; {repeats} rounds, but one for those that are far from the rest
(naive, TRL, Liger eager). Peer's hard loss off, defaults otherwise; TRL and Liger know these three only.
The gradients alone are {gradients:,.0f} MiB.
"""

MEMBERS = """**Every member** at its default parameter, a combination and a user's f, in turn with L.

| divergence | N | L, seconds | kullback | over reverse KL |
|---|---|---|---|---|
"""

THREE = """**One product fewer.** L is here the time of the three `torch.mm` that are left.

| case | N | L, seconds | kullback |
|---|---|---|---|
"""

GROWTH = """**Growth**, reverse KL: time per token and per logit, and memory beyond the gradients.

| N | V | seconds | ms per token | ns per logit | kullback, L | MiB beyond the gradients |
|---|---|---|---|---|---|---|
"""

OVERHEAD = """## What the divergence adds to the products

Total time of one compiled call over the time of its own matrix products, from a profile of the same run, for every
member of the family at its default parameter and for a user's f; N = {tokens:,}, H = {width}, V = {vocab:,}, float32.
A machine whose speed drifts blurs this less than it blurs the ratio to L.

| divergence | total / products |
|---|---|
"""

SKIPPING = """## Leaving out columns: `gradient_tolerance`

Tokens: {tokens:,} (fewer where said), H = {width}, V = {vocab:,}, float32, of a small language model trained by
`benchmarks/trained.py`: student and teacher are two of its checkpoints. {texts} *Error* is the relative
Frobenius norm of the difference to the exact gradient, the documented bound in brackets; bfloat16 rounds to 2e-3 to
4e-3. Values are exact. It is off by default: what is left of a small gradient in a row of the head is coarse, and Adam
takes it as seriously as a large one.
"""

STATISTICS = """## Numbers per token

`linear_statistics` from hidden states and heads, without gradient; N = {tokens:,}, H = {width}, V = {vocab:,}, float32,
medians over {repeats} rounds. **L2** is the time of the two `torch.mm` that make the logits of both sides, into memory
that is already there. *All* is log-probability and entropy of both, forward and reverse KL, JSD, squared Hellinger,
Bhattacharyya, the overlap of the {k} likeliest and agreement. *Naive* keeps both log-softmaxes whole.

| numbers | | seconds | time, L2 | MiB added at the peak |
|---|---|---|---|---|
"""

STEPS = """## Whole steps: distillation, GRPO, DPO

Writing where the student writes, forward, loss, backward and optimiser, against TRL's `DistillationTrainer`,
`GRPOTrainer` and `DPOTrainer`: same weights, token ids, batch, generated lengths, {dtype}, AdamW, no gradient
checkpointing; TRL's other settings at their defaults, its logging off. Tokens are those of the scored completions;
ratio and memory are medians over {turns} turns, each in a process of its own; memory is the peak of a step beyond what
the imports took: weights, optimiser and activations. On fixed text the losses of all steps agree to a relative 1e-4
and the norms of their gradients to 1e-3; where the student writes, two smaller steps on fixed text are compared first.
TRL has no off-policy mode: its sampling is replaced by a look-up of the fixed completions.

Qwen3 with random weights and V = 32,768 (the embedded pair: V = 103); 8 prompts (16) of 64 to 128 tokens (6 to 20).
Small: student 4 layers of width 256, teacher 8 of 512; wider: 4 of 512 and 8 of 1,024. GRPO and DPO train the student:
eight samples of each prompt graded by one function for both; pairs that are new at every step.
"""

ROLLOUTS = """## Rollouts

{samples} samples of each prompt, tokens per second over {repeats} rounds. TRL is `GRPOTrainer`'s own transformers
generation; *with log-probs* adds the forward by which it gets the behaviour policy's log-probabilities where text and
training steps are not aligned. Ours come from the sampling pass. The ratios are those of all rounds together and, in
brackets, the median over rounds: one text that does not end keeps TRL's whole batch going. Memory is what one call adds
at its peak.

*Embedded teacher*: on its task. *Long tail*: untrained, of the same size, so that lengths spread up to the limit.

| model | rows, limit | length, mean | | tokens / s | over text alone | over text with log-probs | MiB |
|---|---|---|---|---|---|---|---|
"""


def write(results: Path = harness.RESULTS, page: Path = PAGE, images: Path = IMAGES) -> Path:
    images.mkdir(parents=True, exist_ok=True)
    parts = [OPENING]
    sections = (linear, overhead, skipping, statistics, steps, rollouts)
    for name, section in ((section.__name__, section) for section in sections):
        path = results / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            parts += [section(result, images), about(result)]
    page.write_text("\n".join(parts).rstrip() + "\n")
    return page


def about(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    pieces = [result, *result.get("pieces", {}).values()]
    loads = [load for piece in pieces for load in piece.get("other_load", []) if load is not None]
    busy = (
        f"; other processes kept {min(loads):g} to {max(loads):g} cores busy between the measurements" if loads else ""
    )
    note = " **Not an idle machine: compare the ratios only with care.**" if loads and max(loads) > harness.BUSY else ""
    note = f" {result['note']}{note}" if "note" in result else note
    return (
        f"<small>{result['when']}; {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['capability']}; Python {machine['python']}, {versions}{busy}.</small>{note}\n"
    )


def linear(result: dict[str, Any], images: Path) -> str:
    pieces = result["pieces"]
    size = {"gradients": _gradients(result, result["tokens"], result["vocab"])}
    other = "On a GPU: unmeasured." if result["device"] == "cpu" else ""
    lines = [LINEAR.format(**result, **size, other=other)]
    peers = [row for name in pieces for row in pieces[name]["rows"] if name not in ("members", "three", "growth")]
    if peers:
        who = [w for w in dict.fromkeys(row["who"] for row in peers) if w != "L"]
        lines += ["| divergence | L, seconds | " + " | ".join(who) + " |", "|---|---|" + "---|" * len(who)]
        for name in dict.fromkeys(row["divergence"] for row in peers):
            cells = {r["who"]: r for r in peers if r["divergence"] == name}
            shown = [_cell(cells.get(w)) for w in who]
            lines.append(f"| {name} | {cells['L']['median']:.3f} | " + " | ".join(shown) + " |")
        _bars(peers, result["tokens"], who, images / "performance-linear.png")
        lines.append("\n![Time over the limit](images/performance-linear.png)\n")
    for name, table in (("members", _members), ("three", _three), ("growth", _growth)):
        if name in pieces:
            lines += [table(result, pieces[name]["rows"])]
    return "\n".join([*lines, *(f"{name}: {about(piece)}" for name, piece in pieces.items())])


def _members(result: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    limit, *ours = rows
    base = next(row for row in ours if row["divergence"] == "reverse_kl")
    lines = []
    for row in ours:
        over = _ratio(row["seconds"], base["seconds"])
        lines.append(f"| {row['divergence']} | {row['tokens']:,} | {limit['median']:.3f} | {_cell(row)} | {over:.3f} |")
    return MEMBERS + "\n".join([*lines, ""])


def _three(result: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = []
    for name in dict.fromkeys(row["divergence"] for row in rows):
        limit, ours = (row for row in rows if row["divergence"] == name)
        lines.append(f"| {name} | {ours['tokens']:,} | {limit['median']:.3f} | {_cell(ours)} |")
    return THREE + "\n".join([*lines, ""])


def _growth(result: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in (row for row in rows if row["who"] != "L"):
        tokens, vocab, spent = row["tokens"], row["vocab"], row["median"]
        more = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20 - _gradients(result, tokens, vocab)
        beyond = "" if more is None else f"{more:,.0f}"
        lines.append(
            f"| {tokens:,} | {vocab:,} | {spent:.3f} | {1e3 * spent / tokens:.3f} | {1e9 * spent / tokens / vocab:.1f} "
            f"| {row['over_limit']:.2f} | {beyond} |"
        )
    return GROWTH + "\n".join([*lines, ""])


def _gradients(result: dict[str, Any], tokens: int, vocab: int) -> float:
    """MiB of the gradients of hidden states and head."""
    return float((4 if result["dtype"] == "float32" else 2) * result["width"] * (vocab + tokens) / 2**20)


def _ratio(seconds: list[float], base: list[float]) -> float:
    """The median over rounds of the ratio."""
    return median(a / b for a, b in zip(seconds, base, strict=True))


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    memory = "" if row["peak_bytes"] is None else f" ({row['peak_bytes'] / 2**20:,.0f})"
    ratio = f"{row['over_limit']:.2f}"
    return (f"**{ratio}**" if row["who"] == "kullback" else ratio) + memory


def overhead(result: dict[str, Any], images: Path) -> str:
    rows = [f"| {row['divergence']} | {row['over_products']:.3f} |" for row in result["rows"]]
    return OVERHEAD.format(**result) + "\n".join(rows) + "\n"


def skipping(result: dict[str, Any], images: Path) -> str:
    entropies = [
        f"Text *{text}*: {of['tokens']:,} tokens, entropy of the student {of['student']:.2f} nats, of the teacher "
        f"{of['teacher']:.2f}."
        for text, of in result["entropy"].items()
    ]
    lines = [SKIPPING.format(**result, texts=" ".join(entropies))]
    lines += [
        "| text | divergence | tolerance | columns kept | time, L | error, hidden states | error, head |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        lines.append(
            f"| {r['text']} | {r['divergence']} | {r['tolerance']:.0e} | {r['kept']:.1%} | {r['over_limit']:.2f} | "
            f"{r['error_hidden']:.1e} ({r['bound_hidden']:.1e}) | {r['error_head']:.1e} ({r['bound_head']:.1e}) |"
        )
    _curve(result["rows"], images / "performance-skipping.png")
    return "\n".join([*lines, "", "![Error and time](images/performance-skipping.png)\n"])


def statistics(result: dict[str, Any], images: Path) -> str:
    lines = []
    for row in result["rows"]:
        memory = f"{row['peak_bytes'] / 2**20:,.0f}" if row["peak_bytes"] is not None else ""
        lines.append(f"| {row['what']} | {row['who']} | {row['median']:.3f} | {row['over_limit']:.2f} | {memory} |")
    return STATISTICS.format(**result) + "\n".join(lines) + "\n"


def steps(result: dict[str, Any], images: Path) -> str:
    pieces = result["pieces"]
    turns = " or ".join(sorted({str(len(row["seconds"])) for piece in pieces.values() for row in piece["rows"]}))
    lines = [STEPS.format(turns=turns, dtype=result["dtype"])]
    below: list[str] = []
    lines.append("| step | TRL, tokens/s | kullback, tokens/s | ratio | TRL, MiB | kullback, MiB | measured |")
    lines.append("|---|---|---|---|---|---|---|")
    for name, piece in pieces.items():
        trl, ours = ({row["who"]: row for row in piece["rows"]}[who] for who in ("TRL", "kullback"))
        memory = [f"{r['peak_bytes'] / 2**20:,.0f}" if r["peak_bytes"] else "" for r in (trl, ours)]
        lines.append(
            f"| {name} | {trl['tokens_per_second']:,.0f} | {ours['tokens_per_second']:,.0f} | "
            f"**{ours['speed_over_trl']:.2f}** | {' | '.join(memory)} | {piece['when']} |"
        )
        if ours.get("bare_seconds"):
            bare, mine, theirs = (
                1e3 * x for x in (ours["bare_seconds"], *(median(row["seconds"]) for row in (ours, trl)))
            )
            below.append(
                f"{name[0].upper()}{name[1:]}: the bare passes of both models and the optimiser, without heads, loss "
                f"and anything around them, take {bare:.1f} ms of a step, TRL {theirs:.1f}, kullback {mine:.1f}. 1.5 "
                f"times TRL's speed would be {theirs / 1.5:.1f} ms: with models and a vocabulary this small there is "
                "hardly a loss to save on.\n"
            )
    return "\n".join([*lines, "", *below])


def rollouts(result: dict[str, Any], images: Path) -> str:
    lines = []
    for name, piece in result["pieces"].items():
        for row in piece["rows"]:
            over = " | ".join(f"{total:.2f} ({middle:.2f})" for total, middle in row["over"].values())
            memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
            lines.append(
                f"| {name} | {row['rows']}, {row['limit']} | {row['mean_length']:.0f} | {row['who']} | "
                f"{row['tokens_per_second']:,.0f} | {over} | {memory} |"
            )
    below = [
        f"{name}: {row['shares']['products']:.0%} of the time of our loop, not compiled, are matrix products "
        f"and {row['shares']['attention']:.0%} attention, by a profile of one call.\n"
        for name, piece in result["pieces"].items()
        for row in piece["rows"]
        if row.get("shares")
    ]
    return ROLLOUTS.format(**result) + "\n".join([*lines, "", *below])


def _bars(rows: list[dict[str, Any]], tokens: int, who: list[str], path: Path) -> None:
    figure, axes = _axes()
    names = list(dict.fromkeys(row["divergence"] for row in rows))
    width = 0.8 / len(who)
    for i, one in enumerate(who):
        found = {r["divergence"]: r["over_limit"] for r in rows if r["who"] == one and r["tokens"] == tokens}
        at = [names.index(n) + i * width for n in found]
        axes.bar(at, list(found.values()), width, label=one)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(names))], names)
    axes.set_ylabel("time / L")
    axes.set_title(f"Loss and gradients, N = {tokens:,}")
    axes.legend(fontsize=8)
    _save(figure, path)


def _curve(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axes = _axes()
    for text, name in dict.fromkeys((row["text"], row["divergence"]) for row in rows):
        found = [r for r in rows if (r["text"], r["divergence"]) == (text, name) and r["error_head"] > 0]
        errors = [max(r["error_head"], r["error_hidden"]) for r in found]
        axes.plot(errors, [r["over_limit"] for r in found], "o-", label=f"{name}, {text}")
    axes.axvline(2**-8, color="black", linewidth=0.8, linestyle=":", label="bfloat16 rounding")
    axes.set_xscale("log")
    axes.set_xlabel("relative error of the gradient (the larger of the two)")
    axes.set_ylabel("time / L")
    axes.legend(fontsize=8)
    _save(figure, path)


def _axes() -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4))
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
