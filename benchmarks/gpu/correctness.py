"""Whether the kernels are right on this device; a kernel that is not gets no speed.

Exact: integers in -3..3, for which every order of summation gives the same bits: the answer must
equal a float64 product. Bound: on normal floats, the error of each element stays below what its own
sum allows; nothing in the bound is tuned. Besides: two runs agree bit for bit, and a row of the
result does not depend on the rows that came with it. Grow scores of integers are exact as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.gpu.agenda import Case, Row
from benchmarks.gpu.cases import Plan, groups
from sparsekern import ops
from sparsekern.errors import told
from sparsekern.ops.dispatch import resolve
from sparsekern.tuning.trial import (
    DTYPES,
    Block,
    Operands,
    Shape,
    Sum,
    block_norms,
    difference,
    expected,
    integers_like,
    operands,
    poisoned,
    precision,
    products,
    random_topology,
)

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench

KERNELS = {"forward": "spmm", "dx": "spmm_t", "dw": "sddmm"}
"""The kernel behind each product of a training step."""

SCORES = "grow_scores"
DENSITY = 0.1  # at which it is asked what `impl=None` takes

ROUNDOFF = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 0.0, "tf32": 0.0}  # of a stored result
# tensor cores cut off where the IEEE sum rounds: one bit
ACCUMULATOR = {"bf16": 2.0**-23, "fp16": 2.0**-23, "fp32": 2.0**-24, "tf32": 2.0**-23}
# TF32 keeps ten bits after the point; cutting the rest off either factor moves a product so much
PRODUCT = {"bf16": 0.0, "fp16": 0.0, "fp32": 0.0, "tf32": 2.0**-9 + 2.0**-20}
SLICE = slice(3, 40)
SCORE_TOKENS = 48  # few enough for the norm of a 128 x 128 block to stay below 2**24


class Gate:
    """Says of each kernel, block and kind whether it may be timed."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._ok: dict[tuple[Any, ...], bool] = {}
        for row in rows:
            where = row["kernel"], tuple(row["block"]), row["kind"]
            self._ok[where] = self._ok.get(where, True) and row["ok"]

    def verdict(self, operation: str, block: Block, kind: str) -> str:
        """For a product or for "three": "ok", "incorrect" or "not checked"."""
        kernels = KERNELS.values() if operation == "three" else [KERNELS[operation]]
        found = {self.kernel(kernel, block, kind) for kernel in kernels}
        return next((v for v in ("incorrect", "not checked") if v in found), "ok")

    def kernel(self, name: str, block: Block, kind: str) -> str:
        """The same for a kernel by its name."""
        found = self._ok.get((name, block, kind))
        return "not checked" if found is None else ("ok" if found else "incorrect")


def beyond_bound(got: Tensor, want: Sum, kind: str) -> str:
    """Empty if every element lies within the bound of its own sum; NaN never does."""
    u, out, dtype = ACCUMULATOR[kind], ROUNDOFF[kind], DTYPES[kind]
    if got.shape != want.value.shape or got.dtype != dtype:
        return f"expected {tuple(want.value.shape)} {dtype}; got {tuple(got.shape)} {got.dtype}"
    gamma = want.terms * u / (1 - want.terms * u)
    spread = (gamma + PRODUCT[kind] * (1 + gamma)) * want.magnitude
    tiny = torch.finfo(dtype).smallest_normal * out  # rounding of a subnormal
    bound = spread + out * (want.value.abs() + spread) + tiny
    outside = ~((got.double() - want.value).abs() <= bound)
    count = int(outside.sum())
    return f"{count} of {got.numel()} outside the bound" if count else ""


def is_exact(operation: str, integers: Operands, impl: str) -> str:
    """Empty if a product of integers is exact; else what differs."""
    with poisoned():
        got = products(integers, impl)[operation]()
    return difference(got, expected(operation, integers).value.to(got.dtype))


def shipped(plan: Plan, device: torch.device) -> list[Case]:
    """Kernels that `impl=None` takes in bf16, which nearly every number depends on."""
    del device
    return [
        _case(*group, kernel) for group in groups(plan) if _ships(*group) for kernel in _names()
    ]


def others(plan: Plan, device: torch.device) -> list[Case]:
    """All other blocks and kinds: those that `impl=None` takes first."""
    del device
    rest = [group for group in groups(plan) if not _ships(*group)]
    rest.sort(key=lambda group: not _taken(*group))
    return [_case(*group, kernel) for group in rest for kernel in _names()]


def _names() -> tuple[str, ...]:
    return (*KERNELS.values(), SCORES)


def _ships(block: Block, kind: str) -> bool:
    return kind == "bf16" and block[0] == block[1] and _taken(block, kind)


def _taken(block: Block, kind: str) -> bool:
    with precision(kind):
        return resolve(None, torch.device("cuda"), DTYPES[kind], block, DENSITY) == "triton"


def _case(block: Block, kind: str, kernel: str) -> Case:
    name = f"check {block[0]}x{block[1]} {kind} {kernel}"
    where: Row = {"kernel": kernel, "block": list(block), "kind": kind, "shape": "any"}
    lost = where | {"check": "runs", "ok": False}
    return Case(name, partial(_checked, block=block, kind=kind, kernel=kernel), 1.0, lost)


def _checked(bench: Bench, block: Block, kind: str, kernel: str) -> Iterator[Row]:
    yield from check_kernel(block, kind, kernel, bench.plan, bench.device)


def check_kernel(
    block: Block, kind: str, kernel: str, plan: Plan, device: torch.device
) -> Iterator[Row]:
    """All checks of one kernel, block and kind of operand, on aligned and on ragged shapes."""
    operation = next((o for o, name in KERNELS.items() if name == kernel), None)
    with precision(kind):
        for name, shape, density in _cases(block, plan):
            topology = random_topology(shape, block, density, device)
            generator = torch.Generator(device).manual_seed(1)
            o = operands(shape, topology, kind, density, generator)
            bias = None if name == "aligned" else torch.ones_like(o.dy[0])
            where: Row = {"kernel": kernel, "block": list(block), "kind": kind}
            where |= {"shape": name, "density": density}
            checks = (
                check_scores(o, generator)
                if operation is None
                else _checks(operation, o, bias, generator)
            )
            for check, detail in _guarded(checks):
                yield where | {"check": check, "ok": not detail, "detail": detail}


def _cases(block: Block, plan: Plan) -> Iterator[tuple[str, Shape, float]]:
    """Aligned rows can be fetched as whole tiles, ragged ones can't: launches differ by it."""
    M, edge = plan.check_tokens, plan.csr_edge if block == (1, 1) else plan.check_edge
    for density in plan.check_densities:
        yield "aligned", Shape(M, edge, edge), density
        yield "ragged", Shape(M // 2 + 27, edge + 7, edge + 3), density


def _guarded(checks: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(check, what is wrong or nothing) pairs; a kernel that raises fails the rest at once."""
    try:
        yield from checks
    except Exception as error:  # any failure is a finding
        yield "runs", told(error)[:300]


def _checks(
    operation: str, o: Operands, bias: Tensor | None, generator: torch.Generator
) -> Iterator[tuple[str, str]]:
    integers = o.with_integers(generator)
    with poisoned():
        got = products(integers, "triton", bias)[operation]()
    want = expected(operation, integers, bias).value
    yield "exact", difference(got, want.to(got.dtype))
    run = products(o, "triton", bias)[operation]
    first = run()
    yield "bound", beyond_bound(first, expected(operation, o, bias), o.kind)
    yield "deterministic", difference(run(), first)
    if operation == "dw":
        # padding is zero in whatever values are added to, and stays so
        base = o.topology.clear_padding_(integers_like(o.values, generator).float())
        got = ops.sddmm(integers.dy, integers.x, o.topology, out=base.clone(), impl="triton")
        yield "adds in place", difference(got, (want + base).float())
        return
    # copies: a slice would begin at an address that compiles anew
    x, dy = o.x[SLICE].clone(), o.dy[SLICE].clone()
    part = Operands(o.topology, o.kind, o.asked, x, dy, o.values)
    got = products(part, "triton", bias)[operation]()
    yield "row invariance", difference(got, first[SLICE])
    if operation == "forward":
        got = ops.spmm(
            integers.x, integers.values, o.topology, bias, activation="relu", impl="triton"
        )
        yield "relu", difference(got, want.clamp(min=0).to(got.dtype))


def check_scores(o: Operands, generator: torch.Generator) -> Iterator[tuple[str, str]]:
    """Grow scores of integers are exact, and ties go to the lowest position."""
    integers, block = o.with_integers(generator), o.topology.block
    dy, x = integers.dy[:SCORE_TOKENS].clone(), integers.x[:SCORE_TOKENS].clone()
    k, held = o.topology.nnzb // 2 + 1, o.topology.positions()
    for norm in ("l1", "max"):  # sums of squares would outgrow float32
        got = ops.grow_scores(dy, x, o.topology, k, norm=norm, impl="triton")
        scores = block_norms(dy.double().t() @ x.double(), block, norm)
        offered = scores.clone()
        offered[held] = -torch.inf
        best = offered.sort(descending=True, stable=True).indices[:k].sort().values
        best = best[offered[best] >= 0]  # fewer come back if fewer are inactive
        yield (
            norm,
            (
                difference(got.active, scores[held].to(got.active.dtype))
                or difference(got.positions, best)
                or difference(got.scores, scores[best].to(got.scores.dtype))
            ),
        )
