"""README.md and docs/ say what was measured, name what exists, and the first example runs."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekern as sk

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


def test_the_readme_is_short():
    assert len(README.splitlines()) < 200


def test_tables_come_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.readme import PAGES as FILLED
    from benchmarks.readme import TABLES, filled, marked

    texts = [page.read_text() for page in FILLED]
    assert sorted(name for text in texts for name in marked(text)) == sorted(TABLES)
    for page, text in zip(FILLED, texts, strict=True):
        assert filled(text) == text, f"{page.name}: run `python -m benchmarks.readme`"


def test_figures_come_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.cpu_tables import stale_figures

    assert stale_figures() == [], "run `python -m benchmarks.readme`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(((?!http)[^)]*)\)", page.read_text(), re.DOTALL):
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        if anchor:
            titles = re.findall(r"(?m)^#+ (.*)$", found.read_text())
            assert anchor in {
                re.sub(r"[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in titles
            }


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_targets_and_files_exist(page):
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|    )make ([\w-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(
        r"`((?:kernels|tests|benchmarks|sparsekern)/[\w/]+\.(?:py|json))`", text
    ):
        assert (ROOT / path).exists(), path


def test_a_table_without_its_marks_is_an_error_and_no_lost_text(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.readme import filled

    with pytest.raises(ValueError, match="no lines for a table between the marks of 'speed'"):
        filled(README.replace("\n<!-- /speed -->", "<!-- /speed -->"))
