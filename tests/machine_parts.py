"""What the state machine drives: a sparse model, its optimizer, method and average."""

import copy
import random
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparsekern as sk

DECAY = 0.75


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(6, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def linear():
    return nn.Sequential(nn.Linear(6, 18), nn.BatchNorm1d(18), nn.ReLU(), nn.Linear(18, 5))


def conv():
    first = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(2)
    return nn.Sequential(*first, nn.Conv1d(8, 10, 3), nn.ReLU(), nn.Flatten(), nn.Linear(70, 5))


MODELS = {
    "linear": (linear, (7, 6)),
    "conv": (conv, (5, 8, 3, 3)),
    "gru": (lambda: Recurrent(nn.GRU), (5, 3, 6)),
    "lstm": (lambda: Recurrent(nn.LSTM), (5, 3, 6)),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.125),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.5, centered=True),
}
START = {("adagrad", "sum"): 0.125}
METHODS = {"rigl": sk.RigL, "set": sk.SET, "static": sk.Static}
AVERAGES = ("none", "ema", "ema with buffers", "followed copy")


class Spec(NamedTuple):
    """What is trained."""

    model: str
    block: int
    impl: str | None
    optimizer: str
    method: str
    average: str
    passes: int
    freq: int
    grow_init: str

    @classmethod
    def draw(cls, g: random.Random) -> "Spec":
        """One of all."""
        return cls(
            g.choice(list(MODELS)),
            g.choice((1, 4)),
            g.choice((None, None, "masked")),
            g.choice(list(OPTIMIZERS)),
            g.choice(("rigl", "rigl", "set", "set", "static")),
            g.choice(AVERAGES),
            g.choice((1, 1, 2)),
            g.choice((1, 2, 3)),
            g.choice(("zeros", "zeros", "init")),
        )

    def possible(self) -> bool:
        """Adafactor's factors of a dense matrix belong to rows and columns, not to weights."""
        return not (self.optimizer == "adafactor" and self.impl == "masked")


class Parts:
    """A model in training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    method: Any
    average: Any

    def __init__(self, spec: Spec, seed: int, dtype: torch.dtype) -> None:
        self.spec, self.dtype = spec, dtype
        self.model = sparse(spec, seed, dtype)
        self.attach()
        self.average = self.averaged()

    def attach(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """A new method, on a new optimizer unless one is given."""
        spec = self.spec
        self.optimizer = optimizer or OPTIMIZERS[spec.optimizer](self.model.parameters())
        self.method = METHODS[spec.method](
            self.model,
            self.optimizer,
            t_end=10**6,
            update_freq=spec.freq,
            drop_fraction=0.5,
            grow_init=spec.grow_init,
            grad_accumulation=spec.passes,
        )

    def averaged(self) -> Any:
        """A new average of the model as it is."""
        kind = self.spec.average
        if kind == "none":
            return None
        if kind == "followed copy":
            made = copy.deepcopy(self.model)
            self.method.follow(made)
            return made
        average = get_ema_multi_avg_fn(DECAY)
        return AveragedModel(self.model, multi_avg_fn=average, use_buffers="buffers" in kind)

    def update_average(self) -> None:
        """As a training loop does after a step."""
        if isinstance(self.average, AveragedModel):
            self.average.update_parameters(self.model)
        elif self.average is not None:
            with torch.no_grad():
                pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
                for own, new in pairs:
                    own.lerp_(new, 1 - DECAY)

    def backward(self, seed: int, scale: float = 1.0) -> torch.Tensor:
        """The passes of a step; the last one's loss."""
        loss = torch.zeros(())
        for i in range(self.spec.passes):
            loss = self.loss(seed + i) * scale
            loss.backward()
        return loss.detach()

    def loss(self, seed: int) -> torch.Tensor:
        """Of a random batch."""
        drawn = torch.Generator().manual_seed(seed)
        shape = MODELS[self.spec.model][1]
        x = torch.randn(shape, generator=drawn, dtype=torch.float64).to(self.dtype)
        return self.model(x).sub(1).square().mean()

    def held(self) -> dict[str, Any]:
        """All that is saved, copied."""
        average = None if self.average is None else self.average.state_dict()
        held = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return copy.deepcopy(held | {"average": average, "method": self.method.state_dict()})

    def layers(self) -> dict[str, Any]:
        """The sparse layers."""
        return dict(sk.sparse_layers(self.model))

    def twins(self) -> dict[str, Any]:
        """Those of the average, by the same names."""
        if self.average is None:
            return {}
        return {n.removeprefix("module."): m for n, m in sk.sparse_layers(self.average).items()}


def dense(spec: Spec, seed: int, dtype: torch.dtype) -> nn.Module:
    """A model to turn sparse."""
    torch.manual_seed(seed)
    return MODELS[spec.model][0]().to(dtype)


def sparse(spec: Spec, seed: int, dtype: torch.dtype) -> nn.Module:
    """The same, sparse; the first layer of a recurrent model stays dense."""
    return sk.sparsify_(
        dense(spec, seed, dtype),
        0.6,
        block=spec.block,
        distribution="uniform",
        impl=spec.impl,
        filter_fn=lambda *_: True,
        generator=torch.Generator().manual_seed(seed),
    )
