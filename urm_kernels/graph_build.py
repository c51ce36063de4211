"""How the neighbours of a :class:`urm_kernels.NeighborGraph` are found, or read from an index of hnswlib."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks
from .progress import progress_of
from .scoring import score_topk
from .table import ItemTable

METRICS = ("cosine", "euclidean", "inner")
_ROWS_AT_ONCE = 512  # queries that a scan serves in one go
_FEW = 1 << 12  # rows of a level that codes would not help to search


def build(
    items: Tensor,
    degree: int,
    metric: str,
    levels: int,
    thinning: int,
    seed: int,
    progress: Callable[[int, int], object] | None,
) -> Tensor:
    """int32 (int64 beyond 2**31 rows) [N, degree]; see :meth:`urm_kernels.NeighborGraph.build`."""
    checks.floats("items", items)
    if items.dim() != 2:
        raise ValueError(f"items: shape [N, r] is wanted, {list(items.shape)} came")
    checks.number_of_rows("items", items.shape[0])
    degree, seed = checks.count("degree", degree), checks.count("seed", seed)
    levels, thinning = checks.count("levels", levels), checks.count("thinning", thinning)
    if metric not in METRICS:
        raise ValueError(f"metric: one of {', '.join(METRICS)} is wanted, {metric!r} came")
    if not 1 <= levels <= max(degree, 1):
        raise ValueError(f"levels: from 1 to the degree, {degree}, is wanted, {levels} came")
    if thinning < 2:
        raise ValueError(f"thinning: at least 2 is wanted, {thinning} came")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: a function of two integers or None is wanted, {progress!r} came")
    with torch.no_grad():
        return _search(items.detach(), degree, metric, levels, thinning, seed, progress)


def _search(items: Tensor, degree: int, metric: str, levels: int, thinning: int, seed: int, progress: Any) -> Tensor:
    rows = items.shape[0]
    table, bias = _compared(items, metric)
    found = torch.full((rows, degree), -1, dtype=torch.int32 if rows < 2**31 else torch.int64, device=items.device)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).to(items.device)
    widths = shares(degree, levels)
    with progress_of("graph", rows * levels, progress) as bar:
        start = 0
        for level in range(levels):
            width = widths[level]
            members = order[: max(1, rows // thinning**level)].sort().values if rows else order
            columns = slice(start, start + width)
            _nearest(table, bias, members, found, columns, bar.more)
            start += width
    return found


def shares(degree: int, levels: int) -> list[int]:
    """How many neighbours come from each level: three quarters from the first, three quarters of the rest from the
    next, what remains from the last; one at least."""
    found = []
    for level in range(levels - 1, 0, -1):
        found.append(max(1, min(3 * degree // 4, degree - level)))
        degree -= found[-1]
    return [*found, degree]


def _compared(items: Tensor, metric: str) -> tuple[Tensor, Tensor | None]:
    """(rows, bias): what is nearest to a row scores highest with it."""
    if metric == "cosine":
        # In float32, where the shortest rows have a length as well.
        return torch.nn.functional.normalize(items.float(), eps=torch.finfo(torch.float32).tiny), None
    return items, items.float().square().sum(1) * -0.5 if metric == "euclidean" else None


def _nearest(
    table: Tensor,
    bias: Tensor | None,
    members: Tensor,
    found: Tensor,
    columns: slice,
    step: Callable[[int], object],
) -> None:
    """Writes the members nearest to each row, other than itself and those found already, into the columns."""
    rows, width = table.shape[0], columns.stop - columns.start
    place = torch.full((rows + 1,), -1, device=table.device)  # of a row among the members; -1 of none
    place[members] = torch.arange(len(members), device=table.device)
    searched = ItemTable(table[members], bias=None if bias is None else bias[members])
    if len(members) >= _FEW and table.dtype != torch.float64 and table.shape[1]:
        searched.pack(("int8",), progress=_silent)
    for first in range(0, rows, _ROWS_AT_ONCE):
        part = slice(first, min(first + _ROWS_AT_ONCE, rows))
        itself = torch.arange(part.start, part.stop, device=table.device)
        known = torch.cat([itself[:, None], found[part, : columns.start].long()], 1)
        nearest = score_topk(table[part], searched, width, exclude=place[known]).ids
        found[part, columns] = members[nearest.clamp(min=0)].where(nearest >= 0, -1).to(found.dtype)
        step(part.stop - part.start)


def _silent(_done: int, _rows: int) -> None:
    """The progress of packing, which is part of another's."""


def hnswlib_links(state: dict[str, Any]) -> Tensor:
    """int32 [N, degree] from the pickled state of an index: level 0 is one run of bytes, for each element the number of
    its links, the links, the vector and the label."""
    count, size = int(state["cur_element_count"]), int(state["size_data_per_element"])
    data = torch.from_numpy(state["data_level0"].view("uint8").reshape(-1)[: count * size].copy()).view(count, size)

    def words(first: int, width: int, dtype: torch.dtype) -> Tensor:
        return data[:, first : first + width].contiguous().view(dtype)

    degree = (int(state["offset_data"]) - int(state["offset_level0"])) // 4 - 1
    labels = words(int(state["label_offset"]), 8, torch.int64)[:, 0]
    if not torch.equal(labels.sort().values, torch.arange(count)):
        raise ValueError(f"index: labels 0 to {count - 1}, the rows, are wanted, others came")
    used = words(0, 4, torch.int32) & 0xFFFF  # the other half marks deleted elements
    links = words(4, 4 * degree, torch.int32).long()
    links = torch.where(torch.arange(degree) < used, labels[links.clamp(0, max(count - 1, 0))], -1)
    return torch.empty(count, degree, dtype=torch.int32).index_copy_(0, labels, links.int())
