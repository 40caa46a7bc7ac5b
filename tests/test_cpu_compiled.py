"""How the CPU products are compiled: for the vectors of every kind of machine, and anew in time."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparsekern.ops.cpu.choice import has_numba

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_numba(), reason="numba is not installed"),
]
ROOT = Path(__file__).resolve().parent.parent

# small integers, so that every order of sums gives the same bits
CODE = """
import torch
from sparsekern import SparseConv2d, SparseLinear
from sparsekern.ops.cpu.jit import simd
assert simd.WIDTH == {width}, simd.WIDTH
torch.set_num_threads(1)
torch.manual_seed(0)

def integers(*shape):
    return torch.randint(-4, 5, shape).float()

def check(layer, x):
    twin = type(layer).from_dense(layer.to_dense(), mask=layer.mask(), block=layer.block,
                                  impl="masked")
    with torch.no_grad():
        layer.set_active_values(integers(*layer.values.shape) * (layer.active_values() != 0))
        layer.bias.copy_(integers(*layer.bias.shape))
        twin.values.copy_(layer.topology.unpack(layer.active_values()))
        twin.bias.copy_(layer.bias)
    found = []
    for one in (layer, twin):
        own = x.clone().requires_grad_()
        y = one(own)
        y.backward(torch.ones_like(y).cumsum(0) % 3)
        found.append((y, own.grad, one.pack(one.values.grad), one.bias.grad))
    for name, a, b in zip(("y", "dx", "dw", "db"), *found):
        assert torch.equal(a, b), (layer, tuple(x.shape), name)

for block in (1, 4, 16, 32, 64, (8, 16), (64, 8)):
    for m in (1, 7, 40):
        check(SparseLinear(130, 150, sparsity=0.5, block=block), integers(m, 130))
for block in (1, 3, 4, 8, (8, 16), 16, 32):
    for size in (5, 16):
        layer = SparseConv2d(48, 40, 3, padding=1, sparsity=0.5, block=block)
        check(layer, integers(2, 48, size, size))
    check(SparseConv2d(48, 40, 1, sparsity=0.5, block=block), integers(2, 48, 6, 7))
    check(SparseConv2d(48, 40, 3, stride=2, sparsity=0.5, block=block), integers(2, 48, 9, 8))
print("all equal")
"""


@pytest.mark.parametrize("width", [16, 32, 64])
def test_exact_with_vectors_of(width, tmp_path):
    if width == importlib.import_module("sparsekern.ops.cpu.jit.simd").WIDTH:
        pytest.skip("this machine's own, which all other tests run with")
    env = os.environ | {
        "SPARSEKERN_VECTOR_BYTES": str(width),
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", CODE.format(width=width)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "all equal\n"


def test_a_kernel_on_disk_is_dated_by_every_file_of_its_folder(tmp_path):
    simd = importlib.import_module("sparsekern.ops.cpu.jit.simd")
    sweep = importlib.import_module("sparsekern.ops.cpu.jit.conv_sweep").sweep
    folder, copied = Path(simd.__file__).parent, tmp_path / "jit"
    shutil.copytree(folder, copied, ignore=shutil.ignore_patterns("__pycache__"))
    assert simd._stamp(copied) == simd._stamp(folder)  # copytree keeps the dates
    assert {"simd.py", "conv_sweep.py", "tiles.py"} <= {path.name for path in folder.glob("*.py")}
    for path in copied.glob("*.py"):
        before = simd._stamp(copied)
        path.write_text(path.read_text() + "# edited\n")
        assert simd._stamp(copied) != before, path.name
    before = simd._stamp(copied)
    (copied / "new.py").touch()
    assert simd._stamp(copied) != before
    store = getattr(sweep._cache, "_cache_file", None)
    if store is not None:  # a folder to write to was found
        assert len(store._source_stamp[1]) == len(simd._stamp(folder))  # a file may be edited now
