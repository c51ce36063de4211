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
def _fold(sums, C: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """[C, D, 2 HALF] -> [C, D, HALF]: sums HALF apart are added."""
    low, high = tl.split(tl.permute(tl.reshape(sums, [C, D, 2, HALF]), [0, 1, 3, 2]))
    return low + high


@triton.jit
def canonical_dots(
    queries,
    items,
    stride_n,
    stride_r,
    row_scale,
    stride_scale,
    r,
    columns,
    there,
    rows,
    live,
    C: tl.constexpr,
    D: tl.constexpr,
):
    """[C, D] dots of rows [C] with queries [D], numbered by int64 `columns`, of contiguous fp32 [B M, r].

    Rows not `live` and queries not `there` count as zeros. row_scale [N] or None multiplies a row's dots.

    Splitting moves a thread its 16 running sums by one exchange through shared memory; adding across threads would
    exchange every sum four times, by shuffles, which are a quarter as fast as multiply-adds.
    """
    lane = tl.arange(0, LANES)
    sums = tl.zeros([C, D, LANES], tl.float32)
    for first in range(0, r, LANES):
        at = first + lane
        inside = at < r
        v_at = items + rows[:, None] * stride_n + at[None, :].to(tl.int64) * stride_r
        v = tl.load(v_at, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        q = tl.load(queries + columns[:, None] * r + at[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        v = tl.broadcast_to(v[:, None, :], [C, D, LANES])
        q = tl.broadcast_to(q[None, :, :], [C, D, LANES])
        sums = tl.fma(q, v, sums)
    low, high = tl.split(_fold(_fold(_fold(sums, C, D, 8), C, D, 4), C, D, 2))
    dots = low + high
    if row_scale is not None:
        dots = dots * tl.load(row_scale + rows * stride_scale, mask=live, other=1.0).to(tl.float32)[:, None]
    return dots


@triton.jit
def minus_logarithms(x, n):
    """x - n ln 2."""
    one = tl.full(x.shape, 1.0, tl.float32)
    return tl.fma(n, one * 2.12194440e-4, tl.fma(n, one * -0.693359375, x))


@triton.jit
def exp_polynomial(f):
    """exp(f) for small f."""
    one = tl.full(f.shape, 1.0, tl.float32)
    p = tl.fma(one * 1.98412698e-4, f, one * 1.38888889e-3)
    p = tl.fma(p, f, one * 8.33333333e-3)
    p = tl.fma(p, f, one * 4.16666667e-2)
    p = tl.fma(p, f, one * 1.66666667e-1)
    p = tl.fma(p, f, one * 0.5)
    p = tl.fma(p, f, one)
    return tl.fma(p, f, one)


@triton.jit
def canonical_exp(x):
    """exp(x) for x <= 0."""
    small = (x >= -80.0) == 0
    x = tl.where(small, 0.0, x)
    one = tl.full(x.shape, 1.0, tl.float32)
    magic = one * 12582912.0
    n = tl.fma(x, one * 1.44269504088896341, magic) - magic
    scale = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(small, 0.0, exp_polynomial(minus_logarithms(x, n)) * scale)


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
def columns_of(exists, users, present, first, M, USERS: tl.constexpr, P: tl.constexpr):
    """(numbers, whether they exist) [USERS P] of the users' queries first, ..., first + P - 1."""
    m = first + tl.arange(0, P)
    columns = tl.reshape(users[:, None] * M + m[None, :], [USERS * P])
    there = tl.reshape(present[:, None] & (m < M)[None, :], [USERS * P])
    if exists is not None:
        there = there & (tl.load(exists + columns, mask=there, other=0) != 0)
    return columns, there


@triton.jit
def any_query(exists, users, present, M, USERS: tl.constexpr, P: tl.constexpr):
    """bool [USERS]: which users that are `present` have a query that exists, of M >= 1."""
    if exists is None:
        return present
    some = tl.zeros([USERS], tl.int32)
    for first in range(0, M, P):
        _, there = columns_of(exists, users, present, first, M, USERS, P)
        some = some | tl.max(tl.reshape(there.to(tl.int32), [USERS, P]), 1)
    return some != 0


@triton.jit
def best_dots(
    queries,
    exists,
    items,
    stride_n,
    stride_r,
    row_scale,
    stride_scale,
    M,
    r,
    users,
    present,
    rows,
    live,
    C: tl.constexpr,
    D: tl.constexpr,
    USERS: tl.constexpr,
):
    """(largest dots fp32, whose they are int32, whether any is NaN) [C, USERS], over the queries that exist of users
    int64 [USERS] that are `present`, for rows [C]. The lowest query wins a tie.

    queries fp32 [B, M, r] contiguous, D / USERS of each user at a time; exists bool [B, M] contiguous or None.
    """
    P: tl.constexpr = D // USERS
    largest = tl.full([C, USERS], float("-inf"), tl.float32)
    winner = tl.zeros([C, USERS], tl.int32)
    bad = tl.zeros([C, USERS], tl.int32)
    for first in range(0, M, P):
        columns, there = columns_of(exists, users, present, first, M, USERS, P)
        dots = canonical_dots(
            queries, items, stride_n, stride_r, row_scale, stride_scale, r, columns, there, rows, live, C, D
        )
        counted = tl.broadcast_to(there[None, :], [C, D])
        nan = dots != dots
        bad = bad | tl.max(tl.reshape((nan & counted).to(tl.int32), [C, USERS, P]), 2)
        kept = tl.reshape(tl.where(counted & (nan == 0), dots, float("-inf")), [C, USERS, P])
        best = tl.max(kept, 2)
        m = first + tl.arange(0, P)
        lowest = tl.min(tl.where(kept == best[:, :, None], m[None, None, :], M), 2)
        winner = tl.where(best > largest, lowest, winner)
        largest = tl.maximum(largest, best)
    return largest, winner, bad != 0


@triton.jit
def reduced_dots(
    queries,
    exists,
    items,
    stride_n,
    stride_r,
    row_scale,
    stride_scale,
    M,
    r,
    users,
    present,
    rows,
    live,
    C: tl.constexpr,
    D: tl.constexpr,
    USERS: tl.constexpr,
    LOG_SUM_EXP: tl.constexpr,
):
    """[C, USERS] maxima, or log-sum-exps, of the dots of best_dots; NaN where one of them is."""
    largest, _, bad = best_dots(queries, exists, items, stride_n, stride_r, row_scale, stride_scale, M, r, users,
                                present, rows, live, C, D, USERS)  # fmt: skip
    result = largest
    if LOG_SUM_EXP:
        # Kahan's sum, m ascending: dots are computed again rather than kept, so that M does not cost memory.
        total = tl.zeros([C, USERS], tl.float32)
        excess = tl.zeros([C, USERS], tl.float32)
        finite = (largest - largest) == 0.0
        for m in range(0, M):
            columns, there = columns_of(exists, users, present, m, M, USERS, 1)
            dots = canonical_dots(
                queries, items, stride_n, stride_r, row_scale, stride_scale, r, columns, there, rows, live, C, USERS
            )
            term = canonical_exp(tl.where(finite, dots - largest, 0.0)) - excess
            following = total + term
            excess = tl.where(there[None, :], (following - total) - term, excess)
            total = tl.where(there[None, :], following, total)
        result = tl.where(finite, largest + canonical_log(tl.where(finite, total, 1.0)), largest)
    return tl.where(bad, float("nan"), result)


@triton.jit
def with_bias(reduced, bias, stride_bias, rows, live):
    """Scores [C, USERS] from reduced dots; bias [N] or None."""
    if bias is not None:
        reduced = reduced + tl.load(bias + rows * stride_bias, mask=live, other=0.0).to(tl.float32)[:, None]
    return reduced + 0.0  # -0 becomes +0


@triton.jit
def canonical_scores(
    queries,
    exists,
    items,
    stride_n,
    stride_r,
    row_scale,
    stride_scale,
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
    """[C] scores of rows [C] for one user, D queries at a time; NaN where an existing query's dot or the bias is."""
    users = tl.zeros([1], tl.int64) + user
    reduced = reduced_dots(
        queries, exists, items, stride_n, stride_r, row_scale, stride_scale, M, r, users, users >= 0, rows, live, C, D,
        1, LOG_SUM_EXP,
    )  # fmt: skip
    return tl.reshape(with_bias(reduced, bias, stride_bias, rows, live), [C])


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
def _lower_bound(exclude, E, users, rows):
    """How many of the users' ascending lists, exclude int64 [B, E] contiguous, lie below the rows; broadcast."""
    low = tl.zeros_like(users + rows)
    high = low + E
    width = E
    while width > 0:
        middle = (low + high) // 2
        below = tl.load(exclude + users * E + middle, mask=low < high, other=0) < rows
        low = tl.where((low < high) & below, middle + 1, low)
        high = tl.where((low < high) & (below == 0), middle, high)
        width = width // 2
    return low


@triton.jit
def excluded_rows(exclude, E, users, rows):
    """Which rows are in the users' lists; int64 users and rows broadcast."""
    at = _lower_bound(exclude, E, users, rows)
    return tl.load(exclude + users * E + at, mask=at < E, other=-1) == rows


@triton.jit
def some_excluded(exclude, E, users, present, first, C: tl.constexpr):
    """Whether any of the rows first, ..., first + C - 1 is in any list of the users [USERS] that are `present`."""
    at = _lower_bound(exclude, E, users, first)
    found = tl.load(exclude + users * E + at, mask=present & (at < E), other=first + C)
    return tl.min(found, 0) < first + C
