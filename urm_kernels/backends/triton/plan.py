"""Sizes of a search: how much is sampled, how many survivors there is room for, which tiles. Pure arithmetic."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

DENSE_ROWS = 8192  # below this many rows everything is scored at once: a scan has nothing to save
DENSE_KEYS = 1 << 27  # of a dense call held at a time
GROUP = 1024  # users of one scan
BOUNDED_QUERIES = 16  # of a user, from where on telling which may win a row takes less than scoring all


class Plan(NamedTuple):
    """group: users of one scan; dense: score every row canonically instead of scanning.

    step, sample: every step-th row is sampled. The sample's scores are reduced to maxima of `gathered` rows; the guess
    is the rank-th best maximum. capacity: survivors there is room for, a user.
    """

    group: int
    dense: bool
    step: int
    sample: int
    gathered: int
    rank: int
    capacity: int


class Card(NamedTuple):
    """What a launch has to know of the device. capability: 90 for sm_90; 0 for Triton's interpreter."""

    processors: int
    capability: int

    @property
    def interpreted(self) -> bool:
        return self.capability == 0

    @property
    def adds_squares(self) -> bool:
        """Whether the tensor cores add the squares of rows; Triton 3.6 fails to compile that for Blackwell."""
        return 80 <= self.capability < 100


class Tile(NamedTuple):
    """One configuration of the scan: at most block_c columns (queries) at a time, per_sm programs a multiprocessor.

    block_r: elements of a row at a time, 0 for whole rows. swap: see the scan's _product.
    """

    block_n: int
    block_c: int
    block_r: int
    warps: int
    stages: int
    per_sm: int
    swap: bool = False

    def owns_scores(self, card: Card) -> bool:
        """Whether every score of a tile is one thread's alone. Ampere's warps lie one below the other, 16 rows each."""
        return not card.interpreted and (card.capability >= 90 or self.block_n >= 16 * self.warps)


class Tiles(NamedTuple):
    """An architecture's tiles. few: up to 32 columns; some: up to 128; users: many users of one query; many: the rest;
    wide: rows of more than 512 bytes, read in parts by addresses that take registers."""

    few: Tile
    some: Tile
    users: Tile
    many: Tile
    wide: Tile


_WIDE = Tile(64, 64, 64, 8, 2, 2)

# By compute capability, the next lower one where there is none. Hopper's are measured at r = 128 (bench/tune_scan.py,
# which tunes another card on request); the others are chosen so that nothing spills (docs/kernels.md).
TILES = {
    80: Tiles(
        few=Tile(64, 32, 0, 4, 3, 4),
        some=Tile(128, 128, 0, 8, 2, 1),
        users=Tile(128, 64, 0, 8, 3, 2),
        many=Tile(64, 64, 0, 4, 3, 3),
        wide=_WIDE,
    ),
    90: Tiles(
        few=Tile(64, 32, 0, 4, 3, 4),
        some=Tile(64, 128, 0, 4, 3, 3),
        users=Tile(128, 64, 0, 8, 3, 2, swap=True),
        many=Tile(64, 64, 0, 4, 3, 3),
        wide=_WIDE,
    ),
    100: Tiles(
        few=Tile(64, 32, 0, 8, 3, 4),
        some=Tile(64, 128, 0, 4, 3, 3),
        users=Tile(128, 64, 0, 8, 3, 2, swap=True),
        many=Tile(64, 64, 0, 4, 3, 3),
        wide=_WIDE,
    ),
}


def make_plan(users: int, rows: int, wanted: int) -> Plan:
    """`wanted` results a user, those that `exclude` may take away counted in.

    Of the `wanted` best rows a sample of S holds k S / N on average. The rank is four standard deviations above that,
    plus four for small counts: about one user in 100,000 needs the second way. Room for survivors is twice what that
    rank lets through. Maxima, 16 times as many as the rank, lose hardly any of the best sampled rows to each other.
    """
    if rows <= max(DENSE_ROWS, 4 * wanted):
        return Plan(min(users, GROUP, max(1, DENSE_KEYS // max(rows, 1))), True, 1, 0, 0, 0, rows)
    group = min(users, GROUP)
    most = 1 << (18 if group < 32 else 19)
    step = max(-(-rows // most), min(64, rows // 2048), 1)
    sample = -(-rows // step)
    share = wanted * sample / rows
    rank = min(math.ceil(share + 4 * math.sqrt(share) + 4), sample)
    gathered = 64
    while gathered > 1 and sample < 16 * rank * gathered:
        gathered //= 2
    capacity = min(rows, 2 * math.ceil(rank * rows / sample) + 4096)
    return Plan(group, False, step, sample, gathered, rank, capacity)


def padded(size: int, least: int = 1) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def choose_tile(
    columns: int,
    m_pad: int,
    r_pad: int,
    itemsize: int,
    capability: int,
    *,
    own_masks: bool = False,
    scaled: bool = False,
    log_sum_exp: bool = False,
) -> Tile:
    """The scan's tile for B * m_pad columns of r_pad elements.

    What takes registers beside them makes the tile narrower: own_masks, of every user, scaled rows, log_sum_exp, long
    rows, on Ampere most. Found by compiling (docs/gpu.md).
    """
    tiles = TILES[max((key for key in TILES if key <= capability), default=min(TILES))]
    row_bytes = r_pad * itemsize
    most = 16 * m_pad if own_masks else columns
    long = row_bytes > 256
    if row_bytes > 512 or (long and (scaled or log_sum_exp)):
        tile = tiles.wide
    elif min(columns, most) <= 128:
        tile = tiles.few if min(columns, most) <= 32 else tiles.some
    else:
        tile = tiles.users if m_pad == 1 else tiles.many
    narrower = 2 if log_sum_exp else 1
    if scaled:
        narrower *= 4 if capability < 90 and m_pad > 1 else 2 if tile is tiles.wide else 1
    if long and tile is not tiles.wide:
        narrower *= 4 if capability < 90 else 2 if tile is tiles.many or own_masks else 1
    block_c = max(min(padded(columns, 16), tile.block_c, padded(most, 16)) // narrower, 16)
    return tile._replace(
        block_c=block_c,
        block_r=tile.block_r * 2 // itemsize or r_pad,
        stages=2 if long else tile.stages,  # or several programs would not fit into shared memory
    )


class CanonicalTile(NamedTuple):
    """A block of canonical dots: rows by `columns` queries, those of `users` users side by side."""

    rows: int
    columns: int
    users: int


def canonical_tile(users: int, count: int, most_sums: int = 512) -> CanonicalTile:
    """Of `users` users of `count` queries that meet the same rows; most_sums: of what is kept of every score.

    512 dots, 64 running sums a thread, are as many as leave room for three or four programs a multiprocessor.
    """
    of_user = min(padded(count), 16)
    columns = of_user * min(padded(users), 16 // of_user)
    rows = min(512 // columns, 128, most_sums * of_user // columns)
    return CanonicalTile(rows, columns, columns // of_user)


def relative_error(dtype: torch.dtype, r: int) -> float:
    """Of a product on the tensor cores and of the canonical dot, as a share of |rounded q| |v|; docs/gpu.md."""
    cut = 2**-10 if dtype == torch.float32 else 0.0  # tf32: the row's elements are cut to ten bits
    return cut + (r + 16) * 2**-22 + (r / 16 + 4) * 2**-24 + 2**-21
