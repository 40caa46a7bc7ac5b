"""Where a result comes from: device, driver, clocks, versions, and the sources that ran."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.agenda import Part
from sparsekern.show import environment as show
from sparsekern.show.environment import ROOT, device_name, version

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
    """What two results must share to be compared: device, versions, launch table."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": version("triton") or "none",
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
def digest(sources: tuple[str, ...], ops: tuple[str, ...], arch: str) -> str:
    """Of what a number depends on: right in a dirty tree and without git, too.

    Args:
        sources: patterns of files beneath the root.
        ops: operations whose shipped launch entries count, by their first letters.
        arch: of the launch table.
    """
    found = hashlib.sha256()
    for pattern in sources:
        for file in sorted(ROOT.glob(pattern)):
            found.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    entries = json.loads((ROOT / "kernels" / "tables" / f"{arch}.json").read_text())["entries"]
    used = {key: entry for key, entry in entries.items() if key.startswith(ops)} if ops else {}
    found.update(json.dumps(used, sort_keys=True).encode())
    return found.hexdigest()[:12]


def digests(parts: Mapping[str, Part], device: torch.device) -> dict[str, str]:
    """Of what each part depends on."""
    from sparsekern.kernels.launch import arch_class  # noqa: PLC0415  imports triton

    arch = arch_class(device)
    return {name: digest(part.sources, part.ops, arch) for name, part in parts.items()}


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
