"""Convolutions with more than 2**31 elements in an operand, and no memory: see `corners`.

Every corner has its big operand's last pixel, row, channel or block at the end of one stride, so
that each product of an index and a stride is the one that overflows somewhere. The pixels of a
launch stay below 2**31, as the launchers ask.
"""

from typing import NamedTuple

import torch
from conv_problems import ConvPattern, window

from sparsekern.kernels import (
    bsr_conv2d,
    bsr_conv2d_dgrad,
    bsr_conv2d_wgrad,
    csr_conv2d,
    csr_conv2d_wgrad,
)
from sparsekern.kernels.window import Window, output_size


class ConvCorner(NamedTuple):
    """A convolution of huge operands, and which of them has its last elements touched.

    `gap` is the distance, in elements, of neighbouring rows or columns where it is not the least.
    """

    op: str  # "conv_y", "conv_dx" or "conv_dw"
    block: int
    batch: int
    size: tuple[int, int]
    n_in: int
    n_out: int
    big: tuple[str, ...]
    window: Window = window(1)
    gap: int = 0
    full: bool = False  # all blocks but those that share the last one's row and column

    def __str__(self):
        kernel, dilation = (
            "x".join(map(str, a)) for a in (self.window.kernel, self.window.dilation)
        )
        sizes = f"n{self.batch}-{self.size[0]}x{self.size[1]}-{self.n_out}o{self.n_in}"
        return f"{self.op}-b{self.block}-{sizes}-k{kernel}-d{dilation}-{'-'.join(self.big)}"


def pattern_of(corner):
    """The last block and a few beside it; or nearly all blocks."""
    (kh, kw), b = corner.window.kernel, corner.block
    mask = torch.zeros(1, -(-corner.n_out // b), kh * kw, -(-corner.n_in // b), dtype=torch.bool)
    if corner.full:
        mask[:] = True
        mask[:, -1] = mask[..., -1] = False
    else:
        mask[0, 0, 0, 0] = True
    mask[0, -1, -1, -1] = True
    return ConvPattern(corner.n_out, corner.n_in, (b, b), corner.window, mask)


def huge(corner, channels, size, big):
    """Images that take no memory, in the layout that the kernel reads without a copy."""
    n, (h, w) = corner.batch, size
    gap = corner.gap if big else 0
    if corner.block == 1:
        return torch.empty(n, channels, h, gap or w, device="meta")[..., :w]
    if h > w:  # the gap is between rows
        gap = -(-gap // w)
    return torch.empty(n, h, w, gap or channels, device="meta")[..., :channels].permute(0, 3, 1, 2)


def held_by(corner):
    """The operands by name."""
    p, out_size = pattern_of(corner), output_size(corner.window, corner.size)
    width = 2**10 if "bias" in corner.big else 1
    return p, {
        "x": huge(corner, corner.n_in, corner.size, "x" in corner.big),
        "dy": huge(corner, corner.n_out, out_size, "dy" in corner.big),
        "values": torch.empty(p.nnzb, *p.block, device="meta"),
        "bias": torch.empty(corner.n_out, width, device="meta")[:, 0],
    }


def product(corner, p, held):
    """Launch it."""
    x, dy, values, w = held["x"], held["dy"], held["values"], corner.window
    csr = corner.block == 1
    if corner.op == "conv_y":
        launch = csr_conv2d.csr_conv2d if csr else bsr_conv2d.bsr_conv2d
        return launch(x, values, *p.forward, held["bias"], corner.n_out, w)
    if corner.op == "conv_dx":
        launch = csr_conv2d.csr_conv2d_dgrad if csr else bsr_conv2d_dgrad.bsr_conv2d_dgrad
        return launch(dy, values, *p.transposed, corner.n_in, corner.size, w)
    if csr:
        return csr_conv2d_wgrad.csr_conv2d_wgrad(dy, x, *p.forward[:2], w)
    return bsr_conv2d_wgrad.bsr_conv2d_wgrad(dy, x, *p.forward[:2], p.block, w)


# their products exceed 2**31 and not 2**32; a sum over pixels takes as few as it can
FEW, WIDE = 2**15 + 3, 2**16 + 128
FLAT, BROAD = 37, 2**26 + 128
SOME, SPREAD = 2**10 + 7, 2**21 + 2**16
_SQUARE = 400 * 128  # all its blocks of 128 exceed 2**31


def _places(pixels):
    """(batch, size) of so many pixels, in a row along each axis."""
    return (pixels, (1, 1)), (1, (pixels, 1)), (1, (1, pixels))


def _taps(pixels):
    """(window, size) of two taps so far apart that the offset of one overflows."""
    return (
        (window((2, 1), dilation=(pixels - 1, 1)), (pixels, 1)),
        (window((1, 2), dilation=(1, pixels - 1)), (1, pixels)),
    )


def bsr_corners():
    """Channels-last images: big in images, rows, columns, taps, weights, bias."""
    for n, size in _places(FEW):
        yield ConvCorner("conv_y", 16, n, size, WIDE, 20, ("x",))
        yield ConvCorner("conv_dx", 16, n, size, 20, WIDE, ("dy",))
    for n, size in _places(FLAT):
        yield ConvCorner("conv_dw", 128, n, size, BROAD, 130, ("x",))
        yield ConvCorner("conv_dw", 128, n, size, 130, BROAD, ("dy",))
    for w, size in _taps(FEW):
        yield ConvCorner("conv_y", 16, 1, size, WIDE, 20, ("x",), w)
        # the gradient of one pixel, of an output as large as the taps reach
        turned = w._replace(
            padding=tuple(d * (k - 1) for d, k in zip(w.dilation, w.kernel, strict=True))
        )
        yield ConvCorner("conv_dx", 16, 1, (1, 1), 20, WIDE, ("dy",), turned)
    for w, size in _taps(FLAT):
        yield ConvCorner("conv_dw", 128, 1, size, BROAD, 130, ("x",), w)
    yield ConvCorner("conv_y", 16, 2**14, (2, 4), 20, 2**14 + 16, ("out",))
    yield ConvCorner("conv_dx", 16, 2**14, (2, 4), 2**14 + 16, 20, ("out",))
    yield ConvCorner("conv_dx", 16, 2**14, (2, 4), 2**14 + 16, 20, ("out",), window(2, 2))
    yield ConvCorner("conv_y", 128, 3, (1, 1), _SQUARE, _SQUARE, ("values",), full=True)
    yield ConvCorner("conv_dx", 128, 3, (1, 1), _SQUARE, _SQUARE, ("values",), full=True)
    yield ConvCorner("conv_dw", 128, 3, (1, 1), _SQUARE, _SQUARE, ("out",), full=True)
    yield ConvCorner("conv_y", 16, 2, (2, 1), 20, 2**21 + 128, ("bias",))


def csr_corners():
    """Contiguous images: big in images, channels, rows, taps, bias."""
    # few outputs: one program holds all rows, so the last one holds rows that read
    yield ConvCorner("conv_y", 1, FEW, (1, 1), WIDE, 4, ("x",))
    yield ConvCorner("conv_y", 1, 1, (FEW, 16), 1, 4, ("x",), gap=WIDE)
    yield ConvCorner("conv_y", 1, 1, (2**8, 2**8), FEW, 20, ("x",))
    yield ConvCorner("conv_y", 1, 1, (FEW, 16), 1, 20, ("x",), _taps(FEW)[0][0], gap=WIDE)
    yield ConvCorner("conv_y", 1, 2**10 + 3, (2**8, 2**7), 20, 2**6 + 3, ("out",))
    yield ConvCorner("conv_y", 1, 1, (2**8, 2**8), 20, FEW, ("out",))
    yield ConvCorner("conv_y", 1, 2, (2, 1), 20, 2**21 + 128, ("bias",))
    yield ConvCorner("conv_dx", 1, FEW, (1, 1), 20, WIDE, ("dy",))
    yield ConvCorner("conv_dx", 1, 1, (2**8, 2**8), 20, FEW, ("dy",))
    yield ConvCorner("conv_dx", 1, 1, (FEW, 16), 20, 1, ("dy",), gap=WIDE)
    yield ConvCorner("conv_dx", 1, 2**10 + 3, (2**8, 2**7), 2**6 + 3, 20, ("out",))
    yield ConvCorner("conv_dx", 1, 1, (2**8, 2**8), FEW, 20, ("out",))
    for big, n_in, n_out in (("x", SPREAD, 20), ("dy", 20, SPREAD)):
        yield ConvCorner("conv_dw", 1, SOME, (1, 1), n_in, n_out, (big,))
        # few pixels to a row, far from the next channel's or the next row's
        channels = (FEW, 1) if big == "x" else (1, FEW)
        yield ConvCorner("conv_dw", 1, 1, (1, 16), *channels, (big,), gap=WIDE)
        yield ConvCorner("conv_dw", 1, 1, (SOME, 2), 1, 1, (big,), gap=SPREAD)
    yield ConvCorner("conv_dw", 1, 1, (SOME, 2), 1, 1, ("x",), _taps(SOME)[0][0], gap=SPREAD)


CORNERS = (*bsr_corners(), *csr_corners())

# an operator, whether its block is 1, and the module of its kernel
KERNELS = {
    ("conv_y", False): "bsr_conv2d",
    ("conv_dx", False): "bsr_conv2d_dgrad",
    ("conv_dw", False): "bsr_conv2d_wgrad",
    ("conv_y", True): "csr_conv2d",
    ("conv_dx", True): "csr_conv2d",
    ("conv_dw", True): "csr_conv2d_wgrad",
}
