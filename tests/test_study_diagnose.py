"""`diagnose`: what it counts, what it advises, and that it changes nothing."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.errors import ConfigError, DtypeError, ModelError

cross_entropy = nn.functional.cross_entropy


def batch(*shape, n=16, classes=3):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, *shape, generator=g), torch.randint(classes, (n,), generator=g)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(5, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def conv():
    return nn.Sequential(
        nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Flatten(1), nn.Unflatten(1, (6, 4, 1)),
        nn.Conv2d(6, 4, (4, 1), groups=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), (5,)),
    "conv": (conv, (2, 6)),
    "gru": (lambda: Recurrent(nn.GRU), (4, 5)),
    "lstm": (lambda: Recurrent(nn.LSTM), (4, 5)),
}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", NETS)
def test_figures_are_those_of_a_step_and_nothing_changes(kind, sparse):
    build, shape = NETS[kind]
    torch.manual_seed(0)
    model = build()
    if sparse:
        sk.sparsify_(model, 0.4)
    x, y = batch(*shape)
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    made = sk.diagnose(model, (x, y), cross_entropy)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks for m in model.modules())
    outputs = {}
    twin = copy.deepcopy(model)
    names = [row.name for row in made.rows]
    for name in names:
        twin.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, name=name: outputs.update(
                {name: out[0] if isinstance(out, tuple) else out}
            )
        )
    loss = cross_entropy(twin(x), y)
    loss.backward()
    assert made.loss == float(loss.detach())
    for row in made.rows:
        layer = twin.get_submodule(row.name)
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in layer.parameters()))
        assert row.gradient == norm
        out = outputs[row.name].detach().double()
        axis = 1 if row.kind.endswith(("Conv1d", "Conv2d")) else -1
        rows = out.movedim(axis, -1).flatten(0, -2)
        spread = float(rows.var(0, correction=0).mean())
        # E[y^2] - E[y]^2 cancels at most so much
        bound = 4 * out.numel() * 2**-53 * float(out.square().max())
        assert abs(row.signal**2 - spread) <= bound
    facts = sk.topology_facts(model)
    for name, fact in facts.items():
        row = next(r for r in made.rows if name == r.name or name.startswith(f"{r.name}."))
        assert row.fan_in_median <= fact.fan_in_median
        assert row.fan_in_max >= fact.fan_in_max
    assert json.loads(json.dumps(made.to_dict()))["rows"][0]["name"] == names[0]
    assert str(made).splitlines()[1].startswith(names[0])


def hand_made():
    """Neuron 0 is dead, neuron 1 has no input, neuron 2 is read by nothing; input 3 is unread."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(5, 4).abs() + 0.5)
        model[0].bias.fill_(100.0)
        model[0].weight[:, 3] = 0
        model[0].bias[0] = -1e6
        model[0].weight[1] = 0
        model[2].weight[:, 2] = 0
    return model


def test_dead_units_are_counted_dense_and_sparse():
    model = hand_made()
    data = batch(4)
    masks = {name: model.get_submodule(name).weight != 0 for name in ("0", "2")}
    sparse = sk.sparsify_(copy.deepcopy(model), masks=masks)
    for net in (model, sparse):
        first, last = sk.diagnose(net, data, cross_entropy).rows
        assert (first.outputs, first.silent, first.unconnected, first.unread) == (5, 2, 1, 1)
        assert (last.silent, last.unconnected, last.unread) == (0, 0, 1)
        assert (first.fan_in_median, first.fan_in_max) == (3, 3)
        assert (last.fan_in_median, last.fan_in_max) == (4, 4)


def test_grouped_convolutions_count_each_group():
    model = nn.Sequential(nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[2:, 0] = 0  # the second group does not read its first input
    row = sk.diagnose(model, batch(4, 2, 2), cross_entropy).rows[0]
    assert (row.unread, row.fan_in_median, row.fan_in_max) == (1, 4, 8)


def lenet(init):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    given = {"init": "sparse", "gain": "relu"} if init == "sparse" else {"init": init}
    return sk.sparsify_(model, 0.98, distribution="uniform", **given)


def test_a_dense_initialisation_vanishes_and_a_sparse_one_does_not():
    x, y = batch(784, n=64, classes=10)
    dense = sk.diagnose(lenet(None), (x, y), cross_entropy)
    sparse = sk.diagnose(lenet("sparse"), (x, y), cross_entropy)
    assert any("vanishes" in text for text in dense.advice)
    assert not any("vanishes" in text for text in sparse.advice)
    assert 'gain="relu"' in str(dense)
    assert any("without any input" in text for text in dense.advice)


def test_each_advice_has_its_sign():
    x, y = batch(4)

    def said(model, text):
        return any(text in advice for advice in sk.diagnose(model, (x, y), cross_entropy).advice)

    model = hand_made()
    assert said(model, "'0': outputs without any input")
    model[2].weight.data.mul_(1e6)
    assert said(model, "'2': the signal grows")
    model[2].weight.data.fill_(float("nan"))
    assert said(model, "not finite")
    model = hand_made()
    model[0].bias.data.fill_(-1e6)
    assert said(model, "'0': no gradient")
    model = hand_made()
    model[0].bias.data[:4] = -1e6
    assert said(model, "most outputs get no gradient")
    model = hand_made()
    model[0].weight.data.fill_(0)
    model[0].weight.data[0] = 1
    assert "a few outputs hold" not in " ".join(sk.diagnose(model, (x, y), cross_entropy).advice)
    torch.manual_seed(0)
    well = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    assert "nothing to mend" in str(sk.diagnose(well, (x, y), cross_entropy))


def test_connections_that_piled_up():
    model = nn.Sequential(nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))
    mask = torch.zeros(5, 64, dtype=torch.bool)
    mask[:, 0] = mask[0] = True
    sk.sparsify_(model, masks={"0": mask})
    advice = sk.diagnose(model, batch(64), cross_entropy).advice
    assert any("'0': a few outputs hold" in text for text in advice)


def test_an_attached_method_does_not_notice():
    """Its capture of dense gradients is that of training alone."""
    x, y = batch(16)
    states = []
    for looks in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
        sk.sparsify_(model, 0.5, exclude=["2"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = sk.RigL(model, optimizer, t_end=8, update_freq=2)
        for _ in range(6):
            if looks:
                sk.diagnose(model, (x * 3 + 1, y), cross_entropy)
            cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append([method.weight_steps, len(method.history), *model.state_dict().values()])
    assert states[0][1] > 1
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_it_is_loaded_when_it_is_first_used():
    code = (
        "import sys, sparsekern as sk; assert 'sparsekern.study' not in sys.modules; "
        "sk.diagnose; assert 'sparsekern.study' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sk.nothing


def test_bad_input():
    model, data = NETS["linear"][0](), batch(5)
    with pytest.raises(DtypeError, match="model"):
        sk.diagnose(3, data, cross_entropy)
    with pytest.raises(DtypeError, match="pair"):
        sk.diagnose(model, data[0], cross_entropy)
    with pytest.raises(DtypeError, match="loss"):
        sk.diagnose(model, data, None)
    with pytest.raises(ConfigError, match="scalar"):
        sk.diagnose(model, data, lambda out, _: out)
    with pytest.raises(ConfigError, match="called none"):
        sk.diagnose(nn.Sequential(nn.ReLU()), data, lambda out, _: out.sum())
    with pytest.raises(ModelError, match="'0'"):
        sk.diagnose(model, batch(6), cross_entropy)
