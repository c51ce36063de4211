"""What every benchmark shares: a clean environment, the record of cells, the table at the end and the JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

# These choose a kernel or a cache size by hand and slow numpy and faiss; a comparison must not profit from that. Read
# when OpenBLAS loads, so they go before anything imports numpy.
for _name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(_name, None)

sys.path.insert(0, str(Path(__file__).parent))  # `import peers`

_RESULTS = Path(__file__).parent / "results" / "latency_cpu.json"
_cells: list[dict[str, Any]] = []
_deselected: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write the JSON here, even where only some cells were run")
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
        _cells.append(cell)

    return keep


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What a reader needs to judge the figures; no name of a host or a folder."""
    import torch

    from urm_kernels.backends import cpu

    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "faiss-cpu", "jax"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": cpu.instruction_set(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str:
    run = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(run, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _verdict(cell: dict[str, Any]) -> str:
    return {True: "met", False: "MISSED", None: "-"}[cell.get("met")]


def table(cells: list[dict[str, Any]]) -> list[str]:
    """One aligned line a cell."""
    rows = [("cell", "ms", "GB/s", "of read", "of FMA", "extra MiB", "best exact peer", "ms", "faster by", "bar", "")]
    for cell in cells:
        extra = cell.get("extra_bytes")
        rows.append(
            (
                cell["cell"],
                _number(cell.get("ms"), 3),
                _number(cell.get("gb_per_s"), 1),
                _number(cell.get("of_read_bandwidth"), 2),
                _number(cell.get("of_fma_rate"), 2),
                _number(None if extra is None else extra / 2**20, 1),
                cell.get("best_peer") or "-",
                _number(cell.get("best_peer_ms"), 3),
                _number(cell.get("faster_by"), 2),
                cell.get("bar", "-"),
                _verdict(cell),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = {0, 6, 9, 10}
    aligned = [
        [text.ljust(w) if i in left else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    return ["  ".join(row).rstrip() for row in aligned]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _cells:
        return
    terminalreporter.section("latency: medians, ours and the peers in turns")
    for line in table(_cells):
        terminalreporter.write_line(line)
    terminalreporter.write_line("of FMA: float32 products at the measured rate; above 1 where bounds need cheaper ones")
    missed = [cell["cell"] for cell in _cells if cell.get("met") is False]
    terminalreporter.write_line(f"bars missed: {', '.join(missed) if missed else 'none'}")
    for cell in _cells:
        for name, reason in cell.get("skipped", {}).items():
            terminalreporter.write_line(f"skipped: {cell['cell']}: {name}: {reason}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Kept as the record of a machine only where every cell was run at full size and was right."""
    path = session.config.getoption("results")
    whole = not _deselected and not any("::" in argument for argument in session.config.args)
    if path is None and whole and exitstatus == 0 and session.config.getoption("rows") == 1_000_000:
        path = _RESULTS
    if path is None or not _cells:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "cells": _cells}, indent=1) + "\n")
