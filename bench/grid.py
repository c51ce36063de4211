"""The full grid of score_topk on the CPU beside its peers; `make bench-full`.

    python3 bench/grid.py [--only PATTERN] [--budget-minutes M] [--fresh] [--results PATH] [--cells]

Hours at full size, so it may be stopped at any time: the JSON is replaced as a whole after every cell, and the next run
skips what is there, of the same machine and the same sources. Results are checked against float64 before anything is
timed; a wrong one ends the run, and nothing of its cell is written. One table is in memory at a time. Peers that would
take long for nothing, or too much of the free memory, are skipped and the JSON says why. Data kind: decay.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# These choose a kernel or a cache size by hand and slow numpy and faiss; read when OpenBLAS loads.
os.environ.pop("OPENBLAS_CORETYPE", None)
os.environ.pop("OPENBLAS_L2_SIZE", None)

from urm_kernels.bench import PEERS, Cell, Experience, Peer, Table, check, measure
from urm_kernels.bench.cells import make_queries, make_table, product, table_bytes
from urm_kernels.bench.machine import commit_of, free_bytes, machine
from urm_kernels.bench.measure import run as run_ours

_ROOT = Path(__file__).parents[1]
RESULTS = _ROOT / "bench" / "results" / "grid_cpu.json"
SHAPES = ((1, 1), (1, 8), (1, 128), (8, 8), (32, 16))
CELLS = product((10**5, 10**6, 10**7), (64, 128), SHAPES, (10, 100, 1000, 10_000), ("fp32", "bf16"))

_PATIENCE = 20.0  # seconds a call of a peer
_MOST_OF_FREE = 0.6
_IDENTITY = ("processor", "cores", "threads", "instruction_set", "versions", "sources")


class OtherMachineError(Exception):
    """The JSON holds figures that this run must not be mixed with."""


class Grid(NamedTuple):
    """What a run goes through, and how.

    why_not: the reason why a cell's table cannot be made here, or None. measured: records of the cells of one table, a
    cell at a time; the table is gone before the next one is made.
    """

    cells: Sequence[Cell]
    results: Path
    why_not: Callable[[Cell], str | None]
    measured: Callable[[Sequence[Cell], Experience, Sequence[Peer]], Iterator[dict[str, Any]]]
    peers: Sequence[Peer]


class Outcome(NamedTuple):
    """Cells measured now, found in the JSON, left out for want of memory or data, and left for want of time."""

    measured: int
    kept: int
    skipped: int
    left: int


def sources() -> str:
    """A digest of what decides our figures: a commit of anything else does not make them old."""
    package = _ROOT / "urm_kernels"
    files = [_ROOT / "CMakeLists.txt", package / "table_codes.py", *(_ROOT / "csrc").rglob("*.*")]
    files += [file for part in ("backends", "ops") for file in (package / part).rglob("*.py")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.relative_to(_ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def here() -> dict[str, Any]:
    return {**machine(), "commit": commit_of(_ROOT), "sources": sources()}


def read(path: Path, this: dict[str, Any]) -> dict[str, Any]:
    """The record so far, of this machine; an empty one where there is no file."""
    if not path.exists():
        return {"machine": this, "cells": []}
    try:
        record = json.loads(path.read_text())
        was = record["machine"]
        record["cells"] = list(record["cells"])
    except (ValueError, KeyError, TypeError) as error:
        raise OtherMachineError(f"{path.name} is damaged ({error}): --fresh starts anew") from error
    differing = [f"{key}: {was.get(key)} there, {this[key]} here" for key in _IDENTITY if was.get(key) != this[key]]
    if differing:
        raise OtherMachineError(
            f"{path.name} is of another machine or version ({'; '.join(differing)}): --fresh starts anew"
        )
    return record


def write(path: Path, record: dict[str, Any]) -> None:
    """Replaces the file as a whole: who is stopped in the middle leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w") as file:
            file.write(json.dumps(record, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def run(
    grid: Grid,
    *,
    this: dict[str, Any] | None = None,
    fresh: bool = False,
    budget: float = float("inf"),
) -> Outcome:
    """budget: seconds; no cell is begun after them."""
    this, cells, path = this or here(), grid.cells, grid.results
    end = time.monotonic() + budget
    record = {"machine": this, "cells": []} if fresh else read(path, this)
    done = {(entry["N"], entry["cell"]): entry for entry in record["cells"] if "ms" in entry}
    record["cells"] = list(done.values())  # a cell that could not be measured is tried again
    experience = Experience(patience=_PATIENCE)
    for cell in cells:
        if (entry := done.get((cell.N, str(cell)))) is not None:
            experience.relearn(cell, entry["peers_ms"])
    wanted = [cell for cell in cells if (cell.N, str(cell)) not in done]
    measured = skipped = 0
    bar = progress(len(wanted))
    for _, together in itertools.groupby(wanted, key=lambda cell: (cell.N, cell.r, cell.dtype, cell.data)):
        entries = entries_of(list(together), grid, experience)
        while time.monotonic() <= end and (entry := next(entries, None)) is not None:
            record["cells"].append(entry)
            record["machine"] = this
            write(path, record)
            measured += "ms" in entry
            skipped += "ms" not in entry
            bar.set_postfix_str(f"N={entry['N']:,} {entry['cell']}")
            bar.update()
    bar.close()
    return Outcome(measured, len(cells) - len(wanted), skipped, len(wanted) - measured - skipped)


def entries_of(cells: Sequence[Cell], grid: Grid, experience: Experience) -> Iterator[dict[str, Any]]:
    """Records of the cells of one table."""
    reason = grid.why_not(cells[0])
    if reason is None:
        return grid.measured(cells, experience, grid.peers)
    return ({"cell": str(cell), "N": cell.N, "not_measured": reason} for cell in cells)


def too_large(needed: int) -> str | None:
    """Why a table is not made, from the bytes that making it takes."""
    free = free_bytes()
    if free is None or needed <= _MOST_OF_FREE * free:
        return None
    return f"making the table takes {needed / 2**30:.1f} GiB, of {free / 2**30:.1f} free"


def measured_table(cells: Sequence[Cell], experience: Experience, peers: Sequence[Peer]) -> Iterator[dict[str, Any]]:
    table = Table(make_table(cells[0]))
    for _, of_shape in itertools.groupby(cells, key=lambda cell: (cell.B, cell.M)):
        shape = list(of_shape)
        queries = make_queries(shape[0], table.items)
        results = [run_ours(cell, table, queries) for cell in shape]
        # Together: the float64 scores of ten million rows are computed once, some users at a time.
        check([result for result, _ in results], queries, table.items)
        for cell, (result, extra) in zip(shape, results, strict=True):
            yield measure(cell, table, queries, result, extra, experience, peers)


GRID = Grid(CELLS, RESULTS, lambda cell: too_large(table_bytes(cell)), measured_table, PEERS)


class _Silent:
    """For where tqdm is not installed."""

    def set_postfix_str(self, text: str) -> None: ...
    def update(self) -> None: ...
    def close(self) -> None: ...


def progress(total: int) -> Any:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return _Silent()
    return tqdm(total=total, unit="cell", desc="grid", file=sys.stderr, smoothing=0.05)


def chosen(cells: Iterable[Cell], pattern: str) -> list[Cell]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise SystemExit(f"error: --only: {pattern!r} is no regular expression: {error}") from error
    found = [cell for cell in cells if expression.search(cell.name)]
    if not found:
        raise SystemExit(f"error: --only: no cell's name holds {pattern!r}; --cells lists them")
    return found


def main(arguments: Sequence[str] | None = None, grid: Grid = GRID, what: str | None = __doc__) -> int:
    parser = argparse.ArgumentParser(description=(what or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="cells whose name holds this regular expression")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"), help="begin no cell after these")
    parser.add_argument("--fresh", action="store_true", help="forget what the JSON has")
    parser.add_argument("--results", type=Path, default=grid.results, help="the JSON (default: %(default)s)")
    parser.add_argument("--cells", action="store_true", help="only list the cells")
    options = parser.parse_args(arguments)
    grid = grid._replace(cells=chosen(grid.cells, options.only), results=options.results)
    if options.cells:
        print("\n".join(cell.name for cell in grid.cells))
        return 0
    try:
        outcome = run(grid, fresh=options.fresh, budget=60 * options.budget_minutes)
    except OtherMachineError as error:
        raise SystemExit(f"error: {error}") from error
    except AssertionError as error:
        raise SystemExit(f"error: a result is wrong, nothing was written for its cell: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None
    print(
        f"{outcome.measured} cells measured, {outcome.kept} were there, {outcome.skipped} not possible here, "
        f"{outcome.left} left"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
