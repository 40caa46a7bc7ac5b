"""What a Gluon kernel is given when its source runs in numpy: pointers, shared memory, matrices."""

import types

import numpy as np
import torch
from support import integers


class Num(np.ndarray):
    """An array that takes `.to`, which changes nothing: integers and sums here are exact."""

    def to(self, _dtype):
        return self


class Pointer:
    """A pointer into a tensor, or an array of them; loads outside it fail."""

    dtype = types.SimpleNamespace(element_ty=None)

    def __init__(self, tensor, offset=0):
        self.tensor, self.offset = tensor, offset
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        self.flat = tensor.as_strided((last + 1 if tensor.numel() else 0,), (1,))

    def __add__(self, offset):
        return Pointer(self.tensor, self.offset + offset)

    def load(self, mask=True, other=None):
        flat = self.flat
        if np.ndim(self.offset) == 0:
            assert not mask or 0 <= self.offset < len(flat)
            return flat[self.offset].item() if mask else other
        loaded = np.full(self.offset.shape, other, np.float32)
        loaded[mask] = flat[torch.from_numpy(np.array(self.offset[mask]))].float()
        return loaded.view(Num)

    def store(self, values, mask):
        index = torch.from_numpy(np.array(self.offset[mask]))
        assert bool(torch.isnan(self.flat[index]).all()), "stored twice"
        self.flat[index] = torch.from_numpy(np.array(values[mask])).to(self.tensor.dtype)


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def index(self, i):
        assert 0 <= i < len(self.array)
        return Shared(self.array[i])

    def permute(self, order):
        return Shared(self.array.transpose(order))


class Descriptor:
    """A TensorDescriptor as the kernel uses it."""

    def __init__(self, real):
        self.dtype, self.layout, self.block_shape = real.base.dtype, real.layout, real.block_shape
        matrix = torch.as_strided(real.base, real.shape, real.strides, real.base.storage_offset())
        self.matrix = matrix.float().numpy()

    def box(self, row, column):
        got = self.matrix[row : row + self.block_shape[0], column : column + self.block_shape[1]]
        out = np.zeros(self.block_shape, np.float32)
        out[: got.shape[0], : got.shape[1]] = got
        return out


def sparse(block, rows, columns, density, dtype):
    """Values in CSR order, both indices, and the dense matrix; some rows and columns are empty."""
    mask = torch.rand(rows, columns) < density
    mask[rows // 2] = False
    mask[:, columns // 3] = False
    row, col = mask.nonzero(as_tuple=True)
    values = integers(len(row), *block, dtype=dtype)
    blocks = torch.zeros(rows, columns, *block, dtype=dtype)
    blocks[row, col] = values
    perm = torch.argsort(col, stable=True)
    starts = [torch.cat([torch.zeros(1), mask.sum(d).cumsum(0)]).to(torch.int32) for d in (1, 0)]
    dense = blocks.transpose(1, 2).reshape(rows * block[0], columns * block[1])
    return values, starts, col.int(), row[perm].int(), perm.int(), dense
