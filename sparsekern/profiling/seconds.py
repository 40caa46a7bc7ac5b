"""Time of a layer's step as predicted: of its products alone, from the planner's tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsekern.cost import cpu_rates
from sparsekern.cost.flops import Count
from sparsekern.cost.roofline import H200, OPERATIONS, Problem, Roofline, device_named
from sparsekern.nn import SparseLayer
from sparsekern.nn.kinds import weights_of
from sparsekern.nn.recurrent.base import SparseRecurrent
from sparsekern.profiling.rows import LayerRow

KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "tf32"}
"""Operands as the roofline model calls them."""


def predicted_seconds(
    row: LayerRow, module: nn.Module, count: Count, device: torch.device
) -> float | None:
    """Forward and backward of one layer; None where there is nothing to predict it from.

    On the CPU from `planning.cpu_rates`, on a GPU a lower bound from `planning.roofline`.
    """
    recurrent = isinstance(module, SparseRecurrent | nn.RNNBase | nn.RNNCellBase)
    if not row.weights or not row.step_flops or (row.shape is None and not recurrent):
        return None
    if device.type == "cuda":
        return _on_gpu(row, module, count)
    return row.calls * _on_cpu(row, module, count)


def _on_cpu(row: LayerRow, module: nn.Module, count: Count) -> float:
    """Seconds of one call."""
    kind, threads = _kind(row), torch.get_num_threads()
    stored = round(row.weights * row.forward_flops / max(row.forward_flops_dense, 1))
    steps, numbers = 0, count.numbers / row.calls
    if kind == "recurrent":
        tokens = row.forward_flops_dense / (2 * row.weights * row.calls)
        steps, numbers = _time_steps(module, count.given), tokens * _features(module)
    work = cpu_rates.Work(row.step_flops / row.calls, numbers, stored, steps)
    if row.block is None or row.impl == "dense":
        return cpu_rates.dense_seconds(kind, work, threads)
    return cpu_rates.sparse_seconds(kind, row.block, work, threads)


def _on_gpu(row: LayerRow, module: nn.Module, count: Count) -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    roofline = Roofline((device_named(name) if name else None) or H200)
    dtype = next(module.parameters()).dtype
    if row.shape is None or dtype not in KINDS:
        return None
    rows, cols = row.shape[0], row.weights // row.shape[0]
    tokens = row.forward_flops_dense // (2 * row.weights)
    read = count.numbers // tokens - rows if len(row.shape) > 2 else None
    density = row.forward_flops / row.forward_flops_dense
    problem = Problem(tokens, cols, rows, row.block or (1, 1), density, KINDS[dtype], read)
    wanted = OPERATIONS if row.backward_flops > row.forward_flops else ("forward", "dw")
    if row.block is None or row.impl == "dense":
        return len(wanted) * roofline.dense(problem).seconds
    return sum(roofline.predict(operation, problem).seconds for operation in wanted)


def _kind(row: LayerRow) -> str:
    if row.shape is None:
        return "recurrent"
    if len(row.shape) == 2:
        return "linear"
    return cpu_rates.kind_of(row.weights // (row.shape[0] * row.shape[1]))


def _time_steps(module: Any, given: tuple[int, ...]) -> int:
    """Of all layers and directions; a cell takes one."""
    if not hasattr(module, "num_layers"):
        return 1
    length = given[1 if module.batch_first and len(given) == 3 else 0]
    return int(length * module.num_layers * (2 if module.bidirectional else 1))


def _features(module: nn.Module) -> int:
    """Inputs and outputs of all weights of a recurrent layer."""
    sparse = [m.matrix_shape for m in module.modules() if isinstance(m, SparseLayer)]
    dense = [w.shape for m in module.modules() for w in weights_of(m).values()]
    return sum(rows + cols for rows, cols in [*sparse, *dense])
