"""`Plan`: what to make sparse in a model, and what it is expected to cost."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from sparsekern.cost.crossing import BreakEven
from sparsekern.errors import ConfigError, DtypeError
from sparsekern.swap import Planned
from sparsekern.topology.blocks import Block


@dataclass(frozen=True)
class Budget:
    """What a sparse model may cost, as shares of the dense model's, in (0, 1].

    Attributes:
        flops: of a training step on the example inputs: the products of forward and of the
            gradients that it needs (1 multiply-add = 2 FLOPs), as `sparsekern.profile` counts
            them; biases, activations and the optimizer are not counted.
        memory: bytes held between two steps: parameters, gradients, optimizer states, buffers and
            index arrays. Activations are not counted.

    Raises:
        ConfigError: neither is given, or one lies outside (0, 1].
        DtypeError: one is not a number.
    """

    flops: float | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        if not self.limits:
            raise ConfigError("`budget` must limit `flops`, `memory` or both; got neither")
        for name, limit in self.limits.items():
            if isinstance(limit, bool) or not isinstance(limit, int | float):
                raise DtypeError(f"`budget` {name} must be a number; got {limit!r}")
            if not 0 < limit <= 1:
                raise ConfigError(
                    f"`budget` {name} is a share of the dense model's, in (0, 1]; got {limit}"
                )

    @property
    def limits(self) -> dict[str, float]:
        """Those that are given, by name."""
        given = {"flops": self.flops, "memory": self.memory}
        return {name: limit for name, limit in given.items() if limit is not None}


class Option(NamedTuple):
    """A layer with one of the blocks, at its planned density.

    Attributes:
        block: edge, or (outputs, inputs).
        seconds: of the forward and backward of a training step.
    """

    block: Block
    seconds: float


@dataclass(frozen=True)
class Row:
    """The plan for one layer; a recurrent layer is one, with all its matrices.

    Attributes:
        name: in the model.
        kind: class of the layer.
        inputs: shape of its input at each call; none if the model never calls it.
        shapes: of its weights, by name in the model.
        sparsities: planned, by the same names; 0 is dense.
        block: planned; None leaves the layer dense.
        why: why it stays dense, or another remark; "" if there is nothing to say.
        weights: how many it has if it is dense.
        active: how many it has by the plan.
        options: seconds with each block that fits, at the density it has or would have.
        density: that density.
        break_even: largest density at which the best of these blocks is no slower than dense.
        dense_seconds: forward and backward of a training step if it is dense; None if never called.
        seconds: by the plan.
        dense_flops: of a training step: forward, and the gradients of weight and input where they
            are needed (1 multiply-add = 2 FLOPs).
        flops: by the plan, executed: whole blocks.
        dense_bytes: of weights, gradients and optimizer states; biases are not counted.
        bytes: by the plan, index arrays included.
        source: what the times are made from.
    """

    name: str
    kind: str
    inputs: tuple[tuple[int, ...], ...]
    shapes: Mapping[str, tuple[int, ...]]
    sparsities: Mapping[str, float]
    block: Block | None
    why: str
    weights: int
    active: int
    options: tuple[Option, ...]
    density: float
    break_even: BreakEven | None
    dense_seconds: float | None
    seconds: float | None
    dense_flops: int
    flops: int
    dense_bytes: int
    bytes: int
    source: str

    @property
    def fastest(self) -> Block | None:
        """The block of the least time, whatever was planned; None if dense takes less."""
        best = min(self.options, key=lambda option: option.seconds, default=None)
        if best is None or self.dense_seconds is None or best.seconds > self.dense_seconds:
            return None
        return best.block


class Totals(NamedTuple):
    """Sums over a model, dense and by the plan.

    Attributes:
        dense_seconds: of the forward and backward of the layers in the plan.
        seconds: the same by the plan.
        dense_flops: of a training step of the whole model.
        flops: the same by the plan.
        dense_bytes: held by the whole model between two steps.
        bytes: the same by the plan.
        weights: of the layers in the plan.
        active: the same by the plan.
    """

    dense_seconds: float
    seconds: float
    dense_flops: int
    flops: int
    dense_bytes: int
    bytes: int
    weights: int
    active: int


@dataclass(frozen=True)
class Plan:
    """What to make sparse in a model; `sparsify_(model, plan=plan)` does it.

    Attributes:
        rows: one for each layer that `sparsify_` could replace.
        sparsity: that was shared out: the one asked for, or the lowest that keeps the budget.
        budget: that was asked for.
        distribution: by which it was shared out.
        device: that it is for.
        optimizer_states: numbers that the optimizer keeps for each weight.
        totals: of the model.
        filter_fn: as given.
        unplanned: why weights that `sparsify_` could replace have no row and stay dense, by name.
    """

    rows: tuple[Row, ...]
    sparsity: float
    budget: Budget | None
    distribution: str
    device: str
    optimizer_states: int
    totals: Totals
    filter_fn: Callable[[nn.Module, str], bool] | None = field(default=None, repr=False)
    unplanned: Mapping[str, str] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `sparsify_`; layers that are not named in it stay dense."""
        sparse = [row for row in self.rows if row.block is not None]
        shares = {
            glob.escape(name): share for row in sparse for name, share in row.sparsities.items()
        }
        blocks = {glob.escape(name): row.block for row in sparse for name in row.sparsities}
        made = {"sparsity": self.sparsity, "block": blocks, "distribution": shares | {"*": 0.0}}
        return made if self.filter_fn is None else made | {"filter_fn": self.filter_fn}

    @property
    def planned(self) -> dict[str, Planned]:
        """The weights that are to be sparse, by name, as `sparsify_(model, plan=plan)` takes them.

        A plan made by hand or read from elsewhere needs only this, `sparsity` and `filter_fn`.
        """
        return {
            name: Planned(tuple(row.shapes[name]), share, row.block)
            for row in self.rows
            if row.block is not None
            for name, share in row.sparsities.items()
            if share > 0
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, in values that JSON knows."""
        from sparsekern.planning.show import as_dict  # noqa: PLC0415  it imports this file

        return as_dict(self)

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def to_csv(self) -> str:
        """A line for each layer, with a head; times in seconds, the step's FLOPs, bytes."""
        from sparsekern.planning.show import as_csv  # noqa: PLC0415  it imports this file

        return as_csv(self)

    def to_markdown(self) -> str:
        """The table and its notes as Markdown."""
        from sparsekern.planning.show import as_markdown  # noqa: PLC0415  it imports this file

        return as_markdown(self)

    def __str__(self) -> str:
        from sparsekern.planning.show import as_text  # noqa: PLC0415  it imports this file

        return as_text(self)
