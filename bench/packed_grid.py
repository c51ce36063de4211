"""Packed tables of ten million rows on the CPU beside exact peers; `make bench-full`.

    python3 bench/packed_grid.py [--only PATTERN] [--budget-minutes M] [--fresh] [--results PATH] [--cells]

Stops and goes on as grid.py does. One table is in memory at a time, and peers that do not fit beside each other (jax
and faiss copy the rows) are measured one after the other, each in turns with ours. The data kind smollm2 needs the
file that `python -m urm_kernels.testing.vocabularies` writes; without it its cells are not measured, and say so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grid  # first: it takes away what would slow numpy and faiss
import packed_cells

from urm_kernels import testing
from urm_kernels.bench import Cell, Experience, Peer
from urm_kernels.bench.cells import make_table, table_bytes

RESULTS = Path(__file__).parent / "results" / "packed_grid_cpu.json"
CELLS = [
    Cell("fp32", 128, *shape, 1000, 10**7, data=data)
    for data in ("decay", "iid", "clustered", "smollm2")
    for shape in packed_cells.SHAPES
]


def why_not(cell: Cell) -> str | None:
    """Also where the memory is too small for the rows and all their codes."""
    try:
        testing.make_items(cell.data, 1, cell.r, seed=0)
    except ValueError as missing:
        return str(missing)
    return grid.too_large(table_bytes(cell) + packed_cells.all_code_bytes(cell))


def measured_table(cells: Sequence[Cell], experience: Experience, peers: Sequence[Peer]) -> Iterator[dict[str, Any]]:
    table = packed_cells.PackedTable(make_table(cells[0]))
    for cell in cells:
        yield packed_cells.measure(cell, table, experience, peers)


GRID = grid.Grid(CELLS, RESULTS, why_not, measured_table, packed_cells.EXACT)

if __name__ == "__main__":
    sys.exit(grid.main(grid=GRID, what=__doc__))
