"""The graph that :func:`urm_kernels.explore_topk` walks: which rows are neighbours of which."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import checks, graph_build
from .interop import as_tensor
from .table import ItemTable

Metric = Literal["cosine", "euclidean", "inner"]

_INDICES = (torch.int32, torch.int64)


class NeighborGraph:
    """Neighbours of every row of a table, [N, degree] row indices.

    Made by :meth:`build` with the library's own exact search, or taken from an HNSW index of faiss or hnswlib.

    Attributes:
        neighbors: int32 or int64 [N, degree], contiguous; -1 where a row has fewer neighbours.
    """

    def __init__(self, neighbors: Tensor) -> None:
        """Takes what :meth:`from_neighbors` takes, and raises what it raises."""
        self.neighbors = _checked(neighbors)

    @classmethod
    def from_neighbors(cls, neighbors: Any) -> Self:
        """A graph of given neighbours, not copied where they are contiguous.

        Args:
            neighbors: int32 or int64 [N, degree] row indices below N, -1 pads anywhere; a tensor, or an array of
                NumPy, CuPy, JAX.

        Raises:
            TypeError, ValueError: what is no such tensor, or names a row that does not exist.
        """
        return cls(as_tensor("neighbors", neighbors))

    @classmethod
    def build(
        cls,
        items: Tensor | ItemTable,
        degree: int = 32,
        *,
        metric: Metric = "cosine",
        levels: int = 2,
        thinning: int = 16,
        seed: int = 0,
        progress: Callable[[int, int], object] | None = None,
    ) -> Self:
        """The rows most similar to each row, found exactly by :func:`urm_kernels.score_topk`.

        Equals, up to rounding, for metric "cosine" and one level::

            x = torch.nn.functional.normalize(items)
            (x @ x.T).fill_diagonal_(-torch.inf).topk(degree).indices

        With more levels the degree is shared out: three quarters of a row's neighbours are the nearest of all rows,
        three quarters of the rest those of a random ``thinning``-th of the rows, and so on, as the levels of HNSW hold
        (Malkov and Yashunin, TPAMI 2020). Where rows have many near copies, the nearest rows alone lead nowhere else.

        Args:
            items: [N, r] float32, float16 or bfloat16, or an :class:`ItemTable`, whose bias takes no part and whose
                removed rows are neighbours too.
            degree: neighbours of a row, in all.
            metric: "cosine" (what led to the best items soonest, docs/design.md), "euclidean", or "inner" products,
                under which the longest rows are everybody's neighbours.
            levels: 1 is the plain graph.
            thinning: of a level beside the one before.
            seed: of the levels' rows.
            progress: called with (rows done, rows in all), in place of a progress bar, which comes after two seconds on
                a terminal where tqdm is installed.

        Raises:
            TypeError, ValueError: with the argument's name, what came and what was wanted.

        Memory: the graph, int32 [N, degree], and on the CPU codes and a float32 copy of the rows. Every row is compared
        with every other: N = 1e5 takes a minute, N = 1e6 a hundred times as long (docs/design.md).
        """
        rows = items.factors if isinstance(items, ItemTable) else as_tensor("items", items)
        return cls(graph_build.build(rows, degree, metric, levels, thinning, seed, progress))

    @classmethod
    def from_faiss(cls, index: Any) -> Self:
        """Level 0 of an HNSW index of faiss (``IndexHNSWFlat`` and its kin), whose n-th vector is row n.

        Raises TypeError for what has no ``hnsw``.
        """
        found = getattr(index, "hnsw", None)
        if found is None:
            raise TypeError(f"index: a faiss index with `hnsw` is wanted, {type(index).__name__} came")
        import faiss

        starts = torch.from_numpy(faiss.vector_to_array(found.offsets).astype("int64"))[: index.ntotal]
        degree = found.nb_neighbors(0)
        links = torch.from_numpy(faiss.vector_to_array(found.neighbors))
        return cls(links[starts[:, None] + torch.arange(degree)].int())

    @classmethod
    def from_hnswlib(cls, index: Any) -> Self:
        """Level 0 of an ``hnswlib.Index`` whose labels are the rows 0, ..., N - 1, added in any order.

        Raises TypeError for another kind of index, and ValueError for other labels.
        """
        if not hasattr(index, "get_current_count") or not hasattr(index, "__getstate__"):
            raise TypeError(f"index: an hnswlib.Index is wanted, {type(index).__name__} came")
        return cls(graph_build.hnswlib_links(index.__getstate__()[0]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one .safetensors file."""
        save_file({"neighbors": self.neighbors.cpu()}, str(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Self:
        """What :meth:`save` wrote. Raises ValueError for a file that is none, or is damaged."""
        if not Path(path).exists():
            raise FileNotFoundError(f"path: {path} does not exist")
        try:
            held = load_file(str(path), device=str(device))
        except SafetensorError as error:
            raise ValueError(f"path: {path} is no .safetensors file that can be read: {error}") from error
        if set(held) != {"neighbors"}:
            raise ValueError(f"path: {path} holds {', '.join(sorted(held)) or 'nothing'}, `neighbors` alone is wanted")
        return cls(held["neighbors"])

    def to(self, device: str | torch.device) -> NeighborGraph:
        """The same graph on a device; this one where it is there already."""
        moved = self.neighbors.to(device)
        return self if moved is self.neighbors else NeighborGraph(moved)

    @property
    def degree(self) -> int:
        """The most neighbours that a row has."""
        return self.neighbors.shape[1]

    def __len__(self) -> int:
        return self.neighbors.shape[0]

    def __repr__(self) -> str:
        where = self.neighbors.device
        return f"NeighborGraph(rows={len(self)}, degree={self.degree}, {self.neighbors.dtype}, device={where})"


def _checked(neighbors: Any) -> Tensor:
    if not isinstance(neighbors, Tensor):
        raise TypeError(f"neighbors: a torch.Tensor is wanted, {type(neighbors).__name__} came")
    if neighbors.dtype not in _INDICES:
        raise TypeError(f"neighbors: dtype torch.int32 or torch.int64 is wanted, {neighbors.dtype} came")
    if neighbors.dim() != 2:
        raise ValueError(f"neighbors: shape [N, degree] is wanted, {list(neighbors.shape)} came")
    checks.number_of_rows("neighbors", neighbors.shape[0])
    if neighbors.numel():
        low, high = (int(bound) for bound in neighbors.aminmax())
        if low < -1 or high >= len(neighbors):
            bad = low if low < -1 else high
            raise ValueError(f"neighbors: rows from -1 to {len(neighbors) - 1} are wanted, {bad} came")
    return neighbors.contiguous()
