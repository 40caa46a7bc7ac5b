"""Public callables name their arguments: to `inspect`, to an editor and to mypy."""

import importlib.util
import inspect
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from torch import nn

import sparsekern as sk
from sparsekern import nn as sparse_nn

HIDING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
# public callables that take any arguments, and why
EXCEPTIONS = {"sparsekern.nn.SparseRecurrent": "a base without a constructor: nn.Module's"}
TWINS = {
    sk.SparseLinear: nn.Linear,
    sk.SparseConv1d: nn.Conv1d,
    sk.SparseConv2d: nn.Conv2d,
    sk.SparseGRU: nn.GRU,
    sk.SparseLSTM: nn.LSTM,
    sk.SparseRNN: nn.RNN,
    sk.SparseGRUCell: nn.GRUCell,
    sk.SparseLSTMCell: nn.LSTMCell,
    sk.SparseRNNCell: nn.RNNCell,
}
RECURRENT = [cls for cls in TWINS if issubclass(cls, sparse_nn.SparseRecurrent)]


def public():
    """Name and value of each public callable, methods of classes included."""
    for module in (sk, sk.ops, sk.nn, sk.methods):
        for name in module.__all__:
            found = getattr(module, name)
            if not callable(found) or (inspect.isclass(found) and issubclass(found, Exception)):
                continue
            yield f"{module.__name__}.{name}", found
            members = inspect.getmembers(found, callable) if inspect.isclass(found) else ()
            for member, value in members:
                ours = (getattr(value, "__module__", None) or "").startswith("sparsekern")
                if ours and (member == "__call__" or not member.startswith("_")):
                    yield f"{module.__name__}.{name}.{member}", value


def parameters(callable_):
    """The named parameters; those of torch's typed overload where there is one."""
    is_class = inspect.isclass(callable_)
    overloads = typing.get_overloads(callable_.__init__ if is_class else callable_)
    found = inspect.signature(overloads[0] if overloads else callable_).parameters
    return {name: p for name, p in found.items() if name != "self"}


def test_no_public_callable_hides_its_arguments():
    hidden = {
        name
        for name, found in public()
        if any(p.kind in HIDING for p in inspect.signature(found).parameters.values())
    }
    # torch's Joinable hands on what Join was given
    hidden = {name for name in hidden if not name.endswith(".join_hook")}
    assert hidden == set(EXCEPTIONS)
    assert len(dict(public())) > 150


@pytest.mark.parametrize("cls", [sk.RigL, sk.SET, sk.Static, sk.Method])
def test_methods_show_every_argument_and_its_default(cls):
    assert "__init__" not in vars(cls) or cls is sk.Method
    shown = parameters(cls)
    assert [n for n, p in shown.items() if p.default is p.empty] == ["model", "optimizer"]
    assert shown["t_end"].default is None  # a typed error says what to give
    assert shown["update_freq"].default == 100
    assert all(
        p.kind is p.KEYWORD_ONLY for n, p in shown.items() if n not in {"model", "optimizer"}
    )


@pytest.mark.parametrize("cls", TWINS)
def test_every_constructor_keyword_of_torch_is_taken_in_its_place(cls):
    theirs, ours = parameters(TWINS[cls]), parameters(cls)
    assert theirs.keys() <= ours.keys()
    assert all(ours[name].default == theirs[name].default for name in theirs)
    # device and dtype, which torch takes last, are for keywords here
    positional = [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [name for name in theirs if name not in {"device", "dtype"}]


@pytest.mark.parametrize("cls", RECURRENT)
def test_every_forward_keyword_of_torch_is_taken_in_its_place(cls):
    theirs, ours = parameters(TWINS[cls].forward), parameters(cls.forward)
    assert list(ours) == list(theirs) == ["input", "hx"]
    assert ours["hx"].default is theirs["hx"].default is None


@pytest.mark.parametrize("cls", RECURRENT)
def test_a_wrong_argument_names_the_public_class(cls):
    with pytest.raises(TypeError, match=rf"^{cls.__name__}\.__init__\(\) .*'sparsty'"):
        cls(4, 4, sparsty=0.5)


CALLS = """
import torch
from torch import nn

import sparsekern as sk


class Mine(sk.RigL):
    pass


def calls(m: nn.Module, o: torch.optim.Optimizer) -> None:
    sk.RigL(m, o, t_end=5, update_freq=3, step_on_update=None)
    sk.SET(m, o, t_end=5, norm="l2")
    sk.RigL(m, [o, o], t_end=0.75, total_steps=100)
    sk.Static(m)  # call-arg
    Mine(m)  # call-arg
    sk.RigL(m, o, 5)  # call-arg misc
    sk.RigL(m, o, t_end=5, update_frequency=3)  # call-arg
    sk.SET(m, o, t_end="5")  # arg-type
    sk.SparseGRU(4, 4, 2, sparsity={"ih_l0": 0.5, "hh_l0": None}, block=(2, 1), batch_first=True)
    sk.SparseRNN(4, 4, 1, "relu", sparsity=0.5)
    sk.SparseLSTMCell(4, 4, False, dtype=torch.float64)
    sk.SparseGRU(4, 4, sparsty=0.5)  # call-arg
    sk.SparseLSTM(4, 4, block="16")  # arg-type
    sk.SparseRNN(4, 4, sparsity="high")  # arg-type
    sk.SparseGRUCell(4, 4, True, 0.5)  # call-arg misc
    sk.SparseLSTMCell(4, 4, topology=None)  # call-arg
    sk.SparseRNNCell(4)  # call-arg
    sk.SparseLinear(4, 4, sparsty=0.5)  # call-arg
    sk.SparseConv2d(4, 4)  # call-arg
    sk.sparsify_(m, sparsty=0.5)  # call-arg
"""
# nothing of torch is needed to judge these calls, and reading it takes a minute
CONFIG = """
[mypy]
strict = true
follow_imports = silent
[mypy-torch.*,triton.*,numba.*,numpy.*]
follow_imports = skip
ignore_missing_imports = true
"""


@pytest.mark.slow
def test_mypy_accepts_the_right_calls_and_rejects_the_wrong_ones(tmp_path):
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    (tmp_path / "calls.py").write_text(CALLS)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--no-pretty", "calls.py"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(Path(sk.__file__).resolve().parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    errors: dict[int, set[str]] = {}
    for line in run.stdout.splitlines():
        if ": error: " in line:
            file, number, _ = line.split(":", 2)
            assert file == "calls.py", line
            errors.setdefault(int(number), set()).add(line.rsplit("[", 1)[1].rstrip("]"))
    for number, line in enumerate(CALLS.splitlines(), 1):
        expected = set(line.partition("  # ")[2].split())
        got = errors.get(number, set())
        assert bool(got) == bool(expected), f"{line.strip()}: {got}\n{run.stdout}{run.stderr}"
        assert got <= expected, f"{line.strip()}: {got}"
