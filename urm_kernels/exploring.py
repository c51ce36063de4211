"""explore_topk: the arguments are checked here, in words, and handed to the op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from . import checks, ops
from .graph import NeighborGraph
from .interop import as_tensor
from .scoring import Reduce, TopK, checked_filters, checked_scoring
from .table import ItemTable


class ExploreStats(NamedTuple):
    """What a walk did; nothing here waits for a device.

    Attributes:
        scored: int64 [rounds, B], rows that were scored in each round.
    """

    scored: Tensor


def explore_topk(
    queries: Tensor,
    items: Tensor | ItemTable,
    graph: NeighborGraph,
    k: int,
    *,
    rounds: int = 4,
    width: int | Sequence[int] | None = None,
    first: int | None = None,
    temperature: float | Tensor = 1.0,
    seed: int | Tensor | Generator | None = None,
    streams: Tensor | None = None,
    projection: Tensor | None = None,
    query_mask: Tensor | None = None,
    reduce: Reduce = "max",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    exclude: Tensor | None = None,
    sparse_grad: bool = False,
    return_stats: bool = False,
    backend: str | None = None,
) -> TopK | tuple[TopK, ExploreStats]:
    """The best of some per cent of the items, found by walking through a graph: fast, and approximate.

    What the Universal Retrieval Model does (URM, arXiv 2502.03041), for comparison with :func:`score_topk`, which is
    exact. The first round scores a random subset of the items. Each further round draws ``width`` of the rows scored so
    far, in proportion to ``softmax(score / temperature)`` and without replacement, takes their neighbours in the graph
    and scores those that are new; a row is drawn once. The result is the top k of all rows scored.

    One round equals, up to rounding and with the scores of ``seen`` rows known::

        drawn = seen[torch.multinomial(torch.softmax(scores[b, seen] / temperature, 0), width)]
        seen = torch.cat([seen, graph.neighbors[drawn].flatten()]).unique()

    Draws are top sums of score / temperature and Gumbel noise (Kool, van Hoof and Welling, ICML 2019), the noise a
    function of (seed, round, stream, row): the result has the same bits on every backend, instruction set, thread count
    and batch, and a user alone equals that user in a batch who has the same stream.

    Args:
        graph: neighbours of the items' rows, on the queries' device.
        rounds: 1 returns the best of the first subset.
        width: rows whose neighbours each round after the first takes, one number for all or one a round. At most
            ``first + sum(width) * graph.degree`` rows are scored. None: k / 2 in the second round, which knows little
            yet, and 3 k / 2 in those that follow, but 32 at least.
        first: rows of the first subset, one of each of as many equal parts of the table; None: N / 50.
        temperature: of the draws; a positive number or scalar tensor. It gets no gradient.
        seed: an integer, an int64 scalar tensor on the queries' device, a torch.Generator, or None for the
            device's default one.
        streams: int64 [B], not negative, names of the users' noise. Default 0, ..., B - 1.
        queries, items, k, projection, query_mask, reduce, bias, mask, exclude, sparse_grad, backend: as in
            :func:`score_topk`. Rows that ``mask``, ``exclude`` and removals forbid are passed through, not returned.
        return_stats: also return :class:`ExploreStats`.

    Returns:
        :class:`TopK`, padded (score -inf, id -1) where fewer rows were scored and allowed; with ``return_stats`` a
        tuple of it and :class:`ExploreStats`. ``scores`` carries gradients as score_topk's do.

    Raises:
        TypeError, ValueError: with the argument's name, what came and what was wanted.
        MemoryError, torch.OutOfMemoryError: what is scored does not fit.

    Memory beyond the result: some 60 bytes a row scored on the CPU, 100 on a GPU; of larger batches some users walk at
    a time, who score about a million rows together, or four million on a GPU.
    """
    table, queries, query_mask = checked_scoring(queries, items, projection, query_mask, reduce, bias)
    users, rows = queries.shape[0], table.items.shape[0]
    mask, exclude = checked_filters(mask, exclude, users, rows, queries)
    if not isinstance(graph, NeighborGraph):
        raise TypeError(f"graph: a NeighborGraph is wanted, {type(graph).__name__} came")
    checks.same_device("graph", graph.neighbors, queries.device)
    if len(graph) != rows:
        raise ValueError(f"graph: neighbours of the N = {rows} rows of items are wanted, those of {len(graph)} came")
    k, rounds = checks.count("k", k), checks.count("rounds", rounds)
    if rounds < 1:
        raise ValueError(f"rounds: at least 1 is wanted, {rounds} came")
    widths = _widths(width, rounds, k)
    first = -(-rows // 50) if first is None else checks.count("first", first)
    temperature = as_tensor("temperature", temperature)
    temperature = checks.temperature(temperature, ops.library.compute_dtype(queries, table.items), queries.device)
    walk = (graph.neighbors, first, widths, temperature.detach(), _seed(seed, queries.device))
    checks.flag("sparse_grad", sparse_grad)
    checks.flag("return_stats", return_stats)
    streams = _streams(streams, users, queries.device)
    options = (query_mask, reduce, mask, exclude, *walk, streams, sparse_grad, checks.backend(backend))
    scores, ids, scored = ops.explore_topk(queries, *table, k, *options)
    found = TopK(scores, ids)
    return (found, ExploreStats(scored)) if return_stats else found


def _widths(width: int | Sequence[int] | None, rounds: int, k: int) -> list[int]:
    """One number for each round after the first."""
    if width is None:
        later = max(3 * k // 2, 32)
        return [max(k // 2, 32), *[later] * (rounds - 2)][: rounds - 1]
    if not isinstance(width, Sequence):
        return [checks.count("width", width)] * (rounds - 1)
    if len(width) != rounds - 1:
        raise ValueError(f"width: a number for each of {rounds - 1} rounds after the first is wanted, {width!r} came")
    return [checks.count("width", number) for number in width]


def _seed(seed: int | Tensor | Generator | None, device: torch.device) -> Tensor:
    """int64 scalar on the device."""
    seed = as_tensor("seed", seed)
    if seed is None:
        return torch.randint(2**63 - 1, (), device=device)
    if isinstance(seed, Generator):
        return torch.randint(2**63 - 1, (), generator=seed, device=seed.device).to(device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim():
            raise TypeError(f"seed: an int64 scalar is wanted, {seed.dtype} {list(seed.shape)} came")
        checks.same_device("seed", seed, device)
        return seed
    return torch.full((), checks.count("seed", seed), dtype=torch.int64, device=device)


def _streams(streams: Tensor | None, users: int, device: torch.device) -> Tensor:
    streams = as_tensor("streams", streams)
    if streams is None:
        return torch.arange(users, device=device)
    checks.streams(streams, users, device)
    return streams
