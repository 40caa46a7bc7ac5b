"""Which averages follow a model's topology updates, and what is refused."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from average_cases import DECAY, Run, averaged_like, dense, linear
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from sparsekern import SET, RigL, sparsify_
from sparsekern.errors import AverageError, DtypeError, SparseKernError, TopologyError
from sparsekern.nn import averaged
from sparsekern.swap import sparse_layers

# ---- who follows, and who does not


def test_a_copy_is_a_snapshot():
    run = Run()
    snapshot = copy.deepcopy(run.model)
    state = copy.deepcopy(snapshot.state_dict())
    kept = AveragedModel(run.model)  # an average that is there makes no difference
    run.train(kept)
    assert all(torch.equal(v, state[k]) for k, v in snapshot.state_dict().items())
    assert not averaged_like(run.model, snapshot)


def test_an_average_that_was_never_updated_follows():
    run = Run()
    average = AveragedModel(run.model)
    run.step(7)
    assert int(average.n_averaged) == 0
    assert averaged_like(run.model, average)
    average.update_parameters(run.model)
    assert all(map(torch.equal, dense(average).values(), dense(run.model).values()))


def test_averages_made_before_the_method():
    first = Run(method="static")
    average = AveragedModel(first.model, avg_fn=get_ema_avg_fn(DECAY))
    run = Run(model=first.model)
    assert averaged_like(run.model, run.train(average))


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [Wrapped, lambda m: torch.compile(m, backend="eager")])
def test_averages_of_wrapped_models(wrap):
    run = Run()
    wrapped = wrap(run.model)
    average = AveragedModel(wrapped, avg_fn=get_ema_avg_fn(DECAY))
    for _ in range(8):
        run.step()
        average.update_parameters(wrapped)
    assert averaged_like(run.model, average)


def test_averages_of_averages():
    run = Run()
    average = AveragedModel(run.model, avg_fn=get_ema_avg_fn(DECAY))
    second = AveragedModel(average.module, avg_fn=get_ema_avg_fn(DECAY))
    for _ in range(8):
        run.step()
        average.update_parameters(run.model)
        second.update_parameters(average.module)
    assert averaged_like(run.model, average)
    assert averaged_like(run.model, second)


def test_two_copies_of_a_model_have_averages_of_their_own():
    first = Run()
    second = Run(model=copy.deepcopy(first.model), method="set")
    averages = [AveragedModel(run.model, avg_fn=get_ema_avg_fn(DECAY)) for run in (first, second)]
    for _ in range(3):
        for run, average in zip((first, second), averages, strict=True):
            run.train(average, 4)
    assert averaged_like(first.model, averages[0])
    assert averaged_like(second.model, averages[1])
    assert not averaged_like(first.model, averages[1])


def test_an_average_of_a_copy_that_is_gone_or_left_hinders_nobody():
    run = Run()
    other = Run(model=copy.deepcopy(run.model))
    result = other.train(AveragedModel(other.model, avg_fn=get_ema_avg_fn(DECAY)), 5)
    state = copy.deepcopy(result.state_dict())
    del other
    gc.collect()
    run.step(7)
    assert len(run.method.history) == 2
    assert all(torch.equal(v, state[k]) for k, v in result.state_dict().items())


def named(package, name, place):
    """A class as another package would have it."""

    def init(self, model):
        nn.Module.__init__(self)
        setattr(self, place, copy.deepcopy(model))

    return type(name, (nn.Module,), {"__init__": init, "__module__": package})


@pytest.mark.parametrize(
    ("package", "name", "place"),
    [
        ("ema_pytorch.ema_pytorch", "EMA", "ema_model"),
        ("timm.utils.model_ema", "ModelEmaV2", "module"),
        ("timm.utils.model_ema", "ModelEmaV3", "module"),
    ],
)
def test_averages_of_other_packages_are_known(package, name, place):
    run = Run()
    average = named(package, name, place)(run.model)
    subclass = type("Mine", (type(average),), {})(run.model)
    run.step(4)
    assert averaged_like(run.model, average)
    assert averaged_like(run.model, subclass)


def test_an_average_of_state_dict_entries():
    """timm's ModelEmaV2 averages whatever a state dict holds."""
    run = Run()
    average = named("timm.utils.model_ema", "ModelEmaV2", "module")(run.model)
    for _ in range(8):
        run.step()
        with torch.no_grad():
            states = average.module.state_dict(), run.model.state_dict()
            pairs = zip(*(state.values() for state in states), strict=True)
            for mine, theirs in pairs:
                mine.copy_(mine * DECAY + theirs * (1 - DECAY))
    assert averaged_like(run.model, average)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_average_may_have_another_dtype(dtype):
    run = Run()
    average = AveragedModel(run.model).to(dtype)
    run.step(4)
    assert averaged_like(run.model, average)
    assert {layer.values.dtype for layer in sparse_layers(average).values()} == {dtype}


# ---- what is refused


def test_an_average_with_other_connections_is_refused_before_anything_changes():
    run = Run()
    average = run.train(AveragedModel(run.model), 2)
    run.model.load_state_dict(Run(seed=3).model.state_dict())
    run.step(2)
    state = copy.deepcopy(run.model.state_dict())
    with pytest.raises(AverageError, match="layer '0' of the model's AveragedModel can't follow"):
        run.step()
    now = run.model.state_dict()
    assert all(
        torch.equal(now[k], v)
        for k, v in state.items()
        if k in dict(run.model.named_parameters())
        or (not v.is_floating_point() and "tracked" not in k)
    )
    assert len(run.method.history) == 1
    del average
    run.step()
    assert len(run.method.history) == 2


def test_an_average_of_another_model_object_is_told_and_refused(caplog):
    run = Run()
    other = pickle.loads(pickle.dumps(run.model))
    average = AveragedModel(other)
    del other
    average.update_parameters(run.model)
    run.step()
    assert "is no copy of its layer" in caplog.text
    average.module(torch.randn(run.shape))  # as it was, as long as nobody writes to it
    average.update_parameters(run.model)
    with pytest.raises(AverageError, match="mix weights of different connections"):
        average.module(torch.randn(run.shape))
    with pytest.raises(AverageError, match="mix weights"):
        run.step(4)
    assert len(run.method.history) == 1
    follower = AveragedModel(pickle.loads(pickle.dumps(run.model)))
    del average
    run.method.follow(follower)
    run.step(4)
    assert len(run.method.history) == 2
    assert averaged_like(run.model, follower)


def test_following_what_is_named():
    run = Run()
    plain = copy.deepcopy(run.model)
    run.method.follow(plain)
    run.method.follow(plain)  # once or twice
    held = Wrapped(Wrapped(pickle.loads(pickle.dumps(run.model))))
    run.method.follow(held)
    gone = weakref.ref(held)
    run.step(4)
    assert averaged_like(run.model, plain)
    assert averaged_like(run.model, held)
    del held
    gc.collect()
    assert gone() is None
    run.step(4)
    assert averaged_like(run.model, plain)
    run.method.follow(copy.deepcopy(run.model))
    assert [item.average for item in run.method.followed] == [plain, plain, None]


def test_a_copied_method_leaves_the_average_alone():
    run = Run()
    plain = copy.deepcopy(run.model)
    run.method.follow(plain)
    (item,) = copy.deepcopy(run.method.followed)
    assert item.average is None
    assert pickle.loads(pickle.dumps(item)).average is None
    both = copy.deepcopy([plain, run.method.followed])
    assert both[1][0].average is both[0]


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda m: [p.clone() for p in m.parameters()], DtypeError, "must be a module .* got list"),
        (lambda m: m, AverageError, "layer '0' of `average` is the model's own"),
        (
            lambda m: m[:2],
            AverageError,
            "no sparse layer that is '0'|no sparse layer that is '3'|model's own",
        ),
        (lambda m: copy.deepcopy(m)[:2], AverageError, "no sparse layer that is '3' of the model"),
        (lambda _: Run(seed=7).model, AverageError, "layer '0' .* it holds other connections"),
        (lambda _: linear(), AverageError, "no sparse layer that is '0'"),
        (lambda m: copy.deepcopy(m).to("meta"), AverageError, "on the meta device"),
        (lambda _: Run(block=2).model, AverageError, "must have shape and values of shape"),
    ],
)
def test_what_can_not_follow_is_refused(make, error, text):
    run = Run()
    average = make(run.model)
    with pytest.raises(error, match=text) as info:
        run.method.follow(average)
    assert isinstance(info.value, SparseKernError)
    assert not run.method.followed


def test_a_spoiled_copy_is_not_mended():
    """Only what is averaged: anybody else's writes are an error as before."""
    run = Run()
    plain = copy.deepcopy(run.model)
    plain[0].col.zero_()
    with pytest.raises(TopologyError):
        plain(torch.randn(run.shape))


# ---- what it costs


def test_copies_keep_no_layer_alive():
    run = Run()
    average = run.train(AveragedModel(run.model), 4)
    run.method.detach()
    snapshot = copy.deepcopy(run.model)
    gone = [weakref.ref(layer) for layer in sparse_layers(run.model).values()]
    del run
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert averaged_like(average.module, average)
    assert len(sparse_layers(snapshot)) == 2


def test_averages_are_looked_for_only_after_a_layer_was_made(monkeypatch):
    run = Run()
    run.step(4)
    looked = []
    original = averaged._containers
    monkeypatch.setattr(averaged, "_containers", lambda: looked.append(1) or original())
    run.step(9)
    assert not looked
    average = AveragedModel(run.model)
    run.train(average, 8)
    assert len(looked) == 1
    assert averaged_like(run.model, average)


def sparse_linear():
    torch.manual_seed(0)
    return sparsify_(linear(), 0.6, distribution="uniform").eval()


@pytest.mark.parametrize("kind", ["torch", "named"])
@pytest.mark.parametrize("method", [RigL, SET])
def test_an_average_that_is_copied_with_its_model_follows_the_copy(method, kind):
    def made():
        model = sparse_linear()
        optimizer = torch.optim.Adam(model.parameters())
        attached = method(model, optimizer, t_end=100, update_freq=2)
        if kind == "torch":
            return model, optimizer, attached, AveragedModel(model, avg_fn=get_ema_avg_fn(DECAY))
        average = copy.deepcopy(model)
        attached.follow(average)
        return model, optimizer, attached, average

    def train(model, optimizer, _, average, steps):
        width = next(iter(sparse_layers(model).values())).matrix_shape[1]
        for i in steps:
            optimizer.zero_grad()
            x = torch.randn(16, width, generator=torch.Generator().manual_seed(i))
            model(x).square().mean().backward()
            optimizer.step()
            if kind == "torch":
                average.update_parameters(model)
                continue
            with torch.no_grad():
                for own, new in zip(average.parameters(), model.parameters(), strict=True):
                    own.lerp_(new, 0.1)

    first = made()
    train(*first, range(4))
    second = copy.deepcopy(first)
    train(*second, range(4, 9))
    train(*first, range(4, 9))
    assert len(first[2].history) == len(second[2].history) > 2
    for one, other in ((first[0], second[0]), (first[3], second[3])):
        pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    if kind == "named":
        again = pickle.loads(pickle.dumps(first))
        assert again[2].followed[0].average is again[3]


def test_an_average_of_a_model_that_loaded_other_connections_is_refused():
    model, other = sparse_linear(), sparse_linear()
    for layer in sparse_layers(other).values():
        old = layer.topology
        cells = old.block_rows * old.block_cols
        topology = old.with_positions(torch.arange(cells - old.nnzb, cells))
        layer.rewire_(topology, torch.full((old.nnzb,), -1), [layer.values])
    own, average = copy.deepcopy(model.state_dict()), AveragedModel(model)
    average.update_parameters(model)
    model.load_state_dict(other.state_dict())
    model.load_state_dict(own)  # there and back
    average.update_parameters(model)
    x = torch.randn(2, next(iter(sparse_layers(model).values())).matrix_shape[1])
    average(x)
    model.load_state_dict(other.state_dict())
    average(x)  # as it was
    average.update_parameters(model)
    with pytest.raises(AverageError, match="took over the connections"):
        average(x)
