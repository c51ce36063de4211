"""Sizes at their edges, layouts of every kind, offsets past 2^31."""

import pytest
import torch
from support import HALVES, INF, REDUCTIONS, assert_same_bits, by_reference, ids_of, packed

from urm_kernels import score_topk
from urm_kernels.testing import make_items, make_queries


def data(users=2, count=3, rows=50, r=19, dtype=torch.float32, device="cpu"):
    items = make_items("iid", rows, r, 1)
    return make_queries("iid", users, count, r, 1, items).to(device), items.to(device, dtype)


@pytest.mark.parametrize("rank", [2, 1])
def test_missing_dimensions_of_queries_are_one_query_and_one_user(machine, device, rank):
    queries, items = data(2 if rank == 2 else 1, 1, device=device)
    short = queries[:, 0] if rank == 2 else queries[0, 0]
    assert_same_bits(score_topk(short, items, 5), score_topk(queries, items, 5))


@pytest.mark.parametrize("k", [0, 1, 49, 50, 51, 1000])
@pytest.mark.parametrize("count", [1, 9])
def test_any_k(machine, device, k, count):
    queries, items = data(2, count, device=device)
    result = score_topk(queries, items, k)
    assert result.scores.shape == result.ids.shape == (2, k)
    assert result.scores.dtype == torch.float32 and result.ids.dtype == torch.int64
    whole = by_reference(queries, items, 50)
    real = min(k, 50)
    assert_same_bits(type(result)(result.scores[:, :real], result.ids[:, :real]),
                     type(whole)(whole.scores[:, :real], whole.ids[:, :real]))  # fmt: skip
    assert (result.ids[:, real:] == -1).all() and (result.scores[:, real:] == -INF).all()


@pytest.mark.parametrize("users", [0, 2])
@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("r", [0, 1, 4])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_empty_sizes(machine, device, users, count, rows, r, reduce):
    queries, items = torch.ones(users, count, r, device=device), torch.ones(rows, r, device=device)
    result = score_topk(queries, items, 3, reduce=reduce)
    real = min(rows, 3) if count else 0
    assert ids_of(result) == [list(range(real)) + [-1] * (3 - real)] * users
    masks = {
        "bias": torch.zeros(rows, device=device),
        "mask": torch.ones(users, rows, dtype=torch.bool, device=device),
        "exclude": torch.full((users, 0), -1, device=device),
        "query_mask": torch.ones(users, count, dtype=torch.bool, device=device),
    }
    assert_same_bits(score_topk(queries, items, 3, reduce=reduce, **masks), result)


def test_one_survivor_and_none(machine, device):
    queries, items = data(2, 1, 5000, 4, device=device)
    for survivor in (0, 15, 16, 4095, 4096, 4999):
        mask = torch.zeros(5000, dtype=torch.bool)
        mask[survivor] = True
        for given in (mask, packed(mask), mask.expand(2, -1), packed(mask).expand(2, -1)):
            assert ids_of(score_topk(queries, items, 3, mask=given.to(device))) == [[survivor, -1, -1]] * 2
    for nothing in (torch.zeros(5000, dtype=torch.bool), torch.zeros(625, dtype=torch.uint8)):
        result = score_topk(queries, items, 3, mask=nothing.to(device))
        assert ids_of(result) == [[-1] * 3] * 2 and (result.scores == -INF).all()


def test_more_wanted_than_allowed(machine, device):
    queries, items = data(3, 2, 40, device=device)
    mask = (torch.arange(40) % 4 == 0).to(device)
    exclude = torch.tensor([[0, 4, 4, -1], [8, 8, 8, 8], [-1, -1, -1, -1]], device=device)
    result = score_topk(queries, items, 20, mask=mask, exclude=exclude)
    assert (result.ids >= 0).sum(1).tolist() == [8, 9, 10]
    assert_same_bits(result, by_reference(queries.cpu(), items.cpu(), 20, mask=mask.cpu(), exclude=exclude.cpu()))


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 63, 64, 65])
def test_a_bitset_is_lowest_bit_first_and_its_spare_bits_do_not_matter(machine, device, rows):
    queries, items = data(2, 1, rows, 3, device=device)
    mask = torch.rand(2, rows) < 0.5
    bitset = packed(mask)
    spare = bitset.clone()
    spare[:, -1] |= (0xFF << (rows % 8 or 8)) & 0xFF
    wanted = score_topk(queries, items, rows, mask=mask.to(device))
    for given in (bitset, spare):
        assert_same_bits(score_topk(queries, items, rows, mask=given.to(device)), wanted)


def test_exclude_takes_duplicates_pads_and_any_order(machine, device):
    queries, items = data(2, 1, 30, device=device)
    lists = torch.tensor([[29, -1, 0, 29, 5, -1], [-1, -1, -1, -1, -1, -1]], device=device)
    allowed = torch.ones(2, 30, dtype=torch.bool, device=device)
    allowed[0, [29, 0, 5]] = False
    wanted = score_topk(queries, items, 30, mask=allowed)
    assert_same_bits(score_topk(queries, items, 30, exclude=lists), wanted)
    reordered = lists[:, [3, 5, 4, 0, 2, 1]]
    assert_same_bits(score_topk(queries, items, 30, exclude=reordered), wanted)
    transposed = lists.T.contiguous().T
    assert_same_bits(score_topk(queries, items, 30, exclude=transposed), wanted)
    assert lists[0].tolist() == [29, -1, 0, 29, 5, -1]  # left as it was
    everything = torch.arange(30, device=device).expand(2, 30)
    assert (score_topk(queries, items, 4, exclude=everything).ids == -1).all()


LAYOUTS = {
    "rows sliced": lambda x: x.repeat_interleave(3, 0)[::3],
    "columns sliced": lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],
    "columns strided": lambda x: torch.stack([x, -x], -1)[..., 0],
    "transposed": lambda x: x.T.contiguous().T,
    "both strided": lambda x: torch.stack([x, -x], -1).repeat(1, 2, 1)[:, : x.shape[1], 0],
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("r", [16, 19])
@pytest.mark.parametrize("count", [1, 10])
def test_items_of_any_layout(machine, device, dtype, layout, r, count):
    queries, items = data(1, count, r=r, dtype=dtype, device=device)
    other = LAYOUTS[layout](items)
    assert torch.equal(other, items) and other.stride() != items.stride()
    assert_same_bits(score_topk(queries, other, 20), score_topk(queries, items, 20))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("offset", range(1, 8))
def test_storage_offsets(machine, device, dtype, offset):
    queries, items = data(2, 3, r=16, dtype=dtype, device=device)
    wanted = score_topk(queries, items, 20)
    moved = [torch.cat([x.new_full((offset,), 9.0), x.flatten()])[offset:].view(x.shape) for x in (queries, items)]
    assert moved[1].storage_offset() == offset
    assert_same_bits(score_topk(moved[0], moved[1], 20), wanted)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("count", [1, 10])
def test_stride_zero(machine, device, dtype, count):
    queries, items = data(1, count, r=16, dtype=dtype, device=device)
    result = score_topk(queries, items[:1].expand(500, 16), 4)
    assert ids_of(result) == [[0, 1, 2, 3]] and (result.scores == result.scores[0, 0]).all()
    narrow = items[:, :1].expand(50, 16)
    assert_same_bits(score_topk(queries, narrow, 9), score_topk(queries, narrow.contiguous(), 9))
    wide = queries[:, :1].expand(4, 12, 16)
    assert_same_bits(score_topk(wide, items, 9), score_topk(wide.contiguous(), items, 9))


def test_strided_queries_bias_and_masks(machine, device):
    queries, items = data(4, 6, device=device)
    bias = torch.randn(50, device=device)
    exists = torch.rand(4, 6, device=device) < 0.6
    mask = torch.rand(4, 50, device=device) < 0.6
    plain = score_topk(queries, items, 20, bias=bias, query_mask=exists, mask=mask)
    pairs = {
        "bias": torch.stack([bias, -bias], 1)[:, 0],
        "query_mask": exists.T.contiguous().T,
        "mask": mask.T.contiguous().T,
    }
    turned = queries.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert turned.stride() != queries.stride()
    assert_same_bits(score_topk(turned, items, 20, **pairs), plain)
    assert_same_bits(score_topk(queries, items, 20, bias=bias, query_mask=exists, mask=packed(mask.cpu()).to(device)
                                .T.contiguous().T), plain)  # fmt: skip
    flat = bias[:1].expand(50)
    assert_same_bits(score_topk(queries, items, 20, bias=flat), score_topk(queries, items, 20, bias=flat.contiguous()))


def test_views_that_torch_resolves_lazily(machine, device):
    queries, items = data(device=device)
    assert_same_bits(score_topk(queries, torch._neg_view(items), 9), score_topk(queries, -items, 9))
    assert_same_bits(score_topk(torch._neg_view(queries), items, 9), score_topk(-queries, items, 9))
    zeros = torch._efficientzerotensor((50, 19), device=device)
    assert ids_of(score_topk(queries, zeros, 3)) == [[0, 1, 2]] * 2


def test_more_users_than_65535(machine, device):
    if machine[0] == "cuda" and device.type == "cpu":
        pytest.skip("minutes on fibers, for groups of 256 users as in every other test")
    users = 65_537 + 40
    queries = (torch.arange(users, device=device) % 7 - 3).float()[:, None]
    items = torch.tensor([[-1.0], [0.0], [1.0]], device=device)
    result = score_topk(queries, items, 1)
    wanted = torch.where(queries[:, 0] < 0, 0, torch.where(queries[:, 0] > 0, 2, 0)).tolist()
    assert result.ids[:, 0].tolist() == wanted
    assert torch.equal(result.scores, queries.abs())


@pytest.fixture
def huge_file(tmp_path, device):
    """A float32 tensor of 2^32 + 2^20 zeros in a sparse file: 16 GiB of addresses, no memory."""
    if device.type == "cuda":
        pytest.skip("the file is the CPU's; test_cuda.py has tables of that size")
    count = 2**32 + 2**20
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(4 * count)
    return torch.from_file(str(path), shared=True, size=count)


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("columns", [False, True], ids=["rows far apart", "columns far apart"])
def test_offsets_past_two_to_the_32(machine, huge_file, count, columns):
    # 33 rows (or 33 columns) 2^27 elements apart; offsets pass 2^31 and 2^32 elements, 2^34 bytes.
    far, near = 2**27, 1
    shape, strides = ((40, 33), (near, far)) if columns else ((33, 40), (far, near))
    items = torch.as_strided(huge_file, shape, strides)
    items[-1, -1], items[16, 16], items[-1, 0], items[0, 0] = 5.0, 3.0, 4.0, -1.0
    queries = torch.ones(1, count, shape[1])
    rows = shape[0]
    result = score_topk(queries, items, 3)
    assert ids_of(result) == [[rows - 1, 16, 1]] and result.scores.tolist() == [[9.0, 3.0, 0.0]]
    bias = torch.as_strided(huge_file, (33,), (2**27,), 8)
    bias[32] = 7.0
    assert ids_of(score_topk(queries, torch.zeros(33, shape[1]), 2, bias=bias)) == [[32, 0]]


def test_offsets_past_two_to_the_32_in_gradients(machine, huge_file):
    items = torch.as_strided(huge_file, (33, 4), (2**27, 1))
    items[32] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    queries = torch.ones(1, 1, 4, requires_grad=True)
    score_topk(queries, items, 1, reduce="logsumexp").scores.sum().backward()
    assert queries.grad.tolist() == [[[1.0, 2.0, 3.0, 4.0]]]


def test_masks_past_two_to_the_32_bytes(machine, huge_file):
    mask = torch.as_strided(huge_file.view(torch.bool), (2, 33), (2**33, 2**28))
    mask[1, 32] = True
    queries, items = torch.ones(2, 1, 4), torch.ones(33, 4)
    assert ids_of(score_topk(queries, items, 2, mask=mask)) == [[-1, -1], [32, -1]]


@pytest.mark.real_device
def test_a_table_of_34_million_rows(device):
    # N r > 2^31: any count of elements in 32 bits goes wrong. Rows overlap in a short buffer (addresses far apart are
    # tested above); the last row alone has the sentinel.
    rows, r = 34_000_000, 64
    buffer = torch.zeros(rows + r, device=device)
    buffer[rows + r - 2] = 1.0
    items = torch.as_strided(buffer, (rows, r), (1, 1))
    queries = torch.zeros(1, 1, r, device=device)
    queries[..., -1] = 1.0
    assert ids_of(score_topk(queries, items, 2)) == [[rows - 1, 0]]


@pytest.mark.slow
def test_row_numbers_past_two_to_the_31():
    rows = 2**31 + 21
    items = torch.ones(1, 16).expand(rows, 16)
    mask = torch.zeros(-(-rows // 8), dtype=torch.uint8)
    mask[[-1, 0]] = torch.tensor([16, 1], dtype=torch.uint8)
    assert ids_of(score_topk(torch.ones(16), items, 3, mask=mask)) == [[0, rows - 1, -1]]
