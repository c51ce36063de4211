"""Packed in blocks: codes by clusters, and bounds of whole cells. No bit of a result changes, whatever is asked."""

import packed_calls
import pytest
import torch
from cuda_bounds import assert_none_is_pruned
from support import CODES, HALVES, INF, REDUCTIONS, assert_same_bits, on_machine, packed
from test_codes import stressful_queries, stressful_rows
from test_packed import SYNTHETIC, generator, plain

from urm_kernels import ItemTable, clusters, log_partition, score_topk
from urm_kernels.backends import codes as formats
from urm_kernels.backends import cpu
from urm_kernels.backends.cuda import plan
from urm_kernels.backends.table_view import TableView
from urm_kernels.testing import forced, make_items, make_queries

MACHINES = [
    ("portable", "bounded", "1"),
    ("avx2", "bounded", "2"),
    ("avx512_vnni", "bounded", "1"),
    ("avx512_vnni", "bounded", "5"),
    ("avx512_vnni", "auto", "2"),
    ("amx", "auto", "2"),
    ("amx", "exact", "2"),
    ("cuda", "packed", "1"),
]
SLOW = ("portable", "cuda")


@pytest.fixture(params=MACHINES, ids="/".join)
def machine(request, monkeypatch):
    """An instruction set, a way to scan ("bounded": cells and codes whatever they rule out), threads. "cuda" are the
    CUDA kernels as they run without a GPU."""
    with on_machine(*request.param, monkeypatch):
        yield request.param


def in_blocks(items, kinds=("int4",), blocks=True, **parts):
    return ItemTable(items, **parts).pack(kinds, blocks=blocks)


def cell_bounds(queries, table):
    """[cells, users]."""
    view = TableView(table.factors, None, table.row_scale, None, None, table.codes())
    out = torch.empty(table.codes().cells.number(), len(queries))
    assert cpu.extension().cell_bounds(cpu._queries(queries.contiguous(), None), cpu._table(view), out.data_ptr())
    return out


def assert_cells_bound(queries, table):
    """No row's canonical dot is above its cell's bound: what scores without a bias are made of."""
    cells = table.codes().cells
    rows = cells.order[: cells.number() * cells.rows, 0].long()
    best = score_topk(queries, ItemTable(table.factors, row_scale=table.row_scale), len(table))
    scores = torch.full((len(queries), len(table) + 1), -INF)
    scores.scatter_(1, best.ids.where(best.ids >= 0, len(table)), best.scores)
    of_cells = scores[:, rows].view(len(queries), cells.number(), cells.rows).amax(2).T
    assert (cell_bounds(queries, table) >= of_cells).all()


@pytest.mark.parametrize("r", [7, 100])
def test_cuda_prunes_no_row_at_its_own_score(monkeypatch, r):
    """Neither its cell nor itself."""
    monkeypatch.setattr(plan, "FEWEST_LISTED", 0)
    if reason := packed_calls.why_not(torch.device("cpu")):
        pytest.skip(reason)
    rows = stressful_rows(r).repeat(2, 1)
    for turn, scale in enumerate((None, 2.0 ** torch.randint(-60, 60, (len(rows),), generator=generator(r)))):
        table = in_blocks(rows, CODES[turn], blocks=32 + 32 * turn, row_scale=scale)
        coded = len(table) // formats.BLOCK * formats.BLOCK
        for user in stressful_queries(r):
            best = score_topk(user[None], ItemTable(rows, row_scale=scale), len(table))
            scores = torch.full((1, len(table) + 1), torch.nan)
            scores.scatter_(1, best.ids.where(best.ids >= 0, len(table)), best.scores)
            with packed_calls.stand_in():
                assert_none_is_pruned(user[None], table, scores[:, : len(table)], coded)


@pytest.mark.parametrize("r", [1, 7, 32, 100])
def test_no_cell_is_below_one_of_its_rows(r):
    rows = stressful_rows(r).repeat(5, 1)
    for scale in (None, 2.0 ** torch.randint(-60, 60, (len(rows),), generator=generator(r))):
        table = in_blocks(rows, blocks=32, row_scale=scale)
        for user in stressful_queries(r):
            assert_cells_bound(user[None], table)


@pytest.mark.parametrize("kind", [kind for kind in SYNTHETIC if ":" not in kind])
def test_no_cell_is_below_one_of_its_rows_on_every_kind_of_data(kind):
    items = make_items(kind, 3000, 48, 0)
    assert_cells_bound(make_queries(kind, 4, 6, 48, 1, items), in_blocks(items))


def test_cells_of_a_kind_are_told_apart():
    """What the level is for: cells of other clusters are far below the best score."""
    items = make_items("clustered", 20_000, 64, 0)
    queries = make_queries("clustered", 8, 1, 64, 1, items)
    bounds, best = cell_bounds(queries, in_blocks(items)), score_topk(queries, items, 1).scores[:, 0]
    assert (bounds >= best).float().mean() < 0.2
    items = torch.randn(20_000, 64, generator=generator(0))  # and rows of no kind are not
    bounds, best = cell_bounds(queries, in_blocks(items)), score_topk(queries, items, 1).scores[:, 0]
    assert (bounds >= best).float().mean() > 0.8


@pytest.mark.parametrize("kind", SYNTHETIC)
def test_every_kind_of_data(machine, kind):
    r, rows = (24, 4500) if machine[0] in SLOW else (72, 9001)
    items = make_items(kind, rows, r, 0)
    queries = make_queries(kind, 3, 9, r, 1, items)
    table = in_blocks(items, CODES[len(kind) % len(CODES)])
    for k in (1, 100, 3000):
        assert_same_bits(score_topk(queries, table, k), plain(queries, items, k))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_every_reduction_with_bias_and_scales(machine, kinds, reduce):
    items, random = make_items("clustered", 5003, 32, 0), generator(1)
    bias, scale = 3 * torch.randn(5003, generator=random), torch.randn(5003, generator=random)
    bias[::97], bias[5::101] = INF, -INF
    exists = torch.rand(3, 20, generator=random) < 0.7
    exists[2] = False
    queries = make_queries("clustered", 3, 20, 32, 1, items)
    table = in_blocks(items, kinds, bias=bias, row_scale=scale)
    options = {"query_mask": exists, "reduce": reduce}
    wanted = plain(queries, ItemTable(items, row_scale=scale), 70, bias=bias, **options)
    assert_same_bits(score_topk(queries, table, 70, **options), wanted)
    logarithms = log_partition(queries, table, **options)
    with forced("cpu", scan="exact"):
        wanted = log_partition(queries, ItemTable(items, row_scale=scale), bias=bias, **options)
    assert torch.equal(logarithms, wanted)


def test_a_bias_of_the_calls_own(machine):
    items = make_items("clustered", 6000, 32, 0)
    bias = 20 * torch.randn(6000, generator=generator(2))
    queries = make_queries("clustered", 2, 4, 32, 1, items)
    assert_same_bits(score_topk(queries, in_blocks(items), 50, bias=bias), plain(queries, items, 50, bias=bias))


@pytest.mark.parametrize("blocks", [32, 96, 512, 4096])
@pytest.mark.parametrize("rows", [0, 31, 32, 63, 64, 97, 2048, 4500])
def test_any_number_of_rows_and_any_size_of_cells(machine, rows, blocks):
    items = make_items("clustered", rows, 16, 0) if rows else torch.empty(0, 16)
    queries = torch.randn(2, 3, 16, generator=generator(3))
    table = in_blocks(items, blocks=blocks)
    for k in (5, 5000):
        assert_same_bits(score_topk(queries, table, k), plain(queries, items, k))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float8_e4m3fn], ids=str)
def test_every_dtype(machine, dtype):
    items = make_items("decay", 5000, 40, 0).to(dtype)
    queries = make_queries("decay", 4, 12, 40, 1, items.float())
    assert_same_bits(score_topk(queries, in_blocks(items), 64), plain(queries, ItemTable(items), 64))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("form", ["bool", "bits"])
@pytest.mark.parametrize("of_users", [False, True])
def test_masks(machine, form, share, of_users):
    items = make_items("clustered", 7013, 32, 0)
    queries = make_queries("clustered", 3, 5, 32, 1, items)
    mask = torch.rand(3 if of_users else 1, 7013, generator=generator(4)) < share
    mask = mask if of_users else mask[0]
    options = {"mask": packed(mask) if form == "bits" else mask, "exclude": torch.randint(7013, (3, 40))}
    table = in_blocks(items)
    table.remove(torch.arange(3, 7000, 50))
    alive = torch.ones(7013, dtype=torch.bool)
    alive[3:7000:50] = False
    wanted = plain(queries, items, 60, mask=mask & alive, exclude=options["exclude"])
    assert_same_bits(score_topk(queries, table, 60, **options), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_met_by_themselves_in_the_order_of_the_codes(machine, dtype):
    """Many queries, and rows between which codes cannot tell: the scan leaves the codes for the rows."""
    items = torch.ones(20_000, 32) + 1e-3 * torch.randn(20_000, 32, generator=generator(5))
    queries = torch.randn(2, 60, 32, generator=generator(6))
    items = items.to(dtype)
    assert_same_bits(score_topk(queries, in_blocks(items), 200), plain(queries, items, 200))


def test_a_large_table_decides_by_a_sample(machine):
    if machine[0] in SLOW:
        pytest.skip("takes a minute there")
    for kind in ("clustered", "iid"):
        items = make_items(kind, 150_000, 32, 0)
        table = in_blocks(items, blocks=64)
        for users, count, k in ((1, 1, 10), (5, 8, 100), (2, 40, 1000)):
            queries = make_queries(kind, users, count, 32, users, items)
            assert_same_bits(score_topk(queries, table, k), plain(queries, items, k))


def test_blocks_are_made_where_a_trial_says_that_they_pay():
    bias = torch.randn(66_000, generator=generator(8))
    assert in_blocks(make_items("clustered", 66_000, 16, 0), bias=bias).codes().cells is not None
    items = make_items("iid", 66_000, 32, 0)
    assert "packed)" in repr(in_blocks(items))
    assert "packed in blocks)" in repr(in_blocks(items, blocks=64))


def test_stats_tell_what_cells_ruled_out():
    items = make_items("clustered", 20_000, 64, 0)
    queries = make_queries("clustered", 3, 2, 64, 1, items)
    table = in_blocks(items)
    with forced("cpu", scan="bounded"):
        asked, left_out = score_topk(queries, table, 10, return_stats=True)[1].blocks.tolist()
    assert asked == 3 * table.codes().cells.number() and asked * 0.5 < left_out < asked
    assert score_topk(queries, items, 10, return_stats=True)[1].blocks.tolist() == [0, 0]


def test_memory_stays_within_what_is_promised():
    for r in (64, 128):
        table = in_blocks(make_items("iid", 32_768, r, 0))
        used = table.memory()
        codes = sum(size for name, size in used.items() if name.startswith("code_"))
        assert codes <= (r / 2 + 18) * 32_768


def test_clusters_find_the_kinds_of_rows():
    random = generator(7)
    kinds = torch.randint(20, (10_240,), generator=random)
    items = torch.randn(20, 48, generator=random)[kinds] + 0.2 * torch.randn(10_240, 48, generator=random)
    labels = clusters.cluster(items, None, seed=0, done=lambda _: None)
    pure = sum(int(kinds[labels == label].bincount().max()) for label in labels.unique())
    assert pure > 0.97 * len(items)
    assert torch.equal(labels, clusters.cluster(items, None, seed=0, done=lambda _: None))


@pytest.mark.parametrize("case", ["equal", "zero", "not finite", "one giant", "few different"])
def test_clusters_of_odd_rows(machine, case):
    items = torch.ones(3000, 8)
    if case == "zero":
        items.zero_()
    elif case == "not finite":
        items[::3], items[1::3] = INF, torch.nan
    elif case == "one giant":
        items[1500] = 1e38
    elif case == "few different":
        items = torch.randn(3, 8, generator=generator(8)).repeat(1000, 1)
    queries = torch.randn(2, 2, 8, generator=generator(9))
    assert_same_bits(score_topk(queries, in_blocks(items), 50), plain(queries, items, 50))


def test_centres_compared_in_groups_are_nearly_the_nearest(monkeypatch):
    items = make_items("clustered", 20_000, 32, 0)
    centres = items[:1000].clone()
    nearest = clusters._Nearest(centres)(items)
    monkeypatch.setattr(clusters, "_ALL_COMPARED", 100)
    found = clusters._Nearest(centres)(items)
    assert (found == nearest).float().mean() > 0.7
    far = ((items - centres[found]).norm(dim=1) / (items - centres[nearest]).norm(dim=1).clamp(min=1e-6)).median()
    assert far < 1.05


def test_the_order_is_one_of_all_rows_with_the_longest_of_a_cluster_first():
    random = generator(10)
    labels = torch.randint(7, (1000,), generator=random, dtype=torch.int32)
    lengths = torch.rand(1000, generator=random)
    order = clusters.order_of(labels, lengths, 64)
    assert torch.equal(order.sort().values, torch.arange(1000))
    whole = sum(int(size) // 64 for size in labels.bincount())
    for cell in order[: whole * 64].view(-1, 64):
        assert len(labels[cell].unique()) == 1 and (lengths[cell].diff() <= 0).all()
    assert (lengths[order[whole * 64 :]].diff() <= 0).all()


@pytest.mark.parametrize("blocks", ["yes", 1, 33, 0.5, 8192, -32])
def test_blocks_of_no_possible_size(blocks):
    with pytest.raises(ValueError, match="blocks: True, False or a number of rows, a multiple of 32"):
        ItemTable(torch.randn(64, 8)).pack(blocks=blocks)


def test_progress_counts_every_pass():
    told = []
    ItemTable(torch.randn(5000, 8)).pack(blocks=True, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] and told == sorted(told) and len({total for _, total in told}) == 1


def test_a_cell_is_64_rows_unless_it_is_said():
    table = ItemTable(torch.randn(4096, 8)).pack(blocks=True)
    assert table.codes().cells.rows == 64
    assert table.pack(blocks=128).codes().cells.rows == 128
    assert table.pack().codes().cells is None
    assert formats.MAX_CELL == 4096
