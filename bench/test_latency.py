"""Latency of score_topk on the CPU beside exact peers, ceilings and bars; `make bench`.

A cell's result is checked against float64 before anything is timed: a wrong result fails the run, a missed bar is
shown as missed and does not. Ours and the peers take turns in one process; medians are reported. A peer that needs
more than 1.5 s a call is called once, just before the turns (`peer_rounds` says so). Data kind: decay.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
import time
import timeit
from typing import Any

import pytest
import torch
from bars import verdict
from torch import Tensor

import urm_kernels
from urm_kernels import scoring, testing
from urm_kernels.bench import PEERS, Cell, Contest, Experience, Table, figures, rounds_for, timed, tolerance
from urm_kernels.bench.cells import make_queries, make_table
from urm_kernels.bench.turns import PAUSE, Call
from urm_kernels.table import Serving

RESULTS = "latency_cpu.json"

# What must be reached (bars.py says how they are judged).
BARS = {
    "k=1000 over k=10": 1.3,
    "small call, us": 40.0,
    "small call, Python checks, us": 20.0,
    "import, s": 0.3,
    "extra MiB at N=1e7": 16.0,
}
SCAN_BARS: dict[tuple[str, int, int], dict[str, float]] = {
    ("fp32", 1, 1): {"of_read_bandwidth": 0.7},
    ("fp32", 1, 8): {"jax": 3.0, "others": 4.0},
    ("fp32", 8, 8): {"others": 2.0},
    ("fp32", 32, 16): {"others": 1.0},
    ("bf16", 1, 1): {"others": 1.4},
    ("bf16", 1, 8): {"others": 3.0},
    ("bf16", 8, 8): {"torch": 1.0},  # not exact itself
}

SHAPES = ((1, 1), (1, 8), (8, 8), (32, 16))
# In the order in which a table, its indexes and an oracle can be kept.
CELLS = [Cell("fp32", r, *shape, k) for r in (64, 128) for shape in SHAPES for k in (100, 1000)]
CELLS += [Cell("bf16", 128, *shape, 100) for shape in SHAPES]


# Those that are exact in the cells' own class; bfloat16 products of a bfloat16 table are shown, too.
_PEERS = [peer for peer in PEERS if peer.exact or peer.dtype == "bf16"]
_experience = Experience()


@functools.lru_cache(maxsize=1)
def _table(dtype: str, r: int, rows: int) -> Table:
    return Table(make_table(Cell(dtype, r, 1, 1, 1, rows)))


@functools.lru_cache(maxsize=1)
def _oracle(cell: Cell) -> Tensor:
    """Of the cell with k = 0: the same for all k."""
    items = _table(cell.dtype, cell.r, cell.N).items
    return testing.full_scores(make_queries(cell, items), items)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_scan(cell: Cell, benchmark: Any, record: Any, request: pytest.FixtureRequest) -> None:
    cell = cell._replace(N=request.config.getoption("rows"))
    table = _table(cell.dtype, cell.r, cell.N)
    items, queries = table.items, make_queries(cell, table.items)
    call = functools.partial(urm_kernels.score_topk, queries, items, cell.k)
    with testing.peak_extra_memory() as peak:
        first, result = timed(call)
    testing.compare_topk(result, _oracle(cell._replace(k=0)), tolerance=tolerance(queries, items))

    contest = Contest(cell, table, queries, result, _experience, _PEERS)
    bandwidth, rate = [], []

    def turn() -> None:
        contest.turn()
        time.sleep(PAUSE)
        rate.append(testing.fma_rate(rounds=1))
        bandwidth.append(testing.read_bandwidth(rounds=1))

    benchmark.pedantic(call, setup=turn, rounds=max(3, rounds_for(first)), iterations=1)
    seconds = _median(benchmark, first)
    beside = figures(cell, items, seconds, statistics.median(bandwidth), statistics.median(rate))
    summary = contest.summary(seconds * 1e3)
    found = {**beside, "extra_bytes": peak.bytes, **summary}
    record(found | verdict(SCAN_BARS.get((cell.dtype, cell.B, cell.M), {}), found))


def _median(benchmark: Any, otherwise: float) -> float:
    """Of the rounds; under --benchmark-disable there are none."""
    return benchmark.stats.stats.median if benchmark.stats else otherwise


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_k_costs_little(dtype: str, benchmark: Any, record: Any, request: pytest.FixtureRequest) -> None:
    rows = request.config.getoption("rows")
    items = _table(dtype, 128, rows).items
    queries = testing.make_queries("decay", 1, 8, 128, seed=1, items=items)
    many, few = (functools.partial(urm_kernels.score_topk, queries, items, k) for k in (1000, 10))
    oracle = testing.full_scores(queries, items)
    for call in (many, few):
        testing.compare_topk(call(), oracle, tolerance=tolerance(queries, items))
    few_seconds: list[float] = []

    def turn() -> None:
        few_seconds.append(timed(few)[0])

    benchmark.pedantic(many, setup=turn, rounds=15, iterations=1)
    seconds, short = _median(benchmark, timed(many)[0]), statistics.median(few_seconds)
    record(
        {
            "cell": f"{dtype} r=128 B=1 M=8 k=1000 over k=10",
            "N": rows,
            "ms": round(seconds * 1e3, 3),
            "k10_ms": round(short * 1e3, 3),
            "ratio": round(seconds / short, 3),
            "bar": f"<= {BARS['k=1000 over k=10']:g}x, is {seconds / short:.2f}x",
            "met": seconds / short <= BARS["k=1000 over k=10"],
        }
    )


def test_small_call(benchmark: Any, record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole call, and what of it is ours in Python: score_topk with the op (dispatcher and backend) taken out."""
    items = testing.make_items("decay", 1000, 64, seed=0)
    queries = testing.make_queries("decay", 1, 1, 64, seed=1, items=items)
    call = functools.partial(urm_kernels.score_topk, queries, items, 10)
    result = call()
    testing.compare_topk(result, testing.full_scores(queries, items), tolerance=tolerance(queries, items))

    def plain_torch() -> Any:
        return torch.topk((queries @ items.T).amax(1), 10)

    table = Serving(items)

    def op_alone() -> Any:
        return scoring.ops.score_topk(queries, *table, 10, None, "max", None, None, True, False, 1.0, "")

    calls: dict[str, Call] = {"whole": call, "op": op_alone, "torch": plain_torch}
    micros: dict[str, list[float]] = {name: [] for name in (*calls, "checks")}

    def turn() -> None:
        for name, one in calls.items():
            time.sleep(PAUSE)
            micros[name].append(_micros(one))
        with monkeypatch.context() as patch:
            patch.setattr(scoring.ops, "score_topk", lambda *_, **__: (result.scores, result.ids))
            micros["checks"].append(_micros(call))

    benchmark.pedantic(call, setup=turn, rounds=9, iterations=1)
    whole, op, peer, checks = (statistics.median(micros[name]) for name in ("whole", "op", "torch", "checks"))
    bars = BARS["small call, us"], BARS["small call, Python checks, us"]
    common = {"N": 1000, "best_peer": "torch matmul, amax, topk", "best_peer_ms": peer / 1e3, "faster_by": peer / whole}
    record(
        {
            "cell": "small call: N=1000 r=64 B=M=1 k=10",
            "ms": whole / 1e3,
            "op_and_backend_us": op,
            **common,
            "bar": f"<= {bars[0]:g} us",
            "met": whole <= bars[0],
        }
    )
    record(
        {
            "cell": "small call: Python above the op alone",
            "ms": checks / 1e3,
            "share_of_whole": checks / whole,
            "bar": f"<= {bars[1]:g} us",
            "met": checks <= bars[1],
        }
    )


def _micros(call: Call, calls: int = 300) -> float:
    return timeit.timeit(call, number=calls) / calls * 1e6


_IMPORT = "import time, torch; began = time.perf_counter(); import urm_kernels; print(time.perf_counter() - began)"


def test_import_time(benchmark: Any, record: Any) -> None:
    """What importing urm_kernels adds once torch is there; each in a process of its own."""
    seconds: list[float] = []

    def once() -> None:
        run = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, timeout=120, check=True)
        seconds.append(float(run.stdout))

    benchmark.pedantic(once, rounds=5, iterations=1, warmup_rounds=1)
    median = statistics.median(seconds[-5:])
    bar = BARS["import, s"]
    record({"cell": "import after torch", "ms": median * 1e3, "bar": f"<= {bar:g} s", "met": median <= bar})


# In a fresh process: memory that an allocator kept from earlier cells would hide what the call takes.
_MEMORY = """
import sys, torch, urm_kernels
from urm_kernels import testing
rows, r = int(sys.argv[1]), int(sys.argv[2])
items = testing.make_items("decay", rows, r, seed=0)
queries = testing.make_queries("decay", 8, 8, r, seed=1, items=items)
urm_kernels.score_topk(queries[:1], items[:1000], 10)
with testing.peak_extra_memory() as peak:
    scores, ids = urm_kernels.score_topk(queries, items, 1000)
assert torch.equal(scores.sort(1, descending=True).values, scores), "scores are not in order"
dots = torch.einsum("bmr,bkr->bmk", queries.double(), items[ids].double()).amax(1)
assert torch.allclose(dots, scores.double(), rtol=1e-5, atol=1e-5), "scores are wrong"
print(peak.bytes)
"""


@pytest.mark.memory
def test_extra_memory(benchmark: Any, record: Any, request: pytest.FixtureRequest) -> None:
    rows, r = 10 * request.config.getoption("rows"), 32
    peaks: list[str] = []

    def once() -> None:
        command = [sys.executable, "-c", _MEMORY, str(rows), str(r)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        peaks.append(run.stdout.strip())

    benchmark.pedantic(once, rounds=1, iterations=1)
    extra = None if peaks[0] == "None" else int(peaks[0])
    bar = BARS["extra MiB at N=1e7"]
    record(
        {
            "cell": f"extra memory: N={rows:.0e} r={r} B=8 M=8 k=1000",
            "extra_bytes": extra,
            "bar": f"< {bar:g} MiB",
            "met": None if extra is None else extra < bar * 2**20,
        }
    )
