"""What the kernels take: some users at a time, the table, what may be returned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..table_view import ScanOptions, TableView, without_removed
from . import queries as query_kernels
from .plan import padded

EXACT = {"enable_fp_fusion": False}  # of every kernel that computes canonical scores
FUSED = {"enable_fp_fusion": True}  # of every other one; Triton's own default changes between versions
MOST_REGISTERS = {"maxnreg": 248}  # said aloud, or the assembler spills for the sake of an occupancy that is no use


class Call(NamedTuple):
    """One group of users, as the kernels take it. queries fp32 [B, M, r] and exists [B, M] are contiguous."""

    queries: Tensor
    exists: Tensor | None
    items: Tensor
    row_scale: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    exclude: Tensor | None  # ascending, contiguous
    log_sum_exp: bool

    @property
    def table(self) -> tuple[Any, ...]:
        """Arguments of every kernel that reads rows: items, row_scale and strides."""
        scale_stride = 0 if self.row_scale is None else self.row_scale.stride(0)
        return (self.items, *self.items.stride(), self.row_scale, scale_stride)

    @property
    def scored(self) -> tuple[Any, ...]:
        """Arguments of every kernel that computes canonical scores: queries, exists, the table, bias and its stride."""
        bias_stride = 0 if self.bias is None else self.bias.stride(0)
        return (self.queries, self.exists, *self.table, self.bias, bias_stride)

    @property
    def masked(self) -> tuple[Any, ...]:
        mask = self.mask
        if mask is None:
            return (None, 0, 0)
        return (mask, mask.stride(0) if mask.dim() == 2 else 0, mask.stride(-1))

    @property
    def excluded(self) -> tuple[Any, ...]:
        return (None, 0) if self.exclude is None else (self.exclude, self.exclude.shape[1])

    @property
    def canonical_tile(self) -> dict[str, Any]:
        """Rows and queries of a block of canonical dots of one user: 2048 running sums a program."""
        d = min(padded(self.queries.shape[1]), 8)
        return {"C": 128 // d, "D": d, "LOG_SUM_EXP": self.log_sum_exp, **EXACT}

    @property
    def bits(self) -> bool:
        return self.mask is not None and self.mask.dtype == torch.uint8


def calls(queries: Tensor, table: TableView, options: ScanOptions, group: int) -> Iterator[tuple[slice, Call]]:
    """Some users at a time: which, and what the kernels take. Removed rows are masked."""
    mask, exclude = without_removed(options.mask, table.alive, table.items.shape[0]), options.exclude
    if exclude is not None:
        exclude = exclude.sort(dim=1).values.contiguous() if exclude.shape[1] else None
    for part, call in calls_of_users(queries, table, options.query_mask, options.reduce, group):
        own = mask if mask is None or mask.dim() == 1 else mask[part]
        yield part, call._replace(mask=own, exclude=None if exclude is None else exclude[part])


def calls_of_users(
    queries: Tensor, table: TableView, query_mask: Tensor | None, reduce: str, group: int
) -> Iterator[tuple[slice, Call]]:
    """The same without what restricts the rows."""
    for first in range(0, queries.shape[0], group):
        part = slice(first, first + group)
        asked, exists = queries[part].contiguous(), None if query_mask is None else query_mask[part].contiguous()
        if reduce in ("sum", "mean"):
            asked, exists = _combine(asked, exists, reduce)
        # Of one query it is the dot itself, in the same bits.
        log_sum_exp = reduce == "logsumexp" and asked.shape[1] > 1
        yield part, Call(asked, exists, table.items, table.row_scale, table.bias, None, None, log_sum_exp)


def _combine(queries: Tensor, exists: Tensor | None, reduce: str) -> tuple[Tensor, Tensor]:
    """sum and mean are linear: one query a user."""
    users, count, r = queries.shape
    total = queries.new_empty((users, 1, r))
    any_exists = torch.empty((users, 1), dtype=torch.bool, device=queries.device)
    query_kernels.combine_queries[(users,)](
        queries, exists, total, any_exists, count, r, R=padded(r), MEAN=reduce == "mean", **EXACT
    )
    return total, any_exists
