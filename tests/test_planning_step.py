"""`plan` takes a step of a copy: what it counts is what `profile` counts, and nothing changes."""

import dataclasses

import pytest
import torch
from planning_models import Mixed
from torch import nn

import sparsekern as sk

# ---- what a step computes, as `profile` counts it


class Convolutions(nn.Module):
    """One that is called twice, one grouped, one depthwise, one that is never called."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.again = nn.Conv2d(32, 32, 3, padding=1)
        self.grouped = nn.Conv2d(32, 64, 3, groups=2, stride=2)
        self.depthwise = nn.Conv2d(64, 64, 3, groups=64)
        self.flat = nn.Conv1d(64, 48, 5)
        self.head = nn.Linear(48, 70)
        self.unused = nn.Linear(128, 128)

    def forward(self, x):
        y = self.again(self.again(self.stem(x)).relu())
        y = self.depthwise(self.grouped(y).relu())
        return self.head(self.flat(y.flatten(2)).mean(2))


def mlp():
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 300), nn.ReLU(), nn.Linear(300, 10)
    )


def frozen_mlp():
    model = mlp()
    model[0].requires_grad_(False)
    model[4].weight.requires_grad_(False)
    return model


class Aside(nn.Module):
    """One layer works without gradients, one for nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.idle, self.last = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        with torch.no_grad():
            x = self.first(x)
        self.idle(x)
        return self.last(x)


STEPS = [
    (mlp, (8, 784)),
    (frozen_mlp, (8, 784)),
    (Convolutions, (2, 3, 15, 15)),
    (Aside, (8, 64)),
    (lambda: nn.Sequential(nn.GRU(48, 32)), (7, 3, 48)),
    (lambda: nn.Sequential(nn.LSTM(24, 32, 2, bidirectional=True)), (7, 3, 24)),
    (Mixed, (4, 3, 15, 15)),
]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("make", "shape"), STEPS, ids=range(len(STEPS)))
def test_flops_and_gradients_are_those_of_a_profile(make, shape, grad):
    model, x = make(), torch.ones(shape, requires_grad=grad)
    options = {"sparsity": 0.8, "blocks": ((8, 12), 1), "filter_fn": lambda *_: True}
    plan = sk.plan(model, x, **options)
    dense = sk.profile(model, x, measure=False).layers
    sk.sparsify_(model, **plan.arguments)
    planned = sk.profile(model, x, measure=False).layers
    assert plan.totals.dense_flops == sum(row.step_flops for row in dense)
    assert plan.totals.flops == sum(row.step_flops for row in planned)
    if not any(isinstance(module, nn.RNNBase | nn.RNNCellBase) for module in make().modules()):
        # of these a sparse layer, which always makes the first state's gradient, counts it as dense
        assert plan.totals.dense_flops == sum(row.step_flops_dense for row in planned)


@pytest.mark.parametrize(("make", "shape"), STEPS[:3])
def test_a_flops_budget_is_kept_when_profiled(make, shape):
    model, x = make(), torch.ones(shape)
    sk.sparsify_(model, **sk.plan(model, x, budget=sk.Budget(flops=0.25)).arguments)
    rows = sk.profile(model, x, measure=False).layers
    assert sum(row.step_flops for row in rows) <= 0.25 * sum(row.step_flops_dense for row in rows)


def test_a_model_with_nothing_to_train_only_goes_forward():
    plan = sk.plan(mlp().requires_grad_(False), torch.ones(8, 784), sparsity=0.5)
    assert plan.totals.dense_flops == 2 * 8 * plan.totals.weights
    assert plan.totals.dense_bytes == sum(4 * p.numel() for p in mlp().parameters())


class Ordered(nn.Module):
    """Calls its layers by name, the input last."""

    def __init__(self):
        super().__init__()
        self.gru, self.linear = nn.GRU(16, 24), nn.Linear(24, 8)

    def forward(self, x):
        y = self.gru(hx=x.new_zeros(1, x.shape[1], 24), input=x)[0]
        return self.linear(input=y)


def test_the_input_is_found_by_name():
    rows = sk.plan(Ordered(), torch.ones(5, 3, 16), sparsity=0.5).rows
    assert [row.inputs for row in rows] == [((5, 3, 16),), ((5, 3, 24),)]


@dataclasses.dataclass
class Output:
    scores: torch.Tensor


class Wrapped(nn.Sequential):
    def forward(self, x):
        return Output(super().forward(x))


def test_outputs_may_be_fields():
    wrapped = sk.plan(Wrapped(nn.Linear(64, 64)), torch.ones(8, 64), sparsity=0.5)
    assert wrapped == sk.plan(nn.Sequential(nn.Linear(64, 64)), torch.ones(8, 64), sparsity=0.5)


# ---- what it leaves alone


class Busy(nn.Module):
    """Counts its calls and writes to its input."""

    def __init__(self):
        super().__init__()
        self.n, self.layer, self.drop = 0, nn.Linear(64, 64), nn.Dropout()

    def forward(self, x):
        self.n += 1
        return self.layer(self.drop(x.add_(torch.rand(()))))


@pytest.mark.parametrize("options", [{}, {"measure": True, "seconds": 0.01}])
def test_neither_model_nor_inputs_nor_random_numbers_change(options):
    model, x, state = Busy(), torch.ones(8, 64), torch.get_rng_state()
    sk.plan(model, x, sparsity=0.5, blocks=(1,), **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, torch.ones(8, 64))
    assert model.n == 0
    assert model.layer.weight.grad is None


def test_a_compiled_model_is_planned_as_it_was_written():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    plain = sk.plan(model, torch.ones(8, 64), sparsity=0.5)
    compiled = torch.compile(model, backend="aot_eager")
    plan = sk.plan(compiled, torch.ones(8, 64), sparsity=0.5)
    assert [row.name for row in plan.rows] == ["_orig_mod.0", "_orig_mod.2"]
    assert plan.totals == plain.totals
    sk.sparsify_(compiled, **plan.arguments)
    assert set(sk.sparse_layers(model)) == {"0", "2"}
