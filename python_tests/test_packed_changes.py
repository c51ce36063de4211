"""Packed tables change as plain ones do: codes follow their rows, and where they cannot, calls say so."""

import copy
import gc
import json
import pickle
import struct
import threading
import weakref

import pytest
import torch
from support import CODES, assert_same_bits, run_python

from urm_kernels import ItemTable, freshness, score_topk
from urm_kernels.table import Serving
from urm_kernels.table_codes import CODE_PARTS
from urm_kernels.testing import make_items, make_queries

ROWS, R = 4500, 24
STALE = "factors changed since pack.*call refresh"


def generator(seed):
    return torch.Generator().manual_seed(seed)


def new_rows(count, seed=9):
    return 2 * torch.randn(count, R, generator=generator(seed))


@pytest.fixture(params=CODES, ids="+".join)
def kinds(request):
    return request.param


@pytest.fixture
def table(kinds):
    return ItemTable(make_items("clustered", ROWS, R, 0)).pack(kinds, seed=3)


@pytest.fixture
def queries():
    return make_queries("clustered", 3, 5, R, 1, make_items("clustered", ROWS, R, 0))


def assert_right(table, queries, kinds, seed=3):
    """The codes are those of a table packed now, and the result is a plain table's."""
    items = table.factors.detach() if table.encoded is None else table.encoded
    fresh = ItemTable(items.clone(), row_scale=table.row_scale).pack(kinds, seed=seed)
    assert table.is_packed
    for name in ("code_rotation", "code_blocks", "code_fine"):
        held, wanted = getattr(table, name), getattr(fresh, name)
        assert (held is None) == (wanted is None), name
        assert held is None or torch.equal(held, wanted), name
    there = None
    if table.alive is not None:
        there = table.alive
    wanted = score_topk(queries, items, 40, mask=there)
    assert_same_bits(score_topk(queries, table, 40), wanted)


def test_updates(table, queries, kinds):
    for rows in ([0], [31, 0, 15, 16], [64, 80, 95, 4479, 4480, 4499], list(range(500, 700))):
        table.update(torch.tensor(rows), new_rows(len(rows)))
        assert_right(table, queries, kinds)


def test_appends_across_blocks_with_and_without_room(table, queries, kinds):
    for count in (1, 11, 12, 33, 300, 5):  # 4500 = 140 blocks and 20 rows
        rows = table.append(new_rows(count, count))
        assert len(rows) == count
        assert_right(table, queries, kinds)
    table.update(torch.arange(4490, 4530), new_rows(40))
    assert_right(table, queries, kinds)


def test_a_table_that_grows_from_nothing(kinds, queries):
    table = ItemTable(torch.empty(0, R)).pack(kinds, seed=3)
    for count in (3, 40, 200):
        table.append(new_rows(count, count))
        assert_right(table, queries, kinds)


def test_removal_and_compaction(table, queries, kinds):
    table.remove(torch.arange(0, ROWS, 7))
    assert_right(table, queries, kinds)
    table.compact()
    assert_right(table, queries, kinds)


def test_packing_again_and_unpacking(table, queries, kinds):
    for other in (*CODES, kinds):
        assert table.pack(other, seed=5) is table
        assert_right(table, queries, other, seed=5)
    used = table.memory()
    assert used["code_blocks"] == table.code_blocks.nbytes
    assert table.unpack() is table
    assert not table.is_packed and table.codes() is None
    assert "code_blocks" not in table.memory() and used["total"] > table.memory()["total"]
    assert_same_bits(score_topk(queries, table, 40), score_topk(queries, table.factors, 40))


@pytest.mark.parametrize("r", [1, 4, 100, 128])
def test_bytes_a_row(kinds, r):
    """At most r / 2 + 10 for 4-bit codes; a quarter of the width rounded up to 8 for 2-bit ones."""
    rows = 32 * 100
    table = ItemTable(torch.randn(rows, r)).pack(kinds)
    wide = -(-r // 4) * 4
    wanted = sum({"int2": -(-r // 8) * 2 + 8, "int4": wide // 2 + 8, "int8": wide + 8}[kind] for kind in kinds)
    held = sum(getattr(table, name).nbytes for name in ("code_blocks", "code_fine") if getattr(table, name) is not None)
    assert held == rows * wanted
    assert kinds != ("int4",) or wanted <= r / 2 + 10


@pytest.mark.parametrize("mmap", [False, True])
def test_files_keep_codes(table, queries, kinds, tmp_path, mmap):
    table.remove(torch.tensor([5, 77]))
    table.save(tmp_path / "table.safetensors")
    loaded = ItemTable.load(tmp_path / "table.safetensors", mmap=mmap)
    for name in CODE_PARTS:
        held, saved = getattr(loaded, name), getattr(table, name)
        assert held is saved is None or torch.equal(held, saved), name
    assert_right(loaded, queries, kinds)
    if mmap:
        with pytest.raises(RuntimeError, match="read-only"):
            loaded.update(torch.tensor([0]), new_rows(1))
        loaded = loaded.clone()
    loaded.update(torch.tensor([0]), new_rows(1))
    assert_right(loaded, queries, kinds)


def test_a_mapped_table_is_packed_as_it_lies(kinds, queries, tmp_path):
    ItemTable(make_items("clustered", ROWS, R, 0)).save(tmp_path / "plain.safetensors")
    loaded = ItemTable.load(tmp_path / "plain.safetensors").pack(kinds, seed=3)
    assert_right(loaded, queries, kinds)


def test_copies(table, queries, kinds):
    for other in (table.clone(), copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert_right(other, queries, kinds)
        other.update(torch.tensor([3]), new_rows(1))
        assert_right(other, queries, kinds)
    assert_right(table, queries, kinds)


def test_moves_and_other_dtypes(table, queries, kinds):
    assert_right(table.to("cpu"), queries, kinds)
    assert_right(table.bfloat16(), queries, kinds)
    assert_right(table.half(), queries, kinds)
    assert_right(table.float(), queries, kinds)
    assert not table.double().is_packed


def test_states_of_other_sizes(table, queries, kinds):
    other = ItemTable(new_rows(600, 1))
    assert not any(name.startswith("code") for name in table.state_dict())
    table.load_state_dict(other.state_dict())
    assert len(table) == 600
    assert_right(table, queries, kinds)


def test_text_and_refresh(kinds, queries):
    items, text, projection = new_rows(700, 1), torch.randn(700, 5), torch.randn(5, R)
    table = ItemTable(items, text=text, text_projection=projection).pack(kinds, seed=3)
    assert_right(table, queries, kinds)
    table.update(torch.tensor([3, 600]), text=torch.randn(2, 5))
    table.append(new_rows(50), text=torch.randn(50, 5))
    assert_right(table, queries, kinds)
    table.text_projection.mul_(1.5)
    with pytest.raises(RuntimeError, match="call refresh"):
        score_topk(queries, table, 3)
    with pytest.raises(RuntimeError, match="call refresh"):
        table.pack(kinds)
    table.refresh()
    assert_right(table, queries, kinds)


def test_scales_of_rows(kinds, queries):
    scale = torch.rand(700, generator=generator(0)) + 0.5
    table = ItemTable(new_rows(700, 1), row_scale=scale).pack(kinds, seed=3)
    table.update(torch.tensor([40]), row_scale=torch.tensor([9.0]))
    fresh = ItemTable(table.factors.clone(), row_scale=table.row_scale.clone()).pack(kinds, seed=3)
    assert torch.equal(table.code_blocks, fresh.code_blocks)
    table.row_scale[3] = 5
    with pytest.raises(RuntimeError, match=STALE):
        score_topk(queries, table, 3)


def test_edits_in_place_make_codes_stale(table, queries, kinds):
    table.factors[7] = 5
    for _ in range(2):
        with pytest.raises(RuntimeError, match=STALE):
            score_topk(queries, table, 3)
    table.update(torch.tensor([9]), new_rows(1))
    with pytest.raises(RuntimeError, match=STALE):
        score_topk(queries, table, 3)
    table.append(new_rows(40))
    with pytest.raises(RuntimeError, match=STALE):
        score_topk(queries, table, 3)
    table.refresh()
    assert_right(table, queries, kinds)


def test_a_step_of_an_optimizer_makes_codes_stale(kinds, queries):
    table = ItemTable(make_items("clustered", ROWS, R, 0), trainable=True).pack(kinds, seed=3)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    score_topk(queries, table, 5).scores.sum().backward()
    optimizer.step()
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=STALE):
            score_topk(queries, table, 5)
    table.refresh()
    assert_right(table, queries, kinds)
    table.append(new_rows(50))
    assert_right(table, queries, kinds)


def test_compiled_calls_see_updates_and_stale_codes(table, queries, kinds):
    torch._dynamo.reset()
    found = torch.compile(lambda queries: score_topk(queries, table, 20), fullgraph=True)
    assert_same_bits(found(queries), score_topk(queries, table.factors, 20))
    table.update(torch.tensor([3, 4]), new_rows(2))
    assert_same_bits(found(queries), score_topk(queries, table.factors, 20))
    table.factors[9] = 1
    with pytest.raises(RuntimeError, match=STALE):
        found(queries)
    table.refresh()
    assert_same_bits(found(queries), score_topk(queries, table.factors, 20))


def test_functional_call_scans_the_tensors_that_it_is_given(table, queries):
    class Finds(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = table

        def forward(self, queries):
            return score_topk(queries, self.table, 5)

    other = new_rows(ROWS, 4)
    got = torch.func.functional_call(Finds(), {"table.factors": other}, (queries,))
    assert_same_bits(got, score_topk(queries, other, 5))


def test_export(table, queries):
    class Finds(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = table

        def forward(self, queries):
            return tuple(score_topk(queries, self.table, 5))

    exported = torch.export.export(Finds(), (queries,))
    assert_same_bits(exported.module()(queries), score_topk(queries, table, 5))


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("counted", ["", "_counted"])
def test_opcheck(kinds, learns, counted):
    pytest.importorskip("expecttest", reason="torch.testing imports it for opcheck")
    items = new_rows(70).requires_grad_(learns)
    codes = ItemTable(items.detach()).pack(kinds).codes()
    queries = torch.randn(2, 3, R).requires_grad_(learns)
    op = getattr(torch.ops.urm_kernels, f"score_topk{counted}{'' if learns else '_no_grad'}")
    table = Serving(items, None, None, None, 0, *codes[:4])
    arguments = (queries, *table, 4, None, "max", None, None, True, False, 1.0, "cpu")
    torch.library.opcheck(op.default, arguments)


def test_readers_see_a_packed_table_before_or_after_an_update(table, queries, kinds):
    """Rows of one value each time, in many blocks: a result that mixes two versions would show."""
    rows = torch.arange(0, ROWS, 9)
    versions = [new_rows(len(rows), seed) for seed in range(4)]
    wanted = []
    for version in versions:
        items = table.factors.clone()
        items[rows] = version
        wanted.append(score_topk(queries, items, 30))
    table.update(rows, versions[0])
    wrong, done = [], threading.Event()

    def read():
        while not done.is_set():
            got = score_topk(queries, table, 30)
            if not any(torch.equal(got.scores, one.scores) and torch.equal(got.ids, one.ids) for one in wanted):
                wrong.append(got)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for turn in range(200):
        table.update(rows, versions[turn % 4])
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong
    table.update(rows, versions[0])
    assert_right(table, queries, kinds)


def test_readers_while_rows_are_appended_and_the_table_is_packed_anew(table, queries):
    wrong, done = [], threading.Event()
    least = score_topk(queries, table, 1).scores[:, 0]

    def read():
        while not done.is_set():
            try:
                if (score_topk(queries, table, 10).scores[:, 0] < least).any():
                    wrong.append("a better row was missed")
            except Exception as error:
                wrong.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for turn in range(30):
        table.append(new_rows(50, turn))
        if turn % 10 == 5:
            table.pack(CODES[turn % len(CODES)])
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong, wrong[0]


def test_a_forked_child_reads_and_updates():
    run_python(
        """
        import os, torch
        torch.set_num_threads(1)
        from urm_kernels import ItemTable, score_topk
        table = ItemTable(torch.randn(5000, 16)).pack()
        queries = torch.randn(2, 3, 16)
        wanted = score_topk(queries, table, 5)
        child = os.fork()
        if child == 0:
            same = torch.equal(score_topk(queries, table, 5).ids, wanted.ids)
            table.update(torch.tensor([3]), torch.ones(1, 16))
            after = torch.equal(score_topk(queries, table, 5).ids, score_topk(queries, table.factors, 5).ids)
            os._exit(0 if same and after else 1)
        assert os.waitpid(child, 0)[1] == 0
        """
    )


def test_wrong_arguments_are_refused_in_words():
    table = ItemTable(torch.randn(40, 4))
    for codes in ((), ("int8", "int4"), ("int2",), "int4", 4, ("int4", "int4")):
        with pytest.raises(ValueError, match=r"^codes: one of .* is wanted"):
            table.pack(codes)
    with pytest.raises(TypeError, match=r"^seed: an integer"):
        table.pack(seed=1.5)
    with pytest.raises(TypeError, match=r"^progress: a function"):
        table.pack(progress=3)
    with pytest.raises(TypeError, match=r"^pack: torch.float64 factors are scored by the reference alone"):
        ItemTable(torch.randn(40, 4).double()).pack()
    with pytest.raises(ValueError, match=r"^pack: .* r = 0 came"):
        ItemTable(torch.randn(40, 0)).pack()
    with pytest.raises(ValueError, match=r"^pack: .* r = 8193 came"):
        ItemTable(torch.empty(1, 8193)).pack()


def test_progress_is_told():
    told = []
    ItemTable(torch.randn(600_000, 2)).pack(progress=lambda done, rows: told.append((done, rows)))
    assert [done for done, _ in told] == [1 << 18, 1 << 19, 600_000]
    assert {rows for _, rows in told} == {600_000}


def test_what_codes_were_made_from_is_forgotten_with_the_table(table):
    key = table._codes_from.key
    assert freshness.find(key) is not None
    del table._codes_from
    assert freshness.find(key) is None


def test_a_table_that_is_dropped_gives_its_memory_back_at_once(kinds):
    gc.disable()
    try:
        table = ItemTable(new_rows(100)).pack(kinds)
        table.update(torch.tensor([3]), new_rows(1))
        held = [weakref.ref(table.factors), weakref.ref(table.code_blocks)]
        del table
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()


def edited(path, tensors=None, **metadata):
    """The file with other entries of its header."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    described = json.loads(header["__metadata__"]["urm_kernels"]) | metadata
    for name, changes in (tensors or {}).items():
        header[name] |= changes
    header["__metadata__"]["urm_kernels"] = json.dumps(described)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"code_blocks": {"shape": [140, 447]}}, "lies at"),
        ({"code_blocks": {"shape": [639, 140]}}, "its metadata says"),
        ({"code_rotation": {"dtype": "I64"}}, "has dtype 'I64'"),
        ({"code_reference": {"shape": [1]}}, "its metadata says"),
    ],
)
def test_headers_of_codes_that_cannot_be_are_refused(queries, tmp_path, tensors, words):
    path = tmp_path / "table.safetensors"
    ItemTable(make_items("clustered", ROWS, R, 0)).pack().save(path)
    edited(path, tensors)
    with pytest.raises(ValueError, match=words):
        ItemTable.load(path)


@pytest.mark.parametrize(
    ("kinds", "r"), [(("int4", "int8"), 24), (("int4", "int8"), 3), (("int2", "int4"), 24)], ids=str
)
def test_fine_codes_of_another_size_are_refused(tmp_path, kinds, r):
    path = tmp_path / "table.safetensors"
    table = ItemTable(torch.randn(64, r)).pack(kinds)
    table.code_fine = table.code_fine[:, :-1].contiguous()
    with pytest.raises(ValueError, match="are no codes of 64 rows of width"):
        score_topk(torch.randn(1, r), table, 3)
    table.save(path)
    with pytest.raises(ValueError, match=f"blocks of .* beside rows of .* bytes are no codes of rows of width {r}"):
        ItemTable.load(path)


def test_a_rotation_of_other_numbers_than_signs_is_refused(tmp_path):
    table = ItemTable(torch.randn(64, 8)).pack()
    table.code_rotation[1, 2] = 1.5
    table.save(tmp_path / "table.safetensors")
    with pytest.raises(ValueError, match="code_rotation holds other numbers"):
        ItemTable.load(tmp_path / "table.safetensors")


def test_damaged_codes_give_a_result_or_an_error_and_no_crash(queries, tmp_path):
    random = generator(0)
    for kinds in CODES:
        for _ in range(8):
            table = ItemTable(make_items("clustered", ROWS, R, 0)).pack(kinds)
            for part in (table.code_blocks, table.code_fine):
                if part is not None:
                    part.copy_(torch.randint(0, 256, part.shape, generator=random))
            table.code_reference.copy_(torch.tensor([float("nan"), 1e38]))
            found = score_topk(queries, table, 10)
            assert ((found.ids >= -1) & (found.ids < ROWS)).all()
