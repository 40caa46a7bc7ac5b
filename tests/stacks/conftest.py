"""Tests against other people's packages, for real: `make stacks` has an environment for them."""

import importlib.util
from pathlib import Path

import pytest

HEAVY = ("transformers", "lightning", "accelerate", "peft", "onnx", "onnxruntime", "onnxscript")
MISSING = [name for name in HEAVY if importlib.util.find_spec(name) is None]

# what a test gets of these packages, not of ours
OTHERS = [
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::UserWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::torch.jit.TracerWarning",
]


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        for text in OTHERS:
            item.add_marker(pytest.mark.filterwarnings(text), append=False)
        if MISSING:
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(MISSING)}"))


def _let_torchvision_import():
    """Declare two operators that it lacks where its library was built for CUDA and torch was not.

    timm and lightning import it; no test computes with them.
    """
    import torch

    if importlib.util.find_spec("torchvision") is None:
        return []
    library = torch.library.Library("torchvision", "FRAGMENT")
    folder = Path(importlib.util.find_spec("torchvision").origin).parent
    try:
        torch.ops.load_library(str(folder / "_C.so"))
    except OSError:
        for name in ("nms", "qnms"):
            if hasattr(torch.ops.torchvision, name):  # this module is imported under two names
                continue
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return [library]


_KEPT = _let_torchvision_import()
