"""Exact selection without a threshold, for the users whose guess was not proven: a radix select over canonical keys.

For one user after the other, six passes over the table count the digits of the 64-bit keys, most significant first; a
seventh collects the rows whose key is not below the k-th. One launch, which ends at once where every user is proven:
nothing waits for the host. Brute force, and no worse: no order of rows and no tie makes it longer.
"""

import triton
import triton.language as tl

from .canonical import NO_KEY, allowed_rows, block_of, canonical_scores, excluded_rows, pack_keys, unsigned_counts

DIGIT = tl.constexpr(11)  # bits; the last digit has the nine that remain
BINS = tl.constexpr(2048)
PASSES = tl.constexpr(6)


@triton.jit
def _unproven(users, inside, counts, capacity, thresholds, proofs, wanted):
    """Whose survivors overflowed, or hold too few scores that reach the threshold, unless it let everything through."""
    count = unsigned_counts(tl.load(counts + users, mask=inside, other=0))
    threshold = tl.load(thresholds + users, mask=inside, other=0.0)
    proof = tl.load(proofs + users, mask=inside, other=0)
    want = tl.load(wanted + users, mask=inside, other=0)
    short = (threshold > float("-inf")) & (proof < want)
    return inside & (want > 0) & ((count > capacity) | short)


@triton.jit
def _wait_for_all(arrivals, target):
    """A barrier of all programs, which are resident together; target: all arrivals when the last one is there."""
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals, 1, sem="acq_rel") + 1
    while arrived < target:
        arrived = tl.atomic_add(arrivals, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _shift(step):
    """The lowest bit of digit `step`."""
    return tl.maximum(64 - DIGIT * (step + 1), 0)


@triton.jit
def _prefix(histograms, want, step):
    """The digits chosen by the passes before `step`, as one signed number."""
    bins = tl.arange(0, BINS)
    prefix = tl.zeros([], tl.int64)
    remaining = want
    for earlier in range(0, step):
        found = unsigned_counts(tl.load(histograms + earlier * BINS + bins, cache_modifier=".cg"))
        from_top = tl.cumsum(found, 0, reverse=True)
        # Fewer keys than wanted: take them all.
        remaining = tl.minimum(remaining, tl.max(from_top, 0))
        digit = tl.sum((from_top >= remaining).to(tl.int64), 0) - 1
        remaining -= tl.sum(tl.where(bins > digit, found, 0), 0)
        if earlier == 0:
            prefix += digit - BINS // 2  # the sign bit
        else:
            prefix = (prefix << (_shift(earlier - 1) - _shift(earlier))) + digit
    return prefix


@triton.jit(do_not_specialize=["capacity", "B", "N", "tiles", "E", "M"])
def select_unproven(
    counts,
    capacity,
    thresholds,
    proofs,
    wanted,
    B,
    unproven,
    histograms,
    arrivals,
    collected,
    keys,
    N,
    tiles,
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
    BLOCK: tl.constexpr,
):
    """Replaces keys int64 [B, capacity] of unproven users by those of their k best rows. Persistent, cooperative.

    unproven int64 [1]: how many there were. Zero at first: histograms int32 [2, PASSES, BINS], arrivals int32 [1],
    collected int32 [B].
    """
    total = tl.zeros([], tl.int32)
    for first in range(0, B, BLOCK):
        users = first + tl.arange(0, BLOCK)
        total += tl.sum(_unproven(users, users < B, counts, capacity, thresholds, proofs, wanted).to(tl.int32), 0)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    if program == 0:
        tl.store(unproven, total.to(tl.int64))
    if total > 0:
        barriers = tl.zeros([], tl.int32)
        half = tl.zeros([], tl.int32)  # of the histograms, which users take in turns
        one = tl.arange(0, 1)
        for user in range(0, B):
            failed = _unproven(user + one, one < 1, counts, capacity, thresholds, proofs, wanted)
            if tl.max(failed.to(tl.int32), 0) != 0:
                wide_user = tl.zeros([], tl.int64) + user
                want = tl.load(wanted + user)
                own = histograms + half * (PASSES * BINS)
                own_keys = keys + wide_user * capacity
                for part in range(program, tl.cdiv(capacity, BINS), programs):
                    slot = block_of(part, BINS)
                    tl.store(own_keys + slot, tl.full([BINS], NO_KEY, tl.int64), mask=slot < capacity)
                for step in range(0, PASSES + 1):
                    prefix = _prefix(own, want, step)
                    histogram = tl.zeros([BINS], tl.int32)
                    for tile in range(program, tiles, programs):
                        rows = block_of(tile, C)
                        live = allowed_rows(
                            mask, mask_stride_user, mask_stride_row, wide_user, rows, rows < N, MASK_BITS
                        )
                        scores = canonical_scores(queries, exists, items, stride_n, stride_r, row_scale, stride_scale,
                                                  bias, stride_bias, M, r, wide_user, rows, live, C, D,
                                                  LOG_SUM_EXP)  # fmt: skip
                        live = live & (scores == scores)
                        if exclude is not None:
                            live = live & (excluded_rows(exclude, E, wide_user, rows) == 0)
                        key = pack_keys(scores, rows)
                        if step == PASSES:
                            live = live & (key >= prefix)
                            into = tl.zeros([C], tl.int32) + user
                            slot = tl.atomic_add(collected + into, tl.full([C], 1, tl.int32), mask=live, sem="relaxed")
                            tl.store(own_keys + slot, key, mask=live & (slot < capacity))
                        else:
                            low = _shift(step)
                            if step == 0:
                                digit = (key >> low) + BINS // 2
                            else:
                                above = _shift(step - 1)
                                live = live & ((key >> above) == prefix)
                                digit = (key >> low) & ((1 << (above - low)) - 1)
                            histogram += tl.histogram(tl.where(live, digit, 0).to(tl.int32), BINS, mask=live)
                    if step < PASSES:
                        bins = tl.arange(0, BINS)
                        tl.atomic_add(own + step * BINS + bins, histogram, mask=histogram > 0, sem="relaxed")
                        barriers += 1
                        _wait_for_all(arrivals, barriers * programs)
                        if (step == 0) & (program == 0):
                            # Everybody has left the user before, whose half the next one takes.
                            other = histograms + (1 - half) * (PASSES * BINS)
                            for earlier in range(0, PASSES):
                                tl.store(other + earlier * BINS + bins, tl.zeros([BINS], tl.int32))
                half = 1 - half
