"""Where result files lie, and how one is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsekern.show.environment import environment
from sparsekern.show.output_files import write_whole

RESULTS = Path(__file__).parent / "results"


def save(name: str, results: dict[str, Any]) -> Path:
    """Write `results` with the environment to benchmarks/results/cpu/<name>.json."""
    path = RESULTS / "cpu" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"environment": environment(), **results}, indent=1) + "\n")
    return path
