"""Other ways to the same top k, each with its own prepared state; all results come as torch tensors.

A peer takes float32 queries [B, M, r]; the index or copy that it would build once is made by `prepare` and not timed.
Under sum and mean every one of them adds the queries first, as we do.
Packages are imported when a peer is prepared; one that is missing is a skip with its reason, not an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Result = tuple[Tensor, Tensor]
CHUNKS = (8192, 65536, None)  # rows; None is all
_MOST_DOTS = 1 << 30  # a peer that stores all B x M x N dots is not asked to store more than 4 GiB of them


class SkipError(Exception):
    """Why a peer does not run a cell."""


class Peer(NamedTuple):
    """family: peers of one family are variants of one method, of which the best is reported.

    dtype: "fp32" or "bf16", the class it is compared in. exact: whether it finds the top k of the table it was given,
    up to float32 rounding; the others are shown and never decide a bar. copied: bytes that `prepare` takes for each
    element of the table. chunk: rows whose dots it holds at a time; None is all.
    """

    name: str
    family: str
    dtype: str
    exact: bool
    prepare: Callable[[Tensor], Any]
    find: Callable[[Any, Tensor, int, str], Result]
    copied: int = 0
    chunk: int | None = 0

    @property
    def package(self) -> str:
        return self.family.split()[0]

    def search(self, state: Any, queries: Tensor, k: int, reduce: str = "max") -> Result:
        if reduce in ("sum", "mean"):
            queries, reduce = getattr(queries, reduce)(1, keepdim=True), "max"
        elif reduce == "logsumexp" and self.package != "torch":
            raise SkipError("not written for logsumexp")
        return self.find(state, queries, k, reduce)

    def dots_bytes(self, users: int, count: int, rows: int) -> int:
        """Memory for the dots held at a time, and their maxima."""
        return 4 * users * (count + 1) * (rows if self.chunk is None else min(self.chunk, rows))


def torch_chunked(dtype: torch.dtype, chunk: int | None, items: Tensor, queries: Tensor, k: int, reduce: str) -> Result:
    """Products of `chunk` rows, the reduction over M, top k of the chunk, merged with the best so far.

    chunk: None is all rows.
    """
    users, count, r = queries.shape
    rows = items.shape[0]
    chunk = chunk or rows
    if users * count * chunk > _MOST_DOTS:
        raise SkipError(f"would store {users * count * chunk * 4 / 2**30:.1f} GiB of dots")
    flat = queries.reshape(-1, r).to(dtype)
    best: Result | None = None
    for first in range(0, rows, chunk):
        part = items[first : first + chunk]
        dots = (flat @ part.T).view(users, count, len(part))
        scores = dots.amax(1) if reduce == "max" else dots.logsumexp(1)
        found, ids = scores.topk(min(k, len(part)))
        ids += first
        if best is not None:
            found, ids = torch.cat([best[0], found], 1), torch.cat([best[1], ids], 1)
            found, order = found.topk(min(k, found.shape[1]))
            ids = ids.gather(1, order)
        best = found, ids
    assert best is not None
    return best


def numpy_chunked(chunk: int | None, items: Any, queries: Tensor, k: int, reduce: str) -> Result:
    """As above under max, by numpy: argpartition of each chunk, one sort at the end."""
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


def _faiss(items: Tensor, quantizer: str | None) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise SkipError(f"faiss is not installed ({error})") from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    r = items.shape[1]
    index: Any
    if quantizer:
        index = faiss.IndexScalarQuantizer(r, getattr(faiss.ScalarQuantizer, quantizer), faiss.METRIC_INNER_PRODUCT)
    else:
        index = faiss.IndexFlatIP(r)
    rows = items.float().numpy()
    index.train(rows[:100_000])
    index.add(rows)
    return index


def faiss_search(index: Any, queries: Tensor, k: int, reduce: str) -> Result:
    """B M searches for k, merged a user.

    Exact for max over M: a row of the user's top k has its score from the query that wins there, and is among the k
    best of that query, since whatever beats it there beats it for the user too.
    """
    users, _, r = queries.shape
    k = min(k, index.ntotal)
    scores, ids = index.search(queries.reshape(-1, r).numpy(), k)
    return merged(scores, ids, users, k)


def merged(scores: Any, ids: Any, users: int, k: int) -> Result:
    """The k best of each user, from the (scores, ids) that numpy arrays hold for each of its queries.

    A row that several queries found counts once, with its best score; -inf and -1 where there are fewer than k, as in
    the pads, ids below 0, that came.
    """
    import numpy

    scores, ids = scores.reshape(users, -1), ids.reshape(users, -1)
    order = numpy.argsort(-scores, axis=1, kind="stable")
    scores, ids = numpy.take_along_axis(scores, order, 1), numpy.take_along_axis(ids, order, 1)
    by_id = numpy.argsort(ids, axis=1, kind="stable")  # of a row's places the best one first
    sorted_ids = numpy.take_along_axis(ids, by_id, 1)
    again = sorted_ids < 0
    again[:, 1:] |= sorted_ids[:, 1:] == sorted_ids[:, :-1]
    left_out = numpy.empty_like(again)
    numpy.put_along_axis(left_out, by_id, again, 1)
    kept = numpy.argsort(left_out, axis=1, kind="stable")[:, :k]
    missing = numpy.take_along_axis(left_out, kept, 1)
    scores = numpy.where(missing, -numpy.inf, numpy.take_along_axis(scores, kept, 1))
    ids = numpy.where(missing, -1, numpy.take_along_axis(ids, kept, 1))
    return torch.from_numpy(scores), torch.from_numpy(ids)


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


def jax_search(state: Any, queries: Tensor, k: int, reduce: str) -> Result:
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
        for chunk in CHUNKS:
            peers.append(
                Peer(
                    f"torch {label} chunks of {chunk or 'N'}",
                    f"torch {label}",
                    label,
                    dtype == torch.float32,
                    functools.partial(Tensor.to, dtype=dtype),
                    functools.partial(torch_chunked, dtype, chunk),
                    chunk=chunk,
                )
            )
    for size in CHUNKS[1:]:
        search = functools.partial(numpy_chunked, size)
        peers.append(Peer(f"numpy chunks of {size or 'N'}", "numpy", "fp32", True, _numpy, search, chunk=size))
    flat, eight, half = (functools.partial(_faiss, quantizer=name) for name in (None, "QT_8bit", "QT_bf16"))
    peers.append(Peer("faiss flat", "faiss flat", "fp32", True, flat, faiss_search, copied=4))
    peers.append(Peer("faiss 8-bit quantizer", "faiss 8-bit", "fp32", False, eight, faiss_search, copied=1))
    # Exact on a table whose values are bfloat16 already: the codes are then the values. They come by way of float32.
    peers.append(Peer("faiss bf16 quantizer", "faiss bf16", "bf16", True, half, faiss_search, copied=6))
    peers.append(Peer("jax top_k", "jax", "fp32", True, _jax, jax_search, copied=4, chunk=None))
    return peers


PEERS = _peers()
FAMILIES = tuple(dict.fromkeys(peer.package for peer in PEERS))
