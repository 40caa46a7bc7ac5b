"""What a measured number is worth: the versions and the machine behind it."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess  # git, for the commit
from pathlib import Path

import numpy as np
import torch


def environment(device: torch.device) -> dict[str, str | int | None]:
    """Versions and machine: what a number is worth depends on them."""
    return {
        "sparsekern": importlib.metadata.version("sparsekern"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def _commit() -> str | None:
    """Commit of the source tree, with "-dirty" if it was changed; None outside a repository."""
    root, git = Path(__file__).resolve().parent.parent, shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    command = [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    done = subprocess.run(  # noqa: S603  fixed arguments
        [*command, "--exclude=*"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None
