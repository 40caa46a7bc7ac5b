"""One training run: a network on images or text, dense or by a sparse method.

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
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsekern.cost.held import HeldBytes, held_bytes
from sparsekern.cost.modes import evaluating
from sparsekern.cost.run_flops import Flops, forward_flops, run_flops
from sparsekern.cost.timing import synchronize
from sparsekern.errors import ConfigError, TrainingLoopError
from sparsekern.methods import METHODS, Method
from sparsekern.swap import sparse_layers
from sparsekern.training.config import ALL_METHODS, DENSE, TrainConfig
from sparsekern.training.data import Dataset, Text, batches, for_model
from sparsekern.training.network import build, first_layer_connections, shaped

T_END_SHARE = 0.75
"""Topology updates stop at this share of the weight steps (Evci et al. 2020)."""


class LayerFacts(NamedTuple):
    """What became of one sparse layer."""

    name: str
    shape: tuple[int, int]
    nnz: int
    impl: str


class Connections(NamedTuple):
    """Connections that leave each input, (inputs,) int64, before and after training."""

    start: Tensor
    end: Tensor


class Score(NamedTuple):
    """How well the held-out data is predicted.

    Attributes:
        accuracy: share of the images, or characters, whose most likely class is the right one.
        bits: per character, of the right one; None for images.
    """

    accuracy: float
    bits: float | None


class _UpdateStep(NamedTuple):
    seconds: float
    spent_batch: bool


@dataclass(frozen=True, eq=False)
class RunResult:
    """What one run gave.

    Attributes:
        method: as asked for.
        seed: as asked for.
        accuracy: share of the held-out images classified rightly after the last step, or of
            characters guessed rightly.
        bits_per_character: of the held-out text; None for images.
        losses: mean training loss of each epoch.
        weight_steps: steps of the optimizer that changed weights.
        updates: topology updates.
        update_batches: batches that updates spent instead of a weight step.
        flops: by formula.
        held: bytes of real tensors.
        layers: the sparse ones.
        seconds: wall-clock time of training, testing left out.
        update_seconds: median time of a step with a topology update; None without updates.
        connections: of the image with the first layer; None if that is not fully connected.
    """

    method: str
    seed: int
    accuracy: float
    bits_per_character: float | None
    losses: tuple[float, ...]
    weight_steps: int
    updates: int
    update_batches: int
    flops: Flops
    held: HeldBytes
    layers: tuple[LayerFacts, ...]
    seconds: float
    update_seconds: float | None
    connections: Connections | None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, without the connections."""
        layers = [layer._asdict() for layer in self.layers]
        kept = {k: v for k, v in vars(self).items() if k not in ("method", "connections")}
        return kept | {"flops": asdict(self.flops), "held": asdict(self.held), "layers": layers}


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
        method: "dense", "static", "set" or "rigl".
        seed: of initial values, connections and batches.
        on_step: called after each weight step with their number.

    Raises:
        ConfigError, ShapeError: the network or the batch does not fit the data.
        DeviceError, DtypeError, UnavailableError: the implementation can't run here.
        TrainingLoopError: the loss is no longer finite.
    """
    return Trainer(config, data, method, seed).train(on_step)


def total_steps(config: TrainConfig, data: Dataset) -> int:
    """Weight steps of one run.

    Raises:
        ConfigError: a batch is larger than the training set.
    """
    samples = len(data.train_y)
    if config.batch_size > samples:
        raise ConfigError(
            f"`batch_size` must be at most the {samples} training samples; got {config.batch_size}"
        )
    return config.epochs * (samples // config.batch_size)


class Trainer:
    """A network with its optimizer and method, ready to train; `run` is the short way.

    Args and raises: as in `run`.
    """

    def __init__(self, config: TrainConfig, data: Dataset, method: str, seed: int) -> None:
        if method not in ALL_METHODS:
            raise ConfigError(f"`method` must be one of {ALL_METHODS}; got {method!r}")
        self.config, self.method_name, self.seed = config, method, seed
        self.steps = total_steps(config, data)
        data = shaped(config, data)
        self.model = build(config, data, method, seed)
        self.data = data.to(config.device)
        self.optimizer = _optimizer(config, self.model)
        self.method = self._attach()
        self.done = 0
        self._batches = batches(self.data, config.batch_size, 2 * seed)
        # another stream, so that weight steps see the same batches as without updates
        self._update_batches = batches(self.data, config.batch_size, 2 * seed + 1)

    def train(self, on_step: Callable[[int], None] | None = None) -> RunResult:
        """Take all weight steps, then test."""
        before = first_layer_connections(self.model, self.data)
        start = time.perf_counter()
        device = self.data.train_x.device
        # dropout draws from the global generators; the fork leaves them as they were
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            losses, updates = self._take_steps(on_step)
        seconds = time.perf_counter() - start
        spent = sum(update.spent_batch for update in updates)
        held, score = held_bytes(self.model, self.optimizer), self.score()
        after = first_layer_connections(self.model, self.data)
        forward = forward_flops(self.model, for_model(self.data.test_x[:1]))
        return RunResult(
            method=self.method_name,
            seed=self.seed,
            accuracy=score.accuracy,
            bits_per_character=score.bits,
            losses=tuple(losses),
            weight_steps=self.done,
            updates=len(updates),
            update_batches=spent,
            flops=run_flops(forward, self.config.batch_size, self.done, spent),
            held=held,
            layers=_layer_facts(self.model),
            seconds=seconds,
            update_seconds=statistics.median(u.seconds for u in updates) if updates else None,
            connections=None if before is None or after is None else Connections(before, after),
        )

    def _take_steps(
        self, on_step: Callable[[int], None] | None
    ) -> tuple[list[float], list[_UpdateStep]]:
        """Train to the end; returns the mean loss of each epoch, and the updates."""
        per_epoch = self.steps // self.config.epochs
        losses: list[float] = []
        updates: list[_UpdateStep] = []
        total = torch.zeros((), dtype=torch.float32, device=self.config.device)
        while self.done < self.steps:
            done, known, began = self.done, self._updates(), time.perf_counter()
            due = self.method is not None and self.method.due
            loss = self.step()
            if due:
                if self._updates() == known:  # postponed: its gradients were not finite
                    self._finite(math.nan)
                synchronize(total.device)
                updates.append(_UpdateStep(time.perf_counter() - began, self.done == done))
            if self.done == done:
                continue
            total += loss
            if self.done % per_epoch == 0:
                losses.append(self._finite(float(total) / per_epoch))
                total.zero_()
            if on_step:
                on_step(self.done)
        return losses, updates

    def step(self) -> Tensor:
        """One step on the next batch, weight step or topology update; returns the loss, a scalar.

        After the last weight step it may still be called, to be timed: the learning rate is 0 then.
        """
        spends = self.method is not None and self.method.due and not self.method.step_on_update
        x, y = next(self._update_batches if spends else self._batches)
        progress = min(self.done / self.steps, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * (1 + math.cos(math.pi * progress)) / 2
        self.optimizer.zero_grad(set_to_none=True)
        loss = _loss(self.model(x), y)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.done = self.done + 1 if self.method is None else self.method.weight_steps
        return loss.detach()

    def score(self) -> Score:
        """Predict the held-out data, in evaluation mode."""
        right, nats = 0, 0.0
        with evaluating(self.model):
            # what fits in training fits in testing
            held_out = (self.data.test_x, self.data.test_y)
            parts = [torch.split(part, self.config.batch_size) for part in held_out]
            for x, y in zip(*parts, strict=True):
                scores, labels = self.model(for_model(x)), for_model(y)
                right += int((scores.argmax(-1) == labels).sum())
                nats += float(_loss(scores, labels, reduction="sum"))
        count = self.data.test_y.numel()
        if not isinstance(self.data, Text):
            return Score(right / count, None)
        return Score(right / count, self._finite(nats) / count / math.log(2))

    def _attach(self) -> Method | None:
        if self.method_name == DENSE:
            return None
        return METHODS[self.method_name](
            self.model,
            self.optimizer,
            t_end=max(1, int(T_END_SHARE * self.steps)),
            update_freq=self.config.update_freq,
            drop_fraction=self.config.drop_fraction,
            seed=self.seed,
        )

    def _updates(self) -> int:
        return len(self.method.history) if self.method else 0

    def _finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise TrainingLoopError(
                f"the loss must stay finite; got {loss} after {self.done} weight steps "
                f"of {self.method_name!r}, seed {self.seed}: try a smaller learning rate"
            )
        return loss


def _loss(scores: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy in nats of scores (..., classes) and labels (...)."""
    return nn.functional.cross_entropy(scores.flatten(0, -2), labels.flatten(), reduction=reduction)


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
