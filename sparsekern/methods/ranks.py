"""Agreement between the ranks of a distributed job.

What ranks tell each other goes over a group of its own, on the CPU: a rank that does something else
meanwhile makes the others wait there, where a mix-up with its collectives could end the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from sparsekern.errors import RankMismatchError, SparseKernError, told

T = TypeVar("T")

_KEY = "sparsekern/rank{}"
_controls: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # groups to talk over, by the default
_meetings: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def is_distributed() -> bool:
    """Whether several ranks train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(slab: Tensor) -> None:
    """Sum a slab of the signed dense gradient over all ranks, in place.

    Summing signed gradients before any absolute value makes the result independent of the number of
    ranks; leaving it out was a bug of the first RigL code (Evci et al. 2020, appendix M).
    """
    dist.all_reduce(slab)


def gather(mine: T) -> list[T]:
    """What each rank gives, by rank; of a single process, what it gives itself.

    Raises:
        RankMismatchError: a rank did not come, within the time limit of the process group.
        Exception: the collective's own, where a rank has died.
    """
    if not is_distributed():
        return [mine]
    world, store = dist.group.WORLD, _store()
    meeting = _meetings[world] = _meetings.get(world, 0) + 1
    with suppress(Exception):
        store.set(_KEY.format(dist.get_rank()), str(meeting))
    everyone: list[T] = [mine] * dist.get_world_size()
    try:
        dist.all_gather_object(everyone, mine, group=_control())
    except Exception as error:
        missing = _missing(store, meeting)
        waited = any(word in str(error).lower() for word in ("timed out", "timeout"))
        if not waited or not missing:
            raise
        raise RankMismatchError(
            f"ranks {missing} did not come to a topology update that rank {dist.get_rank()} "
            "makes: they take other steps, or none"
        ) from error
    return everyone


def given_by(lead: int, mine: T) -> T:
    """What rank `lead` gives, on all ranks."""
    items = [mine]
    dist.broadcast_object_list(items, lead, group=_control())
    return items[0]


class Standing(NamedTuple):
    """Where a rank stands when an update begins.

    Attributes:
        step: weight step.
        last: that of the update before.
        layers: digest of the topology of each layer that takes part.
        joined: it has no inputs any more, see `torch.distributed.algorithms.join`.
    """

    step: int
    last: int | None
    layers: dict[str, str]
    joined: bool = False


def check_standing(mine: Standing) -> list[int]:
    """Compare where all ranks stand; returns those that have joined.

    Raises:
        RankMismatchError: naming the first rank and layer that differ from the others.
    """
    everyone = gather(mine)
    for what in ("step", "last"):
        odd = _odd([getattr(one, what) for one in everyone])
        if odd is not None:
            (rank, value), (other, right) = odd
            kind = "at weight step" if what == "step" else "after an update at weight step"
            raise RankMismatchError(
                f"rank {rank} stands {kind} {value}, rank {other} at {right}: all ranks must take "
                f"the same steps and load the same state (layers {list(mine.layers)})"
            )
    _compare([one.layers for one in everyone], "topology", "does not train")
    return [rank for rank, one in enumerate(everyone) if one.joined]


def check_equal(mine: Callable[[], Mapping[str, Mapping[str, Any]]]) -> None:
    """Compare what all ranks hold of each layer.

    Args:
        mine: makes it, by layer and by what it is; what a rank lacks is not compared there.

    Raises:
        RankMismatchError: naming the first layer, what of it differs, and the rank.
    """
    everyone = gather(together(mine, "compare its layers"))
    for name in dict.fromkeys(name for one in everyone for name in one):
        for what in dict.fromkeys(what for one in everyone for what in one.get(name, ())):
            held = [{name: one.get(name, {}).get(what)} for one in everyone]
            _compare(held, what, None)


def _compare(everyone: list[dict[str, Any]], what: str, lacks: str | None) -> None:
    for name in dict.fromkeys(name for one in everyone for name in one):
        odd = _odd([one.get(name) for one in everyone], skip=lacks is None)
        if odd is None:
            continue
        (rank, value), (other, right) = odd
        if value is None or right is None:
            without = rank if value is None else other
            raise RankMismatchError(
                f"rank {without} {lacks} layer {name!r}, which rank "
                f"{other if value is None else rank} trains: ranks that hold different layers, as "
                "pipeline stages do, can't share a method"
            )
        raise RankMismatchError(
            f"layer {name!r} has {_other(what)} on rank {rank} than on rank {other}: "
            f"digest {str(value)[:12]} against {str(right)[:12]}"
        )


def _odd(values: list[Any], skip: bool = False) -> tuple[tuple[int, Any], tuple[int, Any]] | None:
    """The first rank that differs from most, with its value, and one of the others."""
    held = [(rank, value) for rank, value in enumerate(values) if not (skip and value is None)]
    counts: dict[Any, int] = {}
    for _, value in held:
        counts[value] = counts.get(value, 0) + 1
    if len(counts) < 2:
        return None
    right = max(counts, key=lambda value: counts[value])  # the first of equals: rank 0's
    other = next(one for one in held if one[1] == right)
    return next(one for one in held if one[1] != right), other


def checksum(tensor: Tensor) -> Tensor:
    """A number, int64 and on the tensor's device, that any one changed bit changes."""
    size = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[tensor.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    bits = tensor.detach().contiguous().view(size).flatten()
    for start in range(0, bits.numel(), _PIECE):
        piece = bits[start : start + _PIECE]
        odd = 2 * torch.arange(start, start + piece.numel(), device=tensor.device) + 1
        total += (piece.long() * odd).sum()
    return total


_PIECE = 2**22


def together(work: Callable[[], T], what: str) -> T:
    """Do the same on all ranks; what one can't do fails on all of them, and nobody waits for it.

    Args:
        work: without collectives in it.
        what: it does, in a word for messages.

    Raises:
        RankMismatchError: on every rank, naming the first one on which it failed, and why. Where
            nobody else trains, what was raised comes as it is.
    """
    if not is_distributed():
        return work()
    failed: Exception | None = None
    done: list[T] = []
    try:
        done.append(work())
    except Exception as error:
        failed = error
    for rank, text in enumerate(gather(None if failed is None else _full(failed))):
        if text is not None:
            raise RankMismatchError(f"rank {rank} could not {what}: {text}") from failed
    return done[0]


def not_finite(find: Callable[[], list[str]], copies: bool) -> list[str]:
    """Layers whose values are not finite on some rank; each rank gets the same answer.

    Args:
        find: names those on this rank, without collectives.
        copies: all ranks hold the same values, so that they are to be finite everywhere or nowhere.

    Raises:
        RankMismatchError: of copies, some are finite and some are not; or as in `together`.
    """
    everyone = gather(together(find, "look at its weights"))
    found = list(dict.fromkeys(name for broken in everyone for name in broken))
    for name in found if copies else ():
        odd = _odd([name in broken for broken in everyone])
        if odd is not None:
            (rank, is_broken), (other, _) = odd
            raise RankMismatchError(
                f"layer {name!r} has other values on rank {rank} than on rank {other}: those of "
                f"rank {rank if is_broken else other} are not finite"
            )
    return found


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Let the exception of a collective say what it was for."""
    try:
        yield
    except Exception as error:
        if is_distributed() and not isinstance(error, SparseKernError):
            error.add_note(f"on rank {dist.get_rank()}, in {what}")
        raise


def _control() -> Any:
    """The group over which ranks talk: of gloo's own kind, for its default one may be in use."""
    world = dist.group.WORLD
    if world not in _controls:
        can = dist.is_gloo_available() and dist.get_backend() in ("gloo", "nccl")
        limit = _timeout(world)
        _controls[world] = dist.new_group(backend="gloo", timeout=limit) if can else world
    return _controls[world]


def _timeout(world: Any) -> timedelta | None:
    """How long the collectives of a group wait; None for torch's default."""
    with suppress(Exception):
        limit = world._get_backend(torch.device("cpu")).options._timeout
        return limit if isinstance(limit, timedelta) else None
    return None


def _store() -> Any:
    with suppress(Exception):
        return dist.distributed_c10d._get_default_store()
    return None


def _missing(store: Any, meeting: int) -> list[int]:
    """Ranks that have not come to a meeting."""
    missing: list[int] = []
    with suppress(Exception):
        for rank in range(dist.get_world_size()):
            key = _KEY.format(rank)
            if not store.check([key]) or int(store.get(key)) < meeting:
                missing.append(rank)
    return missing


def _full(error: Exception) -> str:
    return "; ".join((told(error), *getattr(error, "__notes__", ())))


def _other(what: str) -> str:
    """Of one thing or of several, for messages."""
    return f"other {what}" if what in ("values", "scores") else f"another {what}"
