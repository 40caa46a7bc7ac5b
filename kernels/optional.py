"""Products by the kernels that run only where a launch table asks for them, written in Gluon.

Gluon is heavy and seldom needed, so it's imported with the first of them.
"""

from typing import Any

import torch

from .launch import arch_class, compute_kind, tma_fits
from .tables import optional

__all__ = ["held_ring", "launch_held", "launch_stages", "persistent_kernel", "stages"]

_NAMES = ("IN", "OUT", "TRANS", "HAS_BIAS", "RELU")


def held_ring(x: torch.Tensor, values: torch.Tensor, trans: bool, relu: bool) -> int | None:
    """Shared memory, in KiB, for weights in the kernel that holds activations; None: not asked for.

    Nor does it run where the activations do not fit.
    """
    arch, op = arch_class(x.device), "spmm_t_resident" if trans else "spmm_resident"
    _, bh, bw = values.shape
    entry = optional(arch, op, compute_kind(x.dtype), max(bh, bw))
    if entry is None or relu:
        return None
    from .bsr_spmm_resident import resident_fits  # noqa: PLC0415

    fits = resident_fits(arch, x.dtype, (bh, bw), x.shape[1], trans, entry.RING_KB)
    return int(entry.RING_KB) if fits else None


def launch_held(
    x: torch.Tensor,
    values: torch.Tensor,
    side: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor],
    bias: torch.Tensor | None,
    n_out: int,
    ring_kb: int,
) -> torch.Tensor:
    """The product by the kernel that holds activations in shared memory."""
    from . import bsr_spmm_resident as resident  # noqa: PLC0415

    start, inner, perm, _ = side
    if perm is None:
        return resident.bsr_spmm_resident(x, values, start, inner, bias, n_out, ring_kb=ring_kb)
    return resident.bsr_spmm_t_resident(x, values, start, inner, perm, n_out, ring_kb=ring_kb)


def stages(x: torch.Tensor, values: torch.Tensor, y: torch.Tensor, trans: bool) -> int | None:
    """Steps held by the kernel whose programs stay; None: not asked for, or TMA can't do it."""
    arch, op = arch_class(x.device), "spmm_t_persistent" if trans else "spmm_persistent"
    _, bh, bw = values.shape
    reduce, out = (bh, bw) if trans else (bw, bh)
    entry = optional(arch, op, compute_kind(x.dtype), out)
    if entry is None or x.shape[1] % reduce:
        return None
    from .bsr_spmm_persistent import persistent_fits  # noqa: PLC0415

    fits = persistent_fits(arch, x.dtype, (bh, bw)) and tma_fits(x, values.view(-1, bw), y)
    return int(entry.num_stages) if fits else None


def persistent_kernel() -> Any:
    """What `launch_stages` launches."""
    from .bsr_spmm_persistent import _bsr_spmm_persistent_kernel  # noqa: PLC0415

    return _bsr_spmm_persistent_kernel


def launch_stages(
    kernel: Any, tensors: tuple[torch.Tensor, ...], options: dict[str, Any], most: int, sb: int
) -> None:
    """Launch it, or what stands for it, with the options of `bsr_spmm`'s kernels."""
    from .bsr_spmm_persistent import launch_persistent  # noqa: PLC0415

    launch_persistent(kernel, tensors, {name: options[name] for name in _NAMES}, most, sb)
