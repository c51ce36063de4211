"""score_candidates: the scores of chosen rows, with the bits that score_topk gives them."""

import functools

import pytest
import torch
from support import HALVES, INF, NAN, REDUCTIONS, bits
from test_bits import CASES, case, of_user, on
from test_gradients import by_torch, leaves

from urm_kernels import ItemTable, score_candidates, score_topk
from urm_kernels.backends import select
from urm_kernels.backends.table_view import TableView
from urm_kernels.table import Serving
from urm_kernels.testing import forced, make_items, make_queries, three_way_error

SCORING = ("reduce", "bias", "query_mask")
EXISTS = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 0]]).bool()


def assert_equal_bits(a, b):
    """NaN equals NaN, whatever its sign and payload."""
    a, b = a.detach().cpu(), b.detach().cpu()
    assert a.shape == b.shape and a.dtype == b.dtype
    differs = (bits(a) != bits(b)) & ~(a.isnan() & b.isnan())
    assert not differs.any(), f"{a[differs]} came, {b[differs]} is wanted"


@functools.cache
def expected(index):
    """(scores of all rows [B, N] by score_topk of the reference; NaN where it never returns a row)."""
    queries, items, _, options = case(index)
    options = {name: options[name] for name in SCORING if name in options}
    with forced("reference"):
        result = score_topk(queries, items, len(items), **options)
    scores = torch.full((len(queries), len(items) + 1), NAN)
    there = torch.ones(len(queries), dtype=torch.bool)
    there = options["query_mask"].any(1) if "query_mask" in options else there
    scores[~there] = -INF
    return scores.scatter(1, result.ids.where(result.ids >= 0, len(items)), result.scores)[:, : len(items)]


@pytest.mark.parametrize("index", CASES[:24])
def test_rows_have_the_bits_of_score_topk_on_every_machine(machine, device, index):
    queries, items, _, options = case(index)
    options = on(device, {name: options[name] for name in SCORING if name in options})
    queries, items, users = queries.to(device), items.to(device), len(queries)
    everything = torch.arange(len(items), device=device)
    assert_equal_bits(score_candidates(queries, items, everything, **options), expected(index))
    for width in (1, 17, 40):  # beyond N as well: duplicates
        chosen = torch.randint(-1, len(items), (users, width))
        wanted = expected(index).gather(1, chosen.clamp(min=0)).masked_fill(chosen < 0, -INF)
        chosen = chosen.to(device)
        assert_equal_bits(score_candidates(queries, items, chosen, **options), wanted)
        user = of_user(users - 1, options)
        alone = score_candidates(queries[-1:], items, chosen[-1:], **user)
        assert_equal_bits(alone, wanted[-1:])
        shared = score_candidates(queries, items, chosen[0], **options)
        assert_equal_bits(shared, score_candidates(queries, items, chosen[:1].expand(users, width), **options))


@pytest.mark.parametrize("shared", [False, True])
def test_batches_beyond_a_block_of_users_and_any_number_of_threads_agree(machine, device, monkeypatch, shared):
    # Users who share candidates are served 64 at a time.
    items = make_items("decay", 300, 33, 1)
    queries = make_queries("decay", 130, 2, 33, 1, items).to(device)
    chosen, items = torch.randint(-1, 300, (130, 37), device=device), items.to(device)
    chosen = chosen[0] if shared else chosen
    results = []
    for threads in (1, 2, 3, 4) if machine[0] == "cpu" else (1,):
        monkeypatch.setenv("URM_NUM_THREADS", str(threads))
        results.append(score_candidates(queries, items, chosen, reduce="logsumexp"))
        assert_equal_bits(results[-1], results[0])
    for user in (0, 63, 64, 127, 128, 129):
        one = chosen if shared else chosen[user : user + 1]
        alone = score_candidates(queries[user : user + 1], items, one, reduce="logsumexp")
        assert_equal_bits(alone, results[0][user : user + 1])


def test_pads_duplicates_and_every_order(machine, device):
    queries, items = torch.eye(3).to(device)[:, None], torch.arange(12.0, device=device).view(4, 3)
    chosen = torch.tensor([[3, -1, 3, 0], [-1, -1, -1, -1], [0, 1, 2, 3]], device=device)
    found = score_candidates(queries, items, chosen, bias=torch.ones(4, device=device))
    assert found.tolist() == [[10.0, -INF, 10.0, 1.0], [-INF] * 4, [3.0, 6.0, 9.0, 12.0]]


@pytest.mark.parametrize("users", [0, 2])
@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("width", [0, 1, 18])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_empty_sizes_forward_and_backward(machine, device, users, count, rows, width, reduce):
    queries, items = torch.ones(users, count, 1, device=device), torch.ones(rows, 1, device=device)
    bias, row = torch.zeros(rows, device=device), 4 if rows else -1
    made = [tensor.requires_grad_() for tensor in (queries, items, bias)]
    for chosen in (torch.full((width,), row, device=device), torch.full((users, width), row, device=device)):
        found = score_candidates(queries, items, chosen, reduce=reduce, bias=bias)
        assert found.shape == (users, width) and found.isinf().all() == (count == 0 or rows == 0 or not found.numel())
        found.masked_fill(found.isinf(), 0).sum().backward()
    for leaf in made:
        assert leaf.grad.shape == leaf.shape and not leaf.grad.isnan().any()


def test_a_table_of_no_rows_from_which_none_was_removed(machine, device):
    table = ItemTable(torch.zeros(0, 4, device=device), trainable=True)
    table.remove(torch.zeros(0, dtype=torch.int64, device=device))
    found = score_candidates(torch.ones(2, 4, device=device), table, torch.tensor([-1], device=device))
    assert found.tolist() == [[-INF], [-INF]]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("r", [16, 19])
@pytest.mark.parametrize("layout", ["rows sliced", "columns strided", "transposed", "offset", "stride 0"])
def test_layouts(machine, device, dtype, r, layout):
    queries, items = torch.randn(3, 4, r, device=device), torch.randn(50, r, device=device).to(dtype)
    chosen, exists = torch.randint(-1, 50, (3, 21), device=device), torch.rand(3, 4, device=device) < 0.7
    other = {
        "rows sliced": lambda x: x.repeat_interleave(3, 0)[::3],
        "columns strided": lambda x: torch.stack([x, x], -1)[..., 0],
        "transposed": lambda x: x.mT.contiguous().mT,
        "offset": lambda x: torch.cat([x.new_zeros(5), x.flatten()])[5:].view(x.shape),
        "stride 0": lambda x: x[:1].expand(x.shape),
    }[layout]
    made = [other(x) for x in (queries, items, chosen, exists)]
    plain = [x.contiguous() for x in made]
    found = score_candidates(*made[:3], query_mask=made[3])
    assert_equal_bits(found, score_candidates(*plain[:3], query_mask=plain[3]))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("count", [1, 10])
def test_nan_infinities_and_zeros(machine, device, reduce, count):
    items = torch.tensor([[1.0], [NAN], [INF], [-INF], [-0.0], [3e38], [1.0], [1.0]], device=device)
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, -0.0, 0.0, NAN, -INF], device=device)
    queries, chosen = torch.full((1, count, 1), 2.0, device=device), torch.arange(8, device=device)
    found = score_candidates(queries, items, chosen, reduce=reduce, bias=bias)[0].cpu()
    assert found.isnan().tolist() == [False, True, False, False, False, False, True, False]
    assert found[[2, 3, 5, 7]].tolist() == [INF, -INF, INF, -INF]
    if reduce != "logsumexp":
        assert bits(found[4:5]).item() == 0
    queries = torch.cat([queries, torch.full_like(queries, NAN)])
    exists = torch.ones(2, count, dtype=torch.bool, device=device)
    exists[1] = False
    found = score_candidates(queries, items, chosen, reduce=reduce, bias=bias, query_mask=exists)
    assert (found[1] == -INF).all()
    assert score_candidates(queries, items, chosen[:1], reduce=reduce)[1].isnan().all()


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_flush_denormal_changes_nothing(machine, device, reduce):
    scale = torch.tensor([1e-40, 1e-20, 1e18], device=device)
    queries = torch.randn(3, 2, 20, device=device) * scale[:, None, None]
    items = (torch.randn(20, 3, 20, device=device) * scale[:, None]).view(60, 20)
    given = {"bias": torch.full((60,), 1e-42, device=device), "reduce": reduce}
    plain = score_candidates(queries, items, torch.arange(60, device=device), **given)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        flushed = score_candidates(queries, items, torch.arange(60, device=device), **given)
    finally:
        torch.set_flush_denormal(False)
    assert_equal_bits(flushed, plain)


WRONG = [
    (TypeError, torch.zeros(2, 3)), (TypeError, torch.zeros(2, 3, dtype=torch.int32)), (TypeError, [[0], [1]]),
    (TypeError, torch.zeros(2, 3).bool()), (TypeError, None), (TypeError, 3), (ValueError, torch.tensor(1)),
    (ValueError, torch.zeros(1, 3).long()), (ValueError, torch.zeros(3, 2).long()),
    (ValueError, torch.zeros(2, 1, 3).long()), (ValueError, torch.zeros(3, device="meta").long()),
]  # fmt: skip


@pytest.mark.parametrize(("error", "chosen"), WRONG, ids=lambda part: str(part)[:30].replace("\n", ""))
def test_candidates_that_are_refused_in_words(device, error, chosen):
    chosen = chosen.to(device) if torch.is_tensor(chosen) and chosen.device.type == "cpu" else chosen
    with pytest.raises(error, match=r"^candidates: .* (wanted|queries are on)"):
        score_candidates(torch.ones(2, 3, 4, device=device), torch.ones(5, 4, device=device), chosen)


@pytest.mark.parametrize(("rows", "bad"), [(5, 5), (5, -2), (5, 2**62), (5, -(2**63)), (0, 0)])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_backends_score_rows_that_do_not_exist_nan(backend, device, rows, bad, reduce):
    if backend == "cpu":
        pytest.skip("they are refused before")
    queries, items = torch.ones(2, 3, 4, device=device), torch.ones(rows, 4, device=device)
    for chosen in (torch.tensor([-1, bad]), torch.tensor([[-1, bad], [-1, bad]])):
        module = select.BACKENDS[backend]
        scores = module.score_candidates(queries, TableView(items), chosen.to(device), None, reduce)
        assert_equal_bits(scores, torch.tensor([[-INF, NAN]] * 2))


def test_rows_that_do_not_exist_have_no_gradient_where_looking_would_be_waiting(device):
    if device.type == "cpu":
        pytest.skip("they are refused")
    queries, items = (torch.ones(n, 4, device=device, requires_grad=True) for n in (2, 5))
    scores = score_candidates(queries, items, torch.tensor([1, 5, -7], device=device))
    scores.nansum().backward()
    assert scores.tolist()[0][0] == 4.0 and scores.isnan().sum(1).tolist() == [2, 2]
    assert queries.grad.tolist() == [[1.0] * 4] * 2 and items.grad.sum(1).tolist() == [0.0, 8.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(("rows", "bad"), [(5, 5), (5, -2), (5, 2**62), (5, -(2**63)), (0, 0)])
def test_rows_that_do_not_exist_are_refused_on_the_cpu(backend, rows, bad):
    for chosen in (torch.tensor([-1, bad]), torch.tensor([[-1, -1], [bad, -1]])):
        with pytest.raises(ValueError, match=f"^candidates: .*{bad} came"):
            score_candidates(torch.ones(2, 3, 4), torch.ones(rows, 4), chosen, backend=backend)


@pytest.mark.parametrize(("name", "value"), [("sparse_grad", 1), ("reduce", "min"), ("backend", "gpu"), ("backend", 3)])
def test_other_arguments_that_are_refused_in_words(device, name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
        score_candidates(torch.ones(4, device=device), torch.ones(3, 4, device=device),
                         torch.tensor([0], device=device), **{name: value})  # fmt: skip


@pytest.mark.parametrize("kind", ["removed", "row_scale", "float8"])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_tables(machine, device, kind, reduce):
    factors, scale = torch.randn(40, 19), None if kind == "removed" else torch.rand(40) + 0.5
    factors = factors.to(torch.float8_e4m3fn) if kind == "float8" else factors
    table = ItemTable(factors.to(device), row_scale=scale if scale is None else scale.to(device),
                      bias=torch.randn(40).to(device))  # fmt: skip
    queries, chosen = torch.randn(3, 4, 19), torch.randint(-1, 40, (3, 30), device=device)
    if kind == "removed":
        table.remove(torch.tensor([0, 17, 39], device=device))
    given = queries.to(device).clone().requires_grad_()
    whole = score_topk(given, table, 40, reduce=reduce)
    wanted = torch.full((3, 41), -INF).scatter(1, whole.ids.cpu() + 1, whole.scores.detach().cpu())
    wanted[:, 0] = -INF
    found = score_candidates(given, table, chosen, reduce=reduce)
    assert_equal_bits(found, wanted.gather(1, chosen.cpu() + 1))
    found.masked_fill(found.isinf(), 0).sum().backward()
    wide = queries.double().requires_grad_()
    rows = factors.double() if scale is None else factors.double() * scale[:, None]
    truth = by_torch(wide, rows, chosen.cpu().clamp(min=0), reduce)
    truth.masked_fill(found.detach().cpu().isinf(), 0).sum().backward()
    assert torch.allclose(given.grad.cpu().double(), wide.grad, atol=1e-4)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(device, reduce, masked):
    chosen = torch.tensor([[3, 3, -1, 0], [29, 1, 3, -1], [2, 2, 2, 5]], device=device)
    made = [tensor.detach().to(device).requires_grad_() for tensor in leaves()]

    def kept(queries, projection, items, bias):
        given = {"projection": projection, "bias": bias, "query_mask": EXISTS.to(device) if masked else None}
        return score_candidates(queries, items, chosen, reduce=reduce, **given).masked_fill(chosen < 0, 0)

    assert torch.autograd.gradcheck(kept, made)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("sparse", "shared"), [(False, True), (True, False)])
def test_gradients_equal_torch_in_float64(backend, device, reduce, dtype, sparse, shared):
    made = [tensor.detach() for tensor in leaves(dtype=torch.float32, rows=60, r=20)]
    made[2] = made[2].to(dtype)
    chosen = torch.cat([torch.randint(0, 60, (3, 18)), torch.full((3, 2), -1)], 1)[:, torch.randperm(20)]
    chosen = chosen[0] if shared else chosen
    chosen[..., :2] = chosen[..., 2:4]  # duplicates add up
    there, upstream = chosen.expand(3, -1) >= 0, torch.randn(3, 20)
    ours = [tensor.to(device).clone().requires_grad_() for tensor in made]
    found = score_candidates(ours[0], ours[2], chosen.to(device), projection=ours[1], bias=ours[3], reduce=reduce,
                             query_mask=EXISTS.to(device), sparse_grad=sparse, backend=backend)  # fmt: skip
    found.backward(torch.where(there, upstream, NAN).to(device))  # pads take none, whatever comes from above
    errors = []
    for precision in (torch.float64, torch.float32):
        wide = [tensor.to(precision).clone().requires_grad_() for tensor in made]
        rows = chosen.clamp(min=0).expand(3, -1)
        by_torch(wide[0] @ wide[1], wide[2], rows, reduce, wide[3], EXISTS).backward(
            torch.where(there, upstream, 0).to(precision)
        )
        errors.append([leaf.grad for leaf in wide])
    for name, ours_of, truth, plain in zip(("queries", "projection", "items", "bias"), ours, *errors, strict=True):
        grad = ours_of.grad.to_dense().cpu() if ours_of.grad.is_sparse else ours_of.grad.cpu()
        assert grad.dtype == ours_of.dtype and ours_of.grad.is_sparse == (sparse and name == "items")
        error = three_way_error(grad, plain, truth, f"gradient of {name}")
        rounding = torch.finfo(ours_of.dtype).eps if ours_of.dtype != torch.float32 else 2e-6
        assert error.kernel <= 2 * error.torch + rounding * truth.abs().max(), name
    if sparse:
        assert ours[2].grad._indices()[0].tolist() == chosen[chosen >= 0].unique().tolist()


def test_a_tie_under_max_goes_to_the_lowest_query_that_exists(machine, device):
    queries = torch.tensor([[[2.0, 0.0], [2.0, 5.0], [2.0, 1.0]]] * 2, device=device, requires_grad=True)
    exists = torch.tensor([[True, True, True], [False, True, True]], device=device)
    items = torch.tensor([[3.0, 0.0]], device=device)
    score_candidates(queries, items, torch.tensor([0], device=device), query_mask=exists).sum().backward()
    assert queries.grad[..., 0].tolist() == [[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]]


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("upstream", [1.0, INF, NAN])
@pytest.mark.parametrize("void", ["no queries", "no M", "removed row"])
def test_what_is_minus_infinity_by_definition_gives_and_gets_no_gradient(backend, device, reduce, upstream, void):
    # A score that is -inf whatever the arguments hold is a constant, its bias and its rows included.
    queries = torch.randn(2, 0 if void == "no M" else 3, 4, device=device, requires_grad=True)
    table = ItemTable(torch.randn(6, 4, device=device), bias=torch.randn(6, device=device), trainable=True)
    exists, chosen = torch.ones(queries.shape[:2], dtype=torch.bool, device=device), torch.tensor([[1, 2], [3, 3]])
    exists[1] = void != "no queries"
    if void == "removed row":
        table.remove(torch.tensor([3], device=device))
    found = score_candidates(queries, table, chosen.to(device), query_mask=exists, reduce=reduce, backend=backend)
    assert (found[1] == -INF).all() and (found[0] > -INF).all() == (void != "no M")
    found.backward(torch.where(found > -INF, 1.0, upstream))
    assert not queries.grad[1].any()
    assert table.bias.grad.tolist() == ([0.0] * 6 if void == "no M" else [0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    assert not table.factors.grad[3:].any() and not table.factors.grad.isnan().any()


@pytest.mark.real_device
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("everything", [False, True])
def test_opcheck(backend, device, learns, everything):
    pytest.importorskip("expecttest", reason="torch.testing imports it for opcheck")
    queries, _, items, bias = (t.detach().to(device) for t in leaves(d=5, dtype=torch.float32))
    given = [tensor.requires_grad_(learns) for tensor in (queries, items, bias)]
    chosen, exists = torch.tensor([[3, 1, -1], [0, 3, 29], [5, 5, 5]], device=device), EXISTS.to(device)
    ops = torch.ops.urm_kernels
    op = ops.score_candidates if learns else ops.score_candidates_no_grad
    for rows in (chosen, chosen[0]):
        rest = (rows, exists if everything else None, "logsumexp", False, backend)
        table = Serving(given[1], given[2] if everything else None)
        torch.library.opcheck(op.default, (given[0], *table, *rest))


@pytest.mark.real_device
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_compile_in_one_graph_equals_eager(device, dynamic, sparse):
    torch._dynamo.reset()

    def function(queries, items, bias, chosen):
        return score_candidates(queries * 1.0, items, chosen, bias=bias, query_mask=EXISTS.to(device),
                                sparse_grad=sparse)  # fmt: skip

    compiled, results = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager"), []
    for call in (function, compiled):
        queries, _, items, bias = (t.detach().to(device).requires_grad_() for t in leaves(d=5, dtype=torch.float32))
        found = call(queries, items, bias, torch.tensor([4, -1, 4, 7], device=device))
        found.masked_fill(found.isinf(), 0).square().sum().backward()
        results.append([found, queries.grad, items.grad.to_dense(), bias.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert_equal_bits(compiled(queries, items, bias, torch.arange(9, device=device)),
                      function(queries, items, bias, torch.arange(9, device=device)))  # fmt: skip


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.items = torch.nn.Parameter(torch.randn(20, 6))

    def forward(self, hidden, chosen):
        return score_candidates(hidden, self.items, chosen, reduce="mean")


def test_export_runs_like_the_module():
    head, batch, width = Head(), torch.export.Dim("batch", min=1, max=64), torch.export.Dim("width", min=1, max=99)
    sample = (torch.randn(3, 2, 6), torch.zeros(3, 4, dtype=torch.int64))
    program = torch.export.export(head, sample, dynamic_shapes={"hidden": {0: batch}, "chosen": {0: batch, 1: width}})
    for users, C in ((2, 3), (5, 17)):
        given = torch.randn(users, 2, 6), torch.randint(-1, 20, (users, C))
        assert_equal_bits(program.module()(*given), head(*given))


@pytest.mark.real_device
@pytest.mark.parametrize("function", ["score_candidates", "score_topk"])
def test_autocast_touches_neither_the_result_nor_the_gradients(backend, device, function):
    results = []
    for enabled in (False, True):
        queries, _, items, bias = (t.detach().to(device).requires_grad_() for t in leaves(d=5, dtype=torch.float32))
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            given = {"bias": bias, "reduce": "logsumexp", "backend": backend}
            if function == "score_topk":
                found = score_topk(queries, items, 9, **given).scores
            else:
                found = score_candidates(queries, items, torch.arange(9, device=device), **given)
            found.sum().backward()
        results.append([found, queries.grad, items.grad, bias.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_second_derivative_is_refused_in_words(backend, device):
    queries, items = torch.randn(2, 3, 4, device=device, requires_grad=True), torch.randn(9, 4, device=device)
    found = score_candidates(queries, items, torch.tensor([1, 2], device=device), reduce="logsumexp", backend=backend)
    first = torch.autograd.grad(found.sum(), queries, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        first.sum().backward()
