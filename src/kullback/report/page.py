"""report.html: one self-contained page. Its tables stand in the HTML; page.js draws the charts and the token viewer.

Every string from a run is escaped, in the markup by `html.escape` and in the embedded JSON by `_script_json`.
The page's own policy forbids all scripts but page.js (by hash) and every request.
"""

import base64
import hashlib
import html
import json
import math
import os
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from kullback.report.runs import Comparison, Metrics, RunData, anchors, flatten, load_runs, metric, pass_at
from kullback.report.style import Style, styles
from kullback.report.table import (
    ACCURACY,
    Column,
    columns_of,
    comparison_rows,
    format_metric,
    format_number,
)
from kullback.run.directory import strict

POINT_BUDGET = 14_000  # over all curves; longer logs are thinned for drawing, after smoothing
POINTS_PER_CURVE = (60, 240)
MAX_SAMPLES = 24  # per run, spread over the steps
TOKEN_BUDGET = 350_000  # bytes of token details in the page, over all runs
TEXT_BUDGET = 1_200  # characters of a prompt or completion in the table of samples
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


def write_report(
    runs: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    title: str | None = None,
) -> Path:
    """Write one self-contained page about run directories, or about a comparison directory.

    Args:
        runs: run directories and comparison directories, in the order to show.
        out: the file to write, or a directory, which gets report.html.
        title: the heading; without one, what was compared.

    Returns:
        The file written: HTML with its style, script and data inside; it asks the network for nothing.

    Raises:
        ValueError: a path holds no run. A run that lacks some of its files is shown with what it has.
    """
    comparison = load_runs(runs)
    out = Path(out)
    if out.is_dir():
        out = out / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    beside.write_text(render(comparison, title), encoding="utf-8", errors="replace", newline="\n")
    os.replace(beside, out)
    return out


def render(comparison: Comparison, title: str | None = None) -> str:
    """The whole page as text."""
    runs, looks = comparison.runs, styles(comparison.runs)
    rows = comparison_rows(comparison)
    title = title or _title(comparison)
    samples = [_spread(run.samples, MAX_SAMPLES) for run in runs]
    data = _data(comparison, looks, samples)
    files = resources.files("kullback.report")
    script = files.joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    sections = [
        ("result", "Result", _result(comparison, rows, looks, data)),
        ("objective", "Objective", _objectives(comparison)),
        ("curves", "Curves", _curves(data)),
        ("tokens", "Tokens", _tokens(runs, samples, data)),
        ("settings", "Settings", _settings(comparison)),
    ]
    links = "".join(f'<a href="#section-{name}">{heading}</a>' for name, heading, _ in sections)
    body = "".join(f'<section id="section-{name}">{content}</section>' for name, _, content in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="kullback">
<title>{_text(title)}</title>
<style>{files.joinpath("page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<div class="wide"><header class="top">
<h1>{_text(title)}</h1>
<p class="headline">{_text(headline(comparison, rows))}</p>
{_alarms(comparison)}
{_tiles(rows)}
</header></div>
<nav aria-label="sections"><div class="wide">{links}</div></nav>
<main class="wide">
<noscript><p class="note">The charts and the token viewer need JavaScript; the tables do not.</p></noscript>
{body}
</main>
<footer class="wide">Written by kullback from {_count(len(runs), "run directory", "run directories")}.
Everything here can be rebuilt from {"it" if len(runs) == 1 else "them"} with <code>kullback report</code>.</footer>
<script type="application/json" id="data">{_script_json(data)}</script>
<script>{script}</script>
</body>
</html>
"""


def headline(comparison: Comparison, rows: list[dict[str, Any]]) -> str:
    """What came out, in two or three sentences that say how sure the numbers make us."""
    runs = [row for row in rows if row["kind"] == "run"]
    measured = [row for row in runs if math.isfinite(_value(row, ACCURACY.name))]
    if not measured:
        return "Nothing was evaluated yet: there is no accuracy to report, only what was logged while training."
    best = max(measured, key=lambda row: _value(row, ACCURACY.name))
    who = "The student" if len(runs) == 1 else f"{best['label']} does best: it"
    sentence = f"{who} answers {_value(best, ACCURACY.name):.1%} of the problems"
    if gain := best["gain"]:
        points, error = 100 * gain["value"], gain["standard_error"]
        if error and abs(gain["value"]) < 2 * error:
            sentence += ", which cannot be told apart from the untrained student"
        elif error:
            direction = "above" if points > 0 else "below"
            sentence += f", {abs(points):.1f} points {direction} the untrained student"
            sentence += f" ({abs(gain['value']) / error:.0f} standard errors)"
        else:
            sentence += f", {points:+.1f} points against the untrained student"
    teacher = next((row for row in rows if row["kind"] == "teacher"), None)
    if teacher and math.isfinite(_value(teacher, ACCURACY.name)):
        sentence += f"; the teacher answers {_value(teacher, ACCURACY.name):.1%}"
    sentences = [sentence + "."]
    if close := [row["label"] for row in runs if ACCURACY.name in row["close"]]:
        sentences.append(f"Within two standard errors of it: {_join(close)}.")
    with_entropy = [row for row in measured if math.isfinite(_value(row, "entropy"))]
    if len(with_entropy) > 1:
        low, high = (end(with_entropy, key=lambda row: _value(row, "entropy")) for end in (min, max))
        sentences.append(
            f"Entropy runs from {_value(low, 'entropy'):.3f} nats per token ({low['label']}) "
            f"to {_value(high, 'entropy'):.3f} ({high['label']})."
        )
    return " ".join(sentences)


# Sections


def _alarms(comparison: Comparison) -> str:
    notes = [f'<p class="note">{_text(note)}</p>' for note in comparison.notes]
    for run in comparison.runs:
        if run.diverged_at is not None:
            text = f"{run.label} diverged: its loss was not a finite number from step {run.diverged_at} on."
            notes.append(f'<p class="note bad">{_text(text)}</p>')
    absent: dict[tuple[str, ...], list[str]] = {}
    for run in comparison.runs:
        if run.missing:
            absent.setdefault(run.missing, []).append(run.label)
    for files, labels in absent.items():
        where = "" if len(comparison.runs) == 1 else f"{_join(labels)}: "
        notes.append(
            f'<p class="note">{_text(f"{where}there is no {_join(files)}, so what it holds is left out.")}</p>'
        )
    return "".join(notes)


def _tiles(rows: list[dict[str, Any]]) -> str:
    runs = [row for row in rows if row["kind"] == "run" and math.isfinite(_value(row, ACCURACY.name))]
    if not runs:
        return ""
    best = max(runs, key=lambda row: _value(row, ACCURACY.name))
    shown = best["metrics"][ACCURACY.name]
    tiles = [(_with_small_error(shown, 1, 100, "%"), "accuracy" if len(runs) == 1 else "best accuracy")]
    if best["gain"]:
        tiles.append((_with_small_error(best["gain"], 1, 100, " points", sign=True), "above the untrained student"))
        teacher = next((row for row in rows if row["kind"] == "teacher"), None)
        before = shown["value"] - best["gain"]["value"]
        gap = _value(teacher, ACCURACY.name) - before if teacher else math.nan
        if gap > 0:
            tiles.append((f"{best['gain']['value'] / gap:.0%}", "of the way to the teacher"))
    problems, samples = _value(best, "problems"), _value(best, "samples")
    if math.isfinite(problems):
        each = f" <small>&times; {samples:.0f} samples</small>" if math.isfinite(samples) else ""
        tiles.append((f"{problems:.0f}{each}", "held-out problems"))
    seconds = [row["seconds"] for row in rows if row["seconds"]]
    if seconds:
        tiles.append((_duration(sum(seconds)), "of training" + (f", {len(seconds)} runs" if len(seconds) > 1 else "")))
    cells = "".join(f'<div class="tile"><b>{value}</b><span>{_text(name)}</span></div>' for value, name in tiles)
    return f'<div class="tiles">{cells}</div>'


def _result(comparison: Comparison, rows: list[dict[str, Any]], looks: list[Style], data: dict[str, Any]) -> str:
    columns = columns_of(rows)
    parts = ["<h2>Result</h2>"]
    if comparison.vary:
        varied = "; ".join(
            f"<code>{_text(name)}</code>: {_text(', '.join(map(str, values)) if isinstance(values, list) else values)}"
            for name, values in comparison.vary.items()
        )
        of = f" of <code>{_text(comparison.recipe)}</code>" if comparison.recipe else ""
        parts.append(f'<p class="soft">Varied{of}: {varied}. Everything else was held the same.</p>')
    if not any(row["metrics"] for row in rows):
        parts.append('<p class="note">No evaluation.json: run <code>kullback evaluate</code> to fill this table.</p>')
        return "".join(parts)
    head = "".join(
        f'<th scope="col" title="{_text(column.help)}">{_text(column.title).replace("(", "<br>(")}</th>'
        for column in columns
    )
    lines, run_number = [], 0
    for row in rows:
        anchor = row["kind"] != "run"
        swatch = _swatch(Style(0) if anchor else looks[run_number], row["kind"])
        classes = "anchor" if anchor else "first-run" if run_number == 0 else ""
        run_number += not anchor
        cells = "".join(_cell(row, column) for column in columns)
        status = f' <span class="small bad">{_text(row["status"])}</span>' if row["status"] != "evaluated" else ""
        lines.append(f'<tr class="{classes}"><th scope="row">{swatch}{_text(row["label"])}{status}</th>{cells}</tr>')
    meanings = "; ".join(f"{column.title}: {column.help}" for column in columns)
    parts.append(
        f'<div class="scroll"><table class="data"><thead><tr><th scope="col">model</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        f'<p class="why">± one standard error. ● best run, ≈ within two standard errors of the difference from it. '
        f"{_text(meanings)}.</p>"
    )
    plots = []
    if data["points"]:
        plots.append(
            '<figure><h3>Accuracy against entropy</h3><p class="help">Up is better. Left is more certain, with fewer '
            'different answers. Bars: one standard error.</p><div id="scatter"></div></figure>'
        )
    if data["passk"]:
        plots.append(
            '<figure><h3>pass@k</h3><p class="help">Solved by at least one of k samples. A flat line: more samples '
            'bring nothing new.</p><div id="passk"></div></figure>'
        )
    if plots:
        parts.append(f'<div class="grid two">{"".join(plots)}</div>')
    parts.append(_all_metrics(rows))
    return "".join(parts)


def _cell(row: dict[str, Any], column: Column) -> str:
    stored = row["metrics"].get(column.name)
    if stored is None:
        return f'<td class="plain faint">{format_metric(None)}</td>'
    kind = "best" if column.name in row["best"] else "close" if column.name in row["close"] else "plain"
    error = stored["standard_error"]
    about = "" if error is None else f' <span class="pm">± {format_number(error, column.digits)}</span>'
    return f'<td class="{kind}">{format_number(stored["value"], column.digits)}{about}</td>'


def _all_metrics(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    head = "".join(f'<th scope="col">{_text(row["label"])}</th>' for row in rows)
    lines = "".join(
        f'<tr><th scope="row"><code>{_text(name)}</code></th>'
        + "".join(f"<td>{format_metric(row['metrics'].get(name), _digits(row, name))}</td>" for row in rows)
        + "</tr>"
        for name in names
    )
    return (
        "<details><summary>Every number of evaluation.json</summary><div><table class='data'><thead><tr><th>metric</th>"
        f"{head}</tr></thead><tbody>{lines}</tbody></table></div></details>"
    )


def _curves(data: dict[str, Any]) -> str:
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
        f'<figure><h3>{_text(curve["title"])}</h3><p class="help">{_text(curve["help"])}</p>'
        f'<div data-curve="{index}"></div></figure>'
    )


def _tokens(runs: list[RunData], samples: list[list[dict[str, Any]]], data: dict[str, Any]) -> str:
    heading = "<h2>Tokens</h2>"
    if not any(samples):
        return heading + '<p class="note">No samples.jsonl, so there is no text to show.</p>'
    kept, stored = len(data["samples"]), sum(len(run.samples) for run in runs)
    left_out = f" {kept} of {stored} samples are in this page, spread over the steps." if kept < stored else ""
    lines = []
    for number, (run, chosen) in enumerate(zip(runs, samples, strict=True)):
        for i, sample in enumerate(chosen):
            rewards = ", ".join(f"{name} {_short(value)}" for name, value in _rewards(sample).items())
            has_tokens = bool(data["samples"][sum(map(len, samples[:number])) + i]["tokens"])
            look = f'<button type="button" data-open="{number} {i}">tokens</button>' if has_tokens else ""
            run_name = f'<div class="small faint nojs">{_text(run.label)}</div>' if len(runs) > 1 else ""
            lines.append(
                f'<tr data-run="{number}"><td class="narrow">{_text(sample.get("step", ""))}{run_name}</td>'
                f"<td><pre>{_text(_cut(sample.get('prompt')))}</pre></td>"
                f"<td><pre>{_text(_cut(sample.get('completion')))}</pre></td>"
                f'<td class="narrow">{_text(sample.get("origin", ""))}</td><td class="narrow">{_text(rewards)}</td>'
                f'<td class="narrow">{look}</td></tr>'
            )
    return f"""{heading}
<p class="soft small">Each token of a completion, coloured by what training saw there. Point at a token, or use the
arrow keys, to see what the teacher and the student expected next.{left_out}</p>
<div class="bar">
<label>run<select id="pick-run"></select></label><label>sample<select id="pick-sample"></select></label>
<label>colour by<span class="switch" id="modes" role="group" aria-label="colour by"></span></label>
</div>
<div class="viewer" id="viewer">
<div><p class="eyebrow">prompt</p><pre class="prompt" id="prompt"></pre>
<p class="eyebrow">completion</p><p class="small faint" id="meta"></p>
<div class="tokens" id="tokens" role="group" aria-label="tokens of the completion"></div>
<div class="scale" id="scale"></div><div class="strip" id="strip"></div></div>
<div class="side" id="detail" aria-live="polite"></div>
</div>
<details open><summary>Samples of this run</summary><div class="samples-box"><table class="data samples">
<thead><tr><th>step</th><th>prompt</th><th>completion</th><th>text of</th><th>rewards</th><th></th></tr></thead>
<tbody>{"".join(lines)}</tbody></table></div></details>"""


def _objectives(comparison: Comparison) -> str:
    """The objective in words; of several runs, the lines they share once and then what is each one's own."""
    told = [(run, run.objective.splitlines()) for run in comparison.runs if run.objective]
    if not told:
        return '<h2>Objective</h2><p class="note">No objective.txt: what was minimised was not written down.</p>'
    shared = [line for line in told[0][1] if all(line in lines for _, lines in told)]
    block = f'<div class="objective"><pre>{_text(chr(10).join(shared))}</pre></div>' if any(shared) else ""
    if len(told) == 1:
        return f"<h2>Objective</h2>{block}"
    own = "".join(
        f"<tr><th scope='row'>{_text(run.label)}</th>"
        f"<td><pre>{_text(chr(10).join(line for line in lines if line not in shared))}</pre></td></tr>"
        for run, lines in told
    )
    same = '<p class="soft small">What all runs have in common:</p>' if block else ""
    return (
        f"<h2>Objective</h2><div class='scroll'><table class='data objectives'><tbody>{own}</tbody></table></div>"
        f"{same}{block}"
    )


def _settings(comparison: Comparison) -> str:
    runs = comparison.runs
    parts = ["<h2>Settings</h2>"]
    flat = [flatten(run.recipe) for run in runs]
    names = list(dict.fromkeys(name for recipe in flat for name in recipe))
    differing = [name for name in names if len({repr(recipe.get(name)) for recipe in flat}) > 1]
    if len(runs) > 1 and differing:
        head = "".join(f"<th>{_text(run.label)}</th>" for run in runs)
        lines = "".join(
            f"<tr><th scope='row'><code>{_text(name)}</code></th>"
            + "".join(f"<td><code>{_text(recipe.get(name, ''))}</code></td>" for recipe in flat)
            + "</tr>"
            for name in differing
        )
        parts.append(
            "<details><summary>Where the recipes differ</summary><div><table class='data'><thead><tr><th>field</th>"
            f"{head}</tr></thead><tbody>{lines}</tbody></table></div></details>"
        )
    for name, of in (("Recipe", "recipe"), ("Environment", "environment")):
        blocks = []
        for run in runs:
            content = getattr(run, of)
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110) if content else ""
            body = f"<pre>{_text(text)}</pre>" if text else f'<p class="note">This run has no {of} file.</p>'
            if len(runs) > 1:
                body = f"<details><summary>{_text(run.label)}</summary><div>{body}</div></details>"
            blocks.append(body)
        parts.append(f"<details><summary>{name}</summary><div>{''.join(blocks)}</div></details>")
    where = "".join(f"<tr><th>{_text(run.label)}</th><td><code>{_text(run.path)}</code></td></tr>" for run in runs)
    parts.append(f"<details><summary>Run directories</summary><div><table class='data'>{where}</table></div></details>")
    return "".join(parts)


# The data that page.js draws


def _data(comparison: Comparison, looks: list[Style], samples: list[list[dict[str, Any]]]) -> dict[str, Any]:
    runs = comparison.runs
    strings = _Strings()
    return {
        "runs": [
            {"label": run.label, "style": _look(look), "diverged": run.diverged_at}
            for run, look in zip(runs, looks, strict=True)
        ],
        "curves": curves(runs),
        "points": _points(runs, looks),
        "passk": _passk(runs, looks),
        "samples": _sample_data(samples, strings),
        "strings": strings.known,
    }


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
                    "y": [_round(logged[i][1]) for i in kept],
                    "s": [_round(smooth[i]) for i in kept],
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


def models(runs: Sequence[RunData], looks: Sequence[Style]) -> list[tuple[str, str, Style, Metrics]]:
    """(label, kind, style, metrics) of the anchors and then of every evaluated run."""
    found = []
    for kind in ("untrained", "teacher"):
        found += [(label, kind, Style(0), metrics) for label, metrics, _ in anchors(runs, kind)]
    for run, look in zip(runs, looks, strict=True):
        if metrics := run.evaluation.get("student"):
            found.append((run.label, "run", look, metrics))
    return found


def _points(runs: Sequence[RunData], looks: Sequence[Style]) -> list[dict[str, Any]]:
    points = []
    for label, kind, look, metrics in models(runs, looks):
        accuracy, entropy = metric(metrics, ACCURACY.name), metric(metrics, "entropy")
        if accuracy and entropy and math.isfinite(accuracy[0]) and math.isfinite(entropy[0]):
            (y, ye), (x, xe) = accuracy, entropy
            points.append({"label": label, "style": _look(look, kind), "x": x, "xe": xe, "y": y, "ye": ye})
    return points


def _passk(runs: Sequence[RunData], looks: Sequence[Style]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for label, kind, look, metrics in models(runs, looks):
        if found := pass_at(metrics):
            values = list(found.values())
            y, e = [value for value, _ in values], [error for _, error in values]
            lines.append({"label": label, "style": _look(look, kind), "k": list(found), "y": y, "e": e})
    return lines if any(len(line["k"]) > 1 for line in lines) else []


def _sample_data(samples: list[list[dict[str, Any]]], strings: "_Strings") -> list[dict[str, Any]]:
    """All chosen samples; those with tokens lose them once the budget is spent, evenly over the runs."""
    left, tokens = TOKEN_BUDGET, {}
    for i in range(max(map(len, samples), default=0)):
        for number, chosen in enumerate(samples):
            # backwards: the last samples of a run show what it learned
            if i < len(chosen) and (stored := chosen[-1 - i].get("tokens")):
                size = sum(map(_size, stored))
                if size <= left:
                    left -= size
                    tokens[number, len(chosen) - 1 - i] = [_token(token, strings) for token in stored]
    return [
        {
            "run": number,
            "step": sample.get("step"),
            "prompt": _cut(sample.get("prompt")),
            "completion": "" if (number, i) in tokens else _cut(sample.get("completion")),  # else in its tokens
            "origin": str(sample.get("origin", "student")),
            "rewards": {name: _round(value) for name, value in _rewards(sample).items()},
            "tokens": tokens.get((number, i)),
        }
        for number, chosen in enumerate(samples)
        for i, sample in enumerate(chosen)
    ]


class _Strings:
    """Texts by number: top-5 lists repeat the same few tokens thousands of times."""

    def __init__(self) -> None:
        self.known: list[str] = []
        self._numbers: dict[str, int] = {}

    def __call__(self, text: Any) -> int:
        text = str(text)
        if text not in self._numbers:
            self._numbers[text] = len(self.known)
            self.known.append(text)
        return self._numbers[text]


def _token(token: dict[str, Any], strings: _Strings) -> list[Any]:
    route = token.get("route")
    return [
        strings(token.get("text", "")),
        *(_round(token[name], 4) if name in token else None for name in ("divergence", "entropy", "weight")),
        int(bool(token.get("scored", True))),
        None if route is None else strings(route),
        *(
            [[strings(text), _round(probability, 4)] for text, probability in (token.get(name) or ())[:5]]
            for name in ("teacher_top", "student_top")
        ),
    ]


def _size(token: dict[str, Any]) -> int:
    """About how many bytes `_token` takes in the page: ten per number, and its text where it is not a common one."""
    candidates = sum(min(5, len(token.get(name) or ())) for name in ("teacher_top", "student_top"))
    return 40 + 14 * candidates + len(str(token.get("text", "")))


# Small things


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _script_json(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can close the element or start another."""
    text = json.dumps(strict(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _look(look: Style, kind: str = "run") -> dict[str, Any]:
    return {"color": look.color, "dash": look.dash, "kind": None if kind == "run" else kind}


def _swatch(look: Style, kind: str) -> str:
    return f'<span class="swatch" data-swatch="{_text(json.dumps(_look(look, kind)))}"></span>'


def _title(comparison: Comparison) -> str:
    runs = comparison.runs
    if len(runs) == 1:
        return runs[0].label
    if comparison.vary:
        varied = _join(name.split(".")[-1].replace("_", " ") for name in comparison.vary)
        return f"What {varied} did: {len(runs)} runs compared"
    return f"{_count(len(runs), 'run', 'runs')} compared"


def _spread(samples: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """At most `limit` of them, evenly spaced, the first and the last among them."""
    if len(samples) <= limit:
        return samples
    return [samples[round(i * (len(samples) - 1) / (limit - 1))] for i in range(limit)]


def _curve_order(key: str) -> tuple[int, str]:
    first = ("loss", "rollout/accuracy", "rollout/entropy", "rollout/length")
    if key in first:
        return first.index(key), ""
    groups = ("term/", "probe/", "rollout/", "gradient_norm", "learning_rate", "schedule/")
    return next((10 + i for i, group in enumerate(groups) if key.startswith(group)), 99), key


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rewards(sample: dict[str, Any]) -> dict[str, float]:
    rewards = sample.get("rewards")
    return rewards if isinstance(rewards, dict) else {}


def _value(row: dict[str, Any] | None, name: str) -> float:
    return row["metrics"].get(name, {}).get("value", math.nan) if row else math.nan


def _digits(row: dict[str, Any], name: str) -> int:
    value = abs(_value(row, name))
    return 0 if name in ("problems", "samples") else 1 if value >= 100 else 2 if value >= 10 else 4


def _round(value: float, digits: int = 5) -> float | str | None:
    """For the page's JSON: so many significant digits; NaN is null, the infinities are "inf" and "-inf"."""
    if not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return float(f"{value:.{digits}g}")


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else format_number(value)


def _with_small_error(metric: dict[str, Any], digits: int, factor: float, unit: str, *, sign: bool = False) -> str:
    value = format_number(factor * metric["value"], digits)
    if sign and metric["value"] > 0:
        value = f"+{value}"
    error = metric["standard_error"]
    about = "" if error is None else f" <small>± {format_number(factor * error, digits)}</small>"
    return f"{value}{'%' if unit == '%' else f'<small>{unit}</small>'}{about}"


def _cut(text: Any) -> str:
    text = "" if text is None else str(text)
    return text if len(text) <= TEXT_BUDGET else f"{text[:TEXT_BUDGET]} … ({len(text):,} characters in samples.jsonl)"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _join(words: Iterable[str]) -> str:
    words = list(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _ordinal(number: int) -> str:
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} <small>s</small>"
    if seconds < 5400:
        return f"{seconds / 60:.1f} <small>min</small>"
    return f"{seconds / 3600:.1f} <small>h</small>"
