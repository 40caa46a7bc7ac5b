"""Time of a call through a small layer, where everything but the arithmetic shows.

    OMP_NUM_THREADS=2 python -m benchmarks.host_time [--rounds 60] [--threads 2]

Each layer in turn with its `nn.Linear`, and with itself over kernels that do nothing: what is left
then is the way to them, beside autograd's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from sparsekern import SparseLinear, ops
from sparsekern.cost.timing import StepTime, paired_step_times

BURST = 50


class Case(NamedTuple):
    """A layer and its batch; shapes of the networks that a newcomer tries first."""

    inputs: int
    outputs: int
    block: int
    sparsity: float
    batch: int

    def __str__(self) -> str:
        kind = f"block {self.block}" if self.block > 1 else "unstructured"
        return f"{self.inputs} -> {self.outputs} {kind} {self.sparsity:.0%}, batch {self.batch}"


CASES = (
    Case(64, 64, 16, 0.9, 8),
    Case(64, 300, 1, 0.95, 100),
    Case(256, 256, 16, 0.9, 128),
)


class NoKernels:
    """A backend that returns what it was made with."""

    def __init__(self, layer: SparseLinear, x: Tensor) -> None:
        self.y = x.new_zeros(x.shape[0], layer.out_features)
        self.dx, self.dw = torch.zeros_like(x), torch.zeros_like(layer.values.detach())

    def spmm(self, *_: Any, **__: Any) -> Tensor:
        """As `Backend.spmm`."""
        return self.y.detach()

    def backward(self, *_: Any) -> tuple[Tensor, Tensor]:
        """As `Backend.backward`."""
        return self.dx.detach(), self.dw.detach()


class _Nothing(torch.autograd.Function):
    """As many operands as a layer has, and no work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, _bias: Tensor, run: NoKernels) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.run = run
        return run.spmm()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        dx, dw = ctx.run.backward()
        return dx, dw, dy.sum(0), None


def without_kernels(step: Callable[[], object], run: NoKernels) -> Callable[[], object]:
    """The step over kernels that do nothing."""
    places = [module for module in (ops.library, getattr(ops, "direct", None)) if module]

    def stepped() -> None:
        with ExitStack() as stack:
            for module in places:
                stack.enter_context(mock.patch.object(module, "backend", return_value=run))
            for _ in range(BURST):
                step()

    return stepped


def repeated(step: Callable[[], object]) -> Callable[[], object]:
    """The step, a burst of times."""

    def stepped() -> None:
        for _ in range(BURST):
            step()

    return stepped


def forward(module: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """A call without gradient."""

    def step() -> None:
        with torch.no_grad():
            module(x)

    return step


def trained(module: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Callable[[], object]:
    """Forward and backward, x being an activation."""
    x = x.clone().requires_grad_()
    return lambda: torch.autograd.backward(module(x), dy)


def times(case: Case, rounds: int, *, backward: bool) -> dict[str, StepTime]:
    """Seconds of a burst, and ratios to `nn.Linear` beside it."""
    layer = SparseLinear(case.inputs, case.outputs, block=case.block, sparsity=case.sparsity)
    dense = nn.Linear(case.inputs, case.outputs)
    x, dy = torch.randn(case.batch, case.inputs), torch.randn(case.batch, case.outputs)
    run = NoKernels(layer, x)

    def nothing(x: Tensor) -> Tensor:
        y: Tensor = _Nothing.apply(x, layer.values, layer.bias, run)  # type: ignore[no-untyped-call]
        return y if backward else run.spmm()

    def step(module: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return trained(module, x, dy) if backward else forward(module, x)

    steps = {
        "nn.Linear": repeated(step(dense)),
        "SparseLinear": repeated(step(layer)),
        "without kernels": without_kernels(step(layer), run),
    }
    if backward:
        steps["autograd alone"] = repeated(step(nothing))
    return paired_step_times(steps, "nn.Linear", device=torch.device("cpu"), rounds=rounds, burst=1)


def main() -> None:
    """Print microseconds of a call, and ratios to `nn.Linear`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for case in CASES:
        for backward in (False, True):
            found = times(case, args.rounds, backward=backward)
            told = ", ".join(
                f"{name} {time.seconds / BURST * 1e6:.1f} us ({time.ratio:.2f}x)"
                for name, time in found.items()
            )
            print(f"{case}, {'forward + backward' if backward else 'no grad'}: {told}")


if __name__ == "__main__":
    main()
