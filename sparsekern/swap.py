"""`sparsify_` and `densify_`: turn the layers of a model into sparse ones, and back."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from sparsekern.blocks import Block, as_block, check_sparsity
from sparsekern.distribution import distribute
from sparsekern.errors import ConfigError, DtypeError, ShapeError
from sparsekern.nn import SparseLayer, SparseLinear
from sparsekern.nn.tickets import topology_of_largest
from sparsekern.ops.dispatch import check_impl
from sparsekern.topology import Topology

Pattern = str | re.Pattern[str]
Distribution = str | Mapping[Pattern, float] | Callable[[str, nn.Module], float]

DEFAULT_EXCLUDE = ("*lm_head", "*embed_out", "*output_projection")
"""Output heads of language models, which the field leaves dense."""

INITS = ("sparse", "keep", None)


class _Target(NamedTuple):
    name: str
    module: nn.Linear
    sparsity: float


def sparsify_(
    model: nn.Module,
    sparsity: float = 0.9,
    *,
    block: Block = 1,
    distribution: Distribution = "erk",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    exclude: Sequence[Pattern] = (),
    init: str | None = "sparse",
    impl: str | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Replace the model's `nn.Linear` layers by `SparseLinear`, in place.

    Build the optimizer afterwards: the layers have new parameters. Left alone are modules of other
    types (embeddings, norms, subclasses of `nn.Linear`), layers whose weight is shared with another
    module, output heads of language models (`DEFAULT_EXCLUDE`), and layers whose share comes out
    as sparsity 0, which are faster dense.

    Args:
        model: its direct or nested layers are replaced; a bare `nn.Linear` can't be.
        sparsity: of all replaced layers together, in [0, 1).
        block: edge or pair (outputs, inputs).
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
        ConfigError, DtypeError, ShapeError: bad arguments, a pattern that matches nothing, or a
            block larger than a layer. Nothing has been replaced then.
    """
    as_block(block)
    check_sparsity(sparsity)
    check_impl(impl)
    if init not in INITS:
        raise ConfigError(f"`init` must be one of {INITS}; got {init!r}")
    if isinstance(model, nn.Linear):
        raise DtypeError(
            "`model` must contain layers; for a single one use SparseLinear.from_dense"
        )
    modules = _candidates(model, filter_fn, exclude)
    if not modules:
        raise ConfigError("`model` has no nn.Linear left to make sparse")
    targets = _with_sparsity(modules, sparsity, distribution)
    for target in targets:
        _check_block(target, block)
    for target in targets:
        layer = _converted(target, block, init, impl, generator)
        _replace(model, target.module, layer)
    return model


def densify_(model: nn.Module) -> nn.Module:
    """Replace the model's `SparseLinear` layers by `nn.Linear` with the same weights, in place."""
    for module in list(model.modules()):
        if isinstance(module, SparseLinear):
            _replace(model, module, module.to_dense())
    return model


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The model's sparse layers by name, each once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLayer)}


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever the model holds `old`: a module used under two names stays one."""
    for parent in model.modules():
        for name, child in parent._modules.items():  # named_children lists each module once
            if child is old:
                setattr(parent, name, new)


def _candidates(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    exclude: Sequence[Pattern],
) -> dict[str, nn.Linear]:
    linear = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    for pattern in [exclude] if isinstance(exclude, str | re.Pattern) else exclude:
        hits = [name for name, _ in model.named_modules() if _matches(pattern, name)]
        if not hits:
            raise ConfigError(f"`exclude` pattern {_show(pattern)} matches no module of the model")
        linear = {
            name: m
            for name, m in linear.items()
            if not any(name == hit or name.startswith(f"{hit}.") for hit in hits)
        }
    if filter_fn is not None:
        return {name: m for name, m in linear.items() if filter_fn(m, name)}
    shared = _shared_weights(model)
    return {
        name: m
        for name, m in linear.items()
        if id(m.weight) not in shared and not any(_matches(p, name) for p in DEFAULT_EXCLUDE)
    }


def _shared_weights(model: nn.Module) -> set[int]:
    """Ids of parameters that more than one module holds, as tied embeddings do."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _with_sparsity(
    modules: dict[str, nn.Linear], sparsity: float, distribution: Distribution
) -> list[_Target]:
    if isinstance(distribution, str):
        shapes = {name: tuple(m.weight.shape) for name, m in modules.items()}
        shares: dict[str, Any] = dict(distribute(shapes, sparsity, distribution))
    elif isinstance(distribution, Mapping):
        for pattern in distribution:
            if not any(_matches(pattern, name) for name in modules):
                raise ConfigError(
                    f"`distribution` pattern {_show(pattern)} matches none of {list(modules)}"
                )
        shares = {
            name: next((s for p, s in distribution.items() if _matches(p, name)), sparsity)
            for name in modules
        }
    elif callable(distribution):
        shares = {name: distribution(name, m) for name, m in modules.items()}
    else:
        raise DtypeError(
            f"`distribution` must be a name, a dict or a callable; got {distribution!r}"
        )
    targets = [
        _Target(name, m, check_sparsity(shares[name], f"sparsity of layer {name!r}"))
        for name, m in modules.items()
    ]
    return [target for target in targets if target.sparsity > 0]


def _check_block(target: _Target, block: Block) -> None:
    (bh, bw), shape = as_block(block), tuple(target.module.weight.shape)
    if bh > shape[0] or bw > shape[1]:
        raise ShapeError(
            f"`block` {(bh, bw)} is larger than layer {target.name!r} of shape {shape}; "
            f"use a smaller block or exclude=({target.name!r},)"
        )


def _converted(
    target: _Target,
    block: Block,
    init: str | None,
    impl: str | None,
    generator: torch.Generator | None,
) -> SparseLinear:
    module, shape = target.module, tuple(target.module.weight.shape)
    if init == "keep":
        topology = topology_of_largest(module.weight, target.sparsity, block)
    else:
        topology = Topology.random(shape, block, sparsity=target.sparsity, generator=generator)
    layer = SparseLinear.from_topology(module, topology, impl=impl)
    if init == "sparse":
        layer.reset_parameters(generator)
    return layer


def _matches(pattern: Pattern, name: str) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.search(name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def _show(pattern: Pattern) -> str:
    return repr(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)
