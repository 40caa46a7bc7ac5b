"""A sparse convolutional network on Fashion-MNIST at 90 % sparsity: dense, static, RigL.

    python -m benchmarks.conv_accuracy --data-dir DIR [--seeds 3]

LeNet-5 in Caffe's form, 20 and 50 channels and 500 hidden units; convolutions and the hidden
linear layer are sparse (ERK), the output layer is dense. All rows take the same weight steps on the
same batches.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from benchmarks.environment import save
from benchmarks.models import lenet_5
from sparsekern import data, training
from sparsekern.config import PRESETS

METHODS = ("dense", "static", "rigl")
CONFIG = replace(
    PRESETS["fashion-mnist"],
    model="benchmarks.conv_accuracy:network",
    sparsity=0.9,
    drop_fraction=0.3,
    lr=0.05,
    weight_decay=1e-4,
    epochs=4,
)


def network(classes: int, in_channels: int, image_size: int) -> nn.Module:
    """LeNet-5 with 20 and 50 channels and 500 hidden units."""
    return lenet_5(classes, in_channels, image_size, conv=(20, 50), hidden=(500,))


def train(job: tuple[str, int, str]) -> dict[str, Any]:
    """Accuracy in percent and FLOPs of one run."""
    method, seed, folder = job
    torch.set_num_threads(1)
    result = training.run(CONFIG, data.load("fashion-mnist", folder), method, seed)
    return {
        "accuracy": 100 * result.accuracy,
        "flops": asdict(result.flops),
        "layers": [layer._asdict() for layer in result.layers],
        "seconds": result.seconds,
    }


def main() -> None:
    """Train every method with all seeds, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as each run has, for the record
    jobs = [(method, seed, args.data_dir) for method in METHODS for seed in range(args.seeds)]
    with ProcessPoolExecutor(args.workers) as pool:
        results = list(pool.map(train, jobs))
    table = []
    for method in METHODS:
        runs = [r for job, r in zip(jobs, results, strict=True) if job[0] == method]
        accuracies = [run["accuracy"] for run in runs]
        mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
        table.append(
            {"method": method, "accuracies": accuracies, "mean": mean, "std": spread}
            | {key: runs[0][key] for key in ("flops", "layers")}
            | {"seconds": [run["seconds"] for run in runs]}
        )
        each = " ".join(f"{a:.2f}" for a in accuracies)
        sys.stdout.write(f"{method:<8} {mean:6.2f} +- {spread:.2f}   {each}\n")
    results_file = save("conv_accuracy", {"config": asdict(CONFIG), "rows": table})
    sys.stdout.write(f"saved {results_file}\n")


if __name__ == "__main__":
    main()
