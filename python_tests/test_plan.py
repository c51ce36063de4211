"""Sizes of a GPU search: what is guessed holds, launches fit the grid, workspaces stay small, at any N, B and k."""

import itertools
import math

import pytest
import torch

from urm_kernels.backends.triton import plan
from urm_kernels.testing import make_items, make_queries

SIZES = list(itertools.product((1, 8, 64, 1024, 70_000), (8193, 10**6, 10**7, 10**8, 2**32 - 1), (1, 10, 1000, 10_000)))


@pytest.mark.parametrize(("users", "rows", "wanted"), SIZES)
def test_the_sample_covers_the_table_and_the_rank_is_in_it(users, rows, wanted):
    made = plan.make_plan(users, rows, wanted)
    assert 1 <= made.group <= min(users, plan.GROUP)
    if made.dense:
        assert rows <= max(plan.DENSE_ROWS, 4 * wanted) and made.capacity == rows
        return
    assert (made.sample - 1) * made.step < rows <= made.sample * made.step
    assert 1 <= made.rank <= made.sample // made.gathered and made.gathered in (1, 2, 4, 8, 16, 32, 64)
    assert wanted < made.capacity <= rows


@pytest.mark.parametrize(("users", "rows", "wanted"), SIZES)
def test_a_threshold_lets_enough_through_and_not_too_much(users, rows, wanted):
    made = plan.make_plan(users, rows, wanted)
    if made.dense:
        return
    share = wanted * made.sample / rows
    # Fewer than `wanted` pass where more than rank - 1 of them were sampled: four standard deviations away.
    assert made.rank - 1 >= share + 4 * math.sqrt(share)
    expected = made.rank * rows / made.sample
    assert expected <= 64 * wanted + rows / 64 and made.capacity >= min(rows, 2 * expected + 4096)


def test_workspaces_at_a_hundred_million_rows():
    rows, r = 10**8, 128
    table = 2 * rows * r
    for users, wanted in ((1, 1000), (1024, 10), (1024, 1000), (70_000, 1000)):
        made = plan.make_plan(users, rows, wanted)
        maxima = 4 * made.group * -(-made.sample // made.gathered)
        assert maxima < 0.01 * table
        assert 8 * made.group * made.capacity < 0.01 * table + 80 * made.group * wanted


@pytest.mark.parametrize("capability", [0, 80, 90, 100])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("r_pad", [16, 64, 128, 256, 512, 2048])
@pytest.mark.parametrize(
    ("users", "m_pad"), [(1, 1), (1, 8), (1, 128), (1, 1024), (8, 16), (64, 1), (1024, 1), (500, 4)]
)
@pytest.mark.parametrize(
    "options", [(), ("own_masks",), ("scaled",), ("log_sum_exp",), ("own_masks", "scaled", "log_sum_exp")], ids=str
)
def test_tiles_suit_the_tensor_core(users, m_pad, r_pad, itemsize, capability, options):
    tile = plan.choose_tile(users * m_pad, m_pad, r_pad, itemsize, capability, **dict.fromkeys(options, True))
    sizes = (tile.block_n, tile.block_c, tile.block_r)
    assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
    assert tile.block_r * itemsize <= 512 and r_pad % tile.block_r == 0
    # A block holds all columns, or is a wide one, but where something else takes the registers.
    crowded = options or 256 < r_pad * itemsize <= 512
    assert tile.block_c <= 128 and (users * m_pad <= tile.block_c or tile.block_c >= 64 or crowded)
    if "own_masks" in options:
        assert tile.block_c <= 16 * m_pad
    assert not tile.swap or m_pad == 1  # a maximum over queries would be one across threads


@pytest.mark.parametrize("most_sums", [256, 512])
@pytest.mark.parametrize("count", [1, 3, 8, 16, 200])
@pytest.mark.parametrize("users", [1, 2, 7, 1024])
def test_blocks_of_canonical_dots(users, count, most_sums):
    tile = plan.canonical_tile(users, count, most_sums)
    assert all(size & (size - 1) == 0 for size in tile) and tile.rows >= 16
    of_user = tile.columns // tile.users
    assert tile.columns <= 16 and of_user <= plan.padded(count) and tile.users <= plan.padded(users)
    assert tile.rows * tile.columns <= 512 and tile.rows * tile.users <= most_sums


def test_padding():
    assert [plan.padded(n) for n in (0, 1, 2, 3, 128, 129)] == [1, 1, 2, 4, 128, 256]
    assert plan.padded(3, 16) == 16


@pytest.mark.parametrize("r", [1, 128, 4096])
def test_the_stated_error_covers_a_rounding_of_every_step(r):
    # One unit in the last place for each of r additions, in any order, and of the canonical dot's r / 16 + 4.
    assert plan.relative_error(torch.bfloat16, r) >= (r + r / 16 + 4) * 2**-24
    assert plan.relative_error(torch.float32, r) >= 2**-10


@pytest.mark.parametrize("kind", ["iid", "decay"])
def test_few_of_many_queries_are_left(kind):
    # What winners.py goes by, for the predictions in docs/gpu.md: 128 queries, 64 at a time, blocks of 64 rows.
    items = make_items(kind, 6400, 128, 0).bfloat16()
    queries = make_queries(kind, 1, 128, 128, 1, items)[0]
    rounded = queries.bfloat16().float()
    error = plan.relative_error(torch.bfloat16, 128)
    slack = (queries - rounded).norm(dim=1).max() + error * rounded.norm(dim=1).max()
    cheap = items.float() @ rounded.T
    limit = cheap.amax(1) - 2 * 1.003 * slack * items.float().norm(dim=1)
    left = cheap >= limit[:, None]
    assert 1.0 < left.sum(1).float().mean() < 1.2
    rounds = left.view(100, 64, 2, 64).sum(3).amax(1).float().sum(1).mean()
    assert 3 < rounds < 4.5
