"""Packed tables: the same bits as plain ones, whatever the data, the codes, the machine and the way of asking."""

import pytest
import torch
from support import CODES, HALVES, INF, NAN, REDUCTIONS, assert_same_bits, bits, by_reference, on_machine, packed

from urm_kernels import ItemTable, log_partition, score_topk
from urm_kernels.testing import KINDS, forced, make_items, make_queries

SYNTHETIC = [kind for kind in KINDS if kind not in ("smollm2", "minilm")]
MACHINES = [
    ("portable", "bounded", "1"),
    ("avx2", "bounded", "2"),
    ("avx2", "auto", "1"),
    ("avx512", "auto", "3"),
    ("avx512_vnni", "bounded", "1"),
    ("avx512_vnni", "bounded", "7"),
    ("avx512_vnni", "auto", "2"),
    ("amx", "bounded", "2"),
    ("cuda", "fibers", "1"),
]


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=MACHINES, ids="/".join)
def machine(request, monkeypatch):
    """An instruction set, a way to scan ("bounded": codes from the first row on, whatever they rule out), threads; or
    the CUDA kernels as they run without a GPU."""
    with on_machine(*request.param, monkeypatch):
        yield request.param


def plain(queries, items, k, **options):
    """By the exact scan, which other tests compare with the reference."""
    with forced("cpu", scan="exact"):
        return score_topk(queries, items, k, **options)


def assert_packed_equals_plain(queries, items, k, kinds, **options):
    table = ItemTable(items).pack(kinds)
    assert_same_bits(score_topk(queries, table, k, **options), plain(queries, items, k, **options))


@pytest.mark.parametrize("kind", SYNTHETIC)
def test_every_kind_of_data(machine, kind):
    r, rows = (24, 4500) if machine[0] == "portable" else (72, 9001)
    items = make_items(kind, rows, r, 0)
    queries = make_queries(kind, 3, 5, r, 1, items)
    for kinds, k in zip(CODES, (1, 50, 700, 50), strict=True):
        assert_packed_equals_plain(queries, items, k, kinds)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_reductions_bias_and_queries_that_do_not_exist(machine, kinds, reduce):
    items = make_items("clustered", 5003, 40, 0)
    queries = make_queries("clustered", 6, 21, 40, 1, items)
    exists = torch.rand(6, 21, generator=generator(0)) < 0.6
    exists[0], exists[1, 1:], exists[2] = False, False, True
    bias = torch.randn(5003, generator=generator(1))
    bias[::7], bias[3], bias[40], bias[41] = bias[::7] * 30, INF, -INF, NAN
    for options in ({}, {"bias": bias}, {"query_mask": exists}, {"bias": bias, "query_mask": exists}):
        assert_packed_equals_plain(queries, items, 33, kinds, reduce=reduce, **options)


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 63, 255, 256, 257, 4095, 4096, 4129, 12289])
@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_sizes_around_blocks_stretches_and_chunks(machine, kinds, rows):
    if machine[0] in ("portable", "cuda") and rows > 4129:
        pytest.skip("slow there, and the same code")
    items = make_items("iid", rows, 20, 0) if rows else torch.empty(0, 20)
    queries = torch.randn(2, 3, 20, generator=generator(1))
    for k in {0, 1, min(rows, 10), max(0, rows - 1), rows, rows + 5}:
        assert_packed_equals_plain(queries, items, k, kinds)


@pytest.mark.parametrize("r", [1, 2, 3, 4, 5, 17, 31, 63, 64, 65, 127, 300])
@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_widths(machine, kinds, r):
    items = make_items("iid", 4200, r, 0)
    assert_packed_equals_plain(torch.randn(2, 9, r, generator=generator(1)), items, 20, kinds)


@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_filters_and_removed_rows(machine, kinds):
    rows, users = 4500, 3
    items = make_items("decay", rows, 32, 0)
    queries = make_queries("decay", users, 4, 32, 1, items)
    some = torch.rand(users, rows, generator=generator(2)) < 0.3
    some[1] = False
    some[1, 77] = True
    exclude = plain(queries, items, 60).ids[:, ::2].contiguous()
    exclude[2] = -1
    table = ItemTable(items).pack(kinds)
    for mask in (None, some, some[0], packed(some), packed(some[0])):
        for out in (None, exclude):
            got = score_topk(queries, table, 40, mask=mask, exclude=out)
            assert_same_bits(got, plain(queries, items, 40, mask=mask, exclude=out))
    removed = torch.arange(0, rows, 3)
    table.remove(removed)
    there = torch.ones(rows, dtype=torch.bool)
    there[removed] = False
    assert_same_bits(score_topk(queries, table, 40), plain(queries, items, 40, mask=there))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_dtypes_strides_and_a_single_row_for_all(kinds, dtype):
    wide = make_items("iid", 9000, 70, 0).to(dtype)
    queries = make_queries("iid", 2, 3, 33, 1, wide[:, :33].float())
    for items in (wide[:, 3:36], wide[::2, :33], wide.flip(0)[:, :33].T.contiguous().T, wide[:1, :33].expand(5000, 33)):
        assert_packed_equals_plain(queries, items, 25, kinds)
        assert_packed_equals_plain(queries.to(dtype), items, 25, kinds)


@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_row_scales_float8_and_text(kinds):
    queries = torch.randn(2, 4, 16, generator=generator(1))
    factors = torch.randn(5000, 16, generator=generator(0))
    scale = torch.randn(5000, generator=generator(2)) * 3
    scale[:3] = torch.tensor([0.0, 1e30, -1e-30])
    for table in (
        ItemTable(factors.to(torch.float8_e4m3fn), row_scale=scale),
        ItemTable(factors, row_scale=scale, bias=scale.flip(0)),
        ItemTable(factors, text=torch.randn(5000, 5, generator=generator(3)), text_projection=torch.randn(5, 16)),
    ):
        before = [score_topk(queries, table, 30, reduce=reduce) for reduce in REDUCTIONS]
        table.pack(kinds)
        for reduce, wanted in zip(REDUCTIONS, before, strict=True):
            assert_same_bits(score_topk(queries, table, 30, reduce=reduce), wanted)


@pytest.mark.parametrize("threads", ["1", "2", "5"])
@pytest.mark.parametrize("kind", ["iid", "sorted", "reversed", "equal", "duplicates", "clustered"])
def test_large_enough_for_guesses(monkeypatch, kind, threads):
    """More than 65,536 rows: thresholds are guessed from codes, again as the scan goes on, and proven in the end."""
    monkeypatch.setenv("URM_NUM_THREADS", threads)
    items = make_items(kind, 100_003, 16, 0)
    queries = make_queries(kind, 2, 3, 16, 1, items)
    for k, kinds in ((1, ("int8",)), (100, ("int4",)), (3000, ("int4", "int8")), (60_000, ("int4",))):
        assert_packed_equals_plain(queries, items, k, kinds)


def test_a_guess_that_is_refuted_is_made_good():
    """All rows of every 64th block are far better than the rest: the sample promises more than there is."""
    items = torch.randn(131_072, 8, generator=generator(0))
    better = (torch.arange(len(items)) // 32) % 64 == 0
    items[better] += 5
    queries = torch.ones(1, 1, 8)
    for k in (3000, 4000):
        table = ItemTable(items).pack()
        got, stats = score_topk(queries, table, k, return_stats=True)
        assert_same_bits(got, plain(queries, items, k))
        assert stats.proven.all()


@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_queries_that_have_no_bounds(machine, kinds):
    """Infinite, NaN or very long ones, zeros that win, users without any: the group is scanned by its rows."""
    items = -make_items("iid", 4400, 12, 0).abs()
    queries = torch.rand(5, 3, 12, generator=generator(1))
    queries[0, 1, 2], queries[1, 0, 0], queries[2] = INF, NAN, queries[2] * 1e30
    queries[3, 1:] = 0
    exists = torch.tensor([[True] * 3] * 4 + [[False] * 3])
    for users in (slice(0, 5), slice(3, 5), slice(2, 3)):
        assert_packed_equals_plain(queries[users], items, 20, kinds, query_mask=exists[users])


@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_the_reference_goes_the_same_way(kinds):
    items = make_items("norms", 700, 20, 0)
    queries = make_queries("norms", 2, 3, 20, 1, items)
    bias = torch.randn(700, generator=generator(0))
    table = ItemTable(items, bias=bias).pack(kinds)
    for reduce in REDUCTIONS:
        wanted = by_reference(queries, items, 15, bias=bias, reduce=reduce)
        got, stats = score_topk(queries, table, 15, reduce=reduce, backend="reference", return_stats=True)
        assert_same_bits(got, wanted)
        assert_same_bits(score_topk(queries, table, 15, reduce=reduce, backend="cpu"), wanted)
        assert 30 <= stats.survivors[1] <= stats.survivors[0] <= 1400


@pytest.mark.parametrize("kinds", CODES, ids="+".join)
@pytest.mark.parametrize("kind", ["clustered", "iid", "giant"])
def test_the_partition_of_a_packed_table(machine, kinds, kind):
    items = make_items(kind, 6000, 24, 0)
    queries = make_queries(kind, 3, 4, 24, 1, items)
    table = ItemTable(items).pack(kinds)
    for options in ({}, {"reduce": "logsumexp", "temperature": 0.3}):
        with forced("cpu", scan="exact"):
            wanted = log_partition(queries, items, **options)
        assert torch.equal(bits(log_partition(queries, table, **options)), bits(wanted))


@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_gradients_are_those_of_the_plain_table(kinds):
    items = make_items("iid", 5000, 16, 0)
    queries = torch.randn(2, 3, 16, generator=generator(1))
    grads = []
    for pack in (False, True):
        table, asked = ItemTable(items.clone(), trainable=True), queries.clone().requires_grad_()
        if pack:
            table.pack(kinds)
        score_topk(asked, table, 20).scores.square().sum().backward()
        grads.append((asked.grad, table.factors.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_one_user_alone_equals_that_user_in_a_batch():
    items = make_items("clustered", 80_000, 32, 0)
    queries = make_queries("clustered", 40, 16, 32, 1, items)
    table = ItemTable(items).pack(("int4", "int8"))
    together = score_topk(queries, table, 50)
    for user in (0, 7, 39):
        alone = score_topk(queries[user : user + 1], table, 50)
        assert_same_bits(alone, type(alone)(*(part[user : user + 1] for part in together)))
