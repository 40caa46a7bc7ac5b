"""`diagnose`: how signal and gradient get through a model, what is dead in it, and what to do."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from sparsekern.cost.examples import Examples, run
from sparsekern.cost.twin import copied
from sparsekern.errors import ConfigError, DtypeError
from sparsekern.nn import SparseLayer
from sparsekern.nn.conv import SparseConv
from sparsekern.nn.facts import TopologyFacts, facts_of
from sparsekern.nn.recurrent import SparseRecurrent
from sparsekern.show.tables import aligned
from sparsekern.swap.refuse import check_model
from sparsekern.swap.targets import all_targets

SHRINKS = 10.0
"""From one layer's signal to the last one's: more is vanishing. In Evci et al. 2022 a dense
initialisation loses 20 times at 90 %, a sparse-aware one at most 2."""
SILENT = 0.5
"""Share of outputs without gradient beyond which a layer is mostly dead."""
PILED = 20
"""Largest fan-in over the median beyond which connections have piled up."""


class LayerRow(NamedTuple):
    """One layer.

    Attributes:
        name: in the model.
        kind: its class.
        outputs: features or channels.
        silent: outputs that no gradient reaches on this batch: dead units, and those that nothing
            reads.
        unconnected: outputs without a connection; of a recurrent layer, rows of its matrices.
        unread: inputs that no connection reads.
        fan_in_median: connections of an output.
        fan_in_max: most connections of an output.
        signal: standard deviation of an output over the batch and its positions, root mean square
            of all outputs; a bias adds nothing to it.
        gradient: norm of the gradient of its parameters, active weights alone.
    """

    name: str
    kind: str
    outputs: int
    silent: int
    unconnected: int
    unread: int
    fan_in_median: int
    fan_in_max: int
    signal: float
    gradient: float


@dataclass(frozen=True)
class Diagnosis:
    """How a model is; `print` shows a table and the advice.

    Attributes:
        rows: the layers that were called, in this order.
        loss: on the batch.
        gradient: norm over all parameters.
        advice: what to do, most urgent first; empty if nothing was found.
    """

    rows: tuple[LayerRow, ...]
    loss: float
    gradient: float
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, in values that JSON knows."""
        return asdict(self) | {"rows": [row._asdict() for row in self.rows]}

    def __str__(self) -> str:
        head = ("layer", "outputs", "silent", "no input", "fan-in", "most", "signal", "gradient")
        cells = [
            (
                row.name,
                str(row.outputs),
                str(row.silent),
                str(row.unconnected),
                str(row.fan_in_median),
                str(row.fan_in_max),
                f"{row.signal:.3g}",
                f"{row.gradient:.3g}",
            )
            for row in self.rows
        ]
        lines = [*aligned([head, *cells]), f"loss {self.loss:.4g}, gradient {self.gradient:.3g}"]
        for text in self.advice or ("nothing to mend",):
            lines += textwrap.wrap(text, 79, initial_indent="- ", subsequent_indent="  ")
        return "\n".join(lines)


def diagnose(
    model: nn.Module,
    batch: tuple[Examples, Tensor],
    loss: Callable[[Any, Tensor], Tensor],
) -> Diagnosis:
    """Run one forward and backward pass of a copy of the model, and tell what is wrong with it.

    Its layers are those that are sparse or could be. The model keeps its mode in the copy; nothing
    of it changes, nor does the random state.

    Args:
        model: dense, sparse or both.
        batch: (input, target); of several inputs, a tuple or a mapping of them.
        loss: of output and target, their mean.

    Raises:
        ConfigError: the loss is no scalar, or no layer was called.
        DtypeError: `model` is no module, `batch` no pair, or `loss` no function.
        ModelError: the model fails on the batch.
    """
    check_model(model)
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise DtypeError("`batch` must be a pair (input, target)")
    if not callable(loss):
        raise DtypeError(f"`loss` must be a function of (output, target); got {loss!r}")
    twin = copied(model, batch[0], None)
    layers = _layers(twin.model)
    seen: dict[str, _Seen] = {}
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.enable_grad())
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(_watcher(name, seen)).remove)
        value = loss(run(twin.model, twin.examples), batch[1])
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ConfigError(f"`loss` must give a scalar; got {getattr(value, 'shape', value)!r}")
        if value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]
    if not seen:
        raise ConfigError("`model` called none of the layers that could be sparse")
    rows = tuple(_row(name, layers[name], found) for name, found in seen.items())
    total = math.sqrt(sum(_square(p) for p in twin.model.parameters()))
    made = Diagnosis(rows, float(value.detach()), total, ())
    return Diagnosis(rows, made.loss, total, _advice(made))


# ---- what is seen of a layer


class _Seen:
    """Of all calls of a layer: sums over its outputs, and which features got a gradient."""

    def __init__(self, features: int) -> None:
        self.count = 0
        self.sums = torch.zeros(2, features, dtype=torch.float64)
        self.reached = torch.zeros(features, dtype=torch.bool)

    def output(self, y: Tensor, axis: int) -> None:
        wide = y.detach().double().movedim(axis, -1).flatten(0, -2)
        self.count += len(wide)
        self.sums += torch.stack([wide.sum(0), wide.square().sum(0)]).cpu()

    def gradient(self, g: Tensor, axis: int) -> None:
        moved = (g.detach() != 0).movedim(axis, -1).flatten(0, -2)
        self.reached |= moved.any(0).cpu()

    @property
    def deviation(self) -> float:
        mean, square = self.sums / self.count
        spread = (square - mean.square()).clamp(min=0)  # keeps NaN
        return float(spread.mean().sqrt())


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules to watch by name: a recurrent layer, not its matrices."""
    dense = {target.owner: target.module for target in all_targets(model)}
    sparse: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, SparseRecurrent | SparseLayer):
            inside = any(name.startswith(f"{outer}.") for outer in sparse)
            if not inside:
                sparse[name] = module
    return dense | sparse


def _watcher(name: str, seen: dict[str, _Seen]) -> Callable[..., None]:
    def watch(module: nn.Module, _args: Any, output: Any) -> None:
        found: Any = output[0] if isinstance(output, tuple) and not _packed(output) else output
        y = found.data if _packed(found) else found
        if not isinstance(y, Tensor) or not y.numel():
            return
        axis = _axis(module)
        known = seen.setdefault(name, _Seen(y.shape[axis]))
        known.output(y, axis)
        if y.requires_grad:
            y.register_hook(lambda g: known.gradient(g, axis))  # type: ignore[no-untyped-call]

    return watch


def _packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def _axis(module: Any) -> int:
    """Where features or channels are, from the end."""
    convolves = isinstance(module, nn.Conv1d | nn.Conv2d | SparseConv)
    return -1 - len(module.kernel_size) if convolves else -1


def _row(name: str, layer: nn.Module, seen: _Seen) -> LayerRow:
    parts = [m for m in layer.modules() if isinstance(m, SparseLayer)]
    facts = facts_of(part.topology for part in parts) or [_dense_facts(layer)]
    return LayerRow(
        name=name,
        kind=type(layer).__name__,
        outputs=len(seen.reached),
        silent=int((~seen.reached).sum()),
        unconnected=sum(f.outputs - f.live_outputs for f in facts),
        unread=sum(f.inputs - f.live_inputs for f in facts),
        fan_in_median=min(f.fan_in_median for f in facts),
        fan_in_max=max(f.fan_in_max for f in facts),
        signal=seen.deviation,
        gradient=math.sqrt(sum(_square(p) for p in layer.parameters())),
    )


def _dense_facts(layer: nn.Module) -> TopologyFacts:
    """Of a layer without connections of its own; zeros, as pruning leaves them, are none."""
    fan_in, live, inputs = [], 0, 0
    for weight in (target.weight for target in all_targets(layer)):
        active = weight.matrix() != 0
        fan_in.append(active.sum(1))
        read = active.view(weight.groups, -1, weight.taps, weight.part[1]).any(2).any(1)
        live, inputs = live + int(read.sum()), inputs + read.numel()
    counts = torch.cat(fan_in)
    live_outputs = int((counts > 0).sum())
    return TopologyFacts(
        len(counts), live_outputs, inputs, live, int(counts.median()), int(counts.max())
    )


def _square(parameter: Tensor) -> float:
    return 0.0 if parameter.grad is None else float(parameter.grad.double().square().sum())


# ---- what to do about it


class _Rule(NamedTuple):
    """Names the layers that something is wrong with, and says what helps."""

    wrong: Callable[[Diagnosis], list[str]]
    what: str


def _not_finite(d: Diagnosis) -> list[str]:
    return [r.name for r in d.rows if not math.isfinite(r.signal) or not math.isfinite(r.gradient)]


def _no_gradient(d: Diagnosis) -> list[str]:
    return [r.name for r in d.rows if r.gradient == 0]


def _vanishing(d: Diagnosis) -> list[str]:
    first, last = d.rows[0].signal, d.rows[-1].signal
    return [d.rows[-1].name] if last * SHRINKS < first else []


def _growing(d: Diagnosis) -> list[str]:
    first, last = d.rows[0].signal, d.rows[-1].signal
    return [d.rows[-1].name] if last > first * SHRINKS else []


def _mostly_silent(d: Diagnosis) -> list[str]:
    return [r.name for r in d.rows if r.gradient > 0 and r.silent > SILENT * r.outputs]


def _unconnected(d: Diagnosis) -> list[str]:
    return [r.name for r in d.rows if r.unconnected]


def _piled_up(d: Diagnosis) -> list[str]:
    return [r.name for r in d.rows if r.fan_in_max > PILED * max(1, r.fan_in_median)]


RULES = (
    _Rule(_not_finite, "not finite: lower the learning rate, or the gain of the initial values"),
    _Rule(
        _no_gradient,
        "no gradient at all: something after it passes none on; look for an empty layer, dead "
        'units or frozen parameters, and start from sparsify_(init="sparse", gain="relu")',
    ),
    _Rule(
        _vanishing,
        "the signal vanishes on its way there: values that are scaled for a dense layer are too "
        'small for a sparse one; sparsify_(init="sparse", gain="relu") scales them for the '
        "connections that are there",
    ),
    _Rule(
        _growing,
        "the signal grows on its way there: lower the gain, or put norms between the layers",
    ),
    _Rule(
        _mostly_silent,
        "most outputs get no gradient on this batch: they are dead, or nothing reads them; "
        "lower the learning rate, or make the layer less sparse or narrower",
    ),
    _Rule(
        _unconnected,
        "outputs without any input: they give a constant; SRigL keeps every fan-in equal and "
        "leaves out neurons as a whole, SET and RigL can grow connections to them",
    ),
    _Rule(
        _piled_up,
        "a few outputs hold most of the connections: SRigL keeps every fan-in equal, SET spreads "
        "what it grows",
    ),
)
"""Most urgent first."""


def _advice(made: Diagnosis) -> tuple[str, ...]:
    found = ((rule.what, rule.wrong(made)) for rule in RULES)
    return tuple(f"{', '.join(map(repr, names))}: {what}" for what, names in found if names)
