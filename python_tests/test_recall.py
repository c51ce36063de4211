"""recall below 1: what is lost is no more than was allowed, and the same on every machine, thread and batch."""

import pytest
import torch
from support import INF, NAN, REDUCTIONS, assert_same_bits, by_reference

from urm_kernels import ItemTable, score_topk
from urm_kernels.backends import codes as formats
from urm_kernels.backends import cpu
from urm_kernels.backends.table_view import TableView
from urm_kernels.testing import KINDS, available_backends, forced, make_items, make_queries

PACKED = (("int2", "int4"), ("int4",), ("int4", "int8"))
USERS, ROWS, R, K = 2000, 66_000, 64, 50  # as small a table as has probable bounds
MOST = 16  # queries of a call that has probable bounds
MACHINES = [
    ("portable", "auto", "1"),
    ("avx2", "auto", "2"),
    ("avx512", "bounded", "1"),
    ("avx512_vnni", "auto", "1"),
    ("avx512_vnni", "auto", "5"),
    ("avx512_vnni", "bounded", "3"),
    ("amx", "auto", "2"),
]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def asked(queries, table, k, recall, **options):
    return score_topk(queries, table, k, recall=recall, return_stats=True, **options)


def data(kind, users, rows, r, count=1):
    try:
        items = make_items(kind, rows, r, 0)
    except ValueError as missing:
        pytest.skip(str(missing))
    return items, make_queries(kind, users, count, r, 1, items)


def in_calls(queries, table, k, recall):
    """(ids [B, k], proven [B]), of calls with as many users as have probable bounds."""
    parts = [asked(some, table, k, recall) for some in queries.split(MOST)]
    return torch.cat([found.ids for found, _ in parts]), torch.cat([stats.proven for _, stats in parts])


@pytest.mark.parametrize("kind", KINDS)
def test_the_share_that_is_found_is_not_below_recall(kind):
    items, queries = data(kind, USERS, ROWS, R)
    table = ItemTable(items).pack(("int2", "int4"))
    exact = score_topk(queries, items, K)
    for recall in (0.9, 0.99, 0.999):
        ids, proven = in_calls(queries, table, K, recall)
        share = (ids[:, :, None] == exact.ids[:, None]).any(1).double().mean(1)
        error = float(share.std()) / USERS**0.5
        assert share.mean() >= recall - 3 * error
        assert (share[proven] == 1).all(), "what is proven is exact"
        if recall == 0.9 and kind in ("iid", "clustered", "decay", "norms", "integer", "giant"):
            assert proven.double().mean() < 0.5, "or nothing was tried"


@pytest.mark.parametrize("kinds", PACKED, ids="+".join)
@pytest.mark.parametrize("kind", ["iid", "clustered", "decay", "norms", "sparse", "integer"])
def test_a_row_is_below_its_own_score_as_seldom_as_was_said(kind, kinds):
    """The law itself, at a threshold that is the row's score: by bounds of the scan, whose share of loss is known."""
    rows = 512
    for r in (16, 100, 128):
        items, queries = data(kind, USERS, rows, r)
        table = ItemTable(items).pack(kinds)
        dots = (queries[:, 0].double() @ items.double().T).float()
        for recall in (0.6, 0.9, 0.99):
            bounds = torch.empty(USERS, rows)
            view = cpu._table(TableView(items, codes=table.codes()), recall)
            assert cpu.extension().code_bounds(cpu._queries(queries, None), view, False, bounds.data_ptr())
            below = (bounds < dots - 1e-6 * dots.abs()).double().mean(1)
            allowed = (1 - recall) * (1 if len(kinds) == 1 else 7 / 8)
            # 512 rows and 3 signs an element are one draw of a rotation, which 3 standard errors know nothing of.
            assert below.mean() <= allowed * 1.05 + 3 * float(below.std()) / USERS**0.5


@pytest.mark.parametrize("kinds", PACKED, ids="+".join)
@pytest.mark.parametrize(("kind", "users", "count"), [("iid", 16, 1), ("clustered", 2, 8), ("part", 3, 1)])
def test_the_same_bits_on_every_machine_thread_and_batch(monkeypatch, kinds, kind, users, count):
    """Where many pairs survive, as in the first part of "part", a thread's own clock decides whether rows are scored in
    passing."""
    items, queries = data(kind.replace("part", "iid"), users, 70_003, 64, count)
    if kind == "part":
        items[20_000:] *= 0.1
    bias = torch.randn(len(items), generator=generator(1)) * 0.1
    table = ItemTable(items, bias=bias).pack(kinds)
    recall = 0.7
    wanted, stats = asked(queries, table, 300, recall)
    assert not stats.proven.any()
    for isa, scan, threads in MACHINES:
        if ("cpu", isa) not in available_backends():
            continue
        monkeypatch.setenv("URM_NUM_THREADS", threads)
        with forced("cpu", isa, scan):
            assert_same_bits(score_topk(queries, table, 300, recall=recall), wanted)
    for user in (0, users - 1):
        alone = score_topk(queries[user : user + 1], table, 300, recall=recall)
        assert_same_bits(alone, type(alone)(*(part[user : user + 1] for part in wanted)))


def test_a_user_whom_it_does_not_suit_makes_the_call_exact():
    """NaN and infinite queries, a mask that leaves too few rows for a guess; but not a user without queries."""
    items, queries = data("decay", 4, 70_000, 64, 2)
    table = ItemTable(items).pack(("int2", "int4"))
    without = torch.ones(4, 2, dtype=torch.bool)
    without[2] = False
    few = torch.ones(4, len(items), dtype=torch.bool)
    few[2, 60:] = False
    for value, options, proven in (
        (0.0, {}, [False] * 4),
        (0.0, {"query_mask": without}, [False, False, True, False]),
        (0.0, {"mask": few}, [True] * 4),
        (NAN, {}, [True] * 4),
        (INF, {}, [True] * 4),
    ):
        asking = queries.clone()
        asking[1, 0, 3] = value
        found, stats = asked(asking, table, 40, 0.7, **options)
        assert stats.proven.tolist() == proven
        if all(proven):
            assert_same_bits(found, score_topk(asking, items, 40, **options))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("kinds", PACKED, ids="+".join)
def test_scores_are_exact_whatever_is_lost(kinds, reduce):
    """The best of all queries, not of those whose probable bound reaches the threshold."""
    items, queries = data("clustered", 4, 70_000, 64, 4)
    bias = torch.randn(len(items), generator=generator(2))
    table = ItemTable(items, bias=bias).pack(kinds)
    found, stats = asked(queries, table, 100, 0.55, reduce=reduce)
    assert not stats.proven.all()
    exact = score_topk(queries, items, len(items), bias=bias, reduce=reduce)
    at = torch.empty_like(exact.ids).scatter_(1, exact.ids, torch.arange(len(items)).expand(4, -1))
    assert torch.equal(exact.scores.gather(1, at.gather(1, found.ids)), found.scores)
    share = (found.ids[:, :, None] == exact.ids[:, None, :100]).any(1).double().mean()
    assert share >= 0.55


def test_a_threshold_that_is_refuted_is_made_good():
    """All rows of every 64th block are far better than the rest: the sample promises more than there is."""
    items = torch.randn(131_072, 32, generator=generator(0))
    items[(torch.arange(len(items)) // 32) % 64 == 0] += 5
    for kinds in PACKED:
        found, stats = asked(torch.ones(1, 1, 32), ItemTable(items).pack(kinds), 4000, 0.9)
        assert stats.proven.all()
        assert_same_bits(found, score_topk(torch.ones(1, 1, 32), items, 4000))


def test_where_it_is_one_in_effect():
    items, queries = data("iid", 3, 70_000, 64)
    exact = score_topk(queries, items, 30)
    small, narrow = items[:60_000], items[:, :15].contiguous()
    for asking, table, wanted in (
        (queries, items, exact),
        (queries, ItemTable(items), exact),
        (queries, ItemTable(small).pack(("int2", "int4")), score_topk(queries, small, 30)),
        (queries[..., :15], ItemTable(narrow).pack(("int2", "int4")), score_topk(queries[..., :15], narrow, 30)),
    ):
        found, stats = asked(asking, table, 30, 0.5)
        assert stats.proven.all()
        assert_same_bits(found, wanted)
    table = ItemTable(items).pack(("int2", "int4"))
    many = queries[:1].expand(MOST + 1, 1, 64)
    found, stats = asked(many, table, 30, 0.5)
    assert stats.proven.all()
    assert_same_bits(found, score_topk(many, items, 30))
    for options in ({"recall": 1.0}, {"recall": 0.5, "backend": "reference"}):
        found, stats = score_topk(queries[:1], table, 30, return_stats=True, **options)
        assert stats.proven.all()
        assert_same_bits(found, type(found)(*(part[:1] for part in exact)))
    assert not asked(queries, table, 30, 0.5)[1].proven.any()


def test_rows_that_are_being_replaced_are_scanned_exactly():
    items, queries = data("iid", 2, 70_000, 64)
    table = ItemTable(items.clone()).pack(("int2", "int4"))
    version, _ = table._log.pin()
    try:
        table.update(torch.tensor([5, 900]), queries[:, 0] * 3)
        found, stats = asked(queries, table, 30, 0.5)
    finally:
        table._log.unpin(version)
    assert stats.proven.all() and 5 in found.ids[0]
    changed = items.clone()
    changed[[5, 900]] = queries[:, 0] * 3
    assert_same_bits(found, score_topk(queries, changed, 30))
    assert not asked(queries, table, 30, 0.5)[1].proven.any()


def test_extremes_stay_certain():
    """Rows that may hold anything, zero rows that win, rows behind the last block: whatever the recall."""
    items, _ = data("iid", 1, 65_569, 64)
    items = -items.abs()
    items[77, 3], items[78] = INF, 0
    items[-1] = 1.0
    items[79, 0], items[79, 1] = 1e30, -1e29
    for kinds in PACKED:
        table = ItemTable(items).pack(kinds)
        found = score_topk(torch.ones(1, 1, 64), table, 4, recall=0.5)
        assert_same_bits(found, by_reference(torch.ones(1, 1, 64), items, 4))


def test_shares_of_the_slack():
    def shares(recall, r, kinds):
        codes = ItemTable(torch.zeros(32, r)).pack(kinds).codes()
        return formats.slack_shares(recall, codes, r)

    assert shares(1.0, 128, ("int4",)) == (1.0, 1.0) == shares(0.5, 15, ("int4",))
    assert shares(0.99, 128, ("int4",))[0] == pytest.approx(2.3263 / 127**0.5, rel=1e-4)
    for recall in (1e-300, 0.1, 0.5, 0.9, 1 - 1e-16):
        first, second = shares(recall, 64, ("int2", "int4"))
        assert 0 < first <= second <= 1


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (0, ValueError, "0 came"), (-0.5, ValueError, "-0.5 came"), (1.01, ValueError, "1.01 came"),
        (NAN, ValueError, "nan came"), ("high", TypeError, "'high' came"), (True, TypeError, "True came"),
        (None, TypeError, "None came"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_in_words(value, error, words):
    with pytest.raises(error, match=rf"^recall: a number above 0 and at most 1 is wanted, {words}$"):
        score_topk(torch.ones(1, 4), torch.ones(3, 4), 1, recall=value)
