"""Latency cells of the GPU acceptance run: which there are, how one is checked, timed and compared.

Figures are medians over CUDA events around one call, host and launches included ("ms") or replayed from a CUDA graph
("graph_ms"), on tables larger than the card's cache. A result is checked against float64 before it is timed; ceilings
are measured in the same process.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gpu_peers
import torch
from torch import Tensor

SHAPES = ((1, 1), (1, 8), (1, 128), (8, 16), (64, 1), (1024, 1))
ALL_ROWS, ALL_R, ALL_K = (1_000_000, 10_000_000, 50_000_000), (64, 128), (10, 1000, 4096)
CACHE = 1 << 29  # bytes of tables that calls take in turns: several times a card's second-level cache
_HELD = 1 << 31  # bytes of scores a peer holds at a time
_PRODUCT = 8192  # rows and columns of the products that measure the card


class Cell(NamedTuple):
    """Items of kind decay, reduce max. compiled: torch.compile of the torch line is a peer, too. float8: with a scale a
    row; else bfloat16."""

    N: int
    r: int
    B: int
    M: int
    k: int
    compiled: bool = False
    float8: bool = False

    @property
    def name(self) -> str:
        sizes = f"N={self.N:.0e} r={self.r} B={self.B} M={self.M} k={self.k}".replace("e+0", "e")
        return "float8 " * self.float8 + sizes

    @property
    def table(self) -> tuple[int, int, bool]:
        return self.N, self.r, self.float8


class Table(NamedTuple):
    """items [N, r]; scale [N] of the rows, or None."""

    items: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self if part is not None)

    def served(self) -> Any:
        """As a caller passes it."""
        import urm_kernels

        return self.items if self.scale is None else urm_kernels.ItemTable(self.items, row_scale=self.scale)

    def split(self, rows: int) -> Iterator[Table]:
        for first in range(0, len(self.items), rows):
            part = slice(first, first + rows)
            yield Table(self.items[part], None if self.scale is None else self.scale[part])

    def of(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Chosen rows, times their scales."""
        if self.scale is None:
            return self.items[rows].to(dtype)
        as_bytes = self.items.view(torch.uint8)[rows]  # torch indexes no float8
        return as_bytes.view(self.items.dtype).to(dtype) * self.scale[rows].to(dtype)[:, None]

    def wide(self, dtype: torch.dtype) -> Tensor:
        """All rows, times their scales."""
        wide = self.items.to(dtype)
        return wide if self.scale is None else wide * self.scale.to(dtype)[:, None]


def named_cells() -> list[Cell]:
    """The forty-odd cells of a plain run."""
    big, middle, small = ALL_ROWS[2], ALL_ROWS[1], ALL_ROWS[0]
    cells = [Cell(big, 128, *shape, k) for shape in SHAPES for k in ALL_K]
    cells += [Cell(big, 64, *shape, 1000) for shape in SHAPES]
    cells += [Cell(middle, 128, *shape, 1000, shape in ((1, 8), (64, 1))) for shape in SHAPES]
    cells += [Cell(small, 128, *shape, k) for shape in SHAPES for k in (10, 1000)]
    cells += [Cell(big, 128, *shape, 1000, float8=True) for shape in ((1, 8), (1, 128), (64, 1))]
    return cells


def all_cells() -> list[Cell]:
    """The full product, N outermost so that a table serves all of its cells."""
    return [Cell(N, r, *shape, k) for N, r, shape, k in itertools.product(ALL_ROWS, ALL_R, SHAPES, ALL_K)]


def decay(rows: int, r: int, seed: int, spread: float, dtype: torch.dtype, device: str) -> Tensor:
    """testing.make_items' kind decay (spread 0.4) or its queries (0), drawn on the device, a part at a time."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = torch.arange(1, r + 1, device=device) ** -0.5
    out = torch.empty(rows, r, dtype=dtype, device=device)
    for part in out.split(1 << 21):
        drawn = torch.randn(part.shape, device=device, generator=generator) * shape
        part.copy_(drawn * torch.exp(spread * torch.randn(len(part), 1, device=device, generator=generator)))
    return out


def queries_of(cell: Any) -> Tensor:
    """[B, M, r] of a cell."""
    return decay(cell.B * cell.M, cell.r, 1, 0.0, torch.float32, "cuda").view(cell.B, cell.M, cell.r)


def in_float8(items: Tensor) -> Table:
    """Each row's largest element becomes 448, the largest of float8 e4m3."""
    table = Table(torch.empty(items.shape, dtype=torch.float8_e4m3fn, device=items.device), items.new_empty(len(items)))
    assert table.scale is not None
    for rows, part in zip(items.split(1 << 21), table.split(1 << 21), strict=True):
        part.scale.copy_(rows.abs().amax(1) / 448)
        part.items.copy_(rows.float() / part.scale.float()[:, None])
    return table


def check(queries: Tensor, table: Table, k: int, scores: Tensor, ids: Tensor) -> None:
    """Raises AssertionError unless ids are the k best rows by float64, up to rounding, best first, each once.

    Rows are scored in parts; a user's result is right when it holds every row that is better than its last score by
    more than rounding, and its scores are the rows' own.
    """
    users, count, r = queries.shape
    wide = queries.double()
    lengths = wide.norm(dim=2).amax(1)
    longest = max(float(part.wide(torch.float64).norm(dim=1).amax()) for part in table.split(1 << 20))
    tolerance = (lengths * longest * (r / 16 + 4) * 2**-24)[:, None]
    assert scores.shape == ids.shape == (users, k)
    assert (ids >= 0).all() and (ids < len(table.items)).all(), "rows that do not exist"
    assert (ids.sort(1).values.diff(dim=1) != 0).all(), "a row returned twice"
    assert (scores.diff(dim=1) <= 0).all(), "scores do not descend"
    last = scores[:, -1:].double()
    better = torch.zeros(users, dtype=torch.int64, device=ids.device)
    step = max(1, (1 << 26) // max(users * count, r))
    for part in table.split(step):
        exact = (wide.view(-1, r) @ part.wide(torch.float64).T).view(users, count, -1).amax(1)
        better += (exact > last + 2 * tolerance).sum(1)
    own = torch.stack([(wide[b] @ table.of(ids[b], torch.float64).T).amax(0) for b in range(users)])
    wrong = (own - scores).abs() > tolerance
    assert not wrong.any(), f"{int(wrong.sum())} scores are not their rows'"
    missing = better - (own > last + 2 * tolerance).sum(1)
    assert (missing == 0).all(), f"better rows are missing: {missing.tolist()[:8]}"


def milliseconds(call: Callable[[int], Any], most: float = 400.0) -> float:
    """Median time of call(0), call(1), ...: at least three, at most twenty calls or `most` milliseconds."""
    call(0)
    taken: list[float] = []
    while len(taken) < 3 or (len(taken) < 20 and sum(taken) < most):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call(len(taken))
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop))
    return statistics.median(taken)


def replayed_milliseconds(call: Callable[[int], Any], graphs: int = 1) -> float:
    """The same of CUDA graphs that hold call(0), call(1), ..., replayed in turns."""
    held = []
    for turn in range(graphs):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(turn)
        held.append(graph)
    return milliseconds(lambda turn: held[turn % graphs].replay())


def with_extra_bytes(call: Callable[[], Any]) -> tuple[Any, int]:
    """(what the call returns, bytes of the device's memory that it needs beside what is there, its result included)."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def host_milliseconds(call: Callable[[int], Any]) -> float:
    """Median time until call(0), call(1), ... return, their work on the device not awaited."""
    taken = []
    for turn in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call(turn)
        taken.append(1e3 * (time.perf_counter() - began))
    torch.cuda.synchronize()
    return statistics.median(taken)


def byte_products() -> dict[str, float]:
    """TOP/s of unsigned with signed bytes by mma.sync, from registers alone, where the extension is there. torch's int8
    products, by instructions that scans of codes cannot use, are faster on Hopper."""
    try:
        measured = importlib.import_module("urm_kernels._cuda").byte_products
        # The first is slower, since the kernel is loaded with it.
        rates = [measured(1 << 15, torch.cuda.current_stream().cuda_stream) for _ in range(5)]
    except (ImportError, AttributeError, RuntimeError):  # RuntimeError: built for other cards
        return {}
    return {"s8_mma_top_per_s": statistics.median(rates) / 1e12}


def ceilings() -> dict[str, float]:
    """GB/s of a copy, read and written; TFLOP/s (TOP/s) of torch's bfloat16, int8 and float32 products; those of bytes
    by mma.sync."""
    source = torch.randint(1 << 30, (1 << 28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    out = {"copy_gb_per_s": 2 * source.nbytes / milliseconds(lambda _: target.copy_(source)) / 1e6}
    a = torch.randn(_PRODUCT, _PRODUCT, device="cuda")
    for name, operand, product in (
        ("bf16_tflop_per_s", a.bfloat16(), torch.mm),
        ("fp32_tflop_per_s", a[: _PRODUCT // 4, : _PRODUCT // 4].contiguous(), torch.mm),
        ("int8_top_per_s", (a * 40).clamp(-127, 127).to(torch.int8), lambda x, y: torch._int_mm(x, y.T)),
    ):
        out[name] = 2 * len(operand) ** 3 / milliseconds(lambda _, p=product, x=operand: p(x, x)) / 1e9
    return {name: round(value, 1) for name, value in (out | byte_products()).items()}


def attempted(
    cell: Any, limits: dict[str, float], measured: Callable[[], dict[str, Any]]
) -> tuple[Any, dict[str, Any]]:
    """(cell, figures, or the error in words)."""
    try:
        figures = {"status": "ok", **measured()}
    except (AssertionError, RuntimeError, ValueError) as error:
        figures = {"status": f"failed: {type(error).__name__}: {str(error)[:300]}"}
    return cell, {**figures, "ceilings": limits}


def _merged(parts: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0]
    scores, ids = (torch.cat(column, 1) for column in zip(*parts, strict=True))
    best = scores.topk(k, dim=1)
    return best.values, ids.gather(1, best.indices)


def by_torch(queries: Tensor, table: Table, k: int) -> tuple[Tensor, Tensor]:
    """The torch line in bfloat16, in parts of rows that fit: not exact, and what people write."""
    users, count, r = queries.shape
    flat = queries.view(-1, r).bfloat16()
    step = max(k, min(len(table.items), _HELD // (2 * len(flat))))
    parts, first = [], 0
    for part in table.split(step):
        rows = part.wide(torch.bfloat16)
        best = (flat @ rows.T).view(users, count, -1).amax(1).topk(min(k, len(rows)), dim=1)
        parts.append((best.values, best.indices + first))
        first += len(rows)
    return _merged(parts, k)


@functools.cache
def _compiled() -> Callable[..., Any]:
    def line(flat: Tensor, items: Tensor, users: int, count: int, k: int) -> tuple[Tensor, Tensor]:
        return (flat @ items.T).view(users, count, -1).amax(1).topk(k, dim=1)

    return torch.compile(line, dynamic=False)


def by_compiled_torch(queries: Tensor, table: Table, k: int) -> tuple[Tensor, Tensor]:
    users, count, r = queries.shape
    return _compiled()(queries.view(-1, r).to(table.items.dtype), table.items, users, count, k)


def half_fused(queries: Tensor, table: Table, k: int) -> tuple[Tensor, Tensor]:
    """Maximum over a user's queries in the product's epilogue, scores written, then topk: our scan kernel with every
    row in a group of its own, so that the difference is what a threshold is worth."""
    from urm_kernels.backends import triton as backend
    from urm_kernels.backends.triton import search
    from urm_kernels.backends.triton.call import Call

    users = len(queries)
    call = Call(queries, None, *table, None, None, None, False)
    prepared = search.prepare(call, k)
    parts, first = [], 0
    for part in table.split(max(k, min(len(table.items), _HELD // (4 * users)))):
        own = call._replace(items=part.items, row_scale=part.scale)
        rows = len(part.items)
        scores = search.sample_maxima(own, prepared, rows, 1, 1, backend.card(queries.device))
        best = scores.topk(min(k, rows), dim=1)
        parts.append((best.values, best.indices + first))
        first += rows
    return _merged(parts, k)


def other_libraries(queries: Tensor, table: Table, k: int) -> dict[str, float | str]:
    """Milliseconds of those that are installed, or why one could not do it."""
    modules, found = gpu_peers.installed()[0], {}
    rows = table.wide(torch.float16)
    for name, module in modules.items():
        try:
            search = gpu_peers.PEERS[name].prepare(module, rows)
            found[name] = round(milliseconds(lambda _, s=search: gpu_peers.merged(s, queries, k)), 4)
        except Exception as error:  # whatever a foreign library raises is its result
            found[name] = f"failed: {type(error).__name__}: {str(error)[:200]}"
    return found


def measure(cell: Cell, copies: list[Table], limits: dict[str, float]) -> dict[str, Any]:
    """One cell, of the table's copies in turns."""
    import urm_kernels
    from urm_kernels.backends import triton as backend
    from urm_kernels.backends.table_view import ScanOptions, TableView
    from urm_kernels.backends.triton import search

    table = copies[0]
    given = [copy.served() for copy in copies]
    queries = queries_of(cell)

    def ours(turn: int) -> Any:
        return urm_kernels.score_topk(queries, given[turn % len(given)], cell.k, backend="triton")

    result, extra = with_extra_bytes(lambda: ours(0))
    check(queries, table, cell.k, *result)
    view, card = TableView(table.items, None, table.scale), backend.card(queries.device)
    found = search.search(queries, view, ScanOptions(), cell.k, True, card)
    ms = milliseconds(ours)
    host = host_milliseconds(ours)
    replay = replayed_milliseconds(ours, len(copies))
    read = 1e3 * table.nbytes / limits["copy_gb_per_s"] / 1e9
    product = 1e3 * 2 * cell.B * cell.M * table.items.numel() / limits["bf16_tflop_per_s"] / 1e12
    peers = {"torch": by_torch, "half_fused": half_fused}
    if cell.compiled:
        peers["torch_compiled"] = by_compiled_torch
    figures: dict[str, float | str] = {
        name: round(milliseconds(lambda turn, p=peer: p(queries, copies[turn % len(copies)], cell.k)), 4)
        for name, peer in peers.items()
    }
    if ALL_ROWS[1] == cell.N:
        figures |= other_libraries(queries, table, cell.k)
    return {
        "ms": round(ms, 4),
        "graph_ms": round(replay, 4),
        "host_ms": round(host, 4),
        "floor_ms": round(max(read, product), 4),
        "of_floor": round(max(read, product) / replay, 3),
        "gb_per_s": round(table.nbytes / replay / 1e6, 1),
        "tflop_per_s": round(2 * cell.B * cell.M * table.items.numel() / replay / 1e9, 1),
        "extra_mib": round(extra / 2**20, 2),
        "extra_share": round(extra / table.nbytes, 5),
        "unproven_users": sum(int(users) for users in found.unproven),
        "peers_ms": figures,
    }


def copies_of(table: tuple[int, int, bool]) -> list[Table]:
    """The table (N, r, float8), as many times as it takes to be larger than the cache."""
    N, r, float8 = table
    items = decay(N, r, 0, 0.4, torch.bfloat16, "cuda")
    made = in_float8(items) if float8 else Table(items)
    del items
    copies = [made]
    for _ in range(CACHE // made.nbytes):
        copies.append(Table(*(None if part is None else part.clone() for part in made)))
    return copies


def run_table(cells: list[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Measures the cells of one table, one after the other; yields (cell, figures or the error in words)."""
    limits, copies = ceilings(), copies_of(cells[0].table)
    for cell in cells:
        yield attempted(cell, limits, lambda cell=cell: measure(cell, copies, limits))
