"""Sparse models as ONNX files: values and connections in the file, dense weights once it is loaded.

ONNX Runtime has no product with a sparse weight. So each product becomes one with a dense weight,
which standard operators scatter from what the file holds: `values`, `crow` and `col`, all constant,
so that a runtime that folds constants does it once, when it loads the file.

    from sparsekern.integrations.onnx import export_onnx

    export_onnx(model.eval(), (x,), "model.onnx", dynamic_shapes=({0: "batch"},))

Needs the packages onnx and onnxscript.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn

from sparsekern.errors import ConfigError, UnavailableError
from sparsekern.ops.conv_library import geometry_of

OPSET = 18
"""Of the operators that the translations use, and the least that a file can have."""
_SAVING = {"external_data", "include_initializers", "keep_initializers_as_inputs"}
_INT64 = 7  # onnx's number of the type


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """Write a model with sparse layers to an ONNX file, ready for inference.

    Args:
        model: in the mode it is to run in: call `eval()` before.
        args: an example of its inputs.
        path: of the file; None writes none.
        options: of `torch.onnx.export`, such as `dynamic_shapes` and `input_names`; with
            `external_data=False` all is in one file, which can't exceed 2 GB.

    Returns:
        torch's `ONNXProgram`.

    Raises:
        ConfigError: an option is set here.
        UnavailableError: onnx or onnxscript is not installed.
    """
    own = {"dynamo", "custom_translation_table"} & options.keys()
    if own:
        raise ConfigError(
            f"{' and '.join(sorted(own))} can't be given: `export_onnx` sets them; "
            "`translations()` is the table for a call of `torch.onnx.export`"
        )
    table = translations()
    save = {name: options.pop(name) for name in _SAVING & options.keys()}
    program: Any = torch.onnx.export(
        model,
        args,
        dynamo=True,
        custom_translation_table=table,
        # torch's optimizer would fold the weights that fit its limits to dense ones
        **{"opset_version": OPSET, "verbose": False, "optimize": False} | options,
    )
    _tidy(program.model)
    if path is not None:
        program.save(path, **save)
    return program


def _tidy(model: Any) -> None:
    """Make a weight once for all who use it; leave out where in Python each node came from."""
    passes = importlib.import_module("onnx_ir.passes.common")
    passes.CommonSubexpressionEliminationPass()(model)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()


def translations() -> dict[Any, Callable[..., Any]]:
    """The `custom_translation_table` of `torch.onnx.export(..., dynamo=True)` for sparse layers.

    Raises:
        UnavailableError: onnx or onnxscript is not installed.
    """
    try:
        op = getattr(importlib.import_module("onnxscript"), f"opset{OPSET}")
    except ImportError as error:
        raise UnavailableError(
            f"ONNX files need the packages onnx and onnxscript: {error}"
        ) from error
    dense = _Dense(op)

    def spmm(
        x: Any,
        values: Any,
        bias: Any,
        crow: Any,
        col: Any,
        ccol: Any,  # noqa: ARG001  the exporter goes by the names of the operator's arguments
        row: Any,  # noqa: ARG001
        perm: Any,  # noqa: ARG001
        row_order: Any,  # noqa: ARG001
        col_order: Any,  # noqa: ARG001
        layout: Sequence[int],
        relu: bool,
        impl: str,  # noqa: ARG001
    ) -> Any:
        weight = op.Transpose(dense.matrix(values, crow, col, layout), perm=[1, 0])
        y = op.MatMul(x, weight)
        y = y if bias is None else op.Add(y, bias)
        return op.Relu(y) if relu else y

    def conv2d(
        x: Any,
        values: Any,
        bias: Any,
        crow: Any,
        col: Any,
        ccol: Any,  # noqa: ARG001
        row: Any,  # noqa: ARG001
        perm: Any,  # noqa: ARG001
        row_order: Any,  # noqa: ARG001
        col_order: Any,  # noqa: ARG001
        layout: Sequence[int],
        impl: str,  # noqa: ARG001
    ) -> Any:
        g = geometry_of(layout)
        return op.Conv(
            x,
            dense.kernel(values, crow, col, layout),
            *(() if bias is None else (bias,)),
            kernel_shape=list(g.kernel),
            strides=list(g.stride),
            pads=[*g.padding, *g.padding],
            dilations=list(g.dilation),
            group=g.groups,
        )

    ops: Any = torch.ops.sparsekern
    return {ops.spmm.default: spmm, ops.conv2d.default: conv2d}


class _Dense:
    """The dense weight of a product, out of the operators of ONNX."""

    def __init__(self, op: Any) -> None:
        self.op = op

    def kernel(self, values: Any, crow: Any, col: Any, layout: Sequence[int]) -> Any:
        """(C_out, C_in / groups, kh, kw)."""
        rows, cols, *_, taps = layout[:6]
        matrix = self.matrix(values, crow, col, layout)
        taps_first = self._reshape(matrix, [rows, *geometry_of(layout).kernel, cols // taps])
        return self.op.Transpose(taps_first, perm=[0, 3, 1, 2])

    def matrix(self, values: Any, crow: Any, col: Any, layout: Sequence[int]) -> Any:
        """(rows, cols), zeros where no block is; as `Topology.unpack`."""
        rows, cols, bh, bw, groups, taps = layout[:6]
        down, across = math.ceil(rows // groups / bh), math.ceil(cols // taps / bw)
        where = self.op.Concat(self._rows(crow, col), self._column(col), axis=1)
        zeros = self.op.Expand(
            self.op.Cast(self.op.Constant(value_float=0.0), to=int(values.dtype)),
            self._ints([groups * down, taps * across, bh, bw]),
        )
        tiles = self.op.ScatterND(zeros, where, values)
        tiles = self._reshape(
            self.op.Transpose(tiles, perm=[0, 2, 1, 3]), [groups, down * bh, taps, across * bw]
        )
        if (down * bh, across * bw) != (rows // groups, cols // taps):  # padding of edge blocks
            ends = self._ints([rows // groups, cols // taps])
            tiles = self.op.Slice(tiles, self._ints([0, 0]), ends, self._ints([1, 3]))
        return self._reshape(tiles, [rows, cols])

    def _rows(self, crow: Any, col: Any) -> Any:
        """(nnzb, 1), the block row of each block: how many rows after the first start by then."""
        starts = self.op.Slice(self._wide(crow), self._ints([1]), self._ints([-1]), self._ints([0]))
        nnzb = self.op.Shape(col)
        none = self.op.Expand(self._ints([0]), self.op.Add(nnzb, self._ints([1])))
        ones = self.op.Expand(self._ints([1]), self.op.Shape(starts))
        jumps = self.op.ScatterElements(none, starts, ones, axis=0, reduction="add")
        counted = self.op.CumSum(jumps, self.op.Constant(value_int=0))
        return self.op.Unsqueeze(
            self.op.Slice(counted, self._ints([0]), nnzb, self._ints([0])), self._ints([1])
        )

    def _column(self, col: Any) -> Any:
        """(nnzb, 1)."""
        return self.op.Unsqueeze(self._wide(col), self._ints([1]))

    def _wide(self, array: Any) -> Any:
        """int64, which scattering takes."""
        return self.op.Cast(array, to=_INT64)

    def _reshape(self, tensor: Any, shape: Sequence[int]) -> Any:
        return self.op.Reshape(tensor, self._ints(shape))

    def _ints(self, numbers: Sequence[int]) -> Any:
        return self.op.Constant(value_ints=list(numbers))
