"""Cells of packed tables in the GPU acceptance run, and how fast the device encodes.

As in gpu_cells.py, but a result is compared with the bits of the plain call by Triton on the same factors, which the
latency cells compare with float64; that call is also the peer. With a recall below 1 its scores and the share of ids
that it has are. The floor is the larger of one read of the codes at the copy bandwidth and their products at the rate
of mma.sync on bytes (at torch's int8 rate where no extension measures it); a table in blocks is not read whole, and may
be below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gpu_cells
import torch
from torch import Tensor

SHAPES = ((1, 1), (1, 8), (8, 8), (64, 1), (1, 128))
ENCODING_BAR = 2e8  # rows a second
_PART = 1 << 21  # rows drawn at a time
_COMPARED = 100_000  # rows of which the CPU's codes are compared
_ITEMS, _QUERIES, _CENTRES = 0, 1, 2  # seeds


class Cell(NamedTuple):
    """A packed table of bfloat16 factors, reduce max. kind: of urm_kernels.testing.make_items. codes and blocks: as
    pack takes them, codes joined by "+". recall: of score_topk."""

    kind: str
    codes: str
    N: int
    r: int
    B: int
    M: int
    k: int
    blocks: bool = False
    recall: float = 1.0

    @property
    def name(self) -> str:
        sizes = f"N={self.N:.0e} r={self.r} B={self.B} M={self.M} k={self.k}".replace("e+0", "e")
        way = " blocks" * self.blocks + f" recall={self.recall}" * (self.recall < 1)
        return f"{self.kind} {self.codes}{way} {sizes}"

    @property
    def table(self) -> tuple[str, int, int]:
        return self.kind, self.N, self.r


class Encoding(NamedTuple):
    """The encoder alone, of bfloat16 items of kind decay."""

    codes: str
    N: int
    r: int

    @property
    def name(self) -> str:
        return f"encode {self.codes} N={self.N:.0e} r={self.r}".replace("e+0", "e")

    @property
    def table(self) -> tuple[str, int, int]:
        return "encode", self.N, self.r


def named_cells() -> list[Cell | Encoding]:
    """Those of a table that have the same codes are neighbours."""
    small, middle, big = gpu_cells.ALL_ROWS

    def some(kind: str, codes: str, rows: int, *shapes: tuple[int, int], **ways: Any) -> list[Cell | Encoding]:
        return [Cell(kind, codes, rows, 128, *shape, 1000, **ways) for shape in shapes]

    cells = some("decay", "int4", big, *SHAPES)
    cells += some("decay", "int8", big, (1, 8), (64, 1))
    cells += some("decay", "int4+int8", big, (1, 8))
    cells += some("decay", "int2+int4", big, (1, 1), (1, 8), (8, 8), recall=0.99)
    cells += some("clustered", "int4", big, *SHAPES)
    cells += some("clustered", "int8", big, (1, 8))
    # Many rows are close to the best: 4 bits tell little.
    cells += some("iid", "int8", big, (1, 1), (1, 8), (1, 128))
    cells += some("iid", "int4", big, (1, 8))
    cells += some("iid", "int4+int8", big, (1, 8))
    cells += some("iid", "int2+int4", big, (1, 1), (1, 8), recall=0.99)
    cells += some("decay", "int4", middle, (1, 1), (1, 8), (64, 1))
    cells += some("clustered", "int4", middle, (1, 8), (8, 8), (1, 128))
    cells += some("clustered", "int4", middle, (1, 8), (8, 8), (1, 128), blocks=True)
    cells += some("decay", "int4", small, (1, 8), (64, 1))
    return cells + [Encoding(codes, 4_000_000, 128) for codes in ("int4", "int8")]


def kinds_of(codes: str) -> tuple[Any, ...]:
    """As ItemTable.pack takes them."""
    return tuple(codes.split("+"))


def _drawn(rows: int, r: int, seed: int, device: str) -> Iterator[tuple[slice, Tensor, torch.Generator]]:
    """float32 N(0, 1), a part of the rows at a time, with the generator for more."""
    generator = torch.Generator(device).manual_seed(seed)
    for first in range(0, rows, _PART):
        part = slice(first, min(first + _PART, rows))
        yield part, torch.randn(part.stop - first, r, device=device, generator=generator), generator


def centres_of(rows: int, r: int, device: str) -> Tensor:
    """float32 [rows / 500, r] of a clustered table."""
    return torch.cat([drawn for _, drawn, _ in _drawn(max(1, rows // 500), r, _CENTRES, device)])


def items_of(kind: str, rows: int, r: int, device: str = "cuda") -> Tensor:
    """bfloat16 [rows, r] of testing.make_items' kinds iid, clustered and decay, drawn on the device."""
    if kind == "decay":
        return gpu_cells.decay(rows, r, _ITEMS, 0.4, torch.bfloat16, device)
    out = torch.empty(rows, r, dtype=torch.bfloat16, device=device)
    centres = centres_of(rows, r, device)
    law = torch.arange(1, len(centres) + 1, device=device).double().pow(-0.8).cumsum(0)
    for part, drawn, generator in _drawn(rows, r, _ITEMS, device):
        if kind == "clustered":
            place = torch.rand(len(drawn), device=device, generator=generator, dtype=torch.float64) * law[-1]
            member = torch.searchsorted(law, place, right=True).clamp(max=len(centres) - 1)
            spread = torch.exp(0.3 * torch.randn(len(drawn), 1, device=device, generator=generator))
            drawn = (centres[member] + 0.5 * drawn) * spread
        out[part] = drawn
    return out


def queries_of(cell: Cell, device: str = "cuda") -> Tensor:
    """float32 [B, M, r] that go with the cell's items."""
    count, shape = cell.B * cell.M, (cell.B, cell.M, cell.r)
    if cell.kind == "decay":
        return gpu_cells.decay(count, cell.r, _QUERIES, 0.0, torch.float32, device).view(shape)
    ((_, drawn, generator),) = _drawn(count, cell.r, _QUERIES, device)
    if cell.kind == "clustered":
        centres = centres_of(cell.N, cell.r, device)
        drawn = centres[torch.randint(len(centres), (count,), device=device, generator=generator)] + 0.7 * drawn
    return drawn.view(shape)


def packed_copies(items: Tensor, codes: str, blocks: bool = False) -> list[Any]:
    """The packed table, as many times as it takes for the codes to be larger than the cache."""
    import urm_kernels

    table = urm_kernels.ItemTable(items).pack(kinds_of(codes), blocks=blocks)
    return [table, *(table.clone() for _ in range(gpu_cells.CACHE // table.codes().blocks.nbytes))]


def check_bits(found: Any, plain: Any) -> None:
    """Raises AssertionError unless scores and ids are the plain call's, bit for bit."""
    assert found.scores.shape == plain.scores.shape and found.ids.shape == plain.ids.shape
    ids = int((found.ids != plain.ids).sum())
    scores = int((found.scores.view(torch.int32) != plain.scores.view(torch.int32)).sum())
    assert ids == scores == 0, f"not the plain call's: {ids} ids, {scores} scores"


def check_share(found: Any, plain: Any, queries: Tensor, items: Tensor, recall: float) -> float:
    """The share of the plain call's ids; raises AssertionError unless it is what was asked for, but for three standard
    errors, and scores are those of the rows."""
    import urm_kernels

    exact = urm_kernels.score_candidates(queries, items, found.ids)
    wrong = int((found.scores.view(torch.int32) != exact.view(torch.int32)).sum())
    different = min(len(ids.unique()) for ids in found.ids)
    assert wrong == 0 and different == found.ids.shape[1], f"{wrong} scores are not the rows', {different} ids differ"
    had = [float(torch.isin(ids, own).float().mean()) for ids, own in zip(plain.ids, found.ids, strict=True)]
    share, error = sum(had) / len(had), (recall * (1 - recall) / plain.ids.numel()) ** 0.5
    assert share >= recall - 3 * error, f"a share of {share:.4f} was found, not {recall}"
    return share


def proof(queries: Tensor, table: Any, k: int, recall: float = 1.0) -> dict[str, Any]:
    """What the scan did: users whom the guess did not prove, and pairs of user and row that survived the first bounds
    and that were scored, of all pairs."""
    import urm_kernels
    from urm_kernels.backends import cuda
    from urm_kernels.backends.cuda import launching, search
    from urm_kernels.backends.table_view import ScanOptions, TableView

    device, view = queries.device, TableView(table.factors, codes=table.codes())
    options = ScanOptions(recall=recall)
    found = search.search(queries, view, options, k, launching.launcher(device), cuda.card(device))
    _, stats = urm_kernels.score_topk(queries, table, k, recall=recall, return_stats=True, backend="cuda")
    survivors, scored = stats.survivors.tolist()
    return {
        "unproven_users": int(found.unproven),
        "survivors": survivors,
        "scored": scored,
        "pairs": len(queries) * len(table.factors),
        "bytes_read": int(stats.bytes_read),
    }


def floors_ms(cell: Cell, code_bytes: int, limits: dict[str, float]) -> tuple[float, float]:
    """(of reading the codes once, of their products)."""
    rate = limits.get("s8_mma_top_per_s", limits["int8_top_per_s"])
    return code_bytes / limits["copy_gb_per_s"] / 1e6, 2 * cell.B * cell.M * cell.N * cell.r / rate / 1e9


def measure(cell: Cell, tables: list[Any], limits: dict[str, float], plain: str = "triton") -> dict[str, Any]:
    """One cell, of the table's copies in turns; plain: the backend of the call without codes."""
    import urm_kernels

    queries = queries_of(cell, tables[0].factors.device.type)

    def ours(turn: int) -> Any:
        return urm_kernels.score_topk(queries, tables[turn % len(tables)], cell.k, recall=cell.recall, backend="cuda")

    def peer(turn: int) -> Any:
        return urm_kernels.score_topk(queries, tables[turn % len(tables)].factors, cell.k, backend=plain)

    result, extra = gpu_cells.with_extra_bytes(lambda: ours(0))
    if cell.recall == 1:
        check_bits(result, peer(0))
        share = 1.0
    else:
        share = check_share(result, peer(0), queries, tables[0].factors, cell.recall)
    did = proof(queries, tables[0], cell.k, cell.recall)
    ms, host = gpu_cells.milliseconds(ours), gpu_cells.host_milliseconds(ours)
    replay = gpu_cells.replayed_milliseconds(ours, len(tables))
    code_bytes = tables[0].codes().blocks.nbytes
    read, products = floors_ms(cell, code_bytes, limits)
    peers = {"plain": gpu_cells.replayed_milliseconds(peer, len(tables)), "plain_call": gpu_cells.milliseconds(peer)}
    figures = {
        "ms": round(ms, 4),
        "graph_ms": round(replay, 4),
        "host_ms": round(host, 4),
        "floor_ms": round(max(read, products), 4),
        "of_floor": round(max(read, products) / replay, 3),
        "of_s8_rate": round(products / replay, 3),
        "gb_per_s": round(code_bytes / replay / 1e6, 1),
        "extra_mib": round(extra / 2**20, 2),
        "extra_share": round(extra / tables[0].memory()["total"], 5),
        **did,
        "found_share": round(share, 5),
        "peers_ms": {name: round(value, 4) for name, value in peers.items()},
    }
    # Its result is right, but the second way took longer than the guess should.
    if did["unproven_users"]:
        figures["status"] = f"failed: {did['unproven_users']} users were not proven by the guess"
    return figures


def encoded(items: Tensor, codes: str, encoder: Any) -> tuple[Any, Callable[[], None]]:
    """(codes of the items, what writes them once more)."""
    from urm_kernels import table_codes
    from urm_kernels.backends import codes as formats

    rows, r = items.shape
    made = table_codes.room_for(formats.rotation(r, 0).to(items.device), rows, r, kinds_of(codes))
    encoder.encode_blocks(items, None, made)
    return made, lambda: encoder.encode_blocks(items, None, made)


def check_encoder(items: Tensor, codes: str, encoder: Any) -> None:
    """Raises AssertionError unless the codes of these rows are those that the CPU makes."""
    from urm_kernels import table_codes

    made, there = encoded(items, codes, encoder)[0], items.cpu()
    wanted = encoded(there, codes, table_codes.encoder(there))[0]
    for name in ("blocks", "fine"):
        ours, theirs = getattr(made, name), getattr(wanted, name)
        wrong = 0 if theirs is None else int((ours.cpu() != theirs).sum())
        assert wrong == 0, f"{wrong} bytes of {name} are not the CPU's"


def measure_encoding(cell: Encoding, items: Tensor, limits: dict[str, float]) -> dict[str, Any]:
    from urm_kernels.backends import cuda

    check_encoder(items[:_COMPARED], cell.codes, cuda)
    made, write = encoded(items, cell.codes, cuda)
    ms = gpu_cells.milliseconds(lambda _: write())
    moved = items.nbytes + sum(part.nbytes for part in (made.blocks, made.fine) if part is not None)
    floor, rate = moved / limits["copy_gb_per_s"] / 1e6, 1e3 * cell.N / ms
    return {
        "ms": round(ms, 4),
        "floor_ms": round(floor, 4),
        "of_floor": round(floor / ms, 3),
        "rows_per_s": round(rate),
        "bar_rows_per_s": ENCODING_BAR,
        "met": rate >= ENCODING_BAR,
    }


def run_table(cells: list[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Measures the cells of one table, one after the other; yields (cell, figures or the error in words)."""
    limits, (kind, rows, r) = gpu_cells.ceilings(), cells[0].table
    items = items_of("decay" if kind == "encode" else kind, rows, r)
    packed: dict[tuple[str, bool], list[Any]] = {}

    def figures(cell: Any) -> dict[str, Any]:
        if isinstance(cell, Encoding):
            return measure_encoding(cell, items, limits)
        way = (cell.codes, cell.blocks)
        if way not in packed:
            packed.clear()  # before the next ones are made
            packed[way] = packed_copies(items, *way)
        return measure(cell, packed[way], limits)

    for cell in cells:
        yield gpu_cells.attempted(cell, limits, lambda cell=cell: figures(cell))
