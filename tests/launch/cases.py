"""Calls of every launcher: blocks, types, layouts in memory, ragged and empty shapes."""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from sparsekern.kernels.bsr_grow import bsr_grow
from sparsekern.ops import triton as backend
from sparsekern.ops.geometry import ConvGeometry
from sparsekern.topology import Topology

EVERY = os.environ.get("SPARSEKERN_LAUNCH") == "all"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _row(m, k, dtype):
    return torch.zeros(m, k, dtype=dtype)


def _column(m, k, dtype):
    return torch.zeros(k, m, dtype=dtype).t()


def _expanded(m, k, dtype):
    return torch.zeros(1, 1, dtype=dtype).expand(m, k)


def _repeated(m, k, dtype):
    return torch.zeros(1, k, dtype=dtype).expand(m, k)


def _padded(m, k, dtype):
    return torch.zeros(m, k + 24, dtype=dtype)[:, 8 : 8 + k]


def _shifted(m, k, dtype):
    return torch.zeros(m, k + 1, dtype=dtype)[:, 1:]


def _strided(m, k, dtype):
    return torch.zeros(2 * m, 2 * k, dtype=dtype)[::2, ::2]


LAYOUTS = {
    made.__name__[1:]: made
    for made in (_row, _column, _expanded, _repeated, _padded, _shifted, _strided)
}


class Linear(NamedTuple):
    """A layer and the tokens it is given."""

    block: tuple[int, int]
    dtype: torch.dtype = BF16
    layout: str = "row"
    M: int = 300
    N: int = 256
    K: int = 256
    nnzb: int | None = None

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"{self.M}x{self.K}x{self.N}"
        empty = "" if self.nnzb is None else f"-{self.nnzb}"
        return f"{'x'.join(map(str, self.block))}-{dtype}-{self.layout}-{sizes}{empty}"


class Conv(NamedTuple):
    """A convolution and the images it is given."""

    block: tuple[int, int]
    dtype: torch.dtype = BF16
    layout: str = "channels_last"
    stride: int = 1
    batch: int = 2
    groups: int = 1
    channels: int = 64

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        block = "x".join(map(str, self.block))
        sizes = f"s{self.stride}-g{self.groups}-c{self.channels}-n{self.batch}"
        return f"{block}-{dtype}-{self.layout}-{sizes}"


class Call(NamedTuple):
    """One product: what runs it, and the tensors that it takes."""

    run: Callable[[], torch.Tensor]
    tensors: tuple[torch.Tensor, ...]


def square(edge):
    return edge, edge


LINEAR = (
    *(Linear(square(64), layout=name) for name in LAYOUTS),
    *(Linear(square(16), layout=name) for name in ("row", "column", "shifted", "strided")),
    *(Linear(square(e)) for e in (32, 128)),
    *(Linear(block, M=70) for block in ((64, 32), (16, 128))),
    *(Linear(square(e), dtype) for e in (64, 16) for dtype in (FP16, FP32)),
    *(Linear(square(e), M=m) for e in (64, 16, 1) for m in (0, 1)),
    *(Linear(square(e), nnzb=0) for e in (64, 16, 1)),
    *(Linear(square(e), N=259, K=263, M=283) for e in (64, 16, 1)),
    *(Linear(square(e), N=1000, K=1000, M=70) for e in (128, 64, 16)),
    *(Linear(square(64), layout=name, N=1000, K=1001, M=70) for name in ("padded", "column")),
    *(Linear(square(1), layout=name) for name in ("row", "column", "expanded", "shifted")),
    Linear(square(1), FP32),
    Linear(square(64), M=1100),  # sampled products in parts
)
MORE_LINEAR = tuple(
    Linear(block, dtype, layout, m)
    for block in (*map(square, (1, 16, 32, 64, 128)), (32, 64), (128, 16), (16, 64), (64, 128))
    for dtype in (BF16, FP16, FP32)
    for layout in LAYOUTS
    for m in (1, 300)
)
CONV = (
    *(Conv(square(e), layout=name) for e in (32, 1) for name in ("channels_last", "contiguous")),
    *(Conv(square(e), stride=2, groups=2) for e in (16, 1)),
    *(Conv(square(e), batch=b) for e in (32, 1) for b in (0, 1)),
    Conv((64, 16), FP32),
    *(Conv(square(16), channels=c, groups=g) for c, g in ((37, 1), (37, 2), (24, 2))),
)
MORE_CONV = tuple(
    Conv(square(e), dtype, layout, stride, groups=groups)
    for e in (1, 16, 32, 64, 128)
    for dtype in (BF16, FP16, FP32)
    for layout in ("channels_last", "contiguous")
    for stride, groups in ((1, 1), (2, 1), (1, 2))
)
CASES = tuple(dict.fromkeys((*LINEAR, *CONV, *((*MORE_LINEAR, *MORE_CONV) if EVERY else ()))))


def linear_calls(case):
    """The products of a layer, by name."""
    some = {"sparsity": 0.5} if case.nnzb is None else {"nnzb": case.nnzb}
    t = Topology.random((case.N, case.K), case.block, **some)
    values = torch.zeros(t.values_shape, dtype=case.dtype)
    bias = torch.zeros(case.N, dtype=case.dtype)
    x, dy = (LAYOUTS[case.layout](case.M, n, case.dtype) for n in (case.K, case.N))
    held = t.arrays
    out = torch.zeros(t.values_shape)
    calls = {
        "spmm": Call(lambda: backend.spmm(x, values, t, bias), (x, values, bias, *held)),
        "spmm_t": Call(lambda: backend.spmm_t(dy, values, t), (dy, values, *held)),
        "sddmm": Call(lambda: backend.sddmm(dy, x, t), (dy, x, *held)),
        "sddmm-add": Call(lambda: backend.sddmm(dy, x, t, out=out), (dy, x, out, *held)),
    }
    if case.layout == "row":
        relu = {"relu": True}
        calls["spmm-relu"] = Call(
            lambda: backend.spmm(x, values, t, None, **relu), (x, values, *held)
        )
    if case.block in ((64, 64), (16, 16)) and case.nnzb is None:
        calls["grow"] = Call(lambda: bsr_grow(dy, x, case.block), (dy, x))
    return calls


def conv_calls(case):
    """The products of a convolution, by name."""
    taps, c, g = 9, case.channels, case.groups
    pair = (case.stride, case.stride)
    geometry = ConvGeometry((3, 3), pair, (1, 1), (1, 1), g)
    t = Topology.random((c * g, taps * c), case.block, sparsity=0.5, groups=g, taps=taps)
    values = torch.zeros(t.values_shape, dtype=case.dtype)
    bias = torch.zeros(c * g, dtype=case.dtype)
    side = (14 - 1) // case.stride + 1
    x, dy = (
        torch.zeros(case.batch, c * g, n, n, dtype=case.dtype).contiguous(
            memory_format=getattr(
                torch, {"contiguous": "contiguous_format"}.get(case.layout, case.layout)
            )
        )
        for n in (14, side)
    )
    held = t.arrays
    size = {"size": (14, 14)}
    return {
        "conv2d": Call(
            lambda: backend.conv2d(x, values, t, geometry, bias), (x, values, bias, *held)
        ),
        "dgrad": Call(
            lambda: backend.conv2d_dgrad(dy, values, t, geometry, **size), (dy, values, *held)
        ),
        "wgrad": Call(lambda: backend.conv2d_wgrad(dy, x, t, geometry), (dy, x, *held)),
    }


def calls(case):
    """The products of a case, by name."""
    return linear_calls(case) if isinstance(case, Linear) else conv_calls(case)
