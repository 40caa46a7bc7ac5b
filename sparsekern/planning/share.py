"""Which layers become sparse, how sparse, and in which blocks, given what time they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sparsekern.cost.layers import Layer
from sparsekern.cost.predict import Cut, Estimate, Times
from sparsekern.distribution import DISTRIBUTIONS, distribute
from sparsekern.errors import ConfigError
from sparsekern.topology.blocks import check_sparsity

LEAST_SHARE = 0.5
"""Of the weights that a layer would have if none were left dense. Below it, a layer is not starved
so that another one can stay dense: time is not worth accuracy."""

HALVINGS = 30
HIGHEST_SPARSITY = 1 - 1e-7


class Choice(NamedTuple):
    """A layer with one block at its planned density.

    Attributes:
        block: (outputs, inputs).
        estimate: its time.
    """

    block: Cut
    estimate: Estimate


@dataclass(frozen=True)
class Decision:
    """What becomes of a layer.

    Attributes:
        sparsities: of its parts, as they would be; all 0 if it has no share.
        choices: the blocks that fit.
        block: that is planned; None: it stays dense.
        why: in words, if it stays dense, or is sparse although dense is faster.
    """

    sparsities: tuple[float, ...]
    choices: tuple[Choice, ...]
    block: Cut | None
    why: str = ""

    @property
    def chosen(self) -> Choice | None:
        """The planned one."""
        return next((choice for choice in self.choices if choice.block == self.block), None)


@dataclass(frozen=True)
class Asked:
    """What a plan is made for.

    Attributes:
        layers: that share the sparsity out; all of them are called, and some block fits each.
        blocks: to choose from.
        distribution: its name.
    """

    layers: tuple[Layer, ...]
    blocks: tuple[Cut, ...]
    distribution: str

    def __post_init__(self) -> None:
        if not isinstance(self.distribution, str) or self.distribution not in DISTRIBUTIONS:
            raise ConfigError(
                f"`distribution` must be one of {sorted(DISTRIBUTIONS)}, by which a plan can share "
                f"out again what a dense layer keeps; got {self.distribution!r}"
            )


def settle(asked: Asked, sparsity: float, times: Times) -> dict[str, Decision]:
    """Decide for every layer, by name.

    A layer that is faster dense stays dense and the others take up its share by the same
    distribution, which may make more of them faster dense; and so on, the one that gains most
    first. What would leave the others less than `LEAST_SHARE` of their weights stays sparse. A
    convolution keeps a block in each of its groups.
    """
    dense: dict[str, Decision] = {}
    kept: set[str] = set()
    while True:
        decided = _shared(asked, dense, sparsity, times)
        slower = [
            (gain, layer)
            for layer in asked.layers
            if layer.name not in dense and layer.name not in kept
            for gain in [_gain(layer, decided[layer.name], times)]
            if gain > 0
        ]
        if not slower:
            return {
                layer.name: dense.get(layer.name) or _told(layer, decided[layer.name], times)
                for layer in asked.layers
            }
        for _, layer in sorted(slower, key=lambda pair: -pair[0]):
            decision = decided[layer.name]
            if _affordable(asked, {*dense, layer.name}, sparsity):
                dense[layer.name] = _left(decision, times.dense(layer))
            else:
                kept.add(layer.name)


def reach(
    asked: Asked,
    times: Times,
    shares: Callable[[Mapping[str, Decision]], Mapping[str, float]],
    limits: Mapping[str, float],
) -> tuple[float, dict[str, Decision]]:
    """The lowest sparsity that keeps within limits, and its decisions.

    Args:
        asked: what to plan.
        times: of the layers.
        shares: FLOPs or memory, as a share of the dense model's, of decisions, by name.
        limits: of these shares.

    Raises:
        ConfigError: a limit lies below what the highest sparsity reaches.
    """

    def within(decisions: Mapping[str, Decision]) -> bool:
        found = shares(decisions)
        return all(found[name] <= limit for name, limit in limits.items())

    low, high = 0.0, HIGHEST_SPARSITY
    least, best = settle(asked, low, times), settle(asked, high, times)
    if within(least):
        return low, least
    if not within(best):
        found = shares(best)
        missed = [name for name, limit in limits.items() if found[name] > limit]
        raise ConfigError(
            "`budget` can't be reached with a block left in every layer: "
            + ", ".join(
                f"the lowest {name} is {found[name]:.3g} of the dense model's; got {limits[name]:g}"
                for name in missed
            )
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        decisions = settle(asked, middle, times)
        if within(decisions):
            high, best = middle, decisions
        else:
            low = middle
    return high, best


def _shared(
    asked: Asked, dense: Mapping[str, Decision], sparsity: float, times: Times
) -> dict[str, Decision]:
    """Decisions for the layers that are not dense already."""
    rest = [layer for layer in asked.layers if layer.name not in dense]
    if not rest:
        return {}
    highest = 1 - LEAST_SHARE * (1 - sparsity)
    adjusted = min(_adjusted(asked, dense, sparsity), highest)
    shapes = {part.name: tuple(part.weight.parameter.shape) for la in rest for part in la.parts}
    shares = distribute(shapes, check_sparsity(adjusted), asked.distribution)
    return {
        layer.name: _fastest(
            asked,
            layer,
            tuple(min(shares[part.name], part.highest(asked.blocks)) for part in layer.parts),
            times,
        )
        for layer in rest
    }


def _adjusted(asked: Asked, dense: Mapping[str, object] | set[str], sparsity: float) -> float:
    """Sparsity of the others, if these stay dense; may be impossible."""
    total = sum(layer.size for layer in asked.layers)
    rest = sum(layer.size for layer in asked.layers if layer.name not in dense)
    return sparsity * total / rest if rest else (0.0 if sparsity == 0 else float("inf"))


def _affordable(asked: Asked, dense: set[str], sparsity: float) -> bool:
    return 1 - _adjusted(asked, dense, sparsity) >= LEAST_SHARE * (1 - sparsity)


def _fastest(asked: Asked, layer: Layer, sparsities: tuple[float, ...], times: Times) -> Decision:
    """The block of the least time; of several, one that really runs sparse."""
    if max(sparsities) == 0:
        share = f"its share under {asked.distribution!r} is all of its weights"
        return Decision(sparsities, (), None, share)
    fitting = [block for block in asked.blocks if layer.takes(block, sparsities)]
    choices = tuple(Choice(b, times.sparse(layer, b, sparsities)) for b in fitting)
    return Decision(sparsities, choices, min(choices, key=_order).block)


def _order(choice: Choice) -> tuple[float, bool]:
    return choice.estimate.seconds, choice.estimate.densely


def _gain(layer: Layer, decision: Decision, times: Times) -> float:
    """Seconds that dense saves; 0 where it is dense anyway."""
    if not decision.choices:
        return 0.0
    # one that a GPU computes from a dense weight takes as long, and saves memory: it stays sparse
    return min(decision.choices, key=_order).estimate.seconds - times.dense(layer)


def _left(decision: Decision, dense: float) -> Decision:
    return Decision(decision.sparsities, decision.choices, None, _faster(decision, dense))


def _faster(decision: Decision, dense: float) -> str:
    best = min(decision.choices, key=_order)
    height, width = best.block
    block = str(height) if height == width else f"{height}x{width}"
    return (
        f"dense is faster: {1e3 * dense:.3g} ms against {1e3 * best.estimate.seconds:.3g} ms "
        f"in blocks of {block}"
    )


def _told(layer: Layer, decision: Decision, times: Times) -> Decision:
    """With a remark on a sparse layer that saves no time."""
    if decision.chosen is None:
        return decision
    dense, why = times.dense(layer), decision.why
    if decision.chosen.estimate.seconds > dense:
        why = (
            f"{_faster(decision, dense)}, but the other layers would have to give up more than "
            f"{1 - LEAST_SHARE:.0%} of their weights for it"
        )
    elif decision.chosen.estimate.densely:
        why = "computed from a dense weight at this density: it saves memory, not time"
    return Decision(decision.sparsities, decision.choices, decision.block, why)
