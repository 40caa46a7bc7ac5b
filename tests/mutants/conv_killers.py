"""Short convolutions that a faulty kernel cannot get right: see `killers`."""

import functools
from typing import NamedTuple

import torch
from conv_problems import (
    PLAIN,
    ConvCase,
    assert_format,
    conv_oracle,
    dgrad_oracle,
    operands,
    wgrad_oracle,
    window,
)
from support import UNIT_ROUNDOFF

from sparsekern.kernels import (
    bsr_conv2d,
    bsr_conv2d_dgrad,
    bsr_conv2d_wgrad,
    csr_conv2d,
    csr_conv2d_wgrad,
    launch,
)


class Problem(NamedTuple):
    """A case in a dtype; integers are exact, and weights beyond the channels are NaN."""

    case: ConvCase
    dtype: torch.dtype = torch.float32
    exact: bool = True


def operands_of(p):
    """New ones each time: another mutant may have written to its inputs."""
    return operands(p.case, p.dtype, p.exact, padding=float("nan"))


@functools.cache
def want(p, what):
    """The oracle's answer."""
    o = operands_of(p)
    if what == "y":
        return conv_oracle(o.x, o.weight, o.bias, p.case.window)
    if what == "dx":
        return dgrad_oracle(o.dy, o.weight, p.case.x_shape, p.case.window)
    return wgrad_oracle(o.dy, o.x, o.pattern)


def got(p, what, o, **more):
    """What the kernel says."""
    case, csr = p.case, p.case.block == (1, 1)
    if what == "y":
        run = csr_conv2d.csr_conv2d if csr else bsr_conv2d.bsr_conv2d
        return run(o.x, o.values, *o.pattern.forward, o.bias, case.n_out, case.window)
    if what == "dx":
        run = csr_conv2d.csr_conv2d_dgrad if csr else bsr_conv2d_dgrad.bsr_conv2d_dgrad
        sizes = case.n_in, case.size, case.window
        return run(o.dy, o.values, *o.pattern.transposed, *sizes, **more)
    if csr:
        return csr_conv2d_wgrad.csr_conv2d_wgrad(o.dy, o.x, *o.pattern.forward[:2], case.window)
    blocks = *o.pattern.forward[:2], case.block
    return bsr_conv2d_wgrad.bsr_conv2d_wgrad(o.dy, o.x, *blocks, case.window)


def right(p, what):
    """Whether the kernel is right about a problem, in the layout of what it was given."""
    o, wanted = operands_of(p), want(p, what)
    made = got(p, what, o)
    assert made.dtype == p.dtype
    if what != "dw":
        assert_format(made, o.x if what == "y" else o.dy)
    if p.exact:
        return torch.equal(made.double(), wanted.value)
    u, out = UNIT_ROUNDOFF[torch.float32], UNIT_ROUNDOFF[p.dtype]
    gamma = wanted.terms * u / (1 - wanted.terms * u) * wanted.magnitude
    rounded = 0 if p.dtype == torch.float32 else out * (wanted.value.abs() + gamma)
    return bool(((made.double() - wanted.value).abs() <= gamma + rounded).all())


def in_parts(p, what):
    """The same with the pixels cut into parts even where that does not pay."""
    before, launch.START_BYTES = launch.START_BYTES, 0
    try:
        return right(p, what)
    finally:
        launch.START_BYTES = before


def chunked(p, what):
    """The same with images copied one by one and two by two."""
    before, o = launch.CHUNK_ELEMENTS, operands_of(p)
    pair = 2 * (o.x[:1].numel() + o.dy[:1].numel())
    try:
        for launch.CHUNK_ELEMENTS in (1, pair):
            if not right(p, what):
                return False
    finally:
        launch.CHUNK_ELEMENTS = before
    return True


def launched(p, what, bound):
    """Images of each launch under a bound on what is copied; None if the answer is wrong."""
    before, launch.CHUNK_ELEMENTS = launch.CHUNK_ELEMENTS, bound
    images = []
    module, name = LAUNCHERS[p.case.block == (1, 1)]
    # where the launcher looks it up: a mutant's is another module than the one it stands in for
    names = getattr(module, module.__name__.rpartition(".")[2]).__globals__
    layout = names[name]

    def seen(layout):
        return layout._replace(copied=lambda a: images.append(len(a)) or layout.copied(a))

    try:
        names[name] = seen(layout) if name == "COLUMNS" else lambda groups: seen(layout(groups))
        return images if right(p, what) else None
    finally:
        launch.CHUNK_ELEMENTS = before
        names[name] = layout


def whole(p, what):
    """Images that need no copy are not taken apart, however many: one launch."""
    return launched(p, what, 1) == [p.case.batch]


def by_pairs(p, what):
    """What is copied for a launch, in and out, keeps to the bound: two images and one here."""
    o = operands_of(p)
    return launched(p, what, 2 * (o.x[0].numel() + o.dy[0].numel())) == [2, 1]


def both_by_pairs(p, what):
    """What is copied of both operands of a weight gradient keeps to the bound: two and one here."""
    o, names = operands_of(p), csr_conv2d_wgrad.csr_conv2d_wgrad.__globals__
    before, adjacent, images = launch.CHUNK_ELEMENTS, names["columns_adjacent"], []
    copied = [a[0].numel() for a in (o.dy, o.x) if not names["has_adjacent_columns"](a)]
    try:
        launch.CHUNK_ELEMENTS = 2 * sum(copied)
        names["columns_adjacent"] = lambda a: images.append(len(a)) or adjacent(a)
        return bool(copied) and right(p, what) and images == [2, 2, 1, 1]
    finally:
        launch.CHUNK_ELEMENTS = before
        names["columns_adjacent"] = adjacent


LAUNCHERS = {False: (bsr_conv2d, "channels_layout"), True: (csr_conv2d, "COLUMNS")}


def turned(p, what):
    """The input gradient in the other memory format."""
    o, wanted = operands_of(p), want(p, what).value
    formats = torch.contiguous_format, torch.channels_last
    made = [got(p, what, o, memory_format=f) for f in formats]
    as_asked = all(a.is_contiguous(memory_format=f) for a, f in zip(made, formats, strict=True))
    return as_asked and all(torch.equal(a.double(), wanted) for a in made)


def hot(p, what):
    """Infinite gradients: what is zero by decree stays zero, not zero times infinity."""
    o = operands_of(p)
    o.dy[:], o.x[:] = float("inf"), float("nan")
    dw, inside = got(p, what, o), o.pattern.inside()
    return bool(dw[inside].isnan().all() and (dw[~inside] == 0).all())


def apart(p, what):
    """An infinite channel reaches only what is connected to it."""
    o, groups = operands_of(p), p.case.window.groups
    linked = o.pattern.dense(torch.ones(o.values.shape)).sum((2, 3)) > 0  # (C_out, C_in / groups)
    if what == "y":
        o.x[:, 0] = float("inf")
        alone = ~linked[: len(linked) // groups, 0]
    else:
        o.dy[:, 0] = float("inf")
        alone = ~linked[0]
    made = got(p, what, o)[:, : len(alone)]  # of the first group, which the channel belongs to
    return bool(alone.any()) and bool(made[:, alone].isfinite().all())


def apart_from_a_weight(p, what):
    """An infinite weight reaches only what it connects."""
    o = operands_of(p)
    o.values[0] = float("inf")
    reached = o.pattern.dense(torch.arange(len(o.values)).view(-1, 1, 1) == 0) > 0
    made = got(p, what, o)[:, : reached.shape[0 if what == "y" else 1]]
    alone = ~reached.any(1).flatten(1).any(1) if what == "y" else ~reached.any(0).flatten(1).any(1)
    return bool(alone.any()) and bool(made[:, alone].isfinite().all())


# nothing is the same along both axes, channels are ragged in every group
ODD = window(kernel=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
TURNED = window(kernel=(2, 3), stride=(1, 3), padding=(0, 2), dilation=(2, 1), groups=2)
HALF = torch.float16


def problem(block, n_out, n_in, size, w=PLAIN, batch=2, kind="random", layout="nhwc", **more):
    """A case and how it is computed."""
    bias = more.pop("bias", True)
    return Problem(ConvCase(block, n_out, n_in, size, w, batch, kind, layout, bias), **more)


TINY = problem((16, 16), 18, 17, (3, 4), layout="strided")
MIXED = problem((16, 32), 2 * 18, 2 * 35, (5, 4), ODD, layout="channels")
MIXED_HALF = problem((32, 16), 2 * 35, 2 * 18, (5, 4), ODD, dtype=HALF)
TURN_HALF = problem((16, 16), 2 * 33, 2 * 18, (4, 7), TURNED, 3, dtype=HALF, layout="nchw")
LONG = problem((16, 16), 20, 16, (9, 9), window(1, padding=1), 7, "full", bias=False)
MANY_TAPS = problem((16, 16), 17, 16, (4, 5), window((3, 5), padding=(1, 2)), 1, "full")
ROUGH = problem((16, 16), 16, 60, (3, 3), window(3), 1, "full", exact=False)
ROUGH_HALF = problem((64, 32), 66, 90, (3, 3), window(3), 1, "full", exact=False, dtype=HALF)
POINT = problem((16, 16), 1, 1, (1, 1), window(1), 1, "full", "nchw")
EMPTY = problem((16, 16), 20, 20, (2, 3), kind="empty")
NOTHING = problem((16, 16), 20, 20, (2, 3), batch=0)
SPARSE_PHASES = problem((16, 16), 17, 18, (5, 5), window(1, stride=(2, 3)), layout="nchw")
COPIED = problem((16, 16), 17, 16, (3, 2), window((1, 2)), 3, layout="nchw")
COPIED_BACK = problem((16, 16), 17, 16, (3, 2), window((2, 1)), 3, layout="channels")
PARTS = problem((16, 16), 17, 18, (5, 7), batch=9)
PARTS_ODD = problem((16, 16), 2 * 17, 2 * 18, (9, 8), ODD, batch=9, dtype=HALF)


def csr(p, n_out, n_in):
    """The same without blocks."""
    return p._replace(case=p.case._replace(block=(1, 1), n_out=n_out, n_in=n_in))


CSR_TINY, CSR_MIXED = csr(TINY, 5, 3), csr(MIXED, 2 * 9, 2 * 5)
CSR_TURN, CSR_LONG = csr(TURN_HALF, 2 * 5, 2 * 10), csr(LONG, 19, 18)
CSR_ROUGH, CSR_COPIED = csr(ROUGH, 3, 40), csr(COPIED, 5, 4)
CSR_APART = csr(problem((1, 1), 1, 1, (3, 4), window((1, 2), groups=2)), 2 * 9, 2 * 5)
CSR_LAST = CSR_COPIED._replace(case=CSR_COPIED.case._replace(layout="nhwc"))
CSR_PARTS = csr(PARTS, 3, 4)._replace(case=csr(PARTS, 3, 4).case._replace(batch=60))

KILLERS = {
    "bsr_conv2d": [
        *((right, p, "y") for p in (TINY, MIXED, MIXED_HALF, TURN_HALF)),
        *((right, p, "y") for p in (POINT, EMPTY, NOTHING, MANY_TAPS)),
        *((check, COPIED, "y") for check in (right, chunked)),
        (whole, COPIED._replace(case=COPIED.case._replace(layout="nhwc")), "y"),
        (by_pairs, COPIED, "y"),
        (chunked, COPIED_BACK, "y"),
        *((right, p, "y") for p in (LONG, ROUGH, ROUGH_HALF)),
    ],
    "bsr_conv2d_dgrad": [
        *((right, p, "dx") for p in (TINY, MIXED, MIXED_HALF, TURN_HALF, SPARSE_PHASES)),
        *((right, p, "dx") for p in (POINT, EMPTY, NOTHING, MANY_TAPS)),
        (turned, TINY, "dx"),
        *((check, COPIED, "dx") for check in (right, chunked)),
        (chunked, COPIED_BACK, "dx"),
        *((right, p, "dx") for p in (LONG, ROUGH, ROUGH_HALF)),
    ],
    "pixels": [
        *((right, p, w) for p in (TINY, MIXED, CSR_TINY, CSR_MIXED) for w in ("y", "dx", "dw")),
        *((right, p, "dx") for p in (SPARSE_PHASES, csr(SPARSE_PHASES, 3, 4))),
        *((right, p, w) for p in (MANY_TAPS, LONG) for w in ("y", "dx")),
        *((in_parts, p, "dw") for p in (PARTS, PARTS_ODD, CSR_PARTS)),
    ],
    "bsr_conv2d_wgrad": [
        *((right, p, "dw") for p in (TINY, MIXED, MIXED_HALF, TURN_HALF, POINT, EMPTY, NOTHING)),
        *((in_parts, p, "dw") for p in (PARTS, PARTS_ODD)),
        (hot, COPIED._replace(case=COPIED.case._replace(kind="full", batch=1)), "dw"),
        *((chunked, p, "dw") for p in (COPIED, COPIED_BACK)),
        (right, ROUGH._replace(case=ROUGH.case._replace(size=(9, 9), batch=3)), "dw"),
    ],
    "csr_conv2d": [
        *((right, p, w) for p in (CSR_TINY, CSR_MIXED, CSR_TURN) for w in ("y", "dx")),
        *((right, csr(p, 4, 3), w) for p in (POINT, EMPTY, NOTHING) for w in ("y", "dx")),
        *((check, CSR_APART, w) for check in (apart, apart_from_a_weight) for w in ("y", "dx")),
        (right, csr(SPARSE_PHASES, 3, 4), "dx"),
        (turned, CSR_TINY, "dx"),
        *((check, CSR_LAST, w) for check in (right, chunked) for w in ("y", "dx")),
        *((chunked, CSR_COPIED, w) for w in ("y", "dx")),
        (whole, CSR_COPIED, "y"),
        *((right, p, w) for p in (CSR_LONG, CSR_ROUGH) for w in ("y", "dx")),
    ],
    "csr_conv2d_wgrad": [
        *((right, p, "dw") for p in (CSR_TINY, CSR_MIXED, CSR_TURN)),
        *((right, csr(p, 4, 3), "dw") for p in (POINT, EMPTY, NOTHING)),
        (right, CSR_PARTS, "dw"),
        *((chunked, p, "dw") for p in (CSR_LAST, CSR_COPIED)),
        (both_by_pairs, CSR_LAST, "dw"),
        (right, CSR_ROUGH._replace(case=CSR_ROUGH.case._replace(size=(9, 9), batch=3)), "dw"),
    ],
}
