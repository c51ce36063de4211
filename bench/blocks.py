"""What packing in blocks gives on the CPU: the same table with and without, and torch's chunks of scores.

    python3 bench/blocks.py [--rows 1e7] [--r 128] [--kinds clustered,iid] [--shapes 1x1,1x8,1x128,8x8] [--k 100]
                            [--masks] [--results FILE]

One line a shape: milliseconds of a call, medians of queries that take turns, whose results are compared bit by bit
before anything is timed; the share of (user, block) pairs that was read; then the ratios. With --masks also a mask of
one block in a hundred of the packed order and one of every hundredth row, as bitsets. The results are also written as
JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from urm_kernels import ItemTable, TopK, score_topk
from urm_kernels.bench.machine import machine
from urm_kernels.bench.turns import timed
from urm_kernels.testing import make_items, make_queries

_BLOCK = 64
_CHUNK = 1 << 16  # rows that torch scores at a time


def by_torch(queries: Tensor, items: Tensor, k: int) -> TopK:
    """Chunks of scores, each cut to k."""
    scores, ids = [], []
    for first in range(0, len(items), _CHUNK):
        chunk = (queries.flatten(0, 1) @ items[first : first + _CHUNK].T).view(*queries.shape[:2], -1).amax(1)
        best = chunk.topk(min(k, chunk.shape[1]))
        scores.append(best.values)
        ids.append(best.indices + first)
    best = torch.cat(scores, 1).topk(k)
    return TopK(best.values, torch.cat(ids, 1).gather(1, best.indices))


def same(one: TopK, other: TopK) -> bool:
    return torch.equal(one.ids, other.ids) and torch.equal(one.scores, other.scores)


def in_turns(ways: dict[str, Callable[[Tensor], Any]], asked: Sequence[Tensor], rounds: int) -> dict[str, float]:
    """Median milliseconds of each way."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        queries = asked[turn % len(asked)]
        for name, way in ways.items():
            taken[name].append(timed(lambda w=way, q=queries: w(q))[0])
    return {name: 1e3 * statistics.median(seconds[1:]) for name, seconds in taken.items()}


def shape_of(table: ItemTable, plain: ItemTable, asked: Sequence[Tensor], k: int, torch_too: bool) -> dict[str, Any]:
    ways: dict[str, Callable[[Tensor], Any]] = {
        "without": lambda q: score_topk(q, plain, k),
        "blocks": lambda q: score_topk(q, table, k),
    }
    read = [0, 0]
    for queries in asked:
        result, stats = score_topk(queries, table, k, return_stats=True)
        if not same(result, score_topk(queries, plain, k)):
            raise SystemExit("packing in blocks changed a result: nothing is timed")
        pairs, left_out = stats.blocks.tolist()
        read = [read[0] + pairs - left_out, read[1] + pairs]
    ms = in_turns(ways, asked, 13)
    if torch_too:
        ms |= in_turns({"torch": lambda q: by_torch(q, plain.factors, k)}, asked, 4)
    share = read[0] / read[1] if read[1] else 1.0
    return {"ms": ms, "read": share, "users": len(asked[0]), "queries": asked[0].shape[1], "k": k}


def bits_of(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))


def masks_of(table: ItemTable, asked: Sequence[Tensor], k: int) -> dict[str, Any]:
    codes = table.codes()
    assert codes is not None
    order = torch.arange(len(table)) if codes.cells is None else codes.cells.order[:, 0].long()
    rows = order[: len(order) // _BLOCK * _BLOCK].view(-1, _BLOCK)
    of_blocks, of_rows = torch.zeros(len(table), dtype=torch.bool), torch.zeros(len(table), dtype=torch.bool)
    of_blocks[rows[torch.randperm(len(rows))[: len(rows) // 100]].flatten()] = True
    of_rows[torch.randperm(len(table))[: len(table) // 100]] = True
    of_blocks, of_rows = bits_of(of_blocks), bits_of(of_rows)
    ways: dict[str, Callable[[Tensor], Any]] = {
        "all": lambda q: score_topk(q, table, k),
        "blocks": lambda q: score_topk(q, table, k, mask=of_blocks),
        "rows": lambda q: score_topk(q, table, k, mask=of_rows),
    }
    return {"ms": in_turns(ways, asked, 13), "users": len(asked[0]), "queries": asked[0].shape[1], "k": k}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: int(float(text)), default=10**7)
    parser.add_argument("--r", type=int, default=128)
    parser.add_argument("--kinds", default="clustered,iid")
    parser.add_argument("--shapes", default="1x1,1x8,1x128,8x8")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--masks", action="store_true")
    parser.add_argument("--results", default="bench/results/blocks_cpu.json")
    asked = parser.parse_args(arguments)
    found: list[dict[str, Any]] = []
    for kind in asked.kinds.split(","):
        items = make_items(kind, asked.rows, asked.r, 0)
        plain = ItemTable(items).pack()
        begun = time.perf_counter()
        table = ItemTable(items).pack(blocks=True)
        packed = time.perf_counter() - begun
        held = sum(size for name, size in table.memory().items() if name.startswith("code_"))
        size = f"N = {asked.rows:g}, r = {asked.r}"
        print(f"{kind}, {size}: packed in {packed:.1f} s, {held / asked.rows:.1f} bytes a row")
        for shape in asked.shapes.split(","):
            users, count = map(int, shape.split("x"))
            queries = [make_queries(kind, users, count, asked.r, seed, items) for seed in range(4)]
            cell = shape_of(table, plain, queries, asked.k, torch_too=True)
            ms = cell["ms"]
            print(
                f"  ({users}, {count}) k = {asked.k}: without {ms['without']:8.2f} ms, with {ms['blocks']:8.2f} "
                f"({ms['without'] / ms['blocks']:.2f}x; torch {ms['torch'] / ms['blocks']:.1f}x), "
                f"{100 * cell['read']:.1f} % of the blocks read",
                flush=True,
            )
            found.append({"kind": kind, "rows": asked.rows, "r": asked.r, "pack_s": packed, **cell})
            if asked.masks:
                masks = masks_of(table, queries, asked.k)
                ms = masks["ms"]
                print(
                    f"      masks: none {ms['all']:.2f} ms, one block in a hundred {ms['blocks']:.2f} "
                    f"({ms['all'] / ms['blocks']:.1f}x), one row in a hundred {ms['rows']:.2f} "
                    f"({ms['all'] / ms['rows']:.2f}x)",
                    flush=True,
                )
                found.append({"kind": kind, "rows": asked.rows, "r": asked.r, "masks": True, **masks})
    with open(asked.results, "w") as file:
        json.dump({"machine": machine(), "cells": found}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
