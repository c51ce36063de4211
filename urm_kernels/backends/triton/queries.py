"""Queries made ready for the tensor cores, with the slack of what that costs.

A user's queries are scaled by one power of two, so that the largest element lies in [1, 2), and rounded to the
product's type: the table's, bfloat16 for float8. For a finite row v of length |v|, the tensor core's best product c,
computed with the rounded queries, obeys

    canonical reduce_m(q_m . v)  <=  c / scale + a |v| + b

with a = (max_m |q_m - rounded_m| + eps max_m |rounded_m|) and b an absolute term; all of it times |s| where the row has
a scale s. docs/gpu.md has the proof and the model of the tensor core that it rests on.
"""

import triton
import triton.language as tl

FLOAT32 = tl.constexpr(0)
FLOAT16 = tl.constexpr(1)
BFLOAT16 = tl.constexpr(2)


@triton.jit
def _existing(exists, user, m, M):
    there = m < M
    if exists is not None:
        there = there & (tl.load(exists + user * M + m, mask=there, other=0) != 0)
    return there


@triton.jit
def _length(x):
    """Lengths of the rows of x, rounded to nearest."""
    return tl.sqrt(tl.sum(x * x, 1))


@triton.jit(do_not_specialize=["M"])
def combine_queries(queries, exists, out, any_exists, M, r, R: tl.constexpr, MEAN: tl.constexpr):
    """out [B, 1, r]: a user's existing queries added in ascending m, in fp32; MEAN divides by their number once."""
    user = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, R)
    total = tl.zeros([R], tl.float32)
    count = 0
    for m in range(0, M):
        there = tl.max(_existing(exists, user, m + tl.arange(0, 1), M).to(tl.int32), 0)
        q = tl.load(queries + (user * M + m) * r + at, mask=at < r, other=0.0)
        total = tl.where(there != 0, total + q, total)
        count += there
    if MEAN:
        total = tl.div_rn(total, tl.zeros([R], tl.float32) + tl.maximum(count, 1))
    tl.store(out + user * r + at, total, mask=at < r)
    tl.store(any_exists + user, count > 0)


@triton.jit(do_not_specialize=["k", "M"])
def prepare_queries(
    queries,
    exists,
    rounded,
    absent,
    inverse_scale,
    length_slack,
    fixed_slack,
    wanted,
    k,
    M,
    r,
    relative_error,
    reduce_relative,
    M_PAD: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    KIND: tl.constexpr,
):
    """One user a program. queries fp32 [B, M, r] contiguous -> rounded [B, M_PAD, R] in the product's type.

    What does not exist, and the padding up to M_PAD, repeats the user's first existing query: a maximum does not
    change, and the scan asks no questions. absent fp32 [B, M_PAD] is -inf there, for a sum. inverse_scale,
    length_slack (a), fixed_slack (b): fp32 [B]. wanted int64 [B]: k, or 0 for a user who can get nothing: without
    queries, or with a NaN in one.
    """
    user = tl.program_id(0).to(tl.int64)
    queries += user * M * r
    at = tl.arange(0, R)
    largest = 0.0
    nan = 0
    first = M
    for start in range(0, M, D):
        m = start + tl.arange(0, D)
        there = _existing(exists, user, m, M)
        q = tl.load(
            queries + m[:, None].to(tl.int64) * r + at[None, :], mask=there[:, None] & (at < r)[None, :], other=0.0
        )
        nan = nan | tl.max(tl.max((q != q).to(tl.int32), 1), 0)
        largest = tl.maximum(largest, tl.max(tl.max(tl.abs(q), 1), 0))
        first = tl.minimum(first, tl.min(tl.where(there, m, M), 0))
    # 2^-100 to 2^100: beyond, the lengths below come out infinite or zero and the user counts as extreme.
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 27), 227)
    scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    inverse = (exponent << 23).to(tl.float32, bitcast=True)
    lost = 0.0
    length = 0.0
    for start in range(0, M_PAD, D):
        m = start + tl.arange(0, D)
        there = _existing(exists, user, m, M)
        source = tl.where(there, m, first)
        kept = (source < M)[:, None] & (at < r)[None, :] & (nan == 0)
        q = tl.load(queries + source[:, None].to(tl.int64) * r + at[None, :], mask=kept, other=0.0) * scale
        if KIND == FLOAT32:
            # tf32 has ten bits of fraction: round to nearest, ties away.
            code = ((q.to(tl.int32, bitcast=True) + 0x1000) & -8192).to(tl.float32, bitcast=True)
        elif KIND == FLOAT16:
            code = q.to(tl.float16)
        else:
            code = q.to(tl.bfloat16)
        inside = m < M_PAD
        tl.store(
            rounded + (user * M_PAD + m)[:, None] * R + at[None, :], code, mask=inside[:, None] & (at < R)[None, :]
        )
        tl.store(absent + user * M_PAD + m, tl.where(there, 0.0, float("-inf")), mask=inside)
        wide = code.to(tl.float32)
        lost = tl.maximum(lost, tl.max(_length(q - wide), 0))
        length = tl.maximum(length, tl.max(_length(wide), 0))
    # The factor pays for the roundings of both lengths, of a row's length and of the bound itself.
    slack = (lost + relative_error * length) * inverse * (1.003 + r * 1.2e-7) + reduce_relative * length * inverse
    slack = tl.where(length * inverse < 1.152921504606846976e18, slack, float("inf"))  # 2^60: no overflow is possible
    # Below 2^-100 the slack itself would be rounded to a few bits. (Zeros have none.)
    slack = tl.where((largest > 0) & (largest < 7.888609052210118e-31), float("inf"), slack)
    served = (first < M) & (nan == 0)
    tl.store(inverse_scale + user, inverse)
    tl.store(length_slack + user, tl.where(served, slack, 0.0))
    # Underflow: of squares in a row's length (2^-62 sqrt(r)), of flushed products (r 2^-120, scaled), of the dot.
    tiny = slack * 2.168404344971009e-19 * tl.sqrt(r * 1.0) + inverse * r * 7.52316384526264e-37 + r * 1e-42
    tl.store(fixed_slack + user, tl.where(served, tiny, 0.0))
    tl.store(wanted + user, tl.where(served, k, 0).to(tl.int64))


@triton.jit(do_not_specialize=["rank", "B"])
def set_limits(
    maxima,
    stride,
    rank,
    inverse_scale,
    length_slack,
    fixed_slack,
    wanted,
    reduce_fixed,
    thresholds,
    reach,
    slope,
    fixed,
    B,
    SCALED: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the scan compares with, fp32 [B]: reach = threshold - b and slope = a, times the scale unless SCALED.

    The threshold, kept beside, is the rank-th of a user's descending maxima, which lie `stride` apart. With ROW_SCALE b
    is written to `fixed` instead: like a, it grows with a row's scale. reduce_fixed does not, and is part of reach.
    """
    user = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = user < B
    threshold = tl.load(maxima + user.to(tl.int64) * stride + rank - 1, mask=inside, other=0.0)
    own = tl.load(fixed_slack + user, mask=inside, other=0.0)
    rise = tl.load(length_slack + user, mask=inside, other=0.0) * 1.000001
    if ROW_SCALE:
        tl.store(fixed + user, own * 1.000001, mask=inside)
        own = tl.zeros([BLOCK], tl.float32) + 1e-37  # a scaled dot may round to zero
    own += reduce_fixed
    # Rounding here and in the scan's own comparison.
    most = threshold - own - 1e-6 * (tl.abs(threshold) + own)
    # Who can get nothing has codes of zero.
    most = tl.where(tl.load(wanted + user, mask=inside, other=0) > 0, most, 3e38)
    if not SCALED:
        scale = tl.load(inverse_scale + user, mask=inside, other=1.0)
        most = most / scale
        rise = rise / scale
    tl.store(thresholds + user, threshold, mask=inside)
    tl.store(reach + user, most, mask=inside)
    tl.store(slope + user, rise, mask=inside)
