"""What is measured: shapes, blocks, densities and number formats, in full and for a dry run."""

from __future__ import annotations

from dataclasses import dataclass

from sparsekern.tuning.trial import Block, Shape

HEADLINE = 0.1
"""Density of the first numbers anyone asks for, at the first shape."""


@dataclass(frozen=True)
class Plan:
    """Everything a run goes through.

    Attributes:
        dry: on the CPU, through Triton's interpreter: nothing is measured.
        shapes: of the products in bf16.
        csr_shape: of those with unstructured weights.
        graph_shape: few tokens, timed as CUDA graphs.
        kinds: of operand beyond bf16, for the first shape at `other_density`.
        blocks: square ones, for speed.
        checked_blocks: for correctness.
        checked_kinds: of operand, for correctness.
        rectangle_kinds: the same for blocks that aren't square.
        layer_kinds: the same for whole layers.
        check_tokens: M of the checks.
        check_edge: K and N of the checks, before they are made ragged.
        check_densities: launches differ by how long the rows are, so short and long ones.
        csr_edge: K and N of the checks of unstructured weights.
        layer_edge: inputs of the layers that are checked.
        rounds: of a timing, at most; its median is reported.
        step_tokens: of the steps of one layer, whose sizes are those of the first shape.
        gpts: (width, depth, tokens of a sequence, sequences) of the GPTs whose steps are timed.
        gpt_blocks: of their weights.
        probe_bytes: of the copy that measures memory bandwidth.
        probe_edge: of the cube that measures the dense rate.
        variant_shape: of the variants that are compared.
        variant_blocks: for which variants of forward are compared.
        group_blocks: the same for dW, and those of the grow kernel.
    """

    dry: bool
    shapes: tuple[Shape, ...]
    csr_shape: Shape
    graph_shape: Shape
    graph_densities: tuple[float, ...]
    kinds: tuple[str, ...]
    other_density: float
    blocks: tuple[int, ...]
    densities: tuple[float, ...]
    csr_densities: tuple[float, ...]
    peer_densities: tuple[float, ...]
    checked_blocks: tuple[Block, ...]
    checked_kinds: tuple[str, ...]
    rectangle_kinds: tuple[str, ...]
    layer_kinds: tuple[str, ...]
    check_tokens: int
    check_edge: int
    check_densities: tuple[float, ...]
    csr_edge: int
    layer_edge: int
    rounds: int
    step_tokens: int
    gpts: tuple[tuple[int, int, int, int], ...]
    gpt_blocks: tuple[int, ...]
    probe_bytes: int
    probe_edge: int
    variant_shape: Shape
    variant_blocks: tuple[int, ...]
    group_blocks: tuple[int, ...]


FULL = Plan(
    dry=False,
    shapes=(Shape(8192, 4096, 4096), Shape(8192, 4096, 16384)),
    csr_shape=Shape(8192, 4096, 4096),
    graph_shape=Shape(512, 4096, 4096),
    graph_densities=(0.1, 0.05),
    kinds=("tf32", "fp32"),
    other_density=0.1,
    blocks=(128, 64, 32, 16),
    densities=(0.1, 0.05, 0.2, 0.5, 0.02),
    csr_densities=(0.1, 0.05, 0.02, 0.01),
    peer_densities=(0.5, 0.1, 0.02),
    checked_blocks=(
        *((16, 16), (32, 32), (64, 64), (128, 128)),
        *((16, 64), (64, 32), (128, 16)),
        (1, 1),
    ),
    checked_kinds=("bf16", "fp16", "fp32", "tf32"),
    rectangle_kinds=("bf16", "tf32"),
    layer_kinds=("bf16", "fp32"),
    check_tokens=512,
    check_edge=2048,
    check_densities=(0.1, 0.5),
    csr_edge=256,
    layer_edge=256,
    rounds=20,
    step_tokens=8192,
    gpts=((256, 4, 128, 8), (2048, 4, 1024, 8)),
    gpt_blocks=(64, 32),
    probe_bytes=2**32,
    probe_edge=8192,
    variant_shape=Shape(8192, 4096, 4096),
    variant_blocks=(128, 64),
    group_blocks=(64, 32, 16),
)

DRY = Plan(
    dry=True,
    shapes=(Shape(32, 64, 48),),
    csr_shape=Shape(8, 16, 12),
    graph_shape=Shape(16, 64, 48),
    graph_densities=(0.5,),
    kinds=("fp32",),
    other_density=0.5,
    blocks=(16,),
    densities=(0.1, 0.5),
    csr_densities=(0.1,),
    peer_densities=(0.5,),
    checked_blocks=((16, 16), (1, 1)),
    checked_kinds=("bf16", "fp32"),
    rectangle_kinds=(),
    layer_kinds=("fp32",),
    check_tokens=32,
    check_edge=20,
    check_densities=(0.5,),
    csr_edge=8,
    layer_edge=48,
    rounds=1,
    step_tokens=32,
    gpts=((32, 1, 8, 2),),
    gpt_blocks=(16,),
    probe_bytes=2**16,
    probe_edge=32,
    variant_shape=Shape(32, 64, 64),
    variant_blocks=(64,),
    group_blocks=(16,),
)


def groups(plan: Plan) -> list[tuple[Block, str]]:
    """Pairs of block and kind that are checked."""
    return [
        (block, kind)
        for block in plan.checked_blocks
        for kind in (plan.checked_kinds if block[0] == block[1] else plan.rectangle_kinds)
    ]
