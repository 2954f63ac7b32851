"""The pictures of a run: samples of teacher and student side by side, and the weight as a function of the ratio."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kullback.divergence import FDivergence

LOOKS = ("#0072b2", "#d55e00", "#009e73", "#b5529b", "#c98a00", "#16191d", "#6b5bd2", "#77684f")


def show_samples(axis: Any, samples: Tensor, title: str, *, columns: int = 8, limit: float = 4.0) -> None:
    """Points of the plane, or the first images of a batch in a grid."""
    axis.set_title(title, fontsize=9)
    samples = samples.detach().float()
    if samples.dim() == 2:
        axis.plot(samples[:, 0], samples[:, 1], ".", markersize=1.5, alpha=0.5, color=LOOKS[0])
        axis.set_xlim(-limit, limit)
        axis.set_ylim(-limit, limit)
        axis.set_aspect("equal")
        return
    axis.imshow(tile(samples, columns), cmap="gray" if samples.shape[1] == 1 else None, vmin=0, vmax=1)
    axis.set_axis_off()


def tile(images: Tensor, columns: int = 8) -> Any:
    """[row, channel, height, width] in [-1, 1] -> one picture [height, width(, 3)] in [0, 1], a pixel apart."""
    images = images[: len(images) // columns * columns].clamp(-1, 1) / 2 + 0.5
    images = torch.nn.functional.pad(images, (0, 1, 0, 1), value=1.0)
    _, channels, height, width = images.shape
    grid = images.reshape(-1, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    picture = grid.reshape(-1, columns * width, channels)
    return (picture[..., 0] if channels == 1 else picture).numpy()


def show_weights(axis: Any, curves: Mapping[str, FDivergence]) -> None:
    """h(r) on unit scale, both axes logarithmic."""
    log_ratio = torch.linspace(-3, 3, 121, dtype=torch.float64)
    for (name, divergence), color in zip(curves.items(), LOOKS, strict=False):
        axis.plot(log_ratio.exp(), divergence.unit.curvature(log_ratio), color=color, label=name, linewidth=1.4)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(0.04, 25)
    axis.set_xlabel("ratio r = target / model", fontsize=9)
    axis.set_ylabel("weight h(r), h(1) = 1", fontsize=9)
    axis.legend(fontsize=7, frameon=False)


def side_by_side(panels: Sequence[tuple[str, Tensor]], weights: Mapping[str, FDivergence]) -> Any:
    """A figure: one panel of samples for each pair, then the weights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * (len(panels) + 1), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels) + 1, squeeze=False)[0]
    for axis, (title, samples) in zip(axes, panels, strict=False):
        show_samples(axis, samples, title)
    show_weights(axes[-1], weights)
    return figure
