"""Where a result comes from: device, driver, clocks, versions, and the sources that ran."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
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
        "triton": _version("triton") or "none",
        "sources": source_digest(),
        "launch_table": _launch_table(),
    }


def facts(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """The key, and what else a reader may ask."""
    return key(device) | {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "commit": commit or _commit(),
        "nvidia_smi": smi() if device.type == "cuda" else None,
        "multiprocessors": _multiprocessors(device),
        "host_cpus": os.cpu_count(),
    }


def device_name(device: torch.device) -> str:
    """As the driver gives it; a CPU is "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


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


def _commit() -> str | None:
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return commit.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _multiprocessors(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
