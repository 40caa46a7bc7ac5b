"""Time of a layer's step as predicted: of its products alone, from the planner's tables."""

from __future__ import annotations

import torch
from torch import nn

from sparsekern.planning import cpu_rates
from sparsekern.planning.roofline import H200, OPERATIONS, Problem, Roofline, device_named
from sparsekern.profiling.flops import Count
from sparsekern.profiling.rows import LayerRow

KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "tf32"}
"""Operands as the roofline model calls them."""


def predicted_seconds(
    row: LayerRow, module: nn.Module, count: Count, device: torch.device
) -> float | None:
    """Forward and backward of one layer; None where there is nothing to predict it from.

    On the CPU from `planning.cpu_rates`, on a GPU a lower bound from `planning.roofline`.
    """
    if not row.weights or not row.step_flops:
        return None
    return _on_gpu(row, module, count) if device.type == "cuda" else _on_cpu(row, count)


def _on_cpu(row: LayerRow, count: Count) -> float:
    kind, threads = _kind(row), torch.get_num_threads()
    stored = round(row.weights * row.forward_flops / max(row.forward_flops_dense, 1))
    steps = 0
    if kind == "recurrent":
        steps = max(1, row.forward_flops_dense // (2 * row.weights))
    work = cpu_rates.Work(row.step_flops, count.numbers, stored, steps)
    if row.block is None or row.impl == "dense":
        seconds = cpu_rates.dense_seconds(kind, work, threads)
        fixed = cpu_rates.FIXED[kind].dense_call
    else:
        seconds = cpu_rates.sparse_seconds(kind, row.block, work, threads)
        fixed = cpu_rates.FIXED[kind].sparse_call
    return seconds + (row.calls - 1) * fixed


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
