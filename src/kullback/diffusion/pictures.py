"""The pictures of a run: samples of teacher and students side by side, and the weight as a function of the ratio."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kullback.divergence import FDivergence
from kullback.report.style import COLORS

LOG_RATIO = torch.linspace(-3, 3, 121, dtype=torch.float64)  # where h(r) is drawn


def weight_curve(divergence: FDivergence) -> Float[Tensor, "121"]:
    """h on unit scale, h(1) = 1, at `LOG_RATIO`."""
    return divergence.unit.curvature(LOG_RATIO)


def show_samples(axis: Any, samples: Tensor, title: str, *, columns: int = 8, limit: float = 4.0) -> None:
    """Points of the plane (of more coordinates, the first two), a histogram, or the first images in a grid."""
    axis.set_title(title, fontsize=9)
    samples = samples.detach().float()
    if samples.dim() == 2 and samples.shape[1] == 1:
        axis.hist(samples[:, 0].numpy(), 60, density=True, color=COLORS[0])
        return
    if samples.dim() == 2:
        axis.plot(samples[:, 0], samples[:, 1], ".", markersize=1.5, alpha=0.5, color=COLORS[0])
        axis.set_xlim(-limit, limit)
        axis.set_ylim(-limit, limit)
        axis.set_aspect("equal")
        axis.tick_params(labelsize=8)
        return
    axis.imshow(tile(samples[: columns**2], columns), cmap="gray", vmin=0, vmax=1)
    axis.set_axis_off()


def tile(images: Float[Tensor, "row channel height width"], columns: int = 8) -> Any:
    """Values in [-1, 1] -> one picture [height, width(, 3)] in [0, 1], a pixel apart; what fills no row is left out."""
    columns = min(columns, len(images))
    images = images[: len(images) // columns * columns].clamp(-1, 1) / 2 + 0.5
    images = torch.nn.functional.pad(images, (0, 1, 0, 1), value=1.0)
    _, channels, height, width = images.shape
    grid = images.reshape(-1, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    picture = grid.reshape(-1, columns * width, channels)
    return (picture[..., 0] if channels == 1 else picture).numpy()


def show_weights(axis: Any, curves: Mapping[str, Float[Tensor, "121"]]) -> None:
    """h(r) of each divergence, both axes logarithmic."""
    for (name, curve), color in zip(curves.items(), COLORS, strict=False):
        axis.plot(LOG_RATIO.exp(), curve, color=color, label=name, linewidth=1.4)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(0.04, 25)
    axis.set_xlabel("ratio r = target / model", fontsize=9)
    axis.set_ylabel("weight h(r), h(1) = 1", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7, frameon=False)


def show_metric(axis: Any, runs: Mapping[str, Sequence[Mapping[str, Any]]], key: str, title: str) -> None:
    """One logged number of each run against the step; log axis where all of it is positive."""
    drawn: list[float] = []
    for (name, rows), color in zip(runs.items(), COLORS, strict=False):
        found = [(row["step"], row[key]) for row in rows if key in row]
        if found:
            axis.plot(*zip(*found, strict=True), color=color, label=name, linewidth=1.0)
            drawn += [value for _, value in found]
    if drawn and min(drawn) > 0:
        axis.set_yscale("log")
    axis.set_xlabel("step", fontsize=9)
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=8)


def side_by_side(panels: Sequence[tuple[str, Tensor]], weights: Mapping[str, Tensor], columns: int = 4) -> Any:
    """A figure: a panel of samples for each pair, on the scale of the first one's, then the weights."""
    figure, axes = new_figure(len(panels) + 1, columns)
    limit = 1.1 * float(panels[0][1].abs().max())
    for axis, (title, samples) in zip(axes, panels, strict=False):
        show_samples(axis, samples, title, limit=limit)
    show_weights(axes[len(panels)], weights)
    return figure


def new_figure(panels: int, columns: int = 4) -> tuple[Any, list[Any]]:
    """A figure without a display, and its axes, `columns` in a row; those left over are hidden."""
    from matplotlib.figure import Figure

    columns = min(columns, panels)
    rows = -(-panels // columns)
    wide, high = 3.5 * columns, 3.3 * rows  # inches
    figure = Figure(figsize=(wide, high))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    # fixed margins: a layout that measures its labels takes a second
    figure.subplots_adjust(0.65 / wide, 0.6 / high, 1 - 0.15 / wide, 1 - 0.3 / high, wspace=0.24, hspace=0.32)
    for axis in axes[panels:]:
        axis.set_axis_off()
    return figure, axes
