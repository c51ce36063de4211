"""Attacks on the bounds of codes: scales of rows, the widest sums, constants that no packing made, roundings at halves.

test_codes.py has the inequality on ordinary and on stressful data; here is what was built to break it.
"""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import CODES, INF, NAN, assert_same_bits
from test_codes import assert_never_below, bounds_of, generator, unrotated

from urm_kernels import ItemTable, score_topk
from urm_kernels.backends import codes as formats
from urm_kernels.backends import cpu, reference, reference_codes
from urm_kernels.table_codes import room_for
from urm_kernels.testing import forced, make_items

SCALED = {  # factors, scale of rows, queries: powers of two
    "the scaled row vanishes, its dots do not": (-100, -60, 56),
    "some elements of the scaled row vanish": (-60, -80, 40),
    "dots overflow before they are scaled": (100, -100, 33),
    "dots overflow by their sum alone": (70, -70, 56),
    "dots underflow before they are scaled": (-74, 100, -75),
    "dots underflow to nothing, the scaled row is one": (-80, 80, -85),
    "a denormal scale": (0, -149, 56),
    "the largest scale": (-60, 127, -60),
    "nothing extreme": (3, -5, 2),
}


def hunted(examples):
    return settings(max_examples=examples, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("r", [1, 8, 33])
@pytest.mark.parametrize("case", SCALED)
def test_scales_of_rows_that_hide_what_the_dots_did(code_isa, case, r):
    """The dot is formed with the row as it lies and scaled afterwards; codes are of the scaled row."""
    row, scale, query = (2.0**exponent for exponent in SCALED[case])
    for turn, kinds in enumerate(CODES):
        sign = 1 - turn % 2 * 2
        items = make_items("iid", 64, r, 0) * row
        scales = torch.full((64,), sign * scale)
        scales[::9] = 0
        table = ItemTable(items, row_scale=scales).pack(kinds)
        assert_never_below(torch.randn(2, 3, r, generator=generator(r)) * query, table)


def test_scales_of_float8_rows_that_hide_what_the_dots_did(code_isa):
    items = torch.full((64, 8), 2.0**-9).to(torch.float8_e4m3fn)
    items[32:] = torch.tensor(448.0).to(torch.float8_e4m3fn)
    for scale in (2.0**-149, 2.0**-141, 2.0**-130, 2.0**118, 2.0**127):
        for query in (2.0**56, 2.0**-91):
            table = ItemTable(items, row_scale=torch.full((64,), scale)).pack(("int8",))
            assert_never_below(torch.full((1, 1, 8), query), table)


def test_a_row_whose_scaled_codes_vanish_is_found():
    """The same as a whole call: one row in 5000, the best by far, is zero once it is scaled."""
    items, scale = torch.full((5000, 8), -1e-30), torch.full((5000,), 1e-20)
    items[77] = 1e-30
    queries = torch.full((1, 1, 8), 1e17)
    table = ItemTable(items, row_scale=scale)
    wanted = score_topk(queries, table, 3)
    assert wanted.ids[0, 0] == 77 and wanted.scores[0, 0] > 0
    with forced("cpu", scan="bounded"):
        assert_same_bits(score_topk(queries, table.pack(("int8",)), 3), wanted)


@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_codes_of_scaled_rows_have_the_bits_of_the_reference(code_isa, kinds):
    rows = torch.cat([make_items("iid", 32, 9, 0) * 2.0**e for e in (-140, -100, -21, -19, 0, 49, 51, 100)])
    scale = 2.0 ** torch.tensor([-149.0, -120, -60, -1, 0, 1, 60, 120])[torch.arange(len(rows)) % 8]
    scale[::11], scale[::13], scale[::31] = 0, -scale[::13], NAN
    made = [room_for(formats.rotation(9, 3), len(rows), 9, kinds) for _ in range(2)]
    cpu.encode_blocks(rows, scale, made[0])
    reference.encode_blocks(rows, scale, made[1])
    assert torch.equal(made[0].blocks, made[1].blocks)
    assert made[0].fine is None or torch.equal(made[0].fine, made[1].fine)


@hunted(60)
@given(data=st.data())
def test_a_hunt_with_scales_of_rows(code_isa, data):
    r = data.draw(st.sampled_from([1, 2, 5, 16]))
    exponent = st.integers(-149, 120)
    rows = make_items("iid", 32, r, data.draw(st.integers(0, 9))) * 2.0 ** data.draw(exponent)
    scale = torch.randn(32, generator=generator(0)) * 2.0 ** data.draw(exponent)
    queries = torch.randn(1, 2, r, generator=generator(1)) * 2.0 ** data.draw(st.integers(-100, 55))
    table = ItemTable(rows, row_scale=scale).pack(data.draw(st.sampled_from(CODES)))
    if bounds_of(queries, table, False) is not None:
        assert_never_below(queries, table)


@pytest.mark.parametrize("reference", [(NAN, NAN), (-1.0, INF), (1e38, 1e38), (0.0, 1e6)], ids=str)
@pytest.mark.parametrize("r", [1, 96, 8192])
def test_constants_that_a_file_may_bring_are_as_right_as_any(code_isa, r, reference):
    """r = 8192: sums and slack of 2^27, which float32 rounds; a longer integer would be needed above."""
    for kinds in (CODES[0], CODES[1], CODES[3]):
        table = ItemTable(torch.zeros(32, r)).pack(kinds)
        signs = torch.where(torch.rand(32, r, generator=generator(r)) < 0.5, -1.0, 1.0)
        signs[0], signs[1] = 1.0, -1.0
        table.update(torch.arange(32), unrotated(signs, table.codes()).float())
        table.code_reference.copy_(torch.tensor(reference))
        assert_never_below(torch.stack([table.factors[:6], -table.factors[:6]]), table)


@pytest.mark.parametrize("r", [4, 24, 64, 257])
@pytest.mark.parametrize("kinds", CODES, ids="+".join)
def test_rows_and_queries_halfway_between_codes(code_isa, kinds, r):
    """Built by the rotation's inverse: one element is the largest code, the others lie about halfway."""
    table = ItemTable(torch.zeros(96, r)).pack(kinds)
    most = {"int2": 3, "int4": 7, "int8": 127}[kinds[0]]
    halves = torch.randint(-most, most, (96, r), generator=generator(r)) + 0.5
    halves[32:64] += torch.tensor([1e-6, -1e-6, 3e-5, -3e-5]).repeat(8)[:, None]
    halves[64:] = torch.where(halves[64:] > 0, 0.5, -0.5)
    halves[:, r // 2] = most
    table.update(torch.arange(96), unrotated(halves, table.codes()).float())
    queries = torch.randint(-127, 127, (12, r), generator=generator(r + 1)) + 0.5
    queries[:, r // 3] = 127
    queries = unrotated(queries, table.codes()).float()
    asked = torch.cat([queries, table.factors[:12], -table.factors[40:52], table.factors[64:76]])
    assert_never_below(asked.view(4, 12, r), table)


@pytest.mark.parametrize("r", [7, 64, 100])
def test_queries_along_what_the_query_itself_lost(code_isa, r):
    """The other half of the slack: rows along what a query's own rounding lost, so that f n is used up."""
    table = ItemTable(torch.zeros(64, r)).pack(("int8",))
    queries = torch.randn(1, 8, r, generator=generator(r))
    made = reference_codes.encode_queries(queries, torch.ones(1, 8, dtype=torch.bool), table.codes())
    rotated = reference_codes.rotate(queries, table.codes()).double()
    lost = unrotated((rotated - made.u * made.step[:, None, None])[0], table.codes()).float()
    rows = torch.cat([lost, -lost, lost * 1e6, lost * 1e-25, lost + lost.roll(1, 0), queries[0], -queries[0], lost * 3])
    table.update(torch.arange(64), rows)
    assert_never_below(queries, table)


@hunted(40)
@example(seed=0, r=100, spread=0)
@given(seed=st.integers(0, 2**20), r=st.integers(1, 300), spread=st.integers(0, 37))
def test_a_hunt_over_widths_and_magnitudes(code_isa, seed, r, spread):
    """Every row and query of random size and shape, a tenth of the rows near a query or its negative."""
    random = generator(seed)
    queries = torch.randn(2, 4, r, generator=random) * 10 ** (4 * torch.rand(2, 4, 1, generator=random) - 2)
    rows = torch.randn(64, r, generator=random) * 10 ** (spread * (2 * torch.rand(64, 1, generator=random) - 1))
    rows[::10] = queries[0, 0] * 10 ** (spread * (torch.rand(7, 1, generator=random) - 0.5))
    rows[5::20] *= torch.rand(3, r, generator=random) < 3 / r
    assert_never_below(queries, ItemTable(rows).pack(CODES[seed % len(CODES)], seed=seed))


@pytest.mark.slow
@hunted(3000)
@given(seed=st.integers(0, 2**31), r=st.integers(1, 300), spread=st.sampled_from([0, 0, 1, 5, 20, 37]))
def test_a_long_hunt(seed, r, spread):
    test_a_hunt_over_widths_and_magnitudes.hypothesis.inner_test(None, seed, r, spread)


@pytest.mark.parametrize("kinds", [("int4",), ("int8",), ("int2", "int4")], ids="+".join)
@pytest.mark.parametrize("count", [1, 3, 7, 8, 15, 16, 17, 40])
def test_sums_of_any_number_of_queries_are_those_of_plain_integers(code_isa, kinds, count):
    """Queries are taken 8, 4, 2 and 1 at a time, with 1, 2 or 4 blocks: every remainder, on codes of any byte."""
    r, bits = 37, int(kinds[0][3:])
    for blocks in (1, 2, 3, 5, 9):
        table = ItemTable(torch.zeros(32 * blocks, r)).pack(kinds)
        codes = table.codes()
        side = formats.block_bytes(r, bits) - formats.BLOCK * formats.SIDE_BYTES
        codes.blocks[:, :side] = torch.randint(0, 256, (blocks, side), generator=generator(blocks)).to(torch.uint8)
        for part, kept in zip(formats.sides(codes, r), (1.0, 0.0, 0.0), strict=True):
            part.fill_(kept)
        whole = torch.randint(-127, 128, (1, count, r), generator=generator(count)).double()
        whole[..., 0] = 127
        queries = unrotated(whole[0], codes).float()[None]
        made = reference_codes.encode_queries(queries, torch.ones(1, count, dtype=torch.bool), codes)
        assert (made.u == whole).all()
        decoded = reference_codes.decode(codes, r, 0, blocks)
        # Bytes behind the last element belong to no element, and meet zeros of the query.
        wanted = whole @ decoded.codes.T
        if bits != 2:  # whose single queries are bounded by the fine codes
            got = (bounds_of(queries, table, True) / made.step.float()).double()
            assert (got - wanted).abs().max() < 1
        assert (bounds_of(queries, table, False) / made.step.float() - wanted.amax(1)).abs().max() < 3
