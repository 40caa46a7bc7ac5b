"""Frozen launch tables, and what every launcher needs to choose from them.

A table is keyed by architecture class, operand kind and block, never by the number of tokens: a
row of a product must not depend on how many rows were asked for with it. Nothing is tuned at
import or at launch; an entry changes only when a measurement or the compile tests say so.

Operand kinds: "half" (fp16, bf16), "tf32" and "ieee" (fp32 with and without tensor cores).
Architecture classes: "sm80" (all before Hopper, and consumer chips), "sm90", "sm100".
"""

from functools import cache
from typing import NamedTuple

import torch
import triton

__all__ = [
    "BLOCK_EDGES",
    "CsrConfig",
    "SddmmConfig",
    "SpmmConfig",
    "arch_class",
    "bsr_sddmm_config",
    "bsr_spmm_config",
    "compute_kind",
    "csr_sddmm_config",
    "csr_spmm_config",
    "input_precision",
    "is_interpreted",
    "output_dtype",
    "splits",
    "supported",
    "token_chunk",
    "tokens_contiguous",
]

BLOCK_EDGES = (16, 32, 64, 128)

# elements of a transposed copy of the activations that a CSR launcher may hold at once: the copy
# then stays near the L2 cache of a data-center GPU, and its memory does not grow with the batch
CHUNK_ELEMENTS = 1 << 24

# programs that fill each class of GPU twice over; below it a reduction over tokens is split
_FILL = {"sm80": 216, "sm90": 264, "sm100": 296}
_MAX_SPLITS = 16


class SpmmConfig(NamedTuple):
    """Tile of a BSR product: BM tokens, BK reduction lanes an iteration."""

    BM: int
    BK: int
    num_warps: int
    num_stages: int


class SddmmConfig(NamedTuple):
    """Tile of a BSR sampled product: BM tokens an iteration, G blocks of one block row."""

    BM: int
    G: int
    num_warps: int
    num_stages: int


class CsrConfig(NamedTuple):
    """Tile of a CSR kernel: BM tokens, BN rows (spmm) or entries (sddmm), UNROLL entries a step."""

    BM: int
    BN: int
    UNROLL: int
    num_warps: int


# (kind, edge of the output block) -> tile; narrower blocks are gathered to BK lanes, wider ones cut
_BSR_SPMM: dict[tuple[str, int], SpmmConfig] = {
    ("half", 16): SpmmConfig(128, 64, 4, 3),
    ("half", 32): SpmmConfig(128, 64, 4, 3),
    ("half", 64): SpmmConfig(128, 64, 4, 3),
    ("half", 128): SpmmConfig(128, 64, 8, 3),
    ("tf32", 16): SpmmConfig(128, 32, 4, 3),
    ("tf32", 32): SpmmConfig(128, 32, 4, 3),
    ("tf32", 64): SpmmConfig(128, 32, 4, 3),
    ("tf32", 128): SpmmConfig(128, 32, 8, 3),
    ("ieee", 16): SpmmConfig(64, 16, 4, 3),
    ("ieee", 32): SpmmConfig(64, 16, 4, 3),
    ("ieee", 64): SpmmConfig(64, 16, 4, 3),
    ("ieee", 128): SpmmConfig(64, 16, 8, 3),
}

# kind -> tokens an iteration, gathered columns of x, accumulators that four warps hold unspilled
_BSR_SDDMM = {"half": (64, 128, 8192), "tf32": (32, 128, 8192), "ieee": (16, 64, 4096)}


def supported(block: tuple[int, int]) -> bool:
    """Whether the kernels of this package run the block: (1, 1), or both edges 16 to 128."""
    return tuple(block) == (1, 1) or (block[0] in BLOCK_EDGES and block[1] in BLOCK_EDGES)


def is_interpreted(kernel: object) -> bool:
    """Whether a kernel was decorated under TRITON_INTERPRET, so runs on the CPU in numpy."""
    return not isinstance(kernel, triton.runtime.JITFunction)


@cache
def _arch_of(index: int) -> str:
    major = torch.cuda.get_device_capability(index)[0]
    return {9: "sm90", 10: "sm100"}.get(major, "sm80")


def arch_class(device: torch.device) -> str:
    """Row of the launch tables for a device; the interpreter takes Hopper's."""
    if device.type != "cuda":
        return "sm90"
    return _arch_of(torch.cuda.current_device() if device.index is None else device.index)


def input_precision(dtype: torch.dtype) -> str:
    """`tl.dot`'s input_precision: IEEE products of fp32 unless torch was told to allow TF32."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def compute_kind(dtype: torch.dtype) -> str:
    """Operand kind, the key of the launch tables."""
    return "half" if dtype.itemsize == 2 else input_precision(dtype)


def output_dtype(dtype: torch.dtype, kernel: object) -> torch.dtype:
    """What a kernel stores: the interpreter's bf16 casts truncate, so there torch does the cast."""
    return torch.float32 if is_interpreted(kernel) else dtype


def bsr_spmm_config(arch: str, kind: str, out: int) -> SpmmConfig:
    """Tile of `bsr_spmm` for blocks with an edge of `out` along the output."""
    del arch  # one table fits all three classes: every entry stays under 99 KB of shared memory
    return _BSR_SPMM[kind, out]


def bsr_sddmm_config(arch: str, kind: str, block: tuple[int, int]) -> SddmmConfig:
    """Tile of `bsr_sddmm` for a block."""
    del arch
    BM, lanes, held = _BSR_SDDMM[kind]
    G = max(1, lanes // block[1])
    return SddmmConfig(BM, G, num_warps=4 if block[0] * G * block[1] <= held else 8, num_stages=3)


def csr_spmm_config(arch: str) -> CsrConfig:
    """Tile of `csr_spmm`."""
    del arch
    return CsrConfig(BM=128, BN=16, UNROLL=4, num_warps=4)


def csr_sddmm_config(arch: str) -> CsrConfig:
    """Tile of `csr_sddmm`."""
    del arch
    return CsrConfig(BM=128, BN=32, UNROLL=1, num_warps=4)


def splits(arch: str, programs: int, steps: int) -> int:
    """Parts to cut a sum over tokens into when the output alone cannot fill the GPU."""
    wanted = -(-_FILL[arch] // max(programs, 1))
    return max(1, min(wanted, steps // 8, _MAX_SPLITS))


def token_chunk(width: int, tile: int) -> int:
    """Tokens whose transposed copy fits the bound: a multiple of the tile."""
    return max(tile, CHUNK_ELEMENTS // max(width, 1) // tile * tile)


def tokens_contiguous(x: torch.Tensor) -> torch.Tensor:
    """The same matrix with neighbouring tokens side by side in memory; a copy unless they are."""
    return x if x.stride(0) <= 1 else x.t().contiguous().t()
