"""What came out: the headline, the tiles, the table of results, and what its two charts show."""

import math
from collections.abc import Sequence
from typing import Any

from kullback.report.markup import escape, join, look_of, swatch
from kullback.report.runs import Comparison, Metrics, RunData, anchors, metric, pass_at
from kullback.report.style import Style
from kullback.report.table import ACCURACY, Column, columns_of, format_metric, format_number


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
        sentences.append(f"Within two standard errors of it: {join(close)}.")
    with_entropy = [row for row in measured if math.isfinite(_value(row, "entropy"))]
    if len(with_entropy) > 1:
        low, high = (end(with_entropy, key=lambda row: _value(row, "entropy")) for end in (min, max))
        sentences.append(
            f"Entropy runs from {_value(low, 'entropy'):.3f} nats per token ({low['label']}) "
            f"to {_value(high, 'entropy'):.3f} ({high['label']})."
        )
    return " ".join(sentences)


def tiles(rows: list[dict[str, Any]]) -> str:
    """The best run in a few large numbers, in HTML."""
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
    cells = "".join(f'<div class="tile"><b>{value}</b><span>{escape(name)}</span></div>' for value, name in tiles)
    return f'<div class="tiles">{cells}</div>'


def section(comparison: Comparison, rows: list[dict[str, Any]], looks: list[Style], data: dict[str, Any]) -> str:
    """The table of results and room for its charts, in HTML."""
    columns = columns_of(rows)
    parts = ["<h2>Result</h2>"]
    if comparison.vary:
        varied = "; ".join(
            f"<code>{escape(name)}</code>: "
            f"{escape(', '.join(map(str, values)) if isinstance(values, list) else values)}"
            for name, values in comparison.vary.items()
        )
        of = f" of <code>{escape(comparison.recipe)}</code>" if comparison.recipe else ""
        parts.append(f'<p class="soft">Varied{of}: {varied}. Everything else was held the same.</p>')
    if not any(row["metrics"] for row in rows):
        parts.append('<p class="note">No evaluation.json: run <code>kullback evaluate</code> to fill this table.</p>')
        return "".join(parts)
    head = "".join(
        f'<th scope="col" title="{escape(column.help)}">{escape(column.title).replace("(", "<br>(")}</th>'
        for column in columns
    )
    lines, run_number = [], 0
    for row in rows:
        anchor = row["kind"] != "run"
        mark = swatch(Style(0) if anchor else looks[run_number], row["kind"])
        classes = "anchor" if anchor else "first-run" if run_number == 0 else ""
        run_number += not anchor
        cells = "".join(_cell(row, column) for column in columns)
        status = f' <span class="small bad">{escape(row["status"])}</span>' if row["status"] != "evaluated" else ""
        lines.append(f'<tr class="{classes}"><th scope="row">{mark}{escape(row["label"])}{status}</th>{cells}</tr>')
    meanings = "; ".join(f"{column.title}: {column.help}" for column in columns)
    parts.append(
        f'<div class="scroll"><table class="data"><thead><tr><th scope="col">model</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        f'<p class="why">± one standard error. ● best run, ≈ within two standard errors of the difference from it. '
        f"{escape(meanings)}.</p>"
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
    head = "".join(f'<th scope="col">{escape(row["label"])}</th>' for row in rows)
    lines = "".join(
        f'<tr><th scope="row"><code>{escape(name)}</code></th>'
        + "".join(f"<td>{format_metric(row['metrics'].get(name), _digits(row, name))}</td>" for row in rows)
        + "</tr>"
        for name in names
    )
    return (
        "<details><summary>Every number of evaluation.json</summary><div><table class='data'><thead><tr><th>metric</th>"
        f"{head}</tr></thead><tbody>{lines}</tbody></table></div></details>"
    )


def models(runs: Sequence[RunData], looks: Sequence[Style]) -> list[tuple[str, str, Style, Metrics]]:
    """(label, kind, style, metrics) of the anchors and then of every evaluated run."""
    found = []
    for kind in ("untrained", "teacher"):
        found += [(label, kind, Style(0), metrics) for label, metrics, _ in anchors(runs, kind)]
    for run, look in zip(runs, looks, strict=True):
        if metrics := run.evaluation.get("student"):
            found.append((run.label, "run", look, metrics))
    return found


def points(runs: Sequence[RunData], looks: Sequence[Style]) -> list[dict[str, Any]]:
    """Accuracy (y) and entropy (x) of each model with their standard errors, where both were measured."""
    points = []
    for label, kind, look, metrics in models(runs, looks):
        accuracy, entropy = metric(metrics, ACCURACY.name), metric(metrics, "entropy")
        if accuracy and entropy and math.isfinite(accuracy[0]) and math.isfinite(entropy[0]):
            (y, ye), (x, xe) = accuracy, entropy
            points.append({"label": label, "style": look_of(look, kind), "x": x, "xe": xe, "y": y, "ye": ye})
    return points


def pass_at_k(runs: Sequence[RunData], looks: Sequence[Style]) -> list[dict[str, Any]]:
    """pass@k (y), its standard error (e) against k, of each model; nothing where only one k was measured."""
    lines: list[dict[str, Any]] = []
    for label, kind, look, metrics in models(runs, looks):
        if found := pass_at(metrics):
            values = list(found.values())
            y, e = [value for value, _ in values], [error for _, error in values]
            lines.append({"label": label, "style": look_of(look, kind), "k": list(found), "y": y, "e": e})
    return lines if any(len(line["k"]) > 1 for line in lines) else []


def _value(row: dict[str, Any] | None, name: str) -> float:
    return row["metrics"].get(name, {}).get("value", math.nan) if row else math.nan


def _digits(row: dict[str, Any], name: str) -> int:
    value = abs(_value(row, name))
    return 0 if name in ("problems", "samples") else 1 if value >= 100 else 2 if value >= 10 else 4


def _with_small_error(metric: dict[str, Any], digits: int, factor: float, unit: str, *, sign: bool = False) -> str:
    value = format_number(factor * metric["value"], digits)
    if sign and metric["value"] > 0:
        value = f"+{value}"
    error = metric["standard_error"]
    about = "" if error is None else f" <small>± {format_number(factor * error, digits)}</small>"
    return f"{value}{'%' if unit == '%' else f'<small>{unit}</small>'}{about}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} <small>s</small>"
    if seconds < 5400:
        return f"{seconds / 60:.1f} <small>min</small>"
    return f"{seconds / 3600:.1f} <small>h</small>"
