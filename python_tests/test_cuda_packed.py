"""The CUDA backend of packed tables beyond the contract: which tables it takes, its encoder, every way through a scan.

Without a GPU the kernels run as fibers (simt/).
"""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import packed_calls
import pytest
import simt
import torch
from packed_calls import packed
from support import CODES, HALVES, INF, NAN, assert_same_bits, by_reference
from test_codes import stressful_rows

from urm_kernels import ItemTable, score_topk
from urm_kernels.backends import codes as formats
from urm_kernels.backends import cpu, cuda, select
from urm_kernels.backends.cuda import launching, plan, search
from urm_kernels.backends.table_view import Overlay, ScanOptions, TableView
from urm_kernels.table_codes import room_for
from urm_kernels.testing import make_items, make_queries

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _stand_in():
    if reason := packed_calls.why_not(CPU):
        pytest.skip(reason)
    with packed_calls.stand_in():
        yield


def generator(seed):
    return torch.Generator().manual_seed(seed)


def searched(queries, view, k, counts=None, **options):
    options = ScanOptions(**options)
    return search.search(queries, view, options, k, launching.launcher(CPU), cuda.card(CPU), counts)


def made_by(encode, items, scale, kinds, rows=None):
    """Codes by a backend; places that it does not write are 0xAA."""
    codes = room_for(formats.rotation(items.shape[1], 3), len(items) if rows is None else 160, items.shape[1], kinds)
    for part in codes[2:]:
        if part is not None:
            part.fill_(0xAA)
    encode(items, scale, codes, *([] if rows is None else [rows]))
    return codes


def assert_same_codes(made, wanted):
    assert torch.equal(made.blocks, wanted.blocks)
    assert made.fine is None or torch.equal(made.fine, wanted.fine)


@pytest.mark.parametrize("r", [1, 2, 3, 5, 16, 31, 64, 96, 100, 128, 257, 1025])
@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_the_encoder_makes_the_cpus_bits(kinds, r):
    rows = stressful_rows(r)
    assert_same_codes(made_by(cuda.encode_blocks, rows, None, kinds), made_by(cpu.encode_blocks, rows, None, kinds))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float8_e4m3fn])
@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_the_encoder_takes_narrow_rows_scales_and_strides(kinds, dtype):
    wide = torch.cat([make_items("iid", 32, 40, 0) * 2.0**e for e in (-100, -21, 0, 8, 49, 100)])
    rows = wide.clamp(-400, 400).to(dtype)[:, 3:36] if dtype == torch.float8_e4m3fn else wide.to(dtype)[:, 3:36]
    scale = 2.0 ** torch.tensor([-149.0, -120, -60, -1, 0, 1, 60, 120])[torch.arange(len(rows)) % 8]
    scale[::11], scale[::13], scale[::31] = 0, -scale[::13], NAN
    for each in (None, scale, scale.bfloat16()):
        assert_same_codes(made_by(cuda.encode_blocks, rows, each, kinds), made_by(cpu.encode_blocks, rows, each, kinds))


@pytest.mark.parametrize("r", [4, 33, 128, 1030])
@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_the_encoder_writes_chosen_rows_and_no_others(kinds, r):
    """Rows that share bytes, whole blocks of them, and rows behind the last block."""
    rows = torch.tensor([0, 3, 16, 19, 40, *range(64, 96), 100, 116, 159, 170])
    items = make_items("iid", len(rows), r, 0)
    encoders = (cuda.encode_rows, cpu.encode_rows)
    assert_same_codes(*(made_by(encode, items, None, kinds, rows) for encode in encoders))


def test_tables_are_taken_or_left_with_the_reason():
    items = torch.randn(100, 8, generator=generator(0))
    queries = torch.randn(1, 2, 8, generator=generator(1))
    view = packed(TableView(items), ("int4",))
    assert cuda.declines(queries, view) is None
    assert "no codes" in cuda.declines(queries, view._replace(codes=None))
    overlay = Overlay(torch.tensor([1]), items[:1])
    assert "being replaced" in cuda.declines(queries, view._replace(overlay=overlay))
    moved = torch.empty(view.codes.blocks.numel() + 1, dtype=torch.uint8)[1:].view_as(view.codes.blocks)
    assert "16 bytes" in cuda.declines(queries, view._replace(codes=view.codes._replace(blocks=moved)))
    celled = packed(TableView(items), ("int4",), cell_rows=32)
    assert cuda.declines(queries, celled) is None
    moved = celled.codes.cells._replace(order=torch.zeros(97, 2, dtype=torch.int32)[1:])
    assert "16 bytes" in cuda.declines(queries, celled._replace(codes=celled.codes._replace(cells=moved)))
    assert select.choose("score_topk", queries, view, "cuda") is cuda
    with pytest.raises(ValueError, match="'cuda' cannot run this call: the table has no codes"):
        score_topk(queries, items, 3, backend="cuda")
    assert "float64" in cuda.why_not(CPU, (torch.float64,))


def test_a_gpu_without_extension_and_cupy_is_told_so(monkeypatch):
    def missing(name):
        raise ImportError(f"no {name}")

    monkeypatch.setattr(launching.importlib, "import_module", missing)
    launching._found.cache_clear()
    try:
        reason = launching.why_not(torch.device("cuda"))
        assert "no urm_kernels._cuda" in reason and "no cupy" in reason
    finally:
        launching._found.cache_clear()


@pytest.mark.parametrize("kinds", CODES, ids="+".join)
@pytest.mark.parametrize(("B", "M", "room"), [(9, 1, 600), (13, 2, 600), (5, 3, 600), (6, 7, 600), (3, 17, 1700)])
def test_column_groups(monkeypatch, kinds, B, M, room):
    monkeypatch.setattr(plan, "SHARED_COLUMNS", room)
    items = make_items("clustered", 700, 40, 0)
    queries = make_queries("clustered", B, M, 40, 1, items)
    with packed_calls.packed_calls(kinds, CPU):
        assert plan.plan_scan(B, M, 40).group_users < B
        for k in (20, 600):
            assert_same_bits(score_topk(queries, items, k), by_reference(queries, items, k))


@pytest.mark.parametrize("M", [1, 2, 4, 9])
def test_queues_are_emptied_amid_a_tile(M):
    """Every row survives for every user, more pairs than a queue holds."""
    items = make_items("iid", 300, 16, 0)
    queries = make_queries("iid", 33, M, 16, 1, items)
    with packed_calls.packed_calls(("int4",), CPU):
        assert plan.plan_scan(33, M, 16).group_users >= 24
        assert_same_bits(score_topk(queries, items, 290), by_reference(queries, items, 290))


def test_long_rows_and_many_queries_take_the_general_kernel():
    for r, M in ((200, 3), (130, 1), (16, 1100)):
        assert plan.plan_scan(2, M, r).steps == 0
        items = make_items("decay", 600, r, 0)
        queries = make_queries("decay", 2, M, r, 1, items)
        with packed_calls.packed_calls(("int4",), CPU):
            assert_same_bits(score_topk(queries, items, 15), by_reference(queries, items, 15))


@pytest.mark.parametrize("reduce", ["max", "logsumexp"])
def test_users_of_one_column_group_with_nothing_in_common(reduce):
    """Lengths sixty decades apart, an infinite and a NaN query, zeros: each keeps its own bound."""
    items = make_items("norms", 900, 24, 0)
    queries = torch.randn(8, 3, 24, generator=generator(1))
    queries *= 10.0 ** torch.tensor([-35.0, -18, -5, 0, 3, 15, 0, 0])[:, None, None]
    queries[6, 1, 2], queries[7, 0, 0], queries[3, 1] = INF, NAN, 0
    bias = torch.randn(900, generator=generator(2)) * 1e3
    for kinds in CODES:
        for options in ({}, {"bias": bias}):
            with packed_calls.packed_calls(kinds, CPU):
                got = score_topk(queries, items, 25, reduce=reduce, **options)
            assert_same_bits(got, by_reference(queries, items, 25, reduce=reduce, **options))


def test_counts_are_those_of_a_scan():
    items = make_items("decay", 20_000, 64, 0)
    queries = make_queries("decay", 2, 8, 64, 1, items)
    view = packed(TableView(items), ("int4",))
    counts = torch.zeros(3, dtype=torch.int64)
    found = searched(queries, view, 50, counts)
    wanted = by_reference(queries, items, 50)
    assert torch.equal(found.scores, wanted.scores) and torch.equal(found.ids, wanted.ids)
    read, survivors, scored = counts.tolist()
    assert 2 * 50 <= scored <= survivors + 2 * 64 < 4000  # the last rows have no codes
    assert read >= view.codes.blocks.numel() + 4 * 64 * scored and int(found.unproven) == 0


def test_a_refuted_guess_and_a_list_that_overflows_are_made_good():
    items = torch.randn(12_000, 8, generator=generator(0))
    better = torch.arange(len(items)) % 7 == 0
    items[better] += 4
    items[3000:, :] = items[3000]  # nine thousand ties
    queries = torch.ones(2, 1, 8)
    queries[1] = items[3000]
    view = packed(TableView(items), ("int4",))
    found = searched(queries, view, 300)
    wanted = by_reference(queries, items, 300)
    assert int(found.unproven) >= 1
    assert torch.equal(found.scores, wanted.scores) and torch.equal(found.ids, wanted.ids)


@pytest.mark.parametrize("k", [4095, 4096, 4097, 9000])
def test_more_results_than_are_sorted_in_shared_memory(k):
    items = torch.randint(-3, 4, (9000, 4), generator=generator(0)).float()
    queries = torch.randn(1, 2, 4, generator=generator(1))
    with packed_calls.packed_calls(("int4",), CPU):
        assert_same_bits(score_topk(queries, items, k), by_reference(queries, items, k))


class _FakeCuPy:
    """As much of CuPy as RuntimeCompiled asks for; its kernels run as fibers."""

    class RawModule:
        def __init__(self, *, code, options, name_expressions):
            assert code == launching.CODE and options == launching.options(launching.sources())
            self.names = name_expressions

        def get_function(self, name):
            assert name in self.names
            return _FakeKernel(name)

    class cuda:
        class Device:
            attributes = {"MaxSharedMemoryPerBlockOptin": 232448}  # noqa: RUF012

            def __init__(self, number):
                assert number == 3

            def __enter__(self):
                return self

            def __exit__(self, *failed):
                pass

        class ExternalStream(Device):
            def __init__(self, address, number):
                assert (address, number) == (77, 3)


class _FakeKernel:
    def __init__(self, name):
        self.name, self.max_dynamic_shared_size_bytes = name, 0

    def __call__(self, grid, block, values, *, shared_mem):
        assert all(value.size == 1 for value in values)  # CuPy hands arrays of one element over by value
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        arguments = [tuple(value.view("int64").reshape(-1).tolist()) for value in values]
        simt.launcher().launch(self.name, grid, *block, shared_mem, arguments)


def test_cupy_is_given_the_sources_the_stream_and_structs_by_value(monkeypatch):
    items = make_items("decay", 700, 20, 0)
    queries = make_queries("decay", 2, 3, 20, 1, items)
    view = packed(TableView(items), ("int4", "int8"))
    stream = type("Stream", (), {"cuda_stream": 77})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(plan, "DENSE_ROWS", 40)
    launcher = launching.RuntimeCompiled(_FakeCuPy, launching.sources())
    found = search.search(queries, view, ScanOptions(), 9, launcher, cuda.card(CPU))
    wanted = by_reference(queries, items, 9)
    assert torch.equal(found.scores, wanted.scores) and torch.equal(found.ids, wanted.ids)


def test_packing_and_updates_go_through_the_encoder_of_the_device(monkeypatch):
    """As on a GPU, where the CPU's encoder declines."""
    monkeypatch.setattr(cpu, "why_not", lambda device, dtypes: "not here")
    items = make_items("iid", 200, 16, 0)
    table = ItemTable(items.clone()).pack(("int4", "int8"))
    table.update(torch.tensor([5, 21, 199]), items[:3])
    changed = items.clone()
    changed[torch.tensor([5, 21, 199])] = items[:3]
    monkeypatch.undo()
    wanted = ItemTable(changed).pack(("int4", "int8"))
    assert_same_codes(table.codes(), wanted.codes())


@functools.cache
def _kernel(body):
    """A library with one kernel of that body."""
    folder = Path(tempfile.mkdtemp())
    (folder / "kernel.cc").write_text(
        f"__global__ void kernel(int64_t) {{ {body} }}\n"
        'extern "C" const char* urm_launch(const char*, int64_t x, int64_t y, int64_t threads, int64_t shared,\n'
        "                                  const void* const* values) {\n"
        "  try { urm_simt::launch(kernel, {unsigned(x), unsigned(y), 1}, int(threads), shared, values); }\n"
        "  catch (const std::logic_error&) { return urm_simt::failure; }\n"
        "  return nullptr;\n}\n"
    )
    subprocess.run(["g++", *simt._FLAGS, "-o", folder / "kernel.so", folder / "kernel.cc"], check=True)
    return simt.Launcher(ctypes.CDLL(str(folder / "kernel.so")))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("if (threadIdx.x < 3) __syncwarp();", "threads wait for each other at different places"),
        ("if (threadIdx.x % 2) __syncwarp(); else __ballot_sync(~0u, 1);", "lanes of a warp meet for different things"),
        ("__ballot_sync(0xFFFFu, 1);", "a part of a warp meets"),
        ("alignas(16) static int64_t two[3]; (void)__ldg((uint4*)(two + 1));", "a load is not aligned"),
    ],
)
def test_the_stand_in_reports_what_a_gpu_would_not_do(body, words):
    with pytest.raises(RuntimeError, match=words):
        _kernel(body).launch("kernel", (1, 1), 64, 0, [(0,)])


def test_the_stand_in_lets_warps_part_between_barriers():
    body = "if (threadIdx.x < 32) __syncthreads(); else __syncwarp(), __syncwarp(), __syncthreads();"
    _kernel(body).launch("kernel", (3, 2), 64, 0, [(0,)])


@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_limits_that_overflow_prune_nothing(kinds):
    """A bias over a step is infinite; so is a threshold, beside a row whose sum with its bias overflows."""
    items = torch.randn(4096, 16, generator=generator(0))
    items[2000:2100] *= 2.0**70  # may hold anything
    queries = torch.randn(1, 1, 16, generator=generator(1)) * 2.0**-92
    bias = torch.zeros(4096)
    bias[1000:2100] = 1e12
    largest = torch.zeros(4096)
    largest[100:1000], largest[2000:] = torch.finfo(torch.float32).max, INF
    long = torch.rand(4096, 16, generator=generator(2)) * 2.0**50
    with packed_calls.packed_calls(kinds, CPU):
        got = score_topk(queries, items, 8, bias=bias)
        other = score_topk(queries.abs() * 2.0**150, long, 8, bias=largest)
    assert_same_bits(got, by_reference(queries, items, 8, bias=bias))
    assert_same_bits(other, by_reference(queries.abs() * 2.0**150, long, 8, bias=largest))


@pytest.mark.parametrize("hidden", [-INF, torch.finfo(torch.float32).min])
def test_rows_that_a_bias_hides_are_pruned(hidden):
    items = make_items("iid", 8000, 32, 0)
    queries = make_queries("iid", 1, 4, 32, 1, items)
    bias = torch.zeros(8000)
    bias[::2] = hidden
    counts = [torch.zeros(3, dtype=torch.int64) for _ in range(2)]
    searched(queries, packed(TableView(items), ("int8",)), 10, counts[0])
    searched(queries, packed(TableView(items, bias), ("int8",)), 10, counts[1])
    assert counts[1][1] < 2 * counts[0][1] + 200


def test_users_who_can_get_nothing_cost_nothing():
    items = make_items("iid", 3000, 32, 0)
    queries = make_queries("iid", 8, 2, 32, 1, items)
    exists = torch.ones(8, 2, dtype=torch.bool)
    exists[1:4] = False
    queries[4:, 0, 0] = NAN
    view = packed(TableView(items), ("int8",))
    counts, alone = (torch.zeros(3, dtype=torch.int64) for _ in range(2))
    found = searched(queries, view, 10, counts, query_mask=exists)
    searched(queries[:1], view, 10, alone)
    assert found.ids[1:].eq(-1).all() and counts[2] <= 2 * alone[2]


def test_a_periodic_catalogue_is_sampled_as_it_is():
    items = make_items("iid", 20_000, 16, 0)
    for period in (2, 4, 7):
        items[::period] = items[::period] * 1e-3
        with packed_calls.packed_calls(("int8",), CPU):
            view = packed(TableView(items), ("int8",))
            counts = torch.zeros(3, dtype=torch.int64)
            found = searched(torch.ones(1, 1, 16), view, 20, counts)
        assert int(found.unproven) == 0 and counts[1] < 1500


def test_every_launch_of_the_longest_rows_fits_every_card(monkeypatch):
    asked = []

    class Recording:
        def launch(self, name, grid, threads, shared, arguments):
            asked.append((name, grid, shared))
            launching.stand_in(CPU).launch(name, grid, threads, shared, arguments)

    monkeypatch.setattr(plan, "DENSE_ROWS", 40)
    items = make_items("iid", 70, formats.MAX_WIDTH, 0)
    queries = torch.randn(2, 2, formats.MAX_WIDTH, generator=generator(1))
    found = search.search(queries, packed(TableView(items), ("int4",)), ScanOptions(), 5, Recording(), cuda.card(CPU))
    assert torch.equal(found.ids, by_reference(queries, items, 5).ids)
    assert len(asked) == 15  # docs/gpu_packed.md counts them; six rows have no codes
    assert max(shared for _, _, shared in asked) <= 99 << 10
    # Where nobody is left, the second way is a row of blocks that look at one number, however many users there are.
    assert all(grid[1] == 1 for name, grid, _ in asked if name in ("urm::count_digits", "urm::collect_unproven"))
