"""The public scoring functions: arguments are checked here, in words, and handed to the ops."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor

from . import checks, ops
from .interop import as_tensor, in_kind
from .table import ItemTable, Serving

Reduce = Literal["max", "sum", "mean", "logsumexp"]


class TopK(NamedTuple):
    """The k best items of each user, best first: higher score, then lower row index.

    Attributes:
        scores: [B, k] float32 (float64 for float64 input); pads are -inf.
        ids: [B, k] int64 row indices; pads are -1.
    """

    scores: Tensor
    ids: Tensor

    def like(self, array: Any) -> TopK:
        """The same as arrays of the library that ``array`` is from: NumPy, CuPy, JAX, ...; without gradients."""
        return in_kind(self, array)


class ScanStats(NamedTuple):
    """What a call did; nothing here waits for a device.

    Attributes:
        bytes_read: int64 scalar, of codes and rows.
        survivors: int64 [2]: (user, item) pairs that the first bounds of a packed table could not rule out, and pairs
            that were scored exactly, which without codes are all or, where rows are bounded on their way, few.
        blocks: int64 [2], of a table packed in blocks: (user, block) pairs whose bounds were asked, and those of them
            that were not read; zeros where blocks were no use. Where ever fewer are left out, pack the table anew.
        proven: bool [B], whether the user's result is certainly exact.
    """

    bytes_read: Tensor
    survivors: Tensor
    blocks: Tensor
    proven: Tensor


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
    recall: float = 1.0,
    sorted: bool = True,
    sparse_grad: bool = False,
    return_stats: bool = False,
    backend: str | None = None,
) -> TopK:
    """The k items of the largest ``reduce_m(queries[b, m] . items[i]) + bias[i]``, for every user b; exactly, unless
    ``recall`` is below 1.

    Equals, up to rounding and with ties broken by the lower row::

        torch.topk((queries @ items.T).amax(1) + bias, k)            # queries [B, M, r]

    without storing the [B, M, N] dots: memory beyond the result is O(B k) and a few tiles a thread. On the CPU backend
    each row is read once for all queries of a group of users (up to 512 queries), on a GPU for up to 1024 users, and no
    call waits for the device. Scores are canonical dots (CONTRACT.md): the same bits on every backend, instruction set,
    thread count and batch.

    Arrays of NumPy, CuPy, JAX and whatever else has ``__dlpack__`` are taken as they lie, wherever a tensor is;
    ``result.like(queries)`` gives the result back in their kind.

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
        recall: the expected share of the exact k best that is returned, above 0 and at most 1. Below 1 the codes of a
            packed table rule rows out by probable bounds: at a threshold that is guessed before the scan, a row that
            reaches it is lost with a probability of at most 1 - recall, over queries, given the table's rotation. A
            query that was made from the table's own codes has no such promise. What is returned is scored exactly,
            does not depend on threads, timing, instruction set or card, and is exact (``ScanStats.proven``) where
            probable bounds cannot win: on tables without codes, in blocks, or of fewer than 16 elements a row; while
            rows are being replaced; for users whose threshold is refuted or whose queries have no certain bound. By
            "cpu" also on tables of fewer than 65,536 rows or 2**22 numbers, in calls of more than 16 queries, and
            where they rule out too little for some user of the call; by "cuda" on tables of up to 8192 rows or 4 k;
            and always by "triton" and "reference". Fewest bytes are read from ``pack(("int2", "int4"))``; on codes of
            4 or 8 bits fewer rows are left to score. Source: RaBitQ (Gao and Long, SIGMOD 2024) for the law of the
            error.
        sorted: False leaves the order within the k open.
        sparse_grad: the gradient of ``items`` is a coalesced COO tensor that holds the rows returned only.
        return_stats: also return :class:`ScanStats`: what was read, what survived the bounds.
        backend: "cpu", "cuda" (packed tables), "triton" or "reference", which raises where it cannot run the call;
            None takes what the environment variable URM_BACKEND names, else lets the library choose.

    Returns:
        :class:`TopK`; with ``return_stats`` a tuple of it and :class:`ScanStats`. ``scores`` carries gradients to
        queries, projection, items and bias; under "max" to the winning query, the lowest m on ties.

    Raises:
        TypeError, ValueError: with the argument's name, what came and what was wanted.
        MemoryError, torch.OutOfMemoryError: the result does not fit, on the CPU and on a GPU.
    """
    table, queries, query_mask = checked_scoring(queries, items, projection, query_mask, reduce, bias)
    users, rows = queries.shape[0], table.items.shape[0]
    mask, exclude = checked_filters(mask, exclude, users, rows, queries)
    k = checks.count("k", k)
    checks.flag("sorted", sorted)
    checks.flag("sparse_grad", sparse_grad)
    checks.flag("return_stats", return_stats)
    options = (query_mask, reduce, mask, exclude, sorted, sparse_grad, checks.recall(recall), checks.backend(backend))
    scores, ids, *counts = ops.score_topk(queries, *table, k, *options, counted=return_stats)
    if not return_stats:
        return TopK(scores, ids)
    did, proven = counts
    return TopK(scores, ids), ScanStats(did[0], did[1:3], did[3:], proven)  # type: ignore[return-value]  # as asked


def score_candidates(
    queries: Tensor,
    items: Tensor | ItemTable,
    candidates: Tensor,
    *,
    projection: Tensor | None = None,
    query_mask: Tensor | None = None,
    reduce: Reduce = "max",
    bias: Tensor | None = None,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Scores [B, C] of chosen items, with the bits that :func:`score_topk` gives them.

    Equals, up to rounding::

        torch.einsum("bmr,bcr->bmc", queries, items[candidates]).amax(1) + bias[candidates]

    without storing the rows [B, C, r] or the dots [B, M, C]: memory beyond the result is a tile a thread.

    Args:
        candidates: int64 [B, C] row indices, or [C], the same for all users. -1 is no candidate. Rows that do not exist
            raise on the CPU; on other devices they score NaN, since looking would be waiting.
        queries, items, projection, query_mask, reduce, bias, sparse_grad, backend: as in :func:`score_topk`.

    Returns:
        [B, C] float32 (float64 for float64 input): -inf for -1, removed rows and users without queries; NaN where a
        product is. Carries gradients to queries, projection, items and bias, as score_topk's scores do; they take
        memory for the rows [B, C, r].

    Raises:
        TypeError, ValueError: with the argument's name, what came and what was wanted.
        MemoryError, torch.OutOfMemoryError: the result does not fit.
    """
    table, queries, query_mask = checked_scoring(queries, items, projection, query_mask, reduce, bias)
    candidates = as_tensor("candidates", candidates)
    checks.candidates(candidates, queries.shape[0], queries.device)
    checks.flag("sparse_grad", sparse_grad)
    return ops.score_candidates(queries, *table, candidates, query_mask, reduce, sparse_grad, checks.backend(backend))


def log_partition(
    queries: Tensor,
    items: Tensor | ItemTable,
    *,
    projection: Tensor | None = None,
    query_mask: Tensor | None = None,
    reduce: Reduce = "max",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    exclude: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    backend: str | None = None,
) -> Tensor:
    """log of the softmax's denominator over all items that :func:`score_topk` could return, [B].

    Equals, up to rounding::

        torch.logsumexp(((queries @ items.T).amax(1) + bias) / temperature, 1)

    without storing the [B, M, N] dots or the [B, N] scores: memory beyond the result is O(B) and a few tiles a thread,
    backward as well, apart from the gradients themselves. Terms are added as integers by their exponent
    (csrc/common/exponential_sum.h), so that no order of rows, threads or tiles changes a bit; what is left out is below
    2**-22 of the sum, and the result is within 2e-6 max(1, largest score) of exact arithmetic.

    Args:
        temperature: positive number or scalar tensor, which may require a gradient; divides the scores after the bias.
        queries, items, projection, query_mask, reduce, bias, mask, exclude, backend: as in :func:`score_topk`.

    Returns:
        [B] float32 (float64 for float64 input); -inf where no item takes part. Items whose score is NaN, which
        score_topk never returns, take no part; a score of +inf makes it +inf. Carries gradients to queries, projection,
        items, bias and temperature, by recomputation; none where the result is infinite.

    Raises:
        TypeError, ValueError: with the argument's name, what came and what was wanted.
    """
    table, queries, query_mask = checked_scoring(queries, items, projection, query_mask, reduce, bias)
    users, rows = queries.shape[0], table.items.shape[0]
    mask, exclude = checked_filters(mask, exclude, users, rows, queries)
    temperature = as_tensor("temperature", temperature)
    temperature = checks.temperature(temperature, ops.library.compute_dtype(queries, table.items), queries.device)
    return ops.log_partition(queries, *table, query_mask, reduce, mask, exclude, temperature, checks.backend(backend))


def checked_scoring(queries, items, projection, query_mask, reduce, bias) -> tuple[Serving, Tensor, Tensor | None]:
    """What every scoring function takes: (the table's tensors, queries [B, M, r], query_mask)."""
    queries = as_tensor("queries", queries)
    projection, query_mask = as_tensor("projection", projection), as_tensor("query_mask", query_mask)
    bias = as_tensor("bias", bias)
    if isinstance(items, ItemTable):
        table = items.serving()
        if table.bias is not None and bias is not None:
            raise ValueError("bias: given beside an ItemTable that has a bias of its own; pass only one of the two")
        table = table if bias is None else table._replace(bias=bias)
        queries = checks.queries(queries, projection)
        checks.same_device("items", table.items, queries.device)
        checks.width("items", table.items, queries)
        checks.per_row("row_scale", table.row_scale, table.items.shape[0], queries.device)
        checks.alive(table.alive, table.items.shape[0])
        checks.codes(table.code_blocks, table.code_fine, table.items)
        checks.cells(table.code_order, table.code_cells, table.code_cell_rows, table.items)
    else:
        table = Serving(as_tensor("items", items), bias)
        queries = checks.queries(queries, projection)
        checks.items(table.items, queries)
    checks.reduce(reduce)
    checks.query_mask(query_mask, queries.shape[0], queries.shape[1], queries.device)
    checks.bias(table.bias, table.items.shape[0], queries.device)
    return table, queries, query_mask


def checked_filters(mask, exclude, users: int, rows: int, queries: Tensor) -> tuple[Tensor | None, Tensor | None]:
    mask, exclude = as_tensor("mask", mask), as_tensor("exclude", exclude)
    checks.mask(mask, users, rows, queries.device)
    checks.exclude(exclude, users, queries.device)
    return mask, exclude
