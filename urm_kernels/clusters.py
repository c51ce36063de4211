"""Clusters of item rows: k-means whose search for the nearest centre is the library's own scoring.

``argmin |x - c|^2 = argmax (x . c - |c|^2 / 2)``, which is score_topk for the users x, one query each, k = 1.
Seeds are drawn by their distance from those drawn before (Bahmani et al., k-means||, VLDB 2012), and between the passes
centres that are of little use move to where rows are far from theirs (Fritzke, breathing k-means, 2020): rare kinds of
rows find centres of their own, which random seeds would leave to the frequent ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .backends import cpu, reference, triton
from .backends.table_view import ScanOptions, TableView, gather_rows

ROWS_OF_CLUSTER = 256  # on average
_SAMPLED = 16  # rows a centre, in training
_MOST_SAMPLED = 1 << 23
_PASSES = 6  # over the sample, after seeding
_MOVING_PASSES = 5  # in which centres move far
_MOVED = 10  # one of so many centres in each
_FIRST_SEEDS = 4  # one of so many centres; these double until they are enough
_ALL_COMPARED = 8192  # centres; more are grouped, and a row is compared with those of the nearest groups
_GROUPS_ASKED = 4
_ROWS_AT_ONCE = 1 << 18
_LONGEST = 10.0  # times the usual length: longer rows are cut, they would draw centres to themselves


def cluster(items: Tensor, row_scale: Tensor | None, *, seed: int, done: Callable[[int], None]) -> Tensor:
    """int32 [N], the cluster of every row, about one in ``ROWS_OF_CLUSTER`` rows; ``done`` is told of rows compared."""
    count = len(items)
    random = torch.Generator().manual_seed(seed)
    sampled = min(count, _SAMPLED * clusters_of(count), _MOST_SAMPLED)
    picked = torch.randint(count, (sampled,), generator=random).to(items.device)
    sample = rows_of(items, row_scale, picked)
    longest = _LONGEST * float(torch.linalg.vector_norm(sample, dim=1, dtype=torch.float64).median()) or math.inf
    sample = _cut(sample, longest)
    centres = _trained(sample, clusters_of(count), random, done)
    labels = torch.empty(count, dtype=torch.int32, device=items.device)
    nearest = _Nearest(centres)
    for first in range(0, count, _ROWS_AT_ONCE):
        rows = torch.arange(first, min(first + _ROWS_AT_ONCE, count), device=items.device)
        labels[rows] = nearest(_cut(rows_of(items, row_scale, rows), longest)).int()
        done(len(rows))
    return labels


def clusters_of(rows: int) -> int:
    return max(1, rows // ROWS_OF_CLUSTER)


def rows_compared(rows: int) -> int:
    """What ``done`` of :func:`cluster` will be told in all."""
    sampled = min(rows, _SAMPLED * clusters_of(rows), _MOST_SAMPLED)
    seeds, passes = max(1, clusters_of(rows) // _FIRST_SEEDS), 0
    while seeds < clusters_of(rows):
        seeds, passes = min(2 * seeds, clusters_of(rows)), passes + 1
    return rows + (passes + _PASSES) * sampled


def rows_of(items: Tensor, row_scale: Tensor | None, rows: Tensor) -> Tensor:
    """float32 rows times their scale, zeros for what is not finite."""
    out = gather_rows(items, rows).float()
    if row_scale is not None:
        out = out * row_scale[rows].float()[:, None]
    return torch.nan_to_num_(out, 0.0, 0.0, 0.0)


def _cut(rows: Tensor, longest: float) -> Tensor:
    """Rows shortened to at most a length. In float64, in which no square of a float overflows."""
    lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    if bool((lengths <= longest).all()):
        return rows
    return rows * (longest / lengths.clamp(min=max(longest, 1e-300))).float()[:, None]


def _trained(sample: Tensor, wanted: int, random: torch.Generator, done: Callable[[int], None]) -> Tensor:
    """Centres [wanted, r] of a sample of rows, in random order."""
    centres = sample[: max(1, wanted // _FIRST_SEEDS)].clone()
    while len(centres) < wanted:
        distances = _squares(sample, centres, _Nearest(centres)(sample))
        done(len(sample))
        more = min(len(centres), wanted - len(centres))
        if not bool((distances > 0).sum() >= more):  # fewer different rows than centres
            distances = torch.ones_like(distances)
        drawn = torch.multinomial(distances.cpu(), more, generator=random).to(sample.device)
        centres = torch.cat([centres, sample[drawn]])
    for turn in range(_PASSES):
        labels = _Nearest(centres)(sample)
        done(len(sample))
        centres, sizes = _means(sample, labels, centres)
        if turn < _MOVING_PASSES and wanted > _MOVED:
            _move(sample, labels, centres, sizes, random)
    return centres


def _squares(rows: Tensor, centres: Tensor, labels: Tensor) -> Tensor:
    out = torch.empty(len(rows), device=rows.device)
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        out[part] = (rows[part] - centres[labels[part]]).square_().sum(1)
    return out


def _means(rows: Tensor, labels: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """(means of the clusters, which stay where one has no row; their sizes)."""
    sizes = torch.bincount(labels, minlength=len(before))
    sums = torch.zeros_like(before).index_add_(0, labels, rows)
    means = sums / sizes.clamp(min=1)[:, None]
    return torch.where((sizes > 0)[:, None], means, before), sizes


def _move(rows: Tensor, labels: Tensor, centres: Tensor, sizes: Tensor, random: torch.Generator) -> None:
    """Puts those centres that others could replace at least cost at far rows of the loosest clusters."""
    count = len(centres)
    moved = count // _MOVED
    distances = _squares(rows, centres, labels)
    looseness = torch.zeros(count, device=rows.device).index_add_(0, labels, distances)
    neighbours = _scores(centres, centres, 2)
    own = torch.arange(count, device=rows.device)
    other = torch.where(neighbours[:, 0] == own, neighbours[:, 1], neighbours[:, 0])
    worth = sizes * (centres - centres[other]).square().sum(1)
    idle = worth.argsort(stable=True)[:moved]
    looseness[idle] = 0
    loosest = looseness.argsort(descending=True, stable=True)[:moved]
    # Of each cluster a row that is far, and by chance not always the same.
    far = distances * torch.rand(len(rows), generator=random).to(rows.device)
    order = far.argsort(stable=True)
    farthest = _last(labels[order], order, count)
    some = looseness[loosest] > 0
    centres[idle[some]] = rows[farthest[loosest[some]]]


def _last(labels: Tensor, values: Tensor, count: int) -> Tensor:
    """Of each label the last value, whatever the order in which a device writes."""
    places = torch.arange(len(labels), device=labels.device)
    last = torch.zeros(count, dtype=torch.int64, device=labels.device).scatter_reduce_(0, labels, places, "amax")
    return values[last]


def _scores(rows: Tensor, centres: Tensor, k: int) -> Tensor:
    """int64 [n, k], the nearest centres of each row."""
    return _searched(rows, centres, k)[1]


def _searched(rows: Tensor, centres: Tensor, k: int) -> tuple[Tensor, Tensor]:
    bias = centres.square().sum(1) / -2
    queries, table = rows[:, None].contiguous(), TableView(centres, bias)
    if cpu.why_not(rows.device, (torch.float32,)) is None:
        return cpu.nearest(queries, table, k)
    chosen = triton if triton.why_not(rows.device, (torch.float32,)) is None else reference
    return chosen.score_topk(queries, table, ScanOptions(), k, True)


class _Nearest:
    """Finds the nearest of some centres for rows; where centres are many, among those of the nearest groups."""

    def __init__(self, centres: Tensor) -> None:
        self._centres = centres
        self._groups: Tensor | None = None
        if len(centres) <= _ALL_COMPARED:
            return
        count = math.isqrt(len(centres))
        step = len(centres) // count
        self._groups = centres[::step][:count].clone()
        for _ in range(4):
            self._groups, _ = _means(centres, _scores(centres, self._groups, 1)[:, 0], self._groups)
        of_group = _scores(centres, self._groups, 1)[:, 0]
        sizes = torch.bincount(of_group, minlength=count).tolist()
        self._members = of_group.argsort(stable=True).split(sizes)

    def __call__(self, rows: Tensor) -> Tensor:
        """int64 [n]."""
        parts = rows.split(_ROWS_AT_ONCE)
        if self._groups is None:
            return torch.cat([_scores(part, self._centres, 1)[:, 0] for part in parts])
        return torch.cat([self._by_groups(part) for part in parts])

    def _by_groups(self, rows: Tensor) -> Tensor:
        assert self._groups is not None
        asked = _scores(rows, self._groups, _GROUPS_ASKED).flatten()
        order = asked.argsort(stable=True)
        sizes = torch.bincount(asked, minlength=len(self._groups)).tolist()
        scores = torch.full((len(asked),), -torch.inf, device=rows.device)
        nearest = torch.zeros(len(asked), dtype=torch.int64, device=rows.device)
        for places, members in zip(order.split(sizes), self._members, strict=True):
            if len(places) and len(members):
                found, ids = _searched(rows[places // _GROUPS_ASKED], self._centres[members], 1)
                scores[places], nearest[places] = found[:, 0], members[ids[:, 0]]
        best = scores.view(-1, _GROUPS_ASKED).argmax(1, keepdim=True)
        return nearest.view(-1, _GROUPS_ASKED).gather(1, best)[:, 0]


def order_of(labels: Tensor, lengths: Tensor, cell_rows: int) -> Tensor:
    """int64 [N], the rows in an order in which runs of ``cell_rows`` are alike: by cluster, the longest first; the
    shortest rows of each cluster, too few for a run, are put together at the end by their length, where a bound needs
    no direction. That is also where clusters of few rows go."""
    order = lengths.argsort(descending=True, stable=True)
    order = order[labels[order].argsort(stable=True)]
    sizes = torch.bincount(labels)
    starts = sizes.cumsum(0) - sizes
    of = labels[order].long()
    place = torch.arange(len(order), device=order.device) - starts[of]
    whole = place < sizes[of] // cell_rows * cell_rows
    rest = order[~whole]
    return torch.cat([order[whole], rest[lengths[rest].argsort(descending=True, stable=True)]])
