"""What makes the CPU path fast is not missed in silence: one warning, `repr` and `--version`."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsekern as sk
from sparsekern.ops.cpu import choice

ROOT = Path(__file__).resolve().parent.parent
BLOCKED = 'import sys\nsys.modules["numba"] = None\n'


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=True,
    )


PRODUCTS = """
import logging, torch, sparsekern as sk
logging.basicConfig(format="%(levelname)s %(name)s %(message)s", level=logging.INFO)
layers = sk.SparseLinear(8, 8), sk.SparseLinear(64, 64, block=32), sk.SparseConv2d(4, 4, 3)
print([repr(layer) for layer in layers])
sys.stderr.write("first\\n")
for x, layer in zip((torch.ones(2, 8), torch.ones(2, 64), torch.ones(1, 4, 5, 5)), layers):
    layer(x).sum().backward()
"""


def test_one_warning_at_the_first_product_says_what_is_lost_and_what_brings_it():
    done = run(BLOCKED + PRODUCTS)
    first, warning = done.stderr.strip().splitlines()
    assert first == "first"  # neither making nor showing a layer multiplies
    assert warning.startswith("WARNING sparsekern.ops.cpu.choice numba can't be imported (")
    assert "2 to 4 times as long" in warning
    assert warning.endswith('pip install "sparsekern[cpu]" brings it')
    assert "path=csr (torch)" in done.stdout
    assert "path=blas (torch)" in done.stdout


def test_who_chose_is_not_warned():
    assert run(BLOCKED + PRODUCTS, SPARSEKERN_CPU="csr").stderr == "first\n"


def test_with_numba_nothing_is_said():
    pytest.importorskip("numba")
    done = run("import sys\n" + PRODUCTS)
    assert done.stderr == "first\n"
    assert done.stdout.count("path=jit (numba)") == 3


def test_repr_says_which_path_runs():
    layer = sk.SparseLinear(64, 64, block=32)
    for name in ("blas", "csr"):
        with choice.force(name):
            assert f"impl=cpu (auto), path={name} (torch)" in repr(layer)
    assert "path=" not in repr(sk.SparseLinear(8, 8, impl="masked"))


VERSION = "from sparsekern.cli.main import main; main(['--version'])"


def test_version_says_what_runs():
    lines = run(BLOCKED + VERSION).stdout.splitlines()
    assert lines[0] == f"sparsekern {sk.__version__}"
    assert lines[1] == f"torch {torch.__version__}"
    assert [line.split()[0] for line in lines[2:6]] == ["triton", "numba", "numpy", "python"]
    assert lines[6] == "products on the CPU: csr (torch); blocks of 32 and more: blas (torch)"


def test_version_names_numba():
    pytest.importorskip("numba")
    lines = run(VERSION).stdout.splitlines()
    assert f"numba {importlib.metadata.version('numba')}" in lines
    assert lines[6] == "products on the CPU: jit (numba)"
    assert lines == lines[:7]


def test_install_lines_bring_numba():
    """Wherever a page or a message shows how to install, the line asks for the extra `cpu`."""
    shown = [
        (path.name, line.strip())
        for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for line in path.read_text().splitlines()
        if "pip install" in line and ("sparsekern" in line or '".' in line or " ." in line)
    ]
    assert shown
    for name, line in shown:
        assert "[cpu" in line or ",cpu" in line, f"{name}: {line}"
