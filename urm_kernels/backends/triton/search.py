"""The pipeline on a GPU: guess a threshold, scan, rescore, prove, select; launches only, no wait for the host."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..table_view import ScanOptions
from . import queries as query_kernels
from . import radix, rescore
from .plan import GROUP, Card, Plan, Tile, choose_tile, make_plan, padded, relative_error
from .scan import scan as scan_kernel

_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_EXACT = {"enable_fp_fusion": False}
_MOST_REGISTERS = 248  # said aloud, or the assembler spills for the sake of an occupancy that is no use here


class Found(NamedTuple):
    """scores [B, k], ids [B, k]; unproven int64 [groups]: users that needed the second way, on the device."""

    scores: Tensor
    ids: Tensor
    unproven: Tensor


class Call(NamedTuple):
    """One group of users, as the kernels take it. queries fp32 [B, M, r] and exists [B, M] are contiguous."""

    queries: Tensor
    exists: Tensor | None
    items: Tensor
    bias: Tensor | None
    mask: Tensor | None
    exclude: Tensor | None  # ascending, contiguous
    log_sum_exp: bool

    @property
    def scored(self) -> tuple[Any, ...]:
        """Arguments of every kernel that computes canonical scores: queries, exists, items, bias and strides."""
        bias_stride = 0 if self.bias is None else self.bias.stride(0)
        return (self.queries, self.exists, self.items, *self.items.stride(), self.bias, bias_stride)

    @property
    def masked(self) -> tuple[Any, ...]:
        mask = self.mask
        if mask is None:
            return (None, 0, 0)
        return (mask, mask.stride(0) if mask.dim() == 2 else 0, mask.stride(-1))

    @property
    def excluded(self) -> tuple[Any, ...]:
        return (None, 0) if self.exclude is None else (self.exclude, self.exclude.shape[1])

    @property
    def bits(self) -> bool:
        return self.mask is not None and self.mask.dtype == torch.uint8


def search(
    queries: Tensor, items: Tensor, bias: Tensor | None, options: ScanOptions, k: int, sorted: bool, card: Card
) -> Found:
    """See urm_kernels.score_topk."""
    query_mask, reduce, mask, exclude = options
    users, rows = queries.shape[0], items.shape[0]
    scores = queries.new_empty((users, k), dtype=torch.float32)
    ids = queries.new_empty((users, k), dtype=torch.int64)
    if users == 0 or k == 0:
        return Found(scores, ids, ids.new_zeros(0))
    if rows == 0 or queries.shape[1] == 0:
        return Found(scores.fill_(-torch.inf), ids.fill_(-1), ids.new_zeros(0))
    if exclude is not None:
        exclude = exclude.sort(dim=1).values.contiguous() if exclude.shape[1] else None
    wanted = k + (0 if exclude is None else exclude.shape[1])
    plan = make_plan(users, rows, wanted)
    unproven = []
    for first in range(0, users, plan.group):
        part = slice(first, first + plan.group)
        exists = None if query_mask is None else query_mask[part].contiguous()
        call = Call(
            *_combine(queries[part].contiguous(), exists, reduce),
            items,
            bias,
            mask if mask is None or mask.dim() == 1 else mask[part],
            None if exclude is None else exclude[part],
            reduce == "logsumexp",
        )
        keys, failed = _dense_keys(call, k) if plan.dense else _surviving_keys(call, k, plan, card)
        unproven.append(failed)
        width = min(k, keys.shape[1])
        best = torch.topk(keys, width, dim=1, sorted=sorted).values
        grid = (-(-k // 256), keys.shape[0])
        rescore.unpack_keys[grid](best, width, k, scores[part], ids[part], C=256)
    return Found(scores, ids, torch.cat(unproven))


def _combine(queries: Tensor, exists: Tensor | None, reduce: str) -> tuple[Tensor, Tensor | None]:
    """sum and mean are linear: one query a user."""
    if reduce not in ("sum", "mean"):
        return queries, exists
    users, count, r = queries.shape
    total = queries.new_empty((users, 1, r))
    any_exists = torch.empty((users, 1), dtype=torch.bool, device=queries.device)
    query_kernels.combine_queries[(users,)](
        queries, exists, total, any_exists, count, r, R=padded(r), MEAN=reduce == "mean", **_EXACT
    )
    return total, any_exists


class _Prepared(NamedTuple):
    rounded: Tensor
    absent: Tensor
    inverse_scale: Tensor
    length_slack: Tensor
    fixed_slack: Tensor
    wanted: Tensor


def prepare(call: Call, k: int) -> _Prepared:
    """Queries rounded to the table's type, and the slack of that."""
    users, count, r = call.queries.shape
    m_pad, r_pad = padded(count), padded(r, 16)
    scales, slack, fixed = call.queries.new_empty((3, users)).unbind()
    prepared = _Prepared(
        torch.empty((users, m_pad, r_pad), dtype=call.items.dtype, device=call.queries.device),
        call.queries.new_empty((users, m_pad)),
        scales,
        slack,
        fixed,
        torch.empty(users, dtype=torch.int64, device=call.queries.device),
    )
    # log(sum exp) of M dots, computed here and by the canonical operations: both within these of the exact value.
    excess = (8e-6, 3.2e-5 + 4e-7 * count) if call.log_sum_exp else (0.0, 0.0)
    query_kernels.prepare_queries[(users,)](
        call.queries,
        call.exists,
        *prepared,
        k,
        count,
        r,
        relative_error(call.items.dtype, r),
        *excess,
        M_PAD=m_pad,
        R=r_pad,
        D=min(16, m_pad),
        KIND=_KINDS[call.items.dtype],
    )
    return prepared


def _canonical_tile(call: Call) -> dict[str, Any]:
    """Rows and queries of a block of canonical dots: 2048 running sums a program."""
    d = min(padded(call.queries.shape[1]), 8)
    return {"C": 128 // d, "D": d, "LOG_SUM_EXP": call.log_sum_exp, **_EXACT}


def _dense_keys(call: Call, k: int) -> tuple[Tensor, Tensor]:
    users, count, r = call.queries.shape
    rows = call.items.shape[0]
    wanted = prepare(call, k).wanted
    keys = torch.empty((users, rows), dtype=torch.int64, device=call.queries.device)
    tile = _canonical_tile(call)
    grid = (-(-rows // tile["C"]), users)
    rescore.score_all[grid](
        keys, rows, wanted, *call.scored, *call.masked, *call.excluded, count, r, MASK_BITS=call.bits, **tile
    )
    return keys, torch.zeros(1, dtype=torch.int64, device=keys.device)


def _surviving_keys(call: Call, k: int, plan: Plan, card: Card) -> tuple[Tensor, Tensor]:
    users, count, r = call.queries.shape
    rows, device = call.items.shape[0], call.queries.device
    prepared = prepare(call, k)
    limits = guess(call, prepared, plan, card)
    keys = torch.empty((users, plan.capacity), dtype=torch.int64, device=device)
    bins = 2 * radix.PASSES.value * radix.BINS.value
    counts, collected, histograms, arrivals, proofs = _zeros(device, users, users, bins, 1, users)
    scan_rows(call, prepared, limits, keys, counts, plan.capacity, card)
    tile = _canonical_tile(call)
    rescore.rescore[(-(-plan.capacity // tile["C"]), users)](
        keys, counts, plan.capacity, limits.thresholds, proofs, prepared.wanted, *call.scored, *call.excluded, count, r,
        **tile,
    )  # fmt: skip
    unproven = torch.empty(1, dtype=torch.int64, device=device)
    # Programs wait for each other; interpreted ones run one after the other.
    programs, together = (1, {}) if card.interpreted else (2 * card.processors, {"launch_cooperative_grid": True})
    radix.select_unproven[(programs,)](
        counts, plan.capacity, limits.thresholds, proofs, prepared.wanted, users, unproven, histograms, arrivals,
        collected, keys, rows, -(-rows // tile["C"]), *call.scored, *call.masked, *call.excluded, count, r,
        MASK_BITS=call.bits, BLOCK=min(1024, padded(users)), maxnreg=_MOST_REGISTERS, **tile, **together,
    )  # fmt: skip
    return keys, unproven


def _zeros(device: torch.device, *sizes: int) -> list[Tensor]:
    """int32 vectors of zeros in one allocation, the last one int64."""
    wide = [size + size % 2 for size in sizes[:-1]]
    buffer = torch.zeros(sum(wide) + 2 * sizes[-1], dtype=torch.int32, device=device)
    parts = list(buffer.split([*wide, 2 * sizes[-1]]))
    return [*parts[:-1], parts[-1].view(torch.int64)]


class _Limits(NamedTuple):
    """Of every user, fp32 [B]: the threshold, and what the scan compares with."""

    thresholds: Tensor
    reach: Tensor
    slope: Tensor


def guess(call: Call, prepared: _Prepared, plan: Plan, card: Card) -> _Limits:
    """The threshold is the rank-th best maximum of the sample."""
    users = call.queries.shape[0]
    maxima = sample_maxima(call, prepared, plan.sample, plan.step, plan.gathered, card)
    best = torch.topk(maxima, plan.rank, dim=1, sorted=True).values
    limits = _Limits(*call.queries.new_empty((3, users)).unbind())
    query_kernels.set_limits[(-(-users // 128),)](
        best, best.stride(0), plan.rank, prepared.inverse_scale, prepared.length_slack, prepared.fixed_slack, *limits,
        users, SCALED=call.log_sum_exp or call.bias is not None, BLOCK=128,
    )  # fmt: skip
    return limits


def sample_maxima(call: Call, prepared: _Prepared, sample: int, step: int, gathered: int, card: Card) -> Tensor:
    """fp32 [B, groups]: the best scores among `gathered` rows each of `sample` rows, `step` apart."""
    users = call.queries.shape[0]
    tile = _tile(call, prepared, card)
    gathered = min(gathered, tile.block_n)
    groups = -(-sample // tile.block_n) * (tile.block_n // gathered)
    maxima = call.queries.new_empty((users, groups))
    _launch_scan(call, prepared, None, sample, step, maxima, None, 0, gathered, card, tile)
    return maxima


def scan_rows(
    call: Call,
    prepared: _Prepared,
    limits: _Limits,
    survivors: Tensor,
    counts: Tensor,
    capacity: int,
    card: Card,
    tile: Tile | None = None,
) -> None:
    """Rows that may reach their user's threshold go to survivors int64 [B, capacity], their number to counts."""
    tile = tile or _tile(call, prepared, card)
    _launch_scan(call, prepared, limits, call.items.shape[0], 1, survivors, counts, capacity, 0, card, tile)


def _tile(call: Call, prepared: _Prepared, card: Card) -> Tile:
    users, m_pad, r_pad = prepared.rounded.shape
    return choose_tile(users * m_pad, m_pad, r_pad, call.items.element_size(), card.capability)


def _launch_scan(
    call: Call,
    prepared: _Prepared,
    limits: _Limits | None,
    rows: int,
    step: int,
    out: Tensor,
    counts: Tensor | None,
    capacity: int,
    gathered: int,
    card: Card,
    tile: Tile,
) -> None:
    users, _, r = call.queries.shape
    _, m_pad, r_pad = prepared.rounded.shape
    tiles = -(-rows // tile.block_n)
    bias_stride = 0 if call.bias is None else call.bias.stride(0)
    scan_kernel[(min(tiles, card.processors * tile.per_sm),)](
        call.items,
        *call.items.stride(),
        rows,
        step,
        tiles,
        prepared.rounded,
        prepared.absent,
        prepared.inverse_scale,
        None if limits is None else limits.reach,
        None if limits is None else limits.slope,
        call.bias,
        bias_stride,
        *call.masked,
        out,
        counts,
        capacity,
        users,
        r,
        BLOCK_N=tile.block_n,
        BLOCK_C=tile.block_c,
        BLOCK_R=min(tile.block_r, r_pad),
        M_PAD=m_pad,
        R=r_pad,
        EVEN_R=r == r_pad,
        SWAP=tile.swap,
        ONE_BLOCK=users * m_pad <= tile.block_c,
        LOG_SUM_EXP=call.log_sum_exp,
        MASK_BITS=call.bits,
        MASK_PER_USER=call.mask is not None and call.mask.dim() == 2,
        GATHERED=gathered,
        SPARSE=tile.owns_scores(card),
        TENSOR_SQUARES=call.items.dtype == torch.bfloat16 and card.adds_squares,
        STAGES=tile.stages,
        num_warps=tile.warps,
        maxnreg=_MOST_REGISTERS if tile.block_r < r_pad else None,
    )


def candidate_dots(queries: Tensor, items: Tensor, candidates: Tensor) -> Tensor:
    """[B, M, C] canonical dots; see urm_kernels.backends."""
    queries, candidates = queries.contiguous(), candidates.contiguous()
    users, count, r = queries.shape
    width = candidates.shape[1]
    out = queries.new_empty((users, count, width))
    d = min(padded(count), 8)
    # A grid's second dimension ends at 65,535.
    for first in range(0, users if out.numel() else 0, GROUP):
        part = slice(first, first + GROUP)
        grid = (-(-width * d // 128), out[part].shape[0])
        rescore.candidate_dots[grid](
            out[part],
            candidates[part],
            width,
            queries[part],
            items,
            *items.stride(),
            count,
            r,
            C=128 // d,
            D=d,
            **_EXACT,
        )
    return out
