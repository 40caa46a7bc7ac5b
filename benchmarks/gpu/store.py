"""The result file: one `speed.json` that holds every part, replaced whole at each change.

A part that runs in its own process leaves `part-NAME.json`, which is taken in and removed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekern.show.output_files import write_whole

SCHEMA = 1
NAME = "speed.json"


@dataclass
class Store:
    """Results in a folder.

    Attributes:
        key: device, versions and sources, the same for all parts.
    """

    folder: Path
    key: Mapping[str, str]
    dry: bool

    @property
    def path(self) -> Path:
        """Of the result file."""
        return self.folder / NAME

    def part_path(self, name: str) -> Path:
        """Of a part on its way."""
        return self.folder / f"part-{name}.json"

    def load(self) -> dict[str, Any]:
        """Everything stored; no parts if there is no file."""
        if self.path.exists():
            content: dict[str, Any] = json.loads(self.path.read_text())
            return content
        key = dict(self.key)
        return {"schema": SCHEMA, "dry": self.dry, "key": key, "complete": False, "parts": {}}

    def set_aside(self) -> Path | None:
        """Move a result file of another key out of the way: one file never mixes two."""
        if not self.path.exists():
            return None
        content: dict[str, Any] = json.loads(self.path.read_text())
        if content.get("schema") == SCHEMA and content.get("key") == dict(self.key):
            return None
        older = self.path.with_name("speed-older.json")
        self.path.replace(older)
        return older

    def part(self, name: str) -> dict[str, Any] | None:
        """A finished part of this key, or None."""
        content = self.load()
        part: dict[str, Any] | None = content["parts"].get(name)
        done = part is not None and part["complete"] and content["key"] == dict(self.key)
        return part if done else None

    def write_part(self, name: str, part: Mapping[str, Any]) -> None:
        """Leave a part for `take_in`."""
        _write(self.part_path(name), part)

    def take_in(self, name: str) -> dict[str, Any] | None:
        """Move a part into the result file and return it; None if it left nothing of this key."""
        path = self.part_path(name)
        if not path.exists():
            return None
        part: dict[str, Any] = json.loads(path.read_text())
        path.unlink()
        if part["key"] != dict(self.key):
            return None
        content = self.load()
        content["parts"][name] = part
        self.save(content)
        return part

    def save(self, content: Mapping[str, Any]) -> None:
        """Replace the result file."""
        _write(self.path, content)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1) + "\n")
