"""The tests can see faults: each small change to a kernel's source makes some answer wrong.

A share of all mutants runs, the same each time; SPARSEKERN_MUTANTS=1000 (at most so many for each
kernel) runs more, whose survivors have to be judged one by one.
"""

import ast
import importlib
import os
import warnings

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels run compiled here, not interpreted", allow_module_level=True)

from mutants import generate, killers
from mutants.equivalent import EQUIVALENT

PER_KERNEL = int(os.environ.get("SPARSEKERN_MUTANTS", "40"))
# convolutions differ from the linear kernels in what surrounds a product: fewer each will do
SHARE = {module: 1 if "conv2d" not in module else 0.8 for module in generate.modules()}
MUTANTS = [m for k, share in SHARE.items() for m in generate.chosen(k, int(share * PER_KERNEL))]
LIVE = [m for m in MUTANTS if not any(entry.fits(m) for entry in EQUIVALENT)]


def run(wrong, module, problems):
    right = importlib.import_module(f"sparsekern.kernels.{module}")
    with generate.swapped_in(right, wrong), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # only wrong results count, not numpy's complaints
        return killers.killed(problems)


@pytest.mark.parametrize("mutant", LIVE, ids=lambda m: m.name)
def test_a_mutant_is_killed(mutant, tmp_path):
    try:
        wrong = generate.load(mutant, tmp_path)
    except Exception as error:
        pytest.fail(f"the mutant is no program: {error}\n{mutant}")
    by = run(wrong, mutant.module, killers.killers(mutant))
    assert by is not None, f"survived:\n{mutant}"


@pytest.mark.parametrize("module", generate.modules())
def test_the_kernel_itself_is_not_killed(module, tmp_path):
    tree = ast.parse((generate.FOLDER / f"{module}.py").read_text())
    same = generate.load_tree(tree, f"{module}_same", tmp_path)
    assert run(same, module, killers.KILLERS[module]) is None


def test_there_are_enough_mutants():
    assert len(LIVE) >= 200
    assert len({m.name for m in LIVE}) == len(LIVE)
    for module in generate.modules():
        live = sum(m.module == module for m in LIVE)
        assert live >= 20, f"{module}: {live}"


def test_every_equivalence_is_of_a_mutant_that_exists():
    every = [m for module in generate.modules() for m in generate.mutants(module)]
    idle = [entry for entry in EQUIVALENT if not any(map(entry.fits, every))]
    assert not idle, f"these match no mutant any more: {idle}"
