"""numba kernels that move images in and out of flat planes, the form the conv kernels work on.

All images of a batch, one below the other, are one line of pixels per channel: image n's row u is
row `n height + u`, and rows are `pitch` apart. The pitch and the height leave room for the zeros
between neighbours, so a tap of the kernel is a constant shift. A *view* says where such a line lies
in an image tensor; it is one row of an int64 array, whose columns are named below. Rows and columns
outside first..last are zero in the line and are no pixels of the tensor. The base and the steps are
in elements. With a stride there is one view per phase, each holding every stride-th row and column.
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
from sparsekern.ops.cpu.jit.simd import WIDTH, jit, turn, vmove

# what a view's columns are: of the line; the pixels that are in the tensor (the first, and the last
# + 1); where they lie there (base, and the steps of image, row, column and channel)
PITCH, HEIGHT, IMAGES = 0, 1, 2
TOP, BOTTOM, LEFT, RIGHT = 3, 4, 5, 6
BASE, BY_IMAGE, BY_ROW, BY_COLUMN, BY_CHANNEL = 7, 8, 9, 10, 11
VIEW = 12


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
    pitch, height = view[PITCH], view[HEIGHT]
    count = 0
    for line in range(max(0, start // pitch), min(view[IMAGES] * height, -(-stop // pitch))):
        n = line // height
        u = line - n * height
        if view[TOP] <= u < view[BOTTOM]:
            a = max(start, line * pitch + view[LEFT])
            b = min(stop, line * pitch + view[RIGHT])
            if a < b:
                column = a - line * pitch
                home = view[BASE] + n * view[BY_IMAGE] + u * view[BY_ROW]
                found[count, 0] = a - start
                found[count, 1] = home + column * view[BY_COLUMN]
                found[count, 2] = b - a
                count += 1
    return count


@jit
def _turn_run(
    z: Any, eb: int, dst: int, ldd: int, src: int, lds: int, rows: int, cols: int
) -> None:
    """Transpose rows x cols elements; squares at the end overlap those before."""
    lanes = WIDTH // eb
    if rows < lanes or cols < lanes:
        for i in range(0, rows, lanes):
            for j in range(0, cols, lanes):
                to, at = dst + (j * ldd + i) * eb, src + (i * lds + j) * eb
                turn_edge(z, (to, ldd, at, lds, min(lanes, rows - i), min(lanes, cols - j)))
        return
    for a in range(0, rows, lanes):
        i = min(a, rows - lanes)
        for b in range(0, cols, lanes):
            j = min(b, cols - lanes)
            turn(z, (dst + (j * ldd + i) * eb, ldd, src + (i * lds + j) * eb, lds))


@jit
def copy_in(
    z: Any, eb: int, dst: int, ld: int, src: int, view: Any, found: Any, count: int, channels: int
) -> None:
    """Copy runs of pixels of an image tensor to (channels, ld), zero elsewhere."""
    lanes = WIDTH // eb
    apart, step = view[BY_COLUMN], view[BY_CHANNEL]
    for c in range(channels):
        row = dst + c * ld * eb
        fill(z, (row, 0, ld // lanes))
        if apart == 1:
            copy_runs(z, (row, 0, src + c * step * eb, 1, found.ctypes.data, count))
        elif step != 1 or channels == 1:
            for i in range(count):
                at = src + (found[i, 1] + c * step) * eb
                if apart == 2:
                    copy_even(z, (row + found[i, 0] * eb, at, found[i, 2]))
                else:
                    copy_strided(z, (row + found[i, 0] * eb, 1, at, apart, found[i, 2]))
    if apart != 1 and step == 1 and channels > 1:
        for i in range(count):
            to, at = dst + found[i, 0] * eb, src + found[i, 1] * eb
            _turn_run(z, eb, to, ld, at, apart, found[i, 2], channels)


@jit
def copy_out(
    z: Any, eb: int, dst: int, view: Any, found: Any, count: int, src: int, ld: int, channels: int
) -> None:
    """Copy (channels, ld) to runs of pixels of an image tensor."""
    apart, step = view[BY_COLUMN], view[BY_CHANNEL]
    if apart != 1 and step == 1 and channels > 1:
        for i in range(count):
            to, at = dst + found[i, 1] * eb, src + found[i, 0] * eb
            _turn_run(z, eb, to, apart, at, ld, channels, found[i, 2])
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
def panel_in(
    z: Any, eb: int, dst: int, size: int, src: int, view: Any, found: Any, count: int, channels: int
) -> None:
    """Copy runs of pixels of at most lanes channels to (size, lanes), zero elsewhere."""
    lanes = WIDTH // eb
    apart, step = view[BY_COLUMN], view[BY_CHANNEL]
    fill(z, (dst, 0, size))
    for i in range(count):
        to, at, n = dst + found[i, 0] * WIDTH, src + found[i, 1] * eb, found[i, 2]
        if apart == 1:
            _turn_run(z, eb, to, lanes, at, step, channels, n)
        elif step == 1 and channels == lanes:
            for j in range(n):
                vmove(z, (to + j * WIDTH, at + j * apart * eb))
        else:
            for c in range(channels):
                copy_strided(z, (to + c * eb, lanes, at + c * step * eb, apart, n))
