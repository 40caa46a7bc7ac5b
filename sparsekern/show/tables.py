"""Tables of text cells: aligned for a terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

Cells = Sequence[Sequence[str]]
"""Rows of equal length, the head first."""


def aligned(cells: Cells, left: int = 1) -> list[str]:
    """Lines with columns side by side, the first `left` of them flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def markdown(cells: Cells, left: int = 1) -> list[str]:
    """Lines of a Markdown table; a "|" in a cell is escaped."""
    head, *rows = [[cell.replace("|", r"\|") for cell in row] for row in cells]
    marks = ["---" if i < left else "---:" for i in range(len(head))]
    return [f"| {' | '.join(row)} |" for row in [head, marks, *rows]]


def comma_separated(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """CSV with a head; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()


def scaled(number: float, unit: str, base: int = 1000) -> str:
    """A number with four figures and a prefix, like 8.178 G; `base` 1024 counts in Ki, Mi, Gi."""
    prefixes = ("", "k", "M", "G", "T", "P") if base == 1000 else ("", "Ki", "Mi", "Gi", "Ti", "Pi")
    power = 0
    while abs(number) >= base and power < len(prefixes) - 1:
        number, power = number / base, power + 1
    return f"{number:.4g} {prefixes[power]}{unit}"
