"""The result file of a device and its versions: every case with its rows.

A case counts as done for the digest of the sources that its numbers depend on. So the file can be
taken along: the next run, on a fresh machine of the kind, goes on where it ends, and after a change
in one kernel only what depends on it is measured again.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.agenda import Row
from sparsekern.show.output_files import write_whole

SCHEMA = 2
SAVE_SECONDS = 3.0  # between two writes while cases come in
Content = Mapping[str, Any]


@dataclass
class Store:
    """Results of one key.

    Attributes:
        path: of the file.
        key: device, versions and launch table, the same for all cases.
        cases: by name; see `put`.
        runs: what is known of each run.
    """

    path: Path
    key: Mapping[str, str]
    dry: bool
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    _saved: float = 0.0

    @staticmethod
    def read(path: Path) -> Store:
        """What a file holds."""
        content = json.loads(path.read_text())
        return Store(path, content["key"], content["dry"], content["cases"], content["runs"])

    def done(self, name: str, digest: str) -> bool:
        """Whether a case came to its end with these sources."""
        case = self.cases.get(name)
        return case is not None and case["digest"] == digest and case["error"] is None

    def put(self, name: str, case: Mapping[str, Any]) -> None:
        """Set a case: its part, digest, number of the run, seconds, clocks, error and rows."""
        self.cases[name] = dict(case)
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def rows(self, *parts: str) -> Iterator[Row]:
        """Of some parts, in the order of the parts."""
        return rows_of(self.content, *parts)

    @property
    def content(self) -> dict[str, Any]:
        """As it is written."""
        head = {"schema": SCHEMA, "dry": self.dry, "key": dict(self.key)}
        return head | {"runs": self.runs, "cases": self.cases}

    def save(self) -> None:
        """Replace the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, _written(self.content))
        self._saved = time.monotonic()

    def take(self, paths: Iterable[Path]) -> int:
        """Take over the cases of files of the same key that this one lacks; returns their number.

        What a file holds of another key, or what is no result file, stays where it is.
        """
        before = len(self.cases)
        for path in paths:
            content = _read(path)
            if content is None or content["key"] != dict(self.key) or content["dry"] != self.dry:
                continue
            offset = len(self.runs)
            self.runs += content["runs"]
            for name, case in content["cases"].items():
                if name not in self.cases or self.cases[name]["error"]:
                    self.cases[name] = case | {"run": case["run"] + offset}
        return len(self.cases) - before


def rows_of(content: Content, *parts: str) -> Iterator[Row]:
    """Rows of some parts of a result file, in the order of the parts."""
    for part in parts:
        for case in content["cases"].values():
            if case["part"] == part:
                yield from case["rows"]


def file_name(key: Mapping[str, str]) -> str:
    """Of the result file of a key, without folder."""
    device = re.sub(r"[^a-z0-9]+", "-", key["device"].lower()).strip("-")
    table = key["launch_table"]
    return f"{device}.json" if table == "shipped" else f"{device}-table-{table}.json"


def _written(content: Content) -> str:
    """JSON, a line for each case: so a change is seen as one."""
    head = {name: value for name, value in content.items() if name != "cases"}
    lines = [f"  {json.dumps(name)}: {json.dumps(c)}" for name, c in content["cases"].items()]
    text = json.dumps(head, indent=1).removesuffix("\n}")
    return text + ',\n "cases": {\n' + ",\n".join(lines) + "\n }\n}\n"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return content if content.get("schema") == SCHEMA else None
    except (OSError, ValueError):
        return None
