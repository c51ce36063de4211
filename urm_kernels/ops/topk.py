"""score_topk as an op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import gradients
from ..backends import select
from ..backends.table_view import ScanOptions, TableView
from ..float_mode import default_float_mode
from . import library

_ARGUMENTS = (
    f"(Tensor queries, {library.TABLE}, SymInt k, Tensor? query_mask, str reduce, Tensor? mask, Tensor? exclude, "
    "bool sorted, bool sparse_grad, float recall, str backend)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_scores, Tensor ids, Tensor queries, Tensor items, Tensor? row_scale, Tensor? query_mask, "
    "str reduce, bool rows, str backend) -> (Tensor, Tensor)"
)


def _found(
    queries: Tensor,
    *arguments: Any,
    counts: Tensor | None = None,
    proven: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    held, asked = arguments[: library.TABLE_SIZE], arguments[library.TABLE_SIZE :]
    k, query_mask, reduce, mask, exclude, sorted, _sparse_grad, recall, backend = asked
    library.check_rows("exclude", exclude, held[0].shape[0])
    with library.reading(*held) as table:
        chosen = select.choose("score_topk", queries, table, backend, counts=counts is not None)
        options = ScanOptions(query_mask, reduce, mask, exclude, recall)
        report = [] if counts is None else [counts, proven] if chosen.PROBABLE else [counts]
        try:
            return chosen.score_topk(queries, table, options, k, sorted, *report)
        except RuntimeError as error:
            library.memory_in_words(error, f"score_topk: no memory for {queries.shape[0]} users with k = {k}")
            raise


def _counted(queries: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts = torch.zeros(5, dtype=torch.int64, device=queries.device)
    proven = torch.ones(len(queries), dtype=torch.bool, device=queries.device)
    return *_found(queries, *arguments, counts=counts, proven=proven), counts, proven


def _found_fake(queries, items, *arguments):
    shape = (queries.shape[0], arguments[library.TABLE_SIZE - 1])
    scores = queries.new_empty(shape, dtype=library.compute_dtype(queries, items))
    return scores, queries.new_empty(shape, dtype=torch.int64)


def _counted_fake(queries, *arguments):
    counts = queries.new_empty(5, dtype=torch.int64)
    return *_found_fake(queries, *arguments), counts, queries.new_empty(queries.shape[0], dtype=torch.bool)


def _backward_of_rows(
    grad_scores: Tensor,
    ids: Tensor,
    queries: Tensor,
    items: Tensor,
    row_scale: Tensor | None,
    query_mask: Tensor | None,
    reduce: str,
    rows: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    table = TableView(items, None, row_scale)
    chosen = select.choose("candidate_dots", queries, table, backend)
    with default_float_mode(queries.device):
        return gradients.row_gradients(grad_scores, ids, queries, table, query_mask, reduce, rows, chosen)


def _backward_of_rows_fake(grad_scores, ids, queries, items, row_scale, query_mask, reduce, rows, backend):
    grad_rows = (*ids.shape, queries.shape[2]) if rows else (0,)
    return torch.empty_like(queries, memory_format=torch.contiguous_format), grad_scores.new_empty(grad_rows)


def _setup_context(ctx, inputs, output) -> None:
    queries, items, bias, row_scale = inputs[:4]
    _, query_mask, reduce, _, _, _, sparse_grad, _, backend = inputs[1 + library.TABLE_SIZE :]
    ctx.save_for_backward(queries, items, row_scale, query_mask, output[1])
    ctx.reduce, ctx.sparse_grad, ctx.backend = reduce, sparse_grad, backend
    ctx.bias = None if bias is None else (bias.shape[0], bias.dtype)


def _backward(ctx, grad_scores: Tensor, *_grads: None):
    grad_queries, grad_items, grad_bias = scored_rows_backward(ctx, grad_scores)
    return grad_queries, grad_items, grad_bias, *[None] * (library.TABLE_SIZE + 7)


def scored_rows_backward(ctx: Any, grad_scores: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of queries, items and bias (inputs 0, 1, 2) from those of scores [B, C] of chosen rows."""
    queries, items, row_scale, query_mask, ids = ctx.saved_tensors
    needs_queries, needs_items, needs_bias = ctx.needs_input_grad[:3]
    grad_queries = grad_items = grad_bias = None
    if needs_queries or needs_items:
        grad_queries, grad_rows = _op_backward(
            grad_scores, ids, queries, items, row_scale, query_mask, ctx.reduce, needs_items, ctx.backend
        )
        if needs_items:
            scatter = gradients.sparse_rows if ctx.sparse_grad else gradients.dense_rows
            grad_items = scatter(ids, grad_rows, items.shape[0]).to(items.dtype)
    if needs_bias:
        rows, dtype = ctx.bias
        grad_bias = gradients.dense_rows(ids, grad_scores, rows).to(dtype)
    return grad_queries, grad_items, grad_bias


def _register(name: str, implementation: Any, fake: Any, results: str) -> tuple[Any, Any]:
    """(the op with gradients, the op without)."""
    schema = f"{_ARGUMENTS} -> ({results})"
    ops = tuple(library.register(name + suffix, schema, implementation, fake) for suffix in ("", "_no_grad"))
    library.differentiable(name, _backward, _setup_context)
    return ops


_plain = _register("score_topk", _found, _found_fake, "Tensor, Tensor")
_with_counts = _register("score_topk_counted", _counted, _counted_fake, "Tensor, Tensor, Tensor, Tensor")
_op_backward = library.register("score_rows_backward", _BACKWARD_SCHEMA, _backward_of_rows, _backward_of_rows_fake)
library.differentiable("score_rows_backward", library.no_second_derivative)


def score_topk(
    queries: Tensor, items: Tensor, bias: Tensor | None, row_scale, alive, log: int, *options, counted: bool = False
):
    """The op that the call needs; arguments as in the schema. ``counted`` adds what the scan did, int64 [5], and
    whether results are certainly exact, bool [B]."""
    with_grad, no_grad = _with_counts if counted else _plain
    if not library.needs_grad(queries, items, bias):
        return no_grad(queries, items, bias, row_scale, alive, log, *options)
    with library.unchanged(log, items, bias):
        return with_grad(queries, items, bias, row_scale, alive, log, *options)
