"""`sparsify_` and `densify_`: turn the layers of a model into sparse ones, and back."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from sparsekern.distribution import distribute
from sparsekern.errors import ConfigError, DtypeError, ShapeError
from sparsekern.nn import SparseLayer
from sparsekern.nn.connections import topology_of_largest
from sparsekern.nn.conv_arguments import check_groups
from sparsekern.nn.kinds import SPARSE_TYPES, Weight, convert, is_depthwise, weights_of
from sparsekern.ops.dispatch import check_impl
from sparsekern.topology import Topology
from sparsekern.topology.blocks import Block, Grid, active_count, as_block, check_sparsity
from sparsekern.topology.sampling import block_counts, check_count

Pattern = str | re.Pattern[str]
Distribution = str | Mapping[Pattern, float] | Callable[[str, nn.Module], float]
Blocks = Block | Mapping[Pattern, Block] | Callable[[str, nn.Module], Block]

DEFAULT_EXCLUDE = ("*lm_head", "*embed_out", "*output_projection")
"""Output heads of language models, which the field leaves dense."""

INITS = ("sparse", "keep", None)


class Target(NamedTuple):
    """A weight to make sparse: its name, the module that holds it, and what becomes of it.

    Attributes:
        name: of the weight, such as "rnn.hh_l0"; of a layer with one weight, the layer's.
        owner: name of the module.
        module: what holds it.
        weight: shape and parts.
        sparsity: its share.
        block: its block.
    """

    name: str
    owner: str
    module: nn.Module
    weight: Weight
    sparsity: float = 0.0
    block: Block = 1


def sparsify_(
    model: nn.Module,
    sparsity: float = 0.9,
    *,
    block: Blocks = 1,
    distribution: Distribution = "erk",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    exclude: Sequence[Pattern] = (),
    init: str | None = "sparse",
    impl: str | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Replace the model's linear, convolution and recurrent layers by sparse ones, in place.

    `nn.Linear`, `nn.Conv1d`, `nn.Conv2d`, `nn.RNN`, `nn.LSTM`, `nn.GRU` and their cells. The
    matrices of a recurrent layer count one by one, under names such as "rnn.hh_l0".

    Build the optimizer afterwards: the layers have new parameters. Left alone are modules of other
    types (embeddings, norms, subclasses), layers that share a parameter with another module, layers
    whose weight something else makes (weight norm, pruning), output heads of language models
    (`DEFAULT_EXCLUDE`), depthwise convolutions, the model's first convolution if the distribution
    is "uniform" (Evci et al. 2020, section 3), and weights whose share comes out as sparsity 0,
    which are faster dense.

    Args:
        model: its direct or nested layers are replaced; a bare layer can't be.
        sparsity: of all replaced weights together, in [0, 1).
        block: edge or pair (outputs, inputs; channels of a convolution at one tap); a mapping
            from name pattern to block (first match wins, others get 1); or a callable
            (name, module) -> block.
        distribution: "erk", "er" or "uniform"; a mapping from name pattern to sparsity (first match
            wins, others get `sparsity`); or a callable (name, module) -> sparsity.
        filter_fn: (module, name) -> whether to replace it; takes the place of the default
            exclusions.
        exclude: names to leave dense, with all they contain, as globs ("encoder.*.out") or compiled
            regexes.
        init: "sparse": random connections, values drawn for each neuron's real inputs. "keep":
            connections of largest magnitude, with their values (start from a trained model).
            None: random connections, the model's own values.
        impl: of the new layers, see `SparseLinear`.
        generator: of random connections and values.

    Returns:
        The same model.

    Raises:
        ConfigError, DtypeError, ShapeError, TopologyError: bad arguments, a pattern that matches
            nothing, a block larger than a weight, or more blocks than int32 can count. Nothing has
            been replaced then.
    """
    check_sparsity(sparsity)
    check_impl(impl)
    if init not in INITS:
        raise ConfigError(f"`init` must be one of {INITS}; got {init!r}")
    if weights_of(model):
        raise DtypeError(
            f"`model` must contain layers; for a single one use "
            f"{SPARSE_TYPES[type(model)].__name__}.from_dense"
        )
    first_stays = distribution == "uniform"
    found = candidates(model, filter_fn, exclude, first_conv_stays=first_stays)
    if not found:
        kinds = ", ".join(f"nn.{kind.__name__}" for kind in SPARSE_TYPES)
        raise ConfigError(f"`model` has no layer left to make sparse ({kinds})")
    known = [target.name for target in all_targets(model)]
    targets = _with_sparsity(found, sparsity, distribution, known)
    targets = _with_blocks(targets, block, known)
    for target in targets:
        _check_cut(target)
    made = []
    for owner in dict.fromkeys(target.owner for target in targets):
        own = [target for target in targets if target.owner == owner]
        made.append((own[0].module, _converted(own, init, impl, generator)))
    for module, layer in made:
        _replace(model, module, layer)
    return model


def densify_(model: nn.Module) -> nn.Module:
    """Replace the model's sparse layers by torch's, in place, with the same weights."""
    if isinstance(model, tuple(SPARSE_TYPES.values())):
        raise DtypeError("`model` must contain layers; a single one has `to_dense`")
    done: set[int] = set()
    for module in list(model.modules()):
        if id(module) not in done and isinstance(module, tuple(SPARSE_TYPES.values())):
            done.update(map(id, module.modules()))  # a recurrent layer takes its matrices with it
            dense: Any = module  # all kinds have `to_dense`
            _replace(model, module, dense.to_dense())
    return model


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The model's sparse layers by name, each once; of a recurrent layer, its matrices."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLayer)}


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever the model holds `old`: a module used under two names stays one."""
    for parent in model.modules():
        for name, child in parent._modules.items():  # named_children lists each module once
            if child is old:
                setattr(parent, name, new)


def candidates(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    exclude: Sequence[Pattern],
    *,
    first_conv_stays: bool,
) -> list[Target]:
    """The weights that `sparsify_` would share its sparsity out to, with these arguments of it.

    Raises:
        ConfigError: an `exclude` pattern matches nothing.
    """
    targets = all_targets(model)
    for pattern in [exclude] if isinstance(exclude, str | re.Pattern) else exclude:
        names = dict.fromkeys([n for n, _ in model.named_modules()] + [t.name for t in targets])
        hits = [name for name in names if _matches(pattern, name)]
        if not hits:
            raise ConfigError(f"`exclude` pattern {_show(pattern)} matches no module of the model")
        targets = [t for t in targets if not any(_is_within(t.name, hit) for hit in hits)]
    if filter_fn is not None:
        return [target for target in targets if filter_fn(target.module, target.owner)]
    shared, first = _shared_weights(model), _first_convolution(model) if first_conv_stays else None
    return [
        target
        for target in targets
        if shared.isdisjoint(map(id, target.module.parameters(recurse=False)))
        and not any(_matches(p, target.owner) for p in DEFAULT_EXCLUDE)
        and not is_depthwise(target.module)
        and target.module is not first
    ]


def all_targets(model: nn.Module) -> list[Target]:
    """Every weight of the model that has a sparse counterpart."""
    return [
        Target(f"{name}.{own}" if own else name, name, module, weight)
        for name, module in model.named_modules()
        for own, weight in weights_of(module).items()
    ]


def _is_within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _first_convolution(model: nn.Module) -> nn.Module | None:
    return next((m for m in model.modules() if type(m) in (nn.Conv1d, nn.Conv2d)), None)


def _shared_weights(model: nn.Module) -> set[int]:
    """Ids of parameters that more than one module holds, as tied embeddings do."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _with_sparsity(
    targets: list[Target], sparsity: float, distribution: Distribution, known: Sequence[str]
) -> list[Target]:
    """Those that get a share above 0."""
    if isinstance(distribution, str):
        shapes = {t.name: tuple(t.weight.parameter.shape) for t in targets}
        shares: dict[str, Any] = dict(distribute(shapes, sparsity, distribution))
    elif isinstance(distribution, Mapping):
        shares = _by_pattern("distribution", distribution, targets, sparsity, known)
    elif callable(distribution):
        shares = {t.name: distribution(t.name, t.module) for t in targets}
    else:
        raise DtypeError(
            f"`distribution` must be a name, a dict or a callable; got {distribution!r}"
        )
    checked = (
        t._replace(sparsity=check_sparsity(shares[t.name], f"sparsity of layer {t.name!r}"))
        for t in targets
    )
    return [target for target in checked if target.sparsity > 0]


def _with_blocks(targets: list[Target], block: Blocks, known: Sequence[str]) -> list[Target]:
    if isinstance(block, Mapping):
        blocks = _by_pattern("block", block, targets, 1, known)
    elif callable(block):
        blocks = {t.name: block(t.name, t.module) for t in targets}
    else:
        as_block(block)
        blocks = dict.fromkeys((t.name for t in targets), block)
    return [target._replace(block=as_block(blocks[target.name])) for target in targets]


def _by_pattern(
    argument: str,
    values: Mapping[Pattern, Any],
    targets: list[Target],
    default: Any,
    known: Sequence[str],
) -> dict[str, Any]:
    """The value of the first pattern that matches each name.

    A pattern may match a layer that stays dense, but must match one that the model has.
    """
    for pattern in values:
        if not any(_matches(pattern, name) for name in known):
            raise ConfigError(f"`{argument}` pattern {_show(pattern)} matches none of {known}")
    return {
        target.name: next((v for p, v in values.items() if _matches(p, target.name)), default)
        for target in targets
    }


def _check_cut(target: Target) -> None:
    """The block fits the weight, and there are blocks for all groups."""
    if is_depthwise(target.module):
        raise ConfigError(f"layer {target.name!r} is a depthwise convolution: leave it dense")
    weight, (bh, bw) = target.weight, as_block(target.block)
    height, width = weight.part
    if bh > height or bw > width:
        shape = tuple(weight.parameter.shape)
        channels = f", {height} by {width} channels at a tap of a group" if len(shape) > 2 else ""
        raise ShapeError(
            f"`block` {(bh, bw)} is larger than layer {target.name!r} of shape {shape}{channels}; "
            f"use a smaller block or exclude=({target.name!r},)"
        )
    active = active_count(weight.parameter.numel(), target.sparsity)
    grid = Grid.of(weight.shape, target.block, weight.groups, weight.taps)
    check_count(block_counts(grid, active)[0], grid, f"layer {target.name!r}: ")
    check_groups(round(active / (bh * bw)), weight.groups)


def _converted(
    targets: list[Target],
    init: str | None,
    impl: str | None,
    generator: torch.Generator | None,
) -> Any:
    """The sparse layer of one module, with all of its targets."""
    topologies = {t.weight.name: _topology(t, init, generator) for t in targets}
    layer: Any = convert(targets[0].module, topologies, impl)
    names = set(topologies)
    if init == "sparse":
        layer.reset_parameters(generator, **({} if names == {""} else {"names": names}))
    return layer


def _topology(target: Target, init: str | None, generator: torch.Generator | None) -> Topology:
    weight = target.weight
    if init == "keep":
        return topology_of_largest(
            weight.matrix(),
            target.sparsity,
            target.block,
            groups=weight.groups,
            taps=weight.taps,
        )
    return Topology.random(
        weight.shape,
        target.block,
        sparsity=target.sparsity,
        groups=weight.groups,
        taps=weight.taps,
        generator=generator,
    )


def _matches(pattern: Pattern, name: str) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.search(name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def _show(pattern: Pattern) -> str:
    return repr(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)
