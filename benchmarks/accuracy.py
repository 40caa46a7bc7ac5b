"""Accuracy on Fashion-MNIST, 784-300-100-10 at 98 % sparsity: methods, and the price of a block.

    python -m benchmarks.accuracy --data-dir DIR [--seeds 5]

The output layer is dense. All rows take the same weight steps on the same batches. RigL and static
share the command line's preset; static is also shown at a lower weight decay, which suits it more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks.result_files import save
from sparsekern.training import data, trainer
from sparsekern.training.config import PRESETS


class Row(NamedTuple):
    """One line of the table."""

    method: str
    block: int = 1
    weight_decay: float = PRESETS["fashion-mnist"].weight_decay

    @property
    def label(self) -> str:
        """How the table calls it."""
        block = f", block {self.block}" if self.block > 1 else ""
        return f"{self.method}{block}, weight decay {self.weight_decay:g}"


ROWS = [
    Row("dense"),
    Row("static"),
    Row("static", weight_decay=1e-4),
    Row("set"),
    Row("rigl"),
    Row("rigl", 4),
    Row("rigl", 16),
    Row("rigl", 32),
]


def train(job: tuple[Row, int, str]) -> float:
    """Test accuracy in percent of one run."""
    row, seed, folder = job
    torch.set_num_threads(1)
    config = replace(PRESETS["fashion-mnist"], block=row.block, weight_decay=row.weight_decay)
    images = data.load("fashion-mnist", folder)
    return 100 * trainer.run(config, images, row.method, seed).accuracy


def main() -> None:
    """Train all rows with all seeds, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    table = []
    with ProcessPoolExecutor(args.workers) as pool:
        for row in ROWS:
            jobs = [(row, seed, args.data_dir) for seed in range(args.seeds)]
            accuracies = list(pool.map(train, jobs))
            mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
            table.append(row._asdict() | {"accuracies": accuracies, "mean": mean, "std": spread})
            each = " ".join(f"{a:.2f}" for a in accuracies)
            sys.stdout.write(f"{row.label:<36} {mean:6.2f} +- {spread:.2f}   {each}\n")
            sys.stdout.flush()
    sys.stdout.write(f"saved {save('accuracy', {'sparsity': 0.98, 'rows': table})}\n")


if __name__ == "__main__":
    main()
