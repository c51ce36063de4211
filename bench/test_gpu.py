"""Latency on a CUDA device by pytest-benchmark: `make bench DEVICE=cuda`.

The benchmark's own time is a whole call from Python until the device is done; "device_ms" in its extra_info is that of
a replayed CUDA graph, by events. A result is checked against float64 before anything is timed (gpu_cells.py,
gpu_functions.py). More cells, bars and tests: `make gpu-acceptance`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gpu_cells
import gpu_functions
import pytest
import torch

import urm_kernels

RESULTS = "latency_cuda.json"

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

_MOST_ROWS = 10_000_000
CELLS = [cell for cell in gpu_cells.named_cells() if cell.N <= _MOST_ROWS and cell.k == 1000]
CELLS += [gpu_cells.Cell(_MOST_ROWS, 128, 1, 8, 1000, float8=True)]
FUNCTIONS = [cell for cell in gpu_functions.named_cells() if cell.N <= _MOST_ROWS]


@functools.cache
def _ceilings() -> dict[str, float]:
    return gpu_cells.ceilings()


@functools.lru_cache(maxsize=1)
def _copies(table: tuple[int, int, bool]) -> list[gpu_cells.Table]:
    return gpu_cells.copies_of(table)


def _timed(benchmark: Any, call: Callable[[int], Any]) -> None:
    """Calls with 0, 1, ... until the device is done."""
    turns = iter(range(1 << 30))

    def whole() -> None:
        call(next(turns))
        torch.cuda.synchronize()

    benchmark.pedantic(whole, rounds=20, warmup_rounds=2, iterations=1)


def _line(cell: Any, figures: dict[str, Any]) -> dict[str, Any]:
    """As the table of conftest.py shows it."""
    device = figures["graph_ms"] or figures["ms"]
    peers = {name: ms for name, ms in figures["peers_ms"].items() if isinstance(ms, float)}
    best = min(peers, key=lambda name: peers[name])
    extra = round(figures["extra_mib"] * 2**20)
    more = {"best_peer": best, "best_peer_ms": peers[best], "faster_by": round(peers[best] / device, 2)}
    return {"cell": cell.name, "device_ms": device, "extra_bytes": extra, **figures, **more}


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_score_topk(cell: gpu_cells.Cell, benchmark: Any, record: Any) -> None:
    copies = _copies(cell.table)
    record(_line(cell, gpu_cells.measure(cell, copies, _ceilings())))
    queries = gpu_cells.queries_of(cell)
    given = [copy.served() for copy in copies]
    _timed(benchmark, lambda turn: urm_kernels.score_topk(queries, given[turn % len(given)], cell.k))


@pytest.mark.parametrize("cell", FUNCTIONS, ids=lambda cell: cell.name)
def test_other_functions(cell: gpu_functions.Cell, benchmark: Any, record: Any) -> None:
    items = _copies((cell.N, cell.r, False))[0].items
    record(_line(cell, gpu_functions.measure(cell, items, _ceilings())))
    work = gpu_functions.work(cell, gpu_cells.queries_of(cell), items)
    _timed(benchmark, lambda _: work.ours())
