"""The scan: cheap scores of a whole table on the tensor cores, and what of it can still win.

    max_m(rounded[b, m] . items[i]) / scale_b + bias[i]  >=  reach_b - slope_b |items[i]|

(with a scale s_i of the row: times s_i on the left, and reach_b - |s_i| (slope_b |items[i]| + fixed_b) on the right).
Every row of which this is not false (NaN stays) goes into its user's list of survivors: its certain upper bound reaches
the user's threshold (queries.py). Without bias both sides are multiplied by the scale. A list that overflows
keeps counting, so that whoever reads the count knows. Of a sample (GATHERED > 0), maxima of the scores of GATHERED
rows each are written instead, for the guess of a threshold.
"""

import triton
import triton.language as tl

from .append import append, append_sparse
from .canonical import allowed_rows, block_of
from .rows import rows_at, squares_of

_SIZES = ["N", "step", "tiles", "capacity", "B", "r"]


@triton.jit
def _product(v, q, SWAP: tl.constexpr):
    """v [BLOCK_N, R] times q [R, BLOCK_C], fp32.

    A thread holds few rows and many columns of a tensor core's result. SWAP computes the transpose, for many users of
    one query: what is kept of every user then takes few registers. With it, a maximum over neighbouring columns would
    be one across threads.
    """
    return tl.trans(tl.dot(tl.trans(q), tl.trans(v))) if SWAP else tl.dot(v, q)


@triton.jit
def _query_of(column, block, USERS: tl.constexpr, P: tl.constexpr):
    """Which query, as [user, m] counted through, a column of a block of USERS users of P queries is.

    A thread holds columns 8 i + 2 j and 8 i + 2 j + 1 of a tensor core's result, with a j of its own. Where a block has
    four users or more, these are columns of the same user: the maximum over its queries stays within the thread.
    """
    if USERS >= 4 and P >= 2:
        i, j, b = column // 8, (column % 8) // 2, column % 2
        eights: tl.constexpr = P // 2
        own = (i // eights * 4 + j) * P + (i % eights) * 2 + b
    else:
        own = column
    return (tl.zeros_like(own).to(tl.int64) + block) * (USERS * P) + own


@triton.jit
def _by_user(dots, BLOCK_N: tl.constexpr, USERS: tl.constexpr, P: tl.constexpr):
    """[BLOCK_N, columns] -> [BLOCK_N, USERS, P]."""
    if USERS >= 4 and P >= 2:
        eights: tl.constexpr = P // 2
        dots = tl.permute(tl.reshape(dots, [BLOCK_N, USERS // 4, eights, 4, 2]), [0, 1, 3, 2, 4])
    return tl.reshape(dots, [BLOCK_N, USERS, P])


@triton.jit
def _log_sum_exp(
    largest, total, dots, scale, size, absent, BLOCK_N: tl.constexpr, USERS: tl.constexpr, P: tl.constexpr
):
    """Running (largest, sum of exponentials) [BLOCK_N, USERS] after P more dots a user; `absent` is -inf for pads."""
    if size is not None:
        dots *= size[:, None]
    dots = _by_user(dots + absent[None, :], BLOCK_N, USERS, P) * scale[None, :, None]
    following = tl.maximum(largest, tl.max(dots, 2))
    # Against (-inf) - (-inf), before the first query that exists.
    base = tl.where(following == float("-inf"), 0.0, following)
    total = total * tl.exp(largest - base) + tl.sum(tl.exp(dots - base[:, :, None]), 2)
    return following, total


@triton.jit
def _user_terms(users, B, inverse_scale, reach, slope, fixed, SAMPLE: tl.constexpr, SCALED: tl.constexpr):
    """(1 / scale, reach, slope, fixed) [USERS] as far as used; nothing reaches what a user who is not there wants."""
    exists = users < B
    scale = tl.full(users.shape, 1.0, tl.float32)
    if SCALED:
        scale = tl.load(inverse_scale + users, mask=exists, other=1.0)
    most = scale
    rise = scale
    least = scale
    if not SAMPLE:
        most = tl.load(reach + users, mask=exists, other=3e38)
        rise = tl.load(slope + users, mask=exists, other=0.0)
        if fixed is not None:
            least = tl.load(fixed + users, mask=exists, other=0.0)
    return scale, most, rise, least


@triton.jit
def _limits(most, rise, least, length, size, USERS: tl.constexpr):
    """What scores are compared with: [BLOCK_N, USERS] for few users; else [1, USERS], of the tile's longest row."""
    if size is not None:
        # Beyond 2^60 a scaled dot might overflow where its bound does not: everything survives.
        length *= size
        length = tl.where(length < 1.152921504606846976e18, length, float("inf"))
    if USERS > 16:
        length = tl.max(length, 0)[None]
    limit = most[None, :] - length[:, None] * rise[None, :]
    if size is not None:
        if USERS > 16:
            size = tl.max(size, 0)[None]
        limit -= size[:, None] * least[None, :]
    return limit


@triton.jit(do_not_specialize=_SIZES)
def scan(
    items,
    stride_n,
    stride_r,
    row_scale,
    stride_scale,
    N,
    step,
    tiles,
    rounded,
    absent,
    inverse_scale,
    reach,
    slope,
    fixed,
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
    GATHERED: tl.constexpr,
    SPARSE: tl.constexpr,
    TENSOR_SQUARES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Persistent: programs take tiles of BLOCK_N rows in turns. A sample has N rows, `step` apart.

    Columns of the product are queries, those of a user side by side: BLOCK_C at a time, over blocks of users, and over
    parts of one user where M_PAD > BLOCK_C. ONE_BLOCK: one block holds every user, and is loaded once. Rows wider than
    BLOCK_R are read in parts, for every block of columns again.

    out: int64 [B, capacity] survivors' rows, counts int32 [B] (unsigned); of a sample, fp32 [B, groups] maxima of rows
    far apart, -inf where none may be returned. SPARSE: survivors of many users may be appended in PTX.
    """
    SAMPLE: tl.constexpr = GATHERED > 0
    USERS: tl.constexpr = BLOCK_C // M_PAD if M_PAD <= BLOCK_C else 1
    P: tl.constexpr = BLOCK_C // USERS
    PARTS: tl.constexpr = M_PAD // BLOCK_C if M_PAD > BLOCK_C else 1
    WHOLE: tl.constexpr = R == BLOCK_R
    SCALED: tl.constexpr = SAMPLE or LOG_SUM_EXP or bias is not None or row_scale is not None
    SPARSE_APPEND: tl.constexpr = SPARSE and USERS == BLOCK_C and USERS > 16 and not MASK_PER_USER
    blocks = 1 if ONE_BLOCK else tl.cdiv(B, USERS)
    at = tl.arange(0, BLOCK_R)
    if ONE_BLOCK:
        users = tl.arange(0, USERS)
        scale, most, rise, least = _user_terms(users, B, inverse_scale, reach, slope, fixed, SAMPLE, SCALED)
        if WHOLE:
            every = _query_of(tl.arange(0, BLOCK_C), 0, USERS, P)
            q = tl.load(rounded + every[None, :] * R + at[:, None], mask=every[None, :] < B * M_PAD, other=0.0)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES if ONE_BLOCK else 1):
        index = block_of(tile, BLOCK_N)
        if SAMPLE:
            # Neighbours go to different groups: in a sorted catalogue the best rows are neighbours.
            index = index // GATHERED + (index % GATHERED) * (tiles * (BLOCK_N // GATHERED))
        live = index < N
        rows = index * step
        start = items + rows[:, None] * stride_n
        negative = None
        size = None
        if row_scale is not None:
            size = tl.load(row_scale + rows * stride_scale, mask=live, other=1.0).to(tl.float32)
            negative = size < 0
            size = tl.abs(size)
        squares = tl.zeros([BLOCK_N], tl.float32)
        if WHOLE:
            inside = live[:, None] if EVEN_R else live[:, None] & (at < r)[None, :]
            v = rows_at(start + at[None, :].to(tl.int64) * stride_r, inside, negative)
            if not SAMPLE:
                squares = squares_of(v, TENSOR_SQUARES)
        elif not SAMPLE:
            for first in range(0, R, BLOCK_R):
                inside = live[:, None] & (first + at < r)[None, :]
                v_part = rows_at(start + (first + at)[None, :].to(tl.int64) * stride_r, inside, None)
                squares += squares_of(v_part, TENSOR_SQUARES)
        length = tl.sqrt(squares)
        row_bias = tl.zeros([BLOCK_N], tl.float32)
        if bias is not None:
            row_bias = tl.load(bias + rows * stride_bias, mask=live, other=float("-inf")).to(tl.float32)
        kept = live if MASK_PER_USER else allowed_rows(mask, 0, mask_stride_row, 0, rows, live, MASK_BITS)
        for block in tl.range(0, blocks, num_stages=STAGES):
            if not ONE_BLOCK:
                users = block * USERS + tl.arange(0, USERS)
                scale, most, rise, least = _user_terms(users, B, inverse_scale, reach, slope, fixed, SAMPLE, SCALED)
            best = tl.full([BLOCK_N, USERS], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_N, USERS], tl.float32)
            for part in range(PARTS):
                columns = _query_of(tl.arange(0, BLOCK_C), block * PARTS + part, USERS, P)
                present = columns[None, :] < B * M_PAD
                if WHOLE:
                    if not ONE_BLOCK:
                        q = tl.load(rounded + columns[None, :] * R + at[:, None], mask=present, other=0.0)
                    dots = _product(v, q, SWAP)
                else:
                    dots = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
                    for first in range(0, R, BLOCK_R):
                        inside = live[:, None] & (first + at < r)[None, :]
                        v_part = rows_at(start + (first + at)[None, :].to(tl.int64) * stride_r, inside, negative)
                        q_part = tl.load(
                            rounded + columns[None, :] * R + (first + at)[:, None], mask=present, other=0.0
                        )
                        dots += _product(v_part, q_part, SWAP)
                if LOG_SUM_EXP:
                    missing = tl.load(absent + columns, mask=columns < B * M_PAD, other=0.0)
                    best, total = _log_sum_exp(best, total, dots, scale, size, missing, BLOCK_N, USERS, P)
                elif USERS == BLOCK_C:
                    best = dots
                else:
                    best = tl.maximum(best, tl.max(_by_user(dots, BLOCK_N, USERS, P), 2))
            if LOG_SUM_EXP:
                best = best + tl.log(total)
            exists = users < B
            score = best
            if SCALED:
                if not LOG_SUM_EXP:
                    score *= scale[None, :]
                    if size is not None:
                        score *= size[:, None]
                score += row_bias[:, None]
            if SAMPLE:
                alive = kept[:, None] & exists[None, :]
                if MASK_PER_USER:
                    alive = allowed_rows(mask, mask_stride_user, mask_stride_row, users[None, :].to(tl.int64),
                                         rows[:, None], alive, MASK_BITS)  # fmt: skip
                score = tl.where(alive & (score == score), score, float("-inf"))
                groups = block_of(tile, BLOCK_N // GATHERED)
                best = tl.max(tl.reshape(score, [BLOCK_N // GATHERED, GATHERED, USERS]), 1)
                into = out + users[None, :].to(tl.int64) * (tiles * (BLOCK_N // GATHERED)) + groups[:, None]
                tl.store(into, tl.broadcast_to(best, [BLOCK_N // GATHERED, USERS]), mask=exists[None, :])
            else:
                limit = _limits(most, rise, least, length, size, USERS)
                if SPARSE_APPEND:
                    append_sparse(score, tl.reshape(limit, [USERS]), tl.where(kept, rows, -1),
                                   tl.where(exists, users, -1), out, counts, capacity, BLOCK_N, USERS)  # fmt: skip
                else:
                    alive = kept[:, None] & exists[None, :] & ((score < limit) == 0)  # NaN stays
                    if MASK_PER_USER:
                        alive = allowed_rows(mask, mask_stride_user, mask_stride_row, users[None, :].to(tl.int64),
                                             rows[:, None], alive, MASK_BITS)  # fmt: skip
                    alive = alive.to(tl.int32)
                    if tl.max(tl.max(alive, 1), 0) != 0:
                        append(alive, rows, users, out, counts, capacity)
