"""What methods make of a first layer: `python -m benchmarks.topology_facts DIR [EPOCHS]`.

LeNet-300-100 on Fashion-MNIST (its IDX files in DIR) at 98 %, one seed: live neurons, fan-in,
overlap with the start and exploration. It prints a table in Markdown.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import sparsekern as sk
from sparsekern.training.data import Images, batches, load

METHODS = {"SET": sk.SET, "RigL": sk.RigL, "SRigL": sk.SRigL}
BATCH = 100


def row(name: str, data: Images, epochs: int) -> str:
    """Train, and tell of the first layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    g = torch.Generator().manual_seed(0)
    sk.sparsify_(model, 0.98, exclude=("4",), generator=g)
    rates = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    optimizer = torch.optim.SGD(model.parameters(), **rates)  # type: ignore[arg-type]
    steps = epochs * (len(data.train_y) // BATCH)
    share = {"t_end": int(0.75 * steps), "drop_fraction": 0.5, "exploration": True}
    method = METHODS[name](model, optimizer, **share)  # type: ignore[arg-type]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    stream = batches(data, BATCH, 0)
    while method.weight_steps < steps:
        x, y = next(stream)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.flatten(1)), y)
        loss.backward()  # type: ignore[no-untyped-call]
        before = method.weight_steps
        optimizer.step()
        if method.weight_steps > before:
            schedule.step()
    with torch.no_grad():
        right = model(data.test_x.flatten(1)).argmax(1) == data.test_y
    facts, last = sk.topology_facts(model)["0"], method.history[-1].layers["0"]
    return (
        f"| {name} | {100 * float(right.float().mean()):.1f} | {facts.live_outputs} | "
        f"{facts.live_inputs} | {facts.fan_in_median} / {facts.fan_in_max} | {last.overlap:.2f} | "
        f"{method.exploration().layers['0']:.3f} |"
    )


def main() -> None:
    """Print the table."""
    folder, epochs = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5
    data = load("fashion-mnist", folder)
    if not isinstance(data, Images):
        raise TypeError("expected images")
    print(
        "| method | accuracy % | live outputs of 300 | live inputs of 784 | fan-in median / max |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in METHODS:
        print(row(name, data, epochs), flush=True)


if __name__ == "__main__":
    main()
