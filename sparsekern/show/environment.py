"""What a measured number is worth: the versions and the machine behind it."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess  # git, for the commit
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("numpy", "numba", "triton")


def environment(device: torch.device | None = None) -> dict[str, str | int | None]:
    """Date, versions, processor, threads, device and commit; None for what is not there.

    Args:
        device: that ran; the CPU if None.
    """
    import sparsekern  # noqa: PLC0415  not loaded yet when this file is

    return {
        "date": time.strftime("%Y-%m-%d"),
        "sparsekern": sparsekern.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": device_name(device or torch.device("cpu")),
    }


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The CPU's model name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """As the driver gives it; a CPU is "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def commit() -> str | None:
    """Of the source tree, short, with "-dirty" if it was changed; None outside a repository."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return None
    done = subprocess.run(  # noqa: S603  fixed arguments
        [git, "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None
