"""What every launcher needs to know of the device, the operands and the grid.

Operand kinds: "half" (fp16, bf16), "tf32" and "ieee" (fp32 with and without tensor cores).
Architecture classes: "sm80" (all before Hopper, and consumer chips), "sm90", "sm100".
"""

from functools import cache

import torch
import triton

__all__ = [
    "BLOCK_EDGES",
    "aligned_rows",
    "arch_class",
    "compute_kind",
    "empty",
    "has_aligned_rows",
    "in_dtype",
    "input_precision",
    "is_interpreted",
    "load_unit",
    "most_groups",
    "multiprocessors",
    "output_dtype",
    "parts_of_sum",
    "rows_class",
    "splits",
    "supported",
    "tma_fits",
    "token_chunk",
    "tokens_contiguous",
    "unit_of",
    "usual_groups",
]

BLOCK_EDGES = (16, 32, 64, 128)

# of the widest asynchronous copy to shared memory; narrower than 4 there is none
_LOAD_BYTES = 16

# elements of a transposed copy of the activations that a CSR launcher may hold at once: the copy
# then stays near the L2 cache of a data-center GPU, and its memory does not grow with the batch
CHUNK_ELEMENTS = 1 << 24

# three programs to each multiprocessor; below it a reduction over tokens is split
_FILL = {"sm80": 324, "sm90": 396, "sm100": 444}
_MAX_SPLITS = 16
_LEAST_STEPS = 8  # of a part

# The next three weigh the parts of a sum over tokens in bytes that a multiprocessor of an H200
# loads from L2: the first and last steps of a program, which load nothing; the start of a second
# kernel, 3 us; and a byte of what that one reads and writes, mostly to memory.
_IDLE_STEPS = 4
START_BYTES = 220_000
_MEMORY_BYTE = 2.8

# multiprocessors where no device tells: those of an H100 or H200
_MULTIPROCESSORS = 132

# active lanes in a block row below which the start and the end of a program outweigh its loop
_SHORT_ROW = 512


def supported(block: tuple[int, int]) -> bool:
    """Whether the kernels of this package run the block: (1, 1), or both edges 16 to 128."""
    return tuple(block) == (1, 1) or (block[0] in BLOCK_EDGES and block[1] in BLOCK_EDGES)


def is_interpreted(kernel: object) -> bool:
    """Whether a kernel was decorated under TRITON_INTERPRET, so runs on the CPU in numpy."""
    return not isinstance(kernel, triton.runtime.JITFunction)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; the interpreter takes those of an H200."""
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _arch_of(index: int) -> str:
    if torch.version.hip:  # its capabilities are numbered alike and mean something else
        return "sm80"
    major = torch.cuda.get_device_capability(index)[0]
    return {9: "sm90", 10: "sm100"}.get(major, "sm80")


def arch_class(device: torch.device) -> str:
    """Row of the launch tables for a device; the interpreter takes Hopper's."""
    if device.type != "cuda":
        return "sm90"
    return _arch_of(torch.cuda.current_device() if device.index is None else device.index)


def input_precision(dtype: torch.dtype) -> str:
    """`tl.dot`'s input_precision: IEEE products of fp32 unless torch was told to allow TF32."""
    # the older `get_float32_matmul_precision` raises once this newer setting has been used
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32"


def compute_kind(dtype: torch.dtype) -> str:
    """Operand kind, part of the key of the launch tables."""
    return "half" if dtype.itemsize == 2 else input_precision(dtype)


def rows_class(nnzb: int, block_rows: int, edge: int) -> str:
    """Shape class of a product: "short" or "long" rows by their mean number of active lanes.

    Never by the number of tokens: a row of a product must not depend on how many rows were asked
    for with it.
    """
    return "short" if nnzb * edge < _SHORT_ROW * block_rows else "long"


def output_dtype(dtype: torch.dtype, kernel: object) -> torch.dtype:
    """What a kernel stores: the interpreter's bf16 casts truncate, so there torch does the cast."""
    return torch.float32 if is_interpreted(kernel) else dtype


def empty(like: torch.Tensor, *size: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory for a result on the device of `like`."""
    # a dtype that is named costs as much as the allocation
    return like.new_empty(*size) if dtype is like.dtype else like.new_empty(*size, dtype=dtype)


def in_dtype(a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`a.to(dtype)`, which takes a microsecond even where there is nothing to do."""
    return a if a.dtype is dtype else a.to(dtype)


def tma_fits(*matrices: torch.Tensor) -> bool:
    """Whether tensor descriptors can address 2-D tensors: rows of 16 bytes, dense columns."""
    return all(
        a.numel() > 0
        and a.stride(1) == 1
        and a.stride(0) >= a.shape[1]
        and a.stride(0) * a.element_size() % 16 == 0
        and a.data_ptr() % 16 == 0
        and max(a.shape) < 2**31
        for a in matrices
    )


def load_unit(dtype: torch.dtype) -> int:
    """Elements of one 16-byte load: what strides and sizes are counted in."""
    return _LOAD_BYTES // dtype.itemsize


def unit_of(size: int, dtype: torch.dtype) -> int:
    """`load_unit` if it divides a size, else 1."""
    unit = load_unit(dtype)
    return unit if size % unit == 0 else 1


def has_aligned_rows(x: torch.Tensor) -> bool:
    """Whether a matrix is rows of whole 16-byte loads: dense, each beginning at such a multiple."""
    unit = load_unit(x.dtype)
    return (
        x.stride(1) == 1
        and x.stride(0) % unit == 0
        and x.shape[1] % unit == 0
        and x.data_ptr() % _LOAD_BYTES == 0
    )


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """The same matrix in rows of whole 16-byte loads, zeros behind them; a copy unless it has them.

    A kernel that loads anything narrower than 4 bytes has no pipeline; the copy costs twice the
    bytes of x, once.
    """
    if has_aligned_rows(x):
        return x
    (M, K), unit = x.shape, load_unit(x.dtype)
    rows = x.new_empty(M, triton.cdiv(K, unit) * unit)
    rows[:, :K] = x
    rows[:, K:] = 0
    return rows


def splits(arch: str, programs: int, steps: int) -> int:
    """The same for a product without blocks, whose programs are many to a multiprocessor."""
    wanted = -(-_FILL[arch] // max(programs, 1))
    return max(1, min(wanted, steps // _LEAST_STEPS, _MAX_SPLITS))


def most_groups(nnzb: int, rows: int, G: int) -> int:
    """Bound on the groups of up to G neighbouring blocks that block rows can be cut into."""
    return min(nnzb, (nnzb + rows * (G - 1)) // G)


def usual_groups(nnzb: int, rows: int, G: int) -> int:
    """How many groups there are where the blocks of a row are as likely any number as the next.

    How they really lie is not asked: that would wait for the device, and a launch that is recorded
    in a graph outlives a topology. Two in a hundred more cover what chance adds.
    """
    return min(nnzb, int(1.02 * (nnzb / G + rows * (G - 1) / (2 * G))) + 1)


def parts_of_sum(device: torch.device, groups: int, steps: int, tile: int, result: int) -> int:
    """Parts to cut a sum over tokens into, so that the busiest multiprocessor is done first.

    Multiprocessors load tiles from L2, however many programs share one. All parts of all groups are
    dealt to them; more parts deal more evenly, and a second kernel has to add them.

    Args:
        device: of the operands.
        groups: programs of one part that have something to do.
        steps: tiles of tokens in the sum.
        tile: bytes that a step loads.
        result: numbers in the result.
    """
    many = multiprocessors(device)

    def loaded(parts: int) -> float:
        programs = -(-groups * parts // many)
        moved = programs * (-(-steps // parts) + _IDLE_STEPS) * tile
        if parts == 1:
            return moved
        # each part is written, in the course of its programs, and read; the result has half a part
        return moved + START_BYTES + _MEMORY_BYTE * (8 * parts + 2) * result / many

    return min(range(1, max(1, steps // _LEAST_STEPS) + 1), key=loaded)


def token_chunk(width: int, tile: int) -> int:
    """Tokens whose transposed copy fits the bound: a multiple of the tile."""
    return max(tile, CHUNK_ELEMENTS // max(width, 1) // tile * tile)


def tokens_contiguous(x: torch.Tensor) -> torch.Tensor:
    """The same matrix with neighbouring tokens side by side in memory; a copy unless they are."""
    return x if x.stride(0) <= 1 else x.t().contiguous().t()
