"""What `recall` below 1 saves on the CPU: codes of 4 bits read exactly beside codes of 2 bits read probably.

    python3 bench/recall.py [--rows 1e7] [--r 128] [--queries 1] [--users 24] [--kinds iid,decay] [--k 100,1000]

One line a kind of data, k and p: milliseconds a user, the median of users who take turns (one call each, so that what
else the machine does meets all alike), the median ratio of the exact call on 4 bits to each of the others, and the mean
share of the exact k best that was found. `int2` exact is the same table with recall=1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from urm_kernels import ItemTable, TopK, score_topk
from urm_kernels.bench.turns import timed
from urm_kernels.testing import make_items, make_queries

CALLS = (
    ("int4 exact", "int4", 1.0), ("int4 .99", "int4", 0.99), ("int2 .9", "int2", 0.9), ("int2 .99", "int2", 0.99),
    ("int2 .999", "int2", 0.999), ("int2 exact", "int2", 1.0),
)  # fmt: skip


def share_found(found: TopK, exact: TopK) -> float:
    return float(torch.isin(found.ids, exact.ids).double().mean())


def measure(tables: dict[str, ItemTable], queries: Tensor, k: int) -> list[str]:
    seconds: dict[str, list[float]] = {name: [] for name, *_ in CALLS}
    found: dict[str, list[float]] = {name: [] for name, *_ in CALLS}
    survivors: dict[str, list[float]] = {name: [] for name, *_ in CALLS}
    unproven: dict[str, int] = dict.fromkeys(seconds, 0)
    for turn, asked in enumerate(queries.split(1)):
        exact = None
        for name, codes, recall in CALLS:
            elapsed, got = timed(lambda c=codes, p=recall, q=asked: score_topk(q, tables[c], k, recall=p))
            exact = got if exact is None else exact
            if turn == 0:  # warms up
                continue
            seconds[name].append(elapsed)
            found[name].append(share_found(got, exact))
            _, stats = score_topk(asked, tables[codes], k, recall=recall, return_stats=True)
            survivors[name].append(float(stats.survivors[0]) / len(tables[codes]))
            unproven[name] += int((~stats.proven).sum())
    first = seconds[CALLS[0][0]]
    lines = []
    for name, each in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(first, each, strict=True))
        left, share = 100 * statistics.mean(survivors[name]), statistics.mean(found[name])
        lines.append(
            f"  {name:10}  {1e3 * statistics.median(each):8.2f} ms  {ratio:5.2f}x  recall {share:.5f}  "
            f"{left:6.3f} % left by the blocks  probable for {unproven[name]} of {len(each)} users"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: int(float(text)), default=10**7)
    parser.add_argument("--r", type=int, default=128)
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--users", type=int, default=24)
    parser.add_argument("--kinds", default="iid,decay,clustered")
    parser.add_argument("--k", default="100,1000")
    asked = parser.parse_args(arguments)
    for kind in asked.kinds.split(","):
        items = make_items(kind, asked.rows, asked.r, 0)
        tables = {"int4": ItemTable(items).pack(), "int2": ItemTable(items).pack(("int2", "int4"))}
        queries = make_queries(kind, asked.users + 1, asked.queries, asked.r, 1, items)
        for k in map(int, asked.k.split(",")):
            print(f"{kind}, N = {asked.rows:g}, r = {asked.r}, M = {asked.queries}, k = {k}")
            print("\n".join(measure(tables, queries, k)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
