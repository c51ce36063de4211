"""log_partition on Triton where a user has many queries: which may win is bounded first. Bits are the reference's."""

import os
from pathlib import Path

import pytest
import torch
from support import INF, NAN, bits, run_python

from urm_kernels import ItemTable, log_partition, score_topk
from urm_kernels.backends.triton.plan import BOUNDED_QUERIES
from urm_kernels.testing import make_items, make_queries

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="neither a CUDA device nor Triton's interpreter (TRITON_INTERPRET=1)",
)


def partition(queries, items, backend, device, scale=None, **options):
    """(result, gradient of the queries), on the CPU. The reference runs there."""
    place = device if backend == "triton" else torch.device("cpu")
    leaf = queries.to(place, copy=True).requires_grad_()
    table = ItemTable(items.to(place), row_scale=None if scale is None else scale.to(place))
    there = {name: value.to(place) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    result = log_partition(leaf, table, backend=backend, **there)
    (gradient,) = torch.autograd.grad(result.sum(), leaf)
    return result.detach().cpu(), gradient.cpu()


def assert_same(queries, items, device, **options):
    ours, wanted = (partition(queries, items, backend, device, **options) for backend in ("triton", "reference"))
    assert torch.equal(bits(ours[0]), bits(wanted[0])), (ours[0], wanted[0])
    torch.testing.assert_close(ours[1], wanted[1], rtol=1e-5, atol=1e-6)
    return ours


@pytest.mark.parametrize(
    ("kind", "users", "count", "rows", "r", "dtype", "scaled"),
    [
        ("iid", 2, BOUNDED_QUERIES, 300, 16, torch.float32, False),
        ("decay", 1, 128, 200, 32, torch.bfloat16, False),
        ("norms", 1, 200, 150, 19, torch.float16, True),
        ("iid", 3, 33, 70, 300, torch.bfloat16, True),
        ("sparse", 1, 40, 256, 12, torch.float8_e4m3fn, True),
        ("duplicates", 2, 17, 90, 8, torch.float32, False),
    ],
)
def test_many_queries(device, kind, users, count, rows, r, dtype, scaled):
    items = make_items(kind, rows, r, 1)
    queries = make_queries(kind, users, count, r, 1, items) * 0.3
    options = {
        "mask": torch.rand(users, rows) < 0.7, "exclude": torch.randint(-1, rows, (users, 5)), "temperature": 1.7,
        "query_mask": torch.rand(users, count) < 0.8,
    }  # fmt: skip
    queries[~options["query_mask"]] = NAN
    scale = torch.randn(rows) if scaled else None
    assert_same(queries, items.to(dtype), device, scale=scale, **options)


def test_rows_and_queries_of_every_size(device):
    items, queries = torch.randn(40, 8), torch.randn(3, 20, 8)
    items[1], items[2, 0], items[3, 0], items[4] = 0, -INF, NAN, 1e-40
    items[5, :2] = torch.tensor([3e38, -3e38])
    queries[0, 4], queries[1] = 0, queries[1] * 1e-30
    allowed = torch.ones(40, dtype=torch.bool)
    allowed[[2, 5]] = False  # infinite scores make everything infinite
    assert_same(queries, items, device, mask=allowed)
    result = log_partition(queries.to(device), items.to(device), backend="triton")
    wanted = log_partition(queries, items, backend="reference")
    assert torch.equal(bits(result), bits(wanted)) and result.tolist()[1:] == [INF, INF]
    queries[2, 7] = NAN
    result = log_partition(queries.to(device), items.to(device), backend="triton")
    assert result[2] == -INF  # no score of this user is a number


@pytest.mark.parametrize("size", [0.0, -0.0, INF, -INF, NAN, -1e38, 1e-44])
def test_scales_of_every_size(device, size):
    items, queries = torch.randn(30, 8), torch.randn(1, 20, 8)
    items[7] = 0.0  # infinite times zero
    scale = torch.ones(30)
    scale[[3, 7]] = size
    results = [
        log_partition(queries.to(place), ItemTable(items.to(place), row_scale=scale.to(place)), backend=backend)
        for place, backend in ((device, "triton"), ("cpu", "reference"))
    ]
    assert torch.equal(bits(results[0]), bits(results[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_winner_is_found_where_every_rounding_is_against_it(device, dtype):
    # All elements of the best query are rounded down, all of the others up, by nearly half a unit each.
    r, bits_kept = 16, {torch.bfloat16: 8, torch.float16: 11, torch.float32: 11}[dtype]
    half = 2.0**-bits_kept
    queries = torch.full((1, 20, r), 1 + half * 1.01)
    queries[0, :, 0] -= 0.5 * half
    queries[0, 13] = 1 + half * 0.99
    items = torch.ones(3, r, dtype=dtype)
    dots = (queries.double() @ items.double().T)[0, :, 0]
    cheap = (queries.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16).double() @ items.double().T)[
        0, :, 0
    ]
    assert dots.argmax() == 13 and cheap[13] < cheap[12] - 0.9 * r * half
    _, gradient = assert_same(queries, items, device)
    assert gradient.abs().sum(2).nonzero().tolist() == [[0, 13]]


def test_the_lowest_of_equal_queries_gets_the_gradient(device):
    queries = torch.randn(2, 50, 8)
    queries[:, 30:] = queries[:, :20]
    exists = torch.ones(2, 50, dtype=torch.bool)
    exists[1, :20] = False
    _, gradient = assert_same(queries, torch.randn(60, 8), device, query_mask=exists)
    assert (gradient[0, 30:] == 0).all() and (gradient[1, :20] == 0).all() and (gradient[1, 30:] != 0).any()


@pytest.mark.parametrize("scale", [1e-31, -1e-31, 3e-38, 1e-42])
def test_scaled_dots_that_vanish_tie(device, scale):
    queries = torch.full((1, 20, 4), 1e-28) * torch.linspace(1, 2, 20)[None, :, None]
    queries[0, 3] *= -1
    found = []
    for backend in ("triton", "reference"):
        place = device if backend == "triton" else torch.device("cpu")
        leaf = queries.to(place, copy=True).requires_grad_()
        table = ItemTable(torch.full((3, 4), 1e12, device=place), row_scale=torch.full((3,), scale, device=place))
        (gradient,) = torch.autograd.grad(log_partition(leaf, table, backend=backend).sum(), leaf)
        found.append(gradient[0, :, 0].nonzero().flatten().tolist())
    assert found[0] == found[1] and found[0]


def test_one_query_needs_no_logarithm(device):
    queries, items = torch.randn(3, 1, 8), torch.randn(200, 8)
    items[3], items[4, 0] = -INF, NAN
    exists = torch.tensor([[True], [False], [True]])
    for function in (log_partition, lambda *given, **options: score_topk(*given, 200, **options).scores):
        ours = function(
            queries.to(device), items.to(device), reduce="logsumexp", query_mask=exists.to(device), backend="triton"
        )
        wanted = function(queries, items, reduce="logsumexp", query_mask=exists, backend="reference")
        assert torch.equal(bits(ours), bits(wanted))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a page of the CPU's memory is guarded")
def test_nothing_behind_the_excluded_rows_is_read():
    # Five users in a block of eight or more; the rows that they exclude end where memory may not be touched.
    code = f"""
        import ctypes, mmap, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import triton_interpreter, torch
        from urm_kernels import log_partition
        from urm_kernels.backends.triton import partition

        users, width, rows, guard = 5, 4096, 300, 64 * 8 * mmap.PAGESIZE
        size = users * width * 8
        memory = mmap.mmap(-1, size + guard)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert size % mmap.PAGESIZE == 0
        libc = ctypes.CDLL(None)
        assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(guard), 0) == 0
        held = torch.frombuffer((ctypes.c_char * size).from_address(start), dtype=torch.int64).view(users, width)
        calls = partition.calls

        def guarded(*arguments):
            for part, call in calls(*arguments):
                held.copy_(call.exclude)
                yield part, call._replace(exclude=held)

        partition.calls = guarded
        excluded = torch.randint(0, rows // 2, (users, width))
        result = log_partition(torch.randn(users, 1, 8), torch.randn(rows, 8), exclude=excluded, backend="triton")
        print(bool(result.isfinite().all()))
    """
    assert run_python(code, TRITON_INTERPRET="1", PYTHONWARNINGS="ignore") == "True\n"
