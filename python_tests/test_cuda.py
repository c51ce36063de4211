"""What only a CUDA device can show: streams, threads, graphs, waits, memory that ends, tables past 2^32 elements."""

import threading

import pytest
import torch
from support import assert_same_bits, by_reference, ids_of

from urm_kernels import score_topk
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


@pytest.mark.parametrize("options", [{}, {"exclude": 5}, {"reduce": "logsumexp"}, {"k": 30_000}])
def test_no_call_waits_for_the_device(device, scanned, options):
    queries, items, _ = scanned
    given = dict(options)
    k = given.pop("k", 50)
    if "exclude" in given:
        given["exclude"] = torch.zeros(2, given["exclude"], dtype=torch.int64, device=device)
    score_topk(queries, items, k, **given)  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        score_topk(queries, items, k, **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
