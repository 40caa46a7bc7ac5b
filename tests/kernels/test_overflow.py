"""No address is computed in 32 bits: operands of more than 2**31 elements, without the memory."""

import ast
import importlib
import inspect

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("kernels run compiled here, not interpreted", allow_module_level=True)

import corners
from mutants import generate
from shadow import SanitizerError


@pytest.mark.parametrize("corner", corners.CORNERS, ids=str)
def test_the_last_elements_are_reached_inside_bounds(corner):
    for name, reach in corners.run(corner).items():
        assert reach >= corners.LIMIT, f"{name}: only element {reach} was touched"


class Narrow(ast.NodeTransformer):
    """Takes all casts to int64 out of a source."""

    def visit_Call(self, node):
        node = self.generic_visit(node)
        return node.func.value if ast.unparse(node).endswith(".to(tl.int64)") else node


# the interpreter numbers its rows in int64 with or without the casts, so only its stores tell
SEEN = {"bsr_sddmm": 2}


@pytest.mark.parametrize("kernel", sorted(set(corners.KERNELS.values())))
def test_arithmetic_in_int32_is_seen(kernel, tmp_path):
    right = importlib.import_module(f"sparsekern.kernels.{kernel}")
    tree = Narrow().visit(ast.parse(inspect.getsource(right)))
    wrong = generate.load_tree(ast.fix_missing_locations(tree), f"{kernel}_int32", tmp_path)
    found = 0
    with generate.swapped_in(right, wrong):
        for corner in corners.of_kernel(kernel):
            try:
                corners.run(corner)
            except SanitizerError as error:
                found += "out of bounds" in str(error)
    seen = SEEN.get(kernel, len(corners.of_kernel(kernel)) // 2)
    assert found >= seen, f"only {found} corners see it"


def test_every_kernel_has_corners():
    # functions of several kernels; a pass over what dW kernels have written
    shared = {"pixels", "groups", "parts"}
    assert set(generate.modules()) - shared <= set(corners.KERNELS.values())
    for kernel in corners.KERNELS.values():
        assert len(corners.of_kernel(kernel)) >= 6, kernel
