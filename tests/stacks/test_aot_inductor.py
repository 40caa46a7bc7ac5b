"""Packages of AOTInductor: compiled C++ that calls the operators of this library."""

import shutil

import pytest
import torch
from torch import nn

import sparsekern as sk

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def test_a_package_takes_any_batch(tmp_path):
    model = nn.Sequential(
        sk.SparseConv2d(4, 8, 3, stride=2, padding=1, sparsity=0.5, block=2),
        nn.ReLU(),
        nn.Flatten(),
        sk.SparseLinear(8 * 16, 5, sparsity=0.5),
    ).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        x = torch.randn(4, 4, 8, 8)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        run = torch._inductor.aoti_load_package(path)
        for size in (1, 4, 7):
            x = torch.randn(size, 4, 8, 8)
            assert torch.equal(run(x), model(x))
