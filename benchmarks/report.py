"""docs/performance.md and its figures, from the JSON files under results/: every number on the page was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import harness

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
IMAGES = PAGE.parent / "images"

OPENING = """# Performance

Written by `python -m benchmarks` from the JSON files in `benchmarks/results/`; run it to get the numbers of your own
machine. Contestants take turns in one process; before anything is timed their values and gradients are compared.
"""

LINEAR = """## The fused linear divergence

`D.linear(target_hidden, target_head, model_hidden, model_head).mean()` and both gradients, {dtype}, H = {width},
V = {vocab:,}. **L** is the time of the four `torch.mm` that no exact loss can do without, into memory that is already
there; the other columns are multiples of it, medians over {repeats} rounds of the
ratio within the round. Peer loss off, defaults otherwise; TRL and
Liger know the KLs and the JSD only. In brackets: the memory in MiB that one call adds at its peak, gradients included
(the gradients alone: {gradients:.0f} MiB at N = {most:,}).
"""

OVERHEAD = """## What the divergence adds to the products

Total time of one compiled call over the time of its own matrix products, from a profile of the same run, for every
member of the family at its default parameter and for a user's f; N = {tokens:,}, H = {width}, V = {vocab:,}, float32.
A machine whose speed drifts blurs this less than it blurs the ratio to L.

| divergence | total / products |
|---|---|
"""

SKIPPING = """## Leaving out columns: `gradient_tolerance`

Reverse KL, N = {tokens:,}, H = {width}, V = {vocab:,}, float32, on synthetic distributions with a
Zipf unigram and {entropy:.2f} nats of entropy (how they are made: `benchmarks/skipping.py`). *Error* is the relative
Frobenius norm of the difference to the exact gradient; bfloat16 rounds to 2e-3 to 4e-3. Values are exact. It is off by
default: a row of the head that is left out gets gradient 0, and Adam would have rescaled the small one it had.
"""


def write(results: Path = harness.RESULTS, page: Path = PAGE, images: Path = IMAGES) -> Path:
    images.mkdir(parents=True, exist_ok=True)
    parts = [OPENING]
    for name, section in (("linear", linear), ("overhead", overhead), ("skipping", skipping)):
        path = results / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            parts += [section(result, images), about(result)]
    page.write_text("\n".join(parts).rstrip() + "\n")
    return page


def about(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    loads = [load for load in result["other_load"] if load is not None]
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
    rows = result["rows"]
    sizes = sorted({row["tokens"] for row in rows})
    who = [w for w in dict.fromkeys(row["who"] for row in rows) if w != "L"]
    most = sizes[-1]
    lines = [
        LINEAR.format(
            dtype=result["dtype"],
            width=result["width"],
            vocab=result["vocab"],
            repeats=result["repeats"],
            gradients=4 * result["width"] * (result["vocab"] + most) / 2**20,
            most=most,
        )
    ]
    for tokens in sizes:
        lines += [f"N = {tokens:,}\n", "| divergence | L, seconds | " + " | ".join(who) + " |"]
        lines.append("|---|---|" + "---|" * len(who))
        for name in dict.fromkeys(row["divergence"] for row in rows):
            cells = {r["who"]: r for r in rows if r["tokens"] == tokens and r["divergence"] == name}
            if cells:
                shown = [_cell(cells.get(w)) for w in who]
                lines.append(f"| {name} | {cells['L']['median']:.3f} | " + " | ".join(shown) + " |")
        lines.append("")
    _bars(rows, sizes[-1], who, images / "performance-linear.png")
    return "\n".join([*lines, "![Time over the limit](images/performance-linear.png)\n"])


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
    lines = [SKIPPING.format(**result)]
    lines += [
        "| divergence | tolerance | columns kept | time, L | error, hidden states | error, head |",
        "|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        lines.append(
            f"| {r['divergence']} | {r['tolerance']:.0e} | {r['kept']:.1%} | {r['over_limit']:.2f} | "
            f"{r['error_hidden']:.1e} | {r['error_head']:.1e} |"
        )
    _curve(result["rows"], images / "performance-skipping.png")
    return "\n".join([*lines, "", "![Error and time](images/performance-skipping.png)\n"])


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
    for name in dict.fromkeys(row["divergence"] for row in rows):
        found = [r for r in rows if r["divergence"] == name and r["error_head"] > 0]
        axes.plot(
            [max(r["error_head"], r["error_hidden"]) for r in found], [r["over_limit"] for r in found], "o-", label=name
        )
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
