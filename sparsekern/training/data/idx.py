"""IDX files, the format of MNIST: a magic number, sizes, unsigned bytes; and bounded reading."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from sparsekern.errors import DataError

_UINT8 = 0x08
_CHUNK = 1 << 20

MOST_BYTES = 1 << 29
"""Of the data in a file, unpacked: ten times those of MNIST. A small .gz may hold any number."""


def read_idx(path: Path, dims: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped if its name ends in .gz.

    Args:
        path: the file.
        dims: how many dimensions it must have: 3 for images (n, height, width), 1 for labels.

    Returns:
        A uint8 array, at least one element in each dimension.

    Raises:
        DataError: it can't be read, its magic number is another, its sizes make more than
            `MOST_BYTES`, or its length does not fit.
    """
    try:
        # zlib checks its sums at the end only, so a body too long or too short is named first
        with cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            shape = _read_header(file, path, dims)
            body = read_at_most(file, math.prod(shape) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a readable IDX file; got: {error}") from error
    if len(body) != math.prod(shape):
        got = f"{len(body):,}" if len(body) < math.prod(shape) else "more"
        raise DataError(f"{path}: expected {math.prod(shape):,} bytes of data {shape}; got {got}")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def _read_header(file: BinaryIO, path: Path, dims: int) -> tuple[int, ...]:
    size = 4 + 4 * dims
    header = file.read(size)
    expected = bytes((0, 0, _UINT8, dims))
    if header[:4] != expected:
        raise DataError(
            f"{path}: expected magic number 0x{expected.hex()} (unsigned bytes, {dims} "
            f"dimension{'s' * (dims > 1)}); got 0x{header[:4].hex()}"
        )
    if len(header) != size:
        raise DataError(f"{path}: expected a header of {size} bytes; got {len(header)}")
    shape = tuple(int(n) for n in np.frombuffer(header, dtype=">u4", offset=4))
    if min(shape) < 1:
        raise DataError(f"{path}: expected positive sizes; got {shape}")
    if math.prod(shape) > MOST_BYTES:
        raise DataError(
            f"{path}: expected at most {MOST_BYTES:,} bytes of data; got sizes {shape}, "
            f"which make {math.prod(shape):,}"
        )
    return shape


def read_at_most(file: BinaryIO, size: int) -> bytearray:
    """Read up to `size` bytes, allocating no more than what is there: headers may lie."""
    content = bytearray()
    while len(content) < size and (chunk := file.read(min(size - len(content), _CHUNK))):
        content += chunk
    return content


class Bounded:
    """A binary file that raises `DataError` when more than `most` bytes of it are asked for."""

    def __init__(self, file: BinaryIO, most: int = MOST_BYTES) -> None:
        self.file, self.left, self.most = file, most, most

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes; all there are if it is negative."""
        most = self.left + 1 if size < 0 else min(size, self.left + 1)
        return self._counted(bytes(read_at_most(self.file, most)))

    def readline(self) -> bytes:
        """Read up to the next line break."""
        return self._counted(self.file.readline(self.left + 1))

    def tell(self) -> int:
        """Bytes read."""
        return self.most - self.left

    def _counted(self, content: bytes) -> bytes:
        self.left -= len(content)
        if self.left < 0:
            raise DataError(f"expected at most {self.most:,} bytes, unpacked; got more")
        return content
