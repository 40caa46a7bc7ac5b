"""`Topology`: invariants, verbs, exact counts, bad input."""

import itertools

import pytest
import torch
from support import AllocationTracer
from torch import nn

import sparsekern as sk
from sparsekern.errors import ConfigError, DtypeError, ShapeError, SparseKernError, TopologyError
from sparsekern.topology import ARRAY_NAMES, Topology
from sparsekern.topology.blocks import active_count, as_block, check_sparsity

SHAPES = [(1, 1), (7, 9), (16, 16), (17, 15), (33, 64), (50, 3)]
BLOCKS = [1, 4, (2, 3), (7, 1), (1, 9), 16]


def fitting():
    for shape, block in itertools.product(SHAPES, BLOCKS):
        bh, bw = as_block(block)
        if bh <= shape[0] and bw <= shape[1]:
            yield shape, block


@pytest.mark.parametrize(("shape", "block"), list(fitting()))
@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.9, 0.99])
def test_random_is_valid_exact_and_survives_every_round_trip(shape, block, sparsity):
    topology = Topology.random(shape, block, sparsity=sparsity).validate()
    bh, bw = topology.block
    asked = active_count(shape[0] * shape[1], sparsity)
    assert abs(topology.nnz - asked) < max(2, bh * bw)
    mask = topology.to_mask()
    assert int(mask.sum()) == topology.nnz
    assert topology.density == topology.nnz / mask.numel()
    assert Topology.from_mask(mask, block) == topology
    assert Topology.from_positions(topology.positions(), shape, block) == topology
    dense = torch.randn(shape) * mask
    assert torch.equal(topology.unpack(topology.pack(dense)), dense)
    assert topology.nbytes == 4 * (
        2 * topology.block_rows + 2 * topology.block_cols + 2 + 3 * topology.nnzb
    )


def test_unstructured_count_is_exact_as_in_the_reference_code():
    # n_zeros = floor(sparsity * size); 0.29 * 100 is 28.999... in binary
    assert active_count(100, 0.29) == 71
    assert Topology.random((300, 784), sparsity=0.98).nnz == 235200 - 230496


@pytest.mark.parametrize("shape", [(8, 8), (9, 7)])
def test_transpose_arrays_describe_the_same_blocks(shape):
    topology = Topology.random(shape, (2, 3), nnzb=6)
    cols = torch.repeat_interleave(topology.ccol.long().diff())
    via_transpose = {(int(r), int(c)) for r, c in zip(topology.row, cols, strict=True)}
    direct = {(int(r), int(c)) for r, c in zip(topology.slot_rows(), topology.col, strict=True)}
    assert via_transpose == direct
    assert torch.equal(topology.col[topology.perm.long()], cols.int())


def test_random_is_uniform():
    counts = torch.zeros(6, 8)
    for seed in range(600):
        g = torch.Generator().manual_seed(seed)
        counts += Topology.random((6, 8), nnzb=12, generator=g).to_mask()
    # each of 48 positions is hit Binomial(600, 1/4): mean 150, standard deviation 10.6
    assert (counts - 150).abs().max() < 5 * 10.6


def test_random_never_makes_a_dense_mask():
    from support import AllocationTracer

    with AllocationTracer() as tracer:
        topology = Topology.random((4096, 4096), sparsity=0.99)
    assert tracer.largest < 2 * topology.nnz


def test_seed_decides():
    drawn = [
        Topology.random((40, 50), 4, sparsity=0.8, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0].digest() == drawn[1].digest()
    assert drawn[0] != drawn[2]
    assert drawn[0].digest() != drawn[2].digest()


def test_digest_is_stable_across_versions():
    topology = Topology.from_mask(torch.eye(4))
    assert topology.digest()[:16] == DIGEST_OF_EYE_4


DIGEST_OF_EYE_4 = "5f2ca7925ae6d840"


def test_diff_and_overlap():
    old = Topology.from_mask(torch.tensor([[1, 1, 0], [0, 0, 1]]))
    new = Topology.from_mask(torch.tensor([[1, 0, 1], [0, 0, 1]]))
    diff = old.diff(new)
    assert diff.added.tolist() == [2]
    assert diff.removed.tolist() == [1]
    assert diff.kept.tolist() == [0, 5]
    assert old.overlap(new) == pytest.approx(2 / 3)
    assert old.overlap(old) == 1.0
    with pytest.raises(ShapeError, match="share shape and block"):
        old.diff(Topology.from_mask(torch.ones(2, 2)))


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize(("shape", "block"), [((7, 9), 1), ((8, 12), (4, 3))])
def test_torch_interop_both_ways(shape, block):
    topology = Topology.random(shape, block, sparsity=0.6)
    values = torch.randn(topology.values_shape)
    matrix = topology.to_torch(values)
    assert torch.equal(matrix.to_dense(), topology.unpack(values))
    back, same_values = Topology.from_torch(matrix)
    assert back == topology
    assert torch.equal(same_values, values)


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
def test_from_torch_refuses_indices_that_torch_accepts():
    bad = torch.sparse_csr_tensor(
        torch.tensor([0, 1]), torch.tensor([99]), torch.ones(1), (1, 4), check_invariants=False
    )
    with pytest.raises(TopologyError, match=r"`col` must lie in \[0, 4\); got 99 to 99"):
        Topology.from_torch(bad)


def broken(name, change):
    topology = Topology.random((6, 8), 2, nnzb=5, generator=torch.Generator().manual_seed(3))
    arrays = {n: getattr(topology, n).clone() for n in ARRAY_NAMES}
    arrays[name] = change(arrays[name])
    return Topology(topology.shape, topology.block, **arrays)


def put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("col", put(0, 99), r"`col` must lie in \[0, 4\)"),
        ("col", put(0, -1), r"`col` must lie in \[0, 4\); got -1"),
        ("row", put(0, 3), r"`row` must lie in \[0, 3\)"),
        ("crow", put(-1, 4), "`crow` must run from 0 to 5; got 0 to 4"),
        ("crow", put(0, 1), "`crow` must run from 0"),
        ("crow", put(1, 9), "`crow` must not decrease"),
        ("crow", lambda a: a[:-1], "`crow` must have 4 entries; got 3"),
        ("ccol", lambda a: a[:-1], "`ccol` must have 5 entries; got 4"),
        ("col", lambda a: a.long(), "`col` must be a 1-D int32 tensor; got 1-D torch.int64"),
        ("perm", lambda a: a.flip(0), "`perm` does not follow from"),
        ("perm", put(0, 4), "`perm` does not follow from"),
        ("perm", lambda a: a[None], "`perm` must be a 1-D int32 tensor; got 2-D"),
        ("col", lambda a: torch.zeros_like(a), "must ascend without duplicates"),
    ],
)
def test_validate_names_the_array_and_the_fault(name, change, text):
    with pytest.raises(TopologyError, match=text):
        broken(name, change).validate()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: Topology.random((4, 4), sparsity=1.0), ConfigError, r"in \[0, 1\); got 1.0"),
        (lambda: Topology.random((4, 4), sparsity=-0.1), ConfigError, r"in \[0, 1\); got -0.1"),
        (lambda: Topology.random((4, 4), sparsity="x"), DtypeError, "must be a number; got 'x'"),
        (lambda: Topology.random((4, 4)), ConfigError, "exactly one of"),
        (lambda: Topology.random((4, 4), sparsity=0.5, nnzb=1), ConfigError, "exactly one of"),
        (lambda: Topology.random((4, 4), nnzb=17), ConfigError, r"in \[0, 16\]; got 17"),
        (lambda: Topology.random((4, 4), 8, sparsity=0.5), ShapeError, r"\(8, 8\) is larger"),
        (lambda: Topology.random((4,), sparsity=0.5), ShapeError, r"two positive sizes; got \(4,"),
        (lambda: Topology.random((4, 4), 0, sparsity=0.5), ConfigError, "at least 1; got 0"),
        (lambda: Topology.random((4, 4), 2.0, sparsity=0.5), DtypeError, "int or a pair"),
        (lambda: Topology.random((4, 4), True, sparsity=0.5), DtypeError, "int or a pair"),
        (lambda: Topology.random((4, 4), (1, 2, 3), sparsity=0.5), DtypeError, "int or a pair"),
        (lambda: Topology.from_mask(torch.ones(3)), ShapeError, "must be 2-D"),
        (lambda: Topology.from_torch(torch.ones(3, 3)), DtypeError, "got torch.strided"),
        (
            lambda: Topology.from_positions(torch.tensor([1, 1]), (2, 2)),
            TopologyError,
            "strictly ascending",
        ),
        (
            lambda: Topology.from_positions(torch.tensor([4]), (2, 2)),
            TopologyError,
            r"in \[0, 4\); got 4 to 4",
        ),
        (
            lambda: Topology.random((3, 3), nnzb=2).unpack(torch.ones(3, 1, 1)),
            ShapeError,
            r"shape \(2, 1, 1\); got \(3, 1, 1\)",
        ),
        (
            lambda: Topology.random((3, 3), nnzb=2).pack(torch.ones(3, 4)),
            ShapeError,
            r"shape \(3, 3\); got \(3, 4\)",
        ),
        (
            lambda: Topology.random((5, 4), 2, nnzb=2).to_torch(torch.ones(2, 2, 2)),
            ShapeError,
            "multiple of the block",
        ),
        (lambda: check_sparsity(True), DtypeError, "must be a number"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text) as info:
        call()
    assert isinstance(info.value, SparseKernError)


# ---- groups and taps: the weight of a convolution

CUT = [  # shape, groups, taps, block
    ((12, 36), 1, 9, (4, 2)),
    ((14, 30), 2, 6, (4, 3)),
    ((9, 10), 3, 2, 1),
    ((6, 8), 2, 1, (3, 8)),
    ((10, 21), 1, 3, (3, 5)),
]


@pytest.mark.parametrize(("shape", "groups", "taps", "block"), CUT)
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.8])
def test_parts_are_cut_by_themselves_and_survive_every_round_trip(
    shape, groups, taps, block, sparsity
):
    parts = {"groups": groups, "taps": taps}
    topology = Topology.random(shape, block, sparsity=sparsity, **parts).validate()
    (bh, bw), mask = topology.block, topology.to_mask()
    assert abs(topology.nnz - active_count(shape[0] * shape[1], sparsity)) < max(2, bh * bw)
    assert int(mask.sum()) == topology.nnz
    assert Topology.from_mask(mask, block, **parts) == topology
    assert topology.with_positions(topology.positions()) == topology
    dense = torch.randn(shape) * mask
    assert torch.equal(topology.unpack(topology.pack(dense)), dense)
    # each part, looked at alone, is made of whole blocks
    height, width = shape[0] // groups, shape[1] // taps
    blocks = 0
    for part in mask.view(groups, height, taps, width).transpose(1, 2).flatten(0, 1):
        blocks += Topology.from_mask(part, block).nnzb
        assert torch.equal(Topology.from_mask(part, block).to_mask(), part)
    assert blocks == topology.nnzb
    assert topology.nbytes == 4 * (
        2 * topology.block_rows + 2 * groups * topology.block_cols + 2 + 3 * topology.nnzb
    )


def test_the_transpose_of_a_grouped_weight_goes_group_by_group():
    topology = Topology.random((14, 30), (4, 3), sparsity=0.4, groups=2, taps=6)
    keys = torch.repeat_interleave(topology.ccol.long().diff())
    rows, cols = topology.slot_rows(), topology.col.long()
    slots = topology.perm.long()
    assert torch.equal(topology.row.long(), rows[slots])
    assert torch.equal(keys, rows[slots] // 2 * topology.block_cols + cols[slots])


def test_padding_is_cleared_in_every_part():
    topology = Topology.random((14, 30), (4, 3), sparsity=0, groups=2, taps=6)
    values = torch.full(topology.values_shape, float("nan"))
    inside = topology.pack(torch.ones(14, 30)) == 1
    values[inside] = 1
    topology.clear_padding_(values)
    assert torch.equal(values, inside.float())
    assert int(inside.sum()) == 14 * 30 < values.numel()


def test_parts_tell_topologies_apart():
    plain = Topology.random((8, 8), 2, sparsity=0)
    cut = Topology.random((8, 8), 2, sparsity=0, groups=2, taps=4)
    assert plain != cut
    assert plain.digest() != cut.digest()
    assert repr(cut).startswith("Topology(shape=(8, 8), block=(2, 2), groups=2, taps=4, nnzb=16")
    with pytest.raises(ShapeError, match=r"got shape=\(8, 8\), block=\(2, 2\) and shape="):
        plain.diff(cut)
    with pytest.raises(ShapeError, match="3 groups and 1 taps must divide the shape"):
        Topology.random((8, 8), 2, sparsity=0, groups=3)
    with pytest.raises(ShapeError, match="larger than the channels of a group: 4 outputs, 2 in"):
        Topology.random((8, 8), 4, sparsity=0, groups=2, taps=4)


HUGE = nn.Sequential(nn.Linear(8, 8), nn.Linear(70_000, 70_000, device="meta"))
TOO_MANY = {
    "random": lambda: Topology.random((70_000, 70_000), 1, sparsity=0.1),
    "nnzb": lambda: Topology.random((70_000, 70_000), 1, nnzb=2**31),
    "linear": lambda: sk.SparseLinear(70_000, 70_000, sparsity=0.1),
    "conv": lambda: sk.SparseConv2d(30_000, 30_000, 3, sparsity=0.1),
    "recurrent": lambda: sk.SparseGRU(40_000, 40_000, sparsity=0.1),
    "sparsify_": lambda: sk.sparsify_(HUGE, distribution={"1": 0.1}, block={"0": 2}),
}


@pytest.mark.parametrize("make", TOO_MANY.values(), ids=TOO_MANY)
def test_more_blocks_than_int32_counts_are_refused_before_they_are_drawn(make):
    with (
        AllocationTracer() as tracer,
        pytest.raises(TopologyError, match="at most 2147483647 blocks can be active; .* would"),
    ):
        make()
    assert tracer.largest <= 64


def test_the_layer_with_too_many_blocks_is_named():
    with pytest.raises(TopologyError, match="layer '1': at most"):
        TOO_MANY["sparsify_"]()


def test_a_clone_does_not_change_with_the_layer():
    layer = sk.SparseLinear(16, 16, sparsity=0.5)
    shared, kept, before = layer.topology, layer.topology.clone(), layer.topology.positions()
    other = Topology.random((16, 16), nnzb=shared.nnzb)
    layer.rewire_(other, torch.full((other.nnzb,), -1), [layer.values])
    assert shared == layer.topology == other
    assert torch.equal(kept.validate().positions(), before)


def test_a_mask_of_nan_says_nothing():
    with pytest.raises(TopologyError, match="got NaN"):
        Topology.from_mask(torch.full((2, 3), float("nan")))
