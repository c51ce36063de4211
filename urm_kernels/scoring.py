"""The public scoring functions: arguments are checked here, in words, and handed to the ops."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from . import checks, ops
from .table import ItemTable

Reduce = Literal["max", "sum", "mean", "logsumexp"]


class TopK(NamedTuple):
    """The k best items of each user, best first: higher score, then lower row index.

    scores: [B, k] float32 (float64 for float64 input); pads are -inf.
    ids: [B, k] int64 row indices; pads are -1.
    """

    scores: Tensor
    ids: Tensor


def score_topk(
    queries: Tensor,
    items: Tensor | ItemTable,
    k: int,
    *,
    projection: Tensor | None = None,
    query_mask: Tensor | None = None,
    reduce: Reduce = "max",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    exclude: Tensor | None = None,
    sorted: bool = True,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> TopK:
    """The k items of the largest ``reduce_m(queries[b, m] . items[i]) + bias[i]``, exactly, for every user b.

    Equals, up to rounding and with ties broken by the lower row::

        torch.topk((queries @ items.T).amax(1) + bias, k)            # queries [B, M, r]

    without storing the [B, M, N] dots: memory beyond the result is O(B k) and a few tiles a thread. On the CPU backend
    each row is read once for all queries of a group of users (up to 512 queries), on a GPU for up to 1024 users, and no
    call waits for the device. Scores are canonical dots
    (CONTRACT.md): the same bits on every backend, instruction set, thread count and batch.

    Args:
        queries: [B, M, r]: M query vectors for each of B users. [B, r] is one query a user, [r] one user.
            float32, float16, bfloat16 (widened exactly) or float64 (reference backend). With ``projection`` the last
            dimension is d.
        items: item factors [N, r] with any strides, or an :class:`ItemTable`. N < 2**32.
        k: results wanted; where fewer items are allowed, the rest is padded (score -inf, id -1).
        projection: [d, r]; ``queries @ projection`` is formed first by torch, and rounds as torch does.
        query_mask: bool [B, M], True where the query exists. A user without queries gets pads only.
        reduce: how a user's M dots become one score. "max" (URM, arXiv 2502.03041), "sum", "mean" (over existing
            queries; both add the queries first) or "logsumexp".
        bias: [N], added after the reduction. A table brings its own.
        mask: items that may be returned: bool [N] or [B, N], or a bitset uint8 [ceil(N / 8)] or [B, ceil(N / 8)],
            lowest bit first.
        exclude: int64 [B, E] rows that user b must not get; -1 pads. Rows that do not exist raise on the CPU; on other
            devices they exclude nothing, since looking would be waiting.
        sorted: False leaves the order within the k open.
        sparse_grad: the gradient of ``items`` is a coalesced COO tensor that holds the rows returned only.
        backend: "cpu", "triton" or "reference"; None lets the library choose (environment URM_BACKEND overrides).

    Returns:
        :class:`TopK`. ``scores`` carries gradients to queries, projection, items and bias; under "max" to the winning
        query, the lowest m on ties.

    Raises:
        TypeError, ValueError: with the argument's name, what came and what was wanted.
        MemoryError, torch.OutOfMemoryError: the result does not fit, on the CPU and on a GPU.
    """
    if isinstance(items, ItemTable):
        if items.bias is not None and bias is not None:
            raise ValueError("bias: given beside an ItemTable that has a bias of its own; pass only one of the two")
        bias = items.bias if bias is None else bias
        items = items.factors
    queries = checks.queries(queries, projection)
    users, count, _ = queries.shape
    rows = checks.items(items, queries)
    k = checks.count("k", k)
    checks.reduce(reduce)
    checks.query_mask(query_mask, users, count, queries.device)
    checks.bias(bias, rows, queries.device)
    checks.mask(mask, users, rows, queries.device)
    checks.exclude(exclude, users, queries.device)
    checks.flag("sorted", sorted)
    checks.flag("sparse_grad", sparse_grad)
    backend = checks.backend(backend)
    scores, ids = ops.score_topk(
        queries, items, k, query_mask, reduce, bias, mask, exclude, sorted, sparse_grad, backend
    )
    return TopK(scores, ids)
