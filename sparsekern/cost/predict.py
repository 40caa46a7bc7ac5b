"""The time of a layer's training step without running it: on a CPU from a table, on a GPU bounds.

The one predictor: `plan` asks it about layers that could be sparse, `profile` about those that are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from sparsekern.cost import cpu_rates
from sparsekern.cost.crossing import BreakEven, last_that_holds
from sparsekern.cost.layers import Layer, Part, Share
from sparsekern.cost.roofline import H200, Problem, Roofline, device_named
from sparsekern.cost.uses import Use
from sparsekern.errors import DeviceError, DtypeError
from sparsekern.ops.cpu.choice import has_numba
from sparsekern.ops.crossover import covers, dense_wins, operand_kind

Cut = tuple[int, int]
"""A block, (outputs, inputs)."""

LEAST_DENSITY = 1e-4
"""Below it no break-even density is looked for."""


class Estimate(NamedTuple):
    """Time of a training step of a sparse layer.

    Attributes:
        seconds: forward and backward.
        densely: `impl=None` would compute it from a dense weight: it saves memory, but no time.
    """

    seconds: float
    densely: bool = False


class Times(Protocol):
    """What is known of the time of layers, per training step."""

    def source(self, layer: Layer) -> str:
        """What the answers are made from, in words."""

    def dense(self, layer: Layer) -> float:
        """Seconds of the dense layer."""

    def sparse(self, layer: Layer, block: Cut, sparsities: Sequence[float]) -> Estimate:
        """Of the layer with parts of these sparsities; 0 is a part that stays dense."""

    def break_even(self, layer: Layer, blocks: Sequence[Cut]) -> BreakEven:
        """With the best of the blocks at each density."""


class Predictor(Times, Protocol):
    """What is predicted, of layers that are sparse already too."""

    def seconds(self, layer: Layer, shares: Sequence[Share | None]) -> float:
        """Of a layer whose parts compute with these shares; None: with the dense weight."""


def predictor(device: torch.device) -> Predictor:
    """Predictions for a kind of device, whether or not there is one here.

    Raises:
        DeviceError: there are none for this kind of device.
    """
    if device.type in ("cpu", "meta"):
        return CpuTimes(torch.get_num_threads())
    if device.type == "cuda":
        return CudaTimes.here()
    raise DeviceError(f"`device` must be cpu or cuda; got {device}")


def crossing(best: Callable[[float], float], dense: float) -> BreakEven:
    """Where sparse seconds, which grow with density, reach dense ones."""
    if best(LEAST_DENSITY) > dense:
        return BreakEven(1.0 if best(1.0) <= dense else 0.0)
    return BreakEven(last_that_holds(lambda density: best(density) <= dense, LEAST_DENSITY, 1.0))


@dataclass(frozen=True)
class CpuTimes:
    """Predictions from the table of `cpu_rates`.

    Attributes:
        threads: that work.
    """

    threads: int

    def source(self, layer: Layer) -> str:
        """The table, and what about it does not hold here."""
        notes = [] if has_numba() else ["with numba, which is not installed here"]
        if layer.dtype is not torch.float32:
            notes.append(f"float32, not {str(layer.dtype).removeprefix('torch.')}")
        where = f"{cpu_rates.SOURCE}, {threads_shown(self.threads)}"
        return ", ".join([f"predicted from {where}", *notes])

    def dense(self, layer: Layer) -> float:
        """Seconds of all calls."""
        return sum(
            cpu_rates.dense_seconds(layer.kind, _work(use, layer.size, layer.size), self.threads)
            for use in layer.uses
        )

    def sparse(self, layer: Layer, block: Cut, sparsities: Sequence[float]) -> Estimate:
        """Seconds of all calls."""
        return Estimate(self.seconds(layer, layer.shares(block, sparsities)))

    def break_even(self, layer: Layer, blocks: Sequence[Cut]) -> BreakEven:
        """All parts at the same density."""
        return crossing(
            lambda density: min(
                self.seconds(layer, layer.shares_of(block, density)) for block in blocks
            ),
            self.dense(layer),
        )

    def seconds(self, layer: Layer, shares: Sequence[Share | None]) -> float:
        """Seconds of all calls; of several blocks, at the rate of the smallest."""
        pairs = list(zip(layer.parts, shares, strict=True))
        sparse = [share for share in shares if share is not None]
        if not sparse:
            return self.dense(layer)
        block = min((share.block for share in sparse), key=min)
        stored = sum(share.stored for share in sparse)
        dense = sum(part.size for part, share in pairs if share is None)
        seconds = 0.0
        for use in layer.uses:
            work = _work(use, stored, stored + dense)
            seconds += cpu_rates.sparse_seconds(layer.kind, block, work, self.threads)
            rest = 2 * use.products * use.tokens * dense / cpu_rates.RATES[layer.kind].dense
            seconds += 1e-9 * rest / self.threads
        return seconds


def threads_shown(threads: int) -> str:
    """In words."""
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _work(use: Use, multiplied: float, weights: float) -> cpu_rates.Work:
    flops = 2 * use.products * use.tokens * multiplied
    return cpu_rates.Work(flops, use.numbers, weights, use.steps)


@dataclass(frozen=True)
class CudaTimes:
    """Lower bounds from the roofline model; the crossover table says what the kernels take on.

    Attributes:
        roofline: of one device.
        described: where its constants come from, in words.
    """

    roofline: Roofline
    described: str

    @staticmethod
    def here() -> CudaTimes:
        """For the present GPU if the model knows it, else for an H200."""
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        known = device_named(name) if name else None
        if known:
            return CudaTimes(Roofline(known), known.name)
        why = f"there are no constants for {name}" if name else "no GPU is here"
        return CudaTimes(Roofline(H200), f"{H200.name} ({why})")

    def source(self, layer: Layer) -> str:
        """The model, and the arithmetic it assumes."""
        return (
            f"predicted from the roofline model of {self.described}, {_operands(layer)}; launches "
            "not counted"
        )

    def dense(self, layer: Layer) -> float:
        """Seconds of all calls."""
        return self.seconds(layer, [None] * len(layer.parts))

    def sparse(self, layer: Layer, block: Cut, sparsities: Sequence[float]) -> Estimate:
        """Seconds of all calls; a density that the crossover table gives to dense takes as long."""
        return self._estimate(layer, layer.shares(block, sparsities))

    def break_even(self, layer: Layer, blocks: Sequence[Cut]) -> BreakEven:
        """Only where the sparse kernels run."""

        def best(density: float) -> float:
            every = [self._estimate(layer, layer.shares_of(b, density)) for b in blocks]
            return min((e.seconds for e in every if not e.densely), default=float("inf"))

        return crossing(best, self.dense(layer))

    def seconds(self, layer: Layer, shares: Sequence[Share | None]) -> float:
        """Seconds of all calls."""
        return sum(
            self._part(layer, use, part, share)
            for part, share in zip(layer.parts, shares, strict=True)
            for use in layer.uses
        )

    def _estimate(self, layer: Layer, shares: Sequence[Share | None]) -> Estimate:
        kind = operand_kind(layer.dtype)
        taken = [
            share if share and _runs_sparse(kind, part, share) else None
            for part, share in zip(layer.parts, shares, strict=True)
        ]
        return Estimate(self.seconds(layer, taken), taken != list(shares))

    def _part(self, layer: Layer, use: Use, part: Part, share: Share | None) -> float:
        if share is None:
            count, problem = _products(layer, use, part, (1, 1), 1.0)
            return count * use.products * self.roofline.dense(problem).seconds
        count, problem = _products(layer, use, part, share.block, share.stored / part.size)
        operations = ["forward", *["dx"] * use.dx, *["dw"] * use.dw]
        return count * sum(self.roofline.predict(name, problem).seconds for name in operations)


def _runs_sparse(kind: str, part: Part, share: Share) -> bool:
    """Whether `impl=None` takes a sparse kernel."""
    block, _, density = share
    conv = part.weight.parameter.dim() > 2
    return covers(block) and not dense_wins(kind, block, density, conv=conv)


def _products(
    layer: Layer, use: Use, part: Part, block: Cut, density: float
) -> tuple[int, Problem]:
    """How many products one after another a weight takes part in, and one of them."""
    rows, cols = part.weight.shape
    read = use.numbers // use.tokens - rows if part.weight.parameter.dim() > 2 else None
    count = 1
    if use.steps and part.weight.name.startswith("hh"):  # a state's weight, step by step
        count = use.steps // sum(p.weight.name.startswith("hh") for p in layer.parts)
    tokens = max(1, use.tokens // count)
    return count, Problem(tokens, cols, rows, block, density, _operands(layer), read)


def _operands(layer: Layer) -> str:
    """Kind of the operands, as the roofline model calls it."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "tf32"}
    if layer.dtype not in names:
        raise DtypeError(f"GPU kernels take float32, float16 and bfloat16; got {layer.dtype}")
    return "fp32" if operand_kind(layer.dtype) == "ieee" else names[layer.dtype]
