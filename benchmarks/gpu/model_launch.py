"""Launches of this package's GPU kernels, as the fluid model takes them: grids, steps, bytes.

What a kernel does is written here a second time, from its own file's head; what it costs to issue
comes from compiled code (`Kernel`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from benchmarks.gpu.model_fluid import Load, Program, Step
from sparsekern.cost.roofline import ELEMENT_BYTES, Problem
from sparsekern.topology import Topology

REGISTERS = 65536  # of an SM; a warp gets them by 256 (CUDA occupancy calculator, 9.0)
REGISTER_UNIT = 8  # of a thread
THREADS = 2048  # of an SM
MOST_PROGRAMS = 32  # of an SM
SHARED = 228 * 1024  # bytes of an SM; a program costs 1 KiB more than it asks for
SHARED_EXTRA = 1024
WARP = 32
ISSUE_GAP = 2.0  # cycles between two instructions of one warp; assumed
BARRIER = 30.0  # cycles; assumed
MMA_WAIT = 55.0  # cycles from the end of a `wgmma` to the next, if it is waited for; assumed
MMA_ROWS, MMA_COLS, MMA_DEPTH = 64, 256, 16  # of a `wgmma` in 16 bits, at most
MMA_MACS = 2048  # of an SM and cycle


class Kernel(NamedTuple):
    """What a compiled kernel uses.

    Attributes:
        warps: of a program.
        registers: of a thread.
        shared: bytes of a program.
        instructions: a warp issues in one step.
        barriers: of them, those that wait for other warps.
        serial: whether every `wgmma` is waited for before the next.
        depth: buffers of the pipeline, 0 without one.
        fma: of the instructions, multiply-adds on CUDA cores.
        source: launch table entry and triton release that it is from.
    """

    warps: int
    registers: int
    shared: int
    instructions: float
    barriers: float = 4
    serial: bool = False
    depth: int = 3
    fma: float = 0
    source: str = "assumed"

    @property
    def slots(self) -> int:
        """Programs that an SM holds."""
        threads = self.warps * WARP
        registers = math.ceil(self.registers / REGISTER_UNIT) * REGISTER_UNIT * threads
        return min(
            REGISTERS // registers,
            SHARED // (self.shared + SHARED_EXTRA),
            THREADS // threads,
            MOST_PROGRAMS,
        )


class Tile(NamedTuple):
    """How a product is cut.

    Attributes:
        BM: tokens of a program's tile (forward, dX), of a step (dW).
        BK: of the sum, in a step (forward, dX).
        group: token tiles walked together (forward, dX); blocks of a program (dW).
        swap: weights on the rows of `wgmma` (forward, dX).
        tail: blocks that a row's last program multiplies (dW): "full" as many as any, "half" of
            them if that is enough, "exact" what is there.
        even: groups of a row differ by one block at most (dW); else all but the last are full.
    """

    BM: int
    BK: int = 64
    group: int = 8
    swap: bool = False
    tail: str = "full"
    even: bool = True


def topology(problem: Problem, seed: int = 0, taps: int = 1) -> Topology:
    """A random one; a convolution's has K = taps * channels."""
    draw = torch.Generator().manual_seed(seed)
    blocks = (problem.N // problem.block[0]) * (problem.K // problem.block[1])
    count = round(problem.density * blocks)
    shape = (problem.N, problem.K)
    return Topology.random(shape, problem.block, nnzb=count, taps=taps, generator=draw)


def product_programs(
    problem: Problem, lengths: Sequence[int], block: tuple[int, int], tile: Tile, kernel: Kernel
) -> Iterator[Program]:
    """Forward, dX, and both of a convolution.

    Args:
        problem: M tokens or pixels.
        lengths: blocks of each row of blocks of the output, in the order of the grid.
        block: (edge along the sum, edge along the output).
        tile: of a program.
        kernel: compiled.
    """
    inner, out = block
    size = ELEMENT_BYTES[problem.kind]
    step = product_step(problem, block, tile, kernel)
    tiles = math.ceil(problem.M / tile.BM)
    total = tiles * sum(math.ceil(n * inner / tile.BK) for n in lengths)
    read = size * (problem.activations - problem.M * problem.N) + size * sum(lengths) * inner * out
    step = step._replace(memory=read / max(1, total))
    programs = [
        Program(((math.ceil(n * inner / tile.BK), step),), tile.BM * out * size) for n in lengths
    ]
    for first in range(0, tiles, tile.group):
        together = min(tile.group, tiles - first)
        for program in programs:
            yield from [program] * together


def product_step(problem: Problem, block: tuple[int, int], tile: Tile, kernel: Kernel) -> Step:
    """One iteration of forward and dX: BK of the sum."""
    inner, out = block
    size = ELEMENT_BYTES[problem.kind]
    run = min(inner, tile.BK) * size
    loads = Load(tile.BM * tile.BK * size, run), Load(out * tile.BK * size)
    rows, cols = (out, tile.BM) if tile.swap else (tile.BM, out)
    return _multiplied(Step(loads), (rows, cols, tile.BK), kernel, size)


def gradient_programs(
    problem: Problem, lengths: Sequence[int], tile: Tile, kernel: Kernel, parts: int
) -> Iterator[Program]:
    """dW: programs of up to `tile.group` blocks of one row, the sum over tokens in `parts`."""
    bh, bw = problem.block
    size = ELEMENT_BYTES[problem.kind]
    groups = list((even_groups if tile.even else row_groups)(lengths, tile.group))
    span = math.ceil(math.ceil(problem.M / parts) / tile.BM) * tile.BM
    steps = parts * sum(g > 0 for g in groups) * math.ceil(span / tile.BM)
    memory = size * problem.activations / max(1, steps)
    written = size if parts == 1 else 4
    made = {
        g: gradient_step(problem, g, tile, kernel)._replace(memory=memory) for g in {*groups} - {0}
    }
    for part in range(parts):
        count = math.ceil(max(0, min(span, problem.M - part * span)) / tile.BM)
        kinds = {g: Program(((count, made[g]),), g * bh * bw * written) for g in made}
        yield from (kinds[g] if g else Program(()) for g in groups)


def gradient_step(problem: Problem, blocks: int, tile: Tile, kernel: Kernel) -> Step:
    """One iteration of dW: BM tokens; a program of fewer blocks issues fewer instructions."""
    bh, bw = problem.block
    size = ELEMENT_BYTES[problem.kind]
    multiplied = {"full": tile.group, "exact": blocks, "half": tile.group}[tile.tail]
    if tile.tail == "half" and blocks <= tile.group // 2:
        multiplied = tile.group // 2
    # where the last group is not cut evenly, a tile that is multiplied is loaded too
    loaded = multiplied if tile.tail == "half" and not tile.even else blocks
    loads = Load(tile.BM * bh * size, bh * size), Load(tile.BM * loaded * bw * size, bw * size)
    share = (1 + multiplied) / (1 + tile.group)  # tiles of dy and x that are handled
    fewer = kernel._replace(instructions=kernel.instructions * share)
    return _multiplied(Step(loads), (multiplied * bw, bh, tile.BM), fewer, size)


class Held(NamedTuple):
    """Activations that lie in shared memory while the blocks are walked.

    Each program brings in `tokens` x (all columns along the sum) once, whole or panel by panel, and
    makes a part of the outputs: rows of blocks are shared out among `sharers` programs.

    Attributes:
        tokens: of a program.
        sharers: programs that bring in the same tokens.
        ahead: whether a panel comes in while the one before is used.
    """

    tokens: int = 64
    sharers: int = 1
    ahead: bool = False


def held_programs(
    problem: Problem, blocks: int, block: tuple[int, int], held: Held, kernel: Kernel
) -> Iterator[Program]:
    """Forward and dX with activations in shared memory; a warpgroup is a walker, with its blocks.

    Args:
        problem: M tokens.
        blocks: active ones.
        block: (edge along the sum, edge along the output).
        held: how the activations are held.
        kernel: compiled; its step is one block of every walker, with its share of a row's end and
            of the barriers; its depth is that of a walker's ring, in blocks.
    """
    inner, out = block
    size = ELEMENT_BYTES[problem.kind]
    tiles, walkers = math.ceil(problem.M / held.tokens), max(1, kernel.warps // 4)
    numbers = problem.activations - problem.M * problem.N  # read from memory
    steps = blocks / held.sharers / walkers
    tile = held.tokens * problem.K * size
    fetched = numbers * size / tiles / held.sharers
    one = _multiplied(Step(), (held.tokens, out, inner), kernel, size)
    weights = Load(walkers * inner * out * size)
    one = one._replace(
        loads=(weights,),
        shared=one.shared * walkers + weights.size,
        macs=one.macs * walkers,
    )
    pieces = held.tokens  # the fetch is a stream: as many loads on their way as there are pieces
    run = min(inner * size, 128)
    fetch = Step((Load(tile / pieces, run),), fetched / pieces, tile / pieces, depth=pieces)
    if held.ahead:
        part = Load(tile / max(1.0, steps), run)
        loads, memory = (weights, part), fetched / max(1.0, steps)
        one = one._replace(loads=loads, memory=memory, shared=one.shared + part.size)
        loops: tuple[tuple[float, Step], ...] = ((steps, one),)
    else:
        loops = ((pieces, fetch), (steps, one))
    written = held.tokens * problem.N * size / held.sharers
    yield from [Program(loops, written)] * (tiles * held.sharers)


def _multiplied(step: Step, shape: tuple[int, int, int], kernel: Kernel, size: int) -> Step:
    """What the tensor cores do with a (rows, cols, depth) product, and how long it takes alone."""
    rows, cols, depth = shape
    rows, cols = math.ceil(rows / MMA_ROWS) * MMA_ROWS, min(cols, MMA_COLS)
    count = rows * shape[1] * depth / (MMA_ROWS * cols * MMA_DEPTH * 2 / size)
    read = count * (MMA_ROWS + cols) * MMA_DEPTH * 2
    cycles = MMA_ROWS * cols * MMA_DEPTH / MMA_MACS
    groups = max(1, kernel.warps // 4)
    latency = ISSUE_GAP * kernel.instructions + BARRIER * kernel.barriers
    if kernel.serial:
        latency += count / groups * (cycles + MMA_WAIT)
    return step._replace(
        shared=read + sum(load.size for load in step.loads),
        macs=count * MMA_ROWS * cols * MMA_DEPTH,
        instructions=kernel.instructions * kernel.warps,
        latency=latency,
        depth=kernel.depth,
    )


def row_groups(lengths: Iterable[int], size: int) -> Iterator[int]:
    """Blocks of each program of dW where row r owns those from crow[r] // size + r on."""
    begin, row = 0, 0
    for row, length in enumerate(lengths):
        first = begin // size + row
        begin += length
        after = begin // size + row + 1
        for i in range(after - first):
            yield max(0, min(size, length - i * size))


def even_groups(lengths: Sequence[int], size: int) -> Iterator[int]:
    """Blocks of each program of dW where a row of n is ceil(n / size) of them, cut evenly.

    As many programs are started as there could be: those at the end find nothing.
    """
    found = 0
    for length in lengths:
        groups = math.ceil(length / size)
        found += groups
        yield from (length // groups + (i < length % groups) for i in range(groups))
    total = sum(lengths)
    most = min(total, (total + len(lengths) * (size - 1)) // size)
    yield from [0] * (most - found)
