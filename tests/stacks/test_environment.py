"""What the other tests of this folder take for granted."""

import subprocess
import sys
from pathlib import Path

import sparsekern

ROOT = Path(sparsekern.__file__).resolve().parent.parent


def test_importing_sparsekern_imports_none_of_them():
    names = ("transformers", "lightning", "accelerate", "onnx", "onnxscript", "scipy", "torchao")
    code = f"import sys, sparsekern; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "[]\n", done.stderr
