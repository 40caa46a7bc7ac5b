"""Averages of weights over topology updates, against those of the masked twin.

    python -m benchmarks.averages [--data-dir DIR] [--seeds N] [--epochs N]

A network with two hidden layers, 95 % sparse (ERK), on scikit-learn's digits or, from a folder, on
Fashion-MNIST. For RigL and SET, an exponential moving average of the weights in four ways:

- followed: torch's `AveragedModel` of the sparse model, which follows topology updates;
- twin: of the masked twin's dense weights, masked by its final topology;
- left behind: of the values as they lie in memory, whose positions change under it;
- model: no average.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparsekern as sk
from benchmarks.result_files import save
from sparsekern.training import data
from sparsekern.training.data import Images

METHODS = {"rigl": sk.RigL, "set": sk.SET}
WAYS = ("followed", "twin", "left behind", "model")
HIDDEN, SPARSITY, DECAY, BATCH, LR, MOMENTUM = (300, 100), 0.95, 0.99, 64, 0.05, 0.9


class Plan(NamedTuple):
    """How long a run is.

    Attributes:
        epochs: over the training images.
        update_freq: weight steps between topology updates; they end after 3/4 of the steps.
    """

    epochs: int
    update_freq: int


PLANS = {"digits": Plan(20, 20), "fashion-mnist": Plan(2, 100)}


def network(images: Images, seed: int, impl: str | None) -> nn.Module:
    """The network with its connections drawn from `seed`."""
    torch.manual_seed(seed)
    sizes = (images.pixels, *HIDDEN)
    hidden = [
        module
        for a, b in itertools.pairwise(sizes)
        for module in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())
    ]
    model = nn.Sequential(*hidden, nn.Linear(HIDDEN[-1], images.classes))
    drawn = torch.Generator().manual_seed(seed)
    return sk.sparsify_(model, SPARSITY, impl=impl, generator=drawn)


def accuracy(model: nn.Module, images: Images) -> float:
    """Of the held-out images, in percent."""
    model.eval()
    with torch.no_grad():
        right: Tensor = model(images.test_x).argmax(1) == images.test_y
    return 100 * float(right.float().mean())


def lerp(average: nn.Module, model: nn.Module) -> None:
    """Average the parameters where they lie, and copy the buffers."""
    with torch.no_grad():
        for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 1 - DECAY)
        for own, other in zip(average.buffers(), model.buffers(), strict=True):
            own.copy_(other)


def mask_(average: nn.Module, model: nn.Module) -> None:
    """Set what is inactive in a masked model to 0 in its average."""
    for name, layer in sk.sparse_layers(model).items():
        values: Any = average.get_parameter(f"{name}.values")
        values.data *= layer.topology.to_mask()


def batches(images: Images, epochs: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The same for all runs of a seed."""
    drawn = torch.Generator().manual_seed(seed)
    order = [torch.randperm(len(images.train_x), generator=drawn) for _ in range(epochs)]
    rows = [row for epoch in order for row in torch.split(epoch, BATCH)[:-1]]
    return [(images.train_x[row], images.train_y[row]) for row in rows]


def train(images: Images, name: str, plan: Plan, seed: int, impl: str | None) -> dict[str, float]:
    """Accuracies of one run and its averages, by their way."""
    model = network(images, seed, impl)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    steps = batches(images, plan.epochs, seed)
    method = METHODS[name](
        model, optimizer, t_end=len(steps) * 3 // 4, update_freq=plan.update_freq, seed=seed
    )
    ema: Any = get_ema_multi_avg_fn
    followed = AveragedModel(model, multi_avg_fn=ema(DECAY))
    by_hand: nn.Module | None = None
    for x, y in steps:
        optimizer.zero_grad()
        loss: Any = nn.functional.cross_entropy(model.train()(x), y)
        loss.backward()
        optimizer.step()
        followed.update_parameters(model)
        if by_hand is None:
            by_hand = copy.deepcopy(model)
        lerp(by_hand, model)
    if by_hand is None or not method.history:
        raise SystemExit("no topology update was made: take more epochs")
    if impl == "masked":
        mask_(by_hand, model)
        return {"twin": accuracy(by_hand, images)}
    averages = {"followed": followed, "left behind": by_hand, "model": model}
    return {way: accuracy(average, images) for way, average in averages.items()}


def main() -> None:
    """Train all runs, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="of Fashion-MNIST; digits without it")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dataset = "fashion-mnist" if args.data_dir else "digits"
    images, plan = data.load(dataset, args.data_dir), PLANS[dataset]
    if not isinstance(images, Images):
        raise TypeError(f"{dataset} must be images; got {type(images).__name__}")
    plan = plan._replace(epochs=args.epochs or plan.epochs)
    rows, began = [], time.perf_counter()
    for method in METHODS:
        runs = [
            train(images, method, plan, seed, None) | train(images, method, plan, seed, "masked")
            for seed in range(args.seeds)
        ]
        scores = {way: [run[way] for run in runs] for way in WAYS}
        means = {way: statistics.mean(found) for way, found in scores.items()}
        rows.append({"method": method, "means": means, "scores": scores})
        line = "  ".join(f"{way} {mean:.2f}" for way, mean in means.items())
        sys.stdout.write(f"{method:<5} {line}\n")
    config = {
        "data": dataset,
        "hidden": HIDDEN,
        "sparsity": SPARSITY,
        "decay": DECAY,
        "batch_size": BATCH,
        "lr": LR,
        "momentum": MOMENTUM,
        **plan._asdict(),
    }
    content = {"config": config, "rows": rows, "seconds": time.perf_counter() - began}
    sys.stdout.write(f"saved {save('averages', content)}\n")


if __name__ == "__main__":
    main()
