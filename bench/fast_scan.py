"""The approximate peer of packed tables: faiss' PQFastScan, 4 bits a part, its best candidates ranked again exactly."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from urm_kernels.bench import Peer, SkipError
from urm_kernels.scoring import TopK

NAME = "faiss PQFastScan, re-ranked"
RECALL = 0.99  # of a user's top k under max; what is below is no alternative
_FACTORS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50)  # candidates of a query over k
_TRAINED_ON = 100_000  # rows


class Tuned(NamedTuple):
    peer: Peer
    factor: int
    recall: float


def index_of(items: Tensor, bytes_a_row: int) -> Any:
    """Raises SkipError where faiss is missing or a row does not divide into parts of 4 bits."""
    try:
        import faiss
    except ImportError as error:
        raise SkipError(f"faiss is not installed ({error})") from error
    parts = 2 * bytes_a_row
    if items.shape[1] % parts:
        raise SkipError(f"r = {items.shape[1]} does not divide into {parts} parts")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexPQFastScan(items.shape[1], parts, 4, faiss.METRIC_INNER_PRODUCT)
    rows = items.float().numpy()
    index.train(rows[:_TRAINED_ON])
    index.add(rows)
    return index


def search(factor: int, index: Any, items: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """One search for factor k candidates of every query; a user's are joined and scored exactly."""
    users = queries.shape[0]
    _, found = index.search(queries.flatten(0, 1).numpy(), min(factor * k, index.ntotal))
    scores, ids = [], []
    for own, candidates in zip(queries, torch.from_numpy(found).view(users, -1), strict=True):
        rows = candidates[candidates >= 0].unique()
        best = (own @ items.index_select(0, rows).T).amax(0).topk(min(k, len(rows)))
        scores.append(best.values)
        ids.append(rows[best.indices])
    return torch.stack(scores), torch.stack(ids)


def tuned(index: Any, items: Tensor, queries: Tensor, truth: TopK) -> Tuned:
    """With the fewest candidates that find enough of the exact top k of these users; SkipError where none do."""
    k = truth.ids.shape[1]
    for factor in _FACTORS:
        _, ids = search(factor, index, items, queries, k)
        recall = torch.tensor([torch.isin(*pair).sum() / k for pair in zip(truth.ids, ids, strict=True)]).mean().item()
        if recall >= RECALL:

            def find(index: Any, queries: Tensor, k: int, _: str, factor: int = factor) -> tuple[Tensor, Tensor]:
                return search(factor, index, items, queries, k)

            return Tuned(Peer(NAME, NAME, "fp32", False, lambda _: index, find), factor, recall)
    raise SkipError(f"finds {recall:.3f} of the top k with {_FACTORS[-1]} k candidates a query")
