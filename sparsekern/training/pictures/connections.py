"""The picture of one method: connections move from the empty edge of the image to where the ink is.

After the figure in the RigL authors' blog post: how many connections leave each input pixel, before
and after training, beside the average image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsekern.errors import ConfigError
from sparsekern.show.output_files import write_figure
from sparsekern.training.outcome import Connections
from sparsekern.training.pictures.style import check_available, look


class Drawn(Protocol):
    """What is asked of a run."""

    @property
    def method(self) -> str:
        """Its name."""

    @property
    def connections(self) -> Connections | None:
        """Before and after training."""


def draw(results: Sequence[Drawn], average: Tensor, path: Path, subtitle: str = "") -> None:
    """Write a PNG with three panels: average image, connections at the start, and at the end.

    Args:
        results: runs of one method; their connections are averaged.
        average: mean training image, (height, width).
        path: of the PNG.
        subtitle: a line on what was trained.

    Raises:
        ConfigError: the first layer of the model is not fully connected to the image.
        UnavailableError: matplotlib is not installed.
    """
    check_available()
    # Figure objects instead of pyplot: no global state, and no window system is asked for
    from matplotlib.figure import Figure  # noqa: PLC0415

    start, end = mean_connections(results, tuple(average.shape))
    figure = Figure(figsize=(11, 4.1), dpi=150, layout="constrained")
    _titles(figure, results, subtitle)
    panels = figure.subplots(1, 3)
    ink = panels[0].imshow(average.cpu().numpy(), cmap="gray", vmin=0)
    panels[0].set_title("average training image")
    figure.colorbar(ink, ax=panels[0], shrink=0.8, label="brightness")
    top = max(float(start.max()), float(end.max()))
    for panel, counts, when in zip(panels[1:], (start, end), ("start", "end"), strict=True):
        shown = panel.imshow(counts.numpy(), cmap="magma", vmin=0, vmax=top)
        panel.set_title(f"{when} of training")
    figure.colorbar(shown, ax=panels[1:].tolist(), shrink=0.8, label="connections per pixel")
    for panel in panels:
        panel.set_xticks([])
        panel.set_yticks([])
    write_figure(figure, path)


def mean_connections(
    results: Sequence[Drawn], image_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Connections that leave each pixel at start and end, mean over runs: (height, width) each.

    Raises:
        ConfigError: the first layer of the model is not fully connected to the image.
    """
    known = [r.connections for r in results if r.connections is not None]
    if len(known) < len(results):
        raise ConfigError(
            "a picture shows the connections of each pixel with a fully connected first layer; "
            "this model has another"
        )
    starts = torch.stack([connections.start.double() for connections in known])
    ends = torch.stack([connections.end.double() for connections in known])
    return starts.mean(0).view(image_shape), ends.mean(0).view(image_shape)


def _titles(figure: Any, results: Sequence[Drawn], subtitle: str) -> None:
    name = look(results[0].method).label
    figure.suptitle(f"{name}: connections from the image into the first layer", fontsize=14)
    if subtitle:
        figure.supxlabel(subtitle, fontsize=9, color="0.35")
