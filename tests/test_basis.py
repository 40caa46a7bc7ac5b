"""Tickets in another basis: exact transforms, the cosine transform against what it diagonalises."""

import copy
import math

import pytest
import torch
from torch import nn

from sparsekern import tickets
from sparsekern.errors import ConfigError, DtypeError, ShapeError
from sparsekern.tickets.basis import dct
from tests.support import assert_within, integers, product_bound


def hadamard(n):
    """Orthonormal and exact for n = 4, 16."""
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.isqrt(n)


def both(w):
    return hadamard(w.shape[0]), hadamard(w.shape[1])


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(16, 4))
    for parameter in model.parameters():
        parameter.data = 4 * integers(*parameter.shape)
    return model


@pytest.mark.parametrize("transform", ["identity", both])
def test_outputs_are_the_same_and_coordinates_come_back(transform):
    model, x = net(), integers(3, 4, 3, 3)
    y, before = model(x), copy.deepcopy(model.state_dict())
    tickets.in_basis_(model, transform)
    assert torch.equal(model(x), y)
    z = tickets.coordinates(model)
    assert list(z) == ["0", "2"]
    assert torch.equal(z["2"], before["2.weight"]) == (transform == "identity")
    tickets.from_basis_(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_the_cosine_transform_diagonalises_second_differences(n):
    # of a line with reflecting ends: eigenvalues 2 - 2 cos(pi k / n)
    t = 2 * torch.eye(n, dtype=torch.float64)
    t -= torch.diag(torch.ones(n - 1), 1) + torch.diag(torch.ones(n - 1), -1)
    t[0, 0] -= 1
    t[-1, -1] -= 1
    d = dct(n, t)
    k = torch.arange(n, dtype=torch.float64)
    exact = torch.diag(2 - 2 * torch.cos(math.pi * k / n))
    # entries of d: an argument below pi n, off by 3 roundings of it; cos, root and product
    u = 2.0**-53
    off = torch.full_like(d, (3 * math.pi * n + 4) * u * math.sqrt(2 / n))
    spread = (d.abs() + off) @ t.abs() @ (d.abs() + off).t() - d.abs() @ t.abs() @ d.abs().t()
    products = 2 * product_bound(d.abs() @ t.abs(), d.abs().t(), n, torch.float64)
    assert_within(d @ t @ d.t(), exact, spread + products + 8 * u)  # and those of `exact`


def test_singular_vectors_make_a_weight_diagonal():
    model = nn.Sequential(nn.Linear(5, 3, bias=False)).double()
    w = model[0].weight.detach().clone()
    z = tickets.coordinates(tickets.in_basis_(model, "svd"))["0"]
    s = torch.linalg.svdvals(w)
    low = torch.zeros(3, 5, dtype=torch.bool)
    low[0, 0] = True
    # backward stable: within a small multiple of roundings of the norm, of 15 entries
    bound = torch.full_like(z, 15 * 8 * 2.0**-53 * float(s[0]))
    assert_within(z, torch.diag(s) @ torch.eye(3, 5, dtype=torch.float64), bound)
    tickets.hold_(model, {"0": low})
    assert int(torch.linalg.matrix_rank(model[0].weight)) == 1


def test_a_ticket_holds_while_its_coordinates_train():
    model = tickets.in_basis_(net(), both)
    start = tickets.coordinates(model)
    masks = tickets.top(tickets.CRITERIA["large_init"](start), 0.5, "layer")
    tickets.hold_(model, masks, tickets.survivors("rewind", start, masks))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(integers(3, 4, 3, 3)).square().mean().backward()
        optimizer.step()
    for name, z in tickets.coordinates(model).items():
        assert bool((z[~masks[name]] == 0).all())
        assert not torch.equal(z, start[name].where(masks[name], 0.0))
        w = model.get_submodule(name).weight
        rows, cols = both(w.flatten(1))
        exact = rows.t().double() @ z.flatten(1).double() @ cols.double()
        spread = rows.abs() @ z.flatten(1).abs() @ cols.abs()
        n = sum(w.flatten(1).shape)
        assert_within(w.flatten(1), exact, 2 * n * 2.0**-24 * spread.double())


def test_masks_of_whole_rows_prune_units():
    model = tickets.in_basis_(net(), "identity")
    masks = {n: torch.ones_like(z, dtype=torch.bool) for n, z in tickets.coordinates(model).items()}
    masks["2"][1] = False
    w = model[2].weight.detach().clone()
    tickets.hold_(model, masks)
    w[1] = 0
    assert torch.equal(model[2].weight, w)


def test_the_state_loads_with_masks_and_bases():
    model = tickets.in_basis_(net(), "svd")
    masks = tickets.top({n: z.abs() for n, z in tickets.coordinates(model).items()}, 0.5)
    tickets.hold_(model, masks)
    other = net()
    other[2].weight.data.mul_(-1).add_(torch.eye(4, 16))
    tickets.in_basis_(other, "svd").load_state_dict(model.state_dict())
    x = integers(3, 4, 3, 3)
    assert torch.equal(model(x), other(x))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 4)


BAD = [
    (lambda: tickets.in_basis_(net(), "dtc"), ConfigError, "did you mean 'dct'"),
    (lambda: tickets.in_basis_(net(), lambda w: (w, None)), ShapeError, "must have shape (4, 4)"),
    (lambda: tickets.in_basis_(net(), lambda w: w), DtypeError, "two matrices"),
    (lambda: tickets.in_basis_(net(), lambda w: (1, None)), DtypeError, "floating-point"),
    (
        lambda: tickets.in_basis_(net(), lambda w: (2 * hadamard(4), None)),
        ConfigError,
        "not orthonormal",
    ),
    (lambda: tickets.in_basis_(Recurrent()), ConfigError, "belongs to a GRU"),
    (lambda: tickets.in_basis_("net"), DtypeError, "nn.Module"),
    (lambda: tickets.coordinates(net()), ConfigError, "in_basis_ before"),
    (lambda: tickets.from_basis_(net()), ConfigError, "in_basis_ before"),
    (
        lambda: tickets.hold_(tickets.in_basis_(net()), {"0": torch.ones(3).bool()}),
        ConfigError,
        "same names",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD)
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)
