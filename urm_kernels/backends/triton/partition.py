"""log_partition: sums of exponentials that no order of addition can change, of canonical scores of all rows.

The integers of csrc/common/exponential_sum.h: a term is mantissa 2^(n - 24), mantissas are added as integers by groups
of eight exponents n, and groups further than `depth` below the largest are left out. Products of tensor cores would be
off by more than the stated error, so every dot that counts is the canonical one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..table_view import ScanOptions, TableView
from .call import EXACT, MOST_REGISTERS, calls
from .canonical import (
    allowed_rows,
    any_query,
    block_of,
    canonical_log,
    excluded_rows,
    exp_polynomial,
    minus_logarithms,
    reduced_dots,
    some_excluded,
    with_bias,
)
from .plan import GROUP, Card, canonical_tile, padded
from .search import bound_queries
from .winners import winning_dots

GROUPS = tl.constexpr(8)  # of a ring: the largest, and at most seven below it
NO_GROUP = tl.constexpr(-(1 << 28))
HUGE = tl.constexpr(16777216.0)  # scores from here on, either way, have no exponential: the largest is the result
_LEAST_PROGRAMS = 4  # that share a user's rows: 2^32 terms below 2^32 each would overflow one program's sums


@triton.jit
def _round(x):
    """To the nearest integer, ties to even; finite."""
    down = tl.floor(x)
    part = x - down
    odd = (down * 0.5 != tl.floor(down * 0.5)) & (part == 0.5)
    return tl.where((part > 0.5) | odd, down + 1.0, down)


@triton.jit
def _split_exponential(scores):
    """(exponents, mantissas) int32 of |scores| < HUGE."""
    one = tl.full(scores.shape, 1.0, tl.float32)
    n = _round(scores * (one * 1.44269504088896341))
    p = exp_polynomial(minus_logarithms(scores, n))
    return n.to(tl.int32), _round(p * 16777216.0).to(tl.int32)


@triton.jit
def _held(top):
    """int32 [USERS, GROUPS]: the group that each place of a ring holds, the largest being `top` [USERS]."""
    return top[:, None] - ((top[:, None] - tl.arange(0, GROUPS)[None, :]) & (GROUPS - 1))


@triton.jit(do_not_specialize=["depth", "N", "tiles", "B", "E", "M"])
def add_exponentials(
    tops,
    sums,
    largest,
    depth,
    temperature,
    N,
    tiles,
    B,
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
    bias,
    stride_bias,
    mask,
    mask_stride_user,
    mask_stride_row,
    exclude,
    E,
    M,
    r,
    C: tl.constexpr,
    D: tl.constexpr,
    USERS: tl.constexpr,
    LOG_SUM_EXP: tl.constexpr,
    MASK_BITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    M_PAD: tl.constexpr,
    R: tl.constexpr,
    TENSOR_SQUARES: tl.constexpr,
):
    """Each program's share: tops int32 and largest fp32 [programs, B], sums int64 [programs, B, GROUPS] by place.

    The place of a group is its number modulo GROUPS. largest: of the scores that have no exponential. Programs: (shares
    of the rows, blocks of users). With `rounded`, one user a block, whose queries are bounded first (winners.py).
    """
    users = block_of(tl.program_id(1), USERS)
    present = users < B
    known = tl.where(present, users, 0)
    served = any_query(exists, users, present, M, USERS, D // USERS)
    divisor = tl.zeros([C, USERS], tl.float32) + tl.load(temperature)
    top = tl.full([USERS], NO_GROUP, tl.int32)
    huge = tl.full([C, USERS], float("-inf"), tl.float32)
    total = tl.zeros([C, USERS, GROUPS], tl.int64)
    place = tl.arange(0, GROUPS)[None, None, :]
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows = block_of(tile, C)
        inside = rows < N
        if rounded is not None:
            user = tl.program_id(1).to(tl.int64)
            largest_dots, _, bad = winning_dots(
                rounded, inverse_scale, length_slack, fixed_slack, queries, exists, items, stride_n, stride_r,
                row_scale, stride_scale, M, r, user, rows, inside, C, BLOCK_C, BLOCK_R, M_PAD, R, TENSOR_SQUARES,
            )  # fmt: skip
            reduced = tl.where(bad, float("nan"), largest_dots)
        else:
            reduced = reduced_dots(queries, exists, items, stride_n, stride_r, row_scale, stride_scale, M, r, users,
                                   present, rows, inside, C, D, USERS, LOG_SUM_EXP)  # fmt: skip
        scores = tl.div_rn(
            with_bias(reduced, bias, stride_bias, rows, inside), tl.zeros([C, USERS], tl.float32) + divisor
        )
        live = inside[:, None] & served[None, :] & (scores == scores)
        live = allowed_rows(mask, mask_stride_user, mask_stride_row, users[None, :], rows[:, None], live, MASK_BITS)
        if exclude is not None:  # noqa: SIM102  # the first is the compiler's, the second the kernel's
            if some_excluded(exclude, E, known, present, (tl.zeros([], tl.int64) + tile) * C, C):
                live = live & (excluded_rows(exclude, E, known[None, :], rows[:, None]) == 0)
        ordinary = live & (tl.abs(scores) < HUGE)
        huge = tl.maximum(huge, tl.where(live & (ordinary == 0), scores, float("-inf")))
        exponents, mantissas = _split_exponential(tl.where(ordinary, scores, 0.0))
        groups = tl.where(ordinary, exponents >> 3, NO_GROUP)
        above = tl.max(groups, 0)
        if tl.max((above > top).to(tl.int32), 0) != 0:
            before = _held(top)
            top = tl.maximum(top, above)
            total = tl.where((before == _held(top))[None, :, :], total, 0)
        counted = ordinary & (groups >= top[None, :] - depth)
        terms = tl.where(counted, mantissas.to(tl.int64) << (exponents & (GROUPS - 1)).to(tl.int64), 0)
        own = (groups & (GROUPS - 1))[:, :, None] == place
        total += tl.where(own, terms[:, :, None], 0)
    share = tl.program_id(0).to(tl.int64) * B + users
    tl.store(tops + share, top, mask=present)
    tl.store(largest + share, tl.max(huge, 0), mask=present)
    at = share[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    tl.store(sums + at, tl.sum(total, 0), mask=present[:, None])


@triton.jit(do_not_specialize=["depth", "programs", "B"])
def logarithms_of_sums(out, tops, sums, largest, depth, programs, B, SHARES: tl.constexpr):
    """out fp32 [B] of the shares of all programs. One user a program."""
    user = tl.program_id(0).to(tl.int64)
    shares = tl.arange(0, SHARES)
    inside = shares < programs
    at = shares.to(tl.int64) * B + user
    own = tl.load(tops + at, mask=inside, other=NO_GROUP)
    most = tl.max(tl.load(largest + at, mask=inside, other=float("-inf")), 0)
    top = tl.max(own, 0)
    total = tl.zeros([1], tl.float64)
    for step in range(0, depth + 1):
        group = top - depth + step
        held = inside & (group <= own) & (group > own - GROUPS)
        found = tl.load(sums + at * GROUPS + (group & (GROUPS - 1)), mask=held, other=0)
        high, low = tl.sum(found >> 32, 0), tl.sum(found & 0xFFFFFFFF, 0)
        high += low >> 32
        low = low & 0xFFFFFFFF
        part = high.to(tl.float64) * 4294967296.0 + low.to(tl.float64)
        total = total * 0.00390625 + part
    one = tl.full([1], 1.0, tl.float32)
    none = top == NO_GROUP
    logarithm = canonical_log(tl.where(none, one, (total * 5.9604644775390625e-08).to(tl.float32)))
    exponent = (tl.zeros([1], tl.float64) + top) * 8.0 * 0.693147180559945309417
    result = (exponent + logarithm.to(tl.float64)).to(tl.float32)
    result = tl.where(none | (most >= HUGE), one * most, result)
    tl.store(out + user + tl.arange(0, 1), result)


def log_partition(queries: Tensor, table: TableView, options: ScanOptions, temperature: Tensor, card: Card) -> Tensor:
    """See urm_kernels.log_partition."""
    rows = table.items.shape[0]
    out = queries.new_empty(queries.shape[0])
    if rows == 0 or queries.shape[1] == 0:
        return out.fill_(-torch.inf)
    depth = -(-(24 + (rows - 1).bit_length()) // 8)
    for part, call in calls(queries, table, options, GROUP):
        users, count, r = call.queries.shape
        tile, bounded, sizes = bound_queries(call, card)
        tile = tile or canonical_tile(users, count, most_sums=256)
        blocks = -(-users // tile.users)
        programs = max(_LEAST_PROGRAMS, -(-4 * card.processors // blocks))
        tiles = -(-rows // tile.rows)
        programs = min(programs, tiles)
        tops = torch.empty((programs, users), dtype=torch.int32, device=queries.device)
        sums = torch.empty((programs, users, GROUPS.value), dtype=torch.int64, device=queries.device)
        largest = queries.new_empty((programs, users))
        add_exponentials[(programs, blocks)](
            tops, sums, largest, depth, temperature, rows, tiles, users, *bounded, *call.scored, *call.masked,
            *call.excluded, count, r, C=tile.rows, D=tile.columns, USERS=tile.users, LOG_SUM_EXP=call.log_sum_exp,
            MASK_BITS=call.bits, **sizes, **EXACT, **MOST_REGISTERS,
        )  # fmt: skip
        logarithms_of_sums[(users,)](
            out[part], tops, sums, largest, depth, programs, users, SHARES=padded(programs), **EXACT
        )
    return out
