"""`SparseConv2d` and `SparseConv1d`: drop-ins that hold only their active weights.

The weight is the matrix (C_out, kh kw C_in / groups), taps first, channels last, so a block is a
set of neighbouring channels at one kernel position. A 1-D convolution is a 2-D one of height 1.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from sparsekern import ops
from sparsekern.errors import ConfigError, DtypeError, ShapeError
from sparsekern.nn.base import SparseLayer
from sparsekern.nn.connections import check_mask, topology_of
from sparsekern.nn.conv_arguments import (
    Padding,
    check_channels,
    check_cut,
    check_groups,
    padding_of,
)
from sparsekern.nn.init import TORCH_GAIN, draw_uniform_
from sparsekern.nn.sharded import local
from sparsekern.nn.symbolic import Proxy, node_of
from sparsekern.ops import GrowScores
from sparsekern.ops.geometry import ConvGeometry
from sparsekern.ops.masked import dense_conv2d, to_kernel, to_matrix
from sparsekern.topology import Topology
from sparsekern.topology.blocks import Block

Sizes = int | tuple[int, ...]


class SparseConv(SparseLayer):
    """What `SparseConv1d` and `SparseConv2d` share; arguments as in `nn.Conv1d` and `nn.Conv2d`.

    Forward, input gradient and weight gradient cost 2 N P Q nnz FLOPs each for N images and P Q
    outputs, and no unfolded image (im2col) is ever made. Channels-last images come back
    channels-last, others contiguous.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: an int, or one for each dimension, as all sizes.
        stride: pixels between outputs.
        padding: pixels on either side, or "valid" (none), or "same" (with stride 1).
        dilation: pixels between taps.
        groups: parts of the channels that do not mix. A depthwise convolution, with one input
            channel a group, has nothing to leave out: leave it dense.
        bias: whether to add a bias, which is dense.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        sparsity: share of the weights that do not exist, in [0, 1); exact to within one block.
        block: edge or pair (output channels, input channels) of the blocks, each at one tap and in
            one group; 1 is unstructured (CSR).
        impl: None chooses by device, see `sparsekern.ops.resolve`; "masked" is the reference.
        topology: connections to start from instead of random ones; overrides sparsity and block.
        generator: of the random topology and values; torch's default one if None.
        device: where parameters and index arrays live.
        dtype: of the parameters.

    Raises:
        ConfigError, ShapeError, DtypeError: an argument is out of its domain, or the block is
            larger than the channels of a group.
    """

    dims: ClassVar[int]
    convolves = True
    dense_type: ClassVar[type[nn.Conv1d] | type[nn.Conv2d]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        sparsity: float = 0.9,
        block: Block = 1,
        impl: str | None = None,
        topology: Topology | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kernel, strides, dilations = (
            self._sizes(name, value)
            for name, value in (
                ("kernel_size", kernel_size),
                ("stride", stride),
                ("dilation", dilation),
            )
        )
        check_channels(in_channels, out_channels, groups)
        pads = padding_of(
            padding if isinstance(padding, str) else self._sizes("padding", padding),
            padding_mode,
            kernel,
            strides,
            dilations,
        )
        geometry = ConvGeometry(
            kernel=self._pair(kernel, 1),
            stride=self._pair(strides, 1),
            padding=self._pair(pads.zeros, 0),
            dilation=self._pair(dilations, 1),
            groups=groups,
        )
        shape = out_channels, geometry.taps * in_channels // groups
        if topology is None:
            topology = Topology.random(
                shape,
                block,
                sparsity=sparsity,
                groups=groups,
                taps=geometry.taps,
                generator=generator,
            )
        else:
            check_cut(topology, shape, groups, geometry.taps)
        check_groups(topology.nnzb, groups)
        super().__init__(topology.to(device or torch.get_default_device()), impl, dtype)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = kernel, strides, dilations
        self.padding = padding if isinstance(padding, str) else self._sizes("padding", padding)
        self.padding_mode = padding_mode
        self.geometry = geometry
        self._pads: Padding = pads
        empty = self.values.detach().new_empty(out_channels)
        self.bias = nn.Parameter(empty) if bias else None
        self.reset_parameters(generator)

    def reset_parameters(
        self, generator: torch.Generator | None = None, gain: float | str = TORCH_GAIN
    ) -> None:
        """Draw values scaled by each neuron's active inputs, and the bias as torch does."""
        self.reset_values(generator, gain)
        if self.bias is not None:
            draw_uniform_(self.bias.data, generator, 1 / math.sqrt(self.matrix_shape[1]))

    # ---- the dense layer's view of the weight

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(C_out, C_in / groups, *kernel_size)."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def as_weight(self, matrix: Tensor) -> Tensor:
        """(C_out, C_in / groups, *kernel_size) of a matrix (rows, cols)."""
        return to_kernel(matrix, self.geometry).view(self.weight_shape)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """(rows, cols) of a weight (C_out, C_in / groups, *kernel_size), a view where it can be."""
        return matrix_of(weight)

    # ---- use

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, C_in, *size), or one image without N, to (N, C_out, *size)."""
        if isinstance(input, Proxy):
            return cast(Tensor, node_of(self, input, (input,), {}))
        if input.dim() not in (self.dims + 1, self.dims + 2) or input.shape[-self.dims - 1] != (
            self.in_channels
        ):
            names = ", ".join(("height", "width")[-self.dims :])
            raise ShapeError(
                f"input must have shape (N, {self.in_channels}, {names}) or "
                f"({self.in_channels}, {names}); got {tuple(input.shape)}"
            )
        x, values, bias = self._operands(input)
        images = self._as_images(self._pads.apply(x))
        mask = self._mask()
        if mask is not None:
            self.geometry.output_size(*images.shape[2:])
            y = dense_conv2d(images, values * mask, self.geometry, bias)
        else:
            t = self._connections()
            y = ops.conv2d(images, values, t, self.geometry, bias, impl=self.impl)
        return self._from_images(self._observed(y, images), x)

    def grow_scores(
        self, dys: Any, xs: Any, k: int, norm: str, reduce: Any, each_row: int = 0
    ) -> GrowScores:
        """Score the dense gradient of pairs of images; see `ops.conv2d_grow_scores`."""
        what = {"norm": norm, "reduce": reduce, "each_row": each_row}
        return ops.conv2d_grow_scores(dys, xs, self.topology, self.geometry, k, **what)

    def no_pair(self) -> tuple[Tensor, Tensor]:
        """A pair (dy, x) of no images."""
        g, like = self.geometry, local(self.values).detach()
        size = [d * (k - 1) + 1 for d, k in zip(g.dilation, g.kernel, strict=True)]
        x = like.new_empty(0, self.in_channels, *size)
        return like.new_empty(0, self.out_channels, *g.output_size(*size)), x

    # ---- conversion

    @classmethod
    def from_dense(
        cls,
        module: nn.Conv1d | nn.Conv2d,
        *,
        sparsity: float | None = None,
        mask: Tensor | None = None,
        block: Block = 1,
        impl: str | None = None,
    ) -> Self:
        """Take over a dense layer's weights, bias, dtype, device and training flag.

        Args:
            module: the layer; it is not changed.
            sparsity: keep the blocks of largest summed magnitude; exact to within one block.
            mask: keep these weights; of the weight's shape, made of whole blocks.
            block: edge or pair; without `sparsity` and `mask`, blocks holding a nonzero are kept.
            impl: as in the constructor.

        Raises:
            DtypeError: the module is of another type.
            ConfigError: both `sparsity` and `mask` are given, or the module is depthwise.
            ShapeError, TopologyError: the mask does not fit.
        """
        if not isinstance(module, cls.dense_type):
            raise DtypeError(
                f"`module` must be an nn.{cls.dense_type.__name__}; got {type(module).__name__}"
            )
        check_channels(module.in_channels, module.out_channels, module.groups)
        weight = module.weight.detach()
        if mask is not None:
            check_mask(mask, weight)
            mask = matrix_of(mask)
        topology = topology_of(
            matrix_of(weight),
            block,
            sparsity=sparsity,
            mask=mask,
            groups=module.groups,
            taps=math.prod(module.kernel_size),
        )
        return cls.from_topology(module, topology, impl=impl)

    @classmethod
    def from_topology(
        cls, module: nn.Conv1d | nn.Conv2d, topology: Topology, *, impl: str | None = None
    ) -> Self:
        """Take over a dense layer with the weights that `topology` makes active."""
        layer = cls.shaped_like(module, topology, impl)
        return layer._take_from(module, matrix_of(module.weight.detach()))

    @classmethod
    def shaped_like(
        cls, module: nn.Conv1d | nn.Conv2d | SparseConv, topology: Topology, impl: str | None
    ) -> Self:
        """A layer of another one's settings, dtype and device, with values to be overwritten."""
        return cls(
            *_arguments(module),
            topology=topology,
            impl=impl,
            generator=torch.Generator("cpu").manual_seed(0),  # all of it is overwritten
            device=module.weight.device,
            dtype=module.weight.dtype,
        )

    def to_dense(self) -> nn.Conv1d | nn.Conv2d:
        """Torch's own layer with the same weights, zeros filled in."""
        make: Any = self.dense_type
        layer: nn.Conv1d | nn.Conv2d = make(
            *_arguments(self), device=self.values.device, dtype=self.values.dtype
        )
        return self._give_to(layer)

    def extra_repr(self) -> str:
        """Sizes as in torch's layer, then block, sparsity and the implementation in use."""
        usual = {
            "padding": (0,) * self.dims,
            "dilation": (1,) * self.dims,
            "groups": 1,
            "bias": True,
            "padding_mode": "zeros",
        }
        now = vars(self) | {"bias": self.bias is not None}
        others = [f"{name}={now[name]!r}" for name in usual if now[name] != usual[name]]
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        return ", ".join([sizes, f"stride={self.stride}", *others, self._repr_facts()])

    # ---- dimensions

    def _sizes(self, name: str, value: Any) -> tuple[int, ...]:
        """An int, or one for each dimension, as a tuple."""
        sizes = tuple(value) if isinstance(value, tuple | list) else (value,) * self.dims
        if len(sizes) != self.dims or not all(type(size) is int for size in sizes):
            raise DtypeError(f"`{name}` must be an int or a tuple of {self.dims}; got {value!r}")
        least = 0 if name == "padding" else 1
        if min(sizes) < least:
            raise ConfigError(f"`{name}` must be at least {least}; got {value}")
        return sizes

    def _pair(self, sizes: tuple[int, ...], other: int) -> tuple[int, int]:
        """Sizes along height and width; `other` for a dimension that is not there."""
        return cast("tuple[int, int]", (other, *sizes)[-2:])

    def _as_images(self, x: Tensor) -> Tensor:
        """(N, C, height, width)."""
        x = x if x.dim() == self.dims + 2 else x.unsqueeze(0)
        return x if self.dims == 2 else x.unsqueeze(2)

    def _from_images(self, y: Tensor, x: Tensor) -> Tensor:
        """Undo `_as_images` for the output that belongs to `x`."""
        y = y if self.dims == 2 else y.squeeze(2)
        return y if x.dim() == self.dims + 2 else y.squeeze(0)


class SparseConv2d(SparseConv):
    """2-D convolution with a weight that is sparse in memory.

    `SparseConv2d(in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
    bias=True, padding_mode="zeros", *, sparsity=0.9, block=1)`: the positional arguments are those
    of `nn.Conv2d`, all are explained at `SparseConv`.
    """

    dims = 2
    dense_type = nn.Conv2d


class SparseConv1d(SparseConv):
    """1-D convolution with a weight that is sparse in memory.

    `SparseConv1d(in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
    bias=True, padding_mode="zeros", *, sparsity=0.9, block=1)`: the positional arguments are those
    of `nn.Conv1d`, all are explained at `SparseConv`.
    """

    dims = 1
    dense_type = nn.Conv1d


def matrix_of(weight: Tensor) -> Tensor:
    """(C_out, taps C_in / groups) of a dense layer's weight (C_out, C_in / groups, *kernel)."""
    return to_matrix(weight if weight.dim() == 4 else weight.unsqueeze(2))


def _arguments(module: nn.Conv1d | nn.Conv2d | SparseConv) -> tuple[Any, ...]:
    """Positional arguments that dense and sparse layers have in common."""
    return (
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        module.bias is not None,
        module.padding_mode,
    )
