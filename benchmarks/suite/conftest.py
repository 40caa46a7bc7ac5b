"""What the driver asks of pytest: which cases, and a journal that a crash can't take along."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.suite.problem import ceilings
from sparsekern.show.environment import environment


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the driver."""
    group = parser.getgroup("suite")
    group.addoption("--quick", action="store_true", help="tiny cases, whose times mean nothing")
    group.addoption("--journal", type=Path, help="a line of JSON for each event is appended")
    group.addoption("--threads", type=int, help="of the CPU")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of speed or memory takes the cases that its file lists."""
    if "case" not in metafunc.fixturenames:
        return
    name = metafunc.function.__name__.removeprefix("test_").upper()
    if metafunc.config.getoption("quick"):
        name = "QUICK" if name == "SPEED" else f"QUICK_{name}"
    cases = getattr(metafunc.module, name)
    ids = ["-".join(map(str, case)).replace("/", ":") for case in cases]
    metafunc.parametrize("case", cases, ids=ids)


def pytest_configure(config: pytest.Config) -> None:
    """Threads are set before anything is measured."""
    if config.getoption("threads"):
        torch.set_num_threads(config.getoption("threads"))
    if config.getoption("journal"):
        config.pluginmanager.register(Journal(config.getoption("journal")), "journal")


class Journal:
    """Writes down what happens when it happens."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, event: dict[str, Any]) -> None:
        """Append an event, and see that it reaches the file."""
        with self.path.open("a") as file:
            file.write(json.dumps(event, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Which cases there are, and where they are measured."""
        nodes = [item.nodeid for item in session.items]
        facts = environment() | {"ceilings": ceilings()._asdict()}
        self.note({"nodes": nodes, "environment": facts})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Named before it runs, so that a case that kills the process is known."""
        self.note({"begins": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Why a case failed."""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = str(report.longrepr if crash is None else crash.message)
            self.note({"failed": report.nodeid, "reason": " ".join(text.split())[:300]})


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether this only shows that the suite works."""
    return bool(request.config.getoption("quick"))


@pytest.fixture(autouse=True)
def _journal(request: pytest.FixtureRequest) -> Iterator[None]:
    """The entry that pytest-benchmark would write at the end of the session, now."""
    benchmark: Any = request.getfixturevalue("benchmark")
    yield
    if benchmark.stats is not None and not benchmark.has_error:
        journal: Journal | None = request.config.pluginmanager.get_plugin("journal")
        if journal is not None:
            entry = benchmark.stats.as_dict(include_data=False)
            journal.note({"node": request.node.nodeid, "entry": entry})
