"""The report of `profile`: values, and their tables for people and programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsekern.cost.methods import MethodCost
from sparsekern.cost.run_flops import FLOP_CONVENTION
from sparsekern.profiling.measure import Measured
from sparsekern.profiling.rows import SUMMED, LayerRow
from sparsekern.show.tables import aligned, comma_separated, markdown, scaled

FORMAT = 1
_LEFT = 3  # columns of text
_HEAD = (
    "layer", "type", "weight", "block", "density", "impl", "forward", "step", "x dense", "held",
    "x dense", "saved", "workspace", "ms", "measured",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What a training step of a model costs, predicted and measured.

    Attributes:
        model: class of the model.
        inputs: shapes and dtypes of the example inputs, in words.
        device: that the prediction is for.
        layers: a row for each, and one for the rest.
        before_bytes: predicted: held before a step: parameters, buffers, optimizer state, inputs.
        peak_bytes: predicted: most bytes alive at once during a step, with those before it.
        seconds: predicted, by layer: forward and backward of the products of layers with weights.
        methods: training cost per sample by method, Evci et al. 2020, appendix H.
        method: the one in use; None if unknown.
        update_freq: weight steps between topology updates that the costs assume.
        by_running: the model asks tensors for values, so that a copy was run to count it.
        uncounted: calls of operators without a formula, by name; elementwise ones, norms, moves and
            sums are none.
        measured: on this machine; None if it was not asked for, or failed.
        failure: why measuring failed; None if it did not.
        environment: versions and machine.
    """

    model: str
    inputs: str
    device: str
    layers: tuple[LayerRow, ...]
    before_bytes: int
    peak_bytes: int
    seconds: Mapping[str, float]
    methods: Mapping[str, MethodCost]
    method: str | None
    update_freq: int
    by_running: bool
    uncounted: Mapping[str, int]
    measured: Measured | None
    failure: str | None
    environment: Mapping[str, Any]

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over the layers, by the rows' names; and the step as a whole."""
        sums: dict[str, Any] = {name: sum(getattr(r, name) for r in self.layers) for name in SUMMED}
        dense = sums["step_flops_dense"]
        measured = self.measured
        return sums | {
            "density": sums["nnz"] / sums["weights"] if sums["weights"] else None,
            "flops_ratio": sums["step_flops"] / dense if dense else None,
            "held_ratio": sums["held_bytes"] / max(sums["held_bytes_dense"], 1),
            "workspace_bytes": max((r.workspace_bytes for r in self.layers), default=0),
            "predicted_before_bytes": self.before_bytes,
            "predicted_peak_bytes": self.peak_bytes,
            "measured_peak_bytes": None if measured is None else measured.peak_bytes,
            "predicted_layer_seconds": sum(self.seconds.values()),
            "measured_layer_seconds": self._measured_layers,
            "measured_forward_seconds": None if measured is None else measured.forward_seconds,
            "measured_step_seconds": None if measured is None else measured.step_seconds,
        }

    @property
    def _measured_layers(self) -> float | None:
        """Seconds of those layers that there is a prediction for."""
        if self.measured is None:
            return None
        return sum(self.measured.layer_seconds[name] for name in self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in values that JSON knows; `layers` and `totals` hold the FLOPs and bytes."""
        measured = {} if self.measured is None else self.measured.layer_seconds
        layers = [
            row.as_dict()
            | {"predicted_seconds": self.seconds.get(row.name)}
            | {"measured_seconds": measured.get(row.name)}
            for row in self.layers
        ]
        return {
            "format": FORMAT,
            "flops": FLOP_CONVENTION,
            "model": self.model,
            "inputs": self.inputs,
            "device": self.device,
            "layers": layers,
            "totals": self.totals,
            "method": self.method,
            "update_freq": self.update_freq,
            "methods": {name: cost._asdict() for name, cost in self.methods.items()},
            "counted_by_running": self.by_running,
            "uncounted": dict(self.uncounted),
            "measured": None if self.measured is None else self.measured._asdict(),
            "measuring_failed": self.failure,
            "environment": dict(self.environment),
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """A line for each layer with all facts of `LayerRow`."""
        rows = self.to_dict()["layers"]
        head = list(rows[0])
        values = [[_flat(row[name]) for name in head] for row in rows]
        return comma_separated(head, values)

    def to_markdown(self) -> str:
        """The tables of `str(report)` as Markdown."""
        parts = [
            *markdown(_layer_cells(self), _LEFT),
            "",
            *markdown(_method_cells(self)),
            "",
            *markdown(_step_cells(self)),
            "",
            *(f"- {line}" for line in _notes(self)),
        ]
        return "\n".join(parts) + "\n"

    def __str__(self) -> str:
        parts = [
            f"{self.model}({self.inputs}), a training step on {self.device}",
            "",
            *aligned(_layer_cells(self), _LEFT),
            "",
            *aligned(_method_cells(self)),
            "",
            *aligned(_step_cells(self)),
            "",
            *_notes(self),
        ]
        return "\n".join(parts)


def _layer_cells(report: Report) -> list[list[str]]:
    rows = [row for row in report.layers if row.step_flops or row.held_bytes or row.saved_bytes]
    total = report.totals
    last = [
        "total", "", "", "", _share(total["density"]), "", _flops(total["forward_flops"]),
        _flops(total["step_flops"]), _ratio(total["flops_ratio"]), _bytes(total["held_bytes"]),
        _ratio(total["held_ratio"]), _bytes(total["saved_bytes"]),
        _bytes(total["workspace_bytes"]), _ms(total["predicted_layer_seconds"]),
        _ms(total["measured_layer_seconds"]),
    ]  # fmt: skip
    return [list(_HEAD), *(_row_cells(report, row) for row in rows), last]


def _row_cells(report: Report, row: LayerRow) -> list[str]:
    measured = {} if report.measured is None else report.measured.layer_seconds
    held = row.held_bytes / row.held_bytes_dense if row.held_bytes_dense else None
    return [
        row.name,
        row.type,
        "x".join(map(str, row.shape)) if row.shape else "",
        "x".join(map(str, row.block)) if row.block else "",
        _share(row.density),
        row.impl if row.block else "",
        _flops(row.forward_flops),
        _flops(row.step_flops),
        _ratio(row.flops_ratio),
        _bytes(row.held_bytes),
        _ratio(held),
        _bytes(row.saved_bytes),
        _bytes(row.workspace_bytes),
        _ms(report.seconds.get(row.name)),
        _ms(measured.get(row.name)),
    ]


def _method_cells(report: Report) -> list[list[str]]:
    head = ["method", "FLOPs per sample and step", "x dense", "in a step that updates"]
    rows = [
        [
            f"{name} *" if name == report.method else name,
            _flops(cost.flops),
            _ratio(cost.ratio),
            "" if cost.update_flops is None else _flops(cost.update_flops),
        ]
        for name, cost in report.methods.items()
    ]
    return [head, *rows]


def _step_cells(report: Report) -> list[list[str]]:
    m = report.measured
    return [
        ["a step", "predicted", "measured"],
        ["held before it", _bytes(report.before_bytes), _bytes(m.before_bytes) if m else "-"],
        ["peak", _bytes(report.peak_bytes), _bytes(m.peak_bytes) if m else "-"],
        ["forward ms", "-", _ms(m.forward_seconds) if m else "-"],
        [
            "layers with weights ms",
            _ms(report.totals["predicted_layer_seconds"]),
            _ms(report.totals["measured_layer_seconds"]) or "-",
        ],
        ["whole step ms", "-", _ms(m.step_seconds) if m else "-"],
    ]


def _notes(report: Report) -> list[str]:
    notes = [
        f"FLOPs: executed; {FLOP_CONVENTION}.",
        "held: parameters, buffers, gradients, optimizer state and indices; saved: activations "
        "for backward; x dense: against the same layer without sparsity.",
        "ms: forward and backward, predicted from the planner's tables for layers with weights, "
        "and measured; the totals are of these layers.",
        f"methods: Evci et al. 2020, appendix H, an update every {report.update_freq} steps"
        + (f"; * in use: {report.method}." if report.method else "."),
    ]
    if report.by_running:
        notes.append("counted by running a copy: the model asks tensors for their values.")
    if report.uncounted:
        calls = ", ".join(f"{name} ({n})" for name, n in report.uncounted.items())
        notes.append(f"not counted, for want of a formula: {calls}.")
    if report.failure:
        notes.append(f"measuring failed: {report.failure}")
    return notes


def _flat(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, tuple | list) else value


def _flops(number: float) -> str:
    return scaled(number, "") if number else "-"


def _bytes(number: int) -> str:
    return scaled(number, "B", 1024) if number else "-"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}x"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _ms(seconds: float | None) -> str:
    return f"{1e3 * seconds:.3g}" if seconds else ""
