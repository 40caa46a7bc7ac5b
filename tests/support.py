"""What the tests measure with: exact inputs, a proven error bound, an allocation tracer."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

IMPLS = ("cpu", "triton", "dense")
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def integers(*shape, dtype=torch.float32, low=-3, high=3):
    """Integers whose products and sums are exact, so that every order gives the same bits."""
    return torch.randint(low, high + 1, shape).to(dtype)


def integer_values(topology, dtype=torch.float32):
    """Integer block values with zero padding, as layers keep them."""
    dense = integers(*topology.shape, dtype=dtype)
    return topology.pack(dense)


def product_bound(a, b, terms, dtype):
    """Largest possible rounding error of each entry of a @ b computed in `dtype`.

    gamma_K (|a| |b|) for sums in float32 (or wider) in any order, and one final rounding. `a`, `b`
    are float64 and hold the very numbers that were multiplied; `terms` is the number of products.
    """
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    u = UNIT_ROUNDOFF[wide]
    gamma = terms * u / (1 - terms * u)
    spread = a.abs() @ b.abs()
    out = UNIT_ROUNDOFF[dtype]
    return gamma * spread + out * ((a @ b).abs() + gamma * spread)


def assert_within(got, exact, bound, what="result"):
    """Every entry is finite and no further from `exact` than its own bound."""
    assert got.shape == exact.shape, f"{what}: shape {got.shape}, expected {exact.shape}"
    error = (got.double() - exact).abs()
    inside = error <= bound  # NaN compares false, so it fails
    assert bool(inside.all()), (
        f"{what}: {int((~inside).sum())} of {inside.numel()} entries are outside the bound; "
        f"worst error {error.max():.3g}"
    )


class AllocationTracer(TorchDispatchMode):
    """Records the largest tensor, in elements, that any operator returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.at = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes():
                held = leaf.untyped_storage().nbytes() // leaf.element_size()
                if held > self.largest:
                    self.largest, self.at = held, str(func)
        return result
