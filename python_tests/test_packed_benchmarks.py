"""Benchmarks of packed tables at tiny sizes: what is checked, judged, resumed and left out; the rendered sections."""

import json
import sys
from pathlib import Path

import pytest
import torch
from support import with_ceilings

from urm_kernels import ItemTable, score_topk
from urm_kernels.bench import PEERS, Cell, Experience
from urm_kernels.bench.cells import make_queries, make_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import bars
import blocks
import fast_scan
import grid
import packed_cells
import packed_grid
import recall
import render
from packed_cells import PackedTable, code_bytes

CEILINGS = {"read_bandwidth": 2e10, "code_rate": 1e12}
CELL = Cell("fp32", 16, 1, 2, 5, 3000)
TORCH = [peer for peer in PEERS if peer.package == "torch" and peer.chunk]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    with_ceilings(monkeypatch, CEILINGS)


def measured(cell=CELL, **options):
    return packed_cells.measure(cell, PackedTable(make_table(cell)), Experience(), TORCH, **options)


def test_a_cell_says_what_each_code_did():
    record = measured()
    assert list(record["codes"]) == ["int4", "int8", "int4+int8"]
    assert record["judged"] == "int4" and record["ms"] == record["codes"]["int4"]["ms"]
    int4, int8, both = record["codes"].values()
    assert 16 / 2 < int4["bytes_a_row"] <= 16 / 2 + 10
    assert both["bytes_a_row"] == pytest.approx(int4["bytes_a_row"] + int8["bytes_a_row"], abs=0.1)
    # 3000 rows have 93 blocks of 32 with codes: their bytes over 2e10 a second, their products over 1e12.
    assert int4["read_floor_ms"] == pytest.approx(93 * 32 * 16 / 2e10 * 1e3, abs=6e-4)
    assert int4["of_code_rate"] == pytest.approx(2 * 2 * 3000 * 16 / 1e12 / (int4["ms"] / 1e3), rel=0.1, abs=6e-4)
    assert all(did["survivors"][1] > 0 for did in record["codes"].values())
    assert record["plain_ms"] > 0 and record["bar"] == "none" and record["met"] is None


def test_all_codes_are_counted_before_they_are_made():
    cell = Cell("fp32", 12, 1, 1, 1, 640)
    table = PackedTable(make_table(cell))
    assert packed_cells.all_code_bytes(cell) == pytest.approx(sum(map(code_bytes, table.packed.values())), rel=0.02)


def test_a_packed_result_of_other_bits_is_not_measured():
    table = PackedTable(make_table(CELL))
    # Codes of another table, whose own version says that they are fresh.
    table.packed["int8"] = ItemTable(table.items + 1e-3).pack(codes=("int8",))
    with pytest.raises(AssertionError, match="int8: packed and plain results differ"):
        packed_cells.measure(CELL, table, Experience(), TORCH)


def judged(bar, **record):
    peers = {"jax top_k": 11.0, "torch fp32 chunks of N": 16.0, "numpy chunks of N": 14.0, "faiss 8-bit quantizer": 0.5}
    exact = {name: "8-bit" not in name for name in peers}
    found = {"ratios": peers, "peers_exact": exact, "best_peer": "jax top_k", "of_code_rate": 0.5, **record}
    return tuple(bars.verdict(bar, found).values())


def test_bars_are_judged():
    assert judged({}) == ("none", None)
    assert judged({"fastest": 11.0}) == (">= 11x fastest", True)
    assert judged({"jax": 10.0, "others": 15.0}) == (">= 10x jax, >= 15x others", False)  # numpy 14
    assert judged({"jax": 12.0, "others": 14.0})[1] is False
    assert judged({"jax": 10.0, "others": 14.0})[1] is True  # what rounds does not count
    assert judged({"of_code_rate": 0.6}) == (">= 60% of the code rate", False)
    assert judged({"lucene": 2.0}) == (">= 2x lucene (not measured)", None)
    assert judged({"fastest": 2.0}, best_peer=None)[1] is None


def test_the_approximate_peer_is_tuned_to_its_recall():
    pytest.importorskip("faiss")
    cell = Cell("fp32", 16, 3, 2, 10, 5000, data="iid")
    items = make_table(cell)
    queries = make_queries(cell, items)
    index, truth = fast_scan.index_of(items, 8), score_topk(queries, items, cell.k)
    tuned = fast_scan.tuned(index, items, queries, truth)
    assert tuned.recall >= fast_scan.RECALL and not tuned.peer.exact
    scores, ids = tuned.peer.search(tuned.peer.prepare(items), queries, cell.k)
    dots = torch.einsum("bmr,bkr->bmk", queries, items[ids]).amax(1)
    torch.testing.assert_close(scores, dots)
    assert all(len(set(row)) == cell.k for row in ids.tolist())
    if tuned.factor > 1:
        _, fewer = fast_scan.search(1, index, items, queries, cell.k)
        assert sum(len(set(a) & set(b)) for a, b in zip(fewer.tolist(), truth.ids.tolist(), strict=True)) < 0.99 * 30
    with pytest.raises(fast_scan.SkipError, match="does not divide into 24 parts"):
        fast_scan.index_of(items, 12)


def test_the_packed_grid_resumes_and_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.delenv("URM_EMBEDDINGS_SMOLLM2", raising=False)
    assert len(packed_grid.CELLS) == 16 == len(set(packed_grid.CELLS))
    assert {(c.data, c.B, c.M) for c in packed_grid.CELLS} >= set(packed_cells.BARS)
    path, this = tmp_path / "packed.json", dict.fromkeys(grid._IDENTITY, "here")
    cells = [cell._replace(N=2000, r=8, k=5) for cell in packed_grid.CELLS if cell.M < 16]
    small = packed_grid.GRID._replace(cells=cells, results=path, peers=TORCH)
    assert grid.run(small._replace(cells=cells[:3]), this=this) == (3, 0, 0, 0)
    assert grid.run(small, this=this) == (3, 3, 2, 0)
    entries = json.loads(path.read_text())["cells"]
    assert [entry["cell"] for entry in entries] == [str(cell) for cell in cells]
    assert ["URM_EMBEDDINGS_SMOLLM2" in entry.get("not_measured", "") for entry in entries] == 6 * [False] + 2 * [True]
    monkeypatch.setattr(grid, "free_bytes", lambda: 2000 * 8 * 4)
    assert "GiB" in packed_grid.why_not(cells[0])


def test_sections_and_figures_of_a_synthetic_machine(tmp_path):
    about = {
        "processor": "Sham 9000", "cores": 2, "threads": 2, "instruction_set": "portable", "system": "Linux sham",
        "versions": {"torch": "2"}, "commit": "abc", "date": "2026-01-02",
    }  # fmt: skip
    cells = []
    for data, count in (("decay", 8), ("decay", 1), ("iid", 1)):
        record = measured(CELL._replace(M=count, data=data), bars={"fastest": 1e9})
        cells.append({**record, "r": 128, "k": 1000})
    memory = {"cell": "extra memory of packing", "extra_bytes": 3 << 20, "bar": "< 1024 MiB", "met": True}
    worst = {"cell": "worst case: equal", "ms": 1.5, "beside_ms": {"plain": 1.4}, "bar": "<= 1.2x", "met": True}
    missing = {"cell": "x smollm2", "N": 10**7, "not_measured": "no embeddings"}
    for name, more in (("packed_cpu.json", [memory, worst]), ("packed_grid_cpu.json", [missing])):
        (tmp_path / name).write_text(json.dumps({"machine": about, "cells": cells + more}))
    text, figures = render.page(tmp_path)
    for words in (
        "## CPU: packed tables\n", "## CPU: packed tables of ten million rows\n", "Bars: 1 met, 3 missed",
        "| extra memory of packing | < 1024 MiB | 3.0 MiB | met |", "| worst case: equal | 1.50 | plain 1.40 | <= 1.2x",
        "int8: >= 1e+09x fastest", "### Packed, N = 3,000", "Not measured (1 cells): no embeddings.",
    ):  # fmt: skip
        assert words in text, words
    panels, _ = figures["bench_packed_cpu.png"]
    assert [(panel.title, panel.places) for panel in panels] == [
        ("decay, int4", ["(1, 1)", "(1, 8)"]),
        ("iid, int4+int8", ["(1, 1)"]),
    ]
    assert panels[1].series["packed"] == [cells[2]["codes"]["int4+int8"]["ms"]]
    pytest.importorskip("matplotlib")
    render.main(["--results", str(tmp_path), "--docs", str(tmp_path / "docs")])
    assert (tmp_path / "docs" / "figures" / "bench_packed_grid_cpu.png").stat().st_size > 1000


def test_blocks_are_measured_beside_a_table_without_them(tmp_path, capsys):
    arguments = ["--rows", "20000", "--r", "16", "--kinds", "clustered", "--shapes", "1x2", "--k", "5", "--masks"]
    assert blocks.main([*arguments, "--results", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["cells"]
    assert [set(cell["ms"]) for cell in found] == [{"without", "blocks", "torch"}, {"all", "blocks", "rows"}]
    assert 0 < found[0]["read"] <= 1 and "of the blocks read" in capsys.readouterr().out


def test_a_result_that_blocks_changed_is_not_timed(monkeypatch):
    monkeypatch.setattr(blocks, "same", lambda one, other: False)
    with pytest.raises(SystemExit, match="changed a result"):
        blocks.main(["--rows", "3000", "--r", "8", "--kinds", "iid", "--shapes", "1x1", "--k", "3"])


def test_recall_is_measured_beside_exact_calls(capsys):
    arguments = ["--rows", "70000", "--r", "64", "--users", "2", "--kinds", "iid", "--k", "5"]
    assert recall.main(arguments) == 0
    assert "int2 .99" in capsys.readouterr().out
