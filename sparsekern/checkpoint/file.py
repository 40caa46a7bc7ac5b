"""The file: safetensors, with one JSON text in its metadata and a digest over all of it.

No pickle. Names of tensors that do not belong to the model's state_dict begin with `OWN`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekern.errors import CheckpointError, UnavailableError
from sparsekern.show.output_files import write_whole

OWN = "@"
VERSION = 1
MOST_HEADER_BYTES = 100_000_000  # the limit of safetensors itself
_HEAD, _DIGEST = "sparsekern", "sparsekern.sha256"


class Content(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: by name, on the CPU.
        head: plain data; empty for a file that something else wrote.
    """

    tensors: dict[str, Tensor]
    head: dict[str, Any]


def write(path: Path, tensors: Mapping[str, Tensor], head: Mapping[str, Any]) -> None:
    """Write a file, whole or not at all.

    Raises:
        CheckpointError: a tensor has no memory of its own kind.
        OSError: it can't be written; the old file is there then, or the new one.
    """
    text = json.dumps({"version": VERSION, **head}, allow_nan=False)
    named, aliases = _unshared(tensors)
    if aliases:
        text = json.dumps({**json.loads(text), "aliases": aliases}, allow_nan=False)
    if len(text) > MOST_HEADER_BYTES // 2:
        raise CheckpointError(f"the plain data must be smaller; got {len(text)} bytes of JSON")
    metadata = {"format": "pt", _HEAD: text, _DIGEST: _digest(text, named)}
    data: bytes = _safetensors().torch.save(named, metadata)
    write_whole(path, data)


def read(path: Path) -> Content:
    """Read a file, ours or any of safetensors, and check it.

    Raises:
        CheckpointError: it is damaged, or of a version that is not known.
        OSError: it can't be read.
    """
    library = _safetensors()
    metadata = _metadata(path)
    try:
        with library.safe_open(os.fspath(path), framework="pt") as file:
            # clones: what a file is mapped to changes with the file
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (library.SafetensorError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if _HEAD not in metadata:
        return Content(tensors, {})
    if metadata.get(_DIGEST) != _digest(metadata[_HEAD], tensors):
        raise CheckpointError(f"{path} is damaged: its content has another digest than it says")
    head = _parsed(metadata[_HEAD], path)
    if head.get("version") != VERSION:
        raise CheckpointError(
            f"{path} must be of version {VERSION}; got {str(head.get('version'))[:20]}"
        )
    aliases = head.pop("aliases", {})
    if not isinstance(aliases, dict) or any(
        name in tensors or not isinstance(kept, str) or kept not in tensors
        for name, kept in aliases.items()
    ):
        raise CheckpointError(f"{path} is damaged: its shared tensors are not there")
    return Content(tensors | {name: tensors[kept] for name, kept in aliases.items()}, head)


def _metadata(path: Path) -> dict[str, str]:
    """The texts in the header, which must say everything once."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MOST_HEADER_BYTES or size > os.fstat(file.fileno()).st_size - 8:
            raise CheckpointError(f"{path} is damaged: no safetensors header")
        header = file.read(size)
    try:
        text = header.decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is damaged: its header is no text") from None
    found = _parsed(text, path).get("__metadata__", {})
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise CheckpointError(f"{path} is damaged: its metadata must be texts")
    return found


def _parsed(text: str, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise ValueError("a name comes twice")
        return made

    try:
        parsed = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} is damaged: its header must be an object")
    return parsed


def _unshared(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, on the CPU, in memory of its own; and names of the same, by name."""
    held: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        t = tensor.detach()
        plain = type(t) is Tensor and t.layout is torch.strided and not t.is_meta
        if not plain or t.is_quantized:
            kind = "a meta tensor" if t.is_meta else f"{type(t).__name__} of layout {t.layout}"
            raise CheckpointError(f"tensor {name!r} must be a plain one, with data; got {kind}")
        key = (t.data_ptr(), t.device, t.dtype, tuple(t.shape), t.stride())
        if t.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        copied = t.cpu().contiguous()
        # a tensor that shares memory, and conjugates and negatives, which are views
        held[name] = copied.clone() if copied.data_ptr() == t.data_ptr() else copied
    return held, aliases


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"\0{name}\0{t.dtype}\0{tuple(t.shape)}\0".encode())
        if t.numel():
            digest.update(t.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _safetensors() -> Any:
    try:
        import safetensors.torch  # noqa: PLC0415  # not needed to train
    except ImportError as error:
        raise UnavailableError(f"files need the package safetensors: {error}") from None
    return safetensors


def own_names(names: Iterable[str]) -> list[str]:
    """Those that a model must not use."""
    return [name for name in names if name.startswith(OWN)]
