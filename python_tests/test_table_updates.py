"""A table that changes while it is read: every call sees the whole of an update or nothing of it."""

import contextlib
import gc
import random
import threading
import time

import pytest
import torch
from support import assert_same_bits, bits, by_reference, run_python

from urm_kernels import ItemTable, TopK, log_partition, score_candidates, score_topk
from urm_kernels.testing import available_backends, forced

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
R = 32
PATHS = {  # queries of one user, backend, ways to scan
    "direct": (2, "cpu", "exact"),
    "panel": (20, "cpu", "exact"),
    "bounded": (20, "cpu", "bounded"),
    "reference": (2, "reference", None),
}


@contextlib.contextmanager
def on(path):
    """Within, calls take that path. Yields how many queries one user then has."""
    count, backend, scan = PATHS[path]
    isa = None
    if scan == "bounded":
        isa = next((i for b, i in available_backends() if b == "cpu" and i in ("amx", "avx512_vnni")), None)
        if isa is None:
            pytest.skip("no cheap score on this machine")
    with forced(backend, isa, scan):
        yield count


def laid_out(factors, layout):
    if layout == "rows apart":
        wide = torch.zeros(len(factors), 2 * factors.shape[1] + 3, dtype=torch.float32).to(factors.dtype)
        wide[:, 3 : 3 + factors.shape[1]].copy_(factors)
        return wide[:, 3 : 3 + factors.shape[1]]
    if layout == "columns first":
        return factors.T.contiguous().T
    return factors


class Versions:
    """A table whose first `changing` rows carry the version of the last update in every element and in the bias.

    What a score, a list or a partition must be is known for each version; a mixture gives something else.
    """

    def __init__(self, dtype, count, rows=1003, changing=400, layout="whole", last=14):
        self.changing, self.rows = torch.arange(changing), rows
        self.queries = torch.full((1, count, R), 0.37 / R)
        self.versions = range(1, last + 1)
        scaled = {"row_scale": torch.full((rows,), 0.5)} if dtype == torch.float8_e4m3fn else {}
        factors = torch.full((rows, R), -3.0).to(dtype)
        self.table = ItemTable(laid_out(factors, layout), bias=torch.zeros(rows), **scaled)
        self.listed = torch.cat([self.changing, self.changing.flip(0)])
        self.dtype, self.known = dtype, {}
        for version in self.versions:
            self.write(version)
            self.known[version] = self.read()
        assert len({tuple(map(self.key, known)) for known in self.known.values()}) == len(self.known)
        self.write(1)

    def write(self, version):
        rows = self.changing[torch.randperm(len(self.changing))]
        factors = torch.full((len(rows), R), float(version)).to(self.dtype)
        self.table.update(rows, factors, bias=torch.full((len(rows),), version / 64))

    def read(self):
        best = score_topk(self.queries, self.table, len(self.changing) + 5)
        listed = score_candidates(self.queries, self.table, self.listed)
        return best, listed, log_partition(self.queries, self.table)

    @staticmethod
    def key(result):
        parts = result if isinstance(result, TopK) else (result,)
        return tuple(tuple(part.flatten().tolist()) for part in parts)

    def which(self, result, place):
        """The one version whose result this is; None for a mixture."""
        wanted = self.key(result)
        return next((v for v, known in self.known.items() if self.key(known[place]) == wanted), None)


def read_while_written(held, readers, seconds=0.0, updates=40, read=None):
    """Several readers and one writer: every result belongs to one version, none older than the last update that had
    ended before, none newer than the last one that had begun."""
    read = read or held.read
    begun, done, stop, wrong, seen = [0], [0], threading.Event(), [], set()
    history = [1]  # version after update i

    def reader():
        try:
            while not stop.is_set():
                oldest = done[0]
                results = read()
                newest = begun[0]
                for place, result in enumerate(results):
                    version = held.which(result, place)
                    if version is None or version not in history[oldest : newest + 1]:
                        wrong.append((place, version, history[oldest : newest + 1], held.key(result)[0][:3]))
                        stop.set()
                    seen.add(version)
        except BaseException as error:
            wrong.append(error)
            stop.set()

    threads = [threading.Thread(target=reader) for _ in range(readers)]
    for thread in threads:
        thread.start()
    chosen, ends = random.Random(0), time.monotonic() + seconds
    count = 0
    while (count < updates or time.monotonic() < ends) and not stop.is_set():
        version = chosen.choice([v for v in held.versions if v != history[-1]])
        history.append(version)
        begun[0] = count = count + 1
        held.write(version)
        done[0] = count
        time.sleep(chosen.choice([0, 0, 0.001, 0.003]))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]
    assert held.which(held.read()[0], 0) == history[-1] and not held.table._log._pending
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_readers_see_the_whole_of_an_update_or_nothing_of_it(path, dtype):
    with on(path) as count:
        rows = 203 if path == "reference" else 1003
        held = Versions(dtype, count, rows, changing=rows // 2)
        read_while_written(held, readers=2, updates=10 if path == "reference" else 40)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "form", [ItemTable, lambda items: ItemTable(items).pack(), lambda items: ItemTable(items).pack(blocks=32)]
)
def test_a_bias_of_the_call_stays_where_rows_are_being_replaced(path, form):
    generator = torch.Generator().manual_seed(4)
    items, bias = torch.randn(403, R, generator=generator), torch.randn(403, generator=generator)
    table, changed = form(items.clone()), torch.tensor([3, 200, 402])
    version, _ = table._log.pin()
    table.update(changed, items[changed] * 2)
    items[changed] *= 2
    with on(path) as count:
        queries = torch.randn(3, count, R, generator=generator)
        found = score_topk(queries, table, 20, bias=bias)
        sums = log_partition(queries, table, bias=bias)
        scores = score_candidates(queries, table, torch.arange(403), bias=bias)
        table._log.unpin(version)
        assert_same_bits(found, score_topk(queries, items, 20, bias=bias))
        assert torch.equal(bits(sums), bits(log_partition(queries, items, bias=bias)))
        assert torch.equal(bits(scores), bits(score_candidates(queries, items, torch.arange(403), bias=bias)))


@pytest.mark.parametrize("readers", [1, 4])
@pytest.mark.parametrize("layout", ["whole", "rows apart", "columns first"])
def test_readers_see_whole_updates_of_factors_in_any_layout(readers, layout):
    with on("panel") as count:
        read_while_written(Versions(torch.float32, count, layout=layout), readers)


def fill(dtype, rows, generator):
    return torch.randn(rows, R, generator=generator).to(dtype)


@pytest.mark.parametrize("layout", ["whole", "rows apart", "columns first"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_rows_that_wait_beside_the_table_are_read_there_with_every_bit(path, dtype, layout):
    generator = torch.Generator().manual_seed(3)
    rows = 403 if path == "bounded" else 203
    factors, bias = fill(dtype, rows, generator), torch.randn(rows, generator=generator)
    scale = torch.rand(rows, generator=generator) if dtype == torch.float8_e4m3fn else None
    table = ItemTable(laid_out(factors, layout), bias=bias.clone(), row_scale=None if scale is None else scale.clone())
    plain = factors.float().clone()
    version, overlay = table._log.pin()
    assert overlay is None
    first = torch.tensor([0, 1, 2, 15, 16, 17, 31, 40, 100, rows - 17, rows - 3, rows - 2, rows - 1])
    second = torch.tensor([2, 3, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63, rows - 1])
    for changed in (first, second):
        fresh, added = fill(dtype, len(changed), generator), torch.randn(len(changed), generator=generator)
        table.update(changed, fresh, bias=added)
        plain[changed], bias[changed] = fresh.float(), added
    assert not torch.equal(table.factors.float(), plain), "somebody still reads what was there"
    with on(path) as count:
        queries = torch.randn(3, count, R, generator=generator)
        for reduce in ("max", "sum", "logsumexp"):
            results = []
            for _ in range(2):
                results.append(
                    (
                        score_topk(queries, table, rows, reduce=reduce),
                        score_candidates(queries, table, torch.cat([first, second]), reduce=reduce),
                        log_partition(queries, table, reduce=reduce),
                    )
                )
                if len(results) == 1:
                    table._log.unpin(version)
                    version = table._log.pin()[0]
                    assert torch.equal(table.factors.float(), plain)
            (best, listed, total), (best_after, listed_after, total_after) = results
            assert_same_bits(best, best_after)
            assert torch.equal(bits(listed), bits(listed_after)) and torch.equal(bits(total), bits(total_after))
            if scale is None:
                assert_same_bits(best, by_reference(queries, plain, rows, reduce=reduce, bias=bias))
    table._log.unpin(version)


def test_rows_come_and_go_while_others_read():
    # Each call sees the table as it was at one moment between its beginning and its end.
    generator = torch.Generator().manual_seed(1)
    table = ItemTable(torch.randint(-4, 5, (50, 8), generator=generator).float())
    queries = torch.randint(-4, 5, (1, 2, 8), generator=generator).float()
    history, begun, done, stop, wrong = [Versions.key(score_topk(queries, table, 500))], [0], [0], threading.Event(), []

    def reader():
        try:
            while not stop.is_set():
                oldest = done[0]
                got = Versions.key(score_topk(queries, table, 500))
                while len(history) <= begun[0]:  # what the change in hand will have given
                    time.sleep(0)
                if got not in history[oldest : begun[0] + 1]:
                    wrong.append((oldest, begun[0], got[1][:9]))
                    stop.set()
        except BaseException as error:
            wrong.append(error)
            stop.set()

    threads = [threading.Thread(target=reader) for _ in range(2)]
    for thread in threads:
        thread.start()
    chosen = random.Random(1)
    for i in range(150):
        if stop.is_set():
            break
        begun[0] = i + 1
        living = [
            row for row in range(len(table)) if table.alive is None or int(table.alive[row >> 3]) >> (row & 7) & 1
        ]
        what = chosen.choice(["append", "append", "update", "update", "remove", "compact"])
        fresh = torch.randint(-4, 5, (3, 8), generator=generator).float()
        if what == "append":
            table.append(fresh)
        elif what == "update":
            table.update(torch.tensor(chosen.sample(living, 3)), fresh)
        elif what == "remove":
            table.remove(torch.tensor(chosen.sample(living, 3)))
        else:
            table.compact()
        history.append(Versions.key(score_topk(queries, table, 500)))
        done[0] = i + 1
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


def test_a_compiled_reader_sees_updates_and_growth():
    torch._dynamo.reset()
    with on("direct") as count:
        held = Versions(torch.float32, count, rows=203, changing=100)
        compiled = torch.compile(held.read, fullgraph=True, backend="aot_eager")
        read_while_written(held, readers=2, read=lambda: compiled())
        version, _ = held.table._log.pin()
        held.write(7)
        assert held.which(compiled()[0], 0) == 7
        held.table._log.unpin(version)
        assert held.which(compiled()[2], 2) == 7
        for _ in range(3):
            held.table.append(torch.full((1, R), 50.0), bias=torch.zeros(1))
            eager, graph = held.read(), compiled()
            assert [held.key(part) for part in eager] == [held.key(part) for part in graph]


def test_tables_and_their_logs_go_when_nobody_holds_them():
    from urm_kernels import updates

    table = ItemTable(torch.zeros(4, 2))
    key = table._log.key
    score_topk(torch.zeros(2), table, 1)
    del table
    gc.collect()
    assert updates.find(key) is None


def test_fork_in_the_middle_leaves_both_with_whole_tables():
    out = run_python(
        """
        import os, signal, threading
        import torch
        from urm_kernels import ItemTable, score_topk
        table, queries = ItemTable(torch.zeros(999, 16)), torch.ones(16)
        stop = threading.Event()
        def read():
            while not stop.is_set():
                scores = score_topk(queries, table, 999).scores
                assert scores.min() == scores.max()
        def write():
            version = 0
            while not stop.is_set():
                version = version % 1000 + 1
                table.update(torch.arange(999), torch.full((999, 16), float(version)))
        threads = [threading.Thread(target=work) for work in (read, read, write)]
        for thread in threads:
            thread.start()
        statuses = []
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                scores = score_topk(queries, table, 999).scores
                fine = bool(scores.min() == scores.max())
                table.update(torch.tensor([3]), torch.full((1, 16), 1e6))
                fine &= score_topk(queries, table, 1).ids.tolist() == [[3]] and not table._log._pending
                os._exit(0 if fine else 1)
            statuses.append(os.waitpid(child, 0)[1])
            if statuses[-1]:
                break
        stop.set()
        for thread in threads:
            thread.join()
        print(statuses)
        """,
        OMP_NUM_THREADS="1",
        timeout=240,
    )
    assert out == f"{[0] * 20}\n"


def test_fork_while_another_thread_holds_the_tables_lock():
    # Saving waits for the readers that began before; the child has neither these readers nor that thread.
    out = run_python(
        """
        import os, signal, tempfile, threading, time
        import torch
        from urm_kernels import ItemTable, score_topk
        table = ItemTable(torch.zeros(9, 4), ids=torch.arange(9))
        version, _ = table._log.pin()
        table.update(torch.tensor([3]), torch.ones(1, 4))
        with tempfile.TemporaryDirectory() as folder:
            thread = threading.Thread(target=table.save, args=(folder + "/t",))
            thread.start()
            time.sleep(0.3)
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                fine = score_topk(torch.ones(4), table, 1).ids.tolist() == [[3]]
                table.update(torch.tensor([4]), torch.full((1, 4), 2.0))
                fine &= score_topk(torch.ones(4), table, 1).ids.tolist() == [[4]]
                fine &= table.rows_of(torch.tensor([8])).tolist() == [8]
                os._exit(0 if fine else 1)
            print(os.waitpid(child, 0)[1])
            table._log.unpin(version)
            thread.join()
        """,
        OMP_NUM_THREADS="1",
    )
    assert out == "0\n"


def test_an_update_whose_rows_go_before_its_turn_comes_is_refused():
    # Two writers: the second one's rows exist when it is called, and no longer when the first has let it in.
    out = run_python("""
        import threading, time
        import torch
        from urm_kernels import ItemTable
        table, ended = ItemTable(torch.zeros(1 << 20, 16)), []
        def update():
            try:
                table.update(torch.tensor([(1 << 20) - 1]), torch.ones(1, 16))
                ended.append("written")
            except (ValueError, IndexError):
                ended.append("refused")
        with table._lock:  # as a writer holds it
            thread = threading.Thread(target=update)
            thread.start()
            time.sleep(0.3)
            table.remove(torch.arange(4, 1 << 20))
            table.compact()
        thread.join()
        print(ended, len(table))
    """)
    assert out == "['refused'] 4\n"


@pytest.mark.slow
def test_one_minute_of_updates_and_reads():
    """What sanitize.sh thread runs as well: every path and dtype in turn, with one writer and three readers."""
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        for path, dtype in ((p, d) for p in ("direct", "panel", "bounded") for d in DTYPES):
            try:
                with on(path) as count:
                    read_while_written(Versions(dtype, count, rows=5003, changing=700), readers=3, seconds=2.0)
            except pytest.skip.Exception:
                continue
            if time.monotonic() > ends:
                return
