"""Loops of a kernel's machine code, and what an iteration of the products costs."""

import re
from collections import Counter
from typing import NamedTuple

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", re.MULTILINE)
BRANCH = re.compile(r"\bBRA\b.*?\b0x([0-9a-f]+)")
PREDICATE = re.compile(r"^@!?U?P\w+\s+")


class Loop(NamedTuple):
    """An innermost loop around products: its instructions, and how many of each kind."""

    length: int
    counts: Counter

    @property
    def products(self):
        """Matrix instructions of a warp group (HGMMA) in an iteration."""
        return self.counts["HGMMA"]

    @property
    def waits(self):
        """Waits for them."""
        return self.counts["WARPGROUP.DEPBAR"]


def loops(sass):
    """Innermost loops that hold HGMMA."""
    return _innermost(sass, {"HGMMA"})


def spills_in_loops(sass):
    """Accesses to local memory in innermost loops around products, of any kind."""
    found = _innermost(sass, {"HGMMA", "HMMA", "FFMA", "UTCHMMA", "UTCQMMA"})
    return sum(loop.counts["STL"] + loop.counts["LDL"] for loop in found)


def _innermost(sass, products):
    code = [(int(at, 16), text) for at, text in INSTRUCTION.findall(sass)]
    place = {at: i for i, (at, _) in enumerate(code)}
    kinds = [kind(text) for _, text in code]
    spans = []
    for i, (at, text) in enumerate(code):
        branch = BRANCH.search(text)
        target = int(branch[1], 16) if branch else at + 1
        # a branch from beyond the end of the program is a detour, not a loop
        body = kinds[place[target] : i] if target <= at and target in place else []
        if products & set(body) and "EXIT" not in body:
            spans.append((place[target], i))
    inner = [
        (first, last)
        for first, last in spans
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans)
    ]
    return [Loop(last - first + 1, Counter(kinds[first : last + 1])) for first, last in inner]


def kind(text):
    """Opcode without its modifiers, but of warp groups."""
    opcode = PREDICATE.sub("", text).split()[0]
    parts = opcode.split(".")
    return ".".join(parts[:2]) if parts[0] == "WARPGROUP" else parts[0]
