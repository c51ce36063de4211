"""One cell: its result checked against float64, then timed in turns with peers and ceilings."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import scoring, testing
from ..scoring import TopK
from .cells import Cell
from .contest import Contest, Experience, Table
from .peers import PEERS, Peer
from .turns import PAUSE, Call, Spread, rounds_for, timed

_ORACLE_BYTES = 512 << 20  # of float64 scores held at a time


def tolerance(queries: Tensor, items: Tensor, reduce: str = "max") -> float:
    """Of a canonical dot, from the largest lengths; `testing.score_tolerance` row by row would double the wait."""
    lengths = torch.linalg.vector_norm(queries, dim=2, dtype=torch.float32)
    # Where queries are added their sum rounds too; a logarithm adds a few units in the last place of the score.
    length = lengths.sum(1).max() if reduce in ("sum", "mean") else lengths.max()
    longest = torch.linalg.vector_norm(items, dim=1, dtype=torch.float32).max() * length
    extra = queries.shape[1] + 8 if reduce != "max" else 0
    return float(longest) * (queries.shape[2] / 16 + 6 + extra) * 2.0**-24 + (2.0**-20 if reduce == "logsumexp" else 0)


def check(results: Iterable[TopK], queries: Tensor, items: Tensor, reduce: str = "max") -> None:
    """Raises AssertionError where a result for these queries is not the top k; some users at a time, to save memory."""
    results, slack = list(results), tolerance(queries, items, reduce)
    users = max(1, _ORACLE_BYTES // (8 * max(1, items.shape[0])))
    for first in range(0, queries.shape[0], users):
        part = slice(first, first + users)
        oracle = testing.full_scores(queries[part], items, reduce=reduce)
        for scores, ids in results:
            testing.compare_topk(TopK(scores[part], ids[part]), oracle, tolerance=slack)


def figures(cell: Cell, items: Tensor, seconds: float, read_ceiling: float, fma: float) -> dict[str, Any]:
    """A cell's time beside what the machine could do: bytes and float32 operations a second."""
    size = items.numel() * items.element_size()
    count = 1 if cell.reduce in ("sum", "mean") else cell.M
    operations = 2.0 * cell.B * count * items.numel()
    return {
        "cell": str(cell),
        "N": cell.N,
        "ms": round(seconds * 1e3, 3),
        "gb_per_s": round(size / seconds / 1e9, 2),
        "read_ceiling_gb_per_s": round(read_ceiling / 1e9, 2),
        "of_read_bandwidth": round(size / seconds / read_ceiling, 3),
        "gflop_per_s": round(operations / seconds / 1e9, 2),
        "fma_ceiling_gflop_per_s": round(fma / 1e9, 2),
        "of_fma_rate": round(operations / seconds / fma, 3),
    }


def run(cell: Cell, table: Table, queries: Tensor) -> tuple[TopK, int | None]:
    """(our result, the peak of memory beyond what was there)."""
    with testing.peak_extra_memory() as peak:
        result = scoring.score_topk(queries, table.items, cell.k, reduce=cell.reduce)
    return result, peak.bytes


def with_peers(
    contest: Contest, calls: Mapping[str, Call], ceilings: Sequence[str] = ("fma_rate", "read_bandwidth")
) -> tuple[dict[str, Spread], dict[str, float]]:
    """(our calls, medians of what `testing` measures by these names), in turns with the peers of the contest."""
    rounds = max(3, rounds_for(max(timed(call)[0] for call in calls.values())))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    found: dict[str, list[float]] = {name: [] for name in ceilings}
    more = True
    while more:
        for _ in range(rounds):
            contest.turn()
            time.sleep(PAUSE)
            for name in ceilings:
                found[name].append(getattr(testing, name)(rounds=1))
            for name, call in calls.items():
                seconds[name].append(timed(call)[0])
        more = contest.next_group()
    spreads = {name: Spread.of(each) for name, each in seconds.items()}
    return spreads, {name: statistics.median(each) for name, each in found.items()}


def measure(
    cell: Cell,
    table: Table,
    queries: Tensor,
    result: TopK,
    extra_bytes: int | None,
    experience: Experience,
    peers: Sequence[Peer] = PEERS,
) -> dict[str, Any]:
    """The record of a cell whose result has been checked."""
    call = functools.partial(scoring.score_topk, queries, table.items, cell.k, reduce=cell.reduce)
    contest = Contest(cell, table, queries, result, experience, peers)
    spreads, ceilings = with_peers(contest, {"ours": call})
    spread = spreads["ours"]
    beside = figures(cell, table.items, spread.median, ceilings["read_bandwidth"], ceilings["fma_rate"])
    return {
        **beside,
        **spread.milliseconds(),
        "rounds": spread.rounds,
        "extra_bytes": extra_bytes,
        **contest.summary(spread.median * 1e3),
        "checked": "against float64",
    }
