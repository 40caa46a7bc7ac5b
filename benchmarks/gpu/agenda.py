"""What a run consists of: parts in order of worth, each of cases that can be lost one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks.gpu.cases import Plan

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench

Row = dict[str, Any]


class Case(NamedTuple):
    """What is run at once, and lost at once.

    Attributes:
        name: tells it from all others, and from one run to the next.
        run: yields its rows.
        seconds: it may take with kernels compiled before. Estimates, not measurements.
        lost: columns of the row that stands for the case if it does not come to its end.
    """

    name: str
    run: Callable[[Bench], Iterable[Row]]
    seconds: float = 2.0
    lost: Row | None = None


class Part(NamedTuple):
    """Cases of a kind.

    Attributes:
        cases: of a plan, the most telling first; the device decides what there is to try.
        seconds: for its first turn; what is left waits until every part has had one.
        sources: files that its numbers depend on, as patterns beneath the root.
        ops: operations whose entries in the launch tables they depend on, by their first letters.
        workers: processes side by side, where nothing is timed.
        silence: seconds without a row after which a case is taken for dead.
    """

    cases: Callable[[Plan, torch.device], list[Case]]
    seconds: int
    sources: tuple[str, ...]
    ops: tuple[str, ...] = ()
    workers: int = 1
    silence: float = 60.0
