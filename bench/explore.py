"""explore_topk beside the full scan: agreement, rows scored and time after each round, as URM's paper reports them.

    python3 bench/explore.py [--data KIND ...] [--rows N] [--graph NAME ...] [--k K] [--users B] [--results PATH]

Writes a JSON file. The graph "hnsw" takes the links of an index of faiss over rows of length one, which is built in
minutes at a million rows; "ivf" takes nearly the nearest rows by direction, by an inverted file of faiss, in minutes
as well. "cosine", "euclidean", "inner", with "/1" behind them for one level, are exact neighbours by
NeighborGraph.build, which compares every row with every other; a file that NeighborGraph.save wrote is taken as well.
The data kind smollm2 needs the file that `python -m urm_kernels.testing.vocabularies` writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import grid  # noqa: F401  first: it takes away what would slow numpy and faiss
import torch
from torch import Tensor

from urm_kernels import ItemTable, NeighborGraph, explore_topk, graph_build, score_topk, testing
from urm_kernels.bench import machine
from urm_kernels.bench.turns import in_turns, timed

RESULTS = Path(__file__).parent / "results" / "explore_cpu.json"
R, QUERIES = 64, 8
ROUNDS = (1, 2, 3, 4, 6)
_LINKS, _CONSTRUCTION = 16, 40  # of the HNSW index; level 0 has twice as many
_DEGREE, _PROBED = 32, 10
_TURNS = 7


def graph_of(name: str, items: Tensor) -> tuple[float, NeighborGraph]:
    """(seconds it took, graph)."""
    metric, _, levels = name.partition("/")
    if name == "hnsw":
        return timed(lambda: _hnsw(items))
    if metric == "ivf":
        return timed(lambda: _ivf(items, int(levels or 2)))
    if metric in graph_build.METRICS:
        return timed(lambda: NeighborGraph.build(items, metric=metric, levels=int(levels or 2)))
    return timed(lambda: NeighborGraph.load(name))


def _hnsw(items: Tensor) -> NeighborGraph:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexHNSWFlat(items.shape[1], _LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = _CONSTRUCTION
    index.add(torch.nn.functional.normalize(items).numpy())
    return NeighborGraph.from_faiss(index)


def _ivf(items: Tensor, levels: int) -> NeighborGraph:
    """What NeighborGraph.build finds for cosines, but for some rows that lie in lists not looked at."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    units = torch.nn.functional.normalize(items).numpy()
    rows, width = units.shape
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    found = []
    for level, share in enumerate(graph_build.shares(_DEGREE, levels)):
        members = order[: rows // 16**level].sort().values
        index = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(width), width, 2 * int(len(members) ** 0.5), faiss.METRIC_INNER_PRODUCT
        )
        index.cp.niter = 4
        index.train(units[members])
        index.add(units[members])
        index.nprobe = _PROBED
        _, near = index.search(units, share + 1)
        near = members[torch.from_numpy(near).clamp(min=0)]
        other = near != torch.arange(rows)[:, None]
        other[other.all(1), -1] = False
        found.append(near[other].view(rows, share))
    return NeighborGraph(torch.cat(found, 1).int())


def agreement(found: Tensor, wanted: Tensor) -> Tensor:
    """[B] shares of the wanted ids."""
    pairs = zip(found, wanted, strict=True)
    return torch.stack([torch.isin(theirs, ours).double().mean() for ours, theirs in pairs])


def measure(data: str, rows: int, k: int, users: int, how: str) -> dict[str, Any]:
    items = testing.make_items(data, rows, R, seed=0)
    queries = testing.make_queries(data, users, QUERIES, R, 1, items)
    seconds, graph = graph_of(how, items)
    packed = ItemTable(items).pack()
    wanted = score_topk(queries, items, k).ids
    found: list[dict[str, Any]] = []
    calls = {
        "score_topk": lambda: score_topk(queries[:1], items, k),
        "score_topk, packed": lambda: score_topk(queries[:1], packed, k),
    }
    for rounds in ROUNDS:
        result, stats = explore_topk(queries, items, graph, k, rounds=rounds, seed=1, return_stats=True)
        shares, scored = agreement(result.ids, wanted), stats.scored.double().mean(1)
        found.append(
            {
                "rounds": rounds,
                "agreement": round(float(shares.mean()), 4),
                "least_agreement": round(float(shares.min()), 4),
                "rows_of_rounds": [round(count) for count in scored.tolist()],
                "share_scored": round(float(scored.sum()) / rows, 5),
            }
        )
        calls[f"{rounds} rounds"] = lambda rounds=rounds: explore_topk(
            queries[:1], items, graph, k, rounds=rounds, seed=1
        )
    spreads = {name: spread.milliseconds() for name, spread in in_turns(calls, _TURNS).items()}
    for each in found:
        each |= spreads[f"{each['rounds']} rounds"]
    neighbors = float((graph.neighbors >= 0).double().sum(1).mean())
    return {
        "data": data,
        "N": rows,
        "r": R,
        "M": QUERIES,
        "k": k,
        "users": users,
        "graph": {"kind": Path(how).stem if Path(how).exists() else how, "degree": graph.degree, "mean": neighbors},
        "graph_seconds": round(seconds, 1),
        "one_user": {name: spreads[name] for name in ("score_topk", "score_topk, packed")},
        "walks": found,
    }


def _say(cell: dict[str, Any]) -> None:
    graph = cell["graph"]
    print(f"{cell['data']}, N={cell['N']:,}, r={R}, M={QUERIES}, k={cell['k']}: mean of {cell['users']} users")
    print(f"  graph: {graph['kind']}, {graph['mean']:.1f} neighbours a row, {cell['graph_seconds']:.0f} s")
    for name, spread in cell["one_user"].items():
        print(f"  {name}, one user: {spread['ms']:.1f} ms, exact")
    for walk in cell["walks"]:
        rows = " + ".join(f"{count:,}" for count in walk["rows_of_rounds"])
        print(
            f"  {walk['rounds']} rounds: agreement {walk['agreement']:.1%} (least {walk['least_agreement']:.1%}), "
            f"{walk['share_scored']:.2%} of the rows ({rows}), one user {walk['ms']:.1f} ms"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["smollm2", "clustered"])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--graph", nargs="+", default=["hnsw"])
    parser.add_argument("--k", type=int, default=1000)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    cells = []
    for data in asked.data:
        try:
            testing.make_items(data, 1, R, seed=0)
        except ValueError as missing:
            print(f"{data} is not measured: {missing}", file=sys.stderr)
            continue
        for graph in asked.graph:
            cells.append(measure(data, asked.rows, asked.k, asked.users, graph))
            _say(cells[-1])
    taken = {"machine": machine.machine(), "cells": cells}
    asked.results.write_text(json.dumps(taken, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
