"""kullback frontier: trained policies beside the optimum and best-of-N of the reference they started from."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kullback.cli.app import AsJson, app, print_json, quiet_libraries, say, stdout, where

if TYPE_CHECKING:
    from kullback.report.runs import RunData
    from kullback.theory.frontier import Frontier, Standing


@app.command(rich_help_panel="Train and grade")
def frontier(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories or comparison directories.")],
    problems: Annotated[int, typer.Option(min=2, help="Held-out problems.")] = 200,
    samples: Annotated[int, typer.Option(min=2, help="Completions of each, per policy.")] = 16,
    reward: Annotated[str, typer.Option(help="Which number of the verifier is the reward.")] = "accuracy",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The directory to write to.")] = None,
    as_json: AsJson = False,
) -> None:
    """Plot reward against KL: where trained policies stand, the best any policy could do, and best-of-N.

    [bold]Examples[/bold]
      kullback frontier runs/quickstart-compare
      kullback frontier runs/a runs/b --problems 500 --samples 64

    The reference is the student as it was before training. The curve is the most reward that a KL from it can buy,
    prompt by prompt from the reference's own samples; KL(policy, optimum) follows from reward and KL alone (paper 24).
    Standard errors are over problems. Writes frontier.png and frontier.json.
    """
    from kullback.lm.frontier import Ground
    from kullback.report.runs import load_runs
    from kullback.theory.frontier import Frontier

    quiet_libraries()
    data = load_runs(runs).runs
    for run in data:
        if not (run.recipe and (run.path / "model").is_dir()):
            raise ValueError(f"runs={run.path}: there is no recipe.yaml and model/ in it; let the run finish first")
    ground = Ground(data[0].path, problems=problems, samples=samples, reward=reward)
    for run in data[1:]:
        ground.check_same(run.path)
    reference = ground.reference()
    drawn = {run.label: ground.trained(run.path) for run in data}
    judged = reference.rewards.isfinite().all(1)
    for policy in drawn.values():
        judged &= policy.rewards.isfinite().all(1)
    if int(judged.sum()) < 2:
        raise ValueError(f"problems={problems}: the verifier judged {int(judged.sum())} of them; at least 2 are needed")
    plane = Frontier(reference.rewards[judged])
    found: dict[str, Standing] = {"reference": plane.best_of(1)}
    found |= {f"best of {n}": plane.best_of(n) for n in (2**k for k in range(1, samples.bit_length()))}
    found |= {
        label: plane.place(policy.kl[judged].mean(1), policy.rewards[judged].mean(1))
        for label, policy in drawn.items()
        if policy.kl is not None
    }
    folder = output or (Path(runs[0]) if len(runs) == 1 else Path("."))
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "frontier.json", plane, found, reward, int(judged.sum()), samples)
    _draw(folder / "frontier.png", plane, found, data, reward)
    if as_json:
        print_json({label: standing.as_dict() for label, standing in found.items()})
    else:
        _print(found, reward)
    say(f"{int(judged.sum())} problems, {samples} completions of each policy at temperature 1")
    say(f"figure: {where(folder / 'frontier.png')}", style="bold")


COLUMNS = {
    "kl": "KL from reference",
    "reward": "",
    "attainable": "optimum at this KL",
    "distance": "KL to it",
    "needed": "KL needed",
    "excess": "in excess",
}


def _write(
    file: Path, plane: "Frontier", found: "dict[str, Standing]", reward: str, problems: int, samples: int
) -> None:
    from kullback.run.directory import write_json

    kl, gained = plane.curve()
    policies = {label: standing.as_dict() for label, standing in found.items()}
    optimum = {"kl": kl.tolist(), "reward": gained.tolist()}
    counts = {"problems": problems, "samples": samples}
    write_json(file, {"reward": reward, **counts, "optimum": optimum, "policies": policies})


def _print(found: "dict[str, Standing]", reward: str) -> None:
    from rich.table import Table

    columns = COLUMNS | {"reward": reward}
    table = Table("policy", box=None, padding=(0, 2, 0, 0))
    for title in columns.values():
        table.add_column(title, justify="right")
    for label, standing in found.items():
        numbers = standing.as_dict()
        table.add_row(label, *(_number(**numbers[name]) for name in columns))
    stdout().print(table)
    say(
        "KL in nats per completion, ± standard error over problems. `KL to it`: KL(policy, optimum of equal KL). "
        "`KL needed`: by the optimum, for this reward; what is in excess is KL(policy, optimum of equal reward). "
        "-: the reference's samples do not reach that far."
    )


def _number(value: float, standard_error: float) -> str:
    if not math.isfinite(value):
        return "-"
    error = f" ± {standard_error:.3f}" if standard_error >= 5e-4 else ""
    return f"{abs(value) if abs(value) < 5e-4 else value:.3f}{error}"  # no -0.000


def _draw(file: Path, plane: "Frontier", found: "dict[str, Standing]", data: "list[RunData]", reward: str) -> None:
    import matplotlib

    matplotlib.use("agg", force=False)
    from matplotlib import pyplot

    from kullback.report.figures import LINES, LOOK, SHAPES
    from kullback.report.style import COLORS, styles

    with pyplot.rc_context(LOOK):
        figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
        kl, gained = plane.curve()
        axes.plot(kl, gained, color="#16191d", label="optimum", zorder=1)
        best = [found[label] for label in found if label == "reference" or label.startswith("best of ")]
        axes.plot(
            [standing.kl.value for standing in best],
            [standing.reward.value for standing in best],
            color="#6b7480",
            linestyle=LINES[2],
            marker="o",
            markersize=4,
            markerfacecolor="white",
            label=f"best of 1 to {2 ** (len(best) - 1)}",
        )
        for run, look in zip(data, styles(data), strict=True):
            standing = found[run.label]
            axes.errorbar(
                standing.kl.value,
                standing.reward.value,
                xerr=_bar(standing.kl.standard_error),
                yerr=_bar(standing.reward.standard_error),
                color=COLORS[look.color],
                marker=SHAPES[look.dash],
                markersize=6,
                elinewidth=1.2,
                linestyle="none",
                label=run.label,
            )
        widest = max(standing.kl.value for standing in found.values())
        if widest > 20 * float(kl[-1]) > 0:
            axes.set_xscale("symlog", linthresh=float(kl[-1]))
        axes.axhline(gained[-1].item(), color="#9aa3ae", linewidth=0.8, linestyle=LINES[1], zorder=0)
        axes.set(xlabel="KL(policy ‖ reference), nats per completion", ylabel=reward)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(file, dpi=160)
        pyplot.close(figure)


def _bar(error: float) -> Any:
    return None if math.isnan(error) else error
