"""Packed tables beside plain ones, exact peers, faiss' PQFastScan and ceilings; `make bench`.

As in test_latency.py: the plain table's result is checked against float64 and every packed one against its bits before
anything is timed; all take turns; medians. Bars are those of N = 1e7 (packed_grid.py measures there) unless said.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import fast_scan
import packed_cells
import pytest
import torch
from bars import line
from packed_cells import CODES, PackedTable, code_bytes
from torch import Tensor

from urm_kernels import ItemTable, score_topk, testing
from urm_kernels.bench import Cell, Experience, SkipError, in_turns
from urm_kernels.bench.cells import make_queries, make_table

RESULTS = "packed_cpu.json"

BARS = {
    "packing, rows a second": 2e6,
    "packing, extra MiB": 1024.0,
    "int4, bytes a row beside r / 2": 10.0,
    "faster than PQFastScan": 2.0,
    "worst case, over plain": 1.2,
}
CELLS = [
    Cell("fp32", 128, *shape, 1000, data=data)
    for data in ("decay", "iid", "clustered")
    for shape in packed_cells.SHAPES
    if (data, *shape) in packed_cells.BARS or shape != (1, 16)
]
APPROXIMATE = Cell("fp32", 64, 1, 8, 100, data="iid")
_TUNED_ON = 16  # users

_experience = Experience()


@functools.lru_cache(maxsize=1)
def _table(data: str, rows: int) -> PackedTable:
    return PackedTable(make_table(Cell("fp32", 128, 1, 1, 1, rows, data=data)))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_scan(cell: Cell, rows: int, benchmark: Any, record: Any) -> None:
    cell = cell._replace(N=rows)
    table = _table(cell.data, rows)
    record(packed_cells.measure(cell, table, _experience))
    _once(benchmark, table.packed[packed_cells.judged(cell)], make_queries(cell, table.items), cell.k)


def _once(benchmark: Any, table: ItemTable, queries: Tensor, k: int) -> None:
    benchmark.pedantic(score_topk, (queries, table, k), rounds=1)


def test_beside_an_approximate_index(rows: int, benchmark: Any, record: Any) -> None:
    """32 bytes a row, and as many candidates ranked again as a recall of .99 takes."""
    cell = APPROXIMATE._replace(N=rows)
    table = PackedTable(make_table(cell))
    users = make_queries(cell._replace(B=_TUNED_ON), table.items)
    try:
        index = fast_scan.index_of(table.items, 32)
        tuned = fast_scan.tuned(index, table.items, users, score_topk(users, table.items, cell.k))
    except SkipError as reason:
        pytest.skip(f"{fast_scan.NAME}: {reason}")
    bars = {fast_scan.NAME: BARS["faster than PQFastScan"]}
    entry = packed_cells.measure(cell, table, Experience(), [*packed_cells.EXACT, tuned.peer], bars)
    words = f"{entry['bar']} (candidates {tuned.factor} k, recall {tuned.recall:.3f})"
    record({**entry, "bar": words, "factor": tuned.factor, "recall": round(tuned.recall, 4)})
    _once(benchmark, table.packed[packed_cells.judged(cell)], make_queries(cell, table.items), cell.k)


def _near(rows: int, r: int) -> Tensor:
    """One row of length 1, with noise of length 1e-3: all bounds overlap."""
    random = torch.Generator().manual_seed(0)
    noise = torch.empty(rows, r).normal_(generator=random).mul_(1e-3 * r**-0.5)
    base = torch.randn(r, generator=random)
    return noise.add_(base / base.norm())


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (1, 128)], ids=str)
@pytest.mark.parametrize("kind", ["equal", "sorted", "near"])
def test_worst_cases(kind: str, shape: tuple[int, int], rows: int, benchmark: Any, record: Any) -> None:
    """Where codes rule nothing out, a packed table may cost little more than a plain one."""
    table = _worst_table(kind, rows)
    queries = testing.make_queries("iid" if kind == "near" else kind, *shape, 128, seed=1, items=table.items)
    _, did = table.beside_plain(queries, 1000)
    calls = {name: functools.partial(score_topk, queries, packed, 1000) for name, packed in table.packed.items()}
    spreads = in_turns({**calls, "plain": functools.partial(score_topk, queries, table.items, 1000)}, 7)
    worst = max(CODES, key=lambda name: spreads[name].median)
    _once(benchmark, table.packed[worst], queries, 1000)
    ratio, bar = spreads[worst].median / spreads["plain"].median, BARS["worst case, over plain"]
    name = f"worst case: {kind} fp32 N={rows:.0e} r=128 B={shape[0]} M={shape[1]} k=1000"
    words, more = f"<= {bar:g}x plain, is {ratio:.2f}x ({worst})", {"survivors": did[worst]["survivors"]}
    record(line(name, spreads.pop(worst), spreads, words, ratio <= bar, **more))


@functools.lru_cache(maxsize=1)
def _worst_table(kind: str, rows: int) -> PackedTable:
    return PackedTable(_near(rows, 128) if kind == "near" else testing.make_items(kind, rows, 128, seed=0))


@pytest.mark.parametrize("codes", CODES)
def test_packing(codes: str, rows: int, benchmark: Any, record: Any) -> None:
    items = _table("decay", rows).items
    table = ItemTable(items)
    spread = in_turns({"pack": functools.partial(table.pack, codes=CODES[codes])}, 3)["pack"]
    benchmark.pedantic(table.pack, kwargs={"codes": CODES[codes]}, rounds=1)
    queries = testing.make_queries("decay", 1, 8, 128, seed=1, items=items)
    assert all(map(torch.equal, score_topk(queries, table, 1000), score_topk(queries, items, 1000)))
    rate, bytes_a_row = rows / spread.median, code_bytes(table) / rows
    most = 128 / 2 + BARS["int4, bytes a row beside r / 2"]
    words = f">= {BARS['packing, rows a second'] / 1e6:g} million rows/s, is {rate / 1e6:.2f}"
    met = rate >= BARS["packing, rows a second"]
    if codes == "int4":
        words += f"; <= {most:g} bytes a row, are {bytes_a_row:.2f}"
        met = met and bytes_a_row <= most
    record(line(f"pack: {codes} of fp32 N={rows:.0e} r=128", spread, {}, words, met, bytes_a_row=bytes_a_row))


# The file's pages are the system's to take back, but count as resident: they are made so before the peak is measured.
_MEMORY = """
import sys
from urm_kernels import ItemTable, score_topk, testing
table = ItemTable.load(sys.argv[1])
table.factors.view(-1)[::512].float().sum()
with testing.peak_extra_memory() as peak:
    table.pack(codes=sys.argv[2].split("+"))
made = sum(size for part, size in table.memory().items() if part.startswith("code_"))
print(None if peak.bytes is None else max(0, peak.bytes - made))
"""


@pytest.mark.memory
def test_memory_of_packing(large_file: Path, rows: int, benchmark: Any, record: Any) -> None:
    """Beyond the codes, of a mapped file of ten times the rows, in a fresh process."""
    codes = max(CODES, key=len)  # those that write most
    printed: list[str] = []

    def once() -> None:
        command = [sys.executable, "-c", _MEMORY, str(large_file), codes]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        printed.append(run.stdout.strip())

    benchmark.pedantic(once, rounds=1, iterations=1)
    extra, bar = None if printed[0] == "None" else int(printed[0]), BARS["packing, extra MiB"]
    record(
        {
            "cell": f"extra memory of packing: {codes} of bf16 N={10 * rows:.0e} r=128, mapped",
            "extra_bytes": extra,
            "bar": f"< {bar:g} MiB",
            "met": None if extra is None else extra < bar * 2**20,
        }
    )
