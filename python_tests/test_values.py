"""NaN, infinities, zeros, ties, denormals: what a score may be and what may be returned."""

import struct

import pytest
import torch
from support import INF, NAN, REDUCTIONS, assert_same_bits, bits, by_reference, ids_of, run_python

from urm_kernels import score_topk
from urm_kernels.testing import brute_force_topk, make_items, make_queries

NANS = (0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF)


def nan_of(pattern):
    """A float32 tensor element with exactly these bits: a quiet or signalling NaN of either sign."""
    return torch.tensor([struct.unpack("i", struct.pack("I", pattern))[0]], dtype=torch.int32).view(torch.float32)[0]


# One query takes the direct path, ten the panel path.
@pytest.fixture(params=[1, 10], ids=["direct", "panel"])
def ones(request, device):
    """Queries [1, M, 4] of ones."""
    return torch.ones(1, request.param, 4, device=device)


def column(values, device, width=4):
    """Items whose score with a query of ones is the value."""
    items = torch.zeros(len(values), width, device=device)
    items[:, 0] = torch.as_tensor(values, device=device)
    return items


@pytest.mark.parametrize("pattern", NANS, ids=hex)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_nan_of_any_sign_and_payload_is_never_returned(machine, device, ones, pattern, reduce):
    items = column([1.0, 2.0, 3.0, 0.0, 5.0], device)
    items[1, 2] = nan_of(pattern)
    items[4, :] = nan_of(pattern)
    result = score_topk(ones, items, 5, reduce=reduce)
    assert ids_of(result) == [[2, 0, 3, -1, -1]]
    assert not result.scores.isnan().any() and (result.scores[0, 3:] == -INF).all()


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_nan_query_voids_its_user_only(machine, device, reduce):
    queries = torch.ones(2, 5, 4, device=device)
    queries[0, 3, 1] = NAN
    result = score_topk(queries, column([1.0, 2.0], device), 2, reduce=reduce)
    assert ids_of(result) == [[-1, -1], [1, 0]]


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_nan_and_infinity_in_a_query_that_does_not_exist_are_not_looked_at(machine, device, reduce):
    items = column([1.0, 2.0, 3.0], device)
    queries = torch.ones(2, 3, 4, device=device)
    exists = torch.tensor([[True, False, True], [True, True, False]], device=device)
    clean = score_topk(queries, items, 3, reduce=reduce, query_mask=exists)
    queries[0, 1] = NAN
    queries[1, 2] = INF
    assert_same_bits(score_topk(queries, items, 3, reduce=reduce, query_mask=exists), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_bias_voids_its_row(machine, device, ones, dtype):
    bias = torch.tensor([0.0, NAN, -NAN, 0.5], device=device, dtype=dtype)
    assert ids_of(score_topk(ones, column([1.0, 9.0, 9.0, 1.0], device), 4, bias=bias)) == [[3, 0, -1, -1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_catalogue_of_nan_gives_pads(machine, device, ones, dtype, reduce):
    result = score_topk(ones, torch.full((40, 4), NAN, dtype=dtype, device=device), 7, reduce=reduce)
    assert ids_of(result) == [[-1] * 7] and (result.scores == -INF).all()


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_infinities_are_scores_and_minus_infinity_comes_after_all_finite_ones(machine, device, ones, reduce):
    items = column([-INF, 1.0, INF, -3e37, -INF, INF], device)
    result = score_topk(ones[..., :1], items[:, :1], 8, reduce=reduce)
    assert ids_of(result) == [[2, 5, 1, 3, 0, 4, -1, -1]]
    assert result.scores[0, [0, 1, 4, 5, 6, 7]].tolist() == [INF, INF, -INF, -INF, -INF, -INF]


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_infinity_minus_infinity_and_zero_times_infinity_are_nan(machine, device, ones, reduce):
    items = torch.tensor([[INF, -INF, 0, 0], [1, 1, 1, 1], [INF, 0, 0, 0], [-INF, 0, 0, 0]], device=device)
    assert ids_of(score_topk(ones, items, 4, reduce=reduce)) == [[2, 1, 3, -1]]
    zero = torch.zeros_like(ones)
    assert ids_of(score_topk(zero, items, 4, reduce=reduce)) == [[1, -1, -1, -1]]


def test_infinite_bias_orders_rows_and_meets_opposite_infinity_as_nan(machine, device, ones):
    items = column([1.0, 5.0, -INF, INF, 3.0], device)
    bias = torch.tensor([INF, -INF, INF, 0.0, 0.0], device=device)
    assert ids_of(score_topk(ones[..., :1], items[:, :1], 5, bias=bias)) == [[0, 3, 4, 1, -1]]


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_overflow_to_infinity_is_the_result_and_ties_by_row(machine, device, ones, reduce):
    items = column([3e38, 1.0, 3.2e38, -3e38], device)
    result = score_topk(ones * 2, items, 4, reduce=reduce)
    assert ids_of(result) == [[0, 2, 1, 3]]
    assert result.scores[0, 0] == INF and result.scores[0, 3] == -INF


@pytest.mark.parametrize("reduce", ["max", "sum", "mean"])
def test_a_returned_zero_is_plus_zero(machine, device, ones, reduce):
    items = torch.zeros(50, 4, device=device)
    items[::2] = -0.0
    for bias in (None, torch.full((50,), -0.0, device=device)):
        for query in (ones, -ones, -0.0 * ones):
            result = score_topk(query, items, 50, reduce=reduce, bias=bias)
            assert ids_of(result) == [list(range(50))]
            assert not torch.signbit(result.scores).any()


def test_a_product_that_underflows_to_minus_zero_ties_with_plus_zero(machine, device, ones):
    items = column([-1e-40, 0.0, 1e-40, -1e-40], device)
    result = score_topk(ones * 1e-20, items, 4)
    assert ids_of(result) == [[0, 1, 2, 3]] and not torch.signbit(result.scores).any()


@pytest.mark.parametrize("count", [1, 11])
def test_all_equal_gives_the_lowest_rows(machine, device, count):
    # Across tiles of 16 and 32 rows, chunks of up to 4096, and threads.
    items = torch.ones(9000, 4, device=device)
    for k in (1, 16, 17, 100, 5000):
        assert ids_of(score_topk(torch.ones(1, count, 4, device=device), items, k)) == [list(range(k))]


@pytest.mark.parametrize("border", [15, 16, 31, 32, 33, 1024, 4095, 4096, 4097, 8192])
@pytest.mark.parametrize("count", [1, 9])
def test_a_tie_at_the_kth_place_across_a_border_goes_to_the_lower_row(machine, device, border, count):
    values = torch.zeros(8300)
    values[[border - 1, border, border + 1]] = 1.0
    values[[3, 8290]] = 2.0
    queries = torch.ones(1, count, 4, device=device)
    for k in range(1, 7):
        wanted = [3, 8290, border - 1, border, border + 1, 0][:k]
        assert ids_of(score_topk(queries, column(values, device), k)) == [wanted]


@pytest.mark.parametrize("kind", ["sorted", "reversed", "duplicates", "equal", "integer"])
@pytest.mark.parametrize("count", [1, 9])
def test_hard_orders_of_the_catalogue(machine, device, kind, count):
    # r = 4 and integers: float64 and float32 scores are the same numbers, so the oracle decides every tie.
    items = make_items(kind, 6000, 4, 2).mul(8).round().clamp(-50, 50)
    queries = make_queries(kind, 2, count, 4, 2, items).mul(8).round()
    wanted = brute_force_topk(queries, items, 300)
    result = score_topk(queries.to(device), items.to(device), 300)
    assert result.ids.tolist() == wanted.ids.tolist()
    assert torch.equal(result.scores.cpu().double(), wanted.scores)


@pytest.mark.parametrize("count", [1, 9])
def test_strictly_ascending_and_descending_scores(machine, device, count):
    queries = torch.ones(1, count, 4, device=device)
    up = column(torch.arange(9000.0), device)
    assert ids_of(score_topk(queries, up, 700)) == [list(range(8999, 8299, -1))]
    assert ids_of(score_topk(queries, up.flip(0), 700)) == [list(range(700))]


def test_a_zero_query_can_win_and_a_query_that_does_not_exist_cannot(machine, device):
    items = column([-1.0, -2.0, 3.0], device)
    queries = torch.ones(1, 2, 4, device=device)
    queries[0, 1] = 0
    wins = score_topk(queries, items, 3)
    assert ids_of(wins) == [[2, 0, 1]] and wins.scores.tolist() == [[3.0, 0.0, 0.0]]
    masked = score_topk(queries, items, 3, query_mask=torch.tensor([[True, False]], device=device))
    assert ids_of(masked) == [[2, 0, 1]] and masked.scores.tolist() == [[3.0, -1.0, -2.0]]


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_user_without_queries_gets_pads(machine, device, reduce):
    exists = torch.zeros(3, 4, dtype=torch.bool, device=device)
    exists[1, 2] = True
    bias = torch.ones(6, device=device)
    result = score_topk(torch.ones(3, 4, 4, device=device), column(range(6), device), 2, reduce=reduce,
                        query_mask=exists, bias=bias)  # fmt: skip
    assert ids_of(result) == [[-1, -1], [5, 4], [-1, -1]]
    assert result.scores[[0, 2]].eq(-INF).all()


def test_mean_divides_by_the_queries_that_exist(machine, device):
    queries = torch.tensor([[[2.0], [4.0], [100.0]]], device=device)
    exists = torch.tensor([[True, True, False]], device=device)
    result = score_topk(queries, torch.ones(1, 1, device=device), 1, reduce="mean", query_mask=exists)
    assert result.scores.item() == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extremes_of_each_item_type_are_widened_exactly(machine, device, dtype):
    info = torch.finfo(dtype)
    least = torch.tensor([1], dtype=torch.int32 if dtype == torch.float32 else torch.int16).view(dtype).item()
    values = [info.max, info.min, info.tiny, least, -least, 3 * least, 0.0, INF, -INF, NAN]
    items = torch.zeros(len(values), 20, dtype=dtype, device=device)
    for place in (0, 17):  # a full vector and a tail
        items.zero_()
        items[:, place] = torch.tensor(values, dtype=dtype)
        queries = torch.zeros(1, 1, 20, device=device)
        queries[..., place] = 1.0
        wide = items[:, place].double().tolist()
        queries = queries[..., place : place + 1]
        result = score_topk(queries, items[:, place : place + 1], 10)
        order = sorted(range(9), key=lambda i: (-wide[i], i))
        assert ids_of(result) == [[*order, -1]]
        assert result.scores[0, :9].tolist() == [wide[i] for i in order]


@pytest.mark.parametrize("pattern", range(0, 65536, 4096))
def test_every_half_precision_number_is_widened_as_torch_does(machine, device, pattern):
    half = torch.arange(pattern, pattern + 4096, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        items = half.view(dtype)[:, None].to(device)
        wide = items[:, 0].cpu().float()
        result = score_topk(torch.ones(1, device=device), items, 4096)
        found = torch.full((4096,), NAN)
        real = result.ids[0] >= 0
        found[result.ids[0][real].cpu()] = result.scores[0][real].cpu()
        assert torch.equal(found.nan_to_num(nan=0.5), wide.nan_to_num(nan=0.5))


def denormal_data(device):
    """Rows of 1e-40, 1e-20 and 1e18 in turn; users with queries of 1e-40, 1e-20 and 1: denormals in, out, and both."""
    generator = torch.Generator().manual_seed(4)
    items = torch.randn(600, 20, generator=generator) * torch.tensor([1e-40, 1e-20, 1e18]).repeat(200)[:, None]
    queries = torch.randn(3, 6, 20, generator=generator) * torch.tensor([1e-40, 1e-20, 1.0])[:, None, None]
    return queries.to(device), items.to(device)


def flushes():
    return torch.tensor(1e-40).mul(1.0).item() == 0.0


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("bias", [None, 1e-42])
def test_flush_denormal_changes_nothing_and_is_left_as_it_was(machine, device, monkeypatch, reduce, bias):
    queries, items = denormal_data(device)
    monkeypatch.setenv("URM_NUM_THREADS", "3")
    bias = None if bias is None else torch.full((600,), bias, device=device)
    plain = score_topk(queries, items, 600, reduce=reduce, bias=bias)
    if reduce != "logsumexp":  # the data is what it should be
        assert ((plain.scores != 0) & (plain.scores.abs() < 1.1e-38)).sum() > 300
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        for _ in range(2):
            assert flushes()
            flushed = score_topk(queries, items, 600, reduce=reduce, bias=bias)
            assert flushes()
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(flushed, plain)
    assert_same_bits(score_topk(queries, items, 600, reduce=reduce, bias=bias), plain)
    assert not flushes()


def test_flush_denormal_does_not_move_the_winner_that_gets_the_gradient(backend, device):
    # Two denormal dots of one row: 1e-40 and 2e-40. The second query wins.
    queries = torch.tensor([[[1e-20], [2e-20]]], device=device, requires_grad=True)
    items = torch.tensor([[1e-20]], device=device)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        score_topk(queries, items, 1, backend=backend).scores.mul(1e20).sum().backward()
    finally:
        torch.set_flush_denormal(False)
    assert queries.grad.flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_workers_started_while_denormals_were_flushed_do_not_flush(backend):
    run_python(f"""
        import torch
        from urm_kernels import score_topk
        torch.set_num_threads(4)
        generator = torch.Generator().manual_seed(0)
        items = torch.rand(30000, 16, generator=generator) * 1e-20
        queries = torch.rand(1, 1, 16, generator=generator) * 1e-20
        torch.set_flush_denormal(True)
        torch.ones(1 << 22).mul_(2).sin_()  # torch's workers start in here
        score_topk(queries, items, 3, backend="cpu")  # and ours
        torch.set_flush_denormal(False)
        result = score_topk(queries, items, 500, backend="{backend}")
        truth = queries[0].double() @ items.double().T
        wanted = truth[0, result.ids[0]]
        assert (result.scores[0] > 0).all(), result.scores
        assert ((result.scores[0].double() - wanted).abs() <= 20 * 2.0 ** -149).all()
    """)


def test_poisoned_memory_changes_nothing(machine, device, monkeypatch):
    items, queries = make_items("integer", 500, 31, 7).to(device), make_items("integer", 20, 31, 8).to(device)
    exclude = torch.arange(20, device=device)[:, None]
    options = [{"reduce": reduce, "exclude": exclude} for reduce in REDUCTIONS]
    clean = [score_topk(queries.view(4, 5, 31), items, 600, **{**o, "exclude": exclude[:4]}) for o in options]
    empty = torch.empty

    def poisoned(*size, **settings):
        out = empty(*size, **settings)
        return out.fill_(NAN if out.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
    for wanted, o in zip(clean, options, strict=True):
        assert_same_bits(score_topk(queries.view(4, 5, 31), items, 600, **{**o, "exclude": exclude[:4]}), wanted)


def test_filled_uninitialised_memory_changes_nothing():
    # malloc's own perturbation reaches the buffers of the C++ code too.
    code = """
        import torch
        from urm_kernels import score_topk
        generator = torch.Generator().manual_seed(0)
        torch.use_deterministic_algorithms({deterministic})
        torch.utils.deterministic.fill_uninitialized_memory = True
        for count in (1, 3, 12):
            for reduce in ("max", "sum", "mean", "logsumexp"):
                q = torch.randn(3, count, 21, generator=generator).requires_grad_()
                v = torch.randn(77, 21, generator=generator).bfloat16().requires_grad_()
                b = torch.randn(77, generator=generator)
                result = score_topk(q, v, 80, reduce=reduce, bias=b, query_mask=torch.arange(3 * count).view(3, -1) > 1)
                result.scores[:, :5].sum().backward()
                for part in (result.scores, q.grad, v.grad):
                    print(reduce, result.ids.sum().item(), part.detach().double().nan_to_num(neginf=-7).sum().item())
    """
    plain = run_python(code.format(deterministic=False))
    assert plain == run_python(code.format(deterministic=True), MALLOC_PERTURB_="165")


def test_the_first_call_equals_the_second(machine, device):
    items, queries = make_items("decay", 400, 24, 1).to(device), torch.randn(2, 9, 24, device=device)
    first = score_topk(queries, items, 50)
    kept = type(first)(*(part.clone() for part in first))
    second = score_topk(queries, items, 50)
    assert_same_bits(second, kept)
    assert_same_bits(first, kept)  # a later call does not write into an earlier result
    assert_same_bits(first, by_reference(queries, items, 50))
    assert torch.equal(bits(first.scores), bits(second.scores))
