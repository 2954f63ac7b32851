"""The comparison table: one row per model, the same numbers on the terminal, in the page and as JSON."""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from kullback.report.runs import Comparison, Metrics, RunData, anchors, load_runs, metric, pass_at

MINUS = "\N{MINUS SIGN}"
Runs = Comparison | str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


@dataclass(frozen=True)
class Column:
    """A metric of evaluation.json as a column. `best` says which end is better, None where neither is."""

    name: str
    title: str
    help: str
    best: Callable[..., Any] | None = None
    digits: int = 3


# Forward KL is an expectation under the teacher, reverse KL under the student: each on the text it is defined on.
ACCURACY = Column("avg@k", "accuracy", "share of correct answers, mean over k samples per problem (avg@k)", max)
COLUMNS = (
    ACCURACY,
    Column("entropy", "entropy", "nats per token of the model's own text"),
    Column("length", "length", "tokens per completion", digits=1),
    Column("forward_kl_teacher_text", "KL(teacher‖student)", "forward KL on the teacher's text, nats per token", min),
    Column("reverse_kl_student_text", "KL(student‖teacher)", "reverse KL on the student's text, nats per token", min),
    Column("distinct_2", "distinct-2", "share of different token pairs in the model's own text"),
)


def comparison_rows(runs: Runs) -> list[dict[str, Any]]:
    """One row per model: the anchors 'untrained' and 'teacher', then every run. Ready for JSON.

    Returns:
        Rows {"label", "kind": "untrained" | "teacher" | "run", "path", "status", "steps", "seconds", "varied",
        "metrics": {name: {"value", "standard_error"}}, "gain": accuracy above the untrained student with its standard
        error (runs only), "best": names this row is best in among the runs, "close": names whose distance from the
        best is less than two standard errors of the difference}.
    """
    comparison = _load(runs)
    rows = []
    for kind in ("untrained", "teacher"):
        for label, metrics, _ in anchors(comparison.runs, kind):
            rows.append(_row(label, kind, metrics))
    for run in comparison.runs:
        row = _row(run.label, "run", run.evaluation.get("student") or {})
        row |= {"path": str(run.path), "status": run.status, "steps": run.steps, "seconds": run.seconds}
        row |= {"varied": run.varied, "gain": _gain(run)}
        rows.append(row)
    _mark_best([row for row in rows if row["kind"] == "run"])
    return rows


def comparison_table(runs: Runs, *, title: str | None = None) -> Table:
    """The rows of `comparison_rows` for a terminal of 80 columns or more: each value over its standard error."""
    rows = comparison_rows(runs)
    columns = columns_of(rows)
    caption = "± one standard error; bold: best run; ≈ less than two standard errors from it"
    if any("‖" in column.title for column in columns):
        caption += "; KL in nats per token, t teacher, s student"
    table = Table(
        title=title and escape(title),
        caption=caption,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("run", overflow="fold", min_width=14)
    for column in columns:
        name = column.title.replace("teacher", "t").replace("student", "s").replace("KL", "KL\n").replace("-", "\n-")
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        cells = []
        for column in columns:
            stored = row["metrics"].get(column.name)
            text = format_metric(stored and {**stored, "standard_error": None}, column.digits)
            if column.name in row["best"]:
                text = f"[bold green]{text}[/]"
            elif column.name in row["close"]:
                text = f"≈{text}"
            if stored and stored["standard_error"] is not None:
                text += f"\n[dim]±{format_number(stored['standard_error'], column.digits)}[/]"
            cells.append(text)
        label = escape(row["label"])
        if row["kind"] != "run":
            label = f"[italic]{label}[/]"
        elif row["status"] != "evaluated":
            label += f"\n[red]{escape(row['status'])}[/]"
        last_anchor = row["kind"] != "run" and (i + 1 == len(rows) or rows[i + 1]["kind"] == "run")
        table.add_row(label, *cells, end_section=last_anchor)
    return table


def comparison_markdown(runs: Runs) -> str:
    """The same table for a Markdown page; the best run of a column is bold."""
    rows = comparison_rows(runs)
    columns = columns_of(rows)
    lines = [
        "| model | " + " | ".join(column.title for column in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for row in rows:
        cells = [format_metric(row["metrics"].get(column.name), column.digits) for column in columns]
        cells = [
            f"**{cell}**" if column.name in row["best"] else cell for cell, column in zip(cells, columns, strict=True)
        ]
        label = row["label"].replace("|", "\\|")
        status = "" if row["status"] == "evaluated" else f" ({row['status']})"
        lines.append(f"| {label}{status} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def columns_of(rows: Iterable[dict[str, Any]]) -> list[Column]:
    """The columns that at least one row has a number for: accuracy, pass@k for the largest k, then the others."""
    rows = list(rows)
    measured = {name for row in rows for name in row["metrics"]}
    k = max((k for row in rows for k in pass_at(row["metrics"])), default=0)
    largest = Column(f"pass@{k}", f"pass@{k}", f"share of problems solved by at least one of {k} samples", max)
    columns = [COLUMNS[0], *([largest] if k > 1 else []), *COLUMNS[1:]]
    return [column for column in columns if column.name in measured] or [ACCURACY]


def format_metric(stored: dict[str, Any] | None, digits: int = 3) -> str:
    """ "0.421 ± 0.010"; a dash where nothing was measured."""
    if stored is None:
        return "\N{EN DASH}"
    value, error = stored["value"], stored["standard_error"]
    return format_number(value, digits) + ("" if error is None else f" ± {format_number(error, digits)}")


def format_number(value: float | None, digits: int = 3) -> str:
    if value is None or math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    return f"{value:.{digits}f}".replace("-", MINUS)


def _load(runs: Runs) -> Comparison:
    return runs if isinstance(runs, Comparison) else load_runs(runs)


def _row(label: str, kind: str, metrics: Metrics) -> dict[str, Any]:
    measured = {name: found for name in metrics if (found := metric(metrics, name))}
    return {
        "label": label,
        "kind": kind,
        "path": None,
        "status": "evaluated",
        "steps": None,
        "seconds": None,
        "varied": {},
        "metrics": {name: {"value": value, "standard_error": error} for name, (value, error) in measured.items()},
        "gain": None,
        "best": [],
        "close": [],
    }


def _gain(run: RunData) -> dict[str, float | None] | None:
    """Accuracy of the student minus that of the untrained student; the errors add as if independent (conservative
    where both were asked the same problems)."""
    after = metric(run.evaluation.get("student") or {}, ACCURACY.name)
    before = metric(run.evaluation.get("untrained") or {}, ACCURACY.name)
    if after is None or before is None:
        return None
    error = None if after[1] is None or before[1] is None else math.hypot(after[1], before[1])
    return {"value": after[0] - before[0], "standard_error": error}


def _mark_best(rows: list[dict[str, Any]]) -> None:
    if len(rows) < 2:
        return
    for column in columns_of(rows):
        if column.best is None:
            continue
        finite = [row for row in rows if math.isfinite(row["metrics"].get(column.name, {}).get("value", math.nan))]
        if not finite:
            continue
        best = column.best(row["metrics"][column.name]["value"] for row in finite)
        top = [row for row in finite if row["metrics"][column.name]["value"] == best]
        for row in finite:
            here = row["metrics"][column.name]
            errors = (here["standard_error"], top[0]["metrics"][column.name]["standard_error"])
            if row in top:
                row["best"].append(column.name)
            elif None not in errors and abs(here["value"] - best) < 2 * math.hypot(*errors):
                row["close"].append(column.name)
