"""A model or an optimizer that is loaded while a method is attached."""

import copy
import logging

import pytest
import torch
from loops import METHODS, adam, loss, net, sgd, train

from sparsekern import sparse_layers
from sparsekern.errors import OptimizerError


def grown_at_random(topology, generator):
    """Other connections, as many."""
    cells = topology.block_rows * topology.block_cols
    at = torch.randperm(cells, generator=generator)[: topology.nnzb]
    return topology.with_positions(at.sort().values)


def elsewhere(family="linear"):
    """The state of a model with other connections."""
    model = net(family)
    for layer in sparse_layers(model).values():
        old, g = layer.topology, torch.Generator().manual_seed(5)
        layer.rewire_(grown_at_random(old, g), torch.full((old.nnzb,), -1), [layer.values])
    return model.state_dict()


@pytest.mark.parametrize("family", ["linear", "conv2d", "gru"])
@pytest.mark.parametrize("method", METHODS)
def test_optimizer_state_that_a_load_left_behind_is_told(method, family, caplog):
    model = net(family)
    optimizer = adam(model)
    METHODS[method](model, optimizer, t_end=100, update_freq=2, first_update=50)
    train(model, [optimizer], range(2))
    own, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with caplog.at_level(logging.WARNING, "sparsekern"):
        model.load_state_dict(own)  # the same connections
        train(model, [optimizer], range(2))
        model.load_state_dict(elsewhere(family))
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


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_of_connections_that_a_load_replaced_is_not_used(method, in_place):
    model = net()
    optimizer = sgd(model)
    made = METHODS[method](model, optimizer, t_end=100, update_freq=2, step_on_update=False)
    loss(model, 0).backward()
    came = elsewhere()
    if in_place:
        for key, entry in model.state_dict().items():
            entry.copy_(came[key])
    else:
        model.load_state_dict(came)
    optimizer.step()
    assert not made.history or method == "set"  # whose growth looks at nothing
    if method != "set":
        for name, layer in sparse_layers(model).items():
            assert torch.equal(layer.values, came[f"{name}.values"])
            assert torch.equal(layer.col, came[f"{name}.col"])
    train(model, [optimizer], range(1, 4))
    assert bool(made.history) == (method != "static")


@pytest.mark.parametrize("attached", ["before", "after"])
@pytest.mark.parametrize("method", METHODS)
def test_optimizer_state_of_other_connections_than_the_models_is_told(method, attached, caplog):
    def resumed(state):
        model = net()
        model.load_state_dict(state)
        optimizer = adam(model)
        if attached == "before":
            METHODS[method](model, optimizer, t_end=100, first_update=50)
        optimizer.load_state_dict(copy.deepcopy(saved))
        if attached == "after":
            kept.append(METHODS[method](model, optimizer, t_end=100, first_update=50))
        train(model, [optimizer], range(2))

    kept = []
    model = net()
    optimizer = adam(model)
    METHODS[method](model, optimizer, t_end=100, first_update=50)
    train(model, [optimizer], range(2))
    saved = optimizer.state_dict()
    with caplog.at_level(logging.WARNING, "sparsekern"):
        resumed(model.state_dict())
        assert "other connections" not in caplog.text
        resumed(elsewhere())
    assert caplog.text.count("saved with other connections than the model has now") == 1
