"""kullback diffusion: one-step generators by f-divergence distribution matching."""

import warnings
from pathlib import Path
from typing import Annotated

import typer

from kullback.cli.app import AsJson, Overwrite, Resume, app, print_json, say, stdout, where


@app.command(rich_help_panel="Train and grade")
def diffusion(
    data: Annotated[str, typer.Argument(metavar="DATA", help="two_modes, ring, digits, or a folder of images.")],
    divergence: Annotated[
        list[str] | None,
        typer.Option("--divergence", "-d", metavar="NAME", help="What to minimise; may be given several times."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The directory to write to.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each student's loop; it moves in one of five.")] = 12_000,
    teacher_steps: Annotated[int, typer.Option(min=1, help="Steps of a teacher that is to be trained.")] = 10_000,
    teacher: Annotated[str | None, typer.Option(help="A diffusers pipeline: its network and scheduler.")] = None,
    network: Annotated[str, typer.Option(help="mlp, or a network of diffusers by name: UNet2DModel.")] = "mlp",
    scheduler: Annotated[str | None, typer.Option(help="Of a diffusers network, by name: DDPMScheduler.")] = None,
    student: Annotated[str, typer.Option(help="network, or affine: too small for more than one mode.")] = "network",
    width: Annotated[int, typer.Option(min=8, help="Width of the hidden layers.")] = 256,
    batch: Annotated[int, typer.Option(min=2, help="Samples in a step.")] = 256,
    normaliser: Annotated[str, typer.Option(help="level or none: true gradients; dmd: as the paper's code.")] = "level",
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Distil a diffusion model into generators that need one call, one for each divergence.

    [bold]Examples[/bold]
      kullback diffusion digits
      kullback diffusion two_modes --student affine -d reverse_kl -d "jsd(0.5)" -d forward_kl
      kullback diffusion my-images --network UNet2DModel --scheduler DDPMScheduler

    Trains the teacher, then a one-step student for each divergence (reverse_kl and forward_kl unless named). Samples
    side by side, weights, curves and measures are in report.html. Ctrl-C finishes the step and keeps a checkpoint.
    """
    from kullback.diffusion.api import distil_each

    place = output or Path("runs") / f"diffusion-{Path(data).name}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        runs = distil_each(
            data,
            divergence or ["reverse_kl", "forward_kl"],
            place,
            steps=steps,
            teacher=teacher,
            teacher_steps=teacher_steps,
            network=network,
            scheduler=scheduler,
            student=student,
            width=width,
            batch=batch,
            normaliser=normaliser,
            seed=seed,
            resume=resume,
            overwrite=overwrite,
        )
    show_images([run.directory for run in runs], place / "report.html", as_json)
    for text in dict.fromkeys(str(item.message) for item in caught if item.category is UserWarning):
        say(f"warning: {text}", style="yellow")


def show_images(runs: list[Path], page: Path, as_json: bool) -> None:
    """The table of runs and where the report is."""
    from rich.table import Table

    from kullback.diffusion.report import cell, columns_of, table_rows
    from kullback.run.directory import RunDirectory

    rows = table_rows([RunDirectory(run) for run in runs])
    if as_json:
        print_json({"runs": rows, "report": str(page)})
        return
    columns = columns_of(rows)
    table = Table("", box=None, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["label"], *(cell(row, name) for name in columns))
    stdout().print(table)
    say(f"report: {where(page)}", style="bold")
