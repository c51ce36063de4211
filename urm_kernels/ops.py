"""torch.library ops: schema, fake and autograd side by side; the work is done by a backend.

Registered with ``Library.define`` and ``impl``, which cost a call less than ``custom_op``. An autograd formula written
in Python costs every call a second crossing of the dispatcher, about as much as a small scan itself; calls that need
no gradient therefore go to an op without one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gradients
from .backends import select
from .float_mode import default_float_mode

_library = torch.library.Library("urm_kernels", "DEF")

_TOPK = (
    "(Tensor queries, Tensor items, SymInt k, Tensor? query_mask, str reduce, Tensor? bias, Tensor? mask, "
    "Tensor? exclude, bool sorted, bool sparse_grad, str backend) -> (Tensor, Tensor)"
)
_library.define("score_topk" + _TOPK)
_library.define("score_topk_no_grad" + _TOPK)
_library.define(
    "score_topk_backward(Tensor grad_scores, Tensor ids, Tensor queries, Tensor items, Tensor? query_mask, str reduce, "
    "bool rows, str backend) -> (Tensor, Tensor)"
)


def _score_topk(
    queries: Tensor,
    items: Tensor,
    k: int,
    query_mask: Tensor | None,
    reduce: str,
    bias: Tensor | None,
    mask: Tensor | None,
    exclude: Tensor | None,
    sorted: bool,
    sparse_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = select.choose(queries, items, bias, backend)
    if exclude is not None:
        _check_exclude(exclude, items.shape[0])
    try:
        return chosen.score_topk(queries, items, k, query_mask, reduce, bias, mask, exclude, sorted)
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise MemoryError(f"score_topk: no memory for {queries.shape[0]} users with k = {k}: {error}") from error


# torch's CPU allocator has no exception of its own.
_NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")


def _check_exclude(exclude: Tensor, rows: int) -> None:
    # On another device than the CPU the values are not looked at: that would wait for it. There, rows that do not exist
    # exclude nothing.
    if exclude.numel() == 0 or exclude.device.type != "cpu":
        return
    low, high = (int(bound) for bound in exclude.aminmax())
    if low < -1 or high >= rows:
        bad = low if low < -1 else high
        raise ValueError(f"exclude: row indices from 0 to {rows - 1}, or -1 for a pad, are wanted, {bad} came")


def _score_topk_fake(queries, items, k, query_mask, reduce, bias, mask, exclude, sorted, sparse_grad, backend):
    dtype = torch.float64 if torch.float64 in (queries.dtype, items.dtype) else torch.float32
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=dtype), queries.new_empty(shape, dtype=torch.int64)


def _score_topk_backward(
    grad_scores: Tensor,
    ids: Tensor,
    queries: Tensor,
    items: Tensor,
    query_mask: Tensor | None,
    reduce: str,
    rows: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = select.choose(queries, items, None, backend)
    with default_float_mode(queries.device):
        return gradients.topk_gradients(
            grad_scores, ids, queries, items, query_mask, reduce, rows, chosen.candidate_dots
        )


def _score_topk_backward_fake(grad_scores, ids, queries, items, query_mask, reduce, rows, backend):
    grad_rows = (*ids.shape, queries.shape[2]) if rows else (0,)
    return torch.empty_like(queries, memory_format=torch.contiguous_format), grad_scores.new_empty(grad_rows)


def _setup_context(ctx, inputs, output) -> None:
    queries, items, _, query_mask, reduce, bias, _, _, _, sparse_grad, backend = inputs
    ctx.save_for_backward(queries, items, query_mask, output[1])
    ctx.reduce, ctx.sparse_grad, ctx.backend = reduce, sparse_grad, backend
    ctx.bias = None if bias is None else (bias.shape[0], bias.dtype)


def _backward(ctx, grad_scores: Tensor, _grad_ids: None):
    queries, items, query_mask, ids = ctx.saved_tensors
    needs_queries, needs_items, needs_bias = (ctx.needs_input_grad[i] for i in (0, 1, 5))
    grad_queries = grad_items = grad_bias = None
    if needs_queries or needs_items:
        grad_queries, grad_rows = torch.ops.urm_kernels.score_topk_backward(
            grad_scores, ids, queries, items, query_mask, ctx.reduce, needs_items, ctx.backend
        )
        if needs_items:
            scatter = gradients.sparse_rows if ctx.sparse_grad else gradients.dense_rows
            grad_items = scatter(ids, grad_rows, items.shape[0]).to(items.dtype)
    if needs_bias:
        rows, dtype = ctx.bias
        grad_bias = gradients.dense_rows(ids, grad_scores, rows).to(dtype)
    return grad_queries, grad_items, None, None, None, grad_bias, None, None, None, None, None


def _no_second_derivative(ctx, *_grads):
    raise RuntimeError("score_topk: second derivatives are not available; detach the gradient, or score in plain torch")


for _name, _implementation, _fake in (
    ("score_topk", _score_topk, _score_topk_fake),
    ("score_topk_no_grad", _score_topk, _score_topk_fake),
    ("score_topk_backward", _score_topk_backward, _score_topk_backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"urm_kernels::{_name}", _fake, lib=_library)
torch.library.register_autograd("urm_kernels::score_topk", _backward, setup_context=_setup_context, lib=_library)

torch.library.register_autograd("urm_kernels::score_topk_backward", _no_second_derivative, lib=_library)

_with_grad = torch.ops.urm_kernels.score_topk.default
_no_grad = torch.ops.urm_kernels.score_topk_no_grad.default


def score_topk(queries: Tensor, items: Tensor, k: int, query_mask, reduce: str, bias: Tensor | None, *rest):
    """The op that the call needs; arguments as in the schema."""
    if torch.is_grad_enabled() and (
        queries.requires_grad or items.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _with_grad(queries, items, k, query_mask, reduce, bias, *rest)
    return _no_grad(queries, items, k, query_mask, reduce, bias, *rest)
