"""The step in which RigL updates the topology of a layer, against the masked one and a plain step.

It takes a forward and a backward pass, the dense gradient in slabs, and the rewiring. Weight steps
come between, untimed; the learning rate is a power of two, so that everything stays exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.paired import Run
from benchmarks.suite import measure
from benchmarks.suite.layers import fill, integers
from benchmarks.suite.problem import Contender, Facts, Problem, Tensors
from sparsekern import RigL, SparseConv2d, SparseLinear, Topology
from sparsekern.nn import SparseLayer
from sparsekern.ops.cpu import choice

KINDS = ((32, 0.1), (16, 0.1), (1, 0.1))
LR = 2.0**-6


class Case(NamedTuple):
    """A linear layer of `edge` x `edge` on 512 rows, or a 3x3 one on 16 images of 14 x 14."""

    layer: str
    edge: int
    block: int
    density: float
    rows: int


SPEED = [
    Case(layer, edge, *kind, rows)
    for layer, edge, rows in (("linear", 1024, 512), ("linear", 4096, 512), ("3x3", 128, 16))
    for kind in KINDS
]
MEMORY = SPEED
QUICK = [Case(layer, 32, block, 0.25, 4) for layer in ("linear", "3x3") for block in (16, 1)]
QUICK_MEMORY = QUICK[:1]
SIZE = 14


def setup(case: Case) -> Problem:
    """The same update, sparse and masked; both must choose the same connections."""
    torch.manual_seed(0)
    made: Any = SparseLinear if case.layer == "linear" else SparseConv2d
    arguments: dict[str, int] = {} if case.layer == "linear" else {"kernel_size": 3, "padding": 1}
    settings = {"sparsity": 1 - case.density, "block": case.block, **arguments}
    sparse = made(case.edge, case.edge, **settings)
    fill(sparse)
    dense = sparse.to_dense()
    masked, reference, plain = (
        made.from_topology(dense, _copied(sparse.topology), impl=impl)
        for impl in ("masked", "masked", None)
    )
    pixels = (SIZE, SIZE) if arguments else ()
    x = integers(case.rows, case.edge, *pixels)
    dy = integers(case.rows, case.edge, *pixels)
    expected = _updating(reference, x, dy)
    expected.run.call()
    others: dict[str, Contender | str] = {
        "masked": _updating(masked, x, dy),
        "plain step": _plain(plain, x, dy, expected.read(None)),
        "dense": "has no topology",
    }
    return Problem(facts(case, sparse, x), _updating(sparse, x, dy), others, expected.read(None))


def _copied(topology: Topology) -> Topology:
    """Index arrays of its own: a layer keeps those it is given, and updates write into them."""
    return topology.with_arrays([array.clone() for array in topology.arrays])


def _updating(layer: SparseLayer, x: Tensor, dy: Tensor) -> Contender:
    """A step that is an update each time: the first at once, and one after every weight step."""
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    rigl = RigL(model, optimizer, t_end=10**6, update_freq=1)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(model(x), dy)
        optimizer.step()

    def prepare() -> None:
        while not rigl.due:
            call()

    # nothing is held for the layer: an optimizer of another kind would be its second
    return Contender(Run(call, prepare), lambda _: (layer.mask(), layer.dense_weight()))


def _plain(layer: SparseLayer, x: Tensor, dy: Tensor, expected: Tensors) -> Contender:
    """A weight step of the sparse layer; it has nothing to compare with but its own gradient."""
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(model(x), dy)
        optimizer.step()

    return Contender(Run(call), lambda _: expected)


def facts(case: Case, layer: SparseLayer, x: Tensor) -> Facts:
    """FLOPs and bytes by formula: y, dw at active blocks, and all of dw; x needs no gradient."""
    topology = layer.topology
    stored, tokens = topology.nnzb * case.block**2, x.numel() // case.edge
    weights = topology.shape[0] * topology.shape[1]
    numbers = 3 * tokens * 2 * case.edge + 2 * (stored + 2 * topology.nnzb) + weights
    return Facts(
        family="update",
        operation="update",
        name=f"{case.layer} {case.edge}",
        sizes={"edge": case.edge, "rows": case.rows},
        block=case.block,
        density=case.density,
        active=topology.density,
        backend=choice.backend_for(topology, torch.float32),
        flops=2 * tokens * (2 * stored + weights),
        dense_flops=2 * tokens * 2 * weights,
        bytes=4 * numbers,
    )


def test_speed(benchmark: measure.Benchmark, case: Case, quick: bool) -> None:
    """Time it."""
    measure.speed(benchmark, setup(case), quick=quick)


def test_memory(benchmark: measure.Benchmark, case: Case, quick: bool) -> None:
    """Weigh it."""
    measure.memory(benchmark, setup(case), quick=quick)
