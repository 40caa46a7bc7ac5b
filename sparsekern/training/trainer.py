"""One training run: a network on images or text, by one of the recipes.

    config = TrainConfig()
    result = run(config, data.load("digits"), "rigl", seed=0)

A run depends on its arguments only. At one seed all methods draw the same batches, and all sparse
ones start from the same connections and values. A batch that a topology update spends comes on top,
so every method takes the same number of weight steps on the same data.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsekern.cost.held import held_bytes
from sparsekern.cost.timing import synchronize
from sparsekern.errors import ConfigError, TrainingLoopError
from sparsekern.methods import Method
from sparsekern.swap import sparse_layers
from sparsekern.training import recipes
from sparsekern.training.config import TrainConfig
from sparsekern.training.data import Dataset, Text, batches, for_model
from sparsekern.training.meter import Meter
from sparsekern.training.network import first_layer_connections, shaped
from sparsekern.training.outcome import Connections, LayerFacts, Point, RunResult
from sparsekern.training.score import Samples, Score, loss_of, score, split_off
from sparsekern.training.topology_frames import TopologyFrames


class _UpdateStep(NamedTuple):
    seconds: float
    spent_batch: bool


def run(
    config: TrainConfig,
    data: Dataset,
    method: str,
    seed: int,
    on_step: Callable[[int], None] | None = None,
) -> RunResult:
    """Train once and test.

    Args:
        config: what to train; `data`, `methods` and `seeds` in it are not looked at.
        data: moved to `config.device`.
        method: the name of a recipe, see `sparsekern.training.recipes`.
        seed: of initial values, connections and batches.
        on_step: called after each weight step with their number.

    Raises:
        ConfigError, ShapeError: the network or the batch does not fit the data, or there is no
            such method.
        DeviceError, DtypeError, UnavailableError: the implementation can't run here.
        TrainingLoopError: the loss is no longer finite.
    """
    return Trainer(config, data, method, seed).train(on_step)


def epoch_steps(config: TrainConfig, data: Dataset) -> int:
    """Weight steps of a pass over the training samples, those for validation left out.

    Raises:
        ConfigError: a batch is larger than the training set.
    """
    samples = len(data.train_y) - round(config.validation * len(data.train_y))
    if config.batch_size > samples:
        raise ConfigError(
            f"`batch_size` must be at most the {samples} training samples; got {config.batch_size}"
        )
    return samples // config.batch_size


def total_steps(config: TrainConfig, data: Dataset) -> int:
    """Weight steps of one run.

    Raises:
        ConfigError: as in `epoch_steps`.
    """
    return max(1, round(config.multiplier * config.epochs * epoch_steps(config, data)))


class Trainer:
    """A network with its optimizer and method, ready to train; `run` is the short way.

    Args and raises: as in `run`.
    """

    def __init__(self, config: TrainConfig, data: Dataset, method: str, seed: int) -> None:
        recipe = recipes.find(method)
        self.config, self.method_name, self.seed = config, method, seed
        self.per_epoch, self.steps = epoch_steps(config, data), total_steps(config, data)
        # on the CPU first, whose order of samples is the same for every device
        left, held_out = split_off(shaped(config, data), config.validation)
        self.data = left.to(config.device)
        self.validation = held_out and Samples(*(part.to(config.device) for part in held_out))
        self.test = Samples(self.data.test_x, self.data.test_y)
        prepared = recipe.prepare(recipes.Setting(config, self.data, seed, self.steps))
        self.model = prepared.model
        self.optimizer = _optimizer(config, self.model)
        self.method = prepared.attach(self.model, self.optimizer)
        self.done = 0
        self.frames: TopologyFrames | None = None
        self._batches = batches(self.data, config.batch_size, 2 * seed)
        # another stream, so that weight steps see the same batches as without updates
        self._update_batches = batches(self.data, config.batch_size, 2 * seed + 1)

    def train(self, on_step: Callable[[int], None] | None = None) -> RunResult:
        """Take all weight steps, then test."""
        before = first_layer_connections(self.model, self.data)
        self.see()
        meter = Meter(self.model, self.method, for_model(self.test.x[:1]), self.config.batch_size)
        device = self.data.train_x.device
        # dropout draws from the global generators; the fork leaves them as they were
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            course = _Course(self, meter)
            course.run(on_step)
        kept = self.method.growth.bytes() if isinstance(self.method, Method) else 0
        held, last = held_bytes(self.model, self.optimizer, kept), self.score()
        after = first_layer_connections(self.model, self.data)
        updates = [update.seconds for update in course.updates]
        return RunResult(
            method=self.method_name,
            seed=self.seed,
            accuracy=last.accuracy,
            bits_per_character=last.bits,
            validation=course.curve[-1].validation,
            start_loss=course.start_loss,
            curve=tuple(course.curve),
            weight_steps=self.done,
            updates=len(updates),
            update_batches=sum(update.spent_batch for update in course.updates),
            flops=meter.flops(),
            dense_at=meter.dense_at,
            held=held,
            layers=_layer_facts(self.model),
            seconds=course.seconds,
            update_seconds=statistics.median(updates) if updates else None,
            connections=None if before is None or after is None else Connections(before, after),
            history=tuple(self.method.history) if self.method else (),
            frames=None if self.frames is None else self.frames.to_json(),
        )

    def step(self) -> Tensor:
        """One step on the next batch, weight step or topology update; returns the loss, a scalar.

        After the last weight step it may still be called, to be timed: the learning rate is 0 then.
        """
        method = self.method
        spends = method is not None and not method.step_on_update and method.due
        x, y = next(self._update_batches if spends else self._batches)
        progress = min(self.done / self.steps, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * (1 + math.cos(math.pi * progress)) / 2
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss_of(self.model(x), y)
        torch.autograd.backward(loss)
        self.optimizer.step()
        # a method that has done its part (a pruning) follows no more steps
        follows = method is not None and method.attached
        self.done = method.weight_steps if method is not None and follows else self.done + 1
        return loss.detach()

    def score(self) -> Score:
        """Predict the test set, in evaluation mode.

        Raises:
            TrainingLoopError: the loss is no longer finite.
        """
        return self._scored(self.test)

    def validate(self) -> Score | None:
        """Predict what is kept out of training; None if nothing is."""
        return None if self.validation is None else self._scored(self.validation)

    def finite(self, loss: float) -> float:
        """The loss; `TrainingLoopError` if it is none any more."""
        if not math.isfinite(loss):
            raise TrainingLoopError(
                f"the loss must stay finite; got {loss} after {self.done} weight steps "
                f"of {self.method_name!r}, seed {self.seed}: try a smaller learning rate"
            )
        return loss

    def _scored(self, samples: Samples) -> Score:
        # what fits in training fits in testing
        is_text = isinstance(self.data, Text)
        found = score(self.model, samples, self.config.batch_size, in_bits=is_text)
        if found.bits is not None:
            self.finite(found.bits)
        return found

    def see(self) -> None:
        """Keep a frame of the first layer, if frames are wanted."""
        if self.frames is not None:
            self.frames.see(self.model, self.done)


class _Course:
    """All weight steps of a run, and what is kept of them."""

    def __init__(self, trainer: Trainer, meter: Meter) -> None:
        self.trainer, self.meter = trainer, meter
        self.curve: list[Point] = []
        self.updates: list[_UpdateStep] = []
        self.start_loss = math.nan
        self.seconds = 0.0

    def run(self, on_step: Callable[[int], None] | None) -> None:
        """Train to the end; evaluation and counting take no time of it."""
        trainer, method = self.trainer, self.trainer.method
        device = trainer.data.train_x.device
        total, since, taken = torch.zeros((), dtype=torch.float32, device=device), 0, 0
        began = time.perf_counter()
        while trainer.done < trainer.steps:
            done, known = trainer.done, _updates(method)
            due = method is not None and method.due
            step_began = time.perf_counter() if due else 0.0
            loss = trainer.step()
            spent = trainer.done == done
            if due:
                if _updates(method) == known:  # postponed: its gradients were not finite
                    trainer.finite(math.nan)
                synchronize(device)
                ended = time.perf_counter()
                self.seconds += ended - began
                self._updated(_UpdateStep(ended - step_began, spent))
                began = time.perf_counter()
            if spent:
                continue
            if not due:
                self.meter.weight_step(updated=False)
            if not taken:
                self.start_loss = trainer.finite(float(loss))
            total += loss
            taken, since = taken + 1, since + 1
            if trainer.done % trainer.per_epoch == 0 or trainer.done >= trainer.steps:
                mean = trainer.finite(float(total) / since)
                self.seconds += time.perf_counter() - began
                self._point(mean)
                total.zero_()
                since, began = 0, time.perf_counter()
            if on_step:
                on_step(trainer.done)

    def _updated(self, update: _UpdateStep) -> None:
        self.updates.append(update)
        if update.spent_batch:
            self.meter.spent_batch()
        else:
            self.meter.weight_step(updated=True)
        self.meter.look_again()
        self.trainer.see()

    def _point(self, loss: float) -> None:
        trainer = self.trainer
        flops, nnz = self.meter.flops().training, sum(self.meter.nnz.values())
        self.curve.append(Point(trainer.done, self.seconds, flops, loss, trainer.validate(), nnz))


def _updates(method: object) -> int:
    return len(getattr(method, "history", ()))


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
    )


def _layer_facts(model: nn.Module) -> tuple[LayerFacts, ...]:
    return tuple(
        LayerFacts(name, layer.matrix_shape, layer.nnz, layer.resolved_impl)
        for name, layer in sparse_layers(model).items()
    )
