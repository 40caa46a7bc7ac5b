"""Iterative magnitude pruning, against ten dense lines; controls, resuming, bad input."""

import copy

import pytest
import torch
from support import integers
from torch import nn

import sparsekern as sk
from sparsekern import tickets
from sparsekern.cost.uses import Use
from sparsekern.errors import CheckpointError, ConfigError, DtypeError, TrainingLoopError
from sparsekern.tickets.imp import next_masks
from sparsekern.tickets.rounds import break_evens, worth

F64 = torch.float64


def linear():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def conv():
    flat = nn.Flatten()
    return nn.Sequential(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), flat, nn.Linear(8, 3))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


NETS = {"linear": (linear, (6,)), "conv": (conv, (1, 2, 3)), "gru": (Recurrent, (2, 3))}


def case(kind, seed=0):
    """A net in float64, and a deterministic training of it that minds the weight step."""
    build, shape = NETS[kind]
    torch.manual_seed(seed)
    model = build().double()
    g = torch.Generator().manual_seed(1)
    xs, ys = torch.randn(12, 5, *shape, generator=g, dtype=F64), torch.randint(3, (12, 5))

    def train(net, start, stop):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        for step in range(start, stop):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(xs[step]), ys[step]).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()

    return model, train, (xs, ys)


def by_hand(model, rounds, rate, rewind, steps, data, names):
    """The oracle: masks multiply weights and gradients of a dense net."""
    net, (xs, ys) = copy.deepcopy(model), data
    masks = {n: torch.ones_like(net.get_parameter(n)) for n in names}
    kept, found = None, []
    for level in range(rounds + 1):
        begin = 0 if level == 0 else rewind
        for step in range(begin, steps):
            if step in (begin, rewind):
                opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
            if step == rewind and level == 0:
                kept = copy.deepcopy(net.state_dict())
            opt.zero_grad()
            nn.functional.cross_entropy(net(xs[step]), ys[step]).backward()
            for n, mask in masks.items():
                net.get_parameter(n).grad *= mask
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            opt.step()
        found.append(({n: m.clone() for n, m in masks.items()}, copy.deepcopy(net.state_dict())))
        every = torch.cat([net.get_parameter(n).detach().abs().flatten() for n in names])
        left = int(sum(m.sum() for m in masks.values()))
        least = every.sort(descending=True).values[left - int(rate * left) - 1]
        masks = {n: (net.get_parameter(n).detach().abs() >= least).to(F64) for n in names}
        net.load_state_dict(kept)
        for n, mask in masks.items():
            net.get_parameter(n).data *= mask
    return found


@pytest.mark.parametrize("rewind", [0, 3])
@pytest.mark.parametrize("kind", NETS)
def test_masked_rounds_are_those_of_ten_dense_lines(kind, rewind):
    model, train, data = case(kind)
    before = copy.deepcopy(model.state_dict())
    names = [n for n, p in model.named_parameters() if "weight" in n and p.dim() > 1]
    oracle = by_hand(model, 3, 0.5, rewind, 8, data, names)
    got = list(tickets.imp(model, train, 3, 0.5, rewind, steps=8, sparse_below=0.0))
    assert [t.round for t in got] == [0, 1, 2, 3]
    for ticket, (masks, trained) in zip(got, oracle, strict=True):
        for mask, expected in zip(ticket.masks.values(), masks.values(), strict=True):
            assert torch.equal(mask, expected.bool())
        assert ticket.trained.keys() == trained.keys()
        for key, tensor in trained.items():
            assert torch.equal(ticket.trained[key], tensor), key
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class Whole(nn.Module):
    """A linear net whose sums are exact: a few steps on integers, with rates of two's powers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6, dtype=F64), nn.Linear(6, 2, bias=False, dtype=F64)
        for parameter in self.parameters():
            parameter.data = integers(*parameter.shape, dtype=F64) / 4

    def forward(self, x):
        return self.b(self.a(x))


def train_whole(net, start, stop):
    x = (torch.arange(15, dtype=F64).view(3, 5) % 4) - 1
    optimizer = torch.optim.SGD(net.parameters(), lr=2**-5, momentum=0.5)
    for _ in range(start, stop):
        optimizer.zero_grad()
        (net(x).sum(1) * x[:, 0]).sum().backward()
        optimizer.step()


def test_sparse_rounds_are_the_masked_ones_to_the_bit():
    torch.manual_seed(3)
    model = Whole()
    masked = list(tickets.imp(model, train_whole, 3, steps=4, sparse_below=0.0))
    sparse = list(tickets.imp(model, train_whole, 3, steps=4, sparse_below=1.0))
    assert [t.sparse for t in masked] == [()] * 4
    assert [t.sparse for t in sparse] == [()] + [("a", "b")] * 3
    for one, other in zip(masked, sparse, strict=True):
        assert all(torch.equal(one.masks[n], other.masks[n]) for n in one.masks)
        assert all(torch.equal(one.trained[k], other.trained[k]) for k in one.trained)


@pytest.mark.parametrize("kind", NETS)
def test_a_sparse_round_trains_layers_that_hold_active_weights_alone(kind):
    model, train, _ = case(kind)
    seen = []

    def watched(net, start, stop):
        seen.append({n: m.nnz for n, m in sk.sparse_layers(net).items()})
        train(net, start, stop)

    first, second = tickets.imp(model, watched, 1, steps=2, sparse_below=1.0)
    cut = {n: int(m.sum()) for n, m in second.masks.items() if not m.all()}
    assert seen == [{}, cut]
    assert second.trained.keys() == first.trained.keys()
    for name in cut:
        key = f"{name}.weight" if f"{name}.weight" in second.trained else None
        if key:
            assert not second.trained[key][~second.masks[name]].any()
    again = copy.deepcopy(model)
    again.load_state_dict(second.rewound)
    sk.sparsify_(again, masks=second.masks)
    assert {n: m.nnz for n, m in sk.sparse_layers(again).items()} == cut


def test_the_dense_round_says_where_sparse_layers_pay():
    model, train, _ = case("linear")
    dense = next(tickets.imp(model, train, 1, steps=1))
    assert set(dense.break_even) == {"0", "2"}
    assert set(dense.break_even.values()) == {0.0}  # so small a layer never does
    wide = nn.Sequential(nn.Linear(1024, 1024))
    ones = {"0": torch.ones(1024, 1024, dtype=torch.bool)}
    use = Use((256, 1024), 256, 256 * 2048, 0, True, True)
    pytest.importorskip("numba")
    even = break_evens(wide, ones, {"0": use})
    assert 0.05 < even["0"] < 0.95
    thin = {"0": torch.zeros(1024, 1024, dtype=torch.bool)}
    thin["0"][: int(1024 * even["0"]) - 1] = True
    assert worth(wide, ones, even) == ()
    assert worth(wide, thin, even) == ("0",)


def test_counts_scopes_and_rates_of_their_own():
    trained = {"a.weight": torch.tensor([[1.0, -8.0, 3.0, 4.0]]), "b.weight": torch.ones(3, 2)}
    masks = {n: torch.ones_like(trained[f"{n}.weight"], dtype=torch.bool) for n in "ab"}
    keys = {"a": "a.weight", "b": "b.weight"}

    def counts(*arguments):
        made = next_masks(trained, masks, keys, *arguments)
        return [m.flatten().int().tolist() for m in made.values()]

    assert counts(0.5) == [[1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]
    assert counts(0.5, "layer") == [[0, 1, 0, 1], [1, 1, 1, 0, 0, 0]]
    assert counts(0.75, "global", {"b": 0.5}) == [[0, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    masks["a"][0, 1] = False  # the largest, but gone: it does not come back
    assert counts(0.5, "layer") == [[0, 0, 1, 1], [1, 1, 1, 0, 0, 0]]


def test_a_sequence_goes_on_from_plain_tensors():
    model, train, _ = case("conv")
    whole = list(tickets.imp(model, train, 3, 0.4, 2, steps=5, exclude=["3"]))
    saved = {k: v.clone() for k, v in whole[1].tensors().items()}
    assert all(type(v) is torch.Tensor for v in saved.values())
    after = tickets.Ticket.from_tensors(saved)
    assert after.break_even == whole[1].break_even
    rest = list(tickets.imp(model, train, 3, 0.4, 2, steps=5, exclude=["3"], after=after))
    assert [t.round for t in rest] == [2, 3]
    for one, other in zip(whole[2:], rest, strict=True):
        assert one.density == other.density
        a, b = one.tensors(), other.tensors()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert "3" not in whole[-1].masks


def test_controls_are_as_dense_as_the_ticket_and_start_where_it_did():
    model, train, _ = case("linear")
    dense, _, ticket = tickets.imp(model, train, 2, 0.5, 1, steps=4)
    active = sum(int(m.sum()) for m in ticket.masks.values())
    for name in tickets.CONTROLS:
        g = torch.Generator().manual_seed(0)
        start = tickets.control(name, model, dense, ticket, generator=g)
        assert sum(int(m.sum()) for m in start.masks.values()) == active, name
        assert start.step == 1
        for own, mask in start.masks.items():
            assert not start.state[f"{own}.weight"][~mask].any(), name
        assert torch.equal(start.state["0.bias"], dense.rewound["0.bias"])
        trained = tickets.retrain(model, train, start, 4, sparse_below=1.0)
        assert trained.keys() == dense.trained.keys()
        if name in ("shuffled", "one_shot", "random"):
            for own, mask in start.masks.items():
                expected = dense.rewound[f"{own}.weight"] * mask
                assert torch.equal(start.state[f"{own}.weight"], expected)
    shuffled = tickets.control("shuffled", model, dense, ticket)
    for own, mask in ticket.masks.items():
        assert int(shuffled.masks[own].sum()) == int(mask.sum())
    # of one round, pruning at once is what imp does
    once = next(tickets.imp(model, train, 1, 0.75, 1, steps=4, after=dense))
    same = tickets.control("one_shot", model, dense, once)
    assert all(torch.equal(same.masks[n], once.masks[n]) for n in once.masks)
    again = tickets.retrain(model, train, tickets.Start(once.masks, once.rewound, 1), 4)
    assert all(torch.equal(again[k], once.trained[k]) for k in again)


def test_fresh_values_are_scaled_by_the_inputs_that_count():
    model, train, _ = case("conv")
    dense, ticket = tickets.imp(model, train, 1, 0.7, steps=2)
    for name, mask in ticket.masks.items():
        inputs = mask.flatten(1).sum(1).clamp(min=1).double()
        for scale, counted in (
            ("dense", torch.full_like(inputs, mask[0].numel())),
            ("sparse", inputs),
        ):
            g = torch.Generator().manual_seed(5)
            made = tickets.control(f"fresh_{scale}", model, dense, ticket, gain="relu", generator=g)
            weight = made.state[f"{name}.weight"].flatten(1)
            bound = (2 * 3 / counted).sqrt()[:, None]
            assert bool((weight.abs() <= bound * (1 + 2**-50)).all())
            assert bool((weight.abs() > 0)[mask.flatten(1)].all())
    g = torch.Generator().manual_seed(5)
    wide = tickets.control("fresh_sparse", model, dense, ticket, generator=g)
    g = torch.Generator().manual_seed(5)
    usual = tickets.control("fresh_dense", model, dense, ticket, generator=g)
    ratio = wide.state["0.weight"] / usual.state["0.weight"]
    inputs = ticket.masks["0"].flatten(1).sum(1).double()
    expected = (4 / inputs).sqrt().view(-1, 1, 1, 1).expand_as(ratio)
    on = ticket.masks["0"]
    assert bool(((ratio[on] / expected[on] - 1).abs() < 2**-48).all())


# ---- bad input


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"rounds": 0}, ConfigError, "rounds"),
        ({"rate": 0.0}, ConfigError, "rate"),
        ({"rate": 1.0}, ConfigError, "rate"),
        ({"rate": float("nan")}, ConfigError, "rate"),
        ({"rate": "half"}, DtypeError, "rate"),
        ({"rewind": -1}, ConfigError, "rewind"),
        ({"rewind": 4}, ConfigError, "rewind"),
        ({"scope": "erk"}, ConfigError, "scope"),
        ({"sparse_below": 2}, ConfigError, "sparse_below"),
        ({"layer_rates": {"7": 0.5}}, ConfigError, "'7'"),
        ({"layer_rates": {"2": 0.0}}, ConfigError, "'2'"),
        ({"exclude": ["7"]}, ConfigError, "matches no module"),
        ({"train": 3}, DtypeError, "train"),
        ({"after": 3}, DtypeError, "after"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_trained(given, error, text):
    model, _, _ = case("linear")

    def never(*_):
        raise AssertionError

    arguments = {"train": never, "rounds": 1, "steps": 4, **given}
    with pytest.raises(error, match=text):
        tickets.imp(model, **arguments)


def test_a_rewind_step_that_was_not_saved_is_refused():
    model, train, _ = case("linear")
    dense = next(tickets.imp(model, train, 1, rewind=1, steps=3))
    with pytest.raises(ConfigError, match=r"step 2, which was not saved.*step 1"):
        tickets.imp(model, train, 1, rewind=2, steps=3, after=dense)
    with pytest.raises(ConfigError, match="`after` must have masks"):
        tickets.imp(model, train, 1, rewind=1, steps=3, after=dense, exclude=["2"])
    with pytest.raises(ConfigError, match="is sparse"):
        tickets.imp(sk.sparsify_(linear(), 0.5, exclude=["2"]), train, 1, steps=3)
    for key in ("round", "masks.0", "trained.0.weight"):
        held = dense.tensors()
        del held[key]
        if key == "masks.0":
            held = {k: v for k, v in held.items() if not k.startswith("masks")}
        with pytest.raises(CheckpointError, match="must hold"):
            tickets.Ticket.from_tensors(held)
    with pytest.raises(ConfigError, match="`name`"):
        tickets.control("lucky", model, dense, dense)


def test_a_training_that_revives_pruned_weights_is_told_of():
    model, train, _ = case("linear")

    def reviving(net, start, stop):
        train(net, start, stop)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(1.0)

    with pytest.raises(TrainingLoopError, match="pruned weights"):
        list(tickets.imp(model, reviving, 1, steps=2))

    def breaking(net, start, stop):
        train(net, start, stop)
        net[0].weight.data[0, 0] = float("nan")

    with pytest.raises(TrainingLoopError, match="NaN"):
        list(tickets.imp(model, breaking, 1, steps=2))

    def rewiring(net, _start, _stop):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        if sk.sparse_layers(net):
            sk.SET(net, optimizer, t_end=3, update_freq=1)
            for _ in range(3):
                net(torch.ones(1, 6, dtype=F64)).sum().backward()
                optimizer.step()

    with pytest.raises(TrainingLoopError, match="connections"):
        list(tickets.imp(model, rewiring, 1, steps=2, sparse_below=1.0))


def test_an_optimizer_that_remembers_moves_nothing_that_is_pruned():
    """Momentum from before the mask: the pitfall that ends a ticket dense."""
    model, _, (xs, ys) = case("linear")
    state = {}

    def train(net, start, stop):
        optimizer = torch.optim.Adam(net.parameters(), weight_decay=0.1)
        if state:
            optimizer.load_state_dict(state)
        for step in range(start, stop):
            nn.functional.cross_entropy(net(xs[step]), ys[step]).backward()
            optimizer.step()
        state.update(optimizer.state_dict())

    last = list(tickets.imp(model, train, 2, steps=4, sparse_below=0.0))[-1]
    for name, mask in last.masks.items():
        assert not last.trained[f"{name}.weight"][~mask].any()
