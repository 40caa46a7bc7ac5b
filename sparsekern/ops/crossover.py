"""Above which density a dense product is faster than a sparse one on a GPU: a table.

Used by `impl=None` alone. A layer above its entry computes from a dense weight that lives as long
as the operator; storage, gradient and optimizer state stay sparse, and its FLOPs count as dense.

Nothing in it is measured; a measured run replaces it. Figures of blocks come from the traffic model
in `sparsekern/cost/roofline.py`, with a margin of about a fifth for what a kernel loses to its
start and its end: smaller blocks fetch activations more often for each FLOP, so they lose to dense
products earlier. Of unstructured linear layers they are upper ends: a fifth of the instructions
multiply, and the model in `benchmarks/gpu/model_csr.py` has forward alone as fast as dense at a
density of .007 to .011 in 16 bits and TF32, .05 to .09 in strict float32. Of unstructured
convolutions 2 to 11 % multiply: they are computed from a dense weight at every density. The kernels
stay, behind `impl="triton"`.
"""

from __future__ import annotations

import torch

_SAME: dict[int, float] = {16: 0.15, 32: 0.3, 64: 0.5, 128: 0.8}

DENSE_ABOVE: dict[str, dict[int, float]] = {
    "half": {1: 0.012, **_SAME},
    "tf32": {1: 0.012, **_SAME},
    "ieee": {1: 0.09, 16: 0.5, 32: 0.5, 64: 0.5, 128: 0.5},
}
"""Kind of operands -> smaller edge of the block -> share of blocks above which dense wins.

Kinds: "half" for float16 and bfloat16; "tf32" and "ieee" for float32 with and without tensor
cores, as `torch.set_float32_matmul_precision` says.
"""

EDGES = frozenset(_SAME)
"""Of blocks that have kernels, besides 1."""


def operand_kind(dtype: torch.dtype) -> str:
    """Kind of operands; what `sparsekern.kernels.launch.compute_kind` says, without triton."""
    if dtype.itemsize == 2:
        return "half"
    # the older `get_float32_matmul_precision` raises once this newer setting has been used
    strict = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "ieee" if strict else "tf32"


def covers(block: tuple[int, int]) -> bool:
    """Whether there are kernels for it; what `sparsekern.kernels.launch.supported` says."""
    return block == (1, 1) or all(edge in EDGES for edge in block)


def dense_wins(kind: str, block: tuple[int, int], density: float, *, conv: bool) -> bool:
    """Whether a product with this share of active blocks is left to the dense path.

    Args:
        kind: of operand, a key of `DENSE_ABOVE`.
        block: one that `covers`.
        density: share of active blocks.
        conv: whether it is a convolution, of any size of kernel.
    """
    return (conv and block == (1, 1)) or density > DENSE_ABOVE[kind][min(block)]
