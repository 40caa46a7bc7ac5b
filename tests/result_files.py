"""Small result files of training, made by hand, for the tests of pictures."""

import math

import torch
from torch import nn

import sparsekern as sk
from sparsekern.training.pictures import runs
from sparsekern.training.topology_frames import TopologyFrames

STEPS = 100


def frames_of(updates=3):
    model = nn.Sequential(nn.Linear(30, 12), nn.ReLU(), nn.Linear(12, 10))
    frames = TopologyFrames((5, 6))
    for step in range(updates + 1):
        fresh = sk.sparsify_(
            nn.Sequential(*map(type_of, model)),
            0.8,
            generator=torch.Generator().manual_seed(step),
        )
        frames.see(fresh, 10 * step)
    return frames


def type_of(layer):
    linear = isinstance(layer, nn.Linear)
    return nn.Linear(layer.in_features, layer.out_features) if linear else nn.ReLU()


def facts(k, named):
    found = {
        "outputs": 12,
        "live_outputs": 12 - k,
        "inputs": 30,
        "live_inputs": 20,
        "fan_in_median": 6 - k,
        "fan_in_max": 9 + k,
    }
    return found | {"nnz": 70 - k} if named else list(found.values())


def run(method, seed=0, sparsity=0.9, multiplier=1.0, block=(1, 1), lr=0.1, named=True, **other):
    dense = method == "dense"
    accuracy = 0.8 + 0.01 * seed + (0.05 if dense else 0.0) + 0.02 * math.log2(multiplier)
    curve = [
        {
            "step": int(STEPS * multiplier * share),
            "seconds": 2.0 * multiplier * share + seed,
            "training_flops": 1e9 * share,
            "loss": 1.0 - share / 2 + seed,
            "validation": {"accuracy": accuracy - 0.1 + 0.1 * share, "bits": None},
            "nnz": 70,
        }
        for share in (0.5, 1.0)
    ]
    moves = method in ("rigl", "set")
    updates = [
        {
            "step": 20 * k,
            "fraction": 0.3,
            "layers": {"fc1": {"dropped": 5, "grown": 4, "facts": facts(k, named)}},
        }
        for k in range(3 * moves)
    ]
    return {
        "method": method,
        "sparsity": 0.0 if dense else sparsity,
        "block": list(block),
        "multiplier": multiplier,
        "lr": lr,
        "seed": seed,
        "state": "done",
        "error": None,
        "learned": True,
        "validation": {"accuracy": accuracy, "bits": None},
        "test": {"accuracy": accuracy, "bits": None},
        "curve": curve,
        "flops": {"training_ratio": multiplier * (1.0 if dense else 1.2 * (1 - sparsity))},
        "updates": updates,
        "layers": [] if dense else [{"name": "fc1", "shape": [12, 30], "nnz": 70, "impl": "cpu"}],
        "frames": None,
        **other,
    }


def content(*made):
    return {
        "format": 2,
        "data": {"name": "digits"},
        "task": {"model": None, "hidden": [12]},
        "dense": {"inference": 1, "training": 1},
        "runs": list(made),
    }


def grid(methods=("dense", "static", "set", "rigl"), seeds=2, **axes):
    return [run(method, seed, **axes) for method in methods for seed in range(seeds)]


def of(*made):
    return runs.runs_in(content(*made))
