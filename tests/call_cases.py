"""Layers of every family, and a step through them, watched or not."""

from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekern as sk

LAYERS = {
    "linear": (lambda **k: sk.SparseLinear(33, 50, sparsity=0.6, **k), (5, 33)),
    "conv2d": (lambda **k: sk.SparseConv2d(20, 36, 3, padding=1, sparsity=0.6, **k), (2, 20, 6, 5)),
    "conv1d": (lambda **k: sk.SparseConv1d(20, 36, 3, sparsity=0.6, **k), (2, 20, 7)),
    "gru": (lambda **k: sk.SparseGRU(20, 24, sparsity=0.6, **k), (4, 3, 20)),
}


class Watching(TorchDispatchMode):
    """Sees every operator, and changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def made(name, *, dtype=torch.float32, **settings):
    make, shape = LAYERS[name]
    return make(dtype=dtype, **settings), torch.randn(shape, dtype=dtype)


def step(layer, x, watcher=nullcontext):
    """Output, and gradients of input and parameters."""
    x = x.detach().requires_grad_()
    parameters = list(layer.parameters())
    with watcher():
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        return y, *torch.autograd.grad(y, [x, *parameters], dy)


def changed(layer):
    array = layer.col if hasattr(layer, "col") else layer.hh_l0.col
    array.add_(0)
