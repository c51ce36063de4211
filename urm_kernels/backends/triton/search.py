"""The pipeline on a GPU: guess a threshold, scan, rescore, prove, select; launches only, no wait for the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import queries as query_kernels
from . import radix, rescore
from .plan import Plan, Tile, choose_tile, make_plan, padded, relative_error
from .scan import scan as scan_kernel

_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_EXACT = {"enable_fp_fusion": False}


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
    queries: Tensor,
    items: Tensor,
    k: int,
    query_mask: Tensor | None,
    reduce: str,
    bias: Tensor | None,
    mask: Tensor | None,
    exclude: Tensor | None,
    sorted: bool,
    processors: int,
) -> Found:
    """See urm_kernels.score_topk. processors: multiprocessors of the device."""
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
        keys, failed = _dense_keys(call, k) if plan.dense else _surviving_keys(call, k, plan, processors)
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


def _prepare(call: Call, k: int) -> _Prepared:
    users, count, r = call.queries.shape
    m_pad, r_pad = padded(count), padded(r, 16)
    f32 = {"dtype": torch.float32, "device": call.queries.device}
    prepared = _Prepared(
        torch.empty((users, m_pad, r_pad), dtype=call.items.dtype, device=call.queries.device),
        torch.empty((users, m_pad), **f32),
        torch.empty(users, **f32),
        torch.empty(users, **f32),
        torch.empty(users, **f32),
        torch.empty(users, dtype=torch.int64, device=call.queries.device),
    )
    # log(sum exp) of M dots, computed here and by the canonical operations: both within these of the exact value.
    relative, fixed = (8e-6, 3.2e-5 + 4e-7 * count) if call.log_sum_exp else (0.0, 0.0)
    query_kernels.prepare_queries[(users,)](
        call.queries,
        call.exists,
        *prepared,
        k,
        count,
        r,
        relative_error(call.items.dtype, r),
        relative,
        fixed,
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
    wanted = _prepare(call, k).wanted
    keys = torch.empty((users, rows), dtype=torch.int64, device=call.queries.device)
    tile = _canonical_tile(call)
    grid = (-(-rows // tile["C"]), users)
    rescore.score_all[grid](
        keys, rows, wanted, *call.scored, *call.masked, *call.excluded, count, r, MASK_BITS=call.bits, **tile
    )
    return keys, torch.zeros(1, dtype=torch.int64, device=keys.device)


def _surviving_keys(call: Call, k: int, plan: Plan, processors: int) -> tuple[Tensor, Tensor]:
    users, count, r = call.queries.shape
    rows, device = call.items.shape[0], call.queries.device
    prepared = _prepare(call, k)
    limits = _guess(call, prepared, plan, processors)
    thresholds = limits.thresholds
    keys = torch.empty((users, plan.capacity), dtype=torch.int64, device=device)
    counts = torch.zeros(users, dtype=torch.int32, device=device)
    proofs, listed = torch.zeros((2, users), dtype=torch.int64, device=device)
    scan_rows(call, prepared, limits, rows, 1, keys, counts, plan.capacity, processors)
    tile = _canonical_tile(call)
    rescore.rescore[(-(-plan.capacity // tile["C"]), users)](
        keys, counts, plan.capacity, thresholds, proofs, prepared.wanted, *call.scored, *call.excluded, count, r, **tile
    )
    unproven = torch.empty(1, dtype=torch.int64, device=device)
    passes = radix.PASSES.value
    histograms = torch.empty((users, passes, radix.BINS.value), dtype=torch.int32, device=device)
    radix.list_unproven[(1,)](
        counts, plan.capacity, thresholds, proofs, prepared.wanted, users, listed, unproven, histograms,
        PASSES=passes, BLOCK=1024,
    )  # fmt: skip
    for step in range(passes + 1):
        radix.radix_pass[(processors * 4,)](
            step, listed, unproven, histograms, prepared.wanted, keys, counts, plan.capacity, rows,
            -(-rows // tile["C"]), *call.scored, *call.masked, *call.excluded, count, r,
            MASK_BITS=call.bits, COLLECT=step == passes, **tile,
        )  # fmt: skip
    return keys, unproven


class _Limits(NamedTuple):
    """Of every user, fp32 [B]: the threshold, and what the scan compares with."""

    thresholds: Tensor
    reach: Tensor
    slope: Tensor


def _guess(call: Call, prepared: _Prepared, plan: Plan, processors: int) -> _Limits:
    """The threshold is the rank-th best score of the sample."""
    users = call.queries.shape[0]
    limits = _Limits(*call.queries.new_empty((3, users)))
    for first in range(0, users, plan.sample_users):
        part = slice(first, first + plan.sample_users)
        some = call._replace(
            queries=call.queries[part], mask=call.mask if call.mask is None or call.mask.dim() == 1 else call.mask[part]
        )
        count = some.queries.shape[0]
        scores = call.queries.new_empty((count, plan.sample_rows))
        own = _Prepared(*(t[part] for t in prepared))
        scan_rows(some, own, None, plan.sample_rows, plan.sample_step, scores, None, 0, processors)
        best = torch.topk(scores, plan.rank, dim=1, sorted=True).values[:, -1]
        query_kernels.set_limits[(-(-count // 128),)](
            best, best.stride(0), own.inverse_scale, own.length_slack, own.fixed_slack, *(t[part] for t in limits),
            count, SCALED=call.log_sum_exp or call.bias is not None, BLOCK=128,
        )  # fmt: skip
    return limits


def scan_rows(
    call: Call,
    prepared: _Prepared,
    limits: _Limits | None,
    rows: int,
    step: int,
    out: Tensor,
    counts: Tensor | None,
    capacity: int,
    processors: int,
    tile: Tile | None = None,
) -> None:
    """Launches the scan: of every row, or without limits of a sample, whose scores are written."""
    users, _, r = call.queries.shape
    _, m_pad, r_pad = prepared.rounded.shape
    tile = tile or choose_tile(users * m_pad, m_pad, r_pad, call.items.element_size())
    tiles = -(-rows // tile.block_n)
    bias_stride = 0 if call.bias is None else call.bias.stride(0)
    scan_kernel[(min(tiles, processors * tile.per_sm),)](
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
        SAMPLE=limits is None,
        COMPILED=not call.items.is_cpu,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
