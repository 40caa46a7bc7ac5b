"""A sparse convolutional network on Fashion-MNIST at 90 % sparsity: dense, static, RigL.

    python -m benchmarks.conv_accuracy --data-dir DIR [--seeds 3] [--only "rigl 2x"]

LeNet-5 in Caffe's form, 20 and 50 channels and 500 hidden units; convolutions and the hidden
linear layer are sparse (ERK), the output layer is dense. All rows take the same weight steps on the
same batches; "rigl 2x" takes twice as many, as Evci et al. 2020 lengthen sparse training, which
costs fewer FLOPs than dense training still. `--only` measures some rows, and keeps the others that
were measured with the same configuration.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from benchmarks.result_files import RESULTS, save
from sparsekern.models import lenet_5
from sparsekern.training import data, trainer
from sparsekern.training.config import PRESETS

ROWS = {"dense": ("dense", 1), "static": ("static", 1), "rigl": ("rigl", 1), "rigl 2x": ("rigl", 2)}
"""By name: the method, and the length of training as a multiple."""
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
    name, seed, folder = job
    method, length = ROWS[name]
    torch.set_num_threads(1)
    config = replace(CONFIG, epochs=length * CONFIG.epochs)
    result = trainer.run(config, data.load("fashion-mnist", folder), method, seed)
    return {
        "accuracy": 100 * result.accuracy,
        "flops": asdict(result.flops),
        "layers": [layer._asdict() for layer in result.layers],
        "seconds": result.seconds,
    }


def row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    accuracies = [run["accuracy"] for run in runs]
    return {
        "method": name,
        "accuracies": accuracies,
        "mean": statistics.mean(accuracies),
        "std": statistics.stdev(accuracies),
        "flops": runs[0]["flops"],
        "layers": runs[0]["layers"],
        "seconds": [run["seconds"] for run in runs],
    }


def measured_before() -> dict[str, dict[str, Any]]:
    """Rows of the result file, if it has this configuration."""
    path = RESULTS / "cpu" / "conv_accuracy.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    # through JSON, where tuples are lists
    same = content.get("config") == json.loads(json.dumps(asdict(CONFIG)))
    return {row["method"]: row for row in content["rows"]} if same else {}


def main() -> None:
    """Train the rows with all seeds, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    args = parser.parse_args()
    torch.set_num_threads(1)  # as each run has, for the record
    jobs = [(name, seed, args.data_dir) for name in args.only for seed in range(args.seeds)]
    with ProcessPoolExecutor(args.workers) as pool:
        results = list(pool.map(train, jobs))
    found = measured_before()
    for name in args.only:
        runs = [r for job, r in zip(jobs, results, strict=True) if job[0] == name]
        found[name] = row(name, runs)
    table = [found[name] for name in ROWS if name in found]
    for line in table:
        each = " ".join(f"{a:.2f}" for a in line["accuracies"])
        sys.stdout.write(f"{line['method']:<8} {line['mean']:6.2f} +- {line['std']:.2f}   {each}\n")
    results_file = save("conv_accuracy", {"config": asdict(CONFIG), "rows": table})
    sys.stdout.write(f"saved {results_file}\n")


if __name__ == "__main__":
    main()
