"""A cell of a packed table: the plain table checked against float64, packed ones against its bits, all in turns."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bars import verdict
from torch import Tensor

from urm_kernels import ItemTable, score_topk, testing
from urm_kernels.backends import codes as formats
from urm_kernels.bench import PEERS, Cell, Contest, Experience, Peer, Spread, Table, check, timed, with_peers
from urm_kernels.bench.cells import make_queries
from urm_kernels.scoring import TopK
from urm_kernels.table_codes import KINDS

# By their names here; codes of 2 bits are for calls with recall below 1 (bench/recall.py).
CODES = {"+".join(kinds): kinds for kinds in KINDS if kinds[0] != "int2"}
EXACT = [peer for peer in PEERS if peer.exact]
SHAPES = ((1, 1), (1, 8), (1, 16), (1, 128))

# By data kind, B and M; shares of bandwidth are of the codes' bytes.
BARS: dict[tuple[str, int, int], dict[str, float]] = {
    ("decay", 1, 1): {"of_read_bandwidth": 0.6, "fastest": 5.0},
    **{(data, 1, 8): {"jax": 10.0, "others": 15.0} for data in ("clustered", "decay", "smollm2")},
    ("iid", 1, 8): {"fastest": 10.0},
    ("iid", 1, 128): {"torch": 8.0},
    **{("decay", 1, count): {"of_code_rate": 0.6} for count in (16, 128)},
}


def judged(cell: Cell) -> str:
    """The codes that bars speak of: the default; 8 bits where so many rows are close to the best that 4 tell little,
    and behind 4 bits where rows are short."""
    if cell.data != "iid":
        return "int4"
    return "int4+int8" if cell.r <= 64 else "int8"


def all_code_bytes(cell: Cell) -> int:
    """Of the packed forms of the cell's table, together."""
    coarse = sum(formats.block_bytes(cell.r, 4 if kinds[0] == "int4" else 8) for kinds in CODES.values())
    fine = formats.fine_bytes(cell.r, 8) * formats.BLOCK * sum(len(kinds) - 1 for kinds in CODES.values())
    return cell.N // formats.BLOCK * (coarse + fine)


def code_bytes(table: ItemTable) -> int:
    return sum(size for part, size in table.memory().items() if part.startswith("code_"))


class PackedTable(Table):
    """A table and its packed forms, which share the factors."""

    def __init__(self, items: Tensor) -> None:
        super().__init__(items)
        self.packed: dict[str, ItemTable] = {}
        self.build_seconds: dict[str, float] = {}
        for name, kinds in CODES.items():
            table = ItemTable(items)
            self.build_seconds[name], self.packed[name] = timed(functools.partial(table.pack, codes=kinds))

    def beside_plain(self, queries: Tensor, k: int) -> tuple[TopK, dict[str, dict[str, Any]]]:
        """(the result, what each packed call did); AssertionError where a result is wrong or not the same bits."""
        plain = score_topk(queries, self.items, k)
        check([plain], queries, self.items)
        did = {}
        for name, table in self.packed.items():
            with testing.peak_extra_memory() as peak:
                result, stats = score_topk(queries, table, k, return_stats=True)
            assert all(map(torch.equal, result, plain)), f"{name}: packed and plain results differ"
            pairs = queries.shape[0] * len(self.items)
            did[name] = {
                "survivors": [round(int(count) / pairs, 6) for count in stats.survivors],
                "extra_bytes": peak.bytes,
                "bytes_a_row": round(code_bytes(table) / len(self.items), 2),
                "build_s": round(self.build_seconds[name], 3),
            }
        return plain, did


def measure(
    cell: Cell,
    table: PackedTable,
    experience: Experience,
    peers: Sequence[Peer] = EXACT,
    bars: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The record of a cell: what the codes that are judged do, and in "codes" what each does.

    bars: in place of those of its data and shape.
    """
    queries = make_queries(cell, table.items)
    result, codes = table.beside_plain(queries, cell.k)
    contest = Contest(cell, table, queries, result, experience, peers)
    calls = {name: functools.partial(score_topk, queries, packed, cell.k) for name, packed in table.packed.items()}
    calls["plain"] = functools.partial(score_topk, queries, table.items, cell.k)
    spreads, ceilings = with_peers(contest, calls, ("code_rate", "read_bandwidth"))
    for name, about in codes.items():
        about |= {**spreads[name].milliseconds(), **_shares(cell, table.packed[name], spreads[name], ceilings)}
    name = judged(cell)
    record = {
        "cell": str(cell),
        **cell._asdict(),
        "judged": name,
        **codes[name],
        "plain_ms": spreads["plain"].milliseconds()["ms"],
        "rounds": spreads[name].rounds,
        "read_ceiling_gb_per_s": round(ceilings["read_bandwidth"] / 1e9, 2),
        "code_ceiling_gop_per_s": round(ceilings["code_rate"] / 1e9, 2),
        **contest.summary(spreads[name].median * 1e3),
        "codes": codes,
        "checked": "plain against float64, packed against plain bit for bit",
    }
    found = verdict(BARS.get((cell.data, cell.B, cell.M), {}) if bars is None else bars, record)
    return record | found | {"bar": found["bar"] if found["met"] is None else f"{name}: {found['bar']}"}


def _shares(cell: Cell, table: ItemTable, spread: Spread, ceilings: dict[str, float]) -> dict[str, float]:
    """Of the ceilings, by what a scan cannot do without: one read of its first codes, all their products."""
    codes = table.codes()
    assert codes is not None
    read = codes.blocks.nbytes / ceilings["read_bandwidth"]
    products = 2 * cell.B * cell.M * cell.N * cell.r / ceilings["code_rate"]
    return {
        "gb_per_s": round(codes.blocks.nbytes / spread.median / 1e9, 2),
        "read_floor_ms": round(read * 1e3, 3),
        "product_floor_ms": round(products * 1e3, 3),
        "of_read_bandwidth": round(read / spread.median, 3),
        "of_code_rate": round(products / spread.median, 3),
    }
