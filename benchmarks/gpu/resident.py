"""Part `resident`: the product that holds activations in shared memory, on hardware at last.

It may be wrong or hang: small cases first, then ragged edges, then all of shared memory with the
times. `ratio_to_general` is how many times as fast it is as the kernel that runs without it, in
turns with it; `smem_ms` is what its reads of shared memory take at the model's rate. Nothing
depends on this part.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.agenda import Case, Row
from benchmarks.gpu.bench import Bench, describe
from benchmarks.gpu.cases import Plan
from benchmarks.gpu.correctness import KERNELS
from sparsekern.cost.roofline import device_named
from sparsekern.cost.timing import Clock, take_turns
from sparsekern.kernels import tables
from sparsekern.kernels.launch import arch_class
from sparsekern.kernels.tables import Key, RingConfig
from sparsekern.tuning.trial import (
    Block,
    Operands,
    Shape,
    difference,
    expected,
    integers_like,
    operands,
    poisoned,
    products,
    random_topology,
)

RING_KB = 64
DENSITY = 0.1
REPEATS = 200
ROUNDS = 20

Launch = Callable[[str, Operands, Tensor | None], Tensor]


class Product(NamedTuple):
    """One product.

    Attributes:
        held: columns of the activations, which lie in shared memory.
        out: columns of the result.
        timed: if it is right.
    """

    operation: str
    block: Block
    tokens: int
    held: int
    out: int
    kind: str = "bf16"
    bias: bool = False
    timed: bool = False

    @property
    def shape(self) -> Shape:
        """Of the layer: dX holds dy, so as many columns as the layer has outputs."""
        forward = self.operation == "forward"
        K, N = (self.held, self.out) if forward else (self.out, self.held)
        return Shape(self.tokens, K, N)

    @property
    def row(self) -> Row:
        """The columns that name it."""
        row: Row = {"what": "resident", "operation": self.operation, **self.shape._asdict()}
        row |= {"block": list(self.block), "kind": self.kind, "density": DENSITY}
        return row | {"bias": self.bias, "timed": self.timed}


def _cases() -> tuple[Product, ...]:
    """By what they ask of the kernel."""
    first = [Product("forward", (edge, edge), 512, 256, 1024) for edge in (32, 16, 64)]
    first += [Product("dx", (32, 32), 512, 256, 1024), Product("forward", (8, 64), 512, 256, 1024)]
    ragged = [
        Product("forward", (32, 32), 8191, 1024, 4090, "fp16", bias=True),
        Product("forward", (16, 16), 8191, 1536, 4096),
        Product("dx", (32, 32), 8191, 1024, 4090),
    ]
    full = [
        Product(operation, (edge, edge), 8192, held, 4096, timed=True)
        for edge, sizes in ((32, (1024, 1536)), (16, (1024, 1536)), (64, (1024,)))
        for held in sizes
        for operation in ("forward", "dx")
    ]
    return (*first, *ragged, *full)


CASES = _cases()


def resident(plan: Plan, device: torch.device) -> list[Case]:
    """One case per product: ok, incorrect, failed or not run."""
    del plan, device
    return [Case(_name(case), partial(_row, case=case), 3.0, case.row) for case in CASES]


def _name(case: Product) -> str:
    shape = "x".join(map(str, case.shape))
    return f"resident {case.operation} {'x'.join(map(str, case.block))} {shape} {case.kind}"


def _row(bench: Bench, case: Product) -> Iterator[Row]:
    row = case.row | {"ms": None, "general_ms": None, "ratio_to_general": None}
    reason = _refusal(bench)
    if reason:
        yield row | {"status": f"not run: {reason}"}
        return
    with torch.no_grad():
        yield row | judge(case, bench.device, bench.clock, launch_held, bench.times(REPEATS))


def _refusal(bench: Bench) -> str:
    """Why there is nothing to run here; empty if there is."""
    if bench.plan.dry:
        return "interpreted, and this kernel is Hopper's own"
    arch = arch_class(bench.device)
    return "" if arch == "sm90" else f"a kernel for sm90; got {arch}"


def judge(case: Product, device: torch.device, clock: Clock, launch: Launch, repeats: int) -> Row:
    """Check one case, and time it if it asks for that and is right."""
    topology = random_topology(case.shape, case.block, DENSITY, device)
    generator = torch.Generator(device).manual_seed(0)
    o = operands(case.shape, topology, case.kind, DENSITY, generator)
    bias = integers_like(o.dy[0], generator) if case.bias else None
    row = describe(o)
    detail = _wrong(case, o, bias, launch, repeats)
    if detail:
        return row | {"status": "incorrect", "detail": detail}
    row |= {"status": "ok", "detail": ""}
    return row | _times(case, o, clock) if case.timed else row


def _wrong(case: Product, o: Operands, bias: Tensor | None, launch: Launch, repeats: int) -> str:
    """Empty if exact on integers, here and through `ops`, and always the same on floats."""
    integers = o.with_integers(torch.Generator(o.x.device).manual_seed(1))
    want = expected(case.operation, integers, bias).value.to(o.x.dtype)
    with poisoned():
        got = launch(case.operation, integers, bias)
    wrong = difference(got, want)
    if wrong:
        return wrong
    first = launch(case.operation, o, bias)
    changed = torch.zeros((), dtype=torch.int64, device=o.x.device)
    for _ in range(repeats):
        changed += (launch(case.operation, o, bias) != first).any()
    if changed:
        return f"{int(changed)} of {repeats} repeats differ from the first run"
    if case.block[0] == 8:  # `ops` takes no such block
        return ""
    with _through_ops(case, o.x.device), poisoned():
        wrong = difference(products(integers, "triton", bias)[case.operation](), want)
    return f"through ops: {wrong}" if wrong else ""


def _times(case: Product, o: Operands, clock: Clock) -> Row:
    """In turns with the general kernel, which must be right as well."""
    integers = o.with_integers(torch.Generator(o.x.device).manual_seed(1))
    want = expected(case.operation, integers).value.to(o.x.dtype)
    with poisoned():
        wrong = difference(products(integers, "triton")[case.operation](), want)
    run = products(o, "triton")[case.operation]

    def held() -> Tensor:
        with _through_ops(case, o.x.device):
            return run()

    runs = {"held": held} if wrong else {"held": held, "general": run}
    timing = take_turns(clock.once, runs, ROUNDS if o.x.is_cuda else 1)
    ms = timing.ms("held")
    row: Row = {"ms": ms, "tflops": o.flops / ms / 1e9}
    if wrong:
        row["detail"] = f"the general kernel is incorrect: {wrong}"
    else:
        ratios = timing.ratios("general", "held")
        row |= {"general_ms": timing.ms("general"), "ratio_to_general": statistics.median(ratios)}
    return row | _against_model(case, o, ms)


def _against_model(case: Product, o: Operands, ms: float) -> Row:
    """What `wgmma` reads of both operands for every 64 tokens, at the model's rate."""
    known = device_named(torch.cuda.get_device_name(o.x.device)) if o.x.is_cuda else None
    if known is None:
        return {}
    reduce, out = case.block[::-1] if case.operation == "forward" else case.block
    read = o.x.element_size() * -(-case.tokens // 64) * o.topology.nnzb * reduce * (64 + out)
    smem_ms = 1e3 * read / known.smem
    return {"smem_ms": smem_ms, "percent_of_smem": 100 * smem_ms / ms}


def _through_ops(case: Product, device: torch.device) -> AbstractContextManager[None]:
    """Send the products of `ops` to the kernel that is looked at."""
    op = f"{KERNELS[case.operation]}_resident"
    key = Key(op, "half", str(max(case.block)), "any", "tma")
    return tables.overridden(arch_class(device), {key: RingConfig(RING_KB)})


def launch_held(operation: str, o: Operands, bias: Tensor | None) -> Tensor:
    """The launcher itself, which raises where `ops` would quietly take the general kernel."""
    from sparsekern.kernels import bsr_spmm_resident as kernels  # noqa: PLC0415  Gluon is heavy

    t, (N, K) = o.topology, o.topology.shape
    if operation == "forward":
        return kernels.bsr_spmm_resident(o.x, o.values, t.crow, t.col, bias, N, ring_kb=RING_KB)
    return kernels.bsr_spmm_t_resident(o.dy, o.values, t.ccol, t.row, t.perm, K, ring_kb=RING_KB)
