"""RigL, SET and Static attached to real optimizers and training loops."""

import copy
import logging

import pytest
import torch
from test_update import NEW_MASK, G, W
from torch import nn
from torch.nn import functional as F

from sparsekern import SET, RigL, SparseLinear, Static, Topology, sparse_layers, sparsify_
from sparsekern.errors import (
    ConfigError,
    DtypeError,
    OptimizerError,
    SparseKernError,
    TrainingLoopError,
)

STORAGES = ("cpu", "dense", "masked", "triton")


def net(impl="cpu", block=1, sparsity=0.6, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
    return sparsify_(model, sparsity, block=block, impl=impl, distribution="uniform")


def batch(n=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 12, generator=g), torch.randint(0, 8, (n,), generator=g)


def backward(model, data, scale=1.0):
    x, target = data
    (scale * F.cross_entropy(model(x), target)).backward()


def sgd(model, **kwargs):
    return torch.optim.SGD(model.parameters(), **({"lr": 0.1, "momentum": 0.9} | kwargs))


def digests(model):
    return [layer.topology.digest() for layer in sparse_layers(model).values()]


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("impl", ["cpu", "dense", "masked"])
def test_the_worked_update_through_the_hooks(impl):
    dense = nn.Linear(4, 3, bias=False)
    dense.weight.data.copy_(W)
    layer = SparseLinear.from_dense(dense, impl=impl)
    model = nn.Sequential(layer)
    optimizer = sgd(model)
    RigL(model, optimizer, t_end=10, drop_fraction=0.5)
    momentum = torch.tensor([[1.0, 0, 2, 0], [0, 3, 0, 4], [5, 0, 0, 6]])
    stored = momentum.clone() if impl == "masked" else layer.topology.pack(momentum)
    optimizer.state[layer.values]["momentum_buffer"] = stored
    (model(torch.eye(4)) * G.t()).sum().backward()  # dense gradient dyT x = G
    optimizer.step()
    assert torch.equal(layer.mask().int(), NEW_MASK.int())
    expected = torch.tensor([[0.5, 0, -0.02, 0], [0, 0, 0, -0.9], [0, 0, 0, 0.7]])
    assert torch.equal(layer.dense_weight(), expected)
    carried = layer.topology.unpack(layer.pack(stored))
    assert torch.equal(carried, torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 4], [0, 0, 0, 6]]))


def test_an_update_step_spends_its_batch_and_the_step_count_stands():
    model = net()
    optimizer = sgd(model, weight_decay=0.1)
    rigl = RigL(model, optimizer, t_end=100, update_freq=3)
    kinds = []
    for i in range(9):
        bias = model[0].bias.detach().clone()
        backward(model, batch(seed=i))
        optimizer.step()
        optimizer.zero_grad()
        kinds.append("weights" if not torch.equal(bias, model[0].bias) else "update")
    assert kinds == ["update", *["weights"] * 3] * 2 + ["update"]
    assert rigl.weight_steps == 6
    assert [record.step for record in rigl.history] == [0, 3, 6]


def test_step_on_update_takes_the_weight_step_first():
    for method in (RigL, SET):
        model = net()
        optimizer = sgd(model)
        attached = method(model, optimizer, t_end=100, update_freq=3, step_on_update=True)
        twin = copy.deepcopy(model)
        plain = sgd(twin)
        before = digests(model)
        backward(model, batch())
        backward(twin, batch())
        optimizer.step()
        plain.step()
        assert torch.equal(model[0].bias, twin[0].bias)
        assert digests(model) != before
        assert attached.weight_steps == 1
        # the drop is decided by the weights after the step
        kept = twin[0].dense_weight() * model[0].mask()
        assert torch.equal(model[0].dense_weight(), kept)


def test_set_defaults_to_step_on_update_and_static_never_changes():
    model = net()
    optimizer = sgd(model)
    assert SET(model, optimizer, t_end=9).step_on_update
    model = net()
    optimizer = sgd(model)
    static = Static(model, optimizer, t_end=9, update_freq=1)
    before = digests(model)
    for i in range(5):
        backward(model, batch(seed=i))
        optimizer.step()
    assert digests(model) == before
    assert static.weight_steps == 5
    assert not static.history


@pytest.mark.parametrize("style", ["call", "step", "call and step"])
def test_every_way_to_write_the_loop_gives_the_same_training(style):
    def train(style):
        model = net()
        optimizer = sgd(model)
        method = RigL(model, optimizer, t_end=100, update_freq=2)
        for i in range(7):
            optimizer.zero_grad()
            backward(model, batch(seed=i))
            if style == "call":
                if method():
                    optimizer.step()
                continue
            if style == "call and step":
                method()
            optimizer.step()
            if style == "step":
                method.step()
        assert method.weight_steps == 4
        return snapshot(model).values()

    assert all(map(torch.equal, train("hooks"), train(style)))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("impl", ["cpu", "masked"])
def test_state_follows_its_weight_and_new_weights_start_at_zero(name, impl):
    model = net(impl, block=4)
    optimizer = OPTIMIZERS[name](model.parameters())
    rigl = RigL(model, optimizer, t_end=100, first_update=3, drop_fraction=0.8)
    for i in range(3):
        optimizer.zero_grad()
        backward(model, batch(seed=i))
        optimizer.step()

    def dense_state():
        seen = {}
        for layer_name, layer in rigl.layers.items():
            for key, entry in {"values": layer.values, **optimizer.state[layer.values]}.items():
                if entry.shape == layer.values.shape:
                    blocks = layer.pack(entry.detach())
                    seen[layer_name, key] = layer.topology.unpack(blocks).clone()
        return seen

    before, masks = dense_state(), {n: m.mask() for n, m in rigl.layers.items()}
    optimizer.zero_grad()
    backward(model, batch(seed=9))
    optimizer.step()
    assert len(rigl.history) == 1
    assert len(before) > 2 or name == "adagrad"
    for (layer_name, key), after in dense_state().items():
        new = rigl.layers[layer_name].mask()
        survivors = new & masks[layer_name]
        assert bool((new & ~masks[layer_name]).any())
        assert torch.equal(after * survivors, before[layer_name, key] * survivors), key
        assert bool((after[new & ~masks[layer_name]] == 0).all()), key


def test_a_state_that_cannot_be_placed_raises_and_nothing_changes():
    model = net()
    optimizer = sgd(model)
    RigL(model, optimizer, t_end=100)
    optimizer.state[model[2].values]["row_sums"] = torch.zeros(8)
    before = snapshot(model)
    backward(model, batch())
    with pytest.raises(OptimizerError, match=r"'row_sums' of layer '2' .* got shape \(8,\)"):
        optimizer.step()
    assert all(map(torch.equal, before.values(), snapshot(model).values()))
    optimizer.state[model[2].values]["row_sums"] = [torch.zeros(8)]
    with pytest.raises(OptimizerError, match="'row_sums' of layer '2'"):
        optimizer.step()


# ---- micro-batches, shared layers, gradients that fail


@pytest.mark.parametrize("impl", ["cpu", "masked"])
def test_micro_batches_score_as_one_batch(impl):
    x, target = batch(24)
    whole, parts = net(impl), net(impl)
    optimizers = sgd(whole), sgd(parts)
    RigL(whole, optimizers[0], t_end=10)
    RigL(parts, optimizers[1], t_end=10, grad_accumulation=3)
    backward(whole, (x, target))
    for i in range(3):
        backward(parts, (x[i::3], target[i::3]), scale=1 / 3)
    optimizers[0].step()
    optimizers[1].step()
    assert digests(whole) == digests(parts)


def test_the_score_is_the_norm_of_the_sum_not_the_sum_of_norms():
    dense = nn.Linear(3, 1, bias=False)
    layer = SparseLinear.from_dense(dense, mask=torch.tensor([[1, 0, 0]]))
    model = nn.Sequential(layer)
    optimizer = sgd(model)
    RigL(model, optimizer, t_end=10, drop_fraction=1.0, grad_accumulation=2)
    # input 1 gets gradients +5 and -5, input 2 gets +1 and +1
    for x in ([0.0, 5, 1], [0.0, -5, 1]):
        model(torch.tensor([x])).sum().backward()
    optimizer.step()
    assert layer.mask().tolist() == [[False, False, True]]


def test_undeclared_accumulation_is_an_error_that_changes_nothing():
    model = net()
    optimizer = sgd(model)
    RigL(model, optimizer, t_end=10)
    before = snapshot(model)
    for i in range(3):
        backward(model, batch(seed=i))
    with pytest.raises(TrainingLoopError, match="saw 3 backward passes.*expected 1"):
        optimizer.step()
    assert all(map(torch.equal, before.values(), snapshot(model).values()))


def test_a_layer_used_twice_is_scored_by_its_whole_gradient():
    torch.manual_seed(0)
    shared = SparseLinear(6, 6, sparsity=0.5)
    shared.bias.data.zero_()
    model = nn.Sequential(shared, shared)
    optimizer = sgd(model)
    RigL(model, optimizer, t_end=10, drop_fraction=0.5)
    x = torch.randn(5, 6)
    weight = shared.dense_weight().requires_grad_()
    (x @ weight.t() @ weight.t()).square().sum().backward()
    keep = shared.dense_weight().abs().flatten().topk(9).indices
    scores = weight.grad.abs().flatten()
    scores[keep] = -1
    expected = set(keep.tolist()) | set(scores.topk(9).indices.tolist())
    model(x).square().sum().backward()
    optimizer.step()
    assert set(shared.topology.positions().tolist()) == expected


def test_activation_checkpointing_gives_the_same_update():
    from torch.utils.checkpoint import checkpoint

    plain, checked = net(), net()
    optimizers = sgd(plain), sgd(checked)
    for model, optimizer in zip((plain, checked), optimizers, strict=True):
        RigL(model, optimizer, t_end=10)
    x, target = batch()
    F.cross_entropy(plain(x), target).backward()
    F.cross_entropy(checkpoint(checked, x, use_reentrant=False), target).backward()
    optimizers[0].step()
    optimizers[1].step()
    assert digests(plain) == digests(checked)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_postpones_the_update(bad, caplog):
    model = net()
    optimizer = sgd(model)
    rigl = RigL(model, optimizer, t_end=10)
    before = digests(model)
    x, target = batch()
    x[3, 4] = bad
    with caplog.at_level(logging.WARNING, "sparsekern"):
        backward(model, (x, target))
        assert not rigl.step()
        backward(model, (x, target))
        assert not rigl.step()
    assert caplog.text.count("postponed") == 1
    assert digests(model) == before
    optimizer.zero_grad()
    backward(model, batch())
    optimizer.step()
    assert len(rigl.history) == 1
    assert digests(model) != before


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_skipped_amp_step_changes_nothing(set_to_none):
    model = net()
    optimizer = sgd(model)
    rigl = RigL(model, optimizer, t_end=10)
    before = snapshot(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, target = batch()
    for poisoned in (True, False):
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = F.cross_entropy(model(x), target)
        scaler.scale(loss * torch.inf if poisoned else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert bool(rigl.history) is not poisoned
        if poisoned:
            assert all(map(torch.equal, before.values(), snapshot(model).values()))


def test_steps_without_gradients_are_not_counted():
    model = net()
    optimizer = sgd(model)
    rigl = RigL(model, optimizer, t_end=10, first_update=5)
    optimizer.step()
    assert rigl.weight_steps == 0


# ---- observation


def test_off_update_steps_nothing_is_captured(monkeypatch):
    from sparsekern.ops import capture

    seen = []
    monkeypatch.setattr(capture._sinks, "get", lambda key: seen.append(key))
    model = net()
    optimizer = sgd(model)
    RigL(model, optimizer, t_end=100, first_update=2)
    for i in range(2):
        assert all(layer._capture_key == 0 for layer in sparse_layers(model).values())
        backward(model, batch(seed=i))
        optimizer.step()
    assert not seen
    backward(model, batch())
    assert seen


def test_evaluation_on_an_armed_step_is_not_observed():
    model, twin = net(), net()
    optimizers = sgd(model), sgd(twin)
    RigL(model, optimizers[0], t_end=10)
    RigL(twin, optimizers[1], t_end=10)
    with torch.no_grad():
        model(batch(seed=5)[0])
    model(batch(seed=6)[0])  # a forward pass whose loss is never used
    backward(model, batch())
    backward(twin, batch())
    optimizers[0].step()
    optimizers[1].step()
    assert digests(model) == digests(twin)


def test_a_compiled_model_is_updated_alike():
    plain, other = net(), net()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    optimizers = sgd(plain), sgd(other)
    RigL(plain, optimizers[0], t_end=100, update_freq=2)
    RigL(other, optimizers[1], t_end=100, update_freq=2)
    for i in range(8):
        for run, optimizer in ((plain, optimizers[0]), (compiled, optimizers[1])):
            optimizer.zero_grad()
            backward(run, batch(seed=i))
            optimizer.step()
    assert digests(plain) == digests(other)
    assert torch.equal(plain[0].values, other[0].values)


def test_buffers_never_move():
    model = net(block=4)
    addresses = [t.data_ptr() for t in model.state_dict().values()]
    optimizer = sgd(model)
    rigl = RigL(model, optimizer, t_end=100, update_freq=1)
    for i in range(6):
        backward(model, batch(seed=i))
        optimizer.step()
        optimizer.zero_grad()
    assert len(rigl.history) == 3
    assert [t.data_ptr() for t in model.state_dict().values()] == addresses


def test_schedulers_and_resume():
    def build():
        model = net()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        rigl = RigL(model, optimizer, t_end=100, update_freq=3)
        return model, optimizer, rigl, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    def train(parts, batches):
        model, optimizer, _, scheduler = parts
        for i in batches:
            optimizer.zero_grad()
            backward(model, batch(seed=i))
            optimizer.step()
            scheduler.step()

    straight, first, second = build(), build(), build()
    train(straight, range(12))
    for cut in (5, 8):  # 8: between two batches, the next of which is an update
        train(first, range(first[2].weight_steps + len(first[2].history), cut))
    for source, target in zip(first, second, strict=True):
        target.load_state_dict(copy.deepcopy(source.state_dict()))
    train(second, range(8, 12))
    assert digests(straight[0]) == digests(second[0])
    assert torch.equal(straight[0][0].values, second[0][0].values)


def test_grow_init_draws_as_at_the_start():
    model = net(block=4)
    optimizer = sgd(model)
    RigL(model, optimizer, t_end=10, grow_init="init")
    before = model[0].mask()
    backward(model, batch())
    optimizer.step()
    fresh = model[0].mask() & ~before
    assert bool((model[0].dense_weight()[fresh] != 0).all())


def test_detach_leaves_a_plain_optimizer():
    model = net()
    optimizer = sgd(model)
    rigl = RigL(model, optimizer, t_end=10)
    rigl.detach()
    before = digests(model)
    backward(model, batch())
    optimizer.step()
    assert digests(model) == before
    assert rigl.weight_steps == 0


def test_blocks_are_scored_by_the_chosen_norm():
    # block 0 of the gradient has one entry of 3, block 1 four of 1
    gradient = torch.tensor([[3.0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]])
    for norm, winner in (("l1", 1), ("l2", 0), ("max", 0)):
        topology = Topology.from_positions(torch.tensor([2]), (2, 6), 2)
        layer = SparseLinear(6, 2, bias=False, topology=topology)
        model = nn.Sequential(layer)
        optimizer = sgd(model)
        RigL(model, optimizer, t_end=10, drop_fraction=1.0, norm=norm)
        (model(torch.eye(6)) * gradient.t()).sum().backward()
        optimizer.step()
        assert layer.topology.positions().tolist() == [winner]


def test_training_learns_on_every_storage():
    x, target = batch(64)
    target = (x[:, :8] * 3).argmax(1)
    for impl in STORAGES:
        steps = 30 if impl == "triton" else 80
        model = net(impl, sparsity=0.5, seed=1)
        optimizer = sgd(model)
        RigL(model, optimizer, t_end=60, update_freq=10)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2, impl


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m, o: RigL(m, o, t_end=0), ConfigError, "`t_end` must be at least 1; got 0"),
        (lambda m, o: RigL(m, o, t_end=5, norm="l0"), ConfigError, "got 'l0'"),
        (lambda m, o: RigL(m, o, t_end=5, grow_init="ones"), ConfigError, "got 'ones'"),
        (lambda m, o: RigL(m, o, t_end=5, grad_accumulation=0), ConfigError, "at least 1; got 0"),
        (lambda m, o: RigL(m, o, t_end=5, seed=0.5), DtypeError, "`seed` must be an int"),
        (lambda m, o: RigL(m, object(), t_end=5), DtypeError, "got object"),
        (lambda m, o: RigL(nn.Linear(2, 2), o, t_end=5), ConfigError, "call sparsify_ first"),
        (
            lambda m, o: SET(m, torch.optim.SGD(m[0].parameters(), lr=1), t_end=5),
            OptimizerError,
            "hold `values` of layer '2'",
        ),
        (
            lambda m, o: RigL(m, o, t_end=5).load_state_dict({"step": 3}),
            ConfigError,
            r"keys weight_steps, last_update and history; got \['step'\]",
        ),
        (
            lambda m, o: RigL(m, o, t_end=5).load_state_dict(
                {"weight_steps": -3, "last_update": None}
            ),
            ConfigError,
            "step counts",
        ),
    ],
)
def test_bad_input_changes_nothing(call, error, text):
    model = net()
    optimizer = sgd(model)
    before = snapshot(model)
    with pytest.raises(error, match=text) as info:
        call(model, optimizer)
    assert isinstance(info.value, SparseKernError)
    assert all(map(torch.equal, before.values(), snapshot(model).values()))


# ---- loops that can't be followed, and changes after attaching


def test_lbfgs_is_refused():
    model = net()
    with pytest.raises(OptimizerError, match="LBFGS"):
        RigL(model, torch.optim.LBFGS(model.parameters()), t_end=10)


def test_a_second_method_on_one_optimizer_is_refused_until_the_first_is_detached():
    model = net()
    optimizer = sgd(model)
    first = RigL(model, optimizer, t_end=10)
    with pytest.raises(ConfigError, match="attached already"):
        SET(model, optimizer, t_end=10)
    first.detach()
    SET(model, optimizer, t_end=10)


@pytest.mark.parametrize("method", [RigL, SET])
def test_a_layer_frozen_later_keeps_its_topology(method):
    model = net()
    optimizer = sgd(model)
    attached = method(model, optimizer, t_end=10, update_freq=1)
    before = digests(model)
    model[2].values.requires_grad_(False)
    for i in range(4):
        optimizer.zero_grad()
        backward(model, batch(seed=i))
        optimizer.step()
    assert len(attached.history) >= 2
    assert digests(model)[1] == before[1]
    assert digests(model)[0] != before[0]


def test_set_by_hand_does_not_lose_the_weight_step():
    model, twin = net(), net()
    optimizer, plain = sgd(model), sgd(twin)
    method = SET(model, optimizer, t_end=10)
    backward(model, batch())
    backward(twin, batch())
    assert not method.step()
    optimizer.step()
    plain.step()
    assert len(method.history) == 1
    assert torch.equal(model[0].dense_weight(), twin[0].dense_weight() * model[0].mask())


def test_set_does_not_rewire_weights_that_are_not_finite(caplog):
    model = net()
    optimizer = sgd(model)
    method = SET(model, optimizer, t_end=10)
    before = digests(model)
    x, target = batch()
    backward(model, (x * torch.nan, target))
    optimizer.step()
    assert digests(model) == before
    assert not method.history
    assert "not finite" in caplog.text


def test_double_backward_works_on_an_armed_batch():
    model = net()
    optimizer = sgd(model)
    RigL(model, optimizer, t_end=10, grad_accumulation=2)
    x = batch()[0].requires_grad_()
    y = model(x).square().sum()
    (gx,) = torch.autograd.grad(y, x, create_graph=True)
    (y + gx.square().sum()).backward()
    assert bool(model[0].values.grad.isfinite().all())
