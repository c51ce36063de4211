"""What every benchmark shares: a clean environment, the record of cells, the table at the end and the JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# These choose a kernel or a cache size by hand and slow numpy and faiss; a comparison must not profit from that. Read
# when OpenBLAS loads, so they go before anything imports numpy.
for _name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(_name, None)

_RESULTS = Path(__file__).parent / "results"
_ON_GPU = os.environ.get("DEVICE") == "cuda"
_GPU = "test_gpu.py"
collect_ignore = [p.name for p in Path(__file__).parent.glob("test_*.py") if (p.name == _GPU) != _ON_GPU]
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
def rows(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("rows")


@pytest.fixture(scope="module")
def large_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An ItemTable's file of ten times as many rows, r = 128, bfloat16, data kind decay."""
    import torch

    from urm_kernels import ItemTable, testing

    count, r = 10 * request.config.getoption("rows"), 128
    path = tmp_path_factory.mktemp("tables") / "table.safetensors"
    factors = torch.empty(count, r, dtype=torch.bfloat16)
    for first in range(0, count, 1 << 18):  # in float32 as a whole it would take twice the memory
        part = factors[first : first + (1 << 18)]
        part.copy_(testing.make_items("decay", len(part), r, seed=first))
    ItemTable(factors).save(path)
    del factors
    yield path
    path.unlink()


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
    """One aligned line a cell; columns that say nothing of any of them are left out."""
    from urm_kernels.bench.text import aligned, number

    peer = "fastest peer" if _ON_GPU else "best exact peer"
    header = (
        "cell", "ms", "device ms", "plain ms", "GB/s", "of read", "of FMA", "of codes", "first bounds", "scored",
        "extra MiB", peer, "ms", "faster by", "bar", "",
    )  # fmt: skip
    rows = [header]
    for cell in cells:
        extra = cell.get("extra_bytes")
        survivors = [f"{share:.2%}" for share in cell.get("survivors", ())] or ["-", "-"]
        rows.append(
            (
                cell["cell"],
                number(cell.get("ms"), 3),
                number(cell.get("device_ms"), 3),
                number(cell.get("plain_ms"), 3),
                number(cell.get("gb_per_s"), 1),
                number(cell.get("of_read_bandwidth"), 2),
                number(cell.get("of_fma_rate"), 2),
                number(cell.get("of_code_rate"), 2),
                *survivors,
                number(None if extra is None else extra / 2**20, 1),
                cell.get("best_peer") or "-",
                number(cell.get("best_peer_ms"), 3),
                number(cell.get("faster_by"), 2),
                cell.get("bar", "-"),
                _verdict(cell),
            )
        )
    kept = [place for place, column in enumerate(zip(*rows[1:], strict=True)) if set(column) != {"-"}]
    left = {kept.index(place) for place in kept if header[place] in ("cell", peer, "bar", "")}
    return aligned([[row[place] for place in kept] for row in rows], left)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    cells = [cell for of_file in _cells.values() for cell in of_file]
    if not cells:
        return
    terminalreporter.section("medians, ours and the others in turns")
    for of_file in _cells.values():
        for line in [*table(of_file), ""]:
            terminalreporter.write_line(line)
    if _ON_GPU:
        return
    terminalreporter.write_line("of FMA: float32 products at the measured rate; above 1 where bounds need cheaper ones")
    terminalreporter.write_line(
        "of codes: integer products at the measured rate; of packed tables, of read is of theirs"
    )
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
    from urm_kernels.bench.machine import commit_of, device, machine

    folder.mkdir(parents=True, exist_ok=True)
    here = {**(device() if _ON_GPU else machine()), "commit": commit_of(_RESULTS.parent)}
    for name, cells in _cells.items():
        (folder / name).write_text(json.dumps({"machine": here, "cells": cells}, indent=1) + "\n")
