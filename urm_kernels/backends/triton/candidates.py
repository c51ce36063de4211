"""Canonical scores and dots of chosen rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..table_view import TableView
from .call import EXACT, MOST_REGISTERS, calls_of_users
from .canonical import allowed_rows, any_query, block_of, canonical_dots, reduced_dots, with_bias
from .plan import GROUP, canonical_tile


@triton.jit(do_not_specialize=["count", "N", "B", "M"])
def score_rows(
    out,
    candidates,
    stride_user,
    stride_slot,
    count,
    N,
    alive,
    stride_alive,
    queries,
    exists,
    items,
    stride_n,
    stride_r,
    row_scale,
    stride_scale,
    bias,
    stride_bias,
    B,
    M,
    r,
    C: tl.constexpr,
    D: tl.constexpr,
    USERS: tl.constexpr,
    LOG_SUM_EXP: tl.constexpr,
):
    """out fp32 [B, count]: scores of candidates int64 [B, count], or [count] the same for all, stride_user 0.

    -inf for -1, rows whose bit in `alive` is 0, and users without queries; NaN for rows that do not exist. Programs:
    (blocks of candidates, blocks of users); several users a block only where candidates are the same.
    """
    users = block_of(tl.program_id(1), USERS)
    present = users < B
    slots = block_of(tl.program_id(0), C)
    inside = slots < count
    own = candidates + tl.program_id(1).to(tl.int64) * USERS * stride_user
    rows = tl.load(own + slots * stride_slot, mask=inside, other=-1)
    unknown = (rows < -1) | (rows >= N)
    live = (rows >= 0) & (unknown == 0)
    live = allowed_rows(alive, 0, stride_alive, 0, rows, live, True)
    scores = with_bias(
        reduced_dots(queries, exists, items, stride_n, stride_r, row_scale, stride_scale, M, r, users, present, rows,
                     live, C, D, USERS, LOG_SUM_EXP),
        bias, stride_bias, rows, live,
    )  # fmt: skip
    served = any_query(exists, users, present, M, USERS, D // USERS)
    scores = tl.where(live[:, None] & served[None, :], scores, float("-inf"))
    scores = tl.where(unknown[:, None], float("nan"), scores)
    tl.store(out + users[None, :] * count + slots[:, None], scores, mask=inside[:, None] & present[None, :])


@triton.jit(do_not_specialize=["count", "M"])
def dot_rows(
    out,
    candidates,
    count,
    queries,
    items,
    stride_n,
    stride_r,
    row_scale,
    stride_scale,
    M,
    r,
    C: tl.constexpr,
    D: tl.constexpr,
):
    """out fp32 [B, M, count]; candidates int64 [B, count], -1 counts as a zero row. Programs: (blocks, users)."""
    user = tl.program_id(1).to(tl.int64)
    slots = block_of(tl.program_id(0), C)
    inside = slots < count
    rows = tl.load(candidates + user * count + slots, mask=inside, other=-1)
    for first in range(0, M, D):
        m = first + tl.arange(0, D)
        there = m < M
        columns = user * M + m
        dots = canonical_dots(
            queries, items, stride_n, stride_r, row_scale, stride_scale, r, columns, there, rows, rows >= 0, C, D
        )
        tl.store(out + columns[None, :] * count + slots[:, None], dots, mask=inside[:, None] & there[None, :])


def score_candidates(
    queries: Tensor, table: TableView, candidates: Tensor, query_mask: Tensor | None, reduce: str
) -> Tensor:
    """See urm_kernels.score_candidates."""
    users, width = queries.shape[0], candidates.shape[-1]
    rows = table.items.shape[0]
    out = queries.new_empty((users, width))
    if queries.shape[1] == 0 or rows == 0:
        return out.fill_(-torch.inf).masked_fill_((candidates < -1) | (candidates >= rows), torch.nan)
    shared = candidates.dim() == 1
    alive = table.alive
    for part, call in calls_of_users(queries, table, query_mask, reduce, GROUP):
        count, r = call.queries.shape[1:]
        tile = canonical_tile(len(out[part]) if shared else 1, count)
        own = candidates if shared else candidates[part]
        grid = (-(-width // tile.rows), -(-len(out[part]) // tile.users))
        if width:
            score_rows[grid](
                out[part], own, 0 if shared else own.stride(0), own.stride(-1), width, rows,
                alive, 0 if alive is None else alive.stride(0), *call.scored, len(out[part]), count, r,
                C=tile.rows, D=tile.columns, USERS=tile.users, LOG_SUM_EXP=call.log_sum_exp, **EXACT, **MOST_REGISTERS,
            )  # fmt: skip
    return out


def candidate_dots(queries: Tensor, table: TableView, candidates: Tensor) -> Tensor:
    """[B, M, C] canonical dots with candidates [B, C], or [C] the same for all; see urm_kernels.backends."""
    queries, candidates = queries.contiguous(), candidates.contiguous()
    users, count, r = queries.shape
    width = candidates.shape[-1]
    out = queries.new_empty((users, count, width))
    if candidates.dim() == 1:  # as of one user who has all queries
        users, count, candidates = 1, users * count, candidates[None]
    flat, given = out.view(users, count, width), queries.view(users, count, r)
    tile = canonical_tile(1, count)
    scale = table.row_scale
    # A grid's second dimension ends at 65,535.
    for first in range(0, users if out.numel() else 0, GROUP):
        part = slice(first, first + GROUP)
        dot_rows[(-(-width // tile.rows), len(flat[part]))](
            flat[part], candidates[part], width, given[part], table.items, *table.items.stride(),
            scale, 0 if scale is None else scale.stride(0), count, r, C=tile.rows, D=tile.columns,
            **EXACT, **MOST_REGISTERS,
        )  # fmt: skip
    return out
