"""Triton kernels and their launchers: tensors in, tensors out.

No autograd, no validation and no dispatch live here; `sparsekern.ops` does that.
"""

if __name__ != "sparsekern.kernels":
    raise ImportError(
        "this folder is the package `sparsekern.kernels`: "
        "run `pip install -e .` and import that instead"
    )
