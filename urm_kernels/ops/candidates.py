"""score_candidates as an op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import select
from ..backends.table_view import rows_of_bits
from . import library
from .topk import scored_rows_backward

_SCHEMA = (
    f"(Tensor queries, {library.TABLE}, Tensor candidates, Tensor? query_mask, str reduce, bool sparse_grad, "
    "str backend) -> Tensor"
)


def _score_candidates(queries: Tensor, *arguments: Any) -> Tensor:
    held, asked = arguments[: library.TABLE_SIZE], arguments[library.TABLE_SIZE :]
    candidates, query_mask, reduce, _sparse_grad, backend = asked
    library.check_rows("candidates", candidates, held[0].shape[0])
    with library.reading(*held) as table:
        chosen = select.choose("score_candidates", queries, table, backend)
        try:
            return chosen.score_candidates(queries, table, candidates, query_mask, reduce)
        except RuntimeError as error:
            scores = f"{queries.shape[0]} x {candidates.shape[-1]} scores"
            library.memory_in_words(error, f"score_candidates: no memory for {scores}")
            raise


def _score_candidates_fake(queries, items, *arguments):
    shape = (queries.shape[0], arguments[library.TABLE_SIZE - 1].shape[-1])
    return queries.new_empty(shape, dtype=library.compute_dtype(queries, items))


def _setup_context(ctx, inputs, output) -> None:
    queries, items, bias, row_scale, alive = inputs[:5]
    candidates, query_mask, reduce, sparse_grad, backend = inputs[1 + library.TABLE_SIZE :]
    # What scores -inf or NaN whatever rows and bias hold has no gradient.
    ids = candidates.expand(queries.shape[0], -1)
    ids = ids.where((ids >= 0) & (ids < items.shape[0]), -1)
    if alive is not None and items.shape[0]:
        ids = ids.where(rows_of_bits(alive, ids.clamp(min=0)), -1)
    if query_mask is not None or queries.shape[1] == 0:
        exists = queries.new_zeros(queries.shape[0], dtype=torch.bool) if query_mask is None else query_mask.any(1)
        ids = ids.where(exists[:, None], -1)
    ctx.save_for_backward(queries, items, row_scale, query_mask, ids)
    ctx.reduce, ctx.sparse_grad, ctx.backend = reduce, sparse_grad, backend
    ctx.bias = None if bias is None else (bias.shape[0], bias.dtype)


def _backward(ctx, grad_scores: Tensor):
    grad_queries, grad_items, grad_bias = scored_rows_backward(ctx, grad_scores)
    return grad_queries, grad_items, grad_bias, *[None] * (library.TABLE_SIZE + 3)


_with_grad = library.register("score_candidates", _SCHEMA, _score_candidates, _score_candidates_fake)
_no_grad = library.register("score_candidates_no_grad", _SCHEMA, _score_candidates, _score_candidates_fake)
library.differentiable("score_candidates", _backward, _setup_context)


def score_candidates(queries: Tensor, items: Tensor, bias: Tensor | None, row_scale, alive, log: int, *options):
    """The op that the call needs; arguments as in the schema."""
    if not library.needs_grad(queries, items, bias):
        return _no_grad(queries, items, bias, row_scale, alive, log, *options)
    with library.unchanged(log, items, bias):
        return _with_grad(queries, items, bias, row_scale, alive, log, *options)
