"""Case tables, index arrays and the oracle of the convolution kernels' tests.

The oracle is torch's dense `conv2d` in float64. Index arrays are made here from a mask of blocks,
independently of `Topology`, so that the two can be compared.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch.nn import functional

from sparsekern.kernels.window import Window, output_size

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def window(kernel=3, stride=1, padding=0, dilation=1, groups=1):
    """A geometry; numbers stand for both axes."""
    pairs = (v if isinstance(v, tuple) else (v, v) for v in (kernel, stride, padding, dilation))
    kernel, stride, padding, dilation = pairs
    return Window(groups, kernel, stride, padding, dilation)


@dataclass(frozen=True)
class ConvPattern:
    """Which blocks of a convolution's weight exist, as the launchers take it.

    `mask` is (groups, block rows of a group, taps, block columns of a tap).
    """

    n_out: int
    n_in: int
    block: tuple[int, int]
    window: Window
    mask: torch.Tensor

    @cached_property
    def channels(self):
        """Output and input channels of a group."""
        return self.n_out // self.window.groups, self.n_in // self.window.groups

    @cached_property
    def _forward(self):
        g, rb, taps, cb = self.mask.shape
        flat = self.mask.reshape(g * rb, taps * cb)
        return flat, flat.nonzero(as_tuple=True)

    @cached_property
    def forward(self):
        """crow, col and the rows, longest first."""
        flat, (_, col) = self._forward
        return _int32(_starts(flat.sum(1)), col, _longest(flat.sum(1)))

    @cached_property
    def transposed(self):
        """ccol, row and perm: keys (group, tap, block column), rows ascending within one."""
        g, rb = self.mask.shape[:2]
        slot = torch.full(self.mask.shape, -1)
        slot[self.mask] = torch.arange(int(self.mask.sum()))  # CSR order
        keyed, kept = slot.permute(0, 2, 3, 1), self.mask.permute(0, 2, 3, 1)
        rows = (torch.arange(g)[:, None] * rb + torch.arange(rb)).view(g, 1, 1, rb)
        counts = kept.sum(3).flatten()
        return _int32(_starts(counts), rows.expand(kept.shape)[kept], keyed[kept])

    @cached_property
    def nnzb(self):
        """Number of active blocks."""
        return int(self.mask.sum())

    def dense(self, values):
        """(C_out, C_in / groups, kh, kw) float64 weight of block values, padding cut off."""
        (bh, bw), (g, rb, taps, cb) = self.block, self.mask.shape
        cog, cg = self.channels
        full = torch.zeros(g, rb, taps, cb, bh, bw, dtype=torch.float64)
        full[self.mask] = values.double().cpu()
        full = full.permute(0, 1, 4, 3, 5, 2).reshape(g, rb * bh, cb * bw, taps)
        return full[:, :cog, :cg].reshape(self.n_out, cg, *self.window.kernel)

    def sample(self, dense):
        """(nnzb, bh, bw) active blocks of a (C_out, C_in / groups, kh, kw) weight, padding zero."""
        (bh, bw), (g, rb, taps, cb) = self.block, self.mask.shape
        cog, cg = self.channels
        full = torch.zeros(g, rb * bh, cb * bw, taps, dtype=dense.dtype)
        full[:, :cog, :cg] = dense.reshape(g, cog, cg, taps)
        return full.view(g, rb, bh, cb, bw, taps).permute(0, 1, 5, 3, 2, 4)[self.mask]

    def inside(self):
        """(nnzb, bh, bw) bool: which stored values are weights, not padding."""
        cg = self.channels[1]
        return self.sample(torch.ones(self.n_out, cg, *self.window.kernel)) == 1


def _starts(counts):
    return functional.pad(counts.cumsum(0), (1, 0))


def _longest(counts):
    return torch.argsort(counts, descending=True, stable=True)


def _int32(*arrays):
    return tuple(a.to(torch.int32).to(DEVICE) for a in arrays)


def conv_pattern(n_out, n_in, block, window, kind="random", seed=0):
    """A pattern of a named kind: full, empty, random (about a third), holes."""
    groups, taps = window.groups, window.kernel[0] * window.kernel[1]
    shape = (groups, -(-n_out // groups // block[0]), taps, -(-n_in // groups // block[1]))
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=g) < 0.35
    if kind == "random" and mask.numel():
        mask[-1, -1, -1, -1] = True  # the ragged corner is always active
    elif kind == "full":
        mask[:] = True
    elif kind == "empty":
        mask[:] = False
    elif kind == "holes":  # whole taps, rows and columns without a block, the rest dense
        mask[:] = True
        mask[:, ::2] &= shape[1] == 1
        mask[:, :, 1::2] = False
        mask[:, :, :, 1:2] = False
    return ConvPattern(n_out, n_in, block, window, mask)


def images(shape, dtype, seed, layout="nchw", exact=True):
    """Activations of integers in -3..3 or normal floats; NaN lies around them in memory.

    Layouts: "nchw" and "nhwc" are whole tensors; "channels" is a slice of the channels of a wider
    channels-last tensor; "strided" has gaps along every axis; "expanded" has one channel and one
    row, repeated with a stride of 0.
    """
    g = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    if layout == "expanded":
        return images((n, 1, 1, w), dtype, seed, "nchw", exact).expand(shape)
    a = torch.randint(-3, 4, shape, generator=g) if exact else torch.randn(shape, generator=g)
    a = a.to(dtype).to(DEVICE)
    if layout == "nchw":
        return a
    if layout == "nhwc":
        return a.contiguous(memory_format=torch.channels_last)
    nan = {"fill_value": float("nan"), "dtype": dtype, "device": DEVICE}
    if layout == "channels":
        return torch.full((n, h, w, c + 7), **nan).permute(0, 3, 1, 2)[:, 3 : c + 3].copy_(a)
    if layout == "strided":
        store = torch.full((2 * n + 1, c + 2, 3 * h + 1, 2 * w + 3), **nan)
        return store[1::2, 1 : c + 1, 1::3, 2 : 2 * w + 2 : 2].copy_(a)
    raise ValueError(layout)


def conv_values(p, dtype, seed, exact=True, padding=0.0):
    """(nnzb, bh, bw) values; `padding` is what edge blocks hold beyond their channels."""
    g = torch.Generator().manual_seed(seed)
    shape = (p.nnzb, *p.block)
    v = torch.randint(-3, 4, shape, generator=g) if exact else torch.randn(shape, generator=g)
    return torch.where(p.inside(), v.to(dtype), padding).to(dtype).to(DEVICE)


class Sum(NamedTuple):
    """A result in float64, the same sum over absolute values, and its number of terms."""

    value: torch.Tensor
    magnitude: torch.Tensor
    terms: int


def _conv(x, weight, w):
    options = {"stride": w.stride, "padding": w.padding, "dilation": w.dilation}
    return functional.conv2d(x, weight, groups=w.groups, **options)


def conv_oracle(x, weight, bias, w):
    """`conv2d(x, weight) + bias` in float64; terms = active weights of the fullest channel."""
    x = x.double().cpu()
    value, magnitude = _conv(x, weight, w), _conv(x.abs(), weight.abs(), w)
    terms = int((weight != 0).flatten(1).sum(1).max()) if weight.numel() else 0
    if bias is not None:
        b = bias.double().cpu()[:, None, None]
        value, magnitude = value + b, magnitude + b.abs()
    return Sum(value, magnitude, terms + (bias is not None))


def _gradients(x_shape, weight, dy, w, x=None):
    x = torch.zeros(x_shape, dtype=torch.float64) if x is None else x
    x, weight = x.requires_grad_(), weight.clone().requires_grad_()
    return torch.autograd.grad(_conv(x, weight, w), (x, weight), dy)


def dgrad_oracle(dy, weight, x_shape, w):
    """Gradient of the input in float64; terms = all weights that an input channel has."""
    dy = dy.double().cpu()
    value, _ = _gradients(x_shape, weight, dy, w)
    magnitude, _ = _gradients(x_shape, weight.abs(), dy.abs(), w)
    return Sum(value, magnitude, weight.numel() // weight.shape[1] // w.groups)


def wgrad_oracle(dy, x, p):
    """Gradient of the active blocks in float64; terms = output pixels."""
    dy, x, w = dy.double().cpu(), x.double().cpu(), p.window
    weight = torch.zeros(p.n_out, p.channels[1], *w.kernel, dtype=torch.float64)
    _, value = _gradients(x.shape, weight, dy, w, x.clone())
    _, magnitude = _gradients(x.shape, weight, dy.abs(), w, x.abs())
    return Sum(p.sample(value), p.sample(magnitude), dy.numel() // max(dy.shape[1], 1))


class ConvCase(NamedTuple):
    """One launch of each product."""

    block: tuple[int, int]
    n_out: int
    n_in: int
    size: tuple[int, int]
    window: Window
    batch: int = 2
    kind: str = "random"
    layout: str = "nhwc"
    bias: bool = True

    def __str__(self):
        w = self.window
        pairs = (("k", w.kernel), ("s", w.stride), ("p", w.padding), ("d", w.dilation))
        geometry = "-".join(f"{n}{a}x{b}" for n, (a, b) in pairs)
        block, size = ("x".join(map(str, a)) for a in (self.block, self.size))
        channels = f"{self.n_out}o{self.n_in}"
        return (
            f"b{block}-{channels}-g{w.groups}-n{self.batch}-{size}-{geometry}-{self.kind}"
            f"-{self.layout}-{'bias' if self.bias else 'nobias'}"
        )

    @property
    def x_shape(self):
        """Shape of the input."""
        return (self.batch, self.n_in, *self.size)

    @property
    def y_shape(self):
        """Shape of the output."""
        return (self.batch, self.n_out, *output_size(self.window, self.size))


PLAIN = window(3, padding=1)
LAYOUTS = ("nchw", "nhwc", "channels", "strided", "expanded")
KINDS = ("full", "empty", "random", "holes")
BLOCKS = ((16, 16), (32, 32), (64, 64), (16, 32), (32, 16), (128, 128), (64, 16), (16, 128))

# every kernel size, stride, padding, dilation and number of groups, and images down to one pixel
GEOMETRIES = (
    (window(1), (5, 6), 3),
    (window(1, stride=2), (5, 7), 2),
    (window(2), (5, 4), 2),
    (window(2, stride=2), (6, 7), 2),
    (window(3, padding=1), (6, 5), 2),
    (window(3, padding=1), (1, 1), 5),
    (window(3, stride=2, padding=1), (7, 6), 2),
    (window(3, stride=(2, 1), padding=(1, 0)), (7, 5), 2),
    (window(3, stride=3), (8, 9), 2),
    (window(3, padding=2, dilation=2), (6, 5), 2),
    (window(3, stride=2, padding=3, dilation=2), (7, 8), 1),
    (window(3, stride=2, padding=(0, 3), dilation=(2, 1)), (7, 4), 2),
    (window(5, padding=2), (6, 7), 1),
    (window(7, stride=2, padding=3), (9, 8), 1),
    (window((1, 3), padding=(0, 1)), (1, 9), 3),
    (window((3, 1), stride=(1, 2)), (5, 4), 2),
    (window(1, stride=3, padding=1), (4, 5), 2),
    (window(2, stride=3), (9, 3), 2),
    (window(3, stride=2, padding=1, groups=2), (6, 5), 2),
    (window(3, padding=1, groups=3), (4, 5), 2),
    (window((1, 5), stride=(1, 2), padding=(0, 2), groups=2), (1, 11), 2),
)


def _cases(block, out, into, step=1, start=0):
    """Geometries in turn with ragged channels, layouts and kinds that change with them."""
    for i, (w, size, batch) in enumerate(GEOMETRIES):
        if i % step == start % step:
            n_out, n_in = w.groups * (out + i % 3), w.groups * (into + i % 2)
            layout = LAYOUTS[(i + start) % len(LAYOUTS)]
            kind = KINDS[::-1][(i // 2 + start) % len(KINDS)] if i % 7 == 3 else "random"
            yield ConvCase(block, n_out, n_in, size, w, batch, kind, layout, i % 2 == 0)


def _bsr_cases():
    yield from _cases((16, 16), 31, 17)
    for at, (bh, bw) in enumerate(BLOCKS[1:]):
        # a channel more or less than whole blocks
        yield from _cases((bh, bw), bh + 5, bw - 3 if at % 2 else bw + 3, step=10, start=at)
    yield from _kinds_and_layouts((16, 16), 48, 32)
    # more pixels than a tile, whole blocks, images that tiles straddle
    yield ConvCase((32, 32), 64, 64, (9, 9), PLAIN, 5, "random")
    yield ConvCase((64, 32), 64, 64, (9, 12), window(3, 2, 1), 5, "random")
    # one channel
    yield ConvCase((16, 16), 1, 1, (5, 5), PLAIN, 2, "full")
    yield ConvCase((16, 16), 3, 3, (5, 5), window(3, 1, 1, groups=3), 2, "full", "nchw")
    yield ConvCase((16, 16), 20, 20, (5, 5), PLAIN, 0, "full")


def _kinds_and_layouts(block, n_out, n_in):
    for i, kind in enumerate(KINDS):
        for layout in (LAYOUTS[i], LAYOUTS[(i + 2) % len(LAYOUTS)]):
            yield ConvCase(block, n_out, n_in, (4, 5), PLAIN, 2, kind, layout, layout == "nchw")


def _csr_cases():
    yield from _cases((1, 1), 5, 4)
    yield from _kinds_and_layouts((1, 1), 7, 9)
    yield ConvCase((1, 1), 19, 18, (7, 9), PLAIN, 3, "random", "nchw")
    yield ConvCase((1, 1), 1, 1, (5, 5), PLAIN, 2, "full")
    yield ConvCase((1, 1), 3, 3, (5, 5), window(3, 1, 1, groups=3), 2, "full", "nchw")
    yield ConvCase((1, 1), 4, 3, (5, 5), PLAIN, 0, "full")


BSR_CASES = tuple(_bsr_cases())
CSR_CASES = tuple(_csr_cases())


def table(cases):
    """(case, dtype name) pairs: all in fp32, every fourth in fp16, every ninth in bf16."""
    steps = (("fp32", 1), ("fp16", 4), ("bf16", 9))
    return [(case, dtype) for dtype, step in steps for case in cases[::step]]


class Operands(NamedTuple):
    """What the three products of a case take, and the dense weight in float64."""

    pattern: ConvPattern
    values: torch.Tensor
    weight: torch.Tensor
    x: torch.Tensor
    dy: torch.Tensor
    bias: torch.Tensor | None


def operands(case, dtype, exact=True, padding=0.0):
    """Operands; dy lies in memory otherwise than x."""
    p = conv_pattern(case.n_out, case.n_in, case.block, case.window, case.kind)
    values = conv_values(p, dtype, 1, exact, padding)
    other = LAYOUTS[(LAYOUTS.index(case.layout) + 1) % len(LAYOUTS)]
    x = images(case.x_shape, dtype, 2, case.layout, exact)
    dy = images(case.y_shape, dtype, 3, other, exact)
    bias = images((1, 1, 1, case.n_out), dtype, 4, "strided", exact)[0, 0, 0] if case.bias else None
    return Operands(p, values, p.dense(values), x, dy, bias)


def assert_format(made, of):
    """Channels-last if what it was computed from is that and no other, else contiguous."""
    last = of.is_contiguous(memory_format=torch.channels_last) and not of.is_contiguous()
    wanted = torch.channels_last if last else torch.contiguous_format
    assert made.is_contiguous(memory_format=wanted), f"strides {made.stride()}"
