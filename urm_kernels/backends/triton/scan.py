"""The scan: cheap scores of a whole table on the tensor cores, and what of it can still win.

    bound[b, i] = max_m(rounded[b, m] . items[i]) / scale_b + a_b |items[i]| + b_b + bias[i]

Every row whose bound is not below its user's threshold goes into the user's list of survivors. A list that overflows
keeps counting, so that whoever reads the count knows. With SAMPLE the scores of every `step`-th row are written
instead, without slack, for the guess of a threshold.
"""

import triton
import triton.language as tl

from .canonical import allowed_rows, block_of

_SIZES = ["N", "step", "tiles", "capacity", "B", "r"]


@triton.jit
def _squares(v):
    """Squared lengths of the rows of a tile."""
    wide = v.to(tl.float32)
    return tl.sum(wide * wide, 1)


@triton.jit
def _product(v, q, SWAP: tl.constexpr):
    """v [BLOCK_N, R] times q [R, BLOCK_C], fp32.

    A thread holds few rows and many columns of a tensor core's result. SWAP computes the transpose, for many users of one
    query: what is kept of every user (four numbers) then takes few registers. With it, a maximum over neighbouring
    columns would be one across threads.
    """
    return tl.trans(tl.dot(tl.trans(q), tl.trans(v))) if SWAP else tl.dot(v, q)


@triton.jit
def _log_sum_exp(largest, total, dots, scale, absent, BLOCK_N: tl.constexpr, USERS: tl.constexpr, P: tl.constexpr):
    """Running (largest, sum of exponentials) [BLOCK_N, USERS] after P more dots a user; `absent` is -inf for pads."""
    dots = tl.reshape(dots + absent[None, :], [BLOCK_N, USERS, P]) * scale[None, :, None]
    following = tl.maximum(largest, tl.max(dots, 2))
    # Against (-inf) - (-inf), before the first query that exists.
    base = tl.where(following == float("-inf"), 0.0, following)
    total = total * tl.exp(largest - base) + tl.sum(tl.exp(dots - base[:, :, None]), 2)
    return following, total


@triton.jit
def _user_terms(users, B, inverse_scale, length_slack, fixed_slack, thresholds, SAMPLE: tl.constexpr):
    """(1 / scale, a, b, threshold) [USERS]; nothing reaches the threshold of a user who is not there."""
    exists = users < B
    scale = tl.load(inverse_scale + users, mask=exists, other=1.0)
    slack = scale
    fixed = scale
    threshold = scale
    if not SAMPLE:
        slack = tl.load(length_slack + users, mask=exists, other=0.0)
        fixed = tl.load(fixed_slack + users, mask=exists, other=0.0)
        threshold = tl.load(thresholds + users, mask=exists, other=float("inf"))
    return scale, slack, fixed, threshold


@triton.jit
def _may_hold_survivors(best, scale, slack, fixed, threshold, longest, top_bias, kept, exists, MASKED: tl.constexpr):
    """Whether any bound of the tile may reach its threshold: one test for all rows, as long as the longest of them."""
    most = longest * slack + fixed
    reach = threshold - most - top_bias
    # Rounding of this test against that of the bound itself.
    reach -= 1e-6 * (tl.abs(threshold) + most + tl.abs(top_bias))
    reach = tl.where(exists, tl.where(reach == reach, reach, float("-inf")), float("inf"))
    excess = best * scale[None, :] - reach[None, :]
    if MASKED:
        excess = tl.where(kept[:, None], excess, float("-inf"))
    return (tl.max(tl.max(excess, 1), 0) >= 0) | (tl.min(reach, 0) == float("-inf"))


@triton.jit
def _append(alive, rows, users, out, counts, capacity):
    """Rows of the tile that are alive (1 or 0) go to the end of their users' lists, a user at a time.

    One atomic a user and tile, however many rows. Users with survivors in one tile are few, and a loop over them needs
    one column's registers where slots for all pairs at once would need the whole tile's.
    """
    NOBODY: tl.constexpr = 2**31 - 1
    some = tl.max(alive, 0) > 0
    user = tl.min(tl.where(some, users, NOBODY), 0)
    while user < NOBODY:
        own = tl.sum(tl.where(users[None, :] == user, alive, 0), 1)
        first = tl.atomic_add(counts + user, tl.sum(own, 0).to(tl.int64), sem="relaxed")
        slot = first + tl.cumsum(own, 0) - own
        into = out + (user + tl.zeros([1], tl.int64)) * capacity
        tl.store(into + slot, rows, mask=(own > 0) & (slot < capacity))
        user = tl.min(tl.where(some & (users > user), users, NOBODY), 0)


@triton.jit(do_not_specialize=_SIZES)
def scan(
    items,
    stride_n,
    stride_r,
    N,
    step,
    tiles,
    rounded,
    absent,
    inverse_scale,
    length_slack,
    fixed_slack,
    thresholds,
    bias,
    stride_bias,
    mask,
    mask_stride_user,
    mask_stride_row,
    out,
    counts,
    capacity,
    B,
    r,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    M_PAD: tl.constexpr,
    R: tl.constexpr,
    EVEN_R: tl.constexpr,
    SWAP: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    LOG_SUM_EXP: tl.constexpr,
    MASK_BITS: tl.constexpr,
    MASK_PER_USER: tl.constexpr,
    SAMPLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Persistent: programs take tiles of BLOCK_N rows in turns. N counts the sampled rows where only those are read.

    Columns of the product are queries, those of a user side by side: BLOCK_C at a time, over blocks of users, and over
    parts of one user where M_PAD > BLOCK_C. ONE_BLOCK: one block holds every user, and is loaded once. Rows wider than
    BLOCK_R are read in parts, for every block of columns again.

    out: int64 [B, capacity] survivors' rows, counts int64 [B]; with SAMPLE fp32 [B, N] scores, -inf for what may not
    be returned.
    """
    USERS: tl.constexpr = BLOCK_C // M_PAD if M_PAD <= BLOCK_C else 1
    PARTS: tl.constexpr = M_PAD // BLOCK_C if M_PAD > BLOCK_C else 1
    WHOLE: tl.constexpr = R == BLOCK_R
    MASKED: tl.constexpr = mask is not None and not MASK_PER_USER
    blocks = 1 if ONE_BLOCK else tl.cdiv(B, USERS)
    at = tl.arange(0, BLOCK_R)
    if ONE_BLOCK:
        users = tl.arange(0, USERS)
        scale, slack, fixed, threshold = _user_terms(
            users, B, inverse_scale, length_slack, fixed_slack, thresholds, SAMPLE
        )
        if WHOLE:
            every = tl.arange(0, BLOCK_C)
            q = tl.load(rounded + every[None, :] * R + at[:, None], mask=every[None, :] < B * M_PAD, other=0.0)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        index = block_of(tile, BLOCK_N)
        live = index < N
        rows = index * step
        start = items + rows[:, None] * stride_n
        squares = tl.zeros([BLOCK_N], tl.float32)
        if WHOLE:
            inside = live[:, None] if EVEN_R else live[:, None] & (at < r)[None, :]
            v = tl.load(start + at[None, :].to(tl.int64) * stride_r, mask=inside, other=0.0)
            if not SAMPLE:
                squares = _squares(v)
        elif not SAMPLE:
            for first in range(0, R, BLOCK_R):
                inside = live[:, None] & (first + at < r)[None, :]
                squares += _squares(tl.load(start + (first + at)[None, :].to(tl.int64) * stride_r, mask=inside, other=0.0))
        length = tl.sqrt(squares)
        row_bias = tl.zeros([BLOCK_N], tl.float32)
        if bias is not None:
            row_bias = tl.load(bias + rows * stride_bias, mask=live, other=float("-inf")).to(tl.float32)
        kept = live if MASK_PER_USER else allowed_rows(mask, 0, mask_stride_row, 0, rows, live, MASK_BITS)
        for block in range(0, blocks):
            if not ONE_BLOCK:
                users = block * USERS + tl.arange(0, USERS)
                scale, slack, fixed, threshold = _user_terms(
                    users, B, inverse_scale, length_slack, fixed_slack, thresholds, SAMPLE
                )
            best = tl.full([BLOCK_N, USERS], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_N, USERS], tl.float32)
            for part in tl.static_range(PARTS):
                columns = block_of(block * PARTS + part, BLOCK_C)
                present = columns[None, :] < B * M_PAD
                if WHOLE:
                    if not ONE_BLOCK:
                        q = tl.load(rounded + columns[None, :] * R + at[:, None], mask=present, other=0.0)
                    dots = _product(v, q, SWAP)
                else:
                    dots = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
                    for first in range(0, R, BLOCK_R):
                        inside = live[:, None] & (first + at < r)[None, :]
                        v_part = tl.load(start + (first + at)[None, :].to(tl.int64) * stride_r, mask=inside, other=0.0)
                        q_part = tl.load(rounded + columns[None, :] * R + (first + at)[:, None], mask=present, other=0.0)
                        dots += _product(v_part, q_part, SWAP)
                if LOG_SUM_EXP:
                    missing = tl.load(absent + columns, mask=columns < B * M_PAD, other=0.0)
                    best, total = _log_sum_exp(best, total, dots, scale, missing, BLOCK_N, USERS, BLOCK_C // USERS)
                elif USERS == BLOCK_C:
                    best = dots
                else:
                    best = tl.maximum(best, tl.max(tl.reshape(dots, [BLOCK_N, USERS, BLOCK_C // USERS]), 2))
            if LOG_SUM_EXP:
                best = (best + tl.log(total)) / scale[None, :]
            exists = users < B
            if SAMPLE:
                score = best * scale[None, :] + row_bias[:, None]
                alive = kept[:, None] & exists[None, :]
                if MASK_PER_USER:
                    alive = allowed_rows(mask, mask_stride_user, mask_stride_row, users[None, :].to(tl.int64),
                                         rows[:, None], alive, MASK_BITS)  # fmt: skip
                score = tl.where(alive & (score == score), score, float("-inf"))
                into = out + users[None, :].to(tl.int64) * N + index[:, None]
                tl.store(into, score, mask=live[:, None] & exists[None, :])
            elif _may_hold_survivors(best, scale, slack, fixed, threshold, tl.max(length, 0), tl.max(row_bias, 0), kept,
                                     exists, MASKED):  # fmt: skip
                bound = best * scale[None, :] + (length[:, None] * slack[None, :] + fixed[None, :])
                if bias is not None:
                    bound += row_bias[:, None]
                alive = kept[:, None] & exists[None, :] & ((bound < threshold[None, :]) == 0)  # NaN stays
                if MASK_PER_USER:
                    alive = allowed_rows(mask, mask_stride_user, mask_stride_row, users[None, :].to(tl.int64),
                                         rows[:, None], alive, MASK_BITS)  # fmt: skip
                _append(alive.to(tl.int32), rows, users, out, counts, capacity)
