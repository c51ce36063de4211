"""log_partition as an op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, gradients
from ..backends import select
from ..backends.table_view import ScanOptions, TableView
from ..float_mode import default_float_mode
from . import library

_OPTIONS = "Tensor? query_mask, str reduce, Tensor? mask, Tensor? exclude, Tensor temperature, str backend"
_SCHEMA = f"(Tensor queries, {library.TABLE}, {_OPTIONS}) -> Tensor"
_BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor logarithms, Tensor queries, Tensor items, Tensor? bias, Tensor? row_scale, Tensor? alive, "
    f"{_OPTIONS}, bool needs_items, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _log_partition(queries: Tensor, *arguments: Any) -> Tensor:
    held, asked = arguments[: library.TABLE_SIZE], arguments[library.TABLE_SIZE :]
    query_mask, reduce, mask, exclude, temperature, backend = asked
    library.check_rows("exclude", exclude, held[0].shape[0])
    if temperature.device.type == "cpu":
        checks.positive_normal("temperature", temperature.item(), temperature.dtype)
    with library.reading(*held) as table:
        chosen = select.choose("log_partition", queries, table, backend)
        try:
            return chosen.log_partition(queries, table, ScanOptions(query_mask, reduce, mask, exclude), temperature)
        except RuntimeError as error:
            library.memory_in_words(error, f"log_partition: no memory for {queries.shape[0]} users")
            raise


def _log_partition_fake(queries, items, *_options):
    return queries.new_empty((queries.shape[0],), dtype=library.compute_dtype(queries, items))


def _log_partition_backward(
    grad: Tensor,
    logarithms: Tensor,
    queries: Tensor,
    items: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    alive: Tensor | None,
    query_mask: Tensor | None,
    reduce: str,
    mask: Tensor | None,
    exclude: Tensor | None,
    temperature: Tensor,
    backend: str,
    needs_items: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    table = TableView(items, bias, row_scale, alive)
    scan = (queries, table, ScanOptions(query_mask, reduce, mask, exclude), temperature)
    chosen = select.choose("log_partition", queries, table, backend)
    if hasattr(chosen, "log_partition_backward"):
        return chosen.log_partition_backward(grad, logarithms, *scan, needs_items, needs_bias)
    with default_float_mode(queries.device):
        return gradients.partition_gradients(grad, logarithms, *scan, chosen, needs_items, needs_bias)


def _log_partition_backward_fake(grad, logarithms, queries, items, *rest):
    needs_items, needs_bias = rest[-2:]
    return (
        torch.empty_like(queries, memory_format=torch.contiguous_format),
        grad.new_empty(items.shape if needs_items else (0,)),
        grad.new_empty((items.shape[0],) if needs_bias else (0,)),
        grad.new_empty(()),
    )


def _setup_context(ctx, inputs, output) -> None:
    queries, items, bias, row_scale, alive = inputs[:5]
    query_mask, reduce, mask, exclude, temperature, backend = inputs[1 + library.TABLE_SIZE :]
    ctx.save_for_backward(output, queries, items, bias, row_scale, alive, query_mask, mask, exclude, temperature)
    ctx.reduce, ctx.backend = reduce, backend


def _backward(ctx, grad: Tensor):
    logarithms, queries, items, bias, row_scale, alive, query_mask, mask, exclude, temperature = ctx.saved_tensors
    needs_items, needs_bias = ctx.needs_input_grad[1:3]
    grad_queries, grad_items, grad_bias, grad_temperature = _op_backward(
        grad,
        logarithms,
        queries,
        items,
        bias,
        row_scale,
        alive,
        query_mask,
        ctx.reduce,
        mask,
        exclude,
        temperature,
        ctx.backend,
        needs_items,
        needs_bias,
    )
    return (
        grad_queries if ctx.needs_input_grad[0] else None,
        grad_items.to(items.dtype) if needs_items else None,
        grad_bias.to(bias.dtype) if needs_bias else None,
        *[None] * (library.TABLE_SIZE + 2),
        grad_temperature.to(temperature.dtype) if ctx.needs_input_grad[-2] else None,
        None,
    )


_with_grad = library.register("log_partition", _SCHEMA, _log_partition, _log_partition_fake)
_no_grad = library.register("log_partition_no_grad", _SCHEMA, _log_partition, _log_partition_fake)
_op_backward = library.register(
    "log_partition_backward", _BACKWARD_SCHEMA, _log_partition_backward, _log_partition_backward_fake
)
library.differentiable("log_partition", _backward, _setup_context)
library.differentiable("log_partition_backward", library.no_second_derivative)


def log_partition(queries: Tensor, items: Tensor, bias: Tensor | None, row_scale, alive, log: int, *options):
    """The op that the call needs; arguments as in the schema."""
    if not library.needs_grad(queries, items, bias, options[-2]):
        return _no_grad(queries, items, bias, row_scale, alive, log, *options)
    with library.unchanged(log, items, bias):
        return _with_grad(queries, items, bias, row_scale, alive, log, *options)
