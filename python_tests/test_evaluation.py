"""Ranking metrics: the definitions, and what must never count as a hit."""

import math

import pytest
import torch

from urm_kernels.evaluation import ndcg_at, recall_at


def by_definition(ids, targets, k):
    """(recall, ndcg) of one user from plain lists."""
    wanted = {target for target in targets if target >= 0}
    gain, seen = 0.0, set()
    for rank, item in enumerate(ids[:k]):
        if item in wanted and item not in seen:
            gain += 1 / math.log2(rank + 2)
            seen.add(item)
    ideal = sum(1 / math.log2(rank + 2) for rank in range(min(len(wanted), k)))
    return len(seen) / len(wanted), gain / ideal


@pytest.mark.parametrize("width", [1, 3, 20])
@pytest.mark.parametrize("k", [1, 5, 12])
def test_definition(width, k):
    ids = torch.randint(-1, 15, (97, 12))  # with duplicates and pads
    targets = torch.randint(-1, 15, (97, width))
    targets[:, 0] = torch.randint(0, 15, (97,))
    want = [by_definition(*pair, k) for pair in zip(ids.tolist(), targets.tolist(), strict=True)]
    for metric, column in ((recall_at, 0), (ndcg_at, 1)):
        per_user = metric(ids, targets, k, reduction="none")
        torch.testing.assert_close(per_user, torch.tensor([row[column] for row in want], dtype=torch.float64))
        assert per_user.min() >= 0 and per_user.max() <= 1
        assert metric(ids, targets, k) == pytest.approx(per_user.mean().item())


def test_one_target_a_user():
    ids = torch.tensor([[4, 7, 9], [1, 2, 3]])
    assert recall_at(ids, torch.tensor([9, 0]), 3) == 0.5
    assert recall_at(ids, torch.tensor([9, 0]), 2) == 0.0
    assert ndcg_at(ids, torch.tensor([9, 0]), 3) == 0.25  # 1 / log2(4), halved


@pytest.mark.parametrize("wanted", [1, 3, 7])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_perfect_ranking_is_exactly_one(wanted, k):
    ids = torch.arange(8)[None]
    targets = torch.arange(wanted)[None].flip(1)
    assert ndcg_at(ids, targets, k) == 1.0
    assert recall_at(ids, targets, k) == min(wanted, k) / wanted


def test_duplicate_ids_and_targets_count_once():
    ids = torch.tensor([[5, 5, 5, 5]])
    assert recall_at(ids, torch.tensor([[5, 6]]), 4) == 0.5
    assert ndcg_at(ids, torch.tensor([[5]]), 4) == 1.0
    assert recall_at(ids, torch.tensor([[5, 5, 5]]), 4) == 1.0


def test_pads_never_hit():
    ids = torch.full((2, 3), -1)
    targets = torch.tensor([[1, -1], [-1, -1]])
    assert recall_at(ids, targets, 3) == 0.0
    assert ndcg_at(ids, targets, 3, reduction="none").isnan().tolist() == [False, True]


def test_users_without_target_are_left_out():
    ids = torch.tensor([[1], [2]])
    assert recall_at(ids, torch.tensor([1, -1]), 1) == 1.0
    with pytest.raises(ValueError, match="none of 2 users has a target"):
        ndcg_at(ids, torch.tensor([-1, -1]), 1)


@pytest.mark.parametrize("metric", [recall_at, ndcg_at])
def test_nan_scores_raise(metric):
    ids, scores = torch.tensor([[1, 2]]), torch.tensor([[1.0, float("nan")]])
    with pytest.raises(ValueError, match="NaN came for 1 of 1 users"):
        metric(ids, torch.tensor([2]), 1, scores=scores)
    assert metric(ids, torch.tensor([1]), 1, scores=torch.tensor([[float("inf"), -float("inf")]])) == 1.0


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, "ids: dtype torch.int64", (torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), 1)),
        (TypeError, "targets: dtype", (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1), 1)),
        (ValueError, "ids: shape", (torch.arange(2), torch.arange(2), 1)),
        (ValueError, "targets: shape", (torch.zeros(1, 2, dtype=torch.int64), torch.arange(2), 1)),
        (ValueError, "targets: row indices", (torch.zeros(1, 2, dtype=torch.int64), torch.tensor([-100]), 1)),
        (ValueError, "k: 1 to 2", (torch.zeros(1, 2, dtype=torch.int64), torch.tensor([0]), 3)),
        (ValueError, "k: 1 to 2", (torch.zeros(1, 2, dtype=torch.int64), torch.tensor([0]), 0)),
    ],
)
def test_errors_in_words(error, words, arguments):
    for metric in (recall_at, ndcg_at):
        with pytest.raises(error, match=words):
            metric(*arguments)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="reduction"):
        recall_at(ids, torch.tensor([0]), 1, reduction="sum")
    with pytest.raises(ValueError, match="scores: the shape of ids"):
        recall_at(ids, torch.tensor([0]), 1, scores=torch.zeros(1, 3))
