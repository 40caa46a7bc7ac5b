"""`load`: a file's sparse layers, or all of a training state into model, optimizer and method."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from sparsekern.checkpoint import file, layers
from sparsekern.checkpoint.layers import SavedLayer, check_whole
from sparsekern.checkpoint.optimizers import Optimizers, as_tuple, kept, unpacked
from sparsekern.checkpoint.tree import decode
from sparsekern.errors import CheckpointError, ConfigError, DtypeError, told
from sparsekern.methods import Method
from sparsekern.nn import SparseMultiheadAttention
from sparsekern.nn.attention_parts import split_packed
from sparsekern.swap import sparse_layers

CONNECTIONS = ("keep", "magnitude")

_UNFIT = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What torch, an optimizer or a method raises where a state does not fit."""


@overload
def load(path: str | os.PathLike[str]) -> dict[str, SavedLayer]: ...


@overload
def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizers | None = None,
    method: Method | None = None,
    *,
    connections: str = "keep",
    strict: bool = True,
) -> Any: ...


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    optimizer: Optimizers | None = None,
    method: Method | None = None,
    *,
    connections: str = "keep",
    strict: bool = True,
) -> Any:
    """Read what `save` wrote: the sparse layers by name, or all of it into a model.

    With a model, the layers that are sparse in the file turn sparse in it, with the file's
    connections and block, whether they were dense or sparse; then everything is filled. Sparse
    layers change in place and keep their parameters. Everything is checked, and it is all or
    nothing: if anything fails, model, optimizer and method are what they were.

    Any file of safetensors that holds a model's state_dict can be loaded too.

    Args:
        path: of the file.
        model: what to fill; None to get the file's sparse layers.
        optimizer: one or several, as they were saved; built over the model's parameters as they are
            now, so a dense model is loaded alone first, then again with its optimizer.
        method: attached to it.
        connections: of a sparse layer that is dense in the file: "keep" takes the values at the
            layer's own connections, "magnitude" the blocks of largest magnitude, as many.
        strict: whether the file and the model must have the same names. Otherwise what the model
            lacks is left out; a sparse layer is never.

    Returns:
        Without a model, a `SavedLayer` by name. With one, the `extra` that was saved, or None.

    Raises:
        CheckpointError: the file is damaged or does not fit; nothing has changed.
        OSError: it can't be read.
    """
    content = file.read(Path(path))
    if model is None:
        return layers.saved_layers(content)
    if not isinstance(model, nn.Module):
        raise DtypeError(f"`model` must be a torch.nn.Module; got {type(model).__name__}")
    if connections not in CONNECTIONS:
        raise ConfigError(f"`connections` must be one of {CONNECTIONS}; got {connections!r}")
    check_whole(dict(model.named_parameters()))
    optimizers = as_tuple(optimizer)
    try:
        with ExitStack() as undo:
            extra = _fill(content, model, optimizers, method, connections, strict, undo)
            undo.pop_all()
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from error
    except _UNFIT as error:
        raise CheckpointError(f"{os.fspath(path)} does not fit: {told(error)}") from error
    return extra


def _fill(
    content: file.Content,
    model: nn.Module,
    optimizers: tuple[torch.optim.Optimizer, ...],
    method: Method | None,
    connections: str,
    strict: bool,
    undo: ExitStack,
) -> Any:
    """Fill everything, and tell `undo` how to take it back; returns `extra`."""
    head, tensors = content.head, content.tensors
    states = decode(head.get("optimizers", []), tensors)
    if optimizers and (not isinstance(states, list) or len(states) != len(optimizers)):
        held = len(states) if isinstance(states, list) else "no"
        raise CheckpointError(f"the file holds {held} optimizers; expected {len(optimizers)}")
    saved = layers.saved_layers(content) if head else _found(content, model)
    plain = decode(head.get("plain", {"dict": []}), tensors)
    state = {n: t for n, t in tensors.items() if not file.own_names([n])} | plain
    extra = decode(head.get("extra"), tensors)
    for one in optimizers:  # before anything changes
        undo.callback(kept(one))
    replaced = layers.fit(model, saved, undo)
    if replaced and optimizers:
        raise CheckpointError(
            f"{replaced} turn sparse and get new parameters: load the model alone, build the "
            "optimizer and the method, then load all"
        )
    if connections == "magnitude":
        _choose_largest(model, saved, state)
    undo.callback(_kept(model))
    its = None if method is None else _method_state(method, head.get("method"), tensors)
    if method is not None:
        undo.callback(method.load_state_dict, method.state_dict())
    states = [unpacked(s, one, model) for s, one in zip(states, optimizers, strict=False)]
    _check_names(model, state, strict=strict)
    model.load_state_dict(state, strict=strict)
    for one, its_state in zip(optimizers, states, strict=False):
        one.load_state_dict(its_state)
    if method is not None and its is not None:
        method.load_state_dict(its)
    return extra


def _method_state(method: Method, saved: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if not isinstance(saved, dict) or set(saved) != {"class", "state"}:
        raise CheckpointError("the file holds no method's state")
    if saved["class"] != type(method).__name__:
        raise CheckpointError(
            f"the file holds the state of {str(saved['class'])[:60]}, not of "
            f"{type(method).__name__}"
        )
    state = decode(saved["state"], tensors)
    if not isinstance(state, dict):
        raise CheckpointError(f"a method's state must be a dict; got {type(state).__name__}")
    return state


def _found(content: file.Content, model: nn.Module) -> dict[str, SavedLayer]:
    """The sparse layers of a file that says nothing of them; their shapes are the model's."""
    found: dict[str, SavedLayer] = {}
    for name, layer in sparse_layers(model).items():
        before = f"{name}." if name else ""
        crow, col, values = (content.tensors.get(before + n) for n in ("crow", "col", "values"))
        if crow is None or col is None or values is None:
            continue
        held = layer._held()
        block = tuple(values.shape[1:]) if values.dim() == 3 else held.block
        layout = [*held.shape, *block, held.groups, held.taps]
        found[name] = SavedLayer(layers.topology_at(name, layout, crow, col), values, None)
    return found


def _choose_largest(model: nn.Module, saved: dict[str, SavedLayer], state: dict[str, Any]) -> None:
    """Put sparse states in the place of dense weights of sparse layers."""
    for name, module in model.named_modules():
        if isinstance(module, SparseMultiheadAttention):
            split_packed(state, f"{name}." if name else "")
    for name, layer in sparse_layers(model).items():
        before = f"{name}." if name else ""
        owner, _, own = name.rpartition(".")
        torch_name = f"{owner}.weight_{own}" if owner else f"weight_{own}"
        key = next((k for k in (f"{before}weight", torch_name) if k in state), None)
        if name in saved or key is None:
            continue
        weight = state[key]
        if not isinstance(weight, Tensor) or tuple(weight.shape) != tuple(layer.weight_shape):
            raise CheckpointError(f"{key!r} must have shape {tuple(layer.weight_shape)}")
        matrix = layer.as_matrix(weight)
        topology = layers.largest(layer, matrix)
        del state[key]
        state[f"{before}values"] = topology.pack(matrix)
        state[f"{before}crow"], state[f"{before}col"] = topology.crow, topology.col


def _check_names(model: nn.Module, state: dict[str, Any], *, strict: bool) -> None:
    """A sparse layer of the model must be in the file, and what comes must be usable."""
    for key, own in model.state_dict().items():
        came = state.get(key)
        if not isinstance(came, Tensor) or not isinstance(own, Tensor):
            continue
        if own.is_floating_point() != came.is_floating_point():
            raise CheckpointError(f"{key!r} must be {own.dtype}; got {came.dtype}")
    if strict:
        return
    for name in sparse_layers(model):
        before = f"{name}." if name else ""
        if not any(k.startswith(before) for k in state):
            owner, _, own_name = name.rpartition(".")
            if f"{owner}.weight_{own_name}".lstrip(".") not in state:
                raise CheckpointError(f"the file has nothing for sparse layer {name!r}")


def _kept(model: nn.Module) -> Any:
    """A function that puts the tensors of a model back to what they are now."""
    held = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    grads = [(p, p.grad) for p in model.parameters()]
    loads = [(layer, layer._loads) for layer in sparse_layers(model).values()]
    plain = [
        (module, module.get_extra_state())
        for module in model.modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    ]

    def restore() -> None:
        with torch.no_grad():
            for tensor, was in held:
                tensor.copy_(was)
        for parameter, grad in grads:
            parameter.grad = grad
        for layer, times in loads:
            layer._loads = times
        for module, state in plain:
            module.set_extra_state(state)

    return restore
