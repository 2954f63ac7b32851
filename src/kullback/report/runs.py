"""What a report reads: runs, from run directories or from a comparison of several."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kullback.run.directory import RunDirectory, read_json, to_float

Metrics = Mapping[str, Any]  # {"problems": 500, "avg@k": {"value": 0.42, "standard_error": 0.01}, ...}


@dataclass(frozen=True)
class RunData:
    """One run as read from its directory. Whatever is missing there is empty here."""

    label: str
    path: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    objective: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)  # one row per optimiser step
    samples: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Metrics] = field(default_factory=dict)  # "student", "untrained", "teacher"
    varied: dict[str, Any] = field(default_factory=dict)  # in a comparison: what this run has of its own
    missing: tuple[str, ...] = ()  # names of absent files

    @property
    def steps(self) -> int:
        """The last step logged, 0 without any."""
        return int(max((to_float(row.get("step", 0)) for row in self.metrics), default=0))

    @property
    def seconds(self) -> float | None:
        return next((row["time"] for row in reversed(self.metrics) if "time" in row), None)

    @property
    def diverged_at(self) -> int | None:
        """The step from which on the loss was never finite again; None for a run that ended well."""
        step = None
        for row in reversed(self.metrics):
            if "loss" not in row:
                continue
            if math.isfinite(row["loss"]):
                break
            step = row.get("step")
        return step

    @property
    def status(self) -> str:
        if self.diverged_at is not None:
            return f"diverged at step {self.diverged_at}"
        if "student" not in self.evaluation:
            return "not evaluated" if self.metrics else "no steps logged"
        return "evaluated"


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; for a comparison directory also what was varied."""

    runs: list[RunData]
    recipe: str = ""
    vary: dict[str, list[Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what could not be read, one sentence each


def load_runs(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Comparison:
    """Read run directories and comparison directories, in the order given, into one comparison.

    Raises:
        ValueError: a path is no directory, or has neither a run nor a comparison in it.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not paths:
        raise ValueError("runs=[]: name at least one run directory or comparison directory")
    entries: list[tuple[Path, str | None, dict[str, Any]]] = []
    recipe = ""
    vary: dict[str, list[Any]] = {}
    notes: list[str] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"runs={path}: not a directory; name a run directory (with metrics.jsonl in it)")
        comparison = read_json(path / "comparison.json")
        if isinstance(comparison, dict):
            recipe = recipe or str(comparison.get("recipe") or "")
            vary = {**vary, **(comparison.get("vary") or {})}
            for run in comparison.get("runs") or ():
                directory = path / str(run["directory"])
                if directory.is_dir():
                    entries.append((directory, run.get("label"), run.get("varied") or {}))
                else:
                    notes.append(f"{run.get('label') or directory.name}: there is no directory {directory.name}.")
        elif not _holds_run(path):
            raise ValueError(f"runs={path}: no run is in this directory; expected recipe.yaml or metrics.jsonl in it")
        else:
            entries.append((path, None, {}))
    if not entries:
        raise ValueError(f"runs={paths[0]}: comparison.json names no run that exists; run the comparison again")
    labels = _labels(entries)
    runs = [_read(path, label, varied) for (path, _, varied), label in zip(entries, labels, strict=True)]
    return Comparison(runs, recipe, vary, notes)


def anchors(runs: Iterable[RunData], name: str) -> list[tuple[str, Metrics, list[RunData]]]:
    """The distinct evaluations called `name` ("untrained", "teacher"): (label, metrics, the runs that share it).

    Runs of one comparison share their untrained student and their teacher; runs from different places need not.
    """
    groups: list[tuple[Metrics, list[RunData]]] = []
    for run in runs:
        metrics = run.evaluation.get(name)
        if not metrics:
            continue
        for known, members in groups:
            if _same(known, metrics):
                members.append(run)
                break
        else:
            groups.append((metrics, [run]))
    if len(groups) == 1:
        return [(name, *groups[0])]
    return [(f"{name} ({members[0].label})", metrics, members) for metrics, members in groups]


def metric(metrics: Metrics, name: str) -> tuple[float, float | None] | None:
    """(value, standard error or None) of one metric; None where it was not measured. A bare number is a value."""
    stored = metrics.get(name)
    if stored is None:
        return None
    if not isinstance(stored, Mapping):
        return to_float(stored), None
    error = stored.get("standard_error")
    return to_float(stored.get("value")), None if error is None else to_float(error)


def pass_at(metrics: Metrics) -> dict[int, tuple[float, float | None]]:
    """{k: (pass@k, standard error)} for every k measured, ascending."""
    found = {}
    for name in metrics:
        k = name.removeprefix("pass@")
        if name.startswith("pass@") and k.isdecimal() and (value := metric(metrics, name)):
            found[int(k)] = value
    return dict(sorted(found.items()))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {"a.b.c": leaf}."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _holds_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("recipe.yaml", "metrics.jsonl", "evaluation.json", "samples.jsonl"))


def _read(path: Path, label: str, varied: dict[str, Any]) -> RunData:
    directory = RunDirectory(path)
    files = (
        directory.recipe_file,
        directory.objective_file,
        directory.environment_file,
        directory.metrics_file,
        directory.samples_file,
        directory.evaluation_file,
    )
    evaluation = directory.evaluation() or {}
    return RunData(
        label=label,
        path=path,
        recipe=_mapping(directory.recipe()),
        objective=directory.objective() or "",
        environment=_mapping(directory.environment()),
        metrics=directory.metrics(),
        samples=directory.samples(),
        evaluation={name: metrics for name, metrics in evaluation.items() if isinstance(metrics, dict)},
        varied=varied,
        missing=tuple(file.name for file in files if not file.is_file()),
    )


def _labels(entries: list[tuple[Path, str | None, dict[str, Any]]]) -> list[str]:
    """A label per run: the one it was given, else its directory's name, with its parent's where two are equal."""
    short = [label or path.resolve().name for path, label, _ in entries]
    labels = [
        label if short.count(label) == 1 else f"{path.resolve().parent.name}/{path.resolve().name}"
        for label, (path, _, _) in zip(short, entries, strict=True)
    ]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            labels[i] = f"{label} ({1 + labels[:i].count(label)})"
    return labels


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return a == b
