"""What training relies on beyond the kernels: no waiting for the GPU, CUDA graphs that live on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.gpu.agenda import Case, Row
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import Plan
from sparsekern import RigL, SparseLinear
from sparsekern.cost.timing import Clock
from sparsekern.errors import told
from sparsekern.tuning.trial import DTYPES, Block, difference, precision

NEEDS_CUDA = "skipped: needs CUDA"


def layers(plan: Plan, device: torch.device) -> list[Case]:
    """All checks, for the smallest block that has one and for unstructured weights."""
    del device
    smallest = min(block for block in plan.checked_blocks if block != (1, 1))
    return [
        _case(block, kind, check)
        for block in (smallest, (1, 1))
        for kind in plan.layer_kinds
        for check in CHECKS
    ]


def _case(block: Block, kind: str, check: str) -> Case:
    name = f"layer {block[0]}x{block[1]} {kind} {check}"
    where: Row = {"kernel": "layer", "block": list(block), "kind": kind, "shape": "ragged"}
    run = partial(_checked, where=where | {"check": check})
    return Case(name, run, 2.0, where | {"check": check, "ok": False})


def _checked(bench: Bench, where: Row) -> Iterator[Row]:
    block, kind = (where["block"][0], where["block"][1]), where["kind"]
    try:
        with precision(kind):
            detail = CHECKS[where["check"]](block, kind, bench.plan, bench.device, bench.clock)
    except Exception as error:  # any failure is a finding
        detail = told(error)[:300]
    ok = None if detail == NEEDS_CUDA else not detail
    yield where | {"ok": ok, "detail": detail}


def _layer(
    block: Block, kind: str, plan: Plan, device: torch.device
) -> tuple[SparseLinear, Tensor, Tensor]:
    M, edge = plan.check_tokens, plan.csr_edge if block == (1, 1) else plan.layer_edge
    torch.manual_seed(0)
    layer = SparseLinear(
        edge + 5, edge + 3, sparsity=0.6, block=block, impl="triton", dtype=DTYPES[kind]
    ).to(device)
    x = torch.randn(M, edge + 5).to(device, DTYPES[kind]).requires_grad_()
    return layer, x, torch.randn(M, edge + 3).to(device, DTYPES[kind])


def _step(layer: SparseLinear, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y, dx, dw and db."""
    y = layer(x)
    return (y, *torch.autograd.grad(y, [x, *layer.parameters()], dy))


def _no_sync(block: Block, kind: str, plan: Plan, device: torch.device, clock: Clock) -> str:
    """Forward and backward never wait for the GPU."""
    del clock
    layer, x, dy = _layer(block, kind, plan, device)
    _step(layer, x, dy)
    if device.type != "cuda":
        return NEEDS_CUDA
    with _sync_is_an_error():
        _step(layer, x, dy)
    return ""


@contextmanager
def _sync_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _graph_after_update(
    block: Block, kind: str, plan: Plan, device: torch.device, clock: Clock
) -> str:
    """A graph captured before a topology update replays with the new topology."""
    layer, x, dy = _layer(block, kind, plan, device)
    replay, captured = clock.capture(lambda: _step(layer, x, dy))
    before = layer.topology.digest()
    _update_once(layer, x, dy)
    if layer.topology.digest() == before:
        return "the update changed nothing"
    eager = _step(layer, x, dy)
    if device.type != "cuda":
        return NEEDS_CUDA
    replay()
    torch.cuda.synchronize()
    pairs = zip(("y", "dx", "dw", "db"), captured, eager, strict=True)
    wrong = [f"{name}: {difference(a, b)}" for name, a, b in pairs if difference(a, b)]
    return "; ".join(wrong)


def _update_once(layer: SparseLinear, x: Tensor, dy: Tensor) -> None:
    """One RigL update, then one weight step."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    method = RigL(nn.Sequential(layer), optimizer, t_end=10, update_freq=5, drop_fraction=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).backward(dy)
        optimizer.step()
    method.detach()
    if len(method.history) != 1:
        raise RuntimeError(f"expected one topology update; got {len(method.history)}")


CHECKS: dict[str, Callable[[Block, str, Plan, torch.device, Clock], str]] = {
    "no host sync": _no_sync,
    "graph after update": _graph_after_update,
}
