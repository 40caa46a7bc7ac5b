"""`summary`: what each layer of a model became, and how sparse the whole model is."""

from __future__ import annotations

import logging
import math
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from sparsekern.nn import SparseLayer
from sparsekern.show.tables import aligned, scaled
from sparsekern.swap.reasons import reason
from sparsekern.swap.record import Asked, read
from sparsekern.swap.targets import Target, all_targets, shared_parameters

_WIDTH, _NAME = 79, 30
"""Columns of the table, and of a name in it."""


@dataclass(frozen=True)
class SummaryRow:
    """One weight of two or more dimensions.

    Attributes:
        name: as `sparsify_` calls it; what it can't make sparse is called by its parameter.
        kind: class of the module that holds it.
        shape: of the weight, as torch's dense layer has it.
        weights: how many it has if it is dense.
        active: how many it has.
        block: of a sparse weight, (outputs, inputs); None of a dense one.
        asked: sparsity that `sparsify_` was asked for; None if it never was.
        why: why it is dense; "" of a sparse one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    active: int
    block: tuple[int, int] | None
    asked: float | None
    why: str

    @property
    def sparsity(self) -> float:
        """Reached: inactive share of the weights."""
        return 1 - self.active / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Summary:
    """What a model became; `print` shows it as a table.

    Attributes:
        rows: one for each weight of two or more dimensions; a shared one is listed once.
        asked: sparsity that the last `sparsify_` was asked for; None if it never was, or was asked
            layer by layer.
        weights: parameters of the whole model if it is dense: biases, norms and embeddings too.
        active: parameters that it has.
    """

    rows: tuple[SummaryRow, ...]
    asked: float | None
    weights: int
    active: int

    @property
    def sparsity(self) -> float:
        """Reached by the whole model: share of its parameters that do not exist."""
        return 1 - self.active / self.weights if self.weights else 0.0

    @property
    def dense(self) -> dict[str, str]:
        """Why each dense weight is dense, by name."""
        return {row.name: row.why for row in self.rows if row.block is None}

    def to_dict(self) -> dict[str, Any]:
        """Everything, in values that JSON knows."""
        rows = [
            asdict(row)
            | {"shape": list(row.shape), "block": list(row.block) if row.block else None}
            | {"sparsity": row.sparsity}
            for row in self.rows
        ]
        whole = {key: getattr(self, key) for key in ("asked", "weights", "active", "sparsity")}
        return {"rows": rows, **whole}

    def __str__(self) -> str:
        head = ("weight", "dense", "active", "block", "asked", "reached")
        total = _cells("whole model", self.weights, self.active, None, self.asked)
        rows = [_cells(r.name, r.weights, r.active, r.block, r.asked) for r in self.rows]
        return "\n".join([*aligned([head, *rows, total]), *self._reasons()])

    def _reasons(self) -> Iterator[str]:
        by_reason: dict[str, list[str]] = {}
        for name, why in self.dense.items():
            by_reason.setdefault(why, []).append(name)
        for why, names in by_reason.items():
            text = f"dense, {why}: {', '.join(names)}"
            yield from textwrap.wrap(text, _WIDTH, subsequent_indent="  ")


def summary(model: nn.Module) -> Summary:
    """Tell what each layer of a model became, asked and reached sparsity, and why it is dense.

    What was asked is noted with the model by `sparsify_`, and goes with a copy or a pickle of it.
    Rows are weights of two or more dimensions; `sparsity` of the summary counts every parameter.
    """
    known = _known(model)
    asked, shared = read(model), shared_parameters(model)
    rows, weights, active, seen = [], 0, 0, set()
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(module, SparseLayer) and own == "values":
                row = _sparse(name, module, asked)
            elif is_lazy(parameter):
                why = "it has no shape before the model has run once"
                rows.append(SummaryRow(name, type(module).__name__, (), 0, 0, None, None, why))
                continue
            else:
                is_shared = id(parameter) in shared
                targets = known.get((id(module), own), [None])
                for target in targets[:-1]:  # several matrices in one parameter
                    rows.append(_dense(name, module, own, parameter, target, asked, is_shared))
                    weights, active = weights + rows[-1].weights, active + rows[-1].active
                row = _dense(name, module, own, parameter, targets[-1], asked, is_shared)
            weights, active = weights + row.weights, active + row.active
            if len(row.shape) > 1:
                rows.append(row)
    return Summary(tuple(rows), asked.sparsity, weights, active)


def tell(model: nn.Module, log: logging.Logger) -> None:
    """Log it, and warn of a model that reaches less than half of what was asked."""
    made = summary(model)
    log.info("%s", made)
    if made.asked is not None and made.sparsity < made.asked / 2:
        log.warning(
            "the whole model is %.1f %% sparse, less than half of the %.1f %% that were asked for; "
            "sparsekern.summary(model) tells what stays dense, and why",
            100 * made.sparsity,
            100 * made.asked,
        )


def _known(model: nn.Module) -> dict[tuple[int, str], list[Target | None]]:
    """Targets by the module that holds their parameter, and its name there."""
    found: dict[tuple[int, str], list[Target | None]] = {}
    for target in all_targets(model):
        found.setdefault(_place(target), []).append(target)
    return found


def _place(target: Target) -> tuple[int, str]:
    own, module = target.weight.name, target.module
    if isinstance(module, nn.MultiheadAttention):
        if own == "out_proj":
            return id(module.out_proj), "weight"
        return id(module), "in_proj_weight" if module._qkv_same_embed_dim else f"{own}_weight"
    attribute = f"weight_{own}" if own else "weight"
    return id(module), f"{attribute}_orig" if target.pruned is not None else attribute


def _sparse(name: str, layer: SparseLayer, asked: Asked) -> SummaryRow:
    shape = tuple(layer.weight_shape)
    size = layer.matrix_shape[0] * layer.matrix_shape[1]
    share = asked.layers.get(name)
    kind = type(layer).__name__
    held = layer._held()
    # on the meta device it is known how many blocks there are, not where
    active = held.nnzb * layer.block[0] * layer.block[1] if layer.col.is_meta else layer.nnz
    return SummaryRow(name, kind, shape, size, active, layer.block, share, "")


def _dense(
    name: str,
    module: nn.Module,
    own: str,
    parameter: nn.Parameter,
    target: Target | None,
    asked: Asked,
    is_shared: bool,
) -> SummaryRow:
    plain = f"{name}.{own}" if name else own
    full = target.name if target else plain.removesuffix(".weight")
    holder, shape = (target.module, target.shape) if target else (module, tuple(parameter.shape))
    why = asked.dense.get(full) or reason(holder, parameter.dim(), is_shared=is_shared)
    size, kind = math.prod(shape), type(holder).__name__
    share = asked.layers.get(full, 0.0) if full in asked.dense else None
    return SummaryRow(full, kind, shape, size, size, None, share, why)


def _cells(
    name: str, weights: int, active: int, block: tuple[int, int] | None, asked: float | None
) -> tuple[str, ...]:
    short = name if len(name) <= _NAME else f"...{name[3 - _NAME :]}"
    edges = "" if block is None else f"{block[0]} x {block[1]}"
    reached = 1 - active / weights if weights else 0.0
    wanted = "" if asked is None else f"{100 * asked:.2f} %"
    return short, scaled(weights, ""), scaled(active, ""), edges, wanted, f"{100 * reached:.2f} %"
