"""`SparseLinear`: forward, input gradient, weight gradient, and a whole step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.paired import Run
from benchmarks.suite import measure, peers
from benchmarks.suite.layers import fill, forward, integers, only_where, present, step
from benchmarks.suite.problem import Contender, Facts, Problem
from sparsekern import SparseLinear, Topology, ops
from sparsekern.ops.cpu import choice

TOKENS = 512
KINDS = ((128, 0.1), (64, 0.1), (32, 0.1), (16, 0.1), (4, 0.1), (1, 0.1), (1, 0.05), (1, 0.02))
"""Block and density."""

PRODUCTS = {"forward": 1, "dx": 1, "dw": 1, "step": 3}
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)


class Case(NamedTuple):
    """A layer of `rows` outputs and `cols` inputs; a swept one is part of a curve."""

    operation: str
    rows: int
    cols: int
    block: int
    density: float
    swept: bool = False
    tokens: int = TOKENS


SWEEP = [Case("step", 2048, 2048, b, d, swept=True) for b in (64, 32, 16, 1) for d in DENSITIES]
SPEED = [
    Case(operation, rows, 1024, *kind)
    for rows in (1024, 4096)
    for operation in PRODUCTS
    for kind in KINDS
] + SWEEP
MEMORY = [Case("step", 1024, 1024, *kind) for kind in KINDS] + SWEEP
QUICK = [Case(op, 64, 32, b, 0.25, tokens=8) for op in PRODUCTS for b in (16, 1)]
QUICK_MEMORY = [case for case in QUICK if case.operation == "step"]


class Made(NamedTuple):
    """One weight in the layers that hold it, and operands; all integers."""

    topology: Topology
    mask: Tensor
    dense: nn.Linear
    sparse: SparseLinear
    masked: SparseLinear
    x: Tensor
    dy: Tensor


def setup(case: Case) -> Problem:
    """The same layer sparse, dense, masked, and by peers."""
    made = _make(case)
    sparse, others = CONTENDERS[case.operation](made)
    w, bias = made.dense.weight.detach(), present(made.dense.bias).detach()
    if not case.swept:
        values = made.sparse.values.detach()
        operands = case.operation, made.topology, values, bias, made.x, made.dy
        others |= peers.torch_sparse(*operands) | peers.sparselab(*operands)
    x, dy = made.x.detach(), made.dy
    y, dx, dw, db = x @ w.t() + bias, dy @ w, dy.t() @ x * made.mask, dy.sum(0)
    expected = {"forward": (y,), "dx": (dx,), "dw": (dw,), "step": (y, dx, dw, db)}
    return Problem(facts(case, made.topology), sparse, others, expected[case.operation])


def _make(case: Case) -> Made:
    torch.manual_seed(0)
    shape = case.rows, case.cols
    topology = Topology.random(shape, case.block, sparsity=1 - case.density)
    mask, dense = topology.to_mask(), nn.Linear(case.cols, case.rows)
    fill(dense)
    with torch.no_grad():
        dense.weight.mul_(mask)
    sparse, masked = (
        SparseLinear.from_topology(dense, topology, impl=impl) for impl in (None, "masked")
    )
    x, dy = integers(case.tokens, case.cols), integers(case.tokens, case.rows)
    return Made(topology, mask, dense, sparse, masked, x.requires_grad_(), dy)


Contenders = tuple[Contender, dict[str, Contender | str]]


def _forward(m: Made) -> Contenders:
    others = {"dense": forward(m.dense, m.x), "masked": forward(m.masked, m.x)}
    return forward(m.sparse, m.x), dict(others)


def _step(m: Made) -> Contenders:
    dense = only_where(m.mask, step(m.dense, m.x, m.dy), 2)
    return step(m.sparse, m.x, m.dy), {"dense": dense, "masked": step(m.masked, m.x, m.dy)}


def _dx(m: Made) -> Contenders:
    dy, w, values = m.dy, m.dense.weight.detach(), m.sparse.values.detach()
    return _product(lambda: ops.spmm_t(dy, values, m.topology)), {
        "dense": _product(lambda: dy @ w),
        "masked": _product(lambda: dy @ (w * m.mask)),
    }


def _dw(m: Made) -> Contenders:
    dy, x = m.dy, m.x.detach()
    return _product(lambda: ops.sddmm(dy, x, m.topology), m.topology.unpack), {
        "dense": _product(lambda: dy.t() @ x, lambda dw: dw * m.mask),
        "masked": _product(lambda: dy.t() @ x * m.mask),
    }


def _product(
    call: Callable[[], Tensor], read: Callable[[Tensor], Tensor] = lambda result: result
) -> Contender:
    return Contender(Run(call), lambda result: (read(result),))


CONTENDERS = {"forward": _forward, "dx": _dx, "dw": _dw, "step": _step}


def facts(case: Case, topology: Topology) -> Facts:
    """FLOPs and bytes by formula."""
    products, stored = PRODUCTS[case.operation], topology.nnzb * case.block**2
    numbers = case.tokens * (case.rows + case.cols) + stored + 2 * topology.nnzb
    return Facts(
        family="linear",
        operation=case.operation,
        name=f"{case.rows}x{case.cols}",
        sizes={"outputs": case.rows, "inputs": case.cols, "tokens": case.tokens},
        block=case.block,
        density=case.density,
        active=topology.density,
        backend=choice.backend_for(topology, torch.float32),
        flops=2 * products * case.tokens * stored,
        dense_flops=2 * products * case.tokens * case.rows * case.cols,
        bytes=4 * products * numbers,
    )


def test_speed(benchmark: measure.Benchmark, case: Case, quick: bool) -> None:
    """Time it."""
    measure.speed(benchmark, setup(case), quick=quick)


def test_memory(benchmark: measure.Benchmark, case: Case, quick: bool) -> None:
    """Weigh it."""
    measure.memory(benchmark, setup(case), quick=quick)
