"""A model or an optimizer that is loaded while a method is attached."""

import copy
import logging

import pytest
import torch
from loops import METHODS, adam, net, sgd, train

from sparsekern import sparse_layers
from sparsekern.errors import OptimizerError


def grown_at_random(topology, generator):
    """Other connections, as many."""
    cells = topology.block_rows * topology.block_cols
    at = torch.randperm(cells, generator=generator)[: topology.nnzb]
    return topology.with_positions(at.sort().values)


@pytest.mark.parametrize("family", ["linear", "conv2d", "gru"])
@pytest.mark.parametrize("method", METHODS)
def test_optimizer_state_that_a_load_left_behind_is_told(method, family, caplog):
    def other():
        model = net(family)
        for layer in sparse_layers(model).values():
            old, g = layer.topology, torch.Generator().manual_seed(5)
            layer.rewire_(grown_at_random(old, g), torch.full((old.nnzb,), -1), [layer.values])
        return model.state_dict()

    model = net(family)
    optimizer = adam(model)
    METHODS[method](model, optimizer, t_end=100, update_freq=2, first_update=50)
    train(model, [optimizer], range(2))
    own, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with caplog.at_level(logging.WARNING, "sparsekern"):
        model.load_state_dict(own)  # the same connections
        train(model, [optimizer], range(2))
        model.load_state_dict(other())
        optimizer.load_state_dict(state)
        train(model, [optimizer], range(2))
        assert "no optimizer state" not in caplog.text
        model.load_state_dict(own)
        train(model, [optimizer], range(2))
    assert caplog.text.count("no optimizer state") == 1


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_a_load_replaced_are_refused(method):
    model = net()
    optimizer = sgd(model)
    METHODS[method](model, optimizer, t_end=100)
    train(model, [optimizer], range(2))
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(OptimizerError, match="must hold `values`"):
        train(model, [optimizer], range(2))
