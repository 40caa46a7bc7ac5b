"""A callback of Hugging Face's `Trainer`: `SparseTraining(sk.RigL, t_end=0.75).add_to(trainer)`."""

from __future__ import annotations

from typing import Any

from sparsekern.errors import UnavailableError
from sparsekern.integrations.begin import begin
from sparsekern.integrations.monitor import Monitor
from sparsekern.methods import Method

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise UnavailableError(
        f"transformers can't be imported ({error}): pip install 'sparsekern[transformers]'"
    ) from error


class SparseTraining(TrainerCallback):  # type: ignore[misc]
    """Trains the sparse layers of a model by a method, and logs what it does.

        model = sk.sparsify_(model, 0.9)
        trainer = Trainer(model, arguments, train_dataset=data)
        SparseTraining(sk.RigL, t_end=0.75).add_to(trainer)

    Checkpoints hold the method's state, since the optimizer's state holds it, and `train(
    resume_from_checkpoint=...)` goes on where it was. The figures of `Monitor.news` are logged at
    the steps on which something happened. `Trainer(callbacks=[SparseTraining(...)])` works too, but
    a callback is not told its trainer: then they are added to what the trainer logs at
    `logging_steps`, seen by `state.log_history` and by those reporters that were added later.

    Args:
        method: the class; None if the optimizer that the trainer is given has one.
        by_layer: log the blocks dropped and grown in each layer too.
        options: of the method. `t_end` as a float is a share of the trainer's steps;
            `grad_accumulation` is the trainer's unless given.

    Attributes:
        method: that is attached, once training has begun.
    """

    def __init__(
        self, method: type[Method] | None = None, *, by_layer: bool = False, **options: Any
    ) -> None:
        self.kind, self.by_layer, self.options = method, by_layer, options
        self.method: Method | None = None
        self._trainer: Any = None
        self._monitor: Monitor | None = None
        self._unlogged: dict[str, float] = {}

    def add_to(self, trainer: Any) -> SparseTraining:
        """Add this callback to a trainer, and log through it."""
        self._trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach: the optimizer exists, and holds a checkpoint's state if there is one."""
        progress = None
        if self.kind is not None and self.method is not None and self.method.attached:
            progress = self.method.state_dict() if state.global_step else None
            self.method.detach()  # of an earlier `train` with this optimizer
        self.method = begin(
            self.kind,
            kwargs["model"],
            [kwargs["optimizer"]],
            self.options,
            passes=args.gradient_accumulation_steps,
            total_steps=lambda: state.max_steps,
        )
        if progress is not None:
            self.method.load_state_dict(progress)
        self._monitor = Monitor(self.method, by_layer=self.by_layer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log what is new."""
        news = self._monitor.news() if self._monitor is not None else {}
        if news and self._trainer is not None:
            due = control.should_log  # which `log` takes for its own
            self._trainer.log(news)
            control.should_log = due
        else:
            self._unlogged |= news

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add what is not logged yet, of a trainer that is not known."""
        if self._unlogged and logs is not None:
            logs.update(self._unlogged)
            if state.log_history:
                state.log_history[-1].update(self._unlogged)
            self._unlogged = {}
