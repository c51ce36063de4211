"""Other libraries' exhaustive searches on a GPU, where they are installed; measured beside the middle table's cells.

None knows a user of several queries: each query is searched for k, and a user's results are merged, which is exact for
the maximum. FlashLib finds the nearest rows by Euclidean distance: a task of the same size, not the same one.
LiteTopK is no package that could be installed: its kernels are built in place, for 16-bit rows and 5 million of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class Peer(NamedTuple):
    """module: what is imported; prepare: its index of float16 rows, as a search of queries [n, r] for k rows each."""

    module: str
    same_task: bool
    prepare: Callable[[Any, Tensor], Search]


def _faiss(faiss: Any, rows: Tensor) -> Search:
    importlib.import_module("faiss.contrib.torch_utils")  # lets it take torch's tensors
    resources = faiss.StandardGpuResources()

    def search(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return faiss.knn_gpu(resources, queries, rows, k, metric=faiss.METRIC_INNER_PRODUCT)

    return search


def _cuvs(brute_force: Any, rows: Tensor) -> Search:
    index = brute_force.build(rows, metric="inner_product")

    def search(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores, ids = (torch.as_tensor(part, device=rows.device) for part in brute_force.search(index, queries, k))
        return scores, ids.long()

    return search


def _flashlib(flashlib: Any, rows: Tensor) -> Search:
    def search(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        distances, ids = flashlib.flash_knn(queries, rows, k)
        return -distances, ids.long()

    return search


PEERS = {
    "faiss": Peer("faiss", True, _faiss),
    "cuvs": Peer("cuvs.neighbors.brute_force", True, _cuvs),
    "flashlib": Peer("flashlib", False, _flashlib),
}


def installed() -> tuple[dict[str, Any], dict[str, str]]:
    """(modules by the peer's name, why the others are not measured)."""
    modules, missing = {}, {"litetopk": "research code, not an installable package"}
    for name, peer in PEERS.items():
        try:
            module = importlib.import_module(peer.module)
        except ImportError as error:
            missing[name] = f"not installed ({error})"
            continue
        if name == "faiss" and not hasattr(module, "StandardGpuResources"):
            missing[name] = "faiss is installed without its GPU part"
        else:
            modules[name] = module
    return modules, missing


def merged(search: Search, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and rows [B, k] under the maximum over the queries [B, M, r]: every row of a user's k best is among those
    of the query that wins there."""
    users, count, r = queries.shape
    scores, ids = search(queries.reshape(-1, r).half(), k)
    if count == 1:
        return scores, ids
    # By row, best first: a row that several queries found counts once.
    scores, ids = scores.reshape(users, -1), ids.reshape(users, -1)
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, ids.gather(1, order).argsort(dim=1, stable=True))
    scores, ids = scores.gather(1, order), ids.gather(1, order)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    best = scores.masked_fill(again, -torch.inf).topk(k, dim=1)
    return best.values, ids.gather(1, best.indices)
