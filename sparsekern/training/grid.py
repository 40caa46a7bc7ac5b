"""Which runs a comparison is made of: methods x sparsities x blocks x lengths x rates x seeds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sparsekern.topology.blocks import Block, as_block
from sparsekern.training import recipes
from sparsekern.training.config import DENSE, TrainConfig

AXES = ("sparsity", "block", "multiplier", "lr")
"""Fields of a configuration that the runs of one comparison may differ in."""


class Cell(NamedTuple):
    """What all seeds of a row share; where a method has no use for a field, its plainest value.

    Attributes:
        method: a recipe's name.
        sparsity: 0 for dense.
        block: (outputs, inputs).
        multiplier: of the length.
        lr: learning rate at the start.
    """

    method: str
    sparsity: float
    block: tuple[int, int]
    multiplier: float
    lr: float

    @property
    def name(self) -> str:
        """The method, with what is not plain: "rigl, b16, 5x"; a class without its module."""
        return self.method.rpartition(":")[2] + self._not_plain()

    def _not_plain(self) -> str:
        bh, bw = self.block
        block = "" if self.block == (1, 1) else f", b{bh if bh == bw else f'{bh}x{bw}'}"
        return block + ("" if self.multiplier == 1 else f", {self.multiplier:g}x")

    @property
    def full_name(self) -> str:
        """The same with its sparsity: "rigl 0.98, b16"."""
        sparsity = f" {self.sparsity:.4g}" if self.sparsity else ""
        return self.method + sparsity + self._not_plain()

    def of(self, config: TrainConfig) -> TrainConfig:
        """The configuration of its runs."""
        # what is dense keeps the sparsity asked for: its baseline's width may depend on it
        sparsity = self.sparsity or config.sparsity
        return replace(
            config, sparsity=sparsity, block=self.block, multiplier=self.multiplier, lr=self.lr
        )


class Spec(NamedTuple):
    """One run."""

    cell: Cell
    seed: int

    @property
    def label(self) -> str:
        """In words, but for the learning rate."""
        return f"{self.cell.full_name}, seed {self.seed}"

    def to_json(self) -> dict[str, Any]:
        """The fields that name a run in a result file."""
        return self.cell._asdict() | {"block": list(self.cell.block), "seed": self.seed}

    @classmethod
    def of_json(cls, run: Mapping[str, Any]) -> Spec:
        """What `to_json` wrote, and more."""
        height, width = run["block"]
        fields = {name: run[name] for name in Cell._fields} | {"block": (height, width)}
        return cls(Cell(**fields), run["seed"])


@dataclass(frozen=True)
class Grid:
    """All values of each axis.

    Attributes:
        config: of all runs; `methods` and `seeds` are axes too, and the first of each axis is its
            own value.
        sparsities: in [0, 1).
        blocks: edges or pairs.
        multipliers: of the length.
        lrs: learning rates; the best in validation is what a table shows.
    """

    config: TrainConfig
    sparsities: Sequence[float]
    blocks: Sequence[Block]
    multipliers: Sequence[float]
    lrs: Sequence[float]

    def __post_init__(self) -> None:
        for axis, values in zip(AXES, self._axes(), strict=True):
            for value in values:
                replace(self.config, **{axis: value})  # says what is out of its domain
        for method in self.config.methods:
            recipes.find(method)

    def _axes(self) -> tuple[Sequence[Any], ...]:
        return self.sparsities, self.blocks, self.multipliers, self.lrs

    def cells(self) -> list[Cell]:
        """Dense at its plain length first, then in the order of the axes; none twice."""
        found = [Cell(DENSE, 0.0, (1, 1), 1.0, lr) for lr in self.lrs]
        methods = self.config.methods
        for method, *at in itertools.product(methods, *self._axes()):
            sparsity, block, multiplier, lr = at
            recipe = recipes.find(method)
            found.append(
                Cell(
                    method,
                    float(sparsity) if recipe.sparse else 0.0,
                    as_block(block) if recipe.blocks else (1, 1),
                    float(multiplier),
                    float(lr),
                )
            )
        return list(dict.fromkeys(found))

    def specs(self) -> list[Spec]:
        """Each cell with each seed: all of a seed first, so that what breaks off is balanced."""
        return [Spec(cell, seed) for seed in range(self.config.seeds) for cell in self.cells()]
