"""Gradients by recomputation: dots are formed again, never stored.

Scores of chosen rows (score_topk, score_candidates) need these rows only; log_partition needs all, some at a time.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from .backends.reference import allowed_rows, combine_queries
from .backends.table_view import ScanOptions, TableView, gather_rows

_CHUNK = 1 << 22  # weights [users, M, k] held at a time
_PARTITION_CHUNK = 1 << 20  # dots [users, M, rows] held at a time: 4 MiB, and a few temporaries of that size
_DEVICE_CHUNK = 1 << 22  # the same where a launch has to be worth its while; six tensors of at most 16 MiB


def row_gradients(
    grad_scores: Tensor,
    ids: Tensor,
    queries: Tensor,
    table: TableView,
    query_mask: Tensor | None,
    reduce: str,
    rows: bool,
    backend: ModuleType,
) -> tuple[Tensor, Tensor]:
    """(gradient of queries [B, M, r], gradient of every chosen row [B, k, r] or empty [0] without ``rows``).

    d score[b, j] / d dot[b, m, j] is the weight of query m: 1 for the winner under max (the lowest m on ties), the
    softmax under logsumexp, 1 or 1 / count for the sums. Pads have weight 0.
    """
    users, count, r = queries.shape
    dtype = grad_scores.dtype
    grad_queries = queries.new_zeros((users, count, r))
    grad_rows = grad_scores.new_zeros((*ids.shape, r) if rows else (0,))
    if table.items.shape[0] == 0 or ids.numel() == 0 or count == 0:
        return grad_queries, grad_rows
    step = max(1, _CHUNK // (count * ids.shape[1]))
    for first in range(0, users, step):
        part = slice(first, first + step)
        exists = _all_exist(queries[part]) if query_mask is None else query_mask[part]
        # What takes no part is cut out, not multiplied by zero: 0 x inf would be NaN.
        idle = (ids[part] < 0) | (grad_scores[part] == 0)
        dots = None
        if reduce in ("max", "logsumexp"):
            dots = backend.candidate_dots(queries[part], table, ids[part])
        weight = query_weights(dots, exists, reduce).to(dtype)
        weight = (weight * grad_scores[part][:, None]).masked_fill(idle[:, None], 0)
        taken = ids[part].clamp(min=0)
        if table.row_scale is not None:
            weight = _times(weight, table.row_scale[taken].to(dtype)[:, None])
        values = gather_rows(table.items, taken).to(dtype).masked_fill(idle[..., None], 0)
        grad_queries[part] = _existing(weight @ values, exists)
        if rows:
            grad_rows[part] = weight.transpose(1, 2) @ _existing(queries[part], exists).to(dtype)
    return grad_queries, grad_rows


def partition_gradients(
    grad: Tensor,
    logarithms: Tensor,
    queries: Tensor,
    table: TableView,
    options: ScanOptions,
    temperature: Tensor,
    backend: ModuleType,
    needs_items: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries [B, M, r], items [N, r], bias [N] (empty where not needed) and temperature of log_partition.

    A row's share of a user's sum is p = exp(score / T - log_partition); d log_partition / d score = p / T. Sums over
    rows are formed in float64.
    """
    query_mask, reduce = options.query_mask, options.reduce
    users, count, r = queries.shape
    rows = table.items.shape[0]
    dtype, device = grad.dtype, grad.device
    grad_queries = torch.zeros((users, count, r), dtype=torch.float64, device=device)
    grad_items = grad.new_zeros((rows, r) if needs_items else (0,))
    grad_bias = grad.new_zeros((rows,) if needs_bias else (0,))
    grad_temperature = torch.zeros((), dtype=torch.float64, device=device)
    exists = _all_exist(queries) if query_mask is None else query_mask
    adds = reduce in ("sum", "mean")
    # Dots of one query a user where they are linear; its gradient is handed on to the user's queries at the end.
    asked, asked_exist = combine_queries(queries.to(dtype), exists, reduce) if adds else (queries.to(dtype), exists)
    chunk = _PARTITION_CHUNK if device.type == "cpu" else _DEVICE_CHUNK
    step = max(1, chunk // max(1, users * asked.shape[1], r))
    grad_asked = torch.zeros(asked.shape, dtype=torch.float64, device=device)
    scan = (asked, asked_exist, table, options._replace(reduce="max" if adds else reduce), temperature)
    weigh = getattr(backend, "partition_weights", None) or functools.partial(_partition_weights, backend)
    for first in range(0, rows if users and count else 0, step):
        part = slice(first, min(first + step, rows))
        weight, share, scores = weigh(grad, logarithms, *scan, part)
        grad_temperature -= (share * scores.masked_fill(share == 0, 0)).sum(dtype=torch.float64)
        if needs_bias:
            grad_bias[part] = share.sum(0)
        flat = weight.flatten(0, 1)
        # What takes no part is cut out, not multiplied by zero: 0 x inf would be NaN.
        idle = (share == 0).all(0)
        values = table.items[part].to(dtype).masked_fill(idle[:, None], 0)
        grad_asked += (flat @ values).view(asked.shape)
        if needs_items:
            idle = (flat == 0).all(1, keepdim=True)
            grad_items[part] = flat.T @ asked.flatten(0, 1).masked_fill(idle, 0)
    if adds:
        share_of_query = query_weights(None, exists, reduce).double()
        grad_queries = grad_asked * share_of_query
    else:
        grad_queries = grad_asked
    return _existing(grad_queries, exists).to(queries.dtype), grad_items, grad_bias, grad_temperature.to(dtype)


def _partition_weights(
    backend: ModuleType,
    grad: Tensor,
    logarithms: Tensor,
    asked: Tensor,
    exist: Tensor,
    table: TableView,
    options: ScanOptions,
    temperature: Tensor,
    part: slice,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of some rows: gradients of their dots [B, M, n] as products with the unscaled rows, of their scores [B, n] times
    the temperature, and these scores, divided by the temperature."""
    at = torch.arange(part.start, part.stop, device=grad.device)
    dots = backend.candidate_dots(asked, table, at)
    scores = _reduced(dots, exist, options.reduce)
    if table.bias is not None:
        scores = scores + table.bias[part].to(grad.dtype)
    scores = scores / temperature
    counts = allowed_rows(at, len(grad), options.mask, options.exclude, table.alive)
    counts &= torch.isfinite(logarithms)[:, None] & ~torch.isnan(scores)
    share = torch.exp(scores - logarithms[:, None]) * grad[:, None] / temperature
    share = share.masked_fill(~counts, 0)
    weight = query_weights(dots, exist, options.reduce).to(grad.dtype)
    weight = (weight * share[:, None]).masked_fill((share == 0)[:, None], 0)
    if table.row_scale is not None:
        weight = _times(weight, table.row_scale[part].to(grad.dtype))
    return weight, share, scores


def _times(weight: Tensor, row_scale: Tensor) -> Tensor:
    """What has no weight has none whatever the row's scale is."""
    return (weight * row_scale).masked_fill(weight == 0, 0)


def _all_exist(queries: Tensor) -> Tensor:
    return torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)


def _existing(queries: Tensor, exists: Tensor) -> Tensor:
    return queries.masked_fill(~exists[..., None], 0)


def _reduced(dots: Tensor, exists: Tensor, reduce: str) -> Tensor:
    dots = dots.masked_fill(~exists[..., None], -torch.inf)
    return torch.logsumexp(dots, 1) if reduce == "logsumexp" else dots.amax(1)


def query_weights(dots: Tensor | None, exists: Tensor, reduce: str) -> Tensor:
    """d score / d dot, [B, M, n], or [B, M, 1] for the sums, which need no dots; zero for queries that do not exist."""
    if reduce in ("sum", "mean"):
        weight = exists.to(torch.float64)
        if reduce == "mean":
            weight = weight / exists.sum(1, keepdim=True).clamp(min=1)
        return weight[..., None]
    assert dots is not None
    dots = dots.masked_fill(~exists[..., None], -torch.inf)
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
