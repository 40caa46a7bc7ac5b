"""`SparseLinear`: a drop-in for `torch.nn.Linear` that holds only its active weights."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from sparsekern import ops
from sparsekern.errors import ConfigError, DtypeError, ShapeError
from sparsekern.nn.base import SparseLayer
from sparsekern.nn.connections import check_mask, check_topology, topology_of
from sparsekern.nn.init import TORCH_GAIN, draw_uniform_
from sparsekern.nn.symbolic import Proxy, node_of
from sparsekern.topology import Topology
from sparsekern.topology.blocks import Block, Grid


class SparseLinear(SparseLayer):
    """y = x wᵀ + b with a w that is sparse in memory.

    Forward, input gradient and weight gradient cost 2 M nnz FLOPs each, and values, gradient and
    optimizer state hold nnz numbers each (whole blocks, if the shape is ragged).

    Args:
        in_features: inputs, K.
        out_features: outputs, N.
        bias: whether to add a bias, which is dense.
        sparsity: share of the weights that do not exist, in [0, 1); exact to within one block.
        block: edge or pair (outputs, inputs) of the blocks; 1 is unstructured (CSR).
        impl: None chooses by device, see `sparsekern.ops.resolve`; "masked" is the reference.
        topology: connections to start from instead of random ones; overrides sparsity and block.
        generator: of the random topology and values; torch's default one if None.
        device: where parameters and index arrays live.
        dtype: of the parameters.

    Raises:
        ConfigError, ShapeError, DtypeError: an argument is out of its domain, or the block is
            larger than the layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float = 0.9,
        block: Block = 1,
        impl: str | None = None,
        topology: Topology | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if type(size) is not int:
                raise DtypeError(f"`{name}` must be an int; got {size!r}")
            if size < 1:
                raise ConfigError(f"`{name}` must be at least 1; got {size}")
        shape = (out_features, in_features)
        if topology is None:
            topology = Topology.random(shape, block, sparsity=sparsity, generator=generator)
        else:
            _check_fits(topology, shape)
        super().__init__(topology.to(device or torch.get_default_device()), impl, dtype)
        self.in_features = in_features
        self.out_features = out_features
        empty = self.values.detach().new_empty(out_features)
        self.bias = nn.Parameter(empty) if bias else None
        self.reset_parameters(generator)

    def reset_parameters(
        self, generator: torch.Generator | None = None, gain: float | str = TORCH_GAIN
    ) -> None:
        """Draw values scaled by each neuron's active inputs, and the bias as `nn.Linear` does."""
        self.reset_values(generator, gain)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            draw_uniform_(self.bias.data, generator, bound)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if isinstance(input, Proxy):
            return cast(Tensor, node_of(self, input, (input,), {}))
        if input.dim() < 1 or input.shape[-1] != self.in_features:
            raise ShapeError(
                f"input must have shape (..., {self.in_features}); got {tuple(input.shape)}"
            )
        x, values, bias = self._operands(input)
        flat = x.dim() == 2
        tokens = x if flat else x.reshape(-1, self.in_features)
        mask = self._mask()
        if mask is not None:
            y = nn.functional.linear(tokens, values * mask, bias)
        else:
            y = ops.spmm(tokens, values, self._connections(), bias, impl=self.impl)
        y = self._observed(y, tokens)
        return y if flat else y.view(*x.shape[:-1], self.out_features)

    @classmethod
    def from_dense(
        cls,
        module: nn.Linear,
        *,
        sparsity: float | None = None,
        mask: Tensor | None = None,
        block: Block = 1,
        impl: str | None = None,
    ) -> SparseLinear:
        """Take over a dense layer's weights, bias, dtype, device and training flag.

        Args:
            module: the layer; it is not changed.
            sparsity: keep the blocks of largest summed magnitude; exact to within one block.
            mask: keep these weights; (out_features, in_features), made of whole blocks.
            block: edge or pair; without `sparsity` and `mask`, blocks holding a nonzero are kept.
            impl: as in the constructor.

        Raises:
            ConfigError: both `sparsity` and `mask` are given, or sparsity is outside [0, 1).
            ShapeError, TopologyError: the mask does not fit.
        """
        if not isinstance(module, nn.Linear):
            raise DtypeError(f"`module` must be an nn.Linear; got {type(module).__name__}")
        weight = module.weight.detach()
        if mask is not None:
            check_mask(mask, weight)
        topology = topology_of(weight, block, sparsity=sparsity, mask=mask)
        return cls.from_topology(module, topology, impl=impl)

    @classmethod
    def from_topology(
        cls, module: nn.Linear, topology: Topology, *, impl: str | None = None
    ) -> SparseLinear:
        """Take over a dense layer with the weights that `topology` makes active."""
        layer = cls.shaped_like(module, topology, impl)
        return layer._take_from(module, module.weight.detach())

    @classmethod
    def shaped_like(
        cls, module: nn.Linear | SparseLinear, topology: Topology, impl: str | None
    ) -> SparseLinear:
        """A layer of another one's size, dtype and device, with values to be overwritten."""
        return cls(
            module.in_features,
            module.out_features,
            module.bias is not None,
            topology=topology,
            impl=impl,
            generator=torch.Generator("cpu").manual_seed(0),  # all of it is overwritten
            device=module.weight.device,
            dtype=module.weight.dtype,
        )

    def to_dense(self) -> nn.Linear:
        """An `nn.Linear` with the same weights, zeros filled in."""
        layer = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.values.device,
            dtype=self.values.dtype,
        )
        return self._give_to(layer)

    def extra_repr(self) -> str:
        """Sizes as in `nn.Linear`, then block, sparsity and the implementation in use."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._repr_facts()}"
        )


def _check_fits(topology: Topology, shape: tuple[int, int]) -> None:
    """Raise unless `topology` is one of a matrix of `shape`, in one part."""
    check_topology(topology)
    if topology.grid != Grid.of(shape, topology.block):
        parts = topology.groups * topology.taps
        cut = f" in {parts} parts" if parts > 1 else ""
        raise ShapeError(f"`topology` must have shape {shape}; got {topology.shape}{cut}")
