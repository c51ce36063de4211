"""Codes of packed tables: no bound is below the dot that it stands for, and all machines make the same bits."""

import pytest
import torch
from cuda_bounds import assert_none_is_pruned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import CODES, HALVES, INF, NAN

from urm_kernels import ItemTable
from urm_kernels.backends import canonical, cpu, reference, reference_codes
from urm_kernels.backends import codes as formats
from urm_kernels.backends.cuda import launching
from urm_kernels.backends.table_view import TableView
from urm_kernels.table_codes import room_for
from urm_kernels.testing import make_items, make_queries

QUIET = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
BLOCK = formats.BLOCK
WIDTHS = (1, 2, 3, 5, 16, 31, 64, 96, 100, 128, 257)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def bounds_of(queries, table, of_queries):
    """float32 [B, N] of the scan, or [B, M, N] from every query's own lengths; None where the scan would use none."""
    view = TableView(table.factors, row_scale=table.row_scale, codes=table.codes())
    users, count, _ = queries.shape
    out = torch.full((users, count, len(table)) if of_queries else (users, len(table)), NAN)
    queries = queries.contiguous()
    there = cpu.extension().code_bounds(cpu._queries(queries, None), cpu._table(view), of_queries, out.data_ptr())
    return out if there else None


def dots_of(queries, table):
    """[B, M, N] twice: in float64, and canonical; times the rows' scales."""
    rows = table.factors.float()
    exact, rounded = queries.double() @ rows.double().T, canonical.canonical_dots(queries[:, :, None], rows)
    if table.row_scale is not None:
        scale = table.row_scale.float()
        exact, rounded = exact * scale.double(), rounded * scale
    return exact, rounded.double()


def assert_never_below(queries, table, least_room=None):
    """Both kinds of bounds hold; returns the least room of a query's own bound, as a share of |q| |x|.

    Where the CUDA backend's stand-in is installed, it is its scan that must prune no row at its own score.
    """
    if launching.stand_in(queries.device):
        scores = dots_of(queries, table)[1].amax(1)
        assert_none_is_pruned(queries, table, scores + 0.0, len(table) // BLOCK * BLOCK)
        return INF
    own, scan = (bounds_of(queries, table, of_queries).double() for of_queries in (True, False))
    coded = len(table) // BLOCK * BLOCK
    assert own[..., coded:].eq(INF).all() and scan[..., coded:].eq(INF).all(), "rows behind the last block have none"
    for dots in dots_of(queries, table):
        for bounds, what in ((own, dots), (scan, dots.amax(1))):
            wrong = ~(bounds >= what) & ~(bounds.eq(INF) & what.isnan())
            assert not wrong.any(), f"{int(wrong.sum())} too low, the first at {wrong.nonzero()[0].tolist()}"
    sizes = queries.double().norm(dim=2)[..., None] * table.factors.double().norm(dim=1)
    room = (own - dots_of(queries, table)[0]) / sizes
    room = room[..., :coded][torch.isfinite(room[..., :coded])]
    return float(room.min()) if room.numel() else INF


def stressful_rows(r):
    """One coordinate far out, denormals, rows near 2^-73, opposite giants, zeros, constants, sixty decades within and
    between rows, infinities and NaN, three non-zeros; whole blocks of them and some rows more."""
    random = generator(r)
    rows = torch.randn(96, r, generator=random)
    rows[0:8, r // 3] = torch.tensor([1e6, -1e18, 1e-30, 2.0**59, 2.0**61, 3e38, -1e4, 1e30])
    rows[8:16] *= 1e-40
    rows[16:24] *= 2.0**-73
    rows[24] = 0
    rows[24, 0], rows[24, -1] = 1e30, -1e30
    rows[25:28] = 0
    rows[28:32] = torch.tensor([1.0, -1e-20, 1e20, 2.0**-149])[:, None]
    rows[32:48] *= 10 ** (60 * torch.rand(16, r, generator=random) - 30)
    rows[48:64] *= 10 ** (60 * torch.rand(16, 1, generator=random) - 30)
    for i, value in enumerate((INF, -INF, NAN, -NAN)):
        rows[64 + i, i % r] = value
    sparse = torch.zeros(16, r)
    sparse.scatter_(1, torch.randint(r, (16, 3), generator=random), 1.0)
    rows[68:84] = sparse * torch.randn(16, 1, generator=random)
    return torch.cat([rows, make_items("norms", 37, r, 1)])


def stressful_queries(r):
    """[B, M, r]: four decades in a user, one query twenty times longer that points away, zeros beside others and alone,
    tiny and huge ones, a user of a single element."""
    random = generator(r + 1)
    queries = torch.randn(7, 5, r, generator=random)
    queries[0] *= 10 ** torch.linspace(-2, 2, 5)[:, None]
    queries[1, 3] = -20 * queries[1].mean(0)
    queries[2, 1:] = 0
    queries[3] = 0
    queries[4] *= 2.0**-70
    queries[5] *= 2.0**50
    queries[6, :, 1:] = 0
    return queries


@pytest.mark.parametrize("r", WIDTHS)
@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_no_bound_is_below_its_dot(code_isa, kinds, r):
    assert_never_below(stressful_queries(r), ItemTable(stressful_rows(r)).pack(kinds))


@pytest.mark.parametrize("kinds", CODES, ids="+".join)
@pytest.mark.parametrize("kind", ["iid", "clustered", "decay", "norms", "sparse", "integer", "giant"])
def test_no_bound_is_below_its_dot_on_every_kind_of_data(code_isa, kinds, kind):
    items = make_items(kind, 300, 48, 0)
    queries = make_queries(kind, 3, 17, 48, 1, items)
    assert assert_never_below(queries, ItemTable(items).pack(kinds)) > 0


def unrotated(vectors, codes):
    """float64 [n, r] such that rotating them gives the vectors: the steps of a rotation, backwards."""
    r, p = vectors.shape[1], codes.rotation.shape[1]
    out = vectors.double().clone()
    for step in range(len(codes.rotation) - 1, -1, -1):
        start = 0 if p == r else step * (r * 618 // 1000) % r
        at = (torch.arange(p) + start) % r
        x, apart = out[:, at], 1
        while apart < p:
            first, second = x.unflatten(1, (-1, 2, apart)).unbind(2)
            x, apart = torch.stack([first + second, first - second], 2).flatten(1), 2 * apart
        out[:, at] = x * codes.rotation[step].double() / p**0.5
    return out


@pytest.mark.parametrize("r", WIDTHS)
def test_a_rotation_is_one(r):
    """Lengths and dots stay, and what three elements hold is spread: failure case 32."""
    rows, signs = make_items("sparse", 64, max(r, 3), 0)[:, :r], formats.rotation(r, 5)
    codes = formats.Codes(signs, torch.zeros(2), torch.empty(0))
    rotated = reference_codes.rotate(rows, codes).double()
    assert torch.allclose(rotated @ rotated.T, rows.double() @ rows.double().T, atol=1e-5)
    assert torch.allclose(unrotated(rotated, codes), rows.double(), atol=1e-5)
    if r >= 64:
        spread = rotated.abs().amax(1) / rotated.square().mean(1).sqrt()
        assert spread.max() < 6, "an element of a rotated row is about as large as a normal one's"


@pytest.mark.parametrize("r", [8, 64, 96, 128])
@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_queries_along_what_codes_lost_come_close_and_never_pass(code_isa, kinds, r):
    """Cauchy-Schwarz is an equality for a query along a row's lost part: nothing is left of the slack but roundings."""
    table = ItemTable(make_items("iid", 64, r, 3)).pack(kinds)
    codes = table.codes()
    if codes.fine is not None:
        rows = reference_codes.decode_fine(codes, r, torch.arange(64))
    else:
        rows = reference_codes.decode(codes, r, 0, 2)
    rotated = reference_codes.rotate(table.factors, codes).double()
    lost = unrotated(rotated - rows.scale[:, None] * rows.codes, codes).float()
    lost = lost / lost.norm(dim=1, keepdim=True)
    queries = torch.cat([lost, -lost, lost * 2.0**40])
    room = assert_never_below(queries[:, None], table)
    if code_isa == "cuda":  # its bound is seen by what it prunes alone
        return
    # A query is rounded to 8 bits, which costs its own share; what the bound gives away beyond both is little.
    slack = (rows.lost * rows.scale / table.factors.double().norm(dim=1)).max()
    assert 0 < room < 0.25 * slack + 0.02, f"the least room is {room:.2e}, a code loses {slack:.2e}"


@pytest.mark.parametrize("dtype", [*HALVES, torch.float8_e4m3fn])
@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_narrow_factors_and_scales_of_rows(code_isa, kinds, dtype):
    items = make_items("norms", 96, 40, 0).clamp(-400, 400).to(dtype)
    scale = torch.randn(96, generator=generator(0)) * 10 ** (8 * torch.rand(96, generator=generator(1)) - 4)
    scale[:5] = torch.tensor([0.0, -1.0, 1e-40, 1e35, -1e-20])
    table = ItemTable(items, row_scale=scale).pack(kinds)
    assert_never_below(stressful_queries(40)[:4], table)


@QUIET
@given(data=st.data())
def test_a_hunt_for_a_row_and_a_query_that_beat_the_bound(data):
    r = data.draw(st.sampled_from([1, 2, 7, 8, 24, 64]))
    element = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.integers(-8, 8).map(float)
    rows = data.draw(st.lists(st.lists(element, min_size=r, max_size=r), min_size=1, max_size=4))
    query = data.draw(st.lists(st.lists(element, min_size=r, max_size=r), min_size=1, max_size=3))
    items = torch.tensor(rows).repeat(32, 1)[:32]
    table = ItemTable(items).pack(data.draw(st.sampled_from(CODES)), seed=data.draw(st.integers(0, 3)))
    queries = torch.tensor(query)[None]
    if bounds_of(queries, table, False) is not None:
        assert_never_below(queries, table)
    else:
        assert not queries.double().norm(dim=2).max() < 2.0**59 or queries.abs().max() < 2.0**-90


def test_queries_that_are_too_long_or_no_numbers_have_no_bounds(code_isa):
    table = ItemTable(make_items("iid", 64, 16, 0)).pack()
    for value in (NAN, INF, 1e30):
        queries = torch.ones(1, 2, 16)
        queries[0, 1, 3] = value
        assert bounds_of(queries, table, False) is None


@pytest.mark.parametrize("r", WIDTHS)
@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_codes_have_the_bits_of_the_reference(code_isa, kinds, r):
    rows = stressful_rows(r)
    made = [room_for(formats.rotation(r, 3), len(rows), r, kinds) for _ in range(3)]
    cpu.encode_blocks(rows, None, made[0])
    reference.encode_blocks(rows, None, made[1])
    for part in made[2][2:]:
        if part is not None:
            part.zero_()
    cpu.encode_rows(rows, None, made[2], torch.arange(len(rows)))
    for other in made[1:]:
        assert torch.equal(made[0].blocks, other.blocks)
        assert made[0].fine is None or torch.equal(made[0].fine, other.fine)


@pytest.mark.parametrize("r", [1, 7, 64, 100])
@pytest.mark.parametrize("kinds", CODES[2:], ids="+".join)
def test_what_is_kept_beside_a_code_is_true_of_it(kinds, r):
    rows = stressful_rows(r)
    table = ItemTable(rows).pack(kinds)
    count = len(rows) // BLOCK * BLOCK
    rotated = reference_codes.rotate(rows[:count], table.codes()).double()
    for decoded, kind in zip(
        (
            reference_codes.decode(table.codes(), r, 0, count // BLOCK),
            reference_codes.decode_fine(table.codes(), r, torch.arange(count)),
        ),
        kinds,
        strict=True,
    ):
        most = {"int2": 3, "int4": 7, "int8": 127}[kind]
        assert kind != "int2" or (decoded.codes % 2 == 1).all(), "-3, -1, 1 or 3"
        assert decoded.codes.abs().max() <= most
        anything = decoded.norm.isinf()
        sizes = rows[:count].double().norm(dim=1)
        assert anything[~(sizes < 2.0**60)].all(), "rows that are no numbers, or too long, are marked"
        assert not anything[(sizes > 2.0**-90) & (sizes < 2.0**55)].any(), "and ordinary ones are not"
        lost = (rotated / decoded.scale[:, None] - decoded.codes).norm(dim=1)
        assert (decoded.lost >= lost)[~anything & (decoded.scale > 0)].all()
        assert (decoded.norm >= sizes / decoded.scale)[~anything & (decoded.scale > 0)].all()
        zero = sizes == 0
        assert zero.any()
        # Two bits have no code 0: there a zero row's scale is.
        for part, wanted in zip(decoded, (1, 0, 0, 0) if kind == "int2" else (0, 1, 0, 0), strict=True):
            assert (part[zero] == wanted).all()


@pytest.mark.parametrize("kinds", [("int4",), ("int8",), ("int2", "int4")], ids="+".join)
@pytest.mark.parametrize("value", [0, 255, None])
def test_sums_of_extreme_codes_do_not_saturate(code_isa, kinds, value):
    """maddubs would: 255 x 127 x 2 is above 32767. Scale 1, lengths 0: a bound is the sum, times the query's step."""
    r, count, bits = 128, 64, int(kinds[0][3:])
    table = ItemTable(make_items("iid", count, r, 0)).pack(kinds)
    codes = table.codes()
    side = formats.block_bytes(r, bits) - BLOCK * formats.SIDE_BYTES
    random = torch.randint(0, 256, codes.blocks[:, :side].shape, generator=generator(0)).to(torch.uint8)
    codes.blocks[:, :side] = random if value is None else value
    for part, kept in zip(formats.sides(codes, r), (1.0, 0.0, 0.0), strict=True):
        part.fill_(kept)
    codes.reference.zero_()
    rotated = torch.where(torch.rand(1, 3, r, generator=generator(1)) < 0.5, -127.0, 127.0)
    rotated[0, 0], rotated[0, 1] = 127.0, -127.0
    queries = unrotated(rotated[0], codes).float()[None]
    decoded = reference_codes.decode(codes, r, 0, count // BLOCK)
    wanted = reference_codes.encode_queries(queries, torch.ones(1, 3, dtype=torch.bool), codes)
    sums = (wanted.u @ decoded.codes.T) * wanted.step
    if bits != 2:  # whose single queries are bounded by the fine codes
        assert torch.allclose(bounds_of(queries, table, True).double(), sums, rtol=1e-6, atol=1e-2)
    assert torch.allclose(
        bounds_of(queries, table, False).double(), sums.amax(1), rtol=1e-6, atol=2 * float(wanted.step)
    )
