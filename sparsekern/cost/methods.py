"""Training FLOPs of the paper's methods per sample and step: Evci et al. 2020, appendix H.

f_D is the forward pass of the dense network and f_S that of the sparse one; a backward pass costs
twice a forward pass. Sorting, masking and the optimizer are left out, as in the paper, and so are
the few dense gradients of SNIP and the random growth of SET.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sparsekern.errors import ConfigError, DtypeError

METHODS = ("dense", "static", "set", "snip", "rigl", "snfs", "pruning")


@dataclass(frozen=True)
class PruningSchedule:
    """Gradual magnitude pruning (Zhu and Gupta 2018): when the sparsity grows, in weight steps.

    The defaults are those of the paper's ResNet-50. Only their ratios matter.

    Attributes:
        start: nothing is pruned before.
        end: the final sparsity is reached.
        freq: steps between two rounds of pruning.
        steps: of the whole training.
    """

    start: int = 10_000
    end: int = 25_000
    freq: int = 1_000
    steps: int = 32_000

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= self.steps or self.freq < 1:
            raise ConfigError(
                f"a pruning schedule needs 0 <= start < end <= steps and freq > 0; got {self}"
            )

    @property
    def mean_share(self) -> float:
        """Mean over training of the share of the final sparsity that is reached."""
        samples = range(0, self.steps + 1, self.freq)
        return sum(map(self.share, samples)) / len(samples)

    def share(self, step: int) -> float:
        """1 - (1 - (step - start) / (end - start))^3, between 0 and 1."""
        done = min(max((step - self.start) / (self.end - self.start), 0.0), 1.0)
        return 1 - (1 - done) ** 3


class MethodCost(NamedTuple):
    """What a sample costs in a training step, topology updates shared out among all steps.

    Attributes:
        flops: mean of all steps.
        ratio: to dense training.
        update_flops: of a sample in a step that updates the topology; None without updates.
    """

    flops: float
    ratio: float
    update_flops: int | None


def method_costs(
    f_s: int,
    f_d: int,
    *,
    update_freq: int = 100,
    pruning: PruningSchedule | None = None,
) -> dict[str, MethodCost]:
    """Costs of all `METHODS` for a network.

    Args:
        f_s: FLOPs of the sparse network's forward pass, per sample.
        f_d: of the dense network's.
        update_freq: weight steps between topology updates (Delta T).
        pruning: schedule of the method "pruning"; the paper's if None.
    """
    if type(update_freq) is not int or update_freq < 1:
        raise ConfigError(f"`update_freq` must be an int of at least 1; got {update_freq!r}")
    if not isinstance(pruning, PruningSchedule | None):
        raise DtypeError(f"`pruning` must be a PruningSchedule; got {pruning!r}")
    update = 2 * f_s + f_d  # a dense weight gradient
    pruned = f_d - (pruning or PruningSchedule()).mean_share * (f_d - f_s)
    static: tuple[float, int | None] = (3 * f_s, None)
    costs: dict[str, tuple[float, int | None]] = {
        "dense": (3 * f_d, None),
        "static": static,
        "set": static,
        "snip": static,
        "rigl": ((3 * f_s * update_freq + update) / (update_freq + 1), update),
        "snfs": (update, update),
        "pruning": (3 * pruned, None),
    }
    return {
        name: MethodCost(flops, flops / (3 * f_d) if f_d else 1.0, rare)
        for name, (flops, rare) in costs.items()
    }
