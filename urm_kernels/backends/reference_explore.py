"""explore_topk in plain torch, one user after the other: what the other backends' walks are measured against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import noise
from .table_view import ScanOptions, TableView, Walk

# Scores [C] of rows [C]; NaN where a product is.
Scorer = Callable[[Tensor], Tensor]


def first_rows(seed: Tensor, stream: Tensor, count: int, rows: int) -> Tensor:
    """[count] rows, ascending: one of each of `count` equal parts of all rows, by 31 random bits."""
    parts = torch.arange(count, device=seed.device)
    begin, end = parts * rows // max(count, 1), (parts + 1) * rows // max(count, 1)
    first, _ = noise.random_words(noise.seed_of_round(seed, 0), stream, parts)
    return begin + ((first >> 1) * (end - begin) >> 31)


def in_order(scores: Tensor, rows: Tensor) -> Tensor:
    """Places of rows in the total order: the higher score, then the lower row."""
    by_row = rows.argsort(stable=True)
    return by_row[scores[by_row].argsort(descending=True, stable=True)]


def explore(
    score: Scorer, rows: int, walk: Walk, temperature: Tensor, stream: Tensor
) -> tuple[Tensor, Tensor, list[int]]:
    """(rows scored, their scores, how many a round) of one user; none of the scores is NaN."""
    fresh = first_rows(walk.seed, stream, min(walk.first, rows), rows)
    seen = torch.zeros(rows, dtype=torch.bool, device=fresh.device)
    known, scores = fresh[:0], torch.zeros(0, dtype=temperature.dtype, device=fresh.device)
    followed = torch.zeros(0, dtype=torch.bool, device=fresh.device)
    counts = []
    for number in range(walk.rounds):
        if number:
            seed = noise.seed_of_round(walk.seed, number)
            perturbed = noise.perturbed_scores(scores.float(), temperature.float(), seed, stream, known)
            left = (~followed).nonzero().flatten()
            drawn = left[in_order(perturbed[left], known[left])[: walk.widths[number - 1]]]
            followed[drawn] = True
            fresh = walk.neighbors[known[drawn]].flatten().long()
            fresh = fresh[(fresh >= 0) & (fresh < rows)].unique()
            fresh = fresh[~seen[fresh]]
        seen[fresh] = True
        counts.append(len(fresh))
        found = score(fresh)
        kept = ~found.isnan()
        known, scores = torch.cat([known, fresh[kept]]), torch.cat([scores, found[kept]])
        followed = torch.cat([followed, torch.zeros(int(kept.sum()), dtype=torch.bool, device=fresh.device)])
    return known, scores, counts


def explore_topk(
    queries: Tensor,
    table: TableView,
    options: ScanOptions,
    walk: Walk,
    temperature: Tensor,
    k: int,
    score_candidates: Callable[..., Tensor],
    allowed_rows: Callable[..., Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """See urm_kernels.explore_topk; temperature has the dtype of computation. Returns scores and ids [B, k], and how
    many rows were scored [rounds, B]."""
    users, rows, device = queries.shape[0], table.items.shape[0], queries.device
    scores = torch.full((users, k), -torch.inf, dtype=temperature.dtype, device=device)
    ids = torch.full((users, k), -1, dtype=torch.int64, device=device)
    counts = torch.zeros((walk.rounds, users), dtype=torch.int64, device=device)
    everything = torch.arange(rows, device=device)
    plain = table.settled()._replace(alive=None)
    for user in range(users if queries.shape[1] and rows else 0):
        one = slice(user, user + 1)
        exists = None if options.query_mask is None else options.query_mask[one]
        if exists is not None and not exists.any():
            continue

        def score(chosen: Tensor, one: slice = one, exists: Tensor | None = exists) -> Tensor:
            return score_candidates(queries[one], plain, chosen, exists, options.reduce)[0]

        known, found, counted = explore(score, rows, walk, temperature, walk.streams[user])
        mask = options.mask if options.mask is None or options.mask.dim() == 1 else options.mask[one]
        exclude = None if options.exclude is None else options.exclude[one]
        allowed = allowed_rows(everything, 1, mask, exclude, table.alive)[0, known]
        known, found = known[allowed], found[allowed]
        best = in_order(found, known)[:k]
        scores[user, : len(best)], ids[user, : len(best)] = found[best], known[best]
        counts[:, user] = torch.tensor(counted, device=device)
    return scores, ids, counts
