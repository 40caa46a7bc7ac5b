"""`plan`: what it decides, what it counts, and that `sparsify_` does what it says."""

import copy
import csv
import io
import json
import math

import pytest
import torch
from planning_models import Mixed, images
from torch import nn

import sparsekern as sk
from sparsekern.cost import cpu_rates
from sparsekern.cost.held import held_bytes
from sparsekern.cost.predict import CudaTimes, predictor
from sparsekern.errors import ConfigError, DtypeError, ModelError
from sparsekern.ops.crossover import covers
from sparsekern.planning.examine import examine
from sparsekern.planning.share import LEAST_SHARE


def wide(device=None):
    """Two layers that gain by sparsity, and a small one that does not."""
    return nn.Sequential(
        nn.Linear(1024, 1024, device=device),
        nn.ReLU(),
        nn.Linear(1024, 1024, device=device),
        nn.Linear(1024, 8, device=device),
    )


def meta(make):
    with torch.device("meta"):
        return make()


def check_counts(plan, model, inputs=None):
    """Counts, bytes and sparsities after `sparsify_` and a step are those of the plan."""
    sk.sparsify_(model, **plan.arguments)
    layers = sk.sparse_layers(model)
    for row in plan.rows:
        parts = {n: layers[n] for n in row.shapes if n in layers}
        assert set(parts) == {name for name, s in row.sparsities.items() if s > 0}
        assert all(part.block == pair(row.block) for part in parts.values())
        dense = sum(math.prod(s) for name, s in row.shapes.items() if name not in parts)
        assert row.active == dense + sum(part.nnz for part in parts.values())
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4, 1024) if inputs is None else inputs).sum().backward()
    optimizer.step()
    held = held_bytes(model, optimizer)
    steps = 4 * len(optimizer.state)  # AdamW's counters
    assert plan.totals.bytes == held.total - steps


def pair(block):
    return (block, block) if isinstance(block, int) else block


# ---- what sparsify_ makes of it


@pytest.mark.parametrize("distribution", ["erk", "er", "uniform"])
@pytest.mark.parametrize(
    "asked",
    [{"sparsity": 0.9}, {"sparsity": 0.0}, {"budget": sk.Budget(flops=0.3)}],
    ids=["sparse", "dense", "budget"],
)
def test_sparsify_does_what_the_plan_says(distribution, asked):
    plan = sk.plan(Mixed(), images(), distribution=distribution, **asked)
    check_counts(plan, Mixed(), images())


@pytest.mark.parametrize("blocks", [(1,), (16,), ((8, 24),), (1, (16, 8), 32)])
def test_blocks_of_any_kind(blocks):
    plan = sk.plan(Mixed(), images(), sparsity=0.8, blocks=blocks)
    allowed = {*blocks, None}
    assert {row.block for row in plan.rows} <= allowed
    assert all({o.block for o in row.options} <= allowed for row in plan.rows)
    assert any(row.block is not None for row in plan.rows)
    check_counts(plan, Mixed(), images())


def test_a_filter_goes_into_the_arguments():
    plan = sk.plan(wide(), torch.ones(64, 1024), sparsity=0.5, filter_fn=lambda _, n: n != "0")
    assert [row.name for row in plan.rows] == ["2", "3"]
    check_counts(plan, wide())
    assert "lambda" in plan.to_dict()["arguments"]["filter_fn"]


def test_excluded_layers_have_no_row_and_stay_dense():
    model = wide()
    plan = sk.plan(model, torch.ones(64, 1024), sparsity=0.5, exclude=("0",))
    assert [row.name for row in plan.rows] == ["2", "3"]
    sk.sparsify_(model, **plan.arguments)
    assert isinstance(model[0], nn.Linear)


def test_a_weight_that_is_not_trained_has_no_gradient_and_no_state():
    model = wide()
    whole = sk.plan(model, torch.ones(64, 1024), sparsity=0.0).totals.bytes
    model[0].requires_grad_(False)
    part = sk.plan(model, torch.ones(64, 1024), sparsity=0.0).totals.bytes
    assert whole - part == 3 * 4 * (1024 * 1024 + 1024)


def test_the_model_is_not_changed():
    model = Mixed().train()
    before = copy.deepcopy(model.state_dict())
    sk.plan(model, images(), sparsity=0.9)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_meta_model_has_the_same_plan():
    real = sk.plan(Mixed(), images(), sparsity=0.9)
    assert sk.plan(meta(Mixed), images("meta"), sparsity=0.9).to_dict() == real.to_dict()


# ---- decisions


def test_a_layer_that_is_faster_dense_stays_dense_and_others_take_its_share():
    plan = sk.plan(wide(), torch.ones(32, 1024), sparsity=0.9, distribution="uniform")
    first, second, small = plan.rows
    assert small.block is None
    assert small.why.startswith("dense is faster: ")
    assert small.sparsities == {"3": 0.0}
    assert small.active == small.weights
    assert first.sparsities["0"] == second.sparsities["2"] > 0.9
    blocks = max(pair(first.block)) ** 2 + max(pair(second.block)) ** 2
    size = plan.totals.weights
    assert abs(plan.totals.active - 0.1 * size) <= blocks
    assert small.seconds == small.dense_seconds
    assert all(row.seconds < row.dense_seconds for row in (first, second))


def test_a_layer_stays_sparse_where_the_others_would_be_starved():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    plan = sk.plan(model, torch.ones(1, 8), sparsity=0.5, distribution="uniform")
    assert all(row.seconds > row.dense_seconds for row in plan.rows)
    for row in plan.rows:
        assert row.fastest is None
        assert row.block is not None
        assert "the other layers would have to give up more than 50%" in row.why
    assert plan.totals.active == 64


def test_no_layer_loses_more_than_its_least_share():
    model = nn.Sequential(*(nn.Linear(w, w) for w in (16, 24, 32, 48, 512)))
    for made in model:
        made.forward = lambda x, made=made: torch.nn.functional.linear(
            x.new_ones(256, made.in_features), made.weight
        )
    alone = sk.plan(model, torch.ones(4, 16), sparsity=0.95, distribution="uniform", blocks=(1,))
    shares = [max(row.sparsities.values()) for row in alone.rows if row.block is not None]
    assert alone.rows[0].block is None
    assert all(1 - share >= LEAST_SHARE * 0.05 for share in shares)


def test_sparsity_0_leaves_everything_dense():
    plan = sk.plan(wide(), torch.ones(8, 1024), sparsity=0.0, distribution="uniform")
    assert all(row.block is None for row in plan.rows)
    assert {row.why for row in plan.rows} == {"its share under 'uniform' is all of its weights"}
    assert plan.totals.flops == plan.totals.dense_flops
    assert plan.totals.bytes == plan.totals.dense_bytes
    assert "all 3 layers: left dense" in str(plan)


def test_the_recommended_block_has_the_least_time():
    plan = sk.plan(wide(), torch.ones(512, 1024), sparsity=0.9)
    for row in plan.rows:
        if row.block is not None:
            assert row.seconds == min(option.seconds for option in row.options)


def test_layers_left_out_of_account():
    plan = sk.plan(Mixed(), images(), sparsity=0.9, blocks=(32,))
    rows = {row.name: row for row in plan.rows}
    assert rows["unused"].why == "the model never calls it on the example inputs"
    assert (rows["unused"].inputs, rows["unused"].dense_seconds) == ((), None)
    assert rows["stem"].why == "no block fits its 32 x 3 channels"
    assert rows["grouped"].why == "no block fits its 32 x 16 channels"
    assert "depthwise" not in rows
    check_counts(plan, Mixed(), images())


@pytest.mark.parametrize("sparsity", [0.5, 0.97, 0.999999])
def test_a_grouped_convolution_keeps_a_block_in_each_group(sparsity):
    model = nn.Sequential(nn.Conv2d(64, 64, 1, groups=4), nn.Conv2d(64, 256, 3))
    plan = sk.plan(
        model,
        torch.ones(2, 64, 8, 8),
        sparsity=sparsity,
        blocks=(8,),
        distribution="uniform",
        filter_fn=lambda *_: True,
    )
    check_counts(plan, copy.deepcopy(model), torch.ones(2, 64, 8, 8))
    grouped = plan.rows[0]
    assert grouped.active >= 4 * 64
    if sparsity > 0.99:
        assert grouped.active == 4 * 64


def test_a_group_of_one_block_stays_dense():
    model = nn.Sequential(nn.Conv2d(64, 64, 1, groups=4), nn.Conv2d(64, 256, 3))
    plan = sk.plan(model, torch.ones(2, 64, 8, 8), sparsity=0.9, blocks=(16,))
    assert plan.rows[0].block is None
    check_counts(plan, model, torch.ones(2, 64, 8, 8))


def test_calls_and_shapes_of_every_kind_of_layer():
    found = examine(Mixed(), images(), "erk", None, ())
    uses = {layer.name: layer.uses for layer in found.layers}
    assert [(u.tokens, u.steps, u.dx) for u in uses["stem"]] == [(4 * 15 * 15, 0, False)]
    assert [(u.tokens, u.steps, u.dx) for u in uses["grouped"]] == [(4 * 7 * 7, 0, True)]
    assert [(u.tokens, u.steps) for u in uses["gru"]] == [(4 * 21, 2 * 21)]
    assert [(u.tokens, u.steps) for u in uses["cell"]] == [(4, 1)]
    assert uses["unused"] == ()
    assert [u.states for u in uses["gru"]] == [4 * 20]  # the first state is no result
    own = sum(p.step_flops(u, p.size) for la in found.layers for u in la.uses for p in la.parts)
    depthwise = 6 * 4 * 5 * 5 * 64 * 9
    assert found.step_flops == own + depthwise


def test_packed_sequences_count_what_they_hold():
    model = nn.Sequential(nn.LSTM(16, 16))
    packed = nn.utils.rnn.pack_sequence([torch.ones(5, 16), torch.ones(3, 16)])
    (layer,) = examine(model, (packed,), "erk", None, ()).layers
    assert [(use.tokens, use.steps, use.shape) for use in layer.uses] == [(8, 5, (8, 16))]


def test_a_layer_called_twice_counts_twice():
    shared = nn.Linear(64, 64)
    (row,) = sk.plan(nn.Sequential(shared, nn.ReLU(), shared), torch.ones(8, 64), sparsity=0.5).rows
    assert row.inputs == ((8, 64), (8, 64))
    assert row.dense_flops == (2 + 3) * 2 * 8 * 64 * 64  # the first input needs no gradient


def test_one_pattern_excludes_as_several_do():
    options = {"sparsity": 0.5}
    one = sk.plan(wide(), torch.ones(4, 1024), exclude="0", **options)
    assert one == sk.plan(wide(), torch.ones(4, 1024), exclude=("0",), **options)


# ---- break-even


def test_break_even_is_where_the_best_block_takes_as_long_as_dense():
    times = predictor(torch.device("cpu"))
    (layer, *_) = examine(wide(), torch.ones(512, 1024), "erk", None, ()).layers
    even = times.break_even(layer, [(1, 1)]).density
    assert 0 < even < 1

    def faster(density):
        return times.sparse(layer, (1, 1), [1 - density]).seconds <= times.dense(layer)

    assert faster(even * 0.999)
    assert not faster(even * 1.001)
    best = times.break_even(layer, [(1, 1), (64, 64)]).density
    assert best == max(even, times.break_even(layer, [(64, 64)]).density)


def test_a_tiny_layer_never_breaks_even():
    plan = sk.plan(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.ones(1, 4), sparsity=0.5)
    assert [row.break_even.density for row in plan.rows] == [0.0, 0.0]


# ---- predictions


def test_the_table_agrees_with_the_measured_layers_it_came_from():
    """4096 x 1024, 512 tokens, density 0.1: sparse was 1.8 to 4.7 times as fast, larger faster."""
    model = nn.Sequential(nn.Linear(1024, 4096))
    x = torch.ones(512, 1024, requires_grad=True)
    (row,) = sk.plan(model, x, sparsity=0.9, blocks=(1, 4, 16, 32, 64, 128)).rows
    seconds = [option.seconds for option in row.options]
    assert seconds == sorted(seconds, reverse=True)
    assert 1 < row.dense_seconds / seconds[0] < row.dense_seconds / seconds[-1]


@pytest.mark.parametrize("kind", cpu_rates.FIXED)
def test_rates_are_complete_and_never_above_dense(kind):
    rates = cpu_rates.RATES[kind]
    assert 1 in rates.sparse
    assert all(0 < rate <= rates.dense for rate in rates.sparse.values())


def test_more_threads_are_predicted_to_be_faster(monkeypatch):
    plans = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        plans.append(sk.plan(wide(), torch.ones(512, 1024), sparsity=0.9))
    one, two = (plan.totals for plan in plans)
    assert one.dense_seconds > two.dense_seconds > one.dense_seconds / 2
    assert "1 thread" in plans[0].rows[0].source
    assert "2 threads" in plans[1].rows[0].source


def test_a_prediction_says_what_it_is_made_from(monkeypatch):
    assert "cpu_rates.py" in sk.plan(wide(), torch.ones(1, 1024), sparsity=0.9).rows[0].source
    double = sk.plan(wide().double(), torch.ones(1, 1024).double(), sparsity=0.9)
    assert "float32, not float64" in double.rows[0].source
    monkeypatch.setattr("sparsekern.cost.predict.has_numba", lambda: False)
    plan = sk.plan(wide(), torch.ones(1, 1024), sparsity=0.9)
    assert "numba, which is not installed here" in str(plan)


@pytest.mark.parametrize("name", [None, "NVIDIA H200", "Some GPU"])
def test_a_gpu_is_predicted_by_the_roofline_model(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    model = meta(lambda: nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(2))).bfloat16())
    x = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta").requires_grad_()
    plan = sk.plan(model, x, sparsity=0.9, device="cuda", distribution="uniform")
    row, roofline = plan.rows[0], CudaTimes.here().roofline
    assert "roofline model of NVIDIA H200" in row.source
    assert ("Some GPU" in row.source) == (name == "Some GPU")
    assert ("no GPU is here" in row.source) == (name is None)
    assert row.block == 128
    ratios = {o.block: row.dense_seconds / o.seconds for o in row.options}
    # 1 is above its entry of the crossover table: computed densely
    assert ratios[1] == 1
    assert round(ratios[64], 1) == 6.3
    assert roofline.device.name == "NVIDIA H200"


def test_a_gpu_computes_dense_what_its_kernels_do_not_cover():
    model = meta(lambda: nn.Sequential(*(nn.Linear(512, 512) for _ in range(2))).bfloat16())
    x = torch.empty(512, 512, dtype=torch.bfloat16, device="meta")
    plan = sk.plan(model, x, sparsity=0.9, device="cuda", blocks=(8, (16, 20)))
    for row in plan.rows:
        assert row.why == "computed from a dense weight at this density: it saves memory, not time"
        assert row.flops == row.dense_flops
        assert row.bytes < row.dense_bytes
        assert row.break_even.density == 0


@pytest.mark.parametrize("block", [(1, 1), (16, 16), (16, 128), (8, 8), (1, 16), (256, 16)])
def test_the_blocks_of_gpu_predictions_are_those_of_the_kernels(block):
    pytest.importorskip("triton")
    from sparsekern.kernels.launch import supported

    assert covers(block) == supported(block)


def test_gpu_predictions_of_convolutions_and_recurrent_layers():
    plan = sk.plan(meta(Mixed), images("meta"), sparsity=0.9, device="cuda", blocks=(1, 16))
    assert all(row.dense_seconds > 0 for row in plan.rows if row.name != "unused")
    assert plan.device == "cuda"


# ---- budgets


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("name", ["flops", "memory"])
def test_a_budget_is_kept_with_little_to_spare(name, share):
    plan = sk.plan(wide(), torch.ones(256, 1024), budget=sk.Budget(**{name: share}), blocks=(1,))
    t = plan.totals
    spent = {"flops": t.flops / t.dense_flops, "memory": t.bytes / t.dense_bytes}[name]
    assert spent <= share
    check_counts(plan, wide())
    if share < 1:
        # one weight more of each layer costs less than this
        less = sk.plan(wide(), torch.ones(256, 1024), sparsity=plan.sparsity - 1e-4, blocks=(1,))
        t = less.totals
        assert {"flops": t.flops / t.dense_flops, "memory": t.bytes / t.dense_bytes}[name] > share


def test_both_limits_are_kept():
    budget = sk.Budget(flops=0.5, memory=0.2)
    t = sk.plan(wide(), torch.ones(256, 1024), budget=budget).totals
    assert t.flops <= 0.5 * t.dense_flops
    assert t.bytes <= 0.2 * t.dense_bytes


def test_an_unreachable_budget_says_what_can_be_reached():
    with pytest.raises(ConfigError, match=r"can't be reached.*lowest flops is") as error:
        sk.plan(wide(), torch.ones(8, 1024), budget=sk.Budget(flops=1e-9))
    lowest = float(str(error.value).split("lowest flops is ")[1].split()[0])
    plan = sk.plan(wide(), torch.ones(8, 1024), budget=sk.Budget(flops=lowest * 1.01))
    assert plan.totals.flops <= 1.01 * lowest * plan.totals.dense_flops


# ---- what it says


def plan_of_mixed():
    return sk.plan(Mixed(), images(), sparsity=0.9, blocks=(1, 16, (8, 16)))


def test_the_text_has_a_row_for_each_layer_and_says_its_convention():
    plan = plan_of_mixed()
    text = str(plan)
    for row in plan.rows:
        assert any(line.startswith(row.name) for line in text.splitlines())
    assert "1 multiply-add = 2 FLOPs" in text
    assert "unused: left dense, because the model never calls it" in text
    assert "48x64x5" in text
    assert "4x3x15x15" in text


def test_dict_json_csv_and_markdown_agree():
    plan = plan_of_mixed()
    found = json.loads(plan.to_json())
    assert found["totals"] == plan.totals._asdict()
    assert found["sparsity"] == 0.9
    lines = list(csv.DictReader(io.StringIO(plan.to_csv())))
    assert [row["name"] for row in found["layers"]] == [line["name"] for line in lines]
    for row, line in zip(found["layers"], lines, strict=True):
        assert int(line["active"]) == row["active"]
        assert float(line["density"]) == row["density"]
        for option in row["options"]:
            block = option["block"]
            name = block if isinstance(block, int) else "x".join(map(str, block))
            assert float(line[f"seconds_block_{name}"]) == option["seconds"]
    table = plan.to_markdown().splitlines()
    assert sum(line.startswith("| ") for line in table) == 2 + len(plan.rows)
    assert found["arguments"]["distribution"]["*"] == 0.0


def test_a_plan_is_a_value():
    plan = plan_of_mixed()
    assert plan == plan_of_mixed()
    with pytest.raises(AttributeError):
        plan.sparsity = 0.5


# ---- bad input


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, ConfigError, "exactly one of `sparsity` and `budget`; got neither"),
        (
            {"sparsity": 0.9, "budget": sk.Budget(flops=0.5)},
            ConfigError,
            "exactly one of `sparsity` and `budget`; got both",
        ),
        ({"sparsity": 1.0}, ConfigError, r"`sparsity` must lie in \[0, 1\); got 1.0"),
        ({"sparsity": "a"}, DtypeError, "`sparsity` must be a number; got 'a'"),
        ({"budget": 0.5}, DtypeError, "`budget` must be a Budget; got 0.5"),
        ({"sparsity": 0.9, "blocks": ()}, ConfigError, "`blocks` must name a block"),
        ({"sparsity": 0.9, "blocks": 16}, DtypeError, "`blocks` must be a tuple of blocks; got 16"),
        ({"sparsity": 0.9, "blocks": (0,)}, ConfigError, "edges must be at least 1; got 0"),
        ({"sparsity": 0.9, "blocks": (1.5,)}, DtypeError, "an int or a pair of ints; got 1.5"),
        ({"sparsity": 0.9, "blocks": (4096,)}, ConfigError, "no layer that could be made sparse"),
        ({"sparsity": 0.9, "distribution": {"*": 0.9}}, ConfigError, "`distribution` must be one"),
        ({"sparsity": 0.9, "distribution": "odd"}, ConfigError, "`distribution` must be one"),
        ({"sparsity": 0.9, "exclude": ("nothing",)}, ConfigError, "matches no module"),
        ({"sparsity": 0.9, "exclude": ("*",)}, ConfigError, "no layer that could be made sparse"),
        ({"sparsity": 0.9, "device": "odd"}, ConfigError, "`device` must be one of .*; got 'odd'"),
        ({"sparsity": 0.9, "device": "mps"}, ConfigError, "`device` must be one of .*; got 'mps'"),
        ({"sparsity": 0.9, "device": 3.5}, DtypeError, "`device` must be a torch.device or a str"),
        ({"sparsity": 0.9, "seconds": 0}, ConfigError, "`seconds` must be a positive number"),
        ({"sparsity": 0.9, "seconds": -1}, ConfigError, "`seconds` must be a positive number"),
        ({"sparsity": 0.9, "seconds": "a"}, DtypeError, "`seconds` must be a number; got 'a'"),
        ({"sparsity": 0.9, "seconds": None}, DtypeError, "`seconds` must be a number; got None"),
        ({"sparsity": 0.9, "exclude": 3}, DtypeError, "`exclude` must be globs or .*; got 3"),
        (
            {"sparsity": 0.9, "exclude": ("0", 3)},
            DtypeError,
            "`exclude` must be globs or .*; got 3",
        ),
        ({"sparsity": 0.9, "filter_fn": 3}, DtypeError, "`filter_fn` must be a function .*; got 3"),
        (
            {"sparsity": 0.9, "filter_fn": lambda m, _: m.odd},
            ConfigError,
            "`filter_fn` must tell .*; of '0' it raised AttributeError",
        ),
        ({"sparsity": 0.9, "generator": 3}, DtypeError, "`generator` must be a torch.Generator"),
        ({"sparsity": 0.9, "on_layer": 3}, DtypeError, "`on_layer` must be a function .*; got 3"),
        ({"sparsity": 0.9, "seconds": math.nan}, ConfigError, "`seconds` must be a positive"),
        ({"sparsity": 0.9, "optimizer_states": -1}, ConfigError, "`optimizer_states` must be"),
        ({"sparsity": 0.9, "optimizer_states": 1.0}, ConfigError, "`optimizer_states` must be"),
    ],
)
def test_bad_arguments(options, error, text):
    with pytest.raises(error, match=text):
        sk.plan(wide(), torch.ones(4, 1024), **options)


@pytest.mark.parametrize(
    ("limits", "error", "text"),
    [
        ({}, ConfigError, "must limit `flops`, `memory` or both"),
        ({"flops": 0}, ConfigError, r"`budget` flops is a share .* in \(0, 1\]; got 0"),
        ({"memory": 1.5}, ConfigError, r"`budget` memory is a share .* in \(0, 1\]; got 1.5"),
        ({"memory": "x"}, DtypeError, "`budget` memory must be a number; got 'x'"),
        ({"flops": True}, DtypeError, "`budget` flops must be a number; got True"),
    ],
)
def test_bad_budgets(limits, error, text):
    with pytest.raises(error, match=text):
        sk.Budget(**limits)


class Uncopied(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4))

    def __deepcopy__(self, memo):
        raise RuntimeError("there is but one")


class Detached(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4))

    def forward(self, x):
        return super().forward(x).detach()


class NoWayBack(torch.autograd.Function):
    @staticmethod
    def forward(_context, x):
        return x.clone()

    @staticmethod
    def backward(_context, _dy):
        raise RuntimeError("no way back")


class Unlearnable(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4))

    def forward(self, x):
        return NoWayBack.apply(super().forward(x))


@pytest.mark.parametrize(
    ("model", "error", "text"),
    [
        (None, DtypeError, "`model` must be an nn.Module; got None"),
        (nn.Sequential(nn.LazyLinear(4)), ConfigError, "shapes: run it once before; got 0.weight"),
        (Uncopied(), ModelError, "`model` must be one that copy.deepcopy takes"),
        (Detached(), ModelError, "must have an output that depends on a parameter"),
        (
            Unlearnable(),
            ModelError,
            "fails on the example inputs in its backward pass: .* no way back",
        ),
        (nn.Sequential(nn.ReLU()), ConfigError, "no layer that could be made sparse"),
        (nn.Linear(4, 4), DtypeError, "got a bare Linear: wrap it in nn.Sequential"),
        (nn.Sequential(nn.Linear(5, 4)), ModelError, "its layer '0' .Linear. got"),
    ],
)
def test_bad_models(model, error, text):
    with pytest.raises(error, match=text):
        sk.plan(model, torch.ones(2, 4), sparsity=0.5)


def test_a_gpu_takes_no_float64():
    with pytest.raises(DtypeError, match="GPU kernels take float32, float16 and bfloat16"):
        sk.plan(wide().double(), torch.ones(1, 1024).double(), sparsity=0.9, device="cuda")
