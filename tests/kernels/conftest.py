"""Chooses where the kernels of this folder run, before anything imports triton.

On a CUDA device they run compiled; anywhere else in triton's interpreter, which is chosen when a
kernel is decorated, so by the environment at import.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
elif not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "triton was imported before tests/kernels could choose its interpreter: "
            "run `pytest tests/kernels` by itself, or set TRITON_INTERPRET=1"
        )
    os.environ["TRITON_INTERPRET"] = "1"

# --import-mode=importlib puts no folder on sys.path: the tests import the case tables by this name
_spec = importlib.util.spec_from_file_location("kernel_cases", Path(__file__).with_name("cases.py"))
sys.modules["kernel_cases"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["kernel_cases"])


def pytest_report_header():
    if importlib.util.find_spec("triton") is None:
        return "kernels: not tested, triton is not installed"
    return f"kernels: {'compiled' if torch.cuda.is_available() else 'interpreted'}"
