"""The launch table that tuning writes: `kernels/tables/*.json`, with what it was measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsekern.errors import ConfigError
from sparsekern.kernels.tables import Config, Key, read
from sparsekern.show.output_files import check, explained, write_whole
from sparsekern.tuning.problems import Problem


@dataclass(frozen=True)
class Machine:
    """What times depend on besides the configuration; a table holds those of one machine."""

    arch: str
    device: str
    torch: str
    triton: str
    dry_run: bool


@dataclass
class TableFile:
    """A table in the making.

    Attributes:
        path: where it is written.
        machine: what its entries are measured on.
        entries: measured keys only.
        measured: facts about each entry, by the text of its key.
    """

    path: Path
    machine: Machine
    entries: dict[Key, Config]
    measured: dict[str, dict[str, Any]]

    @staticmethod
    def open(path: Path, machine: Machine) -> TableFile:
        """Go on with an existing file, or begin one.

        Raises:
            ConfigError: `path` can't be written, or holds something else than a table that was
                measured on the same machine and versions.
        """
        check({"out": path})
        if not path.exists():
            return TableFile(path, machine, {}, {})
        try:
            arch, entries = read(path)
            data = json.loads(path.read_text())
            found = Machine(arch, *(data[name] for name in list(asdict(machine))[1:]))
            measured = {str(key): dict(data["measured"][str(key)]) for key in entries}
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ConfigError(
                f"`out` must be new or a table that `sparsekern tune` wrote; {path}: {error}"
            ) from None
        if found != machine:
            raise ConfigError(
                f"`out` must be new or measured on {asdict(machine)}; {path} holds {asdict(found)}"
            )
        return TableFile(path, machine, entries, measured)

    def put(self, key: Key, config: Config, problems: Sequence[Problem], **facts: Any) -> None:
        """Set an entry and write the file."""
        self.entries[key] = config
        date = datetime.now(UTC).date().isoformat()
        shapes = [problem._asdict() for problem in problems]
        self.measured[str(key)] = {"date": date, "problems": shapes, **facts}
        self._write()

    @property
    def source(self) -> str:
        """A line for people."""
        m = self.machine
        dates = sorted({facts["date"] for facts in self.measured.values()})
        problems = [p for facts in self.measured.values() for p in facts["problems"]]
        shapes = sorted({f"{p['tokens']} x {p['cols']} x {p['rows']}" for p in problems})
        what = "dry run, its times mean nothing: " if m.dry_run else ""
        return (
            f"{what}sparsekern tune on {m.device}, torch {m.torch}, triton {m.triton}, "
            f"{' to '.join(sorted({dates[0], dates[-1]}))}; tokens x inputs x outputs: "
            f"{', '.join(shapes)}"
        )

    def _write(self) -> None:
        head = {"arch": self.machine.arch, "source": self.source}
        head |= {k: v for k, v in asdict(self.machine).items() if k != "arch"}
        rows = sorted((str(key), config._asdict()) for key, config in self.entries.items())
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
        lines += _section("entries", dict(rows), ",")
        lines += _section("measured", dict(sorted(self.measured.items())), "")
        with explained("out", self.path):
            write_whole(self.path, "\n".join(["{", *lines, "}"]) + "\n")


def _section(name: str, rows: Mapping[str, Any], end: str) -> list[str]:
    """A line for each row, as in the shipped tables."""
    lines = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in rows.items()]
    return [f'  "{name}": {{', ",\n".join(lines), f"  }}{end}"]
