"""The numba kernel of the sparse convolution: one task's chunks, from images to images.

A chunk of the line of pixels (`conv_pack`) is copied into scratch that stays in L2, where the sums
(`conv_sums`) and the weight gradient (`conv_dots`) work on it. What nothing reads stays out.

`z` is a scalar of the element type, `eb` its bytes; addresses are integers, strides in elements.
"""

from typing import Any

from sparsekern.ops.cpu.jit.conv_dots import dots_chunk
from sparsekern.ops.cpu.jit.conv_pack import BY_CHANNEL, copy_in, panel_in, segments
from sparsekern.ops.cpu.jit.conv_spec import Cut, Dots, Image, Scratch, Sums, Task
from sparsekern.ops.cpu.jit.conv_sums import sum_chunk
from sparsekern.ops.cpu.jit.simd import WIDTH, jit


@jit
def _load(
    z: Any, eb: int, dst: int, ld: int, image: Image, start: int, stop: int, found: Any
) -> None:
    """Copy the channels that are read of a range of pixels into scratch, one plane per view."""
    blocks = -(-image.channels // image.edge)
    for p in range(image.views.shape[0]):
        view = image.views[p]
        count = segments(view, start, stop, found)
        for g in range(image.groups):
            marks = image.used[(p * image.groups + g) * blocks :]
            i = 0
            while i < blocks:
                k = i
                while k < blocks and marks[k]:
                    k += 1
                if k > i:
                    first = i * image.edge
                    some = min(k * image.edge, image.channels) - first
                    c = g * image.channels + first
                    to = dst + (p * image.groups * image.channels + c) * ld * eb
                    at = image.address + c * view[BY_CHANNEL] * eb
                    copy_in(z, eb, to, ld, at, view, found, count, some)
                i = k + 1


@jit
def _load_panels(
    z: Any,
    eb: int,
    dst: int,
    ld: int,
    image: Image,
    start: int,
    stop: int,
    found: Any,
    panels: int,
) -> None:
    """The same as panels of lanes channels, (pixels, lanes), `panels` of each group."""
    lanes = WIDTH // eb
    blocks = -(-image.channels // image.edge)
    for p in range(image.views.shape[0]):
        view = image.views[p]
        count = segments(view, start, stop, found)
        for g in range(image.groups):
            for k in range(panels):
                c, home = k * lanes, (p * image.groups + g) * panels + k
                if image.used[(p * image.groups + g) * blocks + c // image.edge]:
                    valid = max(0, min(lanes, image.channels - c))
                    at = image.address + (g * image.channels + c) * view[BY_CHANNEL] * eb
                    panel_in(z, eb, dst + home * ld * WIDTH, ld, at, view, found, count, valid)


@jit
def sweep(
    z: Any,
    eb: int,
    task: Task,
    cut: Cut,
    scratch: Scratch,
    source: Image,
    sums: Sums,
    dots: Dots,
    second: Image,
) -> None:
    """Run the chunks of one task: copy in, sum, and add to the weight gradient.

    Args:
        z: scalar of the element type.
        eb: its bytes.
        task: which chunks, and what of them.
        cut: of the line.
        scratch: what this task works on.
        source: x of the forward product, dy of the backward ones.
        sums: the product, if there is one.
        dots: the weight gradient, if it is asked for.
        second: x, for the dots.
    """
    s, found = scratch, scratch.found
    for i in range(task.chunks[0], task.chunks[1]):
        start = i * cut.chunk
        stop = min(start + cut.chunk, cut.total)
        size = min(cut.chunk, -(-(stop - start) // cut.tile) * cut.tile)
        _load(z, eb, s.source, s.ld, source, start - cut.front, start + size + cut.back, found)
        here = (s.source + cut.front * eb, s.ld)
        if sums.ptr.size:
            pixels = (start, stop, size)
            sum_chunk(z, eb, here, sums, task.outputs, (s.acc, s.lda), found, pixels)
        if dots.crow.size:
            end = start + size + cut.beyond
            if dots.panels:
                _load_panels(z, eb, s.other, s.ldx, second, start, end, found, dots.panels)
                x = (s.other, s.ldx * (WIDTH // eb))
            else:
                _load(z, eb, s.other, s.ldx, second, start, end, found)
                x = (s.other, s.ldx)
            dots_chunk(z, eb, here, x, dots, task.blocks, size)
