"""The promise of bits: one result, whatever backend, instruction set, thread count or batch computes it."""

import ctypes
import ctypes.util
import functools
import random

import pytest
import torch
from support import HALVES, REDUCTIONS, assert_same_bits, bits, by_reference, packed

from urm_kernels import score_topk
from urm_kernels.testing import (
    allowed_rows,
    compare_topk,
    full_scores,
    make_items,
    make_queries,
    score_tolerance,
)

RANKS = (1, 7, 16, 31, 64, 65, 128, 200)
QUERIES = (1, 2, 3, 4, 5, 8, 9, 13, 20)
KINDS = ("iid", "integer", "duplicates", "decay", "giant", "sparse", "sorted", "reversed", "norms")
CASES = range(3 * len(REDUCTIONS) * len(HALVES))


@functools.cache
def case(index):
    """(queries, items, k, options): each reduction with each dtype three times, all else drawn."""
    draw = random.Random(index)
    kind, r, M = draw.choice(KINDS), RANKS[index % 8], draw.choice(QUERIES)
    B, N = draw.choice((1, 2, 5)), draw.choice((1, 15, 33, 257, 700))
    generator = torch.Generator().manual_seed(index)
    items = make_items(kind, N, r, index)
    queries = make_queries(kind, B, M, r, index, items)
    options = {"reduce": REDUCTIONS[index % 4]}
    if draw.random() < 0.5:
        dtype = draw.choice(HALVES)
        options["bias"] = torch.randint(-4, 5, (N,), generator=generator).to(dtype)
    if draw.random() < 0.5:
        options["query_mask"] = torch.rand(B, M, generator=generator) < 0.7
    mask = draw.choice((None, "shared", "user", "shared bits", "user bits", "expanded", "strided"))
    if mask is not None:
        chosen = torch.rand((B, N) if "user" in mask else (N,), generator=generator) < 0.6
        chosen = packed(chosen) if "bits" in mask else chosen
        chosen = chosen.expand(B, N) if mask == "expanded" else chosen
        options["mask"] = torch.stack([chosen, ~chosen], -1)[..., 0] if mask == "strided" else chosen
    if draw.random() < 0.5:
        options["exclude"] = torch.randint(-1, N, (B, 9), generator=generator)
    return queries, items.to(HALVES[index // 4 % 3]), draw.choice((1, 3, 10, 64, N, N + 3)), options


@functools.cache
def expected(index):
    queries, items, k, options = case(index)
    return by_reference(queries, items, k, **options)


def of_user(user, options):
    """The options of one user of a batch."""
    out = dict(options)
    for name in ("query_mask", "exclude"):
        if name in out:
            out[name] = out[name][user : user + 1]
    if "mask" in out and out["mask"].dim() == 2:
        out["mask"] = out["mask"][user : user + 1]
    return out


def on(device, options):
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}


@pytest.mark.parametrize("index", CASES)
def test_every_machine_agrees_with_the_reference_and_with_float64(machine, device, index):
    queries, items, k, options = case(index)
    result = score_topk(queries.to(device), items.to(device), k, **on(device, options))
    assert_same_bits(result, expected(index))
    scoring = {name: options[name] for name in ("query_mask", "reduce", "bias") if name in options}
    allowed = allowed_rows(len(queries), len(items), options.get("mask"), options.get("exclude"))
    if "query_mask" in options:
        allowed &= options["query_mask"].any(1, keepdim=True)
    compare_topk(
        result,
        full_scores(queries, items, **scoring),
        tolerance=score_tolerance(queries, items, **scoring),
        allowed=allowed,
    )


@pytest.mark.parametrize("index", CASES[::2])
def test_a_row_alone_equals_the_row_in_a_batch(machine, device, index):
    queries, items, k, options = case(index)
    queries, items, options = queries.to(device), items.to(device), on(device, options)
    for user in {0, len(queries) - 1}:
        alone = score_topk(queries[user : user + 1], items, k, **of_user(user, options))
        together = expected(index)
        assert_same_bits(alone, type(together)(together.scores[user : user + 1], together.ids[user : user + 1]))


@pytest.mark.parametrize("index", CASES[1::4])
def test_unsorted_is_the_same_set(machine, device, index):
    queries, items, k, options = case(index)
    result = score_topk(queries.to(device), items.to(device), k, sorted=False, **on(device, options))
    assert_same_bits(result, expected(index), sorted=False)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("queries_each", [1, 12])
def test_thread_counts_agree(device, monkeypatch, reduce, queries_each):
    # 20,000 rows of r = 31 are work for seven threads; integers tie across every border of tile, chunk and thread.
    items = make_items("integer", 20_000, 31, 5).to(device)
    queries = make_queries("integer", 2, queries_each, 31, 5, items).to(device)
    options = {"reduce": reduce, "bias": (torch.arange(20_000) % 3).to(device)[:].float()}
    results = []
    for threads in ("1", "2", "3", "7"):
        monkeypatch.setenv("URM_NUM_THREADS", threads)
        results += [score_topk(queries, items, 300, **options) for _ in range(3)]
    for result in results[1:]:
        assert_same_bits(result, results[0])
    assert_same_bits(results[0], by_reference(queries, items, 300, **options))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_groups_of_users_agree_with_each_user_alone(machine, device, reduce):
    # 70 users of 9 queries are 630: more than one group of 512.
    generator = torch.Generator().manual_seed(3)
    items = make_items("integer", 90, 17, 3).to(device)
    queries = make_queries("integer", 70, 9, 17, 3, items).to(device)
    options = {
        "reduce": reduce,
        "query_mask": torch.rand(70, 9, generator=generator) < 0.5,
        "mask": torch.rand(70, 90, generator=generator) < 0.5,
        "exclude": torch.randint(-1, 90, (70, 4), generator=generator),
    }
    options = on(device, options)
    batch = score_topk(queries, items, 40, **options)
    assert_same_bits(batch, by_reference(queries, items, 40, **options))
    for user in (0, 55, 56, 57, 69):
        alone = score_topk(queries[user : user + 1], items, 40, **of_user(user, options))
        assert_same_bits(alone, type(batch)(batch.scores[user : user + 1], batch.ids[user : user + 1]))


def test_groups_cut_by_the_memory_of_their_buffers_agree(device, monkeypatch):
    # k = N = 40,000 for 7 threads: buffers of 64 MiB hold 29 users.
    items = make_items("duplicates", 40_000, 16, 1).to(device)
    queries = make_queries("duplicates", 31, 1, 16, 1, items).to(device)
    monkeypatch.setenv("URM_NUM_THREADS", "7")
    many = score_topk(queries, items, 40_000)
    monkeypatch.setenv("URM_NUM_THREADS", "1")
    for user in (0, 28, 29, 30):
        alone = score_topk(queries[user], items, 40_000)
        assert_same_bits(alone, type(many)(many.scores[user : user + 1], many.ids[user : user + 1]))
    assert (many.ids.cpu().sort(1).values == torch.arange(40_000)).all()


def fused_multiply_add():
    function = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    function.restype, function.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    return function


def canonical_dot(x, y):
    """DESIGN's words in plain Python: 16 running sums by fused multiply-add, then a tree 8, 4, 2, 1 apart."""
    fma, sums = fused_multiply_add(), [0.0] * 16
    for place, (a, b) in enumerate(zip(x, y, strict=True)):
        sums[place % 16] = fma(a, b, sums[place % 16])
    sums = torch.tensor(sums)
    for apart in (8, 4, 2, 1):
        sums = sums[:apart] + sums[apart : 2 * apart]
    return sums[0] + 0.0


@pytest.mark.parametrize("r", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("scale", [1.0, 1e-22, 1e18])
def test_the_score_is_the_canonical_dot(machine, device, r, scale):
    # Scale 1e-22 puts products and sums among the denormals, 1e18 some of them beyond the largest float.
    generator = torch.Generator().manual_seed(r)
    items = torch.randn(20, r, generator=generator) * scale * 10 ** (torch.rand(20, r, generator=generator))
    queries = torch.randn(2, 5, r, generator=generator) * scale
    for user in range(2):
        result = score_topk(queries[user, :1].to(device), items.to(device), 20)
        scores = torch.empty(20)
        for row in range(20):
            scores[row] = canonical_dot(queries[user, 0].tolist(), items[row].tolist())
        order = scores.argsort(descending=True, stable=True)
        order = order[~scores[order].isnan()]
        assert result.ids[0, : len(order)].tolist() == order.tolist()
        assert torch.equal(bits(result.scores[0, : len(order)]), bits(scores[order]))


def test_direct_and_panel_paths_agree_at_every_count_of_queries(machine, device):
    # 1 .. 8 queries in all read rows as they lie, 9 and more by transposed panels; the tail groups are 1, 2, 4 or 8.
    items = make_items("iid", 97, 33, 8).to(device)
    queries = make_queries("iid", 1, 27, 33, 8, items).to(device)
    alone = [score_topk(queries[:, m : m + 1], items, 97) for m in range(27)]
    dots = torch.stack([one.scores[0].scatter(0, one.ids[0], one.scores[0]) for one in alone])
    for count in range(1, 28):
        result = score_topk(queries[:, :count], items, 97)
        best = dots[:count].amax(0)
        order = best.argsort(descending=True, stable=True)
        assert result.ids[0].tolist() == order.tolist(), count
        assert torch.equal(bits(result.scores[0]), bits(best[order])), count


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_sums_add_queries_in_order_before_the_dot(machine, device, reduce):
    generator = torch.Generator().manual_seed(6)
    queries, items = torch.randn(3, 7, 20, generator=generator), torch.randn(40, 20, generator=generator)
    total = torch.zeros(3, 20)
    for m in range(7):
        total = total + queries[:, m]
    total = total / 7 if reduce == "mean" else total
    once = by_reference(total, items, 40)
    assert_same_bits(score_topk(queries.to(device), items.to(device), 40, reduce=reduce), once)


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1e6])
@pytest.mark.parametrize("count", [1, 2, 20, 128])
def test_log_sum_exp_keeps_its_stated_error(machine, device, spread, count):
    generator = torch.Generator().manual_seed(count)
    items = torch.randn(50, 16, generator=generator) * spread
    queries = torch.randn(1, count, 16, generator=generator)
    result = score_topk(queries.to(device), items.to(device), 50, reduce="logsumexp")
    # From the canonical dots, which the reference's max of one query at a time gives.
    dots = torch.empty(count, 50)
    for m in range(count):
        one = by_reference(queries[:, m], items, 50)
        dots[m, one.ids[0]] = one.scores[0]
    truth = dots.double().logsumexp(0)
    error = (result.scores[0].cpu().double() - truth[result.ids[0].cpu()]).abs()
    assert (error <= 2e-6 * dots.abs().max().clamp(min=1).double()).all()


@pytest.mark.parametrize("count", [1000, 5000])
def test_log_sum_exp_keeps_its_stated_error_however_many_queries(machine, device, count):
    # exp(-0.357) is about 0.7: added plainly, each term errs to the same side while the sum lies between powers of two.
    queries = torch.full((1, count, 1), -0.35667494)
    queries[0, 0] = 0.0
    items = torch.ones(64, 1)
    result = score_topk(queries.to(device), items.to(device), 1, reduce="logsumexp")
    truth = queries.double().logsumexp(1)
    assert (result.scores.cpu().double() - truth).abs() <= 2e-6 * truth


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("misled", ["nobody", "everybody", "some"])
def test_thresholds_guessed_from_a_sample_change_nothing(monkeypatch, cheap_isa, reduce, misled):
    # Bounded scans of 65,536 rows and more guess from every 256th row for k from 512 on; where only those are good,
    # the guess is refuted.
    monkeypatch.setenv("URM_CPU_ISA", cheap_isa)
    rows, r, generator = 66_000, 16, torch.Generator().manual_seed(9)
    items = make_items("iid", rows, r, 9)
    queries = make_queries("iid", 4, 3, r, 9, items)
    if misled != "nobody":
        items[::256, 0] = 300.0
        queries[..., 0] = 1.0 if misled == "everybody" else torch.tensor([1.0, 0.0, -1.0, 0.0])[:, None]
    bias = torch.rand(rows, generator=generator)
    mask = torch.rand(4, rows, generator=generator) < torch.tensor([[1.0], [0.9], [0.009], [0.5]])
    exclude = torch.arange(0, 256 * 40, 256).expand(4, 40)
    variants = [{}, {"bias": bias, "mask": mask}, {"mask": packed(mask), "exclude": exclude, "sorted": False}]
    for options in variants:
        results = []
        for scan in ("exact", "bounded"):
            monkeypatch.setenv("URM_CPU_SCAN", scan)
            results.append(score_topk(queries, items, 600, reduce=reduce, **options))
        assert_same_bits(results[1], results[0], sorted=options.get("sorted", True))
