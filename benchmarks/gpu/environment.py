"""Where a result comes from: device, driver, clocks, versions, and the sources that ran."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from sparsekern.show import environment as show
from sparsekern.show.environment import ROOT, device_name, version

SOURCES = ("kernels", "sparsekern", "benchmarks/gpu")
SMI_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "temperature.gpu",
    "power.draw",
    "power.limit",
)


def key(device: torch.device) -> dict[str, str]:
    """What two results must share to be compared: device, versions, sources, launch table."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": version("triton") or "none",
        "sources": source_digest(),
        "launch_table": _launch_table(),
    }


def facts(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """The key, and what else a reader may ask."""
    return (
        show.environment(device)
        | key(device)
        | {
            "cuda": torch.version.cuda,
            **({"commit": commit} if commit else {}),
            "nvidia_smi": smi() if device.type == "cuda" else None,
            "multiprocessors": _multiprocessors(device),
            "host_cpus": os.cpu_count(),
        }
    )


@functools.cache  # the sources that were imported, not those of later
def source_digest() -> str:
    """Of every source that a number depends on: also right in a dirty tree and without git."""
    digest = hashlib.sha256()
    for entry in SOURCES:
        path = ROOT / entry
        files = sorted(path.rglob("*.*")) if path.is_dir() else [path]
        for file in files:
            counts = file.suffix in {".py", ".json"}  # the launch tables are JSON
            if counts and file.name not in {"__main__.py", "report.py"}:
                digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def smi() -> dict[str, str] | None:
    """Clocks, temperature and power as nvidia-smi reads them now."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    values = [value.strip() for value in answer.stdout.strip().split(",")]
    return dict(zip(SMI_FIELDS, values, strict=False)) if answer.returncode == 0 else None


def _launch_table() -> str:
    """Digest of the user's launch table, if the environment names one."""
    path = os.environ.get("SPARSEKERN_LAUNCH_TABLE")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12] if path else "shipped"


def _multiprocessors(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
