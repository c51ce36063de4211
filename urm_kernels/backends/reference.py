"""The reference: every promise in plain torch, on any device. Specification and oracle, chunked, not fast.

float32 results have the bits of every other backend: a float32 fused multiply-add is computed in float64, where the
product is exact, and the one rounding of the sum is made safe for the second (to float32) by rounding to odd
(S. Boldo and G. Melquiond, "Emulation of FMA and correctly rounded sums", IEEE Trans. Comput. 57(4), 2008).
float64 input is computed by torch's own float64 operations and is for gradient checks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..float_mode import default_float_mode
from .table_view import ScanOptions, TableView, gather_rows, rows_of_bits

ROW_SCALE = True  # whether rows may have a scale
LANES = 16
_CHUNK_DOTS = 1 << 16  # dots [B, M, rows] held at a time


def why_not(device: torch.device, dtypes: Collection[torch.dtype]) -> str | None:
    """None: the reference takes every call."""
    return None


def fma32(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """round(x y + z) in float32, rounded once; arguments are float32 and broadcast."""
    product = x.double() * y.double()  # exact: 48 bits
    addend = z.double()
    total = product + addend
    # TwoSum: what the float64 addition lost, exactly.
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    # Rounding to odd: an inexact sum whose last bit is even moves one step towards what was lost.
    bits = total.view(torch.int64)
    inexact = torch.isfinite(total) & (lost != 0) & ((bits & 1) == 0)
    step = torch.where((lost > 0) == (total > 0), 1, -1)
    return torch.where(inexact, bits + step, bits).view(torch.float64).float()


def canonical_dots(queries: Tensor, rows: Tensor) -> Tensor:
    """queries [..., r] . rows [..., r], leading dimensions broadcast, in the order of csrc/common/canonical_dot.h."""
    if queries.dtype == torch.float64 or rows.dtype == torch.float64:
        return (queries.double() * rows.double()).sum(-1)
    r = queries.shape[-1]
    shape = torch.broadcast_shapes(queries.shape, rows.shape)[:-1]
    sums = torch.zeros((*shape, LANES), dtype=torch.float32, device=queries.device)
    for first in range(0, r, LANES):
        width = min(LANES, r - first)
        part = slice(first, first + width)
        sums[..., :width] = fma32(queries[..., part].float(), rows[..., part].float(), sums[..., :width])
    for apart in (8, 4, 2, 1):
        sums = sums[..., :apart] + sums[..., apart : 2 * apart]
    return sums[..., 0]


def _constant(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    total = _constant(coefficients[0], x).expand_as(x)
    for c in coefficients[1:]:
        total = fma32(total, x, _constant(c, x))
    return total


def minus_logarithms(x: Tensor, n: Tensor) -> Tensor:
    """x - n ln 2, the operations of csrc/common/log_sum_exp.h."""
    return fma32(n, _constant(2.12194440e-4, x), fma32(n, _constant(-0.693359375, x), x))


def exp_polynomial(f: Tensor) -> Tensor:
    """exp(f) for small f, the operations of csrc/common/log_sum_exp.h."""
    return _polynomial((1.98412698e-4, 1.38888889e-3, 8.33333333e-3, 4.16666667e-2, 1.66666667e-1, 0.5, 1.0, 1.0), f)


def canonical_exp(x: Tensor) -> Tensor:
    """exp(x) for x <= 0, the operations of csrc/common/log_sum_exp.h."""
    small = ~(x >= -80.0)
    x = x.masked_fill(small, 0.0)
    magic = _constant(12582912.0, x)
    n = fma32(x, _constant(1.44269504088896341, x), magic) - magic
    p = exp_polynomial(minus_logarithms(x, n))
    scale = ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    return (p * scale).masked_fill(small, 0.0)


def canonical_log(s: Tensor) -> Tensor:
    """log(s) for finite s >= 1, the operations of csrc/common/log_sum_exp.h."""
    root_half = 0x3F3504F3
    offset = s.view(torch.int32) - root_half
    n = (offset >> 23).to(torch.float32)
    g = ((offset & 0x007FFFFF) + root_half).view(torch.float32)
    z = (g - 1.0) / (g + 1.0)
    p = _polynomial((0.222222222, 0.285714286, 0.4, 0.666666667, 2.0), z * z)
    low = fma32(n, _constant(-2.12194440e-4, s), z * p)
    return fma32(n, _constant(0.693359375, s), low)


def canonical_log_sum_exp(dots: Tensor, exists: Tensor) -> Tensor:
    """log(sum over existing m of exp(dots[:, m])): dots [B, M, n], exists [B, M]."""
    there = exists[..., None]
    largest = dots.masked_fill(~there, -torch.inf).amax(1)
    terms = canonical_exp(dots - largest[:, None])
    total, excess = torch.zeros_like(largest), torch.zeros_like(largest)  # Kahan's sum
    for m in range(dots.shape[1]):
        term = terms[:, m] - excess
        following = total + term
        excess = torch.where(there[:, m], (following - total) - term, excess)
        total = torch.where(there[:, m], following, total)
    finite = torch.isfinite(largest)
    return torch.where(finite, largest + canonical_log(total.masked_fill(~finite, 1.0)), largest)


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


def _scored(queries: Tensor, table: TableView, options: ScanOptions) -> Iterator[_Chunk]:
    """The scores of all rows, some rows at a time, ascending."""
    query_mask, reduce, mask, exclude = options
    users = queries.shape[0]
    dtype = _compute_dtype(queries, table.items)
    queries = queries.to(dtype)
    exists = torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
    exists = exists if query_mask is None else query_mask
    if reduce in ("sum", "mean"):
        queries, exists = combine_queries(queries, exists, reduce)
    if queries.shape[1] == 0 or users == 0:
        return
    step = max(LANES, _CHUNK_DOTS // (users * queries.shape[1]))
    for first in range(0, table.items.shape[0], step):
        part = slice(first, first + step)
        scale = None if table.row_scale is None else table.row_scale[part]
        scores = reduce_dots(table_dots(queries, table.items[part], scale), exists, reduce)
        if table.bias is not None:
            scores = scores + table.bias[part].to(dtype)
        scores = scores + 0.0  # -0 becomes +0
        rows = torch.arange(first, first + scores.shape[1], device=queries.device)
        allowed = allowed_rows(rows, users, mask, exclude, table.alive)
        yield _Chunk(rows, scores, allowed & exists.any(1, keepdim=True) & ~torch.isnan(scores))


def score_topk(queries: Tensor, table: TableView, options: ScanOptions, k: int, sorted: bool) -> tuple[Tensor, Tensor]:
    """See urm_kernels.score_topk; chunks of rows are scored and merged into the best k so far."""
    with default_float_mode(queries.device):
        shape, device = (queries.shape[0], k), queries.device
        best_scores = torch.full(shape, -torch.inf, dtype=_compute_dtype(queries, table.items), device=device)
        best_ids = torch.full(shape, -1, dtype=torch.int64, device=device)
        for chunk in _scored(queries, table.settled(), options):
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
        n = torch.round(scores * _constant(1.44269504088896341, scores))
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
    """See urm_kernels.score_candidates."""
    with default_float_mode(queries.device):
        table = table.settled()
        dtype = _compute_dtype(queries, table.items)
        queries = queries.to(dtype)
        exists = torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
        exists = exists if query_mask is None else query_mask
        if reduce in ("sum", "mean"):
            queries, exists = combine_queries(queries, exists, reduce)
        shape = (queries.shape[0], candidates.shape[-1])
        if queries.shape[1] == 0 or table.items.shape[0] == 0:
            return queries.new_full(shape, -torch.inf)
        scores = reduce_dots(candidate_dots(queries, table, candidates), exists, reduce)
        taken = candidates.clamp(min=0)
        if table.bias is not None:
            scores = scores + table.bias[taken].to(dtype)
        there = candidates >= 0
        if table.alive is not None:
            there = there & rows_of_bits(table.alive, taken)
        return (scores + 0.0).masked_fill(~(there & exists.any(1, keepdim=True)), -torch.inf)


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
