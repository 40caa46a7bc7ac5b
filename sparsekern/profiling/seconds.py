"""A layer of a profile as the predictor takes it, and its time as predicted."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparsekern.cost.flops import Count
from sparsekern.cost.layers import Layer, Part, Share
from sparsekern.cost.predict import Predictor
from sparsekern.errors import DtypeError
from sparsekern.nn import SparseLayer
from sparsekern.nn.kinds import Weight, weights_of
from sparsekern.nn.recurrent.base import SparseRecurrent


class _Held(NamedTuple):
    """A weight, the tensor that is trained for it, and the sparse layer that it belongs to."""

    weight: Weight
    trained: Tensor
    sparse: SparseLayer | None


def predicted_seconds(
    name: str,
    module: nn.Module,
    count: Count,
    gradients: Container[int],
    times: Predictor,
    device: torch.device,
) -> float | None:
    """Forward and backward of one layer; None where there is nothing to predict it from.

    Args:
        name: of the layer.
        module: dense or sparse.
        count: what it did in a step.
        gradients: ids of the parameters that got one.
        times: predictions for `device`.
        device: where it is to run.
    """
    held, uses = list(_weights(module)), [use for use in count.uses if use is not None]
    if not held or not uses or len(uses) < len(count.uses):
        return None
    parts = [Part(f"{name}.{h.weight.name}", h.weight, id(h.trained) in gradients) for h in held]
    try:
        return times.seconds(
            Layer.of(name, module, parts, uses), [_share(h.sparse, device) for h in held]
        )
    except DtypeError:
        return None  # a dtype that nothing is known of


def _weights(module: Any) -> Iterator[_Held]:
    """Of a layer that the predictor knows."""
    if isinstance(module, SparseLayer):
        yield _sparse("", module)
    elif isinstance(module, SparseRecurrent):
        for name, child in module.named_children():
            if isinstance(child, SparseLayer):
                yield _sparse(name, child)
            else:
                weight: Any = child.weight
                yield _Held(Weight(name, weight), weight, None)
    elif isinstance(module, _ConvNd):
        taps = module.weight[0, 0].numel()
        yield _Held(Weight("", module.weight, module.groups, taps), module.weight, None)
    else:
        for weight in weights_of(module).values():
            yield _Held(weight, weight.parameter, None)


def _sparse(name: str, layer: SparseLayer) -> _Held:
    like = torch.empty(layer.weight_shape, dtype=layer.values.dtype, device="meta")
    topology = layer.topology
    return _Held(Weight(name, like, topology.groups, topology.taps), layer.values, layer)


def _share(layer: SparseLayer | None, device: torch.device) -> Share | None:
    """None if the product takes a dense weight."""
    if layer is None or layer.impl_on(device) in ("dense", "masked"):
        return None
    topology = layer.topology
    return Share(layer.block, math.prod(topology.values_shape), topology.block_density)
