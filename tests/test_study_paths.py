"""Lines between solutions: exact points, barriers, batch norms, connections, bad input."""

import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.errors import ConfigError, DtypeError, ShapeError
from sparsekern.study import Path, instability, interpolate, to_pruned


class Double(nn.Module):
    """A loss with a barrier: (w^2 - 1)^2, minima at +-1."""

    def __init__(self, at=0.0):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        self.layer.weight.data.fill_(at)


def height(model):
    return float((model.layer.weight**2 - 1).square())


def test_a_double_well_has_its_barrier_in_the_middle():
    model, start, end = Double(), Double(-1.0).state_dict(), Double(1.0).state_dict()
    path = interpolate(model, start, end, height, points=5)
    assert path.alphas == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert path.losses == (0.0, 0.5625, 1.0, 0.5625, 0.0)
    assert path.barrier == 1.0
    assert model.layer.weight.item() == 0  # as it was
    wide = interpolate(model, start, end, height, points=29, span=(-0.2, 1.2))
    assert len(wide.alphas) == 29
    assert {0.0, 0.5, 1.0} <= set(wide.alphas)  # met exactly, though steps of .05 are not exact
    assert wide.barrier == 1.0  # what is beyond the ends does not count
    assert max(wide.losses) > 1.0 or wide.losses[0] > 0


def test_a_barrier_is_above_the_mean_of_the_ends():
    assert Path((0.0, 0.5, 1.0), (1.0, 4.0, 3.0)).barrier == 2.0
    assert Path((0.0, 0.5, 1.0), (1.0, 1.0, 3.0)).barrier == 1.0
    with pytest.raises(ConfigError, match="0 and 1"):
        _ = Path((0.0, 0.5), (1.0, 1.0)).barrier


def test_the_ends_are_the_states_themselves():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)) for _ in range(2)]
    for net in nets:
        net(torch.randn(8, 4))
    kept = []
    model = copy.deepcopy(nets[0])
    mode = model.training
    states = [net.state_dict() for net in nets]

    def keep(m):
        assert not m.training
        assert not torch.is_grad_enabled()
        kept.append({k: v.clone() for k, v in m.state_dict().items()})
        return 0.0

    interpolate(model, *states, keep, points=3)
    assert model.training is mode
    for at, net in ((0, nets[0]), (2, nets[1])):
        for key, tensor in net.state_dict().items():
            assert torch.equal(kept[at][key], tensor), key
    for key in ("0.weight", "1.running_var"):
        assert torch.equal(kept[1][key], 0.5 * states[0][key] + 0.5 * states[1][key])


def test_batch_norms_take_their_statistics_anew_at_each_point():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).double() for _ in range(2)]
    batches = [torch.randn(6, 4).double() for _ in range(3)]
    seen = []

    def keep(m):
        seen.append((m[0](torch.cat(batches)), m[1].running_mean.clone(), m[1].momentum))
        return 0.0

    interpolate(nets[0], *(n.state_dict() for n in nets), keep, points=3, batches=batches)
    for out, mean, momentum in seen:
        # means of 18 numbers in another order
        bound = 36 * 2**-53 * float(out.abs().max())
        assert float((mean - out.mean(0)).abs().max()) <= bound
        assert momentum == 0.1
    assert float(nets[0][1].running_mean.abs().max()) == 0


def test_instability_is_the_barrier_between_two_trainings():
    def train(model, seed):
        model.layer.weight.data.fill_(1.0 if seed else -1.0)

    found = instability(Double(0.1), train, height, points=5)
    assert found.value == 1.0
    assert not found.stable
    assert [end["layer.weight"].item() for end in found.ends] == [-1.0, 1.0]
    same = instability(Double(0.1), train, height, seeds=(1, 2))
    assert len(same.path.alphas) == 30
    assert same.value == 0.0
    assert same.stable


@pytest.mark.parametrize("build", [lambda: nn.Linear(8, 6), lambda: nn.Conv1d(8, 6, 1)])
def test_sparse_models_are_measured_as_they_are(build):
    torch.manual_seed(0)
    model = sk.sparsify_(nn.Sequential(build(), nn.ReLU()), 0.5)
    x = torch.randn(3, 8, 1) if isinstance(build(), nn.Conv1d) else torch.randn(3, 8)

    def train(m, seed):
        torch.manual_seed(seed)
        m[0].values.data.normal_()

    found = instability(model, train, lambda m: float(m(x).square().sum()), points=3)
    middle = copy.deepcopy(model)
    a, b = (end["0.values"] for end in found.ends)
    middle[0].values.data.copy_(0.5 * a + 0.5 * b)
    middle[0].bias.data.copy_(model[0].bias)
    assert found.path.losses[1] == float(middle(x).detach().square().sum())
    other = sk.sparsify_(nn.Sequential(build(), nn.ReLU()), 0.5)
    with pytest.raises(ConfigError, match="other connections"):
        interpolate(model, model.state_dict(), other.state_dict(), lambda _: 0.0)


def test_to_the_pruned_solution_both_ends_have_its_mask():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    mask = torch.rand(3, 4) < 0.5
    start, end = model.state_dict(), nn.Sequential(nn.Linear(4, 3)).state_dict()
    zeros = []
    path = to_pruned(
        model,
        start,
        end,
        {"0": mask},
        lambda m: zeros.append(bool((m[0].weight[~mask] == 0).all())) or 0.0,
    )
    assert len(path.alphas) == 29
    assert (path.alphas[0], path.alphas[-1]) == (-0.2, 1.2)
    assert zeros == [True] * 29


def test_bad_input():
    model = Double()
    state = model.state_dict()
    with pytest.raises(ConfigError, match="lacks"):
        interpolate(model, state, {}, height)
    with pytest.raises(ShapeError, match="shape"):
        interpolate(model, state, {"layer.weight": torch.ones(2, 2)}, height)
    with pytest.raises(ConfigError, match="points"):
        interpolate(model, state, state, height, points=1)
    with pytest.raises(ConfigError, match="span"):
        interpolate(model, state, state, height, span=(1.0, 1.0))
    with pytest.raises(DtypeError, match="model"):
        interpolate(3, state, state, height)
    with pytest.raises(ConfigError, match="seeds"):
        instability(model, lambda _m, _s: None, height, seeds=(1, 1))
    with pytest.raises(DtypeError, match="train"):
        instability(model, None, height)
    with pytest.raises(ConfigError, match="no dense weight"):
        to_pruned(model, state, state, {"other": torch.ones(1, 1)}, height)
