"""Commands that train and grade: train, compare, evaluate, report, explain, inspect."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kullback.cli.app import (
    FAILED,
    AsJson,
    Overwrite,
    RecipeArgument,
    Resume,
    Settings,
    app,
    get_recipe,
    print_json,
    quiet_libraries,
    say,
    stderr,
    stdout,
    where,
)


@app.command(rich_help_panel="Train and grade")
def train(
    recipe: RecipeArgument,
    settings: Settings = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train a student by a recipe, grade it, and write the report.

    [bold]Examples[/bold]
      kullback train on_policy_distillation
      kullback train recipes/gkd.yaml signal.beta=0.9 output=runs/beta-0.9
      kullback train my.yaml "schedule.signal.temperature=linear(2 -> 1, steps=9)"
      kullback train runs/beta-0.9 --resume

    Any key of the recipe can be set. The resolved recipe, metrics, samples, model and report.html go to `output`.
    Ctrl-C finishes the step and keeps a checkpoint.
    """
    from kullback.lm import api
    from kullback.lm.compare import check_continues, is_complete
    from kullback.lm.recipe import make_plan
    from kullback.run.directory import RunDirectory

    plan = make_plan(get_recipe(recipe, settings))
    directory = RunDirectory(plan.output)
    if resume:
        check_continues(directory, plan)
    if resume and is_complete(directory, plan):
        say(f"{where(plan.output)}: finished before")
    else:
        api.run(plan, resume=resume, overwrite=overwrite, console=stderr())
    _show([plan.output], directory.report_file, as_json)


@app.command(rich_help_panel="Train and grade")
def compare(
    recipe: RecipeArgument,
    settings: Settings = None,
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", metavar="KEY=A,B,...", help="A key and the values to try; may be given several times."),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train once for each combination of values; one table, one report.

    [bold]Examples[/bold]
      kullback compare quickstart
      kullback compare quickstart --vary "signal.divergence=tv,skew(jsd(0.5), 0.1)"
      kullback compare gkd --vary signal.beta=0.1,0.5,0.9 --vary train.seed=0,1

    Commas inside brackets and quotes do not separate. The untrained student and the teacher are graded once. A run that
    fails does not end the others. --vary replaces what the recipe's own `compare` section varies.
    """
    from kullback.lm.compare import compare as run_all
    from kullback.lm.compare import parse_vary
    from kullback.lm.recipe import compare_settings

    loaded = get_recipe(recipe, settings)
    own = compare_settings(loaded)
    chosen = dict(parse_vary(text) for text in vary) if vary else own.vary
    output = Path(loaded.values.get("output") or f"runs/{loaded.name}-compare")
    failed = run_all(loaded, chosen, output, labels=own.labels, resume=resume, overwrite=overwrite, console=stderr())
    _show([output], output / "report.html", as_json, failed=failed)
    if failed:
        say(f"failed: {', '.join(failed)}; --resume tries again", style="bold red")
        raise typer.Exit(FAILED)


@app.command(rich_help_panel="Train and grade")
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|RUN", help="A model's directory or hub name, or a run directory.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of `evaluate`, such as problems=500 or samples=8."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="The problems: a name or a file. A run has its own.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Also measure both KLs and the JSD to this model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Grade a model on held-out problems; with a teacher, also how far apart the two are.

    [bold]Examples[/bold]
      kullback evaluate embedded:student --task embedded:arithmetic
      kullback evaluate runs/gkd problems=500 samples=8
      kullback evaluate Qwen/Qwen3-0.6B --task reasoning_gym/gcd --json

    Accuracy (avg@k), unbiased pass@k, entropy, length, distinct-n, each with its standard error. Writes nothing.
    """
    quiet_libraries()
    options = [text if text.startswith("evaluate.") else f"evaluate.{text}" for text in settings or ()]
    if (Path(model) / "recipe.yaml").is_file():
        metrics = _evaluate_run(Path(model), options, task, teacher)
    else:
        metrics = _evaluate_model(model, options, task, teacher)
    if as_json:
        print_json(metrics)
    else:
        _print_metrics(model, metrics)


def _evaluate_model(model: str, options: list[str], task: str | None, teacher: str | None) -> dict[str, Any]:
    from kullback.lm import api
    from kullback.lm.recipe import Recipe, make_plan, parse_override

    if task is None:
        raise ValueError("task=None: name the problems to grade on, for example --task embedded:arithmetic")
    # As a recipe, so that the settings are checked, with the same words, before anything is loaded.
    values = {"method": "sft", "student": model, "task": task}
    plan = make_plan(Recipe("evaluate", values).override(map(parse_override, options)))
    return api.evaluate(model, data=plan.task, teacher=teacher, **plan.evaluate.model_dump())


def _evaluate_run(run: Path, options: list[str], task: str | None, teacher: str | None) -> dict[str, Any]:
    """The trained model of a run, on the run's own problems and against its own target unless others are named."""
    from kullback.lm.assemble import assemble
    from kullback.lm.evaluate import Evaluation, grade
    from kullback.lm.recipe import make_plan, parse_override, read_recipe

    changes = [
        ("student", str(run / "model")),
        ("train.lora", None),
    ]  # an adapter that is saved is loaded with its model
    changes += [(key, value) for key, value in (("task", task), ("target.teacher", teacher)) if value is not None]
    plan = make_plan(read_recipe(run).override([*changes, *map(parse_override, options)]))
    at = assemble(plan)
    return grade(Evaluation(plan.evaluate, at, plan.method.max_completion), at, "student", label="evaluate")


def _print_metrics(model: str, metrics: dict[str, Any]) -> None:
    from rich.table import Table

    from kullback.report.table import format_number

    counts = {name: value for name, value in metrics.items() if not isinstance(value, dict)}
    table = Table("metric", "value", "± s.e.", title=model, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name, metric in metrics.items():
        if isinstance(metric, dict):
            error = metric.get("standard_error")
            table.add_row(name, format_number(metric["value"], 4), "" if error is None else format_number(error, 4))
    stdout().print(table)
    say(", ".join(f"{value} {name}" for name, value in counts.items()))


@app.command(rich_help_panel="Train and grade")
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories or comparison directories.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The file to write.")] = None,
    title: Annotated[str | None, typer.Option(help="The heading of the page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained page about runs, and print their table.

    [bold]Examples[/bold]
      kullback report runs/quickstart-compare
      kullback report runs/a runs/b --output a-and-b.html
    """
    from kullback import diffusion
    from kullback import report as text
    from kullback.cli.diffusion import show_images

    page = output or (Path(runs[0]) / "report.html" if len(runs) == 1 else Path("report.html"))
    generators = [diffusion.report.runs_in(run) for run in runs]
    if any(generators):
        if not all(generators):
            raise ValueError(f"runs={' '.join(runs)}: some train text, some images; give them a report each")
        images = [run for found in generators for run in found]
        show_images(images, diffusion.report.write_report(images, page, title), as_json)
    else:
        _show(runs, text.write_report(runs, page, title), as_json)


@app.command(rich_help_panel="Look before you train")
def explain(recipe: RecipeArgument, settings: Settings = None, as_json: AsJson = False) -> None:
    """Say what a recipe would minimise, in words and symbols, without training.

    [bold]Examples[/bold]
      kullback explain on_policy_distillation
      kullback explain vopd signal.baseline=8
    """
    from kullback.lm.plan import check
    from kullback.lm.recipe import make_plan

    plan = make_plan(get_recipe(recipe, settings))
    words = check(plan)
    if as_json:
        print_json({"objective": words, "recipe": plan.recipe})
    else:
        typer.echo(words)


@app.command(rich_help_panel="Look before you train")
def inspect(recipe: RecipeArgument, settings: Settings = None) -> None:
    """Print two rows of the first batch, token by token: mask, source, the teacher's top 3 and the loss.

    [bold]Example[/bold]
      kullback inspect on_policy_distillation signal.divergence=hellinger
    """
    from kullback.lm.inspect import inspect as look
    from kullback.lm.recipe import make_plan

    stdout().print(look(make_plan(get_recipe(recipe, settings))))


def _show(runs: list[Any], page: Path, as_json: bool, **more: Any) -> None:
    """The table of runs and where the report is."""
    from kullback.report import comparison_rows, comparison_table

    if as_json:
        print_json({"runs": comparison_rows(runs), "report": str(page), **more})
        return
    stdout().print(comparison_table(runs))
    say(f"report: {where(page)}", style="bold")
