"""`SparseLayer`: a weight matrix that is sparse in memory, and what every layer does with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from sparsekern import ops
from sparsekern.errors import DtypeError, ShapeError, TopologyError
from sparsekern.nn.held import HeldTopology
from sparsekern.nn.init import TORCH_GAIN, as_gain, sparse_uniform_
from sparsekern.nn.sharded import local, part, whole
from sparsekern.nn.view import WeightView, refuse_assignment
from sparsekern.ops import GrowScores
from sparsekern.ops.capture import capture
from sparsekern.ops.cpu import choice
from sparsekern.ops.direct import any_autocast
from sparsekern.ops.dispatch import check_impl, resolve
from sparsekern.ops.library import is_traced
from sparsekern.topology import Topology
from sparsekern.topology.checks import check_tensor

L = TypeVar("L", bound=nn.Module)

resizers: list[Callable[[SparseLayer, Topology, Any], None]] = []
"""What makes `resize_`: it knows of optimizers and averages, which stand above the layers."""


class SparseLayer(HeldTopology):
    """Base of layers with one sparse weight matrix of shape (rows, cols).

    The parameter `values` holds the active blocks only, (nnzb, bh, bw) in CSR order of the
    topology, whose index arrays are int32 buffers. Topology updates overwrite both in
    place, so optimizers, DDP buckets and CUDA graphs stay valid.

    Under `impl="masked"`, the reference, `values` is the dense (rows, cols) matrix instead,
    multiplied by a mask in forward, and its optimizer state is dense.
    """

    bias: nn.Parameter | None
    convolves: ClassVar[bool] = False

    def __init__(self, topology: Topology, impl: str | None, dtype: torch.dtype | None) -> None:
        check_impl(impl)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise DtypeError(f"`dtype` must be a floating point type; got {dtype}")
        super().__init__(topology)
        self.impl = impl
        self._capture_key = 0
        mask = topology.to_mask() if impl == "masked" else None
        self.register_buffer("dense_mask", mask, persistent=False)
        shape = topology.values_shape if mask is None else topology.shape
        self.values = nn.Parameter(torch.zeros(shape, dtype=dtype, device=topology.device))

    # ---- facts

    @property
    def weight(self) -> WeightView:
        """A view that answers `.shape`, `.dtype`, `.device` and `.to_dense()`; see `WeightView`."""
        return WeightView(self)

    @weight.setter
    def weight(self, _: object) -> None:
        refuse_assignment()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter, as torch does, unless it would stand where the view is."""
        if name == "weight":
            refuse_assignment()
        super().register_parameter(name, param)

    @property
    def nnz(self) -> int:
        """Number of active weights; padding of edge blocks is not counted."""
        return self.topology.nnz

    @property
    def density(self) -> float:
        """Active share of the weights."""
        return self.topology.density

    @property
    def sparsity(self) -> float:
        """Inactive share of the weights."""
        return 1.0 - self.density

    @property
    def resolved_impl(self) -> str:
        """The implementation that a forward pass would use now."""
        return self.impl_on(self.values.device)

    def impl_on(self, device: torch.device) -> str:
        """The implementation that a forward pass on `device` would use."""
        if self.impl == "masked":
            return "masked"
        density = self._held().block_density
        dtype = self.values.dtype
        return resolve(self.impl, device, dtype, self.block, density, conv=self.convolves)

    def is_reduced(self) -> bool:
        """Whether a DDP module makes the gradient of the values equal on all ranks."""
        ddp: Any = None if self._ddp is None else self._ddp()
        return ddp is not None and bool(ddp.require_backward_grad_sync)

    def mask(self) -> Tensor:
        """Dense bool mask of the active weights, of the shape of `weight`."""
        return self.as_weight(self.topology.to_mask())

    def active_values(self) -> Tensor:
        """Active weights (nnzb, bh, bw), detached, whatever the storage.

        Of values that FSDP2 has sharded, a copy of all: every rank must ask.
        """
        held = whole(self.values.detach()) if self._whole is None else self._whole
        return self.pack(held)

    def dense_weight(self) -> Tensor:
        """Dense weight, detached, as torch's dense layer holds it."""
        return self.as_weight(self.topology.unpack(self.active_values()))

    def as_weight(self, matrix: Tensor) -> Tensor:
        """A matrix (rows, cols) in the shape of the dense layer's weight; differentiable."""
        return matrix

    def pack(self, tensor: Tensor) -> Tensor:
        """A tensor of the shape of `values`, seen as blocks (nnzb, bh, bw)."""
        return tensor if self.dense_mask is None else self.topology.pack(tensor)

    # ---- change

    def set_active_values(self, blocks: Tensor) -> None:
        """Overwrite the active weights with `blocks` (nnzb, bh, bw), in place.

        Raises:
            DtypeError, ShapeError: `blocks` is no tensor, or one of another shape.
        """
        check_tensor("blocks", blocks)
        shape = self._held().values_shape
        if blocks.shape != shape:
            raise ShapeError(f"`blocks` must have shape {shape}; got {tuple(blocks.shape)}")
        with torch.no_grad():
            stored = blocks if self.dense_mask is None else self.topology.unpack(blocks)
            local(self.values).copy_(part(stored, self.values))

    def rewire_(self, topology: Topology, source: Tensor, tensors: Sequence[Tensor]) -> None:
        """Switch to `topology` in place, and move `tensors` with it.

        Args:
            topology: same shape, block and number of active blocks.
            source: (nnzb,) int64, where each new block stood in CSR order; -1 for a new one.
            tensors: tensors of the shape of `values`, `values` among them; new blocks become 0.
        """
        topology.known()  # validated before anything changes, and so are the buffers as they are
        _ = self.topology
        fresh = self.fresh_slots(topology, source)
        with torch.no_grad():
            new = [self.moved(whole(t.detach()), source, fresh, topology) for t in tensors]
            for tensor, made in zip(tensors, new, strict=True):
                local(tensor).copy_(part(made, tensor))
            if self.dense_mask is not None:
                self.dense_mask.copy_(topology.to_mask())
            self._overwrite_(topology)

    def resize_(
        self,
        topology: Topology,
        *,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    ) -> None:
        """Switch to a topology with more or fewer active blocks; all or nothing.

        Values, optimizer state and averages move with their blocks; new ones start at 0. `values`
        stays the same Parameter, in its optimizer, and loses its gradient.

        Args:
            topology: same shape and block.
            optimizer: that holds `values`, or several; None takes those of the method that
                follows the layer, if one is attached.

        Raises:
            ConfigError: the layer is inside DistributedDataParallel, FSDP or a compiled module, or
                there is a captured CUDA graph: these count on the size of its parameter.
            DtypeError, OptimizerError, ShapeError, TopologyError: a topology of another matrix, or
                an optimizer that does not hold the values, or whose state can't follow.
        """
        resizers[0](self, topology, optimizer)

    def fresh_slots(self, topology: Topology, source: Tensor) -> Tensor:
        """Which entries of `values` are new under a topology.

        Args:
            topology: the coming one.
            source: (nnzb,) int64, where each of its blocks stands now; -1 for a new one.

        Returns:
            int64 places of blocks, or, under `impl="masked"`, a bool mask (rows, cols).
        """
        new = source < 0
        if self.dense_mask is None:
            return new.nonzero()[:, 0]
        return topology.unpack(new.view(-1, 1, 1).expand(topology.values_shape))

    def moved(
        self,
        tensor: Tensor,
        source: Tensor,
        fresh: Tensor,
        topology: Topology,
        values: Tensor | None = None,
        start: float = 0.0,
    ) -> Tensor:
        """A tensor like `values`, or with a row for each block, as it is under another topology.

        Args:
            tensor: as it is.
            source: (nnzb,) int64, where each new block stands in it; -1 for a new one.
            fresh: from `fresh_slots`.
            topology: the coming one.
            values: of the new blocks (n, bh, bw), in CSR order.
            start: for all of the new blocks, without `values`.
        """
        with torch.no_grad():
            if self.dense_mask is None:
                moved = (
                    tensor.index_select(0, source.clamp(min=0))
                    if tensor.shape[0]
                    else (tensor.new_zeros(source.numel(), *tensor.shape[1:]))
                )
                if values is None or values.shape[1:] != tensor.shape[1:]:
                    return moved.index_fill_(0, fresh, start)
                return moved.index_copy_(0, fresh, values.to(moved))
            if values is None:
                return tensor.masked_fill(fresh, start)
            blocks = tensor.new_zeros(topology.values_shape)
            blocks[source < 0] = values.to(blocks)
            return torch.where(fresh, topology.unpack(blocks), tensor)

    def reset_values(
        self, generator: torch.Generator | None = None, gain: float | str = TORCH_GAIN
    ) -> None:
        """Draw the active weights anew, scaled by each neuron's active inputs; see `nn.init`.

        Args:
            generator: to draw from; torch's default one if None.
            gain: a number, or the nonlinearity that follows; see `nn.init.as_gain`.

        Raises:
            ConfigError, DtypeError: the gain is no positive number and no known name.
        """
        scale = as_gain(gain)
        blocks = torch.empty(
            self.topology.values_shape, dtype=self.values.dtype, device=self.values.device
        )
        self.set_active_values(sparse_uniform_(blocks, self.topology, scale, generator))

    def grow_scores(
        self,
        dys: Sequence[Tensor],
        xs: Sequence[Tensor],
        k: int,
        norm: str,
        reduce: Callable[[Tensor], None] | None,
        each_row: int = 0,
    ) -> GrowScores:
        """Score the dense gradient of pairs (dy, x) from `capture`; see `ops.grow_scores`."""
        return ops.grow_scores(
            dys,
            xs,
            self.topology,
            k,
            norm=norm,
            reduce=reduce,
            impl=self.impl,
            each_row=each_row,
        )

    def no_pair(self) -> tuple[Tensor, Tensor]:
        """A pair (dy, x) of no tokens: its dense gradient is zero."""
        rows, cols = self.matrix_shape
        like = local(self.values).detach()
        return like.new_empty(0, rows), like.new_empty(0, cols)

    def observe(self, key: int) -> None:
        """Pass (dy, x) of coming backward passes to the capture sink `key`; 0 stops it."""
        self._capture_key = key

    # ---- for subclasses

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, values and bias, in autocast's dtype where that is on; float64 stays."""
        if self._blank:
            self.check_known()
        own = self._parameters  # faster than an attribute; a parametrization is one, though
        values, bias = own.get("values"), own.get("bias")
        values = self.values if values is None else values
        bias = self.bias if bias is None else bias
        if not torch.compiler.is_compiling() and not any_autocast():
            return x, values, bias
        kind = x.device.type
        known = torch.amp.autocast_mode.is_autocast_available(kind)  # not of the meta device
        if not known or not torch.is_autocast_enabled(kind) or x.dtype is torch.float64:
            return x, values, bias
        dtype = torch.get_autocast_dtype(kind)
        return x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)

    def _mask(self) -> Tensor | None:
        """The mask of `impl="masked"`, None elsewhere."""
        mask = self._buffers["dense_mask"]
        if mask is not None and not torch.compiler.is_compiling():
            _ = self.topology  # raises if there is none: the mask would mean nothing
        return mask

    def _take_from(self, module: Any, matrix: Tensor) -> Self:
        """Copy the active values of a dense layer, whose weight is `matrix`, and its bias."""
        self.set_active_values(self.topology.pack(matrix))
        self.values.requires_grad_(module.weight.requires_grad)
        if self.bias is not None:
            self.bias.data.copy_(module.bias.detach())
            self.bias.requires_grad_(module.bias.requires_grad)
        return self.train(module.training)

    def _give_to(self, module: L) -> L:
        """Copy weight, zeros filled in, and bias to a dense layer."""
        dense: Any = module
        dense.weight.data.copy_(self.dense_weight())
        dense.weight.requires_grad_(self.values.requires_grad)
        if self.bias is not None:
            dense.bias.data.copy_(self.bias.detach())
            dense.bias.requires_grad_(self.bias.requires_grad)
        return module.train(self.training)

    def _observed(self, y: Tensor, x: Tensor) -> Tensor:
        """Route y = f(x) through the capture operator if observed."""
        if not self._capture_key or not torch.is_grad_enabled() or not self.values.requires_grad:
            return y
        if is_traced() or torch.compiler.is_exporting():
            return y
        return cast(Tensor, capture(y, x, self.values, self._capture_key))

    # ---- torch plumbing

    def __getstate__(self) -> dict[str, Any]:
        # a copy is not observed: its gradients belong to no update of the original
        return super().__getstate__() | {"_capture_key": 0}

    def _repr_facts(self) -> str:
        block = self.block[0] if self.block[0] == self.block[1] else self.block
        runs = self.resolved_impl
        impl = self.impl or f"{runs} (auto)"
        if runs == "cpu":
            impl += f", path={choice.described(min(self.block))}"
        held = self._held()
        if self._blank or (self.col.is_meta and held.grid.ragged):  # how many, not where
            return f"block={block}, active_blocks={held.nnzb}, impl={impl}"
        try:
            held.known()
        except TopologyError as error:
            return f"block={block}, no topology ({error}), impl={impl}"
        return f"block={block}, sparsity={self.sparsity:.4g}, nnz={self.nnz}, impl={impl}"
