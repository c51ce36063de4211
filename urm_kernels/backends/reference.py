"""The reference: every promise in plain torch, on any device. Specification and oracle, chunked, not fast.

float32 results have the bits of every other backend (canonical.py). float64 input is computed by torch's own float64
operations and is for gradient checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..float_mode import default_float_mode
from . import reference_codes, reference_explore
from .canonical import (
    LANES,
    canonical_dots,
    canonical_log,
    canonical_log_sum_exp,
    exp_polynomial,
    minus_logarithms,
    scalar,
)
from .codes import BLOCK, Codes
from .table_view import ScanOptions, TableView, Walk, gather_rows, rows_of_bits

ROW_SCALE = True  # whether rows may have a scale
COUNTS = True  # whether it counts what a scan does
PROBABLE = False  # whether it makes use of a recall below 1
encode_blocks, encode_rows = reference_codes.encode_blocks, reference_codes.encode_rows
_CHUNK_DOTS = 1 << 16  # dots [B, M, rows] held at a time


def why_not(device: torch.device, dtypes: Collection[torch.dtype]) -> str | None:
    """None: the reference takes every call."""
    return None


def combine_queries(queries: Tensor, exists: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    """One query a user, as sum and mean are linear: the existing ones added in ascending m, divided by their number."""
    total = (
        torch.zeros_like(queries[:, 0]) if queries.shape[1] else queries.new_zeros(queries.shape[0], queries.shape[2])
    )
    for m in range(queries.shape[1]):
        total = torch.where(exists[:, m, None], total + queries[:, m], total)
    if reduce == "mean":
        total = total / exists.sum(1, keepdim=True).clamp(min=1)
    return total[:, None], exists.any(1, keepdim=True)


def reduce_dots(dots: Tensor, exists: Tensor, reduce: str) -> Tensor:
    """[B, M, n] -> [B, n]; NaN wherever an existing query's dot is."""
    if reduce != "logsumexp":
        return dots.masked_fill(~exists[..., None], -torch.inf).amax(1)
    if dots.dtype == torch.float64:
        return torch.logsumexp(dots.masked_fill(~exists[..., None], -torch.inf), 1)
    return canonical_log_sum_exp(dots, exists)


def _compute_dtype(queries: Tensor, items: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (queries.dtype, items.dtype) else torch.float32


def table_dots(queries: Tensor, rows: Tensor, row_scale: Tensor | None) -> Tensor:
    """[B, M, n]: queries [B, M, r] with rows [n, r], each row's dots times its scale [n]."""
    dots = canonical_dots(queries[:, :, None], rows.to(queries.dtype))
    return dots if row_scale is None else dots * row_scale.to(dots.dtype)


class _Chunk(NamedTuple):
    rows: Tensor  # [n] indices
    scores: Tensor  # [B, n]
    allowed: Tensor  # bool [B, n]: may be returned, and are not NaN


def _existing(queries: Tensor, query_mask: Tensor | None, reduce: str) -> tuple[Tensor, Tensor]:
    """(queries that take part [B, M, r], which of them exist [B, M])."""
    exists = torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
    exists = exists if query_mask is None else query_mask
    return combine_queries(queries, exists, reduce) if reduce in ("sum", "mean") else (queries, exists)


def _scored(
    queries: Tensor, table: TableView, options: ScanOptions, may_win: Callable[[slice], Tensor] | None = None
) -> Iterator[_Chunk]:
    """The scores of all rows, some rows at a time, ascending; of those alone that may still win for some user."""
    query_mask, reduce, mask, exclude, _recall = options
    users = queries.shape[0]
    dtype = _compute_dtype(queries, table.items)
    queries, exists = _existing(queries.to(dtype), query_mask, reduce)
    if queries.shape[1] == 0 or users == 0:
        return
    step = max(LANES, _CHUNK_DOTS // (users * queries.shape[1]))
    for first in range(0, table.items.shape[0], step):
        part = slice(first, min(first + step, table.items.shape[0]))
        rows = torch.arange(part.start, part.stop, device=queries.device)
        allowed = allowed_rows(rows, users, mask, exclude, table.alive) & exists.any(1, keepdim=True)
        items, scale, bias = (None if t is None else t[part] for t in (table.items, table.row_scale, table.bias))
        assert items is not None
        if may_win is not None:
            allowed &= may_win(part)
            kept = allowed.any(0).nonzero().flatten()
            if not len(kept):
                continue
            rows, allowed, items = rows[kept], allowed[:, kept], gather_rows(items, kept)
            scale, bias = (None if t is None else t[kept] for t in (scale, bias))
        scores = reduce_dots(table_dots(queries, items, scale), exists, reduce)
        if bias is not None:
            scores = scores + bias.to(dtype)
        scores = scores + 0.0  # -0 becomes +0
        yield _Chunk(rows, scores, allowed & ~torch.isnan(scores))


class _Bounds:
    """Which rows of a packed table may still win: those whose bounds reach a user's threshold."""

    def __init__(self, queries: Tensor, table: TableView, codes: Codes, options: ScanOptions, counts: Tensor) -> None:
        self._table, self._codes, self._reduce, self._counts = table, codes, options.reduce, counts
        asked, exists = _existing(queries, options.query_mask, options.reduce)
        self._queries = reference_codes.encode_queries(asked, exists, codes)
        self._exists = exists

    def reach(self, part: slice, threshold: Tensor) -> Tensor:
        """bool [B, rows of the part]."""
        r, first, last = self._table.items.shape[1], part.start // BLOCK, -(-part.stop // BLOCK)
        coded = min(last, len(self._codes.blocks))
        shape = (len(threshold), part.stop - part.start)
        bounds = torch.full(shape, torch.inf, dtype=torch.float64, device=threshold.device)
        if first < coded:
            rows = reference_codes.decode(self._codes, r, first, coded)
            wanted = slice(part.start - first * BLOCK, min(part.stop, coded * BLOCK) - first * BLOCK)
            rows = reference_codes.CodedRows(*(field[wanted] for field in rows))
            largest = reference_codes.scan_bounds(self._queries, rows, self._codes, r)
            bounds[:, : largest.shape[1]] = largest.where(self._queries.bounded[:, None], torch.inf)
            self._counts[0] += (coded - first) * self._codes.blocks.shape[1]
        certain = self._certain(part)
        survivors = certain | self._reaches(bounds, part, threshold)
        self._counts[1] += survivors.sum()
        if self._codes.fine is not None and first < coded:
            at = survivors.any(0)[: largest.shape[1]].nonzero().flatten()
            rows = reference_codes.decode_fine(self._codes, r, at + part.start)
            own = reference_codes.own_bounds(self._queries, rows, self._codes, r)
            own = own.masked_fill(~self._exists[..., None], -torch.inf).amax(1)
            bounds[:, at] = torch.minimum(bounds[:, at], own.where(self._queries.bounded[:, None], torch.inf))
            self._counts[0] += len(at) * self._codes.fine.shape[1]
            survivors = certain | self._reaches(bounds, part, threshold)
        self._counts[2] += survivors.sum()
        return survivors

    def _reaches(self, bounds: Tensor, part: slice, threshold: Tensor) -> Tensor:
        if self._reduce == "logsumexp":
            count = self._exists.sum(1, keepdim=True).clamp(min=1).double()
            bounds = bounds + bounds.abs() * 4e-6 + (count.log() + 3.2e-5)
        # Rounded to float32 before the bias is added, as the score is: both are monotone.
        bounds = bounds.float()
        if self._table.bias is not None:
            bounds = bounds + self._table.bias[part].float()
        return ~(bounds < threshold[:, None])

    def _certain(self, part: slice) -> Tensor:
        """Rows whose codes may be changing."""
        overlay, rows = self._table.overlay, part.stop - part.start
        certain = torch.zeros(rows, dtype=torch.bool, device=self._table.items.device)
        if overlay is not None:
            inside = overlay.rows[(overlay.rows >= part.start) & (overlay.rows < part.stop)]
            certain[inside - part.start] = True
        return certain


def score_topk(
    queries: Tensor, table: TableView, options: ScanOptions, k: int, sorted: bool, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See urm_kernels.score_topk; chunks of rows are scored and merged into the best k so far. What the scan did is
    added to counts, int64 [5]."""
    with default_float_mode(queries.device):
        shape, device = (queries.shape[0], k), queries.device
        dtype = _compute_dtype(queries, table.items)
        best_scores = torch.full(shape, -torch.inf, dtype=dtype, device=device)
        best_ids = torch.full(shape, -1, dtype=torch.int64, device=device)
        counts = torch.zeros(5, dtype=torch.int64, device=device) if counts is None else counts
        codes = table.codes if dtype == torch.float32 and k else None
        if codes is not None and codes.cells is not None:
            codes = None  # rows are met in their own order here
        may_win = None
        if codes is not None and queries.shape[0] and queries.shape[1]:
            bounds = _Bounds(queries, table, codes, options, counts)

            def may_win(part: slice) -> Tensor:
                return bounds.reach(part, best_scores[:, -1].where(best_ids[:, -1] >= 0, -torch.inf))

        for chunk in _scored(queries, table.settled(), options, may_win):
            counts[0] += len(chunk.rows) * table.items.shape[1] * table.items.element_size()
            if may_win is None:
                counts[2] += chunk.scores.numel()
            best_scores, best_ids = _merge(best_scores, best_ids, chunk.scores, chunk.rows.where(chunk.allowed, -1), k)
        return best_scores, best_ids


def log_partition(queries: Tensor, table: TableView, options: ScanOptions, temperature: Tensor) -> Tensor:
    """See urm_kernels.log_partition; temperature is a scalar of the dtype of computation."""
    with default_float_mode(queries.device):
        dtype = _compute_dtype(queries, table.items)
        make = _Float64Sum if dtype == torch.float64 else _ExponentialSum
        total = make(queries.shape[0], table.items.shape[0], queries.device)
        for chunk in _scored(queries, table.settled(), options):
            scores = chunk.scores / temperature
            total.add(scores.masked_fill(~chunk.allowed, -torch.inf))
        return total.log()


class _Float64Sum:
    """log-sum-exp in float64 with a running maximum."""

    def __init__(self, users: int, _rows: int, device: torch.device) -> None:
        self._log = torch.full((users,), -torch.inf, dtype=torch.float64, device=device)

    def add(self, scores: Tensor) -> None:
        self._log = torch.logaddexp(self._log, torch.logsumexp(scores, 1))

    def log(self) -> Tensor:
        return self._log


class _ExponentialSum:
    """The sums of csrc/common/exponential_sum.h: integers by groups of exponents, so that no order matters."""

    HUGE = 2.0**24
    GROUP = 8  # exponents
    NONE = -(1 << 28)

    def __init__(self, users: int, rows: int, device: torch.device) -> None:
        self._groups = 1 + -(-(24 + max(rows - 1, 0).bit_length()) // self.GROUP)
        self._sums = torch.zeros((users, self._groups), dtype=torch.int64, device=device)  # of group top - j at j
        self._top = torch.full((users,), self.NONE, dtype=torch.int64, device=device)
        self._largest = torch.full((users,), -torch.inf, device=device)

    def add(self, scores: Tensor) -> None:
        ordinary = scores.abs() < self.HUGE
        self._largest = torch.maximum(self._largest, scores.masked_fill(ordinary, -torch.inf).amax(1))
        scores = scores.masked_fill(~ordinary, 0.0)
        n = torch.round(scores * scalar(1.44269504088896341, scores))
        p = exp_polynomial(minus_logarithms(scores, n))
        n = n.to(torch.int64)
        mantissas = torch.round(p * 2.0**24).to(torch.int64) << (n % self.GROUP)
        group = n.div(self.GROUP, rounding_mode="floor").masked_fill(~ordinary, self.NONE)
        top = torch.maximum(self._top, group.amax(1))
        came_from = torch.arange(self._groups, device=scores.device) - (top - self._top)[:, None]
        kept = self._sums.gather(1, came_from.clamp(min=0)) * (came_from >= 0)
        below = top[:, None] - group
        counts = ordinary & (below < self._groups)
        self._sums = kept.scatter_add(1, below.where(counts, 0), mantissas.where(counts, 0))
        self._top = top

    def log(self) -> Tensor:
        total = torch.zeros(len(self._top), dtype=torch.float64, device=self._top.device)
        for j in range(self._groups - 1, -1, -1):
            high, low = self._sums[:, j] >> 32, self._sums[:, j] & 0xFFFFFFFF
            total = total * 2.0**-self.GROUP + (high.double() * 2.0**32 + low.double())
        none = self._top == self.NONE
        logarithm = canonical_log((total * 2.0**-24).float().masked_fill(none, 1.0))
        log = (self._top.double() * self.GROUP * math.log(2.0) + logarithm.double()).float()
        return torch.where(none | (self._largest >= self.HUGE), self._largest, log)


def score_candidates(
    queries: Tensor, table: TableView, candidates: Tensor, query_mask: Tensor | None, reduce: str
) -> Tensor:
    """See urm_kernels.score_candidates; rows that do not exist score NaN."""
    with default_float_mode(queries.device):
        table = table.settled()
        unknown = (candidates < -1) | (candidates >= table.items.shape[0])
        candidates = candidates.masked_fill(unknown, -1)
        dtype = _compute_dtype(queries, table.items)
        queries, exists = _existing(queries.to(dtype), query_mask, reduce)
        shape = (queries.shape[0], candidates.shape[-1])
        if queries.shape[1] == 0 or table.items.shape[0] == 0:
            return queries.new_full(shape, -torch.inf).masked_fill(unknown, torch.nan)
        scores = reduce_dots(candidate_dots(queries, table, candidates), exists, reduce)
        taken = candidates.clamp(min=0)
        if table.bias is not None:
            scores = scores + table.bias[taken].to(dtype)
        there = candidates >= 0
        if table.alive is not None:
            there = there & rows_of_bits(table.alive, taken)
        scores = (scores + 0.0).masked_fill(~(there & exists.any(1, keepdim=True)), -torch.inf)
        return scores.masked_fill(unknown, torch.nan)


def explore_topk(
    queries: Tensor, table: TableView, options: ScanOptions, walk: Walk, temperature: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See urm_kernels.explore_topk; temperature is a scalar of the dtype of computation."""
    with default_float_mode(queries.device):
        asked = (queries, table, options, walk, temperature, k)
        return reference_explore.explore_topk(*asked, score_candidates, allowed_rows)


def allowed_rows(
    rows: Tensor, users: int, mask: Tensor | None, exclude: Tensor | None, alive: Tensor | None = None
) -> Tensor:
    """bool [users, len(rows)] for consecutive rows: what mask, exclude and removals leave."""
    allowed = torch.ones((users, len(rows)), dtype=torch.bool, device=rows.device)
    if mask is not None and mask.dtype == torch.bool:
        allowed &= mask[..., rows]
    elif mask is not None:
        allowed &= rows_of_bits(mask, rows)
    if alive is not None:
        allowed &= rows_of_bits(alive, rows)
    if exclude is not None and exclude.shape[1]:
        # One column more collects what lies outside these rows.
        first, width = int(rows[0]), len(rows)
        inside = (exclude >= first) & (exclude < first + width)
        column = torch.where(inside, exclude - first, width)
        out = torch.zeros((users, width + 1), dtype=torch.bool, device=rows.device).scatter(1, column, True)
        allowed &= ~out[:, :width]
    return allowed


def _merge(best_scores: Tensor, best_ids: Tensor, scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k first of both lists in the total order; id -1 marks what may not be returned.

    Two stable sorts: by score, then what may be returned first. New rows stand behind the old and ascend, so that
    stability settles ties by the lower row.
    """
    ids = torch.cat([best_ids, ids], 1)
    scores = torch.cat([best_scores, scores], 1).masked_fill(ids < 0, -torch.inf)
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    order = order.gather(1, torch.argsort((ids.gather(1, order) < 0).to(torch.uint8), dim=1, stable=True))[:, :k]
    return scores.gather(1, order), ids.gather(1, order)


def candidate_dots(queries: Tensor, table: TableView, candidates: Tensor) -> Tensor:
    """[B, M, C] dots of every query with candidate rows, [B, C] or the same [C] for all; -1 counts as a zero row."""
    with default_float_mode(queries.device):
        table = table.settled()
        taken = candidates.clamp(min=0)
        dtype = _compute_dtype(queries, table.items)
        rows = gather_rows(table.items, taken).to(dtype).masked_fill((candidates < 0)[..., None], 0)
        dots = canonical_dots(queries.to(dtype)[:, :, None], rows.unsqueeze(-3))
        if table.row_scale is not None:
            dots = dots * table.row_scale[taken].to(dtype).unsqueeze(-2)
        return dots
