"""Approximate nearest neighbour libraries beside exact calls: recall against milliseconds; `make bench-peers`.

    python3 bench/peers.py [--data KIND ...] [--rows N] [--k K] [--only NAME ...] [--indexes FOLDER] [--build]
                           [--results PATH]

Users have M queries, a row's score is the largest of M inner products, and recall is the mean share of the exact k best
rows that was found. Every peer is called with each setting of its knobs. Ours are compared with the plain scan bit by
bit, and a difference ends the run, before anything is timed. Indexes are kept in a folder with the seconds that
building took, and are built once. The JSON keeps what earlier runs found for other kinds of data.
The data kind smollm2 needs the file that `python -m urm_kernels.testing.vocabularies` writes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import explore  # first: it takes away what would slow numpy and faiss
import torch
from approximate_peers import PEERS, ApproximatePeer, Search, Setting
from torch import Tensor

from urm_kernels import ItemTable, score_topk, testing
from urm_kernels.bench import machine
from urm_kernels.bench.peers import SkipError
from urm_kernels.bench.turns import PAUSE, Spread, timed
from urm_kernels.progress import progress_of

_ROOT = Path(__file__).parents[1]
RESULTS = _ROOT / "bench" / "results" / "peers_cpu.json"
INDEXES = _ROOT / ".cache" / "peers"
KINDS = ("clustered", "decay", "iid", "smollm2")
R = 64
SHAPES = ((1, 1), (1, 8), (8, 8))
TARGETS = (0.95, 0.99)

_USERS = 64  # whose mean is the recall
_BATCHES = {1: 16, 8: 4}  # timed batches by their users
_TURNS = 3
_ENOUGH = 0.9995  # recall above which higher knobs only cost time


class Way(NamedTuple):
    """One line of a figure: a peer with one setting, or an exact call; `at` makes the search right before its calls."""

    name: str
    setting: Setting
    recall: float
    at: Any


def built(peer: ApproximatePeer, rows: Tensor, folder: Path) -> dict[str, float]:
    """What building took and what the index takes; built unless the folder has it."""
    record = folder / "build.json"
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)
        seconds, index = timed(lambda: peer.build(rows))
        folder.mkdir(parents=True)
        peer.save(index, folder)
        held = sum(file.stat().st_size for file in folder.rglob("*"))
        held += rows.nbytes if peer.reads_rows else 0
        record.write_text(json.dumps({"build_s": round(seconds, 2), "bytes_a_row": round(held / len(rows), 1)}))
    return json.loads(record.read_text())


def needless(setting: Setting, found: Sequence[tuple[Setting, float]]) -> bool:
    """Whether all of its knobs are at least those of a setting that found nearly everything."""
    return any(
        recall >= _ENOUGH and all(setting[knob] >= value for knob, value in other.items()) for other, recall in found
    )


def swept(peer: ApproximatePeer, index: Any, queries: Tensor, k: int, wanted: Tensor) -> list[Way]:
    """The peer's settings, each with its recall of all users; none that only cost time."""
    found: list[tuple[Setting, float]] = []
    for setting in peer.settings:
        if not needless(setting, found):
            recall = float(explore.agreement(peer.at(index, setting)(queries, k).ids, wanted).mean())
            found.append((setting, recall))
    return [Way(peer.name, setting, recall, lambda s=setting: peer.at(index, s)) for setting, recall in found]


class Ours(NamedTuple):
    name: str
    table: ItemTable
    recall: float
    build_s: float

    def search(self, queries: Tensor, k: int) -> Any:
        return score_topk(queries, self.table, k, recall=self.recall)

    def way(self, queries: Tensor, k: int, wanted: Any) -> Way:
        found = self.search(queries, k)
        if self.recall == 1 and not (torch.equal(found.ids, wanted.ids) and torch.equal(found.scores, wanted.scores)):
            raise SystemExit(f"{self.name} differs from the plain scan: nothing is timed")
        return Way(self.name, {}, float(explore.agreement(found.ids, wanted.ids).mean()), lambda: self.search)


def our_tables(items: Tensor) -> list[Ours]:
    tables = [Ours("plain", ItemTable(items), 1.0, 0.0)]
    for name, codes, blocks, recall in (
        ("packed", ("int4",), False, 1.0),
        ("packed int8", ("int8",), False, 1.0),
        ("packed in blocks", ("int4",), True, 1.0),
        ("recall=.99", ("int2", "int4"), False, 0.99),
    ):
        seconds, table = timed(lambda c=codes, b=blocks: ItemTable(items).pack(c, blocks=b))
        tables.append(Ours(name, table, recall, round(seconds, 2)))
    return tables


def in_bursts(ways: Sequence[Way], batches: Sequence[Tensor], k: int) -> list[Spread]:
    """Seconds a batch of each way.

    Ways take turns, and in a turn a way answers all batches one after another, as a server would: its index is as warm
    as its own calls keep it. The first batch of a turn meets the other ways' data in the caches and is not counted.
    """
    seconds: list[list[float]] = [[] for _ in ways]
    with progress_of("timed", _TURNS * len(ways), None, unit="setting") as progress:
        for _ in range(_TURNS):
            for way, taken in zip(ways, seconds, strict=True):
                search: Search = way.at()
                time.sleep(PAUSE)
                search(batches[0], k)
                taken += [timed(lambda q=queries, s=search: s(q, k))[0] for queries in batches[1:]]
                progress.more(1)
    return [Spread.of(taken) for taken in seconds]


def measured(data: str, rows: int, k: int, peers: Sequence[ApproximatePeer], folder: Path) -> dict[str, Any]:
    items = testing.make_items(data, rows, R, seed=0)
    builds, left_out, indexes = {}, {}, []
    for peer in peers:
        place = folder / f"{data}_{rows}" / peer.name.replace(" ", "_")
        try:
            builds[peer.name] = built(peer, items, place)
            indexes.append((peer, peer.load(place, items)))
        except SkipError as reason:
            left_out[peer.name] = str(reason)
    ours = our_tables(items)
    for each in ours:
        builds[each.name] = {"build_s": each.build_s, "bytes_a_row": round(each.table.memory()["total"] / rows, 1)}
    ways: dict[int, list[Way]] = {}
    asked = {}
    for count in sorted({count for _, count in SHAPES}):
        queries = asked[count] = testing.make_queries(data, _USERS, count, R, 1, items)
        wanted = score_topk(queries, items, k)
        ways[count] = [each.way(queries, k, wanted) for each in ours]
        with progress_of(f"recall, M = {count}", len(indexes), None, unit="peer") as progress:
            for peer, index in indexes:
                ways[count] += swept(peer, index, queries, k, wanted.ids)
                progress.more(1)
    cells = []
    for users, count in SHAPES:
        batches = asked[count].split(users)[: _BATCHES[users]]
        cells.append({"B": users, "M": count, "ways": []})
        for way, spread in zip(ways[count], in_bursts(ways[count], batches, k), strict=True):
            record = {"name": way.name, "setting": way.setting, "recall": round(way.recall, 5)}
            cells[-1]["ways"].append(record | spread.milliseconds())
    return {
        "data": data, "N": rows, "r": R, "k": k, "users": _USERS, "machine": about(), "builds": builds,
        "left_out": left_out, "cells": cells,
    }  # fmt: skip


def about() -> dict[str, Any]:
    here = machine.machine()
    for package in ("hnswlib", "scann"):
        try:
            here["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            here["versions"][package] = "not installed"
    return here | {"commit": machine.commit_of(_ROOT)}


def fastest(ways: Sequence[dict[str, Any]], name: str, target: float) -> dict[str, Any] | None:
    """Of a cell's records, the one of that name that reaches the target in the least time."""
    reached = [way for way in ways if way["name"] == name and way["recall"] >= target]
    return min(reached, key=lambda way: way["ms"], default=None)


def _say(table: dict[str, Any]) -> None:
    print(f"{table['data']}, N={table['N']:,}, r={R}, k={table['k']}: recall is the mean of {table['users']} users")
    for name, build in table["builds"].items():
        print(f"  {name}: built in {build['build_s']} s, {build['bytes_a_row']} bytes a row")
        for cell in table["cells"]:
            for target in TARGETS:
                way = fastest(cell["ways"], name, target)
                at = "not reached"
                if way is not None:
                    at = f"{way['ms']:.2f} ms, recall {way['recall']:.4f}, {way['setting'] or 'as it is'}"
                print(f"    ({cell['B']}, {cell['M']}) recall >= {target}: {at}")
    for name, reason in table["left_out"].items():
        print(f"  {name} is left out: {reason}")


def kept(path: Path, tables: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """These tables, and those of the file that they do not replace."""
    new = {(table["data"], table["N"]) for table in tables}
    old = json.loads(path.read_text())["tables"] if path.exists() else []
    return [table for table in old if (table["data"], table["N"]) not in new] + list(tables)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=KINDS)
    parser.add_argument("--rows", type=lambda text: int(float(text)), default=1_000_000)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the peers those whose names hold one of these")
    parser.add_argument("--indexes", type=Path, default=INDEXES, help="folder that keeps them")
    parser.add_argument("--build", action="store_true", help="build indexes and measure nothing else")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    peers = [peer for peer in PEERS if asked.only is None or any(name in peer.name for name in asked.only)]
    for data in asked.data:
        try:
            testing.make_items(data, 1, R, seed=0)
        except ValueError as missing:
            print(f"{data} is not measured: {missing}", file=sys.stderr)
            continue
        if asked.build:
            items = testing.make_items(data, asked.rows, R, seed=0)
            for peer in peers:
                place = asked.indexes / f"{data}_{asked.rows}" / peer.name.replace(" ", "_")
                print(f"{data}: {peer.name}", built(peer, items, place), flush=True)
            continue
        table = measured(data, asked.rows, asked.k, peers, asked.indexes)
        _say(table)
        asked.results.write_text(json.dumps({"tables": kept(asked.results, [table])}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
