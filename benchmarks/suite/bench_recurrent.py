"""`SparseGRU`, `SparseLSTM` and `SparseRNN`: a whole step, against torch's.

The width of the character model of Evci et al. 2020 (appendix I). Its sums go through tanh, so they
are no integers after the first step in time: the products of its matrices are checked exactly on
integers, at the number of rows that they are timed with, and the layer as a whole in float64.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.paired import Run
from benchmarks.suite import measure
from benchmarks.suite.layers import integers, present
from benchmarks.suite.problem import Contender, Facts, Problem, Tensors, WrongResultError
from sparsekern import SparseGRU, SparseLSTM, SparseRNN, ops
from sparsekern.ops.cpu import choice

LAYERS: dict[str, Any] = {"GRU": SparseGRU, "LSTM": SparseLSTM, "RNN": SparseRNN}
KINDS = ((32, 0.25), (16, 0.25), (1, 0.25), (32, 0.1), (16, 0.1), (1, 0.1))
CHECKED_STEPS = 6


class Case(NamedTuple):
    """One layer, over `steps` of `batch` sequences."""

    layer: str
    block: int
    density: float
    hidden: int = 512
    batch: int = 32
    steps: int = 64


SPEED = [Case(layer, *kind) for layer in LAYERS for kind in KINDS]
MEMORY = [Case(layer, 32, 0.1) for layer in LAYERS]
QUICK = [Case(layer, block, 0.25, 32, 4, 3) for layer in LAYERS for block in (16, 1)]
QUICK_MEMORY = QUICK[:1]


def setup(case: Case) -> Problem:
    """The same layer sparse, dense and masked.

    Raises:
        WrongResultError: the layer or one of its products is wrong.
    """
    torch.manual_seed(0)
    made = LAYERS[case.layer]
    sparse = made(case.hidden, case.hidden, sparsity=1 - case.density, block=case.block)
    topologies = {name: getattr(sparse, name).topology for name in ("ih_l0", "hh_l0")}
    check_products(topologies["ih_l0"], case.batch * case.steps)
    check_products(topologies["hh_l0"], case.batch)
    dense = sparse.to_dense()
    masked = made(case.hidden, case.hidden, topologies=topologies, impl="masked")
    x = torch.randn(case.steps, case.batch, case.hidden, requires_grad=True)
    dy = torch.randn(case.steps, case.batch, case.hidden)
    check_module(sparse, x[:CHECKED_STEPS].detach())
    others: dict[str, Contender | str] = {
        "dense": contender(dense, x, dy),
        "masked": contender(masked, x, dy),
        "torch.sparse": "has no recurrent layer",
    }
    return Problem(facts(case, topologies["hh_l0"]), contender(sparse, x, dy), others, ())


def contender(module: nn.Module, x: Tensor, dy: Tensor) -> Contender:
    """Forward and backward: y, dx and all weight gradients."""

    def call() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        torch.autograd.backward(module(x)[0], dy)

    return Contender(Run(call), lambda _: (), module)


def check_products(topology: Any, rows: int) -> None:
    """The three products of a matrix, on integers and in float32, bit for bit.

    Raises:
        WrongResultError: one is wrong.
    """
    w = integers(*topology.shape) * topology.to_mask()
    x, dy, values = integers(rows, w.shape[1]), integers(rows, w.shape[0]), topology.pack(w)
    pairs: list[Tensors] = [
        (ops.spmm(x, values, topology), x @ w.t()),
        (ops.spmm_t(dy, values, topology), dy @ w),
        (ops.sddmm(dy, x, topology), topology.pack(dy.t() @ x)),
    ]
    if not all(torch.equal(got, want) for got, want in pairs):
        raise WrongResultError(f"a product of {topology} differs from the reference")


def check_module(layer: Any, x: Tensor) -> None:
    """Compare with torch's in float64, whose 53 bits leave 23 for errors to grow in.

    Raises:
        WrongResultError: y, dx or a weight gradient differs by more.
    """
    layer = copy.deepcopy(layer).double()
    dense, results = layer.to_dense(), []
    for module in (layer, dense):
        xs = x.double().requires_grad_()
        y = module(xs)[0]
        torch.autograd.backward(y.square().sum())
        results.append([y.detach(), present(xs.grad)])
    for name in ("ih_l0", "hh_l0"):
        matrix = layer.get_submodule(name)
        results[0].append(matrix.values.grad)
        results[1].append(matrix.topology.pack(getattr(dense, f"weight_{name}").grad))
    for got, want in zip(*results, strict=True):
        if not bool(((got - want).abs() <= 2.0**-30 * want.abs().max()).all()):
            raise WrongResultError(f"{layer} differs from torch's in float64")


def facts(case: Case, topology: Any) -> Facts:
    """FLOPs and bytes by formula: two matrices of the same shape, applied to every token."""
    tokens, stored = case.batch * case.steps, topology.nnzb * case.block**2
    rows, cols = topology.shape
    return Facts(
        family="recurrent",
        operation="step",
        name=case.layer,
        sizes={"hidden": case.hidden, "batch": case.batch, "steps": case.steps},
        block=case.block,
        density=case.density,
        active=topology.density,
        backend=choice.backend_for(topology, torch.float32),
        flops=3 * 2 * 2 * tokens * stored,
        dense_flops=3 * 2 * 2 * tokens * rows * cols,
        bytes=4 * 3 * 2 * (tokens * (rows + cols) + stored + 2 * topology.nnzb),
    )


def test_speed(benchmark: measure.Benchmark, case: Case, quick: bool) -> None:
    """Time it."""
    measure.speed(benchmark, setup(case), quick=quick)


def test_memory(benchmark: measure.Benchmark, case: Case, quick: bool) -> None:
    """Weigh it."""
    measure.memory(benchmark, setup(case), quick=quick)
