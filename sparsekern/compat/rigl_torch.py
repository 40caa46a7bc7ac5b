"""The scheduler of rigl-torch (github.com/nollied/rigl-torch) over weights sparse in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import ConfigError, ShapeError
from sparsekern.methods import Method, RigL, Static
from sparsekern.swap import sparsify_
from sparsekern.topology.blocks import Block

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)


class RigLScheduler:
    """Makes a dense model sparse, and trains it by RigL; arguments as rigl-torch has them.

        pruner = RigLScheduler(model, optimizer, dense_allocation=0.1, T_end=int(0.75 * steps))
        ...
        loss.backward()
        if pruner():
            optimizer.step()

    The optimizer goes on with the sparse weights, its state included. `pruner()` may be left out:
    the optimizer's hooks update the topology too.

    Args:
        model: its linear and convolution layers become sparse, with the values they have, at
            random connections.
        optimizer: that holds its weights.
        dense_allocation: share of the weights that is left, in (0, 1).
        T_end: calls of the scheduler after which no update comes.
        sparsity_distribution: "uniform" (the first layer stays dense, if there are others) or
            "erk".
        ignore_linear_layers: leave linear layers dense.
        delta: calls between updates, of which one is the update itself; the first comes with call
            `delta`.
        alpha: share of the active weights that the update at step 0 would replace; cosine-decayed
            to `T_end`. Where that is no multiple of `delta`, it is rounded up to a weight step.
        static_topo: never update.
        grad_accumulation_n: backward passes per optimizer step.
        state_dict: what rigl-torch's scheduler saved: its masks and its place in the schedule. The
            model has to hold the weights that were saved with it.
        block: of the sparse weights; rigl-torch has 1.
        generator: of the random connections.

    Attributes:
        method: the `sparsekern.Method` behind it.

    Raises:
        ConfigError: an argument is out of its domain.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dense_allocation: float = 1,
        T_end: int | None = None,
        sparsity_distribution: str = "uniform",
        ignore_linear_layers: bool = False,
        delta: int = 100,
        alpha: float = 0.3,
        static_topo: bool = False,
        grad_accumulation_n: int = 1,
        state_dict: Mapping[str, Any] | None = None,
        *,
        block: Block = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        saved = dict(state_dict or {})
        told = saved.get("hyperparams", {})
        T_end, delta = told.get("T_end", T_end), told.get("delta_T", delta)
        _check(dense_allocation if state_dict is None else 0.5, T_end, delta, sparsity_distribution)
        kept: dict[str, Any] = {"optimizer": optimizer, "block": block}
        if state_dict is not None:
            sparsify_(model, masks=masks_of_rigl_torch(model, saved["backward_masks"]), **kept)
        else:
            share = _shares(
                model, 1 - dense_allocation, sparsity_distribution, ignore_linear_layers
            )
            sparsify_(model, 1 - dense_allocation, **share, init=None, generator=generator, **kept)
        self.model, self.optimizer = model, optimizer
        kind: type[Method] = Static if told.get("static_topo", static_topo) else RigL
        self.method = kind(
            model,
            optimizer,
            t_end=math.ceil(int(T_end or 0) * (delta - 1) / delta),
            update_freq=delta - 1,
            first_update=delta - 1,
            drop_fraction=told.get("alpha", alpha),
            grad_accumulation=told.get("grad_accumulation_n", grad_accumulation_n),
        )
        if state_dict is not None:
            updates, calls = int(saved["rigl_steps"]), int(saved["step"])
            last = updates * (delta - 1) if updates else None
            self.method.load_state_dict({"weight_steps": calls - updates, "last_update": last})
        self._updates_before = int(saved.get("rigl_steps", 0))

    @property
    def rigl_steps(self) -> int:
        """Updates so far."""
        return self._updates_before + len(self.method.history)

    @property
    def step(self) -> int:
        """Calls so far, as rigl-torch counts them."""
        return self.method.weight_steps + self.rigl_steps

    def __call__(self) -> bool:
        """Whether to take the optimizer's step: not on an update, which spends its batch."""
        return self.method()

    def cosine_annealing(self) -> float:
        """Share of the active weights that an update now would replace."""
        return self.method.schedule.fraction(self.method.weight_steps)

    def state_dict(self) -> dict[str, Any]:
        """Of the method; the optimizer's state holds it too, and the model's the connections."""
        return self.method.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave."""
        self.method.load_state_dict(state)

    def __str__(self) -> str:
        return str(self.method)


def masks_of_rigl_torch(
    model: nn.Module, backward_masks: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """Masks by layer, for `sparsekern.sparsify_(model, masks=...)`.

    Args:
        model: dense, as it was when the scheduler was made.
        backward_masks: of the scheduler, or of its `state_dict()`: one for each module with a
            weight, in order, None for those that are dense.

    Raises:
        ConfigError, ShapeError: the model has other layers.
    """
    found = _weighted(model)
    if len(found) != len(backward_masks):
        raise ConfigError(
            f"`backward_masks` must have one entry for each of {len(found)} modules with a weight; "
            f"got {len(backward_masks)}"
        )
    masks = {}
    for (name, module), mask in zip(found, backward_masks, strict=True):
        if mask is None:
            continue
        if mask.shape != module.weight.shape:
            raise ShapeError(
                f"the mask of {name!r} must have shape {tuple(module.weight.shape)}; "
                f"got {tuple(mask.shape)}"
            )
        masks[name] = mask.bool()
    return masks


def _weighted(model: nn.Module, prefix: str = "") -> list[tuple[str, Any]]:
    """Modules with a weight in rigl-torch's order; of BatchNorm2d alone it makes an exception."""
    found: list[tuple[str, Any]] = []
    for name, module in model._modules.items():
        if module is None:
            continue
        if getattr(module, "weight", None) is not None and type(module) is not nn.BatchNorm2d:
            found.append((prefix + name, module))
        else:
            found += _weighted(module, f"{prefix}{name}.")
    return found


def _shares(
    model: nn.Module, sparsity: float, distribution: str, ignore_linear: bool
) -> dict[str, Any]:
    """How rigl-torch shares a sparsity out, as arguments of `sparsify_`."""
    names = [name for name, module in model.named_modules() if isinstance(module, _KINDS)]
    first = names[0] if len(names) > 1 and distribution == "uniform" else None

    def wanted(module: nn.Module, name: str) -> bool:
        skipped = name == first or (ignore_linear and isinstance(module, nn.Linear))
        return isinstance(module, _KINDS) and not skipped

    def uniform(_name: str, _module: nn.Module) -> float:
        return sparsity

    shared = "erk" if distribution == "erk" else uniform
    return {"filter_fn": wanted, "distribution": shared}


def _check(dense_allocation: float, T_end: object, delta: object, distribution: str) -> None:
    if not 0 < dense_allocation < 1:
        raise ConfigError(f"`dense_allocation` must lie in (0, 1); got {dense_allocation}")
    if type(T_end) is not int or T_end < 1:
        raise ConfigError(f"`T_end` must be an int of at least 1, in calls; got {T_end!r}")
    if type(delta) is not int or delta < 2:
        raise ConfigError(f"`delta` must be an int of at least 2, in calls; got {delta!r}")
    if distribution not in ("uniform", "erk"):
        raise ConfigError(
            f"`sparsity_distribution` must be 'uniform' or 'erk'; got {distribution!r}"
        )
