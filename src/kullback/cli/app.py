"""The application: its options, how it says what went wrong, and what its commands share."""

import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

if TYPE_CHECKING:
    from kullback.lm.recipe import Recipe

WRONG_INPUT, FAILED, INTERRUPTED = 2, 1, 130

RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A recipe file, a run directory, or a shipped recipe's name (quickstart)."),
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe to set, such as signal.divergence=hellinger."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for scripts.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a stopped run left off.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the output directory.")]


class Commands(TyperGroup):
    """Errors as one sentence: 2 for what the caller can mend, 1 for what failed, 130 for Ctrl-C."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["kullback.arguments"] = list(args)
        if "--debug" in args:  # wherever it stands
            args = ["--debug", *(argument for argument in args if argument != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            arguments = [item for item in ctx.meta["kullback.arguments"] if item not in ("--overwrite", "--resume")]
            say("stopped", style="yellow")
            if arguments and arguments[0] in ("train", "compare", "diffusion"):
                say(f"go on with: {shlex.join(['kullback', *arguments, '--resume'])}")
            raise typer.Exit(INTERRUPTED) from None
        except ValueError as error:
            raise typer.Exit(_explain(ctx, error, WRONG_INPUT)) from error
        except (OSError, FloatingPointError, ImportError) as error:
            raise typer.Exit(_explain(ctx, error, FAILED)) from error


def _explain(ctx: Any, error: Exception, code: int) -> int:
    if ctx.params.get("debug") or os.environ.get("KULLBACK_DEBUG"):
        traceback.print_exception(error)
    else:
        say(f"error: {' '.join(str(error).split())}", style="bold red")
    return code


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from kullback import __version__

        typer.echo(f"kullback {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Post-train language models by divergences: any divergence, through any gradient, on anyone's text.

    [bold]Start here[/bold]
      kullback compare quickstart           three divergences, in minutes
      kullback train on_policy_distillation signal.divergence=hellinger
      kullback explain gkd signal.beta=0.1  what would be minimised, in words

    [bold]Then[/bold]
      kullback methods                      what there is to train with
      kullback divergences                  what there is to minimise
      kullback papers                       43 claims; `reproduce 05` tests one
      kullback doctor                       does this machine have what it needs?
    """


def say(message: str, style: str | None = None) -> None:
    """A line for the person, on standard error: standard output is for results."""
    stderr().print(message, style=style, markup=False, soft_wrap=True)


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def stdout() -> Console:
    """Wide enough for a table where nobody's terminal sets the width."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def print_json(value: Any) -> None:
    """Strict JSON on standard output."""
    from kullback.run.directory import strict

    typer.echo(json.dumps(strict(value), indent=2, ensure_ascii=False))


def get_recipe(name: str, settings: Iterable[str] | None) -> "Recipe":
    """The recipe with what the command line overrides."""
    from kullback.lm.recipe import parse_override, read_recipe

    quiet_libraries()
    return read_recipe(name).override(parse_override(text) for text in settings or ())


def quiet_libraries() -> None:
    """One progress bar is enough, and notes to developers are not for the terminal."""
    import warnings

    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


def where(path: str | Path) -> str:
    """A path as short as it can be written from here."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
