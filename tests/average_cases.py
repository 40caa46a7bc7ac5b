"""Small sparse models in training, for averages to follow."""

import torch
from torch import nn

import sparsekern as sk
from sparsekern.swap import sparse_layers

DECAY = 0.9


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def linear():
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def conv1d():
    head = nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), *head)


def conv2d():
    head = nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    return nn.Sequential(nn.Conv2d(6, 8, 3, groups=2), *head)


FAMILIES = {
    "linear": (linear, (9, 6)),
    "conv1d": (conv1d, (9, 6, 4)),
    "conv2d": (conv2d, (9, 6, 4, 4)),
    "gru": (Recurrent, (9, 5, 6)),
}
METHODS = {"rigl": sk.RigL, "set": sk.SET, "static": sk.Static}


class Run:
    """A sparse model in training: a step of it changes the topology every third time."""

    def __init__(self, family="linear", method="rigl", *, seed=0, model=None, **options):
        make, self.shape = FAMILIES[family]
        torch.manual_seed(seed)
        self.model = model
        if model is None:
            drawn = torch.Generator().manual_seed(seed)
            self.model = sk.sparsify_(
                make(),
                0.7,
                distribution="uniform",
                generator=drawn,
                exclude=("*rnn.ih_l0",) if family == "gru" else (),
                filter_fn=lambda *_: True,
                **options,
            )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.method = METHODS[method](
            self.model, self.optimizer, t_end=10_000, update_freq=3, drop_fraction=0.5
        )

    def step(self, times=1):
        for _ in range(times):
            self.optimizer.zero_grad()
            self.model(torch.randn(self.shape)).pow(2).mean().backward()
            self.optimizer.step()

    def train(self, average, steps=12):
        for _ in range(steps):
            self.step()
            average.update_parameters(self.model)
        return average


def dense(model):
    return {name: layer.dense_weight() for name, layer in sparse_layers(model).items()}


def masks(model):
    return {name: layer.mask() for name, layer in sparse_layers(model).items()}


def averaged_like(model, average):
    """Whether each sparse layer of an average holds the model's connections, all arrays valid."""
    own = [layer.topology.validate() for layer in sparse_layers(average).values()]
    return [t.digest() for t in own] == [
        layer.topology.digest() for layer in sparse_layers(model).values()
    ]
