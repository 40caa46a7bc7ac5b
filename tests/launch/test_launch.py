"""Every launcher over the stand-in driver: what the driver would refuse, and what plans change.

SPARSEKERN_LAUNCH=all runs a few hundred cases more.
"""

import pytest

pytest.importorskip("launch.standin")  # before triton

import torch
from launch import cases, standin
from triton.runtime.jit import JITFunction

from sparsekern.kernels import plans

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _no_plans():
    plans.clear()
    yield
    plans.clear()


@pytest.fixture
def jitted(monkeypatch):
    """Names of the kernels that went through Triton's own launch, in order."""
    names, run = [], JITFunction.run

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    return names


def relative(parameters, tensors):
    """Parameters, addresses told by the tensor that holds them; what a call made is all alike."""
    spans = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors]

    def told(word):
        for number, (first, length) in enumerate(spans):
            if first and first <= word < first + length:
                return number, word - first
        return "made" if word >= 2**40 else word

    return [
        (told(int.from_bytes(p[:8], "little")), p[8:]) if len(p) >= 8 else p for p in parameters
    ]


def watched(call):
    """(result, the last launch) of a call; no launch if it made none."""
    before = standin.launches()
    result = call.run()
    if standin.launches() == before:
        return result, None
    last = standin.last()
    return result, last._replace(parameters=relative(last.parameters, call.tensors))


PRODUCTS = [
    pytest.param(case, name, id=f"{name}-{case}")
    for case in cases.CASES
    for name in cases.calls(case)
]


@pytest.mark.parametrize(("case", "name"), PRODUCTS)
def test_the_driver_takes_it_and_a_plan_hands_it_the_same(case, name, jitted):
    call = cases.calls(case)[name]
    first, ordinary = watched(call)
    launched = len(jitted)
    assert (launched == 0) == (ordinary is None)
    for _ in range(2):
        again, planned = watched(call)
        assert planned == ordinary
        assert (again.shape, again.stride(), again.dtype) == (
            first.shape,
            first.stride(),
            first.dtype,
        )
    aligned = all(t.data_ptr() % 16 == 0 for t in call.tensors)
    planned_for = aligned and name != "grow"
    assert len(jitted) == (launched if planned_for else 3 * launched)
