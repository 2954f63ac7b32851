"""Static figures for pages and papers: accuracy against entropy, pass@k, curves. PNG, SVG or PDF, by the file's ending.

Two layers: `accuracy_entropy`, `pass_at_k` and `curve` take run directories; `points` and `lines` take plain numbers,
for experiments that have no run directory.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kullback.report.curves import smoothed
from kullback.report.result import models
from kullback.report.runs import RunData, load_runs, metric, pass_at
from kullback.report.style import COLORS, Style, styles
from kullback.report.table import ACCURACY, Runs
from kullback.run.directory import to_float

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = ("-", (0, (6, 3)), (0, (2, 3)), (0, (8, 3, 2, 3)))
SHAPES = ("o", "s", "^", "D")
ANCHORS: dict[str, dict[str, Any]] = {
    "untrained": {"color": "#6b7480", "marker": "o", "markerfacecolor": "white", "linestyle": (0, (1, 2))},
    "teacher": {"color": "#16191d", "marker": "*", "markersize": 10, "linestyle": (0, (1, 2))},
}
LOOK: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3ae",
    "axes.labelcolor": "#33383f",
    "axes.grid": True,
    "grid.color": "#eceff2",
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": "#4d5561",
    "ytick.color": "#4d5561",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "kullback",  # the same numbers give the same file
}


def accuracy_entropy(runs: Runs, out: str | os.PathLike[str], *, title: str = "Accuracy against entropy") -> Path:
    """One point per model (untrained, teacher, each run) with one standard error each way; nats per token."""
    data = _runs(runs)
    found: dict[str, tuple[Any, Any]] = {}
    looks = []
    for label, kind, look, metrics in models(data, styles(data)):
        y, x = metric(metrics, ACCURACY.name), metric(metrics, "entropy")
        if x and y:
            found[label] = (x, y)
            looks.append(_look(look, kind))
    return points(found, out, x_label="entropy, nats per token", y_label="accuracy (avg@k)", title=title, looks=looks)


def pass_at_k(runs: Runs, out: str | os.PathLike[str], *, title: str = "pass@k") -> Path:
    """pass@k against k (logarithmic) per model, with one standard error."""
    data = _runs(runs)
    found: dict[str, tuple[list[Any], ...]] = {}
    looks = []
    for label, kind, look, metrics in models(data, styles(data)):
        if solved := pass_at(metrics):
            values = list(solved.values())
            found[label] = (list(solved), [value for value, _ in values], [error for _, error in values])
            looks.append(_look(look, kind))
    return lines(
        found,
        out,
        x_label="k, samples per problem",
        y_label="pass@k",
        title=title,
        looks=looks,
        markers=True,
        log2_x=True,
    )


def curve(runs: Runs, key: str, out: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """One logged scalar of metrics.jsonl against the step, smoothed over what was logged, all runs on one axis.

    Raises:
        ValueError: no run has logged `key`.
    """
    data = _runs(runs)
    figure, axes = _new()
    drawn = False
    for run, look in zip(data, styles(data), strict=True):
        logged = [(to_float(row["step"]), to_float(row[key])) for row in run.metrics if key in row and "step" in row]
        if not logged:
            continue
        drawn = True
        x, y = zip(*logged, strict=True)
        drawing = _look(look, "run")
        axes.plot(x, y, linestyle="none", marker=".", markersize=2, alpha=0.25, color=drawing["color"])
        axes.plot(x, smoothed(y), color=drawing["color"], linestyle=drawing["linestyle"], label=run.label)
    if not drawn:
        known = sorted({name for run in data for row in run.metrics[:1] for name in row} - {"step", "time"})
        raise ValueError(f"key={key!r}: no run has logged it; logged are {', '.join(known) or 'no metrics at all'}")
    return _finish(figure, axes, out, "step", key if title is None else "", key if title is None else title)


def points(
    values: Mapping[str, tuple[Any, Any]],
    out: str | os.PathLike[str],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    looks: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """A labelled point with error bars per entry. {label: (x, y)}, each a number or (value, standard error or None)."""
    figure, axes = _new()
    for i, (label, (x, y)) in enumerate(values.items()):
        (x, x_error), (y, y_error) = (end if isinstance(end, tuple) else (end, None) for end in (x, y))
        look = {**(looks[i] if looks else _look(Style(i % len(COLORS)), "run")), "linestyle": "none"}
        axes.errorbar(x, y, xerr=x_error, yerr=y_error, label=label, elinewidth=1.2, **look)
    return _finish(figure, axes, out, x_label, y_label, title)


def lines(
    values: Mapping[str, tuple[Sequence[Any], ...]],
    out: str | os.PathLike[str],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    looks: Sequence[Mapping[str, Any]] | None = None,
    markers: bool = False,
    log2_x: bool = False,
    log_y: bool = False,
) -> Path:
    """A line per entry. {label: (x, y) or (x, y, standard errors)}, each a sequence of one length."""
    figure, axes = _new()
    for i, (label, (x, y, *errors)) in enumerate(values.items()):
        look = dict(looks[i] if looks else _look(Style(i % len(COLORS)), "run"))
        if not markers:
            look["marker"] = ""
        bars = [to_float(error or 0.0) for error in errors[0]] if errors else None
        axes.errorbar(x, y, yerr=bars, label=label, elinewidth=1.2, **look)
    if log2_x:
        ticks = sorted({value for x, *_ in values.values() for value in x})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    if log_y:
        axes.set_yscale("log")
    return _finish(figure, axes, out, x_label, y_label, title)


def _runs(runs: Runs) -> Sequence[RunData]:
    return load_runs(runs).runs if not hasattr(runs, "runs") else runs.runs


def _look(look: Style, kind: str) -> dict[str, Any]:
    return ANCHORS.get(kind) or {
        "color": COLORS[look.color],
        "linestyle": LINES[look.dash],
        "marker": SHAPES[look.dash],
        "markersize": 6,
    }


def _new() -> tuple[Any, "Axes"]:
    import matplotlib

    matplotlib.use("agg", force=False)
    from matplotlib import pyplot

    with pyplot.rc_context(LOOK):
        figure, axes = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    return figure, axes


def _finish(figure: Any, axes: "Axes", out: str | os.PathLike[str], x_label: str, y_label: str, title: str) -> Path:
    from matplotlib import pyplot

    with pyplot.rc_context(LOOK):
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_title(title)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        out = Path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if out.suffix == ".svg" else None
        figure.savefig(out, dpi=160, metadata=metadata)
        pyplot.close(figure)
    return out
