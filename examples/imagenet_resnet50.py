"""ResNet-50 on folders of images by the recipe of RigL's paper (Evci et al. 2020, section 4.1).

    torchrun --nproc-per-node=8 examples/imagenet_resnet50.py DATA --out runs/rigl80

DATA holds `train` and `val`, with a folder of images for each class. Started again with the same
`--out`, after whatever ended it, the run goes on from its last save with the bits that it would
have had. `--method dense` trains the dense network. 5 times the paper's steps: `--steps 160000`.

The recipe: batch 4096, 32,000 weight steps, Nesterov momentum 0.9, weight decay 1e-4 on weights,
label smoothing 0.1, learning rate 0.1 per 256 images after a warm-up of 5 epochs, a tenth of it
from epochs 30, 70 and 90 on; RigL every 100 steps until step 25,000, starting at 0.3 of a layer's
weights. Epochs are those of ImageNet in 32,000 steps: with other data or `--steps` the same shares
of the training. The batch of an update takes no weight step, so there are some more batches.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from image_folders import Batches, ImageFolders, shares
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import sparsekern as sk
from sparsekern.models import resnet_50

STEPS, UPDATES_UNTIL = 32_000, 25_000
EPOCH = 1_281_167 / 4096 / STEPS  # of ImageNet, as a share of the training
WARM_UP = 5 * EPOCH
RATES = ((90 * EPOCH, 0.001), (70 * EPOCH, 0.01), (30 * EPOCH, 0.1), (0.0, 1.0))
METHODS = {"static": sk.Static, "set": sk.SET, "rigl": sk.RigL}
NOT_OF_THE_RUN = ("data", "out", "workers", "save_every", "log_every")


class Ranks(NamedTuple):
    """Which process this is, of how many, and where it computes."""

    rank: int
    world: int
    device: torch.device


class Run:
    """What is trained: network, optimizer, and method unless it is dense."""

    def __init__(self, args: argparse.Namespace, classes: int, ranks: Ranks) -> None:
        torch.manual_seed(args.seed)
        self.device = ranks.device
        self.model = MODELS[args.model](classes).to(ranks.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if args.method != "dense":
            # values as the dense network draws them, as in the reference code
            g = torch.Generator().manual_seed(args.seed)
            kwargs = {"distribution": args.distribution, "block": args.block}
            sk.sparsify_(self.model, args.sparsity, init=None, generator=g, **kwargs)
        weights = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": weights, "weight_decay": args.weight_decay}, {"params": others}]
        self.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
        self.method: sk.Method | None = None
        if args.method != "dense":
            self.method = METHODS[args.method](
                self.model,
                self.optimizer,
                t_end=max(1, args.steps * UPDATES_UNTIL // STEPS),
                update_freq=args.update_freq,
                drop_fraction=args.drop_fraction,
                grad_accumulation=args.micro_batches,
                seed=args.seed,
            )
        self.ddp: nn.Module = self.model
        if ranks.world > 1:
            where = [ranks.device] if ranks.device.type == "cuda" else None
            self.ddp = DistributedDataParallel(self.model, device_ids=where)
        self.batches = 0
        self._args = args

    @property
    def steps(self) -> int:
        """Weight steps so far."""
        return self.batches if self.method is None else self.method.weight_steps

    def train(self, images: Tensor, labels: Tensor) -> Tensor:
        """One batch of this rank's, in parts; returns the loss, () float32."""
        args, total = self._args, torch.zeros((), device=self.device)
        rate = args.base_lr * args.batch / 256 * rate_at(self.steps / args.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        cut = (images.chunk(args.micro_batches), labels.chunk(args.micro_batches))
        parts = list(zip(*cut, strict=True))
        for i, (x, y) in enumerate(parts):
            last = i == len(parts) - 1 or not isinstance(self.ddp, DistributedDataParallel)
            with nullcontext() if last else cast(Any, self.ddp).no_sync():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=args.bfloat16):
                    smoothing = args.label_smoothing
                    loss = functional.cross_entropy(self.ddp(x), y, label_smoothing=smoothing)
                torch.autograd.backward(loss / len(parts))
            total += loss.detach().float() / len(parts)
        self.optimizer.step()
        self.batches += 1
        return total

    def state(self) -> dict[str, Any]:
        """All that a run needs to go on; the optimizer's state holds the method's."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state | {"batches": self.batches, "settings": settings(self._args)}

    def resume(self, path: Path) -> None:
        """Go on from a save; it must be of a run with these settings."""
        saved = torch.load(path, map_location=self.device)
        own = settings(self._args)
        other = {k: v for k, v in saved["settings"].items() if own.get(k) != v}
        if other:
            raise SystemExit(f"{path} is of a run with other settings: {other}")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.batches = saved["batches"]


def tiny(classes: int) -> nn.Module:
    """Three convolutions: to try the script, not to learn with."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)),
    )


MODELS = {"resnet50": resnet_50, "tiny": tiny}


def rate_at(done: float) -> float:
    """The learning rate, as a multiple of its highest, after a share of the training."""
    if done < WARM_UP:
        return done / WARM_UP
    return next(rate for start, rate in RATES if done >= start)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What two parts of one run must have in common."""
    return {k: v for k, v in vars(args).items() if k not in NOT_OF_THE_RUN}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, or go on; returns what result.json says."""
    args = parsed(argv)
    ranks = started()
    args.out.mkdir(parents=True, exist_ok=True)
    data = ImageFolders(args.data / "train", args.image_size, args.seed)
    run = Run(args, len(data.classes), ranks)
    saved = args.out / "last.pt"
    if saved.exists():
        run.resume(saved)
    order = Batches(len(data), args.batch, run.batches, ranks.rank, ranks.world, args.seed)
    loader = DataLoader(data, batch_sampler=order, num_workers=args.workers)
    last, batches = time.monotonic(), iter(loader)
    while run.steps < args.steps:
        images, labels = next(batches)
        images = images.to(ranks.device, memory_format=torch.channels_last)
        loss = run.train(images, labels.to(ranks.device))
        if run.batches % args.log_every == 0:
            loss = mean_over_ranks(loss, ranks)
            if ranks.rank == 0:
                rate = args.batch * args.log_every / (time.monotonic() - last)
                print(f"step {run.steps}: loss {loss:.4f}, {rate:.0f} images/s", flush=True)
            last = time.monotonic()
        if run.batches % args.save_every == 0:
            save(run, saved, ranks)
    save(run, saved, ranks)
    return finished(run, args, data.classes, ranks)


def finished(
    run: Run, args: argparse.Namespace, classes: list[str], ranks: Ranks
) -> dict[str, Any]:
    """Test the network, and write result.json."""
    data = ImageFolders(args.data / "val", args.image_size, None)
    if data.classes != classes:
        raise SystemExit("the folders of `val` are not those of `train`")
    found: dict[str, Any] = {
        "accuracy": accuracy(run, data, args, ranks),
        "weight_steps": run.steps,
        "batches": run.batches,
        "updates": 0 if run.method is None else len(run.method.history),
        "sparsity": 0.0 if run.method is None else sk.summary(run.model).sparsity,
    }
    if ranks.rank == 0:
        (args.out / "result.json").write_text(json.dumps(found | settings(args), indent=1) + "\n")
        print(found, flush=True)
    return found


@torch.no_grad()
def accuracy(run: Run, data: ImageFolders, args: argparse.Namespace, ranks: Ranks) -> float:
    """Share of the images whose class comes first."""
    for module in run.model.modules():
        for name in ("running_mean", "running_var"):
            if ranks.world > 1 and hasattr(module, name):
                dist.broadcast(getattr(module, name), 0)  # each rank has those of its own images
    own = max(1, args.batch // ranks.world // args.micro_batches)
    keys = list(shares(len(data), own, ranks.rank, ranks.world))
    run.model.eval()
    right = torch.zeros((), dtype=torch.int64, device=ranks.device)
    for images, labels in DataLoader(data, batch_sampler=keys, num_workers=args.workers):
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=args.bfloat16):
            scores = run.model(images.to(ranks.device, memory_format=torch.channels_last))
        right += (scores.argmax(1) == labels.to(ranks.device)).sum()
    run.model.train()
    if ranks.world > 1:
        dist.all_reduce(right)
    return int(right) / len(data)


def mean_over_ranks(loss: Tensor, ranks: Ranks) -> Tensor:
    """Of numbers that every rank has one of."""
    if ranks.world > 1:
        dist.all_reduce(loss)
    return loss / ranks.world


def save(run: Run, path: Path, ranks: Ranks) -> None:
    """Replace the last save by one that is whole."""
    if ranks.rank == 0:
        torch.save(run.state(), path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
    if ranks.world > 1:
        dist.barrier()


def started() -> Ranks:
    """Join the process group, where torchrun has started several processes."""
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    several = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    return Ranks(rank, world, torch.device(device))


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="ResNet-50 on folders of images, sparse or dense.")
    add = parser.add_argument
    add("data", type=Path, help="folder with `train` and `val`, each with a folder a class")
    add("--out", type=Path, required=True, help="folder of saves and results")
    add("--method", choices=("dense", *METHODS), default="rigl")
    add("--model", choices=MODELS, default="resnet50", help="`tiny` is to try the script")
    add("--sparsity", type=float, default=0.8)
    add("--distribution", choices=("erk", "uniform"), default="erk")
    add("--block", type=int, default=1, help="edge of the blocks of weights")
    add("--steps", type=int, default=STEPS, help="weight steps")
    add("--batch", type=int, default=4096, help="images of all processes together")
    add("--micro-batches", type=int, default=1, help="parts that each takes its share in")
    add("--base-lr", type=float, default=0.1, help="for 256 images")
    add("--weight-decay", type=float, default=1e-4)
    add("--label-smoothing", type=float, default=0.1)
    add("--update-freq", type=int, default=100, help="weight steps between updates")
    add("--drop-fraction", type=float, default=0.3)
    add("--bfloat16", action="store_true", help="products in bfloat16")
    add("--image-size", type=int, default=224)
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=8, help="processes that read images, for each")
    add("--save-every", type=int, default=500, help="batches")
    add("--log-every", type=int, default=100, help="batches")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
