"""Who takes the step, how often, and which steps count."""

import logging

import pytest
import torch
from loops import METHODS, adam, digests, loss, net, same, sgd, train
from torch import nn

from sparsekern import RigL, SparseLinear, Topology, sparse_layers
from sparsekern.errors import ConfigError, DtypeError, OptimizerError

BOTH = [pytest.param(True, id="step first"), pytest.param(False, id="batch spent")]


class Held(torch.optim.Optimizer):
    """A wrapper without Optimizer.__init__, like accelerate's."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Shared(Held):
    """A wrapper that shares the other's attributes, hooks included, like Lightning's."""

    param_groups = state = None

    def __init__(self, optimizer):
        self.__dict__ = {**vars(optimizer), "optimizer": optimizer}


class Outer(torch.optim.Optimizer):
    """A wrapper that is an optimizer of its own, with hooks, and moves weights after the step."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.inner = optimizer
        self.param_groups = optimizer.param_groups

    def step(self, closure=None):
        result = self.inner.step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.mul_(0.999)
        return result


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation: a step up, gradients there, and the step of the other one."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.base_optimizer = optimizer
        self.param_groups = optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.state[p]["old"] = p.clone()
                p.add_(p.grad, alpha=0.1)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure):
        closure = torch.enable_grad()(closure)
        self.first_step()
        closure()
        self.second_step()


@pytest.mark.parametrize("wrapper", [Held, Shared, lambda o: Held(Held(o))])
@pytest.mark.parametrize("method", METHODS)
def test_a_wrapped_optimizer_is_followed_like_a_plain_one(method, wrapper):
    plain, model = net(), net()
    optimizer, wrapped = adam(plain), wrapper(adam(model))
    expected = METHODS[method](plain, optimizer, t_end=100, update_freq=2)
    attached = METHODS[method](model, wrapped, t_end=100, update_freq=2)
    train(plain, [optimizer], range(7))
    train(model, [wrapped], range(7))
    assert same(model, plain)
    assert attached.state_dict() == expected.state_dict()
    saved = wrapped.state_dict()["param_groups"][0]["sparsekern"]
    assert saved["weight_steps"] == attached.weight_steps
    with pytest.raises(ConfigError, match="attached already"):
        RigL(model, wrapped, t_end=10)


@pytest.mark.parametrize("steps_first", BOTH)
def test_with_a_wrapper_that_moves_weights_afterwards(steps_first):
    """The update after a weight step comes when the wrapper, too, is done."""
    model = net()
    optimizer = Outer(sgd(model))
    method = RigL(model, optimizer, t_end=100, step_on_update=steps_first)
    seen = []
    decide = method.decide

    def watched(fraction):
        seen.append(model[0].dense_weight().clone())
        return decide(fraction)

    method.decide = watched
    twin = net()
    if steps_first:
        train(twin, [Outer(sgd(twin))], range(1))
    train(model, [optimizer], range(1))
    assert len(method.history) == 1
    assert torch.equal(seen[0], twin[0].dense_weight())


@pytest.mark.parametrize("form", ["steps", "closure"])
@pytest.mark.parametrize("on", ["outer", "inner"])
@pytest.mark.parametrize("method", METHODS)
def test_sam_on_either_optimizer(method, on, form):
    model = net()
    sam = SAM(sgd(model))
    attached = METHODS[method](
        model,
        sam if on == "outer" else sam.base_optimizer,
        t_end=100,
        update_freq=2,
        step_on_update=False,
    )
    kinds = ""
    for i in range(7):
        bias = model[0].bias.detach().clone()
        loss(model, i).backward()
        if form == "closure":
            sam.step(lambda i=i: loss(model, i).backward())
        else:
            sam.first_step()
            loss(model, i).backward()
            sam.second_step()
        kinds += "u" if torch.equal(bias, model[0].bias) else "w"
    assert kinds == ("wwwwwww" if method == "static" else "uwwuwwu")
    assert attached.weight_steps == kinds.count("w")
    assert len(attached.history) == kinds.count("u")


def test_steps_that_no_hook_sees_are_refused():
    model = net()
    overlapping = sgd(model)
    overlapping._overlap_with_ddp = True
    with pytest.raises(OptimizerError, match="overlap_with_ddp=True takes them inside backward"):
        RigL(model, overlapping, t_end=10)

    class Bare(torch.optim.Optimizer):
        def __init__(self, params):
            self.param_groups, self.state = [{"params": list(params)}], {}

    with pytest.raises(OptimizerError, match="Bare has no step hooks"):
        RigL(model, Bare(model.parameters()), t_end=10)


# ---- steps that are skipped


@pytest.mark.parametrize("steps_first", BOTH)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_gradscaler_skips_changes_nothing(method, fused, steps_first):
    model = net()
    optimizer = adam(model, fused=fused)
    arguments = {"t_end": 100, "update_freq": 2, "step_on_update": steps_first}
    attached = METHODS[method](model, optimizer, **arguments)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(9):
        skipped = i in {0, 3, 4, 7}
        optimizer.zero_grad()
        value = loss(model, i)
        scaler.scale(value * torch.inf if skipped else value).backward()
        before = model[0].values.clone(), digests(model), attached.state_dict()
        scaler.step(optimizer)
        scaler.update()
        after = model[0].values, digests(model), attached.state_dict()
        if skipped:
            assert torch.equal(before[0], after[0])
            assert before[1:] == after[1:]
            assert model[0].values.grad is not None
    assert attached.weight_steps == int(optimizer.state[model[0].values]["step"])
    assert bool(attached.history) is (method != "static")


# ---- several optimizers


def two(model):
    """What a Muon user has: matrices that stay dense to one, the values to another."""
    values = [m.values for m in sparse_layers(model).values()]
    head = [model[3].weight]
    rest = [p for p in model.parameters() if all(p is not q for q in values + head)]
    return torch.optim.AdamW(values + rest, lr=0.01), torch.optim.Muon(head, lr=0.01)


def net_with_a_head():
    model = net()
    torch.manual_seed(1)
    return model.extend([nn.Linear(8, 8)])


@pytest.mark.parametrize("muon_first", [True, False])
@pytest.mark.parametrize("steps_first", BOTH)
@pytest.mark.parametrize("method", METHODS)
def test_several_optimizers_step_as_one(method, steps_first, muon_first):
    model = net_with_a_head()
    optimizers = two(model)[:: -1 if muon_first else 1]
    attached = METHODS[method](
        model, list(optimizers), t_end=100, update_freq=2, step_on_update=steps_first
    )
    assert attached.optimizers == optimizers
    kinds, topologies, head = "", [digests(model)], [model[3].weight.detach().clone()]

    def look(_i):
        nonlocal kinds
        topologies.append(digests(model))
        head.append(model[3].weight.detach().clone())
        kinds += "-" if topologies[-1] == topologies[-2] else "u"
        kinds += "-" if torch.equal(head[-1], head[-2]) else "w"

    train(model, optimizers, range(6), look)
    expected = {True: "uw-wuw-wuw-w", False: "u--w-wu--w-w"}[steps_first]
    if method == "static":
        expected = "-w" * 6
    assert kinds == expected
    assert attached.weight_steps == kinds.count("w")
    for optimizer in optimizers:
        entry = optimizer.state_dict()["param_groups"][0]["sparsekern"]
        assert entry["weight_steps"] == attached.weight_steps


@pytest.mark.parametrize("attach", ["one order", "the other"])
def test_several_optimizers_resume_in_any_order(attach):
    def build(order=1):
        model = net_with_a_head()
        optimizers = two(model)
        return model, optimizers, RigL(model, optimizers[::order], t_end=100, update_freq=2)

    straight, first, second = build(), build(), build(1 if attach == "one order" else -1)
    train(*straight[:2], range(9))
    train(*first[:2], range(5))
    second[0].load_state_dict(first[0].state_dict())
    for a, b in zip(first[1], second[1], strict=True):
        b.load_state_dict(a.state_dict())
    train(*second[:2], range(5, 9))
    assert same(second[0], straight[0])


def test_an_optimizer_that_misses_a_round_is_not_waited_for():
    model = net_with_a_head()
    adamw, muon = two(model)
    method = RigL(model, [adamw, muon], t_end=100, first_update=4)
    for i in range(4):
        train(model, [adamw, muon] if i != 1 else [adamw], [i])
        muon.zero_grad()
    assert method.weight_steps == 4


def test_what_several_optimizers_must_hold():
    model = net_with_a_head()
    adamw, muon = two(model)
    with pytest.raises(OptimizerError, match="exactly one of the optimizers .* layer '0'; 2 do"):
        RigL(model, [adamw, adam(model)], t_end=10)
    with pytest.raises(OptimizerError, match="layer '0'; it does not"):
        RigL(model, muon, t_end=10)
    for none_or_twice in ([], [adamw, adamw]):
        with pytest.raises(ConfigError, match="each optimizer once"):
            RigL(model, none_or_twice, t_end=10)
    with pytest.raises(DtypeError, match="or several in a list; got str"):
        RigL(model, [adamw, "muon"], t_end=10)
    with pytest.raises(ValueError, match="2D"):  # of torch: values have three dimensions
        torch.optim.Muon([model[0].values])


# ---- a method that nothing drives


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_whose_optimizer_never_steps_says_so_once(method, accumulated, caplog):
    model = net()
    METHODS[method](model, sgd(model), t_end=10, grad_accumulation=accumulated)
    other = sgd(model)
    with caplog.at_level(logging.WARNING, "sparsekern"):
        for i in range(10 * accumulated - 1):
            loss(model, i).backward()
            other.step()
        assert "no step of the optimizer" not in caplog.text
        for i in range(20):
            loss(model, i).backward()
    assert caplog.text.count(f"{10 * accumulated} backward passes and no step") == 1


def test_a_method_that_is_driven_does_not(caplog):
    model = net()
    optimizer = sgd(model)
    RigL(model, optimizer, t_end=10)
    train(model, [optimizer], range(12))
    detached = net()
    RigL(detached, sgd(detached), t_end=10).detach()
    for i in range(12):
        loss(detached, i).backward()
    assert "no step of the optimizer" not in caplog.text


@pytest.mark.parametrize("values_first", [True, False])
@pytest.mark.parametrize("steps_first", BOTH)
@pytest.mark.parametrize("method", METHODS)
def test_gradscaler_steps_several_optimizers(method, steps_first, values_first):
    """A spent batch leaves the later optimizer gradients to look at, and they move nothing."""
    model, plain = net(), net()
    held = [[net_.values for net_ in sparse_layers(m).values()] for m in (model, plain)]

    def pair(m, values):
        others = [p for p in m.parameters() if not any(p is v for v in values)]
        made = [torch.optim.SGD(g, lr=0.1, momentum=0.9) for g in (values, others)]
        return made[:: 1 if values_first else -1]

    optimizers, unscaled = pair(model, held[0]), pair(plain, held[1])
    for m, those in ((model, optimizers), (plain, unscaled)):
        METHODS[method](m, those, t_end=100, update_freq=2, step_on_update=steps_first)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for i in range(7):
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(loss(model, i)).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    train(plain, unscaled, range(7))
    assert same(model, plain)  # powers of two scale exactly


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_without_active_blocks_is_left_alone(method):
    empty = SparseLinear(12, 16, topology=Topology.from_mask(torch.zeros(16, 12)))
    model = nn.Sequential(empty, nn.ReLU(), SparseLinear(16, 8, sparsity=0.5))
    optimizer = adam(model)
    METHODS[method](model, optimizer, t_end=100, update_freq=2)
    train(model, [optimizer], range(5))
    assert empty.topology.nnzb == 0


def test_hooks_of_an_optimizer_see_real_steps_only():
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model = net()
    optimizer = Own(model.parameters(), lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    RigL(model, optimizer, t_end=100)
    assert not seen
