"""Ranks that run out of inputs before the others: `torch.distributed.algorithms.join`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsekern.errors import TrainingLoopError
from sparsekern.methods import ranks
from sparsekern.methods.change import Decision
from sparsekern.methods.loop import Loop
from sparsekern.methods.update import TopologyUpdate
from sparsekern.nn import SparseLayer


class Joins(Loop):
    """A loop that can stand beside a DDP module: `with Join([ddp, method])`."""

    joined = False
    """Whether this rank has no inputs any more."""
    _join_config: Any = None  # set by torch's `Join`

    def join_hook(self, **_: Any) -> JoinHook:
        """What this rank does once it has no inputs."""
        return JoinHook(self)

    @property
    def join_device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self._weights())).device

    @property
    def join_process_group(self) -> Any:
        """The default one."""
        return dist.group.WORLD

    def shadow(self) -> None:
        """Count a step of the others, and take part in its update."""
        for parameter in self._weights():
            parameter.grad = None
        self._weights_move()
        spent = self.step()
        if self.step_on_update:
            self._update_if_due()
        self.weight_steps += not spent
        self._watch(self.due)


class JoinHook:
    """What a rank without inputs does, as torch's `Join` asks, until the others have none either.

    It takes part in topology updates as a rank whose gradient is zero, and takes the decisions
    from a rank that still trains. Its values stay behind, until DDP's own hook gives it the
    model of the last rank; so does optimizer state, as torch leaves it.
    """

    def __init__(self, method: Joins) -> None:
        self._method = method

    def main_hook(self) -> None:
        """The others take a step."""
        self._method.joined = True
        self._method.shadow()

    def post_hook(self, is_last_joiner: bool) -> None:  # noqa: ARG002
        """All are done."""
        self._method.joined = False


def check_joinable(layers: Mapping[str, SparseLayer], enabled: bool) -> None:
    """Raise `TrainingLoopError` inside DDP's own `join`, where ranks would wait for each other."""
    for name, layer in layers.items():
        ddp: Any = None if layer._ddp is None else layer._ddp()
        config = getattr(ddp, "_join_config", None)
        if config is not None and config.enable and not enabled:
            raise TrainingLoopError(
                f"layer {name!r} is in `ddp.join()`, which does not know of topology updates: use "
                "`with torch.distributed.algorithms.join.Join([ddp, method])`"
            )


def led(
    decisions: Mapping[str, Decision],
    joined: Sequence[int],
    layers: Mapping[str, SparseLayer],
    grown_values: Callable[[str, SparseLayer, TopologyUpdate], Tensor | None],
) -> dict[str, Decision]:
    """The decisions of a rank that still trains, where others have joined.

    Args:
        decisions: of this rank.
        joined: ranks that ran out of inputs.
        layers: by name.
        grown_values: of new blocks.
    """
    lead = next(rank for rank in range(dist.get_world_size()) if rank not in joined)
    told: dict[str, tuple[Tensor, int]] = {}
    if dist.get_rank() == lead:
        told = {n: (d.update.topology.positions().cpu(), d.dropped) for n, d in decisions.items()}
    told = ranks.given_by(lead, told)
    if dist.get_rank() not in joined:
        return dict(decisions)
    made = {}
    for name, (positions, dropped) in told.items():
        layer = layers[name]
        old = layer.topology
        update = TopologyUpdate.between(old, old.with_positions(positions.to(old.device)))
        made[name] = Decision(update, dropped, grown_values(name, layer, update))
    return made
