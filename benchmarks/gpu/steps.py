"""Part `steps`: whole training steps, dense and sparse in turns, eager and as a CUDA graph.

One layer and the small GPT, in bf16 with AdamW: forward, loss, backward, optimizer. An eager step
is timed by the host's clock, Python included; a graph's replay by the device. Peak memory is what
the process holds at most beyond its start; beside it stands what `sparsekern.profile` predicts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gpu.agenda import Case, Row
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import HEADLINE, Plan
from sparsekern import SparseLinear, profile, sparsify_
from sparsekern.cost.timing import HostClock, take_turns
from sparsekern.models import small_gpt

KIND, DTYPE = "bf16", torch.bfloat16
VOCABULARY = 256
BURST, ROUNDS = 5, 12

Loss = Callable[[Tensor], Tensor]


class Size(NamedTuple):
    """What is trained: a layer, or a GPT if it has a depth."""

    width: int
    outputs: int = 0
    depth: int = 0
    sequence: int = 1
    batch: int = 1

    @property
    def name(self) -> str:
        """For people."""
        if self.depth:
            return f"GPT of width {self.width} and depth {self.depth}"
        return f"layer {self.width}x{self.outputs}"

    @property
    def tokens(self) -> int:
        """In a step."""
        return self.batch * self.sequence


class Training(NamedTuple):
    """A model, its optimizer, one batch and the loss."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    x: Tensor
    loss: Loss

    def step(self) -> None:
        """One weight step."""
        self.optimizer.zero_grad()
        self.x.grad = None
        torch.autograd.backward(self.loss(self.model(self.x)))
        self.optimizer.step()


def steps(plan: Plan, device: torch.device) -> list[Case]:
    """The layer with every block, then the GPTs; eager, then as a graph."""
    del device
    shape = plan.shapes[0]
    layer = Size(shape.K, shape.N, batch=plan.step_tokens)
    sizes = [(layer, edge) for edge in plan.blocks]
    for width, depth, sequence, batch in reversed(plan.gpts):
        gpt = Size(width, depth=depth, sequence=sequence, batch=batch)
        sizes += [(gpt, edge) for edge in plan.gpt_blocks]
    return [
        Case(f"step {size.name} {edge} {mode}", partial(run, size=size, edge=edge), 3.0)
        for size, edge in sizes
        for mode, run in (("eager", _eager), ("graph", _graph))
    ]


def _eager(bench: Bench, size: Size, edge: int) -> Iterator[Row]:
    """Time, and peak memory predicted and measured."""
    row, verdict = _row(bench, size, edge, "eager")
    if verdict != "ok":
        yield row
        return
    dense, dense_memory = _with_memory(bench, size, None)
    sparse, memory = _with_memory(bench, size, edge)
    row |= memory | {f"dense_{name}": value for name, value in dense_memory.items()}
    clock, dry = HostClock(bench.device), bench.plan.dry
    runs = {"sparse": sparse.step, "dense": dense.step}
    timing = take_turns(
        lambda step: clock.wall(step, 1 if dry else BURST), runs, bench.times(ROUNDS)
    )
    row |= {"ms": timing.ms("sparse"), "dense_ms": timing.ms("dense")}
    yield row | {"ratio": statistics.median(timing.ratios("dense", "sparse"))}


def _graph(bench: Bench, size: Size, edge: int) -> Iterator[Row]:
    """Replays of a captured step, which wait for nobody."""
    row, verdict = _row(bench, size, edge, "graph")
    if verdict != "ok":
        yield row
        return
    made = {"sparse": _training(bench, size, edge), "dense": _training(bench, size, None)}
    replays = {name: bench.clock.capture(training.step)[0] for name, training in made.items()}
    timing = bench.time(replays)
    row |= {"ms": timing.ms("sparse"), "dense_ms": timing.ms("dense")}
    yield row | {"ratio": statistics.median(timing.ratios("dense", "sparse"))}


def _row(bench: Bench, size: Size, edge: int, mode: str) -> tuple[Row, str]:
    verdict = bench.gate.verdict("three", (edge, edge), KIND)
    row: Row = {"what": f"step of {size.name}", "mode": mode, "tokens": size.tokens}
    row |= {"block": [edge, edge], "kind": KIND, "density": HEADLINE, "status": verdict}
    return row | {"ms": None, "dense_ms": None, "ratio": None}, verdict


def _training(bench: Bench, size: Size, edge: int | None) -> Training:
    """A fresh one; dense without an edge."""
    torch.manual_seed(0)
    model, x, loss = (_gpt if size.depth else _layer)(size, edge)
    model, x = model.to(bench.device, DTYPE), x.to(bench.device)
    x.requires_grad_(x.is_floating_point())  # there: a copy's gradient would travel back
    # a graph can't ask the host for the number of the step
    fixed = bench.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, capturable=fixed)
    return Training(model, optimizer, x, loss)


def _layer(size: Size, edge: int | None) -> tuple[nn.Module, Tensor, Loss]:
    model: nn.Module = (
        nn.Linear(size.width, size.outputs)
        if edge is None
        else SparseLinear(
            size.width, size.outputs, sparsity=1 - HEADLINE, block=edge, impl="triton"
        )
    )
    x = torch.randn(size.tokens, size.width).to(DTYPE)
    return model, x, _squares


def _squares(y: Tensor) -> Tensor:
    return y.square().mean()


def _gpt(size: Size, edge: int | None) -> tuple[nn.Module, Tensor, Loss]:
    heads = max(1, size.width // 64)
    model = small_gpt(VOCABULARY, size.sequence, size.width, size.depth, heads)
    if edge is not None:
        sparsify_(model, sparsity=1 - HEADLINE, block=edge, distribution="uniform", impl="triton")
    tokens = torch.randint(VOCABULARY, (size.batch, size.sequence))
    return model, tokens, _next_token


def _next_token(scores: Tensor) -> Tensor:
    """Any target costs the same: here token 0."""
    flat = scores.flatten(0, 1).float()
    return functional.cross_entropy(flat, flat.new_zeros(len(flat), dtype=torch.long))


def _with_memory(bench: Bench, size: Size, edge: int | None) -> tuple[Training, Row]:
    """A training after three steps, and its peak in MiB."""
    cuda = bench.device.type == "cuda"
    base = torch.cuda.memory_allocated() if cuda else 0
    made = _training(bench, size, edge)
    made.step()  # makes the optimizer's state, and whatever is made once
    made.step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    made.step()
    peak = (torch.cuda.max_memory_allocated() - base) / 2**20 if cuda else None
    report = profile(made.model, made.x, optimizer=made.optimizer, loss=made.loss, measure=False)
    return made, {"peak_mib": peak, "predicted_peak_mib": report.peak_bytes / 2**20}
