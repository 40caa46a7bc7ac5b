"""The numba kernel of the sparse convolution: one task's chunks, from images to images.

A chunk of the line of pixels (`conv_pack`) is copied into scratch that stays in L2, where the
sums (`conv_sums`) and the weight gradient (`conv_dots`) work on it.

`z` is a scalar of the element type, `eb` its bytes; addresses are integers, strides in elements.
"""

from typing import Any

from sparsekern.ops.cpu.jit.conv_dots import dots_chunk
from sparsekern.ops.cpu.jit.conv_moves import fill
from sparsekern.ops.cpu.jit.conv_pack import copy_in, panel, segments
from sparsekern.ops.cpu.jit.conv_sums import sum_chunk
from sparsekern.ops.cpu.jit.simd import WIDTH, jit


@jit
def load(z: Any, eb: int, dst: Any, src: Any, start: int, stop: int, found: Any) -> None:
    """Copy all channels of a range of pixels into scratch, one plane per view: (address, ld)."""
    address, views, channels = src
    for p in range(views.shape[0]):
        count = segments(views[p], start, stop, found)
        at = dst[0] + p * channels * dst[1] * eb
        copy_in(z, eb, at, dst[1], address, views[p], found, count, channels)


@jit
def load_panels(
    z: Any, eb: int, dst: Any, src: Any, start: int, stop: int, found: Any, groups: Any, strip: int
) -> None:
    """Copy all channels of a range of pixels into scratch as panels of lanes channels.

    Args:
        z: scalar of the element type.
        eb: its bytes.
        dst: (address, pixels of a panel).
        src: (address, views, channels).
        start: first pixel.
        stop: last pixel + 1.
        found: int64 scratch for runs.
        groups: (how many, panels of each).
        strip: address of scratch for one panel.
    """
    address, views, channels = src
    lanes = WIDTH // eb
    some = channels // groups[0]
    i = 0
    for p in range(views.shape[0]):
        count = segments(views[p], start, stop, found)
        for g in range(groups[0]):
            for k in range(groups[1]):
                c = k * lanes
                valid = max(0, min(lanes, some - c))
                at = address + (g * some + c) * views[p, 11] * eb
                copy_in(z, eb, strip, dst[1], at, views[p], found, count, valid)
                fill(z, (strip + valid * dst[1] * eb, 0, (lanes - valid) * dst[1] // lanes))
                panel(z, eb, dst[0] + i * dst[1] * WIDTH, strip, dst[1])
                i += 1


@jit
def sweep(
    z: Any, eb: int, chunks: Any, source: Any, scratch: Any, sums: Any, dots: Any, second: Any
) -> None:
    """Run the chunks of one task: copy in, sum, and add to the weight gradient.

    Args:
        z: scalar of the element type.
        eb: its bytes.
        chunks: (first, last + 1, pixels of a chunk, pixels of a register tile, pixels of the line).
        source: (address, views, channels, pixels needed before and after a chunk): x of the
            forward product, dy of the backward ones.
        scratch: (addresses of the source, of one block row, of x, of one panel; row strides of
            the first three; int64 array for runs).
        sums: (whether, w, ptr, places, out): see `sum_chunk`.
        dots: (kind or 0, dw, index, groups): see `dots_chunk` and `load_panels`.
        second: (address, views, channels, pixels needed after a chunk): x, for the dots.
    """
    first, last, length, tile, total = chunks
    address, views, channels, front, back = source
    base, acc, other, strip, ld, lda, ldx, found = scratch
    for i in range(first, last):
        start = i * length
        stop = min(start + length, total)
        size = min(length, -(-(stop - start) // tile) * tile)
        load(
            z, eb, (base, ld), (address, views, channels), start - front, start + size + back, found
        )
        here = (base + front * eb, ld)
        if sums[0]:
            m = (start, stop, size)
            sum_chunk(z, eb, here, sums[1], sums[2], sums[3], sums[4], (acc, lda), found, m)
        if dots[0]:
            x = (second[0], second[1], second[2])
            end = start + size + second[3]
            if dots[0] == 2:
                load_panels(z, eb, (other, ldx), x, start, end, found, dots[3], strip)
                dots_chunk(z, eb, here, (other, ldx * (WIDTH // eb)), 2, dots[1], dots[2], size)
            else:
                load(z, eb, (other, ldx), x, start, end, found)
                dots_chunk(z, eb, here, (other, ldx), 1, dots[1], dots[2], size)
