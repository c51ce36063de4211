"""explore_topk on a device: rows are scored and perturbed by kernels, sets of rows are sorted lists. Nothing waits.

A round has room for as many new rows as there can be; places that stay empty hold row -1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference_explore import first_rows
from ..table_view import ScanOptions, TableView, Walk, rows_of_bits
from .call import EXACT
from .candidates import score_candidates
from .canonical import NO_KEY, block_of, pack_keys
from .noise import gumbel_noise, seed_of_round

_BLOCK = 256
_ROWS_AT_ONCE = 1 << 22  # scored rows of the users that walk together


@triton.jit(do_not_specialize=["count", "number"])
def perturb_rows(keys, rows, scores, followed, count, seed, number, streams, temperature, C: tl.constexpr):
    """keys int64 [B, count]: of score / temperature + noise of round `number`; NO_KEY where a row is -1, was followed,
    or has no score. seed, temperature: scalars in memory. Programs: (blocks of rows, users)."""
    user = tl.program_id(1).to(tl.int64)
    places = block_of(tl.program_id(0), C)
    inside = places < count
    at = user * count + places
    row = tl.load(rows + at, mask=inside, other=-1)
    live = inside & (row >= 0) & (tl.load(followed + at, mask=inside, other=1) == 0)
    score = tl.load(scores + at, mask=live, other=0.0)
    round_seed = seed_of_round(tl.zeros([C], tl.int64) + tl.load(seed), number)
    stream = tl.zeros([C], tl.int64) + tl.load(streams + user)
    scaled = tl.div_rn(score, tl.zeros([C], tl.float32) + tl.load(temperature))
    perturbed = (scaled + gumbel_noise(round_seed, stream, row)) + 0.0
    tl.store(keys + at, tl.where(live, pack_keys(perturbed, row), NO_KEY), mask=inside)


def explore_topk(
    queries: Tensor, table: TableView, options: ScanOptions, walk: Walk, temperature: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See urm_kernels.explore_topk."""
    users, rows = queries.shape[0], table.items.shape[0]
    scores = queries.new_full((users, k), -torch.inf)
    ids = torch.full((users, k), -1, dtype=torch.int64, device=queries.device)
    counts = torch.zeros((walk.rounds, users), dtype=torch.int64, device=queries.device)
    if queries.shape[1] == 0 or rows == 0:
        return scores, ids, counts
    most = min(walk.first, rows) + sum(walk.widths) * walk.neighbors.shape[1]
    together = max(1, min(_ROWS_AT_ONCE // max(most, 1), 1 << 15))  # a grid's second dimension ends at 65,535
    for start in range(0, users, together):
        part = slice(start, start + together)
        own = walk._replace(streams=walk.streams[part])
        exists = None if options.query_mask is None else options.query_mask[part]
        group = _Walkers(queries[part], exists, options.reduce, table, own, temperature)
        counts[:, part] = group.run()
        group.best(_part_of(options, part), k, scores[part], ids[part])
    return scores, ids, counts


def _part_of(options: ScanOptions, part: slice) -> ScanOptions:
    mask = options.mask if options.mask is None or options.mask.dim() == 1 else options.mask[part]
    exclude = None if options.exclude is None else options.exclude[part]
    return options._replace(mask=mask, exclude=exclude)


class _Walkers:
    """Some users, who walk side by side: rows int64 [B, n] scored so far, -1 in empty places, and their scores."""

    def __init__(
        self, queries: Tensor, exists: Tensor | None, reduce: str, table: TableView, walk: Walk, temperature: Tensor
    ) -> None:
        self._queries, self._exists, self._reduce, self._walk = queries, exists, reduce, walk
        self._table, self._temperature = table, temperature
        empty = (queries.shape[0], 0)
        self._rows = torch.zeros(empty, dtype=torch.int64, device=queries.device)
        self._scores = queries.new_zeros(empty)
        self._followed = torch.zeros(empty, dtype=torch.bool, device=queries.device)

    def run(self) -> Tensor:
        """Rows scored, [rounds, B]."""
        walk, rows = self._walk, self._table.items.shape[0]
        fresh = first_rows(walk.seed, walk.streams[:, None], min(walk.first, rows), rows)
        if self._exists is not None:
            fresh = fresh.where(self._exists.any(1, keepdim=True), -1)
        counts = [self._score(fresh)]
        counts += [self._score(self._neighbors(number)) for number in range(1, walk.rounds)]
        return torch.stack(counts)

    def _score(self, fresh: Tensor) -> Tensor:
        plain = self._table._replace(alive=None)  # removed rows are passed through
        scores = score_candidates(self._queries, plain, fresh.contiguous(), self._exists, self._reduce)
        self._rows = torch.cat([self._rows, fresh], 1)
        self._scores = torch.cat([self._scores, scores], 1)
        self._followed = torch.cat([self._followed, torch.zeros_like(fresh, dtype=torch.bool)], 1)
        return (fresh >= 0).sum(1)

    def _neighbors(self, number: int) -> Tensor:
        """Draws rows; those of their neighbours that are new, each once, [B, most that can be]."""
        walk, (users, count) = self._walk, self._rows.shape
        keys = torch.empty_like(self._rows)
        if keys.numel():
            perturb_rows[(-(-count // _BLOCK), users)](
                keys, self._rows, self._scores, self._followed, count, walk.seed, number, walk.streams,
                self._temperature, C=_BLOCK, **EXACT,
            )  # fmt: skip
        best, places = keys.topk(min(walk.widths[number - 1], count), 1, sorted=False)
        self._followed.scatter_(1, places, True)
        drawn = self._rows.gather(1, places).where(best > NO_KEY.value, -1)
        fresh = walk.neighbors[drawn.clamp(min=0)].long().where(drawn[..., None] >= 0, -1).flatten(1)
        fresh = fresh.where(fresh < self._table.items.shape[0], -1).sort(1).values
        again = torch.zeros_like(fresh, dtype=torch.bool)
        again[:, 1:] = fresh[:, 1:] == fresh[:, :-1]
        return fresh.where(~(again | _among(fresh, self._rows)), -1)

    def best(self, options: ScanOptions, k: int, scores: Tensor, ids: Tensor) -> None:
        """Writes the k best rows that may be returned."""
        rows, taken = self._rows, self._rows.clamp(min=0)
        allowed = (rows >= 0) & ~self._scores.isnan()
        mask = options.mask
        if mask is not None:
            packed = mask.dtype == torch.uint8
            held = mask.expand(len(rows), -1).gather(1, taken >> 3 if packed else taken)
            allowed &= ((held >> (taken & 7)) & 1).bool() if packed else held
        if self._table.alive is not None:
            allowed &= rows_of_bits(self._table.alive, taken)
        if options.exclude is not None:
            allowed &= ~_among(rows, options.exclude)
        bits = self._scores.view(torch.int32)
        ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
        keys = (((ordered + 1) << 32) - 1 - rows).where(allowed, NO_KEY.value)
        best, places = keys.topk(min(k, rows.shape[1]), 1)
        found = best > NO_KEY.value
        scores[:, : best.shape[1]] = self._scores.gather(1, places).where(found, -torch.inf)
        ids[:, : best.shape[1]] = rows.gather(1, places).where(found, -1)


def _among(rows: Tensor, others: Tensor) -> Tensor:
    """Which rows [B, n] the same user's others [B, m] hold."""
    if others.shape[1] == 0:
        return torch.zeros_like(rows, dtype=torch.bool)
    others = others.sort(1).values
    at = torch.searchsorted(others, rows.contiguous()).clamp(max=others.shape[1] - 1)
    return others.gather(1, at) == rows
