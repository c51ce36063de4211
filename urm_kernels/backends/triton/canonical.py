"""Canonical scores and the total order, for kernels: the operations of csrc/common, one for one.

Kernels that use these are launched with ``enable_fp_fusion=False``: what is written as two roundings stays two.
"""

import triton
import triton.language as tl

LANES = tl.constexpr(16)  # running sums of a canonical dot
NO_KEY = tl.constexpr(-(2**63))  # below the key of every score, -inf included


@triton.jit
def block_of(index, SIZE: tl.constexpr):
    """int64 [SIZE]: the numbers of block `index`."""
    return (tl.zeros([SIZE], tl.int64) + index) * SIZE + tl.arange(0, SIZE)


@triton.jit
def unsigned_counts(counts):
    """int64 of counts kept as 32 bits without a sign: there are fewer rows than that."""
    return counts.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def canonical_dots(queries, items, stride_n, stride_r, r, user, m, there, rows, live, C: tl.constexpr, D: tl.constexpr):
    """[C, D] dots of rows [C] with the queries m [D] of contiguous fp32 queries; rows not `live` count as zero rows.

    queries points at [B, M, r]'s first query of `user`.
    """
    lane = tl.arange(0, LANES)
    sums = tl.zeros([C, D, LANES], tl.float32)
    for first in range(0, r, LANES):
        at = first + lane
        inside = at < r
        v_at = items + rows[:, None] * stride_n + at[None, :].to(tl.int64) * stride_r
        v = tl.load(v_at, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        q = tl.load(
            queries + m[:, None].to(tl.int64) * r + at[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        v = tl.broadcast_to(v[:, None, :], [C, D, LANES])
        q = tl.broadcast_to(q[None, :, :], [C, D, LANES])
        sums = tl.fma(q, v, sums)
    sums = tl.sum(tl.reshape(sums, [C, D, 2, 8]), 2)
    sums = tl.sum(tl.reshape(sums, [C, D, 2, 4]), 2)
    sums = tl.sum(tl.reshape(sums, [C, D, 2, 2]), 2)
    return tl.sum(sums, 2)


@triton.jit
def canonical_exp(x):
    """exp(x) for x <= 0."""
    small = (x >= -80.0) == 0
    x = tl.where(small, 0.0, x)
    one = tl.full(x.shape, 1.0, tl.float32)
    magic = one * 12582912.0
    n = tl.fma(x, one * 1.44269504088896341, magic) - magic
    f = tl.fma(n, one * -0.693359375, x)
    f = tl.fma(n, one * 2.12194440e-4, f)
    p = tl.fma(one * 1.98412698e-4, f, one * 1.38888889e-3)
    p = tl.fma(p, f, one * 8.33333333e-3)
    p = tl.fma(p, f, one * 4.16666667e-2)
    p = tl.fma(p, f, one * 1.66666667e-1)
    p = tl.fma(p, f, one * 0.5)
    p = tl.fma(p, f, one)
    p = tl.fma(p, f, one)
    scale = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(small, 0.0, p * scale)


@triton.jit
def canonical_log(s):
    """log(s) for finite s >= 1."""
    one = tl.full(s.shape, 1.0, tl.float32)
    offset = s.to(tl.int32, bitcast=True) - 0x3F3504F3
    n = (offset >> 23).to(tl.float32)
    g = ((offset & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    z = tl.div_rn(g - 1.0, g + 1.0)
    w = z * z
    p = tl.fma(one * 0.222222222, w, one * 0.285714286)
    p = tl.fma(p, w, one * 0.4)
    p = tl.fma(p, w, one * 0.666666667)
    p = tl.fma(p, w, one * 2.0)
    low = tl.fma(n, one * -2.12194440e-4, z * p)
    return tl.fma(n, one * 0.693359375, low)


@triton.jit
def canonical_scores(
    queries,
    exists,
    items,
    stride_n,
    stride_r,
    bias,
    stride_bias,
    M,
    r,
    user,
    rows,
    live,
    C: tl.constexpr,
    D: tl.constexpr,
    LOG_SUM_EXP: tl.constexpr,
):
    """[C] scores of rows [C] for one user, NaN where an existing query's dot or the bias is. D queries at a time.

    queries fp32 [B, M, r] contiguous; exists bool [B, M] contiguous or None; bias [N] or None.
    """
    user = user.to(tl.int64)
    queries += user * M * r
    largest = tl.full([C], float("-inf"), tl.float32)
    bad = tl.zeros([C], tl.int32)
    for first in range(0, M, D):
        m = first + tl.arange(0, D)
        there = m < M
        if exists is not None:
            there = there & (tl.load(exists + user * M + m, mask=there, other=0) != 0)
        dots = canonical_dots(queries, items, stride_n, stride_r, r, user, m, there, rows, live, C, D)
        counted = tl.broadcast_to(there[None, :], [C, D])
        bad = bad | tl.max(((dots != dots) & counted).to(tl.int32), 1)
        largest = tl.maximum(largest, tl.max(tl.where(counted & (dots == dots), dots, float("-inf")), 1))
    score = largest
    if LOG_SUM_EXP:
        # Kahan's sum, m ascending: dots are computed again rather than kept, so that M does not cost memory.
        one_query = tl.arange(0, 1)
        total = tl.zeros([C], tl.float32)
        excess = tl.zeros([C], tl.float32)
        finite = (largest - largest) == 0.0
        for index in range(0, M):
            there = one_query < 1
            if exists is not None:
                there = there & (tl.load(exists + user * M + index + one_query) != 0)
            dots = canonical_dots(
                queries, items, stride_n, stride_r, r, user, index + one_query, there, rows, live, C, 1
            )
            counted = tl.max(there.to(tl.int32), 0) != 0
            term = canonical_exp(tl.where(finite, tl.max(dots, 1) - largest, 0.0)) - excess
            following = total + term
            excess = tl.where(counted, (following - total) - term, excess)
            total = tl.where(counted, following, total)
        score = tl.where(finite, largest + canonical_log(tl.where(finite, total, 1.0)), largest)
    score = tl.where(bad != 0, float("nan"), score)
    if bias is not None:
        score = score + tl.load(bias + rows * stride_bias, mask=live, other=0.0).to(tl.float32)
    return score + 0.0  # -0 becomes +0


@triton.jit
def pack_keys(scores, rows):
    """int64 keys, larger is better: score first, then the lower row (below 2**32). NaN has no key."""
    bits = scores.to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    keys = ((ordered + 1) << 32) - 1 - rows
    return tl.where(scores == scores, keys, NO_KEY)


@triton.jit
def allowed_rows(mask, stride_user, stride_row, user, rows, live, BITS: tl.constexpr):
    """What `mask` (bool, or a bitset with BITS; None) leaves of the rows; all arguments broadcast."""
    if mask is not None:
        at = rows >> 3 if BITS else rows
        value = tl.load(mask + user * stride_user + at * stride_row, mask=live, other=0).to(tl.int32)
        if BITS:
            value = (value >> (rows & 7).to(tl.int32)) & 1
        live = live & (value != 0)
    return live


@triton.jit
def excluded_rows(exclude, E, user, rows, C: tl.constexpr):
    """bool [C]: which rows are in the user's ascending list, exclude int64 [B, E] contiguous. Binary search."""
    low = tl.zeros([C], tl.int64)
    high = tl.full([C], 0, tl.int64) + E
    exclude += user.to(tl.int64) * E
    width = E
    while width > 0:
        middle = (low + high) // 2
        below = tl.load(exclude + middle, mask=low < high, other=0) < rows
        low = tl.where((low < high) & below, middle + 1, low)
        high = tl.where((low < high) & (below == 0), middle, high)
        width = width // 2
    return tl.load(exclude + low, mask=low < E, other=-1) == rows
