"""Part `peers`: other libraries' kernels on the same weights, in turns with ours and cuBLAS.

Each stands behind a guard: one that can't be imported, does not take a case or raises is a row that
says so. A peer must be exact on integers before it is timed, as ours must.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.agenda import Case, Row
from benchmarks.gpu.bench import Bench, describe
from benchmarks.gpu.cases import HEADLINE, Plan
from benchmarks.gpu.speed import dense_for, sparse_runs
from sparsekern.cost.timing import Run
from sparsekern.errors import told
from sparsekern.tuning.trial import Block, Operands, Shape, difference, expected, precision


class Peer(NamedTuple):
    """Another implementation of one product.

    Attributes:
        prepare: takes operands, returns the call to be timed; what it prepares is not timed.
        finish: brings the call's result into our layout, for comparison.
    """

    name: str
    operation: str
    prepare: Callable[[Operands], Run]
    finish: Callable[[Operands, Any], Tensor]


def _transposed(_o: Operands, result: Any) -> Tensor:
    y: Tensor = result.t()
    return y


def _packed(_o: Operands, result: Any) -> Tensor:
    values: Tensor = result.values()
    return values


def _unstructured(_o: Operands, result: Any) -> Tensor:
    values: Tensor = result.values()
    return values.view(-1, 1, 1)


def _torch_bsr(o: Operands, **settings: int) -> Run:
    """`torch.sparse`'s Triton forward, y^T = w x^T; without settings, with its own defaults."""
    triton_ops: Any = importlib.import_module("torch.sparse._triton_ops")
    w, xt = o.topology.to_torch(o.values), o.x.t().contiguous()
    y = xt.new_zeros(o.topology.shape[0], xt.shape[1])
    meta = None
    if settings:
        meta = {"SPLIT_N": max(1, xt.shape[1] // o.topology.block[0]), "GROUP_SIZE_ROW": 4}
        meta |= {"num_warps": 4} | settings
    return lambda: triton_ops.bsr_dense_addmm(y, w, xt, beta=0, alpha=1, meta=meta)


def _torch_bsr_pipelined(o: Operands) -> Run:
    """The same kernel with a software pipeline, as torchao set it on Hopper."""
    return _torch_bsr(o, num_stages=4)


def _torch_sampled_bsr(o: Operands) -> Run:
    """`torch.sparse`'s Triton SDDMM."""
    triton_ops: Any = importlib.import_module("torch.sparse._triton_ops")
    pattern = o.topology.to_torch(torch.zeros_like(o.values))
    dyt = o.dy.t().contiguous()
    return lambda: triton_ops.sampled_addmm(pattern, dyt, o.x, beta=0.0, alpha=1.0)


def _cusparse_csr(o: Operands) -> Run:
    """CSR times dense, cuSPARSE on a GPU: y^T = w x^T."""
    w, xt = o.topology.to_torch(o.values), o.x.t()
    return lambda: w @ xt


def _cusparse_sampled_csr(o: Operands) -> Run:
    """SDDMM at the entries of a CSR matrix, cuSPARSE on a GPU."""
    pattern = o.topology.to_torch(torch.zeros_like(o.values))
    dyt = o.dy.t().contiguous()
    return lambda: torch.sparse.sampled_addmm(pattern, dyt, o.x, beta=0.0)


def _stk(o: Operands) -> Run:
    """stanford-stk, which has blocks of 128 only: y^T = w x^T."""
    stk: Any = importlib.import_module("stk")
    w, xt = stk.ops.to_sparse(o.dense_weight(), blocking=o.topology.block[0]), o.x.t().contiguous()
    return lambda: stk.ops.dsd(w, xt)


BSR_PEERS = (
    Peer("torch bsr_dense_addmm", "forward", _torch_bsr, _transposed),
    Peer("torch bsr_dense_addmm, 4 stages", "forward", _torch_bsr_pipelined, _transposed),
    Peer("torch sampled_addmm (BSR)", "dw", _torch_sampled_bsr, _packed),
)
STK = Peer("stk dsd", "forward", _stk, _transposed)
CSR_PEERS = (
    (Peer("torch.sparse CSR @ dense", "forward", _cusparse_csr, _transposed), "bf16"),
    (Peer("torch.sparse CSR @ dense", "forward", _cusparse_csr, _transposed), "fp32"),
    (Peer("torch.sparse.sampled_addmm", "dw", _cusparse_sampled_csr, _unstructured), "fp32"),
)


def peers(plan: Plan, device: torch.device) -> list[Case]:
    """Blocks away from the headline, then unstructured weights, then what is not installed."""
    del device
    cases = [
        _case(peer, plan.shapes[0], (edge, edge), density, "bf16")
        for density in plan.peer_densities
        for edge in plan.blocks
        for peer in BSR_PEERS
        if density != HEADLINE
    ]
    if importlib.util.find_spec("stk") is not None:
        cases += [
            _case(STK, plan.shapes[0], (128, 128), density, "bf16")
            for density in plan.peer_densities
        ]
    cases += [
        _case(peer, plan.csr_shape, (1, 1), density, kind)
        for density in plan.csr_densities[-2:]
        for peer, kind in CSR_PEERS
    ]
    missing = [name for name in ("stk", "blksprs") if importlib.util.find_spec(name) is None]
    return [*cases, *(Case(f"peer {name}", partial(_missing, name=name), 0.0) for name in missing)]


def _missing(bench: Bench, name: str) -> Iterator[Row]:
    del bench
    yield {"peer": name, "status": "failed: not installed", "ms": None}


def _case(peer: Peer, shape: Shape, block: Block, density: float, kind: str) -> Case:
    name = f"peer {peer.name}, {block[0]} {density:g} {kind}"
    run = partial(_compared, peer=peer, shape=shape, block=block, density=density, kind=kind)
    facts: Row = {"peer": peer.name, "operation": peer.operation, **shape._asdict()}
    facts |= {"block": list(block), "kind": kind, "density": density}
    return Case(name, run, 2.0, facts)


def _compared(
    bench: Bench, peer: Peer, shape: Shape, block: Block, density: float, kind: str
) -> Iterator[Row]:
    """One row: the peer's time, and ours and cuBLAS's in the same rounds."""
    with precision(kind), torch.no_grad():
        o = bench.operands(shape, block, density, kind)
        row: Row = {"peer": peer.name, "operation": peer.operation} | describe(o)
        theirs, status = ready(bench, peer, o)
        if theirs is None:
            yield row | {"status": status, "ms": None}
            return
        ours = bench.verdicts(o)[peer.operation]
        runs = {"peer": theirs, "dense": dense_for(o)[peer.operation]}
        if ours == "ok":
            runs["ours"] = sparse_runs(o)[peer.operation]
        timing = bench.time(runs)
    ms = timing.ms("peer")
    row |= {"status": "ok", "ms": ms, "tflops": o.flops / ms / 1e9, "ours_status": ours}
    row |= {"dense_ms": timing.ms("dense"), "ours_ms": None, "ours_is_faster_by": None}
    if ours == "ok":
        faster = statistics.median(timing.ratios("peer", "ours"))
        row |= {"ours_ms": timing.ms("ours"), "ours_is_faster_by": faster}
    yield row


def ready(bench: Bench, peer: Peer, o: Operands) -> tuple[Run | None, str]:
    """A peer's call, once it is exact on integers; else None, and why."""
    try:
        wrong = _wrong(bench, peer, o)
        theirs = peer.prepare(o)
        theirs()
    except Exception as error:  # a peer's failure is a result
        return None, f"failed: {told(error)[:300]}"
    return (None, f"incorrect: {wrong}") if wrong else (theirs, "ok")


def _wrong(bench: Bench, peer: Peer, o: Operands) -> str:
    """What a peer's product of integers differs in; empty if it is exact."""
    integers = o.with_integers(bench.generator(1))
    got = peer.finish(integers, peer.prepare(integers)())
    want = expected(peer.operation, integers).value.to(got.dtype)
    return difference(got, want)
