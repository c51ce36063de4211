"""Ranking metrics that cannot flatter: NaN is refused, pads never hit, a film listed twice counts once."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

Reduction = Literal["mean", "none"]


@overload
def recall_at(
    ids: Tensor, targets: Tensor, k: int, *, scores: Tensor | None = None, reduction: Literal["mean"] = "mean"
) -> float: ...


@overload
def recall_at(
    ids: Tensor, targets: Tensor, k: int, *, scores: Tensor | None = None, reduction: Literal["none"]
) -> Tensor: ...


def recall_at(
    ids: Tensor, targets: Tensor, k: int, *, scores: Tensor | None = None, reduction: Reduction = "mean"
) -> float | Tensor:
    """Recall@k: the share of a user's targets that is among the first k ids::

        recall[b] = |{ids[b, 0], ..., ids[b, k-1]} & T_b| / |T_b|        # T_b: the distinct targets of user b, no pads

    With one target a user it is the hit rate. A user with more than k targets cannot reach 1.

    Args:
        ids: int64 [B, K], best first, K >= k; -1 pads, which never hit. An id listed twice counts at its first place.
        targets: int64 [B], or [B, L] padded with -1.
        k: how many of the first ids count.
        scores: [B, K], the scores of ``ids``, only looked at: a NaN among them raises, since it has no rank.
        reduction: "mean" over users who have a target (a float), or "none": float64 [B], NaN for users without one.

    Raises:
        TypeError, ValueError: a wrong shape or dtype, NaN scores, or (under "mean") no user with a target.
    """
    hits, wanted = _hits(ids, targets, k, scores)
    return _reduced(hits.sum(dim=1, dtype=torch.float64) / wanted, wanted, reduction)


@overload
def ndcg_at(
    ids: Tensor, targets: Tensor, k: int, *, scores: Tensor | None = None, reduction: Literal["mean"] = "mean"
) -> float: ...


@overload
def ndcg_at(
    ids: Tensor, targets: Tensor, k: int, *, scores: Tensor | None = None, reduction: Literal["none"]
) -> Tensor: ...


def ndcg_at(
    ids: Tensor, targets: Tensor, k: int, *, scores: Tensor | None = None, reduction: Reduction = "mean"
) -> float | Tensor:
    """NDCG@k with binary relevance: the discounted gain over the best gain that the user's targets allow::

        dcg[b]   = sum of 1 / log2(j + 2) over ranks j < k where ids[b, j] is a target of b (at its first place)
        ideal[b] = sum of 1 / log2(j + 2) over ranks j < min(|T_b|, k)
        ndcg[b]  = dcg[b] / ideal[b]                                       # in [0, 1]

    Arguments, reduction and errors are those of :func:`recall_at`.
    """
    hits, wanted = _hits(ids, targets, k, scores)
    gains = 1 / torch.arange(2, k + 2, dtype=torch.float64, device=ids.device).log2()
    # gains[0] is 1 and both sums run over the same ranks in the same order, so a perfect ranking divides equals
    ideal = gains * (torch.arange(k, device=ids.device) < wanted[:, None])
    return _reduced((hits * gains).sum(dim=1) / ideal.sum(dim=1), wanted, reduction)


def _hits(ids: Tensor, targets: Tensor, k: int, scores: Tensor | None) -> tuple[Tensor, Tensor]:
    """bool [B, k]: this rank is the first that holds this target; int64 [B]: distinct targets of each user."""
    targets = _checked(ids, targets, k, scores)
    ids = ids[:, :k]
    targets = targets.sort(dim=1).values
    wanted = (_first_of_equals(targets) & (targets >= 0)).sum(dim=1)
    place = torch.searchsorted(targets, ids.contiguous()).clamp(max=targets.shape[1] - 1)
    found = (targets.gather(1, place) == ids) & (ids >= 0)
    ordered, rank = ids.sort(dim=1, stable=True)
    first = torch.empty_like(found).scatter_(1, rank, _first_of_equals(ordered))
    return found & first, wanted


def _first_of_equals(ordered: Tensor) -> Tensor:
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return first


def _checked(ids: Tensor, targets: Tensor, k: int, scores: Tensor | None) -> Tensor:
    for name, tensor in (("ids", ids), ("targets", targets)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name}: dtype torch.int64 is wanted, {tensor.dtype} came")
    if ids.dim() != 2:
        raise ValueError(f"ids: shape [B, K] is wanted, {list(ids.shape)} came")
    if targets.dim() == 1:
        targets = targets[:, None]
    if targets.dim() != 2 or targets.shape[0] != ids.shape[0] or targets.shape[1] == 0:
        raise ValueError(f"targets: shape [B] or [B, L] with B = {ids.shape[0]} is wanted, {list(targets.shape)} came")
    if not 1 <= k <= ids.shape[1]:
        raise ValueError(f"k: 1 to {ids.shape[1]}, the ids given a user, is wanted, {k} came")
    if bool((targets < -1).any()):
        raise ValueError(f"targets: row indices, or -1 for a pad, are wanted, {int(targets.min())} came")
    if scores is not None:
        if scores.shape != ids.shape:
            raise ValueError(f"scores: the shape of ids, {list(ids.shape)}, is wanted, {list(scores.shape)} came")
        users = int(scores.isnan().any(dim=1).sum())
        if users:
            raise ValueError(f"scores: NaN came for {users} of {len(scores)} users; a NaN has no rank")
    return targets


def _reduced(per_user: Tensor, wanted: Tensor, reduction: Reduction) -> float | Tensor:
    if reduction == "none":
        return per_user  # no target: 0 / 0, a NaN
    if reduction != "mean":
        raise ValueError(f"reduction: 'mean' or 'none' is wanted, {reduction!r} came")
    counted = per_user[wanted > 0]
    if counted.numel() == 0:
        raise ValueError(f"targets: none of {len(wanted)} users has a target, so there is no mean")
    return float(counted.mean())
