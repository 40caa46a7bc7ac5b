"""Launch tables: the tile of each kernel, as data.

One JSON file per architecture class in `kernels/tables/`. A key is

    op / kind / edge / rows / loads      for example  spmm/half/64/short/tma

op: spmm, spmm_t, sddmm, grow, csr_spmm, csr_spmm_t, csr_sddmm, and those of convolutions: conv2d,
conv2d_dgrad, conv2d_wgrad and the same after csr_. kind: see `launch`. edge: of the output block
(spmm, spmm_t, conv2d, conv2d_dgrad), the larger one of the block (sddmm, conv2d_wgrad), "any" for
the rest. rows: shape class, "short", "long" or "any". loads: "tma" (tensor descriptors) or
"pointer"; every operation has a pointer entry, and a launcher takes the tma entry where there is
one and its operands allow it.

spmm_resident and spmm_t_resident are optional: an entry sends the products of blocks with that
larger edge to `bsr_spmm_resident` where it fits. So are spmm_persistent and spmm_t_persistent, by
the edge of the output, for `bsr_spmm_persistent`. No shipped table has one, as those kernels have
not been measured.

Nothing is tuned at import or at launch. `sparsekern tune` measures the operations of `CONFIGS` and
writes a table for one GPU;
the environment variable SPARSEKERN_LAUNCH_TABLE names such a file, whose entries then replace those
of the shipped table of its architecture.
"""

import json
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from sparsekern.kernels import domains
from sparsekern.kernels.domains import TableError

__all__ = [
    "CONFIGS",
    "CONV",
    "ENVIRONMENT",
    "OPTIONAL",
    "CsrConfig",
    "CsrSddmmConfig",
    "GrowConfig",
    "Key",
    "PersistentConfig",
    "RingConfig",
    "SddmmConfig",
    "SpmmConfig",
    "TableError",
    "also_forget",
    "find",
    "optional",
    "overridden",
    "read",
    "table",
]

ENVIRONMENT = "SPARSEKERN_LAUNCH_TABLE"
MOST_BYTES = 1 << 24
"""Of a table file; the shipped ones have 2^14."""

_FOLDER = Path(__file__).parent / "tables"


class Key(NamedTuple):
    """What a launch is looked up by; `str` gives the form used in the files."""

    op: str
    kind: str
    edge: str
    rows: str
    loads: str

    def __str__(self) -> str:
        return "/".join(self)

    @staticmethod
    def parse(text: str) -> "Key":
        """Inverse of `str`.

        Raises:
            TableError: it is no key.
        """
        parts = text.split("/")
        if len(parts) != len(Key._fields) or parts[0] not in _KNOWN:
            raise TableError(
                f"a launch key must read op/kind/edge/rows/loads with op one of "
                f"{sorted(_KNOWN)}; got {_short(text)}"
            )
        key = Key(*parts)
        for name, allowed in domains.PARTS.items():
            if getattr(key, name) not in allowed:
                raise TableError(f"{name} of a launch key must be in {allowed}; got {_short(text)}")
        return key


class SpmmConfig(NamedTuple):
    """Tile of a BSR product.

    BM tokens, BK reduction lanes an iteration, GROUP token tiles walked together for L2; SWAP puts
    the weights on the rows of the matrix instruction and the tokens on its columns.
    """

    BM: int
    BK: int
    GROUP: int
    SWAP: bool
    num_warps: int
    num_stages: int


class SddmmConfig(NamedTuple):
    """Tile of a BSR sampled product: BM tokens an iteration, LANES columns of x in a program."""

    BM: int
    LANES: int
    num_warps: int
    num_stages: int


class GrowConfig(NamedTuple):
    """Tile of the dense gradient: TN rows by TK columns, BM tokens an iteration."""

    TN: int
    TK: int
    BM: int
    num_warps: int
    num_stages: int


class CsrConfig(NamedTuple):
    """Tile of a CSR product: BM tokens by BN rows, UNROLL entries of each row a step."""

    BM: int
    BN: int
    UNROLL: int
    num_warps: int


class CsrSddmmConfig(NamedTuple):
    """Tile of a CSR sampled product: BM tokens by BN entries of one row."""

    BM: int
    BN: int
    num_warps: int


class RingConfig(NamedTuple):
    """Shared memory in which the resident kernel streams weights, in KiB, all walkers together."""

    RING_KB: int


class PersistentConfig(NamedTuple):
    """Steps of the sum that the persistent kernel holds in shared memory, as far as they fit."""

    num_stages: int


Config = SpmmConfig | SddmmConfig | GrowConfig | CsrConfig | CsrSddmmConfig

CONFIGS: dict[str, type[Any]] = {
    "spmm": SpmmConfig,
    "spmm_t": SpmmConfig,
    "sddmm": SddmmConfig,
    "grow": GrowConfig,
    "csr_spmm": CsrConfig,
    "csr_spmm_t": CsrConfig,
    "csr_sddmm": CsrSddmmConfig,
}
"""Fields of each operation's entries."""

CONV: dict[str, type[Any]] = {
    "conv2d": SpmmConfig,
    "conv2d_dgrad": SpmmConfig,
    "conv2d_wgrad": SddmmConfig,
    "csr_conv2d": CsrConfig,
    "csr_conv2d_dgrad": CsrConfig,
    "csr_conv2d_wgrad": CsrSddmmConfig,
}
"""The same for convolutions, where a pixel is a token."""

OPTIONAL: dict[str, type[Any]] = {
    "spmm_resident": RingConfig,
    "spmm_t_resident": RingConfig,
    "spmm_persistent": PersistentConfig,
    "spmm_t_persistent": PersistentConfig,
}
"""The same for operations that a table may leave out."""

_KNOWN = CONFIGS | CONV | OPTIONAL

_texts = reprlib.Repr()
_texts.maxstring = _texts.maxother = _texts.maxlong = 80

_overrides: dict[tuple[str, Key], Any] = {}
_depending: list[Callable[[], None]] = []


def read(path: str | Path) -> tuple[str, dict[Key, Config]]:
    """Architecture class and entries of a table file.

    Raises:
        TableError: it is not a launch table, or an entry has other fields than its operation, or
            a field a value that no kernel can have. It names the file and the entry.
    """
    try:
        data = _parsed(Path(path))
        arch, entries = data["arch"], data["entries"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TableError(f"{path} is not a launch table: {_short(error)}") from None
    if arch not in domains.ARCHES:
        raise TableError(f"{path}: arch must be one of {domains.ARCHES}; got {_short(arch)}")
    try:
        return arch, {Key.parse(text): _config(text, fields) for text, fields in entries}
    except TableError as error:
        raise TableError(f"{path}: {error}") from None


def _parsed(path: Path) -> Any:
    """JSON of a file: no more than `MOST_BYTES`, every name once, and numbers that are numbers."""
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"expected at most {MOST_BYTES:,} bytes; got more")
    return json.loads(content, object_pairs_hook=_distinct, parse_constant=_refused)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"{_short(twice)} is there more than once")
    return found


def _refused(number: str) -> None:
    raise ValueError(f"{number} is not a number in JSON")


def _config(text: str, fields: object) -> Config:
    kind: type[Any] = _KNOWN[Key.parse(text).op]
    if not isinstance(fields, dict) or set(fields) != set(kind._fields):
        raise TableError(
            f"entry {text!r} must have the fields {kind._fields}; got {_short(fields)}"
        )
    for name, value in fields.items():
        expected = domains.why_not(name, value)
        if expected:
            raise TableError(f"entry {text!r}: {name} must be {expected}; got {_short(value)}")
    config: Config = kind(**fields)
    return config


def _short(value: object) -> str:
    """How something reads, as far as it fits a message, however deep it is."""
    return repr(value)[:200] if isinstance(value, Exception) else _texts.repr(value)


@cache
def table(arch: str) -> dict[Key, Config]:
    """The shipped table of an architecture class, with the user's entries on top.

    Raises:
        TableError: see `read`; or the user's table is one for another class.
    """
    entries = read(_FOLDER / f"{arch}.json")[1]
    path = os.environ.get(ENVIRONMENT)
    if path:
        user_arch, user = read(path)
        if user_arch != arch:
            raise TableError(f"{ENVIRONMENT}={path} is a table for {user_arch}; expected {arch}")
        entries |= user
    return entries


@cache
def find(arch: str, op: str, kind: str, edge: int | str, rows: str, *, tma: bool) -> Any:
    """(config, whether it loads through tensor descriptors) for a launch.

    `tma` says whether the operands allow descriptors; without an entry for them, or where they are
    not allowed, the pointer entry answers. A table without that one raises KeyError.
    """
    entries = table(arch)
    for loads in ("tma", "pointer") if tma else ("pointer",):
        key = Key(op, kind, str(edge), rows, loads)
        config = _overrides.get((arch, key)) or entries.get(key)
        if config is not None:
            return config, loads == "tma"
    raise KeyError(f"no launch entry {key} for {arch}")


@cache
def optional(arch: str, op: str, kind: str, edge: int) -> Any:
    """Entry of one of `OPTIONAL`, or None."""
    key = Key(op, kind, str(edge), "any", "tma")
    return _overrides.get((arch, key)) or table(arch).get(key)


@contextmanager
def overridden(arch: str, entries: Mapping[Key, Any]) -> Iterator[None]:
    """Use other entries inside a `with` block: for tuning and for tests."""
    before = dict(_overrides)
    _overrides.update({(arch, key): config for key, config in entries.items()})
    _forget()
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
        _forget()


def also_forget(clear: Callable[[], None]) -> None:
    """Call `clear` whenever entries change: it drops what was decided by them."""
    _depending.append(clear)


def _forget() -> None:
    find.cache_clear()
    optional.cache_clear()
    for clear in _depending:
        clear()
