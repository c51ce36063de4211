"""Other ways to the same top k under max over M, each with its own prepared state; all results come as torch tensors.

A peer takes float32 queries [B, M, r]; the index or copy that it would build once is made by `prepare` and not timed.
Packages are imported when a peer is prepared; one that is missing is a skip with its reason, not an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Result = tuple[Tensor, Tensor]
_MOST_DOTS = 1 << 30  # a peer that stores all B x M x N dots is not asked to store more than 4 GiB of them


class SkipError(Exception):
    """Why a peer does not run a cell."""


@dataclass(frozen=True)
class Peer:
    """family: peers of one family are variants of one method, of which the best is reported.

    dtype: "fp32" or "bf16", the class it is compared in. exact: whether it finds the top k of the table it was given,
    up to float32 rounding; the others are shown and never decide a bar.
    """

    name: str
    family: str
    dtype: str
    exact: bool
    prepare: Callable[[Tensor], Any]
    search: Callable[[Any, Tensor, int], Result]


def torch_chunked(dtype: torch.dtype, chunk: int | None, items: Tensor, queries: Tensor, k: int) -> Result:
    """Products of `chunk` rows, max over M, top k of the chunk, merged with the best so far; None is all rows."""
    users, count, r = queries.shape
    rows = items.shape[0]
    chunk = chunk or rows
    if users * count * chunk > _MOST_DOTS:
        raise SkipError(f"would store {users * count * chunk * 4 / 2**30:.1f} GiB of dots")
    flat = queries.reshape(-1, r).to(dtype)
    best: Result | None = None
    for first in range(0, rows, chunk):
        part = items[first : first + chunk]
        scores = (flat @ part.T).view(users, count, len(part)).amax(1)
        found, ids = scores.topk(min(k, len(part)))
        ids += first
        if best is not None:
            found, ids = torch.cat([best[0], found], 1), torch.cat([best[1], ids], 1)
            found, order = found.topk(min(k, found.shape[1]))
            ids = ids.gather(1, order)
        best = found, ids
    assert best is not None
    return best


def numpy_chunked(chunk: int | None, items: Any, queries: Tensor, k: int) -> Result:
    """As above by numpy: argpartition of each chunk, one sort at the end."""
    import numpy

    users, count, r = queries.shape
    rows = items.shape[0]
    chunk = chunk or rows
    if users * count * chunk > _MOST_DOTS:
        raise SkipError(f"would store {users * count * chunk * 4 / 2**30:.1f} GiB of dots")
    flat = queries.reshape(-1, r).numpy()
    found, ids = [], []
    for first in range(0, rows, chunk):
        part = items[first : first + chunk]
        scores = (flat @ part.T).reshape(users, count, len(part)).max(1)
        if k < len(part):
            order = numpy.argpartition(scores, len(part) - k, axis=1)[:, -k:]
        else:
            order = numpy.broadcast_to(numpy.arange(len(part)), scores.shape)
        found.append(numpy.take_along_axis(scores, order, 1))
        ids.append(order + first)
    all_found, all_ids = numpy.concatenate(found, 1), numpy.concatenate(ids, 1)
    if k < all_found.shape[1]:
        order = numpy.argpartition(all_found, all_found.shape[1] - k, axis=1)[:, -k:]
        all_found, all_ids = numpy.take_along_axis(all_found, order, 1), numpy.take_along_axis(all_ids, order, 1)
    order = numpy.argsort(-all_found, axis=1, kind="stable")
    return (
        torch.from_numpy(numpy.take_along_axis(all_found, order, 1)),
        torch.from_numpy(numpy.take_along_axis(all_ids, order, 1)),
    )


def _faiss(items: Tensor, quantized: bool) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise SkipError(f"faiss is not installed ({error})") from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    r = items.shape[1]
    index: Any
    if quantized:
        index = faiss.IndexScalarQuantizer(r, faiss.ScalarQuantizer.QT_bf16, faiss.METRIC_INNER_PRODUCT)
    else:
        index = faiss.IndexFlatIP(r)
    index.add(items.float().numpy())
    return index


def faiss_search(index: Any, queries: Tensor, k: int) -> Result:
    """B M searches for k, merged a user.

    Exact for max over M: a row of the user's top k has its score from the query that wins there, and is among the k
    best of that query, since whatever beats it there beats it for the user too.
    """
    import numpy

    users, count, r = queries.shape
    k = min(k, index.ntotal)
    scores, ids = index.search(queries.reshape(-1, r).numpy(), k)
    scores, ids = scores.reshape(users, -1), ids.reshape(users, -1)
    if count == 1:
        return torch.from_numpy(scores), torch.from_numpy(ids)
    merged_scores = numpy.empty((users, k), numpy.float32)
    merged_ids = numpy.empty((users, k), numpy.int64)
    for user in range(users):
        order = numpy.argsort(-scores[user], kind="stable")
        _, first = numpy.unique(ids[user][order], return_index=True)
        kept = order[numpy.sort(first)[:k]]
        merged_scores[user], merged_ids[user] = scores[user][kept], ids[user][kept]
    return torch.from_numpy(merged_scores), torch.from_numpy(merged_ids)


def _jax(items: Tensor) -> Any:
    try:
        import jax
        import jax.numpy as jnp
    except ImportError as error:
        raise SkipError(f"jax is not installed ({error})") from error

    @functools.partial(jax.jit, static_argnums=2)
    def search(queries: Any, table: Any, k: int) -> Any:
        users, count, r = queries.shape
        dots = (queries.reshape(-1, r) @ table.T).reshape(users, count, -1)
        return jax.lax.top_k(dots.max(1), k)

    return search, jnp.asarray(items.float().numpy())


def jax_search(state: Any, queries: Tensor, k: int) -> Result:
    search, table = state
    users, count, _ = queries.shape
    if users * count * table.shape[0] > _MOST_DOTS // 4:
        raise SkipError("stores all dots in memory, and sorts: too slow to wait for at this size")
    scores, ids = search(queries.numpy(), table, min(k, table.shape[0]))
    scores.block_until_ready()
    # Views of jax's memory; the copies are of B k numbers.
    import numpy

    return torch.from_numpy(numpy.array(scores)), torch.from_numpy(numpy.array(ids)).long()


def _numpy(items: Tensor) -> Any:
    return items.float().numpy()


def _peers() -> list[Peer]:
    peers = []
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for chunk in (8192, 65536, None):
            peers.append(
                Peer(
                    f"torch {label} chunks of {chunk or 'N'}",
                    f"torch {label}",
                    label,
                    dtype == torch.float32,
                    functools.partial(Tensor.to, dtype=dtype),
                    functools.partial(torch_chunked, dtype, chunk),
                )
            )
    for size in (65536, None):
        search = functools.partial(numpy_chunked, size)
        peers.append(Peer(f"numpy chunks of {size or 'N'}", "numpy", "fp32", True, _numpy, search))
    flat = functools.partial(_faiss, quantized=False)
    peers.append(Peer("faiss flat", "faiss flat", "fp32", True, flat, faiss_search))
    # Exact on a table whose values are bfloat16 already: the codes are then the values.
    quantizer = functools.partial(_faiss, quantized=True)
    peers.append(Peer("faiss bf16 quantizer", "faiss bf16", "bf16", True, quantizer, faiss_search))
    peers.append(Peer("jax top_k", "jax", "fp32", True, _jax, jax_search))
    return peers


PEERS = _peers()
