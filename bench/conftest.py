"""What every benchmark shares: a clean environment, the record of cells, the table at the end and the JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

# These choose a kernel or a cache size by hand and slow numpy and faiss; a comparison must not profit from that. Read
# when OpenBLAS loads, so they go before anything imports numpy.
for _name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(_name, None)

_RESULTS = Path(__file__).parent / "results"
_cells: dict[str, list[dict[str, Any]]] = {}  # by the file they belong into: RESULTS of a test's module
_deselected: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="folder to write the JSON to, even where only some cells were run")
    parser.addoption("--rows", type=int, default=1_000_000, help="N of the latency cells (smaller: for development)")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # its table knows nothing of peers, ceilings and bars; ours follows
    config.addinivalue_line("markers", "memory: N = 1e7, needs 3 GB of memory")


def pytest_deselected(items: list[pytest.Item]) -> None:
    _deselected.extend(item.nodeid for item in items)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the host's name is nobody's business


@pytest.fixture
def record(benchmark: Any, request: pytest.FixtureRequest) -> Any:
    """record(cell): one line of the table, also kept as the benchmark's extra_info."""

    def keep(cell: dict[str, Any]) -> None:
        benchmark.extra_info.update(cell)
        _cells.setdefault(request.module.RESULTS, []).append(cell)

    return keep


def _verdict(cell: dict[str, Any]) -> str:
    return {True: "met", False: "MISSED", None: "-"}[cell.get("met")]


def table(cells: list[dict[str, Any]]) -> list[str]:
    """One aligned line a cell."""
    from urm_kernels.bench.text import aligned, number

    rows = [("cell", "ms", "GB/s", "of read", "of FMA", "extra MiB", "best exact peer", "ms", "faster by", "bar", "")]
    for cell in cells:
        extra = cell.get("extra_bytes")
        rows.append(
            (
                cell["cell"],
                number(cell.get("ms"), 3),
                number(cell.get("gb_per_s"), 1),
                number(cell.get("of_read_bandwidth"), 2),
                number(cell.get("of_fma_rate"), 2),
                number(None if extra is None else extra / 2**20, 1),
                cell.get("best_peer") or "-",
                number(cell.get("best_peer_ms"), 3),
                number(cell.get("faster_by"), 2),
                cell.get("bar", "-"),
                _verdict(cell),
            )
        )
    return aligned(rows, left={0, 6, 9, 10})


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    cells = [cell for of_file in _cells.values() for cell in of_file]
    if not cells:
        return
    terminalreporter.section("medians, ours and the others in turns")
    for line in table(cells):
        terminalreporter.write_line(line)
    terminalreporter.write_line("of FMA: float32 products at the measured rate; above 1 where bounds need cheaper ones")
    missed = [cell["cell"] for cell in cells if cell.get("met") is False]
    terminalreporter.write_line(f"bars missed: {', '.join(missed) if missed else 'none'}")
    for cell in cells:
        for name, reason in cell.get("skipped", {}).items():
            terminalreporter.write_line(f"skipped: {cell['cell']}: {name}: {reason}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Kept as the record of a machine only where every cell of a file was run at full size and was right."""
    folder = session.config.getoption("results")
    whole = not _deselected and not any("::" in argument for argument in session.config.args)
    if folder is None and whole and exitstatus == 0 and session.config.getoption("rows") == 1_000_000:
        folder = _RESULTS
    if folder is None or not _cells:
        return
    from urm_kernels.bench.machine import commit_of, machine

    folder.mkdir(parents=True, exist_ok=True)
    here = {**machine(), "commit": commit_of(_RESULTS.parent)}
    for name, cells in _cells.items():
        (folder / name).write_text(json.dumps({"machine": here, "cells": cells}, indent=1) + "\n")
