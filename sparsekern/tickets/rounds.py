"""One training under masks: sparse layers where they are faster, masked dense ones elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsekern.cost.examples import Call
from sparsekern.cost.layers import Layer, Part
from sparsekern.cost.predict import predictor
from sparsekern.cost.uses import Use, use_of
from sparsekern.errors import TrainingLoopError
from sparsekern.ops.cpu.choice import has_numba
from sparsekern.swap import densify_, sparse_layers, sparsify_
from sparsekern.swap.targets import Target
from sparsekern.tickets.masks import Masks
from sparsekern.tickets.ticket import State, state_of, targets_of

Train = Callable[[nn.Module, int, int], object]
"""train(model, start, stop) runs weight steps [start, stop) on the model, in place."""


def run_round(
    model: nn.Module,
    state: State,
    masks: Masks,
    train: Train,
    spans: Sequence[tuple[int, int]],
    sparse: Collection[str] = (),
    uses: dict[str, Use] | None = None,
) -> list[State]:
    """The state after each span of a training that starts from `state`, under masks.

    Args:
        model: dense; a copy of it is trained.
        state: to start from; what masks leave out counts as zero.
        masks: what stays active.
        train: see `Train`.
        spans: (start, stop) of each call; empty ones are left out.
        sparse: weights to train in sparse layers; all of a recurrent layer's, or none.
        uses: gets what the first call of each layer did, by the module's name.

    Raises:
        TrainingLoopError: `train` brought a pruned weight to life, or changed connections.
    """
    twin = copy.deepcopy(model)
    twin.load_state_dict(state)
    targets = targets_of(twin, masks)
    held = {n: (t.weight.parameter, ~masks[n]) for n, t in targets.items() if n not in sparse}
    _zero(held)
    cut = {name: masks[name] for name in sparse if not bool(masks[name].all())}
    if cut:
        sparsify_(twin, masks=cut, filter_fn=_any)
    states = []
    with ExitStack() as stack:
        stack.enter_context(_holding(held))
        if uses is not None:
            stack.enter_context(_noting(twin, {t.owner for t in targets.values()}, uses))
        for start, stop in spans:
            if start < stop:
                train(twin, start, stop)
                _check(twin, held, cut)
            states.append(_dense_state(twin))
    return states


def break_evens(model: nn.Module, masks: Masks, uses: Mapping[str, Use]) -> dict[str, float]:
    """Largest density at which each weight's layer is no slower sparse, as `cost` predicts it.

    0 for layers that were not called or are of no kind that is known, and for all on a CPU without
    numba.
    """
    targets = targets_of(model, masks)
    owners: dict[str, list[Target]] = {}
    for target in targets.values():
        owners.setdefault(target.owner, []).append(target)
    found: dict[str, float] = {}
    for owner, own in owners.items():
        parameter = own[0].weight.parameter
        use, density = uses.get(owner), 0.0
        if use is not None and (parameter.device.type != "cpu" or has_numba()):
            parts = [Part(t.name, t.weight, t.weight.parameter.requires_grad) for t in own]
            layer = Layer.of(owner, own[0].module, parts, [use])
            density = predictor(parameter.device).break_even(layer, [(1, 1)]).density
        found |= {target.name: density for target in own}
    return found


def worth(model: nn.Module, masks: Masks, below: Mapping[str, float]) -> tuple[str, ...]:
    """The weights of the layers that are no denser than `below` says, all parts together."""
    owners: dict[str, list[str]] = {}
    for name, target in targets_of(model, masks).items():
        owners.setdefault(target.owner, []).append(name)
    chosen: list[str] = []
    for names in owners.values():
        active = sum(int(masks[name].sum()) for name in names)
        if active <= below[names[0]] * sum(masks[name].numel() for name in names):
            chosen += names
    return tuple(chosen)


Held = Mapping[str, tuple[Tensor, Tensor]]
"""Dense weights, and where they are to stay zero."""


@contextmanager
def _holding(held: Held) -> Iterator[None]:
    """Keep gradients and weights zero where they are to be, whatever optimizer steps.

    Gradients too: a norm that is clipped, or a moment, is that of the active weights alone.
    """
    with ExitStack() as stack:
        for weight, off in held.values():
            if weight.requires_grad:
                hook = weight.register_hook(lambda g, off=off: g.masked_fill(off, 0))  # type: ignore[no-untyped-call]
                stack.callback(hook.remove)
        after = register_optimizer_step_post_hook(lambda *_: _zero(held))
        stack.callback(after.remove)
        yield


def _zero(held: Held) -> None:
    with torch.no_grad():
        for weight, off in held.values():
            weight.masked_fill_(off, 0)


@contextmanager
def _noting(model: nn.Module, owners: Collection[str], uses: dict[str, Use]) -> Iterator[None]:
    """Note the first call of each module."""
    with ExitStack() as stack:
        for owner in owners:

            def note(m: nn.Module, args: Any, kwargs: Any, out: Any, owner: str = owner) -> None:
                if owner not in uses and torch.is_grad_enabled():
                    use = use_of(m, Call(args, kwargs, out))
                    if use is not None:
                        uses[owner] = use

            module = model.get_submodule(owner)
            stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        yield


def _check(twin: nn.Module, held: Held, cut: Masks) -> None:
    for name, (weight, off) in held.items():
        revived = int((weight.detach()[off] != 0).sum())
        if revived:
            raise TrainingLoopError(
                f"`train` must leave pruned weights zero; it moved {revived} of {name!r} by "
                "something else than a torch.optim.Optimizer's step"
            )
    layers = sparse_layers(twin)
    for name, mask in cut.items():
        layer = layers.get(name)
        if layer is None or not bool((layer.mask() == mask).all()):
            raise TrainingLoopError(f"`train` must leave the connections of {name!r} as they are")


def _dense_state(twin: nn.Module) -> State:
    """The state of the model, with dense weights."""
    if not sparse_layers(twin):
        return state_of(twin)
    return state_of(densify_(copy.deepcopy(twin)))


def _any(_module: nn.Module, _name: str) -> bool:
    """The masks say which."""
    return True
