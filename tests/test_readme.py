"""The README says what was measured, and its example runs."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekern as sk

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_tables_come_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.readme import TABLES, filled

    assert all(f"<!-- {name} -->" in README for name in TABLES)
    assert filled(README) == README, "run `python -m benchmarks.readme`"


def test_figures_come_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.cpu_tables import stale_figures

    assert stale_figures() == [], "run `python -m benchmarks.readme`"
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README, re.DOTALL):
        assert (ROOT / path).is_file(), path


def test_first_example_runs():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    names = {"model": model, "torch": torch, "steps": 8}
    exec(code, names)  # the README's own text
    optimizer = names["optimizer"]
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 64)).square().sum().backward()
        optimizer.step()
    assert sk.sparse_layers(model)


@pytest.mark.parametrize("target", re.findall(r"make ([\w-]+)", README))
def test_named_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_named_files_exist():
    for path in re.findall(r"`((?:kernels|tests|benchmarks)/[\w/]+\.(?:py|json))`", README):
        assert (ROOT / path).exists(), path


def test_a_table_without_its_marks_is_an_error_and_no_lost_text(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.readme import filled

    with pytest.raises(ValueError, match="no lines for a table between the marks of 'conv'"):
        filled(README.replace("\n<!-- /conv -->", "<!-- /conv -->"))
