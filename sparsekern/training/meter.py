"""FLOPs of a run while it goes on: by the active weights that each of its steps had."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator

from torch import Tensor, nn

from sparsekern.cost.run_flops import Flops, ForwardFlops, Segment, forward_flops, run_flops
from sparsekern.methods import Method
from sparsekern.methods.loop import Loop
from sparsekern.swap import sparse_layers, sparsify_
from sparsekern.tickets import Pruning

EVERY_STEP, UPDATES = "steps", "updates"


class Meter:
    """Counts the steps of a run, a segment for each topology size.

    Args:
        model: in training.
        method: attached to it, or None.
        sample: a batch of one.
        batch: samples per step.
    """

    def __init__(self, model: nn.Module, method: Loop | None, sample: Tensor, batch: int) -> None:
        self.model, self.method, self.sample, self.batch = model, method, sample, batch
        self.nnz = active_weights(model, method)
        self.segments = [Segment(self._forward())]
        # what a method that is not one of ours to ask costs: a Pruning looks at magnitudes alone
        self._dense_at = method.dense_at if isinstance(method, Method) else "never"

    def weight_step(self, updated: bool) -> None:
        """A step that moved weights; whether the topology was updated with it."""
        dense = self._dense_at == EVERY_STEP or (updated and self._dense_at == UPDATES)
        now = self.segments[-1]
        self.segments[-1] = now._replace(
            weight_steps=now.weight_steps + 1, dense_steps=now.dense_steps + dense
        )

    def spent_batch(self) -> None:
        """A batch that an update took instead."""
        now = self.segments[-1]
        self.segments[-1] = now._replace(update_batches=now.update_batches + 1)

    def look_again(self) -> None:
        """The topology has changed: what comes next costs by its new size."""
        nnz = active_weights(self.model, self.method)
        if nnz != self.nnz:
            self.nnz = nnz
            self.segments.append(Segment(self._forward()))

    def flops(self) -> Flops:
        """Of the run so far."""
        return run_flops(self.segments, self.batch)

    def _forward(self) -> ForwardFlops:
        """As if pruned weights were sparse already: Evci et al. 2020 count them like that."""
        masks = _masks(self.method)
        if all(bool(mask.all()) for mask in masks.values()):
            return forward_flops(self.model, self.sample)
        twin = copy.deepcopy(self.model)
        block = self.method.block if isinstance(self.method, Pruning) else 1
        with _only_errors(logging.getLogger("sparsekern.swap")):
            sparsify_(twin, masks=masks, block=block, filter_fn=lambda _module, _name: True)
        return forward_flops(twin, self.sample)


def active_weights(model: nn.Module, method: Loop | None) -> dict[str, int]:
    """How many weights of each sparse or pruned layer are active, by name."""
    masks = {name: int(mask.sum()) for name, mask in _masks(method).items()}
    return masks | {name: layer.nnz for name, layer in sparse_layers(model).items()}


@contextlib.contextmanager
def _only_errors(logger: logging.Logger) -> Iterator[None]:
    """What is wrong with masks is told when the real layers get them, once."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _masks(method: Loop | None) -> dict[str, Tensor]:
    return method.masks if isinstance(method, Pruning) else {}
