"""One call of the sparse convolution with numba: its plan, filled in with addresses and run."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sparsekern.ops.cpu.jit import conv_plan as plans
from sparsekern.ops.cpu.jit.conv_plan import Plan
from sparsekern.ops.cpu.jit.conv_spec import (
    NO_DOTS,
    NO_IMAGE,
    NO_INDEX,
    NO_SUMS,
    Dots,
    Image,
    Outputs,
    Places,
    Range,
    Scratch,
    Sums,
    Task,
    Weights,
)
from sparsekern.ops.cpu.jit.conv_sums import locate, locate_transposed, mark_rows
from sparsekern.ops.cpu.jit.conv_sweep import sweep
from sparsekern.ops.cpu.threads import run
from sparsekern.ops.geometry import ConvGeometry

if TYPE_CHECKING:
    from sparsekern.topology import Topology


class Job:
    """One call: connections and shapes.

    Args:
        t: connections.
        g: geometry.
        x: the input image, or its gradient.
        y: the output image, or its gradient.
    """

    def __init__(self, t: Topology, g: ConvGeometry, x: Tensor, y: Tensor) -> None:
        self.t, self.x, self.y = t, x, y
        self.call = plans.Call.of(t, g, x, y)
        self.sizes = plans.sizes(self.call)

    def forward(self, values: Tensor, bias: Tensor | None) -> None:
        """Fill y."""
        t, s, (bh, bw) = self.t, self.sizes, self.t.block
        plan = plans.forward(self.call, self.x.stride(), self.y.stride())
        places, used = self.places(plan, plan.source)
        address = 0 if bias is None else bias.data_ptr()
        out = Outputs(self.y.data_ptr(), plan.target, t.groups, s.rows, s.outs, bh, address)
        weights = Weights(values.data_ptr(), bh * bw, bw, 1)
        source = Image(self.x.data_ptr(), plan.source, t.groups, s.ins, bw, used)
        self.run(plan, source, Sums(weights, t.crow.numpy(), places, out), NO_DOTS, NO_IMAGE)

    def backward(self, x: Tensor | None, values: Tensor | None, dx: Tensor | None) -> Tensor:
        """Fill dx if there are values; return dw if there is x, else an empty tensor."""
        t, s, line = self.t, self.sizes, self.sizes.line
        to = dx if values is not None else None
        strides = (None if i is None else i.stride() for i in (x, to))
        plan = plans.backward(self.call, self.y.stride(), *strides)
        used = np.empty(t.block_rows, np.uint8)
        mark_rows(t.crow.numpy(), used)
        source = Image(self.y.data_ptr(), plan.source, t.groups, s.outs, t.block[0], used)
        sums, dots, second, keep = NO_SUMS, NO_DOTS, NO_IMAGE, None
        if values is not None and to is not None:
            if not line.complete:
                to.zero_()
            sums, keep = self.transposed(plan, values, to)
        dw = self.y.new_zeros(0)
        if x is not None:
            places, used = self.places(plan, plan.second)
            index = (t.crow.numpy(), places.at, places.count)
            dots = Dots(0, t.block, *index, s.rows, s.outs, plan.panels)
            second = Image(x.data_ptr(), plan.second, t.groups, s.ins, t.block[1], used)
            dw = self.y.new_empty(plan.parts, *t.values_shape)  # tasks fill it, in their threads
            dw[plan.tasks[-1].part + 1 :] = 0
        self.run(plan, source, sums, dots, second, dw)
        del keep
        return dw if x is None else t.clear_padding_(self.total(dw))

    def total(self, parts: Tensor) -> Tensor:
        """Sum over the first axis, in order, in one parallel region if it is worth one."""
        if parts.shape[0] == 1:
            return parts[0]
        whole = parts.new_empty(parts.shape[1:])
        lines, out = parts.view(parts.shape[0], -1).numpy(), whole.view(-1).numpy()

        def add(span: Range) -> None:
            home = out[slice(*span)]
            home[:] = lines[0, slice(*span)]
            for line in lines[1:]:
                home += line[slice(*span)]

        threads = self.sizes.threads if lines.size > plans.GRAIN else 1
        run([functools.partial(add, span) for span in plans.even(out.size, threads)])
        return whole

    # ---- what the kernels are told

    def places(self, plan: Plan, views: np.ndarray) -> tuple[Places, np.ndarray]:
        """What each block reads of x, in CSR order, and what is read at all."""
        t = self.t
        at = np.empty(t.nnzb, np.int32)
        count = np.empty(t.nnzb, np.int32) if plan.count is None else plan.count
        used = np.zeros(len(views) * t.groups * self.sizes.columns, np.uint8)
        counts = NO_INDEX if plan.count is not None else count
        index = (t.crow.numpy(), t.col.numpy())
        locate(*index, plan.table, plan.group, self.sizes.rows, at, counts, used)
        return Places(at, count, NO_INDEX), used

    def transposed(self, plan: Plan, values: Tensor, dx: Tensor) -> tuple[Sums, Tensor]:
        """The input gradient, and what must live as long as it does."""
        t, s, (bh, bw) = self.t, self.sizes, self.t.block
        phases, taps = len(plan.target), s.line.taps
        ptr = np.empty(phases * t.groups * s.columns + 1, np.int32)
        places = Places(*np.empty((3, t.nnzb), np.int32))
        sizes = (phases, t.groups, s.columns, s.rows, s.outs, bh, plan.strides[0])
        locate_transposed((t.ccol.numpy(), t.row.numpy(), t.perm.numpy()), taps, sizes, ptr, places)
        if t.block == (1, 1):
            # single entries are read one after the other, so they are put in that order
            values = values.view(-1).index_select(0, torch.from_numpy(places.slot))
        weights = Weights(values.data_ptr(), bh * bw, 1, bw)
        out = Outputs(dx.data_ptr(), plan.target, t.groups, s.columns, s.ins, bw, 0)
        return Sums(weights, ptr, places, out), values

    def run(
        self,
        plan: Plan,
        source: Image,
        sums: Sums,
        dots: Dots,
        second: Image,
        dw: Tensor | None = None,
    ) -> None:
        """Run the tasks; each adds to its part of dw (parts, nnzb, bh, bw), if there is one."""
        size = self.call.itemsize
        z = np.float32(0) if size == 4 else np.float64(0)
        ends = plan.planes[0], plan.planes[0] + plan.planes[1]
        parts = None if dw is None or not dw.numel() else dw.numpy()

        def one(task: Task) -> None:
            held = self.y.new_empty(plan.scratch)
            base = held.data_ptr()
            places = (base, base + size * ends[0], base + size * ends[1])
            scratch = Scratch(*places, *plan.strides, np.empty((plan.runs, 3), np.int64))
            mine = dots
            if parts is not None and dw is not None:
                parts[task.part, slice(*task.blocks)] = 0
                home = dw.data_ptr() + task.part * parts.strides[0]
                mine = Dots(home, *dots[1:])
            sweep(z, size, task, plan.cut, scratch, source, sums, mine, second)

        run([functools.partial(one, task) for task in plan.tasks])
