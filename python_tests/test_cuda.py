"""What only a CUDA device can show: streams, threads, graphs, waits, memory that ends, tables past 2^32 elements."""

import functools
import math
import threading

import pytest
import torch
from support import assert_same_bits, by_reference, ids_of

from urm_kernels import ItemTable, interop, log_partition, score_candidates, score_topk
from urm_kernels.backends import cpu, cuda
from urm_kernels.backends.cuda import launching
from urm_kernels.testing import make_items, make_queries

pytestmark = [
    pytest.mark.real_device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture
def scanned(device):
    """Queries [2, 3, r] and bf16 items, enough for a scan with a threshold; and the answer."""
    items = make_items("decay", 40_000, 32, 1).bfloat16()
    queries = make_queries("decay", 2, 3, 32, 1, items)
    return queries.to(device), items.to(device), by_reference(queries, items, 50)


def _gradients(function, queries, items, *rest, **options):
    leaves = [queries.clone().requires_grad_(), items.clone().requires_grad_()]
    return torch.autograd.grad(function(*leaves, *rest, **options).sum(), leaves)


def _chosen(queries):
    return torch.arange(40, device=queries.device).expand(len(queries), 40)


@functools.cache
def _packed(kinds, items):
    return ItemTable(items).pack(kinds)


def _by_codes(kinds, **options):
    def call(queries, items):
        if cuda.why_not(queries.device, ()):
            pytest.skip("the CUDA backend of packed tables is not there")
        return score_topk(queries, _packed(kinds, items), 50, backend="cuda", **options)

    return call


# Every function with what takes other kernels.
CALLS = {
    "score_topk": lambda q, v: score_topk(q, v, 50),
    "exclude": lambda q, v: score_topk(q, v, 50, exclude=torch.zeros(2, 5, dtype=torch.int64, device=q.device)),
    "logsumexp": lambda q, v: score_topk(q, v, 50, reduce="logsumexp"),
    "dense": lambda q, v: score_topk(q, v, 30_000),
    "scaled": lambda q, v: score_topk(q, ItemTable(v, row_scale=v[:, 0].float().contiguous()), 50),
    "counted": lambda q, v: score_topk(q, v, 50, return_stats=True)[0],
    "packed": _by_codes(("int4",)),
    "packed logsumexp": _by_codes(("int4", "int8"), reduce="logsumexp"),
    "packed counted": lambda q, v: _by_codes(("int8",), return_stats=True)(q, v)[0],
    "score_candidates": lambda q, v: score_candidates(q, v, _chosen(q)),
    "shared candidates": lambda q, v: score_candidates(q, v, _chosen(q)[0]),
    "log_partition": lambda q, v: log_partition(q, v, temperature=0.5),
    "gradient of log_partition": lambda q, v: _gradients(log_partition, q, v, reduce="logsumexp"),
    "gradient of score_candidates": lambda q, v: _gradients(score_candidates, q, v, _chosen(q)),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_call_waits_for_the_device(scanned, name):
    queries, items, _ = scanned
    CALLS[name](queries, items)  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        CALLS[name](queries, items)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", [name for name in CALLS if "gradient" not in name])
def test_every_call_can_be_captured(scanned, name):
    queries, items, _ = scanned
    wanted = CALLS[name](queries, items)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = CALLS[name](queries, items)
    for _ in range(2):
        graph.replay()
        for part, other in zip(_parts(result), _parts(wanted), strict=True):
            assert torch.equal(part, other)


def _parts(result):
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def test_a_captured_call_replays_with_what_its_tensors_hold_then(scanned):
    queries, items, wanted = scanned
    held = torch.zeros_like(queries)
    score_topk(held, items, 50)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = score_topk(held, items, 50)
    for given in (queries, -queries):
        held.copy_(given)
        graph.replay()
        assert_same_bits(result, score_topk(given, items, 50))
    held.copy_(queries)
    graph.replay()
    assert_same_bits(result, wanted)
    # A table that changes between replays: nothing about it was remembered.
    items *= 0.5
    graph.replay()
    assert_same_bits(result, score_topk(queries, items, 50))


def test_unproven_users_are_found_in_a_graph_as_well(device):
    # All rows equal: every row survives, the list overflows, the second way answers.
    items = torch.ones(40_000, 16, device=device)
    queries = torch.ones(3, 1, 16, device=device)
    score_topk(queries, items, 9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = score_topk(queries, items, 9)
    for _ in range(2):
        graph.replay()
        assert ids_of(result) == [list(range(9))] * 3


def test_calls_run_on_the_current_stream(scanned):
    queries, items, wanted = scanned
    stream = torch.cuda.Stream()
    slow = torch.zeros(1 << 26, device=items.device)
    late = torch.zeros_like(items)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(30):
            slow.add_(1)
        late.copy_(items)  # only behind the additions
        result = score_topk(queries, late, 50)
    stream.synchronize()
    assert_same_bits(result, wanted)


def test_threads_with_streams_of_their_own(scanned):
    queries, items, wanted = scanned
    results, problems = {}, []

    def work(number):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    results[number] = score_topk(queries, items, 50)
                torch.cuda.current_stream().synchronize()
        except Exception as error:
            problems.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    for result in results.values():
        assert_same_bits(result, wanted)


def test_out_of_memory_raises_and_the_next_call_works(device, scanned):
    queries, items, wanted = scanned
    with pytest.raises(torch.OutOfMemoryError):
        score_topk(queries.expand(2, 3, 32), items, 1 << 40)
    assert_same_bits(score_topk(queries, items, 50), wanted)


@pytest.mark.parametrize("rows", [34_000_000, 68_000_000])
def test_tables_past_two_to_the_31_and_32_elements(device, rows):
    free, _ = torch.cuda.mem_get_info()
    if free < 2 * rows * 64 + (2 << 30):
        pytest.skip("not enough memory on the device")
    items = torch.zeros(rows, 64, dtype=torch.bfloat16, device=device)
    items[-1, -1], items[rows // 2, 7], items[0, 0] = 3.0, 2.0, 1.0
    queries = torch.ones(1, 2, 64, device=device)
    result = score_topk(queries, items, 4)
    assert ids_of(result) == [[rows - 1, rows // 2, 0, 1]] and result.scores.tolist() == [[3.0, 2.0, 1.0, 0.0]]
    chosen = torch.tensor([[rows - 1, 1, rows // 2, rows]], device=device)
    assert score_candidates(queries, items, chosen).nan_to_num(9).tolist() == [[3.0, 0.0, 2.0, 9.0]]
    total = math.log(math.exp(30) + math.exp(20) + math.exp(10) + rows - 3)
    assert abs(float(log_partition(queries, items, temperature=0.1)) - total) < 1e-4


def test_survivors_that_crowd_do_not_get_lost(device):
    # Ten million rows within one per cent of each other, the best at the end.
    rows = 10_000_000
    items = torch.ones(rows, 16, dtype=torch.bfloat16, device=device)
    items[:, 3] = (torch.arange(rows, device=device) % 64).bfloat16() / 64
    items[-5:, 5] = 2.0
    queries = torch.ones(2, 1, 16, device=device)
    result = score_topk(queries, items, 7)
    best = rows - 1 - torch.arange(5)
    order = best[torch.argsort((best % 64).float(), descending=True, stable=True)].tolist()
    assert [ids[:5] for ids in ids_of(result)] == [order] * 2
    assert [ids[5:] for ids in ids_of(result)] == [[63, 127]] * 2


@pytest.fixture
def packed_table(device, scanned):
    if reason := cuda.why_not(device, ()):
        pytest.skip(reason)
    return ItemTable(scanned[1]).pack(("int4", "int8"))


def test_codes_made_on_the_device_are_the_cpus(packed_table):
    if cpu.why_not(torch.device("cpu"), ()):
        pytest.skip("needs the CPU's encoder")
    there = ItemTable(packed_table.factors.detach().cpu()).pack(("int4", "int8"))
    for part, other in zip(packed_table.codes()[2:], there.codes()[2:], strict=True):
        assert torch.equal(part.cpu(), other)


def test_packed_tables_past_two_to_the_31_elements(device):
    rows = 34_000_000
    free, _ = torch.cuda.mem_get_info()
    if cuda.why_not(device, ()) or free < 3 * rows * 64 + (2 << 30):
        pytest.skip("needs the CUDA backend and memory")
    items = torch.zeros(rows, 64, dtype=torch.bfloat16, device=device)
    items[-1, -1], items[rows // 2, 7], items[0, 0] = 3.0, 2.0, 1.0
    result = score_topk(torch.ones(1, 2, 64, device=device), ItemTable(items).pack(), 3, backend="cuda")
    assert ids_of(result) == [[rows - 1, rows // 2, 0]] and result.scores.tolist() == [[3.0, 2.0, 1.0]]


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


def test_arrays_of_cupy_are_taken_where_they_lie_and_given_back_in_kind(cupy, packed_table, scanned):
    queries, _, wanted = scanned
    given = cupy.from_dlpack(queries)
    assert interop.as_tensor("queries", given).data_ptr() == queries.data_ptr()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        late = cupy.zeros_like(given)
        for _ in range(200):
            late += 1
        late[...] = given  # only behind the additions, on CuPy's stream
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            result = score_topk(late, packed_table, 50, backend="cuda")
        stream.synchronize()
    assert_same_bits(result, wanted)
    back = interop.in_kind(result, given)
    assert isinstance(back.scores, cupy.ndarray) and back.scores.data.ptr == result.scores.data_ptr()


def test_kernels_that_cupy_compiles_give_the_same_bits(cupy, monkeypatch, packed_table, scanned):
    queries, _, wanted = scanned
    launcher = launching.RuntimeCompiled(cupy, launching.sources())
    monkeypatch.setattr(launching, "launcher", lambda device: launcher)
    assert_same_bits(score_topk(queries, packed_table, 50, backend="cuda"), wanted)
