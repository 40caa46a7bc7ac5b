"""What a setup function gives: the sparse computation, those beside it, and what all must give."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.paired import Run
from sparsekern.errors import told

Tensors = tuple[Tensor, ...]


class WrongResultError(RuntimeError):
    """A sparse computation differs from the reference: its speed means nothing."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a case is, and what it costs by formula.

    Attributes:
        family: of operators, "linear" for one.
        operation: "forward", "dx", "dw", "step" (forward and backward) or "update".
        name: of the layer.
        sizes: its numbers, by name.
        block: edge of the blocks.
        density: that was asked for.
        active: active share of the weights, exactly.
        backend: what the CPU path chose.
        flops: executed; 1 multiply-add = 2 FLOPs.
        dense_flops: if the layer were dense.
        bytes: operands and results, each once, index arrays included.
    """

    family: str
    operation: str
    name: str
    sizes: Mapping[str, int]
    block: int
    density: float
    active: float
    backend: str
    flops: int
    dense_flops: int
    bytes: int
    dtype: str = "float32"
    impl: str = "cpu"

    def id(self, operation: str | None = None) -> str:
        """One case of one operation; the same from run to run."""
        what = f"{self.family}/{operation or self.operation}/{self.name}"
        return f"{what}/block {self.block}/{self.density:g}"


@dataclass(frozen=True)
class Contender:
    """One way to compute the same.

    Attributes:
        run: the call that is timed.
        read: what it computed, in the form of the reference.
        module: whose weights are held, if it trains one.
    """

    run: Run
    read: Callable[[Any], Tensors]
    module: nn.Module | None = None


@dataclass(frozen=True)
class Problem:
    """A case, set up.

    Attributes:
        facts: about the sparse computation.
        sparse: what is measured.
        others: beside it; a text instead tells why one can't take part.
        expected: what all must give.
    """

    facts: Facts
    sparse: Contender
    others: Mapping[str, Contender | str]
    expected: Tensors


class Ceilings(NamedTuple):
    """What this process reaches at best, on all threads.

    Attributes:
        gemm: FLOP/s of a dense float32 product.
        copy: bytes per second of a copy, read and written together.
    """

    gemm: float
    copy: float


GEMM = (512, 2048, 2048)
COPIED = 2**24
"""Numbers in a copy: 64 MiB, more than caches hold."""


@functools.cache
def ceilings() -> Ceilings:
    """Measured once in a process; the best of several."""
    m, k, n = GEMM
    a, b, c = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    source, target = torch.zeros(COPIED), torch.ones(COPIED)
    gemm = min(Run(lambda: torch.mm(a, b, out=c)).seconds() for _ in range(7))
    copy = min(Run(lambda: target.copy_(source)).seconds() for _ in range(7))
    return Ceilings(2 * m * k * n / gemm, 2 * 4 * COPIED / copy)


def check(contender: Contender, expected: Tensors, what: str) -> None:
    """Run it once, and compare bit for bit.

    Raises:
        WrongResultError: something differs; the text names what.
    """
    if contender.run.prepare is not None:
        contender.run.prepare()
    got = contender.read(contender.run.call())
    for i, (one, wanted) in enumerate(zip(got, expected, strict=True)):
        if not torch.equal(one, wanted):
            raise WrongResultError(f"{what}: result {i} differs from the reference")


def able(problem: Problem) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those beside the sparse computation that run and are right, and why the others don't."""
    good: dict[str, Contender] = {}
    cannot: dict[str, str] = {}
    for name, other in problem.others.items():
        if isinstance(other, str):
            cannot[name] = other
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.sparse calls itself a beta
                check(other, problem.expected, name)
        except Exception as error:  # whatever a peer raises, it is the peer that can't
            cannot[name] = told(error)[:160]
        else:
            good[name] = other
    return good, cannot
