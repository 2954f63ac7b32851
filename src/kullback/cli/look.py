"""Commands that say what there is: methods, divergences, papers, reproduce, schema, doctor."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kullback.cli.app import FAILED, AsJson, app, print_json, say, stdout, where

if TYPE_CHECKING:
    from kullback.bench import Bench


@app.command(rich_help_panel="What there is")
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show one method in full.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, or show one: its equation, its fields under the question each answers, its source.

    [bold]Examples[/bold]
      kullback methods
      kullback methods vopd
    """
    from rich.markup import escape
    from rich.table import Table

    from kullback.lm.catalogue import describe_method, describe_methods

    if name is None:
        rows = describe_methods()
        if as_json:
            print_json(rows)
            return
        table = Table("method", "what it does", "whose text", "own fields", "paper", box=None, padding=(0, 2, 0, 0))
        for row in rows:
            table.add_row(f"[bold]{row['name']}[/]", *(escape(row[key]) for key in ("what", "text", "own", "paper")))
        stdout().print(table)
        say("kullback methods NAME shows one in full")
        return
    found = describe_method(name)
    if as_json:
        print_json(found)
        return
    stdout().print(found["documentation"], markup=False)
    table = Table("field", "default", "type", "meaning", box=None, padding=(0, 2, 0, 0))
    for field in found["fields"]:
        default = "needed" if field["needed"] else json.dumps(field["default"])
        table.add_row(f"[bold]{field['key']}[/]", *map(escape, (default, field["type"], field["meaning"])))
    stdout().print()
    stdout().print(table)


@app.command(rich_help_panel="What there is")
def divergences(as_json: AsJson = False) -> None:
    """List the named divergences: definition, parameter, largest value, other names.

    A recipe takes sums, unit(...), reversed(...) and skew(..., a) of them too:
      signal.divergence="0.7*forward_kl + 0.3*reverse_kl"
      signal.divergence="unit(jsd(0.1))"
    """
    from rich.markup import escape
    from rich.table import Table

    from kullback.divergence import divergences as family

    rows: list[dict[str, Any]] = [
        {
            "name": member.name,
            "equation": member.equation,
            "parameter": f"{member.parameter} {member.range}" if member.parameter else "",
            "default": member.default,
            "maximum": member.bounds[1],
            "aliases": list(member.aliases),
            "note": member.note,
        }
        for member in family().values()
    ]
    if as_json:
        print_json(rows)
        return
    table = Table("name", "D(target, model)", "parameter", "largest", "also", "note", box=None, padding=(0, 2, 0, 0))
    for row in rows:
        largest = f"{row['maximum']:.4g}".replace("inf", "∞")
        cells = (row["equation"], row["parameter"], largest, ", ".join(row["aliases"]), row["note"])
        table.add_row(f"[bold]{row['name']}[/]", *map(escape, cells))
    stdout().print(table)


@app.command(rich_help_panel="What there is")
def papers(as_json: AsJson = False) -> None:
    """List the 43 papers: what each claims, and the command that tests it where there is one."""
    from rich.markup import escape
    from rich.table import Table

    from kullback.papers import PAPERS

    if as_json:
        keys = ("number", "name", "title", "arxiv", "wing", "claim", "status", "command")
        print_json([{key: getattr(paper, key) for key in keys} for paper in PAPERS])
        return
    table = Table("", "paper", "claim", "wing", "arXiv", "status", box=None, padding=(0, 2, 0, 0))
    for paper in PAPERS:
        status = f"[green]{paper.command}[/]" if paper.module else "[dim]planned[/]"
        table.add_row(
            f"{paper.number:02d}", f"[bold]{escape(paper.name)}[/]", paper.claim, paper.wing, paper.arxiv, status
        )
    stdout().print(table)
    working = sum(paper.status == "working" for paper in PAPERS)
    say(f"{working} of {len(PAPERS)} run; the others are planned")


@app.command(rich_help_panel="What there is")
def reproduce(
    paper: Annotated[str, typer.Argument(metavar="NN", help="A paper's number or name: 05, vOPD.")],
    quick: Annotated[bool, typer.Option("--quick", help="A smaller experiment, to see that it runs.")] = False,
) -> None:
    """Run the small experiment that tests a paper's claim; print the table, write the page and say whether it held.

    [bold]Example[/bold]
      kullback reproduce 05
    """
    from importlib import import_module

    from kullback.cli.app import quiet_libraries
    from kullback.papers import PAPERS, find_paper

    found = find_paper(paper)
    if found.module is None:
        working = ", ".join(f"{other.number:02d} ({other.name})" for other in PAPERS if other.module) or "none yet"
        raise ValueError(
            f"paper={found.number:02d}: {found.name} is planned and has no experiment yet; working: {working}"
        )
    quiet_libraries()
    say(f"{found.number:02d} {found.name}: {found.claim}", style="bold")
    result = import_module(found.module).reproduce(quick=quick)
    page = getattr(result, "page", None)
    if page is not None:
        say(f"page: {where(page)}", style="bold")


@app.command(rich_help_panel="What there is")
def schema(
    method: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="Only recipes of this method.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it to this file.")] = None,
) -> None:
    """Print the JSON schema of recipes, for an editor that completes and checks them.

    [bold]Example[/bold]
      kullback schema --output docs/recipe.schema.json

    Then begin a recipe with:  # yaml-language-server: $schema=../docs/recipe.schema.json
    """
    from kullback.lm.recipe_schema import recipe_schema

    text = json.dumps(recipe_schema(method), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        typer.echo(text, nl=False)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    say(f"wrote {where(output)}")


@app.command(rich_help_panel="What there is")
def doctor(
    bench: Annotated[
        bool, typer.Option("--bench", help="Also measure, in under a minute, how fast kullback is here.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check this machine: versions, device, threads, extras, and that the shipped models run.

    Says for each thing that is missing what to do about it. Exit status 1 when something needed is missing, or when a
    measured loss is not the loss it should be.

    With --bench: the fused loss against the naive one, rollouts, statistics and whole steps, each with its tokens per
    second, and what keeps this machine from being faster.
    """
    from rich.table import Table
    from rich.text import Text

    from kullback.doctor import examine

    findings = examine()
    if not as_json:
        marks: dict[str, Any] = {
            "ok": Text("ok", "green"),
            "note": Text("-", "dim"),
            "missing": Text("missing", "bold red"),
        }
        table = Table("", "what", "found", "what to do", box=None, padding=(0, 2, 0, 0))
        for finding in findings:
            table.add_row(marks[finding.state], Text(finding.what), Text(finding.found), Text(finding.fix))
        stdout().print(table)
    failed = any(finding.state == "missing" for finding in findings)
    rows: Any = [finding.as_dict() for finding in findings]
    if bench and failed:
        say("not measured: first mend what is missing", style="yellow")
    elif bench:
        from kullback.bench import bench as measure
        from kullback.cli.app import quiet_libraries

        quiet_libraries()
        found = measure()
        failed = not found.agrees
        rows = {"findings": rows, "bench": found.as_dict()}
        if not as_json:
            _print_bench(found)
    if as_json:
        print_json(rows)
    if failed:
        raise typer.Exit(FAILED)


def _print_bench(found: "Bench") -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("measured")
    for title in ("seconds", "over L", "tokens / s", "MiB at its peak"):
        table.add_column(title, justify="right")
    for row in found.rows:
        table.add_row(
            Text(row.what),
            f"{row.seconds:.3f}",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}",
        )
    stdout().print()
    stdout().print(table)
    stdout().print(
        f"Losses and statistics: {found.tokens:,} tokens, width {found.width:,}, vocabulary {found.vocab:,}, float32, "
        "with the gradients of hidden states and head. "
        + ("All values and gradients agree with the naive ones." if found.agrees else ""),
        style="dim",
    )
    for line in found.advice:
        stdout().print(Text(f"! {line}", "yellow"))
