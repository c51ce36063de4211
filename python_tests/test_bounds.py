"""Bounded scans: no bound is below the score that it stands for, and no result shows that bounds were used."""

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import HALVES, INF, NAN, REDUCTIONS, assert_same_bits, packed

from urm_kernels import score_topk
from urm_kernels.backends import canonical, cpu
from urm_kernels.testing import KINDS, available_backends, forced, make_items, make_queries

QUIET = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
LANES = 16
LONGEST_QUERY, LONGEST_ROW = 2.0**60, 2.0**64
ALTERNATING = torch.tensor([1.0, -1.0]).repeat(4096)


@pytest.fixture
def isa(cheap_isa):
    """An instruction set with a cheap score; the CPU backend bounds every row first within the test."""
    with forced("cpu", cheap_isa, "bounded"):
        yield cheap_isa


def generator(seed):
    return torch.Generator().manual_seed(seed)


def bounds_of(queries, items):
    """float32 [Q, N], the bounds that a scan goes by, for queries [Q, r]; None where it scores every row exactly."""
    queries = queries[None].contiguous()
    out = torch.full((queries.shape[1], len(items)), NAN)
    there = cpu.extension().upper_bounds(cpu._queries(queries, None), cpu.matrix(items), out.data_ptr())
    return out if there else None


def dots_of(queries, rows):
    """[Q, N] twice: in float64, and canonical."""
    return queries.double() @ rows.double().T, canonical.canonical_dots(queries[:, None], rows[None]).double()


def assert_never_below(queries, items, dots=None):
    rows = items[: len(items) // LANES * LANES]
    bounds, no_bounds = bounds_of(queries, items).double().tensor_split([len(rows)], dim=1)
    assert no_bounds.eq(INF).all(), "rows past the last tile have no bound"
    lengths = rows.double().norm(dim=1)
    assert bounds[:, lengths < LONGEST_ROW / 2].isfinite().all(), "an ordinary row has a bound"
    assert bounds[:, ~(lengths < LONGEST_ROW * 1.01)].eq(INF).all(), "a row too long or not finite has none"
    for dot in dots or dots_of(queries, rows):
        wrong = ~(bounds >= dot) & ~(bounds.eq(INF) & dot.isnan())
        short = ((dot - bounds) / queries.double().norm(dim=1)[:, None] / lengths)[wrong]
        assert not len(short), f"{len(short)} bounds are too low, the first by {short[0]} |q| |x|: {wrong.nonzero()[0]}"


def off_bfloat16(r):
    """Constant rows just off numbers that cutting or rounding to bfloat16 moves most; 1 + 2^-8 lengthens queries."""
    steps = torch.tensor([0.0, 1, 64, 127], dtype=torch.float64) / 128
    middles = 1 + steps + 2.0**-8
    values = torch.cat([steps + 1, steps + 1 + 2.0**-7, middles, middles / (1 + 2.0**-8), 1 + torch.arange(13) / 2048])
    below, above = (values.float().nextafter(torch.tensor(end)) for end in (0.0, 9.0))
    return torch.cat([values.float(), below, above])[:, None].repeat(1, r)


def off_codes(r):
    """Rows of one largest element, 127, and others about halfway between the integers that become their codes."""
    n = torch.tensor([0.0, 64.0, 126.0, NAN])[:, None].repeat(1, r)
    n[3] = torch.randint(0, 126, (r,), generator=generator(r))
    rows = torch.cat([n + part for part in (0.4999, 0.5, 0.5001)])
    rows[:, r // 2] = 127
    return torch.cat([rows, rows.roll(r // 2, 1)[::4] * 0.37, rows[::4] * ALTERNATING[:r]])


def magnitudes(r):
    """Sixty decades within rows and between them, single coordinates far out, opposite giants, denormals, zeros."""
    rows = torch.randn(24, r, generator=generator(r))
    rows[:6] *= 10 ** (48 * torch.rand(6, r, generator=generator(r + 1)) - 30)
    rows[6:9, r // 3] = torch.tensor([1e6, -1e18, 1e-30])
    rows[9:14] = 1.0
    rows[9:12, 0] = torch.tensor([1e30, 1e17, -3e6])
    rows[9:12, -1] = torch.tensor([-1e30, -1e17, 3e6])
    rows[13] *= ALTERNATING[:r]
    rows[14:18] *= torch.tensor([1e-38, 1e-40, 1e-45, 0.0])[:, None]
    return torch.cat([rows, make_items("iid", 7, r, 2) * 10.0 ** torch.tensor([-30, -20, -8, 0, 5, 18, 30])[:, None]])


@functools.cache
def hard_case(r, dtype):
    """Queries of both signs, none longer than a bound can take; rows, the last tile not whole; their dots."""
    near = torch.cat([off_bfloat16(r), off_codes(r)])
    queries = torch.cat([near, -near, magnitudes(r)])
    too_long = queries.double().norm(dim=1, keepdim=True) > 0.9 * LONGEST_QUERY
    queries = queries.where(~too_long, queries * 2.0**-60)
    kinds = [make_items(kind, 6, r, 1) for kind in KINDS if kind not in ("smollm2", "minilm")]
    rows = torch.cat([*kinds, near, magnitudes(r)]).to(dtype)
    whole = len(rows) // LANES * LANES - LANES
    return queries, rows[: whole + 11], dots_of(queries, rows[:whole])


@pytest.mark.parametrize("r", [1, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 128, 200, 1000])
def test_a_bound_is_never_below_the_dot(isa, r):
    for dtype in HALVES if r in (1, 32, 33, 64, 96, 200) else (torch.float32,):
        assert_never_below(*hard_case(r, dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("r", [15, 64])
def test_a_bound_of_rows_that_lie_apart_is_never_below_the_dot(isa, dtype, r):
    queries, rows, _ = hard_case(r, dtype)
    queries, rows = queries[::3], rows[-53:]
    apart = torch.full((53, 3 * r + 7), NAN, dtype=dtype)
    for view in (apart[:, 5 : 5 + r], apart[:, 2 : 2 + 3 * r : 3], apart.flatten()[: 53 * r].view(r, 53).T):
        assert_never_below(queries, view.copy_(rows))
    assert_never_below(queries, rows[0].expand(40, r))
    assert_never_below(queries, rows[:40, :1].expand(40, r))


@pytest.mark.parametrize("r", [5, 64])
def test_a_bound_is_never_below_the_dot_at_either_end_of_the_range(isa, r):
    shapes = torch.cat([off_bfloat16(r)[::2], off_codes(r)[::2], make_items("iid", 9, r, 1)])
    shapes /= 2 ** (1 + shapes.norm(dim=1, keepdim=True).log2().ceil())  # a length from 1/4 to 1/2
    for query_exponent in (-149, -126, -70, -20, 0, 60):
        queries = torch.cat([shapes, -shapes]) * 2.0**query_exponent
        for exponent in (-149, -140, -126, -76, -74, -73, -72, -65, -60, -55, -50, 0, 40, 64, 65, 66, 120):
            assert_never_below(queries, shapes[:48] * 2.0 ** (exponent // 2) * 2.0 ** -(-exponent // 2))


def test_a_bound_covers_the_rounding_of_the_longest_sums(isa):
    # 16 sums start large; each of 511 more terms is lost in the canonical sum, or makes it a step of float32 larger.
    terms = 2.0**-11 * torch.tensor([-0.26, -0.49, 0.51, 0.99])[:, None].expand(4, 8192 - LANES)
    starts = torch.tensor([1.0, (1 + 2.0**-8) / (1 + 2.0**-8), 1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-23])
    starts = torch.cat([starts, starts.nextafter(torch.tensor(0.0))])
    queries = torch.cat([torch.cat([s * terms[:, :LANES].sign(), terms], 1) for s in starts])
    rows = torch.full((2, 8192), 2.0**-12)
    rows[:, :LANES] = torch.tensor([[1.0], [2 - 2.0**-23]])
    for dtype in HALVES:
        dots = dots_of(queries, rows.to(dtype))
        assert_never_below(queries, rows.to(dtype).repeat(8, 1), [dot.repeat(1, 8) for dot in dots])
    assert_never_below(off_codes(8192)[1:3], off_codes(8192)[:16])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("place", [0, 15, 16, 31, 63, 64])
def test_rows_that_are_not_finite_have_no_bound_and_disturb_no_other(isa, dtype, place):
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    wild = torch.tensor([INF, -INF, NAN, -NAN, INF, -INF, NAN], dtype=dtype).view(integer)
    wild[4:] += torch.tensor([1, 1, 0x3F], dtype=integer)  # NaN by the lowest bit only, and by most
    for width in (65, 64) if place < 64 else (65,):
        queries, rows = make_items("iid", 20, width, 1), make_items("iid", 32, width, 2).to(dtype)
        wanted = bounds_of(queries, rows)
        wanted[:, 1:21:3] = INF
        rows.view(integer)[1:21:3, place] = wild
        assert torch.equal(bounds_of(queries, rows), wanted)


def test_bounds_end_at_a_query_length_of_two_to_the_60th_and_at_8192_elements(isa):
    for value in (0.999 * 2.0**59, 1.001 * 2.0**59, 1e30, 3e38, INF, NAN):
        queries = torch.tensor([1.0, value, 1.0])[:, None].repeat(1, 4)
        assert (bounds_of(queries, torch.ones(16, 4)) is not None) == (value < 2.0**59)
    assert bounds_of(torch.ones(1, 8193), torch.ones(16, 8193)) is None


@st.composite
def patterns(draw, count, r):
    """float32 [count, r] of random bits; exponents of a row lie in a drawn window, anywhere in the last few rows."""
    random = generator(draw(st.integers(0, 2**32 - 1)))
    exponents = torch.randint(0, 187, (count, 1), generator=random)
    exponents = exponents + torch.randint(0, draw(st.sampled_from([1, 2, 8, 64])), (count, r), generator=random)
    exponents[count - draw(st.integers(0, 3)) :] = torch.randint(0, 256, (r,), generator=random)
    mantissas = torch.randint(0, 1 << 23, (count, r), generator=random)
    mantissas |= draw(st.sampled_from([0, 0x7FFF, 0xFFFF, 0x7FFFFF]))
    signs = torch.randint(0, 1 + draw(st.integers(0, 1)), (count, r), generator=random)
    return ((exponents.clamp(max=255) << 23 | mantissas) - (signs << 31)).to(torch.int32).view(torch.float32)


@QUIET
@given(data=st.data(), r=st.sampled_from([1, 3, 16, 17, 32, 50, 64, 100]), dtype=st.sampled_from(HALVES))
def test_a_bound_of_random_bits_is_never_below_the_dot(isa, data, r, dtype):
    queries, rows = data.draw(patterns(20, r)).nan_to_num(1.0, 1.0, 1.0), data.draw(patterns(37, r)).to(dtype)
    queries[queries.double().norm(dim=1) > 0.9 * LONGEST_QUERY] *= 2.0**-80
    assert_never_below(queries, rows)


@pytest.mark.parametrize("dtype", HALVES)
def test_bounds_of_ordinary_data_are_close(isa, dtype):
    limit = 0.033 if isa == "avx512_vnni" else 0.0053 if dtype == torch.bfloat16 else 0.0103  # 10 % above measured ones
    for r in (64, 128):
        queries, rows = make_items("iid", 64, r, 5), make_items("iid", 512, r, 6).to(dtype)
        sizes = queries.double().norm(dim=1)[:, None] * rows.double().norm(dim=1)
        assert ((bounds_of(queries, rows) - queries.double() @ rows.double().T) / sizes).max() < limit


def assert_nothing_shows(queries, items, k, **options):
    """The scan that is forced outside, on several numbers of threads, against exact scores of every row."""
    with forced("cpu", "avx512", "exact"):
        exact = score_topk(queries, items, k, **options)
    for threads in ("1", "2", "7"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("URM_NUM_THREADS", threads)
            assert_same_bits(score_topk(queries, items, k, **options), exact)
    return exact


@functools.cache
def catalogue(kind, r):
    """Queries [3, 5, r] and rows [20,011, r]."""
    items = make_items("equal" if kind in ("near ties", "stretches") else kind, 20011, r, 4)
    queries = make_queries("iid", 3, 5, r, 4, items)
    if kind in ("near ties", "stretches"):
        items.view(torch.int32).bitwise_xor_(torch.randint(0, 2, items.shape, generator=generator(r)).int())
    if kind == "stretches":  # of rows that bounds rule out, and of rows that they cannot
        items[torch.arange(len(items)) // 1500 % 2 == 0] *= 0.01
    if kind in ("sorted", "reversed"):  # for every query
        queries = make_queries(kind, 1, 1, r, 4, items) * (1 + torch.rand(3, 5, 1, generator=generator(3)))
    return queries, items


@pytest.mark.parametrize("scan", ["bounded", "auto"])
@pytest.mark.parametrize(("k", "r"), [(1, 32), (10, 24), (1000, 32)])
@pytest.mark.parametrize("kind", ["iid", "equal", "near ties", "stretches", "sorted", "reversed"])
def test_hard_catalogues_give_the_bits_of_an_exact_scan(isa, kind, k, r, scan):
    with forced("cpu", isa, scan):
        assert_nothing_shows(*catalogue(kind, r), k)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(("users", "count"), [(1, 1), (1, 200), (13, 9), (70, 1), (2, 64), (3, 65), (600, 2)])
def test_few_and_many_users_give_the_bits_of_an_exact_scan(isa, users, count, reduce):
    items = torch.cat([make_items("clustered", 1400, 24, 1), catalogue("near ties", 24)[1][:107]])
    queries = make_queries("norms", users, count, 24, 2, items)
    assert_nothing_shows(queries, items, 20, reduce=reduce)
    exists = torch.rand(users, count) < torch.rand(users, 1)
    exists[users // 2] = users == 1
    queries[~exists] = NAN
    assert_nothing_shows(queries, items, 20, reduce=reduce, query_mask=exists)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", HALVES)
def test_bias_and_filters_give_the_bits_of_an_exact_scan(isa, dtype, reduce):
    items, queries, bias = make_items("decay", 2100, 48, 7).to(dtype), torch.randn(4, 6, 48), torch.randn(2100)
    bias[torch.randint(0, 2100, (60,))] = torch.tensor([NAN, INF, -INF, 3e38, -3e38, 1e5]).repeat(10)
    mask = torch.rand(4, 2100) < 0.6
    filters = {"reduce": reduce, "exclude": torch.randint(-1, 2100, (4, 50))}
    assert_nothing_shows(queries, items, 30, reduce=reduce, bias=bias.to(dtype))
    assert_nothing_shows(queries, items, 2100, bias=bias.to(dtype), mask=mask[0], **filters)
    assert_nothing_shows(queries, items, 30, mask=packed(mask), **filters)


@pytest.mark.parametrize("bias", [-INF, INF, 3e38, -3e38, 1e10])
def test_a_bias_that_swallows_every_score_leaves_ties_by_row(isa, bias):
    queries, items = catalogue("iid", 32)
    for k in (10, 700):
        result = assert_nothing_shows(queries, items[:9000], k, bias=torch.full((9000,), bias))
        assert result.ids.tolist() == [list(range(k))] * 3


def test_logsumexp_of_many_equal_dots_beats_a_larger_dot(isa):
    items = torch.zeros(3000, 40)
    items[torch.arange(3000), torch.arange(3000) % 40] = 2.5 + 0.1 * torch.rand(3000)
    items[2900:] = 1.0  # + log 40 = 4.7, the others log(exp(2.6) + 39) = 4.0
    result = assert_nothing_shows(torch.eye(40)[None], items, 100, reduce="logsumexp")
    assert result.ids.tolist() == [list(range(2900, 3000))]


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("value", [NAN, INF, 1e30, 3e38, 0.0, 1e-42])
def test_strange_users_and_rows_give_the_bits_of_an_exact_scan(isa, reduce, value):
    items, queries = make_items("iid", 1300, 33, 3), torch.randn(5, 4, 33)
    items[5::11, 17] = value
    items[7::13] *= 1e25
    items[9::13, 4] *= -1e38
    for strange in ([], (3, 1), slice(None)):
        queries[strange] = value
        for k in (25, 1300):
            assert_nothing_shows(queries, items, k, reduce=reduce)


@QUIET
@given(data=st.data(), r=st.sampled_from([1, 16, 17, 32, 50]), dtype=st.sampled_from(HALVES))
def test_random_bits_give_the_bits_of_an_exact_scan(isa, data, r, dtype):
    queries, rows = data.draw(patterns(12, r)), data.draw(patterns(200, r)).to(dtype)
    if data.draw(st.booleans()):
        queries = queries.nan_to_num(1.0, 1.0, 1.0).clamp(-(2.0**50), 2.0**50)
    reduce, k = data.draw(st.sampled_from(REDUCTIONS)), data.draw(st.sampled_from([1, 20, 200]))
    assert_nothing_shows(queries.view(2, 6, r), rows, k, reduce=reduce)


def test_ways_to_scan_that_do_not_exist_or_are_not_possible_are_refused_in_words():
    refused = [("portable", scan, f"one of auto, exact, bounded is wanted, '{scan}' came$") for scan in ("b", " auto")]
    plain = [isa for _, isa in available_backends() if isa in ("portable", "avx2", "avx512")]
    refused += [(isa, "bounded", f"bounded is not possible with .* {isa}, which has no cheap score") for isa in plain]
    for isa, scan, words in refused:
        with forced("cpu", isa, scan), pytest.raises(ValueError, match=f"^URM_CPU_SCAN: {words}"):
            score_topk(torch.ones(4), torch.ones(3, 4), 1)
