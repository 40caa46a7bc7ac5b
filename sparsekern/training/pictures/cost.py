"""Accuracy against training FLOPs, and against the length of training: two views of all methods.

After figures 2 and 3 of the RigL paper (Evci et al. 2020).
"""

from __future__ import annotations

from typing import Any

from sparsekern.errors import ConfigError
from sparsekern.training.config import DENSE
from sparsekern.training.pictures.runs import Cell, Runs, best_rates, measure, score
from sparsekern.training.pictures.style import (
    INK,
    Series,
    figure,
    height_of,
    legend,
    log_scale,
    plain,
)


def draw_cost(runs: Runs) -> Any:
    """Each method at its training FLOPs, over those of dense training; seeds as error bars.

    A line joins the sparsities of a method.

    Raises:
        ConfigError: there is no run of a sparse method.
    """
    runs = best_rates(runs)
    if all(cell.method == DENSE for cell in runs.groups):
        raise ConfigError("accuracy against training FLOPs needs a run besides dense training")
    series = Series(runs.groups, "sparsity")
    made, axes = _figure("What accuracy costs to train", runs, series)
    name, of = measure(runs)
    ratios = {
        c: score(group, lambda run: run.training_ratio).mean for c, group in runs.groups.items()
    }
    _lines(axes, runs, series, ratios.__getitem__, of)
    sparse = [ratio for cell, ratio in ratios.items() if cell.method != DENSE]
    log_scale(axes, "x", max(sparse) / min(sparse))
    axes.set_xlabel("training FLOPs, x dense", color=INK)
    _finish(axes, runs, name, of)
    legend(made, series.handles() + axes.get_legend_handles_labels()[0])
    return made


def draw_length(runs: Runs) -> Any:
    """Each method at each length of training.

    Raises:
        ConfigError: all runs have one length.
    """
    runs = best_rates(runs)
    lengths = sorted({cell.multiplier for cell in runs.groups})
    if len(lengths) < 2:
        raise ConfigError(
            "accuracy against training length needs runs of several lengths; "
            f"all have {lengths[0]:g}x"
        )
    series = Series(runs.groups, "multiplier")
    made, axes = _figure("What longer training gives", runs, series)
    name, of = measure(runs)
    _lines(axes, runs, series, lambda cell: cell.multiplier, of)
    axes.set_xscale("log")
    axes.set_xticks(lengths, [f"{length:g}x" for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("length of training", color=INK)
    _finish(axes, runs, name, of)
    legend(made, series.handles() + axes.get_legend_handles_labels()[0])
    return made


def _figure(what: str, runs: Runs, series: Series) -> tuple[Any, Any]:
    title = ", ".join(filter(None, (f"{what}: {runs.title}", series.shared)))
    made = figure(8.4, height_of(series.handles(), 5.0), title, _below(runs))
    return made, made.subplots()


def _lines(axes: Any, runs: Runs, series: Series, at: Any, of: Any) -> None:
    lines: dict[Any, list[Cell]] = {}
    for cell in runs.groups:
        if cell.method != DENSE or series.along == "multiplier":
            lines.setdefault(series.key(cell), []).append(cell)
    for cells in lines.values():
        cells.sort(key=at)
        scores = [score(runs.groups[cell], of) for cell in cells]
        axes.errorbar(
            [at(cell) for cell in cells],
            [s.mean for s in scores],
            yerr=[s.spread for s in scores],
            label=f"_{series.label(cells[0])}",  # the legend is made of handles
            elinewidth=1,
            capsize=2.5,
            **series.style(cells[0]),
        )


def _finish(axes: Any, runs: Runs, name: str, of: Any) -> None:
    plain(axes)
    axes.set_ylabel(name, color=INK)
    dense = [c for c in runs.groups if c.method == DENSE]
    if dense:
        shortest = min(dense, key=lambda cell: abs(cell.multiplier - 1))
        level, spread = score(runs.groups[shortest], of)
        label = f"dense, {shortest.multiplier:g}x"
        axes.axhline(level, color="black", linestyle=(0, (5, 3)), linewidth=1.2, label=label)
        axes.axhspan(level - spread, level + spread, color="black", alpha=0.07, linewidth=0)


def _below(runs: Runs) -> str:
    seeds = sorted({len(group) for group in runs.groups.values()})
    told = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    text = "one seed" if told == "1" else f"mean and standard deviation of {told} seeds"
    return f"{text}; left out: {', '.join(runs.failed)}" if runs.failed else text
