"""Which launch configurations are worth measuring: pure functions of a key and its current entry.

Candidates are moves from the current configuration: one field doubled or halved, or two that
belong together. Running the command again from a table it wrote goes a step further.
"""

from __future__ import annotations

from typing import Any

from sparsekern.kernels.tables import (
    Config,
    CsrConfig,
    CsrSddmmConfig,
    GrowConfig,
    Key,
    SddmmConfig,
    SpmmConfig,
)

LIMIT = 12
"""Candidates of one key, the current configuration among them."""

_TWO_BYTES = "half"
_WIDEST_BLOCK = 128
_DESCRIPTOR_EDGE = 256  # a side of a tensor descriptor's box, at most
_ACCUMULATORS = {"half": 128, "tf32": 128, "ieee": 64}  # of a thread; beyond it registers spill

# the most promising first: steps in powers of two, except num_stages (+1) and SWAP (flipped)
_CSR_MOVES: tuple[dict[str, int], ...] = (
    {"BN": 1},
    {"BN": -1},
    {"BM": 1, "BN": -1},
    {"BM": -1, "BN": 1},
    {"num_warps": 1},
    {"num_warps": -1},
    {"BM": 1},
    {"BM": -1},
    {"BN": 1, "num_warps": 1},
)

_MOVES: dict[type[Any], tuple[dict[str, int], ...]] = {
    SpmmConfig: (
        {"BM": 1, "num_warps": 1},
        {"BM": -1, "num_warps": -1},
        {"BM": 1},
        {"BM": -1},
        {"num_stages": 1},
        {"SWAP": 1},
        {"SWAP": 1, "BM": 1},
        {"SWAP": 1, "BM": -1},
        {"num_warps": 1},
        {"num_warps": -1},
        {"BK": 1, "num_stages": -1},
        {"BK": -1, "num_stages": 1},
        {"GROUP": 1},
        {"GROUP": -1},
        {"num_stages": -1},
        {"BM": -1, "num_stages": 1},
        {"GROUP": 2},
    ),
    SddmmConfig: (
        {"LANES": 1, "num_warps": 1},
        {"LANES": -1, "num_warps": -1},
        {"LANES": 1},
        {"LANES": -1},
        {"num_stages": 1},
        {"num_stages": -1},
        {"BM": 1, "num_stages": -1},
        {"BM": -1, "num_stages": 1},
        {"num_warps": 1},
        {"num_warps": -1},
        {"BM": -1},
        {"BM": 1},
        {"LANES": -1, "num_stages": 1},
    ),
    GrowConfig: (
        {"num_stages": 1},
        {"num_stages": -1},
        {"TK": -1},
        {"TK": 1},
        {"TN": 1, "TK": -1},
        {"TN": 1},
        {"BM": -1, "num_stages": 1},
        {"BM": 1, "num_stages": -1},
        {"num_warps": -1},
        {"num_warps": 1},
        {"TK": -1, "num_stages": 1},
        {"TK": -1, "num_warps": -1},
        {"BM": 1},
        {"BM": -1},
    ),
    CsrConfig: (*_CSR_MOVES, {"UNROLL": 1}, {"UNROLL": -1}),
    CsrSddmmConfig: _CSR_MOVES,
}


def candidates(key: Key, current: Config, shared: int) -> list[Config]:
    """The current configuration first, then its legal neighbours, `LIMIT` in all at most.

    Args:
        key: what is to be tuned.
        current: its entry now, legal or not.
        shared: bytes of shared memory that one program may have.
    """
    found = [current]
    for move in _MOVES[type(current)]:
        moved = _moved(current, move)
        if moved not in found and is_legal(key, moved, shared):
            found.append(moved)
    return found[:LIMIT]


def _moved(config: Config, move: dict[str, int]) -> Config:
    fields = config._asdict()
    for name, step in move.items():
        value = fields[name]
        if name == "SWAP":
            fields[name] = not value
        elif name == "num_stages":
            fields[name] = value + step
        else:
            fields[name] = value << step if step > 0 else value >> -step
    return type(config)(**fields)


def is_legal(key: Key, config: Config, shared: int) -> bool:
    """Whether a configuration can be compiled, fits a program, and is no other one in disguise."""
    sizes = {k: v for k, v in config._asdict().items() if k not in ("SWAP", "num_stages")}
    if not all(size > 0 and size & (size - 1) == 0 for size in sizes.values()):
        return False
    if isinstance(config, CsrConfig | CsrSddmmConfig):
        return _csr_is_legal(key, config)
    # tensor cores take warps by the four
    if config.num_warps not in (4, 8) or not 2 <= config.num_stages <= 6 or config.BM < 16:
        return False
    threads = 32 * config.num_warps
    if accumulators(key, config) > threads * _ACCUMULATORS[key.kind]:
        return False
    return shared_bytes(key, config) <= shared and _shape_is_legal(key, config)


def accumulators(key: Key, config: Config) -> int:
    """fp32 sums that a program holds in registers."""
    if isinstance(config, GrowConfig):
        return config.TN * config.TK
    if isinstance(config, SddmmConfig):
        return max(config.LANES, int(key.edge)) * int(key.edge)
    if isinstance(config, SpmmConfig):
        return config.BM * int(key.edge)
    return config.BM * config.BN


def shared_bytes(key: Key, config: Config) -> int:
    """Shared memory of a tile's pipeline: both operands, once for every stage."""
    if isinstance(config, CsrConfig | CsrSddmmConfig):
        return 0
    size = 2 if key.kind == _TWO_BYTES else 4
    if isinstance(config, GrowConfig):
        stage = config.BM * (config.TN + config.TK)
    elif isinstance(config, SddmmConfig):
        stage = config.BM * (max(config.LANES, int(key.edge)) + int(key.edge))
    else:
        stage = config.BK * (config.BM + int(key.edge))
    return config.num_stages * stage * size


def _shape_is_legal(key: Key, config: SpmmConfig | SddmmConfig | GrowConfig) -> bool:
    tma = key.loads == "tma"
    if tma and config.BM > _DESCRIPTOR_EDGE:
        return False
    if isinstance(config, GrowConfig):
        # one entry serves all blocks, so a tile holds the widest of them
        return all(_WIDEST_BLOCK <= t <= _DESCRIPTOR_EDGE for t in (config.TN, config.TK))
    edge = int(key.edge)
    if isinstance(config, SddmmConfig):
        return config.BM <= 128 and edge <= config.LANES <= 512
    if not 16 <= config.BK <= 128 or config.GROUP > 64:
        return False
    if tma:
        # the launcher cuts BK down to the block; swapped, the block fills the 64 rows of wgmma
        return edge >= config.BK and (not config.SWAP or edge >= 64)
    return not config.SWAP


def _csr_is_legal(key: Key, config: CsrConfig | CsrSddmmConfig) -> bool:
    if not 32 <= config.BM <= 512 or config.BN > 128 or config.num_warps > 8:
        return False
    if isinstance(config, CsrConfig) and config.UNROLL > 8:
        return False
    # two sets of values beside the sums: what is loaded, and where from
    return accumulators(key, config) <= 32 * config.num_warps * _ACCUMULATORS["ieee"]
