"""log_partition: the softmax's denominator over all items. Values, bits, gradients, memory."""

import concurrent.futures
import functools
import math

import pytest
import test_concurrency
import torch
from support import HALVES, INF, NAN, REDUCTIONS, bits, packed, run_python
from test_bits import CASES, case, of_user, on
from test_gradients import by_torch as scores_by_torch

from urm_kernels import ItemTable, log_partition, score_candidates
from urm_kernels.testing import allowed_rows, available_backends, forced, make_items, make_queries, three_way_error

TEMPERATURES = (1.0, 1e-3, 0.05, 0.37, 3.0, 1e3)
EXISTS = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()


def scores_of(queries, items, **options):
    """The canonical scores [B, N] of all rows, by the specification."""
    with forced("reference"):
        return score_candidates(queries, items, torch.arange(len(items)), **options)


def assert_stated_error(result, scores, temperature=1.0, allowed=True):
    """Within 2e-6 max(1, |largest score / T|) of float64; scores that are NaN take no part."""
    scaled = scores.double() / torch.tensor(temperature, dtype=torch.float32).double()
    scaled = scaled.masked_fill(~(~scaled.isnan() & torch.as_tensor(allowed)), -INF)
    truth, found = scaled.logsumexp(1), result.detach().cpu().double()
    slack = 2e-6 * scaled.amax(1).abs().clamp(min=1).nan_to_num(posinf=1)
    wrong = ~((found == truth) | ((found - truth).abs() <= slack))
    assert not wrong.any(), f"{found[wrong]} came, {truth[wrong]} is wanted, {slack[wrong]} is allowed"


def assert_equal_bits(a, b):
    assert torch.equal(bits(a), bits(b)), (a, b)


def column(values, device, users=1, width=4):
    """(queries, items) whose scores are the values, for every user; from 9 users on, scans may bound."""
    items = torch.zeros(len(values), width)
    items[:, 0] = torch.as_tensor(values)
    queries = torch.zeros(users, 1, width)
    queries[..., 0] = 1.0
    return queries.to(device), items.to(device)


@functools.cache
def expected(index):
    queries, items, _, options = case(index)
    with forced("reference"):
        return log_partition(queries, items, temperature=TEMPERATURES[index % 6], **options)


@pytest.mark.parametrize("index", CASES[:24])
def test_every_machine_has_the_bits_of_the_reference_and_the_stated_error(machine, device, index):
    queries, items, _, options = case(index)
    temperature = TEMPERATURES[index % 6]
    result = log_partition(queries.to(device), items.to(device), temperature=temperature, **on(device, options))
    assert_equal_bits(result, expected(index))
    scoring = {name: options[name] for name in ("query_mask", "reduce", "bias") if name in options}
    allowed = allowed_rows(len(queries), len(items), options.get("mask"), options.get("exclude"))
    assert_stated_error(result, scores_of(queries, items, **scoring), temperature, allowed)
    for user in {0, len(queries) - 1}:
        one = on(device, {"temperature": temperature, **of_user(user, options)})
        alone = log_partition(queries[user : user + 1].to(device), items.to(device), **one)
        assert_equal_bits(alone, expected(index)[user : user + 1])


@pytest.mark.parametrize("temperature", [1.0, 1e-3, 0.37])
@pytest.mark.parametrize("kind", ["norms", "sorted", "duplicates"])
def test_the_order_of_rows_does_not_matter_at_all(machine, device, kind, temperature):
    items = make_items(kind, 400, 12, 3)
    queries, bias, mask = make_queries(kind, 5, 3, 12, 3, items).to(device), torch.randn(400), torch.rand(5, 400) < 0.8
    results = []
    for order in (torch.arange(400), torch.randperm(400), torch.arange(399, -1, -1), bias.argsort()):
        given = on(device, {"bias": bias[order], "mask": mask[:, order], "temperature": temperature})
        results.append(log_partition(queries, items[order].to(device), **given))
        assert_equal_bits(results[-1], results[0])


# Around a tie: the two largest terms add up to the middle between two floats, so that one more unit of any term that
# counts, however small, is seen in the result; what does not count must not be.
TIE = [0.0, 2.0**-23]


def depth(rows):
    return -(-(24 + (rows - 1).bit_length()) // 8)


def edge(exponent):
    """(the largest float32 whose exponential has a smaller exponent, the least one that has it)."""
    inside = torch.tensor((exponent - 0.5) * math.log(2.0), dtype=torch.float32)
    down, up = torch.tensor(-INF), torch.tensor(INF)

    def has(score):
        return torch.round(score * 1.44269504088896341) >= exponent

    while has(inside):
        inside = torch.nextafter(inside, down)
    while not has(inside):
        inside = torch.nextafter(inside, up)
    return torch.nextafter(inside, down).item(), inside.item()


@pytest.mark.parametrize("rows", [5, 17, 257, 1500])
@pytest.mark.parametrize("users", [1, 9])
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_terms_in_the_last_group_count_and_terms_below_do_not(machine, device, rows, users, temperature):
    outside, inside = edge(-8 * depth(rows))
    tie = log_partition(*column(TIE + [-INF] * (rows - 2), device, users))
    below = torch.full((rows,), outside)
    below[[1, rows - 2]] = torch.tensor(TIE)
    one = below.clone()
    one[rows // 2] = inside
    for values in (below, below.flip(0), below.sort().values):
        found = log_partition(*column(values * temperature, device, users), temperature=temperature)
        assert_equal_bits(found, tie)
    for values in (one, one.flip(0), one.sort().values):
        found = log_partition(*column(values * temperature, device, users), temperature=temperature)
        assert (found > tie).all() and (found - tie < 3e-7).all()


# Where the rows with the largest scores lie; a scan of many rows looks at every 256th first.
TOPS = {"in the sample": (256, 65_280), "beside the sample": (257, 65_281), "last": (-1, -2)}


@functools.cache
def spread_values(spread, rows=66_000):
    """Scores of which many lie on either side of the window's end, the top behind, and the reference's result."""
    outside, inside = edge(-8 * depth(rows))
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(rows, generator=generator) * (spread if spread != "edge" else 1)
    values = (values - values.max()).clamp(max=-1.0)
    if spread == "edge":
        values[:], values[:40] = torch.where(values < -4, outside, -60.0), inside
    values[-2:] = torch.tensor(TIE)
    with forced("reference"):
        return values, log_partition(*column(values, "cpu"))


@pytest.mark.parametrize("spread", ["edge", 5.0, 1e30])
@pytest.mark.parametrize("arrangement", ["ascending", *TOPS])
def test_neither_pruning_nor_threads_nor_where_the_top_lies_change_a_bit(monkeypatch, cheap_isa, spread, arrangement):
    values, wanted = spread_values(spread)
    ordered = values.sort().values
    if arrangement in TOPS:
        ordered = torch.cat([values[:-2][torch.randperm(len(values) - 2)], values[-2:]])
        for place, row in zip(TOPS[arrangement], (-1, -2), strict=True):
            ordered[[place, row]] = ordered[[row, place]]
    queries, items = column(ordered, "cpu", users=9, width=20)
    items[:, 5:] = torch.randn(len(items), 15) * 3  # which the queries do not see, and bounds have to allow for
    for scan, threads in (("bounded", 1), ("bounded", 4), ("auto", 2)):
        monkeypatch.setenv("URM_NUM_THREADS", str(threads))
        with forced("cpu", cheap_isa, scan):
            assert_equal_bits(log_partition(queries, items), wanted.expand(9))


@pytest.mark.parametrize("kind", ["norms", "reversed:decay", "giant"])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_exact_and_bounded_scans_of_a_large_table_agree(monkeypatch, cheap_isa, kind, reduce):
    items = make_items(kind, 66_000, 24, 9).bfloat16()
    queries, bias = make_queries(kind, 4, 5, 24, 9, items.float()), torch.randn(66_000)
    mask = packed(torch.rand(4, 66_000) < torch.tensor([[1.0], [0.9], [0.001], [0.5]]))
    # Without its best rows, and those of the sample, a user's sum is another one.
    best = (queries.amax(1) @ items.float().T).topk(50).indices
    sample = torch.arange(0, 256 * 100, 256).expand(4, 100)
    for options in ({}, {"bias": bias, "mask": mask, "temperature": 0.1}, {"exclude": torch.cat([best, sample], 1)}):
        results = []
        for scan, threads in (("exact", 1), ("bounded", 1), ("bounded", 3), ("auto", 4)):
            monkeypatch.setenv("URM_NUM_THREADS", str(threads))
            with forced("cpu", cheap_isa, scan):
                results.append(log_partition(queries, items, reduce=reduce, **options))
            assert_equal_bits(results[-1], results[0])


@pytest.mark.parametrize("rows", [2, 3, 1000, 65_536, 65_537, 2_000_000])
def test_equal_scores_give_the_logarithm_of_the_number_of_rows(device, rows):
    rows = rows if device.type == "cpu" else min(rows, 70_000)  # the reference takes its time
    for score in (0.0, 0.75, -0.9) if device.type == "cpu" else (0.75,):
        queries, items = column([score], device, 9)
        found = log_partition(queries, items.expand(rows, 4)).cpu().double()
        assert ((found - math.log(rows) - score).abs() < 2e-6).all()
    assert found.unique().numel() == 1


BIG = 2.0**24  # from here on the largest score is the result
HUGE = [
    ([BIG - 1, BIG - 2, 0.0], BIG - 1 + math.log(1 + math.exp(-1))), ([BIG, 5.0, -1e30], BIG), ([-BIG, -1e30], -BIG),
    ([-3e38, -3e37, -INF], -3e37), ([-2 * BIG, 3.0, -2.0], 3.0 + math.log1p(math.exp(-5))), ([3e38, -3e38, 0.0], 3e38),
    ([INF, 1.0, NAN], INF), ([INF, -INF, NAN], INF), ([-INF, -INF], -INF), ([-INF, 2.0, -INF], 2.0), ([NAN], -INF),
    ([NAN, 1.5], 1.5), ([-INF, NAN], -INF), ([1e-42, -1e-42], math.log(2.0)),
]  # fmt: skip


@pytest.mark.parametrize(("values", "wanted"), HUGE, ids=str)
@pytest.mark.parametrize("users", [1, 9])
@pytest.mark.parametrize("fill", [None, -INF, NAN])
def test_huge_infinite_and_nan_scores(machine, device, values, wanted, users, fill):
    rows = values if fill is None else [fill] * 20 + values + [fill] * 30
    queries, items = column(rows, device, users)
    for order in (items, items.flip(0)):
        found = log_partition(queries[..., :1], order[:, :1]).cpu().double()
        assert ((found == wanted) | ((found - wanted).abs() <= 2e-6 * max(1.0, abs(wanted)))).all(), found
    doubled = log_partition(queries[..., :1] * 0.5, items[:, :1], temperature=0.5)
    assert_equal_bits(doubled, log_partition(queries[..., :1], items[:, :1]))


@pytest.mark.parametrize("temperature", [1e-37, 1e-39])
def test_flush_denormal_changes_nothing(machine, device, temperature):
    queries, items = torch.randn(3, 4, 8, device=device) * 1e-20, torch.randn(50, 8, device=device) * 1e-20
    given = {"temperature": temperature, "bias": torch.full((50,), 1e-41, device=device)}
    plain = log_partition(queries, items, **given)
    assert_stated_error(plain, scores_of(queries.cpu(), items.cpu(), bias=given["bias"].cpu()), temperature)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        flushed = log_partition(queries, items, **given)
    finally:
        torch.set_flush_denormal(False)
    assert_equal_bits(flushed, plain)


def test_what_takes_no_part(machine, device):
    queries, items, nothing = torch.randn(2, 3, 6), torch.randn(40, 6), torch.zeros(40, dtype=torch.bool)
    scores, survivor = scores_of(queries, items), torch.arange(40) == 23
    queries, items = queries.to(device), items.to(device)
    assert log_partition(queries, items, mask=nothing.to(device)).tolist() == [-INF, -INF]
    for mask in (survivor, packed(survivor), survivor.expand(2, 40)):
        assert_stated_error(log_partition(queries, items, mask=mask.to(device)), scores[:, 23:24])
    lists = torch.stack([torch.arange(39, -1, -1), torch.tensor([-1, 0, 0, 39] * 10)]).to(device)
    found = log_partition(queries, items, exclude=lists)
    assert found[0].item() == -INF
    assert_stated_error(found[1:], scores[1:, 1:39])


@pytest.mark.parametrize("shape", [(0, 2, 5, 3), (2, 0, 5, 3), (2, 2, 0, 3), (2, 2, 5, 0), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_empty_sizes_forward_and_backward(machine, device, shape, reduce):
    users, count, rows, r = shape
    queries = torch.ones(users, count, r, device=device, requires_grad=True)
    items, bias = torch.ones(rows, r, device=device, requires_grad=True), torch.zeros(rows, device=device)
    bias.requires_grad_()
    result = log_partition(queries, items, bias=bias, reduce=reduce)
    result.sum().backward()
    assert result.shape == (users,) and (result == -INF).all() == (count == 0 or rows == 0 or users == 0)
    for leaf in (queries, items, bias):
        assert leaf.grad.shape == leaf.shape and not leaf.grad.isnan().any()


@pytest.mark.parametrize("kind", ["removed", "row_scale", "float8"])
def test_tables(machine, device, kind):
    factors, scale, bias = torch.randn(60, 16), torch.rand(60) + 0.5, torch.randn(60)
    factors = factors.to(torch.float8_e4m3fn) if kind == "float8" else factors
    table = ItemTable(factors, row_scale=None if kind == "removed" else scale, bias=bias)
    queries, allowed = torch.randn(9, 2, 16), torch.ones(60, dtype=torch.bool)
    scores = scores_of(queries, table)
    if kind == "removed":
        allowed[[0, 17, 59]] = False
        table.remove((~allowed).nonzero().flatten())
    assert_stated_error(log_partition(queries.to(device), table.to(device)), scores, allowed=allowed)


WRONG = [0.0, -1.0, NAN, INF, -INF, 1e-50, 1e39, 10**400, -(10**400), torch.tensor(0.0), torch.tensor(NAN),
         torch.tensor(1e-50, dtype=torch.float64), torch.tensor(1e39, dtype=torch.float64), torch.ones(1),
         True, "1", None, 1j, torch.tensor(2), torch.tensor(True), [1.0]]  # fmt: skip


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:20])
def test_temperatures_that_are_refused_in_words(value):
    wrong = ValueError if isinstance(value, (int, float)) or torch.is_tensor(value) else TypeError
    wrong = TypeError if value is True or (torch.is_tensor(value) and not value.is_floating_point()) else wrong
    with pytest.raises(wrong, match=r"^temperature: .* wanted, .* came"):
        log_partition(torch.ones(2, 4), torch.ones(3, 4), temperature=value)


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
@pytest.mark.parametrize(("kind", "dtype"), zip(KINDS, HALVES, strict=True))
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
    torch.library.opcheck(op.default, (made["queries"], *table, 0, exists, "logsumexp", *rest))
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
