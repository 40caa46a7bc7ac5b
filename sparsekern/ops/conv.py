"""Convolutions with sparse weights: forward, input gradient, weight gradient, grow scores.

The weight is a pair of a `Topology` over the matrix (C_out, kh kw C_in / groups), taps first,
channels last, and its `values`; a `ConvGeometry` says how it walks the image. No buffer of the size
of an unfolded image (im2col) is made. All functions are differentiable (`conv2d_grow_scores`
apart), work under `torch.compile(fullgraph=True)` and are counted by `FlopCounterMode`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from sparsekern.errors import ConfigError, ShapeError
from sparsekern.ops import conv_library as library
from sparsekern.ops import direct
from sparsekern.ops.checks import (
    check_bias,
    check_device,
    check_geometry,
    check_image,
    check_outputs,
    check_values,
    fits,
    implementation,
)
from sparsekern.ops.geometry import ConvGeometry
from sparsekern.ops.grow import GrowScores, check_norm, conv_slabs, stream_grow_scores
from sparsekern.topology import Topology


def conv2d(
    x: Tensor,
    values: Tensor,
    topology: Topology,
    geometry: ConvGeometry,
    bias: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Convolution with a sparse kernel, y = x * w + bias.

    Args:
        x: (N, C_in, H, W), any strides; channels-last is fastest on a GPU.
        values: (nnzb, bh, bw), the active blocks of the weight matrix in CSR order.
        topology: connections of that matrix, (C_out, kh kw C_in / groups).
        geometry: kernel, stride, padding, dilation, groups.
        bias: (C_out,).
        impl: see `resolve`.

    Returns:
        (N, C_out, P, Q) in the dtype of `x`, sums kept in float32 at least; channels-last if `x`
        is, else contiguous.

    Raises:
        ShapeError, DtypeError, DeviceError, ConfigError, UnavailableError: bad arguments.
    """
    known = None if direct.is_watched() else topology.known()
    check_geometry(topology, geometry)
    if known is None or not (x.dim() == 4 and fits(x, _inputs(topology), 1, values, bias, known)):
        check_values(values, topology)
        check_image("x", x, _inputs(topology), values)
        check_bias(bias, topology.shape[0], values)
    geometry.output_size(x.shape[2], x.shape[3])
    name = implementation(impl, values, topology, conv=True)
    if known is not None and direct.is_plain(x, values, bias):
        return direct.conv2d(x, values, bias, topology, known, geometry=geometry, impl=name)
    return library.ConvOperators(name).conv2d(x, values, topology, geometry, bias)


def conv2d_dgrad(
    dy: Tensor,
    values: Tensor,
    topology: Topology,
    geometry: ConvGeometry,
    *,
    size: tuple[int, int],
    impl: str | None = None,
) -> Tensor:
    """Input gradient of `conv2d`: (N, C_out, P, Q) -> (N, C_in, *size), size = (H, W)."""
    check_geometry(topology, geometry)
    check_values(values, topology)
    check_image("dy", dy, topology.shape[0], values)
    check_outputs(dy, geometry, dy.shape[0], size)
    rest = library.conv_parts(topology, geometry, *size)
    dx: Tensor = library.conv2d_dgrad(
        dy, values, *rest, implementation(impl, values, topology, conv=True)
    )
    return dx


def conv2d_wgrad(
    dy: Tensor,
    x: Tensor,
    topology: Topology,
    geometry: ConvGeometry,
    *,
    impl: str | None = None,
) -> Tensor:
    """Weight gradient of `conv2d` at active blocks only: (nnzb, bh, bw), 0 in the padding."""
    _check_pair(dy, x, topology, geometry)
    rest = library.conv_parts(topology, geometry, *x.shape[2:])
    dw: Tensor = library.conv2d_wgrad(dy, x, *rest, implementation(impl, x, topology, conv=True))
    return dw


def conv2d_grow_scores(
    dy: Tensor | Sequence[Tensor],
    x: Tensor | Sequence[Tensor],
    topology: Topology,
    geometry: ConvGeometry,
    k: int,
    *,
    norm: str = "l1",
    reduce: Callable[[Tensor], None] | None = None,
    each_row: int = 0,
) -> GrowScores:
    """Score the dense gradient of a convolution's weight, streamed by slabs of output channels.

    Each slab is torch's own weight gradient of a few output channels.

    Args:
        dy: (N, C_out, P, Q), or several, whose gradients are summed before any norm is taken.
        x: (N, C_in, H, W), or several.
        topology: what is active now.
        geometry: kernel, stride, padding, dilation, groups.
        k: how many of the best inactive blocks to report.
        norm: "l1", "l2" or "max" over a block.
        reduce: sums a slab of the gradient over ranks, in place.
        each_row: report so many of the best inactive blocks of each block row besides.
    """
    check_norm(norm)
    if k < 0:
        raise ConfigError(f"`k` must not be negative; got {k}")
    dys, xs = ([t] if isinstance(t, Tensor) else list(t) for t in (dy, x))
    if len(dys) != len(xs) or not xs:
        raise ShapeError(f"`dy` and `x` must come in pairs; got {len(dys)} and {len(xs)}")
    for one_dy, one_x in zip(dys, xs, strict=True):
        _check_pair(one_dy, one_x, topology, geometry)
    topology.known()
    # a graph would keep every slab
    dys, xs = ([t.detach() for t in group] for group in (dys, xs))
    slabs = conv_slabs(dys, xs, geometry)
    return stream_grow_scores(slabs, xs[0], topology, k, norm, reduce, each_row)


def _inputs(topology: Topology) -> int:
    return topology.shape[1] // topology.taps * topology.groups


def _check_pair(dy: Tensor, x: Tensor, topology: Topology, geometry: ConvGeometry) -> None:
    check_geometry(topology, geometry)
    check_device(topology, x)
    check_image("x", x, _inputs(topology), x)
    check_image("dy", dy, topology.shape[0], x)
    check_outputs(dy, geometry, x.shape[0], (x.shape[2], x.shape[3]))
