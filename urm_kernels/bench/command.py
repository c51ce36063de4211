"""The command line: sizes in, a checked table of medians out."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import testing
from ..backends import cpu
from ..table import ItemTable
from . import plot, text
from .cells import DTYPES, REDUCTIONS, Cell, make_queries, make_table, product, short, table_bytes
from .contest import Experience, Table
from .machine import free_bytes, machine
from .measure import check, measure, run
from .peers import FAMILIES, PEERS

_MOST_OF_FREE = 0.8
_PATIENCE = 30.0  # seconds a call of a peer
_FILE = "file"  # the data kind of a table that was not generated
_BY_HAND = {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"}  # choose a kernel or a cache size, and slow numpy and faiss

_EXAMPLES = """Lists make a grid: --items 1e5,1e6 --queries 1,8 measures four cells.

examples:
  python -m urm_kernels.bench --items 1e6 --rank 128 --queries 8 --k 100
  python -m urm_kernels.bench --items 1e5,1e6 --dtype fp32,bf16 --peers torch,faiss --plot latency.png
  python -m urm_kernels.bench --table catalogue.safetensors --k 10,1000 --report
"""


def _count(text: str) -> int:
    """A whole number of at least 1, also as 1e6."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a whole number such as 1000 or 1e6 is wanted, {text!r} came") from None
    if not 1 <= value <= 2**53 or value != int(value):
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is wanted, {text!r} came")
    return int(value)


def _counts(text: str) -> list[int]:
    return sorted({_count(part) for part in text.split(",")})


def _words(*allowed: str) -> Any:
    def parse(text: str) -> list[str]:
        words = text.split(",")
        for word in words:
            if word not in allowed:
                raise argparse.ArgumentTypeError(f"of {', '.join(allowed)} any are wanted, {word!r} came")
        return words

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m urm_kernels.bench",
        description="Times score_topk on this machine beside torch, numpy, faiss and jax; results are checked first.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--items", type=_counts, metavar="N", help="rows of the table (default: 1e6)")
    parser.add_argument("--rank", type=_counts, metavar="r", help="width of a row (default: 128)")
    parser.add_argument("--users", type=_counts, default=[1], metavar="B", help="users a call (default: 1)")
    parser.add_argument("--queries", type=_counts, default=[8], metavar="M", help="queries a user (default: 8)")
    parser.add_argument("--k", type=_counts, default=[100], metavar="k", help="results a user (default: 100)")
    parser.add_argument("--dtype", type=_words(*DTYPES), help="of the table: fp32, bf16 (default: fp32)")
    parser.add_argument("--reduce", choices=REDUCTIONS, default="max", help="over a user's queries (default: max)")
    parser.add_argument("--data", help=f"kind of rows (default: decay): {', '.join(testing.KINDS)}")
    parser.add_argument("--peers", type=_words(*FAMILIES, "none"), default=list(FAMILIES), help="who else is measured")
    parser.add_argument("--table", type=Path, help="the factors of an ItemTable's file instead of generated rows")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw them here (.png); needs matplotlib")
    parser.add_argument("--report", action="store_true", help="print a report to paste, with versions and machine")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    for name in ("json", "plot"):
        path = getattr(options, name)
        if path is not None and not path.parent.is_dir():
            parser.error(f"--{name}: the folder {path.parent} does not exist")
    why_not = cpu.why_not(torch.device("cpu"), set())
    if why_not is not None:
        raise SystemExit(f"error: the cpu backend cannot run here: {why_not}")
    if _BY_HAND & os.environ.keys():
        print(f"note: {' and '.join(sorted(_BY_HAND & os.environ.keys()))} set: numpy may be slower", file=sys.stderr)
    try:
        cells, given = _cells(options, parser)
        records = _measured(cells, given, options.peers)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except AssertionError as error:
        raise SystemExit(f"error: a result is wrong, nothing was written; please report this: {error}") from error
    here = machine()
    if options.report:
        print(text.report(here, records))
    else:
        print("\n".join([*text.table(records), "", *text.LEGEND, *text.others(records)]))
    if options.json:
        options.json.write_text(json.dumps({"machine": here, "cells": records}, indent=1) + "\n")
    if options.plot:
        _plot(records, cells, options.plot)


def _cells(options: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[list[Cell], Table | None]:
    """The cells, and their table where a file holds it."""
    shapes = list(itertools.product(options.users, options.queries))
    if options.table is None:
        rows, ranks, dtypes = options.items or [1_000_000], options.rank or [128], options.dtype or ["fp32"]
        cells = product(rows, ranks, shapes, options.k, dtypes, options.reduce, options.data or "decay")
        if not cells:
            parser.error(f"--k: at most N = {max(rows)} is wanted, {min(options.k)} came")
        return cells, None
    for name in ("items", "rank", "dtype", "data"):
        if getattr(options, name) is not None:
            parser.error(f"--{name}: comes from the file of --table; give one of the two")
    items = ItemTable.load(options.table).serving().items
    names = {dtype: name for name, dtype in DTYPES.items()}
    if items.dtype not in names:
        parser.error(f"--table: float32 or bfloat16 factors are measured, these are {items.dtype}")
    count, r = items.shape
    if items.numel() and not all(bound.isfinite() for bound in items.aminmax()):
        parser.error("--table: finite factors are wanted, some of these are not")
    cells = product([count], [r], shapes, options.k, [names[items.dtype]], options.reduce, _FILE)
    if not cells:
        parser.error(f"--k: at most N = {count} is wanted, {min(options.k)} came")
    return cells, Table(items)


def _measured(cells: Sequence[Cell], given: Table | None, families: Sequence[str]) -> list[dict[str, Any]]:
    """The records; one generated table in memory at a time."""
    peers = [peer for peer in PEERS if peer.package in families]
    experience, records = Experience(patience=_PATIENCE), []
    for _, together in itertools.groupby(cells, key=lambda cell: (cell.N, cell.r, cell.dtype)):
        of_table = list(together)
        for cell in of_table:
            _require_room(cell, made=given is None)
        table = given or Table(make_table(of_table[0]))
        for cell in of_table:
            print(f"measuring {cell.name}", file=sys.stderr)
            # For a file as for independent rows: what its own queries look like nobody knows here.
            queries = make_queries(cell._replace(data="iid") if given else cell, table.items)
            result, extra = run(cell, table, queries)
            check([result], queries, table.items, cell.reduce)
            records.append(measure(cell, table, queries, result, extra, experience, peers))
        del table  # before the next one is made
    return records


def _require_room(cell: Cell, made: bool) -> None:
    """For the table, where it is made, and the queries and results of a call."""
    needed = 8 * cell.B * cell.M * cell.r + 24 * cell.B * cell.k + (table_bytes(cell) if made else 0)
    free = free_bytes()
    if free is not None and needed > _MOST_OF_FREE * free:
        raise ValueError(f"{cell.name} takes {needed / 2**30:.1f} GiB to make, {free / 2**30:.1f} GiB are free")


def _named(fields: dict[str, Any], between: str = ", ") -> str:
    return between.join(
        f"{name} = {short(value)}" if isinstance(value, int) else str(value) for name, value in fields.items()
    )


def _plot(records: Sequence[dict[str, Any]], cells: Sequence[Cell], path: Path) -> None:
    """One panel: against N where only N differs, else the cells side by side."""
    floors = []
    for record, cell in zip(records, cells, strict=True):
        count = 1 if cell.reduce in ("sum", "mean") else cell.M
        floors.append(plot.floors(record, cell.B, count, cell.r, DTYPES[cell.dtype].itemsize))
    series: dict[str, list[float | None]] = {
        "ours": [record["ms"] for record in records],
        "best exact peer": [record.get("best_peer_ms") for record in records],
        "read floor": [read for read, _ in floors],
        "product floor": [products for _, products in floors],
    }
    values = {field: [getattr(cell, field) for cell in cells] for field in Cell._fields}
    same = {field: each[0] for field, each in values.items() if len(set(each)) == 1}
    title = _named(same)
    if len(cells) > 1 and set(values) - set(same) == {"N"}:
        panel = plot.Panel(title, "items N", values["N"], series)
    else:
        places = [_named({f: v for f, v in cell._asdict().items() if f not in same}, "\n") for cell in cells]
        panel = plot.Panel(title, "", places, series)
    try:
        plot.draw([panel], path)
    except ModuleNotFoundError as error:
        print(f"no figure: it needs {error.name} (pip install matplotlib)", file=sys.stderr)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --plot: {error}") from error
