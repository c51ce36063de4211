"""Sizes of a search: how much is sampled, how many survivors there is room for, which tiles. Pure arithmetic."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

DENSE_ROWS = 8192  # below this many rows everything is scored at once: a scan has nothing to save
SAMPLE_BYTES = 1 << 26  # of sampled scores held at a time
MAX_SAMPLE = 1 << 18
GROUP = 1024  # users of one scan


class Plan(NamedTuple):
    """group: users of one scan; dense: score every row canonically instead of scanning.

    sample_step, sample_rows, rank: the threshold guessed is the rank-th best of every sample_step-th row.
    sample_users: users whose samples are held at a time. capacity: survivors there is room for, a user.
    """

    group: int
    dense: bool
    sample_step: int
    sample_rows: int
    sample_users: int
    rank: int
    capacity: int


class Tile(NamedTuple):
    """One configuration of the scan; block_c counts columns (queries), per_sm programs a multiprocessor."""

    block_n: int
    block_c: int
    block_r: int
    warps: int
    stages: int
    per_sm: int
    swap: bool = False


def make_plan(users: int, rows: int, wanted: int) -> Plan:
    """`wanted` results a user, those that `exclude` may take away counted in.

    The rank is 4.5 standard deviations above the k S / N of the best rows that a sample of S holds, plus six for small
    counts: one user in 100,000 needs the second way. Room for survivors is twice what that rank lets through.
    """
    group = min(users, GROUP)
    if rows <= max(DENSE_ROWS, 4 * wanted):
        return Plan(min(group, max(1, (1 << 27) // max(rows, 1))), True, 1, 0, 0, 0, rows)
    most = MAX_SAMPLE if group <= 64 else MAX_SAMPLE // 2
    step = max(rows // most, min(64, rows // 2048), 1)
    sample = -(-rows // step)
    share = wanted * sample / rows
    rank = min(math.ceil(share + 4.5 * math.sqrt(share) + 6), sample)
    capacity = min(rows, 2 * math.ceil(rank * rows / sample) + 4096)
    sample_users = max(1, min(group, SAMPLE_BYTES // 4 // sample))
    return Plan(group, False, step, sample, sample_users, rank, capacity)


def padded(size: int, least: int = 1) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def choose_tile(columns: int, m_pad: int, r_pad: int, itemsize: int) -> Tile:
    """The scan's tile for B * m_pad columns of r_pad elements; figures in docs/design.md."""
    stages = 3 if r_pad * itemsize <= 256 else 2
    block_r = min(r_pad, 512 // itemsize)
    if columns <= 32:
        return Tile(64, padded(columns, 16), block_r, 4, stages, 4)
    swap = m_pad == 1
    if columns <= 128:
        return Tile(64, padded(columns), block_r, 4, stages, 3, swap)
    return Tile(128, 64 if swap else 128, block_r, 8, 3, 2, swap)


def relative_error(dtype: torch.dtype, r: int) -> float:
    """Of a product on the tensor cores and of the canonical dot, as a share of |rounded q| |v|; docs/design.md."""
    cut = 2**-10 if dtype == torch.float32 else 0.0  # tf32: the row's elements are cut to ten bits
    return cut + (r + 16) * 2**-22 + (r / 16 + 4) * 2**-24 + 2**-21
