"""explore_topk as an op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import select
from ..backends.table_view import ScanOptions, Walk
from . import library
from .topk import scored_rows_backward

_SCHEMA = (
    f"(Tensor queries, {library.TABLE}, SymInt k, Tensor? query_mask, str reduce, Tensor? mask, Tensor? exclude, "
    "Tensor neighbors, SymInt first, SymInt[] widths, Tensor temperature, Tensor seed, Tensor streams, "
    "bool sparse_grad, str backend) -> (Tensor, Tensor, Tensor)"
)


def _explore_topk(queries: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    held, asked = arguments[: library.TABLE_SIZE], arguments[library.TABLE_SIZE :]
    k, query_mask, reduce, mask, exclude, neighbors, *walked, _sparse_grad, backend = asked
    first, widths, temperature, seed, streams = walked
    library.check_rows("exclude", exclude, held[0].shape[0])
    if temperature.device.type == "cpu":
        checks.positive_normal("temperature", temperature.item(), temperature.dtype)
    with library.reading(*held) as table:
        chosen = select.choose("explore_topk", queries, table, backend)
        options = ScanOptions(query_mask, reduce, mask, exclude)
        walk = Walk(neighbors.contiguous(), first, widths, seed, streams.contiguous())
        try:
            return chosen.explore_topk(queries, table, options, walk, temperature, k)
        except RuntimeError as error:
            library.memory_in_words(error, f"explore_topk: no memory for {queries.shape[0]} users with k = {k}")
            raise


def _explore_topk_fake(queries, items, *arguments):
    k, widths = arguments[library.TABLE_SIZE - 1], arguments[library.TABLE_SIZE + 6]
    shape = (queries.shape[0], k)
    scores = queries.new_empty(shape, dtype=library.compute_dtype(queries, items))
    counts = queries.new_empty((1 + len(widths), queries.shape[0]), dtype=torch.int64)
    return scores, queries.new_empty(shape, dtype=torch.int64), counts


def _setup_context(ctx, inputs, output) -> None:
    queries, items, bias, row_scale = inputs[:4]
    _, query_mask, reduce, *_, sparse_grad, backend = inputs[1 + library.TABLE_SIZE :]
    ctx.save_for_backward(queries, items, row_scale, query_mask, output[1])
    ctx.reduce, ctx.sparse_grad, ctx.backend = reduce, sparse_grad, backend
    ctx.bias = None if bias is None else (bias.shape[0], bias.dtype)


def _backward(ctx, grad_scores: Tensor, *_grads: None):
    grad_queries, grad_items, grad_bias = scored_rows_backward(ctx, grad_scores)
    return grad_queries, grad_items, grad_bias, *[None] * (library.TABLE_SIZE + 11)


_with_grad = library.register("explore_topk", _SCHEMA, _explore_topk, _explore_topk_fake)
_no_grad = library.register("explore_topk_no_grad", _SCHEMA, _explore_topk, _explore_topk_fake)
library.differentiable("explore_topk", _backward, _setup_context)


def explore_topk(queries: Tensor, items: Tensor, bias: Tensor | None, row_scale, alive, log: int, *options):
    """The op that the call needs; arguments as in the schema."""
    if not library.needs_grad(queries, items, bias):
        return _no_grad(queries, items, bias, row_scale, alive, log, *options)
    with library.unchanged(log, items, bias):
        return _with_grad(queries, items, bias, row_scale, alive, log, *options)
