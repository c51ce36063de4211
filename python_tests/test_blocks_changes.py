"""Tables packed in blocks while they change: cells follow their rows, for every reader."""

import threading

import packed_calls
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support import CODES, NAN, assert_same_bits
from test_blocks import assert_cells_bound, cell_bounds
from test_packed import generator, plain

from urm_kernels import ItemTable, score_topk
from urm_kernels.testing import forced, make_items, make_queries

CPU = torch.device("cpu")
R = 12
SEEDS = st.integers(0, 2**20)


def rows_of_kinds(count, seed, size=1.0):
    """Rows along eight axes: a query along one of them rules out the cells of all others."""
    random = generator(seed)
    kinds = torch.eye(8, R)[torch.randint(8, (count,), generator=random)]
    return size * (kinds + 0.1 * torch.randn(count, R, generator=random))


class Changes(RuleBasedStateMachine):
    """Whatever happens to a table, a search finds what a plain scan of the same rows finds, also while a reader that
    began before holds an update back."""

    @initialize(rows=st.integers(0, 1500), seed=SEEDS, kinds=st.sampled_from(CODES), biased=st.booleans())
    def begin(self, rows, seed, kinds, biased):
        self.items = rows_of_kinds(rows, seed)
        self.bias = 0.1 * torch.randn(rows, generator=generator(seed)) if biased else None
        self.alive = torch.ones(rows, dtype=torch.bool)
        bias = None if self.bias is None else self.bias.clone()
        self.table = ItemTable(self.items.clone(), bias=bias).pack(kinds, blocks=32)
        self.pins = []

    def teardown(self):
        while getattr(self, "pins", None):
            self.reader_ends()

    def rows_of(self, seed, most):
        there = self.alive.nonzero().flatten()
        return there[torch.randperm(len(there), generator=generator(seed))[:most]]

    @rule(seed=SEEDS, count=st.integers(1, 20), size=st.sampled_from([1e-30, 0.0, 1.0, 1.5, 2.0, 1e30, NAN]))
    def update(self, seed, count, size):
        rows = self.rows_of(seed, count)
        factors = rows_of_kinds(len(rows), seed, size)
        bias = None if self.bias is None else torch.randn(len(rows), generator=generator(seed + 1))
        self.table.update(rows, factors, bias=bias)
        self.items[rows] = factors
        if bias is not None:
            self.bias[rows] = bias

    @precondition(lambda self: not self.pins)
    @rule(seed=SEEDS, count=st.integers(1, 150), size=st.sampled_from([0.1, 1.0, 2.0]))
    def append(self, seed, count, size):
        factors = rows_of_kinds(count, seed, size)
        bias = None if self.bias is None else torch.randn(count, generator=generator(seed))
        rows = self.table.append(factors, bias=bias)
        assert torch.equal(rows, torch.arange(len(self.items), len(self.items) + count))
        self.items = torch.cat([self.items, factors])
        self.alive = torch.cat([self.alive, torch.ones(count, dtype=torch.bool)])
        if bias is not None:
            self.bias = torch.cat([self.bias, bias])

    @rule(seed=SEEDS, count=st.integers(1, 100))
    def remove(self, seed, count):
        rows = self.rows_of(seed, count)
        self.table.remove(rows)
        self.alive[rows] = False

    @precondition(lambda self: not self.pins)
    @rule()
    def compact(self):
        self.table.compact()
        self.items, self.bias = self.items[self.alive], None if self.bias is None else self.bias[self.alive]
        self.alive = torch.ones(len(self.items), dtype=torch.bool)

    @precondition(lambda self: not self.pins)
    @rule(how=st.sampled_from(["refresh", "clone", "pack", "edit"]))
    def make_anew(self, how):
        if how == "refresh":
            self.table.refresh()
        elif how == "clone":
            self.table = self.table.clone()
        elif how == "pack":
            self.table.pack(CODES[len(self.items) % len(CODES)], blocks=64)
        elif len(self.items):
            self.table.factors[0] = 1.0
            self.items[0] = 1.0
            if self.table.bias is not None:
                self.table.bias[-1] = 9.0
                self.bias[-1] = 9.0
            with pytest.raises(RuntimeError, match="call refresh"):
                score_topk(torch.ones(R), self.table, 1)
            self.table.refresh()

    @rule()
    def reader_begins(self):
        self.pins.append((self.table._log, self.table._log.pin()[0]))

    @precondition(lambda self: self.pins)
    @rule()
    def reader_ends(self):
        log, version = self.pins.pop()
        log.unpin(version)

    @rule(seed=SEEDS, k=st.sampled_from([1, 3, 20, 200]), count=st.sampled_from([1, 2, 20]))
    def search(self, seed, k, count):
        queries = rows_of_kinds(2 * count, seed).view(2, count, R)
        mask = torch.rand(2, len(self.items), generator=generator(seed)) < (1.0, 0.5, 0.02)[seed % 3]
        wanted = plain(queries, self.items, k, bias=self.bias, mask=mask & self.alive)
        with forced("cpu", scan="bounded"):
            assert_same_bits(score_topk(queries, self.table, k, mask=mask), wanted)
        if count < 20 and packed_calls.why_not(CPU) is None:
            with packed_calls.packed_calls(None, CPU):
                assert_same_bits(score_topk(queries, self.table, k, mask=mask), wanted)


TestChanges = Changes.TestCase
TestChanges.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes
)


def assert_cells_hold(table, queries):
    assert_cells_bound(queries, table)
    cells = table.codes().cells
    bias = table.bias.float()[cells.order[: cells.number() * cells.rows, 0].long()]
    assert torch.equal(cells.bias, table.bias.float()[cells.order[:, 0].long()])
    assert (cells.most >= bias.view(-1, cells.rows).amax(1)).all()


def test_cells_hold_their_rows_whatever_changes():
    random = generator(11)
    table = ItemTable(rows_of_kinds(1000, 0), bias=torch.randn(1000, generator=random)).pack(blocks=64)
    queries = torch.cat([rows_of_kinds(40, 1), torch.randn(8, R, generator=random)]).view(6, 8, R)
    assert_cells_hold(table, queries)
    for turn, size in enumerate((1.0, 3.0, 1e-20, 1e20)):
        rows = torch.randperm(len(table), generator=random)[:70]
        table.update(rows, rows_of_kinds(70, turn, size), bias=3 * torch.randn(70, generator=random))
        assert_cells_hold(table, queries)
        table.append(rows_of_kinds(77, turn, 2 * size), bias=torch.randn(77, generator=random))
        assert table.codes().cells.number() == len(table) // 32 * 32 // 64
        assert_cells_hold(table, queries)
    table.remove(torch.arange(0, 900, 3))
    table.compact()
    assert_cells_hold(table, queries)
    table.update(torch.tensor([7]), torch.full((1, R), float("nan")))
    assert (cell_bounds(queries, table) == float("inf")).any()


@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_a_file_keeps_the_cells(tmp_path, kinds):
    items = make_items("clustered", 3001, R, 0)
    table = ItemTable(items, bias=torch.randn(3001, generator=generator(1))).pack(kinds, blocks=96)
    table.save(tmp_path / "table")
    queries = make_queries("clustered", 3, 4, R, 1, items)
    with forced("cpu", scan="bounded"):
        wanted = score_topk(queries, table, 30)
        for mmap in (True, False):
            loaded = ItemTable.load(tmp_path / "table", mmap=mmap)
            assert loaded.codes().cells.rows == 96
            assert_same_bits(score_topk(queries, loaded, 30), wanted)
        loaded.update(torch.tensor([5]), torch.full((1, R), 3.0))
        assert_same_bits(score_topk(queries, loaded, 30), plain(queries, loaded.factors, 30, bias=loaded.bias))


def test_memory_tells_of_rows_that_changed_since_they_were_clustered(tmp_path):
    table = ItemTable(make_items("clustered", 3200, R, 0)).pack(blocks=True)
    assert table.memory()["changed"] == 0
    table.update(torch.arange(100), torch.randn(100, R))
    table.append(torch.randn(32, R))
    row = table.memory()["code_blocks"] // len(table._room["code_blocks"]) // 32
    assert table.memory()["changed"] == 132 * row
    assert table.clone().memory()["changed"] == 132 * row
    table.save(tmp_path / "table")
    assert ItemTable.load(tmp_path / "table").memory()["changed"] == 132 * row
    assert table.pack(blocks=True).memory()["changed"] == 0
    assert "changed" not in table.pack().memory()


def test_an_order_that_is_none_leads_nowhere_else():
    """From a file: rows beyond the table, rows twice, a place for none. Results are then wrong, and still results."""
    items = make_items("clustered", 2048, R, 0)
    queries = make_queries("clustered", 2, 3, R, 1, items)
    for wrong in (-1, 2**31 - 1, 2048, 0):
        table = ItemTable(items).pack(blocks=True)
        table.code_order[:, 0] = wrong
        table.code_order[::2, 1] = wrong
        for mask in (None, torch.arange(2048) < 20):
            with forced("cpu", scan="bounded"):
                ids = score_topk(queries, table, 40, mask=mask).ids
            assert (ids >= -1).all() and (ids < 2048).all()
            if packed_calls.why_not(CPU) is None:
                with packed_calls.packed_calls(None, CPU):
                    ids = score_topk(queries, table, 40, mask=mask).ids
                assert (ids >= -1).all() and (ids < 2048).all()


def test_training_makes_codes_stale_until_they_are_refreshed():
    items = make_items("clustered", 2048, R, 0)
    table = ItemTable(items.clone(), bias=torch.zeros(2048), trainable=True).pack(blocks=True)
    queries = make_queries("clustered", 2, 3, R, 1, items)
    score_topk(queries, table, 5).scores.sum().backward()
    with torch.no_grad():
        table.bias.add_(torch.randn(2048, generator=generator(3)))
    with pytest.raises(RuntimeError, match="call refresh"):
        score_topk(queries, table, 5)
    table.refresh()
    with torch.no_grad(), forced("cpu", scan="bounded"):
        assert_same_bits(score_topk(queries, table, 5), plain(queries, table.factors, 5, bias=table.bias))


def test_a_table_in_blocks_goes_where_tensors_go():
    table = ItemTable(make_items("clustered", 2100, R, 0), bias=torch.randn(2100)).pack(blocks=True)
    queries = make_queries("clustered", 2, 3, R, 1, table.factors)
    for other in (table.clone().half(), table.clone().to(torch.bfloat16), table.clone().float()):
        assert other.codes().cells.rows == 64
        with forced("cpu", scan="bounded"):
            assert_same_bits(score_topk(queries, other, 30), plain(queries, other.factors, 30, bias=other.bias))
    state = ItemTable(torch.zeros(1500, R), bias=torch.zeros(1500)).state_dict()
    table.load_state_dict(state)
    assert len(table) == 1500 and table.codes().cells.number() == 1472 // 64


def test_readers_never_see_half_an_update(monkeypatch):
    """One thread replaces all rows of a kind by those of another and back; the others see the one or the other."""
    monkeypatch.setenv("URM_CPU_SCAN", "bounded")
    items = make_items("clustered", 4096, R, 0)
    rows = torch.arange(0, 4096, 3)
    states = [items[rows], -2 * items[rows]]
    table = ItemTable(items.clone()).pack(blocks=True)
    queries = make_queries("clustered", 2, 3, R, 1, items)
    wanted = []
    for state in states:
        items[rows] = state
        wanted.append(plain(queries, items, 50))
    wrong, stop = [], threading.Event()

    def read():
        while not stop.is_set():
            result = score_topk(queries, table, 50)
            if not any(torch.equal(result.ids, w.ids) and torch.equal(result.scores, w.scores) for w in wanted):
                wrong.append(result)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for turn in range(60):
        table.update(rows, states[turn % 2 == 0])
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
