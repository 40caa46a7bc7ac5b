"""Which weights of a model are to be sparse, and why the others are not."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsekern.errors import ConfigError
from sparsekern.nn import SparseLayer
from sparsekern.nn.conv import SparseConv
from sparsekern.nn.kinds import SPARSE_KINDS, Weight, is_depthwise, weights_of
from sparsekern.nn.pruned import pruned_tensors, unpruned
from sparsekern.nn.recurrent import SparseRecurrent
from sparsekern.nn.transposed import SparseTransposedLinear
from sparsekern.swap.multiplied import multiplied_by_itself
from sparsekern.swap.patterns import Pattern, matches, shown
from sparsekern.topology import Topology
from sparsekern.topology.blocks import Block

DEFAULT_EXCLUDE = ("*lm_head", "*embed_out", "*output_projection")
"""Output heads of language models, which the field leaves dense."""

_ADAPTER = "lora_"  # begins the name of a part of an adapter, in peft

Filter = Callable[[nn.Module, str], bool]


class Target(NamedTuple):
    """A weight to make sparse: its name, the module that holds it, and what becomes of it.

    Attributes:
        name: of the weight, such as "rnn.hh_l0"; of a layer with one weight, the layer's.
        owner: name of the module.
        module: what holds it.
        weight: shape and parts.
        sparsity: its share.
        block: its block.
        pruned: the mask that `torch.nn.utils.prune` has put on it.
        topology: its connections, where they are known before they are drawn.
    """

    name: str
    owner: str
    module: nn.Module
    weight: Weight
    sparsity: float = 0.0
    block: Block = 1
    pruned: Tensor | None = None
    topology: Topology | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, as torch's dense layer has it."""
        return tuple(self.weight.parameter.shape)

    @property
    def size(self) -> int:
        """Weights."""
        return self.weight.parameter.numel()


class Choice(NamedTuple):
    """What becomes of the weights that could be sparse.

    Attributes:
        targets: those that are to be.
        dense: why each of the others stays dense, by name.
        shares: sparsity that those of them were to have which were targets once.
    """

    targets: list[Target]
    dense: dict[str, str]
    shares: Mapping[str, float] = MappingProxyType({})

    def leaving(self, reasons: dict[str, str]) -> Choice:
        """The same without some of the targets."""
        rest = [target for target in self.targets if target.name not in reasons]
        gone = {  # a sparse layer that stays as it is was asked for that before
            t.name: t.sparsity
            for t in self.targets
            if t.name in reasons and not isinstance(t.module, SparseLayer)
        }
        return Choice(rest, self.dense | reasons, {**self.shares, **gone})


def all_targets(model: nn.Module, *, sparse: bool = False) -> list[Target]:
    """Every weight of the model that has a sparse counterpart.

    Args:
        model: what holds them.
        sparse: with those that are sparse already, which can be made sparser.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            if sparse and type(module) in SPARSE_KINDS:  # none that was parametrized
                found.append(Target(name, name, module, _stand_in(module), block=module.block))
            continue
        masks = pruned_tensors(module)
        for own, weight in weights_of(unpruned(module)).items():
            full = f"{name}.{own}" if own else name
            mask = masks.get(f"weight_{own}" if own else "weight")
            found.append(Target(full, name, module, weight, pruned=mask))
    return found


def _stand_in(layer: SparseLayer) -> Weight:
    """Shape and parts of a sparse layer's weight, without its numbers."""
    groups, taps = layer._cut
    dtype = layer.values.dtype
    like = torch.empty(layer.weight_shape, dtype=dtype, device="meta")
    return Weight("", like, groups, taps, isinstance(layer, SparseTransposedLinear))


def candidates(
    model: nn.Module,
    filter_fn: Filter | None,
    exclude: Sequence[Pattern],
    *,
    first_conv_stays: bool,
) -> list[Target]:
    """The weights that `sparsify_` would share its sparsity out to, with these arguments of it.

    Raises:
        ConfigError: an `exclude` pattern matches nothing.
    """
    known = all_targets(model)
    chosen = choose(model, known, filter_fn, exclude, first_conv_stays=first_conv_stays)
    return [target for target in chosen.targets if target.pruned is None]


def choose(
    model: nn.Module,
    known: list[Target],
    filter_fn: Filter | None,
    exclude: Sequence[Pattern],
    *,
    first_conv_stays: bool,
    named: bool = False,
) -> Choice:
    """Sort the model's targets by what the caller and the defaults say.

    `named`: each layer is named by the caller, so that the field's habits do not count.

    Raises:
        ConfigError: an `exclude` pattern matches nothing.
    """
    excluded = _excluded(model, known, exclude)
    why_not = _by_filter(filter_fn) if filter_fn else _by_default(model, first_conv_stays, named)
    targets, dense = [], {}
    for target in known:
        reason = "it has no weights" if not target.size else excluded.get(target.name)
        reason = reason or why_not(target)
        if reason:
            dense[target.name] = reason
        else:
            targets.append(target)
    return Choice(targets, dense)


def _excluded(model: nn.Module, known: list[Target], exclude: Sequence[Pattern]) -> dict[str, str]:
    """Targets that a pattern of `exclude` leaves out, with all that a module contains."""
    out = {}
    names = dict.fromkeys([n for n, _ in model.named_modules()] + [t.name for t in known])
    for pattern in [exclude] if isinstance(exclude, str | re.Pattern) else exclude:
        hits = [name for name in names if matches(pattern, name)]
        if not hits:
            raise ConfigError(f"`exclude` pattern {shown(pattern)} matches no module of the model")
        for target in known:
            if any(_is_within(target.name, hit) for hit in hits):
                out[target.name] = "`exclude` names it"
    return out


def _by_filter(filter_fn: Filter) -> Callable[[Target], str]:
    return lambda target: (
        "" if filter_fn(target.module, target.owner) else "`filter_fn` leaves it out"
    )


def _by_default(model: nn.Module, first_conv_stays: bool, named: bool) -> Callable[[Target], str]:
    """What the field leaves dense; what is sparse or pruned was somebody's choice already."""
    shared = shared_parameters(model)
    first = _first_convolution(model) if first_conv_stays else None
    multiplied = multiplied_by_itself(model)

    def why_not(target: Target) -> str:
        chosen = named or target.pruned is not None or isinstance(target.module, SparseLayer)
        if not shared.isdisjoint(map(id, target.module.parameters(recurse=False))):
            return "it shares a parameter with another module"
        if is_depthwise(target.module):
            return "it is a depthwise convolution"
        return "" if chosen else habit(target)

    def habit(target: Target) -> str:
        if any(matches(p, target.owner) for p in DEFAULT_EXCLUDE):
            return "it is the output head of a language model"
        if any(part.startswith(_ADAPTER) for part in target.owner.split(".")):
            return "it is a part of a low-rank adapter"
        if target.module is first:
            return "it is the model's first convolution, and the distribution is uniform"
        return multiplied.get(id(target.module), "")

    return why_not


def aliases(model: nn.Module, target: Target) -> tuple[str, ...]:
    """All names by which a weight may be called: ours, and torch's of its parameter."""
    parent, _, own = target.owner.rpartition(".")
    if isinstance(model.get_submodule(parent), SparseRecurrent):
        torchs = f"{parent}.weight_{own}" if parent else f"weight_{own}"
        return target.name, f"{target.name}.weight", torchs
    if isinstance(target.module, nn.MultiheadAttention):
        return target.name, f"{target.name}.weight", f"{target.name}_weight"
    if target.weight.name:
        return target.name, f"{target.owner}.weight_{target.weight.name}"
    return target.name, f"{target.name}.weight"


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that more than one module holds, as tied embeddings do."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _is_within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _first_convolution(model: nn.Module) -> nn.Module | None:
    return next(
        (
            m
            for m in model.modules()
            if isinstance(m, SparseConv) or type(m) in (nn.Conv1d, nn.Conv2d)
        ),
        None,
    )
