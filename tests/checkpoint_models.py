"""A model with layers of all kinds for the tests of files, and how to compare states."""

import torch
from torch import nn

import sparsekern as sk


class Tied(nn.Module):
    """Layers of all kinds, a tied weight, a buffer, and an extra state."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.line = nn.Conv1d(6, 8, 3, padding=1)
        self.rnn = nn.GRU(8, 6)
        self.fc = nn.Linear(6, 10)
        self.norm = nn.BatchNorm1d(10)
        self.embedding = nn.Embedding(7, 10)
        self.out = nn.Linear(10, 7, bias=False)
        self.out.weight = self.embedding.weight
        self.steps = 0

    def forward(self, x):
        y = self.line(self.conv(x).flatten(2).relu())
        y, _ = self.rnn(y.permute(2, 0, 1))
        return self.out(self.norm(self.fc(y[-1])))

    def get_extra_state(self):
        return {"steps": self.steps, "pair": (1, float("inf"))}

    def set_extra_state(self, state):
        self.steps = state["steps"]


def dense(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Tied().to(dtype)


def sparse(dtype=torch.float32, seed=0, block=2, share=0.5, **kwargs):
    return sk.sparsify_(
        dense(dtype, seed), share, block=block, distribution="uniform", exclude=("conv",), **kwargs
    )


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(4, 2, 4, 4, generator=g).to(model.fc.weight.dtype)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def states(model):
    return {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def equal(a, b):
    """Whether two plain objects are the same, with tensors and NaN in them."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)  # noqa: PLR0124
