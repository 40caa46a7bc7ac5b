"""Kernels compiled over the stand-in driver are found elsewhere: nothing compiles a second time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("launch.standin", exc_type=ImportError)  # before triton
from launch.cases import EVERY

ROOT = Path(__file__).resolve().parents[2]

PROCESS = """
import json, sys
from pathlib import Path
from benchmarks.gpu import compiled
made, archive, folder = sys.argv[1] == "make", Path(sys.argv[2]), Path(sys.argv[3])
kernels = None if made else compiled.unpack(archive, folder)
from launch import cases, standin
if len(sys.argv) > 4:  # as if another build of the same release were here
    from triton.runtime import cache
    cache.triton_key = lambda: sys.argv[4]
with compiled.taken(None if made else folder) as count:
    cases.linear_calls(cases.Linear((64, 64)))["spmm"].run()
if made:
    kernels = compiled.pack(folder, archive)
print(json.dumps({"kernels": kernels, "launches": standin.launches(), **vars(count)}))
"""


def process(mode, archive, folder, *more):
    env = os.environ | {"TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, mode, archive, folder, *more],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels_travel(tmp_path):
    archive = tmp_path / "compiled.tar.xz"
    first = process("make", archive, tmp_path / "here")
    assert first["found"] == 0
    assert first["made"] == first["kernels"] > 0
    for more in ([], ["another build"]):
        again = process("take", archive, tmp_path / f"there {len(more)}", *more)
        assert again["made"] == 0
        assert again["found"] == again["kernels"] == first["kernels"]
        assert again["launches"] == first["launches"] > 0


@pytest.mark.skipif(not EVERY, reason="SPARSEKERN_LAUNCH=all runs it")
def test_a_rehearsal_walks_through_a_part(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--rehearse"]
    done = subprocess.run(
        [*command, "--out", tmp_path, "--parts", "dense", "layers"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[dense] dense 8192x4096x4096 bf16: 0 kernels" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("0 cases failed, 0 not begun; ")
    assert (tmp_path / "compiled.tar.xz").exists()
