"""Example inputs: how they are passed on, and which layer is blamed."""

from types import MappingProxyType

import pytest
import torch
from torch import nn

from sparsekern.cost import examples
from sparsekern.errors import ModelError


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, a, b):
        return self.first(a) + self.second(b) + self.first(b)


def test_the_innermost_layer_that_fails_is_named():
    model = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    with pytest.raises(ModelError, match=r"layer '1\.1' \(Linear\) got \(float32\(2, 5\)\) and"):
        examples.run(model, torch.ones(2, 3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_wrong_arguments_of_the_model_itself():
    with pytest.raises(ModelError, match=r"\(Sum\) got .*TypeError"):
        examples.run(Sum(), torch.ones(2, 3))


def test_what_is_shown_of_inputs():
    given = {"ids": torch.ones(2, 3), "more": MappingProxyType({"mask": (torch.ones(2), 5)})}
    shown = "{ids: float32(2, 3), more: {mask: (float32(2,), int)}}"
    assert examples.described(given) == shown
