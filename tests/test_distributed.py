"""DDP in all its options: the ranks decide together, and what they can't is said on all of them."""

import pytest
import torch
import torch.distributed as dist
from loops import METHODS, net
from processes import DiedError, FailedError, failure, free_port, ranks
from support import UNIT_ROUNDOFF
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sparsekern import sparse_layers
from sparsekern.errors import RankMismatchError, TrainingLoopError

STEPS = 9


def batch(i):
    g = torch.Generator().manual_seed(i)
    return torch.randn(16, 12, generator=g).double(), torch.randint(0, 8, (16,), generator=g)


def part_of(i, rank, world):
    return tuple(t.chunk(world)[rank] for t in batch(i))


def backward(model, data, parts=1):
    (F.cross_entropy(model(data[0]), data[1]) / parts).backward()


class Run:
    """A model, its optimizer and method, with or without DDP around it."""

    def __init__(self, method="rigl", hook=None, parts=1, **options):
        self.model = net().double()
        self.ddp, self.parts = self.model, parts
        if dist.is_initialized():
            self.ddp = DistributedDataParallel(self.model, **options)
            if hook is not None:
                self.ddp.register_comm_hook(*hook())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.method = METHODS[method](
            self.model, self.optimizer, t_end=100, update_freq=2, grad_accumulation=parts
        )
        self.layers = sparse_layers(self.model)

    def step(self, i, rank=0, world=1, change=None):
        self.optimizer.zero_grad()
        data = part_of(i, rank, world)
        for k in range(self.parts - 1):
            with self.ddp.no_sync():
                backward(self.ddp, [t.chunk(self.parts)[k] for t in data], self.parts)
        backward(self.ddp, [t.chunk(self.parts)[-1] for t in data], self.parts)
        if change is not None:
            change(self)
        self.optimizer.step()

    def train(self, rank=0, world=1, steps=range(STEPS)):
        for i in steps:
            self.step(i, rank, world)
        return self.result()

    def result(self):
        return {
            "digests": [layer.topology.digest() for layer in self.layers.values()],
            "weights": [layer.dense_weight() for layer in self.layers.values()],
            "updates": len(self.method.history),
        }


# ---- options


def fp16_hook():
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    return None, default_hooks.fp16_compress_hook


def power_sgd_hook():
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    state = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2)
    return state, powerSGD_hook.powerSGD_hook


EXACT = {
    "plain": {},
    "set": {"method": "set"},
    "static": {"method": "static"},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "no broadcast": {"broadcast_buffers": False},
    "micro-batches": {"parts": 2},
}
LOSSY = {"fp16": {"hook": fp16_hook}, "PowerSGD": {"hook": power_sgd_hook}}


def late(rank, world):
    """The method is made before there is a process group."""
    model = net().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = object.__new__(Run)
    dist.barrier()
    dist.destroy_process_group()
    method = METHODS["rigl"](model, optimizer, t_end=100, update_freq=2)
    where = f"tcp://127.0.0.1:{late.port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
    run.model, run.ddp, run.parts = model, DistributedDataParallel(model), 1
    run.optimizer, run.method, run.layers = optimizer, method, sparse_layers(model)
    return run.train(rank, world)


# ---- what ranks disagree about


def other_topology(run, seed):
    layer = run.layers["2"]
    topology = layer.topology
    g = torch.Generator().manual_seed(seed)
    positions, total = topology.positions(), topology.grid.total
    free = sorted(set(range(total)) - set(positions.tolist()))
    positions[int(torch.randint(len(positions), (), generator=g))] = free[seed % len(free)]
    moved = topology.with_positions(positions.sort().values)
    layer.rewire_(moved, torch.arange(topology.nnzb), [layer.values.data])


def disagreeing(name, rank, world):
    """What a rank is told where rank 1 is otherwise than rank 0."""
    torch.manual_seed(0)
    try:
        DISAGREE[name](rank, world)
    except (RankMismatchError, TrainingLoopError) as error:
        return type(error).__name__, str(error)
    return None


def other_steps(rank, world):
    run = Run()
    run.train(rank, world, range(3))
    if rank == 1:
        run.method.load_state_dict({"weight_steps": 7, "last_update": 3})
    run.train(rank, world, range(3, 6))


def frozen(rank, _):
    run = Run(find_unused_parameters=True)
    if rank == 1:
        run.layers["2"].values.requires_grad_(False)
    run.method.step() if run.method._ready() else None


def raising(rank, world):
    run = Run("set")
    if rank == 1:
        run.method.survivors = lambda *_: 1 / 0
    run.train(rank, world)


def passes(rank, world):
    run = Run()
    run.optimizer.zero_grad()
    for _ in range(1 + rank):
        with run.ddp.no_sync():
            backward(run.ddp, part_of(0, rank, world))
    run.optimizer.step()


def static_seeds(rank, _):
    model = net().double()
    run = object.__new__(Run)
    run.layers = sparse_layers(model)
    if rank == 1:
        other_topology(run, 0)
    METHODS["static"](model, torch.optim.SGD(model.parameters(), lr=0.1), t_end=100)


def static_save(rank, world):
    run = Run("static")
    run.train(rank, world, range(1))
    other_topology(run, 0)
    run.optimizer.state_dict()


def ddp_join(rank, world):
    run = Run()
    with run.ddp.join():
        run.train(rank, world, range(2))


DISAGREE = {
    "steps": other_steps,
    "frozen": frozen,
    "raising": raising,
    "passes": passes,
    "static at attach": static_seeds,
    "static at a save": static_save,
    "join of DDP alone": ddp_join,
}
TOLD = {
    "steps": ("RankMismatchError", "rank 1 stands at weight step"),
    "frozen": ("RankMismatchError", "rank 1 does not train layer '2'"),
    "raising": ("RankMismatchError", "rank 1 could not decide a topology update: ZeroDivision"),
    "passes": ("TrainingLoopError", "layer '0' saw 2 backward passes on rank 1"),
    "static at attach": ("RankMismatchError", "layer '2' has another topology on rank 1"),
    "static at a save": ("RankMismatchError", "layer '2' has another topology than the ranks"),
    "join of DDP alone": ("TrainingLoopError", "Join([ddp, method])"),
}


def uneven(method, rank, world):
    """Rank 1 has fewer inputs than rank 0."""
    from torch.distributed.algorithms.join import Join

    run = Run(method)
    with Join([run.ddp, run.method]):
        run.train(rank, world, range(STEPS if rank == 0 else STEPS - 4))
    return run.result()


# ---- in one go


def worker(rank, world, port):
    late.port = port

    def tried(work, *args, **options):
        try:
            return work(*args, rank, world, **options)
        except Exception as error:
            return failure(error)

    def trained(rank, world, **options):
        return Run(**options).train(rank, world)

    found = {n: tried(trained, **options) for n, options in (EXACT | LOSSY).items()}
    found |= {f"join {m}": tried(uneven, m) for m in ("rigl", "set")}
    found |= {name: tried(disagreeing, name) for name in DISAGREE}
    return found | {"late": tried(late)}


@pytest.fixture(scope="module")
def found():
    """What each of two ranks found, by scenario."""
    by_rank = ranks(worker, 2, free_port())

    def of(name):
        for told in by_rank.values():
            assert not isinstance(told, DiedError | FailedError), told
            assert not isinstance(told[name], FailedError), told[name]
        return [by_rank[rank][name] for rank in sorted(by_rank)]

    return of


def assert_close(one, other):
    # sums over 16 samples, in another order, at each step
    bound = 16 * STEPS * 64 * UNIT_ROUNDOFF[torch.float64]
    for a, b in zip(one["weights"], other["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EXACT, "late"])
def test_ranks_train_as_one_process_does(found, name):
    expected = Run(method=EXACT.get(name, {}).get("method", "rigl")).train()
    for one in found(name):
        assert one["updates"] == expected["updates"]
        assert one["digests"] == expected["digests"]
        assert_close(one, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSY)
def test_compressed_gradients_leave_the_ranks_equal(found, name):
    first, second = found(name)
    assert first["updates"] == second["updates"] >= 3
    assert first["digests"] == second["digests"]
    for a, b in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", DISAGREE)
def test_what_ranks_disagree_about_is_told_on_each(found, name):
    kind, text = TOLD[name]
    for told in found(name):
        assert told is not None
        assert told[0] == kind
        assert text in told[1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_a_rank_without_inputs_takes_part_in_updates(found, method):
    first, second = found(f"join {method}")
    assert first["updates"] == second["updates"] >= 3
    assert first["digests"] == second["digests"]
    for a, b in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(a, b)  # DDP's own hook hands them out at the end
