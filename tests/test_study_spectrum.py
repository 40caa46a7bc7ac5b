"""Eigenvalues of Hessians: quadratics, small nets against the whole matrix, bad input."""

import pytest
import torch
from support import UNIT_ROUNDOFF, integers
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

import sparsekern as sk
from sparsekern.errors import ConfigError, DtypeError
from sparsekern.study import lanczos, spectrum

F64 = torch.float64
U = UNIT_ROUNDOFF[F64]


def symmetric(n, seed=0):
    torch.manual_seed(seed)
    half = integers(n, n, dtype=F64)
    return half + half.t()


def seen(matrix, made):
    """How far T's eigenvalues may be from the matrix's, from what was computed: Weyl, Ostrowski."""
    q, t = made.basis, made.tridiagonal()
    apart = torch.linalg.matrix_norm(matrix - q.t() @ t @ q, 2)
    off = torch.linalg.matrix_norm(q @ q.t() - torch.eye(len(q), dtype=F64), 2)
    scale = torch.linalg.matrix_norm(matrix, 2) + torch.linalg.matrix_norm(t, 2)
    return float(apart + off * scale + 8 * len(matrix) * U * scale)  # the last: eigh's own


@pytest.mark.parametrize("n", [1, 2, 13, 60])
def test_all_steps_give_all_eigenvalues(n):
    matrix = symmetric(n)
    made = lanczos(lambda v: matrix @ v, n, n, torch.Generator().manual_seed(0))
    got, exact = torch.linalg.eigvalsh(made.tridiagonal()), torch.linalg.eigvalsh(matrix)
    bound = seen(matrix, made)
    assert bound < 1e-9 * float(matrix.abs().max()) * n  # the vectors stayed orthogonal
    assert float((got - exact).abs().max()) <= bound


def test_repeated_eigenvalues_are_found_as_often_as_they_are_there():
    diagonal = torch.tensor([2.0] * 5 + [-1.0] * 3 + [0.0] * 4, dtype=F64)
    made = lanczos(lambda v: diagonal * v, 12, 12, torch.Generator().manual_seed(0))
    got = torch.linalg.eigvalsh(made.tridiagonal())
    bound = seen(diagonal.diag(), made)
    assert float((got - diagonal.sort().values).abs().max()) <= bound < 1e-12


def test_few_steps_find_the_ends_within_their_residuals():
    matrix = symmetric(60)
    made = lanczos(lambda v: matrix @ v, 60, 25, torch.Generator().manual_seed(0))
    values, vectors = torch.linalg.eigh(made.tridiagonal())
    exact = torch.linalg.eigvalsh(matrix)
    rounding = 60 * 60 * U * float(exact.abs().max())
    for value, residual in zip(values, made.beside[-1] * vectors[-1].abs(), strict=True):
        assert float((exact - value).abs().min()) <= float(residual) + rounding
    for end in (0, -1):
        assert float((values[end] - exact[end]).abs()) < 0.01 * float(exact.abs().max())


class Quadratic(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(n, dtype=F64))

    def forward(self, a):
        return self.theta @ a[0] @ self.theta / 2


def test_a_quadratic_has_its_matrix_for_a_hessian():
    matrix = symmetric(9)
    made = spectrum(Quadratic(9), [(matrix[None], matrix)], lambda y, _: y)
    exact = torch.linalg.eigvalsh(matrix)
    assert float((made.values - exact).abs().max()) <= 9 * 9 * 8 * U * float(exact.abs().max())
    assert abs(float(made.weights.sum()) - 1) <= 9 * 8 * U
    assert made.size == 9


def net(kind):
    torch.manual_seed(0)
    if kind == "conv":
        flat = nn.Flatten()
        built = nn.Sequential(
            nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.Tanh(), flat, nn.Linear(8, 3)
        )
        return built.double(), (1, 2, 3)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double(), (5,)


def whole(model, places, batches):
    """The Hessian of the mean loss over active dimensions, by torch."""
    fixed = {k: p.detach() for k, p in model.named_parameters()}

    def loss(flat):
        parameters, at = {}, 0
        for key, place in places.items():
            count = int(place.sum())
            parameters[key] = fixed[key].masked_scatter(place, flat[at : at + count])
            at += count
        buffers = {k: b.clone() for k, b in model.named_buffers()}
        total = sum(len(x) for x, _ in batches)
        return sum(
            len(x)
            / total
            * nn.functional.cross_entropy(functional_call(model, parameters | buffers, (x,)), y)
            for x, y in batches
        )

    flat = torch.cat([fixed[k][place] for k, place in places.items()])
    return hessian(loss, flat)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_net_with_masks_has_torchs_hessian_over_what_is_active(kind):
    model, shape = net(kind)
    masks = {"0": torch.rand_like(model[0].weight) < 0.6}
    batches = [(torch.randn(n, *shape, dtype=F64), torch.randint(3, (n,))) for n in (4, 7)]
    places = {k: torch.ones_like(p, dtype=torch.bool) for k, p in model.named_parameters()}
    places["0.weight"] = masks["0"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = spectrum(model, batches, nn.functional.cross_entropy, masks=masks)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    matrix = whole(model, places, batches)
    assert made.size == len(matrix) == len(made.values)
    exact = torch.linalg.eigvalsh((matrix + matrix.t()) / 2)
    # either way of computing it rounds: their own asymmetry shows by how much, for the whole one
    apart = float((matrix - matrix.t()).abs().sum(1).max())
    bound = 8 * apart + 64 * len(matrix) * U * float(exact.abs().max())
    assert bound < 1e-11
    assert float((made.values - exact).abs().max()) <= bound


@pytest.mark.parametrize("block", [1, (4, 3)])
def test_sparse_layers_have_the_dimensions_of_their_weights(block):
    """Blocks that stick out of the matrix are padded, which is no dimension."""
    model, shape = net("linear")
    sk.sparsify_(model, 0.4, block=block, exclude=["2"])
    layer = model[0]
    batches = [(torch.randn(6, *shape, dtype=F64), torch.randint(3, (6,)))]
    made = spectrum(model, batches, nn.functional.cross_entropy)
    assert made.size == layer.nnz + 6 + 18 + 3
    masks = {"0": layer.mask()}
    dense = sk.densify_(model)
    same = spectrum(dense, batches, nn.functional.cross_entropy, masks=masks)
    assert same.size == made.size
    scale = float(same.values.abs().max())
    # products of at most 64 terms a layer, two layers, there and back twice
    assert float((same.values - made.values).abs().max()) <= 8 * 64 * same.size * U * scale


def test_bad_input():
    model, shape = net("linear")
    x, y = torch.randn(4, *shape, dtype=F64), torch.randint(3, (4,))
    with pytest.raises(ConfigError, match="at least one pair"):
        spectrum(model, [], nn.functional.cross_entropy)
    with pytest.raises(ConfigError, match="at most the 57"):
        spectrum(model, [(x, y)], nn.functional.cross_entropy, steps=58)
    with pytest.raises(ConfigError, match="steps"):
        spectrum(model, [(x, y)], nn.functional.cross_entropy, steps=0)
    with pytest.raises(ConfigError, match="scalar"):
        spectrum(model, [(x, y)], lambda out, _: out)
    with pytest.raises(ConfigError, match="finite"):
        spectrum(model, [(x * float("inf"), y)], nn.functional.cross_entropy)
    with pytest.raises(ConfigError, match="no dense weight"):
        spectrum(model, [(x, y)], nn.functional.cross_entropy, masks={"9": torch.ones(2)})
    with pytest.raises(DtypeError, match="model"):
        spectrum(3, [(x, y)], nn.functional.cross_entropy)
    with pytest.raises(ConfigError, match="no parameter"):
        spectrum(model.requires_grad_(False), [(x, y)], nn.functional.cross_entropy)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def test_a_sparse_gru_has_the_hessian_of_the_masked_one():
    torch.manual_seed(0)
    model = sk.sparsify_(Recurrent().double(), 0.5, exclude=["head"])
    batches = [(torch.randn(3, 2, 3, dtype=F64), torch.tensor([0, 2, 1]))]
    made = spectrum(model, batches, nn.functional.cross_entropy)
    masks = {name: layer.mask() for name, layer in sk.sparse_layers(model).items()}
    same = spectrum(sk.densify_(model), batches, nn.functional.cross_entropy, masks=masks)
    assert made.size == same.size
    scale = float(same.values.abs().max())
    assert float((same.values - made.values).abs().max()) <= 8 * 64 * same.size * U * scale
