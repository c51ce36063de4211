"""Canonical scores of survivors become keys of the total order, and keys scores and rows again."""

import triton
import triton.language as tl

from .canonical import (
    NO_KEY,
    allowed_rows,
    block_of,
    canonical_scores,
    excluded_rows,
    pack_keys,
    unsigned_counts,
)


@triton.jit(do_not_specialize=["capacity", "E", "M"])
def rescore(
    keys,
    counts,
    capacity,
    thresholds,
    proofs,
    wanted,
    queries,
    exists,
    items,
    stride_n,
    stride_r,
    row_scale,
    stride_scale,
    bias,
    stride_bias,
    exclude,
    E,
    M,
    r,
    C: tl.constexpr,
    D: tl.constexpr,
    LOG_SUM_EXP: tl.constexpr,
):
    """The rows in keys int64 [B, capacity] become their keys, in place; slots not taken become NO_KEY.

    proofs int64 [B] += survivors whose score reaches the user's threshold. Programs: (blocks of slots, users).
    """
    user = tl.program_id(1).to(tl.int64)
    count = tl.minimum(unsigned_counts(tl.load(counts + user)), capacity)
    slots = block_of(tl.program_id(0), C)
    inside = slots < capacity
    keys += user * capacity
    if tl.program_id(0).to(tl.int64) * C >= count:
        tl.store(keys + slots, tl.full([C], NO_KEY, tl.int64), mask=inside)
    else:
        live = (slots < count) & (tl.load(wanted + user) > 0)
        rows = tl.load(keys + slots, mask=live, other=0)
        scores = canonical_scores(queries, exists, items, stride_n, stride_r, row_scale, stride_scale, bias,
                                  stride_bias, M, r, user, rows, live, C, D, LOG_SUM_EXP)  # fmt: skip
        live = live & (scores == scores)
        if exclude is not None:
            live = live & (excluded_rows(exclude, E, user, rows) == 0)
        tl.store(keys + slots, tl.where(live, pack_keys(scores, rows), NO_KEY), mask=inside)
        reached = live & (scores >= tl.load(thresholds + user))
        tl.atomic_add(proofs + user, tl.sum(reached.to(tl.int64), 0), sem="relaxed")


@triton.jit(do_not_specialize=["N", "E", "M"])
def score_all(
    keys,
    N,
    wanted,
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
    LOG_SUM_EXP: tl.constexpr,
    MASK_BITS: tl.constexpr,
):
    """keys int64 [B, N] of every row of a small table. Programs: (blocks of rows, users)."""
    user = tl.program_id(1).to(tl.int64)
    rows = block_of(tl.program_id(0), C)
    inside = rows < N
    live = allowed_rows(mask, mask_stride_user, mask_stride_row, user, rows, inside, MASK_BITS)
    live = live & (tl.load(wanted + user) > 0)
    scores = canonical_scores(queries, exists, items, stride_n, stride_r, row_scale, stride_scale, bias, stride_bias,
                              M, r, user, rows, live, C, D, LOG_SUM_EXP)  # fmt: skip
    if exclude is not None:
        live = live & (excluded_rows(exclude, E, user, rows) == 0)
    tl.store(keys + user * N + rows, tl.where(live, pack_keys(scores, rows), NO_KEY), mask=inside)


@triton.jit(do_not_specialize=["width", "k"])
def unpack_keys(keys, width, k, scores, ids, C: tl.constexpr):
    """keys int64 [B, width] -> scores fp32 [B, k], ids int64 [B, k], padded. Programs: (blocks, users)."""
    user = tl.program_id(1).to(tl.int64)
    slots = block_of(tl.program_id(0), C)
    found = tl.load(keys + user * width + slots, mask=slots < tl.minimum(width, k), other=NO_KEY)
    real = found != NO_KEY
    ordered = (found >> 32).to(tl.int32)
    score = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    row = -1 - (found - (((found >> 32) + 1) << 32))
    tl.store(scores + user * k + slots, tl.where(real, score, float("-inf")), mask=slots < k)
    tl.store(ids + user * k + slots, tl.where(real, row, -1), mask=slots < k)
