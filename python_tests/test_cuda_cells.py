"""The CUDA kernels that decide by the bounds of cells, each beside a plain reference of what it computes.

Without a GPU they run as fibers (simt/): what a search's launches have written is looked at afterwards.
"""

import ctypes

import packed_calls
import pytest
import torch
from packed_calls import packed
from support import INF, NAN, assert_same_bits, by_reference
from support import packed as bit_set
from test_cuda_packed import CPU, generator

from urm_kernels import ItemTable, TopK
from urm_kernels.backends import codes as formats
from urm_kernels.backends import cuda, reference_codes
from urm_kernels.backends.cuda import launching, plan, search, tiles
from urm_kernels.backends.table_view import ScanOptions, TableView
from urm_kernels.testing import make_items, make_queries

KINDS = ["clustered", "decay", "iid", "norms", "sparse", "giant", "equal"]


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    if reason := packed_calls.why_not(CPU):
        pytest.skip(reason)
    small = {"DENSE_ROWS": 40, "FEWEST_SAMPLED": 128, "MOST_SAMPLED": 1024, "FEWEST_LISTED": 40, "SAMPLED_CELLS": 64}
    for name, value in small.items():
        monkeypatch.setattr(plan, name, value)
    with packed_calls.stand_in():
        yield


class Launches:
    """Runs kernels, and keeps what each was given."""

    def __init__(self):
        self.given, self.thresholds = {}, []  # the latest of each name; what every set_limits has made

    def launch(self, name, grid, threads, shared, arguments):
        launching.stand_in(CPU).launch(name, grid, threads, shared, arguments)
        name = name.removeprefix("urm::").split("<")[0]
        self.given[name] = arguments
        if name == "set_limits":
            self.thresholds.append(self.floats(arguments[-1][0], grid[0]))

    def floats(self, address, *shape):
        count = torch.Size(shape).numel()
        return torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32).view(shape).clone()

    def integers(self, address, count):
        return torch.frombuffer((ctypes.c_int32 * count).from_address(address), dtype=torch.int32).clone()


class Asked:
    """A call, its launches, and what these decided by."""

    def __init__(self, queries, view, k, **options):
        self.queries, self.view, self.k, self.options = queries, view, k, options
        self.cells, (users, places, _) = view.codes.cells, queries.shape
        sizes = plan.make_plan(users, places, *view.items.shape, k, self.cells.number() if self.cells else 0)
        ((_, call),) = search._calls(queries, view, ScanOptions(**options), places, users)
        self.launches, self.counts = Launches(), torch.zeros(5, dtype=torch.int64)
        arguments = (view, k, sizes, self.launches, cuda.card(CPU), self.counts, torch.zeros(1, dtype=torch.int64))
        self.search = search.Search(call, *arguments)
        self.found = TopK(torch.empty(users, k), torch.empty(users, k, dtype=torch.int64))
        self.search.run(*self.found)
        step, _, _, self.threshold, self.limit, self.inverse = self.search.per_user
        self.step = step[:, None]
        if self.cells:
            bounds = self.launches.given["set_promise"][0][3]
            self.bounds = self.launches.floats(bounds, users, self.cells.number())

    def reaching(self, room=0.0):
        """bool [users, cells], by a limit that is lower by some share of what it is made of."""
        bias = 0.0 if self.cells.most is None else self.cells.most.double() * self.inverse.double()[:, None]
        size = self.limit.abs().double()[:, None] + torch.as_tensor(bias).abs()
        return ~(self.bounds.double() + bias < self.limit.double()[:, None] - room * size)

    def rows_of(self, cell):
        return self.cells.order[cell * self.cells.rows : (cell + 1) * self.cells.rows, 0].long()


def asked(kind, users, places, k, kinds=("int4",), cell_rows=64, rows=2500, r=24, bias=None, **options):
    items = make_items(kind, rows, r, 0)
    view = TableView(items, bias, codes=ItemTable(items, bias=bias).pack(kinds, blocks=cell_rows).codes())
    return Asked(make_queries(kind, users, places, r, 1, items), view, k, **options)


@pytest.mark.parametrize("r", [5, 64, 140])
@pytest.mark.parametrize(("users", "places"), [(1, 1), (1, 3), (1, 12), (5, 1), (3, 2), (2, 9)])
def test_bounds_of_cells_are_those_of_the_reference(users, places, r):
    """Of a user alone; a column group has the largest slack of its users, so that bounds are not below."""
    for kind in ("clustered", KINDS[(r + users + places) % len(KINDS)]):
        call = asked(kind, users, places, 20, r=r, rows=1100)
        reference = call.cells.reference.clamp(max=7 * r**0.5)  # as usable_reference has it
        codes = call.view.codes._replace(blocks=call.cells.blocks, reference=reference)
        coded = reference_codes.decode(codes._replace(fine=None), r, 0, len(codes.blocks))
        encoded = reference_codes.encode_queries(call.queries, torch.ones(users, places, dtype=torch.bool), codes)
        wanted = reference_codes.scan_bounds(encoded, coded, codes, r)[:, : call.cells.number()]
        kept, scale = call.bounds.double() * call.step, coded.scale[: call.cells.number()]
        # A unit of the integer sums, whose slack is rounded up, and roundings.
        room = (1.01 * scale * call.step + 1e-5 * wanted.abs()).where(wanted < INF, 0.0)
        assert (kept >= wanted - room).all()
        if users == 1:
            assert (kept <= wanted + room).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biased", [False, True])
def test_a_promise_is_that_of_a_sample_unless_most_cells_keep_it(kind, biased):
    bias = 0.1 * torch.randn(2500, generator=generator(1)) if biased else None
    call = asked(kind, 3, 2, 15, cell_rows=32, bias=bias)
    *_, (step,), (sample,), (rank,), (address,) = call.launches.given["set_promise"]
    at = torch.arange(sample)
    cells = (at * step + ((at * 0x9E3779B1 & 0xFFFFFFFF) * step >> 32)).clamp(max=call.cells.number() - 1)
    worth = call.bounds if bias is None else call.bounds.double() + call.cells.most * call.inverse.double()[:, None]
    best = worth[:, cells].float().sort(dim=1, descending=True).values[:, rank - 1]
    promise = call.launches.floats(address, 3)
    told = promise < INF
    assert torch.equal(promise[told], best[told])
    assert told.any() == (kind not in ("iid", "equal")) or kind == "giant"
    # Limits have risen since.
    assert call.reaching()[:, cells].sum(1)[told].lt(0.9 * sample).all()


@pytest.mark.parametrize("places", [1, 3])
@pytest.mark.parametrize("cell_rows", [32, 64, 96])
def test_rows_of_promising_cells_are_scored_where_they_may_be_returned(cell_rows, places):
    mask = torch.rand(3, 2500, generator=generator(2)) < 0.7
    exclude = torch.randint(2500, (3, 50), generator=generator(3))
    call = asked("decay", 3, places, 9, cell_rows=cell_rows, mask=mask, exclude=exclude)
    (most,), (taken,), (scores,), (room,) = call.launches.given["score_promising"][8:]
    promise = call.launches.floats(call.launches.given["set_promise"][-1][0], 3)
    taken, scores = call.launches.integers(taken, 6).view(2, 3), call.launches.floats(scores, 3, room)
    before = call.launches.thresholds[0]  # as they were guessed
    mask.scatter_(1, exclude, False)
    canonical = by_reference(call.queries, call.view.items, 2500, mask=mask)
    assert (promise < INF).any()
    for user in (promise < INF).nonzero().flatten().tolist():
        promising = (~(call.bounds[user] < promise[user])).nonzero().flatten()
        assert int(taken[0, user]) == len(promising) <= most
        rows = torch.cat([call.rows_of(cell) for cell in promising])
        of_row = torch.full((2501,), -INF).scatter_(0, canonical.ids[user].where(canonical.ids[user] >= 0, 2500),
                                                    canonical.scores[user])  # fmt: skip
        wanted = of_row[rows].sort(descending=True).values
        wanted = wanted[(wanted >= before[user]) & (wanted > -INF)]
        assert int(taken[1, user]) == len(wanted) <= room
        assert torch.equal(scores[user].sort(descending=True).values[: len(wanted)], wanted)
        assert scores[user].isfinite().sum() == len(wanted)
        assert float(call.threshold[user]) == max(float(before[user]), float(wanted[8]))


@pytest.mark.parametrize(
    ("cell_rows", "biased", "reduce"),
    [(32, False, "max"), (64, True, "max"), (96, False, "max"), (160, True, "max"), (32, True, "logsumexp")],
)
def test_tiles_are_listed_that_some_user_of_the_column_group_needs(monkeypatch, cell_rows, biased, reduce):
    monkeypatch.setattr(plan, "SHARED_COLUMNS", 600)
    bias = 0.1 * torch.randn(2500, generator=generator(4)) if biased else None
    call = asked("decay", 11, 2, 15, cell_rows=cell_rows, bias=bias, reduce=reduce)
    of_group = call.search.scan.group_users
    assert of_group < 11
    (tiles_at, count_at, room) = call.launches.given["list_tiles"][6]
    counts, blocks = call.launches.integers(count_at, -(-11 // of_group)), len(call.view.codes.blocks)
    cell = torch.arange(blocks) // (cell_rows // formats.BLOCK)
    behind = cell >= call.cells.number()
    for group, count in enumerate(counts.tolist()):
        listed = call.launches.integers(tiles_at + 4 * group * room, count)
        assert len(listed.unique()) == count
        users = slice(group * of_group, (group + 1) * of_group)
        # Of logsumexp the limit is lower by some share of itself.
        for room_left, holds in ((1e-6, torch.Tensor.le), (-1e-6, torch.Tensor.ge)) if reduce == "max" else ():
            needed = call.reaching(room_left)[users].any(0)
            tiles = (needed[cell.clamp(max=call.cells.number() - 1)] | behind).nonzero().flatten() // 2
            here = torch.zeros(room + 1, dtype=torch.int32).index_fill_(0, listed.long(), 1)
            assert holds(here, torch.zeros(room + 1, dtype=torch.int32).index_fill_(0, tiles, 1)).all()
    wanted = by_reference(call.queries, call.view.items, 15, reduce=reduce, **({} if bias is None else {"bias": bias}))
    assert_same_bits(call.found, wanted)
    number, left_out = call.counts[3:].tolist()
    assert number == 11 * call.cells.number() and 0 < left_out < number
    assert int(counts.sum()) < len(counts) * room


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_is_the_plain_one_and_reads_less_where_rows_are_of_kinds(kind):
    call = asked(kind, 2, 3, 20, rows=6000)
    assert_same_bits(call.found, by_reference(call.queries, call.view.items, 20))
    asked_cells, left_out = call.counts[3:].tolist()
    assert left_out == 0 if kind in ("iid", "equal") else left_out > 0.1 * asked_cells or kind == "giant"


def test_a_threshold_that_promising_rows_reach_needs_no_proof():
    """The k-th best of them is a score that k rows have: nobody is left for the second way, whatever the guess was."""
    items = make_items("decay", 5000, 24, 0)
    view = packed(TableView(items), ("int4",), 64)
    found = search.search(
        make_queries("decay", 4, 2, 24, 1, items), view, ScanOptions(), 30, launching.launcher(CPU), cuda.card(CPU)
    )
    assert int(found.unproven) == 0


def test_cells_that_cannot_help_are_not_asked(monkeypatch):
    """Of small tables, and beside a bias of the call's own."""
    items, bias = make_items("decay", 2000, 16, 0), torch.randn(2000, generator=generator(5))
    celled = packed(TableView(items), ("int4",), 64)
    assert tiles.cells_asked(celled) is not None
    assert tiles.cells_asked(celled._replace(bias=bias)) is None
    assert tiles.cells_asked(packed(TableView(items, bias), ("int4",), 64)) is not None
    assert tiles.cells_asked(packed(TableView(items), ("int4",), 4096)) is None  # no whole cell
    monkeypatch.setattr(plan, "FEWEST_LISTED", 2001)
    assert tiles.cells_asked(celled) is None


def test_users_without_a_bound_or_without_queries_among_others():
    items = make_items("decay", 3000, 16, 0)
    queries = make_queries("decay", 5, 2, 16, 1, items)
    queries[1, 0, 0], queries[2, 1, 3], queries[3] = NAN, INF, 0
    exists = torch.ones(5, 2, dtype=torch.bool)
    exists[4] = False
    view = packed(TableView(items), ("int8",), 32)
    call = Asked(queries, view, 12, query_mask=exists)
    assert_same_bits(call.found, by_reference(queries, items, 12, query_mask=exists))


def test_bounds_of_many_users_are_held_in_parts(monkeypatch):
    monkeypatch.setattr(plan, "BOUND_BYTES", 1 << 10)
    items = make_items("clustered", 3000, 16, 0)
    view = packed(TableView(items), ("int4",), 64)
    assert plan.make_plan(20, 2, 3000, 16, 10, view.codes.cells.number()).group == 5
    queries = make_queries("clustered", 20, 2, 16, 1, items)
    found = search.search(queries, view, ScanOptions(), 10, launching.launcher(CPU), cuda.card(CPU))
    assert_same_bits(TopK(found.scores, found.ids), by_reference(queries, items, 10))


@pytest.mark.parametrize("users", [1, 8, 21, 256])
@pytest.mark.parametrize("places", [1, 8, 128])
@pytest.mark.parametrize("k", [1, 100, 1000, 10_000])
def test_sizes_of_what_promises(users, places, k):
    for rows, cell_rows in ((1 << 22, 32), (50_000_000, 64), (50_000_000, 4096)):
        cells = rows // cell_rows
        sizes = plan.plan_cells(users, places, k, cells, cell_rows)
        assert (sizes.sample - 1) * sizes.step < cells <= sizes.sample * sizes.step
        assert 1 <= sizes.rank <= sizes.sample
        assert sizes.promising == cells or sizes.promising * cell_rows >= 2 * k
        scored = sizes.promising * cell_rows
        assert scored <= max(4 * k + 64 * cell_rows, 2 * plan.PROMISING_DOTS // (users * places)) or scored >= rows


def masked(share, form, alive):
    """(mask, bits of rows that have not been removed, bool of rows that both allow), of 2500 rows."""
    mask = torch.rand(2500, generator=generator(6)) < share
    there = torch.ones(2500, dtype=torch.bool)
    if alive:
        there[::3] = False
    given = bit_set(mask) if form == "bits" else mask.repeat_interleave(3)[::3] if form == "strided" else mask
    return given, bit_set(there) if alive else None, mask & there


@pytest.mark.parametrize("alive", [False, True])
@pytest.mark.parametrize("form", ["bytes", "bits", "strided"])
@pytest.mark.parametrize(("share", "cell_rows"), [(0.005, 0), (0.4, 0), (0.005, 64), (0.02, 96), (0.4, 64), (0.0, 32)])
def test_tiles_of_allowed_rows_are_marked(share, cell_rows, form, alive):
    """In an order of their own unless more than one row in 16 is allowed."""
    items = make_items("decay", 2500, 16, 0)
    mask, bits, both = masked(share, form, alive)
    view = packed(TableView(items, alive=bits), ("int4",), cell_rows)
    call = Asked(make_queries("decay", 2, 2, 16, 1, items), view, 11, mask=mask)
    marked, everything = call.launches.given["mark_allowed"][2]
    marked = call.launches.integers(marked, -(-len(view.codes.blocks) // 64))
    marked = (marked[:, None] >> torch.arange(32) & 1).flatten().bool()
    rows = torch.arange(len(view.codes.blocks) * 32)
    places = rows if view.codes.cells is None else view.codes.cells.order[:, 1].long()
    wanted = torch.zeros_like(marked).index_fill_(0, places[both[rows]] // 64, True)
    dense = cell_rows > 0 and share > 0.1
    assert bool(call.launches.integers(everything, 1)) == dense
    assert torch.equal(marked, torch.zeros_like(marked) if dense else wanted)
    assert_same_bits(call.found, by_reference(call.queries, items, 11, mask=both))


@pytest.mark.parametrize("cell_rows", [0, 64])
@pytest.mark.parametrize("users", [1, 2])
def test_tiles_without_an_allowed_row_are_not_read(cell_rows, users):
    """A mask of four blocks in packed order; masks of several users of their own are asked of survivors alone."""
    items = make_items("iid", 6400, 16, 0)
    view = packed(TableView(items), ("int4",), cell_rows)
    rows = view.codes.cells.order[256:384, 0].long() if cell_rows else torch.arange(256, 384)
    mask = torch.zeros(6400, dtype=torch.bool).index_fill_(0, rows, True)
    queries, block = make_queries("iid", users, 2, 16, 1, items), view.codes.blocks.shape[1]
    shared = Asked(queries, view, 11, mask=mask)
    assert_same_bits(shared.found, by_reference(queries, items, 11, mask=mask))
    cells = len(view.codes.cells.blocks) * view.codes.cells.blocks.shape[1] if cell_rows else 0
    assert shared.counts[0] <= 4 * block + cells + 128 * users * 64
    own = Asked(queries, view, 11, mask=mask.expand(users, -1))
    assert_same_bits(own.found, shared.found)
    assert users == 1 or own.counts[0] >= 200 * block


def test_a_mask_of_few_rows_does_not_hide_which_cells_promise():
    """Cells without an allowed row are none of the promising ones, and the threshold leaves out others as well."""
    items = make_items("clustered", 20_000, 16, 0)
    view = TableView(items, codes=ItemTable(items).pack(blocks=64).codes())
    mask = torch.rand(20_000, generator=generator(7)) < 0.02
    queries = make_queries("clustered", 3, 2, 16, 1, items)
    call = Asked(queries, view, 10, mask=mask)
    assert_same_bits(call.found, by_reference(queries, items, 10, mask=mask))
    held = mask[call.cells.order[: call.cells.number() * 64, 0].long()].view(-1, 64).any(1)
    assert call.counts[4] > 3 * int((~held).sum()) + 0.1 * 3 * int(held.sum())
