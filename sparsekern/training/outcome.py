"""What one training run gave, as one value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from sparsekern.cost.held import HeldBytes
from sparsekern.cost.run_flops import Flops
from sparsekern.methods import UpdateRecord
from sparsekern.training.score import Score


class LayerFacts(NamedTuple):
    """What became of one sparse layer."""

    name: str
    shape: tuple[int, int]
    nnz: int
    impl: str


class Connections(NamedTuple):
    """Connections that leave each input, (inputs,) int64, before and after training."""

    start: Tensor
    end: Tensor


class Point(NamedTuple):
    """How far a run has come, at the end of each pass over the training samples.

    Attributes:
        step: weight steps so far.
        seconds: of training so far.
        training_flops: so far.
        loss: mean training loss since the point before, nats.
        validation: on what is kept out of training; None if nothing is.
        nnz: active weights of sparse and pruned layers.
    """

    step: int
    seconds: float
    training_flops: int
    loss: float
    validation: Score | None
    nnz: int


@dataclass(frozen=True, eq=False)
class RunResult:
    """What one run gave.

    Attributes:
        method: as asked for.
        seed: as asked for.
        accuracy: share of the test images classified rightly after the last step, or of
            characters guessed rightly.
        bits_per_character: of the test text; None for images.
        validation: the same of what is kept out of training; None if nothing is.
        start_loss: of the first batch before any step, nats.
        curve: a point for each pass over the training samples, and the end.
        weight_steps: steps of the optimizer that changed weights.
        updates: topology updates.
        update_batches: batches that updates spent instead of a weight step.
        flops: by formula.
        held: bytes of real tensors.
        layers: the sparse ones.
        seconds: wall-clock time of training, evaluation left out.
        update_seconds: median time of a step with a topology update; None without updates.
        connections: of the image with the first layer; None if that is not fully connected.
        history: of the method's updates.
        frames: of the first layer, as `TopologyFrames.to_json` gives them; None if not wanted.
    """

    method: str
    seed: int
    accuracy: float
    bits_per_character: float | None
    validation: Score | None
    start_loss: float
    curve: tuple[Point, ...]
    weight_steps: int
    updates: int
    update_batches: int
    flops: Flops
    held: HeldBytes
    layers: tuple[LayerFacts, ...]
    seconds: float
    update_seconds: float | None
    connections: Connections | None
    history: tuple[UpdateRecord, ...] = ()
    frames: dict[str, Any] | None = None

    @property
    def losses(self) -> tuple[float, ...]:
        """Mean training loss of each pass."""
        return tuple(point.loss for point in self.curve)

    @property
    def step_seconds(self) -> float:
        """Mean time of a batch, weight step or update."""
        return self.seconds / (self.weight_steps + self.update_batches)

    def learned(self, chance: float, samples: int) -> bool:
        """Whether its loss fell, and it is three standard deviations of chance above guessing.

        Args:
            chance: share of the test set's most common class.
            samples: of the test set.
        """
        noise = 3 * (chance * (1 - chance) / samples) ** 0.5
        return self.accuracy > chance + noise and self.curve[-1].loss < self.start_loss

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, as `sparsekern.training.results` says."""
        connections = self.connections
        return {
            "validation": self.validation and self.validation._asdict(),
            "test": Score(self.accuracy, self.bits_per_character)._asdict(),
            "start_loss": self.start_loss,
            "curve": [
                p._asdict() | {"validation": p.validation and p.validation._asdict()}
                for p in self.curve
            ],
            "flops": asdict(self.flops),
            "held": asdict(self.held),
            "weight_steps": self.weight_steps,
            "update_batches": self.update_batches,
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            "update_seconds": self.update_seconds,
            "updates": [_record(record) for record in self.history],
            "layers": [layer._asdict() for layer in self.layers],
            "connections": connections
            and {"start": connections.start.tolist(), "end": connections.end.tolist()},
            "frames": self.frames,
        }


def _record(record: UpdateRecord) -> dict[str, Any]:
    layers = {
        name: change._asdict() | {"facts": change.facts and change.facts._asdict()}
        for name, change in record.layers.items()
    }
    return record._asdict() | {"layers": layers}
