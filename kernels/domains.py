"""What the keys and the fields of launch tables may hold: a table is data that somebody wrote."""

from typing import NamedTuple

__all__ = ["ARCHES", "PARTS", "TableError", "why_not"]


class TableError(ValueError):
    """A launch table is damaged, or an entry of it holds what no kernel can have."""


ARCHES = ("sm80", "sm90", "sm100")
"""Architecture classes; see `launch`."""

PARTS: dict[str, tuple[str, ...]] = {
    "kind": ("half", "tf32", "ieee"),
    "edge": ("16", "32", "64", "128", "any"),
    "rows": ("short", "long", "any"),
    "loads": ("tma", "pointer"),
}
"""Parts of a key, besides the operation."""


class _Integers(NamedTuple):
    low: int
    high: int
    only_powers: bool = True

    def __str__(self) -> str:
        what = "a power of two" if self.only_powers else "an integer"
        return f"{what} in [{self.low}, {self.high}]"


# matrix instructions take 16 lanes at least; a tile of grow scores holds the widest block
_FIELDS: dict[str, _Integers] = {
    "BM": _Integers(16, 1024),
    "BN": _Integers(1, 1024),
    "BK": _Integers(16, 1024),
    "TN": _Integers(128, 1024),
    "TK": _Integers(128, 1024),
    "LANES": _Integers(16, 1024),
    "GROUP": _Integers(1, 1024),
    "UNROLL": _Integers(1, 64),
    "num_warps": _Integers(1, 32),
    "num_stages": _Integers(1, 16, only_powers=False),
    "RING_KB": _Integers(1, 1024, only_powers=False),
}


def why_not(name: str, value: object) -> str | None:
    """What the field `name` of an entry must be, if `value` is not; None where it is."""
    if name == "SWAP":
        return None if isinstance(value, bool) else "true or false"
    low, high, only_powers = domain = _FIELDS[name]
    fits = (
        type(value) is int  # a bool is no size
        and low <= value <= high
        and (value.bit_count() == 1 or not only_powers)
    )
    return None if fits else str(domain)
