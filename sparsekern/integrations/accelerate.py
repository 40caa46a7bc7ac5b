"""Methods in loops of accelerate: `attach(accelerator, model, optimizer, sk.RigL, t_end=1000)`."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from sparsekern.carry.wrappers import unwrapped
from sparsekern.integrations.begin import begin
from sparsekern.integrations.monitor import Monitor
from sparsekern.methods import Method


def attach(
    accelerator: Any,
    model: nn.Module,
    optimizer: Any,
    method: type[Method] | None = None,
    *,
    by_layer: bool = False,
    **options: Any,
) -> Method:
    """Attach a method to a prepared model and optimizer, and log through the accelerator.

        model, optimizer, data = accelerator.prepare(model, optimizer, data)
        method = attach(accelerator, model, optimizer, sk.RigL, t_end=0.75, total_steps=steps)

    `accelerator.save_state` and `load_state` hold the method's state, since the optimizer's state
    holds it. The figures of `Monitor.news` go to `accelerator.log` at the steps on which something
    happened: counted from 0, batches that were spent on updates included, a resume too.

    Args:
        accelerator: an `accelerate.Accelerator`.
        model: as `prepare` gave it, or before.
        optimizer: the same.
        method: the class; None if one is attached.
        by_layer: log the blocks dropped and grown in each layer too.
        options: of the method; `grad_accumulation` is the accelerator's unless given.
    """
    attached = begin(
        method,
        accelerator.unwrap_model(model),
        [optimizer],
        options,
        passes=accelerator.gradient_accumulation_steps,
        total_steps=lambda: math.inf,  # accelerate does not know
    )
    monitor = Monitor(attached, by_layer=by_layer)

    def log(*_: Any) -> None:
        news = monitor.news() if attached.attached else {}
        if news and accelerator.trackers:
            spent = 0 if attached.step_on_update else len(attached.history)
            accelerator.log(news, step=attached.weight_steps + spent - 1)

    unwrapped(optimizer)[-1].register_step_post_hook(log)
    return attached
