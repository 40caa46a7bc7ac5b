"""Part `probe`: is the model's picture of the device right? Rates, and what each wall costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.agenda import Case, Row
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import Plan
from sparsekern import Topology
from sparsekern.ops.dispatch import backend
from sparsekern.tuning.trial import Operands, precision, random_topology

DENSITY = 0.1


def probe(plan: Plan, device: torch.device) -> list[Case]:
    """Two rates of the device, then for each block on where forward's time goes."""
    del device
    rates = {"probe copy": _copy_rate, "probe dense cube": _dense_rate}
    cases = [Case(name, run, 1.0) for name, run in rates.items()]
    blocks = plan.blocks
    return cases + [
        Case(f"probe forward {e}", partial(_forward_variants, edge=e), 1.5) for e in blocks
    ]


def _copy_rate(bench: Bench) -> Iterator[Row]:
    """Bytes read and written by a device-to-device copy."""
    source = torch.ones(bench.plan.probe_bytes // 4, dtype=torch.int32, device=bench.device)
    target = torch.empty_like(source)
    timing = bench.time({"copy": lambda: target.copy_(source)})
    rate = 2 * source.nbytes / timing.ms("copy") / 1e9
    yield {"what": "copy", "bytes": source.nbytes, "status": "ok", "tb_per_s": rate}


def _dense_rate(bench: Bench) -> Iterator[Row]:
    """A cube of normal numbers in bf16, through cuBLAS."""
    edge, generator = bench.plan.probe_edge, bench.generator()
    a, b = (
        torch.randn(edge, edge, generator=generator, device=bench.device).bfloat16()
        for _ in range(2)
    )
    timing = bench.time({"cube": lambda: a @ b})
    rate = 2 * edge**3 / timing.ms("cube") / 1e9
    yield {"what": "dense cube", "edge": edge, "status": "ok", "tflops": rate}


def _forward_variants(bench: Bench, edge: int) -> Iterator[Row]:
    """Forward as it is, with one hot tile of x, with rows of equal length, and with one block.

    `hot` reads one block column over and over: what it takes less than `random` is the price of
    L2. `even` gives every block row as many blocks: what it takes less is the price of uneven
    rows. `one block` writes the output and does next to nothing else: the floor.
    """
    block, shape = (edge, edge), bench.plan.shapes[0]
    row: Row = {"what": "forward variants", "block": list(block), "density": DENSITY}
    row |= shape._asdict()
    verdict = bench.gate.verdict("forward", block, "bf16")
    if verdict != "ok":
        yield row | {"status": verdict}
        return
    with precision("bf16"), torch.no_grad():
        o = bench.operands(shape, block, DENSITY, "bf16")
        one = Topology.random((shape.N, shape.K), block, nnzb=1, device=bench.device)
        topologies = {
            "random": random_topology(shape, block, DENSITY, bench.device),
            # no topology, and kernels only: forward reads crow and col alone, and checks nothing
            "hot": replace(o.topology, col=torch.zeros_like(o.topology.col)),
            "even": _even(o.topology),
            "one block": one,
        }
        weights = {name: (t, _values(o, t)) for name, t in topologies.items()}
        runs = {
            name: (lambda t=t, v=v: backend("triton").spmm(o.x, v, t, None))
            for name, (t, v) in weights.items()
        }
        timing = bench.time(runs)
    per_block = {name: topology.nnzb for name, topology in topologies.items()}
    yield row | {"status": "ok", "nnzb": per_block, "ms": {name: timing.ms(name) for name in runs}}


def _values(o: Operands, topology: Topology) -> Tensor:
    return torch.randn(topology.values_shape, device=o.x.device).to(o.values.dtype)


def _even(like: Topology) -> Topology:
    """As many blocks in every row, rounded down, at random columns."""
    rows, cols = like.block_rows, like.block_cols
    each = max(1, like.nnzb // rows)
    draw = torch.Generator().manual_seed(3)
    columns = torch.rand(rows, cols, generator=draw).argsort(1)[:, :each].sort(1).values
    positions = (torch.arange(rows)[:, None] * cols + columns).flatten()
    return Topology.from_positions(positions, like.shape, like.block).to(like.device)
