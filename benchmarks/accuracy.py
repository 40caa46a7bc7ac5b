"""What sparse training costs in accuracy: three networks, each by several methods.

    python -m benchmarks.accuracy STUDY [--data-dir DIR] [--seeds N] [--only ROW ...]

`accuracy`: 784-300-100-10 on Fashion-MNIST at 98 % sparsity, and the price of a block; static is
also shown at a lower weight decay, which suits it more. `conv_accuracy`: LeNet-5 in Caffe's form,
20 and 50 channels and 500 hidden units, at 90 % (ERK); "rigl 2x" takes twice as many steps, as
Evci et al. 2020 lengthen sparse training, which costs fewer FLOPs than dense training still.
`char_lm`: the GRU of their appendix I with a state of 256, at 75 % (uniform), on a text, by default
the documentation that comes with Python; a sequence starts from a zero state.

Output layers of the first two are dense, as the embedding of the third. All rows of a study take
the same weight steps on the same batches. `--only` measures some rows, and keeps the others that
were measured with the same configuration.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.result_files import RESULTS, save
from sparsekern.models import char_gru, lenet_5
from sparsekern.training import data, trainer
from sparsekern.training.config import PRESETS, TrainConfig


class Row(NamedTuple):
    """One line of a table.

    Attributes:
        method: by its name.
        changes: to the study's configuration.
    """

    method: str
    changes: Mapping[str, Any] = {}


class Study(NamedTuple):
    """One network on one set of data.

    Attributes:
        config: of the training.
        rows: by the name that is printed.
        seeds: of each, by default.
        score: field of a run's result that is compared.
        unit: of the score in print.
    """

    config: TrainConfig
    rows: Mapping[str, Row]
    seeds: int
    score: str = "accuracy"
    unit: float = 100.0


def lenet(classes: int, in_channels: int, image_size: int) -> nn.Module:
    """LeNet-5 with 20 and 50 channels and 500 hidden units."""
    return lenet_5(classes, in_channels, image_size, conv=(20, 50), hidden=(500,))


def gru(vocab: int) -> nn.Module:
    """The GRU of RigL with half the state."""
    return char_gru(vocab, state=256)


_LENET = replace(
    PRESETS["fashion-mnist"],
    model="benchmarks.accuracy:lenet",
    sparsity=0.9,
    drop_fraction=0.3,
    lr=0.05,
    weight_decay=1e-4,
    epochs=4,
)
_GRU = replace(
    PRESETS["text"], model="benchmarks.accuracy:gru", seq_len=64, epochs=3, update_freq=50
)
_PLAIN = {name: Row(name) for name in ("dense", "static", "rigl")}
STUDIES = {
    "accuracy": Study(
        PRESETS["fashion-mnist"],
        {
            "dense": Row("dense"),
            "static": Row("static"),
            "static, weight decay 1e-4": Row("static", {"weight_decay": 1e-4}),
            "set": Row("set"),
            "rigl": Row("rigl"),
            **{f"rigl, block {edge}": Row("rigl", {"block": edge}) for edge in (4, 16, 32)},
        },
        seeds=5,
    ),
    "conv_accuracy": Study(
        _LENET, {**_PLAIN, "rigl 2x": Row("rigl", {"epochs": 2 * _LENET.epochs})}, seeds=3
    ),
    "char_lm": Study(_GRU, _PLAIN, seeds=2, score="bits_per_character", unit=1.0),
}
"""By the name of the result file."""


def train(job: tuple[str, str, int, str]) -> dict[str, Any]:
    """Scores and FLOPs of one run."""
    name, label, seed, source = job
    torch.set_num_threads(1)
    study = STUDIES[name]
    method, changes = study.rows[label]
    config = replace(study.config, **changes)
    found = trainer.run(config, data.load(config.data, source, config.seq_len), method, seed)
    return {
        "accuracy": 100 * found.accuracy,
        "score": study.unit * getattr(found, study.score),
        "flops": asdict(found.flops),
        "layers": [layer._asdict() for layer in found.layers],
        "seconds": found.seconds,
    }


def summary(study: Study, label: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    method, changes = study.rows[label]
    config, scores = replace(study.config, **changes), [run["score"] for run in runs]
    return {
        "label": label,
        "method": label if label.startswith(f"{method} ") else method,
        "block": config.block,
        "weight_decay": config.weight_decay,
        "accuracies": [run["accuracy"] for run in runs],
        "scores": scores,
        "mean": statistics.mean(scores),
        "std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "flops": runs[0]["flops"],
        "layers": runs[0]["layers"],
        "seconds": [run["seconds"] for run in runs],
    }


def measured_before(name: str) -> dict[str, dict[str, Any]]:
    """Rows of the result file, if it has this configuration."""
    path = RESULTS / "cpu" / f"{name}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    # through JSON, where tuples are lists
    same = content.get("config") == json.loads(json.dumps(asdict(STUDIES[name].config)))
    return {row["label"]: row for row in content["rows"]} if same else {}


def text_facts(content: bytes, path: str, name: str) -> dict[str, Any]:
    """What the text is, and what a model of single characters reaches."""
    digest = hashlib.sha256(content).hexdigest()
    entropy = data.load_text(Path(path), _GRU.seq_len).unigram_entropy
    return {"name": name, "bytes": len(content), "sha256": digest, "unigram_entropy": entropy}


def main() -> None:
    """Train the rows with all seeds, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=tuple(STUDIES))
    parser.add_argument("--data-dir", type=Path, help="of the images; of char_lm, the text's file")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="ROW")
    args = parser.parse_args()
    study, found = STUDIES[args.study], measured_before(args.study)
    asked, seeds = args.only or list(study.rows), range(args.seeds or study.seeds)
    if not set(asked) <= set(study.rows):
        parser.error(f"--only must name some of {', '.join(study.rows)}; got {', '.join(asked)}")
    torch.set_num_threads(1)  # as each run has, for the record
    facts: dict[str, Any] = {"config": asdict(study.config)}
    with tempfile.NamedTemporaryFile() as file, ProcessPoolExecutor(args.workers) as pool:
        source = str(args.data_dir or file.name)
        if study.config.data == "text":
            content = args.data_dir and args.data_dir.read_bytes()
            file.write(content or "\n".join(topics.values()).encode())
            file.flush()
            content, called = Path(source).read_bytes(), args.data_dir and args.data_dir.name
            facts["text"] = text_facts(content, source, called or "pydoc topics")
        jobs = [(args.study, label, seed, source) for label in asked for seed in seeds]
        results = list(pool.map(train, jobs))
    for label in asked:
        runs = [r for job, r in zip(jobs, results, strict=True) if job[1] == label]
        found[label] = summary(study, label, runs)
    table = [found[label] for label in study.rows if label in found]
    for line in table:
        each = " ".join(f"{score:.3f}" for score in line["scores"])
        sys.stdout.write(f"{line['label']:<28} {line['mean']:.3f} +- {line['std']:.3f}   {each}\n")
    sys.stdout.write(f"saved {save(args.study, {**facts, 'rows': table})}\n")


if __name__ == "__main__":
    main()
