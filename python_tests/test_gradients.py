"""Gradients of the returned scores against finite differences, torch and float64."""

import pytest
import torch
from support import HALVES, INF, NAN, REDUCTIONS

from urm_kernels import ItemTable, score_topk


def leaves(users=3, count=4, rows=30, r=5, d=6, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    return leaf(users, count, d), leaf(d, r), leaf(rows, r), leaf(rows)


def by_torch(queries, items, ids, reduce, bias=None, query_mask=None):
    """Scores of the rows `ids` (no pads) as torch would compute and differentiate them."""
    dots = torch.einsum("bmr,bkr->bmk", queries, items[ids])
    exists = torch.ones_like(dots[:, :, 0], dtype=torch.bool) if query_mask is None else query_mask
    if reduce == "max":
        scores = dots.masked_fill(~exists[..., None], -INF).max(1).values
    elif reduce == "logsumexp":
        scores = dots.masked_fill(~exists[..., None], -INF).logsumexp(1)
    else:
        scores = dots.masked_fill(~exists[..., None], 0).sum(1)
        scores = scores / exists.sum(1, keepdim=True) if reduce == "mean" else scores
    return scores if bias is None else scores + bias[ids]


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(reduce, masked):
    exists = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 0]]).bool() if masked else None

    def scores(queries, projection, items, bias):
        return score_topk(
            queries, items, 6, projection=projection, bias=bias, reduce=reduce, query_mask=exists, backend="reference"
        ).scores

    assert torch.autograd.gradcheck(scores, leaves())


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_equal_torch_in_float64(machine, device, reduce, dtype, sparse):
    queries, projection, items, bias = leaves(dtype=torch.float32, device=device, rows=200, r=20)
    items = items.detach().to(dtype).requires_grad_()
    exists = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 0]], device=device).bool()
    result = score_topk(
        queries, items, 9, projection=projection, bias=bias, reduce=reduce, query_mask=exists, sparse_grad=sparse
    )
    upstream = torch.randn(3, 9, device=device)
    result.scores.backward(upstream)
    wide = [t.detach().double().requires_grad_() for t in (queries, projection, items, bias)]
    truth = by_torch(wide[0] @ wide[1], wide[2], result.ids, reduce, wide[3], exists)
    truth.backward(upstream.double())
    assert torch.allclose(result.scores.double(), truth, atol=1e-4)
    for ours, theirs in zip((queries, projection, items, bias), wide, strict=True):
        assert ours.grad.dtype == ours.dtype
        found = ours.grad.to_dense() if ours.grad.is_sparse else ours.grad
        slack = 2e-2 if ours.dtype == torch.bfloat16 else 3e-3 if ours.dtype == torch.float16 else 1e-4
        assert torch.allclose(found.double(), theirs.grad, atol=slack, rtol=slack)
    assert items.grad.is_sparse == sparse


def test_a_half_precision_gradient_is_summed_in_float32_and_rounded_once(machine, device):
    # 300 users add 1 + 2^-9 each to one row: summed in bfloat16 this would stop at 256.
    items = torch.ones(1, 1, dtype=torch.bfloat16, device=device, requires_grad=True)
    queries = torch.full((300, 1, 1), 1 + 2.0**-9, device=device)
    score_topk(queries, items, 1).scores.sum().backward()
    assert items.grad.item() == torch.tensor(300 * (1 + 2.0**-9)).bfloat16().item()


def test_a_tie_under_max_goes_to_the_lowest_query(machine, device):
    queries = torch.tensor([[[1.0, 9.0], [2.0, 0.0], [2.0, 5.0], [2.0, 1.0]]], device=device, requires_grad=True)
    items = torch.tensor([[3.0, 0.0]], device=device, requires_grad=True)
    score_topk(queries, items, 1).scores.sum().backward()
    assert queries.grad[0].tolist() == [[0.0, 0.0], [3.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert items.grad.tolist() == [[2.0, 0.0]]


def test_a_tie_with_a_query_that_does_not_exist_goes_to_one_that_does(machine, device):
    queries = torch.tensor([[[2.0], [2.0]]], device=device, requires_grad=True)
    exists = torch.tensor([[False, True]], device=device)
    score_topk(queries, torch.ones(1, 1, device=device), 1, query_mask=exists).scores.sum().backward()
    assert queries.grad.flatten().tolist() == [0.0, 1.0]


def test_the_winner_is_decided_by_the_canonical_dot_not_by_exact_arithmetic(machine, device):
    # Both dots round to 2^24 in float32 though the second is larger by 1: a tie, so the first query wins.
    queries = torch.tensor([[[2.0**24, 0.0], [2.0**24, 1.0]]], device=device)
    items = torch.tensor([[1.0] + [0.0] * 15 + [0.5]], device=device)
    queries = torch.cat([queries[..., :1], torch.zeros(1, 2, 15, device=device), queries[..., 1:]], -1).requires_grad_()
    score_topk(queries, items, 1).scores.sum().backward()
    assert queries.grad[0, :, 0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("sparse", [False, True])
def test_pads_have_no_gradient_whatever_comes_from_above(machine, device, reduce, sparse):
    def gradients(k, upstream):
        queries, _, items, bias = leaves(d=5, rows=4, dtype=torch.float32, device=device)
        exists = torch.ones(3, 4, dtype=torch.bool, device=device)
        exists[2] = False
        mask = torch.tensor([True, False, True, True], device=device)
        scores = score_topk(queries, items, k, bias=bias, reduce=reduce, mask=mask, query_mask=exists,
                            sparse_grad=sparse).scores  # fmt: skip
        scores.backward(upstream(scores))
        grads = [t.grad.to_dense() if t.grad.is_sparse else t.grad for t in (queries, items, bias)]
        assert not grads[0][2].any() and not grads[1][1].any() and not grads[2][1].any()
        return grads

    plain = gradients(3, lambda scores: (scores > -INF).float())
    for poison in (7.0, INF, NAN):
        padded = gradients(6, lambda scores, poison=poison: torch.where(scores > -INF, 1.0, poison))
        for a, b in zip(plain, padded, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_only_pads(machine, device, reduce):
    queries, _, items, bias = leaves(d=5, dtype=torch.float32, device=device)
    nothing = torch.zeros(30, dtype=torch.bool, device=device)
    score_topk(queries, items, 4, bias=bias, reduce=reduce, mask=nothing).scores.exp().sum().backward()
    for leaf in (queries, items, bias):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 2, 5, 3), (2, 0, 5, 3), (2, 2, 0, 3), (2, 2, 5, 0)], ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_empty_sizes(machine, device, reduce, shape, sparse):
    users, count, rows, k = shape
    queries, _, items, bias = leaves(users, count, rows, d=5, dtype=torch.float32, device=device)
    score_topk(queries, items, k, bias=bias, reduce=reduce, sparse_grad=sparse).scores.sum().backward()
    for leaf in (queries, items, bias):
        assert leaf.grad.shape == leaf.shape and not leaf.grad.to_dense().any()


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_query_that_does_not_exist_has_no_gradient_and_gives_none(machine, device, reduce):
    queries, _, items, _ = leaves(1, 3, d=5, dtype=torch.float32, device=device)
    exists = torch.tensor([[True, False, True]], device=device)
    with torch.no_grad():
        queries[0, 1] = NAN
        items[7, 0] = INF
        queries[0, [0, 2], 0] = 1.0
    result = score_topk(queries, items, 3, reduce=reduce, query_mask=exists)
    assert result.ids[0, 0] == 7
    result.scores[:, 1:].sum().backward()
    assert queries.grad[0, 1].tolist() == [0.0] * 5
    assert torch.isfinite(items.grad).all()


def test_two_calls_accumulate(machine, device):
    queries, _, items, bias = leaves(d=5, dtype=torch.float32, device=device)
    score_topk(queries, items, 4, bias=bias).scores.sum().backward()
    once = [t.grad.clone() for t in (queries, items, bias)]
    score_topk(queries, items, 4, bias=bias).scores.sum().backward()
    for leaf, first in zip((queries, items, bias), once, strict=True):
        assert torch.equal(leaf.grad, 2 * first)


def test_a_row_taken_by_several_users_gets_all_their_gradients(machine, device):
    items = torch.ones(3, 2, device=device, requires_grad=True)
    queries = torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]], [[0.0, 4.0]]], device=device)
    score_topk(queries, items, 1).scores.sum().backward()
    assert items.grad.tolist() == [[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]]


def test_only_what_asks_for_a_gradient_gets_one(machine, device):
    queries, _, items, bias = leaves(d=5, dtype=torch.float32, device=device)
    everything = score_topk(queries, items, 4, bias=bias).scores
    everything.sum().backward()
    for name, leaf in (("queries", queries), ("items", items), ("bias", bias)):
        given = {"queries": queries.detach(), "items": items.detach(), "bias": bias.detach()}
        given[name] = leaf.detach().clone().requires_grad_()
        scores = score_topk(given["queries"], given["items"], 4, bias=given["bias"]).scores
        scores.sum().backward()
        assert torch.equal(given[name].grad, leaf.grad)
    assert not score_topk(queries.detach(), items.detach(), 4).scores.requires_grad
    with torch.no_grad():
        assert not score_topk(queries, items, 4).scores.requires_grad
    assert not score_topk(queries, items, 4).ids.requires_grad


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_gradients_of_leaves_of_any_layout(machine, device, layout):
    queries, _, items, _ = leaves(d=5, dtype=torch.float32, device=device)
    base = items.detach()[:1] if layout == "expanded" else items.detach()
    base = base.clone().requires_grad_()
    view = {
        "strided": lambda x: torch.stack([x, -x], -1)[..., 0],
        "transposed": lambda x: x.T.contiguous().T,
        "expanded": lambda x: x.expand(30, 5),
    }[layout](base)
    score_topk(queries.detach(), view, 4, reduce="logsumexp").scores.sum().backward()
    plain = base.detach().clone().requires_grad_()
    score_topk(queries.detach(), plain.expand(30, 5).clone(), 4, reduce="logsumexp").scores.sum().backward()
    assert torch.allclose(base.grad, plain.grad, rtol=1e-6)


def test_unsorted_results_carry_the_same_gradients(machine, device):
    grads = []
    for order in (True, False):
        queries, _, items, bias = leaves(rows=500, d=5, dtype=torch.float32, device=device)
        result = score_topk(queries, items, 40, bias=bias, sorted=order)
        (result.scores * (result.ids % 7)).sum().backward()
        grads.append((queries.grad, items.grad, bias.grad))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_chunks_of_users_in_the_backward_agree(machine, device, monkeypatch):
    grads = []
    for chunk in (1 << 22, 1, 40):
        monkeypatch.setattr("urm_kernels.gradients._CHUNK", chunk)
        queries, _, items, _ = leaves(d=5, dtype=torch.float32, device=device)
        score_topk(queries, items, 8, reduce="logsumexp").scores.sum().backward()
        grads.append((queries.grad, items.grad))
    for other in grads[1:]:
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(grads[0], other, strict=True))


def test_a_second_derivative_is_right_or_refused(backend, device):
    dtype = torch.float64 if backend == "reference" else torch.float32
    queries, _, items, _ = leaves(1, 2, rows=6, d=5, dtype=dtype, device=device)
    weights = torch.randn(1, 2, 5, device=device, dtype=dtype)

    def second(scores):
        first = torch.autograd.grad(scores.sum(), queries, create_graph=True)[0]
        return torch.autograd.grad((first * weights).sum(), queries)[0]

    result = score_topk(queries, items, 3, reduce="logsumexp", backend=backend)
    wanted = second(by_torch(queries, items, result.ids, "logsumexp"))
    try:
        found = second(result.scores)
    except RuntimeError:
        return
    assert torch.allclose(found, wanted, atol=1e-4)


def test_float64_beside_float32(device):
    queries, _, items, bias = leaves(d=5, device=device)
    narrow = queries.detach().float().requires_grad_()
    result = score_topk(narrow, items, 4, bias=bias.float(), reduce="mean")
    assert result.scores.dtype == torch.float64
    result.scores.sum().backward()
    wide = queries.detach().float().double().requires_grad_()
    other = items.detach().clone().requires_grad_()
    by_torch(wide, other, result.ids, "mean").sum().backward()
    assert narrow.grad.dtype == torch.float32 and torch.allclose(narrow.grad.double(), wide.grad, rtol=1e-6)
    assert torch.allclose(items.grad, other.grad, rtol=1e-12)


def test_a_trainable_table_learns(backend, device):
    queries, _, items, bias = leaves(d=5, dtype=torch.float32, device=device)
    table = ItemTable(items.detach(), bias=bias.detach(), trainable=True)
    score_topk(queries.detach(), table, 4, backend=backend).scores.sum().backward()
    score_topk(queries.detach(), items, 4, bias=bias, backend=backend).scores.sum().backward()
    assert torch.equal(table.factors.grad, items.grad) and torch.equal(table.bias.grad, bias.grad)
