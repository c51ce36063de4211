"""log_partition's gradients against float64, and torch around it: opcheck, compile, export, threads, memory."""

import concurrent.futures

import pytest
import test_concurrency
import torch
from support import HALVES, INF, NAN, REDUCTIONS, packed, run_python
from test_bits import on
from test_gradients import by_torch as scores_by_torch
from test_partition import EXISTS, assert_equal_bits

from urm_kernels import ItemTable, log_partition, score_candidates, score_topk
from urm_kernels.table import Serving
from urm_kernels.testing import allowed_rows, available_backends, forced, make_items, make_queries, three_way_error


def by_torch(queries, items, reduce="max", *, bias=None, query_mask=None, mask=None, exclude=None, temperature=1.0):
    """The definition in plain torch, in the dtype of its arguments."""
    there = torch.ones(queries.shape[:2]).bool() if query_mask is None else query_mask
    some, rows = there.any(1), torch.arange(len(items)).expand(len(queries), -1)
    scores = scores_by_torch(queries, items, rows, reduce, bias, there | ~some[:, None]) / temperature
    scores = scores.masked_fill(~allowed_rows(*scores.shape, mask, exclude), -1e30)
    return torch.where(some, scores.logsumexp(1), -INF)


def leaves(dtype=torch.float64, rows=40, users=3, count=4, r=5, d=6, scale=1.0):
    generator = torch.Generator().manual_seed(rows)
    shapes = {"queries": (users, count, d), "projection": (d, r), "items": (rows, r), "bias": (rows,)}
    made = {n: torch.randn(*s, generator=generator, dtype=torch.float64) * scale for n, s in shapes.items()}
    made["temperature"] = torch.tensor(0.7, dtype=torch.float64)
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def filters(kind, rows=40):
    spread = torch.arange(3 * rows).view(3, rows)
    lists = torch.tensor([[1, 1, -1, rows - 1]] * 3)
    return {"none": {}, "shared": {"mask": spread[0] % 3 != 0, "query_mask": EXISTS},
            "user": {"mask": packed(spread % 5 != 0), "exclude": lists}}[kind]  # fmt: skip


KINDS = ("none", "shared", "user")


def gradients(function, made, upstream, device, **options):
    made = {name: tensor.to(device).clone().requires_grad_() for name, tensor in made.items()}
    given = {name: tensor for name, tensor in made.items() if name != "projection"}
    queries, items = given.pop("queries"), given.pop("items")
    if function is by_torch:
        result = by_torch(queries @ made["projection"], items, **given, **options)
    else:
        result = function(queries, items, projection=made["projection"], **given, **on(device, options))
    result.backward(upstream.to(result))
    return {name: tensor.grad.cpu() for name, tensor in made.items()}


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(device, reduce, kind):
    made = [tensor.to(device).requires_grad_() for tensor in leaves(rows=12).values()]
    options = on(device, {"reduce": reduce, **filters(kind, 12)})

    def kept(queries, projection, items, bias, temperature):
        result = log_partition(queries, items, projection=projection, bias=bias, temperature=temperature, **options)
        return result[:2]  # the third has no queries under one of the masks: -inf, which has no difference quotient

    assert torch.autograd.gradcheck(kept, made, fast_mode=True)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(("kind", "dtype"), list(zip(KINDS, HALVES, strict=True)))
@pytest.mark.parametrize("rows", [40, 400])
def test_gradients_err_from_float64_no_more_than_twice_torchs_own(machine, device, reduce, kind, dtype, rows):
    made, upstream = leaves(torch.float32, rows, r=20, scale=0.6), torch.tensor([1.0, -2.0, 0.5])
    made["items"] = made["items"].to(dtype)
    options = {"reduce": reduce, **filters(kind, rows)}
    truth = gradients(by_torch, {name: tensor.double() for name, tensor in made.items()}, upstream, "cpu", **options)
    plain = gradients(by_torch, {name: tensor.float() for name, tensor in made.items()}, upstream, "cpu", **options)
    found = gradients(log_partition, made, upstream, device, **options)
    for name, grad in found.items():
        error = three_way_error(grad, plain[name], truth[name], f"gradient of {name}")
        rounding = torch.finfo(grad.dtype).eps if grad.dtype != torch.float32 else 2e-6
        assert grad.dtype == made[name].dtype
        assert error.kernel <= 2 * error.torch + rounding * truth[name].abs().max(), name


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_gradients_have_the_same_bits_on_every_instruction_set_and_any_number_of_threads(monkeypatch, reduce):
    made, results = leaves(torch.float32, 14_000, r=20, scale=0.5), []
    made["projection"] = torch.eye(6, 20)
    sets = [isa for name, isa in available_backends() if name == "cpu"]
    for threads, isa in [(threads, sets[0]) for threads in (1, 2, 3, 4)] + [(2, isa) for isa in sets[1:]]:
        monkeypatch.setenv("URM_NUM_THREADS", str(threads))
        with forced("cpu", isa):
            results.append(gradients(log_partition, made, torch.ones(3), "cpu", reduce=reduce))
        for name in ("queries", "items", "bias", "temperature"):
            assert_equal_bits(results[-1][name], results[0][name])


@pytest.mark.parametrize("temperature", [0.1, 1.0, 30.0])
def test_shares_add_up_and_masked_rows_have_none(backend, device, temperature):
    made, mask = leaves(torch.float32), torch.arange(40) % 4 != 1
    made["temperature"].fill_(temperature)
    found = gradients(log_partition, made, torch.ones(3), device, mask=mask, backend=backend)
    assert found["bias"].sum().item() == pytest.approx(3 / temperature, rel=1e-5)
    assert not found["bias"][~mask].any() and not found["items"][~mask].any()


@pytest.mark.parametrize("upstream", [1.0, INF, NAN])
@pytest.mark.parametrize("user", ["no queries", "all masked", "nan query", "infinite query"])
def test_a_user_without_a_finite_result_gives_and_gets_no_gradient(backend, device, upstream, user):
    # Training on a batch with one such user must go on: the others' gradients are what they are without it.
    found = []
    for weights in ((1.0, upstream, 1.0), (1.0, 0.0, 1.0)):
        made, exists, mask = leaves(torch.float32), torch.ones(3, 4).bool(), torch.ones(3, 40).bool()
        made["projection"] = torch.eye(6)[:, :5].contiguous()
        exists[1], mask[1] = user != "no queries", user != "all masked"
        if "query" in user and weights[1]:
            made["queries"][1, 2, 0] = {"nan query": NAN, "infinite query": INF}.get(user, 0.0)
        found.append(gradients(log_partition, made, torch.tensor(weights), device, query_mask=exists, mask=mask,
                               backend=backend))  # fmt: skip
    for name in ("items", "bias", "temperature"):
        assert torch.equal(found[0][name], found[1][name]), name


@pytest.mark.real_device
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_opcheck(backend, device, everything, learns):
    pytest.importorskip("expecttest", reason="torch.testing imports it for opcheck")
    made = {
        name: tensor.to(device).clone().requires_grad_(learns) for name, tensor in leaves(torch.float32, d=5).items()
    }
    given = on(device, {"bias": made["bias"], **filters("shared"), **filters("user")} if everything else {})
    bias, exists, mask, exclude = (given.get(name) for name in ("bias", "query_mask", "mask", "exclude"))
    table, rest = (made["items"], bias, None, None), (mask, exclude, made["temperature"], backend)
    ops = torch.ops.urm_kernels
    op = ops.log_partition if learns else ops.log_partition_no_grad
    torch.library.opcheck(op.default, (made["queries"], *Serving(*table), exists, "logsumexp", *rest))
    if not learns:
        above = torch.ones(3, device=device), torch.zeros(3, device=device)
        for needs in ((True, True), (True, False), (False, True)):
            arguments = (*above, made["queries"], *table, exists, "mean", *rest, *needs)
            torch.library.opcheck(ops.log_partition_backward.default, arguments)


@pytest.mark.real_device
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["none", "user"])
def test_compile_in_one_graph_equals_eager(device, dynamic, kind):
    torch._dynamo.reset()

    def function(*arguments, **options):
        return log_partition(*arguments, reduce="logsumexp", **options)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    made, upstream = leaves(torch.float32), torch.tensor([1.0, 2.0, 3.0])
    eager = gradients(function, made, upstream, device, **filters(kind))
    found = gradients(compiled, made, upstream, device, **filters(kind))
    assert all(torch.equal(found[name], eager[name]) for name in eager)
    queries, items = made["queries"][..., :5].to(device), made["items"].to(device)
    for temperature in (1.0, 0.5, 0.25):
        assert_equal_bits(compiled(queries, items, temperature=temperature),
                          function(queries, items, temperature=temperature))  # fmt: skip


def test_export_runs_like_the_module():
    head = torch.nn.Module()
    head.items, head.temperature = (torch.nn.Parameter(leaves(torch.float32)[n]) for n in ("items", "temperature"))
    head.forward = lambda hidden, mask: log_partition(hidden, head.items, mask=mask, temperature=head.temperature)
    hidden, mask = torch.randn(3, 4, 5), torch.arange(40) % 3 != 0
    shapes = {"hidden": {0: torch.export.Dim("batch", min=1, max=64)}, "mask": None}
    program = torch.export.export(head, (hidden, mask), dynamic_shapes=shapes)
    for users in (2, 5):
        hidden = torch.randn(users, 4, 5)
        assert_equal_bits(program.module()(hidden, mask), head(hidden, mask))


@pytest.mark.real_device
def test_autocast_touches_neither_the_result_nor_the_gradients(backend, device):
    found = []
    for enabled in (False, True):
        leaf = {name: tensor.to(device).requires_grad_() for name, tensor in leaves(torch.float32, d=5).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            result = log_partition(leaf["queries"], leaf["items"], bias=leaf["bias"], backend=backend)
            result.sum().backward()
        found.append([result, *(leaf[name].grad for name in ("queries", "items", "bias"))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_second_derivative_is_refused_in_words(backend, device):
    queries, items = torch.randn(2, 3, 4, device=device, requires_grad=True), torch.randn(9, 4, device=device)
    first = torch.autograd.grad(log_partition(queries, items, backend=backend).sum(), queries, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        first.sum().backward()


# Users, queries, rows, r: the forward and, apart from the gradients, the backward stay below 32 MiB.
SIZES = [(64, 8, 20_000, 16), (1, 1, 300_000, 64), (16, 1, 100_000, 64)]


@pytest.mark.parametrize("sizes", [SIZES, pytest.param([(64, 8, 1_000_000, 16)], marks=pytest.mark.slow)], ids=str)
def test_memory(sizes):
    out = run_python(f"""
        import torch
        from urm_kernels import log_partition
        from urm_kernels.testing import peak_extra_memory
        def call(reduce, users, count, rows, r):
            q, v, b = (torch.randn(shape, requires_grad=True) for shape in ((users, count, r), (rows, r), (rows,)))
            with peak_extra_memory() as forward:
                result = log_partition(q, v, bias=b, reduce=reduce).sum()
            with peak_extra_memory() as backward:
                result.backward()
            if None in (forward.bytes, backward.bytes):
                return "unknown"
            sizes = forward.bytes >> 20, (backward.bytes - 4 * (v.numel() + b.numel())) >> 20
            return f"{{reduce}} of {{users, count, rows, r}}: MiB {{sizes}}" if max(sizes) >= 32 else ""
        call("max", 2, 3, 5000, 16)
        print("; ".join(filter(None, (call(name, *s) for s in {sizes} for name in ("max", "logsumexp", "sum")))))
    """, timeout=120)  # fmt: skip
    if "unknown" in out:
        pytest.skip("the peak of resident memory cannot be had here")
    assert out == "\n"


def test_several_threads_at_once(monkeypatch):
    monkeypatch.setenv("URM_NUM_THREADS", "3")
    items = make_items("decay", 12_000, 24, 1)
    work = [(make_queries("decay", 2, 1 + 3 * i, 24, i, items), REDUCTIONS[i % 4]) for i in range(6)]

    def call(place):
        return log_partition(work[place % 6][0], items, reduce=work[place % 6][1])

    wanted = [call(place) for place in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for place, found in enumerate(pool.map(call, range(24))):
            assert_equal_bits(found, wanted[place % 6])


def test_ctrl_c_ends_a_long_scan_and_the_process_can_call_again(monkeypatch):
    code = test_concurrency.LONG.replace("score_topk(queries, items, 10)", "log_partition(queries, items)")
    code = code.replace("import score_topk", "import log_partition, score_topk")
    monkeypatch.setattr(test_concurrency, "LONG", code)
    test_concurrency.test_ctrl_c_ends_a_long_scan_and_the_process_can_call_again(monkeypatch, 100, 16)


@pytest.mark.parametrize("scale", [INF, -INF, NAN])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_the_scale_of_a_row_that_takes_no_part_does_not_matter(backend, device, reduce, scale):
    queries, items = torch.randn(2, 3, 6, device=device, requires_grad=True), torch.randn(40, 6, device=device)
    mask = torch.ones(40, dtype=torch.bool, device=device)
    mask[7] = False
    found = []
    for value in (1.0, scale):
        scales = torch.ones(40, device=device)
        scales[[7, 9]] = value
        table = ItemTable(items, row_scale=scales)
        table.remove(torch.tensor([9], device=device))
        result = log_partition(queries, table, mask=mask, reduce=reduce, backend=backend)
        found.append(torch.autograd.grad(result.sum(), queries)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("function", ["score_topk", "score_candidates"])
def test_the_scale_of_the_row_that_stands_for_pads_does_not_matter(backend, device, function):
    queries = torch.randn(2, 3, 6, device=device, requires_grad=True)
    scales = torch.ones(40, device=device)
    scales[0] = INF
    table = ItemTable(torch.randn(40, 6, device=device), row_scale=scales)
    if function == "score_topk":
        mask = torch.zeros(40, dtype=torch.bool, device=device)
        mask[3:6] = True
        scores = score_topk(queries, table, 5, mask=mask, backend=backend).scores[:, :3]
    else:
        scores = score_candidates(queries, table, torch.tensor([3, 4, -1], device=device), backend=backend)[:, :2]
    assert torch.autograd.grad(scores.sum(), queries)[0].isfinite().all()
