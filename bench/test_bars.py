"""Bars of tables that load, change and are read meanwhile, of score_candidates and of log_partition; `make bench`.

As in test_latency.py: checked against float64 (or the table in memory, bit for bit) before anything is timed, in turns
with what stands beside it, medians; a wrong result fails the run, a missed bar is shown as missed and does not.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bars import line
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import urm_kernels
from urm_kernels import ItemTable, testing
from urm_kernels.bench import check, in_turns, timed, tolerance
from urm_kernels.bench.peers import CHUNKS
from urm_kernels.bench.turns import Call, Spread

RESULTS = "tables_cpu.json"

BARS = {
    "load, ms": 50.0,
    "update, ms": 5.0,
    "readers slower by": 1.15,
    "candidates, times faster": 3.0,
    "log_partition, times faster": 2.0,
    "log_partition, MiB": 32.0,
    "gradient error over torch's": 2.0,
}
_ROUNDS = 7
_SETS = 97  # of candidates: 400 MB of rows
_UPDATED, _PERIOD = 1000, 0.01  # rows of an update, seconds from one to the next
_VERSIONS = 8
_LEAST_ERROR = 2.0**-24  # of the largest gradient; below it a ratio of errors says nothing


@pytest.mark.memory
def test_load(large_file: Path, benchmark: Any, record: Any) -> None:
    """From the file to the start of the first call: nothing of the rows is read before."""
    path, loaded = large_file, ItemTable.load(large_file)
    count, r = loaded.factors.shape
    queries = testing.make_queries("decay", 1, 8, r, seed=1, items=loaded.factors)
    in_memory = ItemTable.load(path, mmap=False)
    wanted = urm_kernels.score_topk(queries, in_memory, 100)
    check([wanted], queries, in_memory.factors)
    del in_memory
    assert all(map(torch.equal, urm_kernels.score_topk(queries, loaded, 100), wanted))
    spreads = in_turns(
        {"load": lambda: ItemTable.load(path), "read the file": path.read_bytes}, {"load": 15, "read the file": 1}
    )
    ours = spreads.pop("load")
    benchmark.pedantic(ItemTable.load, (path,), rounds=1)
    bar = BARS["load, ms"]
    gib = path.stat().st_size / 2**30
    name = f"load, mapped: bf16 N={count:.0e} r={r}, {gib:.1f} GiB"
    record(line(name, ours, spreads, f"< {bar:g} ms", ours.median * 1e3 < bar))


def _versions(items: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(random rows, new factors for them, several times): twice as long as others, so that most of the best are new."""
    random = torch.Generator().manual_seed(2)
    chosen = torch.randperm(len(items), generator=random)[:_UPDATED]
    r = items.shape[1]
    return chosen, [2 * testing.make_items("decay", len(chosen), r, seed=10 + v) for v in range(_VERSIONS)]


def test_update(rows: int, benchmark: Any, record: Any) -> None:
    items = testing.make_items("decay", rows, 128, seed=0)
    queries = testing.make_queries("decay", 1, 8, 128, seed=1, items=items)
    chosen, versions = _versions(items)
    table, plain = ItemTable(items.clone()), items.clone()
    turn = iter(range(10**9))
    for new in versions:
        table.update(chosen, new)
        items[chosen] = new
        assert torch.equal(table.factors, items)
    check([urm_kernels.score_topk(queries, table, 100)], queries, items)

    def update() -> None:
        table.update(chosen, versions[next(turn) % _VERSIONS])

    def assign() -> None:
        plain[chosen] = versions[next(turn) % _VERSIONS]

    spreads = in_turns({"update": update, "factors[rows] = new": assign}, 31)
    benchmark.pedantic(update, rounds=5)
    ours, bar = spreads.pop("update"), BARS["update, ms"]
    name = f"update of {len(chosen)} random rows: fp32 N={rows:.0e} r=128"
    record(line(name, ours, spreads, f"< {bar:g} ms", ours.median * 1e3 < bar))


@contextmanager
def _writer(table: ItemTable, chosen: Tensor, versions: list[Tensor], done: list[float]) -> Iterator[None]:
    """Another thread updates every `_PERIOD` seconds, and notes when it did."""
    stop = threading.Event()
    problems: list[BaseException] = []

    def write() -> None:
        due = time.perf_counter()
        try:
            while not stop.is_set():
                table.update(chosen, versions[len(done) % _VERSIONS])
                done.append(time.perf_counter())
                due = max(due + _PERIOD, time.perf_counter())  # what was missed is not made up for
                stop.wait(due - time.perf_counter())
        except BaseException as problem:  # for the thread that waits
            problems.append(problem)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if problems:
        raise problems[0]


def test_read_while_written(rows: int, benchmark: Any, record: Any) -> None:
    """Each result is, bit for bit, that of one whole version of the rows: an update seen in part would be none."""
    items = testing.make_items("decay", rows, 128, seed=0)
    queries = testing.make_queries("decay", 1, 8, 128, seed=1, items=items)
    chosen, versions = _versions(items)
    table = ItemTable(items)
    call = functools.partial(urm_kernels.score_topk, queries, table, 100)
    allowed = []
    for new in versions:
        table.update(chosen, new)
        allowed.append(call())
    check(allowed[-1:], queries, table.factors)

    alone: list[float] = []
    beside: list[float] = []
    found: list[Any] = []
    updates: list[float] = []
    writing = 0.0
    call()
    for _ in range(6):
        alone += [timed(call)[0] for _ in range(15)]
        before = len(updates)
        with _writer(table, chosen, versions, updates):
            began = time.perf_counter()
            while len(updates) == before:  # the writer's thread has started
                time.sleep(0.001)
            for _ in range(15):
                seconds, result = timed(call)
                beside.append(seconds)
                found.append(result)
            writing += time.perf_counter() - began
    torn = [one for one in found if not any(all(map(torch.equal, one, whole)) for whole in allowed)]
    assert not torn, f"{len(torn)} of {len(found)} results are of no whole version of the table"
    benchmark.pedantic(call, rounds=3)
    median, quiet = statistics.median(beside), statistics.median(alone)
    slower, bar = median / quiet, BARS["readers slower by"]
    record(
        {
            "cell": f"read while written: fp32 N={rows:.0e} r=128 B=1 M=8 k=100",
            "ms": round(median * 1e3, 3),
            "low_ms": round(min(beside) * 1e3, 3),
            "high_ms": round(max(beside) * 1e3, 3),
            "beside_ms": {"nobody writing": round(quiet * 1e3, 3)},
            "updates_per_s": round(len(updates) / writing, 1),
            "bar": f"<= {bar:g}x of nobody writing, is {slower:.2f}x",
            "met": slower <= bar,
        }
    )


def test_candidates(rows: int, benchmark: Any, record: Any) -> None:
    count = min(1000, rows)
    items = testing.make_items("decay", rows, 128, seed=0)
    queries = testing.make_queries("decay", 8, 8, 128, seed=1, items=items)
    # Every call has candidates of its own, as in use: rows that no cache holds.
    generator = torch.Generator().manual_seed(3)
    sets = itertools.cycle([torch.randint(rows, (8, count), generator=generator) for _ in range(_SETS)])

    def plain(candidates: Tensor) -> Tensor:
        chosen = items.index_select(0, candidates.flatten()).view(8, count, -1)
        return torch.einsum("bmr,bcr->bmc", queries, chosen).amax(1)

    read_alone: list[float] = []  # seconds of the threads alone: no Python, no op

    def read(candidates: Tensor) -> None:
        rate = testing.gather_bandwidth(items, candidates.flatten(), rounds=1)
        read_alone.append(candidates.numel() * items[0].nbytes / rate)

    calls: dict[str, Callable[[Tensor], Any]] = {
        "ours": lambda candidates: urm_kernels.score_candidates(queries, items, candidates),
        "index_select, einsum, amax": plain,
        "index_select alone": lambda candidates: items.index_select(0, candidates.flatten()),
        "rows read alone": read,
    }
    candidates = next(sets)
    exact = torch.einsum("bmr,bcr->bmc", queries.double(), items[candidates].double()).amax(1)
    slack = tolerance(queries, items)
    for name in ("ours", "index_select, einsum, amax"):
        assert float((calls[name](candidates).double() - exact).abs().max()) <= 4 * slack, f"scores of {name} are wrong"
    spreads = in_turns({name: (lambda call=call: call(next(sets))) for name, call in calls.items()}, 31)
    spreads["rows read alone"] = Spread.of(read_alone[1:])
    benchmark.pedantic(lambda: calls["ours"](next(sets)), rounds=5)
    ours = spreads.pop("ours")
    ratio, bar = spreads["index_select, einsum, amax"].median / ours.median, BARS["candidates, times faster"]
    name = f"score_candidates: fp32 N={rows:.0e} r=128 B=8 M=8 C={count}"
    record(line(name, ours, spreads, f">= {bar:g}x torch, is {ratio:.2f}x", ratio >= bar, faster_by=round(ratio, 3)))


def chunked_partition(queries: Tensor, items: Tensor, chunk: int | None, again: bool = False) -> Tensor:
    """logsumexp over chunks of their logsumexps; again: a chunk's dots are computed again in backward."""
    chunk = chunk or len(items)

    def of_chunk(part: Tensor) -> Tensor:
        return (queries.flatten(0, 1) @ part.T).view(*queries.shape[:2], -1).amax(1).logsumexp(1)

    parts = [
        checkpoint(of_chunk, items[first : first + chunk], use_reentrant=False)
        if again
        else of_chunk(items[first : first + chunk])
        for first in range(0, len(items), chunk)
    ]
    return torch.stack(parts).logsumexp(0)


def products_alone(queries: Tensor, items: Tensor, chunk: int = 8192) -> None:
    """What torch cannot do without, into memory that it has already."""
    flat = queries.flatten(0, 1)
    room = torch.empty(len(flat) * chunk)
    for first in range(0, len(items), chunk):
        part = items[first : first + chunk]
        torch.mm(flat, part.T, out=room[: len(flat) * len(part)].view(len(flat), len(part)))


@pytest.mark.parametrize("data", ["decay", "iid", "clustered"])
def test_log_partition(data: str, rows: int, benchmark: Any, record: Any) -> None:
    items = testing.make_items(data, rows, 128, seed=0)
    queries = testing.make_queries(data, 64, 8, 128, seed=1, items=items)
    call = functools.partial(urm_kernels.log_partition, queries, items)
    with testing.peak_extra_memory() as peak:
        result = call()
    exact = torch.cat([testing.full_scores(part, items).logsumexp(1) for part in queries.split(8)])
    error = float((result.double() - exact).abs().max())
    allowed = 2e-6 * max(1.0, float(exact.abs().max())) + tolerance(queries, items)
    assert error <= allowed, f"{error:.3g} from float64, {allowed:.3g} is allowed"

    ways: dict[str, Call] = {}
    for chunk in CHUNKS:
        ways[f"torch chunks of {chunk or 'N'}"] = functools.partial(chunked_partition, queries, items, chunk)
    best = min(ways, key=lambda name: min(timed(ways[name])[0] for _ in range(2)))
    products = functools.partial(products_alone, queries, items)
    spreads = in_turns({"ours": call, best: ways[best], "products alone": products}, _ROUNDS)
    benchmark.pedantic(call, rounds=1)
    ours = spreads.pop("ours")
    ratio, megabytes = spreads[best].median / ours.median, None if peak.bytes is None else peak.bytes / 2**20
    bars = BARS["log_partition, times faster"], BARS["log_partition, MiB"]
    there = f"is {ratio:.2f}x, {'unknown' if megabytes is None else f'{megabytes:.1f}'} MiB"
    met = ratio >= bars[0] and (megabytes is None or megabytes < bars[1])
    bar = f">= {bars[0]:g}x torch, < {bars[1]:g} MiB, {there}"
    more = {"faster_by": round(ratio, 3), "extra_bytes": peak.bytes, "error": error}
    record(line(f"log_partition: {data} fp32 N={rows:.0e} r=128 B=64 M=8", ours, spreads, bar, met, **more))


def test_log_partition_gradients(rows: int, benchmark: Any, record: Any) -> None:
    """Forward and backward of the sum; torch computes the dots of a chunk again in backward, as we do."""
    count = max(1, rows * 3 // 10)
    items = testing.make_items("decay", count, 128, seed=0)
    queries = testing.make_queries("decay", 64, 8, 128, seed=1, items=items)

    def gradients(way: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (queries, items)]
        return torch.autograd.grad(way(*leaves).sum(), leaves)

    chunked = [functools.partial(chunked_partition, chunk=chunk, again=True) for chunk in CHUNKS]
    torch_way = min(chunked, key=lambda way: timed(lambda: gradients(way))[0])
    exact = gradients(functools.partial(chunked_partition, chunk=8192, again=True), torch.float64)
    errors = {}
    for name, way in (("ours", urm_kernels.log_partition), ("torch", torch_way)):
        errors[name] = [
            float((one.double() - true).abs().max() / true.abs().max())
            for one, true in zip(gradients(way), exact, strict=True)
        ]
    bar = BARS["gradient error over torch's"]
    ratios = [ours / max(theirs, _LEAST_ERROR) for ours, theirs in zip(errors["ours"], errors["torch"], strict=True)]
    assert max(errors["ours"]) < 1e-3, f"gradients are wrong: relative errors {errors['ours']}"
    calls = {"ours": lambda: gradients(urm_kernels.log_partition), "torch": lambda: gradients(torch_way)}
    spreads = in_turns(calls, 5)
    benchmark.pedantic(calls["ours"], rounds=1)
    ours = spreads.pop("ours")
    words = f"errors <= {bar:g}x torch's, are {ratios[0]:.2f}x (queries), {ratios[1]:.2f}x (items)"
    more = {"faster_by": round(spreads["torch"].median / ours.median, 3), "errors": errors}
    name = f"log_partition, forward and backward: decay fp32 N={count:.0e} r=128 B=64 M=8"
    record(line(name, ours, spreads, words, max(ratios) <= bar, **more))
