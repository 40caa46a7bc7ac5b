"""`plan(measure=True)`: what is measured, what follows from it, and what is left if it breaks off.

Times are made up: `paired_step_times` is replaced by one that runs each step and gives the ratio
that the test says.
"""

import json
import math
import sys

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.cli.main import main
from sparsekern.cost.crossing import BreakEven
from sparsekern.cost.predict import predictor
from sparsekern.cost.timing import StepTime
from sparsekern.errors import ConfigError, MeasurementError
from sparsekern.planning import PlanInterrupted
from sparsekern.planning import measure as measuring
from sparsekern.planning.curves import Curve, density_of
from sparsekern.planning.examine import examine

DENSE_SECONDS = 0.5


@pytest.fixture
def timed(monkeypatch):
    """Replace the clock: `ratio[block]` is sparse / dense time; returns what was timed."""
    found = []

    def times(steps, _baseline, **_):
        found.append(tuple(steps))
        for step in steps.values():
            step()
        return {
            name: StepTime(DENSE_SECONDS * timed.ratio(name), timed.ratio(name)) for name in steps
        }

    def timed(ratio):
        timed.ratio = lambda name: 1.0 if name == "dense" else ratio(name)
        return found

    monkeypatch.setattr(measuring, "paired_step_times", times)
    return timed


def net():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 32))


X = torch.ones(4, 64, requires_grad=True)
OPTIONS = {"sparsity": 0.8, "distribution": "uniform", "blocks": (1, 16, 32), "measure": True}


def test_the_fastest_block_is_chosen(timed):
    timed({"1x1": 0.8, "16x16": 0.4, "32x32": 0.6}.__getitem__)
    plan = sk.plan(net(), X, **OPTIONS)
    for row in plan.rows:
        assert row.block == 16
        assert row.dense_seconds == DENSE_SECONDS
        assert row.seconds == pytest.approx(0.4 * DENSE_SECONDS)
        assert row.source.startswith("measured on this machine's cpu, ")


def test_layers_of_one_kind_are_measured_once(timed):
    found = timed(lambda _: 0.5)
    seen = []
    sk.plan(net(), X, on_layer=seen.append, **OPTIONS)
    assert len(seen) == 2  # 64 x 64, 32 x 64
    assert all("dense" in names for names in found)
    done = [sum(row.source.startswith("measured on") for row in plan.rows) for plan in seen]
    assert done == [2, 3]


def test_dense_wins_where_every_block_is_slower(timed):
    timed(lambda _: 2.0)
    plan = sk.plan(net(), X, **OPTIONS)
    assert all(row.fastest is None for row in plan.rows)
    left = [row for row in plan.rows if row.block is None]
    assert all(row.why.startswith("dense is faster: 500 ms against 1e+03 ms") for row in left)
    assert all("<=" in str(row.break_even) for row in plan.rows)


def test_a_budget_is_kept_with_measured_times(timed):
    timed(lambda _: 0.5)
    plan = sk.plan(net(), X, budget=sk.Budget(flops=0.3), blocks=(1,), measure=True)
    assert plan.totals.flops <= 0.3 * plan.totals.dense_flops
    sk.sparsify_(net(), **plan.arguments)


def test_layers_without_a_share_or_a_block_are_measured_too(timed):
    timed(lambda _: 0.5)
    plan = sk.plan(net(), X, sparsity=0.0, distribution="uniform", measure=True)
    assert all(row.block is None for row in plan.rows)
    assert all(row.dense_seconds == DENSE_SECONDS for row in plan.rows)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    plan = sk.plan(model, X, sparsity=0.5, blocks=(32,), measure=True)
    assert plan.rows[1].why == "no block fits its 8 x 64 channels"
    assert plan.rows[1].dense_seconds == DENSE_SECONDS


class Kinds(nn.Module):
    """Recurrent and convolutional layers, one called twice, one by name."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=2)
        self.gru = nn.GRU(8, 8, bidirectional=True)
        self.cell = nn.GRUCell(16, 8)

    def forward(self, x):
        y = self.gru(self.conv(x.to(memory_format=torch.channels_last)).flatten(2).permute(2, 0, 1))
        return self.cell(input=y[0][0], hx=self.cell(y[0][1]))


def test_every_kind_of_layer_can_be_measured(timed):
    timed(lambda _: 0.5)
    x = torch.ones(2, 4, 5, 5)
    plan = sk.plan(Kinds(), x, sparsity=0.5, blocks=(1, 2, 8), measure=True)
    assert {row.name: row.kind for row in plan.rows} == {
        "conv": "Conv2d",
        "gru": "GRU",
        "cell": "GRUCell",
    }
    assert all(row.source.startswith("measured on") for row in plan.rows)
    sk.sparsify_(Kinds(), **plan.arguments)


def test_packed_sequences_can_be_measured(timed):
    timed(lambda _: 0.5)
    packed = nn.utils.rnn.pack_sequence([torch.ones(5, 8), torch.ones(3, 8)])
    plan = sk.plan(nn.Sequential(nn.GRU(8, 8)), (packed,), sparsity=0.5, blocks=(1,), measure=True)
    assert plan.rows[0].dense_seconds == DENSE_SECONDS


def test_a_meta_model_is_measured_on_the_cpu(timed):
    timed(lambda _: 0.5)
    with torch.device("meta"):
        model, x = net(), torch.empty(4, 64)
    plan = sk.plan(model, x, **OPTIONS)
    assert plan.device == "cpu"
    assert all(row.source.startswith("measured on") for row in plan.rows)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_measuring_changes_nothing_of_the_model(timed):
    timed(lambda _: 0.5)
    model, calls = net(), []
    before = [parameter.clone() for parameter in model.parameters()]
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    sk.plan(model, X, **OPTIONS)
    handle.remove()
    assert len(calls) == 1  # the one pass that shows the shapes
    assert all(map(torch.equal, before, model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_generator_draws_the_connections(timed, monkeypatch):
    timed(lambda _: 0.5)
    drawn = []
    real = measuring.Topology.random

    def random(*args, generator, **options):
        made = real(*args, generator=generator, **options)
        drawn.append(made.digest())
        return made

    monkeypatch.setattr(measuring.Topology, "random", random)
    for _ in range(2):
        sk.plan(net(), X, generator=torch.Generator().manual_seed(3), **OPTIONS)
    half = len(drawn) // 2
    assert drawn[:half] == drawn[half:]


def test_a_real_clock_gives_a_whole_plan():
    plan = sk.plan(net(), X, seconds=0.1, **OPTIONS)
    assert all(row.dense_seconds > 0 for row in plan.rows)
    sk.sparsify_(net(), **plan.arguments)


def test_layers_beyond_the_time_are_predicted(timed, monkeypatch):
    timed(lambda _: 0.5)
    now = iter(range(10_000))
    monkeypatch.setattr("sparsekern.planning.planner.time.monotonic", lambda: 100.0 * next(now))
    plan = sk.plan(net(), X, seconds=150.0, **OPTIONS)
    sources = [row.source for row in plan.rows]
    assert [s.startswith("measured on") for s in sources] == [True, True, False]
    assert sources[2].endswith("not measured")


# ---- what is left if it breaks off


def breaks(monkeypatch, error):
    """The second kind of layer raises `error`."""
    real, calls = measuring._Bench._times, []

    def times(self, *arguments):
        calls.append(self.layer.name)
        if self.layer.name == "3":
            raise error
        return real(self, *arguments)

    monkeypatch.setattr(measuring._Bench, "_times", times)


def test_an_interruption_carries_what_was_measured(timed, monkeypatch):
    timed(lambda _: 0.5)
    breaks(monkeypatch, KeyboardInterrupt())
    with pytest.raises(PlanInterrupted) as caught:
        sk.plan(net(), X, **OPTIONS)
    assert isinstance(caught.value, KeyboardInterrupt)
    rows = caught.value.plan.rows
    assert [row.source.startswith("measured on") for row in rows] == [True, True, False]


def test_an_error_names_the_layer_and_carries_what_was_measured(timed, monkeypatch):
    timed(lambda _: 0.5)
    breaks(monkeypatch, RuntimeError("out\nof luck"))
    with pytest.raises(MeasurementError, match="layer '3' failed: RuntimeError: out of luck") as e:
        sk.plan(net(), X, **OPTIONS)
    assert len(e.value.plan.rows) == 3


def test_an_error_of_on_layer_is_its_own(timed):
    timed(lambda _: 0.5)

    def fails(_plan):
        raise RuntimeError("out of luck")

    with pytest.raises(MeasurementError, match="^`on_layer` failed: RuntimeError: out of") as e:
        sk.plan(net(), X, on_layer=fails, **OPTIONS)
    sources = [row.source for row in e.value.plan.rows]
    assert [s.startswith("measured on") for s in sources] == [True, True, False]


def test_what_is_not_trained_is_measured_without_gradients(timed, monkeypatch):
    timed(lambda _: 0.5)
    runs = []
    real = torch.autograd.backward

    def backward(*arguments):
        runs.append(arguments)
        real(*arguments)

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    model[0].requires_grad_(False)
    (first, last) = examine(model, X.detach(), "erk", None, ()).layers
    options = {"device": torch.device("cpu"), "seconds": 0.01, "generator": None}
    monkeypatch.setattr(torch.autograd, "backward", backward)
    measuring.measure(first, [(1, 1)], [0.5], **options)
    assert runs == []
    measuring.measure(last, [(1, 1)], [0.5], **options)
    assert runs != []


# ---- curves


CURVE = Curve(1.0, {(1, 1): ((0.1, 0.5), (0.4, 1.5)), (8, 8): ((0.1, 0.75), (0.4, 1.25))}, 5)


def test_ratios_between_points_are_straight_on_log_density():
    assert CURVE.ratio((1, 1), 0.1) == 0.5
    assert CURVE.ratio((1, 1), 0.2) == pytest.approx(1.0)
    assert CURVE.ratio((1, 1), 0.4) == 1.5
    assert CURVE.ratio((1, 1), 0.01) == 0.5
    assert CURVE.ratio((1, 1), 0.8) == pytest.approx(3.0)


def test_break_even_of_a_curve():
    # the best is 0.5 at 0.1 and 1.25 at 0.4, on a straight line of logarithms between them
    share = math.log(2) / math.log(2.5)
    assert CURVE.break_even([(1, 1), (8, 8)]).density == pytest.approx(0.1 * 4**share)
    share = math.log(2) / math.log(3)
    assert CURVE.break_even([(1, 1)]).density == pytest.approx(0.1 * 4**share)
    slow = Curve(1.0, {(1, 1): ((0.05, 1.5), (0.1, 2.0))}, 5)
    assert slow.break_even([(1, 1)]) == BreakEven(0.05, "<=")
    fast = Curve(1.0, {(1, 1): ((0.05, 0.5), (0.1, 0.7))}, 5)
    assert fast.break_even([(1, 1)]) == BreakEven(0.1, ">=")
    assert str(BreakEven(0.1, ">=")) == ">=0.1"
    whole = Curve(1.0, {(1, 1): ((0.5, 0.5), (1.0, 0.7))}, 5)
    assert whole.break_even([(1, 1)]) == BreakEven(1.0)


@pytest.mark.parametrize(("ratio", "most"), [(0.5, 1.0), (2.0, 0.2)])
def test_densities_go_towards_break_even(timed, ratio, most):
    timed(lambda _: ratio)
    (layer,) = examine(nn.Sequential(nn.Linear(64, 64)), X, "erk", None, ()).layers
    options = {"device": torch.device("cpu"), "seconds": 60.0, "generator": None}
    curve = measuring.measure(layer, [(1, 1), (16, 16)], [0.8], **options)
    densities = [density for density, _ in curve.points[1, 1]]
    assert max(densities) == pytest.approx(most)
    assert min(densities) < 0.2


def test_density_of_a_layer_is_that_of_its_parts_together():
    (layer,) = examine(nn.Sequential(nn.GRU(8, 4)), torch.ones(3, 2, 8), "erk", None, ()).layers
    assert density_of(layer, [0.0, 1.0]) == 2 / 3
    assert predictor(torch.device("cpu")).dense(layer) > 0


# ---- the command


MODULE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 32))

def tokens():
    return nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 64), nn.Linear(64, 50))

def both():
    return net(), torch.ones(4, 64)
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run `sparsekern plan`: exit status, stdout, stderr."""
    (tmp_path / "planned_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "planned_nets", raising=False)

    def run(*arguments):
        status = main(["plan", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_the_command_prints_and_writes_the_plan(command, tmp_path):
    files = ["--json", "p.json", "--csv", "p.csv", "--markdown", "p.md"]
    status, out, err = command("planned_nets:both", "--sparsity", "0.8", *files)
    assert (status, err) == (0, "")
    assert out.startswith("layer")
    assert out.count("Written: ") == 3
    found = json.loads((tmp_path / "p.json").read_text())
    assert [row["name"] for row in found["layers"]] == ["0", "2", "3"]
    assert (tmp_path / "p.csv").read_text().startswith("name,kind,")
    assert (tmp_path / "p.md").read_text().startswith("| layer |")
    assert sorted(path.suffix for path in tmp_path.glob("*p.*")) == [".csv", ".json", ".md"]


@pytest.mark.parametrize(
    "options",
    [
        ("planned_nets:net", "--input", "4x64", "--flops", "0.5", "--memory", "0.9"),
        ("planned_nets:net", "--input", "4x64", "--sparsity", "0.5", "--meta", "--device", "cuda"),
        ("planned_nets:tokens", "--input", "2x7", "--vocab", "50", "--sparsity", "0.5"),
        ("planned_nets:net", "--input", "4x64", "--sparsity", "0.5", "--blocks", "8", "16x32"),
        ("planned_nets:net", "--input", "4x64", "--sparsity", "0.5", "--exclude", "0"),
        ("planned_nets:net", "--input", "4x64", "--sparsity", "0.5", "--distribution", "er"),
    ],
)
def test_options_of_the_command(command, options):
    status, out, err = command(*options)
    assert (status, err) == (0, "")
    assert "break-even" in out


def test_the_command_measures(command, timed):
    timed(lambda _: 0.5)
    status, out, err = command("planned_nets:both", "--sparsity", "0.8", "--measure")
    assert status == 0
    assert "times measured on this machine's cpu" in out
    assert "[2/3] 0: dense 500 ms, at best 2.00x" in err


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (KeyboardInterrupt(), 130, "sparsekern: interrupted"),
        (RuntimeError("no"), 2, "sparsekern: error: measuring layer '3' failed: RuntimeError: no"),
    ],
)
def test_what_was_measured_is_written(command, tmp_path, timed, monkeypatch, error, expected, text):
    timed(lambda _: 0.5)
    breaks(monkeypatch, error)
    options = ["--sparsity", "0.8", "--measure", "--json", "p.json", "--csv", "p.csv", "--quiet"]
    status, out, err = command("planned_nets:both", *options)
    assert status == expected
    assert text in err
    assert out.startswith("Measuring broke off")
    found = json.loads((tmp_path / "p.json").read_text())
    assert [row["source"].startswith("measured on") for row in found["layers"]] == [
        True,
        True,
        False,
    ]
    assert (tmp_path / "p.csv").exists()


def test_the_json_file_is_written_after_every_layer(command, tmp_path, timed, monkeypatch):
    timed(lambda _: 0.5)
    lengths = []
    real = measuring._Bench.__init__

    def begun(self, layer, *arguments):
        lengths.append((tmp_path / "p.json").exists())
        real(self, layer, *arguments)

    monkeypatch.setattr(measuring._Bench, "__init__", begun)
    options = ["--sparsity", "0.8", "--measure", "--json", "p.json", "--quiet"]
    assert command("planned_nets:both", *options)[0] == 0
    assert lengths == [False, True, True]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("planned_nets:both",), "give exactly one of `sparsity` and `budget`; got neither"),
        (("planned_nets:both", "--sparsity", "0.5", "--flops", "0.5"), "got both"),
        (("planned_nets:both", "--flops", "2"), "`budget` flops is a share"),
        (("planned_nets:both", "--sparsity", "0.5", "--json", "no/p.json"), "an existing folder"),
        (("planned_nets:both", "--sparsity", "0.5", "--csv", "."), "`csv` must be a file"),
        (("planned_nets:both", "--sparsity", "0.5", "--json", "/proc/x.json"), "can be written"),
        (("planned_nets:both", "--sparsity", "0.5", "--seed", "9" * 23), "`seed` must lie in"),
        (("nowhere:net", "--sparsity", "0.5"), "expected nowhere:net to import"),
        (("planned_nets:net", "--input", "4x63", "--sparsity", "0.5"), "its layer '0' (Linear)"),
        (("planned_nets:both", "--sparsity", "0.5", "--blocks", "0"), "edges must be at least 1"),
        (("planned_nets:both", "--flops", "1e-9"), "can't be reached"),
    ],
)
def test_bad_options_of_the_command(command, options, text):
    status, out, err = command(*options)
    assert (status, out) == (2, "")
    assert text in err
    assert err.count("\n") == 1


def test_measuring_needs_a_device():
    with pytest.raises(ConfigError, match="`device` 'cuda:99' can't be used here"):
        sk.plan(net(), X, sparsity=0.5, device="cuda:99", measure=True)
