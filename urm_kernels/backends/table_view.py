"""What a backend is given: a table's tensors with the rows that are newer than these, and a scan's options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .codes import Codes


class Overlay(NamedTuple):
    """Rows to be read from here instead of from the table, where somebody may be writing them (urm_kernels.updates).

    rows: [P] int64, ascending, all different. items: [P, r]. bias, row_scale: [P] where the table has them.
    """

    rows: Tensor
    items: Tensor
    bias: Tensor | None = None
    row_scale: Tensor | None = None


class TableView(NamedTuple):
    """items [N, r]; bias and row_scale [N]; alive: bits [ceil(N / 8)] of rows that have not been removed; codes of the
    items, of blocks without a row of the overlay."""

    items: Tensor
    bias: Tensor | None = None
    row_scale: Tensor | None = None
    alive: Tensor | None = None
    overlay: Overlay | None = None
    codes: Codes | None = None

    def dtypes(self) -> tuple[torch.dtype, ...]:
        if self.bias is None and self.row_scale is None:
            return (self.items.dtype,)
        return tuple(t.dtype for t in (self.items, self.bias, self.row_scale) if t is not None)

    def settled(self) -> TableView:
        """The same without an overlay: a copy of the table where there is one."""
        if self.overlay is None:
            return self
        rows = self.overlay.rows
        # Appended after these tensors were fetched, and changed since: not rows of this version.
        rows = rows[rows < self.items.shape[0]]

        def replaced(whole: Tensor | None, part: Tensor | None) -> Tensor | None:
            if whole is None or part is None:
                return whole
            part = part[: len(rows)]
            if whole.dtype != torch.float8_e4m3fn:
                return whole.clone().index_copy_(0, rows, part)
            as_bytes = whole.view(torch.uint8).clone().index_copy_(0, rows, part.view(torch.uint8))
            return as_bytes.view(whole.dtype)

        items, bias, row_scale = (replaced(whole, part) for whole, part in zip(self[:3], self.overlay[1:], strict=True))
        assert items is not None
        return TableView(items, bias, row_scale, self.alive)


class ScanOptions(NamedTuple):
    """How a user's dots become a score, and which rows count; arguments of urm_kernels.score_topk, checked."""

    query_mask: Tensor | None = None
    reduce: str = "max"
    mask: Tensor | None = None
    exclude: Tensor | None = None
    recall: float = 1.0  # what is below, only a backend that is PROBABLE makes use of


class Walk(NamedTuple):
    """What a walk through a graph is told; arguments of urm_kernels.explore_topk, checked.

    neighbors: int32 or int64 [N, degree], contiguous. seed: int64 scalar. streams: int64 [B], contiguous.
    """

    neighbors: Tensor
    first: int
    widths: Sequence[int]  # of the rounds after the first
    seed: Tensor
    streams: Tensor

    @property
    def rounds(self) -> int:
        return 1 + len(self.widths)


def gather_rows(source: Tensor, rows: Tensor) -> Tensor:
    """``source[rows]``, for dtypes that torch does not index as well."""
    if source.dtype == torch.float8_e4m3fn:
        return source.view(torch.uint8)[rows].view(source.dtype)
    return source[rows]


def rows_of_bits(bits: Tensor, rows: Tensor) -> Tensor:
    """bool [..., len(rows)]: the given rows' bits, lowest first."""
    return ((bits[..., rows >> 3] >> (rows & 7)) & 1).bool()


def without_bits(bits: Tensor | None, rows: Tensor, count: int) -> Tensor:
    """The bits of `count` rows, all set where there are none, less those of some rows."""
    if bits is None:
        bits = torch.full((-(-count // 8),), 0xFF, dtype=torch.uint8, device=rows.device)
    rows = rows.unique()  # so that adding bits is joining them
    gone = torch.zeros_like(bits).index_add_(0, rows >> 3, (1 << (rows & 7)).to(torch.uint8))
    return bits & ~gone


def rows_lie_apart(tensor: Tensor) -> bool:
    """Whether no element is part of two rows, or twice of one."""
    apart = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < apart:
            return False
        apart = max(apart, stride * size)
    return True


def more_bits(bits: Tensor, before: int, after: int) -> Tensor:
    """The bits of `before` rows, and set ones of the rows up to `after`."""
    more = bits.new_full((-(-after // 8),), 0xFF)
    more[: len(bits)] = bits
    if before % 8:
        more[before // 8] |= (0xFF << before % 8) & 0xFF
    return more


def without_removed(mask: Tensor | None, alive: Tensor | None, rows: int) -> Tensor | None:
    """The mask of what both allow."""
    if alive is None or mask is None:
        return alive if mask is None else mask
    if mask.dtype == torch.uint8:
        return mask & alive
    return mask & rows_of_bits(alive, torch.arange(rows, device=mask.device))
