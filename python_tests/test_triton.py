"""The Triton backend against the reference, bit for bit: on a CUDA device, or (few, slow) in Triton's interpreter.

Most tables here are just large enough to be scanned behind a guessed threshold instead of scored row by row.
"""

import copy
import os

import pytest
import torch
from support import INF, NAN, assert_same_bits, by_reference, ids_of, packed

from urm_kernels import ItemTable, score_topk
from urm_kernels.backends import select
from urm_kernels.backends.table_view import TableView
from urm_kernels.testing import make_items, make_queries

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="neither a CUDA device nor Triton's interpreter (TRITON_INTERPRET=1)",
)

if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    import triton
    import triton.language as tl

    from urm_kernels.backends.triton.radix import BINS, PASSES, _prefix

    @triton.jit
    def first_digit(histograms, out):
        tl.store(out + tl.arange(0, 1), _prefix(histograms, tl.zeros([], tl.int64) + 10, 1) + tl.zeros([1], tl.int64))


ROWS = 8300  # above plan.DENSE_ROWS


def data(device, kind="decay", users=2, count=3, rows=ROWS, r=16, dtype=torch.float32):
    items = make_items(kind, rows, r, 1)
    return make_queries(kind, users, count, r, 1, items).to(device), items.to(device, dtype)


def assert_equals_reference(queries, items, k, **options):
    result = score_topk(queries, items, k, backend="triton", **options)
    there = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    assert_same_bits(result, by_reference(queries.cpu(), copy.deepcopy(items).cpu(), k, **there))
    return result


# Every value of every column beside every value of the others, as far as so few rows go.
@pytest.mark.parametrize(
    ("dtype", "reduce", "users", "count", "r", "mask", "bias", "exclude"),
    [
        (torch.float32, "max", 1, 1, 16, None, False, False),
        (torch.bfloat16, "max", 1, 8, 32, "shared", True, False),
        (torch.float16, "max", 2, 3, 19, "own", False, True),
        (torch.float32, "logsumexp", 2, 3, 16, "own bits", True, True),
        (torch.bfloat16, "logsumexp", 1, 20, 8, None, False, True),
        (torch.float16, "logsumexp", 1, 2, 16, "shared bits", False, False),
        (torch.float32, "sum", 3, 5, 20, "shared bits", False, True),
        (torch.bfloat16, "mean", 3, 2, 16, None, True, False),
        (torch.float16, "sum", 1, 1, 1, "own", True, False),
        (torch.float32, "mean", 2, 9, 33, "shared", False, False),
        (torch.bfloat16, "max", 17, 1, 16, None, True, True),
        (torch.float32, "max", 18, 7, 16, "shared", False, False),
    ],
)
def test_options_beside_each_other(device, dtype, reduce, users, count, r, mask, bias, exclude):
    queries, items = data(device, users=users, count=count, r=r, dtype=dtype)
    options = {"reduce": reduce}
    if mask:
        allowed = torch.rand((users, ROWS) if "own" in mask else (ROWS,)) < 0.5
        options["mask"] = (packed(allowed) if "bits" in mask else allowed).to(device)
    if bias:
        options["bias"] = torch.randn(ROWS, device=device)
    if exclude:
        seen = by_reference(queries.cpu(), items.cpu(), 12, reduce=reduce).ids
        seen[:, 3] = -1
        options["exclude"] = seen.to(device)
    assert_equals_reference(queries, items, 10, **options)


def test_a_user_of_more_queries_than_a_block_of_columns(device):
    assert_equals_reference(*data(device, users=1, count=150), 5)


def test_more_columns_than_a_block(device):
    assert_equals_reference(*data(device, users=129, count=1, r=8), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_wider_than_a_block(device, dtype):
    assert_equals_reference(*data(device, users=1, count=2, r=300, dtype=dtype), 5)


def test_queries_that_do_not_exist(device):
    queries, items = data(device, users=4, count=3)
    exists = torch.tensor([[True, False, True], [False, True, False], [False, False, False], [True, True, True]])
    queries[0, 1], queries[2] = INF, NAN
    result = assert_equals_reference(queries, items, 6, query_mask=exists.to(device))
    assert ids_of(result)[2] == [-1] * 6


@pytest.mark.parametrize("layout", ["transposed", "every third row", "every second column"])
def test_strided_tables(device, layout):
    queries, items = data(device, r=12)
    strided = {
        "transposed": lambda x: x.T.contiguous().T,
        "every third row": lambda x: x.repeat_interleave(3, 0)[::3],
        "every second column": lambda x: torch.stack([x, -x], -1)[..., 0],
    }[layout](items)
    assert strided.stride() != items.stride()
    assert_equals_reference(queries, strided, 10)


@pytest.mark.parametrize("kind", ["sorted", "reversed", "norms", "giant", "integer", "duplicates"])
def test_hard_catalogues(device, kind):
    assert_equals_reference(*data(device, kind, dtype=torch.bfloat16 if kind == "norms" else torch.float32), 20)


def test_extremes_are_never_pruned(device):
    queries, items = data(device)
    items[5], items[7, 0], items[8, 0] = NAN, INF, -INF
    items[9, :2] = torch.tensor([3e38, -3e38])
    items[10] = 1e-40
    assert_equals_reference(queries, items, 20)


@pytest.mark.parametrize("scaled_rows", [False, True])
def test_the_slack_of_denormal_queries_is_no_slack(device, scaled_rows):
    # 257 and 512 units of the smallest number: rounding costs 1.4 units, which as a float32 is one.
    unit, large = 2.0**-149, 2.0**40
    queries = torch.tensor([[[257 * unit, 257 * unit, -512 * unit]]], device=device)
    items = torch.zeros(ROWS, 3, device=device)
    items[:, 2], items[100:900, 2], items[4001] = 256, -1.875 / 2, 256
    if scaled_rows:
        table = scaled(items.to(torch.float8_e4m3fn), torch.full((ROWS,), large))
    else:
        table = (items * (large / 256)).bfloat16()
    assert ids_of(assert_equals_reference(queries, table, 5))[0][0] == 4001


@pytest.mark.parametrize("size", [1e-30, 1e-44, 3e37])
def test_queries_of_any_size(device, size):
    queries, items = data(device, users=1, count=1, r=8)
    assert_equals_reference(queries * size, items, 5)


def test_zero_queries_and_denormal_rows(device):
    queries, items = data(device, users=2, count=1, r=8)
    queries[0] = 0
    assert_equals_reference(queries, items * 1e-38, 5)


def test_what_overflows_the_list_of_survivors_is_selected_all_the_same(device):
    # Every row ties with every other: nothing can be pruned, and the lowest rows win.
    queries, items = torch.ones(2, 1, 4, device=device), torch.ones(ROWS, 4, device=device)
    queries[1] = -1
    result = score_topk(queries, items, 7, backend="triton")
    assert ids_of(result) == [list(range(7))] * 2 and result.scores.tolist() == [[4.0] * 7, [-4.0] * 7]


def test_a_guess_that_is_too_high_is_found_out(device):
    # The sample sees only the rows that score high: every other row would be missing.
    rows, k = ROWS, 40
    items = torch.zeros(rows, 4)
    step = make_step(rows, k)
    items[::step, 0] = 5.0
    items[1::step, 0] = 4.0
    allowed = torch.zeros(rows, dtype=torch.bool)
    allowed[: 20 * step : step] = True
    allowed[1 : 30 * step : step] = True
    queries = torch.ones(1, 1, 4)
    assert_equals_reference(queries.to(device), items.to(device), k, mask=allowed.to(device))


def make_step(rows, k):
    from urm_kernels.backends.triton.plan import make_plan

    plan = make_plan(1, rows, k)
    assert not plan.dense and plan.step > 1
    return plan.step


@pytest.mark.parametrize("count", [2**31 - 1, 2**31, 3 * 10**9])
def test_digits_that_two_billion_rows_share_are_counted_without_a_sign(device, count):
    histograms = torch.zeros(PASSES.value * BINS.value, dtype=torch.int64)
    histograms[1500], histograms[100] = count, 50
    out = torch.zeros(1, dtype=torch.int64, device=device)
    first_digit[(1,)](histograms.to(torch.int32).to(device), out)
    assert out.item() == 1500 - BINS.value // 2


def test_fewer_allowed_than_wanted(device):
    queries, items = data(device)
    allowed = torch.zeros(ROWS, dtype=torch.bool, device=device)
    allowed[::1500] = True
    result = assert_equals_reference(queries, items, 10, mask=allowed)
    assert (result.ids >= 0).sum(1).tolist() == [6, 6]


@pytest.mark.parametrize("reduce", ["max", "logsumexp"])
def test_small_tables_are_scored_row_by_row(device, reduce):
    queries, items = data(device, rows=300, r=19)
    assert_equals_reference(queries, items, 310, reduce=reduce, bias=torch.randn(300, device=device))


SCALES = (1.0, -1.0, 3.7, 1e-30, -1e-30, 1e30, -1e20, 0.0, -0.0, 1e-44, 2.0**100, INF, -INF, NAN)


@pytest.mark.parametrize("reduce", ["max", "logsumexp", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_rows_with_scales_of_every_size_and_sign(device, reduce, dtype):
    queries, items = data(device, "norms", users=3, count=2, r=20)
    items = (items / items.abs().amax() * 300).to(dtype)
    scale = torch.exp(torch.randn(ROWS)) * torch.where(torch.rand(ROWS) < 0.3, -1.0, 1.0)
    assert_equals_reference(queries, scaled(items, scale), 15, reduce=reduce)
    # Few of the extremes, or what is infinite would take every place.
    rows = torch.randperm(ROWS)[: 2 * len(SCALES)]
    scale[rows] = torch.tensor(SCALES * 2)
    found = assert_equals_reference(queries, scaled(items, scale), 40, reduce=reduce)
    assert (found.scores == INF).any() and not found.scores.isnan().any()


def scaled(items, scale):
    return ItemTable(items, row_scale=scale.to(items.device))


def test_many_users_of_scaled_rows(device):
    queries, items = data(device, users=40, count=1, r=8, dtype=torch.bfloat16)
    scale = torch.exp(torch.randn(ROWS)) * torch.where(torch.rand(ROWS) < 0.5, -1.0, 1.0)
    assert_equals_reference(queries, scaled(items, scale), 5)


@pytest.mark.parametrize(("users", "count"), [(40, 1), (18, 2)])
def test_many_users_with_masks_of_their_own(device, users, count):
    queries, items = data(device, users=users, count=count, r=8, dtype=torch.bfloat16)
    assert_equals_reference(queries, items, 5, mask=packed(torch.rand(users, ROWS) < 0.3).to(device))


def test_scaled_dots_that_overflow_or_vanish(device):
    # Beside scores near the largest float32, and near the smallest.
    queries, items = data(device, users=1, count=2, r=8)
    for size in (3e37, 1e-44):
        assert_equals_reference(queries, scaled(items, torch.rand(ROWS) * size), 9)


def test_float8_rows_wider_than_a_block(device):
    queries, items = data(device, users=1, count=3, r=600)
    assert_equals_reference(queries, scaled(items.to(torch.float8_e4m3fn), torch.rand(ROWS)), 5)


def test_every_float8_value(device):
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    items = torch.stack([values.float(), torch.ones(256)], 1).to(torch.float8_e4m3fn).view(torch.uint8)
    items = items.repeat(ROWS // 256 + 1, 1).view(torch.float8_e4m3fn).to(device)
    queries = torch.tensor([[[1.0, 0.5]], [[-3.0, 0.0]]], device=device)
    assert_equals_reference(queries, ItemTable(items), 600)


@pytest.mark.parametrize("rows", [300, ROWS])
def test_what_a_scan_did(device, rows):
    queries, items = data(device, users=3, count=2, r=16, rows=rows, dtype=torch.bfloat16)
    found, stats = score_topk(queries, items, 10, return_stats=True, backend="triton")
    assert_same_bits(found, by_reference(queries.cpu(), items.cpu(), 10))
    assert stats.proven.tolist() == [True] * 3
    pairs = int(stats.survivors[1])
    assert 30 <= pairs <= 3 * rows and (pairs == 3 * rows) == (rows == 300)
    assert int(stats.survivors[0]) == 0
    assert 32 * rows * (1 if rows == ROWS else 3) <= int(stats.bytes_read) <= 32 * (2 * rows + pairs)


def test_what_the_second_way_did_is_counted(device):
    # Every row ties: more survive than there is room for, and each of seven passes scores all of them.
    queries, items = torch.ones(1, 1, 4, device=device), torch.ones(ROWS, 4, device=device)
    _, stats = score_topk(queries, items, 7, return_stats=True, backend="triton")
    assert int(stats.survivors[1]) > 7 * ROWS and int(stats.bytes_read) > 16 * 7 * ROWS


def test_gradients(device):
    queries, items = data(device, rows=100, r=6)
    grads = []
    for backend in ("triton", "reference"):
        given = queries.clone().requires_grad_(), items.clone().requires_grad_()
        score_topk(*given, 5, reduce="logsumexp", backend=backend).scores.sum().backward()
        grads.append([tensor.grad for tensor in given])
    for ours, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_it_is_chosen_for_cuda_tensors_and_only_for_them(device):
    queries, items = data(device, rows=10)
    chosen = select.choose("score_topk", queries, TableView(items), "").__name__.rpartition(".")[2]
    assert chosen == ("triton" if device.type == "cuda" else "cpu")
    assert select.choose("score_topk", queries.double(), TableView(items), "").__name__.endswith("reference")
