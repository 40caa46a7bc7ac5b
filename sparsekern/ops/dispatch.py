"""Which implementation runs: a table of backends, and the rule for `impl=None`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from sparsekern.errors import ConfigError, DeviceError, DtypeError, ShapeError, UnavailableError
from sparsekern.ops.crossover import covers, dense_wins, operand_kind
from sparsekern.ops.geometry import ConvGeometry
from sparsekern.topology import Topology

BACKENDS = {
    "triton": "sparsekern.ops.triton",
    "cpu": "sparsekern.ops.cpu.backend",
    "dense": "sparsekern.ops.masked",
    "masked": "sparsekern.ops.masked",
}
"""Implementations by name. `dense` and `masked` share their code: the reference defines both."""

# asked once: `torch.compile` warns of a cached function
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Backend(Protocol):
    """What a backend module offers; all inputs are 2-D, of any strides, and only read."""

    def spmm(
        self,
        x: Tensor,
        values: Tensor,
        topology: Topology,
        bias: Tensor | None,
        *,
        relu: bool = False,
    ) -> Tensor:
        """(M, cols) -> (M, rows)."""

    def spmm_t(self, dy: Tensor, values: Tensor, topology: Topology) -> Tensor:
        """(M, rows) -> (M, cols)."""

    def sddmm(
        self, dy: Tensor, x: Tensor, topology: Topology, *, out: Tensor | None = None
    ) -> Tensor:
        """(M, rows), (M, cols) -> (nnzb, bh, bw), added to `out` if it is given."""

    def backward(
        self, dy: Tensor, x: Tensor, values: Tensor, topology: Topology
    ) -> tuple[Tensor, Tensor]:
        """dx and dw at once."""


class ConvBackend(Protocol):
    """What a backend module offers for convolutions; images (N, C, H, W) of any strides.

    Images come back in the memory format of the image they are made from (`layout.format_of`).
    """

    def conv2d(
        self,
        x: Tensor,
        values: Tensor,
        topology: Topology,
        geometry: ConvGeometry,
        bias: Tensor | None,
    ) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, P, Q)."""

    def conv2d_dgrad(
        self,
        dy: Tensor,
        values: Tensor,
        topology: Topology,
        geometry: ConvGeometry,
        *,
        size: tuple[int, int],
    ) -> Tensor:
        """(N, C_out, P, Q) -> (N, C_in, *size)."""

    def conv2d_wgrad(
        self, dy: Tensor, x: Tensor, topology: Topology, geometry: ConvGeometry
    ) -> Tensor:
        """(N, C_out, P, Q), (N, C_in, H, W) -> (nnzb, bh, bw)."""

    def conv2d_backward(
        self,
        dy: Tensor,
        x: Tensor,
        values: Tensor,
        topology: Topology,
        geometry: ConvGeometry,
    ) -> tuple[Tensor, Tensor]:
        """dx, in the format of x, and dw at once."""


class FullBackend(Backend, ConvBackend, Protocol):
    """A backend module as a whole."""


@functools.cache
def backend(impl: str) -> FullBackend:
    """The module behind a resolved implementation name."""
    return cast(FullBackend, importlib.import_module(BACKENDS[impl]))


def check_impl(impl: str | None) -> None:
    """Raise `ConfigError` unless `impl` is None or a known name."""
    if impl is not None and not (isinstance(impl, str) and impl in BACKENDS):
        raise ConfigError(f"`impl` must be None or one of {sorted(BACKENDS)}; got {impl!r}")


class Assumed(NamedTuple):
    """An `impl` that is resolved as if the operands were on `device`.

    For copies of layers that are counted: an attribute of theirs is no other thread's business, and
    `torch.compile` guards on it.
    """

    impl: str | None
    device: torch.device


def resolve(
    impl: str | Assumed | None,
    device: torch.device,
    dtype: torch.dtype,
    block: tuple[int, int],
    density: float = 0.0,
    *,
    conv: bool = False,
) -> str:
    """Name the implementation that will run.

    Only `impl=None` chooses: `cpu` on CPU tensors; `triton` on CUDA tensors whose dtype and block
    its kernels cover, up to the density in `crossover.DENSE_ABOVE` and but for unstructured
    convolutions; `dense` elsewhere. A name is taken as an order.

    Args:
        impl: None or a name in `BACKENDS`.
        device: where the operands are.
        dtype: of the operands.
        block: of the weight.
        density: share of active blocks.
        conv: whether it is for a convolution.

    Raises:
        ConfigError: `impl` is unknown.
        DeviceError, DtypeError, ShapeError, UnavailableError: the named one can't run here.
    """
    if isinstance(impl, Assumed):
        impl, device = impl
    check_impl(impl)
    if impl is None:
        if device.type == "cpu":
            return "cpu"
        covered = device.type == "cuda" and dtype in _TRITON_DTYPES and covers(block)
        if not (covered and has_triton()):
            return "dense"
        kind = operand_kind(dtype)
        return "dense" if dense_wins(kind, block, density, conv=conv) else "triton"
    if impl == "cpu" and device.type != "cpu":
        raise DeviceError(f"impl='cpu' needs CPU tensors; got {device}")
    if impl == "triton":
        _check_triton(device, dtype, block)
    return impl


def has_triton() -> bool:
    """Whether the package triton can be imported."""
    return _HAS_TRITON


def _check_triton(device: torch.device, dtype: torch.dtype, block: tuple[int, int]) -> None:
    if not has_triton():
        raise UnavailableError("impl='triton' needs the package triton: pip install triton")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        raise DeviceError(
            f"impl='triton' needs CUDA tensors (or TRITON_INTERPRET=1 on the CPU); got {device}"
        )
    if dtype not in _TRITON_DTYPES:
        raise DtypeError(f"impl='triton' takes float32, float16 and bfloat16; got {dtype}")
    if not covers(block):
        raise ShapeError(
            f"impl='triton' takes block (1, 1) or edges of 16, 32, 64 and 128; got {block}"
        )
