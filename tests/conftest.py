"""Settings of the whole suite: where Triton runs, determinism, and checked kernel launches."""

import importlib.util
import os
import sys

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None

# Triton reads this when a kernel is decorated. tests/aot and tests/launch compile instead, in a
# process of their own; workers started from here inherit what is decided first.
if not torch.cuda.is_available():
    folders = {part for arg in sys.argv[1:] if arg[:1] != "-" for part in arg.split("/")}
    compiling = not folders.isdisjoint({"aot", "launch"})
    os.environ.setdefault("TRITON_INTERPRET", "0" if compiling else "1")


INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import sanitizer

    from sparsekern.tuning.interpreter import steady_dots

    sanitizer.install()
    steady_dots()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_stays_compiled():
    """torch.compile gives up on a function that many tests have compiled, each in its own way."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _every_launch_sanitized():
    yield
    if INTERPRETED:
        made = sanitizer.counts
        assert made.started == made.sanitized + made.refused, f"launches went unchecked: {made}"


def pytest_collection_modifyitems(items):
    for item in items:
        if "triton" in item.nodeid.split("::")[-1] and not HAS_TRITON:
            item.add_marker(pytest.mark.skip(reason="triton is not installed"))
