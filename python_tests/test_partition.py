"""log_partition: the softmax's denominator over all items. Values, bits, gradients, memory."""

import functools
import math

import pytest
import torch
from support import INF, NAN, REDUCTIONS, bits, packed
from test_bits import CASES, case, of_user, on

from urm_kernels import ItemTable, log_partition, score_candidates
from urm_kernels.testing import allowed_rows, forced, make_items, make_queries

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


@pytest.mark.parametrize("temperature", [1.0, 1e-37])
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


WRONG = [0.0, -1.0, NAN, INF, -INF, 1e-50, 1e-39, 1e39, 10**400, -(10**400), torch.tensor(0.0), torch.tensor(NAN),
         torch.tensor(1e-50, dtype=torch.float64), torch.tensor(1e39, dtype=torch.float64), torch.ones(1),
         True, "1", None, 1j, torch.tensor(2), torch.tensor(True), [1.0]]  # fmt: skip


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:20])
def test_temperatures_that_are_refused_in_words(value):
    wrong = ValueError if isinstance(value, (int, float)) or torch.is_tensor(value) else TypeError
    wrong = TypeError if value is True or (torch.is_tensor(value) and not value.is_floating_point()) else wrong
    with pytest.raises(wrong, match=r"^temperature: .* wanted, .* came"):
        log_partition(torch.ones(2, 4), torch.ones(3, 4), temperature=value)
