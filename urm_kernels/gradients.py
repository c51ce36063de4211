"""Gradients of a top-k result: only the rows returned take part, and the dots are recomputed, never stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_CHUNK = 1 << 22  # weights [users, M, k] held at a time


def topk_gradients(
    grad_scores: Tensor,
    ids: Tensor,
    queries: Tensor,
    items: Tensor,
    query_mask: Tensor | None,
    reduce: str,
    rows: bool,
    candidate_dots: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """(gradient of queries [B, M, r], gradient of every returned row [B, k, r] or empty [0] without ``rows``).

    d score[b, j] / d dot[b, m, j] is the weight of query m: 1 for the winner under max (the lowest m on ties), the
    softmax under logsumexp, 1 or 1 / count for the sums. Pads have weight 0.
    """
    users, count, r = queries.shape
    dtype = grad_scores.dtype
    grad_queries = queries.new_zeros((users, count, r))
    grad_rows = grad_scores.new_zeros((*ids.shape, r) if rows else (0,))
    if items.shape[0] == 0 or ids.numel() == 0 or count == 0:
        return grad_queries, grad_rows
    step = max(1, _CHUNK // (count * ids.shape[1]))
    for first in range(0, users, step):
        part = slice(first, first + step)
        exists = None if query_mask is None else query_mask[part]
        # What takes no part is cut out, not multiplied by zero: 0 x inf would be NaN.
        idle = (ids[part] < 0) | (grad_scores[part] == 0)
        weight = _weights(queries[part], items, ids[part], exists, reduce, candidate_dots).to(dtype)
        weight = (weight * grad_scores[part][:, None]).masked_fill(idle[:, None], 0)
        taken = items[ids[part].clamp(min=0)].to(dtype).masked_fill(idle[..., None], 0)
        grad_queries[part] = _existing(weight @ taken, exists)
        if rows:
            grad_rows[part] = weight.transpose(1, 2) @ _existing(queries[part], exists).to(dtype)
    return grad_queries, grad_rows


def _existing(queries: Tensor, exists: Tensor | None) -> Tensor:
    return queries if exists is None else queries.masked_fill(~exists[..., None], 0)


def _weights(
    queries: Tensor,
    items: Tensor,
    ids: Tensor,
    exists: Tensor | None,
    reduce: str,
    candidate_dots: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """[B, M, k]; zero for queries that do not exist."""
    if exists is None:
        exists = torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
    if reduce in ("sum", "mean"):
        weight = exists.to(queries.dtype)
        if reduce == "mean":
            weight = weight / exists.sum(1, keepdim=True).clamp(min=1)
        return weight[..., None].expand(-1, -1, ids.shape[1])
    dots = candidate_dots(queries, items, ids).masked_fill(~exists[..., None], -torch.inf)
    if reduce == "logsumexp":
        return torch.softmax(dots, 1).masked_fill(~exists[..., None], 0)
    wins = (dots == dots.amax(1, keepdim=True)) & exists[..., None]
    return wins & (wins.cumsum(1) == 1)


def dense_rows(ids: Tensor, values: Tensor, rows: int) -> Tensor:
    """Values [B, k, ...] added into zeros [rows, ...] at their ids; pads are dropped."""
    out = values.new_zeros((rows, *values.shape[2:]))
    if rows == 0:
        return out
    # Pads carry zero gradients of their own; row 0 takes them so that no size depends on the data.
    pads = (ids < 0).reshape(*ids.shape, *[1] * (values.dim() - 2))
    at, added = ids.clamp(min=0).flatten(), values.masked_fill(pads, 0).flatten(0, 1)
    if out.device.type == "cpu":
        return out.index_add(0, at, added)
    # A GPU's index_add adds by atomics in whatever order; index_put sorts by row first, so that runs agree.
    return out.index_put((at,), added, accumulate=True)


def sparse_rows(ids: Tensor, values: Tensor, rows: int) -> Tensor:
    """The same as a coalesced COO tensor that holds the rows of ``ids`` only."""
    kept = ids >= 0
    out = torch.sparse_coo_tensor(ids[kept][None], values[kept], (rows, *values.shape[2:]), check_invariants=False)
    return out.coalesce()
