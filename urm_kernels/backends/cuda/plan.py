"""Sizes of a search of a packed table. Pure arithmetic."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..codes import BLOCK, quads

DENSE_ROWS = 8192  # below this many rows everything is scored: a scan has nothing to save
DENSE_KEYS = 1 << 26  # of a dense call held at a time
GROUP = 256  # users of one scan
GROUP_ELEMENTS = 1 << 23  # of their queries
SORTED = 4096  # results that the selection sorts itself
THREADS = 128
WARPS = THREADS // 32
SELECT_SHARED = 256 * 4 + 16  # bytes, kSelectShared of csrc/cuda/select.h
SCAN_BLOCKS = 2  # of a multiprocessor, as kScanBlocks of csrc/cuda/scan_codes.h
FEWEST_SAMPLED, MOST_SAMPLED = 1 << 14, 1 << 17  # rows
SAMPLED_DOTS = 1 << 22
MOST_TURNS = 4  # sampled rows that one lane scores one after the other
SHARED_COLUMNS = 1 << 16  # bytes of a column group's codes in shared memory
FEWEST_LISTED = 1 << 22  # rows of a table of which tiles are left out: a smaller one is read before that has paid
BOUND_BYTES = 1 << 26  # of the bounds of cells, for all users of one scan
PROMISING_ROWS, PROMISING_DOTS = 64, 1 << 23  # rows scored for each result that is wanted; dots of one scan
SAMPLED_CELLS = 1 << 14


class Card(NamedTuple):
    """What a launch has to know of the device."""

    processors: int

    def blocks(self, tasks: int, per_processor: int = 8) -> int:
        """Blocks of WARPS warps for as many tasks, no more than run at a time."""
        return max(1, min(-(-tasks // WARPS), self.processors * per_processor))


class Plan(NamedTuple):
    """group: users of one scan; dense: score every row instead of scanning.

    One of every step rows is sampled, `sample` rows, whose scores are reduced to `slots` maxima of `turns` rows. The
    guess is the rank-th best maximum. capacity: keys there is room for, a user.
    """

    group: int
    dense: bool
    step: int = 1
    sample: int = 0
    slots: int = 0
    turns: int = 0
    rank: int = 0
    capacity: int = 0


def make_plan(users: int, places: int, rows: int, r: int, k: int, cells: int = 0, recall: float = 1.0) -> Plan:
    """Of the k best rows a sample of S holds k S / N on average. The rank is four standard deviations above that, plus
    four for small counts: about one user in 100,000 needs the second way. Lists have room for twice the rows that this
    rank lets through. Maxima, 16 times as many as the rank, lose hardly any of the best sampled rows to each other.
    Of `cells`, if any, a scan keeps bounds. Of rows that reach the guess a share of `recall` is found, or of 7/16: the
    bounds of a scan are below the score in one case of two at most, and those of fine codes in one of eight.
    """
    group = max(1, min(users, GROUP, GROUP_ELEMENTS // (places * max(r, 1)), BOUND_BYTES // (4 * max(cells, 1))))
    if rows <= max(DENSE_ROWS, 4 * k):
        return Plan(min(group, max(1, DENSE_KEYS // max(rows, 1))), True, capacity=rows)
    wanted = min(max(SAMPLED_DOTS // (group * places), FEWEST_SAMPLED), MOST_SAMPLED)
    step = max(-(-rows // wanted), 1)
    sample = -(-rows // step)
    share = k * sample / rows / max(recall, 7 / 16)
    rank = min(math.ceil(share + 4 * math.sqrt(share) + 4), sample)
    turns = max(1, min(MOST_TURNS, sample // (16 * rank)))
    slots = -(-sample // turns)
    capacity = min(rows, 2 * math.ceil(rank * rows / sample) + 4096)
    return Plan(group, False, step, sample, slots, turns, rank, capacity)


class CellPlan(NamedTuple):
    """promising: cells of a user that are scored at most. One of every `step` cells is sampled, `sample` of them, whose
    `rank`-th best says what half as many are worth."""

    promising: int
    step: int
    sample: int
    rank: int


def plan_cells(users: int, places: int, k: int, cells: int, cell_rows: int) -> CellPlan:
    """A thousand best rows fill few cells, but lie in many: 64 rows for each of them, and as many as for 128 more, give
    nearly the threshold that all rows would (docs/gpu_packed.md)."""
    wanted = -(-PROMISING_ROWS * (k + 128) // cell_rows)
    affordable = PROMISING_DOTS // (users * places * cell_rows)
    half = min(max(min(wanted, affordable), -(-2 * k // cell_rows) + 16), cells)
    step = max(-(-cells // SAMPLED_CELLS), 1)
    sample = -(-cells // step)
    return CellPlan(min(2 * half, cells), step, sample, max(half * sample // cells, 1))


def columns_of_user(places: int) -> int:
    """1, 2, 4, or a multiple of 8."""
    return 1 << (places - 1).bit_length() if places <= 4 else -(-places // 8) * 8


class Scan(NamedTuple):
    """steps: of 32 elements that stay in registers, 0 where rows are longer, or queries too many for shared memory.
    group_users: of a column group."""

    steps: int
    step_pairs: int
    group_users: int
    shared: int


def plan_scan(users: int, places: int, r: int) -> Scan:
    width = columns_of_user(places)
    pairs = -(-quads(r) // 16)
    steps = 2 if pairs == 1 else 4 if pairs == 2 else 0
    least = max(1, 8 // width)  # users of a product
    if steps:
        column_bytes = pairs * 64 + 4
        group_users = SHARED_COLUMNS // (column_bytes * width) // least * least
        if group_users == 0:
            steps = 0
    if not steps:
        group_users = max(least, 512 // width // least * least)
    group_users = min(group_users, -(-users // least) * least)
    products = -(-group_users * width // 8)
    held = products * pairs * 512 + _sixteens(products * 32) if steps else 0
    rows = 2 * BLOCK
    shared = held + 2 * _sixteens(group_users * 4) + 16 + WARPS * (rows * 16 + 2 * rows * 8 * 4)
    return Scan(steps, pairs, group_users, shared)


def _sixteens(size: int) -> int:
    return -(-size // 16) * 16
