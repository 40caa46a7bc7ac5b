"""Closures: the step's gradients are there before it is decided what the step is."""

import pytest
import torch
from loops import METHODS, adam, digests, loss, net, same, sgd, train

from sparsekern import RigL, sparse_layers
from sparsekern.errors import OptimizerError

OPTIMIZERS = {
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": {"amsgrad": True},
    "AdamW": {"fused": True},
    "Adamax": {},
    "ASGD": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.5},
    "Rprop": {},
    "SGD": {"momentum": 0.9, "nesterov": True},
}


def test_every_optimizer_of_torch_is_tried():
    known = {
        name
        for name, found in vars(torch.optim).items()
        if isinstance(found, type) and issubclass(found, torch.optim.Optimizer)
    }
    # Optimizer is the base, LBFGS is refused, SparseAdam takes sparse gradients, Muon matrices
    assert known - {"Optimizer", "LBFGS", "SparseAdam", "Muon"} == set(OPTIMIZERS)


def with_closures(model, optimizer, steps, by_name, gives_loss=True):
    for i in steps:

        def closure(i=i):
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            now = loss(model, i)
            now.backward()
            return now if gives_loss else None

        with torch.no_grad():
            got = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert (got is not None) is gives_loss


CASES = [("rigl", name, None) for name in OPTIMIZERS] + [
    (method, name, steps_first)
    for method in METHODS
    for name in ("Adam", "SGD")
    for steps_first in (True, False)
]


@pytest.mark.parametrize(("method", "name", "step_on_update"), CASES)
def test_a_closure_is_the_plain_loop_bit_for_bit(method, name, step_on_update):
    def build():
        model = net()
        optimizer = getattr(torch.optim, name)(model.parameters(), **OPTIMIZERS[name])
        arguments = {"t_end": 100, "update_freq": 2, "step_on_update": step_on_update}
        return model, optimizer, METHODS[method](model, optimizer, **arguments)

    plain, optimizer, expected = build()
    train(plain, [optimizer], range(8))
    for by_name in (True, False):
        model, optimizer, attached = build()
        with_closures(model, optimizer, range(8), by_name)
        assert same(model, plain)
        assert attached.state_dict() == expected.state_dict()
        assert bool(attached.history) is (method != "static")


@pytest.mark.parametrize("family", ["linear", "conv1d", "conv2d", "gru"])
def test_closures_in_every_family(family):
    plain, model = net(family), net(family)
    before = digests(model)
    optimizers = adam(plain), adam(model)
    for one, optimizer in zip((plain, model), optimizers, strict=True):
        RigL(one, optimizer, t_end=100, update_freq=2)
    train(plain, optimizers[:1], range(8))
    with_closures(model, optimizers[1], range(8), by_name=False, gives_loss=False)
    assert same(model, plain)
    assert digests(model) != before


def test_an_optimizer_that_asks_its_closure_twice():
    """The second evaluation is a real one, but finds no gradients on a batch that was spent."""

    class Extragradient(torch.optim.SGD):
        def step(self, closure):
            closure()
            with torch.no_grad():
                kept = [p.clone() for p in self.param_groups[0]["params"]]
            super().step()
            with torch.enable_grad():
                closure()
            grads = [p.grad for p in self.param_groups[0]["params"]]
            with torch.no_grad():
                for p, old, g in zip(self.param_groups[0]["params"], kept, grads, strict=True):
                    if g is not None:
                        p.copy_(old - 0.1 * g)

    plain, model = net(), net()
    optimizers = [Extragradient(m.parameters(), lr=0.1) for m in (plain, model)]
    method = RigL(model, optimizers[1], t_end=100, first_update=2)
    for i in range(3):
        for m, optimizer in zip((plain, model), optimizers, strict=True):

            def closure(m=m, i=i, optimizer=optimizer):
                optimizer.zero_grad()
                now = loss(m, i)
                now.backward()
                return now

            if i < 2 or m is model:
                optimizer.step(closure)
        if i < 2:
            assert same(model, plain)
    assert [record.step for record in method.history] == [2]
    assert torch.equal(model[0].bias, plain[0].bias)  # the batch was spent


def test_an_error_in_a_closure_leaves_the_method_as_it_was():
    plain, model = net(), net()
    optimizers = sgd(plain), sgd(model)
    for one, optimizer in zip((plain, model), optimizers, strict=True):
        RigL(one, optimizer, t_end=100, update_freq=2)

    def closure():
        raise KeyError("data")

    for i in range(6):
        train(plain, optimizers[:1], [i])
        with pytest.raises(KeyError):
            optimizers[1].step(closure)
        train(model, optimizers[1:], [i])
    assert same(model, plain)


@pytest.mark.parametrize("wrap", [lambda o: o, lambda o: Wrapper(o)])
def test_lbfgs_is_refused_also_inside_a_wrapper(wrap):
    model = net()
    with pytest.raises(OptimizerError, match="LBFGS"):
        RigL(model, wrap(torch.optim.LBFGS(model.parameters())), t_end=10)
    assert all(layer._capture_key == 0 for layer in sparse_layers(model).values())


class Wrapper(torch.optim.Optimizer):
    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
