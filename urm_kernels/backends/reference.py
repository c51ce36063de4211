"""The reference: every promise in plain torch, on any device. Specification and oracle, chunked, not fast.

float32 results have the bits of every other backend: a float32 fused multiply-add is computed in float64, where the
product is exact, and the one rounding of the sum is made safe for the second (to float32) by rounding to odd
(S. Boldo and G. Melquiond, "Emulation of FMA and correctly rounded sums", IEEE Trans. Comput. 57(4), 2008).
float64 input is computed by torch's own float64 operations and is for gradient checks.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..float_mode import default_float_mode

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


def canonical_exp(x: Tensor) -> Tensor:
    """exp(x) for x <= 0, the operations of csrc/common/log_sum_exp.h."""
    small = ~(x >= -80.0)
    x = x.masked_fill(small, 0.0)
    magic = _constant(12582912.0, x)
    n = fma32(x, _constant(1.44269504088896341, x), magic) - magic
    f = fma32(n, _constant(-0.693359375, x), x)
    f = fma32(n, _constant(2.12194440e-4, x), f)
    p = _polynomial((1.98412698e-4, 1.38888889e-3, 8.33333333e-3, 4.16666667e-2, 1.66666667e-1, 0.5, 1.0, 1.0), f)
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


def score_topk(
    queries: Tensor,
    items: Tensor,
    k: int,
    query_mask: Tensor | None,
    reduce: str,
    bias: Tensor | None,
    mask: Tensor | None,
    exclude: Tensor | None,
    sorted: bool,
) -> tuple[Tensor, Tensor]:
    """See urm_kernels.score_topk: chunks of rows are scored and merged into the best k so far."""
    with default_float_mode(queries.device):
        users, _, _ = queries.shape
        dtype = torch.float64 if torch.float64 in (queries.dtype, items.dtype) else torch.float32
        queries = queries.to(dtype)
        exists = torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
        exists = exists if query_mask is None else query_mask
        if reduce in ("sum", "mean"):
            queries, exists = combine_queries(queries, exists, reduce)
        best_scores = queries.new_full((users, k), -torch.inf)
        best_ids = torch.full((users, k), -1, dtype=torch.int64, device=queries.device)
        if queries.shape[1] == 0 or users == 0:
            return best_scores, best_ids
        step = max(LANES, _CHUNK_DOTS // (users * queries.shape[1]))
        for first in range(0, items.shape[0], step):
            rows = torch.arange(first, min(first + step, items.shape[0]), device=queries.device)
            dots = canonical_dots(queries[:, :, None], items[first : first + step])
            scores = reduce_dots(dots, exists, reduce)
            if bias is not None:
                scores = scores + bias[first : first + step].to(dtype)
            scores = scores + 0.0  # -0 becomes +0
            allowed = exists.any(1, keepdim=True) & ~torch.isnan(scores) & allowed_rows(rows, users, mask, exclude)
            best_scores, best_ids = _merge(best_scores, best_ids, scores, rows.where(allowed, -1), k)
        return best_scores, best_ids


def allowed_rows(rows: Tensor, users: int, mask: Tensor | None, exclude: Tensor | None) -> Tensor:
    """bool [users, len(rows)] for consecutive rows: what mask and exclude leave."""
    allowed = torch.ones((users, len(rows)), dtype=torch.bool, device=rows.device)
    if mask is not None and mask.dtype == torch.bool:
        allowed &= mask[..., rows]
    elif mask is not None:
        allowed &= ((mask[..., rows >> 3] >> (rows & 7)) & 1).bool()
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


def candidate_dots(queries: Tensor, items: Tensor, candidates: Tensor) -> Tensor:
    """[B, M, C] canonical dots of every query with the user's candidate rows [B, C]; -1 counts as a zero row."""
    with default_float_mode(queries.device):
        rows = items[candidates.clamp(min=0)].masked_fill((candidates < 0)[..., None], 0)
        return canonical_dots(queries[:, :, None], rows[:, None])
