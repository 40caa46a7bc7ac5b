"""Sparse convolution without numba: a few pixels at a time are unfolded and multiplied.

A chunk of output pixels is copied as (pixels, taps channels), `ELEMENTS` numbers at most and never
more than a quarter of the activations, and handed to the linear products of `blas` or
`csr`. Channels are padded to whole blocks there, so one group is an ordinary sparse matrix.
FLOPs: 2 N P Q bh bw per active block and product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sparsekern.ops.geometry import ConvGeometry
from sparsekern.ops.layout import format_of
from sparsekern.topology import Topology

if TYPE_CHECKING:
    from sparsekern.ops.dispatch import Backend

ELEMENTS = 1 << 20  # unfolded at a time


class _Window(NamedTuple):
    """A range of images, output rows and output columns."""

    images: slice
    rows: slice
    columns: slice


class _Group(NamedTuple):
    """One group as an ordinary sparse matrix."""

    topology: Topology  # (outputs, taps * padded channels)
    inputs: slice  # of the image's channels
    outputs: slice
    blocks: slice  # of the values


@dataclass(frozen=True)
class Products:
    """The four products over the linear ones of a backend module."""

    linear: Backend

    def conv2d(
        self, x: Tensor, values: Tensor, t: Topology, g: ConvGeometry, bias: Tensor | None
    ) -> Tensor:
        """y = x * w + bias: (N, C_in, H, W) -> (N, C_out, P, Q)."""
        y = _empty(x, t.shape[0], g.output_size(x.shape[2], x.shape[3]))
        values = _clean(values, t)
        for group in _groups(t):
            added = None if bias is None else bias[group.outputs]
            blocks = values[group.blocks]
            for window in _windows(x, y, t):
                rows = _unfold(x[:, group.inputs], window, group.topology, g)
                part = self.linear.spmm(rows, blocks, group.topology, added)
                home = y[window.images, group.outputs, window.rows, window.columns]
                home.copy_(part.view(*home.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2))
        return y

    def conv2d_dgrad(
        self, dy: Tensor, values: Tensor, t: Topology, g: ConvGeometry, *, size: tuple[int, int]
    ) -> Tensor:
        """dx: (N, C_out, P, Q) -> (N, C_in, *size)."""
        dx = _empty(dy, t.shape[1] // t.taps * t.groups, size).zero_()
        values = _clean(values, t)
        for group in _groups(t):
            blocks = values[group.blocks]
            for window in _windows(dx, dy, t):
                part = _pixels(dy, window, group.outputs)
                rows = self.linear.spmm_t(part, blocks, group.topology)
                _fold(dx[:, group.inputs], rows, window, g)
        return dx

    def conv2d_wgrad(self, dy: Tensor, x: Tensor, t: Topology, g: ConvGeometry) -> Tensor:
        """dw at active blocks: (nnzb, bh, bw), zero in the padding."""
        dw = x.new_zeros(t.values_shape)
        for group in _groups(t):
            for window in _windows(x, dy, t):
                rows = _unfold(x[:, group.inputs], window, group.topology, g)
                part = _pixels(dy, window, group.outputs)
                dw[group.blocks] += self.linear.sddmm(part, rows, group.topology)
        return t.clear_padding_(dw)

    def conv2d_backward(
        self, dy: Tensor, x: Tensor, values: Tensor, t: Topology, g: ConvGeometry
    ) -> tuple[Tensor, Tensor]:
        """(dx, dw)."""
        dx = self.conv2d_dgrad(dy, values, t, g, size=(x.shape[2], x.shape[3]))
        layout = format_of(x)
        return dx.contiguous(memory_format=layout), self.conv2d_wgrad(dy, x, t, g)


def _empty(x: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    shape = x.shape[0], channels, *size
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=format_of(x))


def _clean(values: Tensor, t: Topology) -> Tensor:
    """Values without what lies in the padding, which the padded channels would meet."""
    if not t.grid.ragged:
        return values.contiguous()
    return t.clear_padding_(values.clone(memory_format=torch.contiguous_format))


def _groups(t: Topology) -> Iterator[_Group]:
    """The groups' matrices, cut out of the index arrays."""
    bh, bw = t.block
    rows, keys = t.block_rows // t.groups, t.block_cols
    outs, ins = t.shape[0] // t.groups, t.shape[1] // t.taps
    shape = (outs, keys * bw)
    for i in range(t.groups):
        crow = t.crow[i * rows : (i + 1) * rows + 1]
        ccol = t.ccol[i * keys : (i + 1) * keys + 1]
        first, last = int(crow[0]), int(crow[-1])
        part = slice(first, last)
        # the blocks of a group lie side by side in both orders
        yield _Group(
            Topology(
                shape,
                (bh, bw),
                crow - first,
                t.col[part],
                ccol - first,
                t.row[part] - i * rows,
                t.perm[part] - first,
                t.row_order[:0],  # the CPU products need no order
                t.col_order[:0],
            ),
            slice(i * ins, (i + 1) * ins),
            slice(i * outs, (i + 1) * outs),
            part,
        )


def _windows(x: Tensor, y: Tensor, t: Topology) -> Iterator[_Window]:
    """Cut the output into windows of bounded size: whole images, else rows, else columns."""
    n, _, height, width = y.shape
    if not y.numel():
        return
    room = max(1, min(ELEMENTS, (x.numel() + y.numel()) // 4) // (t.block_cols * t.block[1]))
    columns = min(width, room)
    rows = min(height, max(1, room // columns)) if columns == width else 1
    images = min(n, max(1, room // (rows * columns))) if rows == height else 1
    for i in range(0, n, images):
        for p in range(0, height, rows):
            for q in range(0, width, columns):
                yield _Window(
                    slice(i, min(i + images, n)),
                    slice(p, min(p + rows, height)),
                    slice(q, min(q + columns, width)),
                )


def _span(window: slice, size: int, g: ConvGeometry, axis: int) -> tuple[slice, int, int]:
    """Pixels of an axis that a window reads: those inside the image, and zeros before, after."""
    first = window.start * g.stride[axis] - g.padding[axis]
    last = (window.stop - 1) * g.stride[axis] - g.padding[axis]
    last += g.dilation[axis] * (g.kernel[axis] - 1) + 1
    low, high = min(max(first, 0), size), max(min(last, size), 0)
    if low >= high:
        return slice(0, 0), last - first, 0
    return slice(low, high), low - first, last - high


def _unfold(x: Tensor, window: _Window, t: Topology, g: ConvGeometry) -> Tensor:
    """The pixels that a window reads, (outputs of the window, taps * padded channels)."""
    rows, top, bottom = _span(window.rows, x.shape[2], g, 0)
    columns, left, right = _span(window.columns, x.shape[3], g, 1)
    channels = t.shape[1] // g.taps
    patch = x[window.images, :, rows, columns]
    patch = functional.pad(patch, (left, right, top, bottom, 0, channels - x.shape[1]))
    patch = patch.contiguous()
    n, c, h, w = patch.stride()
    size = [window.rows.stop - window.rows.start, window.columns.stop - window.columns.start]
    taps = patch.as_strided(
        (patch.shape[0], *size, *g.kernel, channels),
        (n, g.stride[0] * h, g.stride[1] * w, g.dilation[0] * h, g.dilation[1] * w, c),
    )
    return taps.reshape(-1, t.shape[1])


def _fold(dx: Tensor, unfolded: Tensor, window: _Window, g: ConvGeometry) -> None:
    """Add the rows of a window to the pixels that they were unfolded from, tap by tap."""
    images = dx[window.images]
    size = [window.rows.stop - window.rows.start, window.columns.stop - window.columns.start]
    parts = unfolded.view(images.shape[0], *size, *g.kernel, -1)
    for r in range(g.kernel[0]):
        for s in range(g.kernel[1]):
            rows, inner = _inside(window.rows, r, dx.shape[2], g, 0)
            columns, beside = _inside(window.columns, s, dx.shape[3], g, 1)
            part = parts[:, inner, beside, r, s, : dx.shape[1]]
            images[:, :, rows, columns] += part.permute(0, 3, 1, 2)


def _inside(window: slice, tap: int, size: int, g: ConvGeometry, axis: int) -> tuple[slice, slice]:
    """Pixels of an axis that one tap reads from inside the image, and their place in a window."""
    stride = g.stride[axis]
    shift = tap * g.dilation[axis] - g.padding[axis]
    first = min(max(window.start, -(shift // stride)), window.stop)
    last = max(first, min(window.stop, (size - 1 - shift) // stride + 1))
    if first == last:
        return slice(0, 0), slice(0, 0)
    pixels = slice(first * stride + shift, (last - 1) * stride + shift + 1, stride)
    return pixels, slice(first - window.start, last - window.start)


def _pixels(dy: Tensor, window: _Window, channels: slice) -> Tensor:
    """Pixels of a window, (outputs of the window, channels)."""
    part = dy[window.images, channels, window.rows, window.columns]
    return part.permute(0, 2, 3, 1).reshape(-1, part.shape[1])
