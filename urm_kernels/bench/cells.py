"""What is measured: one call's sizes and kinds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from .. import testing
from ..scoring import Reduce

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REDUCTIONS: tuple[Reduce, ...] = get_args(Reduce)


class Cell(NamedTuple):
    dtype: str
    r: int
    B: int
    M: int
    k: int
    N: int = 1_000_000
    reduce: Reduce = "max"
    data: str = "decay"

    def __str__(self) -> str:
        """Without N, which stands beside it, and without what is as usual."""
        text = f"{self.dtype} r={self.r} B={self.B} M={self.M} k={self.k}"
        unusual = [value for value, usual in ((self.reduce, "max"), (self.data, "decay")) if value != usual]
        return " ".join([text, *unusual])

    @property
    def name(self) -> str:
        return f"N={short(self.N)} {self}"


def short(count: int) -> str:
    """1e6, 3.5e5, but 1234567 and 300 as they are."""
    mantissa, _, power = f"{count:e}".partition("e+")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(power)}" if count >= 10_000 and len(mantissa) <= 3 else str(count)


def product(
    rows: Iterable[int],
    ranks: Iterable[int],
    shapes: Iterable[tuple[int, int]],
    ks: Iterable[int],
    dtypes: Iterable[str],
    reduce: Reduce = "max",
    data: str = "decay",
) -> list[Cell]:
    """All of them, those of one table together, small tables first; a k above N is left out."""
    return [
        Cell(dtype, r, *shape, k, count, reduce, data)
        for count, r, dtype, shape, k in itertools.product(sorted(rows), ranks, dtypes, shapes, sorted(ks))
        if k <= count
    ]


def table_bytes(cell: Cell) -> int:
    """The most that making the cell's table takes: it is made in float32."""
    return cell.N * cell.r * (4 if cell.dtype == "fp32" else 4 + DTYPES[cell.dtype].itemsize)


def make_table(cell: Cell) -> Tensor:
    return testing.make_items(cell.data, cell.N, cell.r, seed=0).to(DTYPES[cell.dtype])


def make_queries(cell: Cell, items: Tensor) -> Tensor:
    return testing.make_queries(cell.data, cell.B, cell.M, cell.r, seed=1, items=items)
