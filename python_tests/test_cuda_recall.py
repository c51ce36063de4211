"""recall below 1 on the CUDA kernels: what is lost is no more than was allowed, and the same on every card."""

import packed_calls
import pytest
import torch
from cuda_bounds import found_at
from packed_calls import CPU
from support import INF, NAN, REDUCTIONS, assert_same_bits

from urm_kernels import ItemTable, score_topk
from urm_kernels.backends import cuda
from urm_kernels.backends.cuda import plan
from urm_kernels.testing import make_items, make_queries

PACKED = (("int2", "int4"), ("int4",), ("int4", "int8"), ("int8",))
ROWS, K = 3000, 20


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _stand_in():
    if reason := packed_calls.why_not(CPU):
        pytest.skip(reason)
    with packed_calls.packed_calls(None, CPU):
        yield


def asked(queries, table, k, recall, **options):
    return score_topk(queries, table, k, recall=recall, return_stats=True, **options)


def data(kind, users, count, r=32, rows=ROWS):
    items = make_items(kind, rows, r, 0)
    return items, make_queries(kind, users, count, r, 1, items)


def found_share(found, exact):
    return (found.ids[:, :, None] == exact.ids[:, None]).any(1).double().mean(1)


@pytest.mark.parametrize("kinds", PACKED, ids="+".join)
@pytest.mark.parametrize("kind", ["iid", "clustered", "norms", "sparse", "integer"])
def test_a_row_at_its_own_score_is_lost_as_seldom_as_was_said(kind, kinds):
    """The law itself, of one query: in a scan whose threshold is the row's score."""
    users, rows = 1200, 96
    items, queries = data(kind, users, 1, 64, rows)
    table = ItemTable(items).pack(kinds)
    of = torch.arange(users) % rows
    exact = score_topk(queries, items, rows)
    own = torch.empty(users, rows).scatter_(1, exact.ids, exact.scores)[torch.arange(users), of]
    for recall in (0.6, 0.9):
        parts = (found_at(queries[part], table, own[part], of[part], recall) for part in torch.arange(users).split(96))
        found = torch.cat(list(parts)).double()
        # 96 rows are one draw of a rotation, which the standard error knows nothing of.
        assert found.mean() >= recall - 0.03 - 3 * float(found.std()) / users**0.5
        assert found.mean() < 1, "or nothing was tried"


@pytest.mark.parametrize("kinds", PACKED, ids="+".join)
def test_no_error_of_row_or_query_is_left_out_of_the_law(kinds):
    """Of 8 bits both are as large: many queries, so that the standard error tells them apart."""
    users, rows, random = 3840, 128, generator(0)
    items, queries = torch.randn(rows, 64, generator=random), torch.randn(users, 1, 64, generator=random)
    table, of = ItemTable(items).pack(kinds), torch.arange(users) % rows
    exact = score_topk(queries, items, rows)
    own = torch.empty(users, rows).scatter_(1, exact.ids, exact.scores)[torch.arange(users), of]
    parts = (found_at(queries[part], table, own[part], of[part], 0.9) for part in torch.arange(users).split(96))
    found = torch.cat(list(parts)).double()
    assert found.mean() >= 0.9 - 3 * float(found.std()) / users**0.5


@pytest.mark.parametrize("kinds", PACKED, ids="+".join)
@pytest.mark.parametrize(("users", "count"), [(24, 1), (6, 4), (5, 9), (2, 40)])
def test_the_share_that_is_found_is_not_below_recall(kinds, users, count):
    for kind in ("iid", "clustered", "decay"):
        items, queries = data(kind, users, count)
        table = ItemTable(items).pack(kinds)
        exact = score_topk(queries, items, K)
        for recall in (0.01, 0.5, 0.9):
            found, stats = asked(queries, table, K, recall)
            share = found_share(found, exact)
            assert share.mean() >= recall - 3 * float(share.std()) / users**0.5
            assert (share[stats.proven] == 1).all(), "what is proven is exact"
            assert not stats.proven.all()


@pytest.mark.parametrize("kinds", PACKED[:3], ids="+".join)  # 8 bits leave hardly a pair that is not among the best
@pytest.mark.parametrize("count", [1, 3, 12])
def test_fewer_pairs_are_scored_and_fewer_survive(kinds, count):
    items, queries = data("iid", 4, count)
    table = ItemTable(items).pack(kinds)
    exact, likely = (asked(queries, table, K, recall)[1].survivors for recall in (1.0, 0.9))
    assert likely[0] < 0.7 * exact[0] and likely[1] < 1.1 * exact[1]  # the guess is lower


@pytest.mark.parametrize("kinds", PACKED, ids="+".join)
def test_the_same_bits_on_every_card(monkeypatch, kinds):
    bias = torch.randn(ROWS, generator=generator(1)) * 0.1
    items, queries = data("clustered", 5, 3)
    table = ItemTable(items, bias=bias).pack(kinds)
    wanted, stats = asked(queries, table, 200, 0.7)
    assert not stats.proven.any()
    for processors in (2, 7):
        monkeypatch.setattr(cuda, "card", lambda device, processors=processors: plan.Card(processors))
        assert_same_bits(score_topk(queries, table, 200, recall=0.7), wanted)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("kinds", PACKED, ids="+".join)
@pytest.mark.parametrize("count", [4, 35])
def test_scores_are_exact_whatever_is_lost(kinds, reduce, count):
    """The best of all queries, not of those whose probable bound reaches the threshold."""
    items, queries = data("clustered", 3, count)
    bias = torch.randn(ROWS, generator=generator(2))
    table = ItemTable(items, bias=bias).pack(kinds)
    found, stats = asked(queries, table, 100, 0.55, reduce=reduce)
    assert not stats.proven.any()
    exact = score_topk(queries, items, ROWS, bias=bias, reduce=reduce)
    scores = torch.empty(3, ROWS).scatter_(1, exact.ids, exact.scores)
    assert torch.equal(scores.gather(1, found.ids), found.scores)
    assert found_share(found, type(exact)(*(part[:, :100] for part in exact))).mean() >= 0.55


@pytest.mark.parametrize("kinds", PACKED, ids="+".join)
@pytest.mark.parametrize("count", [6, 33])
def test_the_best_query_makes_the_score_whatever_its_probable_bound(kinds, count):
    """Queries whose scores of a row are nearly the same, the last one's the best; many bounds do not reach it."""
    items = torch.randn(ROWS, 64, generator=generator(0))
    items[:, :count] = 1 + 1e-3 * items[:, -1:] + 1e-6 * items[:, :count]
    items[:, count - 1] += 1e-5
    queries = torch.eye(64)[:count].expand(2, count, 64)
    found, stats = asked(queries, ItemTable(items).pack(kinds), 100, 0.01)
    assert not stats.proven.any()
    exact = score_topk(queries, items, ROWS)
    scores = torch.empty(2, ROWS).scatter_(1, exact.ids, exact.scores)
    assert torch.equal(scores.gather(1, found.ids), found.scores)


def test_a_user_whom_it_does_not_suit_is_answered_exactly():
    """NaN, infinite and no queries; a mask that leaves too few rows for a guess."""
    items, queries = data("decay", 6, 2)
    queries[1, 0, 3], queries[2, 1, 5] = NAN, INF
    exists, mask = torch.ones(6, 2, dtype=torch.bool), torch.ones(6, ROWS, dtype=torch.bool)
    exists[3] = False
    mask[4, 15:] = False
    table = ItemTable(items).pack(("int2", "int4"))
    found, stats = asked(queries, table, K, 0.7, query_mask=exists, mask=mask)
    assert stats.proven.tolist() == [False, True, True, True, True, False]
    exact = score_topk(queries, items, K, query_mask=exists, mask=mask)
    assert_same_bits(*(type(exact)(*(part[1:5] for part in result)) for result in (found, exact)))


def test_more_users_than_one_scan_takes():
    items, queries = data("iid", plan.GROUP + 44, 1, 16, 700)
    queries[[3, plan.GROUP + 34], 0, 5] = NAN
    _, stats = asked(queries, ItemTable(items).pack(("int4",)), K, 0.5)
    assert stats.proven.nonzero().flatten().tolist() == [3, plan.GROUP + 34]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_threshold_next_to_infinity_is_met_by_certain_bounds(sign):
    """Scores that overflow to it, and those next to them: no limit follows, and the result is proven."""
    items, queries = data("iid", 8, 6)
    items, queries = items * 2.0**51, queries * 2.0**51
    bias = torch.full((ROWS,), sign * torch.finfo(torch.float32).max)
    exact = score_topk(queries, items, K, bias=bias)
    for kinds in PACKED:
        found, stats = asked(queries, ItemTable(items, bias=bias).pack(kinds), K, 0.01)
        assert stats.proven.all()
        assert_same_bits(found, exact)


def test_a_threshold_that_is_refuted_is_made_good():
    """The sample promises more than there is."""
    items = torch.randn(12_000, 16, generator=generator(0))
    step = plan.make_plan(1, 1, len(items), 16, 300, recall=0.9).step
    at = torch.arange(-(-len(items) // step))
    items[(at * step + ((at * 0x9E3779B1 & 0xFFFFFFFF) * step >> 32)).clamp(max=len(items) - 1)] += 9
    for kinds in PACKED:
        found, stats = asked(torch.ones(1, 1, 16), ItemTable(items).pack(kinds), len(at) + 500, 0.9)
        assert stats.proven.all()
        assert_same_bits(found, score_topk(torch.ones(1, 1, 16), items, len(at) + 500))


def test_where_it_is_one_in_effect(monkeypatch):
    """Tables in blocks, small and narrow ones; recall 1."""
    items, queries = data("clustered", 2, 3)
    exact = score_topk(queries, items, K)
    blocks = ItemTable(items).pack(("int2", "int4"), blocks=32)
    for table, recall in ((blocks, 0.5), (ItemTable(items).pack(("int2", "int4")), 1.0)):
        found, stats = asked(queries, table, K, recall)
        assert stats.proven.all()
        assert_same_bits(found, exact)
    narrow, asking = items[:, :15].contiguous(), queries[..., :15].contiguous()
    found, stats = asked(asking, ItemTable(narrow).pack(("int2", "int4")), K, 0.5)
    assert stats.proven.all()
    assert_same_bits(found, score_topk(asking, narrow, K))
    monkeypatch.setattr(plan, "DENSE_ROWS", ROWS)
    found, stats = asked(queries, ItemTable(items).pack(("int2", "int4")), K, 0.5)
    assert stats.proven.all()
    assert_same_bits(found, exact)


def test_extremes_stay_certain():
    """Rows that may hold anything, zero rows that win, rows behind the last block: whatever the recall."""
    items = -make_items("iid", 3001, 32, 0).abs()
    items[77, 3], items[78] = INF, 0
    items[-1] = 1.0
    items[79, 0], items[79, 1] = 1e30, -1e29
    for kinds in PACKED:
        found = score_topk(torch.ones(1, 1, 32), ItemTable(items).pack(kinds), 4, recall=0.5)
        assert_same_bits(found, score_topk(torch.ones(1, 1, 32), items, 4))


def test_rows_wanted_for_a_recall_have_a_guess_that_holds_them():
    """More than half of the rows that reach a guess may be lost, and k are wanted all the same."""
    sizes = [plan.make_plan(1, 1, 10**6, 64, 10**5, recall=recall) for recall in (1.0, 0.9, 7 / 16, 0.01)]
    assert [size.rank for size in sizes] == sorted(size.rank for size in sizes)
    assert sizes[2].rank == sizes[3].rank >= 1.8 * sizes[0].rank
    items, queries = data("iid", 8, 1)
    table = ItemTable(items).pack(("int2", "int4"))
    assert not asked(queries, table, 600, 0.01)[1].proven.any(), "the second way was taken"
