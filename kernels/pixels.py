"""How the kernels of convolutions walk pixels: what their programs share."""

# triton decorates without types
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

__all__ = ["FAR", "advance", "below", "both", "inside", "phase", "pixel", "tile_of_program", "walk"]

# a row so far above the image that no tap reaches it
FAR = tl.constexpr(-(2**30))


@triton.jit
def tile_of_program(M, R, BM: tl.constexpr, GROUP: tl.constexpr):
    """Rank and first pixel of this program: ranks slow, the pixels of a group fast."""
    pid = tl.program_id(0)
    first = pid // (GROUP * R) * GROUP
    size = min(tl.cdiv(M, BM) - first, GROUP)
    within = pid % (GROUP * R)
    return within // size, (first + within % size) * BM


@triton.jit
def pixel(m, PQ, Q):
    """Image, row and column of pixels, of images of PQ pixels in rows of Q."""
    n = m // PQ
    at = m - n * PQ
    p = at // Q
    return n, p, at - p * Q


@triton.jit
def phase(H, W, SH: tl.constexpr, SW: tl.constexpr):
    """First row and column of the input pixels of this program, and how many of each follow."""
    fh = tl.program_id(1) // SW
    fw = tl.program_id(1) % SW
    return fh, fw, (H - fh + SH - 1) // SH, (W - fw + SW - 1) // SW


@triton.jit
def inside(h, w, H, W):
    """Whether pixels lie in the image."""
    return (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def below(i, size):
    """Whether 0 <= i < size, in one comparison."""
    return i.to(tl.uint32) < size.to(tl.uint32)


@triton.jit
def both(lanes, live, INTERPRET: tl.constexpr):
    """`lanes & live`, whose second part may be a scalar, which the interpreter makes an integer."""
    if INTERPRET:  # noqa: SIM108  two branches of which one is compiled
        keep = tl.where(live, lanes, False)
    else:
        keep = lanes & live
    return keep


@triton.jit
def advance(n, p, q, dn, dp, dq, P, Q):
    """Image, row and column of pixels a number of (dn, dp, dq) further on."""
    q += dq
    carry = (q >= Q).to(tl.int32)
    q -= carry * Q
    p += dp + carry
    carry = (p >= P).to(tl.int32)
    p -= carry * P
    return n + dn + carry, p, q


@triton.jit
def walk(p, q, at, dp, dq, ahead, next_row, next_image, P, Q):
    """Rows and columns of pixels (dp, dq) further on, and numbers that go along with them.

    `at` grows by `ahead`, by `next_row` where a row ends and by `next_image` where an image does.
    """
    full = q + dq >= Q
    q = tl.where(full, q + dq - Q, q + dq)
    p = tl.where(full, p + dp + 1, p + dp)
    at = tl.where(full, at + ahead + next_row, at + ahead)
    full = p >= P
    return tl.where(full, p - P, p), q, tl.where(full, at + next_image, at)
