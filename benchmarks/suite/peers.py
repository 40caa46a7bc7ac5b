"""Other people's sparse products, beside which ours are timed; they must be exact too."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.paired import Run
from benchmarks.suite.problem import Contender, Tensors
from sparsekern.topology import Topology

SPARSELAB = "sparselab"


def torch_sparse(
    operation: str, topology: Topology, values: Tensor, bias: Tensor, x: Tensor, dy: Tensor
) -> dict[str, Contender | str]:
    """torch.sparse on the same weight: CSR if it is unstructured, else BSR.

    Each operation is the shortest that torch documents: `linear` with a sparse weight, `dy @ w`,
    `sampled_addmm`, and autograd for a step.
    """
    name = "torch csr" if topology.block == (1, 1) else "torch bsr"
    w, mask = _to_torch(topology, values), topology.to_mask()

    def step() -> Tensors:
        x.grad, weight.grad, added.grad = None, None, None
        y = functional.linear(x, weight, added)
        torch.autograd.backward(y, dy)
        return _gradients(y, x.grad, weight.grad, added.grad)

    def read_step(result: Tensors) -> Tensors:
        y, dx, dw, db = result
        return y, dx, (dw if dw.layout is torch.strided else dw.to_dense()) * mask, db

    def forward() -> Tensor:
        with torch.no_grad():
            return functional.linear(x, w, bias)

    if operation == "step":
        weight, added = w.clone().requires_grad_(), bias.clone().requires_grad_()
        return {name: Contender(Run(step), read_step)}
    calls = {
        "forward": (forward, lambda y: (y,)),
        "dx": (lambda: dy @ w, lambda dx: (dx,)),
        "dw": (
            lambda: torch.sparse.sampled_addmm(w, dy.t(), x.detach(), beta=0.0),
            lambda dw: (dw.to_dense(),),
        ),
    }
    call, read = calls[operation]
    return {name: Contender(Run(call), read)}


def sparselab(
    operation: str, topology: Topology, values: Tensor, bias: Tensor, x: Tensor, dy: Tensor
) -> dict[str, Contender | str]:
    """sparselab's linear layer with the same weight, where it is installed; CPU, unstructured."""
    try:
        found: Any = importlib.import_module(SPARSELAB)
    except ImportError:
        return {}
    if topology.block != (1, 1):
        return {SPARSELAB: "has no blocks"}
    if operation not in ("forward", "step"):
        return {SPARSELAB: f"has no {operation} by itself"}
    layer, csr = _sparselab_layer(found, topology, values, bias)

    def forward() -> Tensor:
        with torch.no_grad():
            y: Tensor = layer(x)
            return y

    def step() -> Tensors:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        y = layer(x)
        torch.autograd.backward(y, dy)
        return _gradients(y, x.grad, layer._values.grad, layer.bias.grad)

    def read_step(result: Tensors) -> Tensors:
        y, dx, slots, db = result
        dw, pairs = torch.zeros(topology.shape), zip(csr.row_start, csr.row_nnz, strict=True)
        for i, (start, count) in enumerate(pairs):
            live = slice(int(start), int(start) + int(count))
            dw[i, torch.as_tensor(csr.col_indices[live]).long()] = slots[live]
        return y, dx, dw, db

    if operation == "forward":
        return {SPARSELAB: Contender(Run(forward), lambda y: (y,))}
    return {SPARSELAB: Contender(Run(step), read_step)}


def _sparselab_layer(
    found: Any, topology: Topology, values: Tensor, bias: Tensor
) -> tuple[Any, Any]:
    """Its layer draws its own connections; ours take their place."""
    rows, cols = topology.shape
    csr = found.PaddedCSR.from_torch_sparse_csr(_to_torch(topology, values))
    layer = found.SparseLinear(cols, rows, sparsity=1 - topology.density)
    layer._csr, layer._values = csr, nn.Parameter(torch.from_numpy(csr.values))
    with torch.no_grad():
        layer.bias.copy_(bias)
    return layer, csr


def _to_torch(topology: Topology, values: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse CSR support is in beta state
        return topology.to_torch(values)


def _gradients(*tensors: Tensor | None) -> Tensors:
    """All of them; a missing one would compare as nothing.

    Raises:
        RuntimeError: a gradient was not computed.
    """
    found = tuple(t.detach() for t in tensors if t is not None)
    if len(found) < len(tensors):
        raise RuntimeError("a gradient was not computed")
    return found
