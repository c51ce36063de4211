"""Times the scan kernel alone over many tiles, on request: where the numbers of backends/triton/plan.py come from.

    python3 bench/tune_scan.py [--rows 20000000] [--cells 1x1,1x8] [--seconds 120]

Configurations are compiled beforehand by as many processes as there are cores. Every one must find the same survivors
as the first with as many rows, or it is not reported. Writes bench/results/tune_scan_<card>.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from urm_kernels.backends import triton as backend
from urm_kernels.backends.triton import search
from urm_kernels.backends.triton.call import Call
from urm_kernels.backends.triton.plan import Tile, make_plan, padded

R, K = 128, 1000
CELLS = {"1x1": (1, 1), "1x8": (1, 8), "1x128": (1, 128), "8x16": (8, 16), "64x1": (64, 1), "1024x1": (1024, 1)}


def tiles(users: int, count: int) -> list[Tile]:
    columns = users * padded(count)
    if columns <= 16:
        grid = itertools.product((64, 128), (16,), (4,), (3, 4), (2, 3, 4, 5), (False,))
    elif columns <= 128:
        swaps = (True, False) if count == 1 else (False,)
        grid = itertools.product((64, 128), (columns,), (4, 8), (2, 3, 4), (1, 2, 3, 4, 5), swaps)
    else:
        grid = itertools.product((64, 128, 256), (64, 128), (4, 8), (2, 3, 4), (1, 2, 3), (True,))
    found = []
    for block_n, block_c, warps, stages, per_sm, swap in grid:
        accumulators = block_n * block_c / (32 * warps)
        row_tile, column_tile = block_n * R * 2, block_c * R * 2
        shared = row_tile * (stages - 1) + column_tile if columns <= 128 else row_tile + column_tile * stages
        if (
            accumulators <= 128
            and shared * per_sm <= 227_000
            and (accumulators + 40) * 32 * warps * per_sm <= 65536
            and not (swap and block_n == 64 and warps == 8 and columns <= 64)
        ):
            found.append(
                Tile(
                    block_n,
                    block_c,
                    R,
                    warps,
                    stages,
                    per_sm,
                    swap,
                )
            )
    return found


class Bench:
    def __init__(self, rows: int, users: int, count: int) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        shape = torch.arange(1, R + 1, device="cuda") ** -0.5
        self.items = torch.empty(rows, R, dtype=torch.bfloat16, device="cuda")
        for part in self.items.split(1 << 21):
            part.copy_(torch.randn(part.shape, device="cuda", generator=generator) * shape)
        queries = torch.randn(users, count, R, device="cuda", generator=generator) * shape
        self.card = backend.card(torch.device("cuda", 0))
        self.call = Call(queries, None, self.items, None, None, None, None, False)
        self.plan = make_plan(users, rows, K)
        self.prepared = search.prepare(self.call, K)
        self.out = torch.empty(users, self.plan.capacity, dtype=torch.int64, device="cuda")
        self.counts = torch.zeros(users, dtype=torch.int32, device="cuda")
        self.limits = search.guess(self.call, self.prepared, self.plan, self.card)

    def run(self, tile: Tile) -> None:
        search.scan_rows(self.call, self.prepared, self.limits, self.out, self.counts, self.plan.capacity,
                         self.card, tile)  # fmt: skip

    def survivors(self, tile: Tile) -> torch.Tensor:
        self.counts.zero_()
        self.run(tile)
        filled = torch.arange(self.plan.capacity, device="cuda") < self.counts[:, None]
        rows = torch.where(filled, self.out, -1).sort(1).values
        return torch.cat([self.counts[:, None], rows], 1).sum(1)

    def milliseconds(self, tile: Tile, rounds: int) -> float:
        taken = []
        for _ in range(rounds):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.counts.zero_()
            start.record()
            self.run(tile)
            stop.record()
            stop.synchronize()
            taken.append(start.elapsed_time(stop))
        return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cells = arguments.cells.split(",")
    work = [(cell, tile) for cell in cells for tile in tiles(*CELLS[cell])]
    if arguments.warm:
        part, parts = map(int, arguments.warm.split("/"))
        # One per compilation: the number of programs does not matter.
        different = {(cell, tile._replace(per_sm=1)) for cell, tile in work}
        for cell, tile in sorted(different, key=str)[part::parts]:
            try:
                Bench(100_000, *CELLS[cell]).run(tile)
            except Exception as error:  # too much shared memory, say: the timing run will say so again
                print(cell, tile, str(error)[:100])
        return
    began = time.monotonic()
    parts = os.cpu_count() or 1
    warm = [
        subprocess.Popen([sys.executable, __file__, "--cells", arguments.cells, "--warm", f"{part}/{parts}"])
        for part in range(parts)
    ]
    for process in warm:
        process.wait()
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    report = []
    for cell in cells:
        users, count = CELLS[cell]
        bench = Bench(arguments.rows, users, count)
        wanted: dict[int, torch.Tensor] = {}
        lines = []
        for tile in tiles(users, count):
            if time.monotonic() - began > arguments.seconds:
                break
            try:
                found = bench.survivors(tile)
                # A tile's longest row is part of its limit, so survivors depend on its rows.
                if not torch.equal(found, wanted.setdefault(tile.block_n, found)):
                    print(cell, tile, "OTHER SURVIVORS", flush=True)
                    continue
                ms = bench.milliseconds(tile, 5)
            except Exception as error:
                print(cell, tile, str(error).splitlines()[0][:100], flush=True)
                continue
            lines.append((ms, tile))
        lines.sort()
        for ms, tile in lines:
            report.append({"cell": cell, "ms": round(ms, 4), **tile._asdict()})
        for ms, tile in lines[:6]:
            bytes_read, flops = bench.items.nbytes, 2 * users * count * bench.items.numel()
            rates = f"{bytes_read / ms / 1e9:6.2f} TB/s {flops / ms / 1e9:7.1f} TFLOP/s"
            survivors = f"survivors {bench.counts.float().mean().item():.0f}"
            print(f"{cell:8}{ms:8.3f} ms {rates} {tuple(tile)} {survivors}", flush=True)
        del bench
        torch.cuda.empty_cache()
    name = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(0).lower()).strip("_")
    path = Path(__file__).parent / "results" / f"tune_scan_{name}.json"
    path.write_text("[\n" + ",\n".join(map(json.dumps, report)) + "\n]\n")


if __name__ == "__main__":
    main()
