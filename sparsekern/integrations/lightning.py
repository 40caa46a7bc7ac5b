"""A callback of PyTorch Lightning: `Trainer(callbacks=[SparseTraining(sk.RigL, t_end=0.75)])`."""

from __future__ import annotations

import sys
from typing import Any

from sparsekern.errors import UnavailableError
from sparsekern.integrations.begin import begin
from sparsekern.integrations.monitor import Monitor
from sparsekern.methods import Method

try:
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
        from pytorch_lightning import Callback
    else:
        from lightning.pytorch import Callback
except ImportError as error:
    raise UnavailableError(
        f"PyTorch Lightning can't be imported ({error}): pip install 'sparsekern[lightning]'"
    ) from error


class SparseTraining(Callback):  # type: ignore[misc]
    """Trains the sparse layers of a LightningModule by a method, and logs what it does.

        class Net(LightningModule):
            def __init__(self):
                super().__init__()
                self.body = sk.sparsify_(body(), 0.9)
        ...
        Trainer(callbacks=[SparseTraining(sk.RigL, t_end=0.75)])

    Automatic and manual optimization, `accumulate_grad_batches` and several optimizers need
    nothing else. Checkpoints hold the method's state, since the optimizer's state holds it. The
    figures of `Monitor.news` go to all loggers of the trainer at the steps on which something
    happened, whatever `log_every_n_steps`.

    Args:
        method: the class; None if `configure_optimizers` attaches one.
        by_layer: log the blocks dropped and grown in each layer too.
        options: of the method. `t_end` as a float is a share of the trainer's steps;
            `grad_accumulation` is the trainer's unless given.

    Attributes:
        method: that is attached, once training has begun.
    """

    def __init__(
        self, method: type[Method] | None = None, *, by_layer: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.kind, self.by_layer, self.options = method, by_layer, options
        self.method: Method | None = None
        self._monitor: Monitor | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach: optimizers exist, and a checkpoint's state is not loaded yet."""
        if self.kind is not None and self.method is not None:
            self.method.detach()  # of an earlier fit
        self.method = begin(
            self.kind,
            pl_module,
            trainer.optimizers,
            self.options,
            passes=trainer.accumulate_grad_batches,
            total_steps=lambda: trainer.estimated_stepping_batches,
        )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look from here on: what a checkpoint brought is no news."""
        if self.method is not None:
            self._monitor = Monitor(self.method, by_layer=self.by_layer)

    def on_train_batch_end(self, trainer: Any, *_args: Any, **_kwargs: Any) -> None:
        """Log what is new."""
        news = self._monitor.news() if self._monitor is not None else {}
        if news:
            for logger in trainer.loggers:
                logger.log_metrics(news, step=trainer.global_step)
