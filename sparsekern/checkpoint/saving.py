"""`save`: model, optimizer and method in one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsekern.checkpoint import file
from sparsekern.checkpoint.layers import check_whole
from sparsekern.checkpoint.optimizers import Optimizers, as_tuple, packed
from sparsekern.checkpoint.tree import encode
from sparsekern.errors import CheckpointError, DtypeError
from sparsekern.methods import Method
from sparsekern.swap import sparse_layers


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizers | None = None,
    method: Method | None = None,
    *,
    extra: Any = None,
) -> None:
    """Write the model, and what training it needs, to one file, whole or not at all.

    The format is safetensors, without pickle: the tensors have the names of the model's
    state_dict, so that others can read them too, and JSON in the metadata says the rest. A sparse
    layer takes its values, 4 bytes an active block and 4 a block row. If anything fails, a crash
    included, the old file is there; afterwards the new one survives a loss of power.

    Args:
        path: of the file, "checkpoint.safetensors" for example; it is replaced.
        model: sparse or not.
        optimizer: one or several, over parameters of the model.
        method: attached to it.
        extra: what else a resume needs, plain objects and tensors: a step count, a scheduler's
            state_dict, `torch.get_rng_state()`. `load` returns it.

    Raises:
        CheckpointError: something is neither plain nor a plain tensor, or a parameter of the
            optimizer is none of the model's.
        OSError: the file can't be written.
    """
    if not isinstance(model, nn.Module):
        raise DtypeError(f"`model` must be a torch.nn.Module; got {type(model).__name__}")
    state = dict(model.state_dict())
    check_whole(state)
    if foreign := file.own_names(state):
        raise CheckpointError(f"names must not begin with {file.OWN!r}; got {foreign}")
    tensors = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    others: dict[str, Tensor] = {}
    head: dict[str, Any] = {
        "layers": {
            name: {"layout": list(layer.topology.layout), "masked": layer.dense_mask is not None}
            for name, layer in sparse_layers(model).items()
        },
        "plain": encode(
            {n: v for n, v in state.items() if not isinstance(v, Tensor)},
            f"{file.OWN}plain/",
            others,
        ),
    }
    optimizers = [packed(one, model) for one in as_tuple(optimizer)]
    head["optimizers"] = encode(optimizers, f"{file.OWN}optimizer/", others)
    if method is not None:
        head["method"] = {
            "class": type(method).__name__,
            "state": encode(dict(method.state_dict()), f"{file.OWN}method/", others),
        }
    head["extra"] = encode(extra, f"{file.OWN}extra/", others)
    file.write(Path(path), tensors | others, head)
