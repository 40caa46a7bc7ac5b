"""Small models, optimizers and loops for the tests of training loops."""

import torch
from torch import nn
from torch.nn import functional as F

from sparsekern import SET, RigL, Static, sparse_layers, sparsify_

METHODS = {"rigl": RigL, "set": SET, "static": Static}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(12, 8, batch_first=True), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.gru(x.unflatten(1, (2, 6)).repeat(1, 1, 2))[0][:, -1])


def layers(family):
    if family == "gru":
        return Recurrent()
    if family == "conv1d":
        body = [nn.Unflatten(1, (2, 6)), nn.Conv1d(2, 8, 3), nn.Flatten(), nn.Linear(32, 8)]
    elif family == "conv2d":
        body = [nn.Unflatten(1, (2, 2, 3)), nn.Conv2d(2, 8, 2), nn.Flatten(), nn.Linear(16, 8)]
    else:
        body = [nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8)]
    return nn.Sequential(*body)


def net(family="linear", block=1):
    torch.manual_seed(0)
    model = sparsify_(layers(family), 0.6, block=block)
    assert sparse_layers(model)
    return model


def batch(i):
    g = torch.Generator().manual_seed(i)
    return torch.randn(20, 12, generator=g), torch.randint(0, 8, (20,), generator=g)


def loss(model, i):
    x, target = batch(i)
    return F.cross_entropy(model(x), target)


def train(model, optimizers, steps, after=lambda i: None):
    """The plain loop, of one optimizer or several."""
    for i in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(model, i).backward()
        for optimizer in optimizers:
            optimizer.step()
        after(i)


def sgd(model, **kwargs):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9} | kwargs)


def adam(model, **kwargs):
    return torch.optim.Adam(model.parameters(), **{"lr": 0.01} | kwargs)


def same(a, b):
    """Models with the same bits everywhere."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def digests(model):
    return [layer.topology.digest() for layer in sparse_layers(model).values()]
