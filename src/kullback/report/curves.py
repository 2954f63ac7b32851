"""The curves: every logged number against the optimiser step, smoothed, and thinned to keep the page small."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kullback.report.markup import escape, rounded
from kullback.report.runs import RunData

POINT_BUDGET = 14_000  # over all curves; longer logs are thinned for drawing, after smoothing
POINTS_PER_CURVE = (60, 240)
SMOOTHING = 0.05  # of a run's rows: the memory of the smoothed line

TITLES = {
    "loss": "loss",
    "rollout/accuracy": "accuracy of the student's text while training",
    "rollout/entropy": "entropy, nats per token",
    "rollout/length": "length, tokens per completion",
    "gradient_norm": "gradient norm",
    "learning_rate": "learning rate",
    "tokens": "scored tokens per step",
    "tokens_per_second": "tokens per second",
}


def section(data: dict[str, Any]) -> str:
    """Headings and room for the curves, in HTML."""
    if not data["curves"]:
        return '<h2>Curves</h2><p class="note">No metrics.jsonl with a logged step, so there are no curves.</p>'
    thinned = max((curve["every"] for curve in data["curves"]), default=1)
    about = f" Dots: every {_ordinal(thinned)} step, to keep the page small." if thinned > 1 else ""
    main = "".join(_figure(i, curve) for i, curve in enumerate(data["curves"]) if curve["main"])
    more = "".join(_figure(i, curve) for i, curve in enumerate(data["curves"]) if not curve["main"])
    more = f'<details><summary>More curves</summary><div><div class="grid">{more}</div></div></details>' if more else ""
    return (
        '<h2>Curves</h2><p class="soft small">Against the optimiser step. Dots are what was logged, lines are smoothed '
        f"(Gaussian, over {SMOOTHING:.0%} of the steps).{about}</p>"
        f'<div class="legend" id="legend"></div><div class="grid">{main}</div>{more}'
    )


def _figure(index: int, curve: dict[str, Any]) -> str:
    return (
        f'<figure><h3>{escape(curve["title"])}</h3><p class="help">{escape(curve["help"])}</p>'
        f'<div data-curve="{index}"></div></figure>'
    )


def curves(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Every logged scalar as {"key", "title", "help", "main", "every", "series": [{"run", "x", "y", "s"}]}.

    x: steps; y: the values as logged; s: the same smoothed. Values that are not finite are null, and break it.
    """
    keys = dict.fromkeys(key for run in runs for row in run.metrics for key, value in row.items() if _is_number(value))
    terms = [key for key in keys if key.startswith("term/")]
    several_terms = any(sum(key in row for key in terms) > 1 for run in runs for row in run.metrics[:1])
    own_objectives = len({run.objective for run in runs}) > 1
    low, high = POINTS_PER_CURVE
    most = min(high, max(low, POINT_BUDGET // max(1, len(keys) * len(runs))))
    found = []
    for key in sorted(keys, key=_curve_order):
        if key in ("step", "time"):
            continue
        series, every = [], 1
        for number, run in enumerate(runs):
            logged = [
                (row["step"], float(row[key])) for row in run.metrics if "step" in row and _is_number(row.get(key))
            ]
            if not logged or not any(math.isfinite(value) for _, value in logged):
                continue
            stride = math.ceil(len(logged) / most)
            every = max(every, stride)
            smooth = smoothed([value for _, value in logged])
            kept = sorted({*range(0, len(logged), stride), len(logged) - 1})
            series.append(
                {
                    "run": number,
                    "x": [logged[i][0] for i in kept],
                    "y": [rounded(logged[i][1]) for i in kept],
                    "s": [rounded(smooth[i]) for i in kept],
                }
            )
        if not series:
            continue
        about = ""
        if key == "loss" or key.startswith("term/"):
            about = "Each run its own objective: compare shapes, not heights." if own_objectives else ""
        main = key in ("loss", "rollout/accuracy", "rollout/entropy", "rollout/length") or key.startswith("probe/")
        found.append(
            {
                "key": key,
                "title": TITLES.get(key) or key.replace("term/", "term: ").replace("probe/", "probe: "),
                "help": about,
                "main": main or (several_terms and key.startswith("term/")),
                "every": every,
                "series": series,
            }
        )
    return found


def smoothed(values: Sequence[float], share: float = SMOOTHING) -> list[float]:
    """Gaussian average over about `share` of the values, centred, so without lag; NaN where a value is not finite."""
    x = np.asarray(values, dtype=float)
    finite = np.isfinite(x)
    width = share * len(x) / 2.5  # standard deviation in rows: a box of `share` and this bell weigh about as many rows
    reach = math.ceil(3 * width)
    if reach < 1:
        return np.where(finite, x, np.nan).tolist()
    bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(width, 1e-9)) ** 2)
    total = np.convolve(np.where(finite, x, 0.0), bell)[reach : reach + len(x)]
    weight = np.convolve(finite.astype(float), bell)[reach : reach + len(x)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(finite, total / weight, np.nan).tolist()


def _curve_order(key: str) -> tuple[int, str]:
    first = ("loss", "rollout/accuracy", "rollout/entropy", "rollout/length")
    if key in first:
        return first.index(key), ""
    groups = ("term/", "probe/", "rollout/", "gradient_norm", "learning_rate", "schedule/")
    return next((10 + i for i, group in enumerate(groups) if key.startswith(group)), 99), key


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ordinal(number: int) -> str:
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"
