"""The measuring instruments can fail."""

import pytest
import torch
from support import AllocationTracer, assert_within, product_bound


def test_bound_holds_for_a_right_product_and_catches_wrong_ones():
    a, b = torch.randn(33, 65), torch.randn(65, 17)
    exact = a.double() @ b.double()
    bound = product_bound(a.double(), b.double(), 65, torch.float32)
    assert_within(a @ b, exact, bound)
    wrong = (a @ b).clone()
    wrong[3, 4] *= 1 + 2**-7
    with pytest.raises(AssertionError, match="1 of 561 entries"):
        assert_within(wrong, exact, bound)
    wrong[3, 4] = torch.nan
    with pytest.raises(AssertionError, match="outside the bound"):
        assert_within(wrong, exact, bound)
    with pytest.raises(AssertionError, match="shape"):
        assert_within(wrong[:1], exact, bound)


def test_tracer_sees_a_temporary():
    with AllocationTracer() as tracer:
        torch.ones(10, 10).sum()
    assert tracer.largest == 100
