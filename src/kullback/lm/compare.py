"""One recipe, some of its keys varied, one run each: the same start, the same problems, one table.

    COMPARE/comparison.json  report.html  SLUG/ (a run directory for each combination)

The untrained student and the teacher are graded once and shared by all runs they are the same for. A run that fails is
recorded and the others go on. Started again with `resume`, finished runs are kept and unfinished ones go on.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from kullback.lm.assemble import assemble
from kullback.lm.evaluate import Evaluation
from kullback.lm.plan import Plan, check
from kullback.lm.recipe import Recipe, make_plan, parse_value
from kullback.lm.run import grade_anchors, run
from kullback.report.runs import flatten
from kullback.run.directory import RunDirectory, write_comparison

# What may differ between a run and its continuation: none of it changes what the run has computed so far.
FREE = (
    "train.steps",
    "train.save_every",
    "train.keep_checkpoints",
    "train.trackers",
    "train.rows_at_once",
    "train.compile_decode",
    "train.device",
)


@dataclass(frozen=True)
class Variant:
    """One combination of the varied values.

    Args:
        directory: its place below the comparison's.
        label: what the table calls it.
        varied: the keys and the values that make it different.
    """

    directory: str
    label: str
    varied: dict[str, Any]
    recipe: Recipe


def split_values(text: str) -> list[str]:
    """ "forward_kl,unit(jsd(0.5, ...))" at its commas, except those inside brackets or quotes.

    >>> split_values("reverse_kl, skew(forward_kl, 0.1), '1,2'")
    ['reverse_kl', 'skew(forward_kl, 0.1)', "'1,2'"]

    Raises:
        ValueError: a bracket or a quote is not closed, or nothing stands between two commas.
    """
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
        if sign == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    if depth or quote:
        raise ValueError(f"vary={text!r}: a bracket or a quote is not closed")
    parts = [part.strip() for part in parts]
    if not all(parts):
        raise ValueError(f"vary={text!r}: there is nothing before, between or after its commas; leave the comma out")
    return parts


def parse_vary(text: str) -> tuple[str, list[Any]]:
    """ "signal.divergence=forward_kl,reverse_kl" as the key and its values, each read as YAML."""
    key, equals, values = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", key.strip()):
        raise ValueError(f"--vary {text!r} is no choice of values; write key=a,b, for example train.seed=0,1,2")
    return key.strip(), [parse_value(value, key) for value in split_values(values)]


def variants(
    recipe: Recipe, vary: Mapping[str, list[Any]], output: Path, labels: Mapping[str, Mapping[str, str]] | None = None
) -> list[Variant]:
    """Every combination of the values, the last key varying fastest.

    Raises:
        ValueError: nothing is varied, or a key has no values or one twice.
    """
    if not vary:
        raise ValueError("vary={}: nothing is compared; write --vary signal.divergence=forward_kl,reverse_kl")
    for key, values in vary.items():
        if not values:
            raise ValueError(f"compare.vary.{key}=[]: give at least one value")
        if len({json.dumps(value, default=str) for value in values}) < len(values):
            raise ValueError(f"compare.vary.{key}={values}: the same value stands there twice")
    found: list[Variant] = []
    for combination in itertools.product(*vary.values()):
        varied = dict(zip(vary, combination, strict=True))
        label = ", ".join(_called(key, value, (labels or {}).get(key, {})) for key, value in varied.items())
        slug = re.sub(r"[^\w.=+-]+", "-", label).strip("-.")[:80] or "run"
        taken = {variant.directory for variant in found}
        slug = next(name for name in _numbered(slug) if name not in taken)
        changed = recipe.override([*varied.items(), ("output", str(output / slug)), ("compare", None)])
        found.append(Variant(slug, label, varied, Recipe(slug, changed.values)))
    return found


def _called(key: str, value: Any, names: Mapping[str, str]) -> str:
    if str(value) in names:
        return names[str(value)]
    return value if isinstance(value, str) else f"{key.rpartition('.')[2]}={value}"


def _numbered(slug: str) -> Iterator[str]:
    yield slug
    yield from (f"{slug}-{n}" for n in itertools.count(2))


def compare(
    recipe: Recipe,
    vary: Mapping[str, list[Any]],
    output: str | Path,
    *,
    labels: Mapping[str, Mapping[str, str]] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, str]:
    """Run every combination; write comparison.json and report.html.

    Returns:
        {label: what went wrong} of the runs that failed; empty when all went well.

    Raises:
        ValueError: a combination is refused (before any model is loaded), or `output` holds another run.
        KeyboardInterrupt: stopped; `resume` goes on.
    """
    console = console or Console(stderr=True, highlight=False)
    root = Path(output)
    chosen = variants(recipe, vary, root, labels)
    plans: list[Plan] = []
    objectives: list[str] = []
    for variant in chosen:
        plan = make_plan(variant.recipe)
        try:
            objectives.append(check(plan))
        except ValueError as error:
            raise ValueError(f"{variant.label}: {error}") from error
        plans.append(plan)
    if RunDirectory(root).has_run:
        raise ValueError(f"output={root}: a single run is there already; choose another directory for the comparison")
    directories = [
        RunDirectory.create(plan.output, resume=resume, overwrite=overwrite and not resume) for plan in plans
    ]
    for directory, plan in zip(directories, plans, strict=True):
        check_continues(directory, plan)

    failed: dict[str, str] = {}
    graded: dict[str, dict[str, Any]] = {}
    for directory, plan in zip(directories, plans, strict=True):
        known = {name: metrics for name, metrics in (directory.evaluation() or {}).items() if name != "student"}
        if known:
            graded[_anchor_key(plan)] = known
    record(root, recipe, vary, chosen, failed)
    for index, (variant, plan, directory) in enumerate(zip(chosen, plans, directories, strict=True)):
        head = f"[{index + 1}/{len(chosen)}] {variant.label}"
        if is_complete(directory, plan):
            console.print(f"{head}: finished before", markup=False)
            continue
        console.print(head, style="bold", markup=False)
        for line in objectives[index].splitlines():
            if index == 0 or line not in objectives[0].splitlines():  # the first in full, then what is different
                console.print(f"  {line}", markup=False, style="dim")
        try:
            _share_anchors(plan, directory, graded, console)
            run(plan, resume=True, console=Console(quiet=True))
        except Exception as error:  # whatever ends one run, the others are worth having
            failed[variant.label] = f"{type(error).__name__}: {error}"
            console.print(f"  failed, {failed[variant.label]}", style="red", markup=False)
            record(root, recipe, vary, chosen, failed)
    from kullback.report import write_report

    write_report(root, root / "report.html")
    return failed


def record(
    root: Path, recipe: Recipe, vary: Mapping[str, list[Any]], chosen: list[Variant], failed: Mapping[str, str]
) -> None:
    """Write comparison.json."""
    runs: list[Mapping[str, Any]] = [
        {"directory": variant.directory, "label": variant.label, "varied": variant.varied}
        | ({"error": failed[variant.label]} if variant.label in failed else {})
        for variant in chosen
    ]
    write_comparison(root, recipe=recipe.name, vary=vary, runs=runs)


def is_complete(directory: RunDirectory, plan: Plan) -> bool:
    """Whether the run has done all its steps and was graded as the plan asks."""
    if plan.evaluate.problems:
        return "student" in (directory.evaluation() or {}) and _steps(directory) >= plan.train.steps
    return directory.is_finished and _steps(directory) >= plan.train.steps


def _steps(directory: RunDirectory) -> int:
    return max((int(row.get("step", 0)) for row in directory.metrics()), default=0)


def check_continues(directory: RunDirectory, plan: Plan) -> None:
    """A run may be resumed only with the recipe it began with.

    Raises:
        ValueError: a key differs that decides what was computed.
    """
    before = directory.recipe()
    if before is None:
        return
    old, new = flatten(before), flatten(plan.recipe)
    for key in sorted(old.keys() | new.keys()):
        if key in FREE or key.startswith(("evaluate.", "output")) or old.get(key) == new.get(key):
            continue
        raise ValueError(
            f"{key}={new.get(key)!r}: the run in {directory.path} was begun with {old.get(key)!r}; "
            "set it back, or start over with another output or --overwrite"
        )


def _anchor_key(plan: Plan) -> str:
    """Equal for runs whose untrained student and teacher have the same grades."""
    sections = ("student", "task", "target", "evaluate")
    settings = [plan.recipe.get(section) for section in sections]
    return json.dumps([*settings, plan.method.max_completion, plan.train.seed, plan.train.dtype], default=str)


def _share_anchors(plan: Plan, directory: RunDirectory, graded: dict[str, dict[str, Any]], console: Console) -> None:
    if not plan.evaluate.problems or not plan.evaluate.anchors:
        return
    key = _anchor_key(plan)
    if key not in graded:
        at = assemble(plan)
        graded[key] = grade_anchors(Evaluation(plan.evaluate, at, plan.method.max_completion), at)
    directory.write_evaluation(graded[key] | (directory.evaluation() or {}))
