"""Exact selection without a threshold, for the users whose guess was not proven: a radix select over canonical keys.

Six passes over the table count the digits of the 64-bit keys, most significant first; a seventh collects the rows whose
key is not below the k-th. Nothing waits for the host: every launch ends at once where no user is on the list. Brute
force, and no worse: no order of rows and no tie makes it longer.
"""

import triton
import triton.language as tl

from .canonical import NO_KEY, allowed_rows, block_of, canonical_scores, excluded_rows, pack_keys, unsigned_counts

DIGIT = tl.constexpr(11)  # bits; the last digit has the nine that remain
BINS = tl.constexpr(2048)
PASSES = tl.constexpr(6)


@triton.jit(do_not_specialize=["capacity", "B"])
def list_unproven(
    counts, capacity, thresholds, proofs, wanted, B, listed, unproven, histograms, PASSES: tl.constexpr, BLOCK: tl.constexpr
):
    """One program. listed int64 [B]: users whose survivors overflowed, or hold fewer than `wanted` scores that reach the
    threshold (unless that let everything through); unproven int64 [1]: their number; their counts start again at 0.

    histograms int32 [B, PASSES, BINS] is cleared for them.
    """
    total = 0
    for first in range(0, B, BLOCK):
        user = first + tl.arange(0, BLOCK)
        inside = user < B
        count = unsigned_counts(tl.load(counts + user, mask=inside, other=0))
        threshold = tl.load(thresholds + user, mask=inside, other=0.0)
        proof = tl.load(proofs + user, mask=inside, other=0)
        want = tl.load(wanted + user, mask=inside, other=0)
        short = (threshold > float("-inf")) & (proof < want)
        failed = (inside & (want > 0) & ((count > capacity) | short)).to(tl.int32)
        place = total + tl.cumsum(failed, 0) - failed
        tl.store(listed + place, user.to(tl.int64), mask=failed != 0)
        tl.store(counts + user, tl.zeros([BLOCK], tl.int32), mask=failed != 0)
        total += tl.sum(failed, 0)
    tl.store(unproven, total.to(tl.int64))
    tl.debug_barrier()  # the list is read by other threads than wrote it
    for place in range(0, total):
        own = histograms + tl.load(listed + place) * PASSES * BINS
        for part in range(0, PASSES * BINS // BLOCK):
            tl.store(own + block_of(part, BLOCK), tl.zeros([BLOCK], tl.int32))


@triton.jit
def _shift(step):
    """The lowest bit of digit `step`."""
    return tl.maximum(64 - DIGIT * (step + 1), 0)


@triton.jit
def _prefix(histograms, want, step):
    """(digits chosen before pass `step` as one signed number, keys still wanted among those that begin with it)."""
    bins = tl.arange(0, BINS)
    prefix = tl.zeros([1], tl.int64)
    remaining = tl.zeros([1], tl.int64) + want
    for earlier in range(0, step):
        found = tl.load(histograms + earlier * BINS + bins).to(tl.int64)
        from_top = tl.cumsum(found, 0, reverse=True)
        # Fewer keys than wanted: take them all.
        remaining = tl.minimum(remaining, tl.max(from_top, 0))
        digit = tl.sum((from_top >= remaining).to(tl.int64), 0) - 1
        remaining -= tl.sum(tl.where(bins > digit, found, 0), 0)
        if earlier == 0:
            prefix += digit - BINS // 2  # the sign bit
        else:
            width = _shift(earlier - 1) - _shift(earlier)
            prefix = (prefix << width) + digit
    return prefix, remaining


@triton.jit(do_not_specialize=["step", "tiles", "capacity", "N", "E", "M"])
def radix_pass(
    step,
    listed,
    unproven,
    histograms,
    wanted,
    keys,
    counts,
    capacity,
    N,
    tiles,
    queries,
    exists,
    items,
    stride_n,
    stride_r,
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
    COLLECT: tl.constexpr,
):
    """Pass `step` counts digits among the keys that begin with those chosen so far; COLLECT (step = PASSES) puts every
    key that is not below the k-th into keys int64 [B, capacity], which the first pass has cleared. Persistent.
    """
    for place in range(0, tl.load(unproven).to(tl.int32)):
        user = tl.load(listed + place)
        own = histograms + user * PASSES * BINS
        prefix, _ = _prefix(own, tl.load(wanted + user), step)
        if not COLLECT:
            if step == 0:
                for part in range(tl.program_id(0), tl.cdiv(capacity, BINS), tl.num_programs(0)):
                    slot = block_of(part, BINS)
                    tl.store(keys + user * capacity + slot, tl.full([BINS], NO_KEY, tl.int64), mask=slot < capacity)
        histogram = tl.zeros([BINS], tl.int32)
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            rows = block_of(tile, C)
            live = allowed_rows(mask, mask_stride_user, mask_stride_row, user, rows, rows < N, MASK_BITS)
            scores = canonical_scores(
                queries, exists, items, stride_n, stride_r, bias, stride_bias, M, r, user, rows, live, C, D, LOG_SUM_EXP
            )
            live = live & (scores == scores)
            if exclude is not None:
                live = live & (excluded_rows(exclude, E, user, rows, C) == 0)
            key = pack_keys(scores, rows)
            if COLLECT:
                live = live & (key >= prefix)
                into = tl.zeros([C], tl.int64) + user
                slot = tl.atomic_add(counts + into, tl.full([C], 1, tl.int32), mask=live, sem="relaxed")
                tl.store(keys + user * capacity + slot, key, mask=live & (slot < capacity))
            else:
                low = _shift(step)
                if step == 0:
                    digit = (key >> low) + BINS // 2
                else:
                    above = _shift(step - 1)
                    live = live & ((key >> above) == prefix)
                    digit = (key >> low) & ((1 << (above - low)) - 1)
                histogram += tl.histogram(tl.where(live, digit, 0).to(tl.int32), BINS, mask=live)
        if not COLLECT:
            bins = tl.arange(0, BINS)
            tl.atomic_add(own + step * BINS + bins, histogram, mask=histogram > 0, sem="relaxed")
