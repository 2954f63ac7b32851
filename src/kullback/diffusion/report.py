"""report.html of one or several distillations: pictures, curves and a table, from run directories alone."""

import base64
import html
import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from kullback.diffusion.pictures import new_figure, show_metric, side_by_side
from kullback.report.table import format_number
from kullback.run.directory import RunDirectory, to_float

SAMPLES = "samples.safetensors"
MEASURES = {  # name in evaluation.json: (digits, what it is)
    "modes": (0, "modes of the mixture with at least a tenth of their share of samples within 3 standard deviations"),
    "near a mode": (3, "share of samples within 3 standard deviations of a mode"),
    "energy distance": (4, "to the data, 2 E|X - Y| - E|X - X'| - E|Y - Y'|; 0 for equal laws, up to chance"),
    "coverage": (3, "share of the data with a sample within the distance to its own fifth neighbour"),
    "clipped": (3, "share of the discriminator's log-ratios beyond the clip"),
}
LOGGED = {
    "divergence": "D at the discriminator's ratios",
    "divergence/clipped": "share of log-ratios clipped",
    "divergence/weight_std": "standard deviation of the weight",
    "denoise": "loss of the model's score",
    "discriminate": "loss of the discriminator",
}


def runs_in(place: str | Path) -> list[Path]:
    """The finished distillations of a run directory, or of a directory of several, in the order in which they ended.

    None where it is something else.
    """
    found = (*Path(place).glob(SAMPLES), *Path(place).glob(f"*/{SAMPLES}"))
    return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime_ns)]


def write_report(runs: Sequence[str | Path], out: str | Path, title: str | None = None) -> Path:
    """One self-contained page; samples.png beside it is its first picture.

    Args:
        runs: finished run directories of `distil`, on the same data.
        out: the file to write.
        title: the heading; None names the data.

    Raises:
        ValueError: a directory holds no finished distillation.
    """
    directories = [RunDirectory(run) for run in runs]
    for directory in directories:
        if not (directory.path / SAMPLES).is_file() or not directory.evaluation_file.is_file():
            raise ValueError(f"runs={directory.path}: no finished distillation is there; let the run finish first")
    recipes = [directory.recipe() or {} for directory in directories]
    names = [
        str(recipe.get("divergence", directory.path.name))
        for recipe, directory in zip(recipes, directories, strict=True)
    ]
    drawn = [load_file(directory.path / SAMPLES) for directory in directories]
    rows = table_rows(directories)
    panels = [("teacher, 35 calls for each sample", drawn[0]["teacher"])]
    panels += [(_caption(row), samples["student"]) for row, samples in zip(rows[2:], drawn, strict=True)]
    samples = side_by_side(panels, {name: kept["weight"] for name, kept in zip(names, drawn, strict=True)})
    picture = _png(samples)
    out = Path(out)
    (out.parent / "samples.png").write_bytes(picture)
    figure, axes = new_figure(len(LOGGED), 3)
    logged = {name: directory.metrics() for name, directory in zip(names, directories, strict=True)}
    for axis, (key, title) in zip(axes, LOGGED.items(), strict=False):
        show_metric(axis, logged, key, title)
    if len(logged) > 1 and axes[0].lines:
        axes[0].legend(fontsize=7, frameon=False)
    title = title or f"One-step students of {recipes[0].get('data', 'the data')}"
    css = resources.files("kullback.report").joinpath("page.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    told = "".join(
        f"<details><summary>{_text(name)}: objective, settings, environment</summary><div><pre>"
        + "\n\n".join(
            _text(part) for part in (directory.objective(), _yaml(directory.recipe()), _yaml(directory.environment()))
        )
        + "</pre></div></details>"
        for name, directory in zip(names, directories, strict=True)
    )
    out.write_text(
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="kullback">
<title>{_text(title)}</title>
<style>{css}
figure img {{ max-width: 100%; background: #fff; border-radius: 6px; }}</style>
</head>
<body>
<div class="wide"><header class="top"><h1>{_text(title)}</h1>
<p class="headline">A student calls its network once for a sample, its teacher 35 times.</p>
{_alarms(rows)}</header></div>
<main class="wide">
<section><h2>Samples and weights</h2><figure><img alt="Samples of teacher and students, and the weight h(r)"
src="{_data(picture)}"></figure><p class="why">Last panel: how much a sample counts in the student's gradient, by the
ratio of target to model there.</p></section>
<section><h2>Result</h2>{_table(rows)}</section>
<section><h2>Curves</h2><figure><img alt="{_text(", ".join(LOGGED.values()))}"
src="{_data(_png(figure))}"></figure></section>
<section><h2>Settings</h2>{told}</section>
</main>
</body>
</html>
""",
        encoding="utf-8",
    )
    return out


def table_rows(runs: Sequence[RunDirectory]) -> list[dict[str, Any]]:
    """The teacher, the first run's untrained student, and every student: {"label", "seconds", measures}."""
    rows = []
    for number, directory in enumerate(runs):
        evaluation, metrics = directory.evaluation() or {}, directory.metrics()
        whom = [("teacher", "teacher"), ("one call, untrained", "untrained")] if number == 0 else []
        for label, who in [*whom, (str((directory.recipe() or {}).get("divergence", directory.path.name)), "student")]:
            row: dict[str, Any] = {"label": label, "seconds": None}
            row |= {name: to_float(item["value"]) for name, item in evaluation.get(who, {}).items()}
            if who == "student" and metrics:
                row["seconds"] = to_float(metrics[-1].get("time"))
            rows.append(row)
    return rows


def columns_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The measures that some row has."""
    return [name for name in MEASURES if any(name in row for row in rows)]


def cell(row: dict[str, Any], name: str) -> str:
    return format_number(row[name], MEASURES[name][0]) if name in row else ""


def _caption(row: dict[str, Any]) -> str:
    covered = f", {row['modes']:.0f} modes" if "modes" in row else ""
    return f"student, {row['label']}, 1 call{covered}"


def _alarms(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(
        f'<p class="note">{_text(row["label"])}: {row["clipped"]:.0%} of the discriminator\'s log-ratios lay beyond '
        "the clip, so their weights do not tell them apart.</p>"
        for row in rows
        if row.get("clipped", 0) > 0.5
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    columns = columns_of(rows)
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in columns)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{_text(cell(row, name))}</td>" for name in columns)
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        body += f'<tr><th scope="row">{_text(row["label"])}</th>{cells}<td>{seconds}</td></tr>'
    meanings = "; ".join(f"{name}: {MEASURES[name][1]}" for name in columns)
    return (
        f'<div class="scroll"><table class="data"><thead><tr><th scope="col"></th>{head}<th scope="col">seconds</th>'
        f'</tr></thead><tbody>{body}</tbody></table></div><p class="why">{_text(meanings)}.</p>'
    )


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    return stream.getvalue()


def _data(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)
