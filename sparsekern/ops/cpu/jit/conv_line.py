"""How a convolution becomes a one-dimensional one: taps as shifts along a line of pixels.

See `conv_pack` for the line. Padding is shared between neighbours: the zeros to the right of a
row are those to the left of the next one, so the line is hardly longer than the image. A stride of
s splits rows (and columns) into s phases, of which those that a tap reads are kept; on a phase the
convolution has stride 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsekern.ops.geometry import ConvGeometry

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class _Axis:
    """One axis of the line: rows or columns.

    Attributes:
        size: outputs.
        extent: places per image, outputs and zeros between neighbours included.
        phases: of those that are read: (offset into the image, first, last + 1 place of a pixel).
        taps: phase and shift of each tap.
        complete: whether every pixel of the input is read.
    """

    size: int
    extent: int
    phases: list[tuple[int, int, int]]
    taps: list[tuple[int, int]]
    complete: bool


def _axis(size: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int) -> _Axis:
    taps = [divmod(i * dilation, stride) for i in range(kernel)]
    used = sorted({phase for _, phase in taps})
    phases, extent = [], outputs
    for phase in used:
        reach = outputs + max(shift for shift, a in taps if a == phase)
        first = max(0, -((phase - padding) // stride))
        last = max(first, min((size - 1 + padding - phase) // stride + 1, reach))
        phases.append((phase - padding, first, last))
        extent = max(extent, last, reach - first)
    complete = sum(last - first for _, first, last in phases) == size
    places = [(used.index(phase), shift) for shift, phase in taps]
    return _Axis(outputs, extent, phases, places, complete)


@dataclass(frozen=True, eq=False)
class Line:
    """A convolution on a line of pixels.

    Attributes:
        images: N.
        rows: the vertical axis.
        columns: the horizontal one.
        stride: (sh, sw).
        taps: phase and shift of each tap, (taps, 2).
        reach: the largest shift.
    """

    images: int
    rows: _Axis
    columns: _Axis
    stride: tuple[int, int]
    taps: Ints
    reach: int

    @staticmethod
    def of(images: int, size: tuple[int, int], g: ConvGeometry) -> Line:
        """The line for `images` inputs of (H, W)."""
        outputs = g.output_size(*size)
        rows, columns = (
            _axis(size[i], outputs[i], g.kernel[i], g.stride[i], g.padding[i], g.dilation[i])
            for i in range(2)
        )
        width = len(columns.phases)
        pairs = [
            (a * width + b, r * columns.extent + s) for a, r in rows.taps for b, s in columns.taps
        ]
        reach = max(shift for _, shift in pairs)
        return Line(images, rows, columns, g.stride, np.array(pairs, np.int64), reach)

    @property
    def length(self) -> int:
        """Places of the whole line."""
        return self.images * self.rows.extent * self.columns.extent

    @property
    def phases(self) -> int:
        """Views of the input."""
        return len(self.rows.phases) * len(self.columns.phases)

    @property
    def complete(self) -> bool:
        """Whether every pixel of the input is read."""
        return self.rows.complete and self.columns.complete

    def inputs(self, strides: Sequence[int]) -> Ints:
        """Views of an input image of these strides, one per phase, (phases, VIEW)."""
        (n, c, h, w), (sh, sw) = strides, self.stride
        steps = (n, sh * h, sw * w, c)
        views = [
            [*self._frame(), *row[1:], *column[1:], row[0] * h + column[0] * w, *steps]
            for row in self.rows.phases
            for column in self.columns.phases
        ]
        return np.array(views, np.int64)

    def outputs(self, strides: Sequence[int]) -> Ints:
        """View of an output image of these strides, (1, VIEW)."""
        n, c, h, w = strides
        sizes = [0, self.rows.size, 0, self.columns.size]
        return np.array([[*self._frame(), *sizes, 0, n, h, w, c]], np.int64)

    def _frame(self) -> tuple[int, int, int]:
        return self.columns.extent, self.rows.extent, self.images
