"""What a measuring process is told, and how that travels: as one JSON argument."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sparsekern.kernels.tables import CONFIGS, Config, Key
from sparsekern.tuning.problems import Problem


@dataclass(frozen=True)
class Job:
    """Configurations of one key, to be checked and then timed against each other.

    Attributes:
        key: whose entry they replace.
        problems: to run them on.
        configs: by index; the first right one is the reference.
        rounds: how often each is timed.
        dry_run: on the CPU, in Triton's interpreter.
    """

    key: Key
    problems: tuple[Problem, ...]
    configs: Mapping[int, Config]
    rounds: int
    dry_run: bool

    def without(self, indices: Mapping[int, Any]) -> Job:
        """The same with fewer configurations."""
        left = {i: config for i, config in self.configs.items() if i not in indices}
        return replace(self, configs=left)

    def to_json(self) -> str:
        """Text for `from_json`."""
        configs = {str(i): config._asdict() for i, config in self.configs.items()}
        problems = [problem._asdict() for problem in self.problems]
        return json.dumps(
            {
                "key": str(self.key),
                "problems": problems,
                "configs": configs,
                "rounds": self.rounds,
                "dry_run": self.dry_run,
            }
        )

    @staticmethod
    def from_json(text: str) -> Job:
        """Inverse of `to_json`."""
        data = json.loads(text)
        key = Key.parse(data["key"])
        return Job(
            key,
            tuple(Problem(**problem) for problem in data["problems"]),
            {int(i): CONFIGS[key.op](**fields) for i, fields in data["configs"].items()},
            data["rounds"],
            data["dry_run"],
        )
