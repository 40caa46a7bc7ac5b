"""What the numba kernels of the sparse convolution are told: named tuples of numbers and arrays.

numba takes them as they are. Addresses are integers, strides count elements.
"""

from typing import Any, NamedTuple

import numpy as np

from sparsekern.ops.cpu.jit.conv_pack import VIEW

Range = tuple[int, int]


class Task(NamedTuple):
    """One run of chunks, and what it does with them.

    Attributes:
        chunks: first and last + 1.
        outputs: block rows of the product.
        blocks: blocks of the weight gradient.
        part: of the weight gradient, which is summed in parts.
    """

    chunks: Range
    outputs: Range = (0, 0)
    blocks: Range = (0, 0)
    part: int = 0


class Cut(NamedTuple):
    """How the line of pixels is cut.

    Attributes:
        chunk: pixels of a chunk.
        tile: pixels of a register tile.
        total: pixels of the line.
        front: pixels of the source that are needed before a chunk, in whole vectors.
        back: and after it.
        beyond: pixels of x that the dots need after a chunk.
    """

    chunk: int
    tile: int
    total: int
    front: int
    back: int
    beyond: int


class Image(NamedTuple):
    """An image to be copied into scratch, as far as it is read.

    Attributes:
        address: of the tensor.
        views: int64, (phases, VIEW), see `conv_pack`.
        groups: parts of the channels.
        channels: of one group.
        edge: channels that a block takes.
        used: uint8, (phases, groups, blocks of channels) in one row: whether anything reads them.
    """

    address: int
    views: Any
    groups: int
    channels: int
    edge: int
    used: Any


class Scratch(NamedTuple):
    """What one task works on.

    Attributes:
        source: address of the first image.
        acc: of one block row of a product.
        other: of x, as the dots read it.
        ld: row stride of the source.
        lda: of the block row.
        ldx: of x.
        found: int64, for runs of pixels.
    """

    source: int
    acc: int
    other: int
    ld: int
    lda: int
    ldx: int
    found: Any


class Weights(NamedTuple):
    """Blocks of weights.

    Attributes:
        address: of the first.
        block: elements from one to the next.
        out: from one output channel to the next.
        into: from one input channel to the next.
    """

    address: int
    block: int
    out: int
    into: int


class Places(NamedTuple):
    """What each block reads, in the order in which the blocks are summed; int32.

    Attributes:
        at: (blocks,), where in scratch.
        count: (blocks,), how many channels; (1,) if one count holds for all.
        slot: (blocks,), where its weights are; empty if they lie in that order.
    """

    at: Any
    count: Any
    slot: Any


class Outputs(NamedTuple):
    """The image that a product writes.

    Attributes:
        address: of the tensor.
        views: int64, (phases, VIEW).
        groups: parts of the channels.
        blocks: block rows of one group.
        channels: of one group.
        edge: channels of a block row.
        bias: address, or 0.
    """

    address: int
    views: Any
    groups: int
    blocks: int
    channels: int
    edge: int
    bias: int


class Sums(NamedTuple):
    """A product: y, or the input gradient.

    Attributes:
        weights: the blocks.
        ptr: int32, where each block row starts; empty if there is no such product.
        places: what each block reads.
        out: what is written.
    """

    weights: Weights
    ptr: Any
    places: Places
    out: Outputs


class Dots(NamedTuple):
    """The weight gradient.

    Attributes:
        address: of the part that a task adds to.
        block: (bh, bw).
        crow: int32, where each block row starts; empty if it is not asked for.
        at: int32, (nnzb,), where each block reads x in scratch.
        count: int32, (nnzb,) or (1,), how many channels of x.
        rows: block rows of one group.
        outs: output channels of one group.
        panels: of x, of one group; 0 if x is rows of channels.
    """

    address: int
    block: Range
    crow: Any
    at: Any
    count: Any
    rows: int
    outs: int
    panels: int


_NO_VIEW = np.zeros((0, VIEW), np.int64)
NO_INDEX = np.zeros(0, np.int32)
NO_IMAGE = Image(0, _NO_VIEW, 1, 0, 1, np.zeros(0, np.uint8))
_NO_OUTPUTS = Outputs(0, _NO_VIEW, 1, 1, 0, 1, 0)
_NOWHERE = Places(NO_INDEX, NO_INDEX, NO_INDEX)
NO_SUMS = Sums(Weights(0, 0, 0, 0), NO_INDEX, _NOWHERE, _NO_OUTPUTS)
NO_DOTS = Dots(0, (1, 1), NO_INDEX, NO_INDEX, NO_INDEX, 1, 0, 0)
