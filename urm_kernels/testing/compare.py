"""Oracles in float64 and comparisons that know the order which the library promises."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from ..scoring import TopK

log = logging.getLogger("urm_kernels.testing")

_CHUNK_BYTES = 64 << 20  # of dots held at a time


def full_scores(
    queries: Tensor,
    items: Tensor,
    *,
    query_mask: Tensor | None = None,
    reduce: str = "max",
    bias: Tensor | None = None,
) -> Tensor:
    """float64 [B, N]: ``reduce_m(queries[b, m] . items[i]) + bias[i]``; -inf for a user without queries."""
    queries = _three_dimensional(queries).double()
    users, count, r = queries.shape
    exists = torch.ones(users, count, dtype=torch.bool, device=queries.device) if query_mask is None else query_mask
    queries = queries.masked_fill(~exists[..., None], 0.0)
    if reduce in ("sum", "mean"):
        queries = queries.sum(1, keepdim=True)
        if reduce == "mean":
            queries = queries / exists.sum(1).clamp(min=1)[:, None, None]
        exists, count = exists.any(1, keepdim=True), 1
    scores = torch.full((users, items.shape[0]), -torch.inf, dtype=torch.float64, device=queries.device)
    if users == 0 or count == 0:
        return scores
    step = max(1, _CHUNK_BYTES // (8 * users * count))
    for first in range(0, items.shape[0], step):
        rows = items[first : first + step].double()
        dots = (queries.reshape(-1, r) @ rows.T).view(users, count, len(rows))
        dots = dots.masked_fill(~exists[..., None], -torch.inf)
        scores[:, first : first + step] = torch.logsumexp(dots, 1) if reduce == "logsumexp" else dots.amax(1)
    return scores if bias is None else scores + bias.double()


def score_tolerance(
    queries: Tensor,
    items: Tensor,
    *,
    query_mask: Tensor | None = None,
    reduce: str = "max",
    bias: Tensor | None = None,
) -> Tensor:
    """float64 [B, N]: how far a canonical float32 score may lie from `full_scores`.

    A running sum rounds r / 16 times, the tree four times, the sum of M queries M times, the mean and the bias once
    each; every rounding is at most 2^-24 of the sum of absolute products.
    """
    queries = _three_dimensional(queries)
    _, count, r = queries.shape
    linear = reduce in ("sum", "mean")
    roundings = -(-r // 16) + 6 + (count if linear else 0)
    size = full_scores(
        queries.abs(),
        items.abs(),
        query_mask=query_mask,
        reduce=reduce if linear else "max",
        bias=None if bias is None else bias.abs(),
    )
    size = size.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=0.0)
    tolerance = size * roundings * 2.0**-24 * 1.01 + r * 2.0**-149
    if reduce == "logsumexp":
        scores = full_scores(queries, items, query_mask=query_mask, reduce=reduce, bias=bias)
        finite = torch.where(torch.isfinite(scores), scores, 0.0).abs()
        largest = finite.amax(1, keepdim=True) if items.shape[0] else finite.new_zeros(queries.shape[0], 1)
        tolerance = tolerance + 2e-6 * largest.clamp(min=1.0)
    return tolerance


def allowed_rows(
    users: int,
    rows: int,
    mask: Tensor | None = None,
    exclude: Tensor | None = None,
    device: str | torch.device = "cpu",
) -> Tensor:
    """bool [users, rows]: what `mask` (bool or bitset) and `exclude` leave."""
    allowed = torch.ones(users, rows, dtype=torch.bool, device=device)
    if mask is not None and mask.dtype == torch.uint8:
        bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
        mask = ((mask[..., None] >> bits) & 1).bool().flatten(-2)[..., :rows]
    if mask is not None:
        allowed &= mask
    if exclude is not None:
        for user, listed in enumerate(exclude):
            allowed[user, listed[listed >= 0]] = False
    return allowed


def brute_force_topk(
    queries: Tensor,
    items: Tensor,
    k: int,
    *,
    query_mask: Tensor | None = None,
    reduce: str = "max",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    exclude: Tensor | None = None,
) -> TopK:
    """`score_topk` by the definition, in float64: every score, a stable sort, pads. Scores are float64."""
    scores = full_scores(queries, items, query_mask=query_mask, reduce=reduce, bias=bias) + 0.0
    users, rows = scores.shape
    allowed = allowed_rows(users, rows, mask, exclude, scores.device) & ~torch.isnan(scores)
    if query_mask is not None:
        allowed &= query_mask.any(1, keepdim=True)
    elif _three_dimensional(queries).shape[1] == 0:
        allowed &= False
    order = scores.masked_fill(~allowed, -torch.inf).argsort(dim=1, descending=True, stable=True)
    # What may be returned first: a score of -inf is still better than a pad.
    order = order.gather(1, (~allowed.gather(1, order)).to(torch.uint8).argsort(dim=1, stable=True))[:, :k]
    returned = allowed.gather(1, order)
    best = torch.full((users, k), -torch.inf, dtype=torch.float64, device=scores.device)
    ids = torch.full((users, k), -1, dtype=torch.int64, device=scores.device)
    width = order.shape[1]
    best[:, :width] = scores.gather(1, order).masked_fill(~returned, -torch.inf)
    ids[:, :width] = order.masked_fill(~returned, -1)
    return TopK(best, ids)


def compare_topk(
    result: tuple[Tensor, Tensor],
    expected: TopK | Tensor,
    *,
    tolerance: float | Tensor = 0.0,
    allowed: Tensor | None = None,
    sorted: bool = True,
) -> None:
    """Raises AssertionError, in words, where `result` (scores, ids) is not the top k that `expected` calls for.

    expected a TopK: bit mode: the same ids and the same scores, bit for bit.
    expected a Tensor: the float64 score of every row [B, N], as `full_scores` gives. Each returned score lies within
    `tolerance` (a number, or a tensor that broadcasts to [B, N]) of its row's, the list is in the total order, holds
    no row twice, none that is not `allowed` (bool [B, N]), none whose score is NaN, and as many as there are; and no
    row left out is better than the last one returned by more than its tolerance. A user without queries is one
    for whom nothing is allowed.
    sorted=False leaves the order open.
    """
    scores, ids = (part.detach().cpu() for part in result)
    if scores.shape != ids.shape or ids.dim() != 2 or ids.dtype != torch.int64:
        raise AssertionError(
            f"scores {list(scores.shape)} and ids {list(ids.shape)} {ids.dtype}: two [B, k] with int64 ids are wanted"
        )
    if isinstance(expected, tuple):
        _compare_bits(scores, ids, expected[0].detach().cpu(), expected[1].detach().cpu(), sorted)
        return
    expected = expected.detach().cpu()
    may = ~torch.isnan(expected) if allowed is None else ~torch.isnan(expected) & allowed.cpu()
    slack = torch.as_tensor(tolerance, dtype=torch.float64).cpu().broadcast_to(expected.shape)
    if ids.shape[0] != expected.shape[0]:
        raise AssertionError(f"{ids.shape[0]} users came, {expected.shape[0]} are wanted")
    for user in range(ids.shape[0]):
        wrong = _wrong_with(scores[user].double(), ids[user], expected[user], may[user], slack[user], sorted)
        if wrong:
            raise AssertionError(f"user {user}: {wrong}")


def _compare_bits(scores: Tensor, ids: Tensor, want_scores: Tensor, want_ids: Tensor, sorted: bool) -> None:
    if scores.dtype != want_scores.dtype or scores.shape != want_scores.shape:
        raise AssertionError(
            f"scores are {scores.dtype} {list(scores.shape)}, {want_scores.dtype} {list(want_scores.shape)} is wanted"
        )
    if not sorted:
        order, want_order = (part.argsort(dim=1, stable=True) for part in (ids, want_ids))
        ids, scores = ids.gather(1, order), scores.gather(1, order)
        want_ids, want_scores = want_ids.gather(1, want_order), want_scores.gather(1, want_order)
    bits = torch.int64 if scores.dtype == torch.float64 else torch.int32
    differs = (ids != want_ids) | (scores.contiguous().view(bits) != want_scores.contiguous().view(bits))
    if differs.any():
        user, place = differs.nonzero()[0].tolist()
        raise AssertionError(
            f"user {user}, place {place}: row {ids[user, place]} with score {scores[user, place].item()!r} came, "
            f"row {want_ids[user, place]} with {want_scores[user, place].item()!r} is wanted "
            f"({int(differs.sum())} of {differs.numel()} places differ)"
        )


def _wrong_with(scores: Tensor, ids: Tensor, expected: Tensor, may: Tensor, slack: Tensor, sorted: bool) -> str | None:
    k, rows = len(ids), len(expected)
    if ((ids < -1) | (ids >= rows)).any():
        return f"ids outside -1 .. {rows - 1}: {ids[(ids < -1) | (ids >= rows)][0]}"
    real = ids >= 0
    count = int(real.sum())
    if sorted and not real[:count].all():
        return f"a pad stands before a row: ids {ids.tolist()}"
    if not (scores[~real] == -torch.inf).all():
        return "a pad has a score other than -inf"
    wanted = min(k, int(may.sum()))
    if count != wanted:
        return f"{count} rows came, {wanted} are wanted"
    scores, ids = scores[real], ids[real]
    if len(ids.unique()) != count:
        twice = ids.sort().values
        return f"row {twice[1:][twice[1:] == twice[:-1]][0]} came twice"
    if not may[ids].all():
        return f"row {ids[~may[ids]][0]} came, which may not be returned"
    apart = torch.where(scores == expected[ids], 0.0, (scores - expected[ids]).abs())
    bad = ~(apart <= slack[ids])
    if bad.any():
        place = int(bad.nonzero()[0])
        row = ids[place]
        return (
            f"row {row} has score {scores[place]:.9g}, its float64 score is {expected[row]:.9g}: {apart[place]:.3g} "
            f"apart where {slack[row]:.3g} is allowed"
        )
    if sorted:
        later = (scores[1:] > scores[:-1]) | ((scores[1:] == scores[:-1]) & (ids[1:] < ids[:-1]))
        if later.any():
            place = int(later.nonzero()[0])
            return (
                f"places {place} and {place + 1} are in the wrong order: row {ids[place]} with {scores[place]:.9g}, "
                f"row {ids[place + 1]} with {scores[place + 1]:.9g}"
            )
    left = may.clone()
    left[ids] = False
    if count and left.any():
        sure = torch.where(torch.isinf(expected), expected, expected - slack).masked_fill(~left, -torch.inf)
        best = int(sure.argmax())
        if sure[best] > scores.min():
            return (
                f"row {best} with float64 score {expected[best]:.9g} was left out, the worst row that came has "
                f"{scores.min():.9g}"
            )
    return None


class ThreeWayError(NamedTuple):
    """Largest errors against float64: of the kernel, and of the same sum by torch in the kernel's dtype."""

    kernel: float
    torch: float


def three_way_error(kernel_scores: Tensor, torch_scores: Tensor, fp64_scores: Tensor, what: str = "") -> ThreeWayError:
    """Both errors against float64, logged on success too: a test bounds the kernel's by torch's plus a little."""
    error = ThreeWayError(*(_largest_error(part, fp64_scores) for part in (kernel_scores, torch_scores)))
    log.info("%s error against float64: kernel %.3g, torch %.3g", what or "score", *error)
    return error


def _largest_error(scores: Tensor, truth: Tensor) -> float:
    scores, truth = scores.detach().double().cpu(), truth.detach().double().cpu()
    same = (scores == truth) | (torch.isnan(scores) & torch.isnan(truth))
    apart = (scores - truth).abs().nan_to_num(nan=torch.inf).masked_fill(same, 0.0)
    return float(apart.max()) if apart.numel() else 0.0


def _three_dimensional(queries: Tensor) -> Tensor:
    if queries.dim() == 3:
        return queries
    return queries.reshape(-1, 1, queries.shape[-1]) if queries.dim() == 2 else queries[None, None]
