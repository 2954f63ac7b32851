"""report.html: one self-contained page. Its tables stand in the HTML; page.js draws the charts and the token viewer.

Every string from a run is escaped, in the markup by `escape` and in the embedded JSON by `script_json`.
The page's own policy forbids all scripts but page.js (by hash) and every request.
"""

import base64
import dataclasses
import hashlib
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from kullback.report import curves, result, tokens
from kullback.report.markup import count, escape, join, look_of, script_json
from kullback.report.routes import Routes
from kullback.report.runs import Comparison, flatten, load_runs
from kullback.report.style import Style, styles
from kullback.report.table import comparison_rows


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
    samples = [tokens.spread(run.samples) for run in runs]
    routes = Routes(runs, samples)
    data = _data(comparison, looks, samples, routes)
    files = resources.files("kullback.report")
    script = files.joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    sections = [
        ("result", "Result", result.section(comparison, rows, looks, data)),
        ("objective", "Objective", _objectives(comparison)),
        ("curves", "Curves", curves.section(data)),
        ("tokens", "Tokens", tokens.section(runs, samples, routes, data)),
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
<title>{escape(title)}</title>
<style>{files.joinpath("page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<div class="wide"><header class="top">
<h1>{escape(title)}</h1>
<p class="headline">{escape(result.headline(comparison, rows))}</p>
{_alarms(comparison)}
{result.tiles(rows)}
</header></div>
<nav aria-label="sections"><div class="wide">{links}</div></nav>
<main class="wide">
<noscript><p class="note">The charts and the token viewer need JavaScript; the tables do not.</p></noscript>
{body}
</main>
<footer class="wide">Written by kullback from {count(len(runs), "run directory", "run directories")}.
Everything here can be rebuilt from {"it" if len(runs) == 1 else "them"} with <code>kullback report</code>.</footer>
<script type="application/json" id="data">{script_json(data)}</script>
<script>{script}</script>
</body>
</html>
"""


def _title(comparison: Comparison) -> str:
    runs = comparison.runs
    if len(runs) == 1:
        return runs[0].label
    if comparison.vary:
        varied = join(name.split(".")[-1].replace("_", " ") for name in comparison.vary)
        return f"What {varied} did: {len(runs)} runs compared"
    return f"{count(len(runs), 'run', 'runs')} compared"


def _alarms(comparison: Comparison) -> str:
    notes = [f'<p class="note">{escape(note)}</p>' for note in comparison.notes]
    for run in comparison.runs:
        if run.diverged_at is not None:
            text = f"{run.label} diverged: its loss was not a finite number from step {run.diverged_at} on."
            notes.append(f'<p class="note bad">{escape(text)}</p>')
    absent: dict[tuple[str, ...], list[str]] = {}
    for run in comparison.runs:
        if run.missing:
            absent.setdefault(run.missing, []).append(run.label)
    for files, labels in absent.items():
        where = "" if len(comparison.runs) == 1 else f"{join(labels)}: "
        notes.append(
            f'<p class="note">{escape(f"{where}there is no {join(files)}, so what it holds is left out.")}</p>'
        )
    return "".join(notes)


def _objectives(comparison: Comparison) -> str:
    """The objective in words; of several runs, the lines they share once and then what is each one's own."""
    told = [(run, run.objective.splitlines()) for run in comparison.runs if run.objective]
    if not told:
        return '<h2>Objective</h2><p class="note">No objective.txt: what was minimised was not written down.</p>'
    shared = [line for line in told[0][1] if all(line in lines for _, lines in told)]
    block = f'<div class="objective"><pre>{escape(chr(10).join(shared))}</pre></div>' if any(shared) else ""
    if len(told) == 1:
        return f"<h2>Objective</h2>{block}"
    own = "".join(
        f"<tr><th scope='row'>{escape(run.label)}</th>"
        f"<td><pre>{escape(chr(10).join(line for line in lines if line not in shared))}</pre></td></tr>"
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
        head = "".join(f"<th>{escape(run.label)}</th>" for run in runs)
        lines = "".join(
            f"<tr><th scope='row'><code>{escape(name)}</code></th>"
            + "".join(f"<td><code>{escape(recipe.get(name, ''))}</code></td>" for recipe in flat)
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
            body = f"<pre>{escape(text)}</pre>" if text else f'<p class="note">This run has no {of} file.</p>'
            if len(runs) > 1:
                body = f"<details><summary>{escape(run.label)}</summary><div>{body}</div></details>"
            blocks.append(body)
        parts.append(f"<details><summary>{name}</summary><div>{''.join(blocks)}</div></details>")
    where = "".join(f"<tr><th>{escape(run.label)}</th><td><code>{escape(run.path)}</code></td></tr>" for run in runs)
    parts.append(f"<details><summary>Run directories</summary><div><table class='data'>{where}</table></div></details>")
    return "".join(parts)


def _data(
    comparison: Comparison, looks: list[Style], samples: list[list[dict[str, Any]]], routes: Routes
) -> dict[str, Any]:
    """What page.js draws."""
    runs = comparison.runs
    strings = tokens.Strings()
    return {
        "runs": [
            {"label": run.label, "style": look_of(look), "diverged": run.diverged_at}
            for run, look in zip(runs, looks, strict=True)
        ],
        "curves": curves.curves(runs),
        "points": result.points(runs, looks),
        "passk": result.pass_at_k(runs, looks),
        "samples": tokens.sample_data(samples, routes, strings),
        "routes": [dataclasses.asdict(route) for route in routes.known],
        "strings": strings.known,
    }
