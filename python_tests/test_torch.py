"""torch's own machinery: opcheck, compile, export, autocast, transforms."""

import pytest
import torch
from support import REDUCTIONS, assert_same_bits

from urm_kernels import score_topk
from urm_kernels.table import Serving
from urm_kernels.testing import make_items, make_queries

OPTIONS = {
    "query_mask": torch.tensor([[True, False, True], [True, True, True]]),
    "bias": torch.linspace(-1, 1, 20),
    "mask": torch.arange(20) % 3 != 0,
    "exclude": torch.tensor([[1, 2, -1], [4, 4, 19]]),
}
CHOICES = [(), *[(name,) for name in OPTIONS], tuple(OPTIONS)]


@pytest.fixture
def opcheck():
    pytest.importorskip("expecttest", reason="torch.testing imports it for opcheck")
    return torch.library.opcheck


def tensors(device, users=2, count=3, rows=20, r=6):
    items = make_items("iid", rows, r, 1)
    return make_queries("iid", users, count, r, 1, items).to(device), items.to(device)


def chosen(names, device):
    return {name: OPTIONS[name].to(device) for name in names}


@pytest.mark.real_device
@pytest.mark.parametrize("names", CHOICES, ids="+".join)
@pytest.mark.parametrize("differentiable", [False, True])
def test_opcheck_of_the_forward(opcheck, backend, device, names, differentiable):
    queries, items = tensors(device)
    given = {name: OPTIONS[name].to(device) if name in names else None for name in OPTIONS}
    if differentiable:
        queries.requires_grad_()
        items.requires_grad_()
        if given["bias"] is not None:
            given["bias"] = given["bias"].clone().requires_grad_()
    op = torch.ops.urm_kernels.score_topk if differentiable else torch.ops.urm_kernels.score_topk_no_grad
    filters = (given["mask"], given["exclude"])
    table = Serving(items, given["bias"])
    opcheck(op.default, (queries, *table, 4, given["query_mask"], "max", *filters, True, False, 1.0, backend))


@pytest.mark.real_device
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_of_the_backward(opcheck, backend, device, reduce, rows, masked):
    queries, items = tensors(device)
    ids = torch.tensor([[3, 1, -1], [0, 3, 19]], device=device)
    exists = OPTIONS["query_mask"].to(device) if masked else None
    opcheck(
        torch.ops.urm_kernels.score_rows_backward.default,
        (torch.ones(2, 3, device=device), ids, queries, items, None, exists, reduce, rows, backend),
    )


def differentiated(function, queries, items):
    queries, items = (t.detach().clone().requires_grad_() for t in (queries, items))
    result = function(queries, items)
    weights = torch.arange(result.ids.numel(), device=queries.device).view(result.ids.shape).cos()
    (result.scores.clamp(min=-1e30) * weights).sum().backward()
    return result, queries.grad, items.grad


@pytest.mark.real_device
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("names", [(), tuple(OPTIONS)], ids=["plain", "all options"])
@pytest.mark.parametrize("reduce", ["max", "logsumexp"])
def test_compile_in_one_graph_equals_eager(backend, device, dynamic, names, reduce):
    torch._dynamo.reset()
    given = chosen(names, device)

    def function(queries, items):
        return score_topk(queries * 1.0, items, 4, reduce=reduce, backend=backend, **given)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    queries, items = tensors(device)
    eager, *grads = differentiated(function, queries, items)
    result, *others = differentiated(compiled, queries, items)
    assert_same_bits(result, eager)
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))
    with torch.no_grad():
        assert_same_bits(compiled(queries, items), function(queries, items))


@pytest.mark.real_device
def test_one_dynamic_graph_serves_other_sizes(device):
    torch._dynamo.reset()
    compiles = []

    def counting(graph, inputs):
        compiles.append(graph)
        return graph

    def function(queries, items, k):
        return score_topk(queries, items, k)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counting)
    for users, count, rows, k in ((2, 3, 20, 4), (5, 4, 33, 7), (3, 2, 90, 100)):
        queries, items = tensors(device, users, count, rows)
        assert_same_bits(compiled(queries, items, k), function(queries, items, k))
    assert len(compiles) == 1


@pytest.mark.real_device
def test_inductor_keeps_the_bits(device):
    torch._dynamo.reset()

    def function(queries, items):
        return score_topk(queries, items, 4)

    queries, items = tensors(device)
    compiled = torch.compile(function, fullgraph=True)
    assert_same_bits(compiled(queries, items), function(queries, items))


@pytest.mark.real_device
def test_compile_with_a_sparse_gradient(device):
    torch._dynamo.reset()

    def function(queries, items):
        return score_topk(queries, items, 4, sparse_grad=True)

    queries, items = tensors(device)
    _, _, plain = differentiated(function, queries, items)
    _, _, found = differentiated(torch.compile(function, fullgraph=True, backend="aot_eager"), queries, items)
    assert plain.is_sparse and found.is_sparse
    assert torch.equal(found.to_dense(), plain.to_dense())


class Head(torch.nn.Module):
    def __init__(self, items):
        super().__init__()
        self.items = torch.nn.Parameter(items)
        self.projection = torch.nn.Parameter(torch.eye(6))

    def forward(self, hidden, mask):
        return score_topk(hidden, self.items, 4, projection=self.projection, mask=mask)


def test_export_runs_like_the_module():
    queries, items = tensors("cpu")
    head, mask = Head(items), OPTIONS["mask"]
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(head, (queries, mask), dynamic_shapes={"hidden": {0: batch}, "mask": None})
    for users in (2, 5):
        hidden = torch.randn(users, 3, 6)
        assert_same_bits(head(hidden, mask), type(head(hidden, mask))(*program.module()(hidden, mask)))


@pytest.mark.real_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_touches_the_projection_and_nothing_else(backend, device, dtype):
    queries, items = tensors(device)
    projection = torch.randn(6, 6, device=device)
    plain = score_topk(queries, items, 4, backend=backend)
    with torch.autocast(device.type, dtype):
        cast = score_topk(queries, items, 4, backend=backend)
        projected = score_topk(queries, items, 4, projection=projection, backend=backend)
        by_hand = queries @ projection
    assert by_hand.dtype == dtype
    assert_same_bits(cast, plain)
    assert_same_bits(projected, score_topk(by_hand, items, 4, backend=backend))
    queries.requires_grad_()
    with torch.autocast(device.type, dtype):
        score_topk(queries, items, 4, projection=projection, backend=backend).scores.sum().backward()
    assert queries.grad.dtype == torch.float32 and queries.grad.abs().sum() > 0


def test_vmap_equals_a_loop(device):
    queries, items = tensors(device, users=5)
    batched = torch.vmap(lambda q: score_topk(q, items, 4))(queries[:, None])
    assert torch.equal(batched.ids[:, 0], score_topk(queries, items, 4).ids)


def test_meta_tensors_give_shapes():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        queries, items = torch.empty(2, 3, 6, device="meta"), torch.empty(20, 6, device="meta", dtype=dtype)
        result = score_topk(queries, items, 4)
        assert result.scores.shape == result.ids.shape == (2, 4)
        assert result.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert result.ids.dtype == torch.int64 and result.ids.device.type == "meta"


@pytest.mark.real_device
def test_inference_mode(backend, device):
    queries, items = tensors(device)
    plain = score_topk(queries, items, 4, backend=backend)
    with torch.inference_mode():
        assert_same_bits(score_topk(queries, items.clone(), 4, backend=backend), plain)


def test_half_precision_queries_are_widened_exactly(backend, device):
    queries, items = tensors(device)
    for dtype in (torch.float16, torch.bfloat16):
        half = queries.to(dtype)
        wide = score_topk(half.float(), items, 4, backend=backend)
        assert_same_bits(score_topk(half, items, 4, backend=backend), wide)
        half.requires_grad_()
        score_topk(half, items, 4, backend=backend).scores.sum().backward()
        assert half.grad.dtype == dtype
