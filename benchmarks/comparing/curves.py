"""Curves over density: speed against dense, and memory against dense."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.comparing.results import Results, Row
from sparsekern.errors import DataError

FEWEST_POINTS = 4
"""Densities that make a curve."""


STEP, DENSE = "step", "dense"


class Curve(NamedTuple):
    """One block's line in a panel.

    Attributes:
        block: its edge; 1 is unstructured.
        points: (density, value), by density.
    """

    block: int
    points: tuple[tuple[float, float], ...]


class Panel(NamedTuple):
    """Curves of one layer.

    Attributes:
        title: which layer, and how it was run.
        curves: by block, largest first.
        others: curves of the same blocks to draw beside them, thinner.
    """

    title: str
    curves: tuple[Curve, ...]
    others: tuple[Curve, ...] = ()


def speedups(results: Results) -> tuple[Panel, ...]:
    """Time of dense over time of sparse in the same rounds, forward and backward.

    Raises:
        DataError: the file has no layer at enough densities.
    """
    return _panels(results, "speed", _speedup)


def memory(results: Results) -> tuple[Panel, ...]:
    """Bytes against dense: what training holds, and (others) a step's own peak.

    Raises:
        DataError: the file has no layer at enough densities.
    """
    held = _panels(results, "memory", lambda row: _share(row, "held_bytes"))
    peaks = _panels(results, "memory", lambda row: _share(row, "peak_bytes"))
    return tuple(
        panel._replace(others=peak.curves) for panel, peak in zip(held, peaks, strict=True)
    )


def digest(panels: Sequence[Panel]) -> str:
    """A hash of everything that is drawn."""
    return hashlib.sha256(json.dumps(panels).encode()).hexdigest()[:32]


def _panels(results: Results, kind: str, value: Callable[[Row], float | None]) -> tuple[Panel, ...]:
    """A panel for each layer that was measured at enough densities."""
    layers: dict[tuple[str, str], dict[int, dict[float, float]]] = {}
    for row in results.rows.values():
        if row.get("kind") != kind or row["operation"] != STEP:
            continue
        found = value(row)
        if found is not None:
            blocks = layers.setdefault((row["family"], row["name"]), {})
            blocks.setdefault(row["block"], {})[row["density"]] = found
    panels = []
    for (family, name), blocks in layers.items():
        curves = [
            Curve(block, tuple(sorted(points.items())))
            for block, points in sorted(blocks.items(), reverse=True)
            if len(points) >= FEWEST_POINTS
        ]
        if curves:
            panels.append(Panel(f"{family} {name}", tuple(curves)))
    if not panels:
        raise DataError(
            f"{results.path}: expected a layer measured at {FEWEST_POINTS} densities or more; got "
            f"none with rows of kind {kind!r}"
        )
    return tuple(panels)


def _speedup(row: Row) -> float | None:
    ratio: float | None = row["against"].get(DENSE, {}).get("ratio")
    return ratio


def _share(row: Row, part: str) -> float | None:
    """Bytes of the sparse layer over those of the dense one."""
    mine, dense = row[part].get("sparse"), row[part].get(DENSE)
    return mine / dense if mine and dense else None
