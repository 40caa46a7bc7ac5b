"""A character-level GRU at 75 % sparsity: bits per character of dense, static and RigL.

    python -m benchmarks.char_lm [--text FILE] [--seeds 2]

The network of Evci et al. 2020, appendix I, with a state of 256 instead of 512; the GRU and the
readout are sparse (uniform), the shared embedding is dense. Without a file the text is the
documentation that comes with Python (pydoc's topics). Its last tenth is held out. All rows take the
same weight steps on the same batches; a sequence starts from a zero state.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn

from benchmarks.result_files import save
from sparsekern.models import char_gru
from sparsekern.training import data, trainer
from sparsekern.training.config import PRESETS

METHODS = ("dense", "static", "rigl")
CONFIG = replace(
    PRESETS["text"], model="benchmarks.char_lm:network", seq_len=64, epochs=3, update_freq=50
)


def network(vocab: int) -> nn.Module:
    """The GRU of RigL with half the state."""
    return char_gru(vocab, state=256)


def train(job: tuple[str, int, str]) -> dict[str, Any]:
    """Bits per character and FLOPs of one run."""
    method, seed, path = job
    torch.set_num_threads(1)
    text = data.load("text", path, CONFIG.seq_len)
    result = trainer.run(CONFIG, text, method, seed)
    return {
        "bits_per_character": result.bits_per_character,
        "accuracy": 100 * result.accuracy,
        "flops": asdict(result.flops),
        "layers": [layer._asdict() for layer in result.layers],
        "seconds": result.seconds,
    }


def table(jobs: list[tuple[str, int, str]], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per method: means and standard deviations over seeds."""
    rows = []
    for method in METHODS:
        runs = [r for job, r in zip(jobs, results, strict=True) if job[0] == method]
        bits = [run["bits_per_character"] for run in runs]
        rows.append(
            {
                "method": method,
                "bits_per_character": bits,
                "mean": statistics.mean(bits),
                "std": statistics.stdev(bits) if len(bits) > 1 else None,
                "accuracies": [run["accuracy"] for run in runs],
                "flops": runs[0]["flops"],
                "layers": runs[0]["layers"],
                "seconds": [run["seconds"] for run in runs],
            }
        )
    return rows


def main() -> None:
    """Train every method with all seeds, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="default: the topics of Python's pydoc")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as each run has, for the record
    content = args.text.read_bytes() if args.text else "\n".join(topics.values()).encode()
    with tempfile.NamedTemporaryFile() as file, ProcessPoolExecutor(args.workers) as pool:
        file.write(content)
        file.flush()
        text = data.load_text(Path(file.name), CONFIG.seq_len)
        jobs = [(method, seed, file.name) for seed in range(args.seeds) for method in METHODS]
        rows = table(jobs, list(pool.map(train, jobs)))
    facts = {
        "name": args.text.name if args.text else "pydoc topics",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "unigram_entropy": text.unigram_entropy,
    }
    sys.stdout.write(f"unigram entropy {text.unigram_entropy:.3f} bits per character\n")
    for row in rows:
        each = " ".join(f"{b:.3f}" for b in row["bits_per_character"])
        sys.stdout.write(f"{row['method']:<8} {row['mean']:.3f}   {each}\n")
    saved = save("char_lm", {"config": asdict(CONFIG), "text": facts, "rows": rows})
    sys.stdout.write(f"saved {saved}\n")


if __name__ == "__main__":
    main()
