"""Loss and accuracy over time: against weight steps, and against seconds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from sparsekern.errors import ConfigError
from sparsekern.training.pictures.runs import Cell, Point, Run, Runs, best_rates, one_setting
from sparsekern.training.pictures.style import (
    INK,
    Series,
    figure,
    height_of,
    legend,
    log_scale,
    plain,
)

FEWEST = 2


def draw_curves(runs: Runs) -> Any:
    """Mean over seeds of the training loss, and of the accuracy on a validation split.

    Raises:
        ConfigError: there is no curve with two points.
    """
    runs, others = one_setting(best_rates(runs))
    drawn = {c: group for c, group in runs.groups.items() if len(group[0].curve) >= FEWEST}
    if not drawn:
        raise ConfigError("loss over time needs runs with two points or more in their curves")
    rows = [("training loss, nats", _loss)]
    if all(p.accuracy is not None for g in drawn.values() for r in g for p in r.curve):
        rows.append(("validation accuracy, %", _accuracy))
    lacking = "" if len(rows) == 2 else "no accuracy over time: the runs have no validation split"
    below = "; ".join(filter(None, (lacking, others)))
    series = Series(drawn)
    title = ", ".join(filter(None, (f"Over time: {runs.title}", series.shared)))
    made = figure(10.5, height_of(series.handles(), 0.9 + 3.1 * len(rows)), title, below)
    panels = made.subplots(len(rows), 2, sharey="row", squeeze=False)
    for row, (name, of) in zip(panels, rows, strict=True):
        for axes, (unit, at) in zip(row, _TIMES, strict=True):
            for cell, group in drawn.items():
                _line(axes, cell, group, series, at, of)
            plain(axes)
            axes.set_xlabel(unit, color=INK)
        row[0].set_ylabel(name, color=INK)
    losses = [p.loss for group in drawn.values() for run in group for p in run.curve]
    if min(losses) > 0:
        log_scale(panels[0][0], "y", max(losses) / min(losses))
    made.align_ylabels(panels[:, 0])
    legend(made, series.handles())
    return made


def _line(
    axes: Any,
    cell: Cell,
    group: Sequence[Run],
    series: Series,
    at: Callable[[Point], float],
    of: Callable[[Point], float],
) -> None:
    points = list(zip(*(run.curve for run in group), strict=False))
    style = series.style(cell) | {"markevery": max(1, len(points) // 6)}
    style["markersize"] *= 0.7
    axes.plot(
        [statistics.fmean(map(at, seeds)) for seeds in points],
        [statistics.fmean(map(of, seeds)) for seeds in points],
        label=series.label(cell),
        **style,
    )


def _loss(point: Point) -> float:
    return point.loss


def _accuracy(point: Point) -> float:
    return 100 * (point.accuracy or 0.0)


_TIMES: tuple[tuple[str, Callable[[Point], float]], ...] = (
    ("weight steps", lambda point: point.step),
    ("seconds of training", lambda point: point.seconds),
)
