"""numba kernels that move images in and out of flat planes, the form the conv kernels work on.

All images of a batch, one below the other, are one line of pixels per channel: image n's row u is
row `n height + u`, and rows are `pitch` apart. The pitch and the height leave room for the zeros
between neighbours, so a tap of the kernel is a constant shift. A *view* says where such a line lies
in an image tensor; it is one row of an int64 array:

    pitch, height, images, first and last + 1 row, first and last + 1 column, base, and the steps of
    image, row, column and channel

Rows and columns outside first..last are zero in the line and are no pixels of the tensor. `base`
and the steps are in elements. With a stride there is one view per phase, each holding every
stride-th row and column.
"""

from typing import Any

from sparsekern.ops.cpu.jit.conv_moves import (
    copy_even,
    copy_runs,
    copy_strided,
    fill,
    spread_even,
    turn_edge,
)
from sparsekern.ops.cpu.jit.simd import WIDTH, jit, turn

VIEW = 12  # numbers of a view


@jit
def segments(view: Any, start: int, stop: int, found: Any) -> int:
    """List the runs of pixels of a view within positions start..stop of the line.

    Args:
        view: int64, (VIEW,).
        start: may be negative.
        stop: may lie beyond the last image.
        found: int64, (at least (stop - start) // pitch + 2, 3), receives (place after `start`,
            element of the tensor, length).

    Returns:
        How many there are.
    """
    pitch, height = view[0], view[1]
    count = 0
    for line in range(max(0, start // pitch), min(view[2] * height, -(-stop // pitch))):
        n = line // height
        u = line - n * height
        if view[3] <= u < view[4]:
            a = max(start, line * pitch + view[5])
            b = min(stop, line * pitch + view[6])
            if a < b:
                column = a - line * pitch
                found[count, 0] = a - start
                found[count, 1] = view[7] + n * view[8] + u * view[9] + column * view[10]
                found[count, 2] = b - a
                count += 1
    return count


@jit
def copy_in(
    z: Any, eb: int, dst: int, ld: int, src: int, view: Any, found: Any, count: int, channels: int
) -> None:
    """Copy runs of pixels of an image tensor to (channels, ld), zero elsewhere."""
    lanes = WIDTH // eb
    apart, step = view[10], view[11]
    for c in range(channels):
        row = dst + c * ld * eb
        fill(z, (row, 0, ld // lanes))
        if apart == 1:
            copy_runs(z, (row, 0, src + c * step * eb, 1, found.ctypes.data, count))
        elif step != 1:
            for i in range(count):
                at = src + (found[i, 1] + c * step) * eb
                if apart == 2:
                    copy_even(z, (row + found[i, 0] * eb, at, found[i, 2]))
                else:
                    copy_strided(z, (row + found[i, 0] * eb, 1, at, apart, found[i, 2]))
    if apart != 1 and step == 1:
        for i in range(count):
            for j in range(0, found[i, 2], lanes):
                size = min(lanes, found[i, 2] - j)
                for c in range(0, channels, lanes):
                    some = min(lanes, channels - c)
                    to = dst + (c * ld + found[i, 0] + j) * eb
                    at = src + (found[i, 1] + j * apart + c) * eb
                    if size == lanes and some == lanes:
                        turn(z, (to, ld, at, apart))
                    else:
                        turn_edge(z, (to, ld, at, apart, size, some))


@jit
def copy_out(
    z: Any, eb: int, dst: int, view: Any, found: Any, count: int, src: int, ld: int, channels: int
) -> None:
    """Copy (channels, ld) to runs of pixels of an image tensor."""
    lanes = WIDTH // eb
    apart, step = view[10], view[11]
    if apart != 1 and step == 1:
        for i in range(count):
            for j in range(0, found[i, 2], lanes):
                size = min(lanes, found[i, 2] - j)
                for c in range(0, channels, lanes):
                    some = min(lanes, channels - c)
                    to = dst + (found[i, 1] + j * apart + c) * eb
                    at = src + (c * ld + found[i, 0] + j) * eb
                    if size == lanes and some == lanes:
                        turn(z, (to, apart, at, ld))
                    else:
                        turn_edge(z, (to, apart, at, ld, some, size))
        return
    for c in range(channels):
        to, at = dst + c * step * eb, src + c * ld * eb
        if apart == 1:
            copy_runs(z, (to, 1, at, 0, found.ctypes.data, count))
        else:
            for i in range(count):
                home, run = to + found[i, 1] * eb, at + found[i, 0] * eb
                if apart == 2:
                    spread_even(z, (home, run, found[i, 2]))
                else:
                    copy_strided(z, (home, apart, run, 1, found[i, 2]))


@jit
def panel(z: Any, eb: int, dst: int, src: int, ld: int) -> None:
    """Transpose (lanes, ld) to (ld, lanes)."""
    lanes = WIDTH // eb
    for m in range(0, ld, lanes):
        turn(z, (dst + m * WIDTH, lanes, src + m * eb, ld))
