"""What holds after every operation of the state machine, and over every update."""

from typing import Any, NamedTuple

import torch
from checkpoint_models import equal
from machine_parts import START, Parts, Spec
from support import assert_within, product_bound
from torch import Tensor

from sparsekern.methods import progress
from sparsekern.nn import SparseLinear


class ViolationError(AssertionError):
    pass


def check(holds: object, what: str) -> None:
    if not holds:
        raise ViolationError(what)


class Rows(NamedTuple):
    """What belongs to each active block of a layer: values and state, and what belongs to none."""

    positions: Tensor
    blocks: dict[str, Tensor]
    scalars: dict[str, Any]


def rows(layer: Any, state: dict[str, Any]) -> Rows:
    blocks, scalars = {"values": layer.active_values().clone()}, {}
    for key, entry in state.items():
        if isinstance(entry, Tensor) and entry.shape == layer.values.shape:
            blocks[key] = layer.pack(entry).clone()
        elif isinstance(entry, Tensor) and entry.shape[:1] == layer.values.shape[:1]:
            blocks[key] = entry.clone()
        else:
            shape = getattr(entry, "shape", ())
            check(shape == (), f"state {key} has shape {shape}")
            scalars[key] = entry.clone() if isinstance(entry, Tensor) else entry
    return Rows(layer.topology.positions().clone(), blocks, scalars)


def all_rows(parts: Parts) -> dict[str, dict[str, Rows]]:
    """Of the model's layers with their state, and of the average's."""
    state = parts.optimizer.state
    return {
        "model": {n: rows(m, state.get(m.values, {})) for n, m in parts.layers().items()},
        "average": {n: rows(m, {}) for n, m in parts.twins().items()},
    }


def check_moved(
    old: dict[str, dict[str, Rows]], new: dict[str, dict[str, Rows]], spec: Spec
) -> None:
    """Survivors keep what they hold bit by bit, and new blocks start where they should."""
    for whose, by_name in old.items():
        for name, before in by_name.items():
            after, what = new[whose][name], f"{name} of {whose}"
            stay_old = torch.isin(before.positions, after.positions)
            stay_new = torch.isin(after.positions, before.positions)
            check(before.blocks.keys() == after.blocks.keys(), f"other state in {what}")
            check(equal(before.scalars, after.scalars), f"scalars of {what} changed")
            for key, blocks in before.blocks.items():
                now = after.blocks[key]
                same = torch.equal(blocks[stay_old], now[stay_new])
                check(same, f"{key} of survivors of {what} changed")
                if key == "values" and spec.grow_init == "init" and whose == "model":
                    continue
                start = START.get((spec.optimizer, key), 0.0)
                fresh = now[~stay_new]
                if spec.impl == "masked" and start:  # a dense matrix has no padding to start
                    fresh = fresh[fresh != 0]
                check(bool((fresh == start).all()), f"new {key} of {what} is not {start}")


def check_parts(parts: Parts, counts: dict[str, int]) -> None:
    """Everything that one moment shows."""
    held = {id(p) for group in parts.optimizer.param_groups for p in group["params"]}
    for name, layer in parts.layers().items():
        check_layer(name, layer, counts[name])
        check(id(layer.values) in held, f"{name} has a parameter that the optimizer does not hold")
        check(parts.method.layers[name] is layer, f"the method holds another layer {name}")
        state = parts.optimizer.state.get(layer.values, {})
        for key, entry in rows(layer, state).blocks.items():
            check(bool(entry.isfinite().all()), f"{key} of {name} is not finite")
    for name, twin in parts.twins().items():
        check_layer(f"{name} of the average", twin, counts[name])
        same = twin.topology.digest() == parts.layers()[name].topology.digest()
        check(same, f"the average holds other connections in {name}")
    check_method(parts)


def check_layer(name: str, layer: Any, count: int) -> None:
    topology = layer.topology.validate()
    rebuilt = topology.with_positions(topology.positions())
    pairs = zip(topology.arrays, rebuilt.arrays, strict=True)
    check(all(torch.equal(a, b) for a, b in pairs), f"arrays of {name} disagree")
    check(all(a.dtype == torch.int32 for a in topology.arrays), f"arrays of {name} are cast")
    check(topology.nnzb == count, f"{name} has {topology.nnzb} blocks; expected {count}")
    masked = layer.dense_mask is not None
    shape = topology.shape if masked else topology.values_shape
    check(layer.values.shape == shape, f"values of {name} have shape {layer.values.shape}")
    if masked:
        check(torch.equal(layer.dense_mask, topology.to_mask()), f"the mask of {name} is another")
        return
    own = layer.values.detach()
    cleared = topology.clear_padding_(own.clone())
    check(torch.equal(own, cleared), f"the padding of {name} is not zero")


def check_method(parts: Parts) -> None:
    method = parts.method
    state, steps = method.state_dict(), [record.step for record in method.history]
    check(steps == sorted(set(steps)), f"history holds steps {steps}")
    last = steps[-1] if steps else None
    check(method.last_update == last, f"last_update is {method.last_update}, history ends {last}")
    check(last is None or last <= state["weight_steps"], "the last update lies ahead")
    entry = parts.optimizer.param_groups[0].get(progress.ENTRY)
    told = {key: state[key] for key in progress.NEEDED}
    check(entry == told, f"the optimizer's entry is {entry}, the method's state {told}")


def check_product(layer: Any, dtype: torch.dtype) -> None:
    """A layer's output is the product with its dense weight, within the bound of rounding."""
    weight = layer.dense_weight().double()
    drawn = torch.Generator().manual_seed(1)
    if isinstance(layer, SparseLinear):
        x = torch.randn(3, weight.shape[1], generator=drawn, dtype=torch.float64).to(dtype)
        got, columns, groups = layer(x).double(), x.double(), 1
        matrix = weight
    else:
        groups, dims = layer.groups, weight.dim() - 2
        shape = (1, weight.shape[1] * groups, *weight.shape[2:])
        x = torch.randn(shape, generator=drawn, dtype=torch.float64).to(dtype)
        padding = (slice(None), slice(None), *(slice(p, p + 1) for p in layer.padding[-dims:]))
        got = layer(x)[padding].flatten().double()[None]
        columns, matrix = x.double().flatten()[None], weight.flatten(1)
    bias = torch.zeros(matrix.shape[0]) if layer.bias is None else layer.bias
    out = matrix.shape[0] // groups
    width = matrix.shape[1]
    for g in range(groups):
        a = columns[:, g * width : (g + 1) * width]
        a = torch.cat([a, torch.ones(len(a), 1)], 1)
        part = slice(g * out, (g + 1) * out)
        b = torch.cat([matrix[part], bias[part].detach().double()[:, None]], 1).T
        bound = product_bound(a, b, b.shape[0] + 1, dtype)
        # the reference rounds in float64 too
        bound = bound + product_bound(a, b, b.shape[0] + 1, torch.float64)
        assert_within(got.detach()[:, part], a @ b, bound, "product")
