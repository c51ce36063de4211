"""Benchmarks at tiny sizes: what is written and what is not, what is skipped and why, the rendered page, the words."""

import json
import os
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from support import with_ceilings

from urm_kernels import ItemTable, scoring
from urm_kernels.bench import PEERS, Cell, Experience, Peer, SkipError, Table, check, command, measure, text
from urm_kernels.bench.cells import make_queries, make_table, product, short
from urm_kernels.bench.measure import run as run_ours

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import grid
import render

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
MACHINE = {
    "processor": "Sham 9000", "cores": 2, "threads": 2, "instruction_set": "portable", "system": "Linux sham",
    "versions": {"torch": "2"}, "commit": "abc", "date": "2026-01-02", "sources": "123",
}  # fmt: skip
TORCH = [peer for peer in PEERS if peer.package == "torch" and peer.chunk]
CELLS = product((300, 2000), (8,), ((1, 1), (2, 3)), (5, 1000), ("fp32", "bf16"))
# Ceilings take a tenth of a second a cell, and are tested elsewhere.
CEILINGS = {"read_bandwidth": 2e10, "fma_rate": 1e11}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    with_ceilings(monkeypatch, CEILINGS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results" / "grid.json"


def run(cells, path, like=grid.GRID, this=MACHINE, **options):
    return grid.run(like._replace(cells=cells, results=path, peers=TORCH), this=this, **options)


def cells_of(path):
    return json.loads(path.read_text())["cells"]


def never(*_):
    raise AssertionError("measured again")


def sleeper(name, seconds=0.0, exact=True):
    """A peer that takes its time and returns the right rows."""

    def find(items, queries, k, reduce):
        time.sleep(seconds)
        return scoring.score_topk(queries, items, k)

    return Peer(name, name, "fp32", exact, lambda items: items, find)


# The grid


def test_the_grid_is_the_one_promised():
    assert len(grid.CELLS) == 240 == len(set(grid.CELLS))
    assert (grid.CELLS[0].N, grid.CELLS[-1].name) == (10**5, "N=1e7 bf16 r=128 B=32 M=16 k=10000")


def test_a_run_resumes_where_it_was_stopped(path):
    assert run(CELLS[:3], path) == (3, 0, 0, 0)
    first = cells_of(path)
    assert run(CELLS, path) == (len(CELLS) - 3, 3, 0, 0)
    assert cells_of(path)[:3] == first
    assert [(c["N"], c["cell"]) for c in cells_of(path)] == [(c.N, str(c)) for c in CELLS]
    assert run(CELLS, path, grid.GRID._replace(measured=never)) == (0, len(CELLS), 0, 0)


def test_fresh_forgets(path):
    run(CELLS[:2], path)
    assert run(CELLS[:1], path, fresh=True) == (1, 0, 0, 0)
    assert len(cells_of(path)) == 1


def test_a_budget_that_is_spent_begins_no_cell(path):
    assert run(CELLS[:3], path, budget=0) == (0, 0, 0, 3)
    assert not path.exists()


def test_figures_of_two_machines_are_not_mixed(path):
    run(CELLS[:1], path)
    before = path.read_text()
    with pytest.raises(grid.OtherMachineError, match=r"instruction_set: portable there, avx2 here.*--fresh"):
        run(CELLS[:2], path, this={**MACHINE, "instruction_set": "avx2"})
    assert path.read_text() == before
    # Another day or commit with the same sources is the same version.
    later = {**MACHINE, "date": "2026-01-03", "commit": "def"}
    assert run(CELLS[:1], path, this=later).kept == 1


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"machine": {}}'])
def test_a_damaged_file_is_said(path, damaged):
    path.parent.mkdir()
    path.write_text(damaged)
    with pytest.raises(grid.OtherMachineError, match=r"damaged.*--fresh"):
        run(CELLS[:1], path)


def test_a_wrong_result_ends_the_run_and_is_not_written(path, monkeypatch):
    run(CELLS[:4], path)
    before = path.read_text()

    def wrong(cell, table, queries):
        result, extra = run_ours(cell, table, queries)
        return result._replace(ids=result.ids.flip(1)), extra

    monkeypatch.setattr(grid, "run_ours", wrong)
    with pytest.raises(AssertionError, match="float64 score"):
        run(CELLS, path)
    assert path.read_text() == before


def test_the_file_is_replaced_as_a_whole(path, monkeypatch):
    run(CELLS[:1], path)
    before = path.read_text()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(CELLS[:2], path)
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_table_too_large_for_the_memory_is_said_and_tried_again(path, monkeypatch):
    monkeypatch.setattr(grid, "free_bytes", lambda: 1000)
    assert run(CELLS[:2], path) == (0, 0, 2, 0)
    assert "GiB" in cells_of(path)[0]["not_measured"]
    monkeypatch.undo()
    assert run(CELLS[:2], path).measured == 2
    assert all("not_measured" not in cell for cell in cells_of(path))


def test_only_in_words():
    assert [cell.name for cell in grid.chosen(CELLS, "N=300 bf16.*M=3")] == ["N=300 bf16 r=8 B=2 M=3 k=5"]
    for pattern, words in (("nothing", "no cell's name holds"), ("(", "no regular expression")):
        with pytest.raises(SystemExit, match=words):
            grid.chosen(CELLS, pattern)


# Peers


def contest(cell, peers, experience=None):
    table = Table(make_table(cell))
    queries = make_queries(cell, table.items)
    result, extra = run_ours(cell, table, queries)
    check([result], queries, table.items, cell.reduce)
    return measure(cell, table, queries, result, extra, experience or Experience(), peers)


@pytest.mark.parametrize("reduce", ["max", "sum", "mean", "logsumexp"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_peers_find_the_same_rows(dtype, reduce):
    record = contest(Cell(dtype, 16, 3, 4, 10, 3000, reduce, "iid"), PEERS)
    assert any(name.startswith("torch") for name in record["peers_ms"])
    for name, share in record["agreement"].items():
        assert share > (0.99 if record["peers_exact"][name] else 0.6), name
    for name, reason in record["skipped"].items():
        assert "not installed" in reason or reason == "not written for logsumexp", (name, reason)


def test_a_hopeless_peer_is_predicted_from_smaller_cells():
    peers, experience = [sleeper("quick"), sleeper("slow")], Experience()
    small = Cell("fp32", 8, 1, 2, 5, 1000)
    for peer, seconds in zip(peers, (0.5, 2.0), strict=True):
        experience.learn(small, peer, seconds)
    assert contest(small, peers, experience)["skipped"] == {}
    record = contest(small._replace(N=4000), peers, experience)
    assert set(record["peers_ms"]) == {"quick"}
    assert record["skipped"] == {"slow": "about 8 s, after 2.0 s at N = 1,000: not waited for"}
    # The same from the record of an earlier run.
    resumed = Experience()
    torch_name = TORCH[0].name
    resumed.relearn(small, {torch_name: 6000.0, "unknown": 1.0})
    assert resumed.hopeless(small._replace(N=10**6), TORCH) == {}  # the fastest there is
    resumed.patience = 10.0
    assert "not waited for" in resumed.hopeless(small._replace(N=10**6), TORCH)[TORCH[0].family]


def test_peers_that_lack_memory_or_break_are_said(monkeypatch):
    def broken(items, queries, k, reduce):
        raise RuntimeError("no luck")

    def absent(items):
        raise SkipError("sham is not installed")

    peers = [
        sleeper("good"),
        sleeper("greedy")._replace(copied=1 << 50),
        sleeper("broken")._replace(find=broken),
        sleeper("absent")._replace(prepare=absent),
    ]
    record = contest(Cell("fp32", 8, 1, 2, 5, 500), peers)
    assert record["best_peer"] == "good"
    assert "GiB" in record["skipped"].pop("greedy")
    assert record["skipped"] == {"broken": "failed: RuntimeError: no luck", "absent": "sham is not installed"}


def test_peers_that_do_not_fit_beside_each_other_follow_each_other(monkeypatch):
    held = weakref.WeakSet()

    class Copy:
        def __init__(self, items):
            self.items = items
            held.add(self)

    def copying(name):
        def find(copy, queries, k, reduce):
            assert len(held) == 1
            return scoring.score_topk(queries, copy.items, k)

        return sleeper(name)._replace(prepare=Copy, find=find, copied=4)

    monkeypatch.setattr("urm_kernels.bench.contest.free_bytes", lambda: 500 * 8 * 4 * (2 - len(held)))
    far_too_large = sleeper("greedy")._replace(copied=1 << 50)
    record = contest(Cell("fp32", 8, 1, 2, 5, 500), [copying("one"), far_too_large, copying("other"), TORCH[0]])
    assert {"one", "other"} < set(record["peers_ms"])
    assert record["peer_rounds"]["one"] == record["peer_rounds"]["other"] == 7
    assert set(record["skipped"]) == {"greedy"}


def test_an_inexact_peer_is_never_the_best():
    record = contest(Cell("fp32", 8, 1, 2, 5, 500), [sleeper("rough", exact=False), sleeper("exact", 0.01)])
    assert set(record["peers_ms"]) == {"rough", "exact"}
    assert record["best_peer"] == "exact"


# The page


@pytest.mark.skipif(not RESULTS.is_dir(), reason="a source distribution has no bench/results")
def test_the_committed_page_is_what_the_jsons_say():
    assert (ROOT / "docs" / "benchmarks.md").read_text() == render.page(RESULTS).text


def synthetic(folder):
    one = contest(CELLS[0], TORCH[:1])
    cells = [{**one, "cell": str(cell), "N": cell.N} for cell in CELLS]
    for cell, met in zip(cells, (True, False), strict=False):
        cell |= {"bar": ">= 1x torch", "met": met}
    cells[2]["skipped"] = {"faiss flat": "about 55 s, after 5.5 s at N = 1,000,000: not waited for"}
    cells[2] |= {"best_peer": None}
    cells.append({"cell": "fp32 r=8 B=9 M=9 k=5", "N": 10**9, "not_measured": "making the table takes 30.0 GiB"})
    line = {"cell": "load", "ms": 1.5, "beside_ms": {"read_ms": 20.0}, "bar": "< 50 ms", "met": True}
    (folder / "grid_cpu.json").write_text(json.dumps({"machine": MACHINE, "cells": cells}))
    (folder / "latency_cpu.json").write_text(json.dumps({"machine": MACHINE, "cells": cells[:-1]}))
    (folder / "tables_cpu.json").write_text(json.dumps({"machine": MACHINE, "cells": [line]}))


def test_a_page_of_a_synthetic_machine(tmp_path):
    synthetic(tmp_path)
    text, figures = render.page(tmp_path)
    for words in (
        "Sham 9000", "1 met, 1 missed", "### N = 2,000, bf16", "**missed**",
        "| load | 1.50 | read 20.0 | < 50 ms | met |",
        "faiss flat: about ... s, after ... s: not waited for (1 cell)", "Not measured, 1e9 rows and more: making",
    ):  # fmt: skip
        assert words in text, words
    assert set(figures) == {"bench_latency_cpu.png", "bench_grid_shapes.png", "bench_grid_rows.png"}
    assert "GPU" not in text.split("## CPU")[1]


def test_the_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    synthetic(results)
    (results / "grid_cpu.json").unlink()
    render.main(["--results", str(results), "--docs", str(docs)])
    assert (docs / "benchmarks.md").exists()
    assert [file.name for file in (docs / "figures").iterdir()] == ["bench_latency_cpu.png"]


def test_a_json_that_is_something_else_is_said(tmp_path):
    (tmp_path / "grid_cpu.json").write_text("{}")
    with pytest.raises(SystemExit, match="not what its benchmark writes"):
        render.main(["--results", str(tmp_path), "--docs", str(tmp_path)])


# The command line


def test_a_table_of_a_small_grid(capsys, tmp_path):
    out = tmp_path / "out.json"
    arguments = "--items 300,2e3 --rank 8 --users 2 --queries 1,3 --k 5 --dtype bf16 --peers torch --data iid --json"
    command.main([*arguments.split(), str(out)])
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].split()[:3] == ["N", "cell", "ms"]
    assert "bf16 r=8 B=2 M=3 k=5 iid" in printed.out and "torch bf16" in printed.out
    assert [cell["N"] for cell in cells_of(out)] == [300, 300, 2000, 2000]


def test_a_report_to_paste(capsys):
    command.main(["--items", "300", "--rank", "8", "--k", "5", "--reduce", "sum", "--peers", "none", "--report"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "```" == lines[-1]
    assert any("instruction set" in line and "threads" in line for line in lines)
    for words in ("torch 2.", "checked against float64", "reads 20.0 to 20.0 GB/s", "fp32 r=8 B=1 M=8 k=5 sum"):
        assert any(words in line for line in lines), words


def test_a_table_of_a_file(capsys, tmp_path):
    file = tmp_path / "table.safetensors"
    ItemTable(torch.randn(400, 8).bfloat16()).save(file)
    command.main(["--table", str(file), "--k", "7", "--peers", "none"])
    assert "bf16 r=8 B=1 M=8 k=7 file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        (torch.tensor([[1.0, float("nan")]]), "finite factors are wanted"),
        (torch.zeros(3, 2, dtype=torch.float16), "float32 or bfloat16 factors are measured, these are torch.float16"),
        (torch.zeros(0, 2), "at most N = 0 is wanted"),
    ],
    ids=["nan", "float16", "empty"],
)
def test_files_that_are_not_measured(factors, words, capsys, tmp_path):
    file = tmp_path / "table.safetensors"
    ItemTable(factors).save(file)
    with pytest.raises(SystemExit):
        command.main(["--table", str(file), "--k", "1"])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--items 1.5", "a whole number of at least 1 is wanted, '1.5' came"),
        ("--items many", "a whole number such as 1000 or 1e6 is wanted, 'many' came"),
        ("--items nan", "a whole number of at least 1 is wanted"),
        ("--k 0", "a whole number of at least 1 is wanted, '0' came"),
        ("--dtype fp8", "of fp32, bf16 any are wanted, 'fp8' came"),
        ("--peers lucene", "of torch, numpy, faiss, jax, none any are wanted, 'lucene' came"),
        ("--items 10 --k 11", "--k: at most N = 10 is wanted, 11 came"),
        ("--items 10 --k 1 --data odd", "kind: one of"),
        ("--items 1e12", "GiB to make"),
        ("--items 10 --k 1 --users 1e9 --queries 1e3", "GiB to make"),
        ("--table absent.safetensors", "absent.safetensors"),
        ("--table absent.safetensors --items 10", "--items: comes from the file"),
        ("--json absent/out.json", "--json: the folder absent does not exist"),
    ],
)
def test_errors_in_words(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments.split())
    said = capsys.readouterr().err + str(stopped.value)
    assert words in said and "Traceback" not in said


def test_a_wrong_result_is_refused(monkeypatch, tmp_path):
    def wrong(cell, table, queries):
        result, extra = run_ours(cell, table, queries)
        return result._replace(scores=result.scores + 1), extra

    monkeypatch.setattr(command, "run", wrong)
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit, match="a result is wrong, nothing was written"):
        command.main(["--items", "300", "--rank", "8", "--k", "5", "--peers", "none", "--json", str(out)])
    assert not out.exists()


def test_a_plot_where_matplotlib_is(tmp_path, capsys, monkeypatch):
    arguments = ["--items", "300,900", "--rank", "8", "--k", "5", "--peers", "torch", "--plot"]
    pytest.importorskip("matplotlib")
    command.main([*arguments, str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").stat().st_size > 1000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command.main([*arguments, str(tmp_path / "none.png")])
    assert "no figure: it needs" in capsys.readouterr().err


def test_numbers_and_columns():
    assert [short(n) for n in (300, 10**6, 350_000, 1_234_567)] == ["300", "1e6", "3.5e5", "1234567"]
    assert text.aligned([["a", "bb"], ["ccc", "d"]]) == ["a    bb", "ccc   d"]
