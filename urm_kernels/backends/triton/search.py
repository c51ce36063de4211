"""The pipeline on a GPU: guess a threshold, scan, rescore, prove, select; launches only, no wait for the host."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..table_view import ScanOptions, TableView
from . import queries as query_kernels
from . import radix, rescore
from .call import FUSED, MOST_REGISTERS, Call, calls
from .plan import BOUNDED_QUERIES, CanonicalTile, Card, Plan, Tile, choose_tile, make_plan, padded, relative_error
from .scan import scan as scan_kernel

# Of the product on the tensor cores, by the table's.
_PRODUCTS = {dtype: dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
_PRODUCTS[torch.float8_e4m3fn] = torch.bfloat16
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Found(NamedTuple):
    """scores [B, k], ids [B, k]; unproven: int64 [1] of every group of users, how many needed the second way."""

    scores: Tensor
    ids: Tensor
    unproven: list[Tensor]


class _Keys(NamedTuple):
    """keys int64 [B, n]; of a scan, survivors int32 [B] (without a sign) and unproven int64 [1]."""

    keys: Tensor
    survivors: Tensor | None = None
    unproven: Tensor | None = None


def search(
    queries: Tensor,
    table: TableView,
    options: ScanOptions,
    k: int,
    sorted: bool,
    card: Card,
    counts: Tensor | None = None,
) -> Found:
    """See urm_kernels.score_topk; what it took is added to counts, int64 [5]."""
    users, rows = queries.shape[0], table.items.shape[0]
    scores = queries.new_empty((users, k), dtype=torch.float32)
    ids = queries.new_empty((users, k), dtype=torch.int64)
    if users == 0 or k == 0:
        return Found(scores, ids, [])
    if rows == 0 or queries.shape[1] == 0:
        return Found(scores.fill_(-torch.inf), ids.fill_(-1), [])
    wanted = k + (0 if options.exclude is None else options.exclude.shape[1])
    plan = make_plan(users, rows, wanted)
    unproven = []
    for part, call in calls(queries, table, options, plan.group):
        found = _dense_keys(call, k) if plan.dense else _surviving_keys(call, k, plan, card)
        if found.unproven is not None:
            unproven.append(found.unproven)
        if counts is not None:
            _count(counts, call, plan, found)
        width = min(k, found.keys.shape[1])
        best = torch.topk(found.keys, width, dim=1, sorted=sorted).values
        grid = (-(-k // 256), found.keys.shape[0])
        rescore.unpack_keys[grid](best, width, k, scores[part], ids[part], C=256)
    return Found(scores, ids, unproven)


def _count(counts: Tensor, call: Call, plan: Plan, found: _Keys) -> None:
    """Bytes of rows read (0), pairs scored canonically (2). The second way scores every row in each of its passes."""
    users, (rows, r) = call.queries.shape[0], call.items.shape
    pairs = torch.full((), users * rows if plan.dense else 0, dtype=torch.int64, device=counts.device)
    scanned = 0 if plan.dense else rows + plan.sample
    if found.survivors is not None and found.unproven is not None:
        pairs += (found.survivors.to(torch.int64) & 0xFFFFFFFF).clamp(max=plan.capacity).sum()
        pairs += found.unproven[0] * (rows * (radix.PASSES.value + 1))
    counts[0] += (pairs + scanned) * (r * call.items.element_size())
    counts[2] += pairs


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
    # Columns that a tensor core's least block has anyway repeat queries rather than stand for users who are not there.
    m_pad, r_pad = max(padded(count), 16 // padded(users)), padded(r, 16)
    scales, slack, fixed = call.queries.new_empty((3, users)).unbind()
    prepared = _Prepared(
        torch.empty((users, m_pad, r_pad), dtype=_PRODUCTS[call.items.dtype], device=call.queries.device),
        call.queries.new_empty((users, m_pad)),
        scales,
        slack,
        fixed,
        torch.empty(users, dtype=torch.int64, device=call.queries.device),
    )
    query_kernels.prepare_queries[(users,)](
        call.queries,
        call.exists,
        *prepared,
        k,
        count,
        r,
        relative_error(prepared.rounded.dtype, r),
        _excess(call)[0],
        M_PAD=m_pad,
        R=r_pad,
        D=min(16, m_pad),
        KIND=_KINDS[prepared.rounded.dtype],
        **FUSED,
    )
    return prepared


def bound_queries(call: Call, card: Card) -> tuple[CanonicalTile | None, tuple[Tensor | None, ...], dict[str, Any]]:
    """(tile, arguments, sizes) for winners.py where a user has so many queries that bounding them first pays, in
    instructions; else (None, nothing for the arguments, sizes that mean nothing)."""
    count = call.queries.shape[1]
    if call.log_sum_exp or count < BOUNDED_QUERIES:
        return None, (None,) * 4, {"BLOCK_C": 0, "BLOCK_R": 0, "M_PAD": 0, "R": 0, "TENSOR_SQUARES": False}
    prepared = prepare(call, 0)
    _, m_pad, r_pad = prepared.rounded.shape
    itemsize = prepared.rounded.element_size()
    whole = r_pad * itemsize <= 512
    sizes = {
        "BLOCK_C": min(m_pad, 64),
        "BLOCK_R": r_pad if whole else 128 // itemsize,
        "num_warps": 4 if whole else 8,  # addresses of rows that are read in parts take registers
        "M_PAD": m_pad,
        "R": r_pad,
        "TENSOR_SQUARES": _squares_by_tensor_core(prepared, card),
    }
    arguments = (prepared.rounded, prepared.inverse_scale, prepared.length_slack, prepared.fixed_slack)
    return CanonicalTile(64, 1, 1), arguments, sizes


def _squares_by_tensor_core(prepared: _Prepared, card: Card) -> bool:
    return prepared.rounded.dtype == torch.bfloat16 and card.adds_squares


def _excess(call: Call) -> tuple[float, float]:
    """(relative, absolute): log(sum exp) of M dots as the scan and as the canonical operations compute it are both
    within these of the exact value."""
    return (8e-6, 3.2e-5 + 4e-7 * call.queries.shape[1]) if call.log_sum_exp else (0.0, 0.0)


def _dense_keys(call: Call, k: int) -> _Keys:
    users, count, r = call.queries.shape
    rows = call.items.shape[0]
    wanted = prepare(call, k).wanted
    keys = torch.empty((users, rows), dtype=torch.int64, device=call.queries.device)
    tile = call.canonical_tile
    grid = (-(-rows // tile["C"]), users)
    rescore.score_all[grid](
        keys,
        rows,
        wanted,
        *call.scored,
        *call.masked,
        *call.excluded,
        count,
        r,
        MASK_BITS=call.bits,
        **tile,
        **MOST_REGISTERS,
    )
    return _Keys(keys)


def _surviving_keys(call: Call, k: int, plan: Plan, card: Card) -> _Keys:
    users, count, r = call.queries.shape
    rows, device = call.items.shape[0], call.queries.device
    prepared = prepare(call, k)
    limits = guess(call, prepared, plan, card)
    keys = torch.empty((users, plan.capacity), dtype=torch.int64, device=device)
    bins = 2 * radix.PASSES.value * radix.BINS.value
    counts, collected, histograms, arrivals, proofs = _zeros(device, users, users, bins, 1, users)
    scan_rows(call, prepared, limits, keys, counts, plan.capacity, card)
    tile = call.canonical_tile
    rescore.rescore[(-(-plan.capacity // tile["C"]), users)](
        keys, counts, plan.capacity, limits.thresholds, proofs, prepared.wanted, *call.scored, *call.excluded, count, r,
        **tile, **MOST_REGISTERS,
    )  # fmt: skip
    unproven = torch.empty(1, dtype=torch.int64, device=device)
    # Programs wait for each other; interpreted ones run one after the other.
    programs, together = (1, {}) if card.interpreted else (2 * card.processors, {"launch_cooperative_grid": True})
    radix.select_unproven[(programs,)](
        counts, plan.capacity, limits.thresholds, proofs, prepared.wanted, users, unproven, histograms, arrivals,
        collected, keys, rows, -(-rows // tile["C"]), *call.scored, *call.masked, *call.excluded, count, r,
        MASK_BITS=call.bits, BLOCK=min(1024, padded(users)), **MOST_REGISTERS, **tile, **together,
    )  # fmt: skip
    return _Keys(keys, counts, unproven)


def _zeros(device: torch.device, *sizes: int) -> list[Tensor]:
    """int32 vectors of zeros in one allocation, the last one int64."""
    wide = [size + size % 2 for size in sizes[:-1]]
    buffer = torch.zeros(sum(wide) + 2 * sizes[-1], dtype=torch.int32, device=device)
    parts = list(buffer.split([*wide, 2 * sizes[-1]]))
    return [*parts[:-1], parts[-1].view(torch.int64)]


class _Limits(NamedTuple):
    """Of every user, fp32 [B]: the threshold, and what the scan compares with. fixed: where rows have scales."""

    thresholds: Tensor
    reach: Tensor
    slope: Tensor
    fixed: Tensor | None


def guess(call: Call, prepared: _Prepared, plan: Plan, card: Card) -> _Limits:
    """The threshold is the rank-th best maximum of the sample."""
    users = call.queries.shape[0]
    maxima = sample_maxima(call, prepared, plan.sample, plan.step, plan.gathered, card)
    best = torch.topk(maxima, plan.rank, dim=1, sorted=True).values
    scaled = call.row_scale is not None
    thresholds, reach, slope, *fixed = call.queries.new_empty((3 + scaled, users)).unbind()
    limits = _Limits(thresholds, reach, slope, fixed[0] if fixed else None)
    query_kernels.set_limits[(-(-users // 128),)](
        best, best.stride(0), plan.rank, prepared.inverse_scale, prepared.length_slack, prepared.fixed_slack,
        prepared.wanted, _excess(call)[1], *limits, users,
        SCALED=call.log_sum_exp or call.bias is not None or scaled, ROW_SCALE=scaled, BLOCK=128, **FUSED,
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
    sizes = (users * m_pad, m_pad, r_pad, prepared.rounded.element_size(), card.capability)
    own_masks = call.mask is not None and call.mask.dim() == 2
    return choose_tile(*sizes, own_masks=own_masks, scaled=call.row_scale is not None, log_sum_exp=call.log_sum_exp)


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
    # Where tiles were measured, the assembler's own choice was.
    measured = 90 <= card.capability < 100 and tile.block_r >= r_pad and tile.block_c >= m_pad
    measured = measured and not call.log_sum_exp and call.row_scale is None
    scan_kernel[(min(tiles, card.processors * tile.per_sm),)](
        *call.table,
        rows,
        step,
        tiles,
        prepared.rounded,
        prepared.absent,
        prepared.inverse_scale,
        *(limits or (None,) * 4)[1:],
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
        TENSOR_SQUARES=_squares_by_tensor_core(prepared, card),
        STAGES=tile.stages,
        num_warps=tile.warps,
        **({} if measured else MOST_REGISTERS),
        **FUSED,
    )
