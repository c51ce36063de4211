"""Masks that allow few rows: these alone are scored, or the blocks that hold one; what is found is the same."""

import pytest
import torch
from support import HALVES, INF, REDUCTIONS, assert_same_bits, bits, on_machine, packed
from test_packed import generator, plain

from urm_kernels import ItemTable, log_partition, score_topk
from urm_kernels.testing import available_backends, forced, make_items, make_queries

ROWS, R = 20_011, 24  # rows behind the last block, too
MACHINES = [
    ("portable", "auto", "1"),
    ("avx2", "auto", "2"),
    ("avx512_vnni", "auto", "3"),
    ("avx512_vnni", "bounded", "2"),  # by blocks, not by rows, whatever is cheaper
    ("amx", "auto", "2"),
]
TABLES = {
    "plain": lambda items, **parts: ItemTable(items, **parts),
    "packed": lambda items, **parts: ItemTable(items, **parts).pack(),
    "blocks": lambda items, **parts: ItemTable(items, **parts).pack(("int4", "int8"), blocks=64),
}


@pytest.fixture(params=MACHINES, ids="/".join)
def machine(request, monkeypatch):
    with on_machine(*request.param, monkeypatch):
        yield request.param


@pytest.fixture(params=list(TABLES))
def table(request):
    return TABLES[request.param](make_items("clustered", ROWS, R, 0), bias=bias())


def bias():
    return torch.randn(ROWS, generator=generator(1))


def order_of(table):
    codes = table.codes()
    if codes is None or codes.cells is None:
        return torch.arange(ROWS)
    return torch.cat([codes.cells.order[:, 0].long(), torch.arange(len(codes.cells.order), ROWS)])


def masks_of(table):
    """By their names, bool [N]."""
    order, random = order_of(table), generator(2)
    masks = {
        f"{share} of the rows": torch.rand(ROWS, generator=random) < share for share in (0.0003, 0.01, 0.1, 0.25, 0.6)
    }
    masks |= {name: torch.zeros(ROWS, dtype=torch.bool) for name in ("none", "first", "last", "runs", "single")}
    masks["first"][order[:300]] = True
    masks["last"][order[-300:]] = True
    masks["runs"][order.split(64)[17]] = masks["runs"][order.split(32)[200]] = masks["runs"][ROWS - 1] = True
    masks["single"][order[5]] = True
    return masks


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 40)], ids=str)
def test_what_masks_allow_is_what_is_found(machine, table, shape):
    queries = make_queries("clustered", *shape, R, 1, table.factors)
    for mask in masks_of(table).values():
        wanted = plain(queries, ItemTable(table.factors, bias=bias()), 70, mask=mask)
        for form in (mask, packed(mask), torch.stack([mask, ~mask], 1)[:, 0]):
            assert_same_bits(score_topk(queries, table, 70, mask=form), wanted)


def test_masks_of_users(machine, table):
    """Each user's own, of very different sizes, or all small."""
    queries = make_queries("clustered", 5, 3, R, 1, table.factors)
    masks = masks_of(table)
    for names in (
        ("none", "first", "0.6 of the rows", "single", "0.01 of the rows"),
        ("runs", "single", "none", "first", "last"),
        ("0.01 of the rows", "0.0003 of the rows", "0.01 of the rows", "last", "none"),
    ):
        mask = torch.stack([masks[name] for name in names])
        wanted = plain(queries, ItemTable(table.factors, bias=bias()), 90, mask=mask)
        assert_same_bits(score_topk(queries, table, 90, mask=mask), wanted)
        assert_same_bits(score_topk(queries, table, 90, mask=packed(mask)), wanted)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("name", ["0.01 of the rows", "runs"])
def test_with_exclusions_removed_rows_and_replaced_ones(machine, table, reduce, name):
    queries = make_queries("clustered", 4, 6, R, 1, table.factors)
    mask = masks_of(table)[name]
    allowed = mask.nonzero().flatten()
    exclude = allowed[torch.randint(len(allowed), (4, 9), generator=generator(3))]
    items, removed, replaced = table.factors.clone(), allowed[::7], allowed[1:7]
    items[replaced] = queries[:, 0].mean(0).expand(6, R) * torch.arange(1, 7)[:, None]
    alive = torch.ones(ROWS, dtype=torch.bool)
    alive[removed] = False
    table.remove(removed)
    version, _ = table._log.pin()
    try:
        table.update(replaced, items[replaced])
        found = score_topk(queries, table, 50, reduce=reduce, mask=mask, exclude=exclude)
    finally:
        table._log.unpin(version)
    options = {"reduce": reduce, "mask": mask & alive, "exclude": exclude}
    assert_same_bits(found, plain(queries, ItemTable(items, bias=bias()), 50, **options))


def test_users_without_queries(machine, table):
    queries = make_queries("clustered", 3, 2, R, 1, table.factors)
    exists = torch.tensor([[True, True], [False, False], [True, False]])
    for name in ("runs", "first", "0.01 of the rows"):
        options = {"mask": masks_of(table)[name], "query_mask": exists}
        for reduce in REDUCTIONS:
            wanted = plain(queries, ItemTable(table.factors, bias=bias()), 10, reduce=reduce, **options)
            assert_same_bits(score_topk(queries, table, 10, reduce=reduce, **options), wanted)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_vnni"])
def test_a_user_without_queries_and_few_blocks(isa):
    """Kernels that share their fetching out among a user's queries."""
    if ("cpu", isa) not in available_backends():
        pytest.skip(f"cpu/{isa} cannot run on this machine")
    table = TABLES["packed"](make_items("clustered", ROWS, R, 0))
    mask, exists = torch.arange(ROWS) // 640 == 7, torch.tensor([[True], [False]])
    queries = make_queries("clustered", 2, 1, R, 1, table.factors)
    wanted = plain(queries, table.factors, 10, mask=mask, query_mask=exists)
    with forced("cpu", isa, "bounded"):
        assert_same_bits(score_topk(queries, table, 10, mask=mask, query_mask=exists), wanted)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float8_e4m3fn], ids=str)
def test_every_dtype_with_scales_and_many_queries(machine, dtype):
    scale = torch.rand(ROWS, generator=generator(4)) + 0.5
    items = make_items("norms", ROWS, R, 0).to(dtype)
    queries = make_queries("norms", 6, 30, R, 1, items.float())
    mask = torch.rand(ROWS, generator=generator(5)) < 0.2  # enough rows for cheap scores first
    for parts in ({}, {"row_scale": scale}):
        table = ItemTable(items, **parts)
        assert_same_bits(score_topk(queries, table, 64, mask=mask), plain(queries, table, 64, mask=mask))


def test_sums_over_what_masks_allow(machine, table):
    queries = make_queries("clustered", 3, 4, R, 1, table.factors)
    for name, mask in masks_of(table).items():
        with forced("cpu", scan="exact"):
            wanted = log_partition(queries, ItemTable(table.factors, bias=bias()), mask=mask, temperature=0.7)
        found = log_partition(queries, table, mask=mask, temperature=0.7)
        assert torch.equal(bits(found), bits(wanted)), name
        assert (found == -INF).all() == (name == "none")


def test_only_allowed_rows_are_scored(table):
    """As many as a mask allows where it allows few, and nothing else is read."""
    queries = make_queries("clustered", 2, 3, R, 1, table.factors)
    mask = masks_of(table)["0.01 of the rows"]
    _, stats = score_topk(queries, table, 30, mask=mask, return_stats=True)
    assert stats.survivors[1] == 2 * mask.sum()
    assert stats.bytes_read == mask.sum() * R * 4


def test_blocks_without_an_allowed_row_are_not_read():
    items = make_items("clustered", 200_000, R, 0)
    queries = make_queries("clustered", 2, 3, R, 1, items)
    for table in (ItemTable(items).pack(), ItemTable(items).pack(blocks=64)):
        cells = table.codes().cells
        order = torch.arange(200_000) if cells is None else cells.order[:, 0].long()
        mask = torch.zeros(200_000, dtype=torch.bool)
        mask[torch.cat(order.split(64)[::100])] = True
        with forced("cpu", scan="bounded"):
            result, stats = score_topk(queries, table, 20, mask=mask, return_stats=True)
        assert_same_bits(result, plain(queries, items, 20, mask=mask))
        assert stats.bytes_read < 0.05 * table.memory()["code_blocks"]
