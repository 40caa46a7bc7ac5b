"""Triton's interpreter as users start it: `TRITON_INTERPRET=1`, without the suite's sanitizer.

The sanitizer replaces loads and stores, and with them what the interpreter asks of a mask's type:
a kernel can pass under it and raise without it.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import torch
import sparsekern as sk

def integers(*shape):
    return torch.randint(-2, 3, shape).float()

def trained(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    torch.manual_seed(1)
    y.backward(integers(*y.shape))
    return y.detach(), x.grad, layer.bias.grad

torch.manual_seed(0)
cases = {}
for block, channels in ((16, 32), (1, 4)):
    options = {"block": block, "sparsity": 0.5, "impl": "triton"}
    cases["linear", block] = sk.SparseLinear(2 * channels, channels, **options), (5, 2 * channels)
    for stride in (1, 2):
        conv = sk.SparseConv2d(channels, channels, 3, stride=stride, padding=1, **options)
        cases["conv2d", block, stride] = conv, (2, channels, 5, 4)
for case, (layer, shape) in cases.items():
    with torch.no_grad():
        layer.values.copy_(integers(*layer.values.shape))
        layer.bias.copy_(integers(*layer.bias.shape))
    dense, x = layer.to_dense(), integers(*shape)
    for got, wanted in zip(trained(layer, x), trained(dense, x), strict=True):
        assert torch.equal(got, wanted), case
    grad = dense.weight.grad
    matrix = grad if grad.dim() == 2 else grad.permute(0, 2, 3, 1).flatten(1)  # by tap
    assert torch.equal(layer.values.grad, layer.topology.pack(matrix)), case
    print(*case)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="layers run compiled here")
def test_layers_train_without_the_sanitizer():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{name} {block}{stride}"
        for block in (16, 1)
        for name, stride in (("linear", ""), ("conv2d", " 1"), ("conv2d", " 2"))
    ]
