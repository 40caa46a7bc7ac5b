"""Part `update`: what a topology update costs in time, and a layer in memory."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu.agenda import Case, Row
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import Plan
from sparsekern import RigL, SparseLinear, Topology, ops
from sparsekern.cost.timing import HostClock
from sparsekern.tuning.trial import DTYPES, Block, Shape

DENSITY = 0.1
KIND = "bf16"
UPDATE_FREQ = 100  # weight steps between updates, RigL's default
DROP_FRACTION = 0.3


def update(plan: Plan, device: torch.device) -> list[Case]:
    """Latency of an update and of its pieces, then memory; for every block, and unstructured."""
    del device
    blocks: list[Block] = [*((block, block) for block in plan.blocks), (1, 1)]
    cases = [
        Case(f"{name} {block[0]}", partial(run, block=block), 2.5)
        for name, run in (("update", _latency), ("update pieces", _pieces))
        for block in blocks
    ]
    everyone: list[Block | None] = [None, *blocks]
    return cases + [
        Case(f"memory {block[0] if block else 'dense'}", partial(_memory, block=block), 1.0)
        for block in everyone
    ]


class Training(NamedTuple):
    """A layer, its optimizer and one batch."""

    layer: nn.Module
    optimizer: torch.optim.Optimizer
    x: Tensor
    dy: Tensor

    def step(self) -> None:
        """Forward, backward and optimizer step."""
        self.optimizer.zero_grad()
        self.layer(self.x).backward(self.dy)
        self.optimizer.step()
        self.x.grad = None

    def seconds(self) -> float:
        """Of one step."""
        return HostClock(self.x.device).once(self.step)


def _training(bench: Bench, shape: Shape, block: Block | None) -> Training:
    """A sparse layer, or a dense one if there is no block, with AdamW."""
    torch.manual_seed(0)
    dtype, device = DTYPES[KIND], bench.device
    layer: nn.Module
    if block is None:
        layer = nn.Linear(shape.K, shape.N, dtype=dtype, device=device)
    else:
        layer = SparseLinear(
            shape.K, shape.N, sparsity=1 - DENSITY, block=block, impl="triton", dtype=dtype
        ).to(device)
    x = torch.randn(shape.M, shape.K, device=device).to(dtype).requires_grad_()
    dy = torch.randn(shape.M, shape.N, device=device).to(dtype)
    return Training(layer, torch.optim.AdamW(layer.parameters(), lr=1e-4), x, dy)


def _latency(bench: Bench, block: Block) -> Iterator[Row]:
    """A batch that updates the topology, against the weight steps between two updates."""
    shape, dry = bench.shape_for(block), bench.plan.dry
    verdict = bench.gate.verdict("three", block, KIND)
    row: Row = {"what": "RigL update", "block": list(block), **shape._asdict()}
    row |= {"density": DENSITY, "kind": KIND, "status": verdict}
    if verdict != "ok":
        yield row | {"step_ms": None, "update_ms": None, "percent": None}
        return
    sparse, dense = _training(bench, shape, block), _training(bench, shape, None)
    steps, updates, warm = (1, 1, 1) if dry else (10, 5, 3)
    for training in (sparse, dense):
        for _ in range(warm):
            training.step()
    taken = [(sparse.seconds(), dense.seconds()) for _ in range(steps)]
    step, dense_step = (statistics.median(column) for column in zip(*taken, strict=True))
    # after an update comes at least one weight step: they take turns
    method = RigL(nn.Sequential(sparse.layer), sparse.optimizer, t_end=10**6, update_freq=1)
    pairs = [(sparse.seconds(), sparse.seconds()) for _ in range(updates + 1)]
    if len(method.history) != updates + 1:
        raise RuntimeError(f"expected {updates + 1} updates; got {len(method.history)}")
    spent = statistics.median(batch for batch, _ in pairs[1:])  # the first one allocates
    yield row | {
        "step_ms": 1e3 * step,
        "dense_step_ms": 1e3 * dense_step,
        "update_ms": 1e3 * spent,
        "percent": 100 * spent / (UPDATE_FREQ * step),
    }


def _pieces(bench: Bench, block: Block) -> Iterator[Row]:
    """Scores of the dense gradient, and index arrays from positions."""
    shape = bench.shape_for(block)
    o = bench.operands(shape, block, DENSITY, KIND)
    k = int(DROP_FRACTION * o.topology.nnzb)
    positions = o.topology.positions()
    dense = o.dy.t()
    runs = {
        "grow_scores": lambda: ops.grow_scores(o.dy, o.x, o.topology, k, impl="triton"),
        "index rebuild": lambda: Topology.from_positions(positions, o.topology.shape, block),
        "dense dW": lambda: dense @ o.x,
    }
    with torch.no_grad():
        timing = bench.time(runs)
    ceiling = bench.ceiling("grow", o.problem)
    for what in runs:
        verdict = bench.gate.kernel(what, block, KIND) if what == "grow_scores" else "ok"
        row: Row = {"what": what, "block": list(block), **shape._asdict(), "density": DENSITY}
        row |= {"kind": KIND, "status": verdict}
        row["ms"] = timing.ms(what) if verdict == "ok" else None
        if what == "grow_scores" and ceiling is not None:
            row["ceiling_ms"] = 1e3 * ceiling.seconds
        yield row


def _memory(bench: Bench, block: Block | None) -> Iterator[Row]:
    """Held between steps, and at the peak of one, with AdamW; few tokens, so weights dominate."""
    shape = bench.plan.graph_shape
    verdict = bench.gate.verdict("three", block, KIND) if block else "ok"
    row: Row = {"what": "memory", "block": list(block) if block else None, **shape._asdict()}
    row |= {"density": DENSITY if block else 1.0, "kind": KIND, "status": verdict}
    empty: Row = {"held_mib": None, "peak_mib": None}
    if verdict == "ok" and bench.device.type != "cuda":
        verdict = "skipped: needs CUDA"
    if verdict != "ok":
        yield row | empty | {"status": verdict}
        return
    gc.collect()  # layers and methods of earlier rows refer to each other
    base = torch.cuda.memory_allocated()
    training = _training(bench, shape, block)
    activations = training.x.nbytes + training.dy.nbytes
    training.step()
    training.step()
    held = torch.cuda.memory_allocated() - base - activations
    torch.cuda.reset_peak_memory_stats()
    training.step()
    peak = torch.cuda.max_memory_allocated() - base - activations
    yield row | {"held_mib": held / 2**20, "peak_mib": peak / 2**20}
