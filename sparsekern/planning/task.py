"""From decisions to a plan: what each layer costs, and the rows and sums that tell it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from sparsekern.cost.layers import INDEX_BYTES, Layer, Model
from sparsekern.cost.predict import Cut, Times
from sparsekern.planning.curves import density_of
from sparsekern.planning.result import Budget, Option, Plan, Row, Totals
from sparsekern.planning.share import Asked, Decision, reach, settle
from sparsekern.topology.blocks import Block


class Cost(NamedTuple):
    """Of one layer.

    Attributes:
        flops: of a training step (1 multiply-add = 2 FLOPs), whole blocks.
        held: bytes of weights, gradients, optimizer states and indices.
        active: weights.
    """

    flops: int
    held: int
    active: int


@dataclass(frozen=True)
class Task:
    """What is asked of a model.

    Attributes:
        model: what was found in it.
        asked: the layers that take part, and how.
        left: why others stay out, by name.
        sparsity: to share out; None for a budget.
        budget: to keep.
        device: to plan for.
        optimizer_states: numbers for each weight.
        filter_fn: as given.
    """

    model: Model
    asked: Asked
    left: Mapping[str, str]
    sparsity: float | None
    budget: Budget | None
    device: torch.device
    optimizer_states: int
    filter_fn: Callable[[nn.Module, str], bool] | None

    def plan(self, times: Times) -> Plan:
        """The plan with these times.

        Raises:
            ConfigError: the budget can't be reached.
        """
        sparsity, decisions = self.decide(times)
        rows = tuple(self._row(la, decisions.get(la.name), times) for la in self.model.layers)
        return Plan(
            rows=rows,
            sparsity=sparsity,
            budget=self.budget,
            distribution=self.asked.distribution,
            device=str(self.device),
            optimizer_states=self.optimizer_states,
            totals=self._totals(rows),
            filter_fn=self.filter_fn,
            unplanned=self.model.unplanned,
        )

    def decide(self, times: Times) -> tuple[float, dict[str, Decision]]:
        """The sparsity, and what becomes of each layer that takes part."""
        if self.sparsity is not None:
            return self.sparsity, settle(self.asked, self.sparsity, times)
        limits = self.budget.limits if self.budget else {}
        return reach(self.asked, times, self._shares, limits)

    def fitting(self, layer: Layer) -> list[Cut]:
        """The blocks that a layer can be cut into."""
        return [block for block in self.asked.blocks if layer.too_small(block) is None]

    def cost(self, layer: Layer, decision: Decision | None) -> Cost:
        """Of a layer as decided; dense without a decision."""
        chosen = decision.chosen if decision else None
        flops = held = active = 0
        for part, sparsity in zip(layer.parts, _sparsities(layer, decision), strict=True):
            weights, stored, indices = part.size, part.size, 0
            if chosen and sparsity > 0:
                weights, stored, indices, _ = part.held(chosen.block, sparsity)
            copies = 2 + self.optimizer_states if part.trained else 1
            held += stored * layer.dtype.itemsize * copies + INDEX_BYTES * indices
            densely = chosen is not None and chosen.estimate.densely
            numbers = part.size if densely else stored
            sparse = chosen is not None
            flops += sum(part.step_flops(use, numbers, sparse=sparse) for use in layer.uses)
            active += weights
        return Cost(flops, held, active)

    def _shares(self, decisions: Mapping[str, Decision]) -> dict[str, float]:
        """FLOPs and memory as shares of the dense model's."""
        pairs = [
            (self.cost(la, decisions[la.name]), self.cost(la, None)) for la in self.asked.layers
        ]
        flops = sum(planned.flops - dense.flops for planned, dense in pairs)
        held = sum(planned.held - dense.held for planned, dense in pairs)
        return {
            "flops": 1 + flops / max(1, self.model.step_flops),
            "memory": 1 + held / self._dense_held(),
        }

    def _dense_held(self) -> int:
        copies = self.model.trained * (1 + self.optimizer_states)
        return self.model.parameters + copies + self.model.buffers

    def _row(self, layer: Layer, decision: Decision | None, times: Times) -> Row:
        chosen, cost, dense = (
            decision and decision.chosen,
            self.cost(layer, decision),
            self.cost(layer, None),
        )
        blocks, choices = self.fitting(layer), decision.choices if decision else ()
        seconds = times.dense(layer) if layer.uses else None
        shares = zip(layer.parts, _sparsities(layer, decision), strict=True)
        density = density_of(layer, decision.sparsities) if decision else 1.0
        return Row(
            name=layer.name,
            kind=type(layer.module).__name__,
            inputs=tuple(use.shape for use in layer.uses),
            shapes={part.name: tuple(part.weight.parameter.shape) for part in layer.parts},
            sparsities={part.name: share if chosen else 0.0 for part, share in shares},
            block=_public(chosen.block) if chosen else None,
            why=decision.why if decision else self.left[layer.name],
            weights=layer.size,
            active=cost.active,
            options=tuple(Option(_public(c.block), c.estimate.seconds) for c in choices),
            density=density,
            break_even=times.break_even(layer, blocks) if layer.uses and blocks else None,
            dense_seconds=seconds,
            seconds=chosen.estimate.seconds if chosen else seconds,
            dense_flops=dense.flops,
            flops=cost.flops,
            dense_bytes=dense.held,
            bytes=cost.held,
            source=times.source(layer) if layer.uses else "",
        )

    def _totals(self, rows: tuple[Row, ...]) -> Totals:
        return Totals(
            dense_seconds=sum(row.dense_seconds or 0.0 for row in rows),
            seconds=sum(row.seconds or 0.0 for row in rows),
            dense_flops=self.model.step_flops,
            flops=self.model.step_flops + sum(row.flops - row.dense_flops for row in rows),
            dense_bytes=self._dense_held(),
            bytes=self._dense_held() + sum(row.bytes - row.dense_bytes for row in rows),
            weights=sum(row.weights for row in rows),
            active=sum(row.active for row in rows),
        )


def _sparsities(layer: Layer, decision: Decision | None) -> tuple[float, ...]:
    return decision.sparsities if decision else (0.0,) * len(layer.parts)


def _public(block: Cut) -> Block:
    """An edge for a square."""
    return block[0] if block[0] == block[1] else block
