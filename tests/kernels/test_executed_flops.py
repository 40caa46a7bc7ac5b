"""FLOPs counted inside the interpreted kernels are those of the formulas, as integers.

`flop_meter` counts lanes and live lanes of every product that a kernel makes; `FlopCounterMode`
applies `sparsekern.ops.flops`. Where sizes fill the tiles, the lanes that are computed are the
formula's. Where they do not, tiles hang over the edge, and the lanes that are loaded are. The
formula counts each weight of a convolution once for every output pixel: taps outside of the image
are lanes that are computed but not loaded, so with padding only lanes are compared with it, and
loaded lanes with a dense convolution of ones. `bsr_spmm_resident` is Gluon, which has no
interpreter: nothing is executed that could be counted.
"""

import importlib
import importlib.util
import sys
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sparsekern import kernels, ops
from sparsekern.kernels import launch
from sparsekern.ops.geometry import ConvGeometry
from sparsekern.topology import Topology

if torch.cuda.is_available():
    pytest.skip("compiled kernels can't be metered", allow_module_level=True)

from flop_meter import metered

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def nonzero(*shape, dtype):
    """Integers of magnitude 1 to 3: no product is zero."""
    return (torch.randint(1, 4, shape) * (torch.randint(0, 2, shape) * 2 - 1)).to(dtype)


def regular(shape, block, active, groups=1, taps=1):
    """Equally many active blocks in all block rows, and in all block columns."""
    grid = Topology.random(shape, block, sparsity=0.0, groups=groups, taps=taps)
    rows, cols = grid.block_rows, grid.block_cols
    i = torch.arange(rows)[:, None]
    positions = (i * cols + (i * cols // rows + torch.arange(active)) % cols).flatten()
    return Topology.from_positions(positions.sort().values, shape, block, groups=groups, taps=taps)


class Linear(NamedTuple):
    """Operands of the linear operators."""

    topology: Topology
    values: torch.Tensor
    x: torch.Tensor
    dy: torch.Tensor

    @staticmethod
    def make(topology, tokens, dtype):
        values = topology.clear_padding_(nonzero(*topology.values_shape, dtype=dtype))
        rows, cols = topology.shape
        x, dy = (nonzero(tokens, n, dtype=dtype) for n in (cols, rows))
        return Linear(topology, values, x, dy)


LINEAR = {
    "spmm": lambda o: ops.spmm(o.x, o.values, o.topology, impl="triton"),
    "spmm_t": lambda o: ops.spmm_t(o.dy, o.values, o.topology, impl="triton"),
    "sddmm": lambda o: ops.sddmm(o.dy, o.x, o.topology, impl="triton"),
}


class Conv(NamedTuple):
    """Operands of the convolution operators."""

    topology: Topology
    geometry: ConvGeometry
    values: torch.Tensor
    x: torch.Tensor
    dy: torch.Tensor

    @staticmethod
    def make(topology, geometry, batch, size, dtype, memory_format=torch.contiguous_format):
        values = topology.clear_padding_(nonzero(*topology.values_shape, dtype=dtype))
        n_in = topology.shape[1] // geometry.taps * geometry.groups
        shapes = (n_in, *size), (topology.shape[0], *geometry.output_size(*size))
        x, dy = (
            nonzero(batch, *s, dtype=dtype).contiguous(memory_format=memory_format) for s in shapes
        )
        return Conv(topology, geometry, values, x, dy)

    def loaded(self):
        """FLOPs of active weights at pixels that exist: a convolution of ones by the mask."""
        g = self.geometry
        mask = self.topology.to_mask().double()
        kernel = mask.view(len(mask), *g.kernel, -1).permute(0, 3, 1, 2)
        ones = torch.ones_like(self.x, dtype=torch.float64)
        return 2 * int(
            F.conv2d(ones, kernel, None, g.stride, g.padding, g.dilation, g.groups).sum()
        )


CONV = {
    "conv2d": lambda o: ops.conv2d(o.x, o.values, o.topology, o.geometry, impl="triton"),
    "conv2d_dgrad": lambda o: ops.conv2d_dgrad(
        o.dy, o.values, o.topology, o.geometry, size=tuple(o.x.shape[2:]), impl="triton"
    ),
    "conv2d_wgrad": lambda o: ops.conv2d_wgrad(o.dy, o.x, o.topology, o.geometry, impl="triton"),
}


def measured(run, operands):
    """What the meter saw, and what the formula says."""
    with metered() as meter, FlopCounterMode(display=False) as counter:
        run(operands)
    return meter, counter.get_total_flops()


# ---- linear

FILLED = {
    "bsr": (((64, 256), 16, 16), ("fp32", "fp16", "bf16"), "_bsr_{}_kernel"),
    "bsr-wide": (((64, 128), (32, 16), 8), ("fp32",), "_bsr_{}_kernel"),
    "tma": (((256, 256), 64, 2), ("fp16", "bf16"), "_bsr_{}_tma_kernel"),
    "tma-long": (((256, 512), (64, 64), 8), ("fp16",), "_bsr_{}_tma_kernel"),
    "csr": (((16, 64), 1, 32), ("fp32", "fp16"), "_csr_{}_kernel"),
}


@pytest.mark.parametrize("op", LINEAR)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name, (_, dtypes, _) in FILLED.items() for dtype in dtypes],
)
def test_filled_tiles_compute_what_the_formula_says(name, dtype, op):
    given, _, kernel = FILLED[name]
    o = Linear.make(regular(*given), 256, DTYPES[dtype])
    meter, formula = measured(LINEAR[op], o)
    assert meter.kernels == [kernel.format(op.removesuffix("_t"))]
    assert meter.lanes == meter.live == formula == 2 * 256 * o.values.numel()


RAGGED = {
    "bsr": (((80, 112), 16), ("fp32", "bf16"), "_bsr_{}_kernel"),
    "bsr-tall": (((128, 96), (64, 16)), ("fp32", "fp16"), "_bsr_{}_kernel"),
    "tma": (((192, 320), 64), ("fp16",), "_bsr_{}_tma_kernel"),
    "csr": (((19, 27), 1), ("fp32", "bf16"), "_csr_{}_kernel"),
}


@pytest.mark.parametrize("op", LINEAR)
@pytest.mark.parametrize("tokens", [1, 130])  # the second is more than a tile
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name, (_, dtypes, _) in RAGGED.items() for dtype in dtypes],
)
def test_whatever_the_sizes_the_formula_is_what_is_loaded(name, dtype, tokens, op):
    given, _, kernel = RAGGED[name]
    o = Linear.make(Topology.random(*given, sparsity=0.6), tokens, DTYPES[dtype])
    meter, formula = measured(LINEAR[op], o)
    assert meter.kernels == [kernel.format(op.removesuffix("_t"))]
    assert meter.live == formula == 2 * tokens * o.values.numel()
    assert meter.lanes >= formula


@pytest.mark.parametrize("op", LINEAR)
@pytest.mark.parametrize("block", [16, (32, 16)])
def test_of_a_ragged_block_only_the_inside_is_loaded(block, op):
    o = Linear.make(Topology.random((41, 71), block, sparsity=0.3), 21, torch.float32)
    meter, formula = measured(LINEAR[op], o)
    assert o.topology.nnz < o.values.numel()
    assert meter.live == 2 * 21 * o.topology.nnz
    # a block counts whole, since a tile computes it whole
    assert formula == 2 * 21 * o.values.numel() <= meter.lanes


@pytest.mark.parametrize(("dtype", "rows"), [("fp32", 256), ("fp16", 256), ("fp16", 200)])
def test_grow_scores_compute_the_dense_gradient(dtype, rows):
    o = Linear.make(Topology.random((rows, 256), 16, sparsity=0.6), 64, DTYPES[dtype])
    meter, formula = measured(lambda o: ops.grow_scores(o.dy, o.x, o.topology, 3, impl="triton"), o)
    assert meter.kernels == ["_bsr_grow_kernel"]
    assert meter.live == formula == 2 * 64 * rows * 256
    assert meter.lanes == 2 * 64 * 256 * 256


# ---- convolution

SAME = ConvGeometry((2, 2), padding=(1, 1), dilation=(2, 2))  # outputs as large as inputs
HALVED = ConvGeometry((2, 2), stride=(2, 2))  # each phase of the input meets one tap
CONV_FILLED = {
    "bsr-same": (((64, 256), 16, 8, 1, 4), SAME, (8, 8), ("fp16",)),
    "bsr-small": (((64, 256), 16, 8, 1, 4), SAME, (4, 4), ("fp32",)),
    "bsr-halved": (((128, 256), 16, 8, 1, 4), HALVED, (16, 16), ("bf16",)),
    "bsr-wide": (((128, 512), 64, 4, 1, 4), HALVED, (16, 16), ("fp16",)),
    "csr-same": (((8, 64), 1, 32, 1, 4), SAME, (8, 8), ("fp32",)),
    "csr-halved": (((8, 64), 1, 32, 1, 4), HALVED, (16, 16), ("bf16",)),
}


@pytest.mark.parametrize("op", CONV)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name, (*_, dtypes) in CONV_FILLED.items() for dtype in dtypes],
)
def test_filled_convolution_tiles_compute_what_the_formula_says(name, dtype, op):
    (shape, block, active, groups, taps), geometry, size, _ = CONV_FILLED[name]
    o = Conv.make(regular(shape, block, active, groups, taps), geometry, 4, size, DTYPES[dtype])
    meter, formula = measured(CONV[op], o)
    assert meter.kernels == [f"_{name.partition('-')[0]}_{op}_kernel"]
    assert meter.lanes == formula == 2 * o.dy[:, 0].numel() * o.values.numel()
    # taps outside of the image are computed, with zeros
    assert meter.live == o.loaded()
    assert (meter.live < formula) == (geometry is SAME)


VALID = (
    ConvGeometry((3, 2), stride=(2, 1)),
    ConvGeometry((2, 3), dilation=(2, 1), groups=2),
    ConvGeometry((1, 1)),
)
PADDED = (
    ConvGeometry((3, 3), padding=(2, 1), stride=(1, 2)),
    ConvGeometry((3, 2), padding=(2, 1), dilation=(2, 1), groups=2),
)


FORMATS = {
    torch.contiguous_format: (*VALID, *PADDED),
    torch.channels_last: (VALID[0], PADDED[0]),  # other strides of the same addresses
}


@pytest.mark.parametrize("op", CONV)
@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize(
    ("memory_format", "geometry"),
    [(f, g) for f, all_of in FORMATS.items() for g in all_of],
    ids=str,
)
def test_whatever_the_convolution_its_weights_meet_the_image_once(
    block, geometry, memory_format, op
):
    channels = 8 if block == 1 else 32
    shape = channels, geometry.taps * channels // geometry.groups
    cut = {"groups": geometry.groups, "taps": geometry.taps}
    t = Topology.random(shape, block, sparsity=0.7, **cut)
    o = Conv.make(t, geometry, 2, (5, 4), torch.float32, memory_format)
    meter, formula = measured(CONV[op], o)
    assert meter.live == o.loaded()
    assert formula == 2 * o.dy[:, 0].numel() * o.values.numel()
    assert (meter.live == formula) == (geometry in VALID)


def test_ragged_channels_load_what_there_is():
    geometry = ConvGeometry((3, 3), padding=(1, 1), groups=2)
    t = Topology.random((40, 9 * 20), 16, sparsity=0.4, groups=2, taps=9)
    o = Conv.make(t, geometry, 1, (5, 4), torch.float32)
    assert t.nnz < o.values.numel()
    for run in CONV.values():
        assert measured(run, o)[0].live == o.loaded()


# ---- the meter itself

DOUBLED = {
    "_bsr_spmm_kernel": (
        "bsr_spmm",
        "        acc = tl.dot(x, w, acc, input_precision=PRECISION)\n",
    ),
    "_csr_spmm_kernel": ("csr_spmm", "            acc += v[:, None] * x\n"),
    "_bsr_conv2d_wgrad_kernel": (
        "bsr_conv2d_wgrad",
        "            acc = tl.dot(tl.trans(x), dy, acc, input_precision=PRECISION)\n",
    ),
}


def doubled(module, line, tmp_path):
    """A kernel's module with a line repeated."""
    path = next(iter(kernels.__path__)) + f"/{module}.py"
    with open(path) as file:
        source = file.read()
    assert line in source
    copy = tmp_path / f"{module}.py"
    copy.write_text(source.replace(line, line + line))
    spec = importlib.util.spec_from_file_location(f"sparsekern.kernels.doubled_{module}", copy)
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("kernel", DOUBLED)
def test_the_meter_notices_a_product_made_twice(kernel, tmp_path, monkeypatch):
    module, line = DOUBLED[kernel]
    made = doubled(module, line, tmp_path)
    original = importlib.import_module(f"sparsekern.kernels.{module}")
    if "conv2d" in kernel:
        o = Conv.make(regular((64, 128), 16, 8, 1, 4), HALVED, 1, (16, 16), torch.float32)
        run = CONV[kernel.removeprefix("_bsr_").removesuffix("_kernel")]
    else:
        o = Linear.make(regular((64, 64), 1 if "csr" in kernel else 16, 4), 128, torch.float32)
        run = LINEAR["spmm"]
    before, formula = measured(run, o)
    monkeypatch.setattr(original, kernel, getattr(made, kernel))
    after, still = measured(run, o)
    assert before.lanes == before.live == formula == still
    assert after.lanes == after.live == 2 * formula


def test_the_meter_leaves_nothing_behind_and_nothing_out():
    o = Linear.make(regular((64, 64), 16, 4), 64, torch.float32)
    alone = LINEAR["spmm"](o)
    with metered() as meter:
        assert torch.equal(LINEAR["spmm"](o), alone)
    counted = meter.lanes
    LINEAR["spmm"](o)
    assert meter.lanes == counted > 0
    assert launch.is_interpreted(
        importlib.import_module("sparsekern.kernels.bsr_spmm")._bsr_spmm_kernel
    )
