"""Which of a user's many queries wins each row: cheap products for all, canonical dots for those that may.

The bound of queries.py holds on both sides: a canonical dot is within a |v| + b of the cheap one. A query whose cheap
product lies further than twice that below the best one loses, whatever the roundings were; of 128 queries one or two
are left. Rows and queries whose bound is not finite are left with all.
"""

import triton
import triton.language as tl

from .canonical import LANES
from .rows import rows_at, squares_of


@triton.jit
def _paired_dots(queries, items, stride_n, stride_r, row_scale, stride_scale, r, columns, rows, live, C: tl.constexpr):
    """[C] canonical dots of each row with a query of its own, numbered by int64 columns [C]."""
    lane = tl.arange(0, LANES)
    sums = tl.zeros([C, LANES], tl.float32)
    for first in range(0, r, LANES):
        at = first + lane
        inside = live[:, None] & (at < r)[None, :]
        v_at = items + rows[:, None] * stride_n + at[None, :].to(tl.int64) * stride_r
        v = tl.load(v_at, mask=inside, other=0.0).to(tl.float32)
        q = tl.load(queries + columns[:, None] * r + at[None, :], mask=inside, other=0.0)
        sums = tl.fma(q, v, sums)
    low, high = tl.split(tl.permute(tl.reshape(sums, [C, 2, 8]), [0, 2, 1]))
    low, high = tl.split(tl.permute(tl.reshape(low + high, [C, 2, 4]), [0, 2, 1]))
    low, high = tl.split(tl.permute(tl.reshape(low + high, [C, 2, 2]), [0, 2, 1]))
    low, high = tl.split(low + high)
    dots = low + high
    if row_scale is not None:
        dots = dots * tl.load(row_scale + rows * stride_scale, mask=live, other=1.0).to(tl.float32)
    return dots


@triton.jit
def _cheap_dots(
    items,
    stride_n,
    stride_r,
    r,
    rows,
    live,
    negative,
    rounded,
    part,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R: tl.constexpr,
    TENSOR_SQUARES: tl.constexpr,
):
    """(products [C, BLOCK_C] with a part of a user's rounded queries [M_PAD, R], squared lengths [C] of the rows)."""
    columns = part * BLOCK_C + tl.arange(0, BLOCK_C)
    start = items + rows[:, None] * stride_n
    dots = tl.zeros([C, BLOCK_C], tl.float32)
    squares = tl.zeros([C], tl.float32)
    for first in range(0, R, BLOCK_R):
        at = first + tl.arange(0, BLOCK_R)
        inside = live[:, None] & (at < r)[None, :]
        v = rows_at(start + at[None, :].to(tl.int64) * stride_r, inside, negative)
        dots += tl.dot(v, tl.load(rounded + columns[None, :] * R + at[:, None]))
        squares += squares_of(v, TENSOR_SQUARES)
    return dots, squares


@triton.jit
def winning_dots(
    rounded,
    inverse_scale,
    length_slack,
    fixed_slack,
    queries,
    exists,
    items,
    stride_n,
    stride_r,
    row_scale,
    stride_scale,
    M,
    r,
    user,
    rows,
    live,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    M_PAD: tl.constexpr,
    R: tl.constexpr,
    TENSOR_SQUARES: tl.constexpr,
):
    """best_dots of canonical.py for one user, [C, 1]; rounded and the three slacks are those of prepare_queries."""
    PARTS: tl.constexpr = M_PAD // BLOCK_C
    rounded += user * (M_PAD * R)
    negative = None
    if row_scale is not None:
        size = tl.load(row_scale + rows * stride_scale, mask=live, other=1.0).to(tl.float32)
        negative = size < 0
    cheap, squares = _cheap_dots(
        items, stride_n, stride_r, r, rows, live, negative, rounded, 0, C, BLOCK_C, BLOCK_R, R, TENSOR_SQUARES
    )
    most = tl.max(cheap, 1)
    for part in range(1, PARTS):
        more, _ = _cheap_dots(
            items, stride_n, stride_r, r, rows, live, negative, rounded, part, C, BLOCK_C, BLOCK_R, R, TENSOR_SQUARES
        )
        most = tl.maximum(most, tl.max(more, 1))
    slack = tl.load(length_slack + user) * tl.sqrt(squares) + tl.load(fixed_slack + user)
    limit = most - slack * (2.0 / tl.load(inverse_scale + user))
    if row_scale is not None:
        # Scaled dots that vanish tie, however they differ; infinite times zero would be NaN.
        size = tl.abs(size)
        vanishing = tl.div_rn(tl.full([C], 2.802596928649634e-45, tl.float32), size) / tl.load(inverse_scale + user)
        limit = tl.where(size < float("inf"), limit - vanishing, float("-inf"))
    largest = tl.full([C], float("-inf"), tl.float32)
    winner = tl.zeros([C], tl.int32)
    bad = tl.zeros([C], tl.int32)
    for part in range(0, PARTS):
        if PARTS > 1:
            cheap, _ = _cheap_dots(
                items, stride_n, stride_r, r, rows, live, negative, rounded, part, C, BLOCK_C, BLOCK_R, R,
                TENSOR_SQUARES,
            )  # fmt: skip
        m = part * BLOCK_C + tl.arange(0, BLOCK_C)
        there = m < M
        if exists is not None:
            there = there & (tl.load(exists + user * M + m, mask=there, other=0) != 0)
        # NaN stays. The next query that is left of every row, M where none is.
        left = tl.where(there[None, :] & live[:, None] & ((cheap < limit[:, None]) == 0), m[None, :], M)
        following = tl.min(left, 1)
        while tl.min(following, 0) < M:
            due = following < M
            dots = _paired_dots(
                queries, items, stride_n, stride_r, row_scale, stride_scale, r, user * M + following, rows, due, C
            )
            bad = bad | (due & (dots != dots)).to(tl.int32)
            better = due & (dots > largest)
            largest = tl.where(better, dots, largest)
            winner = tl.where(better, following, winner)
            following = tl.min(tl.where(left > following[:, None], left, M), 1)
    return largest[:, None], winner[:, None], (bad != 0)[:, None]
