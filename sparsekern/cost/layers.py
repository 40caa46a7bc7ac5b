"""The layers of a model that could be sparse: weights, calls, and what they cost in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsekern.cost.cpu_rates import kind_of
from sparsekern.cost.examples import Call
from sparsekern.cost.uses import Use
from sparsekern.errors import ConfigError, DtypeError
from sparsekern.nn.kinds import Weight
from sparsekern.topology.blocks import Block, Grid, active_count, as_block
from sparsekern.topology.sampling import block_counts

INDEX_BYTES = 4  # int32


class Held(NamedTuple):
    """What a sparse weight keeps.

    Attributes:
        weights: active ones, padding of edge blocks left out.
        stored: numbers in whole blocks.
        indices: numbers in the index arrays.
        density: active share of the blocks.
    """

    weights: int
    stored: int
    indices: int
    density: float


class Share(NamedTuple):
    """What a sparse product works with of one weight.

    Attributes:
        block: (outputs, inputs).
        stored: numbers in whole blocks.
        density: active share of the blocks.
    """

    block: tuple[int, int]
    stored: float
    density: float


class Part(NamedTuple):
    """One weight of a layer; a recurrent layer has several.

    Attributes:
        name: in the model, as `sparsify_` calls it.
        weight: its shape and parts.
        trained: whether a training step makes a gradient of it.
    """

    name: str
    weight: Weight
    trained: bool

    @property
    def size(self) -> int:
        """Weights if it is dense."""
        return self.weight.parameter.numel()

    def too_small(self, block: tuple[int, int]) -> str | None:
        """Why it can't be cut into such blocks, in words; None if it can."""
        height, width = self.weight.part
        fits = block[0] <= height and block[1] <= width
        return None if fits else f"no block fits its {height} x {width} channels"

    def has_room(self, block: tuple[int, int], sparsity: float) -> bool:
        """Whether there is a block for each of its groups, as `sparsify_` asks for."""
        blocks = round(active_count(self.size, sparsity) / math.prod(block))
        return self.weight.groups == 1 or blocks >= self.weight.groups

    def highest(self, blocks: Iterable[tuple[int, int]]) -> float:
        """The sparsity at which a block is left in each group; below 1 only if there are several.

        Args:
            blocks: to choose from; some fit.
        """
        groups = self.weight.groups
        least = min(math.prod(block) for block in blocks if self.too_small(block) is None)
        return 1.0 if groups == 1 else max(0.0, 1 - groups * least / self.size)

    def held(self, block: tuple[int, int], sparsity: float) -> Held:
        """Counts of the topology that `sparsify_` draws, without drawing it."""
        grid = Grid.of(self.weight.shape, block, self.weight.groups, self.weight.taps)
        blocks, weights = block_counts(grid, active_count(self.size, sparsity))
        indices = 2 * grid.rows + 2 * grid.groups * grid.cols + 2 + 3 * blocks
        return Held(weights, blocks * math.prod(block), indices, blocks / grid.total)

    def share(self, block: tuple[int, int], sparsity: float) -> Share:
        """What a product works with, of that topology."""
        held = self.held(block, sparsity)
        return Share(block, held.stored, held.density)

    def step_flops(self, use: Use, numbers: int, *, sparse: bool = False) -> int:
        """FLOPs of a call and its backward pass (1 multiply-add = 2 FLOPs).

        Args:
            use: the call.
            numbers: of the weight, that are multiplied.
            sparse: whether it belongs to a sparse layer.
        """
        dw = use.tokens if use.dw and self.trained else 0
        return 2 * numbers * (use.tokens + dw + self._input_gradients(use, sparse))

    def _input_gradients(self, use: Use, sparse: bool) -> int:
        name = self.weight.name
        state = name.startswith("hh")
        if state and not sparse:
            return use.states
        # a sparse layer computes that of the first state in any case
        inner = state or ("_l" in name and not name.startswith("ih_l0"))  # of a stack, a projection
        return use.tokens if use.dx or (inner and use.dw) else 0


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer that could be sparse.

    Attributes:
        name: in the model.
        module: torch's layer.
        parts: its weights.
        calls: on the example inputs; none if the model never calls it.
        uses: the facts of each call.
        dtype: of its weights.
    """

    name: str
    module: nn.Module
    parts: tuple[Part, ...]
    calls: tuple[Call, ...]
    uses: tuple[Use, ...]
    dtype: torch.dtype

    @staticmethod
    def of(
        name: str,
        module: nn.Module,
        parts: Sequence[Part],
        uses: Sequence[Use],
        calls: Sequence[Call] = (),
    ) -> Layer:
        """From uses in which a gradient came back to the output."""
        trained = any(part.trained for part in parts)
        return Layer(
            name=name,
            module=module,
            parts=tuple(parts),
            calls=tuple(calls),
            uses=tuple(use._replace(dw=use.dw and trained) for use in uses),
            dtype=parts[0].weight.parameter.dtype,
        )

    @property
    def kind(self) -> str:
        """Key of the CPU rates."""
        weight = self.parts[0].weight
        if weight.name:
            return "recurrent"
        return "linear" if weight.parameter.dim() == 2 else kind_of(weight.taps)

    @property
    def size(self) -> int:
        """Weights if it is dense."""
        return sum(part.size for part in self.parts)

    @property
    def tokens(self) -> int:
        """How often each weight is applied, over all calls."""
        return sum(use.tokens for use in self.uses)

    def shares(
        self, block: tuple[int, int], sparsities: Sequence[float]
    ) -> tuple[Share | None, ...]:
        """What products work with once `sparsify_` has made parts sparse; those of 0 stay dense."""
        pairs = zip(self.parts, sparsities, strict=True)
        return tuple(
            part.share(block, sparsity) if sparsity > 0 else None for part, sparsity in pairs
        )

    def shares_of(self, block: tuple[int, int], density: float) -> tuple[Share, ...]:
        """All parts at one density, to the number."""
        return tuple(Share(block, density * part.size, density) for part in self.parts)

    def too_small(self, block: tuple[int, int]) -> str | None:
        """Why one of its weights can't be cut into such blocks, in words."""
        return next((why for part in self.parts if (why := part.too_small(block))), None)

    def takes(self, block: tuple[int, int], sparsities: Sequence[float]) -> bool:
        """Whether `sparsify_` takes the block at these sparsities; parts of 0 stay dense."""
        return all(
            part.too_small(block) is None and part.has_room(block, sparsity)
            for part, sparsity in zip(self.parts, sparsities, strict=True)
            if sparsity > 0
        )

    def key(self) -> tuple[Any, ...]:
        """Equal for layers that take the same time: kind, arguments, inputs and dtype."""
        inputs = tuple((u, *map(_layout, (c.args, c.kwargs))) for u, c in self._uses())
        trained = tuple(p.requires_grad for p in self.module.parameters())
        return type(self.module), self.module.extra_repr(), self.dtype, trained, inputs

    def _uses(self) -> Iterator[tuple[Use, Call]]:
        return zip(self.uses, self.calls, strict=True)


class Model(NamedTuple):
    """What there is to plan.

    Attributes:
        layers: those that `sparsify_` would share its sparsity out to.
        depthwise: names of layers that a filter let through, but that have nothing to leave out.
        unplanned: why weights that `sparsify_` would take are not looked at, by name.
        step_flops: of the products of a training step of the model as it is.
        parameters: bytes of its parameters.
        trained: bytes of those that a training step makes a gradient of.
        buffers: bytes of its buffers.
    """

    layers: tuple[Layer, ...]
    depthwise: tuple[str, ...]
    unplanned: Mapping[str, str]
    step_flops: int
    parameters: int
    trained: int
    buffers: int


def _layout(value: Any) -> Any:
    """Sizes and strides of the tensors in a value; a key."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.requires_grad
    if isinstance(value, tuple | list):
        return tuple(map(_layout, value))
    if isinstance(value, Mapping):
        return tuple((name, _layout(part)) for name, part in value.items())
    return repr(value)


def blocks_of(blocks: Sequence[Block]) -> tuple[tuple[int, int], ...]:
    """Check the blocks to choose from.

    Raises:
        ConfigError: there is none, or an edge is below 1.
        DtypeError: one is neither an int nor a pair of ints.
    """
    if not isinstance(blocks, tuple | list):
        raise DtypeError(f"`blocks` must be a tuple of blocks; got {blocks!r}")
    if not blocks:
        raise ConfigError("`blocks` must name a block to choose; got none")
    return tuple(dict.fromkeys(as_block(block) for block in blocks))
