"""The compiled loops of an update choose, merge and sort exactly as torch's operators do."""

import pytest
import torch

from sparsekern import SET, RigL, SparseConv2d, SparseGRU, SparseLinear, Topology, ops
from sparsekern.methods import update
from sparsekern.nn.init import sparse_uniform_
from sparsekern.ops import GrowScores
from sparsekern.topology import native, packed, sampling, select

pytestmark = pytest.mark.skipif(native._module() is None, reason="needs numba")


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch):
    monkeypatch.setattr(native, "SMALLEST", 0)
    monkeypatch.delenv("SPARSEKERN_CPU", raising=False)


def both(made):
    """What the compiled loops make, and what torch makes."""
    with pytest.MonkeyPatch.context() as patch:
        compiled = made()
        patch.setenv("SPARSEKERN_CPU", "csr")
        assert native.loops(10**6) is None
        return compiled, made()


def expect_equal(pair):
    for one, other in zip(*pair, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def tied(n, distinct, dtype):
    """Scores with ties, both zeros and infinities."""
    g = torch.Generator().manual_seed(n + distinct)
    scores = torch.randint(-distinct, distinct + 1, (n,), generator=g).to(dtype) / 8
    zeros = scores == 0
    scores[zeros] = torch.where(torch.rand(int(zeros.sum()), generator=g) < 0.5, 0.0, -0.0).to(
        dtype
    )
    if n > 4:
        scores[1], scores[3] = -torch.inf, torch.inf
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distinct", [0, 1, 50, 10**7])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 3000])
def test_the_best_are_those_of_a_stable_sort(n, distinct, dtype):
    scores = tied(n, distinct, dtype)
    finite = scores.masked_fill(scores == -torch.inf, -1e9)  # which would never win
    order = torch.sort(scores, descending=True, stable=True).indices
    for k in {0, 1, n // 3, n - 1, n}:
        best = order[:k].sort().values
        assert torch.equal(select.top_k_mask(scores, k).nonzero()[:, 0], best)
        stream = select.streamed_top_k(k, scores, n)
        assert isinstance(stream, select.CompiledTopK)
        for first in range(0, n, 37):
            stream.push(finite[first : first + 37].clone(), first)
        positions, values = stream.result()
        assert torch.equal(positions, best)
        assert torch.equal(values, finite[best])


def test_a_stream_of_ever_better_scores_keeps_to_its_memory():
    stream = select.streamed_top_k(10, torch.empty(0), 10**6)
    for first in range(0, 100_000, 5000):
        stream.push(torch.arange(first, first + 5000).float(), first)
    assert stream._scores.numel() == stream._positions.numel() == 10 + 1024 + 16
    assert stream.result()[0].tolist() == list(range(99_990, 100_000))


CUTS = [
    ((40, 30), 1, 1, 1),
    ((40, 30), 4, 1, 1),
    ((24, 36), 1, 2, 9),
    ((24, 36), (2, 2), 4, 3),
    ((7, 5), 3, 1, 1),
    ((5000, 3), 1, 1, 1),
    ((3, 9000), 1, 1, 1),  # more than one band of columns
]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(("shape", "block", "groups", "taps"), CUTS)
def test_topologies_are_the_same_array_for_array(shape, block, groups, taps, sparsity):
    def random():
        g = torch.Generator().manual_seed(1)
        return Topology.random(
            shape, block, sparsity=sparsity, groups=groups, taps=taps, generator=g
        )

    one, other = both(random)
    expect_equal((one.arrays, other.arrays))
    expect_equal([[positions] for positions in both(one.positions)])
    one.validate()


@pytest.mark.parametrize(("n", "total"), [(0, 9), (1, 1), (3, 7), (999, 2**40), (4000, 10_000)])
def test_the_same_numbers_are_drawn(n, total):
    def draw():
        return [sampling.sample_sorted(n, total, torch.Generator().manual_seed(3))]

    pair = both(draw)
    expect_equal(pair)
    assert pair[0][0].numel() == pair[0][0].unique().numel() == n


@pytest.mark.parametrize("positions", [[3, 2], [0, 0], [-1, 4], [0, 100], [100], [5, 10**12]])
def test_wrong_positions_are_told_in_the_same_words(positions):
    def told():
        with pytest.raises(ValueError, match="`positions` must") as caught:
            Topology.from_positions(torch.tensor(positions), (10, 10))
        return str(caught.value)

    assert len(set(both(told))) == 1


def test_offsets_that_were_never_checked_lead_nowhere():
    t = Topology.random((20, 20), sparsity=0.5)
    out = torch.zeros(t.nnzb, dtype=torch.int64)
    for place, bad in ((3, 10**6), (3, -5), (0, 1), (20, t.nnzb + 1)):
        crow = t.crow.clone()
        crow[place] = bad
        assert not native._module().flat(crow.numpy(), t.col.numpy(), 20, out.numpy())


@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf])
@pytest.mark.parametrize("slab", [1, 10**9])
@pytest.mark.parametrize("norm", ["l1", "max"])
@pytest.mark.parametrize(("shape", "block"), [((40, 30), 1), ((40, 30), 4), ((7, 5), 3)])
def test_an_update_is_the_same(shape, block, norm, slab, bad, monkeypatch):
    monkeypatch.setattr(ops.grow, "SLAB_ELEMENTS", slab)
    g = torch.Generator().manual_seed(5)
    t = Topology.random(shape, block, sparsity=0.6, generator=g)
    dy, x = (torch.randint(-2, 3, (6, size), generator=g).float() for size in shape)
    if bad is not None:
        dy[0, 1] = bad
    ours = torch.randint(0, 4, (t.nnzb,), generator=g).float()
    for n in (0, 1, t.nnzb // 3, t.nnzb):
        pair = both(lambda n=n: ops.grow_scores(dy, x, t, n, norm=norm))
        expect_equal(pair)
        assert pair[0].is_finite() == pair[1].is_finite()
        assert bad is None or not n or not pair[0].is_finite()
        if bad is not None:
            continue

        def rewired(scores=pair[0], n=n):
            keep = update.drop_smallest(ours, n)
            grown = update.grow_largest(t, keep, min(n, t.grid.total - int(keep.sum())), scores)
            made = update.rewire(t, keep, grown)
            turned = update.rewire(t, keep, grown.flip(0))  # in another order
            assert torch.equal(made.source, turned.source)
            return [keep, grown, made.source, *made.topology.arrays]

        if n <= pair[0].positions.numel():
            expect_equal(both(rewired))


@pytest.mark.parametrize(("n", "total"), [(0, 9), (3, 7), (400, 500), (400, 10**6)])
def test_what_two_sets_have_in_common(n, total):
    one, other = (
        torch.randperm(total, generator=torch.Generator().manual_seed(s))[:n].sort().values
        for s in (1, 2)
    )
    pair = both(lambda: packed.in_both(packed.gaps_of(one), other))
    assert pair[0] == pair[1] == len(set(one.tolist()) & set(other.tolist()))


def test_a_survivor_that_is_grown_is_told():
    t = Topology.from_mask(torch.tensor([[1, 1, 0, 1]]))
    keep = torch.tensor([True, True, False])
    for grown in ([1], [0], [9]):
        with pytest.raises(ValueError, match="`positions` must"):
            update.rewire(t, keep, torch.tensor(grown))


def test_grown_before_and_behind_all_that_is_old():
    t = Topology.from_mask(torch.tensor([[0, 1, 0, 1, 0]]))
    keep = torch.tensor([False, False])
    scores = GrowScores(torch.tensor([1.0, 1]), torch.tensor([0, 2, 4]), torch.ones(3))
    assert update.grow_largest(t, keep, 3, scores).tolist() == [0, 1, 2]
    made = update.rewire(t, keep, torch.tensor([0, 3]))
    assert made.source.tolist() == [-1, 1]
    assert made.grown == 1


LAYERS = {
    "linear": (lambda block: SparseLinear(16, 24, sparsity=0.7, block=block), (5, 16)),
    "conv": (
        lambda block: SparseConv2d(8, 16, 3, padding=1, groups=2, sparsity=0.6, block=block),
        (2, 8, 5, 5),
    ),
    "gru": (lambda block: SparseGRU(8, 12, sparsity=0.6, block=block), (4, 2, 8)),
}


@pytest.mark.parametrize("method", [RigL, SET])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("family", LAYERS)
def test_training_ends_at_the_same_topology(family, block, method):
    make, shape = LAYERS[family]

    def train():
        torch.manual_seed(0)
        layer = make(block)
        optimizer = torch.optim.SGD(layer.parameters(), lr=2.0**-6, momentum=0.5)
        made = method(layer, optimizer, t_end=100, update_freq=1)
        for _ in range(6):
            optimizer.zero_grad()
            out = layer(torch.randint(-2, 3, shape).float())
            (out[0] if isinstance(out, tuple) else out).square().sum().backward()
            optimizer.step()
        assert made.history
        return [a for one in made.layers.values() for a in one.topology.arrays]

    # the products themselves stay those of numba: only the update differs
    from sparsekern.ops.cpu import choice

    with choice.force("jit"):
        expect_equal(both(train))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "block", "groups"), [((40, 30), 1, 1), ((37, 50), (8, 4), 1), ((24, 20), (5, 4), 3)]
)
def test_the_first_values_are_the_same(shape, block, groups, dtype):
    topology = Topology.random(
        shape, block, sparsity=0.7, groups=groups, generator=torch.Generator().manual_seed(1)
    )

    def drawn():
        values = torch.empty(topology.nnzb, *topology.block, dtype=dtype)
        return [sparse_uniform_(values, topology, generator=torch.Generator().manual_seed(2))]

    expect_equal(both(drawn))


def test_what_is_left_out_of_a_large_draw_is_as_likely_everywhere(monkeypatch):
    monkeypatch.setattr(sampling, "_LARGE", 8)
    generator = torch.Generator().manual_seed(5)
    n, total, rounds = 30, 100, 1500
    seen = torch.zeros(total)
    for _ in range(rounds):
        drawn = sampling.sample_sorted(n, total, generator)
        assert drawn.numel() == n == drawn.unique().numel()
        seen[drawn] += 1
    share = n / total
    # chi-squared with 99 degrees of freedom, counts without replacement: mean 99, deviation 14
    chi = ((seen - rounds * share) ** 2 / (rounds * share * (1 - share))).sum()
    assert chi < 99 + 5 * 14.1
