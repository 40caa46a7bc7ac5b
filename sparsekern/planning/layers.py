"""The layers of a model that could be sparse, and what reaches them in one training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence
from torch.utils.flop_counter import FlopCounterMode

from sparsekern.blocks import Block, Grid, active_count, as_block
from sparsekern.errors import ConfigError, DtypeError, ModelError
from sparsekern.examples import Call, Examples, recorded
from sparsekern.models import evaluating
from sparsekern.nn.kinds import SPARSE_TYPES, Weight, is_depthwise, weights_of
from sparsekern.planning.cpu_rates import kind_of
from sparsekern.sampling import block_counts
from sparsekern.swap import Pattern, Target, candidates

INDEX_BYTES = 4  # int32


class Held(NamedTuple):
    """What a sparse weight keeps.

    Attributes:
        blocks: active ones.
        weights: active ones, padding of edge blocks left out.
        stored: numbers in whole blocks.
        indices: numbers in the index arrays.
    """

    blocks: int
    weights: int
    stored: int
    indices: int


class Part(NamedTuple):
    """One weight of a layer; a recurrent layer has several.

    Attributes:
        name: in the model, as `sparsify_` calls it.
        weight: its shape and parts.
    """

    name: str
    weight: Weight

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
        return Held(blocks, weights, blocks * math.prod(block), indices)


class Use(NamedTuple):
    """One call of a layer.

    Attributes:
        shape: of its first input.
        tokens: how often each weight is applied: rows of the input, output pixels, or sequences
            times time steps.
        numbers: that go in and come out; of a recurrent layer, of each of its products.
        steps: time steps that follow one another, over all layers and directions; 0 elsewhere.
        dx: whether the backward pass computes a gradient of the input.
    """

    shape: tuple[int, ...]
    tokens: int
    numbers: int
    steps: int
    dx: bool

    @property
    def products(self) -> int:
        """Of each weight: forward, weight gradient, and the input's gradient if it is needed."""
        return 3 if self.dx else 2


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

    @property
    def kind(self) -> str:
        """Key of the CPU rates."""
        if isinstance(self.module, nn.Linear):
            return "linear"
        if isinstance(self.module, nn.Conv1d | nn.Conv2d):
            return kind_of(self.parts[0].weight.taps)
        return "recurrent"

    @property
    def size(self) -> int:
        """Weights if it is dense."""
        return sum(part.size for part in self.parts)

    @property
    def tokens(self) -> int:
        """How often each weight is applied, over all calls."""
        return sum(use.tokens for use in self.uses)

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
        return type(self.module), self.module.extra_repr(), self.dtype, inputs

    def _uses(self) -> Iterator[tuple[Use, Call]]:
        return zip(self.uses, self.calls, strict=True)


class Model(NamedTuple):
    """What there is to plan.

    Attributes:
        layers: those that `sparsify_` would share its sparsity out to.
        depthwise: names of layers that a filter let through, but that have nothing to leave out.
        step_flops: of a training step of the dense model, 3 times its forward products.
        parameters: bytes of its parameters.
        trained: bytes of those that are trained.
        buffers: bytes of its buffers.
    """

    layers: tuple[Layer, ...]
    depthwise: tuple[str, ...]
    step_flops: int
    parameters: int
    trained: int
    buffers: int


def examine(
    model: nn.Module,
    examples: Examples,
    distribution: str,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    exclude: Sequence[Pattern],
) -> Model:
    """Run the model once, and gather its layers; nothing of it changes.

    Raises:
        ConfigError: there is no layer to plan, or an `exclude` pattern matches nothing.
        DtypeError: `model` is itself a layer.
        ModelError: it fails on the examples.
    """
    if weights_of(model):
        raise DtypeError(
            f"`model` must contain layers, as `sparsify_` takes it; got a bare "
            f"{type(model).__name__}: wrap it in nn.Sequential"
        )
    first_stays = distribution == "uniform"
    targets = candidates(model, filter_fn, exclude, first_conv_stays=first_stays)
    depthwise = {t.owner for t in targets if is_depthwise(t.module)}
    targets = [t for t in targets if t.owner not in depthwise]
    if not targets:
        kinds = ", ".join(f"nn.{kind.__name__}" for kind in SPARSE_TYPES)
        raise ConfigError(f"`model` has no layer that could be made sparse ({kinds})")
    owners = {t.module for t in targets}
    calls, flops = _watched(model, examples, owners.__contains__)
    layers = [
        _layer([t for t in targets if t.owner == owner], calls.get(owner, []))
        for owner in dict.fromkeys(t.owner for t in targets)
    ]
    parameters = list(model.parameters())
    return Model(
        tuple(layers),
        tuple(sorted(depthwise)),
        3 * flops,
        _bytes(parameters),
        _bytes(p for p in parameters if p.requires_grad),
        _bytes(model.buffers()),
    )


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _watched(
    model: nn.Module, examples: Examples, wanted: Callable[[nn.Module], bool]
) -> tuple[dict[str, list[Call]], int]:
    """The calls of one forward pass in evaluation mode, and the FLOPs of its products."""
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    with (
        evaluating(model),
        torch.enable_grad(),  # an input that needs no gradient saves a product
        # recurrent layers and attention as products that the counter knows
        torch.backends.cudnn.flags(enabled=not recurrent),
        torch.backends.mkldnn.flags(not recurrent, None, None, None),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        calls = recorded(model, examples, wanted)
    return calls, int(counter.get_total_flops())


def _layer(targets: list[Target], calls: list[Call]) -> Layer:
    module = targets[0].module
    return Layer(
        name=targets[0].owner,
        module=module,
        parts=tuple(Part(t.name, t.weight) for t in targets),
        calls=tuple(calls),
        uses=tuple(_use(targets[0].owner, module, call, targets) for call in calls),
        dtype=targets[0].weight.parameter.dtype,
    )


def _use(name: str, module: nn.Module, call: Call, targets: list[Target]) -> Use:
    given = call.args[0] if call.args else next(iter(call.kwargs.values()), None)
    x = given.data if isinstance(given, PackedSequence) else given
    if not isinstance(x, Tensor) or not x.numel():
        raise ModelError(f"layer {name!r} must get a tensor with numbers in it; got {given!r}")
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        y: Tensor = call.output
        tokens, numbers, steps = y.numel() // module.out_channels, x.numel() + y.numel(), 0
    else:
        tokens, steps = x.numel() // x.shape[-1], _steps(module, given)
        numbers = tokens * sum(sum(t.weight.shape) for t in targets)
    return Use(tuple(x.shape), tokens, numbers, steps, x.requires_grad)


def _steps(module: nn.Module, given: Any) -> int:
    if isinstance(module, nn.Linear):
        return 0
    if not isinstance(module, nn.RNNBase):
        return 1  # a cell
    if isinstance(given, PackedSequence):
        length = len(given.batch_sizes)
    else:
        length = given.shape[1 if module.batch_first and given.dim() == 3 else 0]
    return int(length) * module.num_layers * (2 if module.bidirectional else 1)


def _layout(value: Any) -> Any:
    """Sizes and strides of the tensors in a value; a key."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.requires_grad
    if isinstance(value, tuple | list):
        return tuple(map(_layout, value))
    if isinstance(value, dict):
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
