"""Cells of packed tables in the GPU acceptance run, without a GPU: how results are checked, what is measured."""

import sys
from pathlib import Path

import packed_calls
import pytest
import torch

from urm_kernels import ItemTable, score_topk
from urm_kernels.backends import cuda, reference
from urm_kernels.backends.cuda import plan

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import gpu_cells
import gpu_packed
from test_gpu_acceptance import ENCODED, PACKED

LIMITS = {"copy_gb_per_s": 3000.0, "int8_top_per_s": 1500.0, "s8_mma_top_per_s": 1000.0}


def packed_table(kind, codes, rows=9000, r=16, **ways):
    """(cell, table) on the CPU, with rows enough for a scan."""
    cell = gpu_packed.Cell(kind, codes, rows, r, 2, 3, 10, **ways)
    return cell, gpu_packed.packed_copies(gpu_packed.items_of(kind, rows, r, "cpu"), codes, cell.blocks)[0]


@pytest.fixture
def stand_in():
    if reason := packed_calls.why_not(torch.device("cpu")):
        pytest.skip(reason)
    with packed_calls.stand_in():
        yield


@pytest.fixture
def without_clocks(monkeypatch):
    """Calls are made, and take 2 ms, or 1 replayed."""

    def taking(time):
        return lambda call, graphs=1: [call(turn) for turn in range(graphs)] and time

    monkeypatch.setattr(gpu_cells, "with_extra_bytes", lambda call: (call(), 1 << 20))
    monkeypatch.setattr(gpu_cells, "milliseconds", taking(2.0))
    monkeypatch.setattr(gpu_cells, "host_milliseconds", taking(0.5))
    monkeypatch.setattr(gpu_cells, "replayed_milliseconds", taking(1.0))


@pytest.mark.parametrize(("kind", "codes"), [("decay", "int4"), ("clustered", "int4+int8"), ("iid", "int8")])
def test_packed_cells_are_compared_with_the_plain_call(stand_in, without_clocks, monkeypatch, kind, codes):
    cell, table = packed_table(kind, codes)
    figures = gpu_packed.measure(cell, [table, table], LIMITS, plain="reference")
    assert set(PACKED) - {"status", "ceilings"} <= set(figures) and "status" not in figures
    assert (figures["ms"], figures["graph_ms"], figures["extra_mib"]) == (2.0, 1.0, 1.0)
    assert figures["unproven_users"] == 0 and 20 <= figures["survivors"] < figures["pairs"] // 10 == 1800


def test_a_packed_cell_that_is_wrong_is_not_timed_and_one_that_is_unproven_fails(stand_in, without_clocks, monkeypatch):
    cell, table = packed_table("decay", "int4")
    monkeypatch.setattr(gpu_packed, "proof", lambda *arguments: {"unproven_users": 2})
    unproven = gpu_packed.measure(cell, [table], LIMITS, plain="reference")
    assert unproven["status"] == "failed: 2 users were not proven by the guess" and unproven["ms"] == 2.0

    def wrong(call):
        result = call()
        return result._replace(ids=result.ids + 1), 0

    monkeypatch.setattr(gpu_cells, "with_extra_bytes", wrong)
    monkeypatch.setattr(gpu_cells, "milliseconds", None)
    with pytest.raises(AssertionError, match="not the plain call's: 20 ids, 0 scores"):
        gpu_packed.measure(cell, [table], LIMITS, plain="reference")


def test_a_recall_below_one_is_compared_by_scores_and_share(stand_in, without_clocks, monkeypatch):
    cell, table = packed_table("iid", "int2+int4", recall=0.9)
    assert cell.name.startswith("iid int2+int4 recall=0.9 N=9e3")
    figures = gpu_packed.measure(cell, [table], LIMITS, plain="reference")
    assert set(PACKED) - {"status", "ceilings"} <= set(figures) and "status" not in figures
    assert 0.8 < figures["found_share"] <= 1
    queries = gpu_packed.queries_of(cell, "cpu")
    plain = score_topk(queries, table.factors, 10)
    last = score_topk(queries, table.factors, 9000)
    for wrong, words in (
        (type(plain)(last.scores[:, -10:], last.ids[:, -10:]), "a share of 0.0000 was found, not 0.9"),
        (plain._replace(scores=plain.scores + 1), "20 scores are not the rows', 10 ids differ"),
        (type(plain)(plain.scores[:, :1].expand(2, 10), plain.ids[:, :1].expand(2, 10)), "0 scores .*, 1 ids differ"),
    ):
        with pytest.raises(AssertionError, match=words):
            gpu_packed.check_share(wrong, plain, queries, table.factors, 0.9)


def test_cells_of_tables_in_blocks_are_those_of_a_scan_that_leaves_tiles_out(stand_in, without_clocks, monkeypatch):
    monkeypatch.setattr(plan, "FEWEST_LISTED", 1)
    cell, table = packed_table("clustered", "int4", 70_000, blocks=True)
    assert cell.name.startswith("clustered int4 blocks N=7e4") and table.codes().cells is not None
    figures = gpu_packed.measure(cell, [table], LIMITS, plain="reference")
    assert "status" not in figures and figures["found_share"] == 1
    assert figures["bytes_read"] < table.codes().blocks.nbytes


def test_one_wrong_bit_of_a_packed_result_is_found():
    items = gpu_packed.items_of("iid", 500, 8, "cpu")
    plain = score_topk(torch.zeros(2, 1, 8), items, 5)
    gpu_packed.check_bits(plain, plain)
    for wrong, words in (
        (plain._replace(scores=-plain.scores), "0 ids, 10 scores"),  # -0.0 is not the plain call's 0.0
        (plain._replace(ids=plain.ids.flip(1)), "8 ids, 0 scores"),
    ):
        with pytest.raises(AssertionError, match=words):
            gpu_packed.check_bits(wrong, plain)


def test_packed_tables_smaller_than_the_cache_are_read_in_turns(monkeypatch):
    items = gpu_packed.items_of("decay", 640, 8, "cpu")
    held = ItemTable(items).pack().codes().blocks.nbytes
    monkeypatch.setattr(gpu_cells, "CACHE", 3 * held)
    copies = gpu_packed.packed_copies(items, "int4")
    assert len({table.codes().blocks.data_ptr() for table in copies}) == 4
    assert all(torch.equal(table.codes().blocks, copies[0].codes().blocks) for table in copies)


def test_encoders_are_compared_with_the_cpus_bits_before_they_are_timed(stand_in, without_clocks):
    items = gpu_packed.items_of("decay", 1000, 16, "cpu")
    for codes in ("int4", "int8", "int4+int8"):
        gpu_packed.check_encoder(items, codes, cuda)
    figures = gpu_packed.measure_encoding(gpu_packed.Encoding("int4", 1000, 16), items, LIMITS)
    assert (figures["rows_per_s"], figures["met"]) == (500_000, False)
    assert set(ENCODED) - {"status", "ceilings"} == set(figures)

    class Wrong:
        def encode_blocks(self, items, row_scale, codes):
            reference.encode_blocks(items, row_scale, codes)
            codes.blocks[-1, -1] ^= 1

    with pytest.raises(AssertionError, match="1 bytes of blocks are not the CPU's"):
        gpu_packed.check_encoder(items, "int8", Wrong())


def test_packed_data_is_of_the_kinds_that_testing_has(monkeypatch):
    whole = {kind: gpu_packed.items_of(kind, 3000, 8, "cpu").float() for kind in ("iid", "clustered", "decay")}
    assert whole["iid"].std() == pytest.approx(1, abs=0.02) and whole["decay"][:, 7].std() < 0.5
    # Few centres, half a spread around each: most of a clustered row's square is its centre's.
    centres = gpu_packed.centres_of(3000, 8, "cpu")
    assert centres.shape == (6, 8)
    near = torch.nn.functional.cosine_similarity(whole["clustered"][:, None], centres[None], dim=2).amax(1)
    assert near.mean() > 0.8
    for kind in whole:
        queries = gpu_packed.queries_of(gpu_packed.Cell(kind, "int4", 3000, 8, 2, 3, 10), "cpu")
        assert queries.shape == (2, 3, 8) and queries.dtype == torch.float32
    monkeypatch.setattr(gpu_packed, "_PART", 700)
    assert gpu_packed.items_of("clustered", 3000, 8, "cpu").shape == (3000, 8)


def test_floors_of_packed_cells_are_reads_of_codes_or_products_of_bytes():
    cell = gpu_packed.Cell("decay", "int4", 50_000_000, 128, 1, 128, 1000)
    read, products = gpu_packed.floors_ms(cell, 3_600_000_000, LIMITS)
    assert (read, products) == (pytest.approx(1.2), pytest.approx(1.6384))
    without = {name: limit for name, limit in LIMITS.items() if name != "s8_mma_top_per_s"}
    assert gpu_packed.floors_ms(cell, 3_600_000_000, without)[1] == pytest.approx(1.6384 / 1.5)


def test_a_packed_table_is_measured_code_by_code_and_an_error_costs_its_own_cell(monkeypatch):
    made = []
    monkeypatch.setattr(gpu_cells, "ceilings", lambda: LIMITS)
    monkeypatch.setattr(gpu_packed, "items_of", lambda kind, rows, r: torch.zeros(rows, r))
    monkeypatch.setattr(gpu_packed, "packed_copies", lambda items, *way: made.append(way) or [way])

    def measure(cell, tables, limits):
        if cell.M == 8:
            raise ValueError("wrong")
        return {"tables": tables}

    monkeypatch.setattr(gpu_packed, "measure", measure)
    cells = [cell._replace(N=10) for cell in gpu_packed.named_cells() if cell.table[0] == "clustered"]
    found = list(gpu_packed.run_table(cells))
    assert [cell for cell, _ in found] == cells
    assert made == [("int4", False), ("int8", False), ("int4", False), ("int4", True)]
    assert all(figures["ceilings"] == LIMITS for _, figures in found)
    for cell, figures in found:
        assert figures["status"] == ("failed: ValueError: wrong" if cell.M == 8 else "ok")


def test_the_rate_of_byte_products_is_the_extensions_where_it_has_one(monkeypatch):
    class Extension:
        def byte_products(self, steps, stream):
            assert steps > 1000 and stream == 7
            return 9e14

    class OfAnotherCard:
        def byte_products(self, steps, stream):
            raise RuntimeError("no kernel image is available for execution on the device")

    class Stream:
        cuda_stream = 7

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    modules = [
        (Extension(), {"s8_mma_top_per_s": 900.0}),
        *((other, {}) for other in (OfAnotherCard(), object(), None)),
    ]
    for module, found in modules:
        monkeypatch.setitem(sys.modules, "urm_kernels._cuda", module)
        assert gpu_cells.byte_products() == found
