"""Weights of log_partition's gradient: how much each dot moves the result. The products with them are torch's."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..table_view import ScanOptions, TableView
from .call import EXACT, MOST_REGISTERS, calls
from .canonical import (
    allowed_rows,
    best_dots,
    block_of,
    canonical_dots,
    columns_of,
    excluded_rows,
    reduced_dots,
    with_bias,
)
from .plan import GROUP, Card, canonical_tile
from .search import bound_queries
from .winners import winning_dots


@triton.jit(do_not_specialize=["first_row", "n", "B", "E", "M"])
def weigh_rows(
    weights,
    shares,
    out_scores,
    grad,
    logarithms,
    temperature,
    first_row,
    n,
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
    """Of rows first_row, ..., first_row + n - 1, fp32: shares and out_scores [B, n], weights [B, M, n].

    out_scores: divided by the temperature T. shares: grad exp(score / T - logarithm) / T, zero for what takes no part.
    weights: the share, times the row's scale, of the winning query, or of each by their softmax. Programs: (blocks of
    rows, blocks of users). With `rounded`, one user a block, whose queries are bounded first (winners.py).
    """
    P: tl.constexpr = D // USERS
    users = block_of(tl.program_id(1), USERS)
    present = users < B
    slots = block_of(tl.program_id(0), C)
    inside = slots < n
    rows = first_row + slots
    divisor = tl.zeros([C, USERS], tl.float32) + tl.load(temperature)
    if LOG_SUM_EXP:
        reduced = reduced_dots(queries, exists, items, stride_n, stride_r, row_scale, stride_scale, M, r, users,
                               present, rows, inside, C, D, USERS, True)  # fmt: skip
    else:
        if rounded is not None:
            reduced, winner, bad = winning_dots(
                rounded, inverse_scale, length_slack, fixed_slack, queries, exists, items, stride_n, stride_r,
                row_scale, stride_scale, M, r, tl.program_id(1).to(tl.int64), rows, inside, C, BLOCK_C, BLOCK_R, M_PAD,
                R, TENSOR_SQUARES,
            )  # fmt: skip
        else:
            reduced, winner, bad = best_dots(queries, exists, items, stride_n, stride_r, row_scale, stride_scale, M, r,
                                             users, present, rows, inside, C, D, USERS)  # fmt: skip
        reduced = tl.where(bad, float("nan"), reduced)
    scores = tl.div_rn(with_bias(reduced, bias, stride_bias, rows, inside), divisor)
    logarithm = tl.load(logarithms + users, mask=present, other=float("inf"))[None, :]
    live = inside[:, None] & present[None, :] & (tl.abs(logarithm) < float("inf")) & (scores == scores)
    live = allowed_rows(mask, mask_stride_user, mask_stride_row, users[None, :], rows[:, None], live, MASK_BITS)
    if exclude is not None:
        live = live & (excluded_rows(exclude, E, tl.where(present, users, 0)[None, :], rows[:, None]) == 0)
    upstream = tl.load(grad + users, mask=present, other=0.0)[None, :]
    share = tl.where(live, tl.exp(scores - logarithm) * upstream / divisor, 0.0)
    at = users[None, :] * n + slots[:, None]
    kept = inside[:, None] & present[None, :]
    tl.store(shares + at, share, mask=kept)
    tl.store(out_scores + at, scores, mask=kept)
    if row_scale is not None:
        size = tl.load(row_scale + rows * stride_scale, mask=inside, other=1.0).to(tl.float32)[:, None]
    for first in range(0, M, P):
        columns, there = columns_of(exists, users, present, first, M, USERS, P)
        if LOG_SUM_EXP:
            dots = canonical_dots(
                queries, items, stride_n, stride_r, row_scale, stride_scale, r, columns, there, rows, inside, C, D
            )
            wide = tl.reshape(tl.broadcast_to(reduced[:, :, None], [C, USERS, P]), [C, D])
            part = tl.where(there[None, :], tl.exp(dots - wide), 0.0)
        else:
            m = first + tl.arange(0, P)
            part = tl.reshape((winner[:, :, None] == m[None, None, :]).to(tl.float32), [C, D])
        own = tl.reshape(tl.broadcast_to(share[:, :, None], [C, USERS, P]), [C, D])
        weight = tl.where(own == 0, 0.0, part * own)
        if row_scale is not None:
            weight = tl.where(weight == 0, 0.0, weight * size)
        exist = tl.reshape(present[:, None] & (first + tl.arange(0, P) < M)[None, :], [D])
        tl.store(weights + columns[None, :] * n + slots[:, None], weight, mask=inside[:, None] & exist[None, :])


def partition_weights(
    grad: Tensor,
    logarithms: Tensor,
    queries: Tensor,
    table: TableView,
    options: ScanOptions,
    temperature: Tensor,
    part: slice,
    card: Card,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [B, M, n], shares [B, n], scores [B, n]) of some rows."""
    users, count, r = queries.shape
    n = part.stop - part.start
    weights, shares, scores = (queries.new_empty(shape) for shape in ((users, count, n), (users, n), (users, n)))
    grad, logarithms = grad.contiguous(), logarithms.contiguous()
    for group, call in calls(queries, table, options, GROUP):
        tile, bounded, sizes = bound_queries(call, card)
        tile = tile or canonical_tile(len(call.queries), count)
        weigh_rows[(-(-n // tile.rows), -(-len(call.queries) // tile.users))](
            weights[group], shares[group], scores[group], grad[group], logarithms[group], temperature, part.start, n,
            len(call.queries), *bounded, *call.scored, *call.masked, *call.excluded, count, r,
            C=tile.rows, D=tile.columns, USERS=tile.users, LOG_SUM_EXP=call.log_sum_exp, MASK_BITS=call.bits,
            **sizes, **EXACT, **MOST_REGISTERS,
        )  # fmt: skip
    return weights, shares, scores
