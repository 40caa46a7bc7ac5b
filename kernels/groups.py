"""What the programs of the dW kernels share: which slots are theirs, and how they end."""

# triton decorates without types
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN201

import triton
import triton.language as tl

__all__ = ["clear", "group_of_program", "slots_of_program", "store_sums"]

_ROWS = tl.constexpr(512)  # block rows whose groups a program counts at once


@triton.jit
def group_of_program(crow_ptr, pid, R, G: tl.constexpr):
    """Row of program `pid`, and its slots [lo, hi): none if there are fewer groups.

    A row of n blocks is ceil(n / G) groups, whose sizes differ by one at most.
    """
    row, first, seen = pid * 0, pid * 0, pid * 0
    for r0 in range(0, R, _ROWS):
        r = r0 + tl.arange(0, _ROWS)
        begin = tl.load(crow_ptr + r, mask=r < R, other=0)
        n = tl.load(crow_ptr + r + 1, mask=r < R, other=0) - begin
        ends = seen + tl.cumsum(tl.cdiv(n, G), 0)
        before = ends <= pid
        row += tl.sum(before.to(tl.int32), 0)
        first = tl.maximum(first, tl.max(tl.where(before, ends, 0), 0))
        seen = tl.max(ends, 0)
    row = tl.where(pid < seen, row, 0)
    begin = tl.load(crow_ptr + row)
    n = tl.load(crow_ptr + row + 1) - begin
    groups = tl.maximum(tl.cdiv(n, G), 1)
    size = n // groups
    larger = n - size * groups  # of which there are this many, first in the row
    at = pid - first
    lo = begin + at * size + tl.minimum(at, larger)
    hi = lo + size + (at < larger).to(tl.int32)
    return row, lo, tl.where(pid < seen, hi, lo)


@triton.jit
def slots_of_program(crow_ptr, pid, R, G: tl.constexpr):
    """Row of program `pid`, and the slots [lo, hi) that are left in that row from its group on.

    For many rows: row r owns the programs from crow[r] // G + r on, at least as many as it needs.
    """
    left = pid * 0
    right = left + R - 1
    while left < right:
        middle = (left + right + 1) // 2
        fits = tl.load(crow_ptr + middle) // G + middle <= pid
        left = tl.where(fits, middle, left)
        right = tl.where(fits, right, middle - 1)
    begin = tl.load(crow_ptr + left)
    lo = begin + (pid - begin // G - left) * G
    return left, lo, tl.load(crow_ptr + left + 1)


@triton.jit
def store_sums(dw, acc, mine, ADD: tl.constexpr) -> None:
    """Store sums where they are `mine`, padding and all; `clear` follows.

    A choice between a sum and zero would have the products of the loop wait for each other.
    """
    if ADD:
        acc += tl.load(dw, mask=mine, other=0.0).to(tl.float32)
    tl.store(dw, acc.to(dw.dtype.element_ty), mask=mine)


@triton.jit
def clear(dw, padding) -> None:
    """Store zeros: padding is zero by decree, next to an infinity too."""
    tl.store(dw, tl.zeros(padding.shape, dtype=dw.dtype.element_ty), mask=padding)
