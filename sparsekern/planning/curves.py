"""What was measured of layers, and what follows from it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsekern.cost.crossing import BreakEven, break_even
from sparsekern.cost.layers import Layer
from sparsekern.cost.predict import Cut, Estimate, Times


@dataclass(frozen=True)
class Curve:
    """What was measured of one layer.

    Attributes:
        dense: seconds of the dense layer's training step.
        points: by block, (density, sparse time / dense time), ascending; each
            the median over rounds, of two runs' the mean.
        rounds: of the fewest that a point is the median of.
    """

    dense: float
    points: Mapping[Cut, tuple[tuple[float, float], ...]]
    rounds: int

    def ratio(self, block: Cut, density: float) -> float:
        """Sparse time / dense time, between two points straight on log density.

        Below the lowest point nothing is assumed to be gained, above the highest the time to grow
        with the density.
        """
        points = self.points[block]
        (low, first), (high, last) = points[0], points[-1]
        if density <= low:
            return first
        if density >= high:
            return last * (density / high)
        for (d0, r0), (d1, r1) in itertools.pairwise(points):
            if density <= d1:
                return r0 + (r1 - r0) * math.log(density / d0) / math.log(d1 / d0)
        return last

    def break_even(self, blocks: Iterable[Cut]) -> BreakEven | None:
        """With the best of the blocks at each density."""
        best: dict[float, float] = {}
        for block in blocks:
            for density, ratio in self.points.get(block, ()):
                best[density] = min(ratio, best.get(density, math.inf))
        return break_even((density, 1 / ratio) for density, ratio in best.items())


@dataclass(frozen=True)
class Measured:
    """Answers from curves, and from predictions for layers without one.

    Attributes:
        curves: by `Layer.key`.
        otherwise: predictions.
        where: device and threads, in words.
    """

    curves: Mapping[tuple[Any, ...], Curve]
    otherwise: Times
    where: str

    def source(self, layer: Layer) -> str:
        """Measured, or predicted for want of time."""
        if layer.key() in self.curves:
            return f"measured on {self.where}"
        return f"{self.otherwise.source(layer)}; not measured"

    def dense(self, layer: Layer) -> float:
        """Seconds of the dense layer."""
        curve = self.curves.get(layer.key())
        return self.otherwise.dense(layer) if curve is None else curve.dense

    def sparse(self, layer: Layer, block: Cut, sparsities: Sequence[float]) -> Estimate:
        """By the density of the whole layer."""
        curve = self.curves.get(layer.key())
        if curve is None or block not in curve.points:
            return self.otherwise.sparse(layer, block, sparsities)
        return Estimate(curve.dense * curve.ratio(block, density_of(layer, sparsities)))

    def break_even(self, layer: Layer, blocks: Sequence[Cut]) -> BreakEven:
        """From the curve."""
        curve = self.curves.get(layer.key())
        found = None if curve is None else curve.break_even(blocks)
        return self.otherwise.break_even(layer, blocks) if found is None else found


def density_of(layer: Layer, sparsities: Sequence[float]) -> float:
    """Of all weights of a layer."""
    parts = zip(layer.parts, sparsities, strict=True)
    return sum(part.size * (1 - s) for part, s in parts) / layer.size
