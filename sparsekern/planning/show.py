"""A plan as a table for people, as Markdown, CSV and a dict for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any

from sparsekern.cost.run_flops import FLOP_CONVENTION
from sparsekern.planning.result import Plan, Row
from sparsekern.show.tables import aligned, comma_separated, markdown, scaled
from sparsekern.topology.blocks import Block, as_block

FORMAT = 1
LEFT = 3  # columns of text


def as_text(plan: Plan) -> str:
    """An aligned table, with totals and notes below."""
    return "\n".join([*aligned(_cells(plan), LEFT), "", *_totals(plan), *_notes(plan)])


def as_markdown(plan: Plan) -> str:
    """The same as Markdown."""
    notes = [f"- {line}" for line in (*_totals(plan), *_notes(plan))]
    return "\n".join([*markdown(_cells(plan), LEFT), "", *notes]) + "\n"


def as_csv(plan: Plan) -> str:
    """A line for each layer; seconds of a block in a column of its own."""
    blocks = blocks_of(plan.rows)
    names = [field.name for field in fields(Row) if field.name not in ("options", "shapes")]
    lines = []
    for row in plan.rows:
        found = {option.block: option.seconds for option in row.options}
        even = row.break_even
        values = {name: getattr(row, name) for name in names} | {
            "inputs": " ".join(map(_sizes, row.inputs)),
            "sparsities": " ".join(f"{k}={v!r}" for k, v in row.sparsities.items()),
            "block": None if row.block is None else shown(row.block),
            "break_even": None if even is None else f"{even.bound}{even.density!r}",
        }
        lines.append([*values.values(), *map(found.get, blocks)])
    return comma_separated([*names, *(f"seconds_block_{shown(b)}" for b in blocks)], lines)


def as_dict(plan: Plan) -> dict[str, Any]:
    """Everything, in values that JSON knows."""
    arguments = plan.arguments
    if plan.filter_fn is not None:
        arguments["filter_fn"] = getattr(plan.filter_fn, "__qualname__", repr(plan.filter_fn))
    return {
        "format": FORMAT,
        "flops": FLOP_CONVENTION,
        "sparsity": plan.sparsity,
        "budget": None if plan.budget is None else plan.budget.limits,
        "distribution": plan.distribution,
        "device": plan.device,
        "optimizer_states": plan.optimizer_states,
        "totals": plan.totals._asdict(),
        "layers": [_row(row) for row in plan.rows],
        "unplanned": dict(plan.unplanned),
        "arguments": arguments,
    }


def shown(block: Block) -> str:
    """16, or 16x32."""
    return str(block) if isinstance(block, int) else "x".join(map(str, block))


def blocks_of(rows: Iterable[Row]) -> list[Block]:
    """All blocks that some layer has a time for, smallest first."""
    return sorted({o.block for row in rows for o in row.options}, key=as_block)


def _row(row: Row) -> dict[str, Any]:
    values = asdict(row)
    values["shapes"] = {name: list(shape) for name, shape in row.shapes.items()}
    values["inputs"] = [list(shape) for shape in row.inputs]
    values["options"] = [option._asdict() for option in row.options]
    values["break_even"] = None if row.break_even is None else row.break_even._asdict()
    return values


def _cells(plan: Plan) -> list[list[str]]:
    blocks = blocks_of(plan.rows)
    times = [f"{shown(block)} ms" for block in blocks]
    head = ["layer", "weight", "input", "dense ms", *times, "at density", "break-even", "plan"]
    return [head, *([*_facts(row), *_times(row, blocks), *_plan(row)] for row in plan.rows)]


def _facts(row: Row) -> list[str]:
    return [row.name, _several(row.shapes.values()), _several(row.inputs) or "-"]


def _times(row: Row, blocks: Sequence[Block]) -> list[str]:
    found = {option.block: option.seconds for option in row.options}
    return [_ms(row.dense_seconds), *(_ms(found.get(block)) for block in blocks)]


def _plan(row: Row) -> list[str]:
    density = f"{row.density:.3g}" if row.options else "-"
    even = "-" if row.break_even is None else str(row.break_even)
    return [density, even, "dense" if row.block is None else f"block {shown(row.block)}"]


def _several(shapes: Iterable[Sequence[int]]) -> str:
    """The first, and how many more there are."""
    first, *rest = [*map(_sizes, shapes)] or [""]
    return f"{first} +{len(rest)}" if rest else first


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:#.3g}".rstrip(".")


def _totals(plan: Plan) -> list[str]:
    t = plan.totals
    share = t.active / t.weights
    faster = f", {t.dense_seconds / t.seconds:.2f}x" if t.seconds else ""
    return [
        f"weights: {t.active:,} of {t.weights:,} ({share:.2%}) in these layers, by "
        f"{plan.distribution!r} from sparsity {plan.sparsity:.4g}",
        f"step of these layers, forward and backward: {_ms(t.dense_seconds)} ms dense, "
        f"{_ms(t.seconds)} ms planned{faster}",
        f"training step of the whole model: {scaled(t.dense_flops, 'FLOPs')} dense, "
        f"{scaled(t.flops, 'FLOPs')} planned, {t.flops / t.dense_flops:.3f}x ({FLOP_CONVENTION})",
        f"held between steps by the whole model, {plan.optimizer_states} optimizer states: "
        f"{scaled(t.dense_bytes, 'B', 1024)} dense, {scaled(t.bytes, 'B', 1024)} planned, "
        f"{t.bytes / t.dense_bytes:.3f}x",
    ]


def _notes(plan: Plan) -> list[str]:
    """Where the times come from, and why layers stay dense."""
    by_source: dict[str, list[str]] = {}
    by_reason: dict[str, list[str]] = {}
    for row in plan.rows:
        if row.dense_seconds is not None:
            by_source.setdefault(row.source, []).append(row.name)
        if row.why:
            start = "left dense, because " if row.block is None else ""
            by_reason.setdefault(start + row.why, []).append(row.name)
    for name, why in plan.unplanned.items():
        by_reason.setdefault(f"not planned and left dense, because {why}", []).append(name)
    every = f"all {len(plan.rows)} layers"
    return [
        *(
            f"times {source}" + (f": {_names(names)}" if len(by_source) > 1 else "")
            for source, names in by_source.items()
        ),
        *(
            f"{every if len(names) == len(plan.rows) > 1 else _names(names)}: {why}"
            for why, names in by_reason.items()
        ),
    ]


def _names(names: Sequence[str]) -> str:
    return ", ".join(names)
