"""No kernel reads index arrays that were not validated, whoever wrote to a layer's buffers."""

import copy
import os
import pickle
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from call_cases import LAYERS, Watching, changed, made, step
from torch import nn

import sparsekern as sk
from sparsekern import Topology, ops
from sparsekern.ops import library

every = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture
def validations(monkeypatch):
    """Topologies that were validated."""
    found, original = [], Topology.validate
    monkeypatch.setattr(Topology, "validate", lambda t: found.append(t) or original(t))
    return found


# ---- what reaches a kernel


def every_array(change):
    """Apply a change to all index arrays of a module, in place of its buffers."""

    def run(layer):
        for module in layer.modules():
            for name in [n for n in ops.library.ARRAY_NAMES if n in module._buffers]:
                change(module, name)

    return run


def ema(layer):
    """What an average of a model with itself does to ints: it rounds down."""
    every_array(lambda m, n: m._buffers[n].copy_(m._buffers[n] * 0.9 + m._buffers[n] * 0.1))(layer)


def replaced(make):
    return every_array(lambda m, n: m._buffers.__setitem__(n, make(m._buffers[n])))


def strided(array):
    wide = torch.full((array.numel(), 2), 10**8, dtype=torch.int32)
    wide[:, 0] = array
    return wide[:, 0]


def garbage(array):
    return torch.full_like(array, 0x7F7F7F7F)


def no_storage(layer):
    """`to_empty` on memory that holds something else."""
    layer._apply(lambda t: torch.full_like(t, 0x7F7F7F7F if not t.is_floating_point() else 0))


BROKEN = {
    "averaged": ema,
    "in place": every_array(lambda m, n: m._buffers[n].copy_(m._buffers[n].flip(0).neg())),
    "one entry": every_array(lambda m, n: n == "col" and m._buffers[n][-1:].fill_(10**8)),
    "float64": replaced(lambda a: a.double()),
    "int64": replaced(lambda a: a.long()),
    "strided": replaced(strided),
    "garbage": replaced(garbage),
    "uninitialised": no_storage,
    "short": replaced(lambda a: a[:-1]),
    "a matrix": replaced(lambda a: a[None]),
}


@every
@pytest.mark.parametrize("impl", [None, "dense", "masked"])
@pytest.mark.parametrize("case", BROKEN)
def test_no_kernel_gets_what_is_no_topology(name, impl, case):
    layer, x = made(name, impl=impl)
    step(layer, x)
    BROKEN[case](layer)
    for watcher in (nullcontext, Watching):
        # arrays that are too short do not fit the values either, which operators see first
        with watcher(), pytest.raises((sk.errors.TopologyError, sk.errors.ShapeError)):
            layer(x)
    assert "no topology" in repr(layer)


@pytest.mark.parametrize("case", ["one entry", "garbage", "strided", "int64"])
def test_nor_a_compiled_one(case):
    layer, x = made("linear")
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    run(x)
    BROKEN[case](layer)
    with pytest.raises(sk.errors.TopologyError):
        run(x)


@every
@pytest.mark.parametrize(
    "cast",
    [
        lambda layer: layer.type(torch.float64),
        lambda layer: layer._apply(lambda t: t.double()),
        lambda layer: layer.double(),
        lambda layer: layer.half().double(),
    ],
)
def test_casts_leave_index_arrays_alone(name, cast):
    layer, x = made(name)
    before = {n: b for n, b in layer.named_buffers() if b.dtype == torch.int32}
    y = cast(layer)(x.double())
    assert (y[0] if isinstance(y, tuple) else y).dtype is torch.float64
    assert all(torch.equal(b, before[n]) for n, b in layer.named_buffers() if n in before)
    assert all(b.dtype == torch.int32 for n, b in layer.named_buffers() if n in before)


@pytest.mark.parametrize("change", ["shape", "dtype", "device", "no tensor"])
def test_a_topology_made_by_hand_is_validated_before_its_first_product(change):
    t = Topology.random((8, 8), sparsity=0.5)
    x, values = torch.randn(2, 8), torch.randn(t.values_shape)
    arrays = list(t.arrays)
    arrays[1] = {
        "shape": torch.full_like(t.col, 99),
        "dtype": t.col.long(),
        "device": t.col.to("meta"),
        "no tensor": t.col.tolist(),
    }[change]
    with pytest.raises((sk.errors.SparseKernError, AttributeError, TypeError)):
        ops.spmm(x, values, t.with_arrays(arrays))
    if change == "shape":
        for call in (
            lambda bad: ops.spmm(x, values, bad),
            lambda bad: ops.spmm_t(x, values, bad),
            lambda bad: ops.sddmm(x, x, bad),
            lambda bad: ops.grow_scores(x, x, bad, 2),
            lambda bad: sk.SparseLinear(8, 8, topology=bad),
            lambda bad: library.spmm(x, values, None, *library.parts(bad), False, "cpu"),
        ):
            with pytest.raises(sk.errors.TopologyError, match=r"`col` must lie in \[0, 8\)"):
                call(t.with_arrays(arrays))


def test_arrays_are_validated_once(validations):
    t = Topology.random((8, 8), sparsity=0.5)
    x, values = torch.randn(2, 8), torch.randn(t.values_shape)
    ops.spmm(x, values, t)
    assert not validations  # it made them itself
    other = t.with_arrays([a.clone() for a in t.arrays])
    for _ in range(3):
        ops.spmm(x, values, other)
        library.spmm(x, values, None, *library.parts(other), False, "cpu")
        ops.spmm(x, values, t.with_arrays(other.arrays))
    assert len(validations) == 1
    other.col.copy_(other.col.clone())
    ops.spmm(x, values, other)
    assert len(validations) == 2
    # those of a topology that is gone are still known; of tensors that are gone, nothing is
    parts = library.parts(other)
    del other
    library.spmm(x, values, None, *parts, False, "cpu")
    assert len(validations) == 2


def test_exported_programs_validate_their_arrays_once(validations):
    layer, x = made("linear")
    program = torch.export.export(layer, (x,)).module()
    want = layer(x)
    del layer
    validations.clear()
    for _ in range(3):
        assert torch.equal(program(x), want)
    assert len(validations) <= 1


@every
def test_a_layer_hands_out_one_topology_until_it_changes(name, validations):
    layer, x = made(name)
    held = layer if name != "gru" else layer.hh_l0
    first = held.topology
    step(layer, x)
    assert held.topology is first
    assert not validations
    held.rewire_(first, torch.arange(first.nnzb), [held.values.data])
    assert held.topology is not first
    assert not validations  # our own writes are trusted
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.load_state_dict(state)
    checked = len(validations)  # what came
    step(layer, x)
    layer.load_state_dict(state, assign=True)
    step(layer, x)
    assert len(validations) == 2 * checked or name == "gru"


def test_what_is_derived_does_not_outlive_a_write():
    t = Topology.random((8, 8), sparsity=0.5)
    object.__setattr__(t, "_plan", "of the arrays as they are")
    t.known()
    assert t._plan
    t.col.copy_(t.col.clone())
    t.known()
    assert not hasattr(t, "_plan")
    assert not hasattr(pickle.loads(pickle.dumps(t)), "_plan")


@every
def test_copies_are_known_for_themselves(name, validations):
    layer, x = made(name)
    want = step(layer, x)
    copied, unpickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    assert all(map(torch.equal, step(copied, x), want))  # compared with what it was made of
    changed(copied)
    before = len(validations)
    assert all(map(torch.equal, step(unpickled, x), want))
    assert len(validations) > before
    changed(unpickled)
    assert not any(v is layer for v in validations)
    assert all(map(torch.equal, step(layer, x), want))


@pytest.fixture
def swapping():
    """torch swaps tensors where it copies else."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@every
@pytest.mark.usefixtures("swapping")
def test_tensors_may_be_swapped(name):
    (layer, x), (other, _) = made(name), made(name)
    step(layer, x)
    held = layer.topology if hasattr(layer, "topology") else None
    layer.load_state_dict(other.state_dict())
    assert all(map(torch.equal, step(layer, x), step(other, x)))
    assert held is None or held.known() is not None
    layer.double().float()
    assert all(map(torch.equal, step(layer, x), step(other, x)))


# ---- on request, at each use


EACH_TIME = """
import sys
sys.path.insert(0, "tests")
import torch
from call_cases import LAYERS, made, step
import sparsekern as sk

for name in LAYERS:
    for write in (lambda a: a.data.fill_(10**8), lambda a: a.numpy().fill(-5)):
        layer, x = made(name)
        step(layer, x)
        write((layer if hasattr(layer, "col") else layer.hh_l0).col)
        try:
            step(layer, x)
        except sk.errors.TopologyError as error:
            print(str(error).split(" in ")[0])
model = torch.nn.Sequential(torch.nn.Linear(16, 16))
sk.sparsify_(model, 0.5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
method = sk.RigL(model, optimizer, t_end=100, update_freq=1)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(4, 16)).sum().backward()
    optimizer.step()
print(len(method.history))
"""


def test_each_use_may_be_validated():
    found = subprocess.run(
        [sys.executable, "-c", EACH_TIME],
        env=os.environ | {"SPARSEKERN_CHECK": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split("\n") == ["`col` must lie"] * 2 * len(LAYERS) + ["2", ""]


def test_a_forged_pickle_is_found():
    layer, x = made("linear")
    forged = copy.deepcopy(layer)
    state = pickle.loads(pickle.dumps(layer)).__getstate__()
    state["_buffers"]["col"] = torch.full_like(layer.col, 99)
    forged.__setstate__(state)
    with pytest.raises(sk.errors.TopologyError, match="col"):
        forged(x)


@every
def test_inference_mode(name, validations):
    """Its tensors count no writes; index arrays made there do."""
    with torch.inference_mode():
        layer, x = made(name)
        y = layer(x)
        assert not any(b.is_inference() for b in layer.buffers())
        assert not validations
        copied = copy.deepcopy(layer)
        z = copied(x)
        assert not any(b.is_inference() for b in copied.buffers())
        first, second = (t[0] if isinstance(t, tuple) else t for t in (y, z))
        assert torch.equal(first, second)
        every_array(lambda m, n: m._buffers[n].fill_(10**6))(copied)
        with pytest.raises(sk.TopologyError):
            copied(x)


def test_arrays_of_inference_mode_are_validated_each_time(validations):
    t = Topology.random((8, 8), sparsity=0.5)
    with torch.inference_mode():
        t = t.with_arrays([a.clone() for a in t.arrays])
        x, values = torch.randn(2, 8), torch.randn(t.values_shape)
        for n in range(1, 4):
            ops.spmm(x, values, t)
            assert len(validations) == n
        t.col.fill_(99)
        with pytest.raises(sk.errors.TopologyError):
            ops.spmm(x, values, t)


def test_a_strided_state_is_copied_but_not_taken_over():
    layer, x = made("linear")
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    state["col"] = strided(state["col"])
    other = sk.SparseLinear(33, 50, sparsity=0.6)
    with pytest.raises(sk.errors.TopologyError, match="`col` must be contiguous; got stride 2"):
        other.load_state_dict(state, assign=True)
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))


def test_shapes_are_still_checked():
    layer, x = made("linear")
    with pytest.raises(sk.errors.DtypeError, match="`x` must have dtype"):
        layer(x.double())
    layer.values = nn.Parameter(layer.values[:-1].detach())
    with pytest.raises(sk.errors.ShapeError, match="`values` must have shape"):
        layer(x)
